//! Nodes that are drained or stopped cleanly while clients work: no error, and how long they wait.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::clients::{Clients, verify};
use common::{LIMIT, TestCluster, wait_until};
use serde_json::Value;

const IMAGE_BYTES: u64 = 32 << 20;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A node's line of `node ls`.
fn node(cluster: &TestCluster, id: u64) -> Value {
    let all = json(&cluster.ok(&["node", "ls", "--json"]));
    all.as_array().unwrap().iter().find(|node| node["id"] == id).unwrap().clone()
}

/// Five nodes and three copies: everything that a node has fits elsewhere.
fn five_nodes() -> TestCluster {
    let cluster = TestCluster::start(5);
    cluster.ok(&["pool", "create", "p", "--copies", "3", "--pgs", "16"]);
    cluster.wait_clean();
    cluster.ok(&["image", "create", "i", "--pool", "p", "--size", &IMAGE_BYTES.to_string()]);
    cluster
}

#[test]
fn a_clean_stop_costs_no_client_an_error_and_any_node_can_be_stopped() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let clients = Clients::start(&cluster.fleet.controls(), 3, IMAGE_BYTES);
    clients.more(300);
    // One of them leads the metadata group.
    for index in 0..3 {
        let quiet = clients.slowest();
        cluster.fleet.stop(index).unwrap();
        clients.more(300);
        println!(
            "node {index} stopped: the longest operation took {:?}, before {quiet:?}",
            clients.slowest()
        );
        cluster.fleet.spawn(index).unwrap();
        cluster.fleet.wait_ready(index).unwrap();
        cluster.wait_clean();
    }
    verify(&cluster, &clients.finish());
}

#[test]
fn a_whole_cluster_stops_cleanly_at_once_and_comes_back() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let clients = Clients::start(&cluster.fleet.controls(), 1, IMAGE_BYTES);
    clients.more(100);
    let written = clients.finish();
    cluster.fleet.stop_all().unwrap();
    cluster.fleet.start_all().unwrap();
    cluster.wait_clean();
    verify(&cluster, &written);
}

#[test]
fn a_node_in_maintenance_keeps_its_copies_gives_its_primaries_away_and_gets_them_back() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let clients = Clients::start(&cluster.fleet.controls(), 3, IMAGE_BYTES);
    clients.more(300);
    assert!(node(&cluster, 2)["primaries"].as_u64().unwrap() > 0);
    let quiet = clients.slowest();
    cluster.ok(&["node", "drain", "2", "--primaries-only", "--wait", &LIMIT.as_secs().to_string()]);
    clients.more(100);
    println!("drained of primaries: the longest operation took {:?}, before {quiet:?}", clients.slowest());
    let drained = node(&cluster, 2);
    assert_eq!((&drained["primaries"], &drained["copies"]), (&0.into(), &8.into()), "{drained}");
    assert_eq!(drained["drain"]["scope"], "primaries");
    assert_eq!(json(&cluster.ok(&["meta", "get", "/drain/", "--json"]))[0]["value"]["scope"], "primaries");
    let status = cluster.ok(&["status"]);
    assert!(status.contains("node 2 (host2) is drained of its primaries"), "{status}");

    cluster.fleet.stop(1).unwrap();
    clients.more(300);
    println!("drained and stopped: the longest operation took {:?}", clients.slowest());
    cluster.fleet.spawn(1).unwrap();
    cluster.fleet.wait_ready(1).unwrap();
    cluster.wait_clean();
    clients.more(300);
    assert_eq!(node(&cluster, 2)["primaries"], 0, "taken back before the end of the drain");
    cluster.ok(&["node", "undrain", "2"]);
    wait_until("its primaries to be back", || node(&cluster, 2)["primaries"].as_u64().unwrap() > 0);
    verify(&cluster, &clients.finish());
}

#[test]
fn a_drained_node_ends_up_with_nothing_and_can_be_switched_off_and_forgotten() {
    let mut cluster = five_nodes();
    let clients = Clients::start(&cluster.fleet.controls(), 3, IMAGE_BYTES);
    clients.more(300);
    let quiet = clients.slowest();
    cluster.ok(&["node", "drain", "3", "--wait", &LIMIT.as_secs().to_string()]);
    println!("drained: the longest operation took {:?}, before {quiet:?}", clients.slowest());
    let drained = node(&cluster, 3);
    assert_eq!((&drained["primaries"], &drained["copies"]), (&0.into(), &0.into()), "{drained}");
    // What its slices held is erased: the space is there for others.
    let held = |metrics: &str| -> f64 {
        let slices = metrics.lines().filter(|line| line.starts_with("drystone_slice_objects{"));
        slices.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    };
    // Told once per second: all of this may have taken less.
    wait_until("a metric to tell what slices hold", || held(&cluster.metrics(0)) > 0.0);
    wait_until("its slices to be empty", || held(&cluster.metrics(2)) == 0.0);
    assert!(cluster.fails(&["node", "rm", "3"]).contains("node 3 is up"));

    // Its process may die as it likes: nothing waits for it.
    let before = json(&cluster.ok(&["meta", "get", "/pg/", "--json"]));
    cluster.fleet.kill(2).unwrap();
    wait_until("it to be seen dead", || node(&cluster, 3)["up"] == false);
    clients.more(300);
    println!("drained and killed: the longest operation took {:?}", clients.slowest());
    assert_eq!(before, json(&cluster.ok(&["meta", "get", "/pg/", "--json"])), "a record has changed");
    cluster.ok(&["node", "rm", "3"]);
    assert!(!cluster.ok(&["node", "ls"]).contains("host3"));
    assert_eq!(json(&cluster.ok(&["meta", "get", "/drain/", "--json"])), Value::Array(vec![]));
    verify(&cluster, &clients.finish());
    cluster.wait_clean();
}

#[test]
fn a_drain_that_has_no_room_says_so_and_gives_the_primaries_all_the_same() {
    let cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let limit = LIMIT.as_secs().to_string();
    let said = cluster.fails(&["node", "drain", "1", "--wait", &limit]);
    assert!(said.contains("pool p keeps its copies there: 3 copies need 3 different hosts"), "{said}");
    let drained = node(&cluster, 1);
    assert_eq!((&drained["primaries"], &drained["copies"]), (&0.into(), &8.into()), "{drained}");
    cluster.wait_clean();
    let said = cluster.fails(&["node", "drain", "77"]);
    assert!(said.contains("there is no node \"77\"; there is 1, 2, 3"), "{said}");
}
