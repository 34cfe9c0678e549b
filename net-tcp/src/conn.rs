//! One connection's life, from `connect` or `accept` to the one `Closed`.

use crate::recv::Receiver;
use crate::send::Sender;
use crate::socket::{self, RawAddr};
use reactor::backend::TransportIo;
use reactor::{CloseReason, ConnId, Framing, Mono};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// How long a side that has sent all and said so waits for the other's end, in milliseconds.
pub(crate) const LINGER_MS: u64 = 1_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// `connect` is under way.
    Connecting,
    /// Established.
    Open,
    /// To be closed when everything queued has been sent.
    Draining,
    /// Everything is sent and our end said so; waits for the peer's end.
    Lingering,
    /// Waits for outstanding operations, then is no more.
    Closing(CloseReason),
}

/// Operations of a connection in the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    Accept = 1,
    Connect = 2,
    Recv = 3,
    Send = 4,
}

/// User data of an operation: what, and whose.
pub(crate) fn user_data(op: Op, slot: u32) -> u64 {
    (op as u64) << 32 | u64::from(slot)
}

pub(crate) struct Conn {
    pub(crate) id: ConnId,
    pub(crate) slot: u32,
    pub(crate) fd: OwnedFd,
    pub(crate) framing: Framing,
    pub(crate) phase: Phase,
    pub(crate) recv: Receiver,
    pub(crate) send: Sender,
    pub(crate) addr: RawAddr,
    pub(crate) connecting: bool,
    pub(crate) receiving: bool,
    pub(crate) sending: bool,
    /// In the transport's list of connections with something to send.
    pub(crate) dirty: bool,
    /// In the transport's list of connections that wait for buffers.
    pub(crate) starved: bool,
    /// When the present phase ends by itself.
    pub(crate) deadline: Option<Mono>,
    /// When bytes last came, while we wait for the rest of a frame.
    pub(crate) amid_frame: Option<Mono>,
}

impl Conn {
    pub(crate) fn new(
        id: ConnId,
        slot: u32,
        fd: OwnedFd,
        framing: Framing,
        phase: Phase,
        passes_offers: bool,
    ) -> Self {
        Self {
            id,
            slot,
            fd,
            framing,
            phase,
            recv: Receiver::new(passes_offers),
            send: Sender::new(),
            addr: RawAddr::empty(),
            connecting: false,
            receiving: false,
            sending: false,
            dirty: false,
            starved: false,
            deadline: None,
            amid_frame: None,
        }
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Whether frames are still taken for sending.
    pub(crate) fn takes(&self) -> bool {
        matches!(self.phase, Phase::Connecting | Phase::Open)
    }

    pub(crate) fn start_connect(&mut self, io: &mut TransportIo<'_>) {
        let fd = io_uring::types::Fd(self.raw());
        let entry = io_uring::opcode::Connect::new(fd, self.addr.as_ptr(), self.addr.len).build();
        self.connecting = true;
        // SAFETY: the address lies in this boxed connection, which lives until the operation ended.
        unsafe { io.ring.push_net(entry, user_data(Op::Connect, self.slot)) }
    }

    pub(crate) fn start_recv(&mut self, io: &mut TransportIo<'_>) {
        if self.receiving || matches!(self.phase, Phase::Connecting | Phase::Closing(_)) {
            return;
        }
        let entry = self.recv.next(self.raw());
        self.receiving = true;
        // SAFETY: the entry points into this boxed connection's receiver and into buffers that it holds;
        // both stay until the operation ended, and nothing else touches them meanwhile.
        unsafe { io.ring.push_net(entry, user_data(Op::Recv, self.slot)) }
    }

    /// Sends what is queued, unless a send is under way.
    pub(crate) fn start_send(&mut self, io: &mut TransportIo<'_>) {
        if self.sending || !matches!(self.phase, Phase::Open | Phase::Draining) {
            return;
        }
        match self.send.next(self.raw()) {
            Some((entry, short)) => {
                self.sending = true;
                let data = user_data(Op::Send, self.slot);
                // SAFETY: the entry points into this boxed connection's sender and the buffers that it
                // holds; both stay until the operation ended.
                unsafe {
                    if short { io.ring.push_net_inline(entry, data) } else { io.ring.push_net(entry, data) }
                }
            }
            None if self.phase == Phase::Draining => {
                socket::shut(&self.fd, libc::SHUT_WR);
                self.phase = Phase::Lingering;
                self.deadline = Some(io.now.plus_ms(LINGER_MS));
            }
            None => {}
        }
    }

    /// Starts the end. The first reason counts.
    pub(crate) fn begin_close(&mut self, io: &mut TransportIo<'_>, reason: CloseReason) {
        if matches!(self.phase, Phase::Closing(_)) {
            return;
        }
        self.phase = Phase::Closing(reason);
        self.deadline = None;
        self.recv.forget_expected();
        if self.connecting {
            io.ring.cancel_net(user_data(Op::Connect, self.slot));
        } else if self.receiving || self.sending {
            socket::shut(&self.fd, libc::SHUT_RDWR);
        }
    }

    /// Whether it is closing and the kernel has let go of everything.
    pub(crate) fn ended(&self) -> Option<CloseReason> {
        match self.phase {
            Phase::Closing(reason) if !self.connecting && !self.receiving && !self.sending => Some(reason),
            _ => None,
        }
    }
}

/// What an errno means for a connection.
pub(crate) fn reason_of(errno: i32) -> CloseReason {
    match errno {
        libc::ECONNREFUSED => CloseReason::Refused,
        libc::ETIMEDOUT => CloseReason::TimedOut,
        errno => CloseReason::Broken(errno),
    }
}
