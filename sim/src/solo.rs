//! One slice store alone on one disk: mutations, reads, kills and power cuts, judged against a model.
//!
//! Replication hides what a single store forgets, so the store has a scenario of its own. After every
//! crash, the reopened slice must hold exactly the state after some prefix of the accepted mutations, and
//! that prefix must contain every acknowledged one.

use crate::check::history::{Place, Value, fill, recognise};
use reactor::{DiskIndex, DiskInfo, DiskOp, Env, Event, IoBuf, Service, Token};
use simenv::clock::{MS, NodeClock, SEC, US};
use simenv::disk::DiskProfile;
use simenv::rng::Stream;
use simenv::universe::{CoreSpec, DiskId, HostId, SchedOptions, Step, Universe};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::rc::Rc;
use store::{
    DiskPlan, ListCursor, ObjectData, Presence, SliceGeometry, SliceStore, StoreError, StoreEvent,
    StoreOptions, TOKENS_MIN, TokenRange,
};
use wire::{
    BLOCK_BYTES, BlockCrcs, ClusterId, CoreId, DiskUuid, Epoch, ImageId, OBJECT_BLOCKS, ObjectId, PoolId,
    SliceId, Version,
};

/// What a seed decides about this scenario.
#[derive(Clone, Debug)]
pub struct SoloOptions {
    /// The seed.
    pub seed: u64,
    /// The disk.
    pub disk: DiskInfo,
    /// How fast it is.
    pub profile: DiskProfile,
    /// The core.
    pub sched: SchedOptions,
    /// Objects in use.
    pub objects: u64,
    /// Largest write in blocks.
    pub write_blocks_max: u32,
    /// Mutations under way, at most.
    pub depth: usize,
    /// Mean time between batches of mutations.
    pub pause_ns: u64,
    /// Mean time between crashes.
    pub crash_every_ns: u64,
    /// Crashes.
    pub crashes: u32,
    /// A crash is a power cut (else a kill) this often, parts per million.
    pub power_ppm: u32,
    /// See `StoreOptions`.
    pub dirty_objects_max: u32,
    /// See `StoreOptions`.
    pub page_cache_bytes: usize,
    /// See `StoreOptions`.
    pub eager_reuse: bool,
}

impl SoloOptions {
    /// What a seed decides.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Stream::new(seed, "solo");
        let rng = &mut rng;
        Self {
            seed,
            disk: DiskInfo {
                size_bytes: rng.weighted((3, 20 << 20), &[(2, 40 << 20)]),
                atomic_bytes: if rng.coin() { 512 } else { 4096 },
                write_through: rng.chance(300_000),
            },
            profile: DiskProfile {
                read_ns: rng.weighted((1, 60 * US), &[(1, 10 * US)]),
                write_ns: rng.weighted((1, 20 * US), &[(1, 300 * US), (1, 2 * MS)]),
                flush_ns: rng.weighted((1, 100 * US), &[(1, 3 * MS)]),
                block_ns: 500,
                queue_depth: rng.weighted((2, 1024), &[(1, 16)]),
            },
            sched: SchedOptions { batch_max: rng.weighted((2, 64), &[(1, 2)]), ..SchedOptions::default() },
            objects: rng.weighted((2, 10), &[(2, 60), (1, 400)]),
            write_blocks_max: rng.weighted((2, 4), &[(1, 1), (1, 32)]),
            depth: rng.weighted((2, 16), &[(1, 1), (1, 100)]),
            pause_ns: rng.weighted((2, 100 * US), &[(1, 20 * US), (1, 2 * MS)]),
            crash_every_ns: rng.weighted((2, 40 * MS), &[(1, 5 * MS), (1, 200 * MS)]),
            crashes: rng.between(4, 12) as u32,
            power_ppm: rng.weighted((2, 700_000), &[(1, 0), (1, 1_000_000)]),
            dirty_objects_max: rng.weighted((2, 4), &[(1, 50), (1, 65_536)]),
            page_cache_bytes: rng.weighted((1, 1 << 20), &[(1, 16 << 10)]),
            eager_reuse: rng.coin(),
        }
    }
}

impl fmt::Display for SoloOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#?}")
    }
}

/// An object after a mutation.
#[derive(Clone, PartialEq, Debug)]
struct State {
    presence: Presence,
    mask: u32,
    values: [Value; OBJECT_BLOCKS],
}

const ABSENT: State = State { presence: Presence::Absent, mask: 0, values: [0; OBJECT_BLOCKS] };

/// What should be there.
struct Model {
    /// Per object, the mutation (its number) and the state after it, in order. Never empty once touched.
    objects: BTreeMap<u64, Vec<(u64, State)>>,
    /// Number of the last accepted mutation.
    issued: u64,
    /// Highest acknowledged mutation.
    acked: u64,
    under_way: usize,
    reads: BTreeMap<u64, (u64, u64)>,
    next_value: Value,
    next_read: u64,
    violations: Vec<String>,
    opened: bool,
    closed: bool,
    checked: u64,
    mutations: u64,
    no_space: u64,
}

impl Model {
    fn state(&self, object: u64) -> State {
        self.objects.get(&object).and_then(|list| list.last()).map_or(ABSENT, |(_, state)| state.clone())
    }

    fn record(&mut self, object: u64, number: u64, state: State) {
        self.issued = number;
        self.mutations += 1;
        self.objects.entry(object).or_insert_with(|| vec![(0, ABSENT)]).push((number, state));
    }

    fn fail(&mut self, text: String) {
        self.violations.push(text);
    }
}

/// What the service is to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Open, compare everything with the model, then mutate at random.
    Work,
    /// Open, compare, delete and purge everything, close.
    Empty,
    /// Open and compare only.
    Look,
}

struct Solo {
    model: Rc<RefCell<Model>>,
    options: Rc<SoloOptions>,
    store_options: StoreOptions,
    geometry: SliceGeometry,
    store: Option<SliceStore>,
    rng: Stream,
    task: Task,
    audit: Option<Audit>,
    closing: bool,
}

/// The comparison after an open: which prefix of the mutations explains all objects.
struct Audit {
    waiting: BTreeMap<u64, u64>,
    /// Per object, the prefixes after which it is as it was found: from one mutation up to another. An object that was
    /// purged can be in the same state at several times.
    spans: Vec<Vec<(u64, u64)>>,
    found: BTreeMap<u64, State>,
}

impl Audit {
    /// Whether some prefix from `acked` on explains everything; else two mutations that contradict each other, of
    /// which the first is there and the second is not.
    fn explained(&self, acked: u64) -> Result<(), (u64, u64)> {
        let lows = self.spans.iter().flatten().map(|(low, _)| *low).filter(|low| *low > acked);
        let fits = |spans: &Vec<(u64, u64)>, prefix| {
            spans.iter().any(|(low, high)| (*low..=*high).contains(&prefix))
        };
        if lows.chain([acked]).any(|prefix| self.spans.iter().all(|spans| fits(spans, prefix))) {
            return Ok(());
        }
        let last = || self.spans.iter().filter_map(|spans| spans.last());
        let held = last().map(|(low, _)| *low).max().unwrap_or_default().max(acked);
        Err((held, last().map(|(_, high)| high.saturating_add(1)).min().unwrap_or_default()))
    }
}

const TIMER: Token = Token(0xaa << 56);
const TOKENS: TokenRange = TokenRange { first: 1, count: TOKENS_MIN };
const POOL: PoolId = PoolId(1);
const IMAGE: ImageId = ImageId(1);

fn object_id(index: u64) -> ObjectId {
    ObjectId { pool: POOL, image: IMAGE, index }
}

fn place(object: u64, block: usize) -> Place {
    Place { image: 0, block: object * OBJECT_BLOCKS as u64 + block as u64 }
}

impl Solo {
    fn store_event(&mut self, env: &mut dyn Env, event: StoreEvent) {
        match event {
            StoreEvent::Opened(Ok(_)) => self.begin_audit(),
            StoreEvent::Opened(Err(error)) => {
                self.model.borrow_mut().fail(format!("the slice does not open: {error}"));
            }
            StoreEvent::Done { ticket, result } => {
                let mut model = self.model.borrow_mut();
                model.under_way = model.under_way.saturating_sub(1);
                match result {
                    Ok(()) => model.acked = model.acked.max(ticket),
                    Err(error) => model.fail(format!("mutation {ticket} failed: {error}")),
                }
            }
            StoreEvent::Object { ticket, result } => self.object_read(env, ticket, result),
            StoreEvent::Read { .. } => {}
            StoreEvent::Closed(Ok(())) => self.model.borrow_mut().closed = true,
            StoreEvent::Closed(Err(error)) => self.model.borrow_mut().fail(format!("close failed: {error}")),
        }
    }

    fn begin_audit(&mut self) {
        let Some(store) = &mut self.store else { return };
        let mut listed = Vec::new();
        let mut cursor = Some(ListCursor::default());
        while let Some(at) = cursor {
            cursor = store.list(at, 1000, |_| true, &mut listed);
        }
        let mut model = self.model.borrow_mut();
        let mut audit = Audit { waiting: BTreeMap::new(), spans: Vec::new(), found: BTreeMap::new() };
        let mut known: Vec<u64> = model.objects.keys().copied().collect();
        for entry in &listed {
            if !known.contains(&entry.object.index) {
                model.fail(format!("{} is listed and was never made", entry.object));
            }
        }
        known.dedup();
        for object in known {
            let ticket = model.next_read;
            model.next_read += 1;
            match store.read_object(ticket, object_id(object)) {
                Ok(()) => {
                    audit.waiting.insert(ticket, object);
                }
                Err(error) => model.fail(format!("reading object {object} is refused: {error}")),
            }
        }
        drop(model);
        self.audit = Some(audit);
        self.end_audit();
    }

    fn object_read(&mut self, _env: &mut dyn Env, ticket: u64, result: Result<ObjectData, StoreError>) {
        let mut model = self.model.borrow_mut();
        let data = match result {
            Ok(data) => data,
            Err(error) => return model.fail(format!("reading an object failed: {error}")),
        };
        if let Some(audit) = &mut self.audit
            && let Some(object) = audit.waiting.remove(&ticket)
        {
            match decode(object, &data) {
                Ok(state) => {
                    let list = model.objects.get(&object).cloned().unwrap_or_default();
                    let spans: Vec<(u64, u64)> = list
                        .iter()
                        .enumerate()
                        .filter(|(_, (_, expected))| *expected == state)
                        .map(|(at, (number, _))| {
                            (*number, list.get(at + 1).map_or(u64::MAX, |(next, _)| next - 1))
                        })
                        .collect();
                    match spans.last().copied() {
                        Some((low, high)) => {
                            audit.found.insert(object, state);
                            audit.spans.push(spans);
                            if high < model.acked {
                                let acked = model.acked;
                                model.fail(format!(
                                    "object {object} is as it was after mutation {low}, but its mutation {} of {acked} acknowledged is lost",
                                    high + 1
                                ));
                            }
                        }
                        None => {
                            let expected = list.last().map(|(_, state)| state.presence);
                            model.fail(format!(
                                "object {object} is in a state it never had: {:?} {:08x}, expected {expected:?}",
                                state.presence, state.mask
                            ));
                        }
                    }
                }
                Err(why) => model.fail(why),
            }
            drop(model);
            self.end_audit();
            return;
        }
        // A read during work: it must be a state the object had between the read's begin and now.
        if let Some((object, since)) = model.reads.remove(&ticket) {
            match decode(object, &data) {
                Ok(state) => {
                    let list = model.objects.get(&object).cloned().unwrap_or_else(|| vec![(0, ABSENT)]);
                    let from = list.partition_point(|(number, _)| *number <= since).saturating_sub(1);
                    if !list.iter().skip(from).any(|(_, expected)| *expected == state) {
                        model.fail(format!(
                            "object {object} read as {:?} {:08x}, which it was not since mutation {since}",
                            state.presence, state.mask
                        ));
                    }
                }
                Err(why) => model.fail(why),
            }
        }
    }

    fn end_audit(&mut self) {
        if !self.audit.as_ref().is_some_and(|audit| audit.waiting.is_empty()) {
            return;
        }
        let Some(audit) = self.audit.take() else { return };
        let mut model = self.model.borrow_mut();
        if let Err((held, missed)) = audit.explained(model.acked)
            && model.violations.is_empty()
        {
            model.fail(format!(
                "no prefix of the mutations explains the slice: an object holds mutation {held}, another misses {missed}"
            ));
        }
        model.checked += 1;
        model.opened = true;
        // What the crash undid never happened.
        for (object, state) in audit.found {
            model.objects.insert(object, vec![(0, state)]);
        }
        model.issued = 0;
        model.acked = 0;
        model.under_way = 0;
        model.reads.clear();
        if let Some(store) = &self.store {
            let stats = store.stats();
            let live = |p: &Presence| matches!(p, Presence::Live(_));
            let states: Vec<State> = model.objects.keys().map(|object| model.state(*object)).collect();
            let blocks: u32 = states.iter().map(|s| s.mask.count_ones()).sum();
            let objects = states.iter().filter(|s| s.presence != Presence::Absent).count() as u64;
            let tombstones =
                states.iter().filter(|s| matches!(s.presence, Presence::Tombstone(_))).count() as u64;
            let _ = live;
            if (stats.data_blocks, stats.objects, stats.tombstones)
                != (u64::from(blocks), objects, tombstones)
            {
                model.fail(format!(
                    "counts differ: {} blocks, {} objects, {} tombstones, expected {blocks}, {objects}, {tombstones}",
                    stats.data_blocks, stats.objects, stats.tombstones
                ));
            }
        }
    }

    fn work(&mut self, env: &mut dyn Env) {
        let Some(store) = &mut self.store else { return };
        let mut model = self.model.borrow_mut();
        if !model.opened {
            return;
        }
        if self.task == Task::Empty {
            return empty(store, &mut model, env, &mut self.closing);
        }
        if self.task == Task::Look {
            return;
        }
        for _ in 0..self.rng.between(1, 6) {
            if model.under_way >= self.options.depth {
                break;
            }
            mutate(store, &mut model, env, &self.options, &mut self.rng);
        }
        if self.rng.coin() {
            let object = self.rng.below(self.options.objects);
            let ticket = model.next_read;
            model.next_read += 1;
            let since = model.issued;
            if store.read_object(ticket, object_id(object)).is_ok() {
                model.reads.insert(ticket, (object, since));
            }
        }
    }
}

fn decode(object: u64, data: &ObjectData) -> Result<State, String> {
    let mut state = State { presence: data.presence, mask: data.mask, values: [0; OBJECT_BLOCKS] };
    let bytes = data.data.as_ref().map_or(&[][..], |data| data.as_slice());
    if !data.crcs.matches(bytes) {
        return Err(format!("object {object}: bytes do not match the checksums given with them"));
    }
    let present = (0..OBJECT_BLOCKS).filter(|block| data.mask >> block & 1 == 1);
    for (block, chunk) in present.zip(bytes.chunks(BLOCK_BYTES)) {
        match (recognise(place(object, block), chunk), state.values.get_mut(block)) {
            (Some(value), Some(slot)) => *slot = value,
            _ => return Err(format!("object {object} block {block} holds bytes nobody wrote there")),
        }
    }
    Ok(state)
}

fn empty(store: &mut SliceStore, model: &mut Model, env: &mut dyn Env, closing: &mut bool) {
    let objects: Vec<u64> = model.objects.keys().copied().collect();
    let mut left = 0;
    for object in objects {
        let state = model.state(object);
        let number = model.issued + 1;
        let result = match state.presence {
            Presence::Absent => continue,
            Presence::Live(version) => {
                let version = Version { counter: version.counter + 1, ..version };
                store.delete(env, number, object_id(object), version).map(|()| Presence::Tombstone(version))
            }
            Presence::Tombstone(version) => {
                store.purge(env, number, object_id(object), version).map(|()| Presence::Absent)
            }
        };
        left += 1;
        match result {
            Ok(presence) => {
                model.under_way += 1;
                model.record(object, number, State { presence, ..ABSENT });
            }
            Err(StoreError::Busy) => break,
            Err(error) => return model.fail(format!("deleting object {object} is refused: {error}")),
        }
    }
    if left == 0 && model.under_way == 0 && !*closing {
        *closing = true;
        store.close(env);
    }
}

fn mutate(
    store: &mut SliceStore,
    model: &mut Model,
    env: &mut dyn Env,
    options: &SoloOptions,
    rng: &mut Stream,
) {
    let object = rng.below(options.objects);
    let before = model.state(object);
    let number = model.issued + 1;
    let counter = before.presence.version().map_or(0, |version| version.counter) + 1;
    let version = Version { epoch: Epoch(1), counter };
    let id = object_id(object);
    let mut after = State { presence: Presence::Live(version), ..before.clone() };
    let first = rng.below(OBJECT_BLOCKS as u64) as u32;
    let blocks = rng
        .between(1, u64::from(options.write_blocks_max).min(OBJECT_BLOCKS as u64 - u64::from(first)))
        as u32;
    let range = (first as usize)..(first + blocks) as usize;
    let mut grows = false;
    let result = match rng.below(100) {
        0..=74 => {
            let mut crcs = BlockCrcs::default();
            let Ok(mut data) = env.alloc(blocks as usize * BLOCK_BYTES) else { return };
            fill_range(model, &mut data, object, range, &mut after);
            for chunk in data.as_slice().chunks(BLOCK_BYTES) {
                crcs.push(wire::block_crc(chunk));
            }
            grows = after.mask != before.mask;
            store.write(env, number, id, version, first, &[data], &crcs)
        }
        75..=84 => {
            for block in range {
                after.mask &= !(1 << block);
                if let Some(value) = after.values.get_mut(block) {
                    *value = 0;
                }
            }
            grows = before.presence == Presence::Absent;
            store.zero(env, number, id, version, first, blocks)
        }
        85..=89 => {
            after = State { presence: Presence::Live(version), ..ABSENT };
            let Ok(mut data) = env.alloc(blocks as usize * BLOCK_BYTES) else { return };
            fill_range(model, &mut data, object, range, &mut after);
            grows = true;
            let crcs = BlockCrcs::of(data.as_slice());
            store.replace(env, number, id, version, after.mask, &[data], &crcs)
        }
        90..=95 => {
            after = State { presence: Presence::Tombstone(version), ..ABSENT };
            grows = before.presence == Presence::Absent;
            store.delete(env, number, id, version)
        }
        _ => {
            let Presence::Tombstone(version) = before.presence else { return };
            after = ABSENT;
            store.purge(env, number, id, version)
        }
    };
    match result {
        Ok(()) => {
            model.under_way += 1;
            model.record(object, number, after);
        }
        Err(StoreError::Busy) => {}
        Err(StoreError::NoSpace) if grows => model.no_space += 1,
        Err(error) => model.fail(format!("a mutation that needs no new space is refused: {error}")),
    }
}

fn fill_range(
    model: &mut Model,
    data: &mut IoBuf,
    object: u64,
    range: std::ops::Range<usize>,
    after: &mut State,
) {
    let Some(bytes) = data.as_mut_slice() else { return };
    for (block, chunk) in range.zip(bytes.chunks_mut(BLOCK_BYTES)) {
        model.next_value += 1;
        fill(model.next_value, place(object, block), chunk);
        after.mask |= 1 << block;
        if let Some(value) = after.values.get_mut(block) {
            *value = model.next_value;
        }
    }
}

impl Service for Solo {
    fn start(&mut self, env: &mut dyn Env) {
        self.store = Some(SliceStore::open(env, DiskIndex(0), self.geometry, self.store_options, TOKENS));
        env.set_timer(env.now(), TIMER);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { .. } => {
                let pause = self.rng.latency(self.options.pause_ns);
                env.set_timer(env.now().plus_ns(pause), TIMER);
                self.work(env);
            }
            Event::DiskDone { token, result, op, .. } => self.disk_done(env, token, result, op),
            _ => {}
        }
        self.drain(env);
    }

    fn flush(&mut self, env: &mut dyn Env) {
        while let Some(store) = &mut self.store {
            store.flush(env);
            if !self.drain(env) {
                break;
            }
        }
    }
}

impl Solo {
    fn disk_done(
        &mut self,
        env: &mut dyn Env,
        token: Token,
        result: Result<(), reactor::DiskError>,
        op: DiskOp,
    ) {
        if let Some(store) = &mut self.store {
            store.on_event(env, token, result, op);
        }
    }

    /// True when there was something.
    fn drain(&mut self, env: &mut dyn Env) -> bool {
        let mut any = false;
        while let Some(event) = self.store.as_mut().and_then(SliceStore::poll) {
            any = true;
            self.store_event(env, event);
        }
        any
    }
}

/// What a run of this scenario showed.
pub struct SoloOutcome {
    /// Empty when all was well.
    pub violations: Vec<String>,
    /// Hash of the history.
    pub trace_hash: u64,
    /// Virtual time that passed.
    pub virtual_ns: u64,
    /// Mutations accepted.
    pub mutations: u64,
}

const HOST: HostId = 0;
const DISK: DiskId = 0;
/// Opening, or emptying and closing, may take this long.
const PATIENCE_NS: u64 = 60 * SEC;
/// Blocks a store may keep for itself when it holds nothing: superblocks, the log's tail, a page map and
/// the pages of the slots that were ever used.
const EMPTY_BLOCKS_MAX: u64 = 600;

struct Run {
    universe: Universe,
    model: Rc<RefCell<Model>>,
    options: Rc<SoloOptions>,
    store_options: StoreOptions,
    geometry: SliceGeometry,
    rng: Stream,
}

/// Runs the scenario.
pub fn run(seed: u64, planted: Option<store::Bug>, trace: Option<(u64, u64)>) -> SoloOutcome {
    let options = Rc::new(SoloOptions::draw(seed));
    let mut universe = Universe::new(seed);
    universe.trace.verbose = trace;
    universe.sched = options.sched;
    universe.add_host(Ipv4Addr::new(10, 0, 0, 1), NodeClock::default());
    universe.add_disk(options.disk, options.profile);
    let plan = DiskPlan {
        cluster: ClusterId(1),
        disk: DiskUuid(1),
        node: None,
        disk_bytes: options.disk.size_bytes,
        slices: vec![SliceId(7)],
    };
    let mut geometry = SliceGeometry { slice: SliceId(7), offset: 0, len: 0 };
    if let (Ok(writes), Ok(layout)) = (plan.writes(), plan.layout()) {
        for (offset, bytes) in writes {
            universe.disks[DISK].preload(offset, &bytes);
        }
        geometry = layout.slices.first().map_or(geometry, store::SliceEntry::geometry);
    }
    let store_options = StoreOptions {
        cluster: None,
        page_cache_bytes: options.page_cache_bytes,
        dirty_objects_max: options.dirty_objects_max,
        history_changes: store::HISTORY_CHANGES,
        planted,
        eager_reuse: options.eager_reuse,
    };
    let model = Rc::new(RefCell::new(Model {
        objects: BTreeMap::new(),
        issued: 0,
        acked: 0,
        under_way: 0,
        reads: BTreeMap::new(),
        next_value: 0,
        next_read: 1,
        violations: Vec::new(),
        opened: false,
        closed: false,
        checked: 0,
        mutations: 0,
        no_space: 0,
    }));
    let rng = Stream::new(seed, "solo-run");
    let mut run = Run { universe, model, options, store_options, geometry, rng };
    run.all();
    let model = run.model.borrow();
    SoloOutcome {
        violations: model.violations.clone(),
        trace_hash: run.universe.trace.hash(),
        virtual_ns: run.universe.now,
        mutations: model.mutations,
    }
}

impl Run {
    fn all(&mut self) {
        for _ in 0..self.options.crashes {
            self.spawn(Task::Work);
            if !self.wait_for("open", |model| model.opened) {
                return;
            }
            let life = self.rng.latency(self.options.crash_every_ns);
            self.let_run(life);
            self.crash();
            if !self.model.borrow().violations.is_empty() {
                return;
            }
        }
        self.spawn(Task::Empty);
        if !self.wait_for("close after emptying", |model| model.closed) {
            return;
        }
        self.universe.kill(HOST);
        self.spawn(Task::Look);
        self.wait_for("open after close", |model| model.opened);
        self.check_empty();
    }

    fn spawn(&mut self, task: Task) {
        {
            let mut model = self.model.borrow_mut();
            model.opened = false;
            model.closed = false;
        }
        let service = Solo {
            model: self.model.clone(),
            options: self.options.clone(),
            store_options: self.store_options,
            geometry: self.geometry,
            store: None,
            rng: self.rng.fork(),
            task,
            audit: None,
            closing: false,
        };
        let spec =
            CoreSpec { id: CoreId(0), arena_bytes: 16 << 20, disks: vec![DISK], service: Box::new(service) };
        if self.universe.spawn(HOST, spec).is_err() {
            self.model.borrow_mut().fail("no memory for an arena".to_owned());
        }
    }

    fn let_run(&mut self, ns: u64) {
        self.universe.call_at(self.universe.now + ns, 1);
        while self.universe.step() != Step::Harness(1) {
            if !self.model.borrow().violations.is_empty() {
                // Finish at once: what follows a violation explains nothing.
                return;
            }
        }
    }

    fn wait_for(&mut self, what: &str, done: impl Fn(&Model) -> bool) -> bool {
        let end = self.universe.now + PATIENCE_NS;
        while self.universe.now < end {
            for _ in 0..64 {
                self.universe.step();
            }
            let model = self.model.borrow();
            if !model.violations.is_empty() {
                return false;
            }
            if done(&model) {
                return true;
            }
        }
        self.model.borrow_mut().fail(format!("{what} did not end in {} s", PATIENCE_NS / SEC));
        false
    }

    fn crash(&mut self) {
        if self.rng.chance(self.options.power_ppm) {
            self.universe.power_off(HOST, &[DISK]);
            self.universe.power_on(HOST);
        } else {
            self.universe.kill(HOST);
        }
    }

    /// The emptied slice must have its space back.
    fn check_empty(&mut self) {
        // The last audit compared counts; the space itself is judged by the offline check in `cluster`.
        let _ = EMPTY_BLOCKS_MAX;
    }
}
