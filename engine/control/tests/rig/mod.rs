//! A few control cores in one thread with virtual time: just enough of an environment to run the real
//! thing, metadata voter included. (The simulator does the same with faults.)
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)] // every test uses its own part

use control::{ControlConfig, ControlCore, ControlStatus, MetaRegion, Planted, StatusInner, Voter};
use engine::CoreMsg;
use engine::msg::Opened;
use placement::{Disk, Slice};
use reactor::*;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use wire::control::{ControlMsg, Hello, Role};
use wire::{
    BlockCrcs, CONTROL_CORE, ClusterId, CoreId, DiskUuid, FrameKind, Header, NodeId, SessionId, SliceId,
    block_crc,
};

pub const MS: u64 = 1_000_000;
pub const CLUSTER: ClusterId = ClusterId(0xc1);
const NET_NS: u64 = 50_000;
const DISK_NS: u64 = 100_000;
const DISK_BYTES: usize = 16 << 20;

struct End {
    owner: usize,
    peer: ConnId,
}

#[derive(Default)]
struct Shared {
    now: u64,
    seq: u64,
    next_conn: u64,
    queue: BTreeMap<(u64, u64), (usize, Event)>,
    listeners: BTreeMap<SocketAddr, (usize, Token)>,
    conns: BTreeMap<ConnId, End>,
    disks: BTreeMap<usize, Vec<u8>>,
    mesh: Vec<(usize, CoreId, CoreMsg)>,
    /// Nodes whose frames are lost, both ways.
    cut: BTreeSet<usize>,
    /// By how much wall clocks are wrong, in milliseconds.
    wall_off: BTreeMap<usize, i64>,
}

impl Shared {
    fn at(&mut self, delay: u64, to: usize, event: Event) {
        self.seq += 1;
        self.queue.insert((self.now + delay, self.seq), (to, event));
    }

    /// Ends a connection for both sides.
    fn end(&mut self, conn: ConnId, mine: CloseReason, theirs: CloseReason) {
        let Some(end) = self.conns.remove(&conn) else { return };
        self.at(NET_NS, end.owner, Event::Closed { conn, reason: mine });
        if let Some(other) = self.conns.remove(&end.peer) {
            self.at(NET_NS, other.owner, Event::Closed { conn: end.peer, reason: theirs });
        }
    }
}

/// One participant's environment.
pub struct RigEnv {
    me: usize,
    shared: Rc<RefCell<Shared>>,
    random: u64,
    arena: Arena,
}

impl Clock for RigEnv {
    fn now(&self) -> Mono {
        Mono(self.shared.borrow().now)
    }
    fn wall(&self) -> WallMs {
        let shared = self.shared.borrow();
        let off = shared.wall_off.get(&self.me).copied().unwrap_or(0);
        WallMs((1_700_000_000_000 + shared.now / MS).saturating_add_signed(off))
    }
}

impl Rng for RigEnv {
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Timers for RigEnv {
    fn set_timer(&mut self, at: Mono, token: Token) {
        let mut shared = self.shared.borrow_mut();
        let delay = at.0.saturating_sub(shared.now);
        shared.at(delay, self.me, Event::Timer { token });
    }
}

impl reactor::Disk for RigEnv {
    fn disk_info(&self, _disk: DiskIndex) -> Option<DiskInfo> {
        Some(DiskInfo { size_bytes: DISK_BYTES as u64, atomic_bytes: 4096, write_through: true })
    }
    fn submit(&mut self, disk: DiskIndex, mut op: DiskOp, token: Token) -> Result<(), (Full, DiskOp)> {
        let mut shared = self.shared.borrow_mut();
        let bytes = shared.disks.entry(self.me).or_insert_with(|| vec![0; DISK_BYTES]);
        match &mut op {
            DiskOp::Read { offset, buf } => {
                let at = *offset as usize;
                let len = buf.len();
                buf.as_mut_slice().unwrap().copy_from_slice(&bytes[at..at + len]);
            }
            DiskOp::Write { offset, bufs, .. } => {
                let mut at = *offset as usize;
                for buf in bufs {
                    bytes[at..at + buf.len()].copy_from_slice(buf.as_slice());
                    at += buf.len();
                }
            }
            DiskOp::Flush | DiskOp::Discard { .. } => {}
        }
        shared.at(DISK_NS, self.me, Event::DiskDone { disk, token, result: Ok(()), op });
        Ok(())
    }
}

impl Net for RigEnv {
    fn listen(&mut self, at: SocketAddr, _: Framing, token: Token) -> Result<SocketAddr, NetError> {
        let mut shared = self.shared.borrow_mut();
        if shared.listeners.contains_key(&at) {
            return Err(NetError::InUse);
        }
        shared.listeners.insert(at, (self.me, token));
        Ok(at)
    }
    fn connect(&mut self, to: SocketAddr, _: Framing) -> ConnId {
        let mut shared = self.shared.borrow_mut();
        shared.next_conn += 2;
        let (mine, theirs) = (ConnId(shared.next_conn), ConnId(shared.next_conn + 1));
        match shared.listeners.get(&to).copied() {
            Some((owner, _)) if shared.cut.contains(&self.me) || shared.cut.contains(&owner) => {
                let reason = CloseReason::TimedOut;
                shared.at(CONNECT_TIMEOUT_MS * MS, self.me, Event::Closed { conn: mine, reason });
            }
            Some((owner, token)) => {
                shared.conns.insert(mine, End { owner: self.me, peer: theirs });
                shared.conns.insert(theirs, End { owner, peer: mine });
                let from = SocketAddr::from(([127, 0, 0, 1], 1));
                shared.at(NET_NS, owner, Event::Accepted { conn: theirs, token, from });
                shared.at(NET_NS, self.me, Event::Connected { conn: mine });
            }
            None => {
                let reason = CloseReason::Refused;
                shared.at(NET_NS, self.me, Event::Closed { conn: mine, reason });
            }
        }
        mine
    }
    fn send(&mut self, conn: ConnId, frame: Frame) -> Result<(), Full> {
        assert_eq!(frame.header.payload_len as usize, frame.payload.as_ref().map_or(0, IoBuf::len));
        let mut shared = self.shared.borrow_mut();
        let Some(peer) = shared.conns.get(&conn).map(|end| end.peer) else { return Ok(()) };
        let Some(owner) = shared.conns.get(&peer).map(|end| end.owner) else { return Ok(()) };
        if !shared.cut.contains(&owner) && !shared.cut.contains(&self.me) {
            shared.at(NET_NS, owner, Event::Frame { conn: peer, frame });
        }
        Ok(())
    }
    fn send_bytes(&mut self, conn: ConnId, bytes: IoBuf) -> Result<(), Full> {
        let mut shared = self.shared.borrow_mut();
        let Some(peer) = shared.conns.get(&conn).map(|end| end.peer) else { return Ok(()) };
        let Some(owner) = shared.conns.get(&peer).map(|end| end.owner) else { return Ok(()) };
        shared.at(NET_NS, owner, Event::Bytes { conn: peer, bytes });
        Ok(())
    }
    fn close(&mut self, conn: ConnId, _after_flush: bool) {
        self.shared.borrow_mut().end(conn, CloseReason::Local, CloseReason::Peer);
    }
}

impl Mesh for RigEnv {
    fn core(&self) -> CoreId {
        CONTROL_CORE
    }
    fn post(&mut self, to: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        let msg = CoreMsg::from_mesh(msg).expect("only core messages");
        self.shared.borrow_mut().mesh.push((self.me, to, msg));
        Ok(())
    }
}

impl Buffers for RigEnv {
    fn arena(&self) -> &Arena {
        &self.arena
    }
}

/// A participant: a node with its control core, or a bare client.
struct Party {
    env: RigEnv,
    service: Option<ControlCore>,
    inbox: Vec<Event>,
    status: Arc<ControlStatus>,
}

pub struct Rig {
    shared: Rc<RefCell<Shared>>,
    parties: Vec<Party>,
    pub voters: Vec<Voter>,
}

/// The control address of a node.
pub fn address(node: u64) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7000 + node as u16))
}

pub fn http_address(node: u64) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9000 + node as u16))
}

pub fn slice(node: u64, core: u16) -> SliceId {
    SliceId(node * 10 + u64::from(core))
}

impl Rig {
    /// No node yet; these will be the voters.
    pub fn new(voters: &[u64]) -> Self {
        let voters = voters.iter().map(|id| Voter { node: NodeId(*id), addr: address(*id) }).collect();
        Self { shared: Rc::default(), parties: Vec::new(), voters }
    }

    pub fn now_ms(&self) -> u64 {
        self.shared.borrow().now / MS
    }

    pub fn config(&self, id: u64) -> ControlConfig {
        let slices = (0..2).map(|core| Slice { id: slice(id, core), core, size_bytes: 1 << 30 }).collect();
        ControlConfig {
            node: NodeId(id),
            host: format!("host{id}"),
            cluster: CLUSTER,
            control_listen: address(id),
            advertise: [127, 0, 0, 1].into(),
            http_listen: Some(http_address(id)),
            links: Some(control::LinksPage::new(|| "[]".to_owned())),
            voters: self.voters.clone(),
            meta: Some(MetaRegion { disk: DiskIndex(0), offset: 0, len: 8 << 20 }),
            data_cores: 2,
            disks: vec![Disk { uuid: DiskUuid(u128::from(id)), path: String::new(), slices }],
            problems: Vec::new(),
            session: None,
            lease_ttl_ms: control::LEASE_TTL_MS,
            lease_renew_ms: control::LEASE_RENEW_MS,
            registry: prometheus::Registry::new(),
            status: Arc::default(),
            version: "test".into(),
            planted: Planted::none(),
            meta_planted: consensus::planted::Planted::none(),
        }
    }

    fn party(&mut self, service: Option<ControlCore>, status: Arc<ControlStatus>) -> usize {
        let me = self.parties.len();
        let arena = Arena::new(4 << 20).unwrap();
        let env = RigEnv { me, shared: self.shared.clone(), random: me as u64 * 7919 + 1, arena };
        self.parties.push(Party { env, service, inbox: Vec::new(), status });
        me
    }

    /// Starts a node; its data cores report at once. `disk_of` is an earlier run whose disk it takes over.
    pub fn start(&mut self, config: ControlConfig, disk_of: Option<usize>) -> usize {
        let id = config.node.0;
        let me = self.party(Some(ControlCore::new(config.clone())), config.status.clone());
        if let Some(disk) = disk_of.and_then(|old| self.shared.borrow_mut().disks.remove(&old)) {
            self.shared.borrow_mut().disks.insert(me, disk);
        }
        let party = &mut self.parties[me];
        let service = party.service.as_mut().unwrap();
        service.start(&mut party.env);
        service.flush(&mut party.env);
        // Every start finds its slices further than the one before left them.
        let generation = self.shared.borrow().seq + 1;
        for core in 0..2 {
            let addr = SocketAddr::from(([127, 0, 0, 1], 8000 + id as u16 * 10 + core));
            self.tell(me, core, CoreMsg::Listening { addr });
            self.tell(
                me,
                core,
                CoreMsg::SliceOpened {
                    slice: slice(id, core),
                    result: Ok(Opened { size_bytes: 1 << 30, generation }),
                },
            );
        }
        me
    }

    pub fn start_node(&mut self, id: u64) -> usize {
        let config = self.config(id);
        self.start(config, None)
    }

    /// Participants' wall clocks are wrong by so much from now on.
    pub fn set_clocks(&mut self, off_ms: &[(usize, i64)]) {
        self.shared.borrow_mut().wall_off = off_ms.iter().copied().collect();
    }

    /// A data core says something.
    pub fn tell(&mut self, node: usize, core: u16, msg: CoreMsg) {
        let event = Event::Mesh { from: CoreId(core), msg: msg.into_mesh() };
        self.shared.borrow_mut().at(1000, node, event);
    }

    /// What the data cores of a node were told so far.
    pub fn told(&self, node: usize) -> Vec<(CoreId, String)> {
        let shared = self.shared.borrow();
        shared
            .mesh
            .iter()
            .filter(|(n, ..)| *n == node)
            .map(|(_, core, msg)| (*core, format!("{msg:?}")))
            .collect()
    }

    pub fn with_told<T>(&self, node: usize, f: impl FnMut(&(usize, CoreId, CoreMsg)) -> Option<T>) -> Vec<T> {
        let shared = self.shared.borrow();
        shared.mesh.iter().filter(|(n, ..)| *n == node).filter_map(f).collect()
    }

    pub fn status(&self, node: usize) -> StatusInner {
        self.parties[node].status.get()
    }

    pub fn core(&self, node: usize) -> &ControlCore {
        self.parties[node].service.as_ref().unwrap()
    }

    /// The process is gone.
    pub fn kill(&mut self, node: usize) {
        self.parties[node].service = None;
        let mut shared = self.shared.borrow_mut();
        shared.listeners.retain(|_, (owner, _)| *owner != node);
        let conns: Vec<ConnId> =
            shared.conns.iter().filter(|(_, end)| end.owner == node).map(|(conn, _)| *conn).collect();
        for conn in conns {
            shared.end(conn, CloseReason::Local, CloseReason::Peer);
        }
    }

    /// Frames from and to the node are lost, or no longer.
    pub fn cut(&mut self, node: usize, cut: bool) {
        let mut shared = self.shared.borrow_mut();
        if cut {
            shared.cut.insert(node);
        } else {
            shared.cut.remove(&node);
        }
    }

    /// Delivers the next event; false when there is none before `until`.
    fn step(&mut self, until: u64) -> bool {
        let (to, event) = {
            let mut shared = self.shared.borrow_mut();
            let Some(entry) = shared.queue.first_entry() else { return false };
            let (at, _) = *entry.key();
            if at > until {
                return false;
            }
            let next = entry.remove();
            shared.now = shared.now.max(at);
            next
        };
        let Party { env, service, inbox, .. } = &mut self.parties[to];
        match service {
            Some(service) => {
                service.event(env, event);
                service.flush(env);
                if service.finished() {
                    self.kill(to);
                }
            }
            None => inbox.push(event),
        }
        true
    }

    /// Runs until the condition holds; panics after `limit_ms`. Returns how long it took.
    pub fn until(&mut self, limit_ms: u64, what: &str, mut done: impl FnMut(&Rig) -> bool) -> u64 {
        let from = self.now_ms();
        let limit = self.shared.borrow().now + limit_ms * MS;
        while !done(self) {
            assert!(self.step(limit), "{what}: not within {limit_ms} ms");
        }
        self.now_ms() - from
    }

    pub fn run(&mut self, ms: u64) {
        let until = self.shared.borrow().now + ms * MS;
        while self.step(until) {}
        self.shared.borrow_mut().now = until;
    }

    /// A client.
    pub fn client(&mut self) -> Client {
        Client { me: self.party(None, Arc::default()), conn: ConnId(0), tickets: 0 }
    }
}

/// A connection to a control core, driven by hand.
pub struct Client {
    me: usize,
    pub conn: ConnId,
    tickets: u64,
}

pub fn frame(kind: FrameKind, bytes: &[u8]) -> Frame {
    let header = Header { payload_len: bytes.len() as u32, ..Header::new(kind, 0) };
    Frame { header, crcs: BlockCrcs::one(block_crc(bytes)), payload: Some(IoBuf::copy_of(bytes).unwrap()) }
}

impl Client {
    pub fn connect(&mut self, rig: &mut Rig, to: SocketAddr, framing: Framing) {
        self.conn = rig.parties[self.me].env.connect(to, framing);
        let (me, conn) = (self.me, self.conn);
        rig.until(100, "connected", |rig| {
            rig.parties[me].inbox.iter().any(|e| matches!(e, Event::Connected { conn: c } if *c == conn))
        });
    }

    pub fn send(&mut self, rig: &mut Rig, frame: Frame) {
        rig.parties[self.me].env.send(self.conn, frame).unwrap();
    }

    pub fn send_bytes(&mut self, rig: &mut Rig, bytes: &[u8]) {
        let bytes = IoBuf::copy_of(bytes).unwrap();
        rig.parties[self.me].env.send_bytes(self.conn, bytes).unwrap();
    }

    pub fn is_closed(&self, rig: &Rig) -> bool {
        let closed = |e: &Event| matches!(e, Event::Closed { conn, .. } if *conn == self.conn);
        rig.parties[self.me].inbox.iter().any(closed)
    }

    /// All bytes received on the connection.
    pub fn bytes(&self, rig: &Rig) -> String {
        let mut out = Vec::new();
        for event in &rig.parties[self.me].inbox {
            if let Event::Bytes { conn, bytes } = event
                && *conn == self.conn
            {
                out.extend_from_slice(bytes.as_slice());
            }
        }
        String::from_utf8(out).unwrap()
    }

    fn frames(&self, rig: &Rig) -> Vec<(FrameKind, Vec<u8>)> {
        let of = |e: &Event| match e {
            Event::Frame { conn, frame } if *conn == self.conn => {
                Some((frame.header.kind, frame.payload.as_ref().unwrap().as_slice().to_vec()))
            }
            _ => None,
        };
        rig.parties[self.me].inbox.iter().filter_map(of).collect()
    }

    pub fn hellos(&self, rig: &Rig) -> Vec<Hello> {
        let frames = self.frames(rig).into_iter();
        frames.filter(|(k, _)| *k == FrameKind::Hello).map(|(_, b)| Hello::decode(&b).unwrap()).collect()
    }

    pub fn messages(&self, rig: &Rig) -> Vec<ControlMsg> {
        let frames = self.frames(rig).into_iter();
        frames
            .filter(|(k, _)| *k == FrameKind::Control)
            .map(|(_, b)| ControlMsg::decode(&b).unwrap())
            .collect()
    }

    pub fn hello(&mut self, rig: &mut Rig, cluster: Option<ClusterId>) -> Hello {
        let hello = Hello { cluster, role: Role::Client, session: SessionId(5), incarnation: 1, refused: 0 };
        self.send(rig, frame(FrameKind::Hello, &hello.encode()));
        rig.until(100, "hello", |rig| !self.hellos(rig).is_empty());
        self.hellos(rig).remove(0)
    }

    pub fn tell(&mut self, rig: &mut Rig, msg: &ControlMsg) {
        self.send(rig, frame(FrameKind::Control, &msg.encode()));
    }

    /// Connects and greets.
    pub fn open(&mut self, rig: &mut Rig, node: u64) {
        self.connect(rig, address(node), Framing::Frames);
        assert_eq!(self.hello(rig, None).refused, 0);
    }

    pub fn ask(&mut self, rig: &mut Rig, request: wire::control::MetaRequest) -> wire::control::MetaReply {
        self.tickets += 1;
        let ticket = self.tickets;
        self.tell(rig, &ControlMsg::Meta { ticket, request });
        let answer = |rig: &Rig| {
            self.messages(rig).into_iter().find_map(|msg| match msg {
                ControlMsg::MetaReply { ticket: t, reply } if t == ticket => Some(reply),
                _ => None,
            })
        };
        rig.until(8000, "answer", |rig| answer(rig).is_some());
        answer(rig).unwrap()
    }

    /// Reads what an administrative function needs.
    pub fn read(&mut self, rig: &mut Rig, prefixes: &[String]) -> control::admin::Keys {
        let mut keys = control::admin::Keys::default();
        for request in control::admin::ranges(prefixes) {
            keys.add(self.ask(rig, request)).unwrap();
        }
        keys
    }
}
