//! Why a metadata node stops.

use reactor::DiskError;
use thiserror::Error;
use wire::{ClusterId, NodeId};

/// A failure after which this voter takes no further part: going on could break promises it has made.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum MetaError {
    /// The configuration makes no sense.
    #[error("bad metadata configuration: {0}")]
    Config(&'static str),
    /// The device failed.
    #[error("metadata region: {0}")]
    Disk(#[from] DiskError),
    /// No memory for a device operation.
    #[error("no buffer memory for the metadata region")]
    NoBuffers,
    /// The region holds something, but its superblock is neither valid nor blank.
    #[error("the superblock of the metadata region is damaged")]
    SuperblockDamaged,
    /// The region was written by another version of the format.
    #[error("the metadata region has format version {0}")]
    OtherVersion(u32),
    /// The region belongs to another cluster.
    #[error("the metadata region belongs to cluster {0}")]
    OtherCluster(ClusterId),
    /// The region belongs to another node.
    #[error("the metadata region belongs to node {0}")]
    OtherNode(NodeId),
    /// The region was formatted with another size.
    #[error("the metadata region was formatted with another size")]
    OtherSize,
    /// A snapshot that is needed does not match its checksum.
    #[error("the snapshot up to entry {index} is damaged")]
    SnapshotDamaged {
        /// Its last entry.
        index: u64,
    },
    /// A log block is damaged although later ones exist: it may have held committed entries, so nothing
    /// is cut off. The node's region must be recreated from the other voters by an operator.
    #[error("log block {block} of the metadata region is damaged, later blocks exist up to {last}")]
    LogDamaged {
        /// The damaged block's number.
        block: u64,
        /// The last readable block's number.
        last: u64,
    },
    /// The state does not fit into a snapshot area.
    #[error("the metadata ({bytes} bytes) does not fit into a snapshot area of {max} bytes")]
    SnapshotTooLarge {
        /// Size of the image.
        bytes: u64,
        /// Room.
        max: u64,
    },
    /// A committed entry could not be decoded: voters of different versions are mixed.
    #[error("log entry {index} cannot be decoded")]
    BadEntry {
        /// The entry.
        index: u64,
    },
    /// The leader knows that this voter had entries which it does not have any more.
    #[error("this voter has lost log entries: it has {last}, the leader counts on {expected}")]
    EntriesLost {
        /// Last entry here.
        last: u64,
        /// Entry that was acknowledged.
        expected: u64,
    },
    /// The consensus library refused the recovered state.
    #[error("consensus library: {0}")]
    Raft(String),
}
