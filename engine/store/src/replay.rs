//! Replay: the log, from the checkpoint to its end, into the overlay.
//!
//! Commits are read in windows of neighbouring blocks, since the next one mostly lies behind the data of the one
//! before. A commit waits until one behind it names it as durable; those that nothing names so are verified with
//! their data at the end.

use reactor::{DiskError, Env, IoBuf};
use wire::{BLOCK_BYTES, OBJECT_BLOCKS, block_crc};

use crate::commit::{CommitHeader, Record, RecordKind, Records};
use crate::open::{LOG, Opening, TAIL, WALK};
use crate::page::{BlockRef, SLOTS_PER_PAGE, SlotState};
use crate::planted::Bug;
use crate::store::SliceStore;
use crate::types::*;

/// Blocks of the log read at a time: one read of 256 KiB, as each waits for the one before.
const WINDOW_BLOCKS: u64 = 64;
/// Records of the log decoded or replayed in one step, each counted once for both: half a millisecond.
const RECORDS_STEP: usize = 1024;

/// A commit that the walk has accepted and replay has not applied.
pub(crate) struct Pending {
    header: CommitHeader,
    addr: u64,
    block: IoBuf,
}

impl SliceStore {
    pub(crate) fn read_window(&mut self, env: &mut dyn Env, o: &mut Opening) {
        o.window_start = o.at;
        let n = WINDOW_BLOCKS.min(self.blocks - o.at);
        self.open_read(env, LOG, 0, o.at, n);
    }

    /// Walks the chain as far as this window shows it, some records at a time.
    pub(crate) fn walk_log(&mut self, env: &mut dyn Env, o: &mut Opening) -> Result<(), OpenError> {
        let Some(buf) = o.window.take() else { return Ok(()) };
        let mut records = 0;
        loop {
            if records >= RECORDS_STEP {
                o.window = Some(buf);
                self.pause(env, WALK);
                return Ok(());
            }
            if let Some(durable) = o.pending.front().filter(|p| p.header.number <= o.durable) {
                records += usize::from(durable.header.records);
                self.apply_pending(o)?;
                continue;
            }
            let Some(at) =
                o.at.checked_sub(o.window_start).filter(|at| (*at as usize) < buf.len() / BLOCK_BYTES)
            else {
                self.read_window(env, o);
                return Ok(());
            };
            let block = buf.slice(at as usize * BLOCK_BYTES, BLOCK_BYTES);
            let accepted = o.expect.accepts(block.as_slice()).filter(|header| {
                Records::new(block.as_slice(), header, self.blocks).all(|record| record.is_some())
            });
            let Some(header) = accepted else { break };
            records += usize::from(header.records);
            o.durable = o.durable.max(header.durable);
            // The window's memory would be held by a slice of it: keep a copy while the commit waits.
            let kept = IoBuf::copy_of(block.as_slice()).map_err(|_| OpenError::Disk(DiskError::Io(0)))?;
            o.pending.push_back(Pending { header, addr: o.at, block: kept });
            o.expect.number += 1;
            o.at = header.next;
        }
        self.next_tail(env, o)
    }

    fn apply_pending(&mut self, o: &mut Opening) -> Result<(), OpenError> {
        let Some(pending) = o.pending.pop_front() else { return Ok(()) };
        let again = if self.bug(Bug::ApplyRecordTwice) { o.twice.take() } else { None };
        let count = pending.header.records;
        let lost = self.bug(Bug::LoseLastRecord) && count > 1;
        let records = Records::new(pending.block.as_slice(), &pending.header, self.blocks);
        for (i, record) in records.flatten().enumerate() {
            if i == 0 {
                o.twice = Some(record);
            }
            if lost && i + 1 == usize::from(count) {
                break;
            }
            self.replay(&record, pending.header.number, pending.addr)?;
            o.report.records += 1;
        }
        if let Some(record) = again
            && self.index.presence(record.slot) != Presence::Absent
        {
            self.replay(&record, pending.header.number, pending.addr)?;
        }
        o.report.commits += 1;
        o.last = pending.header.number;
        o.next = pending.header.next;
        self.active.log_blocks.push(pending.addr);
        Ok(())
    }

    /// Lays a record into the overlay. What the object was before is not known yet: `process_slot` puts the
    /// page beneath it later.
    fn replay(&mut self, record: &Record, number: u64, addr: u64) -> Result<(), OpenError> {
        let damaged = Err(OpenError::Damaged { block: addr });
        let slot = record.slot;
        if slot > self.index.slots() {
            return damaged;
        }
        match self.index.object(slot) {
            None => {
                if self.index.find(record.object).is_some() {
                    return Err(OpenError::Duplicate { object: record.object });
                }
                if self.index.place(slot, record.object).is_none() {
                    return damaged;
                }
            }
            Some(object) => {
                if object != record.object || self.index.presence(slot) == Presence::Absent {
                    return damaged;
                }
            }
        }
        self.table.grow(slot / SLOTS_PER_PAGE as u32 + 1);
        let (state, emptied) = match record.kind {
            RecordKind::Write => (SlotState::Live, 0),
            RecordKind::Zero => (SlotState::Live, record.mask),
            RecordKind::Replace => (SlotState::Live, !record.mask),
            RecordKind::Delete => (SlotState::Tombstone, u32::MAX),
            RecordKind::Purge => (SlotState::Free, u32::MAX),
        };
        let head = self.active.touch(slot, state, record.version, number, number, 0);
        let mut lay = |block: usize, to: BlockRef| {
            if self.active.replace(head, block, to).is_none() {
                self.active.add(head, block, to, true);
            }
        };
        record.as_ref().each_block(|block, addr, crc| lay(block, BlockRef { addr, crc }));
        for block in (0..OBJECT_BLOCKS).filter(|b| emptied >> b & 1 == 1) {
            lay(block, BlockRef::default());
        }
        if state == SlotState::Free {
            let mut purged = self.active.purged;
            self.index.remove(slot, &mut purged);
            self.active.purged = purged;
        } else {
            self.index.set(slot, state, record.version, 0);
        }
        Ok(())
    }

    /// The chain has ended. Commits that nothing names as durable count if their data is whole.
    fn next_tail(&mut self, env: &mut dyn Env, o: &mut Opening) -> Result<(), OpenError> {
        while let Some(pending) = o.pending.front() {
            if !self.bug(Bug::AcceptTornCommit) {
                let records = Records::new(pending.block.as_slice(), &pending.header, self.blocks);
                for record in records.flatten() {
                    record.as_ref().each_block(|_, addr, crc| o.verify.push_back((addr, crc)));
                }
            }
            if !o.verify.is_empty() {
                self.read_tail(env, o);
                return Ok(());
            }
            self.apply_pending(o)?;
        }
        self.begin_tree(env, o)
    }

    fn read_tail(&mut self, env: &mut dyn Env, o: &mut Opening) {
        let first = o.verify.front().map_or(2, |v| v.0);
        let n = o
            .verify
            .iter()
            .zip(first..first + WINDOW_BLOCKS)
            .take_while(|((addr, _), expected)| addr == expected)
            .count();
        self.open_read(env, TAIL, 0, first, n as u64);
    }

    pub(crate) fn open_tail(
        &mut self,
        env: &mut dyn Env,
        o: &mut Opening,
        buf: &IoBuf,
    ) -> Result<(), OpenError> {
        for block in buf.as_slice().chunks(BLOCK_BYTES) {
            let Some((_, crc)) = o.verify.pop_front() else { break };
            if block_crc(block) != crc {
                o.report.cut = o.pending.len() as u64;
                o.pending.clear();
                o.verify.clear();
                return self.begin_tree(env, o);
            }
        }
        if !o.verify.is_empty() {
            self.read_tail(env, o);
            return Ok(());
        }
        self.apply_pending(o)?;
        self.next_tail(env, o)
    }
}
