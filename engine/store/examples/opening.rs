//! How long the steps of an opening are: fills a slice on a disk in memory, changes a part of it, loses power, and
//! opens the slice again and again.
//!
//!     cargo run --release -p store --example opening -- [OBJECTS [RECORDS [DEPTH [ROUNDS]]]]
//!
//! Times are CPU times of this thread in one `on_event` and the `flush` behind it. The disk's part is left out.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    missing_docs
)]

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use reactor::DiskIndex;
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;
use store::*;

/// Steps longer than this are counted.
const LONG: Duration = Duration::from_millis(2);

fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How the records come into the log.
#[derive(Clone, Copy)]
enum Change {
    Write,
    Delete,
}

/// A slice of so many objects, four blocks each, and so many changes since its last checkpoint.
fn make(objects: u64, records: u64, depth: u64, change: Change) -> (TestEnv, SliceGeometry) {
    let kind = DiskKind { reorder: false, ..DiskKind::default() };
    let mut env = TestEnv::new((objects * 6 * B as u64).next_multiple_of(1 << 30) + (8 << 30), kind, 1);
    env.drop_data = true;
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    let (four, crcs) = data(&mut env, &[5; 4]);
    let (one, crc) = data(&mut env, &[6]);
    for i in 0..objects {
        let first = (i % 7) as u32 * 4;
        store
            .write(&mut env, i, object(i % 5, i), version(1), first, std::slice::from_ref(&four), &crcs)
            .unwrap();
        if i % 64 == 63 {
            settle(&mut env, &mut store);
        }
    }
    close(&mut env, &mut store);
    let mut store = open(&mut env, geometry);
    for i in 0..records {
        // Each object at most once, all over the slice.
        let which = i * (objects / records.max(1)).max(1) % objects;
        let name = object(which % 5, which);
        let done = match change {
            Change::Write => {
                let at = env.below(32) as u32;
                store.write(&mut env, i, name, version(2), at, std::slice::from_ref(&one), &crc)
            }
            Change::Delete => store.delete(&mut env, i, name, version(2)),
        };
        done.unwrap();
        if i % depth == depth - 1 {
            settle(&mut env, &mut store);
        }
    }
    settle(&mut env, &mut store);
    assert!(store.stats().log_blocks >= records / depth.max(1) / 100, "a checkpoint has come between");
    (env, geometry)
}

struct Measured {
    steps: Vec<Duration>,
    report: OpenReport,
}

fn measure(env: &mut TestEnv, geometry: SliceGeometry) -> Measured {
    let mut steps = Vec::new();
    let begin = cpu();
    let mut store = SliceStore::open(env, DiskIndex(0), geometry, StoreOptions::default(), TOKENS);
    store.flush(env);
    steps.push(cpu() - begin);
    loop {
        while let Some(event) = store.poll() {
            if let StoreEvent::Opened(result) = event {
                // A checkpoint may have begun at once: its writes must not come to the next store.
                while env.complete().is_some() {}
                return Measured { steps, report: result.expect("the slice opens") };
            }
        }
        let (token, result, op) = env.complete().expect("opening goes on");
        let begin = cpu();
        store.on_event(env, token, result, op);
        store.flush(env);
        steps.push(cpu() - begin);
    }
}

fn show(name: &str, objects: u64, records: u64, depth: u64, change: Change, rounds: usize) {
    let (mut env, geometry) = make(objects, records, depth, change);
    // Opening writes superblocks: as cut at the end of the first one, the log stays as it is.
    let mut longest = Vec::new();
    let mut totals = Vec::new();
    let (mut long, mut report, mut steps) = (0, OpenReport::default(), 0);
    for _ in 0..rounds {
        let measured = measure(&mut env, geometry);
        longest.push(measured.steps.iter().copied().max().unwrap_or_default());
        totals.push(measured.steps.iter().sum::<Duration>());
        long += measured.steps.iter().filter(|step| **step > LONG).count();
        (report, steps) = (measured.report, measured.steps.len());
    }
    longest.sort_unstable();
    totals.sort_unstable();
    let (median, worst) = (longest[rounds / 2], longest[rounds - 1]);
    println!(
        "{name:<18} {:>7} objects {:>6} records in {:>6} commits: longest step {:>6.2} ms median, {:>6.2} ms worst; \
         {:>5.1} over 2 ms of {steps} steps; total {:>7.1} ms",
        report.objects,
        report.records,
        report.commits,
        median.as_secs_f64() * 1e3,
        worst.as_secs_f64() * 1e3,
        long as f64 / rounds as f64,
        totals[rounds / 2].as_secs_f64() * 1e3
    );
}

fn main() {
    let given: Vec<u64> = std::env::args().skip(1).map(|word| word.parse().expect("a number")).collect();
    let number = |at: usize, usual: u64| given.get(at).copied().unwrap_or(usual);
    let (objects, records) = (number(0, 300_000), number(1, 50_000));
    let (depth, rounds) = (number(2, 16), number(3, 9) as usize);
    show(&format!("writes, depth {depth}"), objects, records, depth, Change::Write, rounds);
    show("writes, depth 1", objects, records, 1, Change::Write, rounds);
    show("deletes, depth 512", objects, records, 512, Change::Delete, rounds);
    show("writes, no log", objects, 0, 1, Change::Write, rounds);
}
