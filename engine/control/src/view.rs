//! The cluster map, parsed. Every change is parsed once; nothing is ever read again from text.

use engine::msg::Member;
use placement::{
    Cluster, DiskRecord, Drain, DrainScope, Image, Live, NextId, Node, PgRecord, Pool, ScrubRecord, Settings,
    Topology, key,
};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use wire::control::{Change, KeyValue};
use wire::{DiskUuid, ImageId, NodeId, PgId, PoolId, Revision, SessionId, SliceId};

/// A PG's record with the revision to compare against.
#[derive(Clone, PartialEq, Debug)]
pub struct PgEntry {
    /// The record.
    pub record: PgRecord,
    /// When it was last written.
    pub revision: Revision,
}

/// Where a slice is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Home {
    /// Its node.
    pub node: NodeId,
    /// Its core.
    pub core: u16,
}

/// What a change was about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touched {
    /// `/cluster`.
    Cluster,
    /// A pool was created, changed or removed.
    Pool(PoolId),
    /// An image of this pool was created, changed or removed.
    Image(PoolId),
    /// A node registered with other data, or was removed.
    Node(NodeId),
    /// A node came, went, changed its process or its failed slices.
    Live {
        /// The node.
        node: NodeId,
        /// Its process before.
        before: Option<SessionId>,
    },
    /// What is known of a disk.
    Disk(DiskUuid),
    /// A PG's record.
    Pg(PgId),
    /// What is known of a PG's scrubs.
    Scrub(PgId),
    /// A node is to be drained, or no longer.
    Drain(NodeId),
    /// `/settings`.
    Settings,
    /// Nothing that this view holds.
    Other,
}

/// The parsed map.
#[derive(Debug, Default)]
pub struct View {
    cluster: Option<Cluster>,
    nodes: BTreeMap<NodeId, Node>,
    live: BTreeMap<NodeId, Live>,
    disks: BTreeMap<DiskUuid, (DiskRecord, Revision)>,
    pools: BTreeMap<PoolId, Pool>,
    images: BTreeMap<ImageId, PoolId>,
    images_in: BTreeMap<PoolId, usize>,
    pgs: BTreeMap<PgId, PgEntry>,
    scrubs: BTreeMap<PgId, (ScrubRecord, Revision)>,
    drains: BTreeMap<NodeId, Drain>,
    settings: Settings,
    next_id: NextId,
    homes: BTreeMap<SliceId, Home>,
    pgs_of_slice: BTreeMap<SliceId, BTreeSet<PgId>>,
    dropped: Vec<SliceId>,
    former_primary: Option<SliceId>,
}

fn parse<T: DeserializeOwned>(item: &KeyValue) -> Option<T> {
    serde_json::from_str(&item.value)
        .inspect_err(|error| tracing::error!(key = item.key, %error, "metadata value cannot be read"))
        .ok()
}

fn number(key: &str) -> Option<u64> {
    key.rsplit_once('/')?.1.parse().ok()
}

impl View {
    /// Takes over one change.
    pub fn apply(&mut self, change: &Change) -> Touched {
        let (name, item) = match change {
            Change::Put(item) => (item.key.as_str(), Some(item)),
            Change::Delete { key } => (key.as_str(), None),
        };
        if name.starts_with(key::PGS) {
            self.apply_pg(name, item)
        } else if name.starts_with(key::SCRUBS) {
            self.apply_scrub(name, item)
        } else if name.starts_with(key::LIVE) {
            self.apply_live(name, item)
        } else if name.starts_with(key::DISKS) {
            self.apply_disk(name, item)
        } else if name.starts_with(key::NODES) {
            self.apply_node(name, item)
        } else if name.starts_with(key::POOLS) {
            self.apply_pool(name, item)
        } else if name.starts_with(key::IMAGES) {
            self.apply_image(name, item)
        } else if name.starts_with(key::DRAINS) {
            self.apply_drain(name, item)
        } else if name == key::SETTINGS {
            self.settings = item.and_then(parse).unwrap_or_default();
            Touched::Settings
        } else if name == key::NEXT_ID {
            self.next_id = item.and_then(parse).unwrap_or_default();
            Touched::Other
        } else if name == key::CLUSTER {
            self.cluster = item.and_then(parse);
            Touched::Cluster
        } else {
            Touched::Other
        }
    }

    fn apply_pg(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(pg) = key::parse_pg(name) else { return Touched::Other };
        self.dropped.clear();
        self.former_primary = None;
        if let Some(old) = self.pgs.remove(&pg) {
            self.dropped.extend_from_slice(&old.record.acting);
            self.former_primary = old.record.primary;
            for slice in old.record.slices() {
                if let Some(pgs) = self.pgs_of_slice.get_mut(&slice) {
                    pgs.remove(&pg);
                    if pgs.is_empty() {
                        self.pgs_of_slice.remove(&slice);
                    }
                }
            }
        }
        if let Some(item) = item
            && let Some(record) = parse::<PgRecord>(item)
        {
            self.dropped.retain(|slice| !record.acting.contains(slice));
            for slice in record.slices() {
                self.pgs_of_slice.entry(slice).or_default().insert(pg);
            }
            self.pgs.insert(pg, PgEntry { record, revision: item.mod_revision });
        }
        Touched::Pg(pg)
    }

    fn apply_scrub(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(pg) = key::parse_scrub(name) else { return Touched::Other };
        self.scrubs.remove(&pg);
        if let Some(item) = item
            && let Some(record) = parse::<ScrubRecord>(item)
        {
            self.scrubs.insert(pg, (record, item.mod_revision));
        }
        Touched::Scrub(pg)
    }

    fn apply_drain(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(node) = key::parse_node(name) else { return Touched::Other };
        self.drains.remove(&node);
        if let Some(drain) = item.and_then(parse::<Drain>) {
            self.drains.insert(node, drain);
        }
        Touched::Drain(node)
    }

    fn apply_live(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(node) = key::parse_node(name) else { return Touched::Other };
        let before = self.live.remove(&node).map(|live| live.session);
        if let Some(live) = item.and_then(parse) {
            self.live.insert(node, live);
        }
        Touched::Live { node, before }
    }

    fn apply_disk(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(disk) = key::parse_disk(name) else { return Touched::Other };
        self.disks.remove(&disk);
        if let Some((item, record)) = item.and_then(|item| Some((item, parse::<DiskRecord>(item)?))) {
            self.disks.insert(disk, (record, item.mod_revision));
        }
        Touched::Disk(disk)
    }

    fn apply_node(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(id) = key::parse_node(name) else { return Touched::Other };
        self.nodes.remove(&id);
        if let Some(node) = item.and_then(parse::<Node>) {
            self.nodes.insert(id, node);
        }
        // In order of node numbers, as `placement::Topology`: of two claims the higher number wins.
        self.homes.clear();
        for (id, node) in &self.nodes {
            for slice in node.disks.iter().flat_map(|disk| &disk.slices) {
                self.homes.insert(slice.id, Home { node: *id, core: slice.core });
            }
        }
        Touched::Node(id)
    }

    fn apply_pool(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(id) = number(name).and_then(|n| u32::try_from(n).ok()).map(PoolId) else {
            return Touched::Other;
        };
        self.pools.remove(&id);
        if let Some(pool) = item.and_then(parse::<Pool>) {
            self.pools.insert(id, pool);
        }
        Touched::Pool(id)
    }

    fn apply_image(&mut self, name: &str, item: Option<&KeyValue>) -> Touched {
        let Some(id) = number(name).map(ImageId) else { return Touched::Other };
        let old = self.images.remove(&id);
        if let Some(count) = old.and_then(|pool| self.images_in.get_mut(&pool)) {
            *count = count.saturating_sub(1);
        }
        let new = item.and_then(parse::<Image>).map(|image| image.pool);
        if let Some(pool) = new {
            self.images.insert(id, pool);
            *self.images_in.entry(pool).or_default() += 1;
        }
        old.or(new).map_or(Touched::Other, Touched::Image)
    }

    /// The cluster, once created.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }
    /// All nodes that ever registered and were not removed.
    pub fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }
    /// The nodes that are up.
    pub fn live(&self) -> &BTreeMap<NodeId, Live> {
        &self.live
    }
    /// What is known of a disk, and the revision that says it.
    pub fn disk(&self, disk: DiskUuid) -> Option<(&DiskRecord, Revision)> {
        self.disks.get(&disk).map(|(record, revision)| (record, *revision))
    }
    /// The pools.
    pub fn pools(&self) -> &BTreeMap<PoolId, Pool> {
        &self.pools
    }
    /// Whether there was such a pool and it has been removed.
    pub fn was_removed(&self, pool: PoolId) -> bool {
        pool < self.next_id.pool && !self.pools.contains_key(&pool)
    }
    /// Number of images in a pool.
    pub fn images_in(&self, pool: PoolId) -> usize {
        self.images_in.get(&pool).copied().unwrap_or_default()
    }
    /// All PGs.
    pub fn pgs(&self) -> &BTreeMap<PgId, PgEntry> {
        &self.pgs
    }
    /// What is known of a PG's scrubs, and the revision that says it; 0 when nothing does.
    pub fn scrub(&self, pg: PgId) -> (ScrubRecord, Revision) {
        self.scrubs.get(&pg).cloned().unwrap_or_default()
    }
    /// The nodes that are being drained.
    pub fn drains(&self) -> &BTreeMap<NodeId, Drain> {
        &self.drains
    }
    /// What holds for the whole cluster.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }
    /// The PGs of a pool.
    pub fn pgs_of_pool(&self, pool: PoolId) -> impl Iterator<Item = (&PgId, &PgEntry)> {
        self.pgs.range(PgId { pool, index: 0 }..=PgId { pool, index: u32::MAX })
    }
    /// The slices that left `acting` with the last change of a PG.
    pub fn dropped(&self) -> &[SliceId] {
        &self.dropped
    }
    /// The primary before the last change of a PG.
    pub fn former_primary(&self) -> Option<SliceId> {
        self.former_primary
    }
    /// Where a slice is.
    pub fn home(&self, slice: SliceId) -> Option<Home> {
        self.homes.get(&slice).copied()
    }
    /// PGs in whose record a slice is named.
    pub fn pgs_of_slice(&self, slice: SliceId) -> impl Iterator<Item = PgId> + '_ {
        self.pgs_of_slice.get(&slice).into_iter().flatten().copied()
    }

    /// PGs in whose record a slice of this node is named.
    pub fn pgs_of_node(&self, node: NodeId) -> BTreeSet<PgId> {
        let slices = self.nodes.get(&node).into_iter().flat_map(|n| &n.disks).flat_map(|d| &d.slices);
        slices.flat_map(|slice| self.pgs_of_slice(slice.id)).collect()
    }

    /// The process that serves a slice now: its node is up and stays, and has not given the slice up.
    pub fn up(&self, slice: SliceId) -> Option<SessionId> {
        let live = self.live.get(&self.home(slice)?.node)?;
        (!live.leaving && !live.failed.contains(&slice)).then_some(live.session)
    }

    /// The slices on which clients are to put nothing more.
    pub fn full(&self) -> BTreeSet<SliceId> {
        self.live.values().flat_map(|live| &live.full).copied().collect()
    }

    /// Whether a slice's node is to be primary of nothing.
    pub fn is_drained(&self, slice: SliceId) -> bool {
        self.home(slice).is_some_and(|home| self.drains.contains_key(&home.node))
    }

    /// What placement places on: all registered nodes, drained ones leading nothing.
    pub fn topology(&self) -> Topology {
        Topology::new(self.nodes.values()).following(&self.drained())
    }

    /// The nodes that are to lead nothing.
    pub fn drained(&self) -> BTreeSet<NodeId> {
        self.drains.keys().copied().collect()
    }

    /// The nodes that are to keep no copies.
    pub fn emptied(&self) -> BTreeSet<NodeId> {
        let all = |(node, drain): (&NodeId, &Drain)| (drain.scope == DrainScope::Everything).then_some(*node);
        self.drains.iter().filter_map(all).collect()
    }

    /// The node whose running process this is.
    pub fn node_of_session(&self, session: SessionId) -> Option<NodeId> {
        self.live.iter().find(|(_, live)| live.session == session).map(|(node, _)| *node)
    }

    /// How a slice is reached.
    pub fn member(&self, slice: SliceId) -> Option<Member> {
        let home = self.home(slice)?;
        let addr = *self.nodes.get(&home.node)?.cores.get(usize::from(home.core))?;
        let session = self.live.get(&home.node).map(|live| live.session);
        Some(Member { slice, node: home.node, session, addr })
    }
}
