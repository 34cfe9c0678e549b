//! What can go wrong, by who has to act on it: the caller of one operation (`SubmitError`, `IoError`) or
//! whoever opens images and talks to the metadata store (`AdminError`).

use reactor::CloseReason;
use thiserror::Error;
use wire::Status;

/// Why an operation was not accepted. Nothing has happened; the operation comes back to the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum SubmitError {
    /// Too much is under way already: poll completions, then submit again.
    #[error("too many operations under way")]
    Busy,
    /// Offset or length is no multiple of 4096.
    #[error("offset and length must be multiples of 4096")]
    Unaligned,
    /// Length is zero.
    #[error("length is zero")]
    Empty,
    /// Longer than `MAX_IO_BYTES`.
    #[error("longer than {max} bytes", max = crate::MAX_IO_BYTES)]
    TooLong,
    /// The range ends behind the end of the image.
    #[error("range ends behind the end of the image ({size_bytes} bytes)")]
    OutOfRange {
        /// The image's size now.
        size_bytes: u64,
    },
    /// A read needs a buffer to which no other handle exists.
    #[error("the read buffer is shared")]
    BufferShared,
    /// The handle is closed or was never given out.
    #[error("image is not open")]
    NotOpen,
    /// The image has been removed from the cluster.
    #[error("image was removed")]
    ImageRemoved,
    /// The image was opened for reading only, or deletion of objects was not asked for at `open`.
    #[error("operation is not allowed by the mode the image was opened with")]
    NotAllowed,
}

/// How an accepted operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum IoError {
    /// `Options::io_timeout_ms` went by. A write may have happened, in whole, in part or not at all.
    #[error("timed out")]
    TimedOut,
    /// No space left in the pool.
    #[error("no space left in the pool")]
    NoSpace,
    /// The device failed on every try.
    #[error("device I/O error")]
    Device,
    /// The bytes did not match their checksums on any try.
    #[error("checksum mismatch")]
    Corrupt,
    /// The node called the request invalid.
    #[error("refused as invalid")]
    Invalid,
    /// The node does not know the object, image or pool.
    #[error("not found")]
    NotFound,
    /// The image was removed from the cluster meanwhile.
    #[error("image was removed")]
    ImageRemoved,
    /// Any other refusal.
    #[error("refused: {0}")]
    Refused(Status),
}

/// Why opening an image or a metadata request failed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum AdminError {
    /// No control address answered in time.
    #[error("no node of the cluster can be reached ({tried}){}", why(.last))]
    Unreachable {
        /// The addresses tried, separated by commas.
        tried: String,
        /// How the last attempt ended.
        last: Option<CloseReason>,
    },
    /// A node answered and the metadata store did not, in time.
    #[error("the metadata store did not answer in time (last answer: {last})")]
    NoAnswer {
        /// What it said last.
        last: Status,
    },
    /// The node refused the connection's greeting.
    #[error("the node at {at} refused the connection: {status}")]
    Refused {
        /// Who.
        at: String,
        /// Why.
        status: Status,
    },
    /// No image of that name.
    #[error("no such image")]
    NotFound,
    /// The image is being removed.
    #[error("image is being removed")]
    Removing,
    /// The request does not fit a control frame.
    #[error("request is larger than a control message may be")]
    TooLarge,
    /// The connection ended after a transaction was sent: it may have been applied.
    #[error("outcome unknown: the connection ended before the answer came")]
    OutcomeUnknown,
    /// The store's answer makes no sense (value that is not what its key says).
    #[error("unexpected answer of the metadata store at key {key}")]
    Malformed {
        /// The key.
        key: String,
    },
    /// Too many images are open.
    #[error("too many images are open")]
    TooManyImages,
}

fn why(last: &Option<CloseReason>) -> String {
    last.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default()
}
