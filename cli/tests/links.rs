//! `drystone status --links`: which node is connected to which, and over what.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::{TestCluster, wait_until};
use serde_json::Value;

const IMAGE_BYTES: u64 = 8 << 20;

fn links(cluster: &TestCluster, flags: &[&str]) -> Vec<Value> {
    let text = cluster.ok(&[&["status", "--links", "--json"], flags].concat());
    match serde_json::from_str(&text) {
        Ok(Value::Array(nodes)) => nodes,
        other => panic!("{other:?}: {text}"),
    }
}

/// Whether `from` has connected to `to`.
fn reaches(nodes: &[Value], from: u64, to: u64) -> bool {
    let node = nodes.iter().find(|node| node["node"] == from).unwrap();
    let links = node["links"].as_array().unwrap();
    links.iter().any(|link| link["peer_node"] == to && link["outgoing"] == true)
}

#[test]
fn three_nodes_are_connected_with_each_other_and_a_dead_one_is_named() {
    // Where the machine has RDMA, the nodes would use it.
    let mut cluster = TestCluster::prepared_with(3, &["--transport", "tcp"]);
    cluster.fleet.start_all().unwrap();
    cluster.make_image(IMAGE_BYTES);
    wait_until("links between all nodes", || {
        let nodes = links(&cluster, &[]);
        let pairs = [(1, 2), (1, 3), (2, 3)];
        pairs.iter().all(|(a, b)| reaches(&nodes, *a, *b) || reaches(&nodes, *b, *a))
    });
    let nodes = links(&cluster, &[]);
    for node in &nodes {
        assert_eq!((&node["problem"], &node["more"]), (&Value::Null, &Value::Bool(false)), "{node}");
        for link in node["links"].as_array().unwrap() {
            assert_eq!((&link["transport"], &link["state"]), (&"tcp".into(), &"tcp".into()), "{link}");
            assert_eq!((&link["round_trip_us"], &link["failures"]), (&Value::Null, &0.into()), "{link}");
        }
    }
    let of_one = links(&cluster, &["--node", "2"]);
    assert!(of_one.len() == 1 && of_one[0]["node"] == 2, "{of_one:?}");
    let text = cluster.ok(&["status", "--links"]);
    assert!(text.starts_with("NODE  CORE") && text.contains("out"), "{text}");
    assert!(cluster.fails(&["status", "--links", "--node", "9"]).contains("no node named '9'"));

    cluster.fleet.kill(2).unwrap();
    let text = cluster.ok(&["status", "--links"]);
    assert!(text.lines().any(|line| line.starts_with("node 3 (") && line.contains("no answer:")), "{text}");
    let problem = &links(&cluster, &["--node", "3"])[0]["problem"];
    assert!(problem.as_str().unwrap().contains("/links"), "{problem}");
}
