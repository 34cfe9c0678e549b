//! A connection's way to RDMA.

use crate::link::{Link, Patience};
use crate::queue_pair::{Owner, QueuePair};
use reactor::{ConnId, Mono};
use std::net::SocketAddr;

/// How far two sides have got (see `negotiate`). Until a side has switched it sends over TCP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// We have made an offer.
    Offered,
    /// The peer has accepted; a probe is under way.
    Probing,
    /// We have accepted the peer's offer.
    Answered,
    /// We send over RDMA.
    Switched,
}

/// The RDMA path of a connection.
pub(crate) struct Path {
    // Dropped first: afterwards the device touches no memory that the link holds.
    pub(crate) pair: QueuePair,
    pub(crate) link: Link,
}

/// A connection that uses RDMA or is about to.
pub(crate) struct Entry {
    pub(crate) conn: ConnId,
    pub(crate) owner: Owner,
    /// Where we connected to; `None` when the peer connected.
    pub(crate) to: Option<SocketAddr>,
    pub(crate) phase: Phase,
    pub(crate) path: Option<Path>,
    /// The peer's last frame over TCP has come: what comes over RDMA may be delivered.
    pub(crate) peer_switched: bool,
    /// To be closed when everything is sent.
    pub(crate) draining: bool,
    /// In the transport's list of connections with something to do.
    pub(crate) dirty: bool,
    /// When the present phase ends by itself.
    pub(crate) deadline: Option<Mono>,
    /// When the probe was sent.
    pub(crate) probed: Mono,
    /// With a peer that owes something.
    pub(crate) patience: Patience,
}

impl Entry {
    pub(crate) fn new(conn: ConnId, owner: Owner, to: Option<SocketAddr>, phase: Phase, now: Mono) -> Self {
        Self {
            conn,
            owner,
            to,
            phase,
            path: None,
            peer_switched: false,
            draining: false,
            dirty: false,
            deadline: None,
            probed: now,
            patience: Patience::new(now),
        }
    }
}
