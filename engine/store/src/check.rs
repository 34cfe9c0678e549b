//! Offline check of a disk: walks everything, says what it finds, and what may safely be repaired.
//!
//! It shares the decoders with the store and nothing else: what the store believes is worked out a second
//! time here. Safe to repair are superblock copies only, because each has a twin; everything else is
//! repaired from other replicas, by the cluster.

use std::collections::BTreeMap;

use thiserror::Error;
use wire::{BLOCK_BYTES, ClusterId, OBJECT_BLOCKS, ObjectId, SliceId, Version, block_crc};

use crate::alloc::{Bitmap, Run};
use crate::commit::{CommitHeader, Expect, Record, RecordKind, Records};
use crate::page::{
    BlockRef, NODE_ENTRIES, SLOTS_PER_PAGE, Slot, SlotState, check_node, check_page, node_entry, tree_shape,
};
use crate::superblock::{DiskSuper, SliceEntry, SliceSuper, SuperError};

/// A disk or its image.
pub trait ReadAt {
    /// Fills `buf` from byte `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()>;
}

/// What to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// When set, a disk of another cluster is a finding.
    pub cluster: Option<ClusterId>,
    /// Read all data and compare its checksums.
    pub verify_data: bool,
}

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Normal after a power cut.
    Note,
    /// Damaged, and repaired by `CheckReport::repairs`.
    Repairable,
    /// Damaged: other replicas must repair it.
    Damage,
}

/// Something found.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Finding {
    /// The device does not read.
    #[error("byte {offset}: {why}")]
    Unreadable {
        /// Where.
        offset: u64,
        /// What the device said.
        why: String,
    },
    /// Neither copy of the disk's superblock is usable.
    #[error("disk superblock: {0}")]
    NoDisk(SuperError),
    /// One copy of the disk's superblock is bad.
    #[error("disk superblock, copy {copy}: {error}")]
    DiskCopy {
        /// 0 or 1.
        copy: usize,
        /// What is wrong.
        error: SuperError,
    },
    /// Neither copy of a slice's superblock is usable.
    #[error("slice {slice}: superblock: {error}")]
    NoSlice {
        /// The slice.
        slice: SliceId,
        /// What is wrong.
        error: SuperError,
    },
    /// One copy of a slice's superblock is bad or older than the other.
    #[error("slice {slice}: superblock copy {copy}: {}", match .error { Some(e) => e.to_string(), None => "older than the other".into() })]
    SliceCopy {
        /// The slice.
        slice: SliceId,
        /// 0 or 1.
        copy: usize,
        /// What is wrong; `None` = valid but older (a cut while updating).
        error: Option<SuperError>,
    },
    /// The slice's superblock contradicts the disk's.
    #[error("slice {slice}: superblock is of slice {found} with {blocks} blocks")]
    WrongSlice {
        /// As the disk says.
        slice: SliceId,
        /// As the slice says.
        found: SliceId,
        /// As the slice says.
        blocks: u64,
    },
    /// The log ends with commits that are not whole.
    #[error("slice {slice}: log ends before commit {number}: {cut} incomplete commits, never acknowledged")]
    LogEnd {
        /// The slice.
        slice: SliceId,
        /// First commit that does not count.
        number: u64,
        /// How many.
        cut: usize,
    },
    /// A record of the log contradicts what is known.
    #[error("slice {slice}: commit block {block}: record of {object} makes no sense")]
    Record {
        /// The slice.
        slice: SliceId,
        /// The commit block.
        block: u64,
        /// The record's object.
        object: ObjectId,
    },
    /// A node of the page map is damaged.
    #[error("slice {slice}: page map node {number} of level {level} at block {block} is damaged")]
    Node {
        /// The slice.
        slice: SliceId,
        /// Its level.
        level: u8,
        /// Its number.
        number: usize,
        /// Where.
        block: u64,
    },
    /// An object page is damaged.
    #[error("slice {slice}: object page {page} at block {block} is damaged")]
    Page {
        /// The slice.
        slice: SliceId,
        /// Its number.
        page: u32,
        /// Where.
        block: u64,
    },
    /// A block is used twice, or lies outside the slice.
    #[error("slice {slice}: block {block} is used twice or outside the slice")]
    DoubleUse {
        /// The slice.
        slice: SliceId,
        /// The block.
        block: u64,
    },
    /// An object has two records.
    #[error("slice {slice}: object {object} has two records")]
    Duplicate {
        /// The slice.
        slice: SliceId,
        /// The object.
        object: ObjectId,
    },
    /// A block of data does not match its checksum.
    #[error("slice {slice}: object {object}: block {index} (at block {block}) does not match its checksum")]
    Data {
        /// The slice.
        slice: SliceId,
        /// The object.
        object: ObjectId,
        /// Block of the object.
        index: usize,
        /// Where.
        block: u64,
    },
}

impl Finding {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Self::LogEnd { .. } => Severity::Note,
            Self::SliceCopy { error: None, .. } | Self::DiskCopy { .. } | Self::SliceCopy { .. } => {
                Severity::Repairable
            }
            _ => Severity::Damage,
        }
    }
}

/// A write that repairs something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repair {
    /// Byte on the disk.
    pub offset: u64,
    /// What to write there.
    pub bytes: Vec<u8>,
    /// What it repairs, for people.
    pub what: String,
}

/// What a slice holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SliceReport {
    /// The slice.
    pub slice: SliceId,
    /// Object records, tombstones included.
    pub objects: u64,
    /// Tombstones among them.
    pub tombstones: u64,
    /// Blocks of client data.
    pub data_blocks: u64,
    /// Object pages.
    pub pages: u64,
    /// Commits in the log.
    pub commits: u64,
    /// Blocks in use, everything included.
    pub used_blocks: u64,
    /// Blocks free.
    pub free_blocks: u64,
    /// Data blocks compared with their checksum.
    pub verified_blocks: u64,
}

/// The result.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// The disk, when its superblock could be read.
    pub disk: Option<DiskSuper>,
    /// Its slices.
    pub slices: Vec<SliceReport>,
    /// What was found.
    pub findings: Vec<Finding>,
    /// What may safely be written to repair some of it. Nothing is written by the check itself.
    pub repairs: Vec<Repair>,
}

impl CheckReport {
    /// The worst finding.
    pub fn severity(&self) -> Option<Severity> {
        self.findings.iter().map(Finding::severity).max()
    }
}

/// Checks a disk of `disk_bytes` bytes that no node has open.
pub fn check(device: &dyn ReadAt, disk_bytes: u64, options: CheckOptions) -> CheckReport {
    let mut report = CheckReport::default();
    let copies = DiskSuper::offsets().map(|offset| read(device, offset, BLOCK_BYTES, &mut report.findings));
    let decoded = copies.each_ref().map(|copy| DiskSuper::decode(copy, disk_bytes, options.cluster));
    let [a, b] = copies.each_ref().map(Vec::as_slice);
    let disk = match DiskSuper::choose(a, b, disk_bytes, options.cluster) {
        Ok(disk) => disk,
        Err(error) => {
            report.findings.push(Finding::NoDisk(error));
            return report;
        }
    };
    for (copy, (found, offset)) in decoded.into_iter().zip(DiskSuper::offsets()).enumerate() {
        if let Err(error) = found {
            report.findings.push(Finding::DiskCopy { copy, error });
            let what = format!("disk superblock, copy {copy}");
            report.repairs.push(Repair { offset, bytes: disk.encode(), what });
        }
    }
    for entry in &disk.slices {
        check_slice(device, entry, options, &mut report);
    }
    report.disk = Some(disk);
    report
}

/// Checks one slice, adding to the report.
pub fn check_slice(device: &dyn ReadAt, entry: &SliceEntry, options: CheckOptions, report: &mut CheckReport) {
    let block = BLOCK_BYTES as u64;
    let offsets = [entry.offset, entry.offset + block];
    let copies = offsets.map(|offset| read(device, offset, BLOCK_BYTES, &mut report.findings));
    let [a, b] = copies.each_ref().map(Vec::as_slice);
    let found = match SliceSuper::choose(a, b) {
        Ok(found) => found,
        Err(error) => {
            report.findings.push(Finding::NoSlice { slice: entry.slice, error });
            return;
        }
    };
    if found.slice != entry.slice || found.blocks != entry.len / block {
        let (slice, of, blocks) = (entry.slice, found.slice, found.blocks);
        report.findings.push(Finding::WrongSlice { slice, found: of, blocks });
        return;
    }
    for (copy, (bytes, offset)) in copies.iter().zip(offsets).enumerate() {
        let error = match SliceSuper::decode(bytes) {
            Ok(same) if same == found => continue,
            Ok(_) => None,
            Err(error) => Some(error),
        };
        report.findings.push(Finding::SliceCopy { slice: entry.slice, copy, error });
        let mut bytes = vec![0; BLOCK_BYTES];
        found.encode_into(&mut bytes);
        report.repairs.push(Repair {
            offset,
            bytes,
            what: format!("slice {}, superblock copy {copy}", entry.slice),
        });
    }
    let mut walk = Walk {
        device,
        offset: entry.offset,
        found,
        options,
        space: Bitmap::new(found.blocks, 2),
        changed: BTreeMap::new(),
        objects: Vec::new(),
        report: SliceReport { slice: entry.slice, ..SliceReport::default() },
        findings: Vec::new(),
    };
    walk.log();
    walk.tree();
    walk.end();
    report.slices.push(walk.report);
    report.findings.append(&mut walk.findings);
}

fn read(device: &dyn ReadAt, offset: u64, len: usize, findings: &mut Vec<Finding>) -> Vec<u8> {
    let mut bytes = vec![0; len];
    if let Err(why) = device.read_at(offset, &mut bytes) {
        findings.push(Finding::Unreadable { offset, why: why.to_string() });
    }
    bytes
}

/// An object as the log leaves it.
struct Changed {
    object: ObjectId,
    state: SlotState,
    version: Version,
    blocks: [Option<BlockRef>; OBJECT_BLOCKS],
}

struct Walk<'a> {
    device: &'a dyn ReadAt,
    offset: u64,
    found: SliceSuper,
    options: CheckOptions,
    space: Bitmap,
    changed: BTreeMap<u32, Changed>,
    objects: Vec<ObjectId>,
    report: SliceReport,
    findings: Vec<Finding>,
}

impl Walk<'_> {
    fn slice(&self) -> SliceId {
        self.found.slice
    }

    fn read(&mut self, block: u64, blocks: usize) -> Vec<u8> {
        let offset = self.offset + block * BLOCK_BYTES as u64;
        read(self.device, offset, blocks * BLOCK_BYTES, &mut self.findings)
    }

    fn use_block(&mut self, block: u64) {
        if !self.space.mark(Run { start: block, len: 1 }) {
            self.findings.push(Finding::DoubleUse { slice: self.slice(), block });
        }
    }

    fn log(&mut self) {
        let found = self.found;
        let mut expect = Expect {
            slice: found.slice,
            number: found.checkpoint + 1,
            incarnation: found.incarnation,
            cut: found.cut,
            blocks: found.blocks,
        };
        let mut commits: Vec<(CommitHeader, u64, Vec<Record>)> = Vec::new();
        let (mut at, mut durable) = (found.log, found.checkpoint.max(found.cut));
        loop {
            let block = self.read(at, 1);
            let Some(header) = expect.accepts(&block) else { break };
            let records: Option<Vec<Record>> = Records::new(&block, &header, found.blocks).collect();
            let Some(records) = records else { break };
            durable = durable.max(header.durable);
            commits.push((header, at, records));
            at = header.next;
            expect.number += 1;
        }
        let whole = |walk: &mut Self, records: &[Record]| {
            let mut ok = true;
            for record in records {
                record.as_ref().each_block(|_, addr, crc| ok = ok && block_crc(&walk.read(addr, 1)) == crc);
            }
            ok
        };
        let mut next = found.log;
        let total = commits.len();
        for (i, (header, at, records)) in commits.into_iter().enumerate() {
            if header.number > durable && !whole(self, &records) {
                let (slice, number) = (self.slice(), header.number);
                self.findings.push(Finding::LogEnd { slice, number, cut: total - i });
                break;
            }
            self.use_block(at);
            for record in &records {
                self.replay(record, at);
            }
            self.report.commits += 1;
            next = header.next;
        }
        // The place of the next commit is held by the chain.
        self.use_block(next);
    }

    fn replay(&mut self, record: &Record, at: u64) {
        let entry = self.changed.entry(record.slot).or_insert_with(|| Changed {
            object: record.object,
            state: SlotState::Live,
            version: record.version,
            blocks: [None; OBJECT_BLOCKS],
        });
        if entry.object != record.object || entry.state == SlotState::Free {
            let slice = self.found.slice;
            self.findings.push(Finding::Record { slice, block: at, object: record.object });
            return;
        }
        let (state, emptied) = match record.kind {
            RecordKind::Write => (SlotState::Live, 0),
            RecordKind::Zero => (SlotState::Live, record.mask),
            RecordKind::Replace => (SlotState::Live, !record.mask),
            RecordKind::Delete => (SlotState::Tombstone, u32::MAX),
            RecordKind::Purge => (SlotState::Free, u32::MAX),
        };
        entry.state = state;
        entry.version = record.version;
        for (i, block) in entry.blocks.iter_mut().enumerate() {
            if emptied >> i & 1 == 1 {
                *block = Some(BlockRef::default());
            }
        }
        record.as_ref().each_block(|i, addr, crc| {
            if let Some(to) = entry.blocks.get_mut(i) {
                *to = Some(BlockRef { addr, crc });
            }
        });
    }

    /// The page map from the root down, then every page.
    fn tree(&mut self) {
        let (maps, tops) = tree_shape(self.found.pages);
        let mut above = vec![BlockRef { addr: self.found.root, crc: self.found.root_crc }];
        for (level, below) in [(2u8, tops), (1, maps), (0, self.found.pages as usize)] {
            let mut children = Vec::new();
            for (number, at) in above.iter().enumerate() {
                if at.addr == 0 {
                    children.resize((number + 1) * NODE_ENTRIES, BlockRef::default());
                    continue;
                }
                self.use_block(at.addr);
                let bytes = if at.addr < self.found.blocks { self.read(at.addr, 1) } else { Vec::new() };
                if check_node(&bytes, self.slice(), level, number as u64, at.crc).is_err() {
                    let (slice, block) = (self.slice(), at.addr);
                    self.findings.push(Finding::Node { slice, level, number, block });
                    children.resize((number + 1) * NODE_ENTRIES, BlockRef::default());
                    continue;
                }
                children.extend((0..NODE_ENTRIES).map(|i| node_entry(&bytes, i)));
            }
            children.truncate(below);
            above = children;
        }
        for (page, at) in above.into_iter().enumerate() {
            if at.addr != 0 {
                self.page(page as u32, at);
            }
        }
    }

    fn page(&mut self, page: u32, at: BlockRef) {
        self.use_block(at.addr);
        let bytes = if at.addr < self.found.blocks { self.read(at.addr, 1) } else { Vec::new() };
        self.report.pages += 1;
        if check_page(&bytes, self.slice(), page, at.crc).is_err() {
            self.findings.push(Finding::Page { slice: self.slice(), page, block: at.addr });
            return;
        }
        for i in 0..SLOTS_PER_PAGE {
            let slot = Slot::of(&bytes, i);
            let mut blocks = [BlockRef::default(); OBJECT_BLOCKS];
            for (i, to) in blocks.iter_mut().enumerate() {
                *to = slot.block(i);
            }
            let number = page * SLOTS_PER_PAGE as u32 + i as u32;
            let state = slot.state();
            match self.changed.get_mut(&number) {
                Some(changed) if state == Some(SlotState::Free) || changed.object == slot.object() => {
                    for (to, under) in changed.blocks.iter_mut().zip(blocks) {
                        to.get_or_insert(under);
                    }
                }
                None if state == Some(SlotState::Free) => {}
                None if state.is_some() => {
                    self.object(slot.object(), state == Some(SlotState::Tombstone), &blocks)
                }
                _ => self.findings.push(Finding::Page { slice: self.slice(), page, block: at.addr }),
            }
        }
    }

    fn object(&mut self, object: ObjectId, tombstone: bool, blocks: &[BlockRef; OBJECT_BLOCKS]) {
        self.objects.push(object);
        self.report.objects += 1;
        self.report.tombstones += u64::from(tombstone);
        for (index, at) in blocks.iter().enumerate().filter(|(_, at)| at.addr != 0) {
            self.report.data_blocks += 1;
            self.use_block(at.addr);
            if !self.options.verify_data || at.addr >= self.found.blocks {
                continue;
            }
            self.report.verified_blocks += 1;
            if block_crc(&self.read(at.addr, 1)) != at.crc {
                let (slice, block) = (self.slice(), at.addr);
                self.findings.push(Finding::Data { slice, object, index, block });
            }
        }
    }

    fn end(&mut self) {
        for (_, changed) in std::mem::take(&mut self.changed) {
            if changed.state != SlotState::Free {
                let blocks = changed.blocks.map(Option::unwrap_or_default);
                self.object(changed.object, changed.state == SlotState::Tombstone, &blocks);
            }
        }
        self.objects.sort_unstable();
        let slice = self.slice();
        let twice = self.objects.windows(2).filter_map(|w| match w {
            [a, b] if a == b => Some(*a),
            _ => None,
        });
        self.findings.extend(twice.map(|object| Finding::Duplicate { slice, object }));
        self.report.free_blocks = self.space.free_blocks();
        self.report.used_blocks = self.found.blocks - self.report.free_blocks;
    }
}
