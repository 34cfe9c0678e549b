//! Outcomes that cross the wire. One byte in every reply's header.

use thiserror::Error;

/// What became of an operation. `Ok` is zero; everything else is an error a caller can match on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Error)]
#[repr(u8)]
pub enum Status {
    /// Done, and durable where that was asked.
    #[error("ok")]
    Ok = 0,
    /// The sender's epoch is older than the receiver's: fetch the map and try again.
    #[error("stale epoch")]
    StaleEpoch = 1,
    /// The receiver is not (or not yet, or no longer) the primary of this PG: fetch the map, try again.
    #[error("not the primary of this placement group")]
    NotPrimary = 2,
    /// The PG cannot serve now (peering, below min_size): try again later.
    #[error("placement group is not active")]
    NotActive = 3,
    /// Queues or buffers are full: try again.
    #[error("busy")]
    Busy = 4,
    /// No space left on a slice of this PG.
    #[error("no space left")]
    NoSpace = 5,
    /// The device failed.
    #[error("device I/O error")]
    Io = 6,
    /// The bytes do not match their checksum.
    #[error("checksum mismatch")]
    Corrupt = 7,
    /// The request itself is wrong (range, alignment, unknown kind); retrying cannot help.
    #[error("invalid request")]
    Invalid = 8,
    /// No such object, image, pool or key.
    #[error("not found")]
    NotFound = 9,
    /// The peer belongs to another cluster.
    #[error("wrong cluster")]
    WrongCluster = 10,
    /// The peer speaks another protocol version.
    #[error("unsupported protocol version")]
    WrongVersion = 11,
    /// The outcome is unknown: the connection ended before an answer came.
    #[error("outcome unknown")]
    Unknown = 12,
    /// It exists already.
    #[error("exists already")]
    Exists = 13,
    /// The node is stopping.
    #[error("shutting down")]
    ShuttingDown = 14,
    /// The member missed an earlier change of this object: it must be recovered before it can follow.
    #[error("member is out of sync")]
    OutOfSync = 15,
    /// The metadata voters are being changed already.
    #[error("another change of the metadata voters is under way")]
    ChangeUnderWay = 16,
    /// A metadata group has 1, 3, 5 or 7 voters.
    #[error("a metadata group has 1, 3, 5 or 7 voters")]
    VoterCount = 17,
    /// Too few of the voters that would be left can be heard.
    #[error("too few of the voters that would be left can be reached")]
    QuorumAtRisk = 18,
}

impl Status {
    /// Decodes the header's byte; a byte of a newer protocol reads as `Unknown`.
    pub fn from_u8(byte: u8) -> Self {
        match byte {
            0 => Self::Ok,
            1 => Self::StaleEpoch,
            2 => Self::NotPrimary,
            3 => Self::NotActive,
            4 => Self::Busy,
            5 => Self::NoSpace,
            6 => Self::Io,
            7 => Self::Corrupt,
            8 => Self::Invalid,
            9 => Self::NotFound,
            10 => Self::WrongCluster,
            11 => Self::WrongVersion,
            13 => Self::Exists,
            14 => Self::ShuttingDown,
            15 => Self::OutOfSync,
            16 => Self::ChangeUnderWay,
            17 => Self::VoterCount,
            18 => Self::QuorumAtRisk,
            _ => Self::Unknown,
        }
    }

    /// Whether a client should fetch the map and try again.
    pub fn is_retryable(self) -> bool {
        matches!(
            self,
            Self::StaleEpoch
                | Self::NotPrimary
                | Self::NotActive
                | Self::Busy
                | Self::Unknown
                | Self::ShuttingDown
        )
    }
}
