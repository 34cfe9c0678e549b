//! A client, its environment and a cluster in one thread. Nothing happens by itself: `step` makes one thing
//! happen, drawn from the seed; time moves only when nothing else can.

use crate::allocations;
use crate::cluster::{FakeCluster, Packet};
use client::{
    AdminDone, AdminTicket, ClientCore, ImageHandle, IoDone, Op, OpenMode, Options, SubmitError, Ticket,
};
use reactor::*;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use wire::CoreId;

pub fn addr(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// One connection, both ends.
pub struct Pipe {
    pub to: SocketAddr,
    /// Sent by the client and not handled by the cluster.
    inbox: Vec<Vec<u8>>,
    /// Answers on their way to the client.
    outbox: VecDeque<Vec<u8>>,
    /// The client still has it.
    open: bool,
    /// The connection's first event is still to come.
    fresh: bool,
    /// To be told to the client.
    closing: Option<CloseReason>,
    expected: BTreeMap<u64, IoBuf>,
}

pub struct TestEnv {
    now: Mono,
    random: u64,
    arena: Arena,
    timers: Vec<(Mono, Token)>,
    pub pipes: BTreeMap<u64, Pipe>,
    next_conn: u64,
    /// The transport uses what `expect` offers.
    pub deliver_in_place: bool,
    /// Frames a connection holds before it refuses more.
    pub queue_frames: usize,
    /// Frames vanish instead of being stored: for counting the client's own allocations.
    pub blackhole: bool,
    pub black: Vec<(u64, u64, wire::Header)>,
}

impl TestEnv {
    pub fn draw(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) % below.max(1)
    }
}

impl Clock for TestEnv {
    fn now(&self) -> Mono {
        self.now
    }
    fn wall(&self) -> WallMs {
        WallMs(0)
    }
}
impl Rng for TestEnv {
    fn random(&mut self) -> u64 {
        self.draw(1 << 31) << 31 | self.draw(1 << 31)
    }
}
impl Timers for TestEnv {
    fn set_timer(&mut self, at: Mono, token: Token) {
        allocations::uncounted(|| self.timers.push((at, token)));
    }
}
impl Disk for TestEnv {
    fn disk_info(&self, _: DiskIndex) -> Option<DiskInfo> {
        None
    }
    fn submit(&mut self, _: DiskIndex, op: DiskOp, _: Token) -> Result<(), (Full, DiskOp)> {
        Err((Full, op))
    }
}
impl Net for TestEnv {
    fn listen(&mut self, _: SocketAddr, _: Framing, _: Token) -> Result<SocketAddr, NetError> {
        Err(NetError::InUse)
    }
    fn connect(&mut self, to: SocketAddr, framing: Framing) -> ConnId {
        assert_eq!(framing, Framing::Frames);
        self.next_conn += 1;
        let pipe = Pipe {
            to,
            inbox: Vec::new(),
            outbox: VecDeque::new(),
            open: true,
            fresh: true,
            closing: None,
            expected: BTreeMap::new(),
        };
        self.pipes.insert(self.next_conn, pipe);
        ConnId(self.next_conn)
    }
    fn send(&mut self, conn: ConnId, frame: Frame) -> Result<(), Full> {
        allocations::uncounted(|| {
            if self.blackhole {
                self.black.push((conn.0, frame.header.request, frame.header));
                return Ok(());
            }
            let Some(pipe) = self.pipes.get_mut(&conn.0).filter(|pipe| pipe.open) else { return Ok(()) };
            if pipe.inbox.len() >= self.queue_frames {
                return Err(Full);
            }
            let payload = frame.payload.as_ref().map_or(Vec::new(), |p| p.as_slice().to_vec());
            assert_eq!(frame.header.payload_len as usize, payload.len());
            pipe.inbox.push(Packet { header: frame.header, crcs: frame.crcs, payload }.encode());
            Ok(())
        })
    }
    fn send_bytes(&mut self, _: ConnId, _: IoBuf) -> Result<(), Full> {
        Err(Full)
    }
    fn close(&mut self, conn: ConnId, _: bool) {
        if let Some(pipe) = self.pipes.get_mut(&conn.0).filter(|pipe| pipe.open) {
            pipe.closing.get_or_insert(CloseReason::Local);
        }
    }
    fn expect(&mut self, conn: ConnId, request: u64, into: IoBuf) {
        if self.deliver_in_place
            && !self.blackhole
            && let Some(pipe) = self.pipes.get_mut(&conn.0)
        {
            pipe.expected.insert(request, into);
        }
    }
}
impl Mesh for TestEnv {
    fn core(&self) -> CoreId {
        CoreId(0)
    }
    fn post(&mut self, _: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        Err((Full, msg))
    }
}
impl Buffers for TestEnv {
    fn arena(&self) -> &Arena {
        &self.arena
    }
}

pub struct World {
    pub client: ClientCore,
    pub env: TestEnv,
    pub cluster: FakeCluster,
    /// The cluster answers data requests; when false they stay unanswered.
    pub answering: bool,
    /// The cluster answers control frames.
    pub control_answering: bool,
}

pub const NODES: usize = 3;

impl World {
    pub fn new(seed: u64, options: Options, size_bytes: u64) -> Self {
        let addrs: Vec<_> = (0..NODES as u16).map(|i| (addr(100 + i), addr(200 + i))).collect();
        let cluster = FakeCluster::new(&addrs, size_bytes);
        let control = addrs.iter().map(|(control, _)| *control).collect();
        let mut world = Self {
            client: ClientCore::new(control, options),
            env: TestEnv {
                now: Mono(1_000_000),
                random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678,
                arena: Arena::new(64 << 20).unwrap(),
                timers: Vec::new(),
                pipes: BTreeMap::new(),
                next_conn: 0,
                deliver_in_place: true,
                queue_frames: 4096,
                blackhole: false,
                black: Vec::new(),
            },
            cluster,
            answering: true,
            control_answering: true,
        };
        world.client.start(&mut world.env);
        world
    }

    /// A world with the image `disk` open.
    pub fn opened(seed: u64, options: Options, size_bytes: u64) -> (Self, ImageHandle) {
        let mut world = Self::new(seed, options, size_bytes);
        let ticket = world.client.open(&mut world.env, "disk", OpenMode::ReadWrite);
        let image = world.wait_open(ticket).expect("the image opens");
        (world, image)
    }

    pub fn wait_open(&mut self, ticket: AdminTicket) -> Result<ImageHandle, client::AdminError> {
        match self.wait_admin() {
            AdminDone::Opened { ticket: of, result } if of == ticket => result,
            other => panic!("{other:?} instead of the opening"),
        }
    }

    pub fn wait_admin(&mut self) -> AdminDone {
        for _ in 0..100_000 {
            if let Some(done) = self.client.poll_admin() {
                return done;
            }
            self.step();
        }
        panic!("no answer to an administrative request");
    }

    pub fn wait_io(&mut self) -> IoDone {
        for _ in 0..100_000 {
            if let Some(done) = self.client.poll() {
                return done;
            }
            self.step();
        }
        panic!("no operation completes");
    }

    pub fn submit(&mut self, image: ImageHandle, op: Op, user: u64) -> Result<Ticket, SubmitError> {
        self.client.submit(&mut self.env, image, op, user).map_err(|(error, _)| error)
    }

    /// Connects the client to every primary.
    pub fn warm_up(&mut self, image: ImageHandle) {
        for stripe in 0..16 {
            let offset = stripe * placement::PG_STRIPE_OBJECTS * wire::OBJECT_BYTES as u64;
            assert_eq!(self.perform(image, Op::Read { offset, buf: empty(1) }).result, Ok(()));
        }
        assert_eq!(self.conns_to(|to| to.port() >= 200).len(), NODES);
    }

    /// Performs one operation.
    pub fn perform(&mut self, image: ImageHandle, op: Op) -> IoDone {
        let ticket = self.submit(image, op, 0).expect("accepted");
        let done = self.wait_io();
        assert_eq!(done.ticket, ticket);
        done
    }

    pub fn now_ms(&self) -> u64 {
        self.env.now.0 / 1_000_000
    }

    fn event(&mut self, event: Event) {
        self.client.event(&mut self.env, event);
        self.client.flush(&mut self.env);
    }

    /// Breaks a connection: the client hears of it, and what the cluster has of it may still be performed.
    pub fn cut(&mut self, conn: u64) {
        if let Some(pipe) = self.env.pipes.get_mut(&conn).filter(|pipe| pipe.open) {
            pipe.closing.get_or_insert(CloseReason::Broken(104));
        }
    }

    /// A node's process dies, with all its connections and whatever it had received.
    pub fn kill(&mut self, node: usize) {
        let (control, core) = (self.cluster.nodes[node].control, self.cluster.nodes[node].core);
        for pipe in self.env.pipes.values_mut().filter(|pipe| pipe.to == control || pipe.to == core) {
            pipe.inbox.clear();
            if pipe.open {
                pipe.closing.get_or_insert(CloseReason::Broken(104));
            }
        }
        self.cluster.kill(node);
    }

    /// Open connections to an address.
    pub fn conns_to(&self, to: impl Fn(SocketAddr) -> bool) -> Vec<u64> {
        let open = self.env.pipes.iter().filter(|(_, pipe)| pipe.open && to(pipe.to));
        open.map(|(conn, _)| *conn).collect()
    }

    /// Data frames that the cluster has and has not answered.
    pub fn pending_data(&self) -> usize {
        let data = |pipe: &&Pipe| (200..300).contains(&pipe.to.port());
        self.env.pipes.values().filter(data).map(|pipe| pipe.inbox.len()).sum()
    }

    /// Makes one thing happen.
    pub fn step(&mut self) {
        for (conn, packet) in std::mem::take(&mut self.cluster.pushed) {
            if let Some(pipe) = self.env.pipes.get_mut(&conn) {
                pipe.outbox.push_back(packet.encode());
            }
        }
        #[derive(Clone, Copy)]
        enum Act {
            Close(u64),
            Connected(u64),
            Serve(u64),
            Deliver(u64),
        }
        let mut acts = Vec::new();
        for (conn, pipe) in &self.env.pipes {
            let control = (100..200).contains(&pipe.to.port());
            let answers = if control { self.control_answering } else { self.answering };
            if pipe.closing.is_some() {
                acts.push(Act::Close(*conn));
            } else if pipe.open && pipe.fresh {
                acts.push(Act::Connected(*conn));
            }
            // What has reached the cluster may be performed although the connection has ended.
            if !pipe.inbox.is_empty() && answers {
                acts.push(Act::Serve(*conn));
            }
            if pipe.open && pipe.closing.is_none() && !pipe.fresh && !pipe.outbox.is_empty() {
                acts.push(Act::Deliver(*conn));
            }
        }
        if acts.is_empty() {
            return self.pass_time();
        }
        let choice = self.env.draw(acts.len() as u64) as usize;
        match acts[choice] {
            Act::Close(conn) => self.close(conn),
            Act::Connected(conn) => self.connect(conn),
            Act::Serve(conn) => self.serve(conn),
            Act::Deliver(conn) => self.deliver(conn),
        }
        if self.env.draw(8) == 0 {
            self.env.now = self.env.now.plus_ns(self.env.random % 300_000);
            self.fire_timers();
        }
    }

    /// Lets the next timer fire.
    fn pass_time(&mut self) {
        let next = self.env.timers.iter().map(|(at, _)| *at).min().expect("the client keeps a timer");
        self.env.now = self.env.now.max(next);
        self.fire_timers();
    }

    /// Nobody polls the client for a while.
    pub fn sleep_ms(&mut self, ms: u64) {
        self.env.now = self.env.now.plus_ms(ms);
        self.fire_timers();
    }

    fn fire_timers(&mut self) {
        let now = self.env.now;
        while let Some(place) = self.env.timers.iter().position(|(at, _)| *at <= now) {
            let (_, token) = self.env.timers.swap_remove(place);
            self.event(Event::Timer { token });
        }
    }

    fn close(&mut self, conn: u64) {
        let pipe = self.env.pipes.get_mut(&conn).unwrap();
        let reason = pipe.closing.take().unwrap();
        pipe.outbox.clear();
        pipe.expected.clear();
        let told = std::mem::replace(&mut pipe.open, false);
        self.cluster.forget(conn);
        if told {
            self.event(Event::Closed { conn: ConnId(conn), reason });
        }
    }

    fn connect(&mut self, conn: u64) {
        let pipe = self.env.pipes.get_mut(&conn).unwrap();
        pipe.fresh = false;
        if self.cluster.listens(pipe.to) {
            self.event(Event::Connected { conn: ConnId(conn) });
        } else {
            pipe.closing = Some(CloseReason::Refused);
        }
    }

    /// The cluster handles a frame: greetings and control in order, data in any.
    fn serve(&mut self, conn: u64) {
        let pipe = self.env.pipes.get_mut(&conn).unwrap();
        let control = (100..200).contains(&pipe.to.port());
        let greeting = Packet::decode(&pipe.inbox[0]).header.kind == wire::FrameKind::Hello;
        let to = pipe.to;
        let choice = if control || greeting { 0 } else { self.env.draw(u64::MAX >> 33) as usize };
        let pipe = self.env.pipes.get_mut(&conn).unwrap();
        let bytes = pipe.inbox.remove(choice % pipe.inbox.len());
        if !self.cluster.listens(to) {
            return;
        }
        for reply in self.cluster.answer(to, conn, &Packet::decode(&bytes)) {
            self.env.pipes.get_mut(&conn).unwrap().outbox.push_back(reply.encode());
        }
    }

    fn deliver(&mut self, conn: u64) {
        let pipe = self.env.pipes.get_mut(&conn).unwrap();
        let packet = Packet::decode(&pipe.outbox.pop_front().unwrap());
        let into = pipe.expected.remove(&packet.header.request);
        let frame = self.frame_of(packet, into);
        self.event(Event::Frame { conn: ConnId(conn), frame });
    }

    fn frame_of(&mut self, packet: Packet, into: Option<IoBuf>) -> Frame {
        let payload = (!packet.payload.is_empty()).then(|| {
            let len = packet.payload.len();
            let mut buf = match into.filter(|buf| buf.len() == len) {
                Some(buf) => buf,
                None => self.env.arena.alloc(len).unwrap(),
            };
            buf.as_mut_slice().unwrap().copy_from_slice(&packet.payload);
            buf
        });
        Frame { header: packet.header, crcs: packet.crcs, payload }
    }

    /// A reply delivered by hand, as it is.
    pub fn hand_over(&mut self, conn: u64, frame: Frame) {
        self.event(Event::Frame { conn: ConnId(conn), frame });
    }
}

/// A heap buffer of blocks that all say `tag`.
pub fn filled(blocks: usize, tag: u64) -> IoBuf {
    let mut buf = IoBuf::heap(blocks * wire::BLOCK_BYTES).unwrap();
    for word in buf.as_mut_slice().unwrap().chunks_mut(8) {
        word.copy_from_slice(&tag.to_le_bytes());
    }
    buf
}

pub fn empty(blocks: usize) -> IoBuf {
    filled(blocks, u64::MAX)
}

/// What each block of a buffer says; `None` when a block says different things.
pub fn sound_tags(bytes: &[u8]) -> Option<Vec<u64>> {
    let one = |block: &[u8]| {
        let tag = u64::from_le_bytes(block[..8].try_into().unwrap());
        block.chunks(8).all(|word| word == tag.to_le_bytes()).then_some(tag)
    };
    bytes.chunks(wire::BLOCK_BYTES).map(one).collect()
}

/// The same for buffers that must be sound.
pub fn tags(bytes: &[u8]) -> Vec<u64> {
    sound_tags(bytes).expect("whole blocks")
}
