//! Whether a disk of this node is much slower than the cluster's others: a write is as slow as the slowest of its
//! copies, so that one such disk slows down everybody.
//!
//! Every node reads what the others say of their disks (`/stats/N`), and tells its data cores from which time per
//! operation on theirs are outliers. They measure, and give a slice up that is one for long, where other copies are
//! there. Only the slowest disk of the whole cluster gets such a bound: two that went at the same moment could have
//! held all copies of something.

use crate::mirror::Mirror;
use crate::view::View;
use engine::CoreMsg;
use placement::{Disk, SliceStat, key};
use reactor::Mono;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::Bound;
use wire::{CoreId, DiskUuid, NodeId, SliceId};

/// Time between two looks, in milliseconds: as often as data cores look at their disks.
const LOOK_MS: u64 = 1_000;
/// Nodes whose statistics are read in one look: each may be 100 KiB of text, most of which is skipped.
const NODES_PER_LOOK: usize = 8;
/// Fewest other disks that make a rule.
const OTHERS_MIN: usize = 3;
/// A disk that needs so many times as long as the median of the others is an outlier. Disks of one kind differ by
/// far less; `status` names a disk from half of that on.
const OUT_TIMES: u64 = 16;
/// No disk is an outlier that is faster than this, in microseconds: some three times what a disk with moving parts
/// needs, which may well stand among fast ones.
const OUT_US_MIN: u64 = 32_768;

/// The part of a node's statistics that is about its disks.
#[derive(Deserialize)]
struct Slices {
    #[serde(default)]
    slices: BTreeMap<String, SliceStat>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct SlowDisks {
    /// Time per operation, as last read.
    service_us: BTreeMap<NodeId, BTreeMap<SliceId, u64>>,
    read_last: NodeId,
    told: BTreeMap<SliceId, u64>,
    next_look: Mono,
}

impl SlowDisks {
    /// What the data cores have to hear, if a look is due.
    pub(crate) fn look(
        &mut self,
        mirror: &Mirror,
        view: &View,
        own: &[Disk],
        now: Mono,
    ) -> Vec<(CoreId, CoreMsg)> {
        if now < self.next_look {
            return Vec::new();
        }
        self.next_look = now.plus_ms(LOOK_MS);
        self.read(mirror, view);
        let disks = self.disks(view);
        let mut news = Vec::new();
        for disk in own {
            let bound_us = bound_us(&disks, disk.uuid);
            for slice in &disk.slices {
                if self.told.insert(slice.id, bound_us).unwrap_or(0) != bound_us {
                    news.push((CoreId(slice.core), CoreMsg::SlowFrom { slice: slice.id, us: bound_us }));
                }
            }
        }
        news
    }

    /// Reads what the next nodes in turn say.
    fn read(&mut self, mirror: &Mirror, view: &View) {
        let nodes = view.live();
        self.service_us.retain(|node, _| nodes.contains_key(node));
        let behind = nodes.range((Bound::Excluded(self.read_last), Bound::Unbounded));
        let in_turn = behind.chain(nodes.range(..=self.read_last)).map(|(node, _)| *node);
        for node in in_turn.take(NODES_PER_LOOK) {
            self.read_last = node;
            let item = mirror.get(&key::stats(node));
            let stats = item.and_then(|item| serde_json::from_str::<Slices>(&item.value).ok());
            let slices = stats.map(|stats| stats.slices).unwrap_or_default();
            let times =
                slices.iter().filter_map(|(slice, stat)| Some((slice.parse().ok()?, stat.service_us)));
            self.service_us.insert(node, times.map(|(slice, us)| (SliceId(slice), us)).collect());
        }
    }

    /// All disks that work, with their time per operation. Slices share a disk: the one that waits least for the
    /// others shows the disk best.
    fn disks(&self, view: &View) -> Vec<(u64, DiskUuid)> {
        let mut disks = Vec::new();
        for (node, times) in &self.service_us {
            let failed = view.live().get(node).map_or(&[][..], |live| live.failed.as_slice());
            for disk in view.nodes().get(node).into_iter().flat_map(|node| &node.disks) {
                let works = disk.slices.iter().all(|slice| !failed.contains(&slice.id));
                let each = disk.slices.iter().filter_map(|slice| times.get(&slice.id).copied());
                disks.extend(each.filter(|us| works && *us > 0).min().map(|us| (us, disk.uuid)));
            }
        }
        disks.sort_unstable();
        disks
    }
}

/// The time per operation from which a disk is an outlier, in microseconds; 0: it is none, however slow.
fn bound_us(sorted: &[(u64, DiskUuid)], disk: DiskUuid) -> u64 {
    match sorted {
        [others @ .., (_, slowest)] if *slowest == disk && others.len() >= OTHERS_MIN => {
            let median = others.get(others.len() / 2).map_or(0, |(us, _)| *us);
            median.saturating_mul(OUT_TIMES).max(OUT_US_MIN)
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_slowest_disk_gets_a_bound_and_only_beside_others() {
        let disks = [(128, DiskUuid(1)), (4096, DiskUuid(2)), (4096, DiskUuid(3)), (65_536, DiskUuid(4))];
        assert_eq!(bound_us(&disks, DiskUuid(4)), 65_536);
        assert_eq!(bound_us(&disks, DiskUuid(3)), 0);
        assert_eq!(bound_us(&disks, DiskUuid(9)), 0, "of it nothing is known");
        assert_eq!(bound_us(&disks[1..], DiskUuid(4)), 0, "too few others");
        let fast = [(1, DiskUuid(1)), (2, DiskUuid(2)), (2, DiskUuid(3)), (64, DiskUuid(4))];
        assert_eq!(bound_us(&fast, DiskUuid(4)), OUT_US_MIN);
    }
}
