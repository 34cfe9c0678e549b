//! A simulated disk: sparse 4 KiB blocks, what a power cut may do to them, and injected faults.
//!
//! Three views of the contents are kept apart. `visible` is what a healthy read returns now. `durable` is
//! what surely survives a power cut. `pending` lists the writes in between: completed, not yet flushed.
//! Faults are an overlay (`fault`) above `visible`, so that the right bytes are never lost to the
//! simulator and a fault can be lifted or counted.
//!
//! Order: an operation takes effect at its submission or at its completion (drawn per operation), reads
//! sample likewise; so operations in flight together happen in any order, as the contract says.

mod fault;
#[cfg(test)]
mod tests;

pub use fault::{Contents, Damage, WriteFault};

use crate::clock::Nanos;
use crate::rng::Stream;
use fault::Overlay;
use hashbrown::HashMap;
use reactor::{DiskError, DiskIndex, DiskInfo, DiskOp, IoBuf, Token};
use std::collections::BTreeMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;
use wire::BLOCK_BYTES;

/// A fixed multiplicative hasher for small integer keys.
#[derive(Default, Clone, Copy)]
pub struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, n: u64) {
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

type IntMap<V> = HashMap<u64, V, BuildHasherDefault<IntHasher>>;

/// Contents of a block; `None` reads as zeroes.
type Data = Option<Rc<[u8]>>;

#[derive(Clone)]
struct Cell {
    /// When it was applied: a later one wins whatever the order of becoming durable.
    seq: u64,
    data: Data,
}

/// How fast a disk is and how much it takes at once.
#[derive(Clone, Copy, Debug)]
pub struct DiskProfile {
    /// Mean latency of a read.
    pub read_ns: Nanos,
    /// Mean latency of a write.
    pub write_ns: Nanos,
    /// Mean latency of a flush.
    pub flush_ns: Nanos,
    /// Added per block.
    pub block_ns: Nanos,
    /// Operations in flight per core before `Full`.
    pub queue_depth: usize,
}

/// Who submitted an operation and wants its completion.
#[derive(Clone, Copy, Debug)]
pub struct Submitter {
    /// The core, as the universe numbers them.
    pub core: usize,
    /// The core's name for this disk.
    pub index: DiskIndex,
    /// The operation's token.
    pub token: Token,
}

struct InFlight {
    from: Submitter,
    op: DiskOp,
    /// Already applied (writes, discards) or sampled (reads).
    early: Option<Result<(), DiskError>>,
    /// For a flush: completions up to this number become durable.
    mark: u64,
    /// Sequence numbers and contents applied early and not durable yet.
    applied: Vec<(u64, Cell)>,
}

struct Pending {
    completion: u64,
    blocks: Vec<(u64, Cell)>,
}

/// What survives of a write that was cut short.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Keep {
    Nothing,
    Everything,
    /// Each atomic unit by itself.
    Units,
}

/// Counters, for the run's summary.
#[derive(Clone, Copy, Default, Debug)]
pub struct DiskCounters {
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Operations that failed by injection.
    pub errors: u64,
    /// Writes cut short by a kill or a power cut.
    pub torn: u64,
}

/// One disk.
pub struct SimDisk {
    info: DiskInfo,
    /// Latencies and bounds.
    pub profile: DiskProfile,
    /// Chance per operation of a one-off I/O error, parts per million.
    pub transient_error_ppm: u32,
    /// Until then, and by how much, operations are slower.
    pub slow: (Nanos, u64),
    visible: IntMap<Cell>,
    durable: IntMap<Cell>,
    pending: Vec<Pending>,
    in_flight: BTreeMap<u64, InFlight>,
    /// Operations in flight by core.
    queued: BTreeMap<usize, usize>,
    overlays: BTreeMap<u64, Overlay>,
    armed: Option<(WriteFault, u64)>,
    next_seq: u64,
    next_op: u64,
    completions: u64,
    rng: Stream,
    /// What happened so far.
    pub counters: DiskCounters,
}

const BLOCK: u64 = BLOCK_BYTES as u64;

impl SimDisk {
    /// An empty disk.
    pub fn new(info: DiskInfo, profile: DiskProfile, rng: Stream) -> Self {
        Self {
            info,
            profile,
            transient_error_ppm: 0,
            slow: (0, 1),
            visible: IntMap::default(),
            durable: IntMap::default(),
            pending: Vec::new(),
            in_flight: BTreeMap::new(),
            queued: BTreeMap::new(),
            overlays: BTreeMap::new(),
            armed: None,
            next_seq: 1,
            next_op: 1,
            completions: 0,
            rng,
            counters: DiskCounters::default(),
        }
    }

    /// What the device promises.
    pub fn info(&self) -> DiskInfo {
        self.info
    }

    /// Accepts an operation: its number, and how long it will take. On refusal it comes back.
    pub fn submit(&mut self, from: Submitter, op: DiskOp, now: Nanos) -> Result<(u64, Nanos), DiskOp> {
        let queued = self.queued.entry(from.core).or_insert(0);
        if *queued >= self.profile.queue_depth {
            return Err(op);
        }
        *queued += 1;
        let (mean, blocks) = match &op {
            DiskOp::Read { buf, .. } => (self.profile.read_ns, buf.len() as u64 / BLOCK),
            DiskOp::Write { bufs, .. } => (self.profile.write_ns, total_len(bufs) / BLOCK),
            DiskOp::Flush => (self.profile.flush_ns, 0),
            DiskOp::Discard { .. } => (self.profile.write_ns, 0),
        };
        let mut took = self.rng.latency(mean) + blocks * self.profile.block_ns;
        if now < self.slow.0 {
            took = took.saturating_mul(self.slow.1);
        }
        let id = self.next_op;
        self.next_op += 1;
        let mut flight = InFlight { from, op, early: None, mark: self.completions, applied: Vec::new() };
        if !matches!(flight.op, DiskOp::Flush) && self.rng.coin() {
            flight.early = Some(self.perform(&mut flight));
        }
        self.in_flight.insert(id, flight);
        Ok((id, took))
    }

    /// Ends an operation: who wanted it, the operation, and its result. `None` when it was cut off.
    pub fn complete(&mut self, id: u64) -> Option<(Submitter, DiskOp, Result<(), DiskError>)> {
        let mut flight = self.in_flight.remove(&id)?;
        if let Some(queued) = self.queued.get_mut(&flight.from.core) {
            *queued -= 1;
        }
        let result = match flight.early {
            Some(result) => result,
            None => self.perform(&mut flight),
        };
        self.completions += 1;
        let durable = match &flight.op {
            DiskOp::Write { durable, .. } => *durable || self.info.write_through,
            DiskOp::Discard { .. } => self.info.write_through,
            DiskOp::Read { .. } | DiskOp::Flush => false,
        };
        let blocks = std::mem::take(&mut flight.applied);
        match &flight.op {
            DiskOp::Read { .. } => self.counters.reads += 1,
            DiskOp::Write { .. } | DiskOp::Discard { .. } => {
                self.counters.writes += 1;
                if durable {
                    self.make_durable(blocks);
                } else if !blocks.is_empty() {
                    self.pending.push(Pending { completion: self.completions, blocks });
                }
            }
            DiskOp::Flush => {
                self.counters.flushes += 1;
                if result.is_ok() {
                    self.flush_up_to(flight.mark);
                }
            }
        }
        Some((flight.from, flight.op, result))
    }

    /// Lets an operation take effect: fills a read's buffer, or applies a write to `visible`.
    fn perform(&mut self, flight: &mut InFlight) -> Result<(), DiskError> {
        if self.rng.chance(self.transient_error_ppm) {
            self.counters.errors += 1;
            return Err(DiskError::Io(EIO));
        }
        match &mut flight.op {
            DiskOp::Read { offset, buf } => {
                check_range(&self.info, *offset, buf.len() as u64)?;
                let first = *offset / BLOCK;
                let into = buf.as_mut_slice().ok_or(DiskError::Io(EFAULT))?;
                self.read_blocks(first, into)
            }
            DiskOp::Write { offset, bufs, .. } => {
                let len = total_len(bufs);
                check_range(&self.info, *offset, len)?;
                let cells: Vec<(u64, Cell)> = cells_of(*offset / BLOCK, bufs, &mut self.next_seq);
                for (block, cell) in &cells {
                    let before = self.visible.insert(*block, cell.clone());
                    self.overlays.remove(block);
                    if let Some((fault, marker)) = self.armed
                        && cell.data.as_deref().is_some_and(|data| fault::is_marked(data, marker))
                    {
                        self.armed = None;
                        self.misplace(fault, *block, before.and_then(|cell| cell.data), cell.data.clone());
                    }
                }
                flight.applied = cells;
                Ok(())
            }
            DiskOp::Discard { offset, len } => {
                check_range(&self.info, *offset, *len)?;
                // Half of the discards do nothing, half read as zeroes: callers may rely on neither.
                if self.rng.coin() {
                    let first = *offset / BLOCK;
                    for block in first..first + *len / BLOCK {
                        if !self.visible.contains_key(&block) {
                            continue;
                        }
                        let cell = Cell { seq: self.next_seq, data: None };
                        self.next_seq += 1;
                        self.visible.insert(block, cell.clone());
                        self.overlays.remove(&block);
                        flight.applied.push((block, cell));
                    }
                }
                Ok(())
            }
            DiskOp::Flush => Ok(()),
        }
    }

    fn read_blocks(&mut self, first: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let mut failed = false;
        for (at, chunk) in into.chunks_mut(BLOCK_BYTES).enumerate() {
            let block = first + at as u64;
            match self.overlays.get(&block) {
                Some(Overlay::Unreadable) => failed = true,
                Some(Overlay::Content(data)) => copy_block(data.as_deref(), chunk),
                None => copy_block(self.visible.get(&block).and_then(|cell| cell.data.as_deref()), chunk),
            }
        }
        if failed {
            self.counters.errors += 1;
            return Err(DiskError::Io(EIO));
        }
        Ok(())
    }

    fn make_durable(&mut self, blocks: Vec<(u64, Cell)>) {
        for (block, cell) in blocks {
            if self.durable.get(&block).is_none_or(|old| old.seq < cell.seq) {
                self.durable.insert(block, cell);
            }
        }
    }

    fn flush_up_to(&mut self, mark: u64) {
        let mut rest = Vec::new();
        for pending in std::mem::take(&mut self.pending) {
            if pending.completion <= mark {
                self.make_durable(pending.blocks);
            } else {
                rest.push(pending);
            }
        }
        self.pending = rest;
    }

    /// The processes of `cores` died: their operations in flight are done, half done, or not done, and
    /// nobody hears of it. What the kernel and the drive hold stays.
    pub fn kill(&mut self, cores: &[usize]) {
        self.queued.retain(|core, _| !cores.contains(core));
        let ids: Vec<u64> =
            self.in_flight.iter().filter(|(_, f)| cores.contains(&f.from.core)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(flight) = self.in_flight.remove(&id) else { continue };
            let cells = self.writes_of(&flight);
            let keep = if flight.early.is_some() { Keep::Everything } else { self.draw_keep() };
            let mut kept = Vec::new();
            for (block, cell) in cells {
                let base = self.visible.get(&block).cloned();
                if let Some(cell) = self.cut_cell(keep, base.as_ref(), cell) {
                    self.visible.insert(block, cell.clone());
                    self.overlays.remove(&block);
                    kept.push((block, cell));
                }
            }
            if self.info.write_through {
                self.make_durable(kept);
            } else if !kept.is_empty() {
                self.completions += 1;
                self.pending.push(Pending { completion: self.completions, blocks: kept });
            }
        }
    }

    /// The power went: of everything not durable, any part may be gone, torn or reordered.
    pub fn power_cut(&mut self) {
        self.queued.clear();
        let mut cut: Vec<(u64, Cell, Keep)> = Vec::new();
        // Drawn per cut, so that the extremes (a cache that lost all, one that lost nothing) are common.
        let mode = self.rng.below(4);
        let mut lists: Vec<Vec<(u64, Cell)>> =
            std::mem::take(&mut self.pending).into_iter().map(|pending| pending.blocks).collect();
        for flight in std::mem::take(&mut self.in_flight).into_values() {
            lists.push(self.writes_of(&flight));
        }
        for list in lists {
            let keep = match mode {
                0 => Keep::Nothing,
                1 => Keep::Everything,
                _ => self.draw_keep(),
            };
            cut.extend(list.into_iter().map(|(block, cell)| (block, cell, keep)));
        }
        cut.sort_by_key(|(_, cell, _)| cell.seq);
        for (block, cell, keep) in cut {
            let base = self.durable.get(&block).cloned();
            if base.as_ref().is_some_and(|base| base.seq > cell.seq) {
                continue;
            }
            match self.cut_cell(keep, base.as_ref(), cell) {
                Some(kept) => {
                    self.durable.insert(block, kept.clone());
                    self.show(block, Some(kept));
                }
                None => self.show(block, base),
            }
        }
    }

    fn show(&mut self, block: u64, cell: Option<Cell>) {
        self.overlays.remove(&block);
        match cell {
            Some(cell) => self.visible.insert(block, cell),
            None => self.visible.remove(&block),
        };
    }

    fn draw_keep(&mut self) -> Keep {
        self.rng.weighted((3, Keep::Nothing), &[(3, Keep::Everything), (4, Keep::Units)])
    }

    /// What an operation in flight would write, or has written early.
    fn writes_of(&mut self, flight: &InFlight) -> Vec<(u64, Cell)> {
        match &flight.op {
            _ if flight.early.is_some() => flight.applied.clone(),
            DiskOp::Write { offset, bufs, .. }
                if check_range(&self.info, *offset, total_len(bufs)).is_ok() =>
            {
                cells_of(*offset / BLOCK, bufs, &mut self.next_seq)
            }
            _ => Vec::new(),
        }
    }

    /// The block after `cell` was written over `base` and cut short; `None` when nothing of it arrived.
    fn cut_cell(&mut self, keep: Keep, base: Option<&Cell>, cell: Cell) -> Option<Cell> {
        match keep {
            Keep::Nothing => None,
            Keep::Everything => Some(cell),
            Keep::Units => {
                self.counters.torn += 1;
                let unit = (self.info.atomic_bytes as usize).clamp(512, BLOCK_BYTES);
                if unit == BLOCK_BYTES {
                    return self.rng.coin().then_some(cell);
                }
                let mut mixed = [0u8; BLOCK_BYTES];
                copy_block(base.and_then(|base| base.data.as_deref()), &mut mixed);
                let mut new = [0u8; BLOCK_BYTES];
                copy_block(cell.data.as_deref(), &mut new);
                for (into, from) in mixed.chunks_mut(unit).zip(new.chunks(unit)) {
                    if self.rng.coin() {
                        into.copy_from_slice(from);
                    }
                }
                Some(Cell { seq: cell.seq, data: Some(Rc::from(&mixed[..])) })
            }
        }
    }

    /// Puts bytes on the medium, durable, without an operation: how a tool prepared it beforehand. The range
    /// must be aligned and lie on the disk.
    pub fn preload(&mut self, offset: u64, bytes: &[u8]) {
        for (at, chunk) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let cell = Cell { seq: self.next_seq, data: Some(Rc::from(chunk)) };
            self.next_seq += 1;
            self.visible.insert(offset / BLOCK + at as u64, cell.clone());
            self.durable.insert(offset / BLOCK + at as u64, cell);
        }
    }

    /// Whether any operation is in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Healthy contents of a block now, for checkers: faults do not show.
    pub fn peek(&self, block: u64, into: &mut [u8]) {
        copy_block(self.visible.get(&block).and_then(|cell| cell.data.as_deref()), into);
    }

    /// A copy of the contents, damage at rest included, as a fresh disk with the same promises.
    pub fn twin(&self, rng: Stream) -> Self {
        let mut copy = self.snapshot(rng);
        copy.overlays = self.overlays.clone();
        copy
    }

    /// A copy of the healthy contents as a fresh disk with the same promises, for checkers that open a
    /// store on it without disturbing this one.
    pub fn snapshot(&self, rng: Stream) -> Self {
        let mut copy = Self::new(self.info, self.profile, rng);
        copy.visible = self.visible.clone();
        copy.durable = self.visible.clone();
        copy.next_seq = self.next_seq;
        copy
    }
}

/// The errno of an injected device error.
const EIO: i32 = 5;
/// The errno of a read into a buffer that is shared: the service broke the contract.
const EFAULT: i32 = 14;

fn total_len(bufs: &[IoBuf]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

fn check_range(info: &DiskInfo, offset: u64, len: u64) -> Result<(), DiskError> {
    let end = offset.checked_add(len).ok_or(DiskError::OutOfRange)?;
    if end > info.size_bytes {
        return Err(DiskError::OutOfRange);
    }
    if !offset.is_multiple_of(BLOCK) || !len.is_multiple_of(BLOCK) {
        return Err(DiskError::Io(EINVAL));
    }
    Ok(())
}

/// The errno of an unaligned operation.
const EINVAL: i32 = 22;

fn copy_block(data: Option<&[u8]>, into: &mut [u8]) {
    match data.and_then(|data| data.get(..into.len())) {
        Some(data) => into.copy_from_slice(data),
        None => into.fill(0),
    }
}

/// Cuts buffers that lie one behind the other into blocks.
fn cells_of(first: u64, bufs: &[IoBuf], next_seq: &mut u64) -> Vec<(u64, Cell)> {
    let mut cells = Vec::new();
    let mut block = first;
    let mut partial: Vec<u8> = Vec::new();
    for buf in bufs {
        let mut bytes = buf.as_slice();
        while !bytes.is_empty() {
            let want = (BLOCK_BYTES - partial.len()).min(bytes.len());
            let (head, rest) = bytes.split_at(want);
            let data: Rc<[u8]> = if partial.is_empty() && head.len() == BLOCK_BYTES {
                Rc::from(head)
            } else {
                partial.extend_from_slice(head);
                if partial.len() < BLOCK_BYTES {
                    bytes = rest;
                    continue;
                }
                Rc::from(std::mem::take(&mut partial))
            };
            bytes = rest;
            cells.push((block, Cell { seq: *next_seq, data: Some(data) }));
            *next_seq += 1;
            block += 1;
        }
    }
    cells
}
