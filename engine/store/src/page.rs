//! Object pages and the tree that finds them.
//!
//! An object page holds twelve object records; slot `s` is record `s % 12` of page `s / 12`. The page map is
//! a tree of three levels above the pages: level 0 nodes name pages, level 1 nodes name level 0 nodes, the
//! one level 2 node (the root) names level 1 nodes. Every block says what it is and carries a checksum, and
//! who points at it repeats that checksum: a stale or misdirected block is noticed.
//!
//! Header of both, 64 bytes:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `DRYO` (page) or `DRYN` (node) |
//! | 4 | 4 | CRC-32 of bytes 8..4096 |
//! | 8 | 8 | slice |
//! | 16 | 8 | number: of the page, or of the node within its level |
//! | 24 | 8 | checkpoint that wrote it (last commit it contains) |
//! | 32 | 1 | level (nodes) |
//! | 33 | 31 | zero |
//!
//! Object record, 336 bytes:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 4 | pool |
//! | 4 | 8 | image |
//! | 12 | 8 | index |
//! | 20 | 8 | version: epoch |
//! | 28 | 8 | version: counter |
//! | 36 | 1 | state: 0 free, 1 live, 2 tombstone |
//! | 37 | 11 | zero |
//! | 48 | 160 | 32 block addresses of 40 bits, 0 = unwritten |
//! | 208 | 128 | 32 checksums |
//!
//! Node entry, 12 bytes, 336 of them: block address (8), checksum (4); address 0 = nothing there.
//!
//! Fixed slots keep a record's place for its life, so that the index in memory is a number per object.

use crate::bytes::*;
use reactor::prefetch;
use wire::{BLOCK_BYTES, Epoch, ImageId, OBJECT_BLOCKS, ObjectId, PoolId, SliceId, Version, block_crc};

/// Records in a page.
pub const SLOTS_PER_PAGE: usize = 12;
/// Entries in a node.
pub const NODE_ENTRIES: usize = 336;
/// Pages three levels of nodes can name: 455 million objects, 54 TiB of fully written ones.
pub const PAGES_MAX: u64 = (NODE_ENTRIES * NODE_ENTRIES * NODE_ENTRIES) as u64;
const PAGE_MAGIC: u32 = u32::from_le_bytes(*b"DRYO");
const NODE_MAGIC: u32 = u32::from_le_bytes(*b"DRYN");
const HEADER: usize = 64;
const RECORD: usize = 336;
const ADDRS: usize = 48;
const CRCS: usize = 208;
const _: () = assert!(HEADER + SLOTS_PER_PAGE * RECORD == BLOCK_BYTES);
const _: () = assert!(HEADER + NODE_ENTRIES * 12 == BLOCK_BYTES);

/// State of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum SlotState {
    /// Nothing.
    #[default]
    Free = 0,
    /// An object.
    Live = 1,
    /// A deleted object.
    Tombstone = 2,
}

impl SlotState {
    /// Decodes; `None` for a byte that means nothing.
    pub fn from_u8(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Free),
            1 => Some(Self::Live),
            2 => Some(Self::Tombstone),
            _ => None,
        }
    }
}

/// Where a block is and what its checksum must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BlockRef {
    /// Block number in the slice, 0 = nothing.
    pub addr: u64,
    /// Checksum.
    pub crc: u32,
}

/// A block that is not what it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("damaged block")]
pub struct Damaged;

/// The block's own checksum, after comparing it and what the block says of itself.
fn check(block: &[u8], magic: u32, slice: SliceId, number: u64, level: u8) -> Result<u32, Damaged> {
    if block.len() != BLOCK_BYTES
        || get_u32(block, 0) != magic
        || get_u64(block, 8) != slice.0
        || get_u64(block, 16) != number
        || get_u8(block, 32) != level
    {
        return Err(Damaged);
    }
    let crc = block_crc(part(block, 8, BLOCK_BYTES - 8));
    if crc != get_u32(block, 4) { Err(Damaged) } else { Ok(crc) }
}

fn seal(block: &mut [u8], magic: u32, slice: SliceId, number: u64, level: u8, checkpoint: u64) -> u32 {
    put_u32(block, 0, magic);
    put_u64(block, 8, slice.0);
    put_u64(block, 16, number);
    put_u64(block, 24, checkpoint);
    put_u8(block, 32, level);
    let crc = block_crc(part(block, 8, BLOCK_BYTES - 8));
    put_u32(block, 4, crc);
    crc
}

/// Checks a page against what points at it.
pub fn check_page(block: &[u8], slice: SliceId, number: u32, crc: u32) -> Result<(), Damaged> {
    if check(block, PAGE_MAGIC, slice, u64::from(number), 0)? == crc { Ok(()) } else { Err(Damaged) }
}

/// Finishes a page; returns its checksum.
pub fn seal_page(block: &mut [u8], slice: SliceId, number: u32, checkpoint: u64) -> u32 {
    seal(block, PAGE_MAGIC, slice, u64::from(number), 0, checkpoint)
}

/// A record in a page's bytes.
#[derive(Clone, Copy)]
pub struct Slot<'a>(&'a [u8]);

impl<'a> Slot<'a> {
    /// Record `i` of a page.
    pub fn of(page: &'a [u8], i: usize) -> Self {
        Self(part(page, HEADER + i * RECORD, RECORD))
    }
    /// Whose it is.
    pub fn object(&self) -> ObjectId {
        ObjectId {
            pool: PoolId(get_u32(self.0, 0)),
            image: ImageId(get_u64(self.0, 4)),
            index: get_u64(self.0, 12),
        }
    }
    /// Its version.
    pub fn version(&self) -> Version {
        Version { epoch: Epoch(get_u64(self.0, 20)), counter: get_u64(self.0, 28) }
    }
    /// Its state; `None` when the byte means nothing.
    pub fn state(&self) -> Option<SlotState> {
        SlotState::from_u8(get_u8(self.0, 36))
    }
    /// Address and checksum of a block.
    pub fn block(&self, i: usize) -> BlockRef {
        if i >= OBJECT_BLOCKS {
            return BlockRef::default();
        }
        BlockRef { addr: get_addr(self.0, ADDRS + i * 5), crc: get_u32(self.0, CRCS + i * 4) }
    }

    /// Begins to bring what `block` reads into the processor's caches.
    #[inline]
    pub(crate) fn prefetch(&self, i: usize) {
        for at in [ADDRS + i * 5, CRCS + i * 4] {
            if let Some(byte) = self.0.get(at) {
                prefetch(byte);
            }
        }
    }
}

/// A record in a page's bytes, writable.
pub struct SlotMut<'a>(&'a mut [u8]);

impl<'a> SlotMut<'a> {
    /// Record `i` of a page.
    pub fn of(page: &'a mut [u8], i: usize) -> Self {
        Self(page.get_mut(HEADER + i * RECORD..HEADER + (i + 1) * RECORD).unwrap_or(&mut []))
    }
    /// As `Slot::block`.
    pub fn block(&self, i: usize) -> BlockRef {
        Slot(self.0).block(i)
    }
    /// Sets a block; address 0 makes it unwritten.
    pub fn set_block(&mut self, i: usize, to: BlockRef) {
        if i < OBJECT_BLOCKS {
            put_addr(self.0, ADDRS + i * 5, to.addr);
            put_u32(self.0, CRCS + i * 4, to.crc);
        }
    }
    /// Sets what is not a block.
    pub fn set_head(&mut self, object: ObjectId, version: Version, state: SlotState) {
        put_u32(self.0, 0, object.pool.0);
        put_u64(self.0, 4, object.image.0);
        put_u64(self.0, 12, object.index);
        put_u64(self.0, 20, version.epoch.0);
        put_u64(self.0, 28, version.counter);
        put_u8(self.0, 36, state as u8);
    }
    /// Makes it free.
    pub fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// Checks a node against what points at it.
pub fn check_node(block: &[u8], slice: SliceId, level: u8, number: u64, crc: u32) -> Result<(), Damaged> {
    if check(block, NODE_MAGIC, slice, number, level)? == crc { Ok(()) } else { Err(Damaged) }
}

/// Finishes a node; returns its checksum.
pub fn seal_node(block: &mut [u8], slice: SliceId, level: u8, number: u64, checkpoint: u64) -> u32 {
    seal(block, NODE_MAGIC, slice, number, level, checkpoint)
}

/// Entry `i` of a node.
pub fn node_entry(block: &[u8], i: usize) -> BlockRef {
    let at = HEADER + i * 12;
    BlockRef { addr: get_u64(block, at), crc: get_u32(block, at + 8) }
}

/// Sets entry `i` of a node.
pub fn set_node_entry(block: &mut [u8], i: usize, to: BlockRef) {
    let at = HEADER + i * 12;
    put_u64(block, at, to.addr);
    put_u32(block, at + 8, to.crc);
}

/// Level 0 and level 1 nodes that `pages` pages need.
pub fn tree_shape(pages: u32) -> (usize, usize) {
    let maps = (pages as usize).div_ceil(NODE_ENTRIES);
    (maps, maps.div_ceil(NODE_ENTRIES))
}
