//! `/stats/N`: what this node's cores report, for `status`, and for other nodes to compare their disks with
//! (`slow_disks`). Written seldom, in bounded pieces, bound to
//! the node's lease.

use crate::config::{STATS_INTERVAL_MS, STATS_PGS_PER_KEY};
use engine::msg::PgReport;
use placement::{NodeStats, PgStat, Settings, SliceStat, key};
use reactor::Mono;
use std::collections::{BTreeMap, BTreeSet};
use wire::control::{Compare, MetaRequest, Write};
use wire::{NodeId, PgId, PoolId, SessionId, SliceId};

/// See the module. The PGs in order, cut into pieces of `STATS_PGS_PER_KEY`; the first piece also holds
/// the slices.
#[derive(Default)]
pub struct Stats {
    pgs: BTreeMap<PgId, PgStat>,
    slices: BTreeMap<SliceId, SliceStat>,
    dirty: BTreeSet<u32>,
    written: BTreeSet<u32>,
    in_flight: Option<u32>,
    next: Mono,
}

impl Stats {
    fn part_of(&self, pg: PgId) -> u32 {
        (self.pgs.range(..pg).count() / STATS_PGS_PER_KEY) as u32
    }

    fn all_dirty(&mut self) {
        let parts = self.pgs.len().div_ceil(STATS_PGS_PER_KEY).max(1) as u32;
        self.dirty.extend((0..parts).chain(self.written.iter().copied()));
    }

    /// A primary's report.
    pub fn report(&mut self, report: PgReport) {
        let PgReport { pg, epoch, state, objects, missing } = report;
        let stat = PgStat { state, epoch, objects, missing };
        if self.pgs.get(&pg) == Some(&stat) {
            return;
        }
        if self.pgs.insert(pg, stat).is_some() {
            self.dirty.insert(self.part_of(pg));
        } else {
            self.all_dirty(); // the pieces have shifted
        }
    }

    /// This node is no longer the PG's primary.
    pub fn forget(&mut self, pg: PgId) {
        if self.pgs.remove(&pg).is_some() {
            self.all_dirty();
        }
    }

    /// The pool is gone.
    pub fn forget_pool(&mut self, pool: PoolId) {
        let gone: Vec<PgId> = self
            .pgs
            .range(PgId { pool, index: 0 }..=PgId { pool, index: u32::MAX })
            .map(|(pg, _)| *pg)
            .collect();
        gone.into_iter().for_each(|pg| self.forget(pg));
    }

    /// A slice's counters.
    pub fn slice(&mut self, slice: SliceId, stat: SliceStat) {
        if self.slices.get(&slice) != Some(&stat) {
            self.slices.insert(slice, stat);
            self.dirty.insert(0);
        }
    }

    /// The slices that have reached a threshold; one that had before has until it is a percent below.
    pub fn full(&self, percent: u8, before: &[SliceId]) -> Vec<SliceId> {
        let reached = |(slice, stat): (&SliceId, &SliceStat)| {
            let percent = percent.saturating_sub(u8::from(before.contains(slice)));
            Settings::reaches(stat.used_bytes, stat.size_bytes, percent).then_some(*slice)
        };
        self.slices.iter().filter_map(reached).collect()
    }

    /// A new session has an empty lease: everything is to be written again.
    pub fn restart(&mut self) {
        self.written.clear();
        self.in_flight = None;
        self.all_dirty();
    }

    /// The write that is due.
    pub fn plan(&mut self, node: NodeId, session: SessionId, now: Mono) -> Option<MetaRequest> {
        if now < self.next || self.in_flight.is_some() {
            return None;
        }
        let part = self.dirty.pop_first()?;
        let stats = NodeStats {
            pgs: self
                .pgs
                .iter()
                .skip(part as usize * STATS_PGS_PER_KEY)
                .take(STATS_PGS_PER_KEY)
                .map(|(pg, stat)| (pg.to_string(), stat.clone()))
                .collect(),
            slices: if part == 0 {
                self.slices.iter().map(|(slice, stat)| (slice.to_string(), stat.clone())).collect()
            } else {
                BTreeMap::new()
            },
        };
        let value = serde_json::to_string(&stats).ok()?;
        // Large values less often: what they cost is their size.
        self.next = now.plus_ms(STATS_INTERVAL_MS + value.len() as u64 / 1024);
        self.in_flight = Some(part);
        self.written.insert(part);
        let key = if part == 0 { key::stats(node) } else { key::stats_part(node, part) };
        // Of an earlier session that was held up on its way it must not come to stand over this one's.
        let compares = vec![Compare::Bound { key: key::live(node), lease: session.0 }];
        let writes = if part > 0 && stats.pgs.is_empty() {
            vec![Write::Delete { key }]
        } else {
            vec![Write::Put { key, value, lease: Some(session.0) }]
        };
        Some(MetaRequest::Txn { compares, writes })
    }

    /// The write's answer; whether it succeeded.
    pub fn on_reply(&mut self, applied: bool) {
        if let Some(part) = self.in_flight.take()
            && !applied
        {
            self.dirty.insert(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_slice_stays_so_until_it_is_a_percent_below() {
        let mut stats = Stats::default();
        let mut full = |used_bytes, before: &[SliceId]| {
            stats.slice(SliceId(1), SliceStat { size_bytes: 1000, used_bytes, ..SliceStat::default() });
            !stats.full(95, before).is_empty()
        };
        assert!(!full(949, &[]) && full(950, &[]));
        assert!(full(949, &[SliceId(1)]) && full(940, &[SliceId(1)]) && !full(939, &[SliceId(1)]));
        stats.slice(SliceId(1), SliceStat::default());
        assert!(stats.full(95, &[]).is_empty(), "a slice that is not open yet is not full");
    }
}
