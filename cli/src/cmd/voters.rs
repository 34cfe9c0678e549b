//! `drystone meta voters`: the nodes that keep the metadata, and changing which they are.

use super::Global;
use crate::cluster::{Cluster, Members};
use crate::deadline::Deadline;
use crate::error::{CliError, VotersProblem};
use crate::output::{self, Table};
use clap::Subcommand;
use placement::{Live, Node, key};
use serde::Serialize;
use std::time::Duration;
use wire::control::{MetaRequest, VoterAddress, VoterInfo, VoterRole};
use wire::{NodeId, Status};

/// How long a change may take when nothing is said: most of it is filling the new voters.
const WAIT_SECS: u64 = 120;

/// What to do with the voters.
#[derive(Subcommand, Debug)]
pub enum VotersCommand {
    /// List the voters: who leads, where they are, and how far they are behind the leader
    Ls,
    /// Have another node vote in place of a voter, dead or alive
    #[command(after_help = "Example:
  drystone meta voters replace 3 4     node 3 is lost for good; node 4 votes from now on

The new node is filled first and votes when it has caught up. Until then nothing changes, and `cancel`
gives the change up. Clients notice nothing. A removed voter that comes back goes on as an ordinary node.")]
    Replace {
        /// The voter that is to go
        old: NodeId,
        /// The node that is to vote
        new: NodeId,
        /// Fail when it takes longer than this; the change goes on all the same
        #[arg(long, value_name = "SECONDS", default_value_t = WAIT_SECS)]
        wait: u64,
    },
    /// Have more nodes vote: two at a time, so that 1 voter becomes 3, or 3 become 5
    #[command(after_help = "Example:
  drystone meta voters add 2 3         a cluster that began with one voter")]
    Add {
        /// The nodes
        #[arg(required = true)]
        nodes: Vec<NodeId>,
        /// Fail when it takes longer than this; the change goes on all the same
        #[arg(long, value_name = "SECONDS", default_value_t = WAIT_SECS)]
        wait: u64,
    },
    /// Have fewer nodes vote: two at a time, so that 5 voters become 3, or 3 become 1
    Rm {
        /// The voters
        #[arg(required = true)]
        nodes: Vec<NodeId>,
        /// Fail when it takes longer than this; the change goes on all the same
        #[arg(long, value_name = "SECONDS", default_value_t = WAIT_SECS)]
        wait: u64,
    },
    /// Give up a change whose new voters do not vote yet
    Cancel,
}

/// A member, for people and programs.
#[derive(Serialize)]
struct Line {
    node: NodeId,
    role: &'static str,
    address: Option<String>,
    behind: u64,
    heard: bool,
}

impl Line {
    fn of(member: &VoterInfo, nodes: &[Node]) -> Self {
        let registered =
            || nodes.iter().find(|node| node.id == member.node).map(|node| node.control.to_string());
        let told = Some(member.address.clone()).filter(|address| !address.is_empty());
        Self {
            node: member.node,
            role: match member.role {
                VoterRole::Leader => "leader",
                VoterRole::Voter => "voter",
                VoterRole::Learner => "learner",
                VoterRole::Leaving => "leaving",
            },
            address: told.or_else(registered),
            behind: member.behind,
            heard: member.heard,
        }
    }
}

/// Runs the command.
pub fn run(global: &Global, command: VotersCommand) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    match command {
        VotersCommand::Ls => ls(global, &mut cluster),
        VotersCommand::Replace { old, new, wait } => change(global, &mut cluster, &[new], &[old], wait),
        VotersCommand::Add { nodes, wait } => change(global, &mut cluster, &nodes, &[], wait),
        VotersCommand::Rm { nodes, wait } => change(global, &mut cluster, &[], &nodes, wait),
        VotersCommand::Cancel => {
            let done = cluster.change_voters("give up the change", MetaRequest::CancelVoters)?;
            done.map_err(|status| refusal("give up the change", status, true))?;
            output::done(global, "the change is given up; the voters are those they were")
        }
    }
}

fn ls(global: &Global, cluster: &mut Cluster) -> Result<(), CliError> {
    let now = cluster.voters()?;
    let nodes: Vec<Node> = cluster.list(key::NODES)?;
    let lines: Vec<Line> = now.members.iter().map(|member| Line::of(member, &nodes)).collect();
    if global.json {
        let change = (!now.target.is_empty()).then_some(&now.target);
        return output::json(
            &serde_json::json!({ "members": lines, "changing_to": change, "settled": now.settled }),
        );
    }
    let mut table = Table::new(&["NODE", "ROLE", "ADDRESS", "BEHIND", "HEARD"]);
    for line in lines {
        let heard = if line.heard { "yes" } else { "no" };
        table.row([
            line.node.to_string(),
            line.role.to_owned(),
            line.address.unwrap_or_else(|| "?".to_owned()),
            line.behind.to_string(),
            heard.to_owned(),
        ]);
    }
    table.print()?;
    if !now.target.is_empty() {
        output::line(&format!("a change is under way: nodes {} are to vote", list(&now.target)))?;
    }
    Ok(())
}

fn list(nodes: &[NodeId]) -> String {
    nodes.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", ")
}

fn refusal(what: &str, status: Status, cancels: bool) -> CliError {
    let problem = match status {
        Status::ChangeUnderWay if cancels => VotersProblem::TooLate,
        Status::NotFound if cancels => VotersProblem::NothingToCancel,
        Status::ChangeUnderWay => VotersProblem::UnderWay,
        Status::VoterCount => VotersProblem::Count,
        Status::QuorumAtRisk => VotersProblem::Quorum,
        Status::Exists => VotersProblem::AlreadyVoter,
        Status::NotFound => VotersProblem::NoVoter,
        other => VotersProblem::Other(other),
    };
    CliError::Voters { what: what.to_owned(), problem }
}

/// Where a node that is to vote is reached; it must be up.
fn address(cluster: &mut Cluster, what: &str, node: NodeId) -> Result<VoterAddress, CliError> {
    let failed = |problem| CliError::Voters { what: what.to_owned(), problem };
    let (record, _) =
        cluster.get::<Node>(&key::node(node))?.ok_or_else(|| failed(VotersProblem::UnknownNode(node)))?;
    if cluster.get::<Live>(&key::live(node))?.is_none() {
        return Err(failed(VotersProblem::NodeDown(node)));
    }
    Ok(VoterAddress { node, address: record.control.to_string() })
}

fn change(
    global: &Global,
    cluster: &mut Cluster,
    add: &[NodeId],
    remove: &[NodeId],
    wait: u64,
) -> Result<(), CliError> {
    let what = match (add, remove) {
        ([new], [old]) => format!("replace voter {old} by node {new}"),
        (_, []) => format!("let nodes {} vote", list(add)),
        _ => format!("remove voters {}", list(remove)),
    };
    let is_done = |now: &Members| {
        let votes =
            |node: &NodeId| now.members.iter().any(|m| m.node == *node && m.role != VoterRole::Learner);
        add.iter().all(votes) && !remove.iter().any(votes)
    };
    let now = cluster.voters()?;
    if now.settled && is_done(&now) {
        return output::done(global, "nothing to do: these are the voters already");
    }
    if now.target.is_empty() && !is_done(&now) {
        let add = add.iter().map(|node| address(cluster, &what, *node)).collect::<Result<_, _>>()?;
        let request = MetaRequest::ChangeVoters { add, remove: remove.to_vec() };
        cluster.change_voters(&what, request)?.map_err(|status| refusal(&what, status, false))?;
    } else if !same_change(&now, add, remove) {
        return Err(refusal(&what, Status::ChangeUnderWay, false));
    }
    let deadline = Deadline::after(Duration::from_secs(wait));
    loop {
        let now = cluster.voters()?;
        if now.settled && is_done(&now) {
            let voters: Vec<NodeId> = now.members.iter().map(|member| member.node).collect();
            return output::done(global, &format!("nodes {} keep the metadata now", list(&voters)));
        }
        if now.target.is_empty() && !is_done(&now) {
            return Err(CliError::Voters { what, problem: VotersProblem::GivenUp });
        }
        if deadline.passed() {
            let lags = now.members.iter().find(|member| member.role == VoterRole::Learner);
            let problem = VotersProblem::TakesLong {
                seconds: wait,
                learner: lags.map(|member| (member.node, member.behind, member.heard)),
            };
            return Err(CliError::Voters { what, problem });
        }
        cluster.wait_for_change()?;
    }
}

/// Whether the change under way is this very one: the command may be repeated.
fn same_change(now: &Members, add: &[NodeId], remove: &[NodeId]) -> bool {
    let joins = |node: &NodeId| now.target.contains(node);
    (now.target.is_empty() || add.iter().all(joins)) && !remove.iter().any(joins)
}
