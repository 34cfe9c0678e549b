//! The connections of nodes: the page `/links` that each shows, and all nodes' pages together.

use crate::cluster::Cluster;
use crate::error::CliError;
use crate::node::metrics::core_label;
use crate::scrape;
use placement::{Node, key};
use reactor::backend::{CoreStats, Link};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use wire::{CoreId, NodeId};

/// Connections on a node's page: some three milliseconds of its control core. A node of a hundred-node cluster has
/// fewer, unless it has thousands of clients; what it connected to itself comes first.
pub const LINKS_SHOWN_MAX: usize = 4096;
/// Nodes asked at once: a thread each.
const NODES_AT_ONCE: usize = 32;

/// A connection, as a node's page shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LinkRow {
    /// The core that has it: its number, or `control`.
    pub core: String,
    /// The other side: where this node connected to, or where it was connected from.
    pub peer: SocketAddr,
    /// Made by this node.
    pub outgoing: bool,
    /// `tcp` or `rdma`: what this node sends over.
    pub transport: String,
    /// `tcp`, `negotiating` or `rdma`.
    pub state: String,
    /// Time of RDMA's probe, there and back.
    pub round_trip_us: Option<u64>,
    /// How often RDMA was tried in vain or broke: on it and, where this node made it, on those before it to the peer.
    pub failures: u32,
    /// Why it did so last.
    #[serde(default)]
    pub last_failure: Option<String>,
}

impl LinkRow {
    fn of(core: CoreId, link: &Link) -> Self {
        Self {
            core: core_label(core),
            peer: link.peer,
            outgoing: link.outgoing,
            transport: link.state.transport().to_owned(),
            state: link.state.name().to_owned(),
            round_trip_us: link.round_trip_us,
            failures: link.failures,
            last_failure: link.last_failure.as_deref().map(str::to_owned),
        }
    }
}

/// The page of a node with these cores.
pub fn page(cores: &[(CoreId, Arc<CoreStats>)]) -> String {
    let all = cores.iter().flat_map(|(core, stats)| stats.links.list().into_iter().map(|link| (*core, link)));
    let (mut shown, incoming): (Vec<_>, Vec<_>) = all.partition(|(_, link)| link.outgoing);
    shown.extend(incoming);
    shown.truncate(LINKS_SHOWN_MAX);
    let rows: Vec<LinkRow> = shown.iter().map(|(core, link)| LinkRow::of(*core, link)).collect();
    // Numbers and names always can be written.
    serde_json::to_string(&rows).unwrap_or_else(|_| "[]".to_owned())
}

/// A connection, and whose address the other side's is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SeenLink {
    /// The node that listens at the peer's address. Who has connected from a port of its own cannot be told.
    pub peer_node: Option<NodeId>,
    /// The rest.
    #[serde(flatten)]
    pub row: LinkRow,
}

/// A node's connections.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct NodeLinks {
    /// The node.
    pub node: NodeId,
    /// Its host.
    pub host: String,
    /// Why there is no answer.
    pub problem: Option<String>,
    /// There may be more than it shows.
    pub more: bool,
    /// What it shows.
    pub links: Vec<SeenLink>,
}

/// Asks all nodes, or one.
pub fn read(cluster: &mut Cluster, only: Option<NodeId>) -> Result<Vec<NodeLinks>, CliError> {
    let nodes: Vec<Node> = cluster.list(key::NODES)?;
    let listening = listening(&nodes);
    let wanted: Vec<&Node> = nodes.iter().filter(|node| only.is_none_or(|id| id == node.id)).collect();
    if let (Some(id), true) = (only, wanted.is_empty()) {
        return Err(CliError::NotFound { kind: "node", name: id.to_string() });
    }
    let answers = wanted.chunks(NODES_AT_ONCE).flat_map(|some| ask(some, &listening));
    Ok(answers.collect())
}

/// Who listens where.
fn listening(nodes: &[Node]) -> BTreeMap<SocketAddr, NodeId> {
    nodes
        .iter()
        .flat_map(|node| node.cores.iter().chain([&node.control]).map(|address| (*address, node.id)))
        .collect()
}

/// Asks these nodes at the same time: one that does not answer must not make the others wait.
fn ask(nodes: &[&Node], listening: &BTreeMap<SocketAddr, NodeId>) -> Vec<NodeLinks> {
    std::thread::scope(|scope| {
        let start = |node: &Node| {
            let http = node.http;
            std::thread::Builder::new().spawn_scoped(scope, move || fetch(http))
        };
        let asked: Vec<_> = nodes.iter().map(|node| (*node, start(node))).collect();
        let answer = |asked: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| match asked {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("asking it failed".to_owned())),
            Err(error) => Err(format!("no thread to ask it: {error}")),
        };
        asked.into_iter().map(|(node, asked)| seen(node, answer(asked), listening)).collect()
    })
}

fn fetch(http: Option<SocketAddr>) -> Result<Vec<LinkRow>, String> {
    let Some(http) = http else {
        return Err("its record names no HTTP port: an older version registered it".to_owned());
    };
    let text = scrape::page(http, "/links").map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| format!("http://{http}/links makes no sense: {error}"))
}

fn seen(
    node: &Node,
    answer: Result<Vec<LinkRow>, String>,
    listening: &BTreeMap<SocketAddr, NodeId>,
) -> NodeLinks {
    let (rows, problem) = match answer {
        Ok(rows) => (rows, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    let more = rows.len() >= LINKS_SHOWN_MAX;
    let whose = |row: &LinkRow| listening.get(&row.peer).copied().filter(|_| row.outgoing);
    let links = rows.into_iter().map(|row| SeenLink { peer_node: whose(&row), row }).collect();
    NodeLinks { node: node.id, host: node.host.clone(), problem, more, links }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::ConnId;
    use wire::CONTROL_CORE;

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 2], port))
    }

    #[test]
    fn a_page_says_what_the_tables_hold_own_connections_first() {
        let (data, control) = (Arc::<CoreStats>::default(), Arc::<CoreStats>::default());
        data.links.opened(ConnId(1), at(40_000), false);
        data.links.opened(ConnId(2), at(7710), true);
        data.links.negotiating(ConnId(2));
        data.links.switched(ConnId(2), Some(9));
        control.links.opened(ConnId(1), at(7700), true);
        control.links.gave_up(ConnId(1), "no probe");
        let text = page(&[(CoreId(0), data), (CONTROL_CORE, control)]);
        let expected = concat!(
            r#"[{"core":"0","peer":"10.0.0.2:7710","outgoing":true,"transport":"rdma","state":"rdma","#,
            r#""round_trip_us":9,"failures":0,"last_failure":null},"#,
            r#"{"core":"control","peer":"10.0.0.2:7700","outgoing":true,"transport":"tcp","state":"tcp","#,
            r#""round_trip_us":null,"failures":1,"last_failure":"no probe"},"#,
            r#"{"core":"0","peer":"10.0.0.2:40000","outgoing":false,"transport":"tcp","state":"tcp","#,
            r#""round_trip_us":null,"failures":0,"last_failure":null}]"#,
        );
        assert_eq!(text, expected);
        let rows: Vec<LinkRow> = serde_json::from_str(&text).unwrap();
        assert_eq!(rows.len(), 3);
    }

    #[test]
    fn a_page_is_bounded_and_keeps_what_the_node_connected_to() {
        let stats = Arc::<CoreStats>::default();
        for conn in 0..LINKS_SHOWN_MAX as u64 {
            stats.links.opened(ConnId(conn), at(40_000), false);
        }
        stats.links.opened(ConnId(1 << 40), at(7710), true);
        let rows: Vec<LinkRow> = serde_json::from_str(&page(&[(CoreId(0), stats)])).unwrap();
        assert_eq!((rows.len(), rows[0].peer), (LINKS_SHOWN_MAX, at(7710)));
    }

    #[test]
    fn a_node_without_a_page_is_named_with_the_reason() {
        let node = Node {
            id: NodeId(3),
            host: "h".into(),
            control: at(7700),
            cores: vec![at(7710)],
            http: None,
            disks: Vec::new(),
            version: String::new(),
            problems: Vec::new(),
        };
        let listening = listening(std::slice::from_ref(&node));
        let answers = ask(&[&node], &listening);
        assert!(answers[0].problem.as_ref().unwrap().contains("no HTTP port"), "{answers:?}");
        // An address names its node only where this side connected to it.
        let link = Link {
            peer: at(7710),
            outgoing: true,
            state: reactor::backend::LinkState::Tcp,
            round_trip_us: None,
            failures: 0,
            last_failure: None,
        };
        let rows = [true, false].map(|outgoing| LinkRow::of(CoreId(0), &Link { outgoing, ..link.clone() }));
        let links = seen(&node, Ok(rows.to_vec()), &listening).links;
        assert_eq!((links[0].peer_node, links[1].peer_node), (Some(NodeId(3)), None));
    }
}
