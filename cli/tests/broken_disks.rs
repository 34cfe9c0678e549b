//! Disks that break under running nodes: their slices go, their nodes and all clients go on.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::disk_rig::*;
use common::{DISK_BYTES, TestCluster};
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

const IMAGE_BYTES: u64 = 32 << 20;

/// Three nodes with two disks each; the second disk of node 2 is at `disk`. A client is at work.
fn cluster_with(second: impl Fn(usize, &TestCluster) -> PathBuf, flags: &[&str]) -> TestCluster {
    let mut cluster = TestCluster::prepared(3);
    for index in 0..3 {
        let path = second(index, &cluster);
        cluster.prepare_disk(&path);
        cluster.fleet.nodes[index].more_disks.push(path);
    }
    cluster.fleet.add_flags(flags);
    cluster.fleet.start_all().unwrap();
    cluster.make_image(IMAGE_BYTES);
    cluster
}

fn ordinary(index: usize, cluster: &TestCluster) -> PathBuf {
    cluster.fleet.nodes[index].dir.join("disk2")
}

/// The disk is named with its reason by `status`, `disk ls` and the metrics page; every copy is made anew
/// elsewhere; the node lives and stops in order.
fn goes_out(mut cluster: TestCluster, load: Load, disk: &Path, reason: &str) -> TestCluster {
    let path = disk.to_str().unwrap();
    let status = wait_for_problem(&cluster, &[path, "node 2", "slices have failed", reason]);
    assert_eq!(status.nodes_up(), 3, "the node lives");
    load.more(200);
    wait_clean_elsewhere(&cluster, disk);
    load.more(200);
    load.finish(&cluster);
    let page = cluster.metrics(1);
    let named = |line: &str| {
        line.starts_with("drystone_slice_failed{") && line.contains(path) && line.contains(reason)
    };
    assert!(page.lines().any(named), "{page}");
    let listed = cluster.ok(&["disk", "ls"]);
    assert!(
        listed.lines().any(|l| l.contains(path) && l.contains("FAILED") && l.contains(reason)),
        "{listed}"
    );
    cluster.fleet.stop(1).unwrap();
    cluster
}

/// Times that a disk is cut short until it is given up: each costs it some twenty read errors, and fifty are too many.
const CUTS_MAX: usize = 20;

#[test]
fn a_disk_that_is_cut_short_goes_out_and_its_node_serves_from_the_other() {
    let cluster = cluster_with(ordinary, &[]);
    let load = Load::start(&cluster);
    load.more(300);
    let disk = cluster.fleet.nodes[1].more_disks[0].clone();
    // A file grows again when something is written behind its end: only who reads notices, and clients read from
    // primaries. What of it is noticed first, a read behind the end or blocks that read as zeroes, is chance; and zeroes
    // are mended, so that it takes some of them until the disk is given up: it is cut until it is.
    for _ in 0..CUTS_MAX {
        OpenOptions::new().write(true).open(&disk).unwrap().set_len(1 << 20).unwrap();
        cluster.command(&["pg", "scrub", "--deep", "--pool", "p"]).output().unwrap();
        if cluster.ok(&["status"]).contains("slices have failed") {
            break;
        }
        load.more(100);
    }
    goes_out(cluster, load, &disk, "");
}

#[test]
fn a_disk_that_vanishes_goes_out_and_its_node_serves_from_the_other() {
    if !may_mount() {
        return;
    }
    let dir = common::temp_dir();
    let device = Loop::new(&dir.path().join("backing"), DISK_BYTES);
    let cluster =
        cluster_with(|index, c| if index == 1 { device.device.clone() } else { ordinary(index, c) }, &[]);
    let load = Load::start(&cluster);
    load.more(300);
    device.shrink(1 << 20);
    // Likewise: a write behind the end of a device finds no space, a read finds nothing.
    goes_out(cluster, load, &device.device, "");
}

#[test]
fn an_idle_disk_that_is_cut_short_is_noticed_although_nobody_uses_it() {
    let cluster = cluster_with(ordinary, &["--disk-probe", "1"]);
    let disk = cluster.fleet.nodes[1].more_disks[0].clone();
    OpenOptions::new().write(true).open(&disk).unwrap().set_len(1 << 20).unwrap();
    let path = disk.to_str().unwrap();
    let status = wait_for_problem(&cluster, &[path, "node 2", "slices have failed"]);
    assert_eq!(status.nodes_up(), 3, "the node lives");
    wait_clean_elsewhere(&cluster, &disk);
}

#[test]
fn a_disk_whose_file_system_is_full_goes_out_and_its_node_serves_from_the_other() {
    if !may_mount() {
        return;
    }
    let dir = common::temp_dir();
    // Far less than the disk claims to have, and less than the client will write.
    let small = Mount::tmpfs(&dir.path().join("small"), 4 << 20);
    let cluster =
        cluster_with(|index, c| if index == 1 { small.at.join("disk2") } else { ordinary(index, c) }, &[]);
    let load = Load::start(&cluster);
    goes_out(cluster, load, &small.at.join("disk2"), "no space left on the device");
}

#[test]
fn a_disk_that_hangs_goes_out_and_its_node_serves_from_the_other_and_stops_in_order() {
    if !may_mount() {
        return;
    }
    let dir = common::temp_dir();
    let mut under = Mount::ext4(&dir.path().join("mnt"), &dir.path().join("ext4"), 256 << 20);
    let device = Loop::new(&under.at.join("backing"), DISK_BYTES);
    let cluster = cluster_with(
        |index, c| if index == 1 { device.device.clone() } else { ordinary(index, c) },
        &["--disk-timeout", "2"],
    );
    let load = Load::start(&cluster);
    load.more(300);
    under.freeze();
    let cluster = goes_out(cluster, load, &device.device, "hangs");
    under.thaw();
    drop(cluster);
}

#[test]
fn a_node_starts_without_the_disk_that_is_no_longer_its_own_and_says_so() {
    let mut cluster = cluster_with(ordinary, &[]);
    let load = Load::start(&cluster);
    load.more(100);
    cluster.fleet.stop(1).unwrap();
    // Somebody has put a disk of another cluster into the slot.
    let disk = cluster.fleet.nodes[1].more_disks[0].clone();
    let other = "00000000000000000000000000000abc";
    let path = disk.to_str().unwrap();
    cluster.ok(&["disk", "prepare", path, "--force", "--slices", "2", "--cluster-id", other]);
    cluster.fleet.spawn(1).unwrap();
    cluster.fleet.wait_ready(1).unwrap();
    wait_for_problem(&cluster, &["node 2", "belongs to cluster 00000000000000000000000000000abc"]);
    goes_out(cluster, load, &disk, "is not there");
}
