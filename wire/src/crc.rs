//! Block checksums: IEEE CRC-32 (the polynomial of Ethernet and zlib), one per 4 KiB block.

use crate::{BLOCK_BYTES, OBJECT_BLOCKS};

/// Checksum of a block, or of any run of bytes.
#[inline]
pub fn block_crc(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Checksum of 4096 zero bytes: what an unwritten block reads as.
pub const ZERO_BLOCK_CRC: u32 = 0xc71c_0011;

/// The checksums of up to one object's blocks, in order, without an allocation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BlockCrcs {
    len: u8,
    crcs: [u32; OBJECT_BLOCKS],
}

impl Default for BlockCrcs {
    fn default() -> Self {
        Self { len: 0, crcs: [0; OBJECT_BLOCKS] }
    }
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
    pub fn push(&mut self, crc: u32) {
        if let Some(slot) = self.crcs.get_mut(self.len as usize) {
            *slot = crc;
            self.len += 1;
        }
    }

    /// The checksums present.
    pub fn as_slice(&self) -> &[u32] {
        self.crcs.get(..self.len as usize).unwrap_or(&[])
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
    fn matches_refuses_a_flipped_bit_and_a_wrong_length() {
        let mut data = vec![7u8; 3 * BLOCK_BYTES];
        let crcs = BlockCrcs::of(&data);
        assert!(crcs.matches(&data));
        assert!(!crcs.matches(&data[..2 * BLOCK_BYTES]));
        data[BLOCK_BYTES + 5] ^= 1;
        assert!(!crcs.matches(&data));
    }
}
