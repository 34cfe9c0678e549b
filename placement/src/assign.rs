//! The rule: which slices hold each PG of a pool.
//!
//! The result depends on the topology, the pool's rule and the previous assignment, on nothing else.
//! 1. Every place of the previous assignment that is still valid stays.
//! 2. Empty places go to slices that lack PGs, drawn in proportion to what they lack, so that any two
//!    slices share PGs and a lost slice is rebuilt by all others.
//! 3. Slices outside their bounds (`fair`) hand PGs on, first only those placed in step 2, then, when
//!    that leaves someone outside the tolerance, any. A chain of hand-overs is tried when no direct one helps.
//! 4. `primary` chooses who comes first in each list.

use crate::fair::{Share, shares};
use crate::map::FailureDomain;
use crate::primary::Chooser;
use crate::topology::{Spot, Topology};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;
use thiserror::Error;
use wire::SliceId;

/// Most copies of an object: a write goes to all of them in parallel, and more than eight protect
/// against nothing that eight do not.
pub const COPIES_MAX: u8 = 8;
/// Most PGs of a pool: each is a key of the metadata store and an assignment must end in a blink.
pub const PG_COUNT_MAX: u32 = 16_384;

/// What a pool asks of placement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Copies of each object.
    pub copies: u8,
    /// Placement groups.
    pub pg_count: u32,
    /// What copies may not share.
    pub failure_domain: FailureDomain,
    /// Makes pools with the same shape differ; the pool's number.
    pub seed: u64,
}

/// Why a pool cannot be placed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum PlacementError {
    /// Copies must lie on different domains and there are too few of them.
    #[error(
        "{needed} copies need {needed} different {kind}s with usable slices, the cluster has {have}: \
         add {kind}s, or ask for fewer copies{hint}"
    )]
    NotEnoughDomains {
        /// `host` or `disk`.
        kind: &'static str,
        /// Domains that exist.
        have: usize,
        /// Domains that are needed.
        needed: usize,
        /// More advice.
        hint: &'static str,
    },
    /// The number of copies makes no sense.
    #[error("{0} copies asked for, from 1 to {COPIES_MAX} are possible")]
    Copies(u8),
    /// The number of PGs makes no sense.
    #[error("{0} placement groups asked for, from 1 to {PG_COUNT_MAX} are possible")]
    PgCount(u32),
}

/// An ordered list of slices for every PG of a pool: the first is the preferred primary.
///
/// `previous` is the last result for this pool (shorter, longer or empty is fine); what can stay stays.
pub fn assign(
    topology: &Topology,
    rule: &Rule,
    previous: &[Vec<SliceId>],
) -> Result<Vec<Vec<SliceId>>, PlacementError> {
    let mut assigner = Assigner::new(Arc::new(topology.clone()), *rule, previous.to_vec())?;
    loop {
        if let Some(lists) = assigner.step(u64::MAX) {
            return Ok(lists);
        }
    }
}

/// Looks at places in one step of an assignment that shares a loop with others: well below a millisecond, so that even a
/// slow machine stays below the five that a step may take.
pub const LOOKS_PER_STEP: u64 = 20_000;

/// What an assignment does next.
enum Stage {
    /// Step 1, from this PG on.
    Keep(u32),
    /// Step 2, from this PG on.
    Fill(u32),
    /// Step 3: the slices that are stuck, and the bounds that hold afterwards.
    Fresh(BTreeSet<usize>, Vec<Share>),
    /// Step 3 again, any PG.
    All(BTreeSet<usize>),
    /// Step 4.
    Primaries(Box<Chooser>),
}

/// `assign` in bounded steps, for pools with many PGs.
pub struct Assigner {
    state: State,
    stage: Stage,
    previous: Vec<Vec<SliceId>>,
}

impl Assigner {
    /// Takes what `assign` takes.
    pub fn new(
        topology: Arc<Topology>,
        rule: Rule,
        previous: Vec<Vec<SliceId>>,
    ) -> Result<Self, PlacementError> {
        check(&topology, &rule)?;
        Ok(Self { state: State::new(topology, rule), stage: Stage::Keep(0), previous })
    }

    /// The assignment that this one starts from.
    pub fn previous(&self) -> &[Vec<SliceId>] {
        &self.previous
    }

    /// Places looked at so far: what the work is counted in.
    pub fn looks(&self) -> u64 {
        self.state.looks.get()
    }

    /// Goes on for about so many looks; the result when it is there.
    pub fn step(&mut self, looks: u64) -> Option<Vec<Vec<SliceId>>> {
        let until = self.state.looks.get().saturating_add(looks);
        while self.state.looks.get() < until {
            self.state.look(1);
            let count = self.state.rule.pg_count;
            match &mut self.stage {
                Stage::Keep(pg) if *pg < count => {
                    let list = self.previous.get(*pg as usize).map_or(&[][..], Vec::as_slice);
                    self.state.keep(*pg, list);
                    *pg += 1;
                }
                Stage::Keep(_) => self.stage = Stage::Fill(0),
                Stage::Fill(pg) if *pg < count => {
                    self.state.fill(*pg);
                    *pg += 1;
                }
                Stage::Fill(_) => {
                    let loose = self.state.shares.clone();
                    self.state.shares.iter_mut().for_each(|share| *share = share.tight());
                    self.stage = Stage::Fresh(BTreeSet::new(), loose);
                }
                Stage::Fresh(stuck, loose) => {
                    if !self.state.rebalance(Movable::Fresh, stuck) {
                        self.state.shares = std::mem::take(loose);
                        self.stage = Stage::All(BTreeSet::new());
                    }
                }
                Stage::All(stuck) => {
                    if !self.state.rebalance(Movable::All, stuck) {
                        let chooser = Chooser::new(self.state.topology.clone(), &self.state.members);
                        self.stage = Stage::Primaries(Box::new(chooser));
                    }
                }
                Stage::Primaries(chooser) => {
                    let looked = chooser.step(&self.state.rule, &mut self.state.members, &self.previous);
                    match looked {
                        Some(looked) => self.state.look(looked),
                        None => return Some(self.state.lists()),
                    }
                }
            }
        }
        None
    }
}

fn check(topology: &Topology, rule: &Rule) -> Result<(), PlacementError> {
    if rule.copies == 0 || rule.copies > COPIES_MAX {
        return Err(PlacementError::Copies(rule.copies));
    }
    if rule.pg_count == 0 || rule.pg_count > PG_COUNT_MAX {
        return Err(PlacementError::PgCount(rule.pg_count));
    }
    let (have, needed) = (topology.domains(rule.failure_domain), usize::from(rule.copies));
    if have >= needed {
        return Ok(());
    }
    let (kind, hint) = match rule.failure_domain {
        FailureDomain::Host if topology.domains(FailureDomain::Disk) >= needed => {
            ("host", ", or let copies share a host (failure domain disk)")
        }
        FailureDomain::Host => ("host", ""),
        FailureDomain::Disk => ("disk", ""),
    };
    Err(PlacementError::NotEnoughDomains { kind, have, needed, hint })
}

/// A well mixed number from three, the same on every machine.
pub(crate) fn mix(seed: u64, a: u64, b: u64) -> u64 {
    let mut hash = seed ^ 0x9e37_79b9_7f4a_7c15;
    for word in [a, b] {
        hash = hash.wrapping_add(word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^= hash >> 31;
    }
    hash
}

/// Which places a rebalancing may move.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Movable {
    /// Those filled in this run: nothing is copied that would not be copied anyway.
    Fresh,
    /// Any.
    All,
}

/// An assignment in the making. Slices are indices into the topology's spots, PGs are their numbers.
struct State {
    topology: Arc<Topology>,
    rule: Rule,
    shares: Vec<Share>,
    members: Vec<Vec<usize>>,
    /// The PGs of each slice.
    held: Vec<BTreeSet<u32>>,
    /// Places filled in this run.
    fresh: BTreeSet<(u32, usize)>,
    /// Places looked at so far.
    looks: Cell<u64>,
}

impl State {
    fn new(topology: Arc<Topology>, rule: Rule) -> Self {
        Self {
            shares: shares(&topology, rule.failure_domain, rule.copies, rule.pg_count),
            members: vec![Vec::new(); rule.pg_count as usize],
            held: vec![BTreeSet::new(); topology.spots().len()],
            fresh: BTreeSet::new(),
            looks: Cell::new(0),
            topology,
            rule,
        }
    }

    fn spots(&self) -> &[Spot] {
        self.topology.spots()
    }

    fn look(&self, places: u64) {
        self.looks.set(self.looks.get().saturating_add(places));
    }

    fn lists(&self) -> Vec<Vec<SliceId>> {
        let name = |at: &usize| self.spots().get(*at).map(|spot| spot.slice);
        self.members.iter().map(|list| list.iter().filter_map(name).collect()).collect()
    }

    fn load(&self, spot: usize) -> u32 {
        self.held.get(spot).map_or(0, |held| held.len() as u32)
    }

    fn share(&self, spot: usize) -> Share {
        self.shares.get(spot).copied().unwrap_or_default()
    }

    fn excess(&self, spot: usize) -> i64 {
        self.share(spot).excess(self.load(spot))
    }

    fn domain(&self, spot: usize) -> Option<u32> {
        self.spots().get(spot).map(|s| s.domain(self.rule.failure_domain))
    }

    fn members_of(&self, pg: u32) -> &[usize] {
        self.members.get(pg as usize).map_or(&[], Vec::as_slice)
    }

    /// Whether `to` may join the PG when `leaving` is no longer counted.
    fn may_join(&self, pg: u32, to: usize, leaving: Option<usize>) -> bool {
        self.look(1);
        let domain = self.domain(to);
        self.members_of(pg).iter().all(|&m| m != to && (Some(m) == leaving || self.domain(m) != domain))
    }

    fn moves(&self, movable: Movable, pg: u32, from: usize) -> bool {
        movable == Movable::All || self.fresh.contains(&(pg, from))
    }

    fn add(&mut self, pg: u32, spot: usize) {
        if let (Some(list), Some(held)) = (self.members.get_mut(pg as usize), self.held.get_mut(spot)) {
            list.push(spot);
            held.insert(pg);
        }
    }

    fn relocate(&mut self, pg: u32, from: usize, to: usize) {
        if let Some(list) = self.members.get_mut(pg as usize) {
            list.retain(|&m| m != from);
        }
        if let Some(held) = self.held.get_mut(from) {
            held.remove(&pg);
        }
        self.add(pg, to);
        self.fresh.remove(&(pg, from));
        self.fresh.insert((pg, to));
    }

    /// Step 1 for one PG.
    fn keep(&mut self, pg: u32, previous: &[SliceId]) {
        for slice in previous {
            if self.members_of(pg).len() == usize::from(self.rule.copies) {
                break;
            }
            if let Some(spot) = self.topology.position(*slice)
                && self.may_join(pg, spot, None)
            {
                self.add(pg, spot);
            }
        }
    }

    /// Step 2 for one PG.
    fn fill(&mut self, pg: u32) {
        while self.members_of(pg).len() < usize::from(self.rule.copies) {
            let Some(spot) = self.draw(pg) else { break };
            self.add(pg, spot);
            self.fresh.insert((pg, spot));
        }
    }

    /// A slice for a PG's next place.
    fn draw(&self, pg: u32) -> Option<usize> {
        let place = self.members_of(pg).len() as u64;
        let candidates: Vec<usize> =
            (0..self.spots().len()).filter(|&spot| self.may_join(pg, spot, None)).collect();
        let lack = |spot: usize| self.excess(spot).min(0).unsigned_abs();
        let total: u64 = candidates.iter().map(|&spot| lack(spot)).sum();
        if total == 0 {
            return candidates.into_iter().min_by_key(|&spot| self.excess(spot));
        }
        let mut at = mix(self.rule.seed, u64::from(pg), place) % total;
        for &spot in &candidates {
            let lack = lack(spot);
            if at < lack {
                return Some(spot);
            }
            at -= lack;
        }
        None
    }

    /// Step 3, one move: of a place that `movable` allows, for the slice that is furthest outside its bounds.
    /// False when every slice is within its bounds or stuck.
    fn rebalance(&mut self, movable: Movable, stuck: &mut BTreeSet<usize>) -> bool {
        self.look(self.spots().len() as u64);
        let worst = (0..self.spots().len())
            .filter(|spot| !stuck.contains(spot))
            .filter_map(|spot| {
                let (load, share) = (self.load(spot), self.share(spot));
                let by = load.saturating_sub(share.high).max(share.low.saturating_sub(load));
                (by > 0).then_some((by, spot))
            })
            .max_by_key(|&(by, spot)| (by, std::cmp::Reverse(spot)));
        let Some((_, spot)) = worst else { return false };
        let moved = if self.load(spot) > self.share(spot).high {
            self.push_from(spot, movable)
        } else {
            self.pull_to(spot, movable)
        };
        if !moved {
            stuck.insert(spot);
        }
        true
    }

    fn push_from(&mut self, from: usize, movable: Movable) -> bool {
        let path = chain(
            self.spots().len(),
            &[from],
            |spot, seen| self.steps(spot, movable, seen),
            |spot| (self.load(spot) < self.share(spot).high).then(|| self.excess(spot)),
        );
        self.take(path)
    }

    fn pull_to(&mut self, to: usize, movable: Movable) -> bool {
        let mut donors: Vec<usize> =
            (0..self.spots().len()).filter(|&s| s != to && self.load(s) > self.share(s).low).collect();
        donors.sort_by_key(|&s| (-self.excess(s), s));
        for &donor in &donors {
            let fits = |&&pg: &&u32| self.moves(movable, pg, donor) && self.may_join(pg, to, Some(donor));
            let Some(held) = self.held.get(donor) else { continue };
            // A PG that the donor does not lead moves without a change of primary.
            let led = |pg: u32| self.members_of(pg).first() == Some(&donor);
            let found = held.iter().filter(fits).find(|pg| !led(**pg)).or_else(|| held.iter().find(fits));
            if let Some(&pg) = found {
                self.relocate(pg, donor, to);
                return true;
            }
        }
        let path = chain(
            self.spots().len(),
            &donors,
            |spot, seen| self.steps(spot, movable, seen),
            |spot| (spot == to).then_some(0),
        );
        self.take(path)
    }

    /// Slices to which one of `from`'s PGs can move, each with the first such PG.
    fn steps(&self, from: usize, movable: Movable, seen: &[bool]) -> Vec<(usize, u32)> {
        let Some(held) = self.held.get(from) else { return Vec::new() };
        let mut wanted: Vec<usize> =
            (0..self.spots().len()).filter(|&to| !seen.get(to).copied().unwrap_or(true)).collect();
        let mut steps = Vec::new();
        for &pg in held.iter().filter(|&&pg| self.moves(movable, pg, from)) {
            wanted.retain(|&to| {
                let fits = self.may_join(pg, to, Some(from));
                if fits {
                    steps.push((to, pg));
                }
                !fits
            });
            if wanted.is_empty() {
                break;
            }
        }
        steps
    }

    fn take(&mut self, path: Option<Vec<Step>>) -> bool {
        let Some(path) = path else { return false };
        let pgs: BTreeSet<u32> = path.iter().map(|&(_, _, pg)| pg).collect();
        if pgs.len() != path.len() {
            return false; // two moves of one PG could bring two copies into one domain
        }
        for (from, to, pg) in path {
            self.relocate(pg, from, to);
        }
        true
    }
}

/// A hand-over: from, to, which PG.
pub(crate) type Step = (usize, usize, u32);

/// The shortest chain of hand-overs from one of `sources` to a node for which `end` gives a rank, the
/// lowest rank among the equally short ones. `next` lists the nodes not yet `seen` that a node can hand
/// a PG to.
pub(crate) fn chain(
    nodes: usize,
    sources: &[usize],
    next: impl Fn(usize, &[bool]) -> Vec<(usize, u32)>,
    end: impl Fn(usize) -> Option<i64>,
) -> Option<Vec<Step>> {
    let mut seen = vec![false; nodes];
    let mut parent: Vec<Option<(usize, u32)>> = vec![None; nodes];
    let mut frontier = sources.to_vec();
    for &source in sources {
        *seen.get_mut(source)? = true;
    }
    while !frontier.is_empty() {
        let mut found: Vec<usize> = Vec::new();
        for node in std::mem::take(&mut frontier) {
            for (to, pg) in next(node, &seen) {
                *seen.get_mut(to)? = true;
                *parent.get_mut(to)? = Some((node, pg));
                found.push(to);
            }
        }
        if let Some(best) = found.iter().copied().filter_map(|n| Some((end(n)?, n))).min() {
            let mut path = Vec::new();
            let mut at = best.1;
            while let Some(&Some((from, pg))) = parent.get(at) {
                path.push((from, at, pg));
                at = from;
            }
            path.reverse();
            return Some(path);
        }
        frontier = found;
    }
    None
}
