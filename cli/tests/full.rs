//! Slices that fill up: new data is refused in time, everything else goes on, and space that returns is used.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::{TestCluster, pattern, wait_until};
use drystone::{IoError, OnNoSpace, OpenMode, Options, blocking};
use serde_json::Value;
use std::sync::mpsc::channel;

const MIB: u64 = 1 << 20;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn problems(cluster: &TestCluster) -> String {
    json(&cluster.ok(&["status", "--json"]))["problems"].to_string()
}

/// Three copies on three nodes, images `a` and `b`, and thresholds that are soon reached.
fn small(a_mib: u64, b_mib: u64, thresholds: [&str; 3]) -> TestCluster {
    let cluster = TestCluster::start(3);
    for (name, value) in ["nearfull", "backfillfull", "full"].into_iter().zip(thresholds) {
        cluster.ok(&["set", name, value]);
    }
    cluster.ok(&["pool", "create", "p", "--copies", "3", "--pgs", "8"]);
    cluster.wait_clean();
    for (image, mib) in [("a", a_mib), ("b", b_mib)] {
        cluster.ok(&["image", "create", image, "--pool", "p", "--size", &format!("{mib}MiB")]);
    }
    cluster
}

fn write_mib(image: &blocking::Image, nth: u64) -> Result<(), blocking::Error> {
    image.write_at(nth * MIB, &pattern(nth + 1, MIB as usize))
}

#[test]
fn a_full_cluster_refuses_new_data_goes_on_with_the_old_and_recovers_when_an_image_is_removed() {
    // Far below what would really fill a slice: the nodes' word of it takes a second or two.
    let cluster = small(900, 64, ["20%", "25%", "0.3"]);
    let client = cluster.client();
    let a = client.open("a", OpenMode::ReadWrite).unwrap();
    let b = client.open("b", OpenMode::ReadWrite).unwrap();
    write_mib(&b, 0).unwrap();
    // How much more gets in before the nodes have told each other is a matter of speed, so their word is waited for.
    (0..200).for_each(|nth| write_mib(&a, nth).unwrap());
    let quickly = (200..400).take_while(|nth| write_mib(&a, *nth).is_ok()).count();
    println!("{} MiB before it was heard", 200 + quickly);
    wait_until("status to call it an error", || {
        let status = json(&cluster.ok(&["status", "--json"]));
        status["health"] == "error" && status["problems"].to_string().contains("reached 30%, full")
    });
    let refused = (400..900).find_map(|nth| write_mib(&a, nth).err());
    assert!(matches!(refused, Some(blocking::Error::Io(IoError::NoSpace))), "{refused:?}");
    // What has its place already: overwrites, zeroes, discards, reads.
    a.write_at(0, &pattern(77, MIB as usize)).unwrap();
    a.write_zeroes(MIB, MIB).unwrap();
    a.discard(2 * MIB, MIB).unwrap();
    let mut read = vec![0; MIB as usize];
    a.read_at(0, &mut read).unwrap();
    assert!(read == pattern(77, MIB as usize));
    a.flush().unwrap();

    // A client that would rather wait.
    let waits = Options { on_no_space: OnNoSpace::Wait, ..Options::default() };
    let patient = blocking::Cluster::connect(&cluster.fleet.controls(), waits).unwrap();
    let waiting = patient.open("b", OpenMode::ReadWrite).unwrap();
    std::thread::scope(|scope| {
        let (done, is_done) = channel();
        scope.spawn(move || {
            for nth in 1..64 {
                write_mib(&waiting, nth).unwrap();
            }
            done.send(()).unwrap();
        });
        // It has had every chance to go on: somebody who does not wait is refused again and again.
        for _ in 0..20 {
            assert!((1..64).any(|nth| write_mib(&b, nth).is_err()), "there is space");
        }
        assert!(is_done.try_recv().is_err(), "it did not wait");
        drop(a);
        cluster.ok(&["image", "rm", "a"]);
        is_done.recv_timeout(common::LIMIT).unwrap();
    });
    cluster.wait_clean();
    wait_until("status to be ok", || json(&cluster.ok(&["status", "--json"]))["health"] == "ok");
    for nth in 0..64 {
        b.read_at(nth * MIB, &mut read).unwrap();
        assert!(read == pattern(nth + 1, MIB as usize), "MiB {nth} of b");
    }
}

#[test]
fn recovery_onto_a_nearly_full_node_stops_is_reported_and_goes_on_when_there_is_space() {
    let mut cluster = small(256, 48, ["10%", "12%", "95%"]);
    let client = cluster.client();
    let a = client.open("a", OpenMode::ReadWrite).unwrap();
    let b = client.open("b", OpenMode::ReadWrite).unwrap();
    (0..256).for_each(|nth| write_mib(&a, nth).unwrap());
    cluster.fleet.kill(2).unwrap();
    (0..48).for_each(|nth| write_mib(&b, nth).unwrap());
    // The node has a place for these: they come back to it, full or not.
    (0..8).for_each(|nth| a.write_at(nth * MIB, &pattern(nth + 500, MIB as usize)).unwrap());
    cluster.fleet.spawn(2).unwrap();
    cluster.fleet.wait_ready(2).unwrap();
    wait_until("status to say that recovery waits for space", || {
        let said = problems(&cluster);
        said.contains("waits for space on slices that are too full") && said.contains("reached 12%, too full")
    });
    let states = json(&cluster.ok(&["status", "--json"]))["pgs"]["by_state"].to_string();
    assert!(states.contains("active+recovering+toofull"), "{states}");
    // Clients go on meanwhile; what they write to is recovered first.
    (0..8).for_each(|nth| write_mib(&b, nth).unwrap());
    drop(a);
    cluster.ok(&["image", "rm", "a"]);
    cluster.wait_clean();
    wait_until("nothing to be wrong", || problems(&cluster) == "[]");
    // Its copies are as good as the others'.
    cluster.fleet.kill(0).unwrap();
    let mut read = vec![0; MIB as usize];
    for nth in 0..48 {
        b.read_at(nth * MIB, &mut read).unwrap();
        assert!(read == pattern(nth + 1, MIB as usize), "MiB {nth} of b");
    }
}
