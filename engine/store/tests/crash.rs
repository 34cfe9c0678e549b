//! Power cuts: whatever a cut leaves, the slice opens, holds every acknowledged mutation, and a prefix of
//! those that were not.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::model::{Shape, run};
use common::*;
use store::StoreOptions;

fn shape() -> Shape {
    Shape {
        objects: 30,
        steps: 400,
        kind: DiskKind::default(),
        options: StoreOptions { dirty_objects_max: 64, page_cache_bytes: 0, ..StoreOptions::default() },
        disk_bytes: 24 << 20,
        cuts: 6,
        closes: true,
        flush_one_in: 3,
    }
}

fn seeds(from: u64, n: u64, shape: Shape) {
    let mut total = 0;
    for seed in from..from + n {
        match run(seed, shape) {
            Ok(acked) => total += acked,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(total > n * 100, "the runs must get something done: {total}");
}

#[test]
fn tearing_at_4096() {
    seeds(1, 30, shape());
}

#[test]
fn tearing_at_512_with_a_volatile_cache() {
    let kind = DiskKind { atomic: 512, write_through: false, reorder: true };
    seeds(1000, 30, Shape { kind, ..shape() });
}

#[test]
fn in_order_completions() {
    let kind = DiskKind { reorder: false, ..DiskKind::default() };
    seeds(2000, 20, Shape { kind, ..shape() });
}

#[test]
fn few_objects_and_long_runs() {
    seeds(3000, 15, Shape { objects: 3, steps: 3000, cuts: 3, ..shape() });
}

#[test]
fn many_objects_on_a_small_cache() {
    seeds(4000, 4, Shape { objects: 1500, steps: 6000, cuts: 2, disk_bytes: 64 << 20, ..shape() });
}

#[test]
fn large_batches() {
    seeds(5000, 20, Shape { flush_one_in: 100, ..shape() });
}

#[test]
fn a_full_slice() {
    // 17 MiB of disk give the smallest slice; 200 objects of up to 128 KiB do not fit.
    seeds(6000, 8, Shape { objects: 200, steps: 8000, cuts: 3, disk_bytes: 17 << 20, ..shape() });
}
