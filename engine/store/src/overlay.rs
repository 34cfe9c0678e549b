//! What the log says that the pages do not yet say: per changed object its version and state, per changed
//! block its new address and checksum.
//!
//! Two generations exist at most: the active one takes new mutations; while a checkpoint runs, the frozen
//! one holds exactly what lies before the checkpoint's last commit. A block is looked up in the active one,
//! then in the frozen one, then in the page. Writes therefore never read a page.

use hashbrown::HashTable;
use wire::{Epoch, Version};

use crate::index::SlotList;
use crate::page::{BlockRef, SLOTS_PER_PAGE, SlotState};
use crate::seg::Seg;

const NIL: u32 = u32::MAX;
const ADDR_MASK: u64 = (1 << 40) - 1;
const BLOCK_SHIFT: u32 = 40;
const SETTLED: u64 = 1 << 63;

/// A changed object.
#[derive(Clone, Copy, Default)]
pub(crate) struct Head {
    pub(crate) slot: u32,
    first: u32,
    /// Blocks changed by commits up to `commit` that were not durable when the last of them was made.
    pub(crate) pending: u32,
    state: u8,
    epoch: u64,
    counter: u64,
    /// The last commit that changed it.
    pub(crate) commit: u64,
}

impl Head {
    pub(crate) fn version(&self) -> Version {
        Version { epoch: Epoch(self.epoch), counter: self.counter }
    }
    pub(crate) fn state(&self) -> SlotState {
        SlotState::from_u8(self.state).unwrap_or_default()
    }
}

/// A changed block.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// Address (40 bits), block of the object (5), and the top bit: the block beneath needs no release.
    word: u64,
    crc: u32,
    next: u32,
}

/// What one look-up of a block found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Change {
    pub(crate) block: usize,
    pub(crate) to: BlockRef,
    /// What the page names for this block has been released already, or there is nothing.
    pub(crate) settled: bool,
}

impl Entry {
    fn change(&self) -> Change {
        Change {
            block: (self.word >> BLOCK_SHIFT & 31) as usize,
            to: BlockRef { addr: self.word & ADDR_MASK, crc: self.crc },
            settled: self.word & SETTLED != 0,
        }
    }
}

pub(crate) struct Overlay {
    table: HashTable<u32>,
    heads: Seg<Head>,
    entries: Seg<Entry>,
    /// Bit per page with a changed object.
    pages: Vec<u64>,
    page_count: u32,
    /// Commit blocks of this generation.
    pub(crate) log_blocks: Vec<u64>,
    /// Slots purged in this generation.
    pub(crate) purged: SlotList,
    /// Blocks that only the merge can release.
    pub(crate) unsettled: u64,
}

fn hash_slot(slot: u32) -> u64 {
    let x = u64::from(slot).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^ (x >> 29)
}

impl Overlay {
    pub(crate) fn new() -> Self {
        Self {
            table: HashTable::new(),
            heads: Seg::new(),
            entries: Seg::new(),
            pages: Vec::new(),
            page_count: 0,
            log_blocks: Vec::new(),
            purged: SlotList::default(),
            unsettled: 0,
        }
    }

    /// Changed objects.
    pub(crate) fn objects(&self) -> usize {
        self.heads.len()
    }
    /// Changed blocks.
    pub(crate) fn entries(&self) -> usize {
        self.entries.len()
    }
    /// Pages with changed objects.
    pub(crate) fn page_count(&self) -> u32 {
        self.page_count
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.heads.len() == 0 && self.log_blocks.is_empty()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.allocation_size()
            + self.heads.bytes()
            + self.entries.bytes()
            + self.pages.capacity() * 8
            + self.log_blocks.capacity() * 8
    }

    /// Forgets everything, keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.table.clear();
        self.heads.clear();
        self.entries.clear();
        self.pages.fill(0);
        self.page_count = 0;
        self.log_blocks.clear();
        self.purged = SlotList::default();
        self.unsettled = 0;
    }

    #[inline]
    fn find(&self, slot: u32) -> Option<u32> {
        if self.heads.len() == 0 {
            return None;
        }
        self.table
            .find(hash_slot(slot), |h| self.heads.get(*h as usize).is_some_and(|h| h.slot == slot))
            .copied()
    }

    #[inline]
    pub(crate) fn head(&self, slot: u32) -> Option<&Head> {
        self.heads.get(self.find(slot)? as usize)
    }

    /// The change of one block, if any.
    pub(crate) fn block(&self, slot: u32, block: usize) -> Option<Change> {
        self.changes(slot).find(|c| c.block == block)
    }

    /// All changes of an object.
    pub(crate) fn changes(&self, slot: u32) -> Changes<'_> {
        Changes { entries: &self.entries, at: self.head(slot).map_or(NIL, |h| h.first) }
    }

    /// Records that an object changed; creates its entry. Returns a handle for `put`.
    pub(crate) fn touch(
        &mut self,
        slot: u32,
        state: SlotState,
        version: Version,
        commit: u64,
        durable: u64,
        blocks: u32,
    ) -> u32 {
        let at = match self.find(slot) {
            Some(at) => at,
            None => {
                let at = self.heads.push(Head { slot, first: NIL, ..Head::default() }) as u32;
                let heads = &self.heads;
                self.table.insert_unique(hash_slot(slot), at, |h| {
                    heads.get(*h as usize).map_or(0, |h| hash_slot(h.slot))
                });
                self.mark_page(slot / SLOTS_PER_PAGE as u32);
                at
            }
        };
        if let Some(head) = self.heads.get_mut(at as usize) {
            head.pending = if head.commit > durable { head.pending | blocks } else { blocks };
            head.state = state as u8;
            head.epoch = version.epoch.0;
            head.counter = version.counter;
            head.commit = commit;
        }
        at
    }

    fn mark_page(&mut self, page: u32) {
        let word = (page / 64) as usize;
        if word >= self.pages.len() {
            self.pages.resize(word + 1, 0);
        }
        if let Some(word) = self.pages.get_mut(word) {
            let bit = 1 << (page % 64);
            self.page_count += u32::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// The lowest changed page at or above `from`.
    pub(crate) fn next_page(&self, from: u32) -> Option<u32> {
        let mut word = (from / 64) as usize;
        let mut bits = self.pages.get(word)? & u64::MAX << (from % 64);
        loop {
            if bits != 0 {
                return Some(word as u32 * 64 + bits.trailing_zeros());
            }
            word += 1;
            bits = *self.pages.get(word)?;
        }
    }

    /// Changes a block that is in the overlay already; returns what it was.
    pub(crate) fn replace(&mut self, head: u32, block: usize, to: BlockRef) -> Option<BlockRef> {
        let mut at = self.heads.get(head as usize)?.first;
        loop {
            let entry = self.entries.get_mut(at as usize)?;
            let change = entry.change();
            if change.block == block {
                entry.word = entry.word & !ADDR_MASK | to.addr & ADDR_MASK;
                entry.crc = to.crc;
                return Some(change.to);
            }
            at = entry.next;
        }
    }

    /// Adds a block that is not in the overlay.
    pub(crate) fn add(&mut self, head: u32, block: usize, to: BlockRef, settled: bool) {
        let Some(first) = self.heads.get(head as usize).map(|h| h.first) else { return };
        let settled_bit = if settled { SETTLED } else { 0 };
        let word = to.addr & ADDR_MASK | (block as u64) << BLOCK_SHIFT | settled_bit;
        let at = self.entries.push(Entry { word, crc: to.crc, next: first }) as u32;
        self.unsettled += u64::from(!settled);
        if let Some(head) = self.heads.get_mut(head as usize) {
            head.first = at;
        }
    }
}

/// The changes of one object.
pub(crate) struct Changes<'a> {
    entries: &'a Seg<Entry>,
    at: u32,
}

impl Iterator for Changes<'_> {
    type Item = Change;
    fn next(&mut self) -> Option<Change> {
        let entry = self.entries.get(self.at as usize)?;
        self.at = entry.next;
        Some(entry.change())
    }
}
