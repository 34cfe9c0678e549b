//! The director: writes the configuration of every PG. It runs on the node whose metadata voter leads,
//! and holds nothing that a successor would miss: a new leader looks at every PG once.
//!
//! `decide` says what one PG's next record is. This module knows which PGs to look at, bundles records
//! into transactions, creates the PGs of new pools, clears away removed ones, follows placement, and
//! gives primaries back to their preferred members. Two directors at once do no harm: every write
//! compares the record's revision.

mod bundle;
pub mod decide;
pub mod handover;
pub mod hold;

use crate::planted::{Bug, Planted};
use crate::view::{PgEntry, Touched, View};
pub use bundle::put_record;

use bundle::Bundle;
use decide::{Situation, begin_hand_over};
use handover::{Halfway, HandOvers, Why};
use hold::Holds;
use placement::{Assigner, LOOKS_PER_STEP, Node, PgRecord, PlacementError, Pool, Rule, Topology, key};
use reactor::Mono;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use wire::control::{Compare, MetaReply, MetaRequest, Write};
use wire::{NodeId, PgId, PoolId, Revision, SliceId};

/// PG records in one transaction: some 300 bytes each, far below a transaction's bound, and few enough
/// that one conflict does not throw away much.
pub const PGS_PER_TXN: usize = 64;
/// Transactions on their way at once: enough to hide a commit's latency; the leader decides each against
/// all others on their way, so more of them cost it quadratically more.
pub const TXNS_IN_FLIGHT: usize = 4;
/// PGs looked at in one step: some ten microseconds each with their transaction.
pub const PGS_PER_STEP: usize = 128;
/// How long a new director waits for members that have not registered yet, in milliseconds. A whole
/// cluster that restarts comes up in one piece instead of degrading PG by PG. One time to live of a
/// lease: nobody is removed earlier after a change of leader anyway.
pub const SETTLE_MS: u64 = 1_000;
/// Pause after the metadata store could not take a transaction, in milliseconds.
const RETRY_MS: u64 = 20;

/// A transaction to submit; its reply goes to `Director::on_reply` with the same number.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// Chosen by the director.
    pub batch: u64,
    /// A `MetaRequest::Txn`.
    pub request: MetaRequest,
}

/// What the director has done, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// PG records written.
    pub records: u64,
    /// Transactions refused because a record had changed meanwhile.
    pub conflicts: u64,
}

/// See the module.
pub struct Director {
    leading: Option<Leading>,
    next_batch: u64,
    planted: Planted,
    counters: Counters,
}

enum Batch {
    Pgs(Vec<PgId>),
    Removal(PoolId),
}

struct Leading {
    settle_until: Mono,
    settled: bool,
    /// No transactions before then.
    paused_until: Mono,
    /// Nodes that have gone since it leads.
    lost: BTreeSet<NodeId>,
    dirty: BTreeSet<PgId>,
    restarted: BTreeSet<PgId>,
    dirty_pools: BTreeSet<PoolId>,
    /// What the targets were computed from.
    topology: Arc<Topology>,
    /// Nodes that are to keep no copies.
    emptied: BTreeSet<NodeId>,
    /// Slices that failed in the processes of their nodes seen last. A node that is down has not mended them.
    failed: BTreeMap<NodeId, Vec<SliceId>>,
    /// The pool that is being placed.
    placing: Option<(PoolId, Assigner)>,
    retarget: BTreeSet<PoolId>,
    targets: BTreeMap<PoolId, Vec<Vec<SliceId>>>,
    problems: BTreeMap<PoolId, PlacementError>,
    holds: Holds,
    hand_overs: HandOvers,
    in_flight: BTreeMap<u64, Batch>,
    busy: BTreeSet<PgId>,
    unreachable: BTreeSet<NodeId>,
}

impl Director {
    /// One that does nothing until it leads.
    pub fn new(planted: Planted) -> Self {
        Self { leading: None, next_batch: 1, planted, counters: Counters::default() }
    }

    /// Whether it leads.
    pub fn is_leading(&self) -> bool {
        self.leading.is_some()
    }

    /// What it has done.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Pools that cannot be placed, and why.
    pub fn problems(&self) -> impl Iterator<Item = (&PoolId, &PlacementError)> {
        self.leading.iter().flat_map(|leading| &leading.problems)
    }

    /// Whether nothing is to be done and nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.leading.as_ref().is_none_or(|l| {
            l.dirty.is_empty()
                && l.in_flight.is_empty()
                && l.retarget.is_empty()
                && l.placing.is_none()
                && l.dirty_pools.is_empty()
        })
    }

    /// The local voter has become the leader.
    pub fn lead(&mut self, view: &View, now: Mono) {
        self.leading = Some(Leading {
            settle_until: now.plus_ms(SETTLE_MS),
            settled: false,
            paused_until: now,
            lost: BTreeSet::new(),
            dirty: view.pgs().keys().copied().collect(),
            restarted: BTreeSet::new(),
            dirty_pools: view.pools().keys().copied().collect(),
            topology: Arc::new(Topology::default()),
            emptied: view.emptied(),
            failed: BTreeMap::new(),
            placing: None,
            retarget: view.pools().keys().copied().collect(),
            targets: BTreeMap::new(),
            problems: BTreeMap::new(),
            holds: Holds::default(),
            hand_overs: HandOvers::new(now),
            in_flight: BTreeMap::new(),
            busy: BTreeSet::new(),
            unreachable: BTreeSet::new(),
        });
        if let Some(leading) = &mut self.leading {
            view.live().keys().for_each(|node| leading.note_failed(view, *node));
            leading.topology = leading.placeable(view);
        }
    }

    /// It leads no longer. Transactions on their way may still succeed.
    pub fn resign(&mut self) {
        self.leading = None;
    }

    /// A change has been applied to the view.
    pub fn touched(&mut self, view: &View, touched: Touched, now: Mono) {
        let Some(leading) = &mut self.leading else { return };
        match touched {
            Touched::Pg(pg) => leading.touched_pg(view, pg, now),
            Touched::Live { node, before } => {
                // Merged, not inserted one by one: a node may take part in thousands.
                let mut pgs = view.pgs_of_node(node);
                let session = view.live().get(&node).map(|live| live.session);
                if session != before {
                    leading.hand_overs.disturbed(now);
                }
                if before.is_some() && session.is_some() && session != before {
                    leading.restarted.append(&mut pgs.clone());
                }
                if session.is_some() && session != before {
                    let there = |slice: SliceId| view.home(slice).is_some_and(|home| home.node == node);
                    leading.holds.release(there);
                }
                if session.is_none() {
                    leading.lost.insert(node);
                } else {
                    leading.note_failed(view, node);
                    leading.follow_topology(view);
                    leading.lost.remove(&node);
                    leading.unreachable.remove(&node);
                    // New pools may be waiting for this node.
                    leading.dirty_pools.extend(view.pools().keys());
                }
                leading.dirty.append(&mut pgs);
            }
            Touched::Node(node) | Touched::Drain(node) => {
                leading.follow_topology(view);
                leading.dirty.append(&mut view.pgs_of_node(node));
            }
            Touched::Pool(pool) => {
                leading.retarget.insert(pool);
                leading.dirty_pools.insert(pool);
                leading.dirty.extend(view.pgs_of_pool(pool).map(|(pg, _)| pg));
            }
            Touched::Image(pool) => {
                leading.dirty_pools.insert(pool);
            }
            Touched::Cluster | Touched::Disk(_) | Touched::Scrub(_) | Touched::Settings | Touched::Other => {}
        }
    }

    /// Somebody could not connect to this node. Nothing follows from it: only the lease decides.
    pub fn refused(&mut self, view: &View, node: NodeId) {
        if self.planted.has(Bug::DemoteBeforeLeaseExpiry)
            && let Some(leading) = &mut self.leading
        {
            leading.unreachable.insert(node);
            leading.dirty.extend(view.pgs_of_node(node));
        }
    }

    /// To be called every few ten milliseconds.
    pub fn on_tick(&mut self, view: &View, now: Mono) {
        let Some(leading) = &mut self.leading else { return };
        if !leading.settled && now >= leading.settle_until {
            leading.settled = true;
            leading.dirty.extend(view.pgs().keys());
            leading.dirty_pools.extend(view.pools().keys());
        }
        leading.dirty.extend(leading.hand_overs.due(now));
        leading.dirty.extend(leading.holds.due(now));
    }

    /// The transactions that are due. Bounded work; call again when `has_work`.
    pub fn plan(&mut self, view: &View, now: Mono) -> Vec<Plan> {
        let Some(leading) = &mut self.leading else { return Vec::new() };
        if now < leading.paused_until {
            return Vec::new();
        }
        leading.place(view);
        let mut plans = Vec::new();
        while let Some(pool) = leading.dirty_pools.pop_first() {
            if let Some(request) = leading.look_at_pool(view, pool) {
                self.next_batch += 1;
                leading.in_flight.insert(self.next_batch, Batch::Removal(pool));
                plans.push(Plan { batch: self.next_batch, request });
            }
        }
        let mut looked_at = 0;
        while leading.in_flight.len() < TXNS_IN_FLIGHT && looked_at < PGS_PER_STEP {
            let mut bundle = Bundle::default();
            while bundle.pgs.len() < PGS_PER_TXN && looked_at < PGS_PER_STEP {
                let Some(pg) = leading.dirty.pop_first() else { break };
                looked_at += 1;
                if leading.busy.contains(&pg) {
                    continue; // looked at again when the answer is there
                }
                let any_primary = self.planted.has(Bug::PickStalePrimary);
                if let Some((record, revision)) = leading.look_at(view, pg, now, any_primary) {
                    bundle.add(pg, &record, revision);
                }
            }
            if bundle.pgs.is_empty() {
                break;
            }
            self.next_batch += 1;
            leading.busy.extend(&bundle.pgs);
            leading.in_flight.insert(self.next_batch, Batch::Pgs(bundle.pgs));
            let request = MetaRequest::Txn { compares: bundle.compares, writes: bundle.writes };
            plans.push(Plan { batch: self.next_batch, request });
        }
        plans
    }

    /// Whether `plan` would find something to do now.
    pub fn has_work(&self, now: Mono) -> bool {
        self.leading.as_ref().is_some_and(|l| {
            now >= l.paused_until
                && (!l.retarget.is_empty()
                    || l.placing.is_some()
                    || !l.dirty.is_empty() && l.in_flight.len() < TXNS_IN_FLIGHT)
        })
    }

    /// The answer to a plan. The view should already have the changes of an applied one; if not, a
    /// comparison fails once more.
    pub fn on_reply(&mut self, batch: u64, reply: &MetaReply, now: Mono) {
        let Some(leading) = &mut self.leading else { return };
        let Some(sent) = leading.in_flight.remove(&batch) else { return };
        match reply {
            MetaReply::Applied { .. } => {}
            MetaReply::CompareFailed { .. } => self.counters.conflicts += 1,
            _ => leading.paused_until = now.plus_ms(RETRY_MS),
        }
        match sent {
            Batch::Removal(pool) => {
                leading.dirty_pools.insert(pool);
            }
            Batch::Pgs(pgs) => {
                let applied = matches!(reply, MetaReply::Applied { .. });
                if applied {
                    self.counters.records += pgs.len() as u64;
                }
                for pg in pgs {
                    leading.busy.remove(&pg);
                    leading.dirty.insert(pg);
                    if applied {
                        leading.restarted.remove(&pg);
                    }
                }
            }
        }
    }
}

impl Leading {
    fn note_failed(&mut self, view: &View, node: NodeId) {
        match view.live().get(&node).map(|live| live.failed.clone()).filter(|failed| !failed.is_empty()) {
            Some(failed) => self.failed.insert(node, failed),
            None => self.failed.remove(&node),
        };
    }

    /// What copies may be placed on: every slice registered that has not failed.
    fn placeable(&self, view: &View) -> Arc<Topology> {
        let failed: BTreeSet<SliceId> = self.failed.values().flatten().copied().collect();
        if failed.is_empty() {
            return Arc::new(view.topology());
        }
        let mut nodes: Vec<Node> = view.nodes().values().cloned().collect();
        for disk in nodes.iter_mut().flat_map(|node| &mut node.disks) {
            disk.slices.retain(|slice| !failed.contains(&slice.id));
        }
        Arc::new(Topology::new(&nodes).following(&view.drained()))
    }

    /// A node that registers again as it was moves nothing.
    fn follow_topology(&mut self, view: &View) {
        let (topology, emptied) = (self.placeable(view), view.emptied());
        if topology != self.topology || emptied != self.emptied {
            (self.topology, self.emptied) = (topology, emptied);
            self.retarget.extend(view.pools().keys());
        }
    }

    fn touched_pg(&mut self, view: &View, pg: PgId, now: Mono) {
        self.dirty.insert(pg);
        let Some(entry) = view.pgs().get(&pg) else {
            self.hand_overs.forget(pg);
            self.holds.forget(pg);
            self.restarted.remove(&pg);
            self.dirty_pools.insert(pg.pool);
            return;
        };
        if entry.record.primary.is_some() {
            self.hand_overs.written(pg, &entry.record);
        }
        for slice in view.dropped() {
            if entry.record.target.contains(slice) && view.up(*slice).is_some() {
                self.holds.dropped(pg, *slice, view.former_primary(), now);
            }
        }
    }

    /// Follows placement, one pool after the other, in bounded steps.
    fn place(&mut self, view: &View) {
        // What it was computed from is not so any more.
        if self.placing.as_ref().is_some_and(|(pool, _)| self.retarget.contains(pool)) {
            self.placing = None;
        }
        if self.placing.is_none()
            && let Some(pool) = self.retarget.pop_first()
        {
            self.start_placing(view, pool);
        }
        let Some((id, assigner)) = &mut self.placing else { return };
        let Some(targets) = assigner.step(LOOKS_PER_STEP) else { return };
        for (index, (old, new)) in (0..).zip(assigner.previous().iter().zip(&targets)) {
            if old != new {
                self.dirty.insert(PgId { pool: *id, index });
            }
        }
        self.targets.insert(*id, targets);
        self.placing = None;
    }

    fn start_placing(&mut self, view: &View, id: PoolId) {
        let Some(pool) = view.pools().get(&id) else {
            self.targets.remove(&id);
            self.problems.remove(&id);
            return;
        };
        if pool.removing {
            return;
        }
        let mut previous: Vec<Vec<SliceId>> = vec![Vec::new(); pool.pg_count as usize];
        for (pg, entry) in view.pgs_of_pool(id) {
            if let Some(slot) = previous.get_mut(pg.index as usize) {
                slot.clone_from(&entry.record.target);
            }
        }
        let mut assigner = Err(PlacementError::Copies(0));
        if !self.emptied.is_empty() {
            let rest = Arc::new(self.topology.without(&self.emptied));
            assigner = Assigner::new(rest, rule_of(pool), previous.clone());
            if let Err(error) = &assigner {
                tracing::warn!(pool = pool.name, %error, "copies stay on drained nodes");
            }
        }
        match assigner.or_else(|_| Assigner::new(self.topology.clone(), rule_of(pool), previous)) {
            Ok(assigner) => {
                self.problems.remove(&id);
                self.placing = Some((id, assigner));
            }
            Err(error) => {
                if self.problems.get(&id) != Some(&error) {
                    tracing::warn!(pool = pool.name, %error, "pool cannot be placed");
                }
                self.problems.insert(id, error);
            }
        }
    }

    /// Wakes the PGs of a pool that do not exist yet, and clears away a removed pool.
    fn look_at_pool(&mut self, view: &View, id: PoolId) -> Option<MetaRequest> {
        let pool = view.pools().get(&id)?;
        if !pool.removing {
            let known: BTreeSet<u32> = view.pgs_of_pool(id).map(|(pg, _)| pg.index).collect();
            if known.len() < pool.pg_count as usize {
                let missing = (0..pool.pg_count).filter(|index| !known.contains(index));
                self.dirty.extend(missing.map(|index| PgId { pool: id, index }));
            }
            return None;
        }
        let under_way = self.in_flight.values().any(|b| matches!(b, Batch::Removal(p) if *p == id));
        if view.images_in(id) > 0 || under_way {
            return None;
        }
        let delete = |key: String| Write::Delete { key };
        let mut writes: Vec<Write> = view
            .pgs_of_pool(id)
            .take(PGS_PER_TXN)
            .flat_map(|(pg, _)| [delete(key::pg(*pg)), delete(key::scrub(*pg))])
            .collect();
        if writes.is_empty() {
            writes = vec![delete(key::pool(id)), delete(key::pool_name(&pool.name))];
        }
        Some(MetaRequest::Txn { compares: vec![Compare::Exists { key: key::pool(id) }], writes })
    }

    /// The next record of a PG and the revision it replaces.
    fn look_at(
        &mut self,
        view: &View,
        pg: PgId,
        now: Mono,
        any_primary: bool,
    ) -> Option<(PgRecord, Revision)> {
        let pool = view.pools().get(&pg.pool).filter(|pool| !pool.removing)?;
        let placed = self.targets.get(&pg.pool).and_then(|t| t.get(pg.index as usize));
        let entry = view.pgs().get(&pg);
        let target = placed.cloned().or_else(|| Some(entry?.record.target.clone()))?;
        let mut held = self.holds.of(pg, entry.map(|entry| &entry.record), now);
        let mut consent = false;
        if let Some(primary) = entry.and_then(|e| e.record.primary)
            && view.home(primary).is_some_and(|home| self.unreachable.contains(&home.node))
        {
            held.insert(primary);
            consent = true;
        }
        let lost = std::mem::take(&mut self.lost);
        let situation = Situation {
            view,
            pool,
            target: &target,
            settling: !self.settled,
            lost: &lost,
            held: &held,
            restarted: self.restarted.contains(&pg),
            consent,
            any_primary,
        };
        let record = match entry {
            Some(entry) => self.next_or_hand_over(&situation, pg, entry, now),
            None => situation.first(),
        };
        self.lost = lost;
        if record.is_none() && self.settled {
            self.restarted.remove(&pg);
        }
        record.map(|record| (record, entry.map_or(Revision(0), |entry| entry.revision)))
    }

    fn next_or_hand_over(
        &mut self,
        situation: &Situation<'_>,
        pg: PgId,
        entry: &PgEntry,
        now: Mono,
    ) -> Option<PgRecord> {
        if entry.record.primary.is_some() {
            self.hand_overs.not_begun(pg);
        }
        let members_up = entry.record.acting.iter().all(|s| situation.view.up(*s).is_some());
        if self.hand_overs.halfway(pg, members_up, now) == Halfway::Wait {
            return None;
        }
        if let Some(next) = situation.next(entry) {
            self.hand_overs.unwanted(pg);
            return Some(next);
        }
        let why = if situation.wants_relief(&entry.record) {
            Some(Why::Drained)
        } else {
            situation.wants_hand_over(&entry.record).then_some(Why::Preferred)
        };
        let (Some(why), Some(former)) = (why, entry.record.primary) else {
            self.hand_overs.unwanted(pg);
            return None;
        };
        self.hand_overs.want(pg, why, former, now).then(|| begin_hand_over(&entry.record))
    }
}

/// A pool's rule, for those who want to know beforehand whether it can be placed.
pub fn rule_of(pool: &Pool) -> Rule {
    Rule {
        copies: pool.copies,
        pg_count: pool.pg_count,
        failure_domain: pool.failure_domain,
        seed: u64::from(pool.id.0),
    }
}
