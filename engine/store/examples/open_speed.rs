//! How long a slice takes to open: `cargo run --release -p store --example open_speed [objects]`.
//!
//! Fills a slice on a disk in memory that keeps metadata only, closes it, and measures the CPU-bound time of
//! opening it. Ten million objects in ten seconds on one core is the aim.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/common/mod.rs"]
mod common;
use common::*;
use store::*;

/// Nanoseconds this thread has been on a processor: other load on the machine does not count.
fn on_cpu() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap()
}

fn main() {
    let objects: u64 = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(500_000);
    let kind = DiskKind { reorder: false, ..DiskKind::default() };
    let mut env = TestEnv::new((objects * 140 * 1024).max(1 << 30), kind, 1);
    env.drop_data = true;
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    let (whole, crcs) = data(&mut env, &[3; 32]);
    let mut i = 0;
    let before = on_cpu();
    while i < objects {
        match store.write(&mut env, i, object(i % 7, i), version(1), 0, std::slice::from_ref(&whole), &crcs) {
            Ok(()) => i += 1,
            Err(StoreError::Busy) => drop(settle(&mut env, &mut store)),
            Err(error) => panic!("{error}"),
        }
        if i.is_multiple_of(64) {
            settle(&mut env, &mut store);
        }
    }
    close(&mut env, &mut store);
    println!("filled {objects} objects in {:.2} s of CPU", (on_cpu() - before) as f64 / 1e9);
    drop(store);
    let before = on_cpu();
    let (store, report) = try_open(&mut env, geometry, StoreOptions::default()).unwrap();
    let seconds = (on_cpu() - before) as f64 / 1e9;
    let each = seconds / objects as f64;
    println!("opened {} objects, {} pages in {seconds:.3} s of CPU", report.objects, report.pages);
    println!("{:.2} microseconds each, {:.1} s for ten million", each * 1e6, each * 1e7);
    println!("{:.1} bytes of index per object", store.stats().index_bytes as f64 / objects as f64);
}
