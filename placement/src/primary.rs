//! Who comes first in each PG's list. A primary costs its slice's core far more than a member does, so
//! primaries are spread over slices and over cores on their own.
//!
//! A previous first member stays first while the bounds allow it: a change of primary interrupts the PG
//! for a moment. The order behind the first says who takes over, so it is shuffled per PG: the PGs of a
//! lost slice get primaries all over the cluster.

use crate::assign::{Rule, Step, chain, mix};
use crate::fair::{Share, UNIT};
use crate::topology::Spot;
use std::collections::{BTreeMap, BTreeSet};
use wire::{NodeId, SliceId};

/// How far a slice's or core's primaries may be from fair, in percent, before existing ones move.
const PRIMARY_TOLERANCE_PERCENT: u64 = 8;

type Core = (NodeId, u16);

/// Orders every list of `members` (indices into `spots`).
pub(crate) fn choose(spots: &[Spot], rule: &Rule, members: &mut [Vec<usize>], previous: &[Vec<SliceId>]) {
    let mut state = State::new(spots, members);
    for (pg, list) in members.iter().enumerate() {
        let before = previous.get(pg).and_then(|list| list.first());
        let kept = before.and_then(|slice| {
            list.iter().copied().find(|&m| spots.get(m).is_some_and(|spot| spot.slice == *slice))
        });
        if let Some(first) = kept {
            state.set(pg as u32, first);
        }
    }
    for (pg, list) in members.iter().enumerate() {
        if state.first.get(pg).copied().flatten().is_none() {
            let lightest = list.iter().copied().min_by_key(|&m| {
                let order = mix(rule.seed ^ 1, pg as u64, m as u64);
                (state.excess(m).saturating_add(state.core_excess(m)), order)
            });
            if let Some(first) = lightest {
                state.set(pg as u32, first);
            }
        }
    }
    state.balance_slices(members);
    state.balance_cores(members);
    order(spots, rule, members, previous, &state.first);
}

/// Puts the chosen one first and the others behind: previous ones as they were, new ones shuffled.
fn order(
    spots: &[Spot],
    rule: &Rule,
    members: &mut [Vec<usize>],
    previous: &[Vec<SliceId>],
    first: &[Option<usize>],
) {
    for (pg, list) in members.iter_mut().enumerate() {
        let before = previous.get(pg).map_or(&[][..], Vec::as_slice);
        let chosen = first.get(pg).copied().flatten();
        list.sort_by_key(|&m| {
            let slice = spots.get(m).map(|spot| spot.slice);
            let place = before.iter().position(|s| Some(*s) == slice).unwrap_or(usize::MAX);
            (Some(m) != chosen, place, mix(rule.seed ^ 2, pg as u64, slice.map_or(0, |s| s.0)))
        });
    }
}

struct State<'a> {
    spots: &'a [Spot],
    first: Vec<Option<usize>>,
    /// The PGs that each slice leads.
    led: Vec<BTreeSet<u32>>,
    shares: Vec<Share>,
    cores: BTreeMap<Core, (Share, u32)>,
}

impl<'a> State<'a> {
    fn new(spots: &'a [Spot], members: &[Vec<usize>]) -> Self {
        let mut fair = vec![0u64; spots.len()];
        for list in members {
            for &member in list {
                if let Some(fair) = fair.get_mut(member) {
                    *fair += UNIT / list.len() as u64;
                }
            }
        }
        let mut of_cores: BTreeMap<Core, u64> = BTreeMap::new();
        for (spot, fair) in spots.iter().zip(&fair) {
            *of_cores.entry((spot.node, spot.core)).or_default() += fair;
        }
        let share = |fair: u64| Share::new(fair, PRIMARY_TOLERANCE_PERCENT);
        Self {
            spots,
            first: vec![None; members.len()],
            led: vec![BTreeSet::new(); spots.len()],
            shares: fair.into_iter().map(share).collect(),
            cores: of_cores.into_iter().map(|(core, fair)| (core, (share(fair), 0))).collect(),
        }
    }

    fn core(&self, spot: usize) -> Core {
        self.spots.get(spot).map_or((NodeId(0), 0), |s| (s.node, s.core))
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
            for &to in members.get(pg as usize).into_iter().flatten() {
                if !seen.get(to).copied().unwrap_or(true) {
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

    fn balance_slices(&mut self, members: &[Vec<usize>]) {
        for spot in 0..self.spots.len() {
            while self.load(spot) > self.share(spot).high {
                let path = chain(
                    self.spots.len(),
                    &[spot],
                    |at, seen| self.steps(at, members, seen),
                    |at| (self.load(at) < self.share(at).high).then(|| self.excess(at)),
                );
                if !self.take(path) {
                    break;
                }
            }
        }
        for spot in 0..self.spots.len() {
            while self.load(spot) < self.share(spot).low {
                let mut donors: Vec<usize> = (0..self.spots.len())
                    .filter(|&s| s != spot && self.load(s) > self.share(s).low)
                    .collect();
                donors.sort_by_key(|&s| (-self.excess(s), s));
                let path = chain(
                    self.spots.len(),
                    &donors,
                    |at, seen| self.steps(at, members, seen),
                    |at| (at == spot).then_some(0),
                );
                if !self.take(path) {
                    break;
                }
            }
        }
    }

    /// As `balance_slices` for cores, without taking a slice out of its bounds.
    fn balance_cores(&mut self, members: &[Vec<usize>]) {
        let cores: Vec<Core> = self.cores.keys().copied().collect();
        let room = |state: &Self, spot: usize| state.load(spot) < state.share(spot).high;
        let spare = |state: &Self, spot: usize| state.load(spot) > state.share(spot).low;
        let all = 0..self.spots.len();
        for core in cores {
            let bounds = |state: &Self, core: Core| state.cores.get(&core).copied().unwrap_or_default();
            while bounds(self, core).1 > bounds(self, core).0.high {
                let sources: Vec<usize> =
                    all.clone().filter(|&s| self.core(s) == core && spare(self, s)).collect();
                let path = chain(
                    self.spots.len(),
                    &sources,
                    |at, seen| self.steps(at, members, seen),
                    |at| {
                        let (share, load) = bounds(self, self.core(at));
                        (self.core(at) != core && load < share.high && room(self, at))
                            .then(|| self.core_excess(at))
                    },
                );
                if !self.take(path) {
                    break;
                }
            }
            while bounds(self, core).1 < bounds(self, core).0.low {
                let donor = |s: usize| {
                    let (share, load) = bounds(self, self.core(s));
                    self.core(s) != core && load > share.low && spare(self, s)
                };
                let sources: Vec<usize> = all.clone().filter(|&s| donor(s)).collect();
                let path = chain(
                    self.spots.len(),
                    &sources,
                    |at, seen| self.steps(at, members, seen),
                    |at| (self.core(at) == core && room(self, at)).then_some(0),
                );
                if !self.take(path) {
                    break;
                }
            }
        }
    }
}
