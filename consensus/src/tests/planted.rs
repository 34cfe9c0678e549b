//! The checks see deliberate bugs.

use super::{faults, leases};
use crate::planted::{Bug, Planted};
use crate::testing::Options;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Seeds until the bug is noticed.
fn noticed(mut attempt: impl FnMut(u64) -> Result<(), String>) -> Option<(u64, String)> {
    (0..100).find_map(|seed| match catch_unwind(AssertUnwindSafe(|| attempt(seed))) {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some((seed, error)),
        Err(panic) => Some((seed, panic.downcast_ref::<String>().cloned().unwrap_or_default())),
    })
}

fn under_faults(bug: Bug) {
    let (seed, what) =
        noticed(|seed| faults::run(seed, 3, 0, Planted::with(bug)).map(drop)).expect("noticed");
    println!("{bug:?}: seed {seed}: {what}");
}

fn under_changes(bug: Bug) {
    let (seed, what) =
        noticed(|seed| faults::run(seed, 3, 2, Planted::with(bug)).map(drop)).expect("noticed");
    println!("{bug:?}: seed {seed}: {what}");
}

#[test]
fn changing_voters_in_one_step_is_noticed() {
    under_changes(Bug::MembersNotJoint);
}

#[test]
fn forgetting_the_members_in_snapshots_is_noticed() {
    under_changes(Bug::MembersNotInSnapshot);
}

#[test]
fn acknowledging_before_the_log_is_durable_is_noticed() {
    under_faults(Bug::AckBeforeLogDurable);
}

#[test]
fn forgetting_the_vote_is_noticed() {
    under_faults(Bug::VoteNotPersisted);
}

#[test]
fn silence_about_a_snapshot_is_noticed() {
    under_faults(Bug::WatchSkipsOnSnapshot);
}

#[test]
fn forgetting_retries_is_noticed() {
    under_faults(Bug::DedupForgotten);
}

#[test]
fn early_ends_of_leases_are_noticed() {
    let options = Options {
        loss: 20,
        doubled: 20,
        delay_us: 20_000,
        planted: Planted::with(Bug::LeaseExpiresEarly),
        ..Options::default()
    };
    let attempt = |seed| leases::owners_under_leader_changes(seed, options.clone());
    let (seed, what) = noticed(attempt).expect("noticed");
    println!("LeaseExpiresEarly: seed {seed}: {what}");
}
