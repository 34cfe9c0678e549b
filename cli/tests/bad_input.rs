//! What must not be believed: strangers on every port, foreign and damaged disks, nodes that join twice.
//! Each time: a clear error, no panic, nothing lost, and the others go on.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use cli::children::free_ports;
use common::{TestCluster, failure, pattern, temp_dir, wait_until};
use drystone::OpenMode;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use wire::{BlockCrcs, FrameKind, Header};

/// Every address that the nodes listen on.
fn listeners(cluster: &TestCluster) -> Vec<SocketAddr> {
    let nodes: Vec<placement::Node> = cluster.admin().list(placement::key::NODES).unwrap();
    let mut all: Vec<SocketAddr> =
        nodes.iter().flat_map(|node| node.cores.iter().copied().chain([node.control])).collect();
    all.extend(cluster.fleet.nodes.iter().filter_map(|node| node.addresses.as_ref()).map(|a| a.http));
    all
}

/// Sends bytes and waits for the other side to close.
#[allow(clippy::disallowed_methods, reason = "a stranger knows nothing of the seam")]
fn send_and_be_closed(to: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // The node may close before it has taken everything.
    let _ = stream.write_all(bytes);
    let mut sink = [0; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("{to} did not close the connection: {error}"),
        }
    }
}

fn frame(kind: FrameKind, payload_len: u32) -> Vec<u8> {
    let mut header = Header::new(kind, 1);
    header.payload_len = payload_len;
    let mut bytes = Vec::new();
    header.encode_into(&BlockCrcs::default(), &mut bytes);
    bytes
}

#[test]
fn strangers_on_every_port_are_turned_away_and_nobody_else_notices() {
    let mut cluster = TestCluster::with_image(3, 16 << 20);
    let client = cluster.client();
    let image = client.open("i", OpenMode::ReadWrite).unwrap();
    let data = pattern(1, 1 << 20);
    image.write_at(0, &data).unwrap();
    let mut other_version = frame(FrameKind::Hello, 0);
    other_version[11] = 99;
    let mut strangers: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        vec![0; 300_000],
        vec![0xff; 300_000],
        frame(FrameKind::Write, u32::MAX),
        frame(FrameKind::Control, 512 << 20),
        other_version,
        // A frame before any hello.
        frame(FrameKind::Read, 0),
    ];
    strangers.extend((0..20).map(|seed| pattern(seed, 70_000)));
    for to in listeners(&cluster) {
        for bytes in &strangers {
            send_and_be_closed(to, bytes);
        }
        image.write_at(1 << 20, &data).unwrap();
    }
    let mut read = vec![0; 1 << 20];
    image.read_at(0, &mut read).unwrap();
    assert!(read == data);
    for node in 0..3 {
        let log = std::fs::read_to_string(cluster.fleet.nodes[node].dir.join("log")).unwrap();
        assert!(!log.contains("panicked"), "{log}");
        cluster.fleet.stop(node).unwrap();
    }
}

/// A server that answers whatever it is told with bytes that mean nothing. Ends with the test.
struct Babbler {
    at: SocketAddr,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    answered: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

#[allow(clippy::disallowed_methods, reason = "a stranger knows nothing of the seam")]
impl Babbler {
    fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (stop, answered): (std::sync::Arc<std::sync::atomic::AtomicBool>, _) = Default::default();
        let this = Self { at: listener.local_addr().unwrap(), stop, answered };
        let (stop, answered) = (this.stop.clone(), this.answered.clone());
        std::thread::spawn(move || {
            for (seed, stream) in (1..).zip(listener.incoming()) {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let mut asked = [0; 4096];
                let _ = stream.read(&mut asked).and_then(|_| stream.write_all(&pattern(seed, 100_000)));
                answered.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
        this
    }
}

#[allow(clippy::disallowed_methods, reason = "a stranger knows nothing of the seam")]
impl Drop for Babbler {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let _ = TcpStream::connect(self.at);
    }
}

#[test]
fn a_voter_that_answers_garbage_is_left_for_another() {
    let cluster = TestCluster::start(3);
    let (babbler, other) = (Babbler::start(), Babbler::start());
    let disk = cluster.dir.path().join("fourth");
    cluster.prepare_disk(&disk);
    let mut node = Command::new(common::binary());
    node.args(["node", "--cluster-id", &cluster.fleet.cluster.to_string(), "--id", "4", "--host", "host4"])
        .args(["--die-with-parent", "--http", "127.0.0.1:0", "--cores", "1", "--cpus", "none"])
        .args(["--control", &free_ports(1).unwrap()[0].to_string()])
        // Most of what it is told about voters is wrong.
        .args(["--voter", &format!("7@{}", babbler.at), "--voter", &format!("8@{}", other.at)])
        .args(["--voter", &format!("1@{}", cluster.fleet.nodes[0].control)])
        .arg("--data-dir")
        .arg(cluster.dir.path().join("data4"))
        .arg("--disk")
        .arg(&disk)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(common::disk_rig::log_file(&cluster.dir.path().join("log4")));
    let mut child = node.spawn().unwrap();
    let up = || cli::health::ClusterStatus::read(&mut cluster.admin()).unwrap().nodes_up();
    let count = |one: &Babbler| one.answered.load(std::sync::atomic::Ordering::Relaxed);
    let answered = || count(&babbler) + count(&other);
    wait_until("the node to be served by the good voter", || up() == 4);
    // Whom one asks first is drawn: the command line is asked until it has met the babbler, and always answers.
    let both = format!("{},{}", babbler.at, cluster.fleet.nodes[0].control);
    wait_until("somebody to ask the babbler", || {
        let output = Command::new(common::binary()).args(["--cluster", &both, "status"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        answered() > 0
    });
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn storms_of_connections_leak_no_descriptors() {
    let cluster = TestCluster::with_image(3, 16 << 20);
    let client = cluster.client();
    let image = client.open("i", OpenMode::ReadWrite).unwrap();
    image.write_at(0, &pattern(1, 4096)).unwrap();
    let open_files = |index: usize| {
        let pid = cluster.fleet.pid(index).unwrap();
        std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    };
    let before: Vec<usize> = (0..3).map(open_files).collect();
    let ports = listeners(&cluster);
    let hello = frame(FrameKind::Hello, 0);
    for round in 0..200 {
        for to in &ports {
            #[allow(clippy::disallowed_methods, reason = "a stranger knows nothing of the seam")]
            let mut stream = TcpStream::connect(to).unwrap();
            // Some say nothing, some half a greeting, some a bad one; all are gone at once.
            let said = match round % 3 {
                0 => &[],
                1 => &hello[..hello.len() / 2],
                _ => &hello[..],
            };
            let _ = stream.write_all(said);
        }
    }
    // Clients of our own come and go, too.
    for _ in 0..20 {
        cluster.client().open("i", OpenMode::ReadOnly).unwrap();
    }
    wait_until("every descriptor to be closed", || {
        (0..3).all(|index| open_files(index) <= before[index] + 4)
    });
    image.write_at(4096, &pattern(2, 4096)).unwrap();
    cluster.wait_clean();
}

#[test]
fn half_a_frame_and_silence_hold_nothing_up() {
    let cluster = TestCluster::with_image(1, 16 << 20);
    let hello = frame(FrameKind::Hello, 0);
    #[allow(clippy::disallowed_methods, reason = "a stranger knows nothing of the seam")]
    let held: Vec<TcpStream> = listeners(&cluster)
        .into_iter()
        .flat_map(|to| (0..8).map(move |_| TcpStream::connect(to).unwrap()))
        .collect();
    for mut stream in &held {
        stream.write_all(&hello[..40]).unwrap();
    }
    let image = cluster.client().open("i", OpenMode::ReadWrite).unwrap();
    image.write_at(0, &pattern(1, 4096)).unwrap();
    cluster.ok(&["status"]);
}

#[test]
fn metrics_are_served_and_other_pages_are_not() {
    let cluster = TestCluster::with_image(1, 16 << 20);
    cluster.client().open("i", OpenMode::ReadWrite).unwrap().write_at(0, &pattern(1, 4096)).unwrap();
    let http = cluster.fleet.nodes[0].addresses.as_ref().unwrap().http;
    #[allow(clippy::disallowed_methods, reason = "a scraper lives outside the seam")]
    let get = |path: &str| {
        let mut stream = TcpStream::connect(http).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let page = get("/metrics");
    for family in [
        "drystone_loop_enters_total{core=\"0\"}",
        "drystone_operations_total{core=\"0\",op=\"write\",result=\"ok\"} 1",
        "drystone_operation_duration_seconds_bucket",
        "drystone_slice_used_bytes",
        "drystone_pgs{",
        "drystone_raft_term",
    ] {
        assert!(page.contains(family), "{family} is missing:\n{page}");
    }
    assert!(get("/secret").starts_with("HTTP/1.1 404"));
    // Prometheus' own checker, where it is installed.
    let body = page.split_once("\r\n\r\n").unwrap().1;
    let promtool =
        Command::new("promtool").args(["check", "metrics"]).stdin(std::process::Stdio::piped()).spawn();
    if let Ok(mut checker) = promtool {
        checker.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
        assert!(checker.wait().unwrap().success(), "promtool does not accept the page");
    }
}

/// A node that must not start, and what it says.
fn refused(cluster: &mut TestCluster, index: usize) -> String {
    let (code, said) = cluster.fleet.run_expecting_failure(index).unwrap();
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("error: ") && !said.contains("panicked"), "{said}");
    said
}

fn open_rw(path: &Path) -> std::fs::File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn disks_that_are_not_the_nodes_own_are_told_apart() {
    let mut cluster = TestCluster::prepared(1);
    let disk = cluster.fleet.nodes[0].disk.clone();
    let whole = std::fs::read(&disk).map(|bytes| bytes[..2 << 20].to_vec()).unwrap();
    let restore = || open_rw(&disk).write_all_at(&whole, 0).unwrap();

    open_rw(&disk).write_all_at(&vec![0; 2 << 20], 0).unwrap();
    let said = refused(&mut cluster, 0);
    assert!(said.contains("never prepared") && said.contains("drystone disk prepare"), "{said}");

    open_rw(&disk).write_all_at(&pattern(1, 2 << 20), 0).unwrap();
    assert!(refused(&mut cluster, 0).contains("not Drystone's"));

    restore();
    for copy in [100, (512 << 10) + 100] {
        let mut byte = [0];
        open_rw(&disk).read_exact_at(&mut byte, copy).unwrap();
        open_rw(&disk).write_all_at(&[byte[0] ^ 1], copy).unwrap();
    }
    assert!(refused(&mut cluster, 0).contains("superblock is unusable"));

    restore();
    open_rw(&disk).set_len(100 << 20).unwrap();
    assert!(refused(&mut cluster, 0).contains("truncated"));
    open_rw(&disk).set_len(common::DISK_BYTES).unwrap();

    let other = cluster
        .command(&["disk", "prepare", disk.to_str().unwrap(), "--force"])
        .args(["--slices", "2", "--cluster-id", "00000000000000000000000000000abc"])
        .output()
        .unwrap();
    assert!(other.status.success());
    let said = refused(&mut cluster, 0);
    assert!(said.contains("belongs to cluster 00000000000000000000000000000abc"), "{said}");

    std::fs::remove_file(&disk).unwrap();
    assert!(refused(&mut cluster, 0).contains("does not exist"));
}

#[test]
fn one_flipped_bit_in_one_superblock_copy_is_survived_and_repaired() {
    let mut cluster = TestCluster::prepared(1);
    let disk = cluster.fleet.nodes[0].disk.clone();
    open_rw(&disk).write_all_at(&[0xee], 200).unwrap();
    let found = cluster.fails(&["disk", "check", disk.to_str().unwrap()]);
    assert!(found.contains("is damaged"), "{found}");
    let repaired = cluster.ok(&["disk", "check", disk.to_str().unwrap(), "--repair"]);
    assert!(repaired.contains("repaired: disk superblock"), "{repaired}");
    cluster.ok(&["disk", "check", disk.to_str().unwrap()]);
    cluster.fleet.start_all().unwrap();
}

#[test]
fn a_disk_in_use_is_left_alone() {
    let mut cluster = TestCluster::start(1);
    let disk = cluster.fleet.nodes[0].disk.clone();
    let disk = disk.to_str().unwrap();
    for args in [
        vec!["disk", "check", disk],
        vec!["disk", "prepare", disk, "--force", "--cluster-id", "00000000000000000000000000000abc"],
    ] {
        assert!(cluster.fails(&args).contains("in use by another process"), "{args:?}");
    }
    cluster.ok(&["disk", "info", disk]);
    assert!(refused(&mut cluster, 0).contains("in use by another process"));
    cluster.ok(&["status"]);
}

#[test]
fn another_nodes_disk_is_refused() {
    let mut cluster = TestCluster::start(3);
    cluster.fleet.stop(0).unwrap();
    cluster.fleet.stop(1).unwrap();
    let first = cluster.fleet.nodes[0].disk.clone();
    cluster.fleet.nodes[1].disk = first;
    assert!(refused(&mut cluster, 1).contains("belongs to node 1, this is node 2"));
}

#[test]
fn a_node_that_joins_twice_is_refused_and_the_first_goes_on() {
    let mut cluster = TestCluster::with_image(3, 16 << 20);
    let image = cluster.client().open("i", OpenMode::ReadWrite).unwrap();
    image.write_at(0, &pattern(1, 4096)).unwrap();
    // A fourth machine, configured by mistake with the number of the third, with a disk of its own.
    let dir = temp_dir();
    let disk = dir.path().join("disk");
    let id = cluster.fleet.cluster.to_string();
    cluster.ok(&[
        "disk",
        "prepare",
        disk.to_str().unwrap(),
        "--create",
        "1G",
        "--slices",
        "2",
        "--cluster-id",
        &id,
    ]);
    let port = free_ports(1).unwrap()[0];
    let mut twin = Command::new(common::binary());
    twin.args(["node", "--cluster-id", &id, "--id", "3", "--host", "impostor", "--die-with-parent"])
        .args(["--control", &port.to_string(), "--http", "127.0.0.1:0", "--cores", "1", "--cpus", "none"])
        .args(["--voter", &format!("1@{}", cluster.fleet.nodes[0].control)])
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .arg("--disk")
        .arg(&disk);
    let said = failure(twin);
    assert!(said.contains("already running on host host3"), "{said}");
    image.write_at(4096, &pattern(2, 4096)).unwrap();
    cluster.wait_clean();
    cluster.fleet.stop(2).unwrap();
}

#[test]
fn a_node_of_another_cluster_is_refused_by_the_metadata() {
    let cluster = TestCluster::start(1);
    let dir = temp_dir();
    let disk = dir.path().join("disk");
    let other = "00000000000000000000000000000abc";
    let disk_text = disk.to_str().unwrap();
    cluster.ok(&["disk", "prepare", disk_text, "--create", "1G", "--slices", "2", "--cluster-id", other]);
    let mut node = Command::new(common::binary());
    node.args(["node", "--cluster-id", other, "--id", "2", "--host", "h2", "--die-with-parent"])
        .args(["--control", &free_ports(1).unwrap()[0].to_string(), "--http", "127.0.0.1:0"])
        .args(["--cores", "1", "--cpus", "none"])
        .args(["--voter", &format!("1@{}", cluster.fleet.nodes[0].control)])
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .args(["--disk", disk_text]);
    let said = failure(node);
    assert!(said.contains(&format!("belong to cluster {other}")), "{said}");
    cluster.ok(&["status"]);
}

#[test]
fn a_taken_port_is_named() {
    let mut cluster = TestCluster::prepared(1);
    #[allow(clippy::disallowed_methods, reason = "the test takes the port")]
    let taken = std::net::TcpListener::bind(cluster.fleet.nodes[0].control).unwrap();
    let said = refused(&mut cluster, 0);
    assert!(said.contains(&taken.local_addr().unwrap().to_string()), "{said}");
}

#[test]
fn configuration_mistakes_name_the_key() {
    let dir = temp_dir();
    let path = dir.path().join("node.toml");
    let run = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let mut node = Command::new(common::binary());
        node.args(["node", "--config", path.to_str().unwrap()]);
        failure(node)
    };
    let starter = Command::new(common::binary()).args(["node", "--new-config"]).output().unwrap();
    let good = String::from_utf8(starter.stdout).unwrap();
    assert!(run(&good.replace("id = 1\n", "")).contains("node.id is not set"));
    assert!(run(&good.replace("disks = []", "diks = []")).contains("diks"));
    assert!(run(&good.replace("disks = []", "disks = 7")).contains("disks = 7"));
    // A file that an editor or a full disk cut off.
    let half = &good[..good.find("data_dir").unwrap() + 12];
    assert!(run(half).contains("data_dir"), "{}", run(half));
    std::fs::remove_file(&path).unwrap();
    let mut node = Command::new(common::binary());
    node.args(["node", "--config", path.to_str().unwrap()]);
    assert!(failure(node).contains("cannot read configuration file"));
}

#[test]
fn a_removed_image_is_gone_for_those_who_have_it_open() {
    let cluster = TestCluster::with_image(1, 16 << 20);
    let image = cluster.client().open("i", OpenMode::ReadWrite).unwrap();
    image.write_at(0, &pattern(1, 4096)).unwrap();
    cluster.ok(&["image", "rm", "i"]);
    wait_until("the image to be refused", || image.write_at(0, &pattern(1, 4096)).is_err());
    assert!(cluster.client().open("i", OpenMode::ReadWrite).is_err());
}
