//! Full is a state: overwrites and deletes go on, and space comes back.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use store::*;
use wire::*;

struct Full {
    env: TestEnv,
    geometry: SliceGeometry,
    store: SliceStore,
    counter: u64,
}

/// Asks until the store is no longer busy. A bound: busy must end by itself.
fn patiently(
    env: &mut TestEnv,
    store: &mut SliceStore,
    mut f: impl FnMut(&mut TestEnv, &mut SliceStore) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    for _ in 0..50 {
        match f(env, store) {
            Err(StoreError::Busy) => {
                settle(env, store);
            }
            other => return other,
        }
    }
    panic!("busy without end: {:?}", store.stats());
}

impl Full {
    fn new(seed: u64, mib: u64) -> Self {
        let mut env = TestEnv::new(mib << 20, DiskKind::default(), seed);
        let geometry = prepare(&mut env);
        let store = open(&mut env, geometry);
        Self { env, geometry, store, counter: 0 }
    }

    fn write(&mut self, o: ObjectId, first: u32, values: &[u64]) -> Result<(), StoreError> {
        self.counter += 1;
        let (buf, crcs) = data(&mut self.env, values);
        let at = version(self.counter);
        patiently(&mut self.env, &mut self.store, |env, store| {
            store.write(env, at.counter, o, at, first, std::slice::from_ref(&buf), &crcs)
        })
    }

    /// Writes objects of `blocks` blocks until there is no space; how many there are.
    fn fill(&mut self, blocks: usize) -> u64 {
        for i in 0.. {
            match self.write(object(1, i), 0, &vec![i + 1; blocks]) {
                Ok(()) => {}
                Err(StoreError::NoSpace) => {
                    settle(&mut self.env, &mut self.store);
                    return i;
                }
                Err(error) => panic!("{error}"),
            }
            if i % 7 == 0 {
                settle(&mut self.env, &mut self.store);
            }
        }
        unreachable!()
    }

    fn sound(&mut self) {
        settle(&mut self.env, &mut self.store);
        self.store.state().unwrap();
        let report = check_disk(&self.env);
        assert!(report.severity() <= Some(Severity::Note), "{:?}", report.findings);
    }
}

#[test]
fn overwrites_go_on_when_full() {
    // One block per object fills it with pages, 32 with data.
    for (blocks, depth) in [(1, 1), (1, 64), (32, 1), (32, 64)] {
        let mut f = Full::new(5, 17);
        let n = f.fill(blocks);
        assert!(n * blocks as u64 > 2400, "{n} objects of {blocks} blocks");
        for i in 0..6000 {
            let o = object(1, f.env.below(n));
            let at = f.env.below(blocks as u64) as u32;
            f.write(o, at, &[i + 10]).unwrap();
            if i % depth == 0 {
                settle(&mut f.env, &mut f.store);
            }
        }
        f.sound();
        assert_eq!(f.write(object(2, 1), 0, &[1; 32]), Err(StoreError::NoSpace));
        close(&mut f.env, &mut f.store);
        f.store = open(&mut f.env, f.geometry);
        for i in 0..500 {
            f.write(object(1, i % n), 0, &[i + 77]).unwrap();
            settle(&mut f.env, &mut f.store);
            assert_eq!(read_now(&mut f.env, &mut f.store, object(1, i % n), 0, 1), Ok(vec![i + 77]));
        }
    }
}

#[test]
fn a_new_block_in_an_old_object_is_refused_when_full_and_a_whole_overwrite_is_not() {
    let mut f = Full::new(6, 17);
    let n = f.fill(16);
    assert_eq!(f.write(object(1, 0), 16, &[5; 16]), Err(StoreError::NoSpace));
    for i in 0..n {
        f.write(object(1, i), 0, &[9; 16]).unwrap();
    }
    f.sound();
}

#[test]
fn deletes_zeroes_and_purges_work_when_full_and_give_space_back() {
    for blocks in [1, 4, 32] {
        let mut f = Full::new(7, 17);
        let n = f.fill(blocks);
        let mut removed = 0;
        for i in (0..n).step_by(2) {
            f.counter += 1;
            let (ticket, at) = (f.counter, version(f.counter));
            let zero = i % 4 == 0;
            patiently(&mut f.env, &mut f.store, |env, store| {
                if zero {
                    store.zero(env, ticket, object(1, i), at, 0, 32)
                } else {
                    store.delete(env, ticket, object(1, i), at)
                }
            })
            .unwrap();
            if !zero {
                settle(&mut f.env, &mut f.store);
                patiently(&mut f.env, &mut f.store, |env, store| store.purge(env, ticket, object(1, i), at))
                    .unwrap();
            }
            removed += 1;
        }
        settle(&mut f.env, &mut f.store);
        // Half is free again, and can be used.
        let mut again = 0;
        while f.write(object(3, again), 0, &vec![again + 1; blocks]).is_ok() {
            again += 1;
            if again % 5 == 0 {
                settle(&mut f.env, &mut f.store);
            }
        }
        assert!(again * 10 > removed * 8, "{again} of {removed} objects' space came back ({blocks} blocks)");
        f.sound();
        f.store = open(&mut f.env, f.geometry);
        assert_eq!(read_now(&mut f.env, &mut f.store, object(1, 1), 0, 1), Ok(vec![2]));
        assert_eq!(read_now(&mut f.env, &mut f.store, object(1, 0), 0, 1), Ok(vec![0]));
    }
}

#[test]
fn a_full_slice_survives_cuts_while_it_is_overwritten() {
    let mut f = Full::new(8, 17);
    let n = f.fill(32);
    for round in 0..10 {
        for i in 0..300 {
            let o = object(1, f.env.below(n));
            f.write(o, 3, &[round * 1000 + i + 1]).unwrap();
        }
        f.store.flush(&mut f.env);
        f.env.power_cut();
        f.store = open(&mut f.env, f.geometry);
        f.sound();
    }
}

#[test]
fn tombstones_of_objects_never_seen_work_when_full() {
    let mut f = Full::new(9, 17);
    f.fill(32);
    for i in 0..200 {
        f.counter += 1;
        let at = version(f.counter);
        patiently(&mut f.env, &mut f.store, |env, store| store.delete(env, at.counter, object(8, i), at))
            .unwrap();
    }
    f.sound();
    assert_eq!(f.store.stats().tombstones, 200);
}

#[test]
fn what_was_removed_counts_as_free_before_the_checkpoint_that_frees_it() {
    let mut f = Full::new(11, 17);
    let before = f.store.space().0;
    for i in 0..10 {
        f.write(object(1, i), 0, &[i + 1; 32]).unwrap();
    }
    // Now the pages name the blocks, and only a checkpoint can give them back.
    close(&mut f.env, &mut f.store);
    f.store = open(&mut f.env, f.geometry);
    let (full, data) = (f.store.space().0, 320 * BLOCK_BYTES as u64);
    assert!(full >= before + data, "{before} to {full} bytes");
    for i in 0..10 {
        f.counter += 1;
        f.store.delete(&mut f.env, f.counter, object(1, i), version(f.counter)).unwrap();
    }
    settle(&mut f.env, &mut f.store);
    let stats = f.store.stats();
    assert_eq!((stats.checkpoints, stats.superseded_bytes), (0, data));
    // One commit or a few are new.
    let slack = 12 * BLOCK_BYTES as u64;
    let (used, free) = f.store.space();
    assert!(used <= full - data + slack, "{full} to {used} bytes");
    assert_eq!(used + free, stats.used_bytes + stats.free_bytes);
    close(&mut f.env, &mut f.store);
    f.store = open(&mut f.env, f.geometry);
    let stats = f.store.stats();
    assert_eq!(stats.superseded_bytes, 0);
    assert!(stats.used_bytes <= used, "{used} bytes were said, {} are used", stats.used_bytes);
}
