//! Commit blocks: the log.
//!
//! A commit is one block of records plus the data those records speak of. Commits form a chain: each names
//! the block of the next one, which is chosen before it is written. A commit counts when its block and every
//! block of its data match their checksums, and all commits before it count. So nothing needs to be ordered
//! on the device: whatever part of a batch a power cut leaves, the first commit that is not whole ends the
//! log, and no commit behind it was ever acknowledged.
//!
//! Data of a commit is verified on replay only when its number is above the highest `durable` named by any
//! valid commit (or the checkpoint): older data may have been superseded and its blocks reused. The other
//! half of that rule is in `write`: a superseded block is reused only when a durable commit names the
//! superseding one as durable.
//!
//! Block, 4096 bytes:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `DRYC` |
//! | 4 | 4 | CRC-32 of bytes 8..4096 |
//! | 8 | 8 | slice |
//! | 16 | 8 | number, +1 with every commit |
//! | 24 | 8 | incarnation that wrote it |
//! | 32 | 8 | block of the next commit |
//! | 40 | 8 | highest commit known to be durable when this one was submitted |
//! | 48 | 2 | records |
//! | 50 | 2 | bytes of records |
//! | 52 | 76 | zero |
//! | 128 | | records, one behind the other |
//!
//! Record:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 1 | kind: 1 write, 2 zero, 3 replace, 4 delete, 5 purge |
//! | 1 | 1 | runs |
//! | 2 | 2 | zero |
//! | 4 | 4 | slot |
//! | 8 | 20 | object: pool (4), image (8), index (8) |
//! | 28 | 16 | version: epoch, counter |
//! | 44 | 4 | mask: the blocks written, zeroed, or present |
//! | 48 | 4 each | checksums of the data, one per bit of the mask (write, replace) |
//! | | 6 each | runs: first block (5), blocks (1); together one block per bit of the mask |

use crate::bytes::*;
use wire::{BLOCK_BYTES, Epoch, ImageId, OBJECT_BLOCKS, ObjectId, PoolId, SliceId, Version, block_crc};

const MAGIC: u32 = u32::from_le_bytes(*b"DRYC");
/// Bytes before the first record.
pub const HEADER: usize = 128;
const RECORD_FIXED: usize = 48;
/// The longest record: 32 blocks in 32 runs.
pub const RECORD_BYTES_MAX: usize = RECORD_FIXED + OBJECT_BLOCKS * (4 + 6);

/// What a commit block says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CommitHeader {
    /// Its slice.
    pub slice: SliceId,
    /// Its number.
    pub number: u64,
    /// The incarnation that wrote it.
    pub incarnation: u64,
    /// Block of the next commit.
    pub next: u64,
    /// Highest commit known durable when it was submitted.
    pub durable: u64,
    /// Records.
    pub records: u16,
    /// Bytes of records.
    pub used: u16,
}

/// Finishes a commit block whose records are in place.
pub fn seal(block: &mut [u8], header: &CommitHeader) {
    if let Some(rest) = block.get_mut(HEADER + usize::from(header.used)..) {
        rest.fill(0);
    }
    if let Some(head) = block.get_mut(..HEADER) {
        head.fill(0);
    }
    put_u32(block, 0, MAGIC);
    put_u64(block, 8, header.slice.0);
    put_u64(block, 16, header.number);
    put_u64(block, 24, header.incarnation);
    put_u64(block, 32, header.next);
    put_u64(block, 40, header.durable);
    put_u16(block, 48, header.records);
    put_u16(block, 50, header.used);
    let crc = block_crc(part(block, 8, BLOCK_BYTES - 8));
    put_u32(block, 4, crc);
}

/// Reads a commit block's header; `None` when the block is no valid commit.
pub fn decode(block: &[u8]) -> Option<CommitHeader> {
    if block.len() != BLOCK_BYTES || get_u32(block, 0) != MAGIC {
        return None;
    }
    if block_crc(part(block, 8, BLOCK_BYTES - 8)) != get_u32(block, 4) {
        return None;
    }
    let header = CommitHeader {
        slice: SliceId(get_u64(block, 8)),
        number: get_u64(block, 16),
        incarnation: get_u64(block, 24),
        next: get_u64(block, 32),
        durable: get_u64(block, 40),
        records: get_u16(block, 48),
        used: get_u16(block, 50),
    };
    (HEADER + usize::from(header.used) <= BLOCK_BYTES && header.durable < header.number).then_some(header)
}

/// Which commit a log walk expects next.
#[derive(Clone, Copy, Debug)]
pub struct Expect {
    /// The slice.
    pub slice: SliceId,
    /// Number of the next commit.
    pub number: u64,
    /// The superblock's incarnation and cut.
    pub incarnation: u64,
    /// See `SliceSuper::cut`.
    pub cut: u64,
    /// Blocks of the slice.
    pub blocks: u64,
}

impl Expect {
    /// Whether a block continues the chain.
    pub fn accepts(&self, block: &[u8]) -> Option<CommitHeader> {
        let header = decode(block)?;
        let incarnation_fits = if header.number > self.cut {
            header.incarnation == self.incarnation
        } else {
            header.incarnation < self.incarnation
        };
        (header.slice == self.slice
            && header.number == self.number
            && incarnation_fits
            && header.next >= 2
            && header.next < self.blocks)
            .then_some(header)
    }
}

/// What a record does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum RecordKind {
    /// Merges blocks into the object.
    Write = 1,
    /// Makes blocks unwritten.
    Zero = 2,
    /// The object becomes exactly these blocks.
    Replace = 3,
    /// The object becomes a tombstone.
    Delete = 4,
    /// The tombstone goes.
    Purge = 5,
}

impl RecordKind {
    fn from_u8(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Write,
            2 => Self::Zero,
            3 => Self::Replace,
            4 => Self::Delete,
            5 => Self::Purge,
            _ => return None,
        })
    }

    /// Whether the record brings data.
    pub fn has_data(self) -> bool {
        matches!(self, Self::Write | Self::Replace)
    }
}

/// Where a record's data lies: up to 32 runs.
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    len: u8,
    runs: [(u64, u8); OBJECT_BLOCKS],
}

impl Default for Runs {
    fn default() -> Self {
        Self { len: 0, runs: [(0, 0); OBJECT_BLOCKS] }
    }
}

impl Runs {
    /// Forgets them.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends a run, or lengthens the last one when it continues it.
    pub fn push(&mut self, start: u64, blocks: u8) {
        if let Some(last) = (self.len as usize).checked_sub(1).and_then(|i| self.runs.get_mut(i))
            && last.0 + u64::from(last.1) == start
            && usize::from(last.1) + usize::from(blocks) <= OBJECT_BLOCKS
        {
            last.1 += blocks;
            return;
        }
        if let Some(to) = self.runs.get_mut(self.len as usize) {
            *to = (start, blocks);
            self.len += 1;
        }
    }
    /// The runs.
    pub fn as_slice(&self) -> &[(u64, u8)] {
        self.runs.get(..self.len as usize).unwrap_or(&[])
    }
    /// Blocks in all.
    pub fn blocks(&self) -> u32 {
        self.as_slice().iter().map(|r| u32::from(r.1)).sum()
    }
}

/// A record.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// What it does.
    pub kind: RecordKind,
    /// The object's slot.
    pub slot: u32,
    /// The object.
    pub object: ObjectId,
    /// The version it brings.
    pub version: Version,
    /// Blocks concerned.
    pub mask: u32,
    /// Checksums of the data, in block order.
    pub crcs: [u32; OBJECT_BLOCKS],
    /// Where the data lies, in block order.
    pub runs: Runs,
}

/// A record that lies in parts: what is written, without gathering it first.
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    /// What it does.
    pub kind: RecordKind,
    /// The object's slot.
    pub slot: u32,
    /// The object.
    pub object: ObjectId,
    /// The version it brings.
    pub version: Version,
    /// Blocks concerned.
    pub mask: u32,
    /// Checksums of the data, in block order; as many as there are blocks of data.
    pub crcs: &'a [u32],
    /// Where the data lies, in block order.
    pub runs: &'a Runs,
}

impl RecordRef<'_> {
    /// Bytes on disk.
    pub fn encoded_len(&self) -> usize {
        let data = if self.kind.has_data() { self.mask.count_ones() as usize * 4 } else { 0 };
        RECORD_FIXED + data + self.runs.as_slice().len() * 6
    }

    /// Writes it at `at`; returns its length, 0 when it does not fit.
    pub fn encode(&self, block: &mut [u8], at: usize) -> usize {
        let len = self.encoded_len();
        let Some(to) = block.get_mut(at..at + len) else { return 0 };
        put_u8(to, 0, self.kind as u8);
        put_u8(to, 1, self.runs.len);
        put_u16(to, 2, 0);
        put_u32(to, 4, self.slot);
        put_u32(to, 8, self.object.pool.0);
        put_u64(to, 12, self.object.image.0);
        put_u64(to, 20, self.object.index);
        put_u64(to, 28, self.version.epoch.0);
        put_u64(to, 36, self.version.counter);
        put_u32(to, 44, self.mask);
        let mut at = RECORD_FIXED;
        if self.kind.has_data() {
            for crc in self.crcs.iter().take(self.mask.count_ones() as usize) {
                put_u32(to, at, *crc);
                at += 4;
            }
        }
        for (start, blocks) in self.runs.as_slice() {
            put_addr(to, at, *start);
            put_u8(to, at + 5, *blocks);
            at += 6;
        }
        len
    }

    /// Calls `f(block of the object, address, checksum)` for every block the record brings.
    pub fn each_block(&self, mut f: impl FnMut(usize, u64, u32)) {
        let mut mask = self.mask;
        let mut crcs = self.crcs.iter();
        for (start, n) in self.runs.as_slice() {
            for addr in *start..*start + u64::from(*n) {
                if mask == 0 {
                    return;
                }
                let block = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                f(block, addr, crcs.next().copied().unwrap_or(0));
            }
        }
    }
}

impl Record {
    /// The same, by reference.
    pub fn as_ref(&self) -> RecordRef<'_> {
        let Self { kind, slot, object, version, mask, .. } = *self;
        let crcs = self.crcs.get(..mask.count_ones() as usize).unwrap_or(&[]);
        RecordRef { kind, slot, object, version, mask, crcs, runs: &self.runs }
    }

    /// Reads the record at the start of `bytes`, checking that it makes sense in a slice of `blocks` blocks.
    pub fn decode(bytes: &[u8], blocks: u64) -> Option<(Self, usize)> {
        if bytes.len() < RECORD_FIXED {
            return None;
        }
        let mut record = Self {
            kind: RecordKind::from_u8(get_u8(bytes, 0))?,
            slot: get_u32(bytes, 4),
            object: ObjectId {
                pool: PoolId(get_u32(bytes, 8)),
                image: ImageId(get_u64(bytes, 12)),
                index: get_u64(bytes, 20),
            },
            version: Version { epoch: Epoch(get_u64(bytes, 28)), counter: get_u64(bytes, 36) },
            mask: get_u32(bytes, 44),
            crcs: [0; OBJECT_BLOCKS],
            runs: Runs::default(),
        };
        if u64::from(record.slot) / crate::page::SLOTS_PER_PAGE as u64 >= crate::page::PAGES_MAX {
            return None;
        }
        let mut at = RECORD_FIXED;
        if record.kind.has_data() {
            for crc in record.crcs.iter_mut().take(record.mask.count_ones() as usize) {
                *crc = get_u32(bytes, at);
                at += 4;
            }
        }
        let runs = usize::from(get_u8(bytes, 1));
        if runs > OBJECT_BLOCKS || at + runs * 6 > bytes.len() {
            return None;
        }
        for _ in 0..runs {
            let (start, n) = (get_addr(bytes, at), get_u8(bytes, at + 5));
            if start < 2 || n == 0 || usize::from(n) > OBJECT_BLOCKS || start + u64::from(n) > blocks {
                return None;
            }
            record.runs.push(start, n);
            at += 6;
        }
        let want = if record.kind.has_data() { record.mask.count_ones() } else { 0 };
        (record.runs.blocks() == want).then_some((record, at))
    }
}

/// The records of a valid commit block. A record that makes no sense yields `None` and ends the walk.
pub struct Records<'a> {
    rest: &'a [u8],
    left: u16,
    blocks: u64,
}

impl<'a> Records<'a> {
    /// Walks `block`, of a slice of `blocks` blocks.
    pub fn new(block: &'a [u8], header: &CommitHeader, blocks: u64) -> Self {
        Self { rest: part(block, HEADER, usize::from(header.used)), left: header.records, blocks }
    }
}

impl Iterator for Records<'_> {
    type Item = Option<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let Some((record, len)) = Record::decode(self.rest, self.blocks) else {
            self.left = 0;
            return Some(None);
        };
        self.left -= 1;
        self.rest = self.rest.get(len..).unwrap_or(&[]);
        Some(Some(record))
    }
}
