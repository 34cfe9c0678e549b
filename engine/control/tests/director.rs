//! The director against random histories: nodes die, vanish, return and restart, primaries report
//! members in and out of sync, leaders change, transactions are late and lose races. What must hold is
//! checked at every record written.
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

use control::Planted;
use control::director::decide::{Wish, finish_hand_over, fulfil};
use control::director::{Director, Plan, put_record};
use control::view::{PgEntry, View};
use placement::{Disk, Drain, DrainScope, FailureDomain, Live, Node, PgRecord, Pool, Slice, key};
use proptest::prelude::*;
use reactor::Mono;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use wire::control::{Change, Compare, KeyValue, MetaReply, MetaRequest, Write};
use wire::{DiskUuid, NodeId, PgId, PoolId, Revision, SessionId, SliceId};

const POOL: PoolId = PoolId(1);
const PGS: u32 = 8;
const MS: u64 = 1_000_000;

/// The metadata store, the director's view of it, and who may believe itself primary.
struct World {
    kv: BTreeMap<String, (String, u64)>,
    revision: u64,
    view: View,
    director: Director,
    now: Mono,
    sessions: u64,
    late: Vec<Plan>,
    /// Processes that act as primary as far as they know: from a record to the end of their lease or
    /// their consent.
    holders: BTreeMap<PgId, (SliceId, SessionId)>,
    /// Nodes whose process is dead, lease or not.
    dead: BTreeSet<u64>,
}

fn node(id: u64) -> Node {
    let at: SocketAddr = ([127, 0, 0, 1], 7000).into();
    let slice = |n: u64| Slice { id: SliceId(id * 10 + n), core: n as u16, size_bytes: 1 << 30 };
    Node {
        id: NodeId(id),
        host: format!("h{id}"),
        control: at,
        cores: vec![at; 2],
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
    fn new(nodes: u64, copies: u8, min_copies: u8) -> Self {
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

    fn put<T: serde::Serialize>(&mut self, key: &str, value: &T) {
        let value = serde_json::to_string(value).unwrap();
        self.write(vec![Write::Put { key: key.into(), value, lease: None }]);
    }

    fn write(&mut self, writes: Vec<Write>) {
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

    fn records(&self) -> BTreeMap<PgId, PgEntry> {
        self.view.pgs().clone()
    }

    fn live(&self, session: SessionId) -> bool {
        self.view.node_of_session(session).is_some()
    }

    /// The invariants of one step from record to record.
    fn check(&mut self, before: &BTreeMap<PgId, PgEntry>) {
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

    fn submit(&mut self, request: &MetaRequest) -> MetaReply {
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
    fn direct(&mut self, late: bool) {
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

    fn settle_late(&mut self) {
        for plan in std::mem::take(&mut self.late) {
            let reply = self.submit(&plan.request);
            self.director.on_reply(plan.batch, &reply, self.now);
        }
    }

    fn advance(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(50) {
            self.now = self.now.plus_ns(50 * MS);
            self.director.on_tick(&self.view, self.now);
            self.direct(false);
        }
    }

    fn register(&mut self, id: u64) {
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

    /// The process says that it is about to stop.
    fn leave(&mut self, id: u64) {
        if let Some(live) = self.view.live().get(&NodeId(id)).cloned() {
            self.put(&key::live(NodeId(id)), &Live { leaving: true, ..live });
        }
    }

    fn drain(&mut self, id: u64, scope: Option<DrainScope>) {
        let key = key::drain(NodeId(id));
        match scope {
            Some(scope) => self.put(&key, &Drain { scope, since_ms: 0 }),
            None => self.write(vec![Write::Delete { key }]),
        }
    }

    fn set_copies(&mut self, copies: u8) {
        let pool = self.view.pools()[&POOL].clone();
        self.put(&key::pool(POOL), &Pool { copies, min_copies: pool.min_copies.min(copies), ..pool });
    }

    /// Time passes, and everybody does his part.
    fn live_on(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(100) {
            self.settle_late();
            self.advance(100);
            self.recover();
            self.consent();
        }
    }

    fn primaries_of(&self, id: u64) -> usize {
        let of = |slice: SliceId| slice.0 / 10 == id;
        self.view.pgs().values().filter(|entry| entry.record.primary.is_some_and(of)).count()
    }

    fn copies_of(&self, id: u64) -> usize {
        let named =
            |entry: &&PgEntry| control::view::slices_of(&entry.record).iter().any(|slice| slice.0 / 10 == id);
        self.view.pgs().values().filter(named).count()
    }

    fn expire(&mut self, id: u64) {
        self.dead.insert(id);
        self.write(vec![Write::Delete { key: key::live(NodeId(id)) }]);
    }

    /// The primary of a PG, if its process is alive, wishes something.
    fn wish(&mut self, pg: PgId, member: usize, wish: Wish) {
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

    fn write_record(&mut self, pg: PgId, entry: &PgEntry, record: &PgRecord) {
        let compares = vec![Compare::ModRevision { key: key::pg(pg), revision: entry.revision }];
        let writes = vec![put_record(pg, record).unwrap()];
        self.submit(&MetaRequest::Txn { compares, writes });
    }

    /// Former primaries that are asked to, and are alive, hand over.
    fn consent(&mut self) {
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
    fn recover(&mut self) {
        for index in 0..PGS {
            let pg = PgId { pool: POOL, index };
            for member in 0..8 {
                self.wish(pg, member, Wish::InSync);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Die(u64),
    Expire(u64),
    Register(u64),
    Wish(u32, usize, u8),
    Leader,
    Advance(u64),
    Late,
    Settle,
    Consent,
    Join,
    Drain(u64, Option<DrainScope>),
    Leave(u64),
    Copies(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = 1u64..6;
    let scopes = [None, Some(DrainScope::Primaries), Some(DrainScope::Everything)];
    let scope = prop::sample::select(scopes.to_vec());
    let step = prop_oneof![
        2 => node.clone().prop_map(Step::Die),
        3 => node.clone().prop_map(Step::Expire),
        4 => node.clone().prop_map(Step::Register),
        2 => (node.clone(), scope).prop_map(|(node, scope)| Step::Drain(node, scope)),
        2 => node.prop_map(Step::Leave),
        1 => (1u8..4).prop_map(Step::Copies),
        5 => (0..PGS, 0usize..5, 0u8..3).prop_map(|(pg, member, wish)| Step::Wish(pg, member, wish)),
        1 => Just(Step::Leader),
        4 => (50u64..3000).prop_map(Step::Advance),
        2 => Just(Step::Late),
        2 => Just(Step::Settle),
        2 => Just(Step::Consent),
        1 => Just(Step::Join),
    ];
    prop::collection::vec(step, 1..40)
}

fn run(world: &mut World, nodes: u64, step: Step) {
    match step {
        Step::Die(id) if id <= nodes => {
            world.dead.insert(id);
        }
        Step::Expire(id) if id <= nodes => world.expire(id),
        Step::Register(id) if id <= nodes => world.register(id),
        Step::Wish(index, member, wish) => {
            let wish = [Wish::InSync, Wish::OutOfSync, Wish::Failed][usize::from(wish)];
            world.wish(PgId { pool: POOL, index }, member, wish);
        }
        Step::Leader => {
            // The old leader's transactions may still arrive after the new one has begun.
            world.director = Director::new(Planted::none());
            world.director.lead(&world.view, world.now);
        }
        Step::Advance(ms) => world.advance(ms),
        Step::Late => world.direct(true),
        Step::Settle => world.settle_late(),
        Step::Consent => world.consent(),
        Step::Join => world.register(nodes + 1),
        Step::Drain(id, scope) if id <= nodes => world.drain(id, scope),
        Step::Leave(id) if id <= nodes => world.leave(id),
        Step::Copies(copies) => world.set_copies(copies),
        _ => {}
    }
    world.direct(false);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn records_stay_safe_and_heal(
        nodes in 3u64..6, copies in 2u8..4, spare in 0u8..2, history in steps(),
    ) {
        let mut world = World::new(nodes, copies, copies - spare);
        for step in history {
            run(&mut world, nodes, step);
        }
        // Everybody comes back; a process that is dead but still has its lease loses it first.
        for id in 1..=nodes {
            let leaving = world.view.live().get(&NodeId(id)).is_some_and(|live| live.leaving);
            if world.dead.contains(&id) || leaving {
                world.expire(id);
                world.register(id);
            }
        }
        // Hand-overs that failed make a leader wait for long before it tries again.
        run(&mut world, nodes, Step::Leader);
        world.live_on(24_000);
        world.advance(1000);
        let emptied = world.view.emptied();
        let copies = usize::from(world.view.pools()[&POOL].copies);
        let room = world.view.nodes().len() - emptied.len() >= copies;
        prop_assert_eq!(world.view.pgs().len(), PGS as usize);
        for (pg, entry) in world.view.pgs() {
            let record = &entry.record;
            let set = |list: &[SliceId]| list.iter().copied().collect::<BTreeSet<_>>();
            prop_assert_eq!(set(&record.acting), set(&record.target), "{} {:?}", pg, record);
            prop_assert_eq!(set(&record.in_sync), set(&record.target), "{} {:?}", pg, record);
            prop_assert_eq!(record.target.len(), copies);
            let home = |slice: &SliceId| NodeId(slice.0 / 10);
            let drained = |slice: &SliceId| world.view.drains().contains_key(&home(slice));
            if world.view.drains().is_empty() {
                prop_assert_eq!(record.primary, record.target.first().copied(), "{} {:?}", pg, record);
            } else if record.target.iter().any(|slice| !drained(slice)) {
                prop_assert!(!drained(&record.primary.unwrap()), "{} {:?}", pg, record);
            }
            if room {
                prop_assert!(!record.target.iter().any(|s| emptied.contains(&home(s))), "{} {:?}", pg, record);
            }
        }
    }
}

#[test]
fn a_new_pool_gets_its_pgs_at_once() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    assert_eq!(world.view.pgs().len(), PGS as usize);
    for entry in world.view.pgs().values() {
        assert_eq!((entry.record.epoch.0, entry.record.acting.len()), (1, 3));
        assert_eq!(entry.record.primary, entry.record.target.first().copied());
    }
}

#[test]
fn a_dead_primary_stays_until_its_lease_is_over_and_is_replaced_then() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    world.dead.insert(1);
    world.director.refused(&world.view, NodeId(1));
    world.advance(900);
    assert!(world.view.pgs().values().all(|entry| entry.record.epoch.0 == 1));
    world.expire(1);
    world.direct(false);
    for entry in world.view.pgs().values() {
        let record = &entry.record;
        assert_eq!((record.epoch.0, record.acting.len(), record.in_sync.len()), (2, 2, 2));
        assert!(world.view.up(record.primary.unwrap()).is_some());
    }
}

#[test]
fn a_restarted_primary_goes_on_without_waiting_under_a_new_epoch() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    world.register(2);
    world.direct(false);
    for entry in world.view.pgs().values() {
        let record = &entry.record;
        assert_eq!((record.epoch.0, record.in_sync.len()), (2, 3));
        assert_eq!(record.primary_session, world.view.up(record.primary.unwrap()));
    }
}

#[test]
fn a_whole_cluster_restart_waits_for_the_last_node_and_keeps_everybody_in_sync() {
    let mut world = World::new(3, 3, 2);
    world.advance(100);
    for id in 1..=3 {
        world.expire(id);
    }
    world.director = Director::new(Planted::none());
    world.director.lead(&world.view, world.now);
    let epochs: Vec<u64> = world.view.pgs().values().map(|e| e.record.epoch.0).collect();
    world.register(1);
    world.direct(false);
    world.register(2);
    world.direct(false);
    assert_eq!(epochs, world.view.pgs().values().map(|e| e.record.epoch.0).collect::<Vec<_>>());
    world.register(3);
    world.direct(false);
    for entry in world.view.pgs().values() {
        assert_eq!(entry.record.in_sync.len(), 3);
        assert!(entry.record.primary_session.is_some_and(|s| world.live(s)));
    }
}

#[test]
fn below_the_minimum_nobody_serves_and_nothing_is_forgotten() {
    let mut world = World::new(3, 3, 2);
    world.advance(1500);
    world.expire(2);
    world.direct(false);
    world.expire(3);
    world.direct(false);
    for entry in world.view.pgs().values() {
        assert_eq!(entry.record.primary, None);
        assert!(entry.record.in_sync.len() >= 2, "{:?}", entry.record);
    }
    world.register(3);
    world.direct(false);
    for entry in world.view.pgs().values() {
        let record = &entry.record;
        assert!(record.primary.is_some() && record.acting.len() == 2, "{record:?}");
    }
}

#[test]
fn a_node_drained_of_primaries_gives_them_away_at_once_and_gets_them_back_when_it_is_over() {
    let mut world = World::new(3, 3, 2);
    world.live_on(1500);
    assert!(world.primaries_of(1) > 0);
    world.drain(1, Some(DrainScope::Primaries));
    world.live_on(1500); // less than the time that a preferred primary waits for quiet
    assert_eq!((world.primaries_of(1), world.copies_of(1)), (0, PGS as usize));
    world.live_on(10_000);
    assert_eq!(world.primaries_of(1), 0, "taken back");
    world.drain(1, None);
    world.live_on(10_000);
    assert!(world.primaries_of(1) > 0);
}

#[test]
fn a_drained_node_gives_its_primaries_away_while_another_is_down_and_keeps_what_nobody_else_can_serve() {
    let mut world = World::new(3, 3, 1);
    world.live_on(1500);
    world.expire(3);
    world.drain(1, Some(DrainScope::Primaries));
    world.live_on(1500);
    assert_eq!((world.primaries_of(1), world.primaries_of(2)), (0, PGS as usize));
    world.expire(2);
    world.live_on(1500);
    assert_eq!(world.primaries_of(1), PGS as usize, "the last copy serves, drained or not");
    world.register(2);
    world.live_on(1500);
    assert_eq!((world.primaries_of(1), world.primaries_of(2)), (0, PGS as usize));
}

#[test]
fn a_drained_node_keeps_its_copies_only_where_there_is_no_other_place() {
    let mut world = World::new(4, 3, 2);
    world.live_on(1500);
    assert!(world.copies_of(4) > 0);
    world.drain(4, Some(DrainScope::Everything));
    world.live_on(3000);
    assert_eq!(world.copies_of(4), 0);
    // Three nodes are left for three copies: the next one gives its primaries only.
    world.drain(3, Some(DrainScope::Everything));
    world.live_on(3000);
    assert_eq!((world.primaries_of(3), world.primaries_of(4)), (0, 0));
    for entry in world.view.pgs().values() {
        assert_eq!((entry.record.acting.len(), entry.record.in_sync.len()), (3, 3));
    }
    world.drain(4, None);
    world.live_on(3000);
    assert_eq!(world.copies_of(3), 0, "there is room again");
}

#[test]
fn a_leaving_node_is_replaced_while_it_still_works_and_only_with_its_consent() {
    let mut world = World::new(3, 3, 2);
    world.live_on(1500);
    world.leave(1);
    world.advance(100);
    let waiting = |world: &World| world.view.pgs().values().filter(|e| e.record.primary.is_none()).count();
    assert!(waiting(&world) > 0, "primaries are replaced without consent");
    for entry in world.view.pgs().values().filter(|entry| entry.record.primary.is_some()) {
        assert!(entry.record.acting.iter().all(|slice| slice.0 / 10 != 1), "{:?}", entry.record);
    }
    world.consent();
    assert_eq!((waiting(&world), world.primaries_of(1)), (0, 0));
    // Its end changes nothing more.
    let records: Vec<PgRecord> = world.view.pgs().values().map(|entry| entry.record.clone()).collect();
    world.expire(1);
    world.advance(100);
    assert_eq!(records, world.view.pgs().values().map(|entry| entry.record.clone()).collect::<Vec<_>>());
}

#[test]
fn the_number_of_copies_of_a_pool_can_be_changed() {
    let mut world = World::new(4, 2, 1);
    world.live_on(1500);
    for copies in [3, 4, 1, 2] {
        world.set_copies(copies);
        world.live_on(6000);
        for entry in world.view.pgs().values() {
            let record = &entry.record;
            let lengths = (record.target.len(), record.acting.len(), record.in_sync.len());
            assert_eq!(lengths, (copies.into(), copies.into(), copies.into()), "{record:?}");
            assert!(record.primary.is_some());
        }
    }
}

#[test]
fn a_removed_pool_is_cleared_away() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    let pool = Pool { removing: true, ..world.view.pools()[&POOL].clone() };
    world.put(&key::pool(POOL), &pool);
    world.advance(200);
    assert!(world.view.pgs().is_empty() && world.view.pools().is_empty());
    assert!(!world.kv.keys().any(|key| key.starts_with("/pg/") || key.starts_with("/pool")));
}

#[cfg(feature = "planted")]
#[test]
fn the_planted_bugs_of_the_director_break_the_invariants() {
    use control::planted::Bug;
    for bug in [Bug::DemoteBeforeLeaseExpiry, Bug::PickStalePrimary] {
        let caught = std::panic::catch_unwind(|| {
            let mut world = World::new(3, 3, 1);
            world.director = Director::new(Planted::with(bug));
            world.director.lead(&world.view, world.now);
            world.advance(1500);
            for index in (0..PGS).filter(|_| bug == Bug::PickStalePrimary) {
                world.wish(PgId { pool: POOL, index }, 1, Wish::OutOfSync);
                world.wish(PgId { pool: POOL, index }, 2, Wish::OutOfSync);
            }
            for id in 1..=3 {
                world.director.refused(&world.view, NodeId(id));
                world.direct(false);
            }
            for id in 1..=3 {
                world.expire(id);
                world.direct(false);
                world.register(id);
                world.direct(false);
            }
        });
        assert!(caught.is_err(), "{bug:?} went unnoticed");
    }
}
