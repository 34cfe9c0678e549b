//! Mutations and the commits that make them durable.
//!
//! A mutation goes at once into the commit being built: its data gets blocks, its record is written into
//! the commit block, index and overlay change. `flush` closes the commit and submits it: usually one device
//! write, commit block first and data behind it. While eight commits are in flight the next one keeps
//! filling, so batches grow with load by themselves.
//!
//! Acknowledgement is by prefix: a commit counts when it and all before it are durable. A block that a
//! mutation supersedes is reused only when some durable commit *names* the superseding commit as durable:
//! until then replay may still have to verify the commit that wrote the block (see `commit`).

use std::collections::VecDeque;

use reactor::{DiskError, DiskOp, Env, IOV_MAX, IoBuf};
use wire::{BLOCK_BYTES, BlockCrcs, OBJECT_BLOCKS, ObjectId, Version, block_crc};

use crate::alloc::Run;
use crate::commit::{CommitHeader, HEADER, RECORD_BYTES_MAX, RecordKind, RecordRef, Runs};
use crate::page::{BlockRef, SLOTS_PER_PAGE, Slot, SlotState};
use crate::planted::Bug;
use crate::store::{Life, OpKind, SliceStore};
use crate::types::*;

/// Data blocks in one commit: with its block, one vectored write of at most `IOV_MAX` buffers.
const COMMIT_DATA_BLOCKS_MAX: usize = IOV_MAX - 1;
/// Blocks taken from free space at a time for commits and their data to lie side by side: 4 MiB.
const EXTENT_BLOCKS: u64 = 1024;
/// A remainder that a commit like the last one does not fit in is given back when a commit closes, so that a
/// lone write stays one device write. No more is asked than a commit with one object takes: where free space
/// is in short runs, looking for a longer one each time costs more than writing in two pieces now and then.
const EXTENT_LEFT_MAX: u64 = OBJECT_BLOCKS as u64 + 1;
/// Small commits in flight at once. While so many are, the next one fills: each costs a block of its own, a
/// checksum over it and a device write, so under load a few large ones are cheaper than many small ones,
/// and their own completions come often enough. A lone writer never waits.
const COMMITS_SMALL_MAX: usize = 2;
/// From so many records or data blocks on a commit is not small: its own block is then a small part of it.
const COMMIT_WORTH_RECORDS: usize = 16;
const COMMIT_WORTH_BLOCKS: usize = 16;
/// Share of a slice kept for log, checkpoints, overwrites and deletes (1/64), and its bounds: enough for a
/// checkpoint's pages and all commits in flight on the smallest slice, 128 MiB on large ones.
const RESERVE_SHARE: u64 = 64;
const RESERVE_BLOCKS_MIN: u64 = 768;
const RESERVE_BLOCKS_MAX: u64 = 32_768;

/// Consecutive blocks of a commit that go out in one device write.
struct Piece {
    addr: u64,
    blocks: u64,
    bufs: Vec<IoBuf>,
}

/// A commit from its first record to its acknowledgement.
#[derive(Default)]
pub(crate) struct Commit {
    number: u64,
    used: usize,
    records: u16,
    data_blocks: usize,
    pieces: Vec<Piece>,
    tickets: Vec<u64>,
    next: u64,
    /// What its header says is durable.
    names_durable: u64,
    /// Device writes outstanding.
    outstanding: u32,
}

/// The log's end in memory.
pub(crate) struct Log {
    /// Blocks held for the next commit and its data. Its first block is where the next commit goes.
    pub(crate) head: Run,
    pub(crate) next_number: u64,
    /// All commits up to this one are durable.
    pub(crate) durable: u64,
    /// The highest commit that something durable names as durable.
    pub(crate) named: u64,
    building: Option<Commit>,
    sealed: VecDeque<Commit>,
    in_flight: VecDeque<Commit>,
    pool: Vec<Commit>,
    blocks: Vec<IoBuf>,
    /// Superseded blocks and the commit that superseded them, in order.
    released: VecDeque<(u64, u64)>,
    /// A mutation was refused for want of space that recycling would give.
    pub(crate) want_space: bool,
    /// The last commit that brought data.
    last_data: u64,
    /// An empty commit is to name the last one as durable.
    want_rest: bool,
    /// Freed blocks for the next one-block writes (`StoreOptions::eager_reuse`), else empty.
    pub(crate) eager: Vec<u64>,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self {
            head: Run::default(),
            next_number: 1,
            durable: 0,
            named: 0,
            building: None,
            sealed: VecDeque::with_capacity(COMMITS_SEALED_MAX),
            in_flight: VecDeque::with_capacity(COMMITS_IN_FLIGHT_MAX),
            pool: Vec::new(),
            blocks: Vec::new(),
            released: VecDeque::new(),
            want_space: false,
            last_data: 0,
            want_rest: false,
            eager: Vec::new(),
        }
    }

    /// Whether no commit is being built, waiting or in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.building.is_none() && self.sealed.is_empty() && self.in_flight.is_empty()
    }

    /// Blocks that will be free without any further mutation.
    pub(crate) fn recyclable(&self) -> u64 {
        (self.released.len() + self.eager.len()) as u64
    }
}

/// A mutation's effect on the space it needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// More blocks than before.
    Grow,
    /// As many blocks as before, new ones before the old ones come back.
    Same,
    /// Fewer, or none.
    Shrink,
}

/// The object whose blocks a record changes.
#[derive(Clone, Copy)]
struct Target {
    /// Its entry in the active overlay.
    head: u32,
    slot: u32,
    /// Blocks written before.
    had: u32,
}

struct Mutation<'a> {
    kind: RecordKind,
    ticket: u64,
    object: ObjectId,
    version: Version,
    mask: u32,
    data: &'a [IoBuf],
    crcs: &'a BlockCrcs,
}

/// Bits `first .. first + blocks`; `None` when they do not lie in an object.
pub(crate) fn range_mask(first: u32, blocks: u32) -> Option<u32> {
    let end = first.checked_add(blocks)?;
    if blocks == 0 || end > OBJECT_BLOCKS as u32 {
        return None;
    }
    Some((u64::MAX >> (64 - blocks) << first) as u32)
}

impl SliceStore {
    /// Writes whole blocks from `first_block` on; `data` may come in several buffers, `crcs` has one checksum
    /// per block. The object is created when absent or a tombstone. `Done { ticket }` tells when it is
    /// durable. On `Err` nothing has happened.
    #[allow(clippy::too_many_arguments)]
    pub fn write(
        &mut self,
        env: &mut dyn Env,
        ticket: u64,
        object: ObjectId,
        version: Version,
        first_block: u32,
        data: &[IoBuf],
        crcs: &BlockCrcs,
    ) -> Result<(), StoreError> {
        let mask = range_mask(first_block, crcs.len() as u32).ok_or(StoreError::Invalid)?;
        self.mutate(env, Mutation { kind: RecordKind::Write, ticket, object, version, mask, data, crcs })
    }

    /// Makes the object exactly the blocks of `mask` (recovery): `data` holds them one behind the other, all
    /// others become unwritten. An empty mask makes an object without blocks.
    #[allow(clippy::too_many_arguments)]
    pub fn replace(
        &mut self,
        env: &mut dyn Env,
        ticket: u64,
        object: ObjectId,
        version: Version,
        mask: u32,
        data: &[IoBuf],
        crcs: &BlockCrcs,
    ) -> Result<(), StoreError> {
        self.mutate(env, Mutation { kind: RecordKind::Replace, ticket, object, version, mask, data, crcs })
    }

    /// Makes blocks unwritten: they read as zeroes and their space is free.
    pub fn zero(
        &mut self,
        env: &mut dyn Env,
        ticket: u64,
        object: ObjectId,
        version: Version,
        first_block: u32,
        blocks: u32,
    ) -> Result<(), StoreError> {
        let mask = range_mask(first_block, blocks).ok_or(StoreError::Invalid)?;
        self.mutate_bare(env, RecordKind::Zero, ticket, object, version, mask)
    }

    /// Deletes the object, leaving a tombstone with `version` (also where there was nothing).
    pub fn delete(
        &mut self,
        env: &mut dyn Env,
        ticket: u64,
        object: ObjectId,
        version: Version,
    ) -> Result<(), StoreError> {
        let kind = if self.bug(Bug::ForgetTombstone) { RecordKind::Purge } else { RecordKind::Delete };
        self.mutate_bare(env, kind, ticket, object, version, 0)
    }

    /// Forgets a tombstone of exactly this version.
    pub fn purge(
        &mut self,
        env: &mut dyn Env,
        ticket: u64,
        object: ObjectId,
        version: Version,
    ) -> Result<(), StoreError> {
        self.state()?;
        if self.lookup(object) != Presence::Tombstone(version) {
            return Err(StoreError::NotTombstone);
        }
        self.mutate_bare(env, RecordKind::Purge, ticket, object, version, 0)
    }

    fn mutate_bare(
        &mut self,
        env: &mut dyn Env,
        kind: RecordKind,
        ticket: u64,
        object: ObjectId,
        version: Version,
        mask: u32,
    ) -> Result<(), StoreError> {
        let crcs = BlockCrcs::default();
        self.mutate(env, Mutation { kind, ticket, object, version, mask, data: &[], crcs: &crcs })
    }

    fn mutate(&mut self, env: &mut dyn Env, m: Mutation<'_>) -> Result<(), StoreError> {
        self.state()?;
        check_data(&m)?;
        self.start_fresh(env);
        let slot = self.index.find(m.object);
        let had = slot.map_or(0, |slot| self.index.mask(slot));
        let data_blocks = m.data.iter().map(|b| b.len() / BLOCK_BYTES).sum::<usize>();
        let need = match m.kind {
            RecordKind::Write | RecordKind::Replace if slot.is_none() || m.mask & !had != 0 => Need::Grow,
            RecordKind::Write | RecordKind::Replace => Need::Same,
            RecordKind::Zero if slot.is_none() => Need::Grow,
            RecordKind::Zero | RecordKind::Delete | RecordKind::Purge => Need::Shrink,
        };
        self.admit(need, data_blocks as u64)?;
        self.make_room(env, data_blocks)?;
        let before = slot.map_or(Presence::Absent, |slot| self.index.presence(slot));
        let slot = match slot {
            Some(slot) => slot,
            None => self.index.insert(m.object).ok_or(StoreError::NoSpace)?,
        };
        self.table.grow(slot / SLOTS_PER_PAGE as u32 + 1);
        // Taken out while the store changes itself by it, boxed: no copy of half a kilobyte for one block.
        let mut runs = self.runs.take().unwrap_or_default();
        let placed = self.place_data(m.data, &mut runs);
        if placed.is_ok() {
            self.note(&m, slot, had, &runs);
            self.groups.changed(slot, m.object, before, self.index.presence(slot));
        }
        self.runs = Some(runs);
        placed
    }

    /// Writes a mutation's record, and changes index and overlay.
    fn note(&mut self, m: &Mutation<'_>, slot: u32, had: u32, runs: &Runs) {
        let Mutation { kind, object, version, mask, .. } = *m;
        let record = RecordRef { kind, slot, object, version, mask, crcs: m.crcs.as_slice(), runs };
        if let Some(commit) = self.log.building.as_mut()
            && let Some(block) = commit.pieces.first_mut().and_then(|p| p.bufs.first_mut())
            && let Some(block) = block.as_mut_slice()
        {
            commit.used += record.encode(block, HEADER + commit.used);
            commit.records += 1;
            commit.tickets.push(m.ticket);
        }
        self.counters.written_data_bytes += m.data.iter().map(|buf| buf.len() as u64).sum::<u64>();
        self.apply(&record, had);
    }

    /// Changes index and overlay as a record says. `had` are the blocks written before.
    fn apply(&mut self, record: &RecordRef<'_>, had: u32) {
        let commit = self.log.next_number - 1;
        let (state, mask) = match record.kind {
            RecordKind::Write => (SlotState::Live, had | record.mask),
            RecordKind::Zero => (SlotState::Live, had & !record.mask),
            RecordKind::Replace => (SlotState::Live, record.mask),
            RecordKind::Delete => (SlotState::Tombstone, 0),
            RecordKind::Purge => (SlotState::Free, 0),
        };
        let gone = had & !mask;
        let changed = gone | if record.kind.has_data() { record.mask } else { 0 };
        let slot = record.slot;
        let durable = self.log.durable;
        let head = self.active.touch(slot, state, record.version, commit, durable, changed);
        let target = Target { head, slot, had };
        record.each_block(|block, addr, crc| self.change_block(target, block, BlockRef { addr, crc }));
        let mut bits = gone;
        while bits != 0 {
            let block = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            self.change_block(target, block, BlockRef::default());
        }
        if record.kind == RecordKind::Purge {
            let mut purged = self.active.purged;
            self.index.remove(slot, &mut purged);
            self.active.purged = purged;
        } else {
            self.index.set(slot, state, record.version, mask);
        }
    }

    fn change_block(&mut self, target: Target, block: usize, to: BlockRef) {
        let Target { head, slot, had } = target;
        let commit = self.log.next_number - 1;
        let before = match self.active.replace(head, block, to) {
            Some(before) => before.addr,
            None => {
                let (before, settled) = if had >> block & 1 == 0 {
                    (0, true)
                } else if let Some(frozen) = self.frozen.block(slot, block) {
                    (frozen.to.addr, true)
                } else if let Some(page) = self.cache.peek(slot / SLOTS_PER_PAGE as u32) {
                    (Slot::of(page, slot as usize % SLOTS_PER_PAGE).block(block).addr, true)
                } else {
                    (0, false)
                };
                self.active.add(head, block, to, settled);
                before
            }
        };
        if before == 0 {
            return;
        }
        if self.bug(Bug::ReuseTooEarly) {
            self.free_superseded(before);
        } else {
            self.log.released.push_back((commit, before));
        }
    }

    /// Blocks kept for other things than new data.
    pub(crate) fn reserve(&self) -> u64 {
        (self.blocks / RESERVE_SHARE).clamp(RESERVE_BLOCKS_MIN, RESERVE_BLOCKS_MAX)
    }

    /// Blocks that can be used now.
    pub(crate) fn available(&self) -> u64 {
        self.space.free_blocks() + self.log.head.len
    }

    /// Whether there is room for a mutation.
    fn admit(&mut self, need: Need, data_blocks: u64) -> Result<(), StoreError> {
        if self.log.sealed.len() >= COMMITS_SEALED_MAX || self.overlay_is_full() {
            return Err(StoreError::Busy);
        }
        let reserve = self.reserve();
        let keep = self.checkpoint_need()
            + match need {
                Need::Grow => reserve,
                Need::Same => reserve / 2,
                Need::Shrink => reserve / 4,
            };
        // Its data, its commit block, the next commit's block, one more page and node.
        let want = keep + data_blocks + 4;
        if self.available() >= want {
            return Ok(());
        }
        self.log.want_space = true;
        if self.available() + self.recyclable() >= want {
            Err(StoreError::Busy)
        } else {
            Err(StoreError::NoSpace)
        }
    }

    /// Blocks that commits and a checkpoint will free without any further mutation.
    fn recyclable(&self) -> u64 {
        self.log.recyclable()
            + self.active.unsettled
            + self.frozen.unsettled
            + self.active.log_blocks.len() as u64
            + self.frozen.log_blocks.len() as u64
            + self.checkpoint.old_blocks()
    }

    /// Makes sure that the commit being built takes one more record and `data_blocks` blocks.
    fn make_room(&mut self, env: &mut dyn Env, data_blocks: usize) -> Result<(), StoreError> {
        if let Some(commit) = &self.log.building {
            let fits = HEADER + commit.used + RECORD_BYTES_MAX <= BLOCK_BYTES
                && commit.data_blocks + data_blocks <= COMMIT_DATA_BLOCKS_MAX;
            if fits {
                return Ok(());
            }
            self.seal_commit();
            self.state()?;
        }
        self.begin_commit(env)
    }

    fn begin_commit(&mut self, env: &mut dyn Env) -> Result<(), StoreError> {
        let block = match self.log.blocks.pop() {
            Some(block) => block,
            None => Self::buffer(env, BLOCK_BYTES).ok_or(StoreError::Busy)?,
        };
        let mut commit = self.log.pool.pop().unwrap_or_default();
        let mut bufs = self.take_vec();
        bufs.push(block);
        let addr = self.log.head.start;
        self.log.head = Run { start: addr + 1, len: self.log.head.len.saturating_sub(1) };
        commit.number = self.log.next_number;
        self.log.next_number += 1;
        commit.used = 0;
        commit.records = 0;
        commit.data_blocks = 0;
        commit.pieces.push(Piece { addr, blocks: 1, bufs });
        self.active.log_blocks.push(addr);
        self.log.building = Some(commit);
        Ok(())
    }

    /// Takes a new extent of at least `least` blocks for the log's head when there is one, giving the rest of
    /// the old one back; `false` when nothing better was found.
    fn new_extent(&mut self, least: u64) -> bool {
        let old = self.log.head;
        let want = EXTENT_BLOCKS.min(self.space.free_blocks() / 32).max(least);
        let Some(found) = self.space.take(want) else { return false };
        if found.len < least && found.len <= old.len {
            self.space.release_run(found);
            return false;
        }
        self.space.release_run(old);
        self.log.head = found;
        true
    }

    /// Gives blocks to the data, listed in `runs`, and adds it to the commit being built.
    fn place_data(&mut self, data: &[IoBuf], runs: &mut Runs) -> Result<(), StoreError> {
        runs.clear();
        let total = data.iter().map(|b| b.len() / BLOCK_BYTES).sum::<usize>() as u64;
        if total == 0 {
            return Ok(());
        }
        if let (1, Some(buf)) = (total, data.first())
            && let Some(block) = self.log.eager.pop()
        {
            runs.push(block, 1);
            self.add_piece(block, 1, buf.clone());
            return Ok(());
        }
        if self.log.head.len < total {
            self.new_extent(total);
        }
        let mut data = data.iter();
        let mut rest: Option<IoBuf> = None;
        let mut left = total;
        while left > 0 {
            if self.log.head.len == 0 && !self.new_extent(1) {
                // `admit` keeps free blocks; reaching this means that the accounting is wrong.
                self.fail(StoreError::NoSpace);
                return Err(StoreError::NoSpace);
            }
            let buf = match rest.take() {
                Some(buf) => buf,
                None => match data.next() {
                    Some(buf) => buf.clone(),
                    None => break,
                },
            };
            let blocks = (buf.len() / BLOCK_BYTES) as u64;
            let n = blocks.min(self.log.head.len);
            let addr = self.log.head.start;
            self.log.head = Run { start: addr + n, len: self.log.head.len - n };
            if n < blocks {
                let cut = n as usize * BLOCK_BYTES;
                rest = Some(buf.slice(cut, buf.len() - cut));
                self.add_piece(addr, n, buf.slice(0, cut));
            } else {
                self.add_piece(addr, n, buf);
            }
            runs.push(addr, n as u8);
            left -= n;
        }
        Ok(())
    }

    fn add_piece(&mut self, addr: u64, blocks: u64, buf: IoBuf) {
        let spare = self.vecs.pop();
        let Some(commit) = self.log.building.as_mut() else { return };
        commit.data_blocks += blocks as usize;
        if let Some(last) = commit.pieces.last_mut()
            && last.addr + last.blocks == addr
            && last.bufs.len() < IOV_MAX
        {
            last.bufs.push(buf);
            last.blocks += blocks;
            self.vecs.extend(spare);
            return;
        }
        let mut bufs = spare.unwrap_or_else(|| Vec::with_capacity(OBJECT_BLOCKS));
        bufs.push(buf);
        commit.pieces.push(Piece { addr, blocks, bufs });
    }

    /// To be called now and then, before `flush`. When nothing is under way, the last commits are named as
    /// durable by an empty one: otherwise their data would be verified again at the next opening, and a block
    /// of it that decays meanwhile would look like a commit that a power cut has torn.
    pub fn rest(&mut self) {
        let room = self.available() > self.checkpoint_need() + self.reserve() / 4;
        if self.life == Life::Running && self.log.is_idle() && self.log.last_data > self.log.named && room {
            self.log.want_rest = true;
        }
    }

    /// Closes the commit being built: from now on the next commit's place is fixed.
    pub(crate) fn seal_commit(&mut self) {
        let Some(mut commit) = self.log.building.take() else { return };
        let least = (1 + commit.data_blocks as u64).min(EXTENT_LEFT_MAX);
        if self.log.head.len < least && !self.new_extent(least) && self.log.head.len == 0 {
            self.log.building = Some(commit);
            self.fail(StoreError::NoSpace);
            return;
        }
        commit.next = self.log.head.start;
        if commit.data_blocks > 0 {
            self.log.last_data = commit.number;
        }
        self.log.sealed.push_back(commit);
    }

    /// Submits what may be submitted.
    pub(crate) fn submit_commits(&mut self, env: &mut dyn Env) {
        let idle = self.log.in_flight.is_empty() && self.log.sealed.is_empty();
        let wanted = self.log.want_rest || self.log.want_space && !self.log.released.is_empty();
        if wanted && idle && self.log.building.is_none() {
            // An empty commit names the last one as durable, which frees what that one superseded.
            if self.begin_commit(env).is_err() {
                return;
            }
        }
        self.log.want_rest = false;
        while self.log.in_flight.len() < COMMITS_IN_FLIGHT_MAX {
            if self.log.sealed.is_empty() {
                if self.log.in_flight.len() >= COMMITS_SMALL_MAX && !self.building_is_worth_it() {
                    return;
                }
                self.seal_commit();
            }
            let Some(commit) = self.log.sealed.pop_front() else { return };
            self.submit_commit(env, commit);
        }
    }

    /// Whether the commit being built is large enough to go beside several others.
    fn building_is_worth_it(&self) -> bool {
        self.log.building.as_ref().is_some_and(|commit| {
            usize::from(commit.records) >= COMMIT_WORTH_RECORDS || commit.data_blocks >= COMMIT_WORTH_BLOCKS
        })
    }

    fn submit_commit(&mut self, env: &mut dyn Env, mut commit: Commit) {
        let header = CommitHeader {
            slice: self.geometry.slice,
            number: commit.number,
            incarnation: self.superblock.incarnation,
            next: commit.next,
            durable: self.log.durable,
            records: commit.records,
            used: commit.used as u16,
        };
        if let Some(block) = commit.pieces.first_mut().and_then(|p| p.bufs.first_mut())
            && let Some(block) = block.as_mut_slice()
        {
            crate::commit::seal(block, &header);
        }
        commit.names_durable = self.log.durable;
        commit.outstanding = commit.pieces.len() as u32;
        let mut pieces = std::mem::take(&mut commit.pieces);
        let number = commit.number;
        if self.bug(Bug::AckBeforeDurable) {
            for ticket in commit.tickets.drain(..) {
                self.events.push_back(StoreEvent::Done { ticket, result: Ok(()) });
            }
        }
        for (i, piece) in pieces.drain(..).enumerate() {
            let op = DiskOp::Write { offset: self.byte_of(piece.addr), bufs: piece.bufs, durable: true };
            self.submit(env, OpKind::Commit { number, first: i == 0 }, op);
        }
        commit.pieces = pieces;
        self.log.in_flight.push_back(commit);
    }

    /// A device write of a commit has ended.
    pub(crate) fn commit_written(
        &mut self,
        number: u64,
        first: bool,
        mut bufs: Vec<IoBuf>,
        result: Result<(), DiskError>,
    ) {
        if first && !bufs.is_empty() {
            self.log.blocks.push(bufs.swap_remove(0));
        }
        self.recycle(bufs);
        if let Err(error) = result {
            self.fail(StoreError::Failed(error));
            return;
        }
        if let Some(commit) = self.log.in_flight.iter_mut().find(|c| c.number == number) {
            commit.outstanding = commit.outstanding.saturating_sub(1);
        }
        while self.log.in_flight.front().is_some_and(|c| c.outstanding == 0) {
            let Some(mut commit) = self.log.in_flight.pop_front() else { break };
            self.log.durable = commit.number;
            self.counters.commits += 1;
            self.counters.mutations += u64::from(commit.records);
            for ticket in commit.tickets.drain(..) {
                self.events.push_back(StoreEvent::Done { ticket, result: Ok(()) });
            }
            let named = if self.bug(Bug::ReuseWhenDurable) { commit.number } else { commit.names_durable };
            self.log.pool.push(commit);
            self.release_named(named);
        }
    }

    /// Something durable says that commits up to `named` are durable: what they superseded is free.
    pub(crate) fn release_named(&mut self, named: u64) {
        self.log.named = self.log.named.max(named);
        while let Some((_, block)) = self.log.released.front().copied().filter(|(commit, _)| *commit <= named)
        {
            self.log.released.pop_front();
            self.free_superseded(block);
            self.log.want_space = false;
        }
    }

    /// The store has failed: nobody waits any longer.
    pub(crate) fn fail_commits(&mut self, why: StoreError) {
        let log = &mut self.log;
        let all = log.in_flight.iter_mut().chain(log.sealed.iter_mut()).chain(log.building.iter_mut());
        for commit in all {
            for ticket in commit.tickets.drain(..) {
                self.events.push_back(StoreEvent::Done { ticket, result: Err(why) });
            }
        }
        log.sealed.clear();
        log.building = None;
        log.in_flight.clear();
    }

    /// Whether every mutation of an object that concerns `mask` is durable.
    pub(crate) fn is_settled(&self, slot: u32, mask: u32) -> bool {
        [&self.active, &self.frozen].into_iter().all(|overlay| {
            overlay.head(slot).is_none_or(|h| h.commit <= self.log.durable || h.pending & mask == 0)
        })
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.life, Life::Running | Life::Closing)
    }
}

/// Lengths, alignment and checksums of what a mutation brings. A wrong checksum on disk would make replay
/// take the commit for torn and cut the log, so it is refused here.
fn check_data(m: &Mutation<'_>) -> Result<(), StoreError> {
    if !m.kind.has_data() {
        return Ok(());
    }
    let blocks = m.mask.count_ones() as usize;
    let bytes: usize = m.data.iter().map(IoBuf::len).sum();
    if m.crcs.len() != blocks
        || bytes != blocks * BLOCK_BYTES
        || m.data.iter().any(|b| !b.len().is_multiple_of(BLOCK_BYTES) || b.is_empty())
    {
        return Err(StoreError::Invalid);
    }
    let computed = m.data.iter().flat_map(|b| b.as_slice().chunks(BLOCK_BYTES)).map(block_crc);
    if computed.zip(m.crcs.as_slice()).any(|(is, said)| is != *said) {
        return Err(StoreError::Corrupt);
    }
    Ok(())
}
