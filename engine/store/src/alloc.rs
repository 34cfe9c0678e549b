//! Free space of a slice: one bit per 4 KiB block, in memory only, rebuilt on open.
//!
//! Two levels of counts over the bits let a search skip what is full: per 4096 blocks and per 4 Mi
//! blocks. Searches go round from a cursor (next fit), so that consecutive writes lie side by side.

/// Consecutive blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// Blocks under one count of the lower level.
const GROUP_BLOCKS: u64 = 4096;
/// Blocks under one count of the upper level.
const SUPER_BLOCKS: u64 = GROUP_BLOCKS * 1024;
/// Words looked at before a search takes the best run it has met: bounds a step on fragmented space to
/// a few microseconds.
const SCAN_WORDS_MAX: u32 = 1024;

pub(crate) struct Bitmap {
    /// 1 = used. Fresh memory is zero, so free space costs no resident memory.
    words: Vec<u64>,
    groups: Vec<u16>,
    supers: Vec<u32>,
    blocks: u64,
    free: u64,
    cursor: u64,
}

impl Bitmap {
    /// `blocks` blocks of which the first `taken` are used.
    pub(crate) fn new(blocks: u64, taken: u64) -> Self {
        let words = blocks.div_ceil(64) as usize;
        let mut map = Self {
            words: vec![0; words],
            groups: vec![GROUP_BLOCKS as u16; blocks.div_ceil(GROUP_BLOCKS) as usize],
            supers: vec![SUPER_BLOCKS as u32; blocks.div_ceil(SUPER_BLOCKS) as usize],
            blocks,
            free: blocks,
            cursor: taken,
        };
        if let Some(last) = map.groups.last_mut() {
            *last = ((blocks - 1) % GROUP_BLOCKS + 1) as u16;
        }
        if let Some(last) = map.supers.last_mut() {
            *last = ((blocks - 1) % SUPER_BLOCKS + 1) as u32;
        }
        map.mark(Run { start: 0, len: taken.min(blocks) });
        map
    }

    pub(crate) fn free_blocks(&self) -> u64 {
        self.free
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.words.capacity() * 8 + self.groups.capacity() * 2 + self.supers.capacity() * 4
    }

    /// Marks a run used. `false`, changing nothing more, at the first block used already or outside.
    pub(crate) fn mark(&mut self, run: Run) -> bool {
        let Some(end) = run.start.checked_add(run.len).filter(|end| *end <= self.blocks) else {
            return false;
        };
        let mut at = run.start;
        while at < end {
            let bit = at % 64;
            let n = (64 - bit).min(end - at);
            let mask = ones(n) << bit;
            let Some(word) = self.words.get_mut((at / 64) as usize) else { return false };
            if *word & mask != 0 {
                return false;
            }
            *word |= mask;
            self.count(at, -(n as i64));
            at += n;
        }
        true
    }

    /// Marks a block free. `false` when it was free already or is outside.
    pub(crate) fn release(&mut self, at: u64) -> bool {
        self.release_run(Run { start: at, len: 1 })
    }

    /// Marks a run free.
    pub(crate) fn release_run(&mut self, run: Run) -> bool {
        let Some(end) = run.start.checked_add(run.len).filter(|end| *end <= self.blocks) else {
            return false;
        };
        let mut at = run.start;
        while at < end {
            let bit = at % 64;
            let n = (64 - bit).min(end - at);
            let mask = ones(n) << bit;
            let Some(word) = self.words.get_mut((at / 64) as usize) else { return false };
            if *word & mask != mask {
                return false;
            }
            *word &= !mask;
            self.count(at, n as i64);
            at += n;
        }
        true
    }

    fn count(&mut self, at: u64, change: i64) {
        self.free = self.free.wrapping_add_signed(change);
        if let Some(group) = self.groups.get_mut((at / GROUP_BLOCKS) as usize) {
            *group = group.wrapping_add_signed(change as i16);
        }
        if let Some(sup) = self.supers.get_mut((at / SUPER_BLOCKS) as usize) {
            *sup = sup.wrapping_add_signed(change as i32);
        }
    }

    pub(crate) fn is_used(&self, at: u64) -> bool {
        self.words.get((at / 64) as usize).is_none_or(|w| w >> (at % 64) & 1 == 1)
    }

    /// Takes a run of up to `want` blocks: the first long enough, else the longest met within the
    /// search's bound. `None` only when nothing is free.
    pub(crate) fn take(&mut self, want: u64) -> Option<Run> {
        if self.free == 0 || want == 0 {
            return None;
        }
        let first = self.cursor.min(self.blocks);
        let mut best = Run::default();
        let mut budget = SCAN_WORDS_MAX;
        if !self.scan(first, self.blocks, want, &mut best, &mut budget) {
            self.scan(0, first, want, &mut best, &mut budget);
        }
        if best.len == 0 || !self.mark(best) {
            return None;
        }
        self.cursor = best.start + best.len;
        Some(best)
    }

    /// Lets the next search begin at `at`.
    pub(crate) fn set_cursor(&mut self, at: u64) {
        self.cursor = at;
    }

    /// Takes the run that starts exactly at `start`, which must be used by the caller already or free:
    /// used to grow a run that is held. Returns how many of up to `want` blocks were free and are taken.
    pub(crate) fn take_at(&mut self, start: u64, want: u64) -> u64 {
        let mut n = 0;
        while n < want && start + n < self.blocks && !self.is_used(start + n) {
            n += 1;
        }
        if n > 0 && !self.mark(Run { start, len: n }) {
            return 0;
        }
        n
    }

    /// Whether the search is over.
    fn scan(&self, from: u64, to: u64, want: u64, best: &mut Run, budget: &mut u32) -> bool {
        let mut at = from;
        let mut run = Run { start: from, len: 0 };
        while at < to {
            if self.supers.get((at / SUPER_BLOCKS) as usize) == Some(&0) {
                at = (at / SUPER_BLOCKS + 1) * SUPER_BLOCKS;
                run = Run { start: at, len: 0 };
                continue;
            }
            if self.groups.get((at / GROUP_BLOCKS) as usize) == Some(&0) {
                at = (at / GROUP_BLOCKS + 1) * GROUP_BLOCKS;
                run = Run { start: at, len: 0 };
                continue;
            }
            let bit = at % 64;
            let left = (64 - bit).min(to - at);
            let Some(word) = self.words.get((at / 64) as usize) else { return true };
            let used = word >> bit;
            let n = u64::from(used.trailing_zeros()).min(left);
            run.len += n;
            if run.len > best.len {
                *best = Run { start: run.start, len: run.len.min(want) };
            }
            if best.len >= want {
                return true;
            }
            at += n;
            if n < left {
                at += u64::from((used >> n).trailing_ones()).min(left - n);
                run = Run { start: at, len: 0 };
            }
            *budget = budget.saturating_sub(1);
            if *budget == 0 && best.len > 0 {
                return true;
            }
        }
        false
    }
}

/// `n` low bits.
fn ones(n: u64) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_everything_once_and_counts_agree() {
        for blocks in [64, 100, 4096, 4097, 70_000] {
            let mut map = Bitmap::new(blocks, 2);
            let mut seen = vec![false; blocks as usize];
            let mut total = 0;
            while let Some(run) = map.take(37) {
                for b in run.start..run.start + run.len {
                    assert!(!seen[b as usize] && b >= 2);
                    seen[b as usize] = true;
                }
                total += run.len;
            }
            assert_eq!(total, blocks - 2);
            assert_eq!(map.free_blocks(), 0);
            for b in (2..blocks).step_by(2) {
                assert!(map.release(b));
                assert!(!map.release(b));
            }
            assert_eq!(map.take(5).map(|r| r.len), Some(1));
        }
    }

    #[test]
    fn finds_a_long_run_behind_short_ones() {
        let mut map = Bitmap::new(1 << 20, 0);
        while map.take(1 << 20).is_some() {}
        for b in (0..1_600).step_by(2) {
            map.release(b);
        }
        map.release_run(Run { start: 20_000, len: 300 });
        assert_eq!(map.take(256), Some(Run { start: 20_000, len: 256 }));
        assert_eq!(map.take_at(20_256, 100), 44);
    }

    #[test]
    fn a_map_past_two_to_the_32_blocks_works() {
        let blocks = (1u64 << 32) + 12_345;
        let mut map = Bitmap::new(blocks, 2);
        // Everything below 2^32 used, word by word would be slow: mark in large runs.
        assert!(map.mark(Run { start: 2, len: (1 << 32) - 2 }));
        let run = map.take(100).unwrap();
        assert!(run.start >= 1 << 32);
        assert_eq!(map.free_blocks(), 12_345 - 100);
        assert!(!map.mark(Run { start: u64::MAX - 1, len: 5 }));
        assert!(!map.release(blocks));
    }
}
