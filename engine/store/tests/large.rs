//! Offsets past 4 GiB, 2^32 blocks and 16 TiB on a sparse disk.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use store::*;
use wire::*;

/// Prepares a slice whose log begins at `first` blocks, so that everything is written from there on.
fn slice_from(env: &mut TestEnv, first: u64) -> SliceGeometry {
    let geometry = prepare(env);
    let mut block = vec![0; B];
    env.read_bytes(geometry.offset, &mut block);
    let moved = SliceSuper { log: first, number: 2, ..SliceSuper::decode(&block).unwrap() };
    moved.encode_into(&mut block);
    env.write_bytes(geometry.offset, &block);
    env.write_bytes(geometry.offset + B as u64, &block);
    geometry
}

fn works_from(disk: u64, first: u64) {
    let mut env = TestEnv::new(disk, DiskKind::default(), first);
    let geometry = slice_from(&mut env, first);
    let options = StoreOptions { dirty_objects_max: 100, page_cache_bytes: 0, ..StoreOptions::default() };
    let (mut store, _) = try_open(&mut env, geometry, options).unwrap();
    for i in 0..600 {
        write_now(&mut env, &mut store, object(u64::MAX, u64::MAX - i), i + 1, 5, &[i + 1, i + 2]).unwrap();
    }
    for i in 0..300 {
        write_now(&mut env, &mut store, object(u64::MAX, u64::MAX - i), 1000 + i, 6, &[i + 9]).unwrap();
    }
    let expected = |i: u64| vec![0, i + 1, if i < 300 { i + 9 } else { i + 2 }, 0];
    for orderly in [false, true] {
        if orderly {
            close(&mut env, &mut store);
        }
        store = try_open(&mut env, geometry, options).unwrap().0;
        assert!(store.superblock().root >= first, "pages lie past the mark");
        for i in (0..600).step_by(17) {
            let o = object(u64::MAX, u64::MAX - i);
            assert_eq!(read_now(&mut env, &mut store, o, 4, 4), Ok(expected(i)));
        }
    }
    assert!(store.stats().checkpoints == 0 && store.superblock().checkpoint > 0);
}

#[test]
fn past_4_gib() {
    works_from(8 << 30, (4u64 << 30) / B as u64 - 700);
}

#[test]
fn past_16_tib_and_two_to_the_32_blocks() {
    // 2^32 blocks of 4 KiB are 16 TiB: start just below, end above.
    works_from(20 << 40, (1 << 32) - 700);
}

#[test]
fn at_the_end_of_a_slice_it_goes_round() {
    let disk = 1u64 << 30;
    let blocks = (disk - (1 << 20)) / B as u64;
    let mut env = TestEnv::new(disk, DiskKind::default(), 3);
    let geometry = slice_from(&mut env, blocks - 3);
    let mut store = open(&mut env, geometry);
    for i in 0..200 {
        write_now(&mut env, &mut store, object(1, i), 1, 0, &[i + 1; 32]).unwrap();
    }
    store = open(&mut env, geometry);
    for i in 0..200 {
        assert_eq!(read_now(&mut env, &mut store, object(1, i), 31, 1), Ok(vec![i + 1]));
    }
}

#[test]
fn offsets_of_a_second_slice_past_16_tib() {
    let mut env = TestEnv::new(40 << 40, DiskKind::default(), 3);
    let plan = DiskPlan {
        cluster: CLUSTER,
        disk: DiskUuid(9),
        node: None,
        disk_bytes: env.size,
        slices: vec![SliceId(1), SliceId(2)],
    };
    for (offset, bytes) in plan.writes().unwrap() {
        env.write_bytes(offset, &bytes);
    }
    let geometry = plan.layout().unwrap().slices[1].geometry();
    assert!(geometry.offset > 16 << 40);
    let mut store = open(&mut env, geometry);
    write_now(&mut env, &mut store, object(1, 1), 1, 0, &[5]).unwrap();
    close(&mut env, &mut store);
    let mut store = open(&mut env, geometry);
    assert_eq!(read_now(&mut env, &mut store, object(1, 1), 0, 1), Ok(vec![5]));
}
