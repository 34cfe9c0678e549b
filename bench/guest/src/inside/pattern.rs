//! Blocks that say which write they are of.

/// Bytes of a block.
pub const BLOCK: usize = wire::BLOCK_BYTES;
/// First word of every block that was written.
const MAGIC: u64 = 0x6775_6573_7462_6c6b;

/// A stream of random numbers (xorshift).
pub struct Rng(u64);

impl Rng {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n.max(1)
    }
}

/// The contents of a block.
pub fn block(stamp: u64, number: u64) -> Vec<u8> {
    let mut filler = Rng::new(stamp ^ number.rotate_left(40));
    let head = [MAGIC, stamp, number];
    let words = head.into_iter().chain(std::iter::repeat_with(move || filler.bits()));
    words.take(BLOCK / size_of::<u64>()).flat_map(u64::to_le_bytes).collect()
}

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Zeroes: never written.
    Blank,
    /// This write, whole.
    Write(u64),
    /// Something that no write has made.
    Garbage,
}

/// Recognises a block.
pub fn recognise(bytes: &[u8], number: u64) -> Found {
    if bytes.iter().all(|byte| *byte == 0) {
        return Found::Blank;
    }
    let stamp = bytes.get(8..16).and_then(|word| word.try_into().ok()).map(u64::from_le_bytes);
    match stamp {
        Some(stamp) if block(stamp, number) == bytes => Found::Write(stamp),
        _ => Found::Garbage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_recognised_only_whole_and_in_its_place() {
        let mut bytes = block(77, 5);
        assert_eq!(bytes.len(), BLOCK);
        assert_eq!(recognise(&bytes, 5), Found::Write(77));
        assert_eq!(recognise(&bytes, 6), Found::Garbage);
        bytes[BLOCK - 1] ^= 1;
        assert_eq!(recognise(&bytes, 5), Found::Garbage);
        assert_eq!(recognise(&[0; BLOCK], 5), Found::Blank);
    }
}
