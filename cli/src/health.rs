//! The cluster's condition, put together from the metadata: what `status` shows, and what the
//! demonstration and tests wait for.

use crate::cluster::{Cluster, decode};
use crate::disk_status::{self, DiskStatus};
use crate::error::CliError;
use placement::{Drain, DrainScope, Image, Live, Node, NodeStats, PgRecord, Pool, Settings, key};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use wire::control::KeyValue;
use wire::{ClusterId, NodeId, PoolId};

/// Problems shown by name; the rest is counted.
const PROBLEMS_MAX: usize = 20;

/// Whether somebody has to act.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Everything is served with all copies.
    Ok,
    /// Everything is served, with less redundancy than wanted.
    Warning,
    /// Some data cannot be read or written.
    Error,
}

/// A node.
#[derive(Debug, Serialize)]
pub struct NodeStatus {
    /// Its number.
    pub id: NodeId,
    /// Its host.
    pub host: String,
    /// Its control address.
    pub control: SocketAddr,
    /// Whether it is live.
    pub up: bool,
    /// What it is drained of.
    pub drain: Option<DrainScope>,
    /// Its software.
    pub version: String,
    /// Its data cores.
    pub cores: usize,
    /// Its slices.
    pub slices: usize,
    /// Those that can serve.
    pub slices_open: usize,
    /// Bytes its slices can hold.
    pub size_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
}

/// A pool.
#[derive(Debug, Serialize)]
pub struct PoolStatus {
    /// Its number.
    pub id: PoolId,
    /// Its name.
    pub name: String,
    /// Copies of each object.
    pub copies: u8,
    /// Placement groups it has.
    pub pgs: u32,
    /// Those that serve.
    pub active: u32,
    /// Those that have every copy.
    pub clean: u32,
    /// Those whose recovery waits for space.
    pub too_full: u32,
    /// Object copies still to be recovered.
    pub missing: u64,
    /// Images in it.
    pub images: usize,
}

/// Placement groups of all pools.
#[derive(Debug, Default, Serialize)]
pub struct PgSummary {
    /// As many as the pools have.
    pub total: u32,
    /// Those that serve.
    pub active: u32,
    /// Those that have every copy.
    pub clean: u32,
    /// Objects in them.
    pub objects: u64,
    /// Object copies still to be recovered.
    pub missing: u64,
    /// How many are in which state.
    pub by_state: BTreeMap<String, u32>,
}

/// Everything `status` knows.
#[derive(Debug, Serialize)]
pub struct ClusterStatus {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its health.
    pub health: Health,
    /// Why it is not `ok`.
    pub problems: Vec<String>,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
    /// Its pools.
    pub pools: Vec<PoolStatus>,
    /// Its placement groups.
    pub pgs: PgSummary,
    /// Its images.
    pub images: usize,
}

/// The metadata that a status is made of.
struct Raw {
    nodes: Vec<Node>,
    live: BTreeMap<NodeId, Live>,
    drains: BTreeMap<NodeId, Drain>,
    settings: Settings,
    stats: BTreeMap<NodeId, NodeStats>,
    pools: Vec<Pool>,
    images: Vec<Image>,
    pgs: Vec<(wire::PgId, PgRecord)>,
}

/// Values of keys that end with a node's number.
pub(crate) fn by_node<T: serde::de::DeserializeOwned>(
    items: &[KeyValue],
) -> Result<BTreeMap<NodeId, T>, CliError> {
    let pairs = items.iter().filter_map(|item| key::parse_node(&item.key).map(|node| (node, item)));
    pairs.map(|(node, item)| Ok((node, decode(item)?))).collect()
}

impl Raw {
    fn read(cluster: &mut Cluster) -> Result<Self, CliError> {
        Ok(Self {
            nodes: cluster.list(key::NODES)?,
            live: by_node(&cluster.range(key::LIVE)?)?,
            drains: by_node(&cluster.range(key::DRAINS)?)?,
            settings: cluster.settings()?,
            stats: by_node(&cluster.range(key::STATS)?)?,
            pools: cluster.pools()?,
            images: cluster.images()?,
            pgs: cluster
                .range(key::PGS)?
                .iter()
                .filter_map(|item| key::parse_pg(&item.key).map(|pg| (pg, item)))
                .map(|(pg, item)| Ok((pg, decode(item)?)))
                .collect::<Result<_, CliError>>()?,
        })
    }

    fn node(&self, node: &Node) -> NodeStatus {
        let stats = self.stats.get(&node.id);
        let slices = stats.map(|stats| &stats.slices);
        let sum = |part: fn(&placement::SliceStat) -> u64| {
            slices.map_or(0, |slices| slices.values().map(part).sum())
        };
        NodeStatus {
            id: node.id,
            host: node.host.clone(),
            control: node.control,
            up: self.live.contains_key(&node.id),
            drain: self.drains.get(&node.id).map(|drain| drain.scope),
            version: node.version.clone(),
            cores: node.cores.len(),
            slices: node.disks.iter().map(|disk| disk.slices.len()).sum(),
            slices_open: slices.map_or(0, |s| s.values().filter(|stat| stat.state == "open").count()),
            size_bytes: node.disks.iter().flat_map(|disk| &disk.slices).map(|slice| slice.size_bytes).sum(),
            used_bytes: sum(|stat| stat.used_bytes),
        }
    }

    /// The PG's state as its primary reports it, if that report is about the present epoch.
    fn pg_stat(&self, pg: wire::PgId, record: &PgRecord) -> Option<&placement::PgStat> {
        let name = pg.to_string();
        self.stats
            .values()
            .filter_map(|stats| stats.pgs.get(&name))
            .find(|stat| stat.epoch == record.epoch && record.primary.is_some())
    }
}

impl ClusterStatus {
    /// Reads it.
    pub fn read(cluster: &mut Cluster) -> Result<Self, CliError> {
        let id = cluster
            .get::<placement::Cluster>(key::CLUSTER)?
            .map(|(found, _)| found.id)
            .ok_or(CliError::NotFound { kind: "key", name: key::CLUSTER.into() })?;
        Ok(Self::of(id, &Raw::read(cluster)?))
    }

    fn of(cluster: ClusterId, raw: &Raw) -> Self {
        let mut pgs = PgSummary::default();
        let mut pools: Vec<PoolStatus> = Vec::new();
        for pool in &raw.pools {
            let mut status = PoolStatus {
                id: pool.id,
                name: pool.name.clone(),
                copies: pool.copies,
                pgs: pool.pg_count,
                active: 0,
                clean: 0,
                too_full: 0,
                missing: 0,
                images: raw.images.iter().filter(|image| image.pool == pool.id).count(),
            };
            for (pg, record) in raw.pgs.iter().filter(|(pg, _)| pg.pool == pool.id) {
                let stat = raw.pg_stat(*pg, record);
                let state = match (stat, record.primary) {
                    (Some(stat), _) => stat.state.clone(),
                    (None, Some(_)) => "starting".to_string(),
                    (None, None) => "inactive".to_string(),
                };
                let has = |flag: &str| state.split('+').any(|part| part == flag);
                status.active += u32::from(has("active"));
                status.clean += u32::from(has("active") && has("clean"));
                status.too_full += u32::from(has("toofull"));
                status.missing += stat.map_or(0, |stat| stat.missing);
                pgs.objects += stat.map_or(0, |stat| stat.objects);
                *pgs.by_state.entry(state).or_default() += 1;
            }
            pgs.total += status.pgs;
            pgs.active += status.active;
            pgs.clean += status.clean;
            pgs.missing += status.missing;
            pools.push(status);
        }
        let nodes: Vec<NodeStatus> = raw.nodes.iter().map(|node| raw.node(node)).collect();
        let disks = disk_status::disks(&raw.nodes, &raw.live, &raw.stats);
        let (health, problems) = judge(&nodes, &disks, &pools, raw);
        Self { cluster, health, problems, nodes, disks, pools, pgs, images: raw.images.len() }
    }

    /// Whether every placement group of every pool serves.
    pub fn is_active(&self) -> bool {
        self.pgs.total > 0 && self.pgs.active == self.pgs.total
    }

    /// Whether every placement group of every pool has all copies.
    pub fn is_clean(&self) -> bool {
        self.pgs.total > 0 && self.pgs.clean == self.pgs.total
    }

    /// Nodes that are live.
    pub fn nodes_up(&self) -> usize {
        self.nodes.iter().filter(|node| node.up).count()
    }

    /// Reads the status again at every change of the metadata until `good` holds.
    pub fn wait_for(
        cluster: &mut Cluster,
        what: &str,
        limit: Duration,
        good: impl Fn(&Self) -> bool,
    ) -> Result<Self, CliError> {
        let deadline = crate::deadline::Deadline::after(limit);
        loop {
            let status = Self::read(cluster)?;
            if good(&status) {
                return Ok(status);
            }
            if deadline.passed() {
                return Err(CliError::TimedOut {
                    what: format!("{what} ({})", status.summary()),
                    seconds: limit.as_secs(),
                });
            }
            cluster.wait_for_change()?;
        }
    }

    /// One line.
    pub fn summary(&self) -> String {
        let states: Vec<String> =
            self.pgs.by_state.iter().map(|(state, count)| format!("{count} {state}")).collect();
        format!(
            "{}/{} nodes up, {}/{} PGs clean: {}",
            self.nodes_up(),
            self.nodes.len(),
            self.pgs.clean,
            self.pgs.total,
            if states.is_empty() { "none".to_string() } else { states.join(", ") }
        )
    }
}

fn judge(
    nodes: &[NodeStatus],
    disks: &[DiskStatus],
    pools: &[PoolStatus],
    raw: &Raw,
) -> (Health, Vec<String>) {
    let mut problems = Vec::new();
    let mut health = Health::Ok;
    let mut found = |worse: Health, problem: String| {
        health = match (health, worse) {
            (Health::Error, _) | (_, Health::Error) => Health::Error,
            (Health::Warning, _) | (_, Health::Warning) => Health::Warning,
            _ => Health::Ok,
        };
        problems.push(problem);
    };
    for node in nodes {
        if !node.up {
            found(Health::Warning, format!("node {} ({}) is down", node.id, node.host));
        }
    }
    for node in nodes {
        if let Some(scope) = node.drain {
            let what = match scope {
                DrainScope::Primaries => "its primaries",
                DrainScope::Everything => "its primaries and copies",
            };
            found(Health::Warning, format!("node {} ({}) is drained of {what}", node.id, node.host));
        }
    }
    for flag in flags(&raw.settings) {
        found(Health::Warning, format!("{flag} is set"));
    }
    for (health, problem) in fullness(raw) {
        found(health, problem);
    }
    for problem in disks.iter().filter_map(DiskStatus::problem) {
        found(Health::Warning, problem);
    }
    for node in &raw.nodes {
        for problem in &node.problems {
            found(
                Health::Warning,
                format!("node {} ({}) runs without a disk: {problem}", node.id, node.host),
            );
        }
    }
    for pool in pools {
        if pool.too_full > 0 {
            let problem = format!(
                "pool {}: recovery of {} PG(s) waits for space on slices that are too full for it",
                pool.name, pool.too_full
            );
            found(Health::Warning, problem);
        }
        if pool.active < pool.pgs {
            let missing = pool.pgs - pool.active;
            found(Health::Error, format!("pool {}: {missing} PG(s) do not serve", pool.name));
        } else if pool.clean < pool.pgs {
            let left = pool.pgs - pool.clean;
            let problem = format!(
                "pool {}: {left} PG(s) lack copies, {} object copies to recover",
                pool.name, pool.missing
            );
            found(Health::Warning, problem);
        }
    }
    let total = problems.len();
    if total > PROBLEMS_MAX {
        problems.truncate(PROBLEMS_MAX);
        problems.push(format!("and {} more", total - PROBLEMS_MAX));
    }
    (health, problems)
}

/// The names of the flags that are set.
fn flags(settings: &Settings) -> impl Iterator<Item = &'static str> {
    let all = [
        (settings.norecover, "norecover"),
        (settings.norebalance, "norebalance"),
        (settings.noscrub, "noscrub"),
    ];
    all.into_iter().filter_map(|(set, name)| set.then_some(name))
}

/// What is to be said of slices above a threshold: a line for each threshold, and an error only for the last.
fn fullness(raw: &Raw) -> Vec<(Health, String)> {
    let Settings { nearfull_percent, backfillfull_percent, full_percent, .. } = raw.settings;
    let levels = [
        (full_percent, Health::Error, "full: writes that need more space fail"),
        (backfillfull_percent, Health::Warning, "too full for recovery in the background"),
        (nearfull_percent, Health::Warning, "nearly full"),
    ];
    let mut found: Vec<Vec<String>> = vec![Vec::new(); levels.len()];
    for (node, stats) in &raw.stats {
        for (slice, stat) in &stats.slices {
            let reached =
                levels.iter().position(|level| Settings::reaches(stat.used_bytes, stat.size_bytes, level.0));
            if let Some(names) = reached.and_then(|level| found.get_mut(level)) {
                let percent = u128::from(stat.used_bytes) * 100 / u128::from(stat.size_bytes.max(1));
                names.push(format!("{slice} of node {node} ({percent}%)"));
            }
        }
    }
    let line = |((percent, health, what), names): ((u8, Health, &str), &Vec<String>)| {
        let first = names.first()?;
        let others = names.len() - 1;
        let more = if others > 0 { format!(" and {others} more") } else { String::new() };
        Some((health, format!("slice {first}{more} reached {percent}%, {what}")))
    };
    levels.into_iter().zip(&found).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use placement::PgStat;
    use wire::{Epoch, PgId, SessionId, SliceId};

    fn raw(state: &str, stat_epoch: u64) -> Raw {
        let pg = PgId { pool: PoolId(1), index: 0 };
        let stat = PgStat { state: state.into(), epoch: Epoch(stat_epoch), objects: 5, missing: 2 };
        let record = PgRecord { epoch: Epoch(3), primary: Some(SliceId(1)), ..PgRecord::default() };
        Raw {
            nodes: Vec::new(),
            live: BTreeMap::from([(
                NodeId(1),
                Live { session: SessionId(1), failed: Vec::new(), full: Vec::new(), leaving: false },
            )]),
            drains: BTreeMap::new(),
            settings: Settings::default(),
            stats: BTreeMap::from([(
                NodeId(1),
                NodeStats { pgs: BTreeMap::from([("1.0".into(), stat)]), slices: BTreeMap::new() },
            )]),
            pools: vec![Pool {
                id: PoolId(1),
                name: "p".into(),
                copies: 3,
                min_copies: 2,
                pg_count: 1,
                failure_domain: Default::default(),
                removing: false,
                scrub: Default::default(),
            }],
            images: Vec::new(),
            pgs: vec![(pg, record)],
        }
    }

    #[test]
    fn only_a_report_of_the_present_epoch_counts() {
        let status = ClusterStatus::of(ClusterId(1), &raw("active+clean", 3));
        assert!(status.is_clean() && status.health == Health::Ok, "{status:?}");
        let status = ClusterStatus::of(ClusterId(1), &raw("active+clean", 2));
        assert!(!status.is_active() && status.health == Health::Error, "{status:?}");
        assert_eq!(status.pgs.by_state.get("starting"), Some(&1));
    }

    #[test]
    fn degraded_is_active_and_not_clean() {
        let status = ClusterStatus::of(ClusterId(1), &raw("active+degraded", 3));
        assert!(status.is_active() && !status.is_clean());
        assert_eq!((status.health, status.pgs.missing), (Health::Warning, 2));
    }

    #[test]
    fn drains_flags_and_full_slices_are_told() {
        let mut raw = raw("active+recovering+toofull", 3);
        raw.settings.norecover = true;
        let slices = &mut raw.stats.get_mut(&NodeId(1)).unwrap().slices;
        for (slice, used_bytes) in [("1", 84), ("2", 86), ("3", 87), ("4", 92)] {
            let stat = placement::SliceStat { size_bytes: 100, used_bytes, ..Default::default() };
            slices.insert(slice.into(), stat);
        }
        let status = ClusterStatus::of(ClusterId(1), &raw);
        assert_eq!(status.health, Health::Warning);
        assert_eq!(
            status.problems,
            [
                "norecover is set",
                "slice 4 of node 1 (92%) reached 90%, too full for recovery in the background",
                "slice 2 of node 1 (86%) and 1 more reached 85%, nearly full",
                "pool p: recovery of 1 PG(s) waits for space on slices that are too full for it",
                "pool p: 1 PG(s) lack copies, 2 object copies to recover",
            ]
        );
        raw.settings.full_percent = 92;
        let status = ClusterStatus::of(ClusterId(1), &raw);
        assert_eq!(status.health, Health::Error, "{:?}", status.problems);
    }

    #[test]
    fn a_pool_without_records_is_not_clean() {
        let mut raw = raw("active+clean", 3);
        raw.pgs.clear();
        assert!(!ClusterStatus::of(ClusterId(1), &raw).is_clean());
    }
}
