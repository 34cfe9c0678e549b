//! Ways in which other storage systems have failed their users, tried on this one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use cli::scrape::scrape;
use common::clients::{Clients, verify};
use common::{LIMIT, TestCluster, failure, pattern, wait_until};
use drystone::OpenMode;
use serde_json::Value;
use std::process::Stdio;

const IMAGE_BYTES: u64 = 32 << 20;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Names that some program has taken for something else: a number, a property, a missing value, an option.
fn odd_names() -> Vec<String> {
    let names =
        ["04e278988710", "__proto__", "null", "1e5", "true", "höst ß 日本 🦀", "constructor", "..", "%s%n"];
    names.into_iter().map(str::to_owned).chain([format!("x{}", "é".repeat(127))]).collect()
}

#[test]
fn host_names_that_look_like_numbers_or_nothing_are_only_names() {
    let names = odd_names();
    for three in names.chunks_exact(3) {
        let mut cluster = TestCluster::prepared(3);
        for (node, name) in cluster.fleet.nodes.iter_mut().zip(three) {
            node.host.clone_from(name);
        }
        cluster.fleet.start_all().unwrap();
        cluster.ok(&["pool", "create", "p", "--copies", "3", "--pgs", "8"]);
        cluster.wait_clean();
        let listed = json(&cluster.ok(&["node", "ls", "--json"]));
        let hosts: Vec<&str> =
            listed.as_array().unwrap().iter().map(|node| node["host"].as_str().unwrap()).collect();
        assert_eq!(hosts, three);
        cluster.ok(&["node", "drain", "1", "--primaries-only", "--wait", &LIMIT.as_secs().to_string()]);
        let status = cluster.ok(&["status"]);
        assert!(status.contains(&format!("node 1 ({}) is drained", three[0])), "{status}");
    }
}

#[test]
fn pool_and_image_names_that_look_like_numbers_or_nothing_are_only_names() {
    let cluster = TestCluster::start(1);
    let names = odd_names();
    for name in &names {
        cluster.ok(&["pool", "create", name, "--copies", "1", "--pgs", "1"]);
        cluster.ok(&["image", "create", name, "--pool", name, "--size", "1MiB"]);
    }
    let client = cluster.client();
    for (nth, name) in (0..).zip(&names) {
        let image = client.open(name, OpenMode::ReadWrite).unwrap();
        image.write_at(0, &pattern(nth, 4096)).unwrap();
    }
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    for kind in ["pool", "image"] {
        let listed = json(&cluster.ok(&[kind, "ls", "--json"]));
        let listed =
            listed.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect();
        assert_eq!(sorted(listed), sorted(names.clone()));
    }
    for (nth, name) in (0..).zip(&names) {
        let exported = cluster.command(&["image", "export", name, "-"]).output().unwrap();
        assert!(exported.stdout[..4096] == pattern(nth, 4096), "{name}");
        cluster.ok(&["image", "resize", name, "--size", "2MiB"]);
        assert_eq!(json(&cluster.ok(&["image", "info", name, "--json"]))["size_bytes"], 2 << 20);
        cluster.ok(&["pool", "set", name, "--light-scrub", "5"]);
        cluster.ok(&["image", "rm", name]);
        cluster.ok(&["pool", "rm", name]);
    }
    wait_until("all to be gone", || json(&cluster.ok(&["pool", "ls", "--json"])) == Value::Array(vec![]));
    let left = cluster.ok(&["meta", "get", "/", "--json"]);
    assert!(!left.contains("-names/"), "{left}");
    for bad in ["", " x", "a/b", "a@b", "a\nb", &"x".repeat(481)] {
        let said = cluster.fails(&["pool", "create", "--", bad]);
        assert!(said.contains("is no valid name"), "{said}");
    }
}

#[test]
fn a_removed_image_leaves_nothing_in_the_statistics() {
    let cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let status = || json(&cluster.ok(&["status", "--json"]));
    let used = |status: &Value| -> u64 {
        status["nodes"].as_array().unwrap().iter().map(|node| node["used_bytes"].as_u64().unwrap()).sum()
    };
    let slice_objects = || -> u64 {
        let stats = json(&cluster.ok(&["meta", "get", "/stats/", "--json"]));
        let slices = |node: &Value| -> Vec<u64> {
            let slices = node["value"]["slices"].as_object().unwrap();
            slices.values().map(|slice| slice["objects"].as_u64().unwrap()).collect()
        };
        stats.as_array().unwrap().iter().flat_map(slices).sum()
    };
    for _ in 0..2 {
        let before = used(&status());
        let image = cluster.client().open("i", OpenMode::ReadWrite).unwrap();
        image.write_at(0, &pattern(1, IMAGE_BYTES as usize)).unwrap();
        let objects = IMAGE_BYTES >> 17;
        wait_until("what was written to be counted", || {
            let now = status();
            now["pgs"]["objects"] == objects
                && used(&now) >= before + 3 * IMAGE_BYTES
                && slice_objects() == 3 * objects
        });
        drop(image);
        cluster.ok(&["image", "rm", "i"]);
        wait_until("what was removed to be counted no more", || {
            let now = status();
            now["pgs"]["objects"] == 0 && slice_objects() == 0 && used(&now) < before + IMAGE_BYTES / 2
        });
        assert_eq!(status()["images"], 0);
        cluster.ok(&["image", "create", "i", "--pool", "p", "--size", &IMAGE_BYTES.to_string()]);
    }
}

/// The node that directs the cluster.
fn director(cluster: &TestCluster) -> Option<usize> {
    let leads = |node: &cli::children::FleetNode| {
        let page = node.addresses.as_ref().and_then(|at| scrape(at.http).ok()).unwrap_or_default();
        page.lines().any(|line| line == "drystone_raft_leader 1")
    };
    cluster.fleet.nodes.iter().position(leads)
}

#[test]
fn a_director_that_is_killed_in_the_middle_of_a_change_leaves_nothing_paused() {
    let mut cluster = TestCluster::start(5);
    cluster.ok(&["pool", "create", "p", "--copies", "3", "--pgs", "32"]);
    cluster.wait_clean();
    cluster.ok(&["image", "create", "i", "--pool", "p", "--size", &IMAGE_BYTES.to_string()]);
    let clients = Clients::start(&cluster.fleet.controls(), 2, IMAGE_BYTES);
    clients.more(200);
    let changes: [&[&str]; 4] = [
        &["node", "drain", "5"],
        &["pool", "set", "p", "--copies", "2", "--min-copies", "1"],
        &["node", "undrain", "5"],
        &["pool", "set", "p", "--copies", "3"],
    ];
    for change in changes {
        let mut victim = None;
        wait_until("a director", || {
            victim = director(&cluster);
            victim.is_some()
        });
        let victim = victim.unwrap();
        cluster.ok(change);
        cluster.fleet.kill(victim).unwrap();
        clients.more(200);
        cluster.fleet.spawn(victim).unwrap();
        cluster.fleet.wait_ready(victim).unwrap();
        cluster.wait_clean();
    }
    wait_until("every record to be as its pool wants it", || {
        let records = json(&cluster.ok(&["meta", "get", "/pg/", "--json"]));
        let whole = |record: &Value| {
            let (record, len) = (&record["value"], |list: &Value| list.as_array().unwrap().len());
            !record["primary"].is_null() && len(&record["acting"]) == 3 && len(&record["in_sync"]) == 3
        };
        records.as_array().unwrap().len() == 32 && records.as_array().unwrap().iter().all(whole)
    });
    verify(&cluster, &clients.finish());
}

#[test]
fn requests_that_come_before_the_cluster_does_fail_with_the_reason_or_wait_for_it() {
    let mut cluster = TestCluster::prepared(3);
    // Nobody at all.
    assert!(failure(cluster.command(&["status"])).contains("is a node running there"));
    // One of three: it answers, and cannot decide anything.
    cluster.fleet.spawn(0).unwrap();
    let said = failure(cluster.command(&["pool", "create", "p", "--copies", "3"]));
    assert!(said.contains("hint: "), "{said}");
    let patient = drystone::Options { admin_timeout_ms: LIMIT.as_millis() as u64, ..Default::default() };
    let early = drystone::blocking::Cluster::connect(&cluster.fleet.controls(), patient).unwrap();
    let mut wait = cluster.command(&["meta", "watch", "/pools/", "--json"]);
    let mut watcher = wait.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::scope(|scope| {
        let range =
            wire::control::MetaRequest::Range { prefix: placement::key::CLUSTER.to_owned(), limit: 1 };
        let asked = scope.spawn(|| early.meta(range).unwrap());
        for node in [1, 2] {
            cluster.fleet.spawn(node).unwrap();
        }
        for node in 0..3 {
            cluster.fleet.wait_ready(node).unwrap();
        }
        let reply = asked.join().unwrap();
        assert!(matches!(reply, wire::control::MetaReply::Range { .. }), "{reply:?}");
    });
    // A cluster without pools is a cluster.
    assert_eq!(json(&cluster.ok(&["status", "--json"]))["health"], "ok");
    assert_eq!(json(&cluster.ok(&["pg", "ls", "--json"])), Value::Array(vec![]));
    assert!(cluster.fails(&["image", "create", "i", "--pool", "p", "--size", "1MiB"]).contains("no pool"));
    cluster.ok(&["pool", "create", "p", "--copies", "3", "--pgs", "8"]);
    cluster.wait_clean();
    assert!(watcher.try_wait().unwrap().is_none(), "the watch gave up");
    watcher.kill().unwrap();
    watcher.wait().unwrap();
}
