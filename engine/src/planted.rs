//! Deliberate bugs, one per core, so that a simulator can prove that it would notice them.
//!
//! The enumeration always exists; a `Planted` can hold one only with feature `planted`, and without it
//! `Planted::is` is constantly false, so that nothing of this is left in a shipped binary.

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
        }
    }
}

/// The bug of a core: none, unless compiled with feature `planted` and asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Planted {
    #[cfg(feature = "planted")]
    bug: Option<Bug>,
}

impl Planted {
    /// No bug.
    pub fn none() -> Self {
        Self::default()
    }

    /// With this bug.
    #[cfg(feature = "planted")]
    pub fn with(bug: Bug) -> Self {
        Self { bug: Some(bug) }
    }

    /// Whether this very bug is planted.
    #[inline]
    pub(crate) fn is(self, _bug: Bug) -> bool {
        #[cfg(feature = "planted")]
        {
            self.bug == Some(_bug)
        }
        #[cfg(not(feature = "planted"))]
        {
            false
        }
    }
}
