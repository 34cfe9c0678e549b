//! Connections: two ends, two directions, each direction a queue of what is under way.

#![allow(clippy::result_large_err, reason = "an item comes back whole when there is no memory for it")]

use super::rdma::{Half, Over, RdmaAction};
use super::{BROKEN_RESET, BROKEN_TIMEOUT};
use crate::clock::{Nanos, US};
use crate::universe::{Action, CoreIdx, HostId, Universe};
use reactor::{CloseReason, ConnId, Event, FRAME_STALL_MS, Frame, Framing, Full, IoBuf};
use std::collections::VecDeque;
use std::net::SocketAddr;
use wire::{BlockCrcs, HEADER_BYTES, Header, HeaderError};

/// How soon a sender tries again whose receiver has no memory.
pub(super) const NO_MEMORY_NS: Nanos = 200 * US;

/// What happens in the network.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NetAction {
    /// A connection request reaches the target.
    Syn { conn: usize, target: HostId },
    /// The answer reaches the initiator.
    SynAck { conn: usize },
    /// "Nothing listens here" reaches the initiator.
    Refused { conn: usize },
    /// The initiator gives up.
    SynTimeout { conn: usize },
    /// The head of a direction's queue is due.
    Deliver { conn: usize, dir: usize },
    /// A reset reaches an end.
    Reset { conn: usize, end: usize },
    /// Unacknowledged bytes of this end may have waited too long.
    UserTimeout { conn: usize, end: usize },
    /// A frame of which a part has come may have stopped half-way.
    Stalled { conn: usize, end: usize },
    /// This end's kernel asks whether the other end is still there; `missed` questions stayed unanswered.
    KeepAlive { conn: usize, end: usize, missed: u32 },
    /// The service's own `close` takes effect.
    ClosedLocally { conn: usize, end: usize },
    /// What only connections over RDMA do.
    Rdma(RdmaAction),
}

#[allow(
    clippy::large_enum_variant,
    reason = "frames are by far the most; a box would cost an allocation for each"
)]
pub(super) enum Item {
    Frame {
        header: Header,
        crcs: BlockCrcs,
        payload: Option<IoBuf>,
    },
    Bytes(IoBuf),
    Bad(HeaderError),
    /// What follows travels over RDMA.
    Switch,
    End(CloseReason),
}

pub(super) struct Queued {
    pub(super) item: Item,
    pub(super) bytes: usize,
    pub(super) due: Nanos,
    /// How far it is, when it travels over RDMA.
    pub(super) over: Over,
}

pub(super) struct End {
    pub(super) core: CoreIdx,
    pub(super) host: HostId,
    pub(super) framing: Framing,
    /// The service has not been told `Closed` yet.
    pub(super) open: bool,
    /// The service has called `close`.
    pub(super) closing: bool,
    expects: Vec<(u64, IoBuf)>,
    /// Bytes of a frame that is not complete yet, when the peer sends raw bytes.
    partial: Vec<u8>,
    /// Until when the next of them must come.
    stall_at: Nanos,
}

impl End {
    fn new(core: CoreIdx, host: HostId, framing: Framing) -> Self {
        let (expects, partial) = (Vec::new(), Vec::new());
        Self { core, host, framing, open: true, closing: false, expects, partial, stall_at: 0 }
    }
}

#[derive(Default)]
pub(super) struct Dir {
    pub(super) queue: VecDeque<Queued>,
    pub(super) scheduled: bool,
    pub(super) stalled_since: Option<Nanos>,
    pub(super) last_due: Nanos,
    line_free: Nanos,
    unacked_bytes: usize,
    /// Its end has switched to RDMA.
    pub(super) half: Option<Box<Half>>,
}

pub(super) struct Conn {
    pub(super) ends: [Option<End>; 2],
    /// `dirs[i]` carries what end `i` sends.
    pub(super) dirs: [Dir; 2],
    pub(super) connected: bool,
    to: SocketAddr,
}

/// The name of an end of a connection.
pub(super) fn id_of(conn: usize, end: usize) -> ConnId {
    ConnId((conn as u64 + 1) * 2 + end as u64)
}

/// The end that a name stands for.
pub(super) fn split(id: ConnId) -> (usize, usize) {
    ((id.0 / 2).saturating_sub(1) as usize, (id.0 % 2) as usize)
}

impl Conn {
    pub(super) fn new(core: CoreIdx, host: HostId, framing: Framing, to: SocketAddr) -> Self {
        Self {
            ends: [Some(End::new(core, host, framing)), None],
            dirs: [Dir::default(), Dir::default()],
            connected: false,
            to,
        }
    }

    pub(super) fn core_of(&self, end: usize) -> Option<CoreIdx> {
        self.end(end).map(|end| end.core)
    }

    pub(super) fn is_stalled(&self, dir: usize, host: HostId) -> bool {
        self.dirs.get(dir).is_some_and(|dir| dir.stalled_since.is_some() || dir.is_waiting())
            && self.ends.iter().flatten().any(|end| end.host == host)
    }

    pub(super) fn backlog(&self, index: usize) -> Vec<String> {
        let mut lines = Vec::new();
        for (dir, line) in self.dirs.iter().enumerate().filter(|(_, line)| !line.queue.is_empty()) {
            let held: usize = line
                .queue
                .iter()
                .map(|queued| match &queued.item {
                    Item::Frame { payload: Some(payload), .. } | Item::Bytes(payload)
                        if payload.is_arena() =>
                    {
                        payload.len()
                    }
                    _ => 0,
                })
                .sum();
            lines.push(format!(
                "conn {} end {dir} of hosts {:?} open {:?} connected {} stalled {:?}: {} frames, {held} bytes held",
                id_of(index, dir).0,
                self.hosts(dir),
                [self.is_open(0), self.is_open(1)],
                self.connected,
                line.stalled_since,
                line.queue.len()
            ));
        }
        lines
    }

    pub(super) fn end(&self, end: usize) -> Option<&End> {
        self.ends.get(end).and_then(Option::as_ref)
    }

    fn end_mut(&mut self, end: usize) -> Option<&mut End> {
        self.ends.get_mut(end).and_then(Option::as_mut)
    }

    pub(super) fn is_open(&self, end: usize) -> bool {
        self.end(end).is_some_and(|end| end.open)
    }

    /// Whether something that an end has sent is still on its way.
    pub(super) fn has_queued(&self, dir: usize) -> bool {
        self.dirs.get(dir).is_some_and(|dir| !dir.queue.is_empty())
    }

    pub(super) fn hosts(&self, dir: usize) -> Option<(HostId, HostId)> {
        Some((self.end(dir)?.host, self.end(1 - dir)?.host))
    }
}

impl Queued {
    /// Its bytes are not the sender's any more.
    pub(super) fn take_from_sender(&mut self) {
        if let Item::Frame { payload: Some(payload), .. } | Item::Bytes(payload) = &mut self.item
            && payload.is_arena()
            && let Ok(copy) = IoBuf::copy_of(payload.as_slice())
        {
            *payload = copy;
        }
    }
}

impl Universe {
    pub(crate) fn net_action(&mut self, action: NetAction) {
        match action {
            NetAction::Syn { conn, target } => self.net_syn(conn, target),
            NetAction::SynAck { conn } => self.net_syn_ack(conn),
            NetAction::Refused { conn } => {
                if self.net.conns.get(&conn).is_some_and(|conn| !conn.connected) {
                    self.net_end(conn, 0, CloseReason::Refused);
                }
            }
            NetAction::SynTimeout { conn } => {
                let given_up = self.net.conns.get(&conn).is_some_and(|c| !c.is_open(0) && c.end(1).is_none());
                if given_up {
                    // Closed before it came to be, and no request is on its way any more.
                    self.net.conns.remove(&conn);
                } else if self.net.conns.get(&conn).is_some_and(|conn| !conn.connected && conn.is_open(0)) {
                    self.net_end(conn, 0, CloseReason::TimedOut);
                }
            }
            NetAction::Deliver { conn, dir } => self.net_deliver(conn, dir),
            NetAction::Reset { conn, end } => self.net_end(conn, end, BROKEN_RESET),
            NetAction::UserTimeout { conn, end } => self.net_user_timeout(conn, end),
            NetAction::Stalled { conn, end } => self.net_stalled(conn, end),
            NetAction::KeepAlive { conn, end, missed } => self.net_ask(conn, end, missed),
            NetAction::ClosedLocally { conn, end } => self.net_end(conn, end, CloseReason::Local),
            NetAction::Rdma(action) => self.rdma_action(action),
        }
    }

    fn net_syn(&mut self, index: usize, target: HostId) {
        let Some(conn) = self.net.conns.get(&index) else { return };
        let Some(from) = conn.end(0).map(|end| end.host) else { return };
        if self.net.blocked(from, target) || !self.hosts.get(target).is_some_and(|host| host.powered) {
            return;
        }
        let Some(listener) = self.net.listeners.get(&conn.to).copied() else {
            if !self.net.blocked(target, from) {
                let at = self.now + self.net.delay(target, from);
                self.at(at, Action::Net(NetAction::Refused { conn: index }));
            }
            return;
        };
        let ip = self.hosts.get(from).map(|host| host.ip);
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        conn.ends[1] = Some(End::new(listener.core, target, listener.framing));
        if let Some(ip) = ip {
            let from = SocketAddr::from((ip, 32_768 + (index % 28_000) as u16));
            let event = Event::Accepted { conn: id_of(index, 1), token: listener.token, from };
            self.deliver(listener.core, event);
        }
        self.net_keep_alive(index, 1);
        let at = self.now + self.net.delay(target, from);
        self.at(at, Action::Net(NetAction::SynAck { conn: index }));
    }

    fn net_syn_ack(&mut self, index: usize) {
        let Some(conn) = self.net.conns.get(&index) else { return };
        let Some((to, from)) = conn.hosts(0) else { return };
        if self.net.blocked(from, to) || !self.hosts.get(to).is_some_and(|host| host.powered) {
            return;
        }
        if !conn.is_open(0) || conn.end(0).is_some_and(|end| end.closing) {
            self.net_send_reset(index, 1);
            return;
        }
        let core = conn.core_of(0).unwrap_or(usize::MAX);
        if let Some(conn) = self.net.conns.get_mut(&index) {
            conn.connected = true;
        }
        self.deliver(core, Event::Connected { conn: id_of(index, 0) });
        self.net_keep_alive(index, 0);
        self.rdma_offer(index);
        for dir in 0..2 {
            self.net_schedule(index, dir, self.now);
        }
    }

    /// Queues a frame that a service sends.
    pub(crate) fn net_send(&mut self, id: ConnId, frame: Frame) -> Result<(), Full> {
        let (index, end) = split(id);
        let payload_len = frame.payload.as_ref().map_or(0, IoBuf::len);
        assert_eq!(
            frame.header.payload_len as usize, payload_len,
            "a frame whose payload_len lies: {frame:?}"
        );
        let mut bytes = Vec::with_capacity(HEADER_BYTES + frame.crcs.len() * 4);
        frame.header.encode_into(&frame.crcs, &mut bytes);
        let size = bytes.len() + payload_len;
        // The real codec runs: a field that does not survive it must not survive here.
        let item = match Header::decode(&bytes) {
            Ok((header, crcs)) => {
                // Memory of somebody else may be gone by the time of delivery.
                let payload = match frame.payload {
                    Some(payload) if !payload.is_arena() => IoBuf::copy_of(payload.as_slice()).ok(),
                    other => other,
                };
                Item::Frame { header, crcs, payload }
            }
            Err(error) => Item::Bad(error),
        };
        if let Some((from, to)) = self.net.conns.get(&index).and_then(|conn| conn.hosts(end))
            && let Some(observer) = &mut self.observer
        {
            observer.frame_sent(self.now, from, to, &frame.header);
        }
        self.net_push(index, end, item, size)
    }

    /// Queues raw bytes that a service sends.
    pub(crate) fn net_send_bytes(&mut self, id: ConnId, bytes: IoBuf) -> Result<(), Full> {
        let (index, end) = split(id);
        let size = bytes.len();
        let bytes = match bytes.is_arena() {
            true => bytes,
            false => IoBuf::copy_of(bytes.as_slice()).map_err(|_| Full)?,
        };
        self.net_push(index, end, Item::Bytes(bytes), size)
    }

    fn net_push(&mut self, index: usize, end: usize, item: Item, bytes: usize) -> Result<(), Full> {
        let options = self.net.options;
        let Some(conn) = self.net.conns.get_mut(&index) else { return Ok(()) };
        let Some(sender) = conn.end(end) else { return Ok(()) };
        if !sender.open || sender.closing {
            return Ok(());
        }
        let depart = self.cores.get(sender.core).map_or(0, |core| core.depart).max(self.now);
        let Some(dir) = conn.dirs.get_mut(end) else { return Ok(()) };
        // What has landed over RDMA is the peer's.
        if dir.queue.len() - dir.landed() >= options.send_queue_frames {
            return Err(Full);
        }
        dir.line_free = dir.line_free.max(depart) + bytes as u64 * options.kib_ns / 1024;
        let free = dir.line_free;
        let (from, to) = match conn.hosts(end) {
            Some(hosts) => hosts,
            None => (sender_host(conn, end), usize::MAX),
        };
        let due = free + self.net.delay(from, to);
        let Some(dir) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(end)) else {
            return Ok(());
        };
        dir.last_due = dir.last_due.max(due);
        let due = dir.last_due;
        let over = dir.over();
        dir.queue.push_back(Queued { item, bytes, due, over });
        if over == Over::Rdma {
            self.rdma_pushed(index, end);
        }
        self.net_schedule(index, end, due);
        if self.net.rng.chance(options.reset_ppm) {
            self.net_reset(index);
        }
        Ok(())
    }

    /// The reply to `request` may be received into this buffer.
    pub(crate) fn net_expect(&mut self, id: ConnId, request: u64, into: IoBuf) {
        let (index, end) = split(id);
        if let Some(end) = self.net.conns.get_mut(&index).and_then(|conn| conn.end_mut(end))
            && end.open
        {
            end.expects.push((request, into));
        }
    }

    pub(crate) fn net_schedule(&mut self, index: usize, dir: usize, at: Nanos) {
        let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(dir)) else {
            return;
        };
        if line.scheduled || line.queue.is_empty() {
            return;
        }
        line.scheduled = true;
        self.at(at, Action::Net(NetAction::Deliver { conn: index, dir }));
    }

    fn net_deliver(&mut self, index: usize, dir: usize) {
        let now = self.now;
        let options = self.net.options;
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        let connected = conn.connected;
        let hosts = conn.hosts(dir);
        let receiver = conn.core_of(1 - dir);
        let Some(line) = conn.dirs.get_mut(dir) else { return };
        line.scheduled = false;
        if line.queue.front().is_some_and(|head| head.over != Over::Tcp) {
            return self.rdma_deliver(index, dir);
        }
        let Some((due, bytes)) = line.queue.front().map(|head| (head.due, head.bytes)) else { return };
        let (Some((from, to)), Some(receiver)) = (hosts, receiver) else { return };
        if !connected {
            return;
        }
        if due > now {
            self.net_schedule(index, dir, due);
            return;
        }
        let unacked = line.unacked_bytes;
        let clogged_until = if from == to { 0 } else { self.net.link(from, to).clogged_until };
        if clogged_until > now {
            let at = clogged_until + self.net.rng.below(100 * US);
            self.net_schedule(index, dir, at);
            return;
        }
        let no_answer = self.net.blocked(to, from);
        let unreachable = self.net.blocked(from, to)
            || !self.hosts.get(to).is_some_and(|host| host.powered)
            || (no_answer && unacked > options.window_bytes);
        let paused = self.is_alive(receiver) && self.is_paused(receiver);
        if unreachable || paused {
            self.net_stall(index, dir, unreachable);
            return;
        }
        let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(dir)) else {
            return;
        };
        line.stalled_since = None;
        line.unacked_bytes = if no_answer { unacked + bytes } else { 0 };
        let Some(head) = line.queue.pop_front() else { return };
        if let Err(back) = self.net_receive(index, 1 - dir, head.item) {
            // The receiver has no memory: its window is shut, try again soon.
            if let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(dir)) {
                let due = now + NO_MEMORY_NS;
                line.queue.push_front(Queued { item: back, bytes: head.bytes, due, over: head.over });
            }
        }
        let next =
            self.net.conns.get(&index).and_then(|conn| conn.dirs.get(dir)?.queue.front()).map(|q| q.due);
        if let Some(next) = next {
            self.net_schedule(index, dir, next);
        }
    }

    fn net_stall(&mut self, index: usize, dir: usize, unreachable: bool) {
        let now = self.now;
        let timeout = self.net.options.user_timeout_ns;
        let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(dir)) else {
            return;
        };
        let first = line.stalled_since.is_none();
        line.stalled_since.get_or_insert(now);
        if first && unreachable {
            self.at(now + timeout, Action::Net(NetAction::UserTimeout { conn: index, end: dir }));
        }
    }

    fn net_user_timeout(&mut self, index: usize, end: usize) {
        let timeout = self.net.options.user_timeout_ns;
        let now = self.now;
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        let Some(line) = conn.dirs.get_mut(end) else { return };
        if line.stalled_since.is_none_or(|since| since + timeout > now) {
            return;
        }
        self.net_break(index, end, BROKEN_TIMEOUT);
    }

    /// An end's kernel gives the connection up; what it had queued is lost.
    pub(super) fn net_break(&mut self, index: usize, end: usize, reason: CloseReason) {
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        if let Some(line) = conn.dirs.get_mut(end) {
            line.queue.clear();
            line.stalled_since = None;
        }
        let closing = conn.end(end).is_some_and(|end| end.closing);
        self.net_end(index, end, if closing { CloseReason::Local } else { reason });
    }

    /// An item reaches an end. It comes back when the receiving core has no memory for it.
    pub(super) fn net_receive(&mut self, index: usize, to: usize, item: Item) -> Result<(), Item> {
        let Some(conn) = self.net.conns.get(&index) else { return Ok(()) };
        let Some(end) = conn.end(to) else { return Ok(()) };
        if !end.open {
            if !matches!(item, Item::End(_)) {
                self.net_send_reset(index, 1 - to);
            } else {
                self.net_finish_closing(index, 1 - to);
            }
            return Ok(());
        }
        let (core, framing, closing) = (end.core, end.framing, end.closing);
        match item {
            Item::End(reason) => {
                let reason = if closing { CloseReason::Local } else { reason };
                self.net_end(index, to, reason);
                self.net_finish_closing(index, 1 - to);
            }
            Item::Switch => self.rdma_peer_switched(index, to),
            _ if closing => {}
            Item::Bad(error) => self.net_protocol_error(index, to, error),
            Item::Frame { header, crcs, payload } if framing == Framing::Frames => {
                return self.net_receive_frame(index, to, header, crcs, payload);
            }
            Item::Frame { header, crcs, payload } => {
                let mut bytes = Vec::new();
                header.encode_into(&crcs, &mut bytes);
                bytes.extend_from_slice(payload.as_ref().map_or(&[], |payload| payload.as_slice()));
                self.net_receive_raw(core, id_of(index, to), &bytes);
            }
            Item::Bytes(bytes) if framing == Framing::Raw => {
                self.net_receive_raw(core, id_of(index, to), bytes.as_slice());
            }
            Item::Bytes(bytes) => self.net_reassemble(index, to, bytes.as_slice()),
        }
        Ok(())
    }

    fn net_receive_frame(
        &mut self,
        index: usize,
        to: usize,
        header: Header,
        crcs: BlockCrcs,
        payload: Option<IoBuf>,
    ) -> Result<(), Item> {
        let direct = self.net.rng.coin();
        let Some(conn) = self.net.conns.get_mut(&index) else { return Ok(()) };
        // A queue pair's receives are the core's own memory, whatever was expected.
        let direct = direct && conn.dirs.get(1 - to).is_some_and(|line| line.half.is_none());
        let Some(end) = conn.end_mut(to) else { return Ok(()) };
        let core = end.core;
        let expected = end.expects.iter().position(|(request, _)| *request == header.request);
        let into = expected.map(|at| end.expects.swap_remove(at).1);
        let Some(arena) = self.cores.get(core).map(|core| core.arena.clone()) else { return Ok(()) };
        let received = match &payload {
            None => None,
            Some(payload) => {
                let wanted = into.filter(|into| direct && into.len() == payload.len() && into.is_unique());
                let mut buf = match wanted.map_or_else(|| arena.alloc(payload.len()), Ok) {
                    Ok(buf) => buf,
                    Err(_) => return Err(Item::Frame { header, crcs, payload: Some(payload.clone()) }),
                };
                if let Some(bytes) = buf.as_mut_slice() {
                    bytes.copy_from_slice(payload.as_slice());
                    if self.net.rng.chance(self.net.options.corrupt_ppm) {
                        self.net.counters.corrupted += 1;
                        let bit = self.net.rng.below(bytes.len() as u64 * 8) as usize;
                        if let Some(byte) = bytes.get_mut(bit / 8) {
                            *byte ^= 1 << (bit % 8);
                        }
                    }
                }
                Some(buf)
            }
        };
        self.net.counters.frames += 1;
        let frame = Frame { header, crcs, payload: received };
        self.deliver(core, Event::Frame { conn: id_of(index, to), frame });
        Ok(())
    }

    /// Raw bytes arrive in pieces that have nothing to do with how they were sent.
    fn net_receive_raw(&mut self, core: CoreIdx, conn: ConnId, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let len = if self.net.rng.coin() {
                bytes.len()
            } else {
                1 + self.net.rng.below(bytes.len() as u64) as usize
            };
            let (head, rest) = bytes.split_at(len.min(bytes.len()));
            bytes = rest;
            if let Ok(buf) = IoBuf::copy_of(head) {
                self.deliver(core, Event::Bytes { conn, bytes: buf });
            }
        }
    }

    /// Raw bytes reach an end that expects frames.
    fn net_reassemble(&mut self, index: usize, to: usize, bytes: &[u8]) {
        let now = self.now;
        let Some(end) = self.net.conns.get_mut(&index).and_then(|conn| conn.end_mut(to)) else { return };
        end.partial.extend_from_slice(bytes);
        // By the clock of the receiving host, whose kernel or transport counts.
        let clock = self.hosts.get(end.host).map(|host| host.clock).unwrap_or_default();
        end.stall_at = clock.global(clock.local(now).plus_ms(FRAME_STALL_MS));
        let at = end.stall_at;
        self.at(at, Action::Net(NetAction::Stalled { conn: index, end: to }));
        self.net_cut_frames(index, to);
    }

    /// The connection ends when no byte of a frame's rest has come for too long.
    fn net_stalled(&mut self, index: usize, to: usize) {
        let now = self.now;
        let Some(end) = self.net.conns.get(&index).and_then(|conn| conn.end(to)) else { return };
        if end.open && !end.partial.is_empty() && end.stall_at <= now {
            self.net_end(index, to, CloseReason::TimedOut);
            self.net_send_reset(index, 1 - to);
        }
    }

    fn net_cut_frames(&mut self, index: usize, to: usize) {
        loop {
            let Some(end) = self.net.conns.get_mut(&index).and_then(|conn| conn.end_mut(to)) else { return };
            if end.partial.len() < HEADER_BYTES {
                return;
            }
            let lengths = match Header::peek(&end.partial) {
                Ok(lengths) if lengths.total() > end.partial.len() => return,
                Ok(lengths) => lengths,
                Err(error) => return self.net_protocol_error(index, to, error),
            };
            let rest = end.partial.split_off(lengths.total());
            let whole = std::mem::replace(&mut end.partial, rest);
            match Header::decode(&whole) {
                Ok((header, crcs)) => {
                    let payload = whole.get(HEADER_BYTES + lengths.meta..).filter(|bytes| !bytes.is_empty());
                    let payload = payload.and_then(|bytes| IoBuf::copy_of(bytes).ok());
                    if self.net_receive_frame(index, to, header, crcs, payload).is_err() {
                        return self.net_end(index, to, BROKEN_RESET);
                    }
                }
                Err(error) => return self.net_protocol_error(index, to, error),
            }
        }
    }

    fn net_protocol_error(&mut self, index: usize, end: usize, error: HeaderError) {
        self.net_end(index, end, CloseReason::Protocol(error));
        self.net_send_reset(index, 1 - end);
    }

    /// An end is told that its connection is no more.
    pub(super) fn net_end(&mut self, index: usize, end: usize, reason: CloseReason) {
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        let Some(target) = conn.end_mut(end) else { return };
        if !target.open {
            return;
        }
        target.open = false;
        target.expects.clear();
        let core = target.core;
        let connected = conn.connected;
        self.deliver(core, Event::Closed { conn: id_of(index, end), reason });
        if connected && matches!(reason, CloseReason::Peer) {
            // What it had queued is for nobody: the peer has closed both ways.
            self.net_cut_queue(index, end, 0);
        }
        self.net_collect(index);
    }

    fn net_finish_closing(&mut self, index: usize, end: usize) {
        if self.net.conns.get(&index).and_then(|conn| conn.end(end)).is_some_and(|end| end.closing) {
            self.net_end(index, end, CloseReason::Local);
        }
    }

    /// Forgets a connection that neither side knows any more.
    fn net_collect(&mut self, index: usize) {
        let Some(conn) = self.net.conns.get(&index) else { return };
        if !conn.is_open(0) && !conn.is_open(1) && (conn.connected || conn.end(1).is_some()) {
            self.net.conns.remove(&index);
        }
    }

    fn net_send_reset(&mut self, index: usize, to: usize) {
        let Some((from, host)) = self.net.conns.get(&index).and_then(|conn| conn.hosts(1 - to)) else {
            return;
        };
        if !self.net.blocked(from, host) {
            let at = self.now + self.net.delay(from, host);
            self.at(at, Action::Net(NetAction::Reset { conn: index, end: to }));
        }
    }

    /// Keeps a random part of what an end has sent: it is on the wire already.
    pub(super) fn net_cut_queue(&mut self, index: usize, end: usize, at_most: usize) {
        let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(end)) else {
            return;
        };
        let len = line.queue.len().min(at_most);
        let keep = self.net.rng.below(len as u64 + 1) as usize;
        line.cut(keep, at_most);
        // It is the kernel's now, or the peer's: the sender has its buffers back.
        line.queue.iter_mut().for_each(Queued::take_from_sender);
    }

    pub(super) fn net_push_end(&mut self, index: usize, end: usize, reason: CloseReason) {
        let now = self.now;
        let hosts = self.net.conns.get(&index).and_then(|conn| conn.hosts(end));
        let delay = hosts.map_or(0, |(from, to)| self.net.delay(from, to));
        let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(end)) else {
            return;
        };
        let due = line.last_due.max(now + delay);
        line.last_due = due;
        line.queue.push_back(Queued { item: Item::End(reason), bytes: 0, due, over: Over::Tcp });
        self.net_schedule(index, end, due);
    }

    /// The network resets a connection: each side receives a part of what was under way, then the end,
    /// each in its own time.
    pub(super) fn net_reset(&mut self, index: usize) {
        if !self.net.conns.get(&index).is_some_and(|conn| conn.connected) {
            return;
        }
        self.net.counters.resets += 1;
        if self.net.conns.get(&index).is_some_and(|conn| conn.dirs.iter().any(|line| line.half.is_some())) {
            return self.rdma_break_somewhere(index);
        }
        for end in 0..2 {
            self.net_cut_queue(index, end, usize::MAX);
            self.net_push_end(index, end, BROKEN_RESET);
        }
    }

    /// An end's process died: its kernel sends the end after all, or a part, of what was queued.
    pub(super) fn net_abandon(&mut self, index: usize, end: usize) {
        self.net_silence(index, end);
        if self.net.rng.coin() {
            self.net_push_end(index, end, CloseReason::Peer);
        } else {
            self.net_cut_queue(index, end, usize::MAX);
            self.net_push_end(index, end, BROKEN_RESET);
        }
        self.net_collect(index);
    }

    /// An end's machine lost power: a part of what was queued is on the wire, and no end follows.
    pub(super) fn net_vanish(&mut self, index: usize, end: usize) {
        self.net_silence(index, end);
        self.net_cut_queue(index, end, usize::MAX);
        self.net_collect(index);
    }

    fn net_silence(&mut self, index: usize, end: usize) {
        if let Some(end) = self.net.conns.get_mut(&index).and_then(|conn| conn.end_mut(end)) {
            end.open = false;
            end.expects.clear();
        }
    }

    pub(super) fn net_close_end(&mut self, index: usize, end: usize, after_flush: bool) {
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        let connected = conn.connected;
        let Some(target) = conn.end_mut(end) else { return };
        if !target.open || target.closing {
            return;
        }
        target.closing = true;
        let depart = self.cores.get(target.core).map_or(0, |core| core.depart).max(self.now);
        let linger = after_flush && connected;
        if connected {
            if !after_flush {
                self.net_cut_queue(index, end, usize::MAX);
            }
            self.net_push_end(index, end, CloseReason::Peer);
        }
        if !linger {
            self.at(depart, Action::Net(NetAction::ClosedLocally { conn: index, end }));
        }
    }
}

fn sender_host(conn: &Conn, end: usize) -> HostId {
    conn.end(end).map_or(0, |end| end.host)
}
