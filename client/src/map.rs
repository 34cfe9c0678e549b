//! What the client knows of the cluster: pools, images, nodes, and for each PG of its pools the epoch and
//! where the primary is reached. Compact, because a pool may have thousands of PGs.

use crate::peer::Peers;
use crate::slab::NIL;
use placement::{Image, Live, Node, PgRecord, Pool, key};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use wire::control::{Change, KeyValue};
use wire::{Epoch, ImageId, NodeId, PgId, PoolId, SessionId, SliceId};

/// Most PGs of a pool that a client keeps a table for. Ten times what a thousand hosts need; a key beyond
/// it is ignored instead of making us allocate by somebody's number.
const PGS_PER_POOL_MAX: u32 = 1 << 18;

/// A PG as the client needs it.
#[derive(Clone, Copy)]
pub(crate) struct PgEntry {
    pub epoch: Epoch,
    pub primary: Option<SliceId>,
    /// The primary's place among the peers; `NIL` while there is no primary or its node is not live.
    pub peer: u32,
    /// Mentioned by the snapshot being applied.
    seen: bool,
}

const NO_PG: PgEntry = PgEntry { epoch: Epoch(0), primary: None, peer: NIL, seen: false };

/// What a change touched, so that only that is worked on.
#[derive(Clone, Copy, Default)]
pub(crate) struct Touched {
    /// Nodes or their liveness: every PG has to be resolved again.
    pub nodes: bool,
    /// Images or pools: open images have to be looked at.
    pub images: bool,
}

#[derive(Default)]
pub(crate) struct ClusterMap {
    nodes: BTreeMap<NodeId, Node>,
    live: BTreeMap<NodeId, SessionId>,
    pools: BTreeMap<PoolId, Pool>,
    images: BTreeMap<ImageId, Image>,
    /// Slices of live nodes: their core's address and their node.
    slices: BTreeMap<SliceId, (SocketAddr, NodeId)>,
    pgs: BTreeMap<PoolId, Vec<PgEntry>>,
    /// PGs changed since the last `resolve`.
    dirty: Vec<PgId>,
}

fn parse_tail<T: std::str::FromStr>(key: &str) -> Option<T> {
    key.rsplit_once('/')?.1.parse().ok()
}

impl ClusterMap {
    pub(crate) fn image(&self, id: ImageId) -> Option<&Image> {
        self.images.get(&id)
    }

    pub(crate) fn pool(&self, id: PoolId) -> Option<&Pool> {
        self.pools.get(&id)
    }

    #[inline]
    pub(crate) fn pg(&self, id: PgId) -> PgEntry {
        self.pgs.get(&id.pool).and_then(|pgs| pgs.get(id.index as usize)).copied().unwrap_or(NO_PG)
    }

    /// Where live nodes' control cores listen.
    pub(crate) fn control_addrs(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.nodes.values().filter(|n| self.live.contains_key(&n.id)).map(|n| n.control)
    }

    /// The session of a node's running process.
    pub(crate) fn session_of(&self, node: NodeId) -> Option<SessionId> {
        self.live.get(&node).copied()
    }

    /// Replaces everything by a snapshot.
    pub(crate) fn replace(&mut self, items: &[KeyValue]) -> Touched {
        self.nodes.clear();
        self.live.clear();
        self.pools.clear();
        self.images.clear();
        for pgs in self.pgs.values_mut() {
            pgs.iter_mut().for_each(|entry| entry.seen = false);
        }
        for item in items {
            self.put(item);
        }
        for pgs in self.pgs.values_mut() {
            pgs.iter_mut().filter(|entry| !entry.seen).for_each(|entry| *entry = NO_PG);
        }
        Touched { nodes: true, images: true }
    }

    /// Applies one revision's changes. Values that cannot be parsed count as absent: a newer cluster may
    /// write what this client does not know.
    pub(crate) fn apply(&mut self, changes: &[Change]) -> Touched {
        let mut touched = Touched::default();
        for change in changes {
            let key = match change {
                Change::Put(item) => {
                    self.put(item);
                    &item.key
                }
                Change::Delete { key } => {
                    self.delete(key);
                    key
                }
            };
            touched.nodes |= key.starts_with(key::NODES) || key.starts_with(key::LIVE);
            touched.images |= key.starts_with(key::IMAGES) || key.starts_with(key::POOLS);
        }
        touched
    }

    fn put(&mut self, item: &KeyValue) {
        let (key, value) = (item.key.as_str(), item.value.as_str());
        if key.starts_with(key::PGS) {
            let Some(pg) = key::parse_pg(key) else { return };
            match serde_json::from_str::<PgRecord>(value) {
                Ok(record) => self.set_pg(pg, record.epoch, record.primary),
                Err(_) => self.set_pg(pg, Epoch(0), None),
            }
        } else if key.starts_with(key::LIVE) {
            if let (Some(node), Ok(live)) = (key::parse_node(key), serde_json::from_str::<Live>(value)) {
                self.live.insert(node, live.session);
            }
        } else if key.starts_with(key::NODES) {
            if let Ok(node) = serde_json::from_str::<Node>(value) {
                self.nodes.insert(node.id, node);
            }
        } else if key.starts_with(key::POOLS) {
            if let Ok(pool) = serde_json::from_str::<Pool>(value) {
                self.pools.insert(pool.id, pool);
            }
        } else if key.starts_with(key::IMAGES)
            && let Ok(image) = serde_json::from_str::<Image>(value)
        {
            self.images.insert(image.id, image);
        }
    }

    fn delete(&mut self, key: &str) {
        if key.starts_with(key::PGS) {
            if let Some(pg) = key::parse_pg(key) {
                self.set_pg(pg, Epoch(0), None);
            }
        } else if key.starts_with(key::LIVE) {
            if let Some(node) = key::parse_node(key) {
                self.live.remove(&node);
            }
        } else if key.starts_with(key::NODES) {
            if let Some(node) = key::parse_node(key) {
                self.nodes.remove(&node);
            }
        } else if key.starts_with(key::POOLS) {
            if let Some(pool) = parse_tail::<PoolId>(key) {
                self.pools.remove(&pool);
            }
        } else if key.starts_with(key::IMAGES)
            && let Some(image) = parse_tail::<ImageId>(key)
        {
            self.images.remove(&image);
        }
    }

    fn set_pg(&mut self, pg: PgId, epoch: Epoch, primary: Option<SliceId>) {
        if pg.index >= PGS_PER_POOL_MAX {
            return;
        }
        let pgs = self.pgs.entry(pg.pool).or_default();
        if pgs.len() <= pg.index as usize {
            pgs.resize(pg.index as usize + 1, NO_PG);
        }
        if let Some(entry) = pgs.get_mut(pg.index as usize) {
            *entry = PgEntry { epoch, primary, peer: NIL, seen: true };
        }
        self.dirty.push(pg);
    }

    /// Finds the peers of the PGs that changed, or of all when nodes did.
    pub(crate) fn resolve(&mut self, touched: Touched, peers: &mut Peers) {
        if touched.nodes {
            self.dirty.clear();
            self.slices.clear();
            for node in self.nodes.values().filter(|node| self.live.contains_key(&node.id)) {
                for slice in node.disks.iter().flat_map(|disk| &disk.slices) {
                    if let Some(addr) = node.cores.get(usize::from(slice.core)) {
                        self.slices.insert(slice.id, (*addr, node.id));
                    }
                }
            }
            let all: Vec<PgId> = self
                .pgs
                .iter()
                .flat_map(|(pool, pgs)| (0..pgs.len() as u32).map(|index| PgId { pool: *pool, index }))
                .collect();
            for pg in all {
                self.resolve_one(pg, peers);
            }
        } else {
            while let Some(pg) = self.dirty.pop() {
                self.resolve_one(pg, peers);
            }
        }
    }

    fn resolve_one(&mut self, pg: PgId, peers: &mut Peers) {
        let Some(entry) = self.pgs.get_mut(&pg.pool).and_then(|pgs| pgs.get_mut(pg.index as usize)) else {
            return;
        };
        entry.peer = entry
            .primary
            .and_then(|slice| self.slices.get(&slice))
            .map_or(NIL, |(addr, node)| peers.index_of(*addr, *node));
    }

    /// Whether any PG has its primary at this peer.
    pub(crate) fn refers_to(&self, peer: u32) -> bool {
        self.pgs.values().flatten().any(|entry| entry.peer == peer)
    }
}
