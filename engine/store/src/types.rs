//! What callers of the store see: options, errors, events, statistics.

use reactor::{DiskError, IoBuf};
use thiserror::Error;
use wire::{BlockCrcs, ClusterId, ObjectId, SliceId, Status, Version};

use crate::superblock::SuperError;

/// Where a slice lies on its disk, from the disk's superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SliceGeometry {
    /// The slice's identity; compared with its superblock.
    pub slice: SliceId,
    /// First byte on the disk, a multiple of 4096.
    pub offset: u64,
    /// Bytes, a multiple of 4096.
    pub len: u64,
}

/// The tokens a store may use for its disk operations: `first .. first + count`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TokenRange {
    /// The lowest token.
    pub first: u64,
    /// How many. At least `TOKENS_MIN`; bounds the operations in flight.
    pub count: u32,
}

impl TokenRange {
    /// Whether a completion with this token belongs to the store.
    pub fn contains(&self, token: u64) -> bool {
        token >= self.first && token - self.first < u64::from(self.count)
    }
}

/// Fewest tokens a store works with: `READS_MAX` reads of 32 parts would want more, but parts wait in a
/// queue when tokens run out; commits, pages and the checkpoint need some beside them.
pub const TOKENS_MIN: u32 = 1024;

/// Reads in progress in one store; beyond it `StoreError::Busy`. Several times a client's full depth.
pub const READS_MAX: usize = 2048;

/// Commits submitted and not yet durable. More would not help a drive and would lengthen replay's
/// verification; meanwhile mutations gather in the next commit.
pub const COMMITS_IN_FLIGHT_MAX: usize = 8;

/// Commits closed and waiting for submission; beyond it `StoreError::Busy`.
pub const COMMITS_SEALED_MAX: usize = 64;

/// Smallest slice: below 16 MiB the reserve would leave nothing to use.
pub const SLICE_BYTES_MIN: u64 = 16 << 20;

/// How a store runs. Nothing here changes the format.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// When set, a slice of another cluster is refused.
    pub cluster: Option<ClusterId>,
    /// Bytes of object pages kept in memory.
    pub page_cache_bytes: usize,
    /// Objects changed since the last checkpoint that start the next one at the latest. More means fewer
    /// page writes per client write on a large working set, and about 60 bytes of memory each.
    pub dirty_objects_max: u32,
    /// Changes remembered as hints for comparing copies (`groups`), 8 bytes each.
    pub history_changes: usize,
    /// A deliberate bug.
    #[cfg(feature = "planted")]
    pub planted: Option<crate::planted::Bug>,
    /// Gives freed blocks to the next one-block write, so that a block reused too early shows. Without it
    /// free space is used round robin, and a block rests long before its turn.
    #[cfg(feature = "planted")]
    pub eager_reuse: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            cluster: None,
            page_cache_bytes: 16 << 20,
            dirty_objects_max: 65_536,
            history_changes: crate::groups::HISTORY_CHANGES,
            #[cfg(feature = "planted")]
            planted: None,
            #[cfg(feature = "planted")]
            eager_reuse: false,
        }
    }
}

/// Why an operation was refused or failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum StoreError {
    /// The store has not finished opening, or is closing.
    #[error("store is not open")]
    NotOpen,
    /// A bound is reached (reads, commits, or space that is about to be recycled): try again after the next
    /// completion. Nothing has happened.
    #[error("store is busy")]
    Busy,
    /// No space for a new object or a new block.
    #[error("no space left on the slice")]
    NoSpace,
    /// Range, alignment, or lengths that do not fit together.
    #[error("invalid request")]
    Invalid,
    /// Bytes do not match their checksum: on the disk (reads) or as given (writes).
    #[error("checksum mismatch")]
    Corrupt,
    /// The device failed this operation.
    #[error("device I/O error")]
    Io,
    /// A write of the device failed earlier; the store has stopped.
    #[error("store has failed: {0}")]
    Failed(DiskError),
    /// The store stopped because its own structures on disk are damaged.
    #[error("store has failed: damaged structure")]
    Damaged,
    /// The store's owner has given it up.
    #[error("store has been given up")]
    Abandoned,
    /// `purge` of something that is not a tombstone of this version.
    #[error("not a tombstone of this version")]
    NotTombstone,
}

impl StoreError {
    /// The outcome as it crosses the wire.
    pub fn status(self) -> Status {
        match self {
            Self::NotOpen => Status::NotActive,
            Self::Busy => Status::Busy,
            Self::NoSpace => Status::NoSpace,
            Self::Invalid => Status::Invalid,
            Self::Corrupt => Status::Corrupt,
            Self::Io | Self::Failed(_) | Self::Damaged | Self::Abandoned => Status::Io,
            Self::NotTombstone => Status::NotFound,
        }
    }
}

/// Why a slice did not open.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum OpenError {
    /// The geometry is impossible (alignment, size).
    #[error("impossible slice geometry")]
    Geometry,
    /// Neither superblock copy is usable.
    #[error("superblock: {0}")]
    Super(#[from] SuperError),
    /// The superblock is of another slice.
    #[error("superblock is of slice {found}, expected {expected}")]
    WrongSlice {
        /// As asked for.
        expected: SliceId,
        /// As found.
        found: SliceId,
    },
    /// The slice belongs to another cluster.
    #[error("slice belongs to cluster {found}")]
    WrongCluster {
        /// As found.
        found: ClusterId,
    },
    /// A node of the page map, or a page, fails its checks.
    #[error("damaged metadata block at {block}")]
    Damaged {
        /// Block number in the slice.
        block: u64,
    },
    /// Two structures claim the same block.
    #[error("block {block} is used twice")]
    DoubleUse {
        /// Block number in the slice.
        block: u64,
    },
    /// An object has two records.
    #[error("object {object} has two records")]
    Duplicate {
        /// The object.
        object: ObjectId,
    },
    /// The device failed.
    #[error("device: {0}")]
    Disk(#[from] DiskError),
    /// The slice has no free block left to go on with.
    #[error("no free block left")]
    NoSpace,
}

/// What `open` found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenReport {
    /// Object records, tombstones included.
    pub objects: u64,
    /// Object pages read.
    pub pages: u64,
    /// Commits replayed.
    pub commits: u64,
    /// Records replayed.
    pub records: u64,
    /// Commits behind the log's end that were cut off because they were incomplete: never acknowledged.
    pub cut: u64,
}

/// What a slice knows of an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Presence {
    /// Nothing.
    #[default]
    Absent,
    /// It exists.
    Live(Version),
    /// It was deleted.
    Tombstone(Version),
}

impl Presence {
    /// The version, if anything is known.
    pub fn version(self) -> Option<Version> {
        match self {
            Self::Absent => None,
            Self::Live(v) | Self::Tombstone(v) => Some(v),
        }
    }
}

/// A range read.
#[derive(Clone, Debug)]
pub struct ReadData {
    /// The blocks; unwritten ones are zero.
    pub data: IoBuf,
    /// One checksum per block.
    pub crcs: BlockCrcs,
    /// What was there when the read was resolved.
    pub presence: Presence,
}

/// A whole object.
#[derive(Clone, Debug)]
pub struct ObjectData {
    /// What was there when the read was resolved.
    pub presence: Presence,
    /// Bit i: block i is written and in `data`.
    pub mask: u32,
    /// The written blocks one behind the other; `None` when there are none.
    pub data: Option<IoBuf>,
    /// Their checksums.
    pub crcs: BlockCrcs,
}

/// What the store tells its owner.
#[derive(Debug)]
pub enum StoreEvent {
    /// The slice is open, or is not.
    Opened(Result<OpenReport, OpenError>),
    /// A mutation is durable, and all before it; or failed.
    Done {
        /// As given.
        ticket: u64,
        /// What became of it.
        result: Result<(), StoreError>,
    },
    /// `read` ended.
    Read {
        /// As given.
        ticket: u64,
        /// The data.
        result: Result<ReadData, StoreError>,
    },
    /// `read_object` ended.
    Object {
        /// As given.
        ticket: u64,
        /// The object.
        result: Result<ObjectData, StoreError>,
    },
    /// `close` ended: everything is checkpointed (or the store has failed).
    Closed(Result<(), StoreError>),
}

/// One object of a listing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListEntry {
    /// The object.
    pub object: ObjectId,
    /// Its version.
    pub version: Version,
    /// Whether it is a tombstone.
    pub tombstone: bool,
}

/// Where a listing goes on. Starts at `ListCursor::default()`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ListCursor(pub u32);

/// Counters and gauges.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StoreStats {
    /// Object records, tombstones included.
    pub objects: u64,
    /// Tombstones among them.
    pub tombstones: u64,
    /// Blocks of client data.
    pub data_blocks: u64,
    /// Bytes used, everything included.
    pub used_bytes: u64,
    /// Of the bytes used, those of data that was overwritten or removed and wait for the next checkpoint. It comes
    /// when their space is wanted, so they count as free wherever a slice's fill level matters.
    pub superseded_bytes: u64,
    /// Bytes free, the reserve included.
    pub free_bytes: u64,
    /// Bytes a new object cannot have.
    pub reserve_bytes: u64,
    /// Commits made durable.
    pub commits: u64,
    /// Mutations made durable.
    pub mutations: u64,
    /// Checkpoints finished.
    pub checkpoints: u64,
    /// Bytes given to the device for writing.
    pub written_bytes: u64,
    /// Bytes of client data among them.
    pub written_data_bytes: u64,
    /// Device writes submitted.
    pub device_writes: u64,
    /// Device reads submitted.
    pub device_reads: u64,
    /// Bytes asked from the device.
    pub read_bytes: u64,
    /// Pages found in memory.
    pub page_hits: u64,
    /// Pages that had to be read.
    pub page_misses: u64,
    /// Device operations in flight.
    pub in_flight: u64,
    /// Device operations that have ended.
    pub device_ops: u64,
    /// Time they took, each from its submission to its end.
    pub device_wait_ns: u64,
    /// Time in which at least one was under way, up to the last moment when none was.
    pub device_busy_ns: u64,
    /// Reads in progress.
    pub reads: u64,
    /// Blocks that failed their checksum.
    pub corrupt: u64,
    /// Bytes of memory for index, free space map and page table.
    pub index_bytes: u64,
    /// Bytes of memory for changes not yet checkpointed.
    pub overlay_bytes: u64,
    /// Bytes of memory of the page cache.
    pub cache_bytes: u64,
    /// Log blocks a replay would read.
    pub log_blocks: u64,
}
