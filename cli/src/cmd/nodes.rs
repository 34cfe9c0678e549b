//! `drystone node ls|drain|undrain|rm`: the nodes of a cluster, and taking one out of service gently.

use super::Global;
use crate::cluster::{Cluster, decode};
use crate::deadline::Deadline;
use crate::error::CliError;
use crate::output::{self, Table};
use crate::units::ByteSize;
use clap::{Args, Subcommand};
use control::director::rule_of;
use placement::{Assigner, Drain, DrainScope, Live, Node, NodeStats, PgRecord, Pool, Topology, key};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use wire::{NodeId, PoolId, SliceId};

/// How long `--wait` waits when nothing is said: a week, more than any disk takes.
const WAIT_SECS: &str = "604800";

/// What to do with nodes.
#[derive(Subcommand, Debug)]
pub enum NodeCommand {
    /// List nodes: what they have, and whether they are drained
    Ls,
    /// Have a node give away its primaries and copies, while it goes on working
    #[command(after_help = "Examples:
  drystone node drain 3 --primaries-only --wait    before a restart or an upgrade
  drystone node drain 3 --wait                     before it is taken away for good

Clients notice nothing. Copies move only where the other nodes have room for them in failure domains of their
own; the command says where they have not. `drystone node undrain` ends it.")]
    Drain(DrainArgs),
    /// End a drain: the node gets its share of primaries and copies again
    Undrain {
        /// Its number
        node: NodeId,
    },
    /// Forget a node that is down and will not come back; its copies are made anew elsewhere
    Rm {
        /// Its number
        node: NodeId,
    },
}

/// A drain.
#[derive(Args, Debug)]
pub struct DrainArgs {
    /// Its number
    pub node: NodeId,
    /// Keep the copies and give away primaries only (maintenance)
    #[arg(long)]
    pub primaries_only: bool,
    /// Return when the node has given everything away, or fail after this many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = WAIT_SECS)]
    pub wait: Option<u64>,
}

/// A node, for people and programs.
#[derive(Serialize)]
struct NodeLine {
    #[serde(flatten)]
    node: Node,
    up: bool,
    drain: Option<Drain>,
    #[serde(flatten)]
    holds: Holds,
    size_bytes: u64,
    used_bytes: u64,
}

/// What the records say that a node has.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
struct Holds {
    /// Placement groups it is primary of, or is about to hand over.
    primaries: usize,
    /// Placement groups that it has, or is to have, a copy of.
    copies: usize,
}

/// Everything about the nodes, as of now.
struct Map {
    nodes: Vec<Node>,
    live: BTreeMap<NodeId, Live>,
    drains: BTreeMap<NodeId, Drain>,
    pools: Vec<Pool>,
    records: Vec<(PoolId, PgRecord)>,
}

impl Map {
    fn read(cluster: &mut Cluster) -> Result<Self, CliError> {
        Ok(Self {
            nodes: cluster.list(key::NODES)?,
            live: crate::health::by_node(&cluster.range(key::LIVE)?)?,
            drains: crate::health::by_node(&cluster.range(key::DRAINS)?)?,
            pools: cluster.pools()?,
            records: cluster
                .range(key::PGS)?
                .iter()
                .filter_map(|item| Some((key::parse_pg(&item.key)?.pool, item)))
                .map(|(pool, item)| Ok((pool, decode(item)?)))
                .collect::<Result<_, CliError>>()?,
        })
    }

    fn slices(&self, node: NodeId) -> BTreeSet<SliceId> {
        let found = self.nodes.iter().filter(|one| one.id == node).flat_map(|one| &one.disks);
        found.flat_map(|disk| disk.slices.iter().map(|slice| slice.id)).collect()
    }

    /// What a node has, in pools of which `counts` says so.
    fn holds(&self, node: NodeId, counts: impl Fn(PoolId) -> bool) -> Holds {
        let own = self.slices(node);
        let mut holds = Holds::default();
        for (_, record) in self.records.iter().filter(|(pool, _)| counts(*pool)) {
            let leads = record.primary.or_else(|| record.primary_session.and(record.acting.first().copied()));
            holds.primaries += usize::from(leads.is_some_and(|slice| own.contains(&slice)));
            holds.copies += usize::from(record.slices().iter().any(|slice| own.contains(slice)));
        }
        holds
    }

    /// Pools whose copies cannot leave the drained nodes, and why.
    fn stuck(&self) -> BTreeMap<PoolId, String> {
        let whole =
            |(node, drain): (&NodeId, &Drain)| (drain.scope == DrainScope::Everything).then_some(*node);
        let emptied = self.drains.iter().filter_map(whole).collect();
        let rest = Arc::new(Topology::new(&self.nodes).without(&emptied));
        let why = |pool: &Pool| {
            let error = Assigner::new(rest.clone(), rule_of(pool), Vec::new()).err()?;
            Some((pool.id, format!("pool {} keeps its copies there: {error}", pool.name)))
        };
        self.pools.iter().filter(|pool| !pool.removing).filter_map(why).collect()
    }
}

/// Runs the command.
pub fn run(global: &Global, command: NodeCommand) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    match command {
        NodeCommand::Ls => list(global, &mut cluster),
        NodeCommand::Drain(args) => drain(global, &mut cluster, &args),
        NodeCommand::Undrain { node } => {
            cluster.undrain_node(node)?;
            output::done(global, &format!("node {node} is in service"))
        }
        NodeCommand::Rm { node } => {
            cluster.remove_node(node)?;
            output::done(global, &format!("node {node} is forgotten"))
        }
    }
}

fn drain(global: &Global, cluster: &mut Cluster, args: &DrainArgs) -> Result<(), CliError> {
    let node = args.node;
    let scope = if args.primaries_only { DrainScope::Primaries } else { DrainScope::Everything };
    cluster.drain_node(node, scope)?;
    let Some(seconds) = args.wait else {
        let stuck = if args.primaries_only { BTreeMap::new() } else { Map::read(cluster)?.stuck() };
        let what = if args.primaries_only { "its primaries" } else { "its primaries and copies" };
        let notes: String = stuck.values().map(|why| format!("\n{why}")).collect();
        return output::done(global, &format!("node {node} is giving away {what}{notes}"));
    };
    let deadline = Deadline::after(Duration::from_secs(seconds));
    loop {
        let map = Map::read(cluster)?;
        let stuck = if args.primaries_only { BTreeMap::new() } else { map.stuck() };
        let left = map.holds(node, |_| true);
        let movable = map.holds(node, |pool| !stuck.contains_key(&pool)).copies;
        if left.primaries == 0 && (args.primaries_only || movable == 0) {
            return match stuck.values().next() {
                Some(why) if left.copies > 0 => {
                    let what = format!("move {} placement groups off node {node}", left.copies);
                    Err(CliError::Refused { what, why: why.clone() })
                }
                _ if args.primaries_only => {
                    output::done(global, &format!("node {node} is primary of nothing"))
                }
                _ => output::done(global, &format!("node {node} holds nothing any more")),
            };
        }
        if deadline.passed() {
            let Holds { primaries, copies } = left;
            let what = format!("node {node} to be drained: it has {primaries} primaries, {copies} copies");
            return Err(CliError::TimedOut { what, seconds });
        }
        cluster.wait_for_change()?;
    }
}

fn list(global: &Global, cluster: &mut Cluster) -> Result<(), CliError> {
    let map = Map::read(cluster)?;
    let stats: BTreeMap<NodeId, NodeStats> = crate::health::by_node(&cluster.range(key::STATS)?)?;
    let lines: Vec<NodeLine> = map
        .nodes
        .iter()
        .map(|node| NodeLine {
            node: node.clone(),
            up: map.live.contains_key(&node.id),
            drain: map.drains.get(&node.id).cloned(),
            holds: map.holds(node.id, |_| true),
            size_bytes: node.disks.iter().flat_map(|disk| &disk.slices).map(|slice| slice.size_bytes).sum(),
            used_bytes: stats
                .get(&node.id)
                .map_or(0, |stats| stats.slices.values().map(|stat| stat.used_bytes).sum()),
        })
        .collect();
    if global.json {
        return output::json(&lines);
    }
    let headings =
        ["NODE", "HOST", "ADDRESS", "STATE", "DRAINED", ">PRIMARIES", ">COPIES", ">USED", ">SIZE", "VERSION"];
    let mut table = Table::new(&headings);
    for line in &lines {
        let drained = match line.drain.as_ref().map(|drain| drain.scope) {
            None => "-",
            Some(DrainScope::Primaries) => "of primaries",
            Some(DrainScope::Everything) => "of everything",
        };
        table.row([
            line.node.id.to_string(),
            line.node.host.clone(),
            line.node.control.to_string(),
            if line.up { "up" } else { "DOWN" }.to_string(),
            drained.to_string(),
            line.holds.primaries.to_string(),
            line.holds.copies.to_string(),
            ByteSize(line.used_bytes).to_string(),
            ByteSize(line.size_bytes).to_string(),
            line.node.version.clone(),
        ]);
    }
    table.print()
}
