//! Buffers: reference-counted handles to memory of a per-core arena.
//!
//! The arena is one block-aligned mapping, cut by a buddy allocator into power-of-two runs of 4 KiB
//! blocks. The same memory is an io_uring fixed buffer and, later, an RDMA memory region, so a payload
//! goes wire, arena, drive without a copy. Handles are cheap to clone, because a write's payload is at
//! once on its way to the drive and to two replicas. Nothing here is `Send`: a buffer stays on its core.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;
use thiserror::Error;
use wire::BLOCK_BYTES;

/// Largest buffer the arena itself serves; longer ones (control frames) come from the heap.
pub const ARENA_BUF_BYTES_MAX: usize = 256 * 1024;
/// Buddy orders: 4 KiB << 0 ..= 4 KiB << 6.
const ORDERS: usize = 7;

/// The arena is exhausted: back-pressure, try when something has completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("no buffer memory left")]
pub struct NoBuffers;

/// A core's buffer memory.
#[derive(Clone)]
pub struct Arena(Rc<Inner>);

struct Inner {
    base: NonNull<u8>,
    bytes: usize,
    blocks: u32,
    /// Per order, block numbers of free runs (may hold stale entries; `order_of` is the truth).
    free: RefCell<[Vec<u32>; ORDERS]>,
    /// Per block: for the first block of a run, `FREE_BIT | order` or `order`; `NONE` inside a run.
    state: Box<[Cell<u8>]>,
    refs: Box<[Cell<u32>]>,
    used_blocks: Cell<u32>,
}

const FREE_BIT: u8 = 0x80;
const NONE: u8 = 0x7f;

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: `base` came from `mmap` with this very length, and every `IoBuf` into it holds an `Rc`
        // to this `Inner`, so none is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl Arena {
    /// An arena of `bytes`, rounded up to the largest run. Memory is touched only when used.
    pub fn new(bytes: usize) -> Result<Self, NoBuffers> {
        let run = BLOCK_BYTES << (ORDERS - 1);
        let bytes = bytes.max(run).div_ceil(run) * run;
        // A mapping, not the allocator: that would write zeroes over all of it, and so take all of it.
        // SAFETY: a fresh anonymous mapping touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(NoBuffers);
        }
        // Large pages where the kernel has them: copies in and out of the kernel, and the drive's own
        // transfers, then look up one address translation for many buffers. A refusal costs only speed.
        // SAFETY: advice about the mapping just made; it changes no contents.
        unsafe { libc::madvise(base, bytes, libc::MADV_HUGEPAGE) };
        let base = NonNull::new(base.cast::<u8>()).ok_or(NoBuffers)?;
        let blocks = (bytes / BLOCK_BYTES) as u32;
        let state: Box<[Cell<u8>]> = (0..blocks).map(|_| Cell::new(NONE)).collect();
        let mut free: [Vec<u32>; ORDERS] = std::array::from_fn(|_| Vec::new());
        let step = 1u32 << (ORDERS - 1);
        for (order, list) in free.iter_mut().enumerate() {
            // Room for every run of the order, so that freeing never allocates.
            list.reserve((blocks >> order) as usize);
        }
        for first in (0..blocks).step_by(step as usize).rev() {
            if let Some(cell) = state.get(first as usize) {
                cell.set(FREE_BIT | (ORDERS - 1) as u8);
            }
            if let Some(list) = free.last_mut() {
                list.push(first);
            }
        }
        Ok(Self(Rc::new(Inner {
            base,
            bytes,
            blocks,
            free: RefCell::new(free),
            state,
            refs: (0..blocks).map(|_| Cell::new(0)).collect(),
            used_blocks: Cell::new(0),
        })))
    }

    /// Start and length of the memory, for registration with the kernel or a network card.
    pub fn region(&self) -> (*mut u8, usize) {
        (self.0.base.as_ptr(), self.0.bytes)
    }

    /// Bytes in use and in all.
    pub fn usage(&self) -> (usize, usize) {
        (self.0.used_blocks.get() as usize * BLOCK_BYTES, self.0.blocks as usize * BLOCK_BYTES)
    }

    /// A buffer of `len` bytes with unspecified (initialised) contents, block-aligned.
    pub fn alloc(&self, len: usize) -> Result<IoBuf, NoBuffers> {
        if len > ARENA_BUF_BYTES_MAX {
            return IoBuf::heap(len);
        }
        let wanted = len.div_ceil(BLOCK_BYTES).max(1).next_power_of_two().trailing_zeros() as usize;
        let first = self.0.take(wanted).ok_or(NoBuffers)?;
        self.0.used_blocks.set(self.0.used_blocks.get() + (1 << wanted));
        if let Some(refs) = self.0.refs.get(first as usize) {
            refs.set(1);
        }
        // SAFETY: block `first` lies inside the mapping.
        let ptr = unsafe { self.0.base.add(first as usize * BLOCK_BYTES) };
        Ok(IoBuf { ptr, len, owner: Owner::Arena(self.0.clone(), first) })
    }
}

impl Inner {
    fn state_of(&self, block: u32) -> u8 {
        self.state.get(block as usize).map_or(NONE, Cell::get)
    }

    fn set_state(&self, block: u32, state: u8) {
        if let Some(cell) = self.state.get(block as usize) {
            cell.set(state);
        }
    }

    /// Takes a run of `order`, splitting a larger one when needed.
    fn take(&self, wanted: usize) -> Option<u32> {
        let mut free = self.free.borrow_mut();
        for order in wanted..ORDERS {
            while let Some(first) = free.get_mut(order).and_then(Vec::pop) {
                if self.state_of(first) != FREE_BIT | order as u8 {
                    continue; // stale: merged into a larger run since
                }
                for smaller in (wanted..order).rev() {
                    let buddy = first + (1 << smaller);
                    self.set_state(buddy, FREE_BIT | smaller as u8);
                    if let Some(list) = free.get_mut(smaller) {
                        list.push(buddy);
                    }
                }
                self.set_state(first, wanted as u8);
                return Some(first);
            }
        }
        None
    }

    fn give(&self, mut first: u32) {
        let mut order = self.state_of(first) as usize;
        debug_assert!(order < ORDERS, "freeing a block that is no run");
        self.used_blocks.set(self.used_blocks.get().saturating_sub(1 << order));
        while order + 1 < ORDERS {
            let buddy = first ^ (1 << order);
            if self.state_of(buddy) != FREE_BIT | order as u8 {
                break;
            }
            self.set_state(first.max(buddy), NONE);
            first = first.min(buddy);
            order += 1;
        }
        self.set_state(first, FREE_BIT | order as u8);
        if let Some(list) = self.free.borrow_mut().get_mut(order) {
            // Stale entries bound the list's growth only loosely; drop them when it would reallocate.
            if list.len() == list.capacity() {
                list.retain(|&run| self.state_of(run) == FREE_BIT | order as u8 && run != first);
            }
            list.push(first);
        }
    }
}

enum Owner {
    Arena(Rc<Inner>, u32),
    Heap(Rc<HeapBlock>),
    Foreign,
}

struct HeapBlock {
    base: NonNull<u8>,
    layout: Layout,
}

impl Drop for HeapBlock {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `IoBuf::heap`, and this is the last handle.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// A handle to `len` bytes. Cloning shares the memory.
pub struct IoBuf {
    ptr: NonNull<u8>,
    len: usize,
    owner: Owner,
}

impl IoBuf {
    /// A block-aligned, zeroed buffer from the heap: for control traffic and tools.
    pub fn heap(len: usize) -> Result<Self, NoBuffers> {
        let size = len.div_ceil(BLOCK_BYTES).max(1) * BLOCK_BYTES;
        let layout = Layout::from_size_align(size, BLOCK_BYTES).map_err(|_| NoBuffers)?;
        // SAFETY: the layout's size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(NoBuffers)?;
        Ok(Self { ptr: base, len, owner: Owner::Heap(Rc::new(HeapBlock { base, layout })) })
    }

    /// A heap buffer with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Result<Self, NoBuffers> {
        let mut buf = Self::heap(bytes.len())?;
        if let Some(into) = buf.as_mut_slice() {
            into.copy_from_slice(bytes);
        }
        Ok(buf)
    }

    /// Wraps memory of somebody else, so that user buffers travel without a copy.
    ///
    /// # Safety
    /// `ptr .. ptr + len` must stay valid, and must not be touched by others in a way that races with
    /// this handle's use, until every clone of the handle is dropped.
    pub unsafe fn foreign(ptr: NonNull<u8>, len: usize) -> Self {
        Self { ptr, len, owner: Owner::Foreign }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `ptr..ptr+len` is initialised memory that the owner keeps alive; `&mut` access is
        // only given by `as_mut_slice`, which needs `&mut self` on the only handle.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// The bytes, writable, when this is the only handle to the memory.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        if !self.is_unique() {
            return None;
        }
        // SAFETY: as `as_slice`, and no other handle exists.
        Some(unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) })
    }

    /// Start of the memory, for submission to the kernel. The memory stays valid while a handle lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Whether the memory lies in the arena (and so in a registered region).
    pub fn is_arena(&self) -> bool {
        matches!(self.owner, Owner::Arena(..))
    }

    /// Whether the memory is the caller's own (see `foreign`): a transport may deliver into it although
    /// other handles exist.
    pub fn is_foreign(&self) -> bool {
        matches!(self.owner, Owner::Foreign)
    }

    /// Whether this is the only handle. A foreign buffer counts as unique: its owner vouches.
    pub fn is_unique(&self) -> bool {
        match &self.owner {
            Owner::Arena(inner, first) => inner.refs.get(*first as usize).is_some_and(|r| r.get() == 1),
            Owner::Heap(block) => Rc::strong_count(block) == 1,
            Owner::Foreign => true,
        }
    }

    /// A handle to a part of the same memory; clamped to this handle's range.
    pub fn slice(&self, from: usize, len: usize) -> Self {
        let from = from.min(self.len);
        let len = len.min(self.len - from);
        let mut part = self.clone();
        // SAFETY: `from <= self.len`, so the pointer stays inside or one past the range.
        part.ptr = unsafe { self.ptr.add(from) };
        part.len = len;
        part
    }

    /// Shortens the handle; the memory stays.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Clone for IoBuf {
    fn clone(&self) -> Self {
        let owner = match &self.owner {
            Owner::Arena(inner, first) => {
                if let Some(refs) = inner.refs.get(*first as usize) {
                    refs.set(refs.get() + 1);
                }
                Owner::Arena(inner.clone(), *first)
            }
            Owner::Heap(block) => Owner::Heap(block.clone()),
            Owner::Foreign => Owner::Foreign,
        };
        Self { ptr: self.ptr, len: self.len, owner }
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        if let Owner::Arena(inner, first) = &self.owner
            && let Some(refs) = inner.refs.get(*first as usize)
        {
            refs.set(refs.get() - 1);
            if refs.get() == 0 {
                inner.give(*first);
            }
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_can_be_taken_and_comes_back_whole() {
        let arena = Arena::new(1 << 20).unwrap();
        for round in 0..3 {
            let small: Vec<_> = (0..256).map(|_| arena.alloc(4096).unwrap()).collect();
            assert_eq!(arena.alloc(1).unwrap_err(), NoBuffers);
            drop(small);
            let large: Vec<_> = (0..4).map(|_| arena.alloc(256 * 1024).unwrap()).collect();
            assert!(arena.alloc(1).is_err(), "round {round}");
            drop(large);
            assert_eq!(arena.usage().0, 0);
        }
    }

    #[test]
    fn clones_and_slices_share_memory_and_keep_it() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut buf = arena.alloc(8192).unwrap();
        buf.as_mut_slice().unwrap()[5000] = 42;
        let part = buf.slice(4096, 4096);
        assert!(buf.as_mut_slice().is_none());
        drop(buf);
        assert_eq!(part.as_slice()[904], 42);
        assert_eq!(arena.usage().0, 8192);
        drop(part);
        assert_eq!(arena.usage().0, 0);
    }

    #[test]
    fn mixed_sizes_never_overlap() {
        let arena = Arena::new(4 << 20).unwrap();
        let mut held: Vec<IoBuf> = Vec::new();
        let mut x = 12345u64;
        for _ in 0..20_000 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            if !held.is_empty() && x >> 63 == 0 {
                let at = (x >> 20) as usize % held.len();
                held.swap_remove(at);
            } else if let Ok(buf) = arena.alloc(1 + (x >> 30) as usize % (256 * 1024)) {
                held.push(buf);
            }
        }
        let mut ranges: Vec<_> = held.iter().map(|b| (b.as_ptr() as usize, b.len())).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
    }
}
