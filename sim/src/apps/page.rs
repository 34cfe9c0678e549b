//! The contents of a block: who wrote it, where it belongs, and a sum over all of it.

use crate::check::history::DATA_MARKER;
use wire::BLOCK_BYTES;

/// What the writer says about a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// Unique among all blocks ever written; never 0.
    pub serial: u64,
    /// The image.
    pub image: u64,
    /// The block in the image.
    pub block: u64,
    /// The program's own: what it must find again.
    pub note: [u64; 2],
}

/// What a block turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// Nothing but zeroes.
    Zeroes,
    /// A whole page, of whatever place.
    Page(Page),
    /// Neither.
    Garbage,
}

const WORDS: usize = BLOCK_BYTES / 8;
/// The last word is the sum of the others.
const SUM_AT: usize = WORDS - 1;
/// Words with a meaning; the second marks client data, for the fault injector.
const HEADER: usize = 6;

fn sum(words: impl Iterator<Item = u64>) -> u64 {
    // FNV-1a (public domain) over words, with a rotation so that high bits matter as well.
    words.fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| {
        (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    })
}

impl Page {
    fn word(&self, at: usize) -> u64 {
        match at {
            0 => self.serial,
            1 => DATA_MARKER,
            2 => self.image,
            3 => self.block,
            4 => self.note[0],
            5 => self.note[1],
            _ => (self.serial << 16 ^ self.block << 8).wrapping_add(at as u64),
        }
    }

    /// Fills a block.
    pub fn write(&self, into: &mut [u8]) {
        let all = sum((0..SUM_AT).map(|at| self.word(at)));
        for (at, bytes) in into.chunks_exact_mut(8).enumerate() {
            let word = if at == SUM_AT { all } else { self.word(at) };
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Looks at a block.
pub fn look(block: &[u8]) -> Seen {
    let words = || block.chunks_exact(8).filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?)));
    if block.len() != BLOCK_BYTES {
        return Seen::Garbage;
    }
    if words().all(|word| word == 0) {
        return Seen::Zeroes;
    }
    let mut head = [0u64; HEADER];
    head.iter_mut().zip(words()).for_each(|(into, word)| *into = word);
    let [serial, _, image, block_number, first, second] = head;
    let page = Page { serial, image, block: block_number, note: [first, second] };
    let right = words().enumerate().all(|(at, word)| at == SUM_AT || word == page.word(at));
    match right && words().next_back() == Some(sum((0..SUM_AT).map(|at| page.word(at)))) {
        true => Seen::Page(page),
        false => Seen::Garbage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_known_again_and_neither_a_mixture_nor_one_changed_bit_is() {
        let page = |serial| Page { serial, image: 1, block: 7, note: [3, 4] };
        let (mut one, mut two) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
        page(5).write(&mut one);
        page(6).write(&mut two);
        assert_eq!(look(&one), Seen::Page(page(5)));
        assert_eq!(look(&vec![0; BLOCK_BYTES]), Seen::Zeroes);
        two[..512].copy_from_slice(&one[..512]);
        assert_eq!(look(&two), Seen::Garbage);
        for at in [0, 9, 100, BLOCK_BYTES - 1] {
            let mut bad = one.clone();
            bad[at] ^= 4;
            assert_eq!(look(&bad), Seen::Garbage, "byte {at}");
        }
    }
}
