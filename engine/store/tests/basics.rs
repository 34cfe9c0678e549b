//! One operation at a time.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use reactor::*;
use store::*;
use wire::*;

fn fresh(mib: u64) -> (TestEnv, SliceGeometry, SliceStore) {
    let mut env = TestEnv::new(mib << 20, DiskKind::default(), 1);
    let geometry = prepare(&mut env);
    let store = open(&mut env, geometry);
    (env, geometry, store)
}

#[test]
fn what_is_written_is_read_before_and_after_reopening() {
    let (mut env, geometry, mut store) = fresh(64);
    let o = object(1, 5);
    write_now(&mut env, &mut store, o, 1, 3, &[10, 11]).unwrap();
    write_now(&mut env, &mut store, o, 2, 4, &[20]).unwrap();
    let expected = vec![0, 10, 20, 0];
    assert_eq!(read_now(&mut env, &mut store, o, 2, 4).unwrap(), expected);
    assert_eq!(store.lookup(o), Presence::Live(version(2)));
    drop(store);
    let (mut store, report) = try_open(&mut env, geometry, StoreOptions::default()).unwrap();
    assert_eq!((report.objects, report.commits, report.records), (1, 2, 2));
    assert_eq!(read_now(&mut env, &mut store, o, 2, 4).unwrap(), expected);
    close(&mut env, &mut store);
    let (mut store, report) = try_open(&mut env, geometry, StoreOptions::default()).unwrap();
    assert_eq!((report.objects, report.commits, report.pages), (1, 0, 1));
    assert_eq!(read_now(&mut env, &mut store, o, 2, 4).unwrap(), expected);
    assert_eq!(store.lookup(o), Presence::Live(version(2)));
}

#[test]
fn a_lone_overwrite_is_one_device_write_and_no_read() {
    let (mut env, geometry, mut store) = fresh(64);
    let o = object(1, 5);
    for i in 1..=2000 {
        let before = (env.writes, env.reads);
        write_now(&mut env, &mut store, o, i, 7, &[i]).unwrap();
        // Checkpoints write on their own account.
        let checkpoint = store.stats().checkpoints;
        if checkpoint == 0 && store.stats().log_blocks < 500 {
            assert_eq!((env.writes - before.0, env.reads - before.1), (1, 0), "write {i}");
        }
    }
    let mut store = {
        close(&mut env, &mut store);
        open(&mut env, geometry)
    };
    // The page is not in memory now: a write still reads nothing.
    let before = env.reads;
    write_now(&mut env, &mut store, o, 5000, 7, &[99]).unwrap();
    assert_eq!(env.reads, before);
    assert_eq!(read_now(&mut env, &mut store, o, 7, 1).unwrap(), vec![99]);
}

#[test]
fn unwritten_blocks_cost_no_device_read() {
    let (mut env, _, mut store) = fresh(64);
    write_now(&mut env, &mut store, object(1, 1), 1, 0, &[5]).unwrap();
    let before = env.reads;
    assert_eq!(read_now(&mut env, &mut store, object(1, 1), 1, 31).unwrap(), vec![0; 31]);
    assert_eq!(read_now(&mut env, &mut store, object(9, 9), 0, 32).unwrap(), vec![0; 32]);
    assert_eq!(env.reads, before);
}

#[test]
fn delete_leaves_a_tombstone_until_purged() {
    let (mut env, geometry, mut store) = fresh(64);
    let o = object(1, 1);
    write_now(&mut env, &mut store, o, 1, 0, &[5, 6, 7]).unwrap();
    store.delete(&mut env, 2, o, version(2)).unwrap();
    settle(&mut env, &mut store);
    assert_eq!(store.lookup(o), Presence::Tombstone(version(2)));
    assert_eq!(store.stats().data_blocks, 0);
    assert_eq!(store.purge(&mut env, 3, o, version(1)), Err(StoreError::NotTombstone));
    for round in 0..2 {
        if round == 1 {
            close(&mut env, &mut store);
        }
        store = open(&mut env, geometry);
        assert_eq!(store.lookup(o), Presence::Tombstone(version(2)));
        assert_eq!(read_now(&mut env, &mut store, o, 0, 3).unwrap(), vec![0; 3]);
    }
    store.purge(&mut env, 4, o, version(2)).unwrap();
    settle(&mut env, &mut store);
    assert_eq!(store.lookup(o), Presence::Absent);
    store = open(&mut env, geometry);
    assert_eq!(store.lookup(o), Presence::Absent);
    close(&mut env, &mut store);
    store = open(&mut env, geometry);
    assert_eq!(store.lookup(o), Presence::Absent);
    write_now(&mut env, &mut store, o, 9, 1, &[8]).unwrap();
    assert_eq!(read_now(&mut env, &mut store, o, 0, 3).unwrap(), vec![0, 8, 0]);
}

#[test]
fn replace_zero_and_read_object() {
    let (mut env, geometry, mut store) = fresh(64);
    let o = object(1, 1);
    write_now(&mut env, &mut store, o, 1, 0, &[1; 32]).unwrap();
    let (buf, crcs) = data(&mut env, &[70, 71, 72]);
    let mask = 1 << 3 | 1 << 9 | 1 << 31;
    store.replace(&mut env, 2, o, version(2), mask, &[buf.slice(0, B), buf.slice(B, 2 * B)], &crcs).unwrap();
    settle(&mut env, &mut store);
    store.zero(&mut env, 3, o, version(3), 8, 4).unwrap();
    settle(&mut env, &mut store);
    for _ in 0..2 {
        store.read_object(5, o).unwrap();
        let found = settle(&mut env, &mut store)
            .into_iter()
            .find_map(|e| match e {
                StoreEvent::Object { ticket: 5, result } => Some(result.unwrap()),
                _ => None,
            })
            .unwrap();
        assert_eq!(found.presence, Presence::Live(version(3)));
        assert_eq!(found.mask, 1 << 3 | 1 << 31);
        assert_eq!(values_of(&found.data.unwrap()), vec![70, 72]);
        assert_eq!(found.crcs.len(), 2);
        close(&mut env, &mut store);
        store = open(&mut env, geometry);
    }
    assert_eq!(store.stats().data_blocks, 2);
}

#[test]
fn damage_is_reported_and_never_returned() {
    let (mut env, _, mut store) = fresh(64);
    let o = object(1, 1);
    write_now(&mut env, &mut store, o, 1, 0, &[5, 6]).unwrap();
    // Commit block first, data behind it: the first commit lies at block 2 of the slice.
    env.damage((1 << 20) + 4 * B as u64 + 100);
    assert_eq!(read_now(&mut env, &mut store, o, 0, 2), Err(StoreError::Corrupt));
    assert_eq!(read_now(&mut env, &mut store, o, 0, 1), Ok(vec![5]));
    assert_eq!(store.stats().corrupt, 1);
    write_now(&mut env, &mut store, o, 2, 1, &[66]).unwrap();
    assert_eq!(read_now(&mut env, &mut store, o, 0, 2), Ok(vec![5, 66]));
}

#[test]
fn a_damaged_page_is_reported() {
    let (mut env, geometry, mut store) = fresh(64);
    for i in 0..4000 {
        store
            .write(&mut env, i, object(1, i), version(1), 0, &[], &BlockCrcs::default())
            .expect_err("no data is no write");
        let (buf, crcs) = data(&mut env, &[i + 1]);
        store.write(&mut env, i, object(1, i), version(1), 0, &[buf], &crcs).unwrap();
        if i % 50 == 0 {
            settle(&mut env, &mut store);
        }
    }
    close(&mut env, &mut store);
    let mut store = open(&mut env, geometry);
    // The page of the first objects: find it by its magic and number.
    let mut block = vec![0; B];
    for at in 0..(64u64 << 20) / B as u64 {
        env.read_bytes(at * B as u64, &mut block);
        if block[..4] == *b"DRYO" && block[16..24] == [0; 8] {
            env.damage(at * B as u64 + 500);
        }
    }
    assert_eq!(read_now(&mut env, &mut store, object(1, 3), 0, 1), Err(StoreError::Corrupt));
    assert_eq!(read_now(&mut env, &mut store, object(1, 3000), 0, 1), Ok(vec![3001]));
}

#[test]
fn wrong_requests_are_refused() {
    let (mut env, _, mut store) = fresh(64);
    let o = object(1, 1);
    let (buf, crcs) = data(&mut env, &[1, 2]);
    let one = std::slice::from_ref(&buf);
    assert_eq!(store.write(&mut env, 1, o, version(1), 31, one, &crcs), Err(StoreError::Invalid));
    assert_eq!(
        store.write(&mut env, 1, o, version(1), 0, &[buf.slice(0, B)], &crcs),
        Err(StoreError::Invalid)
    );
    let wrong = BlockCrcs::of(&[7; 2 * B]);
    assert_eq!(store.write(&mut env, 1, o, version(1), 0, one, &wrong), Err(StoreError::Corrupt));
    assert_eq!(store.zero(&mut env, 1, o, version(1), 0, 0), Err(StoreError::Invalid));
    assert_eq!(store.zero(&mut env, 1, o, version(1), u32::MAX, 2), Err(StoreError::Invalid));
    assert_eq!(store.read(1, o, 0, 33), Err(StoreError::Invalid));
    assert_eq!(store.lookup(o), Presence::Absent);
    assert!(settle(&mut env, &mut store).is_empty());
}

#[test]
fn a_failed_device_write_fails_everything_and_says_so() {
    let (mut env, geometry, mut store) = fresh(64);
    let o = object(1, 1);
    write_now(&mut env, &mut store, o, 1, 0, &[5]).unwrap();
    env.fail_writes = true;
    let failed = StoreError::Failed(DiskError::Io(5));
    assert_eq!(write_now(&mut env, &mut store, o, 2, 0, &[6]), Err(failed));
    env.fail_writes = false;
    assert_eq!(write_now(&mut env, &mut store, o, 3, 0, &[6]), Err(failed));
    assert_eq!(store.read(1, o, 0, 1), Err(failed));
    let mut store = open(&mut env, geometry);
    assert_eq!(read_now(&mut env, &mut store, o, 0, 1), Ok(vec![5]));
}

#[test]
fn a_failed_device_read_fails_that_read_only() {
    let (mut env, _, mut store) = fresh(64);
    let o = object(1, 1);
    write_now(&mut env, &mut store, o, 1, 0, &[5]).unwrap();
    env.fail_reads = true;
    assert_eq!(read_now(&mut env, &mut store, o, 0, 1), Err(StoreError::Io));
    env.fail_reads = false;
    assert_eq!(read_now(&mut env, &mut store, o, 0, 1), Ok(vec![5]));
}

#[test]
fn a_full_device_queue_only_delays() {
    let (mut env, _, mut store) = fresh(64);
    env.queue_max = 1;
    for i in 0..200 {
        let (buf, crcs) = data(&mut env, &[i + 1]);
        store.write(&mut env, i, object(1, i), version(1), 0, &[buf], &crcs).unwrap();
        if i % 20 == 19 {
            store.flush(&mut env);
        }
    }
    let done = settle(&mut env, &mut store);
    let tickets: Vec<u64> = done
        .iter()
        .filter_map(|e| match e {
            StoreEvent::Done { ticket, result: Ok(()) } => Some(*ticket),
            _ => None,
        })
        .collect();
    assert_eq!(tickets, (0..200).collect::<Vec<_>>(), "in order of submission");
    for i in 0..200 {
        store.read(i, object(1, i), 0, 1).unwrap();
    }
    let reads = settle(&mut env, &mut store);
    assert_eq!(reads.iter().filter(|e| matches!(e, StoreEvent::Read { result: Ok(_), .. })).count(), 200);
}

#[test]
fn a_read_waits_for_the_write_before_it() {
    let (mut env, _, mut store) = fresh(64);
    let o = object(1, 1);
    let (buf, crcs) = data(&mut env, &[42]);
    store.write(&mut env, 1, o, version(1), 0, &[buf], &crcs).unwrap();
    store.read(2, o, 0, 2).unwrap();
    store.flush(&mut env);
    assert!(store.poll().is_none(), "neither is durable yet");
    let events = settle(&mut env, &mut store);
    assert!(matches!(events[0], StoreEvent::Done { ticket: 1, result: Ok(()) }));
    match &events[1] {
        StoreEvent::Read { ticket: 2, result: Ok(read) } => assert_eq!(values_of(&read.data), vec![42, 0]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_read_does_not_see_the_write_behind_it_in_its_batch() {
    let (mut env, _, mut store) = fresh(64);
    let o = object(1, 1);
    write_now(&mut env, &mut store, o, 1, 0, &[7]).unwrap();
    store.read(2, o, 0, 1).unwrap();
    let (buf, crcs) = data(&mut env, &[42]);
    store.write(&mut env, 3, o, version(2), 0, &[buf], &crcs).unwrap();
    let events = settle(&mut env, &mut store);
    let read = events.iter().find_map(|event| match event {
        StoreEvent::Read { ticket: 2, result: Ok(read) } => Some(values_of(&read.data)),
        _ => None,
    });
    assert_eq!(read, Some(vec![7]));
}

#[test]
fn a_slice_of_another_cluster_or_identity_is_refused() {
    let (mut env, geometry, store) = fresh(64);
    drop(store);
    let options = StoreOptions { cluster: Some(ClusterId(1)), ..StoreOptions::default() };
    assert_eq!(try_open(&mut env, geometry, options).err(), Some(OpenError::WrongCluster { found: CLUSTER }));
    let other = SliceGeometry { slice: SliceId(1), ..geometry };
    assert!(matches!(
        try_open(&mut env, other, StoreOptions::default()).err(),
        Some(OpenError::WrongSlice { .. })
    ));
    let odd = SliceGeometry { len: geometry.len - 1, ..geometry };
    assert_eq!(try_open(&mut env, odd, StoreOptions::default()).err(), Some(OpenError::Geometry));
    // One damaged copy is survived, two are not.
    env.damage(geometry.offset + 100);
    open(&mut env, geometry);
    env.damage(geometry.offset + B as u64 + 100);
    open(&mut env, geometry);
    env.damage(geometry.offset + 100);
    env.damage(geometry.offset + B as u64 + 100);
    assert_eq!(
        try_open(&mut env, geometry, StoreOptions::default()).err(),
        Some(OpenError::Super(SuperError::BadCrc))
    );
}

/// Writes one block, lets the store rest or not, damages the block, and says what a store opened after a
/// crash makes of it.
fn decayed_after_the_last_commit(rest: bool) -> (Presence, Result<Vec<u64>, StoreError>) {
    const VALUE: u64 = 0x7777_1234;
    let (mut env, geometry, mut store) = fresh(64);
    let o = object(1, 5);
    write_now(&mut env, &mut store, o, 1, 3, &[VALUE]).unwrap();
    if rest {
        let before = env.writes;
        for _ in 0..5 {
            store.rest();
            settle(&mut env, &mut store);
        }
        assert_eq!(env.writes - before, 1, "one block is enough, once");
    }
    drop(store);
    let (mut block, mut wanted) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
    fill(&mut wanted, VALUE);
    let at = (0..64 << 8).map(|nth| nth * BLOCK_BYTES as u64).find(|at| {
        env.read_bytes(*at, &mut block);
        block == wanted
    });
    env.damage(at.unwrap());
    let mut store = open(&mut env, geometry);
    (store.lookup(o), read_now(&mut env, &mut store, o, 3, 1))
}

#[test]
fn a_block_that_decays_at_rest_is_noticed_and_not_taken_for_a_torn_commit() {
    // Right after the write nobody can tell decay from a torn write: the commit is forgotten.
    assert_eq!(decayed_after_the_last_commit(false), (Presence::Absent, Ok(vec![0])));
    assert_eq!(decayed_after_the_last_commit(true), (Presence::Live(version(1)), Err(StoreError::Corrupt)));
}
