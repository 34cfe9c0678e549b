//! Deliberate bugs of a data core, to prove that tests and the simulator can see: see `reactor::Planted`.

/// A bug of the data core.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Bug {
    /// Members and primaries do not look at the epoch of what they are asked to do.
    SkipEpochCheck,
    /// A write is acknowledged when the first copy has it.
    AckBeforeAllMembers,
    /// A primary serves without looking at its lease.
    ReadFromStalePrimary,
    /// A read does not wait for in-flight writes that it overlaps.
    ReadOverlappingInflight,
    /// After a reconnection the sub-operations in flight are taken for acknowledged.
    ForgetResend,
    /// A fresh primary believes that its members equal it.
    SkipListOnFreshPrimary,
    /// Writes to an object go on while it is being pushed.
    PushWithoutBlockingWrites,
    /// A member applies a sub-write to whatever it has, and the primary does not recover the object first.
    AcceptOutOfOrderSubwrite,
    /// An older connection of a session stays welcome beside a newer one.
    OldIncarnationAccepted,
    /// A primary does not recognise changes that are sent again.
    ForgetOrigins,
    /// A scrub finds what is bad and leaves it.
    ScrubRepairsNothing,
    /// Changes of an object go on while a scrub compares its copies.
    ScrubWithoutHold,
    /// What the history does not name is taken for equal, whatever the digests say.
    TrustHistory,
    /// What a PG once left behind is erased although the PG has come back.
    EraseReturned,
    /// A store that stops with nobody waiting for it stays in service.
    StoppedStoreUnnoticed,
}

impl Bug {
    /// All of them.
    pub fn all() -> &'static [Bug] {
        &[
            Self::SkipEpochCheck,
            Self::AckBeforeAllMembers,
            Self::ReadFromStalePrimary,
            Self::ReadOverlappingInflight,
            Self::ForgetResend,
            Self::SkipListOnFreshPrimary,
            Self::PushWithoutBlockingWrites,
            Self::AcceptOutOfOrderSubwrite,
            Self::OldIncarnationAccepted,
            Self::ForgetOrigins,
            Self::ScrubRepairsNothing,
            Self::ScrubWithoutHold,
            Self::TrustHistory,
            Self::EraseReturned,
            Self::StoppedStoreUnnoticed,
        ]
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::SkipEpochCheck => "engine-skip-epoch-check",
            Self::AckBeforeAllMembers => "engine-ack-before-all-members",
            Self::ReadFromStalePrimary => "engine-read-from-stale-primary",
            Self::ReadOverlappingInflight => "engine-read-overlapping-inflight",
            Self::ForgetResend => "engine-forget-resend",
            Self::SkipListOnFreshPrimary => "engine-skip-list-on-fresh-primary",
            Self::PushWithoutBlockingWrites => "engine-push-without-blocking-writes",
            Self::AcceptOutOfOrderSubwrite => "engine-accept-out-of-order-subwrite",
            Self::OldIncarnationAccepted => "engine-old-incarnation-accepted",
            Self::ForgetOrigins => "engine-forget-origins",
            Self::ScrubRepairsNothing => "engine-scrub-repairs-nothing",
            Self::ScrubWithoutHold => "engine-scrub-without-hold",
            Self::TrustHistory => "engine-trust-history",
            Self::EraseReturned => "engine-erase-returned",
            Self::StoppedStoreUnnoticed => "engine-stopped-store-unnoticed",
        }
    }
}

/// Which one is planted, if any.
pub type Planted = reactor::Planted<Bug>;
