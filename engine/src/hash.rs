//! Hash tables with a fixed hasher: the same order in every run, no per-process seed.

use std::hash::{BuildHasherDefault, Hasher};

/// Multiply and rotate, word by word: keys here are identifiers of a few integers.
#[derive(Clone, Copy, Default)]
pub(crate) struct WordHasher(u64);

/// The golden ratio's 64-bit fraction: odd, with well spread bits.
const K: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for WordHasher {
    #[inline]
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(K);
    }
    #[inline]
    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }
    #[inline]
    fn write_u16(&mut self, word: u16) {
        self.write_u64(u64::from(word));
    }
    #[inline]
    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u8(*byte);
        }
    }
    #[inline]
    fn finish(&self) -> u64 {
        // The table takes its tag from the top bits and its bucket from the low ones.
        self.0 ^ (self.0 >> 29)
    }
}

/// A hash table with the fixed hasher. Never iterate it where order matters: sort first.
pub(crate) type Table<K, V> = hashbrown::HashMap<K, V, BuildHasherDefault<WordHasher>>;
