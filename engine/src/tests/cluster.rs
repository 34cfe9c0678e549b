//! Cores in the small world, a scripted director, and a scripted client.

use super::world::{CoreEnv, DiskMem, Due, Shared, World};
use crate::config::{DataCoreConfig, SliceConfig};
use crate::metrics::CoreMetrics;
use crate::msg::{CoreMsg, Member, PgUpdate};
use crate::planted::Planted;
use crate::session::{hello_frame, parse_hello};
use crate::{DataCore, PgState};
use placement::{PgRecord, Pool};
use reactor::*;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use store::{DiskPlan, Presence, StoreOptions};
use wire::control::{Hello, Role};
use wire::*;

pub(super) const CLUSTER: ClusterId = ClusterId(77);
pub(super) const PG: PgId = PgId { pool: PoolId(1), index: 0 };
pub(super) const CLIENT: usize = 100;
const DISK_BYTES: u64 = 64 << 20;
/// Virtual nanoseconds a wait may take.
const LIMIT_NS: u64 = 20_000_000_000;

pub(super) fn slice(node: usize) -> SliceId {
    SliceId(node as u64 + 1)
}

pub(super) fn addr(node: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 1000 + node as u16))
}

pub(super) fn object(index: u64) -> ObjectId {
    ObjectId { pool: PG.pool, image: ImageId(1), index }
}

pub(super) struct Node {
    pub(super) core: DataCore,
    pub(super) env: CoreEnv,
}

pub(super) struct Cluster {
    pub(super) world: Shared,
    pub(super) nodes: BTreeMap<usize, Node>,
    pub(super) paused: BTreeSet<usize>,
    pub(super) record: PgRecord,
    geometry: BTreeMap<usize, SliceConfig>,
    sessions: BTreeMap<usize, SessionId>,
    pub(super) client_env: CoreEnv,
    pub(super) client_events: Vec<Event>,
    pub(super) replies: BTreeMap<u64, Frame>,
    pub(super) welcomed: BTreeMap<ConnId, Hello>,
    pub(super) closed: BTreeSet<ConnId>,
    request: u64,
    planted: Planted,
    /// Changes that a slice remembers, from its next start on.
    pub(super) history_changes: usize,
    pub(super) dirty_objects_max: u32,
    /// What a new primary gets.
    pub(super) lease_ms: u64,
    /// Nodes hear of a new record up to this much later, in nanoseconds.
    pub(super) news_ns: u64,
    /// Of the pool.
    pub(super) copies: u8,
    pub(super) min_copies: u8,
}

impl Cluster {
    /// Three nodes with prepared disks, their cores running, no PG yet.
    pub(super) fn new(seed: u64) -> Self {
        Self::with(seed, Planted::none())
    }

    /// The same, with a deliberate bug in every core.
    pub(super) fn with(seed: u64, planted: Planted) -> Self {
        let world = World::new(seed);
        let client_env = CoreEnv { world: world.clone(), node: CLIENT, arena: Arena::new(1 << 20).unwrap() };
        let mut cluster = Self {
            world,
            nodes: BTreeMap::new(),
            paused: BTreeSet::new(),
            record: PgRecord::default(),
            geometry: BTreeMap::new(),
            sessions: BTreeMap::new(),
            client_env,
            client_events: Vec::new(),
            replies: BTreeMap::new(),
            welcomed: BTreeMap::new(),
            closed: BTreeSet::new(),
            request: 0,
            planted,
            history_changes: store::HISTORY_CHANGES,
            dirty_objects_max: StoreOptions::default().dirty_objects_max,
            lease_ms: 60_000,
            news_ns: 0,
            copies: 3,
            min_copies: 1,
        };
        for node in 0..3 {
            cluster.prepare(node);
            cluster.start(node);
        }
        cluster
    }

    pub(super) fn prepare(&mut self, node: usize) {
        let plan = DiskPlan {
            cluster: CLUSTER,
            disk: DiskUuid(node as u128 + 1),
            node: Some(NodeId(node as u64 + 1)),
            disk_bytes: DISK_BYTES,
            slices: vec![slice(node)],
        };
        let layout = plan.layout().unwrap();
        self.geometry.insert(node, SliceConfig { disk: DiskIndex(0), geometry: layout.slices[0].geometry() });
        let mut disk = DiskMem { bytes: DISK_BYTES, ..Default::default() };
        for (offset, bytes) in plan.writes().unwrap() {
            for (at, chunk) in bytes.chunks(4096).enumerate() {
                let mut block = vec![0; 4096];
                block[..chunk.len()].copy_from_slice(chunk);
                disk.blocks.insert(offset / 4096 + at as u64, block.into());
            }
        }
        self.world.borrow_mut().disks.insert(node, disk);
    }

    /// Starts a node's process and waits until its slice is open.
    pub(super) fn start(&mut self, node: usize) {
        self.spawn(node);
        self.wait("slice opens", |c| {
            c.told()
                .iter()
                .any(|(n, msg)| *n == node && matches!(msg, CoreMsg::SliceOpened { result: Ok(_), .. }))
        });
    }

    /// Starts a node's process.
    pub(super) fn spawn(&mut self, node: usize) {
        let life = self.world.borrow().life.get(&node).copied().unwrap_or(0);
        let session = SessionId(1000 * (node as u64 + 1) + life);
        self.sessions.insert(node, session);
        let config = DataCoreConfig {
            cluster: CLUSTER,
            node: NodeId(node as u64 + 1),
            listen: addr(node),
            slices: vec![self.geometry[&node]],
            metrics: Arc::new(CoreMetrics::new(&[slice(node)])),
            store: StoreOptions {
                page_cache_bytes: 1 << 20,
                history_changes: self.history_changes,
                dirty_objects_max: self.dirty_objects_max,
                ..Default::default()
            },
            scrub_bytes_per_second: crate::config::SCRUB_BYTES_PER_SECOND,
            disk_timeout_s: crate::config::DISK_TIMEOUT_S,
            disk_probe_s: crate::config::DISK_PROBE_S,
            planted: self.planted,
        };
        let mut env = CoreEnv { world: self.world.clone(), node, arena: Arena::new(16 << 20).unwrap() };
        let mut core = DataCore::new(config);
        core.start(&mut env);
        self.nodes.insert(node, Node { core, env });
        self.world.borrow_mut().told.clear();
        self.tell(node, CoreMsg::Identity { session });
    }

    pub(super) fn crash(&mut self, node: usize) {
        self.nodes.remove(&node);
        self.paused.remove(&node);
        self.world.borrow_mut().crash(node);
    }

    /// A message from the node's control core, at once.
    pub(super) fn tell(&mut self, node: usize, msg: CoreMsg) {
        let event = Event::Mesh { from: CONTROL_CORE, msg: msg.into_mesh() };
        let mut world = self.world.borrow_mut();
        let now = world.now;
        world.at(now, node, Due::Event(event));
    }

    pub(super) fn told(&self) -> std::cell::Ref<'_, Vec<(usize, CoreMsg)>> {
        std::cell::Ref::map(self.world.borrow(), |world| &world.told)
    }

    pub(super) fn lease(&mut self, node: usize, ms: u64) {
        let until = Mono(self.world.borrow().now).plus_ms(ms);
        self.tell(node, CoreMsg::Lease { until });
    }

    pub(super) fn update(&self) -> PgUpdate {
        let pool = Pool {
            id: PG.pool,
            name: "p".into(),
            copies: self.copies,
            min_copies: self.min_copies,
            pg_count: 1,
            failure_domain: Default::default(),
            removing: false,
            scrub: Default::default(),
        };
        let members = (0..3)
            .map(|node| Member {
                slice: slice(node),
                node: NodeId(node as u64 + 1),
                session: self.sessions.get(&node).copied(),
                addr: addr(node),
            })
            .collect();
        // One revision per record: in-sync changes under one epoch come later than the epoch.
        let revision = Revision(self.record.epoch.0 * 100 + self.record.in_sync.len() as u64);
        PgUpdate { pg: PG, pool, record: self.record.clone(), revision, members }
    }

    /// The director decides: a new epoch with this primary, these members and these in-sync ones.
    pub(super) fn decide(&mut self, primary: usize, acting: &[usize], in_sync: &[usize]) {
        self.record = self.next_record(primary, acting, in_sync);
        self.announce();
        let ms = self.lease_ms;
        self.lease(primary, ms);
    }

    fn next_record(&self, primary: usize, acting: &[usize], in_sync: &[usize]) -> PgRecord {
        PgRecord {
            epoch: Epoch(self.record.epoch.0 + 1),
            target: (0..3).map(slice).collect(),
            acting: acting.iter().map(|n| slice(*n)).collect(),
            primary: Some(slice(primary)),
            primary_session: self.sessions.get(&primary).copied(),
            in_sync: in_sync.iter().map(|n| slice(*n)).collect(),
        }
    }

    /// As `decide`, for the copies that the record's `target` names; only `nodes` are told.
    pub(super) fn decide_for(
        &mut self,
        nodes: &[usize],
        primary: usize,
        acting: &[usize],
        in_sync: &[usize],
    ) {
        let target = self.record.target.clone();
        self.record = PgRecord { target, ..self.next_record(primary, acting, in_sync) };
        self.announce_to(nodes);
        let ms = self.lease_ms;
        self.lease(primary, ms);
    }

    /// Every live node's control core passes the record on.
    pub(super) fn announce(&mut self) {
        // A paused process hears when it wakes, if somebody tells it then.
        let nodes: Vec<usize> =
            self.nodes.keys().copied().filter(|node| !self.paused.contains(node)).collect();
        self.announce_to(&nodes);
    }

    fn announce_to(&mut self, nodes: &[usize]) {
        for &node in nodes {
            let event = Event::Mesh { from: CONTROL_CORE, msg: CoreMsg::Pg(self.update()).into_mesh() };
            let mut world = self.world.borrow_mut();
            let late = if self.news_ns > 0 { world.random() % self.news_ns } else { 0 };
            let at = world.now + late;
            world.at(at, node, Due::Event(event));
        }
    }

    /// Does what the control core does with `InSync`.
    pub(super) fn obey_in_sync(&mut self) {
        let epoch = self.record.epoch;
        let asked: Vec<SliceId> = self
            .told()
            .iter()
            .filter_map(|(_, msg)| match msg {
                CoreMsg::InSync { epoch: at, slice, .. } if *at == epoch => Some(*slice),
                _ => None,
            })
            .collect();
        let mut changed = false;
        for slice in asked {
            if !self.record.in_sync.contains(&slice) {
                self.record.in_sync.push(slice);
                changed = true;
            }
        }
        if changed {
            self.announce();
        }
    }

    /// Lets the next thing happen. False when nothing is left.
    pub(super) fn step(&mut self) -> bool {
        let next = {
            let world = self.world.borrow();
            let due = world.queue.iter().find(|(_, (node, ..))| !self.paused.contains(node));
            due.map(|(at, _)| *at)
        };
        let Some(at) = next else { return false };
        let (node, life, due) = {
            let mut world = self.world.borrow_mut();
            world.now = world.now.max(at.0);
            world.queue.remove(&at).unwrap()
        };
        if life != self.world.borrow().life.get(&node).copied().unwrap_or(0) {
            return true;
        }
        let event = match due {
            Due::Event(event) => event,
            Due::Disk(token, mut op) => {
                let result = self.world.borrow_mut().perform(node, &mut op);
                Event::DiskDone { disk: DiskIndex(0), token, result, op }
            }
        };
        if node == CLIENT {
            self.client_event(event);
        } else if let Some(Node { core, env }) = self.nodes.get_mut(&node) {
            core.event(env, event);
            core.flush(env);
        }
        true
    }

    fn client_event(&mut self, event: Event) {
        match event {
            Event::Frame { conn, frame } if frame.header.kind == FrameKind::Hello => {
                self.welcomed.insert(conn, parse_hello(&frame).unwrap());
            }
            Event::Frame { frame, .. } => {
                if let Some(payload) = &frame.payload {
                    assert!(frame.crcs.matches(payload.as_slice()), "a reply's payload fits its checksums");
                }
                self.replies.insert(frame.header.request, frame);
            }
            Event::Closed { conn, .. } => {
                self.closed.insert(conn);
            }
            other => self.client_events.push(other),
        }
    }

    /// Runs until a condition holds; fails the test when it does not within the limit.
    pub(super) fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let limit = self.world.borrow().now + LIMIT_NS;
        while !done(self) {
            assert!(self.step() && self.world.borrow().now < limit, "never happened: {what}");
        }
    }

    /// Runs for some virtual time.
    pub(super) fn pass(&mut self, ms: u64) {
        let end = self.world.borrow().now + ms * 1_000_000;
        let mut world = self.world.borrow_mut();
        // Something has to be due at the end, so that time gets there.
        world.at(end, CLIENT, Due::Event(Event::Timer { token: Token(0) }));
        drop(world);
        while self.world.borrow().now < end && self.step() {}
    }

    // The client.

    /// Opens a connection as incarnation `incarnation` of session 5 and waits for the welcome.
    pub(super) fn dial(&mut self, node: usize, incarnation: u64) -> ConnId {
        let conn = self.dial_as(node, Some(CLUSTER), incarnation);
        self.wait("welcome", |c| c.welcomed.contains_key(&conn));
        conn
    }

    pub(super) fn dial_as(&mut self, node: usize, cluster: Option<ClusterId>, incarnation: u64) -> ConnId {
        let conn = self.client_env.connect(addr(node), Framing::Frames);
        let hello = Hello { cluster, role: Role::Client, session: SessionId(5), incarnation, refused: 0 };
        self.client_env.send(conn, hello_frame(&hello, 0).unwrap()).unwrap();
        conn
    }

    pub(super) fn request(&mut self, conn: ConnId, mut header: Header, data: Option<Vec<u8>>) -> u64 {
        self.request += 1;
        header.request = self.request;
        if header.pg == PgId::default() {
            header.pg = PG;
        }
        if header.epoch == Epoch(0) {
            header.epoch = self.record.epoch;
        }
        let crcs = data.as_deref().map(BlockCrcs::of).unwrap_or_default();
        header.payload_len = data.as_ref().map_or(0, Vec::len) as u32;
        let payload = data.map(|data| IoBuf::copy_of(&data).unwrap());
        self.client_env.send(conn, Frame { header, crcs, payload }).unwrap();
        self.request
    }

    pub(super) fn write(&mut self, conn: ConnId, index: u64, block: u32, fill: u8) -> u64 {
        let mut header = Header::new(FrameKind::Write, 0);
        header.object = object(index);
        header.block = block;
        header.blocks = 1;
        self.request(conn, header, Some(vec![fill; BLOCK_BYTES]))
    }

    pub(super) fn read(&mut self, conn: ConnId, index: u64, block: u32) -> u64 {
        let mut header = Header::new(FrameKind::Read, 0);
        header.object = object(index);
        header.block = block;
        header.blocks = 1;
        self.request(conn, header, None)
    }

    pub(super) fn delete(&mut self, conn: ConnId, index: u64) -> u64 {
        let mut header = Header::new(FrameKind::Delete, 0);
        header.object = object(index);
        self.request(conn, header, None)
    }

    pub(super) fn status(&mut self, request: u64) -> Status {
        self.wait("an answer", |c| c.replies.contains_key(&request));
        self.replies[&request].header.status
    }

    /// Writes and waits for success.
    pub(super) fn put(&mut self, conn: ConnId, index: u64, block: u32, fill: u8) {
        let request = self.write(conn, index, block, fill);
        assert_eq!(self.status(request), Status::Ok);
    }

    /// Reads a block and returns its first byte; the whole block must be of that byte.
    pub(super) fn get(&mut self, conn: ConnId, index: u64, block: u32) -> u8 {
        let request = self.read(conn, index, block);
        assert_eq!(self.status(request), Status::Ok);
        self.byte_of(request)
    }

    pub(super) fn byte_of(&self, request: u64) -> u8 {
        let data = self.replies[&request].payload.as_ref().unwrap();
        let first = data.as_slice()[0];
        assert!(data.as_slice().iter().all(|byte| *byte == first), "a block is of one write");
        first
    }

    // Disks.

    pub(super) fn disk(&mut self, node: usize, change: impl FnOnce(&mut DiskMem)) {
        change(self.world.borrow_mut().disks.get_mut(&node).unwrap());
    }

    /// Why the node's slice failed, if it told its control core.
    pub(super) fn slice_failed(&self, node: usize) -> Option<String> {
        self.told().iter().find_map(|(from, msg)| match msg {
            CoreMsg::SliceFailed { why, .. } if *from == node => Some(why.clone()),
            _ => None,
        })
    }

    // Looking inside.

    pub(super) fn presence(&self, node: usize, index: u64) -> Presence {
        self.nodes[&node].core.store_ref(0).unwrap().lookup(object(index))
    }

    /// Whether these nodes hold the same objects in the same versions.
    pub(super) fn equal(&self, nodes: &[usize]) -> bool {
        let list = |node: usize| {
            let mut found = Vec::new();
            let store = self.nodes[&node].core.store_ref(0).unwrap();
            store.list(Default::default(), u32::MAX, |_| true, &mut found);
            let mut all: Vec<_> = found.iter().map(|e| (e.object, e.version, e.tombstone)).collect();
            all.sort_unstable();
            all
        };
        nodes.windows(2).all(|pair| list(pair[0]) == list(pair[1]))
    }

    pub(super) fn reported(&self, node: usize, state: PgState) -> bool {
        let epoch = self.record.epoch;
        let told = self.told();
        let last = told.iter().rev().find_map(|(from, msg)| match msg {
            CoreMsg::PgReport(report) if *from == node && report.epoch == epoch => Some(report.state.clone()),
            _ => None,
        });
        last.as_deref() == Some(state.name())
    }

    pub(super) fn wait_state(&mut self, node: usize, state: PgState) {
        self.wait(state.name(), |c| c.reported(node, state));
    }

    /// Nothing of the data path is left under way on a node.
    pub(super) fn assert_idle(&self, node: usize) {
        let core = &self.nodes[&node].core;
        assert_eq!((core.ops.len(), core.subs.len(), core.objs.len(), core.heals.len()), (0, 0, 0, 0));
        assert_eq!(core.obj_index.len(), 0);
        assert!(core.pgs.iter().all(|(_, pg)| pg.locals.iter().all(|local| local.inflight == 0)));
    }
}
