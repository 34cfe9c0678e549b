//! Whole runs: the same seed twice, seeds that failed once, and a bug that must be seen.

use sim::planted;
use sim::run::{How, Job, Outcome, Scenario, run};

fn run_in(seed: u64, scenario: Scenario) -> Outcome {
    run(seed, How { scenario: Some(scenario), ..How::default() })
}

#[test]
fn a_seed_gives_the_same_run_twice_and_other_seeds_another() {
    for scenario in Scenario::ALL {
        let (once, again, other) = (run_in(11, scenario), run_in(11, scenario), run_in(12, scenario));
        assert!(once.violations.is_empty(), "{once}");
        assert_eq!(once.trace_hash, again.trace_hash, "{scenario:?}");
        assert_eq!(once.summary, again.summary);
        assert_ne!(once.trace_hash, other.trace_hash);
        assert!(once.operations > 0, "{once}");
    }
}

/// The whole file is replayed by `sim --replay-file`; here it must at least be readable, and its first run.
#[test]
fn past_failures_stay_fixed() {
    let text = include_str!("../seeds.txt");
    let jobs = sim::run::parse_seeds(text).unwrap();
    assert!(!jobs.is_empty());
    for Job { seed, scenario, flavour } in jobs.into_iter().take(3) {
        let outcome = run(seed, How { scenario, flavour, ..How::default() });
        assert!(outcome.violations.is_empty(), "{outcome}");
    }
}

#[test]
fn deliberate_bugs_are_noticed() {
    for name in ["engine-ack-before-all-members", "store-ack-before-durable", "client-overlap-order-ignored"]
    {
        let case = planted::cases().into_iter().find(|case| case.name == name).unwrap();
        let caught = planted::hunt(&case, 1, &Default::default);
        assert!(caught.seeds.is_some(), "{name} was not noticed");
    }
}
