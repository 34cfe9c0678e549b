//! A small world in memory: cores on virtual time, a network with delays, holds and breaks, disks that
//! survive a crash. Everything is seeded; nothing runs by itself.

use reactor::*;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use wire::{CONTROL_CORE, CoreId};

use crate::CoreMsg;

/// Blocks of a disk in memory, by number.
type Blocks = BTreeMap<u64, Box<[u8]>>;

#[derive(Default)]
pub(super) struct DiskMem {
    pub(super) blocks: Blocks,
    pub(super) bytes: u64,
    /// Every operation fails like this.
    pub(super) broken: Option<DiskError>,
    /// Reads fail like this.
    pub(super) unreadable: Option<DiskError>,
    /// Operations are taken and never end.
    pub(super) hangs: bool,
    /// Operations take so much longer, in nanoseconds, one behind the other.
    pub(super) slow_ns: u64,
    pub(super) free_at: u64,
}

struct End {
    node: usize,
    peer: ConnId,
    open: bool,
    /// No frame may overtake an earlier one.
    last: u64,
}

/// Something that will happen on a node.
#[allow(clippy::large_enum_variant)]
pub(super) enum Due {
    Event(Event),
    /// A disk operation completes then.
    Disk(Token, DiskOp),
}

pub(super) struct World {
    pub(super) now: u64,
    seq: u64,
    rng: u64,
    next_conn: u64,
    pub(super) queue: BTreeMap<(u64, u64), (usize, u64, Due)>,
    ends: BTreeMap<ConnId, End>,
    pub(super) listeners: BTreeMap<SocketAddr, usize>,
    pub(super) disks: BTreeMap<usize, DiskMem>,
    /// Rises with every crash: what was due for the process before is not for the next one.
    pub(super) life: BTreeMap<usize, u64>,
    /// Directions in which frames wait, with what waits.
    held: BTreeMap<(usize, usize), Vec<(ConnId, Frame)>>,
    /// The same for single connections, by the sender's end.
    held_conns: BTreeMap<ConnId, Vec<Frame>>,
    pub(super) told: Vec<(usize, CoreMsg)>,
    /// Disk operations a node may have under way.
    pub(super) disk_room: usize,
    /// Frames sent, by kind: for asserting what did not happen.
    pub(super) sent: Vec<(usize, wire::FrameKind)>,
}

pub(super) type Shared = Rc<RefCell<World>>;

impl World {
    pub(super) fn new(seed: u64) -> Shared {
        Rc::new(RefCell::new(Self {
            now: 1_000_000_000,
            seq: 0,
            rng: seed | 1,
            next_conn: 1,
            queue: BTreeMap::new(),
            ends: BTreeMap::new(),
            listeners: BTreeMap::new(),
            disks: BTreeMap::new(),
            life: BTreeMap::new(),
            held: BTreeMap::new(),
            held_conns: BTreeMap::new(),
            told: Vec::new(),
            disk_room: usize::MAX,
            sent: Vec::new(),
        }))
    }

    pub(super) fn random(&mut self) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        self.rng.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn at(&mut self, time: u64, node: usize, due: Due) {
        self.seq += 1;
        let life = self.life.get(&node).copied().unwrap_or(0);
        self.queue.insert((time, self.seq), (node, life, due));
    }

    fn delay(&mut self) -> u64 {
        5_000 + self.random() % 45_000
    }

    fn connect(&mut self, from: usize, to: SocketAddr) -> ConnId {
        let (here, there) = (ConnId(self.next_conn), ConnId(self.next_conn + 1));
        self.next_conn += 2;
        let at = self.now + self.delay();
        match self.listeners.get(&to).copied() {
            Some(node) => {
                self.ends.insert(here, End { node: from, peer: there, open: true, last: at });
                self.ends.insert(there, End { node, peer: here, open: true, last: at });
                let from_addr = SocketAddr::from(([127, 0, 0, 1], 1));
                self.at(
                    at,
                    node,
                    Due::Event(Event::Accepted { conn: there, token: Token(0), from: from_addr }),
                );
                self.at(at, from, Due::Event(Event::Connected { conn: here }));
            }
            None => {
                self.at(at, from, Due::Event(Event::Closed { conn: here, reason: CloseReason::Refused }));
            }
        }
        here
    }

    fn send(&mut self, conn: ConnId, frame: Frame) {
        let Some(end) = self.ends.get(&conn) else { return };
        let (from, peer, open) = (end.node, end.peer, end.open);
        let Some(to) = self.ends.get(&peer).map(|end| end.node) else { return };
        if !open {
            return;
        }
        self.sent.push((from, frame.header.kind));
        // The receiver gets memory of its own.
        let payload = frame.payload.as_ref().map(|p| IoBuf::copy_of(p.as_slice()).unwrap());
        let frame = Frame { payload, ..frame };
        if let Some(held) = self.held_conns.get_mut(&conn) {
            held.push(frame);
            return;
        }
        if let Some(held) = self.held.get_mut(&(from, to)) {
            held.push((peer, frame));
            return;
        }
        self.deliver(to, peer, frame);
    }

    fn deliver(&mut self, to: usize, conn: ConnId, frame: Frame) {
        let at = self.now + self.delay();
        let Some(end) = self.ends.get_mut(&conn) else { return };
        let at = at.max(end.last + 1);
        end.last = at;
        self.at(at, to, Due::Event(Event::Frame { conn, frame }));
    }

    /// From now on frames of one direction wait.
    pub(super) fn hold(&mut self, from: usize, to: usize) {
        self.held.entry((from, to)).or_default();
    }

    /// From now on what is sent on a connection waits.
    pub(super) fn hold_conn(&mut self, conn: ConnId) {
        self.held_conns.entry(conn).or_default();
    }

    /// What waited arrives, even if the connection has been given up since.
    pub(super) fn release_conn(&mut self, conn: ConnId) {
        let Some(end) = self.ends.get(&conn) else { return };
        let peer = end.peer;
        let Some(to) = self.ends.get(&peer).map(|end| end.node) else { return };
        for frame in self.held_conns.remove(&conn).unwrap_or_default() {
            self.deliver(to, peer, frame);
        }
    }

    /// What waited goes on.
    pub(super) fn release(&mut self, from: usize, to: usize) {
        for (conn, frame) in self.held.remove(&(from, to)).unwrap_or_default() {
            self.deliver(to, conn, frame);
        }
    }

    /// What waited is lost, with its connections.
    pub(super) fn lose(&mut self, from: usize, to: usize) {
        self.held.remove(&(from, to));
        self.break_between(from, to);
    }

    /// Breaks every connection between two nodes. Frames under way may still arrive, as on a real network.
    pub(super) fn break_between(&mut self, a: usize, b: usize) {
        let broken: Vec<ConnId> = self
            .ends
            .iter()
            .filter(|(_, end)| end.open)
            .filter(|(_, end)| {
                let peer = self.ends.get(&end.peer).map(|peer| peer.node);
                (end.node == a && peer == Some(b)) || (end.node == b && peer == Some(a))
            })
            .map(|(conn, _)| *conn)
            .collect();
        for conn in broken {
            self.end(conn, CloseReason::Broken(104));
        }
    }

    fn end(&mut self, conn: ConnId, reason: CloseReason) {
        let at = self.now + self.delay();
        let Some(end) = self.ends.get_mut(&conn) else { return };
        if !end.open {
            return;
        }
        end.open = false;
        let (node, at) = (end.node, at.max(end.last + 1));
        end.last = at;
        self.at(at, node, Due::Event(Event::Closed { conn, reason }));
    }

    fn close(&mut self, conn: ConnId) {
        let Some(peer) = self.ends.get(&conn).map(|end| end.peer) else { return };
        self.end(conn, CloseReason::Local);
        self.end(peer, CloseReason::Peer);
    }

    /// A process ends: its connections break, what was due for it is void, its disk keeps what completed.
    pub(super) fn crash(&mut self, node: usize) {
        *self.life.entry(node).or_default() += 1;
        self.listeners.retain(|_, listener| *listener != node);
        let peers: BTreeSet<ConnId> =
            self.ends.values().filter(|end| end.node == node && end.open).map(|end| end.peer).collect();
        for end in self.ends.values_mut().filter(|end| end.node == node) {
            end.open = false;
        }
        for peer in peers {
            self.end(peer, CloseReason::Broken(104));
        }
    }

    /// Carries out a disk operation at its completion.
    pub(super) fn perform(&mut self, node: usize, op: &mut DiskOp) -> Result<(), DiskError> {
        let Some(disk) = self.disks.get_mut(&node) else { return Err(DiskError::Gone) };
        if let Some(error) = disk.broken {
            return Err(error);
        }
        match op {
            DiskOp::Read { .. } if disk.unreadable.is_some() => {
                return Err(disk.unreadable.unwrap_or(DiskError::Io(5)));
            }
            DiskOp::Read { offset, buf } => {
                let first = *offset / 4096;
                let Some(into) = buf.as_mut_slice() else { return Err(DiskError::Io(22)) };
                for (at, chunk) in into.chunks_mut(4096).enumerate() {
                    match disk.blocks.get(&(first + at as u64)) {
                        Some(block) => chunk.copy_from_slice(block),
                        None => chunk.fill(0),
                    }
                }
            }
            DiskOp::Write { offset, bufs, .. } => {
                let chunks = bufs.iter().flat_map(|buf| buf.as_slice().chunks(4096));
                disk.blocks.extend((*offset / 4096..).zip(chunks.map(Into::into)));
            }
            DiskOp::Flush | DiskOp::Discard { .. } => {}
        }
        Ok(())
    }
}

/// The environment of one node's core.
pub(super) struct CoreEnv {
    pub(super) world: Shared,
    pub(super) node: usize,
    pub(super) arena: Arena,
}

impl Clock for CoreEnv {
    fn now(&self) -> Mono {
        Mono(self.world.borrow().now)
    }
    fn wall(&self) -> WallMs {
        WallMs(0)
    }
}

impl Rng for CoreEnv {
    fn random(&mut self) -> u64 {
        self.world.borrow_mut().random()
    }
}

impl Timers for CoreEnv {
    fn set_timer(&mut self, at: Mono, token: Token) {
        let mut world = self.world.borrow_mut();
        let at = at.0.max(world.now + 1);
        world.at(at, self.node, Due::Event(Event::Timer { token }));
    }
}

impl Disk for CoreEnv {
    fn disk_info(&self, _: DiskIndex) -> Option<DiskInfo> {
        let size_bytes = self.world.borrow().disks.get(&self.node)?.bytes;
        Some(DiskInfo { size_bytes, atomic_bytes: 4096, write_through: true })
    }
    fn submit(&mut self, _: DiskIndex, op: DiskOp, token: Token) -> Result<(), (Full, DiskOp)> {
        let mut world = self.world.borrow_mut();
        let mine = |(node, _, due): &&(usize, u64, Due)| *node == self.node && matches!(due, Due::Disk(..));
        if world.disk_room < usize::MAX && world.queue.values().filter(mine).count() >= world.disk_room {
            return Err((Full, op));
        }
        let mut at = world.now + 20_000 + world.random() % 20_000;
        let now = world.now;
        if let Some(disk) = world.disks.get_mut(&self.node) {
            if disk.hangs {
                at = u64::MAX;
            } else if disk.slow_ns > 0 {
                disk.free_at = disk.free_at.max(now) + disk.slow_ns;
                at = disk.free_at;
            }
        }
        world.at(at, self.node, Due::Disk(token, op));
        Ok(())
    }
}

impl Net for CoreEnv {
    fn listen(&mut self, at: SocketAddr, _: Framing, _: Token) -> Result<SocketAddr, NetError> {
        self.world.borrow_mut().listeners.insert(at, self.node);
        Ok(at)
    }
    fn connect(&mut self, to: SocketAddr, _: Framing) -> ConnId {
        self.world.borrow_mut().connect(self.node, to)
    }
    fn send(&mut self, conn: ConnId, frame: Frame) -> Result<(), Full> {
        self.world.borrow_mut().send(conn, frame);
        Ok(())
    }
    fn send_bytes(&mut self, _: ConnId, _: IoBuf) -> Result<(), Full> {
        Ok(())
    }
    fn close(&mut self, conn: ConnId, _: bool) {
        self.world.borrow_mut().close(conn);
    }
}

impl Mesh for CoreEnv {
    fn core(&self) -> CoreId {
        CoreId(0)
    }
    fn post(&mut self, to: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        assert_eq!(to, CONTROL_CORE);
        let msg = CoreMsg::from_mesh(msg).map_err(|msg| (Full, msg))?;
        self.world.borrow_mut().told.push((self.node, msg));
        Ok(())
    }
}

impl Buffers for CoreEnv {
    fn arena(&self) -> &Arena {
        &self.arena
    }
}
