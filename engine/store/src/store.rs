//! `SliceStore`: the pieces together, its operations in flight, and the dispatch of completions.

use std::collections::VecDeque;

use reactor::{DiskError, DiskIndex, DiskOp, Env, IoBuf, Mono, Token};
use wire::{BLOCK_BYTES, ObjectId};

use crate::alloc::Bitmap;
use crate::cache::{Cache, Lookup, PageTable};
use crate::checkpoint::Checkpoint;
use crate::groups::Groups;
use crate::index::Index;
use crate::open::Opening;
use crate::overlay::Overlay;
use crate::planted::Bug;
use crate::read::Reads;
use crate::superblock::SliceSuper;
use crate::types::*;
use crate::write::Log;

/// Buffers a fresh vector has room for: a usual batch, so that vectors stop growing early.
const VEC_BUFS: usize = 64;

/// What a device operation in flight is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OpKind {
    /// Not in use.
    Idle,
    /// A part of a commit.
    Commit { number: u64, first: bool },
    /// A part of a read: blocks `at .. at + n` of its output.
    Part { read: u32, at: u8, n: u8, whole: bool },
    /// A page into a frame.
    Page { frame: u32 },
    /// A write of a checkpoint's pages or nodes.
    Checkpoint,
    /// The flush before a superblock.
    CheckpointFlush,
    /// A superblock copy.
    Super,
    /// A read of a superblock copy by which the device shows that it is there.
    Probe,
    /// Something of the opening; what it is, is the opening's business.
    Open { a: u32, b: u32 },
}

/// Whether the store serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Life {
    Opening,
    Running,
    Closing,
    Closed,
    Failed(StoreError),
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) commits: u64,
    pub(crate) mutations: u64,
    pub(crate) checkpoints: u64,
    pub(crate) written_bytes: u64,
    pub(crate) written_data_bytes: u64,
    pub(crate) device_writes: u64,
    pub(crate) device_reads: u64,
    pub(crate) read_bytes: u64,
    pub(crate) corrupt: u64,
    pub(crate) device_ops: u64,
    pub(crate) device_wait_ns: u64,
    pub(crate) device_busy_ns: u64,
    /// Probes that have failed since the last one that did not.
    pub(crate) probes_failed: u32,
}

/// Operations in flight and those that wait for room.
pub(crate) struct Ops {
    pub(crate) kinds: Vec<OpKind>,
    pub(crate) free: Vec<u32>,
    /// Operations without a token yet, or refused by the environment.
    pub(crate) backlog: VecDeque<(OpKind, DiskOp)>,
    limit: u32,
    /// When each was given to the environment, by token.
    pub(crate) started: Vec<Mono>,
    /// Since when there has always been one under way.
    pub(crate) busy_since: Mono,
}

/// A slice, open or opening.
pub struct SliceStore {
    pub(crate) disk: DiskIndex,
    pub(crate) geometry: SliceGeometry,
    pub(crate) options: StoreOptions,
    tokens: TokenRange,
    pub(crate) life: Life,
    pub(crate) superblock: SliceSuper,
    pub(crate) blocks: u64,
    pub(crate) space: Bitmap,
    pub(crate) index: Index,
    pub(crate) groups: Groups,
    pub(crate) active: Overlay,
    pub(crate) frozen: Overlay,
    pub(crate) table: PageTable,
    pub(crate) cache: Cache,
    pub(crate) log: Log,
    pub(crate) reads: Reads,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) opening: Option<Box<Opening>>,
    pub(crate) ops: Ops,
    /// Emptied buffer vectors for the next writes.
    pub(crate) vecs: Vec<Vec<IoBuf>>,
    /// Where the data of the mutation at hand lies, kept for reuse.
    pub(crate) runs: Option<Box<crate::commit::Runs>>,
    pub(crate) events: VecDeque<StoreEvent>,
    pub(crate) counters: Counters,
    /// Nobody waits for the device any more: completions only bring memory back.
    pub(crate) abandoned: bool,
}

/// Blocks kept for eager reuse: writes of several blocks cannot use them.
const EAGER_BLOCKS_MAX: usize = 64;

impl SliceStore {
    /// Starts opening a slice; `StoreEvent::Opened` tells the end. Until then operations are refused.
    pub fn open(
        env: &mut dyn Env,
        disk: DiskIndex,
        geometry: SliceGeometry,
        options: StoreOptions,
        tokens: TokenRange,
    ) -> Self {
        let blocks = geometry.len / BLOCK_BYTES as u64;
        let fits = crate::superblock::usable(geometry.offset, geometry.len) && tokens.count >= TOKENS_MIN;
        let blocks = if fits { blocks } else { 64 };
        let mut store = Self {
            disk,
            geometry,
            options,
            tokens,
            life: Life::Opening,
            superblock: SliceSuper {
                cluster: Default::default(),
                disk: Default::default(),
                slice: geometry.slice,
                blocks,
                number: 0,
                incarnation: 0,
                cut: 0,
                checkpoint: 0,
                log: 2,
                root: 0,
                root_crc: 0,
                pages: 0,
            },
            blocks,
            space: Bitmap::new(blocks, 2),
            index: Index::new(blocks),
            groups: Groups::new(options.history_changes),
            active: Overlay::new(),
            frozen: Overlay::new(),
            table: PageTable::new(),
            cache: Cache::new(options.page_cache_bytes),
            log: Log::new(),
            reads: Reads::new(),
            checkpoint: Checkpoint::new(),
            opening: None,
            ops: Ops {
                kinds: Vec::new(),
                free: Vec::new(),
                backlog: VecDeque::new(),
                limit: tokens.count,
                started: Vec::new(),
                busy_since: Mono(0),
            },
            abandoned: false,
            vecs: Vec::new(),
            runs: None,
            events: VecDeque::with_capacity(1024),
            counters: Counters::default(),
        };
        if fits {
            store.start_opening(env);
        } else {
            store.life = Life::Failed(StoreError::Invalid);
            store.events.push_back(StoreEvent::Opened(Err(OpenError::Geometry)));
        }
        store
    }

    /// The slice this is.
    pub fn geometry(&self) -> SliceGeometry {
        self.geometry
    }

    /// The superblock as last read or written.
    pub fn superblock(&self) -> &SliceSuper {
        &self.superblock
    }

    /// Takes the next event. Call until `None` after `on_event` and `flush`.
    pub fn poll(&mut self) -> Option<StoreEvent> {
        let event = self.events.pop_front();
        if event.is_none() {
            // Back to its beginning: the next events find memory that is in the cache.
            self.events.clear();
        }
        event
    }

    /// A completion whose token lies in this store's range.
    pub fn on_event(&mut self, env: &mut dyn Env, token: Token, result: Result<(), DiskError>, op: DiskOp) {
        let Some(kind) = self.finish_op(token, env.now()) else { return };
        if self.abandoned {
            return;
        }
        match (kind, op) {
            (OpKind::Commit { number, first }, DiskOp::Write { bufs, .. }) => {
                self.commit_written(number, first, bufs, result);
            }
            (OpKind::Part { read, at, n, whole }, DiskOp::Read { buf, .. }) => {
                self.part_read(env, read, usize::from(at), usize::from(n), whole, buf, result);
            }
            (OpKind::Page { frame }, DiskOp::Read { buf, .. }) => self.page_read(env, frame, buf, result),
            (OpKind::Checkpoint, DiskOp::Write { bufs, .. }) => {
                self.recycle(bufs);
                self.checkpoint_written(result);
            }
            (OpKind::CheckpointFlush, _) => self.checkpoint_flushed(env, result),
            (OpKind::Super, DiskOp::Write { bufs, .. }) => {
                self.recycle(bufs);
                self.super_written(env, result);
            }
            (OpKind::Probe, _) => self.probed(result),
            (OpKind::Open { a, b }, op) => self.opening_event(env, a, b, result, op),
            _ => {}
        }
        self.drain_backlog(env);
        self.resume_parked(env);
        self.step_checkpoint(env);
    }

    /// Closes the group commit of what was submitted since the last call, and sends it out. Call once after
    /// every batch of events.
    pub fn flush(&mut self, env: &mut dyn Env) {
        self.drain_backlog(env);
        self.start_fresh(env);
        if matches!(self.life, Life::Running | Life::Closing) {
            self.maybe_start_checkpoint();
            self.submit_commits(env);
            self.step_checkpoint(env);
            if self.life == Life::Closing {
                self.finish_release();
            }
            self.finish_closing();
        }
        self.resume_parked(env);
    }

    /// Whether device operations wait for room in the core's disk queue. The queue belongs to all stores of
    /// the core, so that another store's completion may be what makes room: `flush` must be called then.
    pub fn has_backlog(&self) -> bool {
        !self.ops.backlog.is_empty()
    }

    /// Ends the store: what is queued becomes durable, then everything is checkpointed, then
    /// `StoreEvent::Closed`. New operations are refused from now on.
    pub fn close(&mut self, env: &mut dyn Env) {
        match self.life {
            Life::Running => {
                self.life = Life::Closing;
                self.flush(env);
            }
            Life::Closing | Life::Closed => {}
            Life::Opening => {
                self.life = Life::Closed;
                self.opening = None;
                self.events.push_back(StoreEvent::Closed(Ok(())));
            }
            Life::Failed(why) => self.events.push_back(StoreEvent::Closed(Err(why))),
        }
    }

    fn finish_closing(&mut self) {
        if self.life == Life::Closing
            && self.log.is_idle()
            && self.checkpoint.is_idle()
            && self.active.is_empty()
            && self.reads.in_progress() == 0
        {
            self.life = Life::Closed;
            self.events.push_back(StoreEvent::Closed(Ok(())));
        }
    }

    /// What the slice knows of an object, mutations not yet durable included.
    pub fn lookup(&self, object: ObjectId) -> Presence {
        self.index.find(object).map_or(Presence::Absent, |slot| self.index.presence(slot))
    }

    /// Which blocks of an object are written, mutations not yet durable included.
    pub fn written_mask(&self, object: ObjectId) -> u32 {
        self.index.find(object).map_or(0, |slot| self.index.mask(slot))
    }

    /// Lists objects that `filter` accepts, in no particular order, looking at no more than `max` slots.
    /// Appends to `out`; returns where to go on, `None` at the end. Objects made or removed meanwhile may or
    /// may not be listed; all others are, once.
    pub fn list(
        &self,
        cursor: ListCursor,
        max: u32,
        mut filter: impl FnMut(&ObjectId) -> bool,
        out: &mut Vec<ListEntry>,
    ) -> Option<ListCursor> {
        let end = cursor.0.saturating_add(max.max(1)).min(self.index.slots());
        for slot in cursor.0..end {
            let (version, tombstone) = match self.index.presence(slot) {
                Presence::Absent => continue,
                Presence::Live(version) => (version, false),
                Presence::Tombstone(version) => (version, true),
            };
            if let Some(object) = self.index.object(slot)
                && filter(&object)
            {
                out.push(ListEntry { object, version, tombstone });
            }
        }
        (end < self.index.slots()).then_some(ListCursor(end))
    }

    /// Bytes in use and bytes that can be had, superseded ones among the latter.
    pub fn space(&self) -> (u64, u64) {
        let free = self.available() + self.log.recyclable() + self.superseded();
        let block = BLOCK_BYTES as u64;
        (self.blocks.saturating_sub(free) * block, free * block)
    }

    /// Blocks that only a checkpoint frees.
    fn superseded(&self) -> u64 {
        self.active.unsettled + self.frozen.unsettled
    }

    /// Counters and gauges.
    pub fn stats(&self) -> StoreStats {
        let block = BLOCK_BYTES as u64;
        let free_bytes = (self.available() + self.log.recyclable()) * block;
        StoreStats {
            objects: self.index.objects(),
            tombstones: self.index.tombstones(),
            data_blocks: self.index.data_blocks(),
            used_bytes: (self.blocks * block).saturating_sub(free_bytes),
            superseded_bytes: self.superseded() * block,
            free_bytes,
            reserve_bytes: self.reserve() * block,
            commits: self.counters.commits,
            mutations: self.counters.mutations,
            checkpoints: self.counters.checkpoints,
            written_bytes: self.counters.written_bytes,
            written_data_bytes: self.counters.written_data_bytes,
            device_writes: self.counters.device_writes,
            device_reads: self.counters.device_reads,
            read_bytes: self.counters.read_bytes,
            page_hits: self.cache.hits,
            page_misses: self.cache.misses,
            in_flight: (self.ops.under_way() + self.ops.backlog.len()) as u64,
            device_ops: self.counters.device_ops,
            device_wait_ns: self.counters.device_wait_ns,
            device_busy_ns: self.counters.device_busy_ns,
            reads: self.reads.in_progress() as u64,
            corrupt: self.counters.corrupt,
            index_bytes: (self.index.bytes() + self.groups.bytes() + self.space.bytes() + self.table.bytes())
                as u64,
            overlay_bytes: (self.active.bytes() + self.frozen.bytes()) as u64,
            cache_bytes: self.cache.bytes() as u64,
            log_blocks: (self.active.log_blocks.len() + self.frozen.log_blocks.len()) as u64,
        }
    }

    /// Whether the store serves, and if not, why.
    pub fn state(&self) -> Result<(), StoreError> {
        match self.life {
            Life::Running => Ok(()),
            Life::Failed(why) => Err(why),
            Life::Opening | Life::Closing | Life::Closed => Err(StoreError::NotOpen),
        }
    }

    #[inline]
    pub(crate) fn bug(&self, bug: Bug) -> bool {
        #[cfg(feature = "planted")]
        return self.options.planted == Some(bug);
        #[cfg(not(feature = "planted"))]
        {
            let _ = bug;
            false
        }
    }

    /// Whether freed blocks go to the next write at once (test switch; planted reuse needs it to show).
    #[inline]
    fn reuses_eagerly(&self) -> bool {
        #[cfg(feature = "planted")]
        return self.options.eager_reuse
            || matches!(self.options.planted, Some(Bug::ReuseTooEarly | Bug::ReuseWhenDurable));
        #[cfg(not(feature = "planted"))]
        false
    }

    /// Gives a superseded block back.
    #[inline]
    pub(crate) fn free_superseded(&mut self, block: u64) {
        if self.reuses_eagerly() && self.log.eager.len() < EAGER_BLOCKS_MAX {
            self.log.eager.push(block);
        } else {
            self.space.release(block);
        }
    }

    /// Byte on the disk of a block of the slice.
    pub(crate) fn byte_of(&self, block: u64) -> u64 {
        self.geometry.offset + block * BLOCK_BYTES as u64
    }

    /// Sends an operation out, or queues it when a bound is reached.
    pub(crate) fn submit(&mut self, env: &mut dyn Env, kind: OpKind, op: DiskOp) {
        match &op {
            DiskOp::Write { bufs, .. } => {
                self.counters.device_writes += 1;
                self.counters.written_bytes += bufs.iter().map(|b| b.len() as u64).sum::<u64>();
            }
            DiskOp::Read { buf, .. } => {
                self.counters.device_reads += 1;
                self.counters.read_bytes += buf.len() as u64;
            }
            _ => {}
        }
        if self.ops.backlog.is_empty() {
            if let Some((kind, op)) = self.try_submit(env, kind, op) {
                self.ops.backlog.push_back((kind, op));
            }
        } else {
            self.ops.backlog.push_back((kind, op));
        }
    }

    fn try_submit(&mut self, env: &mut dyn Env, kind: OpKind, op: DiskOp) -> Option<(OpKind, DiskOp)> {
        let id = match self.ops.free.pop() {
            Some(id) => id,
            None if (self.ops.kinds.len() as u32) < self.ops.limit => {
                self.ops.kinds.push(OpKind::Idle);
                self.ops.kinds.len() as u32 - 1
            }
            None => return Some((kind, op)),
        };
        match env.submit(self.disk, op, Token(self.tokens.first + u64::from(id))) {
            Ok(()) => {
                self.op_started(id, env.now());
                if let Some(to) = self.ops.kinds.get_mut(id as usize) {
                    *to = kind;
                }
                None
            }
            Err((_, op)) => {
                self.ops.free.push(id);
                Some((kind, op))
            }
        }
    }

    /// What an operation in flight is for.
    #[inline]
    pub(crate) fn op_kind(&self, token: Token) -> Option<OpKind> {
        self.ops.kinds.get(token.0.checked_sub(self.tokens.first)? as usize).copied()
    }

    fn finish_op(&mut self, token: Token, now: Mono) -> Option<OpKind> {
        let id = token.0.checked_sub(self.tokens.first)?;
        let kind = std::mem::replace(self.ops.kinds.get_mut(id as usize)?, OpKind::Idle);
        if kind == OpKind::Idle {
            return None;
        }
        self.ops.free.push(id as u32);
        self.op_ended(id as usize, now);
        Some(kind)
    }

    fn drain_backlog(&mut self, env: &mut dyn Env) {
        while let Some((kind, op)) = self.ops.backlog.pop_front() {
            if let Some(back) = self.try_submit(env, kind, op) {
                self.ops.backlog.push_front(back);
                return;
            }
        }
    }

    /// An empty vector for buffers.
    pub(crate) fn take_vec(&mut self) -> Vec<IoBuf> {
        self.vecs.pop().unwrap_or_else(|| Vec::with_capacity(VEC_BUFS))
    }

    /// Takes a vector back.
    pub(crate) fn recycle(&mut self, mut bufs: Vec<IoBuf>) {
        bufs.clear();
        self.vecs.push(bufs);
    }

    /// A buffer from the arena, or from the heap when the arena is exhausted: internal work must not stall
    /// on back-pressure meant for clients.
    pub(crate) fn buffer(env: &mut dyn Env, len: usize) -> Option<IoBuf> {
        env.alloc(len).or_else(|_| IoBuf::heap(len)).ok()
    }

    /// Stops the store: every mutation not yet acknowledged fails.
    pub(crate) fn fail(&mut self, why: StoreError) {
        if matches!(self.life, Life::Failed(_)) {
            return;
        }
        tracing::error!(slice = self.geometry.slice.0, error = %why, "store failed");
        let closing = self.life == Life::Closing;
        self.life = Life::Failed(why);
        self.fail_commits(why);
        if closing {
            self.events.push_back(StoreEvent::Closed(Err(why)));
        }
    }

    /// Asks for a page; `Some(frame)` when it is there, else a read is under way or frames are short.
    pub(crate) fn want_page(&mut self, env: &mut dyn Env, page: u32) -> Option<u32> {
        match self.cache.lookup(page) {
            Lookup::Ready(frame) => Some(frame),
            Lookup::Loading | Lookup::Full => None,
            Lookup::Load(frame, buf) => {
                let at = self.table.get(page);
                let op = DiskOp::Read { offset: self.byte_of(at.addr), buf };
                self.submit(env, OpKind::Page { frame }, op);
                None
            }
        }
    }

    fn page_read(&mut self, env: &mut dyn Env, frame: u32, buf: IoBuf, result: Result<(), DiskError>) {
        let page = self.cache.page_of(frame);
        let at = self.table.get(page);
        let error = if result.is_err() {
            Some(StoreError::Io)
        } else if crate::page::check_page(buf.as_slice(), self.geometry.slice, page, at.crc).is_err() {
            Some(StoreError::Corrupt)
        } else {
            None
        };
        self.cache.loaded(frame, Some(buf), error.is_none());
        if let Some(error) = error {
            self.counters.corrupt += u64::from(error == StoreError::Corrupt);
            self.page_failed(env, page, error);
        }
    }
}
