//! No heap allocation per operation once warm.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use store::*;

thread_local! {
    static COUNTING: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system allocator unchanged; counting touches thread-local cells only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.get() {
            COUNT.set(COUNT.get() + 1);
        }
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `alloc` above with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if COUNTING.get() {
            COUNT.set(COUNT.get() + 1);
        }
        // SAFETY: as `dealloc`, and the caller promises a valid `size`.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn counted<T>(f: impl FnOnce() -> T) -> T {
    COUNTING.set(true);
    let out = f();
    COUNTING.set(false);
    out
}

const OBJECTS: u64 = 200;

/// `n` rounds of 16 overwrites and 16 reads in flight together.
fn rounds(env: &mut TestEnv, store: &mut SliceStore, n: u64, first: u64) {
    for round in first..first + n {
        for i in 0..16 {
            let o = object(1, env.below(OBJECTS));
            let at = env.below(32) as u32;
            let (buf, crcs) = data(env, &[round * 16 + i + 1]);
            counted(|| store.write(env, i, o, version(round), at, std::slice::from_ref(&buf), &crcs))
                .unwrap();
            let o = object(1, env.below(OBJECTS));
            counted(|| store.read(100 + i, o, at, 1)).unwrap();
        }
        loop {
            counted(|| store.flush(env));
            while let Some(event) = counted(|| store.poll()) {
                match event {
                    StoreEvent::Done { result, .. } => result.unwrap(),
                    StoreEvent::Read { result, .. } => drop(result.unwrap()),
                    other => panic!("{other:?}"),
                }
            }
            let Some((token, result, op)) = env.complete() else { break };
            counted(|| store.on_event(env, token, result, op));
        }
    }
}

#[test]
fn overwrites_and_reads_do_not_allocate() {
    let mut env = TestEnv::new(128 << 20, DiskKind { reorder: false, ..DiskKind::default() }, 1);
    let geometry = prepare(&mut env);
    let options = StoreOptions { dirty_objects_max: 150, ..StoreOptions::default() };
    let (mut store, _) = try_open(&mut env, geometry, options).unwrap();
    for i in 0..OBJECTS {
        write_now(&mut env, &mut store, object(1, i), 1, 0, &[i + 1; 32]).unwrap();
    }
    rounds(&mut env, &mut store, 2000, 1);
    let before = store.stats();
    COUNT.set(0);
    rounds(&mut env, &mut store, 700, 5000);
    let stats = store.stats();
    assert!(stats.checkpoints > before.checkpoints + 5, "checkpoints are part of the steady state");
    assert_eq!(stats.mutations - before.mutations, 700 * 16);
    assert_eq!(COUNT.get(), 0, "allocations in {} operations", 700 * 32);
}
