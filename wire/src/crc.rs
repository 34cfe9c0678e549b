//! Block checksums: IEEE CRC-32 (the polynomial of Ethernet and zlib), one per 4 KiB block.

use crate::{BLOCK_BYTES, OBJECT_BLOCKS};
use std::cell::RefCell;
use std::sync::Arc;

/// Checksum of a block, or of any run of bytes.
#[inline]
pub fn block_crc(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Checksum of 4096 zero bytes: what an unwritten block reads as.
pub const ZERO_BLOCK_CRC: u32 = 0xc71c_0011;

/// Checksums that lie in the value itself: operations of up to 16 KiB, by far the most.
const FEW: usize = 4;
/// Spare memory for longer lists kept by a thread: as many as one core has operations under way.
const SPARE_MAX: usize = 1024;

/// The checksums of a long operation, shared by everybody who passes them on.
type Many = Arc<[u32; OBJECT_BLOCKS]>;

thread_local! {
    static SPARE: RefCell<Vec<Many>> = const { RefCell::new(Vec::new()) };
}

/// The checksums of up to one object's blocks, in order. Small, because every message carries one through
/// queues and tables; a long list lies outside, in memory that is reused.
#[derive(Clone, Default)]
pub struct BlockCrcs {
    len: u8,
    few: [u32; FEW],
    many: Option<Many>,
}

impl PartialEq for BlockCrcs {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for BlockCrcs {}

impl Drop for BlockCrcs {
    fn drop(&mut self) {
        if let Some(many) = self.many.take() {
            give_back(many);
        }
    }
}

/// Keeps the memory of a list that nobody else has.
#[cold]
fn give_back(many: Many) {
    if Arc::strong_count(&many) == 1 {
        // A thread that is ending has no spare memory any more: then it is simply freed.
        let _ = SPARE.try_with(|spare| {
            if let Ok(mut spare) = spare.try_borrow_mut()
                && spare.len() < SPARE_MAX
            {
                spare.push(many);
            }
        });
    }
}

/// Memory for a long list; what it holds is of no meaning.
fn spare() -> Many {
    let kept = SPARE.try_with(|spare| spare.try_borrow_mut().ok().and_then(|mut spare| spare.pop()));
    kept.ok().flatten().unwrap_or_default()
}

impl BlockCrcs {
    /// Checksums of `data`, cut into blocks; a last partial block counts as one.
    /// Anything beyond `OBJECT_BLOCKS` blocks is ignored: callers bound `data` by `OBJECT_BYTES`.
    pub fn of(data: &[u8]) -> Self {
        let mut out = Self::default();
        for block in data.chunks(BLOCK_BYTES) {
            out.push(block_crc(block));
        }
        out
    }

    /// A single checksum (control frames: of the whole payload).
    pub fn one(crc: u32) -> Self {
        let mut out = Self::default();
        out.push(crc);
        out
    }

    /// Appends one; ignored when full.
    #[inline]
    pub fn push(&mut self, crc: u32) {
        let at = usize::from(self.len);
        if self.many.is_none()
            && let Some(slot) = self.few.get_mut(at)
        {
            *slot = crc;
            self.len += 1;
        } else {
            self.push_many(at, crc);
        }
    }

    fn push_many(&mut self, at: usize, crc: u32) {
        if at >= OBJECT_BLOCKS {
            return;
        }
        let few = self.few;
        let many = self.many.get_or_insert_with(|| {
            let mut many = spare();
            if let Some(start) = Arc::get_mut(&mut many).and_then(|many| many.first_chunk_mut()) {
                *start = few;
            }
            many
        });
        if let Some(slot) = Arc::make_mut(many).get_mut(at) {
            *slot = crc;
            self.len += 1;
        }
    }

    /// The checksums present.
    #[inline]
    pub fn as_slice(&self) -> &[u32] {
        let all: &[u32] = match &self.many {
            Some(many) => many.as_slice(),
            None => &self.few,
        };
        all.get(..usize::from(self.len)).unwrap_or(&[])
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A sub-range, clamped to what is there.
    pub fn range(&self, first: usize, count: usize) -> Self {
        let mut out = Self::default();
        for crc in self.as_slice().iter().skip(first).take(count) {
            out.push(*crc);
        }
        out
    }

    /// Whether `data`, cut into blocks, has exactly these checksums.
    pub fn matches(&self, data: &[u8]) -> bool {
        data.len().div_ceil(BLOCK_BYTES) == self.len()
            && data.chunks(BLOCK_BYTES).zip(self.as_slice()).all(|(block, crc)| block_crc(block) == *crc)
    }
}

impl std::fmt::Debug for BlockCrcs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_block_constant_is_the_crc_of_zeroes() {
        assert_eq!(block_crc(&[0; BLOCK_BYTES]), ZERO_BLOCK_CRC);
    }

    #[test]
    fn lists_of_every_length_hold_what_was_pushed_and_clones_do_not_share_changes() {
        for round in 0..3u32 {
            for count in 0..=OBJECT_BLOCKS + 2 {
                let mut crcs = BlockCrcs::default();
                let mut copies = Vec::new();
                for n in 0..count as u32 {
                    copies.push(crcs.clone());
                    crcs.push(n * 7 + round);
                }
                let want: Vec<u32> = (0..count.min(OBJECT_BLOCKS) as u32).map(|n| n * 7 + round).collect();
                assert_eq!(crcs.as_slice(), want);
                for (len, copy) in copies.iter().enumerate() {
                    assert_eq!(copy.as_slice(), &want[..len.min(OBJECT_BLOCKS)]);
                }
            }
        }
        assert!(size_of::<BlockCrcs>() <= 32);
    }

    #[test]
    fn matches_refuses_a_flipped_bit_and_a_wrong_length() {
        let mut data = vec![7u8; 3 * BLOCK_BYTES];
        let crcs = BlockCrcs::of(&data);
        assert!(crcs.matches(&data));
        assert!(!crcs.matches(&data[..2 * BLOCK_BYTES]));
        data[BLOCK_BYTES + 5] ^= 1;
        assert!(!crcs.matches(&data));
    }
}
