//! What the control core and the data cores of a node tell each other over the mesh.
//!
//! Control only: no client data takes this way. The mesh's `Box<dyn Any + Send>` holds the `CoreMsg`
//! itself: `into_mesh` and `from_mesh` are the two ends.

use crate::config::SliceConfig;
pub use crate::disk_health::Extent;
pub use crate::strays::Leavings;
use placement::{Disk, PgRecord, Pool, ScrubDepth, Settings};
use reactor::{MeshMsg, Mono};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use wire::{CoreId, Epoch, NodeId, PgId, PoolId, Revision, SessionId, SliceId};

/// Where a member of a PG is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// The slice.
    pub slice: SliceId,
    /// Its node.
    pub node: NodeId,
    /// The node's running process, as far as known; `None` while it is down.
    pub session: Option<SessionId>,
    /// Its core's address.
    pub addr: SocketAddr,
}

/// A PG of which this core owns a member, as the metadata store has it now.
#[derive(Clone, PartialEq, Debug)]
pub struct PgUpdate {
    /// Which.
    pub pg: PgId,
    /// Its pool.
    pub pool: Pool,
    /// The record.
    pub record: PgRecord,
    /// The record's modification revision, for compare-and-swap.
    pub revision: Revision,
    /// Every slice named in `acting`, `in_sync` and `target`, resolved.
    pub members: Vec<Member>,
}

/// A PG's condition, as its primary's core reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PgReport {
    /// Which.
    pub pg: PgId,
    /// Under which epoch.
    pub epoch: Epoch,
    /// `active+clean` and so on, see `placement::PgStat`.
    pub state: String,
    /// Objects on the primary.
    pub objects: u64,
    /// Object copies still to be recovered.
    pub missing: u64,
}

/// What a scrub of a PG found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScrubReport {
    /// Which.
    pub pg: PgId,
    /// How thoroughly.
    pub depth: ScrubDepth,
    /// Objects looked at.
    pub objects: u64,
    /// Of these, the ones with a copy that was bad or different. They are being recovered.
    pub errors: u64,
}

/// A disk that was opened while the node runs.
#[derive(Clone, PartialEq, Debug)]
pub struct OpenedDisk {
    /// As it is to be registered.
    pub disk: Disk,
    /// The slices of each core.
    pub slices: Vec<(CoreId, Vec<SliceConfig>)>,
}

/// A slice that has been opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    /// Usable bytes.
    pub size_bytes: u64,
    /// Number of its superblock: rises with every open and every checkpoint, and is durable. A slice that
    /// comes with a lower number than it once had is an older copy of itself.
    pub generation: u64,
}

/// Mesh messages of a node.
#[derive(Debug)]
pub enum CoreMsg {
    // Control core to data cores.
    /// A PG changed. Newer revisions replace older ones.
    Pg(PgUpdate),
    /// The PG no longer exists, or this core owns no member of it any more.
    PgGone {
        /// Which.
        pg: PgId,
    },
    /// Until then (this node's clock, drift margin already taken off) primaries may serve.
    Lease {
        /// End of authority.
        until: Mono,
    },
    /// The cluster and session this node runs under; sent once before the first `Pg`.
    Identity {
        /// This process.
        session: SessionId,
    },
    /// What an administrator has set for the whole cluster. Defaults hold until this comes.
    Settings(Settings),
    /// The slices of the cluster that are so full that clients may put nothing more on them.
    Full {
        /// All of them; replaces what was said before.
        slices: BTreeSet<SliceId>,
    },
    /// Compare the copies of a PG whose primary is here; `Scrubbed` follows unless its record changes.
    Scrub {
        /// Which.
        pg: PgId,
        /// How thoroughly.
        depth: ScrubDepth,
    },
    /// This slice must not serve: its disk has failed elsewhere, or is not what the cluster knows.
    GiveUp {
        /// Which.
        slice: SliceId,
        /// Why, for a person.
        why: String,
        /// Only if other copies of all that it holds are there.
        spared: bool,
    },
    /// From so much time per operation on this slice's disk is an outlier among the cluster's.
    SlowFrom {
        /// Which.
        slice: SliceId,
        /// Microseconds; 0: no time is too long beside the others.
        us: u64,
    },
    /// A disk has come while the node runs: open these slices of it. `SliceOpened` follows for each.
    OpenSlices {
        /// The slices that this core is to own.
        slices: Vec<SliceConfig>,
    },
    /// The answer to `AskLeavings`.
    Leavings {
        /// The slice.
        slice: SliceId,
        /// The pool.
        pool: PoolId,
        /// What may go.
        leavings: Leavings,
    },
    /// Finish what is in flight, close the slices, answer `Stopped`.
    Stop,

    // Data cores to the control core.
    /// The slice is open and can serve (or not).
    SliceOpened {
        /// Which.
        slice: SliceId,
        /// What was opened, or why it failed.
        result: Result<Opened, String>,
    },
    /// The slice serves no more.
    SliceFailed {
        /// Which.
        slice: SliceId,
        /// Why, for a person.
        why: String,
        /// Whether the other slices of its disk have to go, too.
        extent: Extent,
    },
    /// Where this core listens; sent once after start.
    Listening {
        /// The bound address.
        addr: SocketAddr,
    },
    /// This core could not listen: it can serve nobody.
    ListenFailed {
        /// The address wanted.
        addr: SocketAddr,
        /// Why, for a person.
        error: String,
    },
    /// A PG's condition changed.
    PgReport(PgReport),
    /// A member now holds every acknowledged write: add it to `in_sync` if the record is still at this
    /// epoch.
    InSync {
        /// The PG.
        pg: PgId,
        /// Under this epoch.
        epoch: Epoch,
        /// The member.
        slice: SliceId,
    },
    /// A member cannot follow (it missed a write, or its store failed): give the PG a new epoch in which
    /// it is not in sync.
    OutOfSync {
        /// The PG.
        pg: PgId,
        /// Under this epoch.
        epoch: Epoch,
        /// The member.
        slice: SliceId,
        /// The member's store cannot serve at all: leave it out of `acting` too.
        failed: bool,
    },
    /// The primary cannot reach a member: give the PG a new epoch without it.
    Unreachable {
        /// The PG.
        pg: PgId,
        /// Under this epoch.
        epoch: Epoch,
        /// The member.
        slice: SliceId,
    },
    /// The primary cannot reach enough members, and others could serve without it. It has stopped, and never serves
    /// under this epoch again.
    GivesAway {
        /// The PG.
        pg: PgId,
        /// Under this epoch.
        epoch: Epoch,
        /// The primary.
        slice: SliceId,
    },
    /// A peer's host refused our connection: its process is gone.
    PeerRefused {
        /// The peer.
        node: NodeId,
    },
    /// Space and object counts of a slice, about once a second and when they changed.
    SliceStat {
        /// Which.
        slice: SliceId,
        /// Numbers.
        stat: placement::SliceStat,
        /// As in `Opened`; 0 while it is not known.
        generation: u64,
    },
    /// A scrub has been through all objects of a PG.
    Scrubbed(ScrubReport),
    /// A slice holds something of this pool: what of it may be erased? Answered with `Leavings`, always.
    AskLeavings {
        /// The slice.
        slice: SliceId,
        /// The pool.
        pool: PoolId,
    },
    /// Everything is closed.
    Stopped,

    // Whoever assembled the node to the control core.
    /// What became of a disk that `StatusInner::wanted_disks` named.
    DiskOpened {
        /// The number of the wish.
        ticket: u64,
        /// The disk and which core owns which of its slices, or why there is none.
        result: Result<OpenedDisk, String>,
    },
}

impl CoreMsg {
    /// As the mesh carries it.
    pub fn into_mesh(self) -> MeshMsg {
        Box::new(self)
    }

    /// From the mesh; a message of another type comes back.
    pub fn from_mesh(msg: MeshMsg) -> Result<CoreMsg, MeshMsg> {
        msg.downcast::<CoreMsg>().map(|msg| *msg)
    }
}
