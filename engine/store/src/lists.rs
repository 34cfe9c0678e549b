//! Lists of changed blocks, each in one piece of memory.
//!
//! A list has room for a power of two of entries, up to an object's blocks. One that is full moves to a piece
//! of twice the size; what it leaves is for other lists. Pieces never join again before `clear`, so that lists
//! that all grow in step take up to twice their own memory.

use wire::OBJECT_BLOCKS;

use crate::page::BlockRef;
use crate::seg::Seg;

/// No piece.
const NIL: u32 = u32::MAX;
/// Sizes of pieces: 1, 2, 4 ... `OBJECT_BLOCKS`.
const CLASSES: usize = OBJECT_BLOCKS.trailing_zeros() as usize + 1;
/// The upper bit of an address's upper part, which has 8 bits: what lies beneath needs no release.
const SETTLED: u32 = 1 << 31;

/// A changed block: address (40 bits), mark, checksum. In a free piece, its first word names the next one.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Entry([u32; 3]);

impl Entry {
    pub(crate) fn new(to: BlockRef, settled: bool) -> Self {
        let mark = if settled { SETTLED } else { 0 };
        Self([to.addr as u32, (to.addr >> 32) as u32 & 0xff | mark, to.crc])
    }

    /// Where the block is.
    pub(crate) fn to(&self) -> BlockRef {
        let [low, high, crc] = self.0;
        BlockRef { addr: u64::from(low) | u64::from(high & !SETTLED) << 32, crc }
    }

    /// What the page names for this block has been released already, or there is nothing.
    pub(crate) fn settled(&self) -> bool {
        self.0[1] & SETTLED != 0
    }
}

/// All lists of one overlay.
pub(crate) struct Lists {
    entries: Seg<Entry>,
    /// Per size the first free piece.
    free: [u32; CLASSES],
}

/// The size of piece that `len` entries are in.
fn class_of(len: u32) -> usize {
    len.max(1).next_power_of_two().trailing_zeros() as usize
}

impl Lists {
    pub(crate) fn new() -> Self {
        Self { entries: Seg::new(), free: [NIL; CLASSES] }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.entries.bytes()
    }

    /// Forgets all lists, keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.free = [NIL; CLASSES];
    }

    /// The `len` entries of the list at `list`.
    #[inline]
    pub(crate) fn get(&self, list: u32, len: u32) -> &[Entry] {
        self.entries.run(list as usize, len as usize)
    }

    /// As `get`, to be changed.
    #[inline]
    pub(crate) fn get_mut(&mut self, list: u32, len: u32) -> &mut [Entry] {
        self.entries.run_mut(list as usize, len as usize)
    }

    /// Puts an entry in front of the `at`th of the list's `len` ones. Returns where the list is now.
    pub(crate) fn insert(&mut self, list: u32, len: u32, at: usize, entry: Entry) -> u32 {
        let mut to = list;
        if len == 0 || class_of(len) != class_of(len + 1) {
            to = self.take(class_of(len + 1));
            for i in 0..len as usize {
                let moved = self.entries.get(list as usize + i).copied().unwrap_or_default();
                if let Some(place) = self.entries.get_mut(to as usize + i) {
                    *place = moved;
                }
            }
            if len > 0 {
                self.give(list, class_of(len));
            }
        }
        // The free place behind the last one comes to the front of those that move on.
        let behind = self.get_mut(to, len + 1).get_mut(at..).unwrap_or(&mut []);
        behind.rotate_right(1);
        if let Some(place) = behind.first_mut() {
            *place = entry;
        }
        to
    }

    fn take(&mut self, class: usize) -> u32 {
        let Some(free) = self.free.get_mut(class) else { return NIL };
        let first = *free;
        if first != NIL {
            *free = self.entries.get(first as usize).map_or(NIL, |e| e.0[0]);
            return first;
        }
        // A whole object's worth at a time: a piece then never lies across two chunks.
        let fresh = self.entries.len() as u32;
        self.entries.grow(fresh as usize + OBJECT_BLOCKS);
        let size = 1u32 << class;
        for piece in (1..OBJECT_BLOCKS as u32 / size).rev() {
            self.give(fresh + piece * size, class);
        }
        fresh
    }

    fn give(&mut self, piece: u32, class: usize) {
        let Some(first) = self.free.get_mut(class) else { return };
        if let Some(entry) = self.entries.get_mut(piece as usize) {
            entry.0[0] = *first;
            *first = piece;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_what_it_was_told() {
        for (addr, settled) in [(0, true), (1, false), ((1 << 40) - 1, true), (0x12_3456_789a, false)] {
            let entry = Entry::new(BlockRef { addr, crc: 77 }, settled);
            assert_eq!((entry.to(), entry.settled()), (BlockRef { addr, crc: 77 }, settled));
        }
    }

    #[test]
    fn lists_that_grow_in_step_take_at_most_twice_their_memory() {
        let mut lists = Lists::new();
        let mut at = vec![NIL; 1000];
        for len in 0..OBJECT_BLOCKS as u32 {
            for list in &mut at {
                *list = lists.insert(*list, len, len as usize, Entry::default());
            }
        }
        assert!(lists.entries.len() <= 2 * 1000 * OBJECT_BLOCKS + CLASSES * OBJECT_BLOCKS);
    }
}
