//! The disks of a cluster: which serve, which have failed and why, which are slower than the others.

use placement::{Disk, Live, Node, NodeStats, SliceStat};
use serde::Serialize;
use std::collections::BTreeMap;
use wire::{DiskUuid, NodeId};

/// A disk that needs so many times as long per operation as the cluster's median disk is reported. Service
/// times are powers of two, so that less than four times would be within their error.
const SLOW_TIMES: u64 = 8;
/// A disk faster than this is never reported, in microseconds: half of what a disk with moving parts may
/// need. Between fast drives a factor of eight is what their caches make of it.
const SLOW_US_MIN: u64 = 16_384;

/// A disk.
#[derive(Clone, Debug, Serialize)]
pub struct DiskStatus {
    /// Its identity.
    pub disk: DiskUuid,
    /// Where its node finds it.
    pub path: String,
    /// Its node.
    pub node: NodeId,
    /// The node's host.
    pub host: String,
    /// Whether the node is up.
    pub up: bool,
    /// Its slices.
    pub slices: usize,
    /// Those that have failed.
    pub slices_failed: usize,
    /// Why they have.
    pub reason: Option<String>,
    /// Bytes its slices can hold.
    pub size_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Time it needs for one operation, in microseconds, rounded up to a power of two; 0: not known.
    pub service_us: u64,
    /// Reads that failed lately.
    pub read_errors: u64,
    /// Set when it is much slower than the others: their median, in microseconds.
    pub slow_beside_us: Option<u64>,
}

impl DiskStatus {
    /// In one word, or with the reason.
    pub fn state(&self) -> String {
        match (&self.reason, self.slow_beside_us) {
            (Some(why), _) => format!("FAILED: {why}"),
            (None, _) if !self.up => "node down".to_owned(),
            (None, Some(_)) => "slow".to_owned(),
            (None, None) => "ok".to_owned(),
        }
    }

    /// What is wrong with it, if anything, for a person. A node that is down is reported as a node.
    pub fn problem(&self) -> Option<String> {
        let name = format!("disk {} ({}) of node {} ({})", self.path, self.disk, self.node, self.host);
        if let Some(why) = &self.reason {
            let all = self.slices;
            let failed = self.slices_failed;
            return Some(format!("{name}: {failed} of {all} slices have failed: {why}"));
        }
        if let Some(others) = self.slow_beside_us {
            let (own, others) = (millis(self.service_us), millis(others));
            return Some(format!("{name} is slow: {own} per operation, others {others}"));
        }
        (self.read_errors > 0).then(|| format!("{name}: {} read errors lately", self.read_errors))
    }
}

/// Microseconds as milliseconds.
pub fn millis(us: u64) -> String {
    if us >= 10_000 { format!("{} ms", us / 1000) } else { format!("{:.1} ms", us as f64 / 1000.0) }
}

/// All disks that the nodes have registered.
pub fn disks(
    nodes: &[Node],
    live: &BTreeMap<NodeId, Live>,
    stats: &BTreeMap<NodeId, NodeStats>,
) -> Vec<DiskStatus> {
    let of = |node: &Node, disk: &Disk| status(node, disk, live.get(&node.id), stats.get(&node.id));
    let mut disks: Vec<DiskStatus> =
        nodes.iter().flat_map(|node| node.disks.iter().map(move |disk| of(node, disk))).collect();
    let measured: Vec<(DiskUuid, u64)> = disks
        .iter()
        .filter(|disk| disk.service_us > 0 && disk.reason.is_none())
        .map(|disk| (disk.disk, disk.service_us))
        .collect();
    for disk in &mut disks {
        let mut others: Vec<u64> =
            measured.iter().filter(|(other, _)| *other != disk.disk).map(|(_, us)| *us).collect();
        others.sort_unstable();
        let median = others.get(others.len() / 2).copied();
        disk.slow_beside_us = median.filter(|median| {
            disk.reason.is_none()
                && disk.service_us >= SLOW_US_MIN
                && disk.service_us >= median.saturating_mul(SLOW_TIMES)
        });
    }
    disks
}

fn status(node: &Node, disk: &Disk, live: Option<&Live>, stats: Option<&NodeStats>) -> DiskStatus {
    let stat = |slice: wire::SliceId| stats.and_then(|stats| stats.slices.get(&slice.to_string()));
    let known: Vec<&SliceStat> = disk.slices.iter().filter_map(|slice| stat(slice.id)).collect();
    let failed: Vec<wire::SliceId> = disk
        .slices
        .iter()
        .map(|slice| slice.id)
        .filter(|slice| {
            live.is_some_and(|live| live.failed.contains(slice))
                || stat(*slice).is_some_and(|stat| stat.state.starts_with("failed"))
        })
        .collect();
    let reason = failed.first().map(|slice| {
        let why = failed.iter().find_map(|slice| stat(*slice)?.state.strip_prefix("failed: "));
        why.map_or_else(|| format!("slice {slice} does not serve"), str::to_owned)
    });
    DiskStatus {
        disk: disk.uuid,
        path: disk.path.clone(),
        node: node.id,
        host: node.host.clone(),
        up: live.is_some(),
        slices: disk.slices.len(),
        slices_failed: failed.len(),
        reason,
        size_bytes: disk.slices.iter().map(|slice| slice.size_bytes).sum(),
        used_bytes: known.iter().map(|stat| stat.used_bytes).sum(),
        // Slices share the disk: the one that waits least for the others shows the disk best.
        service_us: known.iter().map(|stat| stat.service_us).filter(|us| *us > 0).min().unwrap_or(0),
        read_errors: known.iter().map(|stat| stat.read_errors).sum(),
        slow_beside_us: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use placement::Slice;
    use std::net::SocketAddr;
    use wire::{SessionId, SliceId};

    fn cluster(service_us: &[u64]) -> (Vec<Node>, BTreeMap<NodeId, Live>, BTreeMap<NodeId, NodeStats>) {
        let (mut nodes, mut live, mut stats) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        for (id, service_us) in (1..).zip(service_us) {
            let slice = |n: u64| Slice { id: SliceId(id * 10 + n), core: 0, size_bytes: 100 };
            let disk = Disk {
                uuid: DiskUuid(id.into()),
                path: format!("/dev/d{id}"),
                slices: vec![slice(0), slice(1)],
            };
            nodes.push(Node {
                id: NodeId(id),
                host: format!("h{id}"),
                control: SocketAddr::from(([127, 0, 0, 1], 1)),
                cores: Vec::new(),
                http: None,
                disks: vec![disk],
                version: String::new(),
                problems: Vec::new(),
            });
            live.insert(
                NodeId(id),
                Live { session: SessionId(id), failed: Vec::new(), full: Vec::new(), leaving: false },
            );
            let stat = |n: u64| {
                let stat = SliceStat {
                    service_us: service_us * (n + 1),
                    state: "open".into(),
                    ..SliceStat::default()
                };
                ((id * 10 + n).to_string(), stat)
            };
            let slices = [stat(0), stat(1)].into();
            stats.insert(NodeId(id), NodeStats { pgs: BTreeMap::new(), slices });
        }
        (nodes, live, stats)
    }

    fn slow(service_us: &[u64]) -> Vec<u64> {
        let (nodes, live, stats) = cluster(service_us);
        disks(&nodes, &live, &stats).iter().filter(|d| d.slow_beside_us.is_some()).map(|d| d.node.0).collect()
    }

    #[test]
    fn a_disk_is_slow_beside_the_others_and_never_by_itself() {
        assert_eq!(slow(&[128, 256, 131_072, 128]), [3]);
        assert_eq!(slow(&[128, 256, 8192, 128]), [0; 0], "fast enough");
        assert_eq!(slow(&[65_536, 131_072, 131_072]), [0; 0], "all alike");
        assert_eq!(slow(&[1 << 20]), [0; 0], "the only one");
        assert_eq!(slow(&[1 << 20, 0, 0]), [0; 0], "nothing is known of the others");
    }

    #[test]
    fn a_failed_disk_is_named_with_its_reason() {
        let (nodes, mut live, mut stats) = cluster(&[128, 128]);
        live.get_mut(&NodeId(2)).unwrap().failed = vec![SliceId(21)];
        let all = disks(&nodes, &live, &stats);
        assert_eq!(
            all[1].problem().unwrap(),
            format!(
                "disk /dev/d2 ({}) of node 2 (h2): 1 of 2 slices have failed: slice 21 does not serve",
                DiskUuid(2)
            )
        );
        stats.get_mut(&NodeId(2)).unwrap().slices.get_mut("21").unwrap().state =
            "failed: device is gone".into();
        let all = disks(&nodes, &live, &stats);
        assert_eq!(all[1].state(), "FAILED: device is gone");
        assert_eq!((all[0].state().as_str(), all[0].problem()), ("ok", None));
    }
}
