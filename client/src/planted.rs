//! Deliberate bugs, compiled only with the feature `planted`, with which the simulator proves that its
//! checkers see what they claim to see.

/// One deliberate bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A write whose connection ended before its answer is reported as done instead of being sent again.
    WriteNotRetriedReportedOk,
    /// Overlapping operations are sent at once instead of one after the other.
    OverlapOrderIgnored,
    /// What was under way on a queue pair that broke is taken for not done, and asked for anew: the device said that it
    /// failed. Only RDMA ends connections so.
    FlushedTakenForFailed,
    /// Read replies are delivered without comparing them with their checksums.
    ReadCrcIgnored,
}

impl Bug {
    /// Every bug of this room, with its name.
    pub const ALL: [(Bug, &'static str); 4] = [
        (Bug::WriteNotRetriedReportedOk, "write-not-retried-reported-ok"),
        (Bug::OverlapOrderIgnored, "overlap-order-ignored"),
        (Bug::FlushedTakenForFailed, "flushed-taken-for-failed"),
        (Bug::ReadCrcIgnored, "stale-read-crc-ignored"),
    ];
}

/// How a connection ends whose queue pair broke.
pub(crate) const FLUSHED: reactor::CloseReason = reactor::CloseReason::Broken(5);
