//! Deliberate bugs, to prove that tests and the simulator can see: see `reactor::Planted`.

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

/// Which one is planted, if any.
pub type Planted = reactor::Planted<Bug>;
