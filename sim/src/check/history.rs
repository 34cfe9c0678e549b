//! What clients did and saw, per 4 KiB block, and the contents that make every write recognisable.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use wire::{BLOCK_BYTES, OBJECT_BLOCKS};

/// What a block holds: the number of the write that filled it, 0 for zeroes.
pub type Value = u64;

/// The second word of every written block: tells client data from a store's own structures, which the
/// fault injector leaves alone.
pub const DATA_MARKER: u64 = u64::from_le_bytes(*b"simdata!");

/// Fills a block with the contents that stand for `value` at this place. A block that mixes two writes,
/// or lies at the wrong place, matches no value.
pub fn fill(value: Value, place: Place, into: &mut [u8]) {
    if value == 0 {
        return into.fill(0);
    }
    let salt = place.salt();
    for (at, word) in into.chunks_exact_mut(8).enumerate() {
        let bits = match at {
            0 => value,
            1 => DATA_MARKER,
            _ => mix(value ^ salt, at as u64),
        };
        word.copy_from_slice(&bits.to_le_bytes());
    }
}

/// Which value a block holds; `None` when it is the contents of no write to this place.
pub fn recognise(place: Place, block: &[u8]) -> Option<Value> {
    let value = u64::from_le_bytes(block.get(..8)?.try_into().ok()?);
    if value == 0 {
        return block.iter().all(|byte| *byte == 0).then_some(0);
    }
    let salt = place.salt();
    let right = block.len() == BLOCK_BYTES
        && block
            .chunks_exact(8)
            .enumerate()
            .skip(2)
            .all(|(at, word)| word == mix(value ^ salt, at as u64).to_le_bytes())
        && block.get(8..16) == Some(&DATA_MARKER.to_le_bytes());
    right.then_some(value)
}

fn mix(value: u64, at: u64) -> u64 {
    let x = (value.wrapping_add(at)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^ (x >> 29)
}

/// A block of an image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// The image, as the workload numbers them.
    pub image: usize,
    /// Block number in the image.
    pub block: u64,
}

impl Place {
    fn salt(self) -> u64 {
        mix((self.image as u64) << 40 | self.block, 77)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {} block {} (object {})", self.image, self.block, self.block / OBJECT_BLOCKS as u64)
    }
}

/// A position in the one order of everything that clients did.
pub type Stamp = u64;

/// What an operation did to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Did {
    /// Wrote this value (0: zeroed it).
    Write(Value),
    /// Saw this value.
    Read(Value),
}

/// An operation on one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpRecord {
    /// Which client instance.
    pub client: usize,
    /// What it did.
    pub did: Did,
    /// When it was submitted.
    pub start: Stamp,
    /// When its success was known; `None`: it never was, so it may have happened, or may yet.
    pub end: Option<Stamp>,
    /// Virtual time of the submission, for people.
    pub at: u64,
}

/// An operation under way, to be ended later.
#[derive(Clone, Debug)]
pub struct Pending {
    /// Which blocks.
    pub first: Place,
    /// How many.
    pub blocks: u64,
    /// For writes, the value of the first block; the others follow. `None` for zeroing and reads.
    pub value: Option<Value>,
    /// When it was submitted.
    pub start: Stamp,
    /// Virtual time of the submission.
    pub at: u64,
    /// Which client instance.
    pub client: usize,
    /// Index of its record in each block's list, for writes.
    slots: Vec<usize>,
}

/// When a change may take effect once more: what the nodes remember of changes made is bounded, and lives in
/// their processes.
#[derive(Clone, Default, Debug)]
pub struct Memory {
    /// Between these stamps a primary began to serve when nobody was left who knew which changes had been
    /// made: it says so itself, and `cluster` checks that its process had ended before.
    lost: Vec<(Stamp, Stamp)>,
    /// Changes begun up to a stamp, each counted once per object.
    begun: Vec<(Stamp, u64)>,
}

impl Memory {
    /// Whether an operation's life spans a loss of memory, or so many other changes that it may have been
    /// forgotten among them. One of unknown outcome lives on.
    pub fn may_be_forgotten(&self, op: &OpRecord) -> bool {
        let end = op.end.unwrap_or(Stamp::MAX);
        let lost = self.lost.iter().any(|(from, to)| op.start <= *to && end >= *from);
        // Half of what is remembered of one PG: some that began before may have been counted later.
        lost || self.begun_by(end) - self.begun_by(op.start) > engine::ORIGINS_PER_PG_MAX as u64 / 2
    }

    /// How often memory was lost.
    pub fn losses(&self) -> usize {
        self.lost.len()
    }

    fn begun_by(&self, stamp: Stamp) -> u64 {
        let at = self.begun.partition_point(|(start, _)| *start <= stamp);
        at.checked_sub(1).and_then(|at| self.begun.get(at)).map_or(0, |(_, count)| *count)
    }
}

/// Everything that clients did.
#[derive(Default)]
pub struct History {
    blocks: BTreeMap<Place, Vec<OpRecord>>,
    clock: Rc<Cell<Stamp>>,
    next_value: Value,
    /// See `Memory`.
    pub memory: Memory,
    /// When losses of memory were last looked for.
    looked: Stamp,
    /// Writes acknowledged.
    pub acked_writes: u64,
    /// Reads answered.
    pub answered_reads: u64,
    /// Operations whose outcome stayed unknown.
    pub unknown: u64,
    /// Operations that ended with an error other than a timeout, by its text.
    pub errors: BTreeMap<String, u64>,
    /// What was seen that no legal history contains, found while it was recorded.
    pub violations: Vec<String>,
}

impl History {
    fn tick(&self) -> Stamp {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    /// The position of what comes next, less one.
    pub fn now(&self) -> Stamp {
        self.clock.get()
    }

    /// A read begins.
    pub fn begin_read(&mut self, client: usize, at: u64, first: Place, blocks: u64) -> Pending {
        Pending { first, blocks, value: None, start: self.tick(), at, client, slots: Vec::new() }
    }

    /// A write begins; it has the values `value`, `value + 1`, … of the returned operation.
    pub fn begin_write(&mut self, client: usize, at: u64, first: Place, blocks: u64) -> Pending {
        let value = self.next_value + 1;
        self.next_value += blocks;
        self.begin_change(client, at, first, blocks, Some(value))
    }

    /// A discard or write-zeroes begins.
    pub fn begin_zero(&mut self, client: usize, at: u64, first: Place, blocks: u64) -> Pending {
        self.begin_change(client, at, first, blocks, None)
    }

    fn begin_change(
        &mut self,
        client: usize,
        at: u64,
        first: Place,
        blocks: u64,
        value: Option<Value>,
    ) -> Pending {
        let start = self.tick();
        let objects =
            (first.block + blocks - 1) / OBJECT_BLOCKS as u64 - first.block / OBJECT_BLOCKS as u64 + 1;
        let before = self.memory.begun.last().map_or(0, |(_, count)| *count);
        self.memory.begun.push((start, before + objects));
        let mut slots = Vec::with_capacity(blocks as usize);
        for nth in 0..blocks {
            let place = Place { image: first.image, block: first.block + nth };
            let list = self.blocks.entry(place).or_default();
            let did = Did::Write(value.map_or(0, |value| value + nth));
            slots.push(list.len());
            list.push(OpRecord { client, did, start, end: None, at });
        }
        Pending { first, blocks, value, start, at, client, slots }
    }

    /// Memory was lost, or not, since the last call.
    pub fn look_at_memory(&mut self, lost: bool) {
        let now = self.clock.get();
        if lost {
            self.memory.lost.push((self.looked, now));
        }
        self.looked = now;
    }

    /// A write, discard or write-zeroes was acknowledged.
    pub fn change_done(&mut self, op: &Pending) {
        let end = self.tick();
        self.acked_writes += 1;
        for (nth, slot) in op.slots.iter().enumerate() {
            let place = Place { image: op.first.image, block: op.first.block + nth as u64 };
            if let Some(record) = self.blocks.get_mut(&place).and_then(|list| list.get_mut(*slot)) {
                record.end = Some(end);
            }
        }
    }

    /// A read was answered with this data.
    pub fn read_done(&mut self, op: &Pending, data: &[u8]) {
        let end = self.tick();
        self.answered_reads += 1;
        for (nth, block) in data.chunks(BLOCK_BYTES).enumerate() {
            let place = Place { image: op.first.image, block: op.first.block + nth as u64 };
            match recognise(place, block) {
                Some(value) => {
                    let did = Did::Read(value);
                    let record = OpRecord { client: op.client, did, start: op.start, end: Some(end), at: op.at };
                    self.blocks.entry(place).or_default().push(record);
                }
                None => self.violations.push(format!(
                    "garbage: client {} read at {} from {place} bytes that no single write put there (they begin {:02x?})",
                    op.client,
                    simenv::trace::stamp(op.at),
                    block.get(..16).unwrap_or(&[]),
                )),
            }
        }
    }

    /// An operation's outcome is unknown, or it failed.
    pub fn unknown(&mut self, error: &str) {
        self.unknown += 1;
        *self.errors.entry(error.to_owned()).or_default() += 1;
    }

    /// All blocks that were ever touched, with their operations in order of submission.
    pub fn blocks(&self) -> impl Iterator<Item = (Place, Vec<OpRecord>)> + '_ {
        self.blocks.iter().map(|(place, list)| {
            let mut list = list.clone();
            list.sort_by_key(|op| op.start);
            (*place, list)
        })
    }
}

/// A block's operations, one a line, for a report.
pub fn show(ops: &[OpRecord]) -> String {
    let mut out = String::new();
    for op in ops {
        let end = op.end.map_or("?".to_owned(), |end| end.to_string());
        let did = match op.did {
            Did::Write(value) => format!("write {value}"),
            Did::Read(value) => format!("read  {value}"),
        };
        out.push_str(&format!(
            "      {} client {} {did} [{}..{end}]\n",
            simenv::trace::stamp(op.at),
            op.client,
            op.start
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_recognised_at_their_place_only_and_mixes_never() {
        let here = Place { image: 0, block: 5 };
        let there = Place { image: 0, block: 6 };
        let mut a = vec![0; BLOCK_BYTES];
        let mut b = vec![0; BLOCK_BYTES];
        fill(11, here, &mut a);
        fill(12, here, &mut b);
        assert_eq!(recognise(here, &a), Some(11));
        assert_eq!(recognise(there, &a), None);
        b[..512].copy_from_slice(&a[..512]);
        assert_eq!(recognise(here, &b), None);
        assert_eq!(recognise(here, &vec![0; BLOCK_BYTES]), Some(0));
    }
}
