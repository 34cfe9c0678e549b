//! Figures the design promises: bytes written per byte, memory per object.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use store::*;
use wire::*;

/// Bytes given to the device per byte of client data, for 4 KiB random overwrites at a depth.
fn amplification(depth: u64, objects: u64) -> f64 {
    let mut env = TestEnv::new(1 << 30, DiskKind { reorder: false, ..DiskKind::default() }, 1);
    env.drop_data = true;
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    let (whole, crcs) = data(&mut env, &[3; 32]);
    for i in 0..objects {
        store.write(&mut env, i, object(1, i), version(1), 0, std::slice::from_ref(&whole), &crcs).unwrap();
        settle(&mut env, &mut store);
    }
    let (one, crc) = data(&mut env, &[5]);
    let mut run = |n: u64| {
        for i in 0..n {
            let (o, at) = (object(1, env.below(objects)), env.below(32) as u32);
            store.write(&mut env, i, o, version(2 + i), at, std::slice::from_ref(&one), &crc).unwrap();
            if i % depth == depth - 1 {
                settle(&mut env, &mut store);
            }
        }
        store.stats()
    };
    let before = run(30_000);
    let after = run(60_000);
    assert!(after.checkpoints >= before.checkpoints + 2, "checkpoints must be counted");
    let written = after.written_bytes - before.written_bytes;
    written as f64 / (after.written_data_bytes - before.written_data_bytes) as f64
}

#[test]
fn random_overwrites_write_little_more_than_the_data() {
    for (depth, limit) in [(1, 2.3), (16, 1.3), (128, 1.3)] {
        let found = amplification(depth, 4000);
        println!("depth {depth}: {found:.3} bytes written per byte");
        assert!(found <= limit, "depth {depth}: {found:.3}");
    }
}

#[test]
fn memory_per_object_of_a_fully_written_slice() {
    let mut env = TestEnv::new(16 << 30, DiskKind { reorder: false, ..DiskKind::default() }, 1);
    env.drop_data = true;
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    let (whole, crcs) = data(&mut env, &[3; 32]);
    let mut objects = 0;
    loop {
        let o = object(objects % 5, objects);
        match store.write(&mut env, objects, o, version(1), 0, std::slice::from_ref(&whole), &crcs) {
            Ok(()) => objects += 1,
            Err(StoreError::NoSpace) => break,
            Err(StoreError::Busy) => {
                settle(&mut env, &mut store);
            }
            Err(error) => panic!("{error}"),
        }
        if objects.is_multiple_of(8) {
            settle(&mut env, &mut store);
        }
    }
    settle(&mut env, &mut store);
    let stats = store.stats();
    let share = (objects * OBJECT_BYTES as u64) as f64 / geometry.len as f64;
    assert!(share > 0.97, "only {share:.3} of the slice could be filled");
    let index = stats.index_bytes as f64 / objects as f64;
    let overlay = stats.overlay_bytes as f64 / objects as f64;
    println!("{objects} objects: {index:.1} bytes each for the index, {overlay:.1} for the overlay");
    let per_tb = index * (1e12 / OBJECT_BYTES as f64) / 1e6;
    println!("index: {per_tb:.0} MB per TB; page cache and overlay are bounded by options");
    assert!(index <= 48.0, "{index:.1} bytes per object");
    assert!(per_tb + (stats.overlay_bytes as f64 / 1e6) <= 400.0);
}

#[test]
fn a_large_slice_opens_in_small_steps() {
    const OBJECTS: u64 = 200_000;
    // What one step may allocate: the index of two steps' pages, in whole chunks.
    const STEP_BYTES: u64 = 2 << 20;
    let mut env = TestEnv::new(8 << 30, DiskKind { reorder: false, ..DiskKind::default() }, 1);
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    let (one, crc) = data(&mut env, &[5]);
    for i in 0..OBJECTS {
        store.write(&mut env, i, object(1, i), version(1), 0, std::slice::from_ref(&one), &crc).unwrap();
        if i % 64 == 63 {
            settle(&mut env, &mut store);
        }
    }
    close(&mut env, &mut store);
    let mut store = SliceStore::open(
        &mut env,
        reactor::DiskIndex(0),
        geometry,
        StoreOptions::default(),
        TokenRange { first: 0, count: TOKENS_MIN },
    );
    store.flush(&mut env);
    let (mut before, mut largest, mut steps) = (store.stats().index_bytes, 0, 0);
    while let Some((token, result, op)) = env.complete() {
        store.on_event(&mut env, token, result, op);
        store.flush(&mut env);
        let now = store.stats().index_bytes;
        (largest, before, steps) = (now.saturating_sub(before).max(largest), now, steps + 1);
    }
    assert!(matches!(store.poll(), Some(StoreEvent::Opened(Ok(report))) if report.objects == OBJECTS));
    println!("{steps} steps, the largest allocated {largest} bytes of {before}");
    assert!(before > 4 * STEP_BYTES, "too small to tell: {before}");
    assert!(largest <= STEP_BYTES, "{largest} bytes in one step");
}

#[test]
fn a_step_of_an_opening_takes_in_a_few_hundred_objects_or_records() {
    const OBJECTS: u64 = 30_000;
    const DELETED: u64 = 20_000;
    // Of pages sixteen at a time; of records what one step may replay, and the rest of a commit.
    const OBJECTS_STEP: u64 = 16 * 12;
    const RECORDS_STEP: u64 = 1024 + 82;
    let mut env = TestEnv::new(2 << 30, DiskKind { reorder: false, ..DiskKind::default() }, 1);
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    let (one, crc) = data(&mut env, &[5]);
    for i in 0..OBJECTS {
        store.write(&mut env, i, object(1, i), version(1), 0, std::slice::from_ref(&one), &crc).unwrap();
        if i % 64 == 63 {
            settle(&mut env, &mut store);
        }
    }
    close(&mut env, &mut store);
    let mut store = open(&mut env, geometry);
    // Many to a commit, and no data between the commits: a window of the log holds thousands.
    for i in 0..DELETED {
        store.delete(&mut env, i, object(1, i), version(2)).unwrap();
        if i % 512 == 511 {
            settle(&mut env, &mut store);
        }
    }
    settle(&mut env, &mut store);
    let options = StoreOptions::default();
    let mut store = SliceStore::open(&mut env, reactor::DiskIndex(0), geometry, options, TOKENS);
    let (mut before, mut objects, mut records) = (store.stats(), 0, 0);
    let report = loop {
        if let Some(StoreEvent::Opened(result)) = store.poll() {
            break result.expect("it opens");
        }
        let (token, result, op) = env.complete().expect("opening goes on");
        store.on_event(&mut env, token, result, op);
        store.flush(&mut env);
        let now = store.stats();
        let replayed = now.tombstones - before.tombstones;
        records = records.max(replayed);
        objects = objects.max(now.objects - before.objects - replayed);
        before = now;
    };
    println!("at most {objects} objects of pages, {records} records of the log in a step");
    assert!(report.objects == OBJECTS && report.records > 2 * RECORDS_STEP, "{report:?}");
    assert!(objects > 0 && objects <= OBJECTS_STEP, "{objects} objects in a step");
    assert!(records > 0 && records <= RECORDS_STEP, "{records} records in a step");
}
