//! What the log says that the pages do not yet say: per changed object its version and state, per changed
//! block its new address and checksum.
//!
//! Two generations exist at most: the active one takes new mutations; while a checkpoint runs, the frozen
//! one holds exactly what lies before the checkpoint's last commit. A block is looked up in the active one,
//! then in the frozen one, then in the page. Writes therefore never read a page.
//!
//! An object's changes lie side by side, ordered by block (`lists`): once the object is found, so is each of
//! them, however many there are.

use hashbrown::HashTable;
use wire::{Epoch, Version};

use crate::index::SlotList;
use reactor::prefetch;

use crate::lists::{Entry, Lists};
use crate::page::{BlockRef, SLOTS_PER_PAGE, SlotState};
use crate::seg::Seg;

/// Hash tables of an overlay. Growing one moves its entries: at 130,000 changed objects some 2000, and not all of
/// them, which takes milliseconds.
const TABLES: usize = 64;

/// A changed object.
#[derive(Clone, Copy, Default)]
pub(crate) struct Head {
    pub(crate) slot: u32,
    /// Where its list of changed blocks begins.
    list: u32,
    /// Changed blocks.
    mask: u32,
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

/// What one look-up of a block found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Change {
    pub(crate) block: usize,
    pub(crate) to: BlockRef,
    /// What the page names for this block has been released already, or there is nothing.
    pub(crate) settled: bool,
}

/// Where a slot's head is. The slot is here, too, so that a look-up touches no head but the right one, and that one
/// only when it is wanted.
#[derive(Clone, Copy)]
struct Bucket {
    slot: u32,
    head: u32,
}

pub(crate) struct Overlay {
    tables: [HashTable<Bucket>; TABLES],
    heads: Seg<Head>,
    lists: Lists,
    entries: usize,
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

/// By bits that the table itself does not use: it takes the lowest and the highest ones.
fn table_of(hash: u64) -> usize {
    (hash >> 32) as usize % TABLES
}

impl Overlay {
    pub(crate) fn new() -> Self {
        Self {
            tables: [const { HashTable::new() }; TABLES],
            heads: Seg::new(),
            lists: Lists::new(),
            entries: 0,
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
    /// The slot of the n-th changed object.
    pub(crate) fn slot_at(&self, n: usize) -> Option<u32> {
        self.heads.get(n).map(|head| head.slot)
    }
    /// Changed blocks.
    pub(crate) fn entries(&self) -> usize {
        self.entries
    }
    /// Pages with changed objects.
    pub(crate) fn page_count(&self) -> u32 {
        self.page_count
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.heads.len() == 0 && self.log_blocks.is_empty()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tables.iter().map(HashTable::allocation_size).sum::<usize>()
            + self.heads.bytes()
            + self.lists.bytes()
            + self.pages.capacity() * 8
            + self.log_blocks.capacity() * 8
    }

    /// Forgets everything, keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.tables.iter_mut().for_each(HashTable::clear);
        self.heads.clear();
        self.lists.clear();
        self.entries = 0;
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
        let hash = hash_slot(slot);
        self.tables.get(table_of(hash))?.find(hash, |bucket| bucket.slot == slot).map(|bucket| bucket.head)
    }

    #[inline]
    pub(crate) fn head(&self, slot: u32) -> Option<&Head> {
        self.heads.get(self.find(slot)? as usize)
    }

    /// The head of a slot that will be wanted soon.
    #[inline]
    pub(crate) fn coming(&self, slot: u32) {
        if let Some(head) = self.head(slot) {
            prefetch(head);
        }
    }

    /// A change of a block that will be wanted soon; false when there is none.
    #[inline]
    pub(crate) fn coming_block(&self, head: &Head, block: u32) -> bool {
        if 1u32.checked_shl(block).unwrap_or(0) & head.mask == 0 {
            return false;
        }
        let list = self.lists.get(head.list, head.mask.count_ones());
        if let Some(entry) = list.get(rank(head.mask, block as usize)) {
            prefetch(entry);
        }
        true
    }

    /// The change of one block, if any.
    pub(crate) fn block(&self, slot: u32, block: usize) -> Option<Change> {
        self.changes(slot, 1 << block).next()
    }

    /// Changes of an object, of the blocks of `wanted`, in their order.
    pub(crate) fn changes(&self, slot: u32, wanted: u32) -> Changes<'_> {
        let Some(head) = self.head(slot) else { return Changes { list: &[], mask: 0, wanted: 0 } };
        let wanted = wanted & head.mask;
        let list = if wanted == 0 { &[] } else { self.lists.get(head.list, head.mask.count_ones()) };
        Changes { list, mask: head.mask, wanted }
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
                let at = self.heads.push(Head { slot, ..Head::default() }) as u32;
                let hash = hash_slot(slot);
                if let Some(table) = self.tables.get_mut(table_of(hash)) {
                    table.insert_unique(hash, Bucket { slot, head: at }, |bucket| hash_slot(bucket.slot));
                }
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
        let head = self.heads.get(head as usize)?;
        if head.mask >> block & 1 == 0 {
            return None;
        }
        let entry = self.lists.get_mut(head.list, head.mask.count_ones()).get_mut(rank(head.mask, block))?;
        let was = entry.to();
        *entry = Entry::new(to, entry.settled());
        Some(was)
    }

    /// Adds a block that is not in the overlay.
    pub(crate) fn add(&mut self, head: u32, block: usize, to: BlockRef, settled: bool) {
        let Some(head) = self.heads.get_mut(head as usize) else { return };
        let at = rank(head.mask, block);
        head.list = self.lists.insert(head.list, head.mask.count_ones(), at, Entry::new(to, settled));
        head.mask |= 1 << block;
        self.entries += 1;
        self.unsettled += u64::from(!settled);
    }
}

/// How many blocks of `mask` lie before `block`.
fn rank(mask: u32, block: usize) -> usize {
    (mask & ((1u32 << block) - 1)).count_ones() as usize
}

/// Changes of one object.
pub(crate) struct Changes<'a> {
    list: &'a [Entry],
    mask: u32,
    wanted: u32,
}

impl Iterator for Changes<'_> {
    type Item = Change;
    fn next(&mut self) -> Option<Change> {
        if self.wanted == 0 {
            return None;
        }
        let block = self.wanted.trailing_zeros() as usize;
        self.wanted &= self.wanted - 1;
        let entry = self.list.get(rank(self.mask, block))?;
        Some(Change { block, to: entry.to(), settled: entry.settled() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// A fixed sequence that looks like none.
    fn numbers() -> impl Iterator<Item = u64> {
        let mut x = 1u64;
        std::iter::repeat_with(move || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            x >> 33
        })
    }

    #[test]
    fn it_holds_what_a_map_would_hold_over_generations() {
        let mut overlay = Overlay::new();
        let mut numbers = numbers();
        let mut next = || numbers.next().unwrap();
        for _ in 0..3 {
            let mut model: BTreeMap<(u32, usize), (u64, u32)> = BTreeMap::new();
            for _ in 0..60_000 {
                let (slot, block) = ((next() % 3_000) as u32, (next() % 32) as usize);
                let to = BlockRef { addr: next() << 9 & ((1 << 40) - 1), crc: next() as u32 };
                let head = overlay.touch(slot, SlotState::Live, Version::default(), 1, 0, 1 << block);
                let was = overlay.replace(head, block, to).map(|was| (was.addr, was.crc));
                if was.is_none() {
                    overlay.add(head, block, to, slot % 2 == 0);
                }
                assert_eq!(was, model.insert((slot, block), (to.addr, to.crc)));
            }
            assert_eq!(overlay.entries(), model.len());
            for slot in 0..3_000 {
                let held: Vec<_> =
                    overlay.changes(slot, u32::MAX).map(|c| (c.block, (c.to.addr, c.to.crc))).collect();
                let meant: Vec<_> =
                    model.range((slot, 0)..=(slot, 31)).map(|(key, value)| (key.1, *value)).collect();
                assert_eq!(held, meant);
                assert!(overlay.changes(slot, u32::MAX).all(|c| c.settled == (slot % 2 == 0)));
                let meant_7 = meant.iter().find(|(block, _)| *block == 7).map(|(_, to)| *to);
                assert_eq!(overlay.block(slot, 7).map(|c| (c.to.addr, c.to.crc)), meant_7);
            }
            overlay.clear();
            assert_eq!((overlay.entries(), overlay.block(5, 5)), (0, None));
        }
    }
}
