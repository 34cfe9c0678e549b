//! The nodes that keep the metadata are changed while the cluster serves.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use cli::children::free_ports;
use common::disk_rig::Load;
use common::{TestCluster, wait_until};
use wire::control::VoterRole;

const IMAGE_BYTES: u64 = 32 << 20;

/// Three voters and a fourth node that is none, with an image of three copies.
fn four() -> TestCluster {
    let mut cluster = TestCluster::prepared(3);
    let disk = cluster.fleet.next_dir().join("disk");
    cluster.fleet.add(free_ports(1).unwrap()[0], disk, false).unwrap();
    cluster.fleet.start_all().unwrap();
    cluster.make_image(IMAGE_BYTES);
    cluster
}

fn voters(cluster: &TestCluster) -> Vec<u64> {
    let now = cluster.admin().voters().unwrap();
    now.members.iter().filter(|m| m.role != VoterRole::Learner).map(|member| member.node.0).collect()
}

#[test]
fn a_lost_voter_is_replaced_and_then_another_one_may_be_lost() {
    let mut cluster = four();
    let load = Load::start(&cluster);
    load.more(50);
    for (args, says) in
        [(["3", "3"], "votes already"), (["9", "4"], "no voter"), (["3", "9"], "does not know node 9")]
    {
        let said = cluster.fails(&["meta", "voters", "replace", args[0], args[1]]);
        assert!(said.contains(says) && said.contains("cannot replace voter"), "{said}");
    }
    assert!(cluster.fails(&["meta", "voters", "add", "4"]).contains("1, 3, 5 or 7"));
    assert!(cluster.fails(&["meta", "voters", "cancel"]).contains("no change is under way"));

    cluster.fleet.kill(2).unwrap();
    load.more(50);
    let said = cluster.ok(&["meta", "voters", "replace", "3", "4"]);
    assert!(said.contains("nodes 1, 2, 4 keep the metadata"), "{said}");
    assert!(cluster.ok(&["meta", "voters", "replace", "3", "4"]).contains("nothing to do"));
    let table = cluster.ok(&["meta", "voters", "ls"]);
    assert!(table.contains(&cluster.fleet.nodes[3].control.to_string()), "{table}");
    assert!(table.contains("leader") && !table.contains("learner"), "{table}");
    let json: serde_json::Value =
        serde_json::from_str(&cluster.ok(&["meta", "voters", "ls", "--json"])).unwrap();
    assert_eq!((json["members"].as_array().unwrap().len(), json["settled"].as_bool()), (3, Some(true)));
    assert!(cluster.ok(&["meta", "get", "/meta/voters"]).contains("\"node\":4"));
    // Copies come back onto three nodes, so that the data, too, can do without one more.
    cluster.ok(&["node", "rm", "3"]);
    cluster.wait_clean();

    cluster.fleet.kill(1).unwrap();
    load.more(50);
    cluster.ok(&["meta", "put", "/notes/a", "1"]);
    cluster.ok(&["image", "create", "j", "--pool", "p", "--size", "1M"]);
    // The two that are left come back as what they are, whatever their command lines say.
    for node in [0, 3] {
        cluster.fleet.kill(node).unwrap();
        cluster.fleet.spawn(node).unwrap();
        cluster.fleet.wait_ready(node).unwrap();
    }
    assert_eq!(voters(&cluster), [1, 2, 4]);
    load.more(50);
    load.finish(&cluster);
    assert!(cluster.ok(&["meta", "get", "/notes/a"]).contains('1'));
}

#[test]
fn a_living_voter_that_is_replaced_goes_on_as_an_ordinary_node() {
    let mut cluster = four();
    let load = Load::start(&cluster);
    load.more(50);
    let leader = cluster.admin().voters().unwrap();
    let leader = leader.members.iter().find(|m| m.role == VoterRole::Leader).unwrap().node;
    cluster.ok(&["meta", "voters", "replace", &leader.to_string(), "4"]);
    assert!(!voters(&cluster).contains(&leader.0));
    load.more(50);
    let up =
        |cluster: &TestCluster| cli::health::ClusterStatus::read(&mut cluster.admin()).unwrap().nodes_up();
    wait_until("four nodes", || up(&cluster) == 4);
    let index = leader.0 as usize - 1;
    // It takes part under its old command line, and can be taken back.
    cluster.fleet.stop(index).unwrap();
    cluster.fleet.spawn(index).unwrap();
    cluster.fleet.wait_ready(index).unwrap();
    assert!(!voters(&cluster).contains(&leader.0));
    cluster.wait_clean();
    cluster.ok(&["meta", "voters", "replace", "4", &leader.to_string()]);
    assert_eq!(voters(&cluster), [1, 2, 3]);
    load.more(50);
    load.finish(&cluster);
}

#[test]
fn a_cluster_grows_from_one_voter_to_three_and_back() {
    let mut cluster = TestCluster::prepared(1);
    for _ in 0..2 {
        let disk = cluster.fleet.next_dir().join("disk");
        cluster.fleet.add(free_ports(1).unwrap()[0], disk, false).unwrap();
    }
    cluster.fleet.start_all().unwrap();
    cluster.ok(&["meta", "put", "/notes/a", "1"]);
    cluster.ok(&["meta", "voters", "add", "2", "3"]);
    assert_eq!(voters(&cluster), [1, 2, 3]);
    cluster.fleet.kill(0).unwrap();
    cluster.ok(&["meta", "put", "/notes/a", "2"]);
    cluster.fleet.spawn(0).unwrap();
    cluster.fleet.wait_ready(0).unwrap();
    cluster.ok(&["meta", "voters", "rm", "1", "3"]);
    assert_eq!(voters(&cluster), [2]);
    cluster.fleet.kill(0).unwrap();
    cluster.fleet.kill(2).unwrap();
    cluster.ok(&["meta", "put", "/notes/a", "3"]);
}
