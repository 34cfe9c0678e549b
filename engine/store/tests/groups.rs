//! What a slice says of its groups, against a count from scratch.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use std::collections::{BTreeMap, BTreeSet};
use store::*;
use wire::*;

const POOL: PoolId = PoolId(1);
const GROUPS: u32 = 5;

fn group_of(object: ObjectId, count: u32) -> u32 {
    (object.index % u64::from(count)) as u32
}

fn track_all(store: &mut SliceStore, count: u32, step: u32) {
    assert!(store.track(POOL, count, group_of));
    while !store.track_step(step) {
        assert!(store.group(POOL, 0).is_none(), "nothing is said before everything is counted");
    }
}

/// Digests, objects and tombstones of every group, from the list of everything.
fn counted(store: &SliceStore) -> BTreeMap<u32, (Digests, u64, BTreeSet<ObjectId>)> {
    let mut found = Vec::new();
    store.list(ListCursor::default(), u32::MAX, |object| object.pool == POOL, &mut found);
    let mut groups: BTreeMap<_, _> =
        (0..GROUPS).map(|group| (group, ([0; DIGEST_BUCKETS], 0, BTreeSet::new()))).collect();
    for entry in found {
        let (digests, objects, tombstones) = groups.get_mut(&group_of(entry.object, GROUPS)).unwrap();
        digests[bucket_of(entry.object)] ^= digest_of(entry.object, store.lookup(entry.object));
        *objects += u64::from(!entry.tombstone);
        if entry.tombstone {
            tombstones.insert(entry.object);
        }
    }
    groups
}

fn assert_counted(store: &SliceStore) {
    for (group, (digests, objects, tombstones)) in counted(store) {
        let said = store.group(POOL, group).unwrap();
        assert_eq!((said.digests, said.objects, &said.tombstones), (digests, objects, &tombstones));
    }
}

/// A write, a deletion, a replacement or the purge of a tombstone of one of 200 objects.
fn mutate(env: &mut TestEnv, store: &mut SliceStore, counter: u64) {
    let object = ObjectId { pool: POOL, image: ImageId(env.below(3)), index: env.below(70) };
    let version = Version { epoch: Epoch(1 + counter / 100), counter };
    let ticket = counter;
    let done = match (env.below(6), store.lookup(object)) {
        (_, Presence::Tombstone(version)) => store.purge(env, ticket, object, version),
        (0, _) => store.delete(env, ticket, object, version),
        (1, _) => store.replace(env, ticket, object, version, 0, &[], &BlockCrcs::default()),
        (_, _) => store.zero(env, ticket, object, version, 3, 1),
    };
    done.unwrap();
    settle(env, store);
}

#[test]
fn digests_counts_and_tombstones_follow_every_mutation() {
    let mut env = TestEnv::new(64 << 20, DiskKind::default(), 7);
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    track_all(&mut store, GROUPS, 100);
    for counter in 1..2_000 {
        mutate(&mut env, &mut store, counter);
        if counter % 50 == 0 {
            assert_counted(&store);
        }
    }
    let before = counted(&store);
    assert!(before.values().any(|(_, _, tombstones)| !tombstones.is_empty()));
    drop(store);
    // What was lost with the process is counted again, log and pages together.
    let mut store = open(&mut env, geometry);
    track_all(&mut store, GROUPS, 7);
    assert_counted(&store);
    assert_eq!(counted(&store), before);
}

#[test]
fn mutations_beside_the_pass_are_counted_once() {
    let mut env = TestEnv::new(64 << 20, DiskKind::default(), 8);
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    (1..500).for_each(|counter| mutate(&mut env, &mut store, counter));
    assert!(store.track(POOL, GROUPS, group_of));
    let mut counter = 500;
    while !store.track_step(1) {
        for _ in 0..5 {
            mutate(&mut env, &mut store, counter);
            counter += 1;
        }
    }
    assert!(counter > 600, "there was something beside it");
    assert_counted(&store);
    assert!(!store.track(POOL, GROUPS, group_of), "once is enough");
}

#[test]
fn history_names_what_changed_last_first_and_each_once() {
    let mut env = TestEnv::new(64 << 20, DiskKind::default(), 9);
    let geometry = prepare(&mut env);
    let options = StoreOptions { history_changes: 8, ..StoreOptions::default() };
    let (mut store, _) = try_open(&mut env, geometry, options).unwrap();
    track_all(&mut store, 2, 100);
    let object = |index: u64| ObjectId { pool: POOL, image: ImageId(1), index };
    let mut write = |store: &mut SliceStore, index: u64, counter: u64| {
        let version = Version { epoch: Epoch(1), counter };
        store.zero(&mut env, counter, object(index), version, 0, 1).unwrap();
        settle(&mut env, store);
    };
    for (at, index) in [0, 2, 4, 2, 1, 2, 2].into_iter().enumerate() {
        write(&mut store, index, at as u64 + 1);
    }
    assert_eq!(store.history(POOL, 0), [object(2), object(4), object(0)]);
    assert_eq!(store.history(POOL, 1), [object(1)]);
    // The bound: eight changes later the rest is forgotten.
    for at in 0..8 {
        write(&mut store, 11 + 2 * at, 100 + at);
    }
    assert_eq!(store.history(POOL, 0), []);
    drop(store);
    // A process that has just opened the slice knows what the log says.
    let mut store = open(&mut env, geometry);
    track_all(&mut store, 2, 2);
    let all: BTreeSet<ObjectId> = [0, 2, 4].into_iter().map(object).collect();
    assert_eq!(store.history(POOL, 0).into_iter().collect::<BTreeSet<_>>(), all);
}

#[test]
fn pools_are_apart_and_forgotten_when_not_wanted() {
    let mut env = TestEnv::new(64 << 20, DiskKind::default(), 10);
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    track_all(&mut store, GROUPS, 100);
    let foreign = ObjectId { pool: PoolId(2), image: ImageId(1), index: 1 };
    store.zero(&mut env, 1, foreign, Version { epoch: Epoch(1), counter: 1 }, 0, 1).unwrap();
    settle(&mut env, &mut store);
    assert_eq!(store.group(POOL, 1).unwrap().objects, 0);
    assert!(store.group(PoolId(2), 1).is_none());
    store.track_only(|pool| pool == PoolId(2));
    assert!(store.group(POOL, 1).is_none());
}
