//! The core's slices: opening their stores, giving them their completions, hearing their events.

use crate::config::{DataCoreConfig, SLICES_MAX, SliceConfig};
use crate::core::{DataCore, Life, TOKEN_SLICES, ticket};
use crate::disk_health::{Extent, Watch};
use crate::metrics::{CoreMetrics, SliceMetrics};
use crate::msg::{CoreMsg, Opened};
use crate::planted::Bug;
use crate::slab::{KEY_BITS, Key};
use placement::SliceStat;
use reactor::{ConnId, DiskError, DiskIndex, DiskOp, Env, Frame, Token};
use std::collections::VecDeque;
use std::sync::Arc;
use store::{SliceStore, StoreError, StoreEvent, StoreOptions, StoreStats, TokenRange};
use wire::SliceId;

/// Disk operations one store may have in flight: twice its reads, so that reads of several parts and the
/// commits beside them find tokens.
const TOKENS_PER_SLICE: u32 = 4096;

/// Where a slice stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum SliceLife {
    Opening,
    Open,
    /// It cannot serve, and why.
    Failed(String),
    Closed,
}

/// A slice of this core.
pub(crate) struct SliceState {
    pub(crate) id: SliceId,
    config: SliceConfig,
    tokens: TokenRange,
    pub(crate) store: Option<SliceStore>,
    pub(crate) life: SliceLife,
    /// Sub-operations that wait for room in the store, in order; later ones queue behind.
    pub(crate) parked: VecDeque<(ConnId, Frame)>,
    /// Something was submitted since the last flush.
    pub(crate) has_unflushed: bool,
    /// What its device has shown.
    pub(crate) watch: Watch,
    pub(crate) metrics: Arc<SliceMetrics>,
    reported: Option<(SliceStat, u64)>,
}

impl SliceState {
    pub(crate) fn new(at: usize, config: &SliceConfig, metrics: &CoreMetrics) -> Self {
        let first = u64::from(TOKEN_SLICES + at as u8) << KEY_BITS;
        Self {
            id: config.geometry.slice,
            config: *config,
            tokens: TokenRange { first, count: TOKENS_PER_SLICE },
            store: None,
            life: SliceLife::Opening,
            parked: VecDeque::new(),
            has_unflushed: false,
            watch: Watch::default(),
            metrics: metrics.slice(config.geometry.slice),
            reported: None,
        }
    }

    fn open(&mut self, env: &mut dyn Env, core: &DataCoreConfig) {
        let options = StoreOptions { cluster: Some(core.cluster), ..core.store };
        let store = SliceStore::open(env, self.config.disk, self.config.geometry, options, self.tokens);
        self.store = Some(store);
        self.has_unflushed = true;
    }

    /// Something was submitted since the last flush, or waits for room in the core's disk queue.
    fn wants_flush(&self) -> bool {
        self.has_unflushed || self.store.as_ref().is_some_and(SliceStore::has_backlog)
    }

    pub(crate) fn disk(&self) -> DiskIndex {
        self.config.disk
    }

    /// The open store, for an operation that the next flush sends out.
    pub(crate) fn open_store(&mut self) -> Result<&mut SliceStore, StoreError> {
        match (&self.life, &mut self.store) {
            (SliceLife::Open, Some(store)) => {
                self.has_unflushed = true;
                Ok(store)
            }
            (SliceLife::Failed(_), _) => Err(StoreError::Io),
            _ => Err(StoreError::NotOpen),
        }
    }

    pub(crate) fn close(&mut self, env: &mut dyn Env) {
        match (&self.life, &mut self.store) {
            (SliceLife::Open, Some(store)) => {
                store.close(env);
                self.has_unflushed = true;
            }
            (SliceLife::Opening, Some(store)) => {
                store.close(env);
                self.life = SliceLife::Closed;
            }
            _ => {}
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.life, SliceLife::Closed | SliceLife::Failed(_)) || self.store.is_none()
    }

    /// See `Opened::generation`.
    fn generation(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.superblock().number)
    }

    fn stats(&self) -> StoreStats {
        self.store.as_ref().map(SliceStore::stats).unwrap_or_default()
    }

    fn stat(&self, stats: &StoreStats) -> SliceStat {
        SliceStat {
            size_bytes: stats.used_bytes + stats.free_bytes,
            used_bytes: stats.used_bytes.saturating_sub(stats.superseded_bytes),
            objects: stats.objects - stats.tombstones.min(stats.objects),
            service_us: self.watch.service_us(),
            read_errors: self.watch.errors(),
            state: match &self.life {
                SliceLife::Opening => "opening".to_owned(),
                SliceLife::Open => "open".to_owned(),
                SliceLife::Failed(why) => format!("failed: {why}"),
                SliceLife::Closed => "closed".to_owned(),
            },
        }
    }
}

impl DataCore {
    pub(crate) fn open_slices(&mut self, env: &mut dyn Env) {
        for slice in &mut self.slices {
            slice.open(env, &self.config);
        }
    }

    /// Slices of a disk that has come while the core runs: opened in steps like those of the start, beside everything.
    pub(crate) fn take_slices(&mut self, env: &mut dyn Env, slices: Vec<SliceConfig>) {
        for config in slices {
            let (slice, at) = (config.geometry.slice, self.slices.len());
            let why = match (at < SLICES_MAX, self.slice_at(slice), self.life) {
                (_, _, life) if life != Life::Running => "the node is stopping".to_owned(),
                (_, Some(_), _) => {
                    "this process had the slice before: restart the node to take it again".to_owned()
                }
                (false, _, _) => format!("the core has {SLICES_MAX} slices, and that is the most"),
                _ => {
                    let mut state = SliceState::new(at, &config, &self.metrics);
                    state.open(env, &self.config);
                    self.slices.push(state);
                    continue;
                }
            };
            tracing::error!(%slice, why, "a slice is not taken");
            self.tell(CoreMsg::SliceOpened { slice, result: Err(why) });
        }
    }

    /// The store of the slice at `at`, for an operation.
    pub(crate) fn store(&mut self, at: usize) -> Result<&mut SliceStore, StoreError> {
        self.slices.get_mut(at).ok_or(StoreError::NotOpen)?.open_store()
    }

    /// The same for looking things up only.
    pub(crate) fn store_ref(&self, at: usize) -> Option<&SliceStore> {
        self.slices.get(at)?.store.as_ref()
    }

    pub(crate) fn disk_done(
        &mut self,
        env: &mut dyn Env,
        token: Token,
        result: Result<(), DiskError>,
        op: DiskOp,
    ) {
        let Some(at) = ((token.0 >> KEY_BITS) as u8).checked_sub(TOKEN_SLICES) else { return };
        let at = usize::from(at);
        // No later operation can succeed, whatever this one was.
        if let Err(error @ (DiskError::Gone | DiskError::Truncated)) = result {
            self.give_up(env, at, error.to_string(), Extent::Disk);
        }
        let Some(slice) = self.slices.get_mut(at) else { return };
        let Some(store) = slice.store.as_mut() else { return };
        store.on_event(env, token, result, op);
        slice.has_unflushed = true;
        self.drain_store(env, at);
    }

    /// Flushes every store that was given something, or that waits for room in the core's disk queue, which
    /// any other store's completion may have made; true when that brought events.
    pub(crate) fn flush_stores(&mut self, env: &mut dyn Env) -> bool {
        let mut any = false;
        // All of the core's at once: see there.
        for store in self.slices.iter_mut().filter_map(|slice| slice.store.as_mut()) {
            store.locate_fresh();
        }
        for at in 0..self.slices.len() {
            let Some(slice) = self.slices.get_mut(at) else { continue };
            if !slice.wants_flush() {
                continue;
            }
            slice.has_unflushed = false;
            if let Some(store) = slice.store.as_mut() {
                store.flush(env);
            }
            any |= self.drain_store(env, at);
        }
        any
    }

    fn drain_store(&mut self, env: &mut dyn Env, at: usize) -> bool {
        let mut any = false;
        while let Some(event) =
            self.slices.get_mut(at).and_then(|s| s.store.as_mut()).and_then(SliceStore::poll)
        {
            any = true;
            self.store_event(env, at, event);
        }
        self.check_store(env, at);
        any
    }

    /// A store may stop with nobody waiting for it: while it writes a checkpoint, say.
    fn check_store(&mut self, env: &mut dyn Env, at: usize) {
        if self.bug(Bug::StoppedStoreUnnoticed) {
            return;
        }
        let Some(slice) = self.slices.get(at).filter(|slice| slice.life == SliceLife::Open) else { return };
        if let Some(error) = slice.store.as_ref().and_then(SliceStore::failure) {
            let device = matches!(error, StoreError::Failed(_) | StoreError::Io);
            let extent = if device { Extent::DiskWhereSpared } else { Extent::Slice };
            self.give_up(env, at, error.to_string(), extent);
        }
    }

    fn store_event(&mut self, env: &mut dyn Env, at: usize, event: StoreEvent) {
        match event {
            StoreEvent::Done { ticket, result } => {
                let (class, key) = Key::untag(ticket);
                if let Err(error) = result {
                    self.store_failure(env, at, error);
                }
                match class {
                    ticket::OP => self.local_done(env, key, result),
                    ticket::SUB => self.sub_done(env, key, result),
                    ticket::HEAL_STORE => self.heal_stored(env, key, result),
                    ticket::ERASE => self.erased(result),
                    _ => {}
                }
            }
            StoreEvent::Read { ticket, result } => {
                let (_, key) = Key::untag(ticket);
                if let Err(error) = &result {
                    self.read_failure(env, at, *error);
                }
                self.read_done(env, key, result);
            }
            StoreEvent::Object { ticket, result } => {
                let (class, key) = Key::untag(ticket);
                if let Err(error) = &result {
                    self.read_failure(env, at, *error);
                }
                match class {
                    ticket::HEAL_READ => self.heal_read_done(env, key, result),
                    ticket::SCRUB => self.check_read_done(env, key, result),
                    ticket::SUB => self.sub_read_done(env, key, result),
                    _ => {}
                }
            }
            StoreEvent::Opened(result) => self.slice_opened(env, at, result),
            StoreEvent::Closed(_) => {
                if let Some(slice) = self.slices.get_mut(at) {
                    slice.life = SliceLife::Closed;
                }
            }
        }
    }

    fn slice_opened(
        &mut self,
        env: &mut dyn Env,
        at: usize,
        result: Result<store::OpenReport, store::OpenError>,
    ) {
        let Some(slice) = self.slices.get_mut(at) else { return };
        if slice.life != SliceLife::Opening {
            return;
        }
        let id = slice.id;
        let result = match result {
            Ok(report) => {
                tracing::info!(slice = %id, objects = report.objects, commits = report.commits, "slice is open");
                slice.life = SliceLife::Open;
                let generation = slice.generation();
                Ok(Opened { size_bytes: slice.stat(&slice.stats()).size_bytes, generation })
            }
            Err(error) => {
                tracing::error!(slice = %id, disk = slice.disk().0, %error, "slice does not open");
                slice.life = SliceLife::Failed(error.to_string());
                Err(error.to_string())
            }
        };
        self.tell(CoreMsg::SliceOpened { slice: id, result });
        self.reconsider_all(env);
    }

    /// Counts a store's error; when the store itself has stopped, the slice has failed.
    fn store_failure(&mut self, env: &mut dyn Env, at: usize, error: StoreError) {
        if let Some(slice) = self.slices.get(at) {
            let metrics = &slice.metrics;
            match error {
                StoreError::Corrupt => metrics.corrupt.add(1),
                StoreError::Busy | StoreError::NotOpen | StoreError::Abandoned => {}
                _ => metrics.failures.add(1),
            }
        }
        self.check_store(env, at);
    }

    /// A read met an unreadable or damaged block.
    fn read_failure(&mut self, env: &mut dyn Env, at: usize, error: StoreError) {
        if matches!(error, StoreError::Corrupt | StoreError::Io)
            && let Some(slice) = self.slices.get_mut(at)
        {
            slice.watch.read_error();
        }
        self.store_failure(env, at, error);
    }

    /// Lets stores with nothing under way settle what they have written last.
    pub(crate) fn rest_stores(&mut self) {
        for slice in &mut self.slices {
            if slice.life == SliceLife::Open
                && let Some(store) = slice.store.as_mut()
            {
                store.rest();
                slice.has_unflushed = true;
            }
        }
    }

    /// Reports every slice whose numbers changed.
    pub(crate) fn slice_stats(&mut self) {
        for at in 0..self.slices.len() {
            let Some(slice) = self.slices.get_mut(at) else { continue };
            let memory = slice.stats();
            let stat = slice.stat(&memory);
            let metrics = &slice.metrics;
            metrics.open.set(u64::from(slice.life == SliceLife::Open));
            metrics.size_bytes.set(stat.size_bytes);
            metrics.used_bytes.set(stat.used_bytes);
            metrics.objects.set(stat.objects);
            metrics.memory_bytes.set(memory.index_bytes + memory.overlay_bytes + memory.cache_bytes);
            metrics.device_ops.set(memory.device_ops);
            metrics.device_wait_ns.set(memory.device_wait_ns);
            metrics.device_busy_ns.set(memory.device_busy_ns);
            let generation = slice.generation();
            if slice.reported.as_ref() != Some(&(stat.clone(), generation)) {
                slice.reported = Some((stat.clone(), generation));
                let slice = slice.id;
                self.tell(CoreMsg::SliceStat { slice, stat, generation });
            }
        }
    }
}
