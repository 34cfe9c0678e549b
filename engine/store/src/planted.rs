//! Deliberate bugs, one per instance, so that a simulator can prove that it would notice them.
//!
//! The enumeration always exists; the switch (`StoreOptions::planted`) only with feature `planted`.

/// A bug of the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Bug {
    /// Replay applies the first record of a commit once more after the next commit.
    ApplyRecordTwice,
    /// Completions are given when the commit is submitted.
    AckBeforeDurable,
    /// Reads do not compare checksums.
    SkipReadChecksum,
    /// A superseded block is reused at once.
    ReuseTooEarly,
    /// A superseded block is reused once the superseding commit is durable, before anything durable says so.
    ReuseWhenDurable,
    /// Replay drops the last record of every commit block.
    LoseLastRecord,
    /// A deletion removes the object without a trace.
    ForgetTombstone,
    /// Replay takes a commit whose data may be torn.
    AcceptTornCommit,
    /// The superblock may name a checkpoint whose commits are not durable yet.
    CheckpointTooEarly,
}

impl Bug {
    /// All of them.
    pub fn all() -> &'static [Bug] {
        &[
            Self::ApplyRecordTwice,
            Self::AckBeforeDurable,
            Self::SkipReadChecksum,
            Self::ReuseTooEarly,
            Self::ReuseWhenDurable,
            Self::LoseLastRecord,
            Self::ForgetTombstone,
            Self::AcceptTornCommit,
            Self::CheckpointTooEarly,
        ]
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::ApplyRecordTwice => "store-apply-record-twice",
            Self::AckBeforeDurable => "store-ack-before-durable",
            Self::SkipReadChecksum => "store-skip-read-checksum",
            Self::ReuseTooEarly => "store-reuse-too-early",
            Self::ReuseWhenDurable => "store-reuse-when-durable",
            Self::LoseLastRecord => "store-lose-last-record",
            Self::ForgetTombstone => "store-forget-tombstone",
            Self::AcceptTornCommit => "store-accept-torn-commit",
            Self::CheckpointTooEarly => "store-checkpoint-too-early",
        }
    }
}
