//! The metadata store, the director's view of it, and everybody who acts on it, driven by hand. Every record
//! written is checked.

use control::Planted;
use control::director::decide::{Wish, finish_hand_over, fulfil};
use control::director::{Director, Plan, put_record};
use control::view::{PgEntry, View};
use placement::{Disk, Drain, DrainScope, FailureDomain, Live, Node, PgRecord, Pool, Slice, key};
use reactor::Mono;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use wire::control::{Change, Compare, KeyValue, MetaReply, MetaRequest, Write};
use wire::{DiskUuid, NodeId, PgId, PoolId, Revision, SessionId, SliceId};

pub const POOL: PoolId = PoolId(1);
pub const PGS: u32 = 8;
pub const MS: u64 = 1_000_000;

/// The metadata store, the director's view of it, and who may believe itself primary.
pub struct World {
    pub kv: BTreeMap<String, (String, u64)>,
    pub revision: u64,
    pub view: View,
    pub director: Director,
    pub now: Mono,
    pub sessions: u64,
    pub late: Vec<Plan>,
    /// Processes that act as primary as far as they know: from a record to the end of their lease or
    /// their consent.
    pub holders: BTreeMap<PgId, (SliceId, SessionId)>,
    /// Nodes whose process is dead, lease or not.
    pub dead: BTreeSet<u64>,
}

pub fn node(id: u64) -> Node {
    let at: SocketAddr = ([127, 0, 0, 1], 7000).into();
    let slice = |n: u64| Slice { id: SliceId(id * 10 + n), core: n as u16, size_bytes: 1 << 30 };
    Node {
        id: NodeId(id),
        host: format!("h{id}"),
        control: at,
        cores: vec![at; 2],
        http: None,
        disks: vec![Disk {
            uuid: DiskUuid(id.into()),
            path: String::new(),
            slices: vec![slice(0), slice(1)],
        }],
        version: String::new(),
        problems: Vec::new(),
    }
}

impl World {
    pub fn new(nodes: u64, copies: u8, min_copies: u8) -> Self {
        let mut world = Self {
            kv: BTreeMap::new(),
            revision: 0,
            view: View::default(),
            director: Director::new(Planted::none()),
            now: Mono(0),
            sessions: 100,
            late: Vec::new(),
            holders: BTreeMap::new(),
            dead: BTreeSet::new(),
        };
        world.director.lead(&world.view, world.now);
        for id in 1..=nodes {
            world.register(id);
        }
        let pool = Pool {
            id: POOL,
            name: "p".into(),
            copies,
            min_copies,
            pg_count: PGS,
            failure_domain: FailureDomain::Host,
            removing: false,
            scrub: Default::default(),
        };
        world.put(&key::pool(POOL), &pool);
        world
    }

    pub fn put<T: serde::Serialize>(&mut self, key: &str, value: &T) {
        let value = serde_json::to_string(value).unwrap();
        self.write(vec![Write::Put { key: key.into(), value, lease: None }]);
    }

    pub fn write(&mut self, writes: Vec<Write>) {
        self.revision += 1;
        for write in writes {
            let change = match write {
                Write::Put { key, value, lease } => {
                    self.kv.insert(key.clone(), (value.clone(), self.revision));
                    Change::Put(KeyValue { key, value, mod_revision: Revision(self.revision), lease })
                }
                Write::Delete { key } => {
                    self.kv.remove(&key);
                    Change::Delete { key }
                }
                Write::DeletePrefix { .. } => unreachable!("the director does not do that"),
            };
            let before = self.records();
            let touched = self.view.apply(&change);
            self.check(&before);
            self.director.touched(&self.view, touched, self.now);
        }
    }

    pub fn records(&self) -> BTreeMap<PgId, PgEntry> {
        self.view.pgs().clone()
    }

    pub fn live(&self, session: SessionId) -> bool {
        self.view.node_of_session(session).is_some()
    }

    /// The invariants of one step from record to record.
    pub fn check(&mut self, before: &BTreeMap<PgId, PgEntry>) {
        for (pg, entry) in self.view.pgs() {
            let new = &entry.record;
            assert!(!new.in_sync.is_empty(), "{pg}: nobody is in sync: {new:?}");
            if let Some(primary) = new.primary {
                assert!(new.acting.contains(&primary), "{pg}: primary does not act: {new:?}");
                assert!(new.in_sync.contains(&primary), "{pg}: primary is not in sync: {new:?}");
                assert!(new.primary_session.is_some());
                assert!(new.in_sync.iter().all(|s| new.acting.contains(s)), "{pg}: {new:?}");
            }
            let Some(old) = before.get(pg).map(|entry| &entry.record).filter(|old| *old != new) else {
                continue;
            };
            let moved = (&old.acting, old.primary, old.primary_session)
                != (&new.acting, new.primary, new.primary_session);
            assert!(new.epoch > old.epoch || !moved && new.epoch == old.epoch, "{pg}: {old:?} -> {new:?}");
            let lost: Vec<_> = old.in_sync.iter().filter(|s| !new.in_sync.contains(s)).collect();
            assert!(lost.is_empty() || new.primary.is_some(), "{pg}: {lost:?} forgotten while nobody serves");
            if let Some(primary) = new.primary
                && moved
            {
                assert!(old.in_sync.contains(&primary), "{pg}: a stale primary: {old:?} -> {new:?}");
            }
        }
        let holders: Vec<(PgId, (SliceId, SessionId))> =
            self.holders.iter().map(|(pg, holder)| (*pg, *holder)).collect();
        for (pg, (slice, session)) in holders {
            let Some(entry) = self.view.pgs().get(&pg) else { continue };
            let other = entry.record.primary.is_some_and(|p| p != slice)
                || entry.record.primary.is_some() && entry.record.primary_session != Some(session);
            assert!(!(other && self.live(session)), "{pg}: {slice} still has its lease: {:?}", entry.record);
        }
        for (pg, entry) in self.view.pgs() {
            if let (Some(primary), Some(session)) = (entry.record.primary, entry.record.primary_session) {
                self.holders.insert(*pg, (primary, session));
            }
        }
    }

    pub fn submit(&mut self, request: &MetaRequest) -> MetaReply {
        let MetaRequest::Txn { compares, writes } = request else { panic!("no transaction") };
        for (index, compare) in compares.iter().enumerate() {
            let holds = match compare {
                Compare::ModRevision { key, revision } => {
                    self.kv.get(key).map_or(0, |(_, at)| *at) == revision.0
                }
                Compare::Exists { key } => self.kv.contains_key(key),
                Compare::Bound { .. } => panic!("the director owns no lease"),
            };
            if !holds {
                return MetaReply::CompareFailed { index: index as u32 };
            }
        }
        self.write(writes.clone());
        MetaReply::Applied { revision: Revision(self.revision) }
    }

    /// Lets the director work; `late` keeps its transactions back.
    pub fn direct(&mut self, late: bool) {
        for _ in 0..50 {
            let plans = self.director.plan(&self.view, self.now);
            if plans.is_empty() && !self.director.has_work(self.now) {
                break;
            }
            self.late.extend(plans);
            if late {
                break;
            }
            self.settle_late();
        }
    }

    pub fn settle_late(&mut self) {
        for plan in std::mem::take(&mut self.late) {
            let reply = self.submit(&plan.request);
            self.director.on_reply(plan.batch, &reply, self.now);
        }
    }

    pub fn advance(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(50) {
            self.now = self.now.plus_ns(50 * MS);
            self.director.on_tick(&self.view, self.now);
            self.direct(false);
        }
    }

    pub fn register(&mut self, id: u64) {
        self.dead.remove(&id);
        self.sessions += 1;
        let live =
            Live { session: SessionId(self.sessions), failed: vec![], full: Vec::new(), leaving: false };
        let record = serde_json::to_string(&node(id)).unwrap();
        let live = serde_json::to_string(&live).unwrap();
        self.write(vec![
            Write::Put { key: key::node(NodeId(id)), value: record, lease: None },
            Write::Put { key: key::live(NodeId(id)), value: live, lease: None },
        ]);
    }

    /// A node that runs registers a further disk.
    pub fn add_disk(&mut self, id: u64, uuid: DiskUuid, slices: [SliceId; 2]) {
        let mut node = self.view.nodes()[&NodeId(id)].clone();
        let slice = |id| Slice { id, core: 0, size_bytes: 1 << 30 };
        node.disks.push(Disk { uuid, path: String::new(), slices: slices.map(slice).to_vec() });
        self.put(&key::node(NodeId(id)), &node);
    }

    /// PGs that a slice holds, and how many of them it leads.
    pub fn held_by(&self, slice: SliceId) -> (usize, usize) {
        let records = || self.view.pgs().values().map(|entry| &entry.record);
        let held = records().filter(|record| record.in_sync.contains(&slice)).count();
        (held, records().filter(|record| record.primary == Some(slice)).count())
    }

    /// The process says that it is about to stop.
    pub fn leave(&mut self, id: u64) {
        if let Some(live) = self.view.live().get(&NodeId(id)).cloned() {
            self.put(&key::live(NodeId(id)), &Live { leaving: true, ..live });
        }
    }

    pub fn drain(&mut self, id: u64, scope: Option<DrainScope>) {
        let key = key::drain(NodeId(id));
        match scope {
            Some(scope) => self.put(&key, &Drain { scope, since_ms: 0 }),
            None => self.write(vec![Write::Delete { key }]),
        }
    }

    pub fn set_copies(&mut self, copies: u8) {
        let pool = self.view.pools()[&POOL].clone();
        self.put(&key::pool(POOL), &Pool { copies, min_copies: pool.min_copies.min(copies), ..pool });
    }

    /// Time passes, and everybody does his part.
    pub fn live_on(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(100) {
            self.settle_late();
            self.advance(100);
            self.recover();
            self.consent();
        }
    }

    pub fn primaries_of(&self, id: u64) -> usize {
        let of = |slice: SliceId| slice.0 / 10 == id;
        self.view.pgs().values().filter(|entry| entry.record.primary.is_some_and(of)).count()
    }

    pub fn copies_of(&self, id: u64) -> usize {
        let named = |entry: &&PgEntry| entry.record.slices().iter().any(|slice| slice.0 / 10 == id);
        self.view.pgs().values().filter(named).count()
    }

    pub fn expire(&mut self, id: u64) {
        self.dead.insert(id);
        self.write(vec![Write::Delete { key: key::live(NodeId(id)) }]);
    }

    /// The primary of a PG, if its process is alive, wishes something.
    pub fn wish(&mut self, pg: PgId, member: usize, wish: Wish) {
        let Some(entry) = self.view.pgs().get(&pg).cloned() else { return };
        let Some(session) = entry.record.primary_session else { return };
        let alive = self.view.node_of_session(session).is_some_and(|node| !self.dead.contains(&node.0));
        let acting = &entry.record.acting;
        if !alive || acting.is_empty() {
            return;
        }
        let slice = acting[member % acting.len()];
        let pool = self.view.pools()[&POOL].clone();
        let Some(record) = fulfil(&entry, &pool, session, entry.record.epoch, slice, wish) else { return };
        if Some(slice) == entry.record.primary {
            self.holders.remove(&pg); // its core has stopped
        }
        self.write_record(pg, &entry, &record);
    }

    pub fn write_record(&mut self, pg: PgId, entry: &PgEntry, record: &PgRecord) {
        let compares = vec![Compare::ModRevision { key: key::pg(pg), revision: entry.revision }];
        let writes = vec![put_record(pg, record).unwrap()];
        self.submit(&MetaRequest::Txn { compares, writes });
    }

    /// Former primaries that are asked to, and are alive, hand over.
    pub fn consent(&mut self) {
        for (pg, entry) in self.records() {
            let record = &entry.record;
            let Some(session) = record.primary_session.filter(|_| record.primary.is_none()) else { continue };
            let Some(node) = self.view.node_of_session(session) else { continue };
            if self.dead.contains(&node.0) {
                continue;
            }
            let pool = self.view.pools()[&POOL].clone();
            if let Some(next) = finish_hand_over(&self.view, &entry, &pool, session) {
                self.holders.remove(&pg);
                self.write_record(pg, &entry, &next);
            }
        }
    }

    /// Recovery: every acting member gets in sync.
    pub fn recover(&mut self) {
        for index in 0..PGS {
            let pg = PgId { pool: POOL, index };
            for member in 0..8 {
                self.wish(pg, member, Wish::InSync);
            }
        }
    }
}
