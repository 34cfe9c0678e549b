//! Heap allocations of the client per operation, in steady state: none.

use crate::world::{World, empty};
use client::{Op, Options};
use reactor::{Frame, IoBuf};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::NonNull;
use wire::{BLOCK_BYTES, BlockCrcs, FrameKind, Status};

thread_local! {
    static COUNTING: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting touches thread-local cells without
// destructors only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.get() {
            COUNT.set(COUNT.get() + 1);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs the environment's own work without counting it.
pub fn uncounted<R>(work: impl FnOnce() -> R) -> R {
    let before = COUNTING.replace(false);
    let result = work();
    COUNTING.set(before);
    result
}

fn counted<R>(work: impl FnOnce() -> R) -> R {
    let before = COUNTING.replace(true);
    let result = work();
    COUNTING.set(before);
    result
}

const DEPTH: usize = 128;

/// One round: a full queue of 4 KiB operations, each answered.
fn round(world: &mut World, image: client::ImageHandle, memory: &mut [u8], turn: u64) {
    let reads = turn.is_multiple_of(2);
    for (i, block) in memory.chunks_mut(BLOCK_BYTES).enumerate() {
        let ptr = NonNull::from(&mut *block).cast();
        // SAFETY: `memory` outlives the round, in which every operation completes.
        let buf = unsafe { IoBuf::foreign(ptr, BLOCK_BYTES) };
        let place = (i as u64 * 37 + turn * 11) % 4096;
        let offset = place * BLOCK_BYTES as u64;
        let op = if reads { Op::Read { offset, buf } } else { Op::Write { offset, buf } };
        counted(|| world.client.submit(&mut world.env, image, op, place).map(|_| ()).map_err(|(e, _)| e))
            .expect("accepted");
        if i % 16 == 0 {
            // Overlaps the last one.
            let flush = counted(|| world.client.submit(&mut world.env, image, Op::Flush, 0).is_ok());
            assert!(flush);
        }
    }
    let mut done = 0;
    while done < DEPTH + DEPTH.div_ceil(16) {
        let sent = std::mem::take(&mut world.env.black);
        for (conn, request, header) in sent.iter().copied() {
            if !matches!(header.kind, FrameKind::Read | FrameKind::Write) {
                continue;
            }
            let kind = if reads { FrameKind::ReadReply } else { FrameKind::WriteReply };
            assert_eq!(header.request, request);
            let mut header = header.reply(kind, Status::Ok);
            let mut frame = Frame { header, crcs: BlockCrcs::default(), payload: None };
            if reads {
                let payload = empty(1);
                header.payload_len = BLOCK_BYTES as u32;
                frame = Frame { header, crcs: BlockCrcs::of(payload.as_slice()), payload: Some(payload) };
            }
            counted(|| world.hand_over(conn, frame));
        }
        while let Some(io) = counted(|| world.client.poll()) {
            assert_eq!(io.result, Ok(()));
            done += 1;
        }
    }
}

#[test]
fn no_operation_allocates_in_steady_state() {
    let (mut world, image) = World::opened(1, Options::default(), 64 << 20);
    world.warm_up(image);
    world.env.blackhole = true;
    let mut memory = vec![0u8; DEPTH * BLOCK_BYTES];
    for turn in 0..20 {
        round(&mut world, image, &mut memory, turn);
    }
    COUNT.set(0);
    for turn in 0..100 {
        round(&mut world, image, &mut memory, turn);
    }
    assert_eq!(COUNT.get(), 0, "allocations in {} operations", 100 * DEPTH);
    // The counter counts.
    counted(|| drop(std::hint::black_box(Box::new(5))));
    assert_eq!(COUNT.get(), 1);
}
