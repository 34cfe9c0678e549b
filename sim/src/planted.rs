//! The proof that the simulator can see: deliberate bugs, one at a time, and how many seeds it takes.

use crate::options::Focus;
use crate::run::{How, Outcome, Planted, Scenario, run};
use std::time::Duration;

/// Seeds a bug has until it must have been noticed.
pub const SEEDS_MAX: u64 = 200;
/// Seeds without a bug that must stay green, in every corner.
pub const CONTROL_SEEDS: u64 = 10;

/// A deliberate bug with its name and the scenario that is meant to see it.
#[derive(Clone, Debug)]
pub struct Case {
    /// For reports.
    pub name: String,
    /// Which.
    pub bug: Planted,
    /// Where.
    pub scenario: Scenario,
    /// In which corner.
    pub focus: Focus,
    /// Why it is hunted only when it is asked for by name.
    pub left_out: Option<&'static str>,
}

/// Where a bug has to be looked for.
fn focus_of(bug: Planted) -> Focus {
    use control::planted::Bug as Control;
    use engine::planted::Bug as Engine;
    match bug {
        Planted::Engine(bug) => match bug {
            Engine::ForgetOrigins => Focus::Breaks,
            Engine::OldIncarnationAccepted => Focus::GivingUp,
            Engine::SkipEpochCheck | Engine::ReadFromStalePrimary => Focus::Isolation,
            Engine::ScrubRepairsNothing => Focus::Decay,
            Engine::ScrubWithoutHold => Focus::Breaks,
            Engine::EraseReturned => Focus::Moves,
            // It takes more objects than a short history holds.
            Engine::TrustHistory | Engine::StoppedStoreUnnoticed => Focus::None,
            _ => Focus::Churn,
        },
        Planted::Control(Control::PickStalePrimary) => Focus::Churn,
        Planted::Control(Control::KeepSessionAfterLostLease) => Focus::Pauses,
        Planted::Control(_) => Focus::Isolation,
        Planted::Consensus(_) => Focus::None,
        Planted::Client(_) => Focus::Breaks,
        Planted::Store(_) => Focus::None,
    }
}

/// Bugs that are not noticed here within the seeds they get.
fn left_out(bug: Planted) -> Option<&'static str> {
    use consensus::planted::Bug as Meta;
    use control::planted::Bug as Control;
    match bug {
        Planted::Engine(engine::planted::Bug::SkipEpochCheck) => Some(
            "leases keep a replaced primary silent; what it sent before must be held up for longer than a failover; \
             engine's directed test sees it",
        ),
        Planted::Engine(engine::planted::Bug::StoppedStoreUnnoticed) => Some(
            "no answer is wrong because of it, only the disk that failed is never named; tests of broken disks see it",
        ),
        Planted::Engine(engine::planted::Bug::EraseReturned) => Some(
            "a placement group has to come back within the milliseconds of a pass; engine's directed test sees it",
        ),
        Planted::Control(Control::DemoteBeforeLeaseExpiry) => {
            Some("only a process that has died refuses a connection, and a dead one serves nobody")
        }
        Planted::Control(Control::LeaseWithoutMargin) => {
            Some("not noticed: margin and drift have to meet a slow renewal and a fast failover")
        }
        Planted::Consensus(Meta::VoteNotPersisted) => Some(
            "not noticed: a voter has to die between its vote and the new leader's first entry, and another to stand \
             for the same term just then; the group's own schedules see it",
        ),
        Planted::Consensus(Meta::LeaderPauseForgotten) => Some(
            "not noticed: a leader has to stop for less than an election takes, just before a lock's lease ends",
        ),
        Planted::Consensus(Meta::MembersNotJoint) => Some(
            "not noticed: the network has to part the voters just then into a majority of the old and one of the new \
             that have nobody in common; the group's own schedules see it",
        ),
        Planted::Consensus(Meta::LearnerTakenForCaughtUp) => {
            Some("no answer is wrong because of it, it only costs availability; the group's own test sees it")
        }
        _ => None,
    }
}

/// Every bug of every room.
pub fn cases() -> Vec<Case> {
    use {consensus::planted::Bug as Meta, control::planted::Bug as Control};
    let mut cases = Vec::new();
    for &bug in store::Bug::all() {
        let scenario = Scenario::Store;
        cases.push(Case {
            name: bug.name().to_owned(),
            bug: Planted::Store(bug),
            scenario,
            focus: Focus::None,
            left_out: None,
        });
    }
    let cluster = |name: &str, bug| Case {
        name: name.to_owned(),
        bug,
        scenario: match bug {
            Planted::Consensus(_) => Scenario::Meta,
            Planted::Engine(engine::planted::Bug::StoppedStoreUnnoticed) => Scenario::Beyond,
            _ => Scenario::Cluster,
        },
        focus: focus_of(bug),
        left_out: left_out(bug),
    };
    for &bug in engine::planted::Bug::all() {
        cases.push(cluster(bug.name(), Planted::Engine(bug)));
    }
    for (bug, name) in [
        (Control::DemoteBeforeLeaseExpiry, "control-demote-before-lease-expiry"),
        (Control::PickStalePrimary, "control-pick-stale-primary"),
        (Control::LeaseWithoutMargin, "control-lease-without-margin"),
        (Control::KeepSessionAfterLostLease, "control-keep-session-after-lost-lease"),
    ] {
        cases.push(cluster(name, Planted::Control(bug)));
    }
    for (bug, name) in [
        (Meta::AckBeforeLogDurable, "consensus-ack-before-log-durable"),
        (Meta::VoteNotPersisted, "consensus-vote-not-persisted"),
        (Meta::LeaseExpiresEarly, "consensus-lease-expires-early"),
        (Meta::WatchSkipsOnSnapshot, "consensus-watch-skips-on-snapshot"),
        (Meta::DedupForgotten, "consensus-dedup-forgotten"),
        (Meta::ReadWithoutConfirmation, "consensus-read-without-confirmation"),
        (Meta::LeaderPauseForgotten, "consensus-leader-pause-forgotten"),
        (Meta::MembersNotJoint, "consensus-members-not-joint"),
        (Meta::MembersNotInSnapshot, "consensus-members-not-in-snapshot"),
        (Meta::LearnerTakenForCaughtUp, "consensus-learner-taken-for-caught-up"),
    ] {
        cases.push(cluster(name, Planted::Consensus(bug)));
    }
    for (bug, name) in client::planted::Bug::ALL {
        cases.push(cluster(&format!("client-{name}"), Planted::Client(bug)));
    }
    cases
}

/// What became of a bug.
pub struct Caught {
    /// Seeds it took; `None`: it was not noticed.
    pub seeds: Option<u64>,
    /// What noticed it.
    pub by: String,
    /// Real time that it took.
    pub took: Duration,
}

/// Looks for the first seed that notices a bug.
pub fn hunt(case: &Case, first_seed: u64, clock: &dyn Fn() -> Duration) -> Caught {
    let began = clock();
    let how =
        How { scenario: Some(case.scenario), planted: Some(case.bug), focus: case.focus, ..How::default() };
    for nth in 0..SEEDS_MAX {
        let outcome = run(first_seed + nth, how);
        if let Some(violation) = outcome.violations.first() {
            let by = violation.lines().next().unwrap_or_default().to_owned();
            return Caught { seeds: Some(nth + 1), by, took: clock() - began };
        }
    }
    Caught { seeds: None, by: "nothing".to_owned(), took: clock() - began }
}

/// Runs without a bug, in every corner; returns the first that is not green.
pub fn control_run(first_seed: u64) -> Option<Outcome> {
    let cluster = [
        Focus::None,
        Focus::Breaks,
        Focus::GivingUp,
        Focus::Churn,
        Focus::Isolation,
        Focus::Pauses,
        Focus::Power,
        Focus::Decay,
        Focus::Moves,
    ];
    let corners = cluster.map(|focus| (Scenario::Cluster, focus));
    let others = [Scenario::Store, Scenario::Beyond, Scenario::Apps, Scenario::Meta];
    for (scenario, focus) in corners.into_iter().chain(others.map(|scenario| (scenario, Focus::None))) {
        for nth in 0..CONTROL_SEEDS {
            let outcome = run(first_seed + nth, How { scenario: Some(scenario), focus, ..How::default() });
            if !outcome.violations.is_empty() {
                return Some(outcome);
            }
        }
    }
    None
}
