//! Deliberate bugs, to prove that tests and the simulator can see. Without the feature `planted` no bug
//! can be chosen and every check folds to `false`.

/// A deliberate bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// Tells Raft that its log is durable when the write has only been submitted.
    AckBeforeLogDurable,
    /// Leaves the vote out of what is written to the log.
    VoteNotPersisted,
    /// Lets leases run out after a quarter of their time to live.
    LeaseExpiresEarly,
    /// Says nothing to watchers when a snapshot replaces the state.
    WatchSkipsOnSnapshot,
    /// Applies a retried request again.
    DedupForgotten,
}

/// Which bug, if any.
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

    /// This bug.
    #[cfg(feature = "planted")]
    pub fn with(bug: Bug) -> Self {
        Self { bug: Some(bug) }
    }

    /// Whether this bug was chosen.
    #[inline]
    pub fn has(self, _bug: Bug) -> bool {
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
