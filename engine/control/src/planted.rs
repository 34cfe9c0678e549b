//! Deliberate bugs, to prove that tests and the simulator can see. Without the feature `planted` no bug
//! can be chosen and every check folds to `false`.

/// A deliberate bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// The director replaces a primary as soon as a peer reports its node unreachable, although its
    /// lease still runs.
    DemoteBeforeLeaseExpiry,
    /// The director takes any live member as the new primary, in sync or not.
    PickStalePrimary,
    /// Authority is counted from the arrival of the renewal's answer, without a margin for drift.
    LeaseWithoutMargin,
    /// A node whose lease was lost registers again under its old session.
    KeepSessionAfterLostLease,
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
