//! Every planted bug is noticed by the crash model (`--features planted`).
#![cfg(feature = "planted")]
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::model::{Shape, run};
use common::*;
use store::{Bug, StoreOptions};

const SEEDS: u64 = 200;

fn shape(bug: Option<Bug>, seed: u64) -> Shape {
    Shape {
        objects: if seed.is_multiple_of(2) { 8 } else { 30 },
        steps: 500,
        kind: DiskKind { atomic: 512, write_through: false, reorder: true },
        options: StoreOptions {
            dirty_objects_max: 64,
            page_cache_bytes: 0,
            planted: bug,
            eager_reuse: true,
            ..StoreOptions::default()
        },
        disk_bytes: 24 << 20,
        cuts: 4,
        closes: false,
        flush_one_in: 3,
    }
}

/// Runs seeds until one fails; what it said.
fn noticed(bug: Bug) -> Option<(u64, String)> {
    (1..=SEEDS).find_map(|seed| run(seed, shape(Some(bug), seed)).err().map(|why| (seed, why)))
}

#[test]
fn every_planted_bug_is_noticed() {
    let mut missed = Vec::new();
    for bug in Bug::all() {
        // A read without its checksum shows only on a damaged disk: see below.
        if *bug == Bug::SkipReadChecksum {
            continue;
        }
        match noticed(*bug) {
            Some((seed, why)) => println!("{}: seed {seed}: {why:.120}", bug.name()),
            None => missed.push(bug.name()),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

#[test]
fn without_a_bug_the_same_runs_pass() {
    for seed in 1..=SEEDS / 2 {
        if let Err(why) = run(seed, shape(None, seed)) {
            panic!("{why}");
        }
    }
}

#[test]
fn a_skipped_checksum_returns_damage() {
    for (planted, returned) in [(None, false), (Some(Bug::SkipReadChecksum), true)] {
        let mut env = TestEnv::new(64 << 20, DiskKind::default(), 1);
        let geometry = prepare(&mut env);
        let options = StoreOptions { planted, ..StoreOptions::default() };
        let (mut store, _) = try_open(&mut env, geometry, options).unwrap();
        write_now(&mut env, &mut store, object(1, 1), 1, 0, &[5]).unwrap();
        env.damage((1 << 20) + 3 * B as u64 + 100);
        store.read(1, object(1, 1), 0, 1).unwrap();
        let read = settle(&mut env, &mut store)
            .into_iter()
            .any(|e| matches!(e, store::StoreEvent::Read { result: Ok(_), .. }));
        assert_eq!(read, returned);
    }
}
