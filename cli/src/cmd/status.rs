//! `drystone status`: is the cluster well, and if not, what is wrong; over what its nodes are connected.

use super::Global;
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::health::{ClusterStatus, Health};
use crate::links::{self, NodeLinks};
use crate::output::{self, Table};
use crate::units::ByteSize;
use clap::Args;
use std::time::Duration;
use wire::NodeId;

/// How to show the status.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  drystone status
  drystone status --json | jq .pgs
  drystone status --wait-clean 60      for scripts: returns once every PG is clean
  drystone status --links              every connection of every node: over TCP or RDMA?
  drystone status --links --node 3     those of one node")]
pub struct StatusArgs {
    /// Wait until every placement group is active and clean; fail after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pub wait_clean: Option<u64>,
    /// Show the connections of the nodes instead, and over what each goes
    #[arg(long, conflicts_with = "wait_clean")]
    pub links: bool,
    /// Those of this node only
    #[arg(long, requires = "links")]
    pub node: Option<NodeId>,
}

/// Runs the command.
pub fn run(global: &Global, args: &StatusArgs) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    if args.links {
        let nodes = links::read(&mut cluster, args.node)?;
        return if global.json { output::json(&nodes) } else { print_links(&nodes) };
    }
    let status = match args.wait_clean {
        Some(seconds) => ClusterStatus::wait_for(
            &mut cluster,
            "every placement group to be clean",
            Duration::from_secs(seconds),
            ClusterStatus::is_clean,
        )?,
        None => ClusterStatus::read(&mut cluster)?,
    };
    if global.json { output::json(&status) } else { print(&status) }
}

fn print(status: &ClusterStatus) -> Result<(), CliError> {
    let health = match &status.health {
        Health::Ok => "ok".to_string(),
        Health::Warning => "warning".to_string(),
        Health::Error => "ERROR".to_string(),
    };
    output::line(&format!("cluster {}  health {health}", status.cluster))?;
    for problem in &status.problems {
        output::line(&format!("  - {problem}"))?;
    }
    output::line("")?;
    let mut nodes = Table::new(&["NODE", "HOST", "ADDRESS", "STATE", ">CORES", ">SLICES", ">USED", ">SIZE"]);
    for node in &status.nodes {
        nodes.row([
            node.id.to_string(),
            node.host.clone(),
            node.control.to_string(),
            match (node.up, node.drain) {
                (true, None) => "up",
                (true, Some(_)) => "up, drained",
                (false, _) => "DOWN",
            }
            .to_string(),
            node.cores.to_string(),
            format!("{}/{}", node.slices_open, node.slices),
            ByteSize(node.used_bytes).to_string(),
            ByteSize(node.size_bytes).to_string(),
        ]);
    }
    nodes.print()?;
    output::line("")?;
    let mut pools = Table::new(&["POOL", ">COPIES", ">PGS", ">ACTIVE", ">CLEAN", ">TO RECOVER", ">IMAGES"]);
    for pool in &status.pools {
        pools.row([
            pool.name.clone(),
            pool.copies.to_string(),
            pool.pgs.to_string(),
            pool.active.to_string(),
            pool.clean.to_string(),
            pool.missing.to_string(),
            pool.images.to_string(),
        ]);
    }
    pools.print()?;
    for (state, count) in &status.pgs.by_state {
        output::line(&format!("  {count} {state}"))?;
    }
    Ok(())
}

fn print_links(nodes: &[NodeLinks]) -> Result<(), CliError> {
    let mut table = Table::new(&[
        "NODE",
        "CORE",
        "PEER",
        "ADDRESS",
        "DIRECTION",
        "TRANSPORT",
        "STATE",
        ">ROUND TRIP",
        ">FAILURES",
        "LAST FAILURE",
    ]);
    for node in nodes {
        for link in &node.links {
            let row = &link.row;
            table.row([
                node.node.to_string(),
                row.core.clone(),
                link.peer_node.map_or("-".to_string(), |peer| format!("node {peer}")),
                row.peer.to_string(),
                if row.outgoing { "out" } else { "in" }.to_string(),
                row.transport.clone(),
                row.state.clone(),
                row.round_trip_us.map_or("-".to_string(), |us| format!("{us} us")),
                row.failures.to_string(),
                row.last_failure.clone().unwrap_or_else(|| "-".to_string()),
            ]);
        }
    }
    table.print()?;
    for node in nodes {
        if let Some(why) = &node.problem {
            output::line(&format!("node {} ({})  no answer: {why}", node.node, node.host))?;
        }
        if node.more {
            let shown = node.links.len();
            output::line(&format!("node {} ({})  shows {shown} and may have more", node.node, node.host))?;
        }
    }
    Ok(())
}
