//! The seam behind which the network lives: `net-tcp` and `net-rdma` implement `Transport`.
//!
//! A transport belongs to one core. It pushes submissions into the core's ring under its own 56 bits of
//! user data, gets their completions back, and appends events. It is called on the core's thread only.

use super::ring::Ring;
use super::stats::CoreStats;
use crate::buf::{Arena, IoBuf};
use crate::env::{CloseReason, ConnId, Event, Frame, Framing, Full, Mono, NetError, Token};
use std::collections::VecDeque;
use std::net::SocketAddr;

/// What a transport may use while it is called.
pub struct TransportIo<'a> {
    /// The core's ring, for `Ring::push_net`.
    pub ring: &'a mut Ring,
    /// The core's buffers.
    pub arena: &'a Arena,
    /// Where events for the service go.
    pub events: &'a mut VecDeque<Event>,
    /// Time, as of this batch.
    pub now: Mono,
    /// What the core counts.
    pub stats: &'a CoreStats,
}

/// One core's connections.
pub trait Transport {
    /// See `Net::listen`.
    fn listen(
        &mut self,
        io: &mut TransportIo<'_>,
        at: SocketAddr,
        framing: Framing,
        token: Token,
    ) -> Result<SocketAddr, NetError>;
    /// See `Net::connect`.
    fn connect(&mut self, io: &mut TransportIo<'_>, to: SocketAddr, framing: Framing) -> ConnId;
    /// See `Net::send`. Only queues; `prepare` sends.
    fn send(&mut self, io: &mut TransportIo<'_>, conn: ConnId, frame: Frame) -> Result<(), Full>;
    /// See `Net::send_bytes`. Only queues; `prepare` sends.
    fn send_bytes(&mut self, io: &mut TransportIo<'_>, conn: ConnId, bytes: IoBuf) -> Result<(), Full>;
    /// See `Net::close`.
    fn close(&mut self, io: &mut TransportIo<'_>, conn: ConnId, after_flush: bool);
    /// See `Net::expect`.
    fn expect(&mut self, conn: ConnId, request: u64, into: IoBuf);
    /// Nothing that `expect` announced on this connection will come: nothing may be written there any more.
    fn forget_expected(&mut self, _conn: ConnId) {}
    /// A submission with user data `data` completed. `flags` as in the completion queue entry.
    fn completed(&mut self, io: &mut TransportIo<'_>, data: u64, result: i32, flags: u32);
    /// Called before every submission: turns what is queued into submissions, retries what waits for
    /// buffers, expires what took too long.
    fn prepare(&mut self, io: &mut TransportIo<'_>);
    /// When `prepare` has to be called again even if nothing happens.
    fn deadline(&self) -> Option<Mono>;
    /// Looks for what a device of the transport's own has completed, without a system call, and appends events. Called
    /// in every turn and while the loop spins.
    fn poll(&mut self, _io: &mut TransportIo<'_>) -> Polled {
        Polled::Nothing
    }
    /// Called before the loop sleeps: from now on the device must wake the ring. `Something` when it has completed
    /// something meanwhile: then the loop does not sleep.
    fn arm(&mut self, _io: &mut TransportIo<'_>) -> Polled {
        Polled::Nothing
    }
}

/// What polling a transport's device came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Polled {
    /// The device has completed nothing.
    Nothing,
    /// There are events, or `prepare` has something to do.
    Something,
}

/// No network: for tools that use disks only. Every connection attempt breaks at once.
#[derive(Default)]
pub struct NoTransport {
    connections: u64,
}

impl Transport for NoTransport {
    fn listen(
        &mut self,
        _: &mut TransportIo<'_>,
        _: SocketAddr,
        _: Framing,
        _: Token,
    ) -> Result<SocketAddr, NetError> {
        Err(NetError::Os(libc::EOPNOTSUPP))
    }

    fn connect(&mut self, io: &mut TransportIo<'_>, _: SocketAddr, _: Framing) -> ConnId {
        self.connections += 1;
        let conn = ConnId(self.connections);
        io.events.push_back(Event::Closed { conn, reason: CloseReason::Broken(libc::EOPNOTSUPP) });
        conn
    }

    fn send(&mut self, _: &mut TransportIo<'_>, _: ConnId, _: Frame) -> Result<(), Full> {
        Ok(())
    }

    fn send_bytes(&mut self, _: &mut TransportIo<'_>, _: ConnId, _: IoBuf) -> Result<(), Full> {
        Ok(())
    }

    fn close(&mut self, _: &mut TransportIo<'_>, _: ConnId, _: bool) {}

    fn expect(&mut self, _: ConnId, _: u64, _: IoBuf) {}

    fn completed(&mut self, _: &mut TransportIo<'_>, _: u64, _: i32, _: u32) {}

    fn prepare(&mut self, _: &mut TransportIo<'_>) {}

    fn deadline(&self) -> Option<Mono> {
        None
    }
}
