//! What an administrator sets for the cluster or changes about a pool, and what follows from it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::clients::{Clients, verify};
use common::{TestCluster, pattern, wait_until};
use drystone::OpenMode;
use serde_json::Value;

const IMAGE_BYTES: u64 = 32 << 20;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn status(cluster: &TestCluster) -> Value {
    json(&cluster.ok(&["status", "--json"]))
}

#[test]
fn norecover_leaves_a_returned_node_without_what_it_missed_until_it_is_unset() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let image = cluster.client().open("i", OpenMode::ReadWrite).unwrap();
    assert!(cluster.ok(&["set"]).contains("norecover     off"), "{}", cluster.ok(&["set"]));
    cluster.ok(&["set", "norecover"]);
    cluster.fleet.kill(1).unwrap();
    let data = pattern(1, IMAGE_BYTES as usize);
    image.write_at(0, &data).unwrap();
    cluster.fleet.spawn(1).unwrap();
    cluster.fleet.wait_ready(1).unwrap();
    // Writes go on without the copy that is not up to date.
    let objects = IMAGE_BYTES >> 17;
    wait_until("all of it to be missing", || status(&cluster)["pgs"]["missing"] == objects);
    let newer = pattern(2, 1 << 20);
    image.write_at(0, &newer).unwrap();
    let now = status(&cluster);
    assert_eq!(now["pgs"]["missing"], objects, "{now}");
    assert!(now["problems"].to_string().contains("norecover is set"), "{now}");
    assert_eq!(json(&cluster.ok(&["meta", "get", "/settings", "--json"]))[0]["value"]["norecover"], true);
    cluster.ok(&["unset", "norecover"]);
    cluster.wait_clean();
    wait_until("health to be ok", || status(&cluster)["health"] == "ok");
    // The returned node has it now: it serves alone beside one other.
    cluster.fleet.kill(0).unwrap();
    let mut found = vec![0; newer.len()];
    image.read_at(0, &mut found).unwrap();
    assert!(found == newer, "an older copy was read");
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let cluster = TestCluster::start(1);
    assert!(cluster.fails(&["set", "nearfull", "96%"]).contains("nearfull <= backfillfull <= full"));
    assert!(cluster.fails(&["set", "norecover", "50%"]).contains("a flag has no value"));
    assert!(cluster.fails(&["set", "full"]).contains("a threshold needs a value"));
    for args in [&["set", "nonsense"][..], &["set", "full", "2"], &["unset"]] {
        assert_eq!(cluster.command(args).output().unwrap().status.code(), Some(2), "{args:?}");
    }
    assert_eq!(cluster.ok(&["set", "full", "0.97"]), "full is 97%\n");
    assert_eq!(cluster.ok(&["unset", "full"]), "full is 95%\n");
}

#[test]
fn a_pool_gets_more_copies_and_fewer_while_clients_work() {
    let cluster = TestCluster::start(3);
    cluster.ok(&["pool", "create", "p", "--copies", "2", "--pgs", "8"]);
    cluster.wait_clean();
    cluster.ok(&["image", "create", "i", "--pool", "p", "--size", &IMAGE_BYTES.to_string()]);
    let clients = Clients::start(&cluster.fleet.controls(), 2, IMAGE_BYTES);
    clients.more(200);
    for copies in [3, 1, 2] {
        let quiet = clients.slowest();
        cluster.ok(&["pool", "set", "p", "--copies", &copies.to_string()]);
        wait_until("all records to have so many copies", || {
            let records = json(&cluster.ok(&["meta", "get", "/pg/", "--json"]));
            let fits = |record: &Value| {
                ["target", "acting", "in_sync"]
                    .iter()
                    .all(|list| record["value"][list].as_array().unwrap().len() == copies)
            };
            records.as_array().unwrap().iter().all(fits)
        });
        clients.more(200);
        println!("{copies} copies: the longest operation took {:?}, before {quiet:?}", clients.slowest());
        cluster.wait_clean();
    }
    verify(&cluster, &clients.finish());
    // The minimum followed the copies down and stays where it is on the way up.
    let pool = json(&cluster.ok(&["pool", "ls", "--json"]))[0].clone();
    assert_eq!((&pool["copies"], &pool["min_copies"]), (&2.into(), &1.into()));

    assert!(
        cluster.fails(&["pool", "set", "p", "--copies", "4"]).contains("4 copies need 4 different hosts")
    );
    assert!(
        cluster.fails(&["pool", "set", "p", "--min-copies", "3"]).contains("from 1 to the number of copies")
    );
    assert!(cluster.fails(&["pool", "set", "q", "--copies", "2"]).contains("there is no pool \"q\""));
    assert_eq!(cluster.command(&["pool", "set", "p"]).output().unwrap().status.code(), Some(2));
    cluster.ok(&["pool", "create", "other", "--copies", "1"]);
    assert!(cluster.fails(&["pool", "set", "p", "--name", "other"]).contains("exists already"));
    cluster.ok(&["pool", "set", "p", "--name", "fast"]);
    cluster.ok(&["image", "create", "j", "--pool", "fast", "--size", "1MiB"]);
    assert!(cluster.fails(&["pool", "set", "p", "--copies", "3"]).contains("there is no pool \"p\""));
}

#[test]
fn scrubs_follow_their_pool_s_new_plan_and_noscrub_stops_those_by_schedule() {
    let cluster = TestCluster::start(3);
    let plan = ["--light-scrub", "0", "--deep-scrub", "0"];
    cluster.ok(&[&["pool", "create", "p", "--copies", "3", "--pgs", "8"][..], &plan].concat());
    cluster.wait_clean();
    let records = || json(&cluster.ok(&["meta", "get", "/scrub/", "--json"])).as_array().unwrap().clone();
    wait_until("new groups to be known", || records().len() == 8);
    cluster.ok(&["set", "noscrub"]);
    // The last time was long ago.
    for record in records() {
        cluster.ok(&["meta", "put", record["key"].as_str().unwrap(), r#"{"light_ms":1,"deep_ms":1}"#]);
    }
    let scrubbed =
        || records().iter().filter(|record| record["value"]["light_ms"].as_u64().unwrap() > 1).count();
    assert_eq!(scrubbed(), 0);
    cluster.ok(&["pool", "set", "p", "--light-scrub", "24"]);
    // Whoever asks for one gets it; the others, long due, would have come before it.
    cluster.ok(&["pg", "scrub", "1.7"]);
    assert_eq!(scrubbed(), 1);
    cluster.ok(&["unset", "noscrub"]);
    wait_until("all to be scrubbed", || scrubbed() == 8);
    assert!(cluster.ok(&["pool", "ls"]).contains("every 24 h   never"), "{}", cluster.ok(&["pool", "ls"]));
}
