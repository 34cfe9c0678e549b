//! One core's listeners and connections.

use crate::conn::{Conn, Op, Phase, reason_of, user_data};
use crate::recv::Parsed;
use crate::send::Heads;
use crate::socket::{self, RawAddr};
use io_uring::{cqueue, opcode, types};
use reactor::backend::{Transport, TransportIo};
use reactor::{
    CONNECT_TIMEOUT_MS, CloseReason, ConnId, Event, FRAME_STALL_MS, Frame, Framing, Full, IoBuf, Mono,
    NetError, Token,
};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use wire::{BlockCrcs, FrameKind, Status};

/// Connections of one core: bounds what unauthenticated peers can make us hold (64 KiB of stream buffer
/// and one partial payload each). Further ones are closed at once.
pub const MAX_CONNECTIONS: usize = 4096;
/// Low bits of a `ConnId` that hold the slot; the others count connections.
const SLOT_BITS: u32 = 20;
/// How long accepting pauses after an error such as too many open files, in milliseconds.
const ACCEPT_PAUSE_MS: u64 = 100;
/// How often connections that wait for buffers look again when nothing else turns the loop.
const STARVED_RETRY_MS: u64 = 1;

struct Listener {
    fd: OwnedFd,
    framing: Framing,
    token: Token,
    /// Where the kernel writes the peer's address.
    peer: RawAddr,
    resume_at: Option<Mono>,
}

/// TCP for one core.
#[derive(Default)]
pub struct TcpTransport {
    // Boxed, because the kernel holds pointers into them.
    #[allow(clippy::vec_box, reason = "listeners must not move while an accept is under way")]
    listeners: Vec<Box<Listener>>,
    conns: Vec<Option<Box<Conn>>>,
    free: Vec<u32>,
    made: u64,
    dirty: Vec<u32>,
    starved: VecDeque<u32>,
    starved_retry: Option<Mono>,
    deadlines: BinaryHeap<Reverse<(Mono, ConnId)>>,
    /// When to look for connections whose frame has stopped half-way.
    stall_check: Option<Mono>,
    heads: Heads,
    /// See `beneath`.
    passes_offers: bool,
}

impl TcpTransport {
    /// A transport without connections.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, as the reactor's factories want it.
    pub fn boxed() -> Box<dyn Transport> {
        Box::new(Self::default())
    }

    /// The same, beneath a transport that offers another path and answers such offers itself.
    pub fn beneath() -> Box<dyn Transport> {
        Box::new(Self { passes_offers: true, ..Self::default() })
    }

    fn slot_of(conn: ConnId) -> u32 {
        (conn.0 & ((1 << SLOT_BITS) - 1)) as u32
    }

    fn get(&mut self, conn: ConnId) -> Option<&mut Conn> {
        let slot = Self::slot_of(conn) as usize;
        self.conns.get_mut(slot)?.as_deref_mut().filter(|found| found.id == conn)
    }

    fn at(&mut self, slot: u32) -> Option<&mut Conn> {
        self.conns.get_mut(slot as usize)?.as_deref_mut()
    }

    /// A fresh number, also for connections that never come to be.
    fn number(&mut self, slot: u32) -> ConnId {
        self.made += 1;
        ConnId(self.made << SLOT_BITS | u64::from(slot))
    }

    fn insert(&mut self, fd: OwnedFd, framing: Framing, phase: Phase) -> Option<ConnId> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.conns.len() < MAX_CONNECTIONS => {
                self.conns.push(None);
                self.conns.len() as u32 - 1
            }
            None => return None,
        };
        let id = self.number(slot);
        if let Some(place) = self.conns.get_mut(slot as usize) {
            let passes = self.passes_offers;
            *place = Some(Box::new(Conn::new(id, slot, fd, framing, phase, passes)));
        }
        Some(id)
    }

    /// After anything that may have ended it: says `Closed` and frees the slot.
    fn settle(&mut self, io: &mut TransportIo<'_>, slot: u32) {
        let Some(conn) = self.at(slot) else { return };
        let (Some(reason), id) = (conn.ended(), conn.id) else { return };
        if let Some(place) = self.conns.get_mut(slot as usize) {
            *place = None;
        }
        self.free.push(slot);
        io.stats.links.closed(id);
        io.events.push_back(Event::Closed { conn: id, reason });
    }

    fn mark_dirty(&mut self, slot: u32) {
        if let Some(conn) = self.at(slot)
            && !conn.dirty
        {
            conn.dirty = true;
            self.dirty.push(slot);
        }
    }

    fn start_accept(&mut self, io: &mut TransportIo<'_>, index: u32) {
        let Some(listener) = self.listeners.get_mut(index as usize) else { return };
        listener.resume_at = None;
        listener.peer = RawAddr::empty();
        let entry = opcode::Accept::new(
            types::Fd(listener.fd.as_raw_fd()),
            (&raw mut listener.peer.storage).cast(),
            &raw mut listener.peer.len,
        )
        .flags(libc::SOCK_CLOEXEC)
        .build();
        // SAFETY: the address lies in the boxed listener, which lives as long as the transport.
        unsafe { io.ring.push_net(entry, user_data(Op::Accept, index)) }
    }

    fn accepted(&mut self, io: &mut TransportIo<'_>, index: u32, result: i32) {
        let Some(listener) = self.listeners.get_mut(index as usize) else { return };
        if result < 0 {
            match -result {
                libc::ECANCELED => return,
                libc::EINTR | libc::EAGAIN | libc::ECONNABORTED => {}
                errno => {
                    tracing::warn!(errno, "accepting pauses");
                    listener.resume_at = Some(io.now.plus_ms(ACCEPT_PAUSE_MS));
                    return;
                }
            }
            return self.start_accept(io, index);
        }
        let (framing, token, from) = (listener.framing, listener.token, listener.peer.get());
        // SAFETY: a successful accept returns a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(result) };
        self.start_accept(io, index);
        if let Err(errno) = socket::tune(&fd) {
            // The peer has gone already; nothing was announced yet.
            tracing::debug!(errno, %from, "connection died before it was accepted");
            return;
        }
        let Some(id) = self.insert(fd, framing, Phase::Open) else {
            tracing::warn!(%from, MAX_CONNECTIONS, "too many connections; closing a new one");
            return;
        };
        if framing == Framing::Frames {
            io.stats.links.opened(id, from, false);
        }
        io.events.push_back(Event::Accepted { conn: id, token, from });
        if let Some(conn) = self.get(id) {
            conn.start_recv(io);
        }
    }

    fn connected(&mut self, io: &mut TransportIo<'_>, slot: u32, result: i32) {
        let Some(conn) = self.at(slot) else { return };
        conn.connecting = false;
        match conn.phase {
            Phase::Connecting if result == 0 => {
                conn.phase = Phase::Open;
                conn.deadline = None;
                if conn.framing == Framing::Frames {
                    io.stats.links.opened(conn.id, conn.addr.get(), true);
                }
                io.events.push_back(Event::Connected { conn: conn.id });
                conn.start_recv(io);
                self.mark_dirty(slot);
            }
            Phase::Connecting if matches!(-result, libc::EINTR | libc::EAGAIN) => conn.start_connect(io),
            _ => conn.begin_close(io, reason_of(-result)),
        }
        self.settle(io, slot);
    }

    fn received(&mut self, io: &mut TransportIo<'_>, slot: u32, result: i32, flags: u32) {
        let Some(conn) = self.at(slot) else { return };
        conn.receiving = false;
        match (conn.phase, result) {
            (Phase::Closing(_), _) => {}
            (Phase::Lingering, 1..) => {
                // Nobody listens any more; read on until the peer's end comes.
                conn.recv = crate::recv::Receiver::new(false);
                conn.start_recv(io);
            }
            (Phase::Lingering, ..=0) => conn.begin_close(io, CloseReason::Local),
            (_, 1..) => {
                conn.recv.received(result as usize, cqueue::sock_nonempty(flags), conn.id, io.events);
                self.parse(io, slot);
            }
            (_, 0) => conn.begin_close(io, CloseReason::Peer),
            (_, error) => match -error {
                libc::EINTR | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => conn.start_recv(io),
                errno => conn.begin_close(io, reason_of(errno)),
            },
        }
        self.settle(io, slot);
    }

    /// Delivers what has come and receives on, or waits for buffers.
    fn parse(&mut self, io: &mut TransportIo<'_>, slot: u32) {
        let Some(conn) = self.conns.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        loop {
            match conn.recv.parse(conn.framing, io.arena, conn.id, io.events) {
                Parsed::Hungry => {
                    conn.amid_frame = conn.recv.is_amid_a_frame().then_some(io.now);
                    conn.start_recv(io);
                    if conn.amid_frame.is_some() && self.stall_check.is_none() {
                        self.stall_check = Some(io.now.plus_ms(FRAME_STALL_MS));
                    }
                }
                Parsed::Starved => {
                    // It is us who do not read on.
                    conn.amid_frame = None;
                    conn.starved = true;
                    self.starved.push_back(slot);
                    self.starved_retry = Some(io.now.plus_ms(STARVED_RETRY_MS));
                }
                Parsed::Refused(error) => conn.begin_close(io, CloseReason::Protocol(error)),
                Parsed::Offered(offer) => {
                    let header = offer.reply(FrameKind::LinkReply, Status::Invalid);
                    let answer = Frame { header, crcs: BlockCrcs::default(), payload: None };
                    // To a peer that does not read its answers, no more of them than the queue takes.
                    if conn.send.push_frame(&mut self.heads, answer).is_ok() && !conn.dirty {
                        conn.dirty = true;
                        self.dirty.push(slot);
                    }
                    continue;
                }
            }
            break;
        }
    }

    fn sent(&mut self, io: &mut TransportIo<'_>, slot: u32, result: i32) {
        let Self { conns, heads, .. } = self;
        let Some(Some(conn)) = conns.get_mut(slot as usize) else { return };
        conn.sending = false;
        match result {
            0.. => conn.send.advance(heads, result as usize),
            error => match -error {
                libc::EINTR | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => {}
                errno => conn.begin_close(io, reason_of(errno)),
            },
        }
        if !conn.send.is_empty() || conn.phase == Phase::Draining {
            self.mark_dirty(slot);
        }
        self.settle(io, slot);
    }

    fn expire(&mut self, io: &mut TransportIo<'_>) {
        while let Some(Reverse((at, id))) = self.deadlines.peek().copied() {
            if at > io.now {
                break;
            }
            self.deadlines.pop();
            // A deadline that no longer holds belongs to an earlier phase.
            let Some(conn) = self.get(id).filter(|conn| conn.deadline == Some(at)) else { continue };
            let reason =
                if conn.phase == Phase::Connecting { CloseReason::TimedOut } else { CloseReason::Local };
            conn.begin_close(io, reason);
            self.settle(io, Self::slot_of(id));
        }
        for index in 0..self.listeners.len() {
            let due = self.listeners.get(index).and_then(|listener| listener.resume_at);
            if due.is_some_and(|at| at <= io.now) {
                self.start_accept(io, index as u32);
            }
        }
    }

    /// Ends connections that have sent a part of a frame and then nothing for too long: they hold a stream
    /// buffer and a payload's buffer of ours.
    fn end_stalled(&mut self, io: &mut TransportIo<'_>) {
        self.stall_check = None;
        for slot in 0..self.conns.len() as u32 {
            let Some((conn, since)) = self.at(slot).and_then(|conn| conn.amid_frame.map(|at| (conn, at)))
            else {
                continue;
            };
            let due = since.plus_ms(FRAME_STALL_MS);
            if due > io.now {
                self.stall_check = Some(self.stall_check.map_or(due, |at| at.min(due)));
                continue;
            }
            conn.amid_frame = None;
            conn.begin_close(io, CloseReason::TimedOut);
            self.settle(io, slot);
        }
    }

    fn retry_starved(&mut self, io: &mut TransportIo<'_>) {
        self.starved_retry = None;
        for _ in 0..self.starved.len() {
            let Some(slot) = self.starved.pop_front() else { break };
            let Some(conn) = self.at(slot).filter(|conn| conn.starved) else { continue };
            conn.starved = false;
            if matches!(conn.phase, Phase::Closing(_)) {
                continue;
            }
            self.parse(io, slot);
            self.settle(io, slot);
        }
    }
}

impl Transport for TcpTransport {
    fn listen(
        &mut self,
        io: &mut TransportIo<'_>,
        at: SocketAddr,
        framing: Framing,
        token: Token,
    ) -> Result<SocketAddr, NetError> {
        let (fd, bound) = socket::listen(at)?;
        let peer = RawAddr::empty();
        self.listeners.push(Box::new(Listener { fd, framing, token, peer, resume_at: None }));
        self.start_accept(io, self.listeners.len() as u32 - 1);
        Ok(bound)
    }

    fn connect(&mut self, io: &mut TransportIo<'_>, to: SocketAddr, framing: Framing) -> ConnId {
        let fd = socket::stream(to).and_then(|fd| socket::tune(&fd).map(|()| fd));
        let made = fd.and_then(|fd| self.insert(fd, framing, Phase::Connecting).ok_or(libc::EMFILE));
        let id = match made {
            Ok(id) => id,
            Err(errno) => {
                // Beyond every slot, so that the number never means another connection.
                let conn = self.number((1 << SLOT_BITS) - 1);
                io.events.push_back(Event::Closed { conn, reason: CloseReason::Broken(errno) });
                return conn;
            }
        };
        let due = io.now.plus_ms(CONNECT_TIMEOUT_MS);
        self.deadlines.push(Reverse((due, id)));
        if let Some(conn) = self.get(id) {
            conn.addr = RawAddr::of(to);
            conn.deadline = Some(due);
            conn.start_connect(io);
        }
        id
    }

    fn send(&mut self, _: &mut TransportIo<'_>, conn: ConnId, frame: Frame) -> Result<(), Full> {
        let slot = Self::slot_of(conn);
        let Self { conns, heads, dirty, .. } = self;
        let Some(Some(found)) = conns.get_mut(slot as usize) else { return Ok(()) };
        if found.id != conn || !found.takes() {
            return Ok(());
        }
        found.send.push_frame(heads, frame)?;
        if !found.dirty {
            found.dirty = true;
            dirty.push(slot);
        }
        Ok(())
    }

    fn send_bytes(&mut self, _: &mut TransportIo<'_>, conn: ConnId, bytes: IoBuf) -> Result<(), Full> {
        let Some(found) = self.get(conn).filter(|found| found.takes()) else { return Ok(()) };
        found.send.push_bytes(bytes)?;
        self.mark_dirty(Self::slot_of(conn));
        Ok(())
    }

    fn close(&mut self, io: &mut TransportIo<'_>, conn: ConnId, after_flush: bool) {
        let Some(found) = self.get(conn) else { return };
        if after_flush && found.phase == Phase::Open {
            found.phase = Phase::Draining;
            self.mark_dirty(Self::slot_of(conn));
        } else {
            found.begin_close(io, CloseReason::Local);
            self.settle(io, Self::slot_of(conn));
        }
    }

    fn expect(&mut self, conn: ConnId, request: u64, into: IoBuf) {
        if let Some(found) = self.get(conn).filter(|found| found.takes()) {
            found.recv.expect(request, into);
        }
    }

    fn forget_expected(&mut self, conn: ConnId) {
        if let Some(found) = self.get(conn) {
            found.recv.forget_expected();
        }
    }

    fn completed(&mut self, io: &mut TransportIo<'_>, data: u64, result: i32, flags: u32) {
        let slot = data as u32;
        match data >> 32 {
            1 => self.accepted(io, slot, result),
            2 => self.connected(io, slot, result),
            3 => self.received(io, slot, result, flags),
            4 => self.sent(io, slot, result),
            _ => {}
        }
    }

    fn prepare(&mut self, io: &mut TransportIo<'_>) {
        if !self.starved.is_empty() {
            self.retry_starved(io);
        }
        if self.deadline().is_some_and(|at| at <= io.now) {
            self.expire(io);
        }
        if self.stall_check.is_some_and(|at| at <= io.now) {
            self.end_stalled(io);
        }
        while let Some(slot) = self.dirty.pop() {
            let Some(conn) = self.at(slot) else { continue };
            conn.dirty = false;
            conn.start_send(io);
            if let (Phase::Lingering, Some(at)) = (conn.phase, conn.deadline) {
                let id = conn.id;
                self.deadlines.push(Reverse((at, id)));
            }
        }
    }

    fn deadline(&self) -> Option<Mono> {
        let heap = self.deadlines.peek().map(|Reverse((at, _))| *at);
        let listeners = self.listeners.iter().filter_map(|listener| listener.resume_at).min();
        [heap, listeners, self.starved_retry, self.stall_check].into_iter().flatten().min()
    }
}
