//! Deliberate bugs, to prove that tests and the simulator can see: see `reactor::Planted`.

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
    /// Answers a range from the replica at hand, without asking whether somebody else leads.
    ReadWithoutConfirmation,
    /// A leader whose process was stopped does not add the pause to the leases.
    LeaderPauseForgotten,
    /// Promotes a learner whatever it has.
    LearnerTakenForCaughtUp,
    /// Changes voters in one step: for a while two majorities need not meet.
    MembersNotJoint,
    /// Leaves the members out of snapshots on disk: a restart goes back to the founders.
    MembersNotInSnapshot,
}

/// Which one is planted, if any.
pub type Planted = reactor::Planted<Bug>;
