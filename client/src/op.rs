//! Operations as the caller sees them.

use crate::error::{AdminError, IoError};
use reactor::IoBuf;
use wire::control::{Change, MetaReply};
use wire::{ImageId, PoolId, Revision};

/// An open image of one client. Not reused after `close`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct ImageHandle(pub(crate) u64);

impl ImageHandle {
    /// As a number, for interfaces without types.
    pub fn to_raw(self) -> u64 {
        self.0
    }
    /// From `to_raw`; a number that is no handle is refused wherever it is used.
    pub fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
}

/// An accepted operation of one client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A pending `open`, `meta` or `watch` of one client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct AdminTicket(pub u64);

/// An operation on an image. Offsets and lengths are bytes and multiples of 4096.
#[derive(Debug)]
pub enum Op {
    /// Fills `buf` from `offset`.
    Read {
        /// Bytes from the start of the image.
        offset: u64,
        /// Destination; its length is the length to read. The only handle to its memory, or foreign
        /// memory, into which the transport may deliver directly.
        buf: IoBuf,
    },
    /// Writes `buf` to `offset`.
    Write {
        /// Bytes from the start of the image.
        offset: u64,
        /// Source; must not change until the operation completes.
        buf: IoBuf,
    },
    /// The range need not be kept: reads as zeroes from then on, and its space is freed.
    Discard {
        /// Bytes from the start of the image.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeroes from then on.
    WriteZeroes {
        /// Bytes from the start of the image.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Completes once every write, discard and write-zeroes of the image that was submitted before it has
    /// completed. Every completion already means durable.
    Flush,
    /// Removes whole objects. Needs `OpenMode::Removal`.
    DeleteObjects {
        /// First object.
        first: u64,
        /// How many.
        count: u64,
    },
}

/// A completed operation.
#[derive(Debug)]
pub struct IoDone {
    /// From `submit`.
    pub ticket: Ticket,
    /// The caller's number, from `submit`.
    pub user: u64,
    /// What became of it. After an error a read's buffer has unspecified contents.
    pub result: Result<(), IoError>,
    /// The operation's buffer, for reads and writes.
    pub buf: Option<IoBuf>,
}

/// An image as the cluster describes it now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImageInfo {
    /// Its number.
    pub id: ImageId,
    /// Its pool.
    pub pool: PoolId,
    /// Its size in bytes; changes when it is resized.
    pub size_bytes: u64,
    /// It was removed; operations fail.
    pub removed: bool,
}

/// A completed `open` or `meta`, or news of the watch.
#[derive(Debug)]
pub enum AdminDone {
    /// To `open`.
    Opened {
        /// From `open`.
        ticket: AdminTicket,
        /// The image, ready for operations.
        result: Result<ImageHandle, AdminError>,
    },
    /// To `meta`.
    Meta {
        /// From `meta`.
        ticket: AdminTicket,
        /// The store's answer.
        result: Result<MetaReply, AdminError>,
    },
    /// To `watch`: what has changed since the last one. The first has every present key. None is skipped
    /// and none repeated, also across a change of connection; then several revisions may come as one.
    Watch {
        /// From `watch`.
        ticket: AdminTicket,
        /// Revision up to which this describes the keys.
        revision: Revision,
        /// In order.
        changes: Vec<Change>,
    },
}
