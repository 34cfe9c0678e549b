//! A global allocator that counts, so that "no allocation on the data path" is a number on `/metrics`
//! and in a test instead of a hope. A binary that wants it declares
//! `#[global_allocator] static HEAP: reactor::backend::CountingHeap = reactor::backend::CountingHeap;`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Constant and without a destructor: reading it inside the allocator can neither allocate nor fail.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting this thread's allocations and reallocations.
pub struct CountingHeap;

/// Allocations this thread has made so far; stays zero when the binary uses another allocator.
pub fn allocations_of_this_thread() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

fn count() {
    ALLOCATIONS.with(|n| n.set(n.get().wrapping_add(1)));
}

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for CountingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_it_passes_on() {
        let before = allocations_of_this_thread();
        let layout = Layout::from_size_align(64, 8).unwrap();
        // SAFETY: the layout's size is not zero, and the block is freed with the same layout.
        unsafe {
            let block = CountingHeap.alloc(layout);
            CountingHeap.dealloc(block, layout);
        }
        assert_eq!(allocations_of_this_thread(), before + 1);
    }
}
