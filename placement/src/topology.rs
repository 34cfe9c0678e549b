//! The slices of a cluster and what they share: core, disk, host.

use crate::map::{FailureDomain, Node};
use std::collections::{BTreeMap, BTreeSet};
use wire::{DiskUuid, NodeId, SliceId};

/// A slice with everything that placement asks about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spot {
    /// The slice.
    pub slice: SliceId,
    /// Its node.
    pub node: NodeId,
    /// Its disk.
    pub disk: DiskUuid,
    /// Which core of its node owns it.
    pub core: u16,
    /// Usable bytes: its weight.
    pub size_bytes: u64,
    /// It may come first in a list. When it may not, others do wherever there are any.
    pub leads: bool,
    /// Number of its host, counted in order of host names.
    host: u32,
    /// Number of its disk, counted in order of identities.
    disk_number: u32,
}

impl Spot {
    /// The number of the failure domain that the slice lies in. Numbers of different kinds of domain
    /// have nothing to do with each other.
    pub fn domain(&self, kind: FailureDomain) -> u32 {
        match kind {
            FailureDomain::Host => self.host,
            FailureDomain::Disk => self.disk_number,
        }
    }
}

/// All slices of the cluster, in order of their numbers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Topology {
    spots: Vec<Spot>,
}

impl Topology {
    /// The slices that these nodes registered.
    ///
    /// A host is known by its name alone: nodes with the same host name share a failure domain. A slice
    /// that two nodes claim counts for the node with the higher number (the disk has moved and the old
    /// record is stale, or somebody copied a disk; either way it is one failure domain less, never one
    /// more). A slice without space takes no data.
    pub fn new<'a>(nodes: impl IntoIterator<Item = &'a Node>) -> Self {
        let mut claimed: BTreeMap<SliceId, (&Node, DiskUuid, u16, u64)> = BTreeMap::new();
        let mut hosts: BTreeMap<&str, u32> = BTreeMap::new();
        let mut disks: BTreeMap<DiskUuid, u32> = BTreeMap::new();
        for node in nodes {
            hosts.insert(&node.host, 0);
            for disk in &node.disks {
                disks.insert(disk.uuid, 0);
                for slice in disk.slices.iter().filter(|slice| slice.size_bytes > 0) {
                    let spot = (node, disk.uuid, slice.core, slice.size_bytes);
                    let known = claimed.entry(slice.id).or_insert(spot);
                    if known.0.id < node.id {
                        *known = spot;
                    }
                }
            }
        }
        number(&mut hosts);
        number(&mut disks);
        let spots = claimed.into_iter().map(|(slice, (node, disk, core, size_bytes))| Spot {
            slice,
            node: node.id,
            disk,
            core,
            size_bytes,
            leads: true,
            host: hosts.get(node.host.as_str()).copied().unwrap_or_default(),
            disk_number: disks.get(&disk).copied().unwrap_or_default(),
        });
        Self { spots: spots.collect() }
    }

    /// The same without these nodes: they get no copies, and the ones that they have go elsewhere.
    pub fn without(&self, nodes: &BTreeSet<NodeId>) -> Self {
        Self { spots: self.spots.iter().filter(|spot| !nodes.contains(&spot.node)).copied().collect() }
    }

    /// The same with these nodes leading nothing.
    pub fn following(mut self, nodes: &BTreeSet<NodeId>) -> Self {
        self.spots.iter_mut().for_each(|spot| spot.leads = !nodes.contains(&spot.node));
        self
    }

    /// The slices, in order of their numbers.
    pub fn spots(&self) -> &[Spot] {
        &self.spots
    }

    /// One slice.
    pub fn spot(&self, slice: SliceId) -> Option<&Spot> {
        self.position(slice).and_then(|at| self.spots.get(at))
    }

    /// Index of a slice in `spots`.
    pub(crate) fn position(&self, slice: SliceId) -> Option<usize> {
        self.spots.binary_search_by_key(&slice, |spot| spot.slice).ok()
    }

    /// Number of failure domains that hold at least one slice.
    pub fn domains(&self, kind: FailureDomain) -> usize {
        self.spots.iter().map(|spot| spot.domain(kind)).collect::<std::collections::BTreeSet<_>>().len()
    }
}

fn number<K: Ord>(map: &mut BTreeMap<K, u32>) {
    for (at, slot) in map.values_mut().enumerate() {
        *slot = at as u32;
    }
}
