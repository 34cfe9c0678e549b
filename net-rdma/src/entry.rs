//! One connection that uses RDMA or is about to find out whether it can.

use crate::link::Link;
use crate::queue_pair::{Owner, QueuePair};
use reactor::{ConnId, Frame, Mono};
use std::collections::VecDeque;
use std::net::SocketAddr;

/// How far two sides have got.
///
/// The side that connects: `Connecting` until TCP is there, `Offered` until the answer, `Probing` until a message
/// has gone there and back over RDMA, then `Open`. The other side: `Answered` until the first side commits to RDMA,
/// then `Open`; or it gives up, and both stay on TCP. Frames to be sent wait meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Connecting,
    Offered,
    Probing,
    Answered,
    Open,
}

/// The RDMA path of a connection.
pub(crate) struct Path {
    // Dropped first: afterwards the device touches no memory that the link holds.
    pub(crate) pair: QueuePair,
    pub(crate) link: Link,
}

/// A connection.
pub(crate) struct Entry {
    pub(crate) conn: ConnId,
    pub(crate) owner: Owner,
    /// Where we connected to; `None` when the peer connected.
    pub(crate) to: Option<SocketAddr>,
    pub(crate) phase: Phase,
    pub(crate) path: Option<Path>,
    /// Frames that wait for the decision.
    pub(crate) held: VecDeque<Frame>,
    /// To be closed when everything is sent.
    pub(crate) draining: bool,
    /// In the transport's list of connections with something to do.
    pub(crate) dirty: bool,
    /// When the present phase ends by itself.
    pub(crate) deadline: Option<Mono>,
    /// When the probe was sent.
    pub(crate) probed: Mono,
    /// The link's progress when it was last looked at, and when it last changed.
    pub(crate) progress: (u64, Mono),
}

impl Entry {
    pub(crate) fn new(conn: ConnId, owner: Owner, to: Option<SocketAddr>, phase: Phase, now: Mono) -> Self {
        Self {
            conn,
            owner,
            to,
            phase,
            path: None,
            held: VecDeque::new(),
            draining: false,
            dirty: false,
            deadline: None,
            probed: now,
            progress: (0, now),
        }
    }
}
