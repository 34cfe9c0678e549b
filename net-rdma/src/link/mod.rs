//! One connection over a queue pair, as a state machine without verbs: frames in, work requests out;
//! completions in, frames out. What drives it is `transport`; in tests it is a model of two queue pairs.
//!
//! - **Credits.** A side sends only when the other has a receive posted for it, so "receiver not ready" never
//!   happens. Credits come back with every message, or alone when half of them are owed. The last one is kept for
//!   messages that free something at the other side, so that two sides that wait for each other both go on.
//! - **Small payloads** are part of the message and land in a block of the receiver's arena.
//! - **Large payloads** stay where they are. The sender opens a memory window over exactly those bytes, for this
//!   queue pair only, and says where; the receiver fetches them with RDMA READ into its own arena and says `Done`;
//!   the sender closes the window and only then lets go of the memory. No side can ever write into the other.
//! - **Order.** Frames are delivered in the order sent: one whose payload is still being fetched holds up those
//!   behind it.
//! - **Bounds.** `RECEIVES` posted receives, `SENDS` work requests, `WINDOWS` windows. A receive is posted again only
//!   while fewer than `RECEIVES` frames wait to be delivered, and that of a large frame only when it is fetched.
//!
//! Start reading at `outgoing`, then `incoming`; `message` has the format.

mod incoming;
mod message;
mod outgoing;
mod staging;
mod stall;
#[cfg(test)]
mod tests;

use message::SMALL_PAYLOAD_BYTES;
pub(crate) use message::{CREDITS_MAX, Descriptor, Kind};
pub(crate) use message::{HEAD_BYTES, PART_BYTES};
pub(crate) use staging::Staging;
#[cfg_attr(
    not(any(test, feature = "rdma")),
    allow(unused_imports, reason = "driven by the verbs transport only")
)]
pub(crate) use stall::{Patience, Stall};

use incoming::Incoming;
use outgoing::Outgoing;
use reactor::{Arena, Frame, Full, NoBuffers};
use thiserror::Error;
use wire::HeaderError;

/// Receives that each side keeps posted: a queue depth of 64 for a client on one connection. Each takes a block of
/// the arena and a head, some 270 KiB for a connection.
pub(crate) const RECEIVES: u16 = 64;
/// Work requests that may be outstanding on one connection: as many messages as the peer has receives, a window
/// to be opened for each of half of them, and fetches.
pub(crate) const SENDS: u16 = 128;
/// Large payloads that may be on their way to the peer at once: 4 MiB of them, more than any link here has in flight.
pub(crate) const WINDOWS: u16 = 32;

/// Bytes of the arena that a connection holds: a block for each receive, and heads for receives and work requests.
pub(crate) const BUFFERS_OF_A_CONNECTION: usize =
    RECEIVES as usize * (wire::BLOCK_BYTES + HEAD_BYTES) + SENDS as usize * HEAD_BYTES;

/// A piece of memory of this side, for a work request. Whoever made the work request keeps it alive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) addr: u64,
    pub(crate) len: u32,
}

/// A work request for the send queue.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// SEND with immediate data.
    Message { imm: u32, head: Option<Span>, payload: Option<Span> },
    /// Opens a window over `span` under `key`, to be read by the peer.
    Bind { window: u16, key: u32, span: Span },
    /// Closes the window with `key`.
    Invalidate { key: u32 },
    /// RDMA READ.
    Read { into: Span, from: Descriptor },
}

/// A receive to be posted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Receive {
    pub(crate) slot: u16,
    pub(crate) head: Span,
    pub(crate) payload: Span,
}

/// What a link wants done, in this order: first the receives, then the work, numbered from `first_seq` on.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) receives: Vec<Receive>,
    pub(crate) work: Vec<Work>,
    pub(crate) first_seq: u64,
}

/// The core's registered memory.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a> {
    pub(crate) arena: &'a Arena,
    pub(crate) staging: &'a Staging,
}

/// Whether the link waits for buffers of the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Buffers {
    Enough,
    Short,
}

/// What the peer's message says beyond frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Signal {
    Probe,
    ProbeReply,
}

/// The peer does not keep to the protocol. The connection is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub(crate) enum LinkError {
    #[error("unknown message {0:#010x}")]
    Immediate(u32),
    #[error("message of {0} bytes, which its kind does not have")]
    Length(u32),
    #[error("more credits than there are receives")]
    Credits,
    #[error("a message for which no receive was granted")]
    Uncredited,
    #[error("done with window {0}, which is not open")]
    Window(u16),
    #[error("a part of {0} bytes that belongs to no frame")]
    Part(u32),
    #[error("{0}")]
    Header(#[from] HeaderError),
}

/// One end of a connection.
pub(crate) struct Link {
    outgoing: Outgoing,
    incoming: Incoming,
    /// Rises whenever the peer or the device has done something for us.
    progress: u64,
}

impl Link {
    /// A link whose windows have these keys. It can send nothing before `grant`.
    pub(crate) fn new(arena: &Arena, window_keys: &[u32]) -> Result<Self, NoBuffers> {
        Ok(Self {
            outgoing: Outgoing::new(arena, window_keys)?,
            incoming: Incoming::new(arena)?,
            progress: 0,
        })
    }

    /// The peer has so many receives.
    pub(crate) fn grant(&mut self, receives: u16) {
        self.outgoing.grant(receives);
    }

    /// Queues a frame.
    pub(crate) fn push(&mut self, frame: Frame) -> Result<(), Full> {
        self.outgoing.push(frame)
    }

    /// Queues a message without a frame.
    pub(crate) fn signal(&mut self, kind: Kind) {
        self.outgoing.signal(kind, 0);
    }

    /// Turns what is queued into work, as far as credits, the send queue and buffers allow.
    pub(crate) fn fill(&mut self, memory: Memory<'_>, batch: &mut Batch) -> Buffers {
        batch.receives.clear();
        batch.work.clear();
        batch.first_seq = self.outgoing.next_seq();
        let posted = self.incoming.post_receives(memory.arena, &mut self.outgoing, &mut batch.receives);
        let pulled = self.incoming.fetch(memory, &mut self.outgoing, &mut batch.work);
        let sent = self.outgoing.fill(memory, &mut batch.work);
        if [posted, pulled, sent].contains(&Buffers::Short) { Buffers::Short } else { Buffers::Enough }
    }

    /// A receive has completed with a message of `bytes`.
    pub(crate) fn received(&mut self, slot: u16, bytes: u32, imm: u32) -> Result<Option<Signal>, LinkError> {
        self.progress += 1;
        self.incoming.received(&mut self.outgoing, slot, bytes, imm)
    }

    /// The work request whose number ends in the low bits `seq` has completed, and with it all before it.
    pub(crate) fn completed(&mut self, seq: u32) {
        self.progress += 1;
        let incoming = &mut self.incoming;
        self.outgoing.completed(seq, |outgoing, read| incoming.fetched(outgoing, read));
    }

    /// Hands over the frames that are complete, in order.
    pub(crate) fn deliver(&mut self, take: impl FnMut(Frame)) {
        self.incoming.deliver(take);
    }

    /// Nothing is queued, and the peer has everything that was sent.
    pub(crate) fn is_drained(&self) -> bool {
        self.outgoing.is_drained() && self.incoming.is_idle()
    }

    /// Rises with everything that the peer or the device does.
    pub(crate) fn progress(&self) -> u64 {
        self.progress
    }

    /// Whether the peer owes something: credits, a `Done`, or acknowledgements.
    pub(crate) fn awaits_peer(&self) -> bool {
        !self.outgoing.is_drained()
    }
}
