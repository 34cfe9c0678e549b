//! Reads: resolve, fetch, verify.
//!
//! A read sees every mutation submitted before it, and returns nothing that is not durable: when a block it
//! wants was changed by a commit still on its way, it waits for that commit. Unwritten blocks cost no
//! device read. A block may have been superseded and reused while it was being fetched: its checksum tells,
//! and the read starts again if the mapping has changed, else the block is corrupt.

use std::collections::VecDeque;

use reactor::{DiskError, DiskOp, Env, IoBuf, Token, prefetch};
use wire::crc::ZERO_BLOCK_CRC;
use wire::{BLOCK_BYTES, BlockCrcs, OBJECT_BLOCKS, ObjectId, block_crc};

use crate::overlay::Overlay;
use crate::page::{BlockRef, SLOTS_PER_PAGE, Slot};
use crate::planted::Bug;
use crate::store::{OpKind, SliceStore};
use crate::types::*;
use crate::write::range_mask;

/// Times a read starts again because a block moved under it. Each needs an overwrite of the very block
/// during the fetch and its reuse by another one; more in a row means something else is wrong.
const RETRIES_MAX: u8 = 64;

/// What a read is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Slot in the table is free.
    Idle,
    /// Submitted since the last flush or change: see `start_fresh`.
    Fresh,
    /// Waits for a commit, a page, or a frame.
    Parked,
    /// Device reads are out.
    Fetching,
}

struct Read {
    step: Step,
    ticket: u64,
    object: ObjectId,
    /// All written blocks, packed, instead of a range.
    whole: bool,
    /// Wanted blocks.
    mask: u32,
    /// What it was resolved to.
    found: Box<Found>,
    outstanding: u8,
    retries: u8,
    /// A block failed its checksum: the mapping must have changed, or it is corrupt.
    suspect: bool,
    failed: Option<StoreError>,
    data: Option<IoBuf>,
}

impl Read {
    /// A free place in the table.
    fn idle() -> Self {
        Self {
            step: Step::Idle,
            ticket: 0,
            object: ObjectId::default(),
            whole: false,
            mask: 0,
            found: Box::default(),
            outstanding: 0,
            retries: 0,
            suspect: false,
            failed: None,
            data: None,
        }
    }

    fn begin(&mut self, ticket: u64, object: ObjectId, mask: u32, whole: bool) {
        self.step = Step::Fresh;
        (self.ticket, self.object, self.mask, self.whole) = (ticket, object, mask, whole);
        self.outstanding = 0;
        self.retries = 0;
        self.suspect = false;
        self.failed = None;
    }
}

/// Whether the mapping of what a read wants is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Resolved {
    Known,
    /// A commit or a page must arrive first.
    NotYet,
}

/// What a read was resolved to.
#[derive(Default)]
struct Found {
    presence: Presence,
    /// The wanted blocks that were written.
    written: u32,
    count: u8,
    /// In order of output; the first `count` count.
    blocks: [BlockRef; OBJECT_BLOCKS],
}

impl Found {
    /// `count` unwritten blocks.
    fn set_empty(&mut self, presence: Presence, count: usize) {
        self.presence = presence;
        self.written = 0;
        self.count = count as u8;
        self.blocks.iter_mut().take(count).for_each(|block| *block = BlockRef::default());
    }

    /// Where a block of the object is, one of `wanted`.
    fn put(&mut self, wanted: u32, block: usize, to: BlockRef) {
        let before = wanted & ((1u32 << block) - 1);
        if let Some(place) = self.blocks.get_mut(before.count_ones() as usize) {
            *place = to;
        }
    }

    fn blocks(&self) -> &[BlockRef] {
        self.blocks.get(..usize::from(self.count)).unwrap_or(&[])
    }

    fn is_same(&self, other: &Self) -> bool {
        self.presence == other.presence && self.blocks() == other.blocks()
    }
}

/// Reads in progress.
pub(crate) struct Reads {
    table: Vec<Read>,
    free: Vec<u32>,
    parked: VecDeque<u32>,
    /// Reads at `Step::Fresh` in the order of their submission, and the slot of each once it was looked up.
    fresh: Vec<(u32, Option<u32>)>,
    /// As many of `fresh` were looked up. They stay valid: a change starts all of them first.
    located: usize,
    /// For the next resolution.
    scratch: Option<Box<Found>>,
}

impl Reads {
    pub(crate) fn new() -> Self {
        Self {
            table: Vec::new(),
            free: Vec::new(),
            parked: VecDeque::new(),
            fresh: Vec::new(),
            located: 0,
            scratch: None,
        }
    }

    pub(crate) fn in_progress(&self) -> usize {
        self.table.len() - self.free.len()
    }
}

impl SliceStore {
    /// Reads `blocks` blocks from `first_block` on; `StoreEvent::Read` brings them. Unwritten blocks, absent
    /// and deleted objects read as zeroes.
    pub fn read(
        &mut self,
        ticket: u64,
        object: ObjectId,
        first_block: u32,
        blocks: u32,
    ) -> Result<(), StoreError> {
        let mask = range_mask(first_block, blocks).ok_or(StoreError::Invalid)?;
        self.begin_read(ticket, object, mask, false)
    }

    /// Reads all written blocks of an object with its version, all durable; `StoreEvent::Object` brings them.
    pub fn read_object(&mut self, ticket: u64, object: ObjectId) -> Result<(), StoreError> {
        self.read_blocks(ticket, object, u32::MAX)
    }

    /// The same for those of its blocks whose bits are set in `mask`.
    pub fn read_blocks(&mut self, ticket: u64, object: ObjectId, mask: u32) -> Result<(), StoreError> {
        self.begin_read(ticket, object, mask, true)
    }

    fn begin_read(
        &mut self,
        ticket: u64,
        object: ObjectId,
        mask: u32,
        whole: bool,
    ) -> Result<(), StoreError> {
        self.state()?;
        if self.reads.in_progress() >= READS_MAX {
            return Err(StoreError::Busy);
        }
        let id = match self.reads.free.pop() {
            Some(id) => id,
            None => {
                self.reads.table.push(Read::idle());
                self.reads.table.len() as u32 - 1
            }
        };
        if let Some(read) = self.reads.table.get_mut(id as usize) {
            read.begin(ticket, object, mask, whole);
        }
        self.reads.fresh.push((id, None));
        Ok(())
    }

    /// Looks up where fresh reads find their objects, without doing anything yet.
    ///
    /// What a look-up finds in memory is rarely in the processor's caches, which the data of other reads passes through.
    /// One step of all reads after the other, each asking for what the next one needs, the processor waits for many of
    /// them at once.
    pub fn locate_fresh(&mut self) {
        let Self { reads, index, cache, active, frozen, .. } = self;
        let Reads { table, fresh, located, .. } = reads;
        let new = fresh.get_mut(*located..).unwrap_or_default();
        let mut last = None;
        for (id, slot) in new.iter_mut() {
            *slot = table.get(*id as usize).and_then(|read| index.find_next(&mut last, read.object));
        }
        for slot in new.iter().filter_map(|(_, slot)| *slot) {
            active.coming(slot);
        }
        for (id, slot) in new.iter() {
            let first = table.get(*id as usize).map_or(0, |read| read.mask.trailing_zeros());
            let Some(slot) = *slot else { continue };
            let changed =
                |overlay: &Overlay| overlay.head(slot).is_some_and(|head| overlay.coming_block(head, first));
            if !changed(active)
                && !changed(frozen)
                && let Some(page) = cache.peek(slot / SLOTS_PER_PAGE as u32)
            {
                Slot::of(page, slot as usize % SLOTS_PER_PAGE).prefetch(first as usize);
            }
        }
        *located = fresh.len();
    }

    /// Starts the reads submitted since the last call: at the end of a batch, and before a change, which none of them
    /// may see.
    pub(crate) fn start_fresh(&mut self, env: &mut dyn Env) {
        self.locate_fresh();
        self.reads.located = 0;
        let mut fresh = std::mem::take(&mut self.reads.fresh);
        for (id, slot) in fresh.drain(..) {
            if let Some(read) = self.reads.table.get_mut(id as usize).filter(|read| read.step == Step::Fresh)
            {
                read.step = Step::Parked;
                self.advance_located(env, id, slot);
            }
        }
        self.reads.fresh = fresh;
    }

    /// Tries parked reads again; called when something they may wait for has happened.
    pub(crate) fn resume_parked(&mut self, env: &mut dyn Env) {
        for _ in 0..self.reads.parked.len() {
            let Some(id) = self.reads.parked.pop_front() else { return };
            self.advance_read(env, id);
        }
    }

    /// Resolves a read; goes on to fetch, or parks it.
    fn advance_read(&mut self, env: &mut dyn Env, id: u32) {
        let Some(object) = self.reads.table.get(id as usize).map(|read| read.object) else { return };
        let slot = self.index.find(object);
        self.advance_located(env, id, slot);
    }

    /// The same for a read whose object is in `slot` now, if anywhere.
    fn advance_located(&mut self, env: &mut dyn Env, id: u32, slot: Option<u32>) {
        let Some(read) = self.reads.table.get(id as usize) else { return };
        if read.step != Step::Parked {
            return;
        }
        if let Some(error) = read.failed {
            self.finish_read(id, Err(error));
            return;
        }
        if let Err(error) = self.state()
            && !self.is_running()
        {
            self.finish_read(id, Err(error));
            return;
        }
        let (whole, mask) = (read.whole, read.mask);
        // Boxed, and exchanged with the read's own: nothing here moves half a kilobyte for one block.
        let mut to = self.reads.scratch.take().unwrap_or_default();
        let resolved = self.resolve(env, slot, whole, mask, &mut to);
        let Some(read) = self.reads.table.get_mut(id as usize) else { return };
        if resolved == Resolved::NotYet {
            self.reads.scratch = Some(to);
            self.reads.parked.push_back(id);
            return;
        }
        let corrupt = read.suspect && read.found.is_same(&to);
        std::mem::swap(&mut read.found, &mut to);
        self.reads.scratch = Some(to);
        read.suspect = false;
        if corrupt {
            self.counters.corrupt += 1;
            self.finish_read(id, Err(StoreError::Corrupt));
            return;
        }
        read.step = Step::Fetching;
        self.fetch(env, id);
    }

    /// Where the wanted blocks are, in order of output.
    fn resolve(
        &mut self,
        env: &mut dyn Env,
        slot: Option<u32>,
        whole: bool,
        mask: u32,
        found: &mut Found,
    ) -> Resolved {
        let nothing = if whole { 0 } else { mask.count_ones() as usize };
        let Some(slot) = slot else {
            found.set_empty(Presence::Absent, nothing);
            return Resolved::Known;
        };
        let settled = if whole { self.is_durable(slot) } else { self.is_settled(slot, mask) };
        if !settled {
            return Resolved::NotYet;
        }
        let presence = self.index.presence(slot);
        let written = self.index.mask(slot) & mask;
        if written == 0 {
            found.set_empty(presence, nothing);
            return Resolved::Known;
        }
        let wanted = if whole { written } else { mask };
        found.set_empty(presence, wanted.count_ones() as usize);
        found.written = written;
        let mut missing = written;
        for overlay in [&self.active, &self.frozen] {
            for change in overlay.changes(slot, missing) {
                found.put(wanted, change.block, change.to);
                missing &= !(1 << change.block);
            }
        }
        if missing != 0 {
            let page = slot / SLOTS_PER_PAGE as u32;
            let Some(frame) = self.want_page(env, page) else { return Resolved::NotYet };
            let Some(page) = self.cache.frame(frame) else { return Resolved::NotYet };
            let record = Slot::of(page, slot as usize % SLOTS_PER_PAGE);
            while missing != 0 {
                let block = missing.trailing_zeros() as usize;
                missing &= missing - 1;
                found.put(wanted, block, record.block(block));
            }
        }
        Resolved::Known
    }

    fn is_durable(&self, slot: u32) -> bool {
        [&self.active, &self.frozen]
            .into_iter()
            .all(|overlay| overlay.head(slot).is_none_or(|h| h.commit <= self.log.durable))
    }

    /// Submits the device reads of a resolved read: one per run of adjacent addresses.
    fn fetch(&mut self, env: &mut dyn Env, id: u32) {
        let Some(read) = self.reads.table.get_mut(id as usize) else { return };
        let count = usize::from(read.found.count);
        let (first, addr) =
            (run_at(read.found.blocks(), 0), read.found.blocks().first().map_or(0, |b| b.addr));
        read.data = None;
        read.outstanding = 0;
        if count == 0 {
            self.finish_read(id, Ok(()));
            return;
        }
        let Some(mut data) = Self::buffer(env, count * BLOCK_BYTES) else {
            self.finish_read(id, Err(StoreError::Busy));
            return;
        };
        if first == count && addr != 0 {
            if let Some(read) = self.reads.table.get_mut(id as usize) {
                read.outstanding = 1;
            }
            let op = DiskOp::Read { offset: self.byte_of(addr), buf: data };
            self.submit(env, OpKind::Part { read: id, at: 0, n: count as u8, whole: true }, op);
            return;
        }
        let mut parts = 0u8;
        let mut at = 0;
        while at < count {
            let Some(blocks) = self.reads.table.get(id as usize).map(|read| read.found.blocks()) else {
                return;
            };
            let n = run_at(blocks, at);
            let addr = blocks.get(at).map_or(0, |b| b.addr);
            if addr == 0 {
                if let Some(to) =
                    data.as_mut_slice().and_then(|d| d.get_mut(at * BLOCK_BYTES..(at + n) * BLOCK_BYTES))
                {
                    to.fill(0);
                }
            } else if let Some(buf) = Self::buffer(env, n * BLOCK_BYTES) {
                parts += 1;
                let op = DiskOp::Read { offset: self.byte_of(addr), buf };
                self.submit(env, OpKind::Part { read: id, at: at as u8, n: n as u8, whole: false }, op);
            } else if let Some(read) = self.reads.table.get_mut(id as usize) {
                read.failed = Some(StoreError::Busy);
            }
            at += n;
        }
        let Some(read) = self.reads.table.get_mut(id as usize) else { return };
        read.data = Some(data);
        read.outstanding = parts;
        if parts == 0 {
            let result = read.failed.map_or(Ok(()), Err);
            self.finish_read(id, result);
        }
    }

    /// The ticket of the read that a device operation is a part of, when that one is the next to be handled soon; what
    /// it needs is asked of memory.
    #[inline]
    pub fn coming(&self, token: Token) -> Option<u64> {
        let OpKind::Part { read, .. } = self.op_kind(token)? else { return None };
        let read = self.reads.table.get(read as usize)?;
        prefetch(&*read.found);
        Some(read.ticket)
    }

    /// A part of a read has ended.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn part_read(
        &mut self,
        env: &mut dyn Env,
        id: u32,
        at: usize,
        n: usize,
        whole: bool,
        buf: IoBuf,
        result: Result<(), DiskError>,
    ) {
        let verify = !self.bug(Bug::SkipReadChecksum);
        let Some(read) = self.reads.table.get_mut(id as usize) else { return };
        if result.is_err() {
            read.failed = Some(StoreError::Io);
        } else {
            let expected = read.found.blocks().iter().skip(at).take(n);
            let bad = buf.as_slice().chunks(BLOCK_BYTES).zip(expected).any(|(b, e)| block_crc(b) != e.crc);
            if bad && verify {
                read.suspect = true;
            }
            if whole {
                read.data = Some(buf);
            } else if let Some(to) = read
                .data
                .as_mut()
                .and_then(IoBuf::as_mut_slice)
                .and_then(|d| d.get_mut(at * BLOCK_BYTES..(at + n) * BLOCK_BYTES))
            {
                to.copy_from_slice(buf.as_slice().get(..n * BLOCK_BYTES).unwrap_or(&[]));
            }
        }
        read.outstanding = read.outstanding.saturating_sub(1);
        if read.outstanding > 0 {
            return;
        }
        if let Some(error) = read.failed {
            self.finish_read(id, Err(error));
        } else if !read.suspect {
            self.finish_read(id, Ok(()));
        } else if read.retries >= RETRIES_MAX {
            self.finish_read(id, Err(StoreError::Corrupt));
        } else {
            read.retries += 1;
            read.step = Step::Parked;
            self.advance_read(env, id);
        }
    }

    /// A page could not be read: whoever waits for it fails.
    pub(crate) fn page_failed(&mut self, _env: &mut dyn Env, page: u32, error: StoreError) {
        for i in 0..self.reads.parked.len() {
            let Some(id) = self.reads.parked.get(i).copied() else { break };
            let Some(object) = self.reads.table.get(id as usize).map(|r| r.object) else { continue };
            if self.index.find(object).is_some_and(|slot| slot / SLOTS_PER_PAGE as u32 == page)
                && let Some(read) = self.reads.table.get_mut(id as usize)
            {
                read.failed = Some(error);
            }
        }
        self.checkpoint_page_failed(page, error);
    }

    /// Every read in progress ends here and now, whatever the device still does.
    pub(crate) fn fail_reads(&mut self, why: StoreError) {
        self.reads.parked.clear();
        self.reads.fresh.clear();
        self.reads.located = 0;
        for id in 0..self.reads.table.len() as u32 {
            if self.reads.table.get(id as usize).is_some_and(|read| read.step != Step::Idle) {
                self.finish_read(id, Err(why));
            }
        }
    }

    fn finish_read(&mut self, id: u32, result: Result<(), StoreError>) {
        let Some(read) = self.reads.table.get_mut(id as usize) else { return };
        let (ticket, whole) = (read.ticket, read.whole);
        let data = read.data.take();
        let mut crcs = BlockCrcs::default();
        for block in read.found.blocks() {
            crcs.push(if block.addr == 0 { ZERO_BLOCK_CRC } else { block.crc });
        }
        let presence = read.found.presence;
        read.step = Step::Idle;
        let mask = read.found.written;
        self.reads.free.push(id);
        let event = if whole {
            let result = result.map(|()| ObjectData { presence, mask, data, crcs });
            StoreEvent::Object { ticket, result }
        } else {
            let result = match (result, data) {
                (Ok(()), Some(data)) => Ok(ReadData { data, crcs, presence }),
                (Ok(()), None) => Err(StoreError::Busy),
                (Err(error), _) => Err(error),
            };
            StoreEvent::Read { ticket, result }
        };
        self.events.push_back(event);
    }
}

/// Blocks from `at` on that lie side by side on the device, or are all unwritten.
fn run_at(blocks: &[BlockRef], at: usize) -> usize {
    let Some(first) = blocks.get(at) else { return 1 };
    let mut n = 1;
    while let Some(block) = blocks.get(at + n) {
        let adjacent = if first.addr == 0 { block.addr == 0 } else { block.addr == first.addr + n as u64 };
        if !adjacent {
            break;
        }
        n += 1;
    }
    n
}
