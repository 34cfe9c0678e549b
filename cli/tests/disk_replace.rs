//! `disk replace` and `disk retire`, and disks that come back when they should not.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use cli::children::free_ports;
use common::disk_rig::*;
use common::{DISK_BYTES, TestCluster, failure, wait_until};
use std::path::Path;
use std::process::Command;

const IMAGE_BYTES: u64 = 32 << 20;

/// Three nodes with one disk each, an image of three copies on them.
fn cluster() -> TestCluster {
    let cluster = TestCluster::start(3);
    cluster.make_image(IMAGE_BYTES);
    cluster
}

/// What a node says that must not start.
fn refused(cluster: &mut TestCluster, index: usize) -> String {
    let (code, said) = cluster.fleet.run_expecting_failure(index).unwrap();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("error: ") && !said.contains("panicked"), "{said}");
    said
}

/// Starts a node none of whose disks may serve, and stops it when it has said this.
fn lives_without_its_disk(cluster: &mut TestCluster, index: usize, why: &str) {
    cluster.fleet.spawn(index).unwrap();
    cluster.fleet.wait_ready(index).unwrap();
    wait_until("the disk to be named", || cluster.metrics(index).contains(why));
    cluster.fleet.stop(index).unwrap();
}

fn identity(cluster: &TestCluster, disk: &Path) -> String {
    let info = cluster.ok(&["disk", "info", disk.to_str().unwrap(), "--json"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info[0]["disk"].as_str().unwrap().to_owned()
}

#[test]
fn a_failed_disk_is_replaced_while_the_cluster_serves_and_the_old_one_is_refused() {
    let mut cluster = cluster();
    let load = Load::start(&cluster);
    load.more(200);
    let old = cluster.fleet.nodes[1].disk.clone();
    let old_text = old.to_str().unwrap().to_owned();
    let id = identity(&cluster, &old);
    let config = cluster.dir.path().join("node2.toml");
    std::fs::write(&config, format!("[node]\nid = 2\ndisks = [\"{old_text}\"]\n")).unwrap();
    let new = cluster.dir.path().join("new");
    let new_text = new.to_str().unwrap().to_owned();
    let create = DISK_BYTES.to_string();
    let config_text = config.to_str().unwrap().to_owned();
    let replace =
        ["disk", "replace", &id, &new_text, "--create", &create, "--config", &config_text].map(String::from);
    let args: Vec<&str> = replace.iter().map(String::as_str).collect();
    assert!(cluster.fails(&args).contains("it serves; --force"), "a good disk is not replaced by mistake");

    let whole = cluster.dir.path().join("kept");
    std::fs::copy(&old, &whole).unwrap();
    std::fs::OpenOptions::new().write(true).open(&old).unwrap().set_len(1 << 20).unwrap();
    wait_for_problem(&cluster, &[&old_text, &id, "slices have failed"]);
    load.more(200);
    let pid = cluster.fleet.pid(1).unwrap();
    let said = cluster.ok(&args);
    assert!(said.contains("is retired") && said.contains("is being filled"), "{said}");
    assert!(std::fs::read_to_string(&config).unwrap().contains(&format!("disks = [\"{new_text}\"]")));
    assert!(!cluster.ok(&["disk", "ls"]).contains(&id), "it is off the map");
    load.more(200);
    let status = cluster.wait_clean();
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert!(holds_pgs(&cluster, &new), "nothing is on the new disk");
    load.more(200);
    assert_eq!(cluster.fleet.pid(1), Some(pid), "the same process serves");
    cluster.fleet.stop(1).unwrap();
    cluster.fleet.nodes[1].disk.clone_from(&new);
    cluster.fleet.spawn(1).unwrap();
    cluster.fleet.wait_ready(1).unwrap();
    let status = cluster.wait_clean();
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    load.more(200);

    // The old disk comes back, mended and in sync once.
    cluster.fleet.stop(1).unwrap();
    std::fs::copy(&whole, &old).unwrap();
    cluster.fleet.nodes[1].disk = old;
    lives_without_its_disk(&mut cluster, 1, &format!("disk {id} has been retired"));
    // Beside the good one it is left out, and said to be.
    cluster.fleet.nodes[1].more_disks = vec![cluster.fleet.nodes[1].disk.clone()];
    cluster.fleet.nodes[1].disk = new;
    cluster.fleet.spawn(1).unwrap();
    cluster.fleet.wait_ready(1).unwrap();
    cluster.wait_clean();
    assert!(!cluster.ok(&["disk", "ls"]).contains(&id));
    assert!(cluster.metrics(1).contains("has been retired"));
    load.finish(&cluster);
}

#[test]
fn a_good_disk_can_be_retired_by_force_but_never_the_only_copy() {
    let cluster = cluster();
    let load = Load::start(&cluster);
    load.more(100);
    let disk = cluster.fleet.nodes[0].disk.clone();
    let path = disk.to_str().unwrap().to_owned();
    cluster.ok(&["pool", "create", "alone", "--copies", "1", "--pgs", "16"]);
    cluster.wait_clean();
    assert!(cluster.fails(&["disk", "retire", &path]).contains("it serves; --force"));
    assert!(cluster.fails(&["disk", "retire", &path, "--force"]).contains("no other complete copy"));
    cluster.ok(&["pool", "rm", "alone"]);
    let total = || cli::health::ClusterStatus::read(&mut cluster.admin()).unwrap().pgs.total;
    wait_until("the pool to be gone", || total() == 8);
    let id = identity(&cluster, &disk);
    assert!(cluster.fails(&["disk", "retire", "nowhere"]).contains("no disk named 'nowhere'"));
    assert!(cluster.ok(&["disk", "retire", &path, "--force"]).contains("is retired"));
    assert!(!cluster.ok(&["disk", "ls"]).contains(&id));
    load.more(100);
    load.finish(&cluster);
}

/// A cluster whose third node has been stopped in order, with the copy of its disk that `copy` made, and
/// what has been written since.
fn with_copy(copy_running: bool) -> (TestCluster, Load, std::path::PathBuf) {
    let mut cluster = cluster();
    let load = Load::start(&cluster);
    load.more(100);
    let disk = cluster.fleet.nodes[2].disk.clone();
    let copy = cluster.dir.path().join("copy");
    if copy_running {
        std::fs::copy(&disk, &copy).unwrap();
        load.more(500);
        cluster.fleet.stop(2).unwrap();
    } else {
        cluster.fleet.stop(2).unwrap();
        std::fs::copy(&disk, &copy).unwrap();
        cluster.fleet.spawn(2).unwrap();
        cluster.fleet.wait_ready(2).unwrap();
        load.more(100);
        cluster.fleet.kill(2).unwrap();
    }
    (cluster, load, copy)
}

#[test]
fn an_older_copy_of_a_disk_is_refused_and_the_disk_itself_is_not() {
    for copy_running in [false, true] {
        let (mut cluster, load, copy) = with_copy(copy_running);
        let disk = cluster.fleet.nodes[2].disk.clone();
        cluster.fleet.nodes[2].disk = copy;
        lives_without_its_disk(&mut cluster, 2, "is an older copy of itself");
        load.more(100);
        cluster.fleet.nodes[2].disk = disk;
        cluster.fleet.spawn(2).unwrap();
        cluster.fleet.wait_ready(2).unwrap();
        cluster.wait_clean();
        load.finish(&cluster);
    }
}

/// The command line of a node that somebody starts beside the fleet.
fn stranger(cluster: &TestCluster, dir: &Path, id: u64, host: &str, disk: &Path) -> Command {
    let mut node = Command::new(common::binary());
    node.args(["node", "--cluster-id", &cluster.fleet.cluster.to_string(), "--id", &id.to_string()])
        .args([
            "--host",
            host,
            "--die-with-parent",
            "--http",
            "127.0.0.1:0",
            "--cores",
            "1",
            "--cpus",
            "none",
        ])
        .args(["--control", &free_ports(1).unwrap()[0].to_string()])
        .args(["--voter", &format!("1@{}", cluster.fleet.nodes[0].control)])
        .arg("--data-dir")
        .arg(dir)
        .arg("--disk")
        .arg(disk);
    node
}

#[test]
fn a_copied_disk_started_beside_its_original_is_refused_and_the_original_goes_on() {
    let mut cluster = TestCluster::prepared(3);
    // A fourth node, not a voter, with the disk that will be copied.
    let disk = cluster.dir.path().join("fourth");
    cluster.prepare_disk(&disk);
    cluster.fleet.start_all().unwrap();
    let log = log_file(&cluster.dir.path().join("fourth.log"));
    let mut original = stranger(&cluster, &cluster.dir.path().join("data4"), 4, "host4", &disk);
    let child = original.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(log);
    let mut child = Ended(child.spawn().unwrap());
    cluster.make_image(IMAGE_BYTES);
    let up =
        |cluster: &TestCluster| cli::health::ClusterStatus::read(&mut cluster.admin()).unwrap().nodes_up();
    wait_until("four nodes", || up(&cluster) == 4);
    let load = Load::start(&cluster);
    load.more(100);
    let copy = cluster.dir.path().join("copy");
    std::fs::copy(&disk, &copy).unwrap();
    for host in ["host4", "elsewhere"] {
        let said = failure(stranger(&cluster, &cluster.dir.path().join(host), 4, host, &copy));
        assert!(said.contains("already running on host host4"), "{said}");
    }
    load.more(100);
    assert_eq!(up(&cluster), 4, "the original goes on");
    load.finish(&cluster);
    child.0.kill().unwrap();
    child.0.wait().unwrap();
}

/// A child that does not outlive its test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn one_prepared_disk_copied_for_two_nodes_serves_the_first_only() {
    let cluster = TestCluster::start(3);
    // Prepared once, and copied before any node claimed it.
    let (first, second) = (cluster.dir.path().join("first"), cluster.dir.path().join("second"));
    cluster.prepare_disk(&first);
    std::fs::copy(&first, &second).unwrap();
    let data = |id: u64| cluster.dir.path().join(format!("data{id}"));
    let mut fourth = stranger(&cluster, &data(4), 4, "host4", &first);
    let quiet = fourth.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    let _fourth = Ended(quiet.stderr(std::process::Stdio::null()).spawn().unwrap());
    let up = || cli::health::ClusterStatus::read(&mut cluster.admin()).unwrap().nodes_up();
    wait_until("four nodes", || up() == 4);
    let said = failure(stranger(&cluster, &data(5), 5, "host5", &second));
    assert!(said.contains("belongs to node 4: it must not be used by two nodes"), "{said}");
    assert_eq!(up(), 4);
}

#[test]
fn the_same_disk_twice_in_one_node_is_refused() {
    let mut cluster = TestCluster::prepared(1);
    let disk = cluster.fleet.nodes[0].disk.clone();
    let copy = cluster.dir.path().join("copy");
    std::fs::copy(&disk, &copy).unwrap();
    cluster.fleet.nodes[0].more_disks.push(copy);
    assert!(refused(&mut cluster, 0).contains("one of the two is a copy"));
}

/// Whether placement groups have complete copies on every slice of a disk.
fn holds_pgs(cluster: &TestCluster, disk: &Path) -> bool {
    let mut admin = cluster.admin();
    let nodes: Vec<placement::Node> = admin.list(placement::key::NODES).unwrap();
    let records: Vec<placement::PgRecord> = admin.list(placement::key::PGS).unwrap();
    let disks = nodes.iter().flat_map(|node| &node.disks);
    let mut slices = disks.filter(|one| Path::new(&one.path) == disk).flat_map(|one| &one.slices).peekable();
    let held = |slice: &placement::Slice| records.iter().any(|record| record.in_sync.contains(&slice.id));
    slices.peek().is_some() && slices.all(held)
}

#[test]
fn a_running_node_takes_a_further_disk_and_fills_it_and_has_it_after_a_restart() {
    let mut cluster = cluster();
    let load = Load::start(&cluster);
    load.more(100);
    let pid = cluster.fleet.pid(1).unwrap();
    let new = cluster.dir.path().join("further");
    let (text, create) = (new.to_str().unwrap().to_owned(), DISK_BYTES.to_string());
    let add = ["disk", "add", &text, "--create", &create, "--slices", "2", "--node", "2"];
    let said = cluster.ok(&add);
    assert!(
        said.contains("is being filled") && said.contains(&format!("Add \"{text}\" to node.disks")),
        "{said}"
    );
    assert!(cluster.fails(&add).contains("has disk"), "the same disk again");
    wait_until("the new disk to be filled", || holds_pgs(&cluster, &new));
    cluster.wait_clean();
    load.more(100);
    assert_eq!(cluster.fleet.pid(1), Some(pid), "the same process serves");
    assert!(cluster.metrics(1).contains("drystone_slice_open"));

    // Without it in the configuration the node says what it misses, and takes it back.
    let old = cluster.dir.path().join("older");
    let old_text = old.to_str().unwrap().to_owned();
    cluster.fleet.stop(1).unwrap();
    std::fs::copy(&new, &old).unwrap();
    for (path, refused) in [(&text, None), (&old_text, Some("is an older copy of itself"))] {
        cluster.fleet.spawn(1).unwrap();
        cluster.fleet.wait_ready(1).unwrap();
        wait_for_problem(&cluster, &[&text, "is not there"]);
        match refused {
            Some(why) => assert!(cluster.fails(&["disk", "add", path, "--node", "2"]).contains(why)),
            None => assert!(cluster.ok(&["disk", "add", path, "--node", "2"]).contains("is being filled")),
        }
        load.more(100);
        cluster.wait_clean();
        cluster.fleet.stop(1).unwrap();
    }
    // With it in the configuration all is well.
    cluster.fleet.nodes[1].more_disks.push(new.clone());
    cluster.fleet.spawn(1).unwrap();
    cluster.fleet.wait_ready(1).unwrap();
    let status = cluster.wait_clean();
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert!(holds_pgs(&cluster, &new));
    load.finish(&cluster);
}

#[test]
fn disks_that_a_running_node_must_not_take_are_refused_with_the_reason() {
    let cluster = cluster();
    let at = |name: &str| cluster.dir.path().join(name).to_str().unwrap().to_owned();
    let add = |path: &str, node: &str| cluster.fails(&["disk", "add", path, "--node", node]);
    let create = DISK_BYTES.to_string();
    // A copy of a disk that this node, or another one, has.
    let own = cluster.fleet.nodes[1].disk.clone();
    std::fs::copy(&own, at("copy")).unwrap();
    assert!(add(&at("copy"), "2").contains("or a copy of it"));
    assert!(add(&at("copy"), "3").contains("belongs to node 2"));
    assert!(add(own.to_str().unwrap(), "2").contains("node 2 has disk"));
    // Of another cluster.
    let other = ["--create", &create, "--cluster-id", "00000000000000000000000000000abc"];
    cluster.ok(&[&["disk", "prepare", &at("other")], &other[..]].concat());
    assert!(add(&at("other"), "2").contains("belongs to cluster 00000000000000000000000000000abc"));
    // Retired: the node asks the metadata, whatever the disk says. And one that nobody finds.
    cluster.prepare_disk(Path::new(&at("once")));
    std::fs::copy(at("once"), at("again")).unwrap();
    cluster.ok(&["disk", "add", &at("once"), "--node", "2"]);
    cluster.wait_clean();
    cluster.ok(&["disk", "retire", &at("once"), "--force"]);
    assert!(add(&at("again"), "2").contains("has been retired"), "a copy of a retired disk");
    assert!(add(&at("again"), "3").contains("has been retired"), "on another node, too");
    assert!(add(&at("nowhere"), "2").contains("does not exist"));
    assert!(add(&at("again"), "9").contains("node 9 is not up"));
    let wishes = cluster.admin().range(placement::key::NEW_DISKS).unwrap();
    assert!(wishes.is_empty(), "{wishes:?}");
    cluster.wait_clean();
}
