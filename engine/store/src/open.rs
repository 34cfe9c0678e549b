//! Opening: superblock, log, page map, pages; then a new incarnation.
//!
//! The log is walked first (`replay`), into the overlay, without touching the index of free space; then every page is
//! read once and what the overlay says is laid over it, so that exactly the blocks in use are marked, each
//! once. The time is linear in what is stored. At the end the device is flushed (what replay has seen may
//! have been in a volatile cache only) and both superblock copies name a new incarnation and the last valid
//! commit: nothing left over from behind the log's end can ever be taken for valid again.

use std::collections::VecDeque;

use reactor::{DiskError, DiskOp, Env, IoBuf};
use wire::{BLOCK_BYTES, OBJECT_BLOCKS};

use crate::alloc::Run;
use crate::commit::{Expect, Record};
use crate::page::{
    BlockRef, NODE_ENTRIES, SLOTS_PER_PAGE, Slot, SlotState, check_node, check_page, node_entry, tree_shape,
};
use crate::replay::Pending;
use crate::store::{Life, OpKind, SliceStore};
use crate::superblock::SliceSuper;
use crate::types::*;

/// Pages read at a time. All of one read are taken in with one event: some 200 objects, a third of a millisecond
/// where they are many blocks in many places.
const PAGES_READ: u32 = 16;
/// Blocks of the log marked as used in one step.
const LOG_BLOCKS_STEP: usize = 16_384;
/// Reads in flight while the page map and the pages are loaded.
const READS_IN_FLIGHT: u32 = 16;
/// Pages made room for in one step: some 0.7 MiB of index, which the kernel gives page by page, half a millisecond.
const GROW_PAGES_STEP: u32 = 2048;
/// Pages without contents looked at in one step.
const EMPTY_PAGES_STEP: u32 = 512;

const SUPER: u32 = 0;
pub(crate) const LOG: u32 = 1;
pub(crate) const TAIL: u32 = 2;
const NODE: u32 = 3;
const PAGES: u32 = 4;
const FLUSH: u32 = 5;
const TICK: u32 = 6;
const GROW: u32 = 7;
pub(crate) const WALK: u32 = 8;
const END: u32 = 9;

/// The state of an opening.
pub(crate) struct Opening {
    pub(crate) expect: Expect,
    /// Where the next commit is expected.
    pub(crate) at: u64,
    /// The part of the log that was read last, and where it begins.
    pub(crate) window: Option<IoBuf>,
    pub(crate) window_start: u64,
    pub(crate) durable: u64,
    pub(crate) pending: VecDeque<Pending>,
    /// Data of the first pending commit still to be verified.
    pub(crate) verify: VecDeque<(u64, u32)>,
    pub(crate) twice: Option<Record>,
    level: u8,
    cursor: u32,
    outstanding: u32,
    /// Blocks of the log that are marked as used.
    marked: usize,
    pub(crate) report: OpenReport,
    /// Where the log goes on.
    pub(crate) next: u64,
    pub(crate) last: u64,
    superblocks: u8,
}

impl SliceStore {
    pub(crate) fn start_opening(&mut self, env: &mut dyn Env) {
        let expect =
            Expect { slice: self.geometry.slice, number: 0, incarnation: 0, cut: 0, blocks: self.blocks };
        self.opening = Some(Box::new(Opening {
            expect,
            at: 0,
            window: None,
            window_start: 0,
            durable: 0,
            pending: VecDeque::new(),
            verify: VecDeque::new(),
            twice: None,
            level: 2,
            cursor: 0,
            outstanding: 0,
            marked: 0,
            report: OpenReport::default(),
            next: 0,
            last: 0,
            superblocks: 0,
        }));
        self.open_read(env, SUPER, 0, 0, 2);
    }

    pub(crate) fn open_read(&mut self, env: &mut dyn Env, a: u32, b: u32, block: u64, blocks: u64) {
        let Some(buf) = Self::buffer(env, blocks as usize * BLOCK_BYTES) else {
            self.open_failed(OpenError::Disk(DiskError::Io(0)));
            return;
        };
        let op = DiskOp::Read { offset: self.byte_of(block), buf };
        self.submit(env, OpKind::Open { a, b }, op);
    }

    /// Comes back in a step of its own: the others on this core have their turn first. Only a completion brings
    /// the store back, and every device has its first block.
    pub(crate) fn pause(&mut self, env: &mut dyn Env, then: u32) {
        self.open_read(env, then, 0, 0, 1);
    }

    fn open_failed(&mut self, why: OpenError) {
        if self.life != Life::Opening {
            return;
        }
        tracing::warn!(slice = self.geometry.slice.0, error = %why, "slice does not open");
        self.opening = None;
        self.life = Life::Failed(match &why {
            OpenError::Disk(error) => StoreError::Failed(*error),
            OpenError::NoSpace => StoreError::NoSpace,
            _ => StoreError::Damaged,
        });
        self.events.push_back(StoreEvent::Opened(Err(why)));
    }

    pub(crate) fn opening_event(
        &mut self,
        env: &mut dyn Env,
        a: u32,
        b: u32,
        result: Result<(), DiskError>,
        op: DiskOp,
    ) {
        let Some(mut o) = self.opening.take() else { return };
        if let Err(error) = result {
            self.open_failed(OpenError::Disk(error));
            return;
        }
        let done = match (a, op) {
            (SUPER, DiskOp::Read { buf, .. }) => self.open_super(env, &mut o, &buf),
            (LOG, DiskOp::Read { buf, .. }) => {
                o.window = Some(buf);
                self.walk_log(env, &mut o)
            }
            (WALK, _) => self.walk_log(env, &mut o),
            (TAIL, DiskOp::Read { buf, .. }) => self.open_tail(env, &mut o, &buf),
            (NODE, DiskOp::Read { buf, .. }) => self.open_node(env, &mut o, b, &buf),
            (PAGES, DiskOp::Read { buf, .. }) => self.open_pages(env, &mut o, b, &buf),
            (TICK, _) => {
                o.outstanding -= 1;
                self.load_pages(env, &mut o)
            }
            (GROW, _) => {
                self.make_place(env, &mut o);
                Ok(())
            }
            (END, _) => self.end_of_pages(env, &mut o),
            (FLUSH, _) => {
                self.open_incarnation(env, &o);
                Ok(())
            }
            _ => Ok(()),
        };
        match done {
            Ok(()) => self.opening = Some(o),
            Err(why) => self.open_failed(why),
        }
    }

    fn open_super(&mut self, env: &mut dyn Env, o: &mut Opening, buf: &IoBuf) -> Result<(), OpenError> {
        let bytes = buf.as_slice();
        let (a, b) = bytes.split_at_checked(BLOCK_BYTES).unwrap_or((bytes, &[]));
        let found = SliceSuper::choose(a, b)?;
        if found.slice != self.geometry.slice {
            return Err(OpenError::WrongSlice { expected: self.geometry.slice, found: found.slice });
        }
        if self.options.cluster.is_some_and(|c| c != found.cluster) {
            return Err(OpenError::WrongCluster { found: found.cluster });
        }
        if found.blocks != self.blocks {
            return Err(OpenError::Geometry);
        }
        self.superblock = found;
        o.expect.number = found.checkpoint + 1;
        o.expect.incarnation = found.incarnation;
        o.expect.cut = found.cut;
        // What the cut named was verified then, and flushed.
        o.durable = found.checkpoint.max(found.cut);
        o.last = found.checkpoint;
        o.at = found.log;
        o.next = found.log;
        self.make_place(env, o);
        Ok(())
    }

    /// Makes room for what the checkpoint holds, a part at a time, before the log is read that speaks of it.
    fn make_place(&mut self, env: &mut dyn Env, o: &mut Opening) {
        let pages = self.table.len().saturating_add(GROW_PAGES_STEP).min(self.superblock.pages);
        self.table.grow(pages);
        self.index.grow(pages * SLOTS_PER_PAGE as u32);
        if pages < self.superblock.pages {
            self.pause(env, GROW);
        } else {
            self.index.expect(self.superblock.pages * SLOTS_PER_PAGE as u32);
            self.read_window(env, o);
        }
    }

    fn use_block(&mut self, block: u64) -> Result<(), OpenError> {
        if self.space.mark(Run { start: block, len: 1 }) {
            Ok(())
        } else {
            Err(OpenError::DoubleUse { block })
        }
    }

    /// The log is known; now what lies under it.
    pub(crate) fn begin_tree(&mut self, env: &mut dyn Env, o: &mut Opening) -> Result<(), OpenError> {
        let pages = self.superblock.pages.max(self.table.len());
        self.table.grow(pages);
        self.index.grow(pages * SLOTS_PER_PAGE as u32);
        self.table.root = BlockRef { addr: self.superblock.root, crc: self.superblock.root_crc };
        o.level = 2;
        o.cursor = 0;
        self.load_nodes(env, o)
    }

    /// Nodes of a level that exist in the checkpoint.
    fn nodes_of(&self, level: u8) -> usize {
        let (maps, tops) = tree_shape(self.superblock.pages);
        match level {
            0 => maps,
            1 => tops,
            _ => usize::from(self.superblock.root != 0),
        }
    }

    fn load_nodes(&mut self, env: &mut dyn Env, o: &mut Opening) -> Result<(), OpenError> {
        loop {
            while (o.cursor as usize) < self.nodes_of(o.level) && o.outstanding < READS_IN_FLIGHT {
                let at = o.cursor;
                o.cursor += 1;
                let node = self.table.node_mut(o.level, at as usize).copied().unwrap_or_default();
                if node.addr != 0 {
                    self.use_block(node.addr)?;
                    o.outstanding += 1;
                    self.open_read(env, NODE, at, node.addr, 1);
                }
            }
            if o.outstanding > 0 {
                return Ok(());
            }
            o.cursor = 0;
            if o.level == 0 {
                return self.load_pages(env, o);
            }
            o.level -= 1;
        }
    }

    fn open_node(
        &mut self,
        env: &mut dyn Env,
        o: &mut Opening,
        at: u32,
        buf: &IoBuf,
    ) -> Result<(), OpenError> {
        o.outstanding -= 1;
        let node = self.table.node_mut(o.level, at as usize).copied().unwrap_or_default();
        check_node(buf.as_slice(), self.geometry.slice, o.level, u64::from(at), node.crc)
            .map_err(|_| OpenError::Damaged { block: node.addr })?;
        let pages = self.superblock.pages;
        for i in 0..NODE_ENTRIES {
            let entry = node_entry(buf.as_slice(), i);
            let child = at as usize * NODE_ENTRIES + i;
            if entry.addr >= self.blocks {
                return Err(OpenError::Damaged { block: node.addr });
            }
            match o.level {
                0 if child < pages as usize => self.table.set(child as u32, entry),
                0 => {}
                level => {
                    if let Some(to) = self.table.node_mut(level - 1, child) {
                        *to = entry;
                    }
                }
            }
        }
        self.load_nodes(env, o)
    }

    /// Reads pages, adjacent ones together, in order of number.
    fn load_pages(&mut self, env: &mut dyn Env, o: &mut Opening) -> Result<(), OpenError> {
        let pages = self.table.len();
        let mut empty = 0;
        while o.cursor < pages && o.outstanding < READS_IN_FLIGHT {
            let first = o.cursor;
            let at = self.table.get(first).addr;
            if at == 0 {
                self.open_page(first, None)?;
                o.cursor += 1;
                empty += 1;
                if empty >= EMPTY_PAGES_STEP {
                    if o.outstanding == 0 {
                        o.outstanding += 1;
                        self.pause(env, TICK);
                    }
                    return Ok(());
                }
                continue;
            }
            let mut n = 1;
            while n < PAGES_READ && self.table.get(first + n).addr == at + u64::from(n) {
                n += 1;
            }
            o.cursor += n;
            o.outstanding += 1;
            self.open_read(env, PAGES, first, at, u64::from(n));
        }
        if o.outstanding == 0 && o.cursor >= pages {
            return self.end_of_pages(env, o);
        }
        Ok(())
    }

    fn open_pages(
        &mut self,
        env: &mut dyn Env,
        o: &mut Opening,
        first: u32,
        buf: &IoBuf,
    ) -> Result<(), OpenError> {
        o.outstanding -= 1;
        for (page, bytes) in (first..).zip(buf.as_slice().chunks(BLOCK_BYTES)) {
            let at = self.table.get(page);
            check_page(bytes, self.geometry.slice, page, at.crc)
                .map_err(|_| OpenError::Damaged { block: at.addr })?;
            self.use_block(at.addr)?;
            self.open_page(page, Some(bytes))?;
            o.report.pages += 1;
        }
        self.load_pages(env, o)
    }

    fn open_page(&mut self, page: u32, bytes: Option<&[u8]>) -> Result<(), OpenError> {
        for i in (0..SLOTS_PER_PAGE).rev() {
            let slot = page * SLOTS_PER_PAGE as u32 + i as u32;
            let damaged = OpenError::Damaged { block: self.table.get(page).addr };
            let record = bytes.map(|bytes| Slot::of(bytes, i));
            let state = match &record {
                Some(record) => record.state().ok_or(damaged.clone())?,
                None => SlotState::Free,
            };
            let head = self.active.head(slot).copied();
            if state == SlotState::Free && head.is_none() {
                self.index.add_free(slot);
                continue;
            }
            if let Some(record) = record.filter(|_| state != SlotState::Free) {
                let object = record.object();
                match (self.index.object(slot), head.is_some()) {
                    (Some(other), true) if other == object => {}
                    (None, false) => {
                        if self.index.find(object).is_some() {
                            return Err(OpenError::Duplicate { object });
                        }
                        self.index.place(slot, object).ok_or(damaged)?;
                    }
                    _ => return Err(damaged),
                }
            }
            let mut blocks = [BlockRef::default(); OBJECT_BLOCKS];
            if let Some(record) = &record {
                for (i, to) in blocks.iter_mut().enumerate() {
                    *to = record.block(i);
                }
            }
            for change in self.active.changes(slot, u32::MAX) {
                if let Some(to) = blocks.get_mut(change.block) {
                    *to = change.to;
                }
            }
            let mask = self.use_blocks(&blocks)?;
            let (state, version) = match (&head, &record) {
                (Some(head), _) => (head.state(), head.version()),
                (None, Some(record)) => (state, record.version()),
                (None, None) => continue,
            };
            if state != SlotState::Free {
                self.index.set(slot, state, version, mask);
            }
        }
        Ok(())
    }

    /// Marks an object's blocks, runs at a time; returns which are written.
    fn use_blocks(&mut self, blocks: &[BlockRef; OBJECT_BLOCKS]) -> Result<u32, OpenError> {
        let mut mask = 0;
        let mut run = Run::default();
        for (i, block) in blocks.iter().enumerate().filter(|(_, b)| b.addr != 0) {
            mask |= 1 << i;
            if run.start + run.len == block.addr {
                run.len += 1;
                continue;
            }
            if run.len > 0 && !self.space.mark(run) {
                return Err(OpenError::DoubleUse { block: run.start });
            }
            run = Run { start: block.addr, len: 1 };
        }
        if run.len > 0 && !self.space.mark(run) {
            return Err(OpenError::DoubleUse { block: run.start });
        }
        Ok(mask)
    }

    /// Everything is known: the log's blocks, its end, and a place for what follows.
    fn end_of_pages(&mut self, env: &mut dyn Env, o: &mut Opening) -> Result<(), OpenError> {
        let until = o.marked.saturating_add(LOG_BLOCKS_STEP).min(self.active.log_blocks.len());
        for at in o.marked..until {
            let block = self.active.log_blocks.get(at).copied().unwrap_or_default();
            self.use_block(block)?;
        }
        o.marked = until;
        if until < self.active.log_blocks.len() {
            self.pause(env, END);
            return Ok(());
        }
        self.use_block(o.next)?;
        self.log.head = Run { start: o.next, len: 1 };
        let want = (self.space.free_blocks() / 32).min(1023);
        self.log.head.len += self.space.take_at(o.next + 1, want);
        self.space.set_cursor(self.log.head.start + self.log.head.len);
        self.log.next_number = o.last + 1;
        self.log.durable = o.last;
        self.log.named = o.last;
        o.report.objects = self.index.objects();
        self.submit(env, OpKind::Open { a: FLUSH, b: 0 }, DiskOp::Flush);
        Ok(())
    }

    fn open_incarnation(&mut self, env: &mut dyn Env, o: &Opening) {
        let next = SliceSuper {
            number: self.superblock.number + 1,
            incarnation: self.superblock.incarnation + 1,
            cut: o.last,
            ..self.superblock
        };
        self.superblock = next;
        self.set_next_super(next);
        self.write_super(env, 0);
    }

    pub(crate) fn opening_super_written(&mut self, env: &mut dyn Env, result: Result<(), DiskError>) {
        if let Err(error) = result {
            self.open_failed(OpenError::Disk(error));
            return;
        }
        let Some(o) = self.opening.as_mut() else { return };
        o.superblocks += 1;
        if o.superblocks == 1 {
            self.write_super(env, 1);
            return;
        }
        let report = o.report;
        self.opening = None;
        self.life = Life::Running;
        self.events.push_back(StoreEvent::Opened(Ok(report)));
    }
}
