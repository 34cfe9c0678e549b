//! Failures that stores of this kind have shipped: one test each, named after it.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use reactor::DiskError;
use std::collections::BTreeMap;
use store::*;
use wire::*;

/// What a whole object should read as.
type Blocks = [u64; OBJECT_BLOCKS];

fn done(env: &mut TestEnv, store: &mut SliceStore, ticket: u64) -> Result<(), StoreError> {
    let events = settle(env, store);
    let mut done = events.into_iter().filter_map(|event| match event {
        StoreEvent::Done { ticket: of, result } if of == ticket => Some(result),
        _ => None,
    });
    done.next().expect("an answer")
}

/// Brings an object into one of the states that a change may find: absent, a block somewhere, all blocks,
/// deleted.
fn bring(env: &mut TestEnv, store: &mut SliceStore, o: ObjectId, state: usize, counter: &mut u64) -> Blocks {
    let mut blocks = [0; OBJECT_BLOCKS];
    *counter += 1;
    match state {
        1 => {
            blocks[16] = *counter;
            write_now(env, store, o, *counter, 16, &[*counter]).unwrap();
        }
        2 | 3 => {
            blocks = [*counter; OBJECT_BLOCKS];
            write_now(env, store, o, *counter, 0, &blocks).unwrap();
        }
        _ => {}
    }
    if state == 3 {
        *counter += 1;
        store.delete(env, *counter, o, version(*counter)).unwrap();
        done(env, store, *counter).unwrap();
        blocks = [0; OBJECT_BLOCKS];
    }
    blocks
}

fn reads_as(env: &mut TestEnv, store: &mut SliceStore, o: ObjectId, blocks: &Blocks, what: &str) {
    // `read_now` compares every checksum, those of unwritten blocks included.
    assert_eq!(read_now(env, store, o, 0, 32).unwrap(), blocks, "{what}");
    for at in [0, 1, 15, 16, 17, 31] {
        assert_eq!(read_now(env, store, o, at, 1).unwrap(), [blocks[at as usize]], "{what}, block {at}");
    }
}

/// Every way to change an object, at every kind of alignment, in every state of the object, the first small
/// write to an object that does not exist among them.
#[test]
fn checksums_are_right_after_every_way_of_writing_at_every_alignment() {
    let mut env = TestEnv::new(256 << 20, DiskKind::default(), 5);
    let geometry = prepare(&mut env);
    let options = StoreOptions { dirty_objects_max: 40, page_cache_bytes: 0, ..StoreOptions::default() };
    let mut store = try_open(&mut env, geometry, options).unwrap().0;
    let mut all: BTreeMap<ObjectId, Blocks> = BTreeMap::new();
    let (mut counter, mut index) = (0, 0);
    for state in 0..4 {
        for way in 0..3 {
            for first in [0u32, 1, 2, 15, 16, 30, 31] {
                for count in [1, 2, 32 - first].into_iter().filter(|count| first + count <= 32) {
                    index += 1;
                    let o = object(9, index);
                    let mut blocks = bring(&mut env, &mut store, o, state, &mut counter);
                    counter += 1;
                    let values: Vec<u64> = (0..u64::from(count)).map(|n| counter * 100 + n).collect();
                    let range = first as usize..(first + count) as usize;
                    match way {
                        0 => {
                            write_now(&mut env, &mut store, o, counter, first, &values).unwrap();
                            blocks[range].copy_from_slice(&values);
                        }
                        1 => {
                            store.zero(&mut env, counter, o, version(counter), first, count).unwrap();
                            done(&mut env, &mut store, counter).unwrap();
                            blocks[range].fill(0);
                        }
                        _ => {
                            let mask = (((1u64 << count) - 1) << first) as u32;
                            let (buf, crcs) = data(&mut env, &values);
                            store
                                .replace(&mut env, counter, o, version(counter), mask, &[buf], &crcs)
                                .unwrap();
                            done(&mut env, &mut store, counter).unwrap();
                            blocks = [0; OBJECT_BLOCKS];
                            blocks[range].copy_from_slice(&values);
                        }
                    }
                    reads_as(&mut env, &mut store, o, &blocks, &format!("{state} {way} {first}+{count}"));
                    all.insert(o, blocks);
                }
            }
        }
    }
    for orderly in [false, true] {
        if orderly {
            close(&mut env, &mut store);
        }
        store = try_open(&mut env, geometry, options).unwrap().0;
        for (o, blocks) in &all {
            reads_as(&mut env, &mut store, *o, blocks, "after opening");
        }
    }
    close(&mut env, &mut store);
    let report = check_disk(&env);
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

/// A device that fails one write after so many, and all behind it: whatever that write was for.
#[test]
fn whichever_device_write_fails_the_slice_opens_again_with_everything_acknowledged() {
    for error in [DiskError::Io(5), DiskError::NoSpace] {
        let mut failed_at = 0;
        for left in 0.. {
            let mut env = TestEnv::new(32 << 20, DiskKind::default(), left);
            let geometry = prepare(&mut env);
            let options =
                StoreOptions { dirty_objects_max: 8, page_cache_bytes: 0, ..StoreOptions::default() };
            let mut store = try_open(&mut env, geometry, options).unwrap().0;
            env.writes_left = Some((left, error));
            // The last acknowledged value of each object, and one that may have made it.
            let mut known: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
            let mut failure = None;
            for counter in 1..=120u64 {
                let entry = known.entry(counter % 24).or_default();
                entry.1 = counter;
                match write_now(&mut env, &mut store, object(1, counter % 24), counter, 3, &[counter]) {
                    Ok(()) => entry.0 = counter,
                    Err(why) => {
                        failure = Some(why);
                        break;
                    }
                }
            }
            // An orderly end writes a checkpoint: pages, nodes, superblocks.
            store.close(&mut env);
            settle(&mut env, &mut store);
            let whole = failure.is_none() && store.failure().is_none();
            env.writes_left = None;
            let mut store = try_open(&mut env, geometry, options).expect("it opens").0;
            for (index, (acknowledged, tried)) in known {
                let found = read_now(&mut env, &mut store, object(1, index), 3, 1).unwrap()[0];
                assert!(found == acknowledged || found == tried, "{left}: {index} is {found}");
            }
            if whole {
                break;
            }
            failed_at = left;
        }
        assert!(failed_at > 120, "the checkpoints' writes were among them: {failed_at}");
    }
}

/// Nanoseconds this thread has been on a processor: other load on the machine does not count.
fn on_cpu() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap()
}

/// Opens a slice of so many objects, written in an order that nothing likes: downwards in stripes, with
/// every third one deleted and purged so that slots are used again. Device reads, and time on the processor.
fn opening_of(objects: u64) -> (u64, u64) {
    let kind = DiskKind { reorder: false, ..DiskKind::default() };
    let mut env = TestEnv::new((objects * 16 * 1024).max(1 << 30), kind, 1);
    env.drop_data = true;
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    let (block, crcs) = data(&mut env, &[3]);
    let stripes = 61;
    for n in 0..objects {
        let index = u64::MAX - (n % (objects / stripes) * stripes + n / (objects / stripes));
        let o = object(n % 7, index);
        let ticket = n * 4;
        while store.write(&mut env, ticket, o, version(1), 0, std::slice::from_ref(&block), &crcs).is_err() {
            settle(&mut env, &mut store);
        }
        if n.is_multiple_of(3) {
            while store.delete(&mut env, ticket + 1, o, version(2)).is_err() {
                settle(&mut env, &mut store);
            }
            while store.purge(&mut env, ticket + 2, o, version(2)).is_err() {
                settle(&mut env, &mut store);
            }
        }
        if n.is_multiple_of(64) {
            settle(&mut env, &mut store);
        }
    }
    settle(&mut env, &mut store);
    close(&mut env, &mut store);
    let (reads, began) = (env.reads, on_cpu());
    let (_, report) = try_open(&mut env, geometry, StoreOptions::default()).unwrap();
    assert!(report.objects >= objects / 2, "{report:?}");
    (env.reads - reads, on_cpu() - began)
}

/// Quadratic work at the start has kept daemons from starting for hours.
#[test]
fn opening_takes_eight_times_as_long_for_eight_times_as_much() {
    let (few_reads, few_ns) = opening_of(20_000);
    let (many_reads, many_ns) = opening_of(160_000);
    println!("{few_reads} reads and {few_ns} ns, {many_reads} reads and {many_ns} ns");
    assert!(many_reads <= few_reads * 10, "{few_reads} reads become {many_reads}");
    // Quadratic would be 64 times; caches and noise are far from three.
    assert!(many_ns < few_ns * 24, "{few_ns} ns become {many_ns}");
}

/// A store that is given up answers everything now; what its device says later means nothing any more.
#[test]
fn an_abandoned_store_answers_everybody_and_listens_to_nobody() {
    let mut env = TestEnv::new(64 << 20, DiskKind::default(), 1);
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    write_now(&mut env, &mut store, object(1, 1), 1, 0, &[5, 6]).unwrap();
    let (buf, crcs) = data(&mut env, &[7]);
    store.write(&mut env, 2, object(1, 1), version(2), 5, std::slice::from_ref(&buf), &crcs).unwrap();
    store.read(3, object(1, 1), 0, 2).unwrap();
    store.read(4, object(1, 1), 5, 1).unwrap();
    store.flush(&mut env);
    assert!(env.in_flight() >= 2 && store.oldest_operation().is_some());
    store.abandon();
    let mut answers = Vec::new();
    while let Some(event) = store.poll() {
        match event {
            StoreEvent::Done { ticket, result } => answers.push((ticket, result)),
            StoreEvent::Read { ticket, result } => answers.push((ticket, result.map(|_| ()))),
            other => panic!("{other:?}"),
        }
    }
    answers.sort_by_key(|(ticket, _)| *ticket);
    let gone = Err(StoreError::Abandoned);
    assert_eq!(answers, [(2, gone), (3, gone), (4, gone)]);
    while let Some((token, result, op)) = env.complete() {
        store.on_event(&mut env, token, result, op);
        store.flush(&mut env);
        assert!(store.poll().is_none());
    }
    assert_eq!((env.in_flight(), store.oldest_operation(), store.stats().in_flight), (0, None, 0));
    assert_eq!(store.failure(), Some(StoreError::Abandoned));
    // What was acknowledged is there for the next who opens it.
    let mut store = open(&mut env, geometry);
    assert_eq!(read_now(&mut env, &mut store, object(1, 1), 0, 2), Ok(vec![5, 6]));
}
