//! Checkpoints: what the log says goes into the pages, so that the log can be short.
//!
//! At a commit boundary the active overlay becomes the frozen one; when its commits are durable, the pages
//! it touches are merged and written to new places, then the nodes above them, then (after a flush) the
//! superblock's two copies, one after the other. Only then are the old pages, the old nodes and the log
//! blocks free. A cut at any point leaves the former checkpoint and a longer log.
//!
//! The pages hold exactly the state at the checkpoint's last commit, not a newer one: what follows may
//! never become durable. Work is done in bounded pieces, driven by the completions of its own writes.

use reactor::{DiskError, DiskOp, Env, IoBuf};
use wire::BLOCK_BYTES;

use crate::alloc::Run;
use crate::overlay::Overlay;
use crate::page::{
    BlockRef, NODE_ENTRIES, SLOTS_PER_PAGE, SlotMut, SlotState, seal_node, seal_page, set_node_entry,
    tree_shape,
};
use crate::planted::Bug;
use crate::store::{Life, OpKind, SliceStore};
use crate::superblock::SliceSuper;
use crate::types::StoreError;

/// Pages or nodes merged and written in one step: about 50 microseconds of work.
const BATCH: usize = 32;
/// Blocks or slots released in one step.
const RELEASE_STEP: usize = 4096;
/// Commits that start a checkpoint at the latest, as a share of the slice (1/32), and its bounds: replay
/// reads that many blocks.
const LOG_SHARE: u64 = 32;
const LOG_BLOCKS_MIN: u64 = 256;
const LOG_BLOCKS_MAX: u64 = 65_536;
/// Changed objects per page before a checkpoint is worth its page writes: with 5 random changes per page
/// about 0.2 pages are written per change.
const CHANGES_PER_PAGE: u64 = 5;
/// A checkpoint below this many changed objects is not started by their number.
const CHANGES_MIN: u64 = 4096;
/// Changed blocks per changed object, at most, before a checkpoint starts: full-object writes change 32.
const ENTRIES_PER_OBJECT: u64 = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    /// Waits until its commits are durable.
    WaitDurable,
    Pages,
    Nodes(u8),
    Flush,
    SuperFirst,
    SuperSecond,
    Release,
}

pub(crate) struct Checkpoint {
    phase: Phase,
    /// The last commit it contains, and where the next one is.
    commit: u64,
    log: u64,
    /// Next page or node to look at.
    cursor: u32,
    batch: Vec<(u32, Option<u32>)>,
    /// Writes outstanding.
    writes: u32,
    /// Blocks free once the superblock is durable.
    old: Vec<u64>,
    /// Level 0 and 1 nodes to write: bit per node.
    dirty: [Vec<u64>; 2],
    next_super: Option<SliceSuper>,
    log_released: usize,
}

impl Checkpoint {
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Idle,
            commit: 0,
            log: 0,
            cursor: 0,
            batch: Vec::with_capacity(BATCH),
            writes: 0,
            old: Vec::new(),
            dirty: [Vec::new(), Vec::new()],
            next_super: None,
            log_released: 0,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Blocks that its end will free.
    pub(crate) fn old_blocks(&self) -> u64 {
        self.old.len() as u64
    }

    fn mark(&mut self, level: usize, node: usize) {
        let Some(bits) = self.dirty.get_mut(level) else { return };
        if bits.len() <= node / 64 {
            bits.resize(node / 64 + 1, 0);
        }
        if let Some(word) = bits.get_mut(node / 64) {
            *word |= 1 << (node % 64);
        }
    }

    fn next_dirty(&self, level: usize, from: u32) -> Option<u32> {
        let bits = self.dirty.get(level)?;
        (from as usize..bits.len() * 64)
            .find(|n| bits.get(n / 64).is_some_and(|w| w >> (n % 64) & 1 == 1))
            .map(|n| n as u32)
    }
}

impl SliceStore {
    /// Blocks that checkpointing one overlay may take before it gives any back.
    fn need_of(&self, overlay: &Overlay) -> u64 {
        let pages = u64::from(overlay.page_count());
        let (maps, tops) = tree_shape(self.table.len());
        pages + pages.min(maps as u64) + pages.min(tops as u64) + 2
    }

    pub(crate) fn checkpoint_need(&self) -> u64 {
        let frozen = if self.checkpoint.is_idle() { 0 } else { self.need_of(&self.frozen) };
        self.need_of(&self.active) + frozen
    }

    fn changes_limit(&self) -> u64 {
        (u64::from(self.table.len()) * CHANGES_PER_PAGE)
            .max(CHANGES_MIN)
            .min(u64::from(self.options.dirty_objects_max).max(64))
    }

    fn log_limit(&self) -> u64 {
        (self.blocks / LOG_SHARE).clamp(LOG_BLOCKS_MIN, LOG_BLOCKS_MAX)
    }

    /// Whether mutations must wait for a checkpoint that is under way: memory and log are bounded.
    pub(crate) fn overlay_is_full(&self) -> bool {
        if self.checkpoint.is_idle() {
            return false;
        }
        let limit = self.changes_limit();
        self.active.objects() as u64 >= 2 * limit
            || self.active.entries() as u64 >= 2 * limit * ENTRIES_PER_OBJECT
            || self.active.log_blocks.len() as u64 >= 2 * self.log_limit()
    }

    /// Starts a checkpoint when there is reason to.
    pub(crate) fn maybe_start_checkpoint(&mut self) {
        if !self.checkpoint.is_idle() || self.active.is_empty() {
            return;
        }
        let limit = self.changes_limit();
        let log = self.active.log_blocks.len() as u64;
        let due = self.active.objects() as u64 >= limit
            || self.active.entries() as u64 >= limit * ENTRIES_PER_OBJECT
            || log >= self.log_limit();
        let reserve = self.reserve();
        let short = self.available() < 2 * reserve + 2 * self.checkpoint_need();
        let debt = log + u64::from(self.active.page_count()) + self.active.unsettled;
        let recycle = short && debt >= reserve / 8;
        let asked = self.log.want_space && log + self.active.unsettled > 0;
        if due || recycle || asked || self.life == Life::Closing {
            self.start_checkpoint();
        }
    }

    fn start_checkpoint(&mut self) {
        self.seal_commit();
        if !self.is_running() {
            return;
        }
        let c = &mut self.checkpoint;
        c.phase = Phase::WaitDurable;
        c.commit = self.log.next_number - 1;
        c.log = self.log.head.start;
        c.cursor = 0;
        c.log_released = 0;
        std::mem::swap(&mut self.active, &mut self.frozen);
    }

    /// Does what can be done now without waiting for the device.
    pub(crate) fn step_checkpoint(&mut self, env: &mut dyn Env) {
        if !self.is_running() {
            return;
        }
        match self.checkpoint.phase {
            Phase::Idle | Phase::Flush | Phase::SuperFirst | Phase::SuperSecond => {}
            Phase::WaitDurable => {
                if self.log.durable >= self.checkpoint.commit || self.bug(Bug::CheckpointTooEarly) {
                    self.checkpoint.phase = Phase::Pages;
                    self.step_pages(env);
                }
            }
            Phase::Pages => self.step_pages(env),
            Phase::Nodes(level) => self.step_nodes(env, level),
            Phase::Release => self.step_release(),
        }
    }

    /// One batch of pages: gather, wait until they are in memory, merge, write.
    fn step_pages(&mut self, env: &mut dyn Env) {
        if self.checkpoint.writes > 0 {
            return;
        }
        let mut batch = std::mem::take(&mut self.checkpoint.batch);
        if batch.is_empty() {
            let mut cursor = self.checkpoint.cursor;
            while batch.len() < BATCH
                && let Some(page) = self.frozen.next_page(cursor)
            {
                batch.push((page, None));
                cursor = page + 1;
            }
            self.checkpoint.cursor = cursor;
            if batch.is_empty() {
                self.checkpoint.batch = batch;
                self.begin_nodes(env, 0);
                return;
            }
        }
        let mut ready = true;
        for (page, frame) in &mut batch {
            if frame.is_some() {
                continue;
            }
            let found = if self.table.get(*page).addr == 0 && self.cache.peek(*page).is_none() {
                self.cache.create(*page)
            } else {
                self.want_page(env, *page)
            };
            match found {
                Some(found) => {
                    self.cache.pin(found);
                    *frame = Some(found);
                }
                None => ready = false,
            }
        }
        self.checkpoint.batch = batch;
        if ready {
            self.merge_batch(env);
        }
    }

    fn merge_batch(&mut self, env: &mut dyn Env) {
        let batch = std::mem::take(&mut self.checkpoint.batch);
        let mut writes: Vec<IoBuf> = self.take_vec();
        let (mut start, mut spare) = (0, Run::default());
        for (i, (page, frame)) in batch.iter().enumerate() {
            let Some(frame) = *frame else { continue };
            if spare.len == 0 {
                self.write_batch(env, start, &mut writes);
                match self.space.take((batch.len() - i) as u64) {
                    Some(run) => spare = run,
                    None => return self.fail(StoreError::NoSpace),
                }
                start = spare.start;
            }
            let Some(crc) = self.merge_page(*page, frame) else { return self.fail(StoreError::Damaged) };
            let old = self.table.get(*page);
            if old.addr != 0 {
                self.checkpoint.old.push(old.addr);
            }
            self.table.set(*page, BlockRef { addr: spare.start, crc });
            self.checkpoint.mark(0, *page as usize / NODE_ENTRIES);
            spare = Run { start: spare.start + 1, len: spare.len - 1 };
            writes.extend(self.cache.handle(frame));
        }
        self.write_batch(env, start, &mut writes);
        self.recycle(writes);
        self.checkpoint.batch = batch;
    }

    fn write_batch(&mut self, env: &mut dyn Env, start: u64, bufs: &mut Vec<IoBuf>) {
        if bufs.is_empty() {
            return;
        }
        let next = self.take_vec();
        let bufs = std::mem::replace(bufs, next);
        self.checkpoint.writes += 1;
        let op = DiskOp::Write { offset: self.byte_of(start), bufs, durable: false };
        self.submit(env, OpKind::Checkpoint, op);
    }

    /// Applies the frozen overlay to a page in its frame; returns the page's new checksum.
    fn merge_page(&mut self, page: u32, frame: u32) -> Option<u32> {
        let slice = self.geometry.slice;
        let bytes = self.cache.bytes_mut(frame)?;
        let mut settled = 0;
        for i in 0..SLOTS_PER_PAGE {
            let slot = page * SLOTS_PER_PAGE as u32 + i as u32;
            let Some(head) = self.frozen.head(slot).copied() else { continue };
            let mut record = SlotMut::of(bytes, i);
            for change in self.frozen.changes(slot, u32::MAX) {
                let old = record.block(change.block).addr;
                settled += u64::from(!change.settled);
                if !change.settled && old != 0 {
                    self.space.release(old);
                }
                record.set_block(change.block, change.to);
            }
            if head.state() == SlotState::Free {
                record.clear();
            } else {
                record.set_head(self.index.object(slot)?, head.version(), head.state());
            }
        }
        self.frozen.unsettled = self.frozen.unsettled.saturating_sub(settled);
        Some(seal_page(bytes, slice, page, self.checkpoint.commit))
    }

    fn begin_nodes(&mut self, env: &mut dyn Env, level: u8) {
        self.checkpoint.phase = Phase::Nodes(level);
        self.checkpoint.cursor = 0;
        self.step_nodes(env, level);
    }

    /// One batch of nodes of a level; goes up when the level is done.
    fn step_nodes(&mut self, env: &mut dyn Env, level: u8) {
        if self.checkpoint.writes > 0 {
            return;
        }
        let mut bufs = self.take_vec();
        let (mut start, mut end) = (0, 0);
        let mut done = 0;
        while done < BATCH {
            let cursor = self.checkpoint.cursor;
            let node = match level {
                0 | 1 => self.checkpoint.next_dirty(usize::from(level), cursor),
                _ => (cursor == 0 && self.checkpoint.next_dirty(1, 0).is_some()).then_some(0),
            };
            let Some(node) = node else { break };
            self.checkpoint.cursor = node + 1;
            let Some(run) = self.space.take(1) else { return self.fail(StoreError::NoSpace) };
            let Some(buf) = self.build_node(env, level, node, run.start) else {
                return self.fail(StoreError::NoSpace);
            };
            if run.start != end {
                self.write_batch(env, start, &mut bufs);
                start = run.start;
            }
            end = run.start + 1;
            bufs.push(buf);
            done += 1;
        }
        self.write_batch(env, start, &mut bufs);
        self.recycle(bufs);
        if done < BATCH && self.checkpoint.writes == 0 {
            if level < 2 {
                self.begin_nodes(env, level + 1);
            } else {
                self.begin_flush(env);
            }
        }
    }

    fn build_node(&mut self, env: &mut dyn Env, level: u8, node: u32, addr: u64) -> Option<IoBuf> {
        let mut buf = Self::buffer(env, BLOCK_BYTES)?;
        let bytes = buf.as_mut_slice()?;
        bytes.fill(0);
        for i in 0..NODE_ENTRIES {
            set_node_entry(bytes, i, self.table.child(level, node as usize, i));
        }
        let crc = seal_node(bytes, self.geometry.slice, level, u64::from(node), self.checkpoint.commit);
        let at = self.table.node_mut(level, node as usize)?;
        let old = std::mem::replace(at, BlockRef { addr, crc });
        if old.addr != 0 {
            self.checkpoint.old.push(old.addr);
        }
        if level == 0 {
            self.checkpoint.mark(1, node as usize / NODE_ENTRIES);
        }
        Some(buf)
    }

    /// A write of pages or nodes has ended.
    pub(crate) fn checkpoint_written(&mut self, result: Result<(), DiskError>) {
        if let Err(error) = result {
            self.fail(StoreError::Failed(error));
            return;
        }
        let c = &mut self.checkpoint;
        c.writes = c.writes.saturating_sub(1);
        if c.writes == 0 && c.phase == Phase::Pages {
            let frames = c.batch.drain(..).filter_map(|(_, frame)| frame);
            for frame in frames {
                self.cache.unpin(frame);
            }
        }
    }

    fn begin_flush(&mut self, env: &mut dyn Env) {
        self.checkpoint.phase = Phase::Flush;
        self.submit(env, OpKind::CheckpointFlush, DiskOp::Flush);
    }

    pub(crate) fn checkpoint_flushed(&mut self, env: &mut dyn Env, result: Result<(), DiskError>) {
        if let Err(error) = result {
            self.fail(StoreError::Failed(error));
            return;
        }
        let root = self.table.root;
        // Pages that were never written stay out of the count: a checkpoint covers the pages it knows.
        let pages = if root.addr == 0 { 0 } else { self.table.len() };
        self.checkpoint.next_super = Some(SliceSuper {
            number: self.superblock.number + 1,
            checkpoint: self.checkpoint.commit,
            log: self.checkpoint.log,
            root: root.addr,
            root_crc: root.crc,
            pages,
            ..self.superblock
        });
        self.checkpoint.phase = Phase::SuperFirst;
        self.write_super(env, 0);
    }

    /// Writes one copy of the coming superblock; `second` = 1 for the copy written last.
    pub(crate) fn write_super(&mut self, env: &mut dyn Env, second: u64) {
        let Some(next) = self.checkpoint.next_super else { return };
        let Some(mut buf) = Self::buffer(env, BLOCK_BYTES) else {
            self.fail(StoreError::NoSpace);
            return;
        };
        if let Some(bytes) = buf.as_mut_slice() {
            next.encode_into(bytes);
        }
        let mut bufs = self.take_vec();
        bufs.push(buf);
        // The first copy written is the one that holds the older superblock when only one could be
        // written last time.
        let copy = (next.number + second) % 2;
        let op = DiskOp::Write { offset: self.byte_of(copy), bufs, durable: true };
        self.submit(env, OpKind::Super, op);
    }

    /// Takes a superblock to be written outside a checkpoint (on open).
    pub(crate) fn set_next_super(&mut self, next: SliceSuper) {
        self.checkpoint.next_super = Some(next);
    }

    pub(crate) fn super_written(&mut self, env: &mut dyn Env, result: Result<(), DiskError>) {
        if self.life == Life::Opening {
            self.opening_super_written(env, result);
            return;
        }
        if let Err(error) = result {
            self.fail(StoreError::Failed(error));
            return;
        }
        match self.checkpoint.phase {
            Phase::SuperFirst => {
                self.checkpoint.phase = Phase::SuperSecond;
                self.write_super(env, 1);
            }
            Phase::SuperSecond => {
                if let Some(next) = self.checkpoint.next_super.take() {
                    self.superblock = next;
                }
                self.checkpoint.phase = Phase::Release;
                self.release_named(self.checkpoint.commit);
            }
            _ => {}
        }
    }

    /// Frees what the checkpoint has made superfluous, a piece at a time.
    fn step_release(&mut self) {
        for _ in 0..RELEASE_STEP {
            if let Some(block) = self.checkpoint.old.pop() {
                self.space.release(block);
            } else if let Some(block) = self.frozen.log_blocks.pop() {
                self.space.release(block);
            } else {
                break;
            }
        }
        if !self.checkpoint.old.is_empty() || !self.frozen.log_blocks.is_empty() {
            return;
        }
        let mut purged = self.frozen.purged;
        let done = self.index.release(&mut purged, RELEASE_STEP);
        self.frozen.purged = purged;
        if !done {
            return;
        }
        self.frozen.clear();
        for bits in &mut self.checkpoint.dirty {
            bits.fill(0);
        }
        self.checkpoint.phase = Phase::Idle;
        self.counters.checkpoints += 1;
        self.log.want_space = false;
    }

    /// Ends the release at once: when closing, no further event may come.
    pub(crate) fn finish_release(&mut self) {
        while self.checkpoint.phase == Phase::Release {
            self.step_release();
        }
    }

    /// A page that the checkpoint needs cannot be read: the log can never be shortened again.
    pub(crate) fn checkpoint_page_failed(&mut self, page: u32, error: StoreError) {
        if self.checkpoint.phase == Phase::Pages && self.checkpoint.batch.iter().any(|(p, _)| *p == page) {
            let why = if error == StoreError::Corrupt { StoreError::Damaged } else { error };
            self.fail(why);
        }
    }
}
