//! Who comes first in each PG's list. A primary costs its slice's core far more than a member does, so
//! primaries are spread over slices and over cores on their own.
//!
//! A previous first member stays first while the bounds allow it: a change of primary interrupts the PG
//! for a moment. Slices that do not lead (their node is drained) come first only where nobody else can.
//! The order behind the first says who takes over, so it is shuffled per PG: the PGs of a
//! lost slice get primaries all over the cluster.

use crate::assign::{Rule, Step, chain, mix};
use crate::fair::{Share, UNIT};
use crate::topology::{Spot, Topology};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use wire::{NodeId, SliceId};

/// How far a slice's or core's primaries may be from fair, in percent, before existing ones move.
const PRIMARY_TOLERANCE_PERCENT: u64 = 8;

type Core = (NodeId, u16);

/// What is chosen next.
enum Stage {
    /// Former first members stay, from this PG on.
    Keep(usize),
    /// PGs without one get the lightest, from this PG on.
    Lightest(usize),
    /// Slices beyond their bounds hand on, from this one on.
    Heavy(usize),
    /// Slices below their bounds are handed some, from this one on.
    Light(usize),
    /// The same for these cores, the last one first.
    Cores(Vec<Core>),
    /// Lists are put in order, from this PG on.
    Order(usize),
}

/// Orders every list of `members` (indices into the topology's spots), in bounded steps.
pub(crate) struct Chooser {
    state: State,
    stage: Stage,
}

impl Chooser {
    pub(crate) fn new(topology: Arc<Topology>, members: &[Vec<usize>]) -> Self {
        Self { state: State::new(topology, members), stage: Stage::Keep(0) }
    }

    /// One step: of one PG, slice or core. How many places it looked at; `None` when all is done.
    pub(crate) fn step(
        &mut self,
        rule: &Rule,
        members: &mut [Vec<usize>],
        previous: &[Vec<SliceId>],
    ) -> Option<u64> {
        let state = &mut self.state;
        let looked = state.looks.get();
        match &mut self.stage {
            Stage::Keep(pg) => match members.get(*pg) {
                Some(list) => {
                    let before = previous.get(*pg).and_then(|list| list.first());
                    let kept = before.and_then(|slice| {
                        let at = |&m: &usize| state.spots().get(m).is_some_and(|s| s.slice == *slice);
                        list.iter().copied().filter(|&m| state.may_lead(m, list)).find(at)
                    });
                    if let Some(first) = kept {
                        state.set(*pg as u32, first);
                    }
                    *pg += 1;
                }
                None => self.stage = Stage::Lightest(0),
            },
            Stage::Lightest(pg) => match members.get(*pg) {
                Some(list) => {
                    if state.first.get(*pg).copied().flatten().is_none() {
                        let able = list.iter().copied().filter(|&m| state.may_lead(m, list));
                        let lightest = able.min_by_key(|&m| {
                            let order = mix(rule.seed ^ 1, *pg as u64, m as u64);
                            (state.excess(m).saturating_add(state.core_excess(m)), order)
                        });
                        if let Some(first) = lightest {
                            state.set(*pg as u32, first);
                        }
                    }
                    *pg += 1;
                }
                None => self.stage = Stage::Heavy(0),
            },
            Stage::Heavy(spot) if *spot < state.spots().len() => {
                if !state.relieve(*spot, members) {
                    *spot += 1;
                }
            }
            Stage::Heavy(_) => self.stage = Stage::Light(0),
            Stage::Light(spot) if *spot < state.spots().len() => {
                if !state.burden(*spot, members) {
                    *spot += 1;
                }
            }
            // Cores in their order: the last of the list is taken first.
            Stage::Light(_) => self.stage = Stage::Cores(state.cores.keys().rev().copied().collect()),
            Stage::Cores(cores) => match cores.last() {
                Some(&core) => {
                    if !state.relieve_core(core, members) && !state.burden_core(core, members) {
                        cores.pop();
                    }
                }
                None => self.stage = Stage::Order(0),
            },
            Stage::Order(pg) => {
                let at = *pg;
                state.order(rule, at, members.get_mut(at)?, previous);
                *pg += 1;
            }
        }
        Some(1 + state.looks.get() - looked)
    }
}

/// Whether a member of a list may come first in it: it leads, or none of them does.
fn may_lead(spots: &[Spot], member: usize, list: &[usize]) -> bool {
    let leads = |m: usize| spots.get(m).is_some_and(|spot| spot.leads);
    leads(member) || !list.iter().any(|&m| leads(m))
}

struct State {
    topology: Arc<Topology>,
    first: Vec<Option<usize>>,
    /// The PGs that each slice leads.
    led: Vec<BTreeSet<u32>>,
    shares: Vec<Share>,
    cores: BTreeMap<Core, (Share, u32)>,
    /// Places looked at so far.
    looks: Cell<u64>,
}

impl State {
    fn new(topology: Arc<Topology>, members: &[Vec<usize>]) -> Self {
        let spots = topology.spots();
        let mut fair = vec![0u64; spots.len()];
        for list in members {
            let able = list.iter().filter(|&&m| may_lead(spots, m, list)).count().max(1) as u64;
            for &member in list.iter().filter(|&&m| may_lead(spots, m, list)) {
                if let Some(fair) = fair.get_mut(member) {
                    *fair += UNIT / able;
                }
            }
        }
        let mut of_cores: BTreeMap<Core, u64> = BTreeMap::new();
        for (spot, fair) in spots.iter().zip(&fair) {
            *of_cores.entry((spot.node, spot.core)).or_default() += fair;
        }
        let share = |fair: u64| Share::new(fair, PRIMARY_TOLERANCE_PERCENT);
        Self {
            first: vec![None; members.len()],
            led: vec![BTreeSet::new(); spots.len()],
            shares: fair.into_iter().map(share).collect(),
            cores: of_cores.into_iter().map(|(core, fair)| (core, (share(fair), 0))).collect(),
            looks: Cell::new(0),
            topology,
        }
    }

    fn spots(&self) -> &[Spot] {
        self.topology.spots()
    }

    fn may_lead(&self, spot: usize, list: &[usize]) -> bool {
        may_lead(self.spots(), spot, list)
    }

    /// Puts the chosen one first and the others behind: previous ones as they were, new ones shuffled.
    fn order(&self, rule: &Rule, pg: usize, list: &mut [usize], previous: &[Vec<SliceId>]) {
        let before = previous.get(pg).map_or(&[][..], Vec::as_slice);
        let chosen = self.first.get(pg).copied().flatten();
        list.sort_by_key(|&m| {
            let slice = self.spots().get(m).map(|spot| spot.slice);
            let place = before.iter().position(|s| Some(*s) == slice).unwrap_or(usize::MAX);
            (Some(m) != chosen, place, mix(rule.seed ^ 2, pg as u64, slice.map_or(0, |s| s.0)))
        });
    }

    fn core(&self, spot: usize) -> Core {
        self.spots().get(spot).map_or((NodeId(0), 0), |s| (s.node, s.core))
    }

    fn load(&self, spot: usize) -> u32 {
        self.led.get(spot).map_or(0, |led| led.len() as u32)
    }

    fn share(&self, spot: usize) -> Share {
        self.shares.get(spot).copied().unwrap_or_default()
    }

    fn excess(&self, spot: usize) -> i64 {
        self.share(spot).excess(self.load(spot))
    }

    fn core_excess(&self, spot: usize) -> i64 {
        self.cores.get(&self.core(spot)).map_or(0, |(share, load)| share.excess(*load))
    }

    fn set(&mut self, pg: u32, to: usize) {
        let Some(first) = self.first.get_mut(pg as usize) else { return };
        let from = first.replace(to);
        if let Some(from) = from {
            if let Some(led) = self.led.get_mut(from) {
                led.remove(&pg);
            }
            if let Some((_, load)) = self.cores.get_mut(&self.core(from)) {
                *load = load.saturating_sub(1);
            }
        }
        if let Some(led) = self.led.get_mut(to) {
            led.insert(pg);
        }
        if let Some((_, load)) = self.cores.get_mut(&self.core(to)) {
            *load += 1;
        }
    }

    fn steps(&self, from: usize, members: &[Vec<usize>], seen: &[bool]) -> Vec<(usize, u32)> {
        let mut steps: BTreeMap<usize, u32> = BTreeMap::new();
        for &pg in self.led.get(from).into_iter().flatten() {
            self.looks.set(self.looks.get() + 1);
            let list = members.get(pg as usize).map_or(&[][..], Vec::as_slice);
            for &to in list {
                if !seen.get(to).copied().unwrap_or(true) && self.may_lead(to, list) {
                    steps.entry(to).or_insert(pg);
                }
            }
        }
        steps.into_iter().collect()
    }

    fn take(&mut self, path: Option<Vec<Step>>) -> bool {
        let Some(path) = path else { return false };
        for (_, to, pg) in path {
            self.set(pg, to);
        }
        true
    }

    /// Hands one of a slice's PGs on if it leads too many. False when it does not, or nobody can take one.
    fn relieve(&mut self, spot: usize, members: &[Vec<usize>]) -> bool {
        if self.load(spot) <= self.share(spot).high {
            return false;
        }
        let path = chain(
            self.spots().len(),
            &[spot],
            |at, seen| self.steps(at, members, seen),
            |at| (self.load(at) < self.share(at).high).then(|| self.excess(at)),
        );
        self.take(path)
    }

    /// Hands a slice a PG if it leads too few. False when it does not, or nobody can give one.
    fn burden(&mut self, spot: usize, members: &[Vec<usize>]) -> bool {
        if self.load(spot) >= self.share(spot).low {
            return false;
        }
        let mut donors: Vec<usize> =
            (0..self.spots().len()).filter(|&s| s != spot && self.load(s) > self.share(s).low).collect();
        donors.sort_by_key(|&s| (-self.excess(s), s));
        let path = chain(
            self.spots().len(),
            &donors,
            |at, seen| self.steps(at, members, seen),
            |at| (at == spot).then_some(0),
        );
        self.take(path)
    }

    fn core_share(&self, core: Core) -> (Share, u32) {
        self.cores.get(&core).copied().unwrap_or_default()
    }

    fn has_room(&self, spot: usize) -> bool {
        self.load(spot) < self.share(spot).high
    }

    fn has_spare(&self, spot: usize) -> bool {
        self.load(spot) > self.share(spot).low
    }

    /// As `relieve` for a core, without taking a slice out of its bounds.
    fn relieve_core(&mut self, core: Core, members: &[Vec<usize>]) -> bool {
        let (share, load) = self.core_share(core);
        if load <= share.high {
            return false;
        }
        let all = 0..self.spots().len();
        let sources: Vec<usize> = all.filter(|&s| self.core(s) == core && self.has_spare(s)).collect();
        let path = chain(
            self.spots().len(),
            &sources,
            |at, seen| self.steps(at, members, seen),
            |at| {
                let (share, load) = self.core_share(self.core(at));
                (self.core(at) != core && load < share.high && self.has_room(at))
                    .then(|| self.core_excess(at))
            },
        );
        self.take(path)
    }

    /// As `burden` for a core, without taking a slice out of its bounds.
    fn burden_core(&mut self, core: Core, members: &[Vec<usize>]) -> bool {
        let (share, load) = self.core_share(core);
        if load >= share.low {
            return false;
        }
        let donor = |s: usize| {
            let (share, load) = self.core_share(self.core(s));
            self.core(s) != core && load > share.low && self.has_spare(s)
        };
        let sources: Vec<usize> = (0..self.spots().len()).filter(|&s| donor(s)).collect();
        let path = chain(
            self.spots().len(),
            &sources,
            |at, seen| self.steps(at, members, seen),
            |at| (self.core(at) == core && self.has_room(at)).then_some(0),
        );
        self.take(path)
    }
}
