//! One core's connections: each begins on TCP, and goes on over RDMA when both sides can.
//!
//! The TCP connection stays: it carried the negotiation, and its end is the connection's end. So a peer whose process
//! dies is noticed at once, by its kernel closing the socket, and a connection that never gets to use RDMA works as
//! if there were none. What a queue pair that breaks had under way is unknown, as with TCP: the connection ends.

use crate::completion::{CompletionQueue, Done, status_text};
use crate::device::Region;
use crate::entry::{Entry, Phase};
use crate::events::EVENTS;
use crate::link::{BUFFERS_OF_A_CONNECTION, Batch, Buffers, Memory, RECEIVES, SENDS, Staging, Stall};
use crate::peers::Peers;
use crate::queue_pair::{Owner, Request, Shared, meaning};
use crate::{Device, RdmaError};
use io_uring::{opcode, types};
use reactor::backend::{Polled, Transport, TransportIo};
use reactor::{CloseReason, ConnId, Event, Frame, Framing, Full, IoBuf, Mono, NetError, Token};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;

/// Connections of one core that use RDMA at once. Further ones use TCP.
pub const RDMA_CONNECTIONS_MAX: usize = 256;
/// At most one of so many parts of a core's buffers goes to connections: the rest is for what they carry.
const BUFFERS_SHARE: usize = 2;
/// What a connection can have in the completion queue at most.
const COMPLETIONS_OF_A_CONNECTION: u32 = RECEIVES as u32 + SENDS as u32;
/// How often connections are looked at for whether their peer does what it owes, in milliseconds.
const STALL_CHECK_MS: u64 = 500;
/// How often connections that wait for buffers look again when nothing else turns the loop, in milliseconds.
const STARVED_RETRY_MS: u64 = 1;
/// User data of our own submissions; those of the transport beneath lie below.
pub(crate) const CHANNEL: u64 = 1 << 55;

/// What there is of the device.
enum State {
    /// Opened; connections have not been asked for yet.
    Opened(Rc<Device>),
    Ready(Rc<Shared>),
    /// It cannot be used after all, or is gone: TCP it is.
    Off,
}

/// RDMA for one core, over a transport that makes the connections.
pub struct RdmaTransport {
    pub(crate) beneath: Box<dyn Transport>,
    /// What the transport beneath has to say.
    pub(crate) inbox: VecDeque<Event>,
    state: State,
    pub(crate) entries: Vec<Option<Box<Entry>>>,
    free: Vec<u16>,
    generation: u16,
    pub(crate) slots: BTreeMap<ConnId, u16>,
    dirty: Vec<u16>,
    starved: Vec<u16>,
    starved_retry: Option<Mono>,
    stall_check: Option<Mono>,
    /// No entry's deadline is before this.
    pub(crate) next_deadline: Option<Mono>,
    /// Connections that we are ending, with the reason that counts.
    ending: BTreeMap<ConnId, CloseReason>,
    /// Connections whose end is told once the device has been asked for what came before it.
    closed: Vec<(ConnId, CloseReason)>,
    pub(crate) peers: Peers,
    /// Connections that we made, which may use RDMA sooner or later.
    pub(crate) outgoing: BTreeMap<ConnId, SocketAddr>,
    /// When to look whether to offer RDMA again.
    pub(crate) offer_check: Option<Mono>,
    /// The channel is being watched by the ring.
    pub(crate) watching: bool,
    /// So is the device's own descriptor.
    pub(crate) watching_events: bool,
    /// As far as the device has said.
    pub(crate) port_up: bool,
    /// When to look whether the device is still there.
    pub(crate) node_check: Option<Mono>,
    batch: Batch,
    done: Vec<Done>,
}

impl RdmaTransport {
    /// RDMA with `device`, over `beneath`, which must pass on offers (`TcpTransport::beneath`).
    pub fn over(beneath: Box<dyn Transport>, device: Device) -> Self {
        Self {
            beneath,
            inbox: VecDeque::new(),
            state: State::Opened(Rc::new(device)),
            entries: Vec::new(),
            free: Vec::new(),
            generation: 0,
            slots: BTreeMap::new(),
            dirty: Vec::new(),
            starved: Vec::new(),
            starved_retry: None,
            stall_check: None,
            next_deadline: None,
            ending: BTreeMap::new(),
            closed: Vec::new(),
            peers: Peers::default(),
            outgoing: BTreeMap::new(),
            offer_check: None,
            watching: false,
            watching_events: false,
            port_up: true,
            node_check: None,
            batch: Batch::default(),
            done: Vec::new(),
        }
    }

    /// What all connections share, made when the first one wants it.
    pub(crate) fn shared(&mut self, io: &TransportIo<'_>) -> Option<Rc<Shared>> {
        if let State::Opened(device) = &self.state {
            self.state = match Self::make_shared(device, io) {
                Ok(shared) => State::Ready(Rc::new(shared)),
                Err(error) => {
                    tracing::warn!(%error, "RDMA cannot be used on this core; connections stay on TCP");
                    State::Off
                }
            };
        }
        match &self.state {
            State::Ready(shared) => Some(shared.clone()),
            _ => None,
        }
    }

    /// The device, if there is one.
    pub(crate) fn device(&self) -> Option<Rc<Device>> {
        match &self.state {
            State::Opened(device) => Some(device.clone()),
            State::Ready(shared) => Some(shared.device.clone()),
            State::Off => None,
        }
    }

    /// Closes the device; no connection uses it any more.
    pub(crate) fn switch_off(&mut self) {
        self.state = State::Off;
        self.outgoing.clear();
        (self.offer_check, self.node_check) = (None, None);
    }

    fn make_shared(device: &Rc<Device>, io: &TransportIo<'_>) -> Result<Shared, RdmaError> {
        let region = Region::of(device, io.arena)?;
        let wanted = COMPLETIONS_OF_A_CONNECTION * RDMA_CONNECTIONS_MAX as u32;
        let entries = wanted.min(device.limits().completions);
        let completions = CompletionQueue::new(device, entries)?;
        let buffers = io.arena.usage().1 / BUFFERS_SHARE / BUFFERS_OF_A_CONNECTION;
        let connections_max = buffers.min((entries / COMPLETIONS_OF_A_CONNECTION) as usize);
        let staging = Staging::new(io.arena).map_err(|_| RdmaError::NoBuffers)?;
        Ok(Shared { connections_max, staging, completions, region, device: device.clone() })
    }

    /// How many connections there is room for.
    fn connections_max(&self) -> usize {
        match &self.state {
            State::Ready(shared) => shared.connections_max,
            _ => 0,
        }
    }

    /// A new entry; `None` when there are too many.
    pub(crate) fn insert(
        &mut self,
        conn: ConnId,
        to: Option<SocketAddr>,
        phase: Phase,
        now: Mono,
    ) -> Option<u16> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.entries.len() < self.connections_max() => {
                self.entries.push(None);
                self.entries.len() as u16 - 1
            }
            None => return None,
        };
        self.generation = self.generation.wrapping_add(1);
        let owner = Owner { slot, generation: self.generation };
        if let Some(place) = self.entries.get_mut(usize::from(slot)) {
            *place = Some(Box::new(Entry::new(conn, owner, to, phase, now)));
        }
        self.slots.insert(conn, slot);
        Some(slot)
    }

    pub(crate) fn at(&mut self, slot: u16) -> Option<&mut Entry> {
        self.entries.get_mut(usize::from(slot))?.as_deref_mut()
    }

    /// Forgets a connection here; with its queue pair goes whatever it had under way.
    pub(crate) fn remove(&mut self, slot: u16) -> Option<Box<Entry>> {
        let entry = self.entries.get_mut(usize::from(slot))?.take()?;
        self.slots.remove(&entry.conn);
        self.free.push(slot);
        Some(entry)
    }

    pub(crate) fn mark_dirty(&mut self, slot: u16) {
        if let Some(entry) = self.at(slot)
            && !entry.dirty
        {
            entry.dirty = true;
            self.dirty.push(slot);
        }
    }

    /// Ends a connection for a reason of ours, visibly.
    pub(crate) fn fail(&mut self, io: &mut TransportIo<'_>, slot: u16, reason: CloseReason, why: &str) {
        let Some(entry) = self.remove(slot) else { return };
        let pause_ms = entry.to.map(|to| self.peers.failed(to, io.now));
        let (peer, phase) = (entry.to.map(|to| to.to_string()), entry.phase);
        io.stats.rdma_breaks.add(1);
        tracing::warn!(peer, ?phase, why, tcp_for_ms = pause_ms, "an RDMA connection broke");
        io.stats.links.broke(entry.conn, why);
        self.ending.insert(entry.conn, reason);
        self.beneath(io, |beneath, io| beneath.close(io, entry.conn, false));
    }

    /// Calls the transport beneath; what it says is in the inbox.
    pub(crate) fn beneath<R>(
        &mut self,
        io: &mut TransportIo<'_>,
        call: impl FnOnce(&mut dyn Transport, &mut TransportIo<'_>) -> R,
    ) -> R {
        let Self { beneath, inbox, .. } = self;
        let mut io =
            TransportIo { ring: &mut *io.ring, arena: io.arena, events: inbox, now: io.now, stats: io.stats };
        call(beneath.as_mut(), &mut io)
    }

    /// Passes on what the transport beneath has said, and acts on what is meant for us.
    fn sort(&mut self, io: &mut TransportIo<'_>) {
        while let Some(event) = self.inbox.pop_front() {
            match event {
                Event::Connected { conn } => {
                    io.events.push_back(event);
                    if let Some(to) = self.outgoing.get(&conn).copied() {
                        self.offer(io, conn, to);
                        self.check_offers_later(io.now);
                    }
                }
                Event::Frame { conn, frame } => self.frame_beneath(io, conn, frame),
                Event::Closed { conn, reason } => self.closed(io, conn, reason),
                other => io.events.push_back(other),
            }
        }
    }

    /// The connection beneath is no more. What has arrived over RDMA before the end comes before it, but is only taken
    /// by `poll`: requests must not be judged by a time from before they were taken.
    fn closed(&mut self, io: &mut TransportIo<'_>, conn: ConnId, reason: CloseReason) {
        self.outgoing.remove(&conn);
        let reason = self.ending.remove(&conn).unwrap_or(reason);
        if self.slots.contains_key(&conn) {
            self.closed.push((conn, reason));
        } else {
            io.events.push_back(Event::Closed { conn, reason });
        }
    }

    /// Tells the end of connections whose last messages have been taken.
    fn tell_closed(&mut self, io: &mut TransportIo<'_>) {
        while let Some((conn, reason)) = self.closed.pop() {
            if let Some(slot) = self.slots.get(&conn).copied() {
                self.remove(slot);
            }
            // It may have broken meanwhile: nobody else will ask for that reason.
            self.ending.remove(&conn);
            io.events.push_back(Event::Closed { conn, reason });
        }
    }

    /// Takes what the device has completed. True when there was anything.
    fn reap(&mut self, io: &mut TransportIo<'_>) -> bool {
        let mut any = false;
        loop {
            let State::Ready(shared) = &self.state else { return any };
            let mut done = std::mem::take(&mut self.done);
            let some = shared.completions.take(&mut done);
            for one in done.drain(..) {
                self.completion(io, one);
            }
            self.done = done;
            if !some {
                return any;
            }
            any = true;
        }
    }

    fn completion(&mut self, io: &mut TransportIo<'_>, done: Done) {
        let (owner, request) = meaning(done.id);
        // Completions of a queue pair that is gone may come behind it.
        let Some(entry) = self.at(owner.slot).filter(|entry| entry.owner == owner) else { return };
        let Some(path) = &mut entry.path else { return };
        let signal = match (done.result, request) {
            (Err(status), _) if entry.phase != Phase::Switched => {
                let why = status_text(status);
                return self.give_up(io, owner.slot, &why);
            }
            (Err(status), _) => {
                let why = status_text(status);
                return self.fail(io, owner.slot, CloseReason::Broken(libc::EIO), &why);
            }
            (Ok(_), Request::Work(seq)) => {
                path.link.completed(seq);
                Ok(None)
            }
            (Ok((bytes, imm)), Request::Receive(slot)) => path.link.received(slot, bytes, imm),
        };
        match signal {
            Ok(signal) => {
                if let Some(signal) = signal {
                    self.signal(io, owner.slot, signal);
                }
                self.deliver(io, owner.slot);
                self.mark_dirty(owner.slot);
            }
            Err(error) => {
                self.fail(io, owner.slot, CloseReason::Broken(libc::EPROTO), &error.to_string());
            }
        }
    }

    /// Hands over what has come over RDMA, once everything has that was sent over TCP before.
    pub(crate) fn deliver(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        let Some(entry) = self.at(slot).filter(|entry| entry.peer_switched) else { return };
        let conn = entry.conn;
        if let Some(path) = &mut entry.path {
            path.link.deliver(|frame| io.events.push_back(Event::Frame { conn, frame }));
        }
    }

    /// Turns what a connection has queued into work, and rings the bell once.
    pub(crate) fn push_out(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        let State::Ready(shared) = &self.state else { return };
        let memory = Memory { arena: io.arena, staging: &shared.staging };
        let entry = self.entries.get_mut(usize::from(slot)).and_then(Option::as_deref_mut);
        let Some(path) = entry.and_then(|entry| entry.path.as_mut()) else { return };
        let mut batch = std::mem::take(&mut self.batch);
        let buffers = path.link.fill(memory, &mut batch);
        if !batch.work.is_empty() {
            io.stats.rdma_doorbells.add(1);
            io.stats.rdma_work_requests.add(batch.work.len() as u64);
        }
        let posted = path.pair.post(&batch);
        let awaits = path.link.awaits_peer();
        self.batch = batch;
        if let Err(error) = posted {
            return self.fail(io, slot, CloseReason::Broken(libc::EIO), &error.to_string());
        }
        if buffers == Buffers::Short {
            self.starved.push(slot);
            self.starved_retry = Some(io.now.plus_ms(STARVED_RETRY_MS));
        }
        if awaits && self.stall_check.is_none() {
            self.stall_check = Some(io.now.plus_ms(STALL_CHECK_MS));
        }
        self.finish_drain(io, slot);
    }

    /// Closes a connection that is to be closed and has sent everything.
    fn finish_drain(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        let Some(entry) = self.at(slot).filter(|entry| entry.draining && entry.phase == Phase::Switched)
        else {
            return;
        };
        if entry.path.as_ref().is_none_or(|path| path.link.is_drained())
            && let Some(entry) = self.remove(slot)
        {
            self.beneath(io, |beneath, io| beneath.close(io, entry.conn, true));
        }
    }

    /// Ends connections whose peer owes something and does nothing.
    fn check_stalls(&mut self, io: &mut TransportIo<'_>) {
        self.stall_check = None;
        for slot in 0..self.entries.len() as u16 {
            let Some(entry) = self.at(slot) else { continue };
            let Some(path) = &entry.path else { continue };
            let stall = entry.patience.look(&path.link, io.now);
            if stall == Stall::Over && entry.phase == Phase::Switched {
                self.fail(io, slot, CloseReason::TimedOut, "the peer takes nothing any more");
            } else if stall != Stall::Nothing {
                self.stall_check = Some(io.now.plus_ms(STALL_CHECK_MS));
            }
        }
    }

    fn has_switched(&mut self, slot: u16) -> bool {
        self.at(slot).is_some_and(|entry| entry.phase == Phase::Switched)
    }

    fn has_paths(&self) -> bool {
        self.free.len() < self.entries.len()
    }
}

impl Transport for RdmaTransport {
    fn listen(
        &mut self,
        io: &mut TransportIo<'_>,
        at: SocketAddr,
        framing: Framing,
        token: Token,
    ) -> Result<SocketAddr, NetError> {
        let bound = self.beneath(io, |beneath, io| beneath.listen(io, at, framing, token));
        self.sort(io);
        bound
    }

    fn connect(&mut self, io: &mut TransportIo<'_>, to: SocketAddr, framing: Framing) -> ConnId {
        let conn = self.beneath(io, |beneath, io| beneath.connect(io, to, framing));
        if framing == Framing::Frames && !matches!(self.state, State::Off) {
            self.outgoing.insert(conn, to);
        }
        self.sort(io);
        conn
    }

    fn send(&mut self, io: &mut TransportIo<'_>, conn: ConnId, frame: Frame) -> Result<(), Full> {
        let slot = self.slots.get(&conn).copied();
        let entry = slot.and_then(|slot| self.at(slot)).filter(|entry| entry.phase == Phase::Switched);
        match entry.map(|entry| (entry.owner.slot, entry.draining, &mut entry.path)) {
            Some((slot, false, Some(path))) => {
                path.link.push(frame)?;
                self.mark_dirty(slot);
                Ok(())
            }
            Some(_) => Ok(()),
            None => self.beneath(io, |beneath, io| beneath.send(io, conn, frame)),
        }
    }

    fn send_bytes(&mut self, io: &mut TransportIo<'_>, conn: ConnId, bytes: IoBuf) -> Result<(), Full> {
        self.beneath(io, |beneath, io| beneath.send_bytes(io, conn, bytes))
    }

    fn close(&mut self, io: &mut TransportIo<'_>, conn: ConnId, after_flush: bool) {
        match self.slots.get(&conn).copied() {
            Some(slot) if after_flush && self.has_switched(slot) => {
                if let Some(entry) = self.at(slot) {
                    entry.draining = true;
                }
                self.mark_dirty(slot);
            }
            Some(slot) => {
                self.remove(slot);
                self.beneath(io, |beneath, io| beneath.close(io, conn, after_flush));
            }
            None => self.beneath(io, |beneath, io| beneath.close(io, conn, after_flush)),
        }
        self.sort(io);
    }

    fn expect(&mut self, conn: ConnId, request: u64, into: IoBuf) {
        // Memory that is not registered cannot be landed in: the payload comes in a buffer of the arena.
        if !self.slots.contains_key(&conn) {
            self.beneath.expect(conn, request, into);
        }
    }

    fn completed(&mut self, io: &mut TransportIo<'_>, data: u64, result: i32, flags: u32) {
        if data == CHANNEL {
            self.watching = false;
            if let State::Ready(shared) = &self.state {
                shared.completions.woken();
            }
            return;
        }
        if data == EVENTS {
            self.events(io);
            return self.sort(io);
        }
        self.beneath(io, |beneath, io| beneath.completed(io, data, result, flags));
        self.sort(io);
    }

    fn prepare(&mut self, io: &mut TransportIo<'_>) {
        if self.starved_retry.is_some_and(|at| at <= io.now) || !self.starved.is_empty() {
            self.starved_retry = None;
            while let Some(slot) = self.starved.pop() {
                self.mark_dirty(slot);
            }
        }
        if self.next_deadline.is_some_and(|at| at <= io.now) {
            self.expire(io);
        }
        if self.stall_check.is_some_and(|at| at <= io.now) {
            self.check_stalls(io);
        }
        if self.offer_check.is_some_and(|at| at <= io.now) {
            self.offer_again(io);
        }
        if self.node_check.is_some_and(|at| at <= io.now) {
            self.check_node(io);
        }
        self.check_node_later(io.now);
        self.watch_events(io);
        // Each once: what starves is tried again later.
        for _ in 0..self.dirty.len() {
            let Some(slot) = self.dirty.pop() else { break };
            if let Some(entry) = self.at(slot) {
                entry.dirty = false;
                self.push_out(io, slot);
            }
        }
        self.beneath(io, |beneath, io| beneath.prepare(io));
        self.sort(io);
        io.stats.rdma_connections.set((self.entries.len() - self.free.len()) as u64);
    }

    fn deadline(&self) -> Option<Mono> {
        let here =
            [self.next_deadline, self.starved_retry, self.stall_check, self.offer_check, self.node_check];
        here.into_iter().chain([self.beneath.deadline()]).flatten().min()
    }

    fn poll(&mut self, io: &mut TransportIo<'_>) -> Polled {
        if !self.has_paths() && self.closed.is_empty() {
            return Polled::Nothing;
        }
        let reaped = self.reap(io);
        let closed = !self.closed.is_empty();
        self.tell_closed(io);
        if !reaped && !closed {
            return Polled::Nothing;
        }
        self.sort(io);
        Polled::Something
    }

    fn arm(&mut self, io: &mut TransportIo<'_>) -> Polled {
        if !self.has_paths() && self.closed.is_empty() {
            return Polled::Nothing;
        }
        let State::Ready(shared) = &self.state else { return Polled::Nothing };
        shared.completions.arm();
        if !self.watching {
            self.watching = true;
            let fd = types::Fd(shared.completions.fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
            // SAFETY: the entry points to no memory, and the channel lives as long as this transport.
            unsafe { io.ring.push_net(entry, CHANNEL) }
        }
        // What came before the channel was armed did not ring.
        self.poll(io)
    }
}
