//! What the process tests share: clusters of real node processes, and the command run as a person would.
//!
//! Nothing here sleeps: every wait is for a condition, with a deadline after which the test fails.

#![allow(dead_code, reason = "each test file uses its own part")]

pub mod clients;
pub mod disk_rig;

use cli::children::{Fleet, FleetPlan, wait_for_end};
use cli::cluster::Cluster;
use cli::deadline::Deadline;
use cli::health::ClusterStatus;
use drystone::blocking;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Deadline of everything that should take a moment; generous, because the machine may be busy.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of a test node's disk.
pub const DISK_BYTES: u64 = 1 << 30;

/// The program under test.
pub fn binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_drystone"))
}

/// A cluster of processes with its directory. Dropping it kills what still runs and removes everything.
pub struct TestCluster {
    pub fleet: Fleet,
    pub dir: tempfile::TempDir,
}

/// A directory in memory, so that tests measure nobody's disk.
pub fn temp_dir() -> tempfile::TempDir {
    let base = Path::new("/dev/shm");
    let base = if base.is_dir() { base.to_path_buf() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("drystone-test-").tempdir_in(base).unwrap()
}

impl TestCluster {
    /// Prepares nodes and starts none.
    pub fn prepared(nodes: u64) -> Self {
        Self::prepared_with(nodes, &[])
    }

    /// The same, of nodes with further flags.
    pub fn prepared_with(nodes: u64, flags: &[&str]) -> Self {
        let usual = ["--cores", "1", "--cpus", "none", "--meta-bytes", "16MiB"];
        let dir = temp_dir();
        let plan = FleetPlan {
            binary: binary(),
            dir: dir.path().to_path_buf(),
            nodes,
            disk_bytes: DISK_BYTES,
            slices: 2,
            flags: usual.iter().chain(flags).map(|flag| (*flag).to_owned()).collect(),
            log: "info".into(),
        };
        Self { fleet: Fleet::prepare(plan).unwrap(), dir }
    }

    /// Prepares a disk of this cluster, made with its full size if it is not there.
    pub fn prepare_disk(&self, path: &Path) {
        let (path, id) = (path.to_str().unwrap(), self.fleet.cluster.to_string());
        let bytes = DISK_BYTES.to_string();
        self.ok(&["disk", "prepare", path, "--create", &bytes, "--slices", "2", "--cluster-id", &id]);
    }

    /// A pool `p` of three copies with an image `i`, all of it clean.
    pub fn make_image(&self, image_bytes: u64) {
        self.ok(&["pool", "create", "p", "--copies", "3", "--pgs", "8"]);
        self.wait_clean();
        self.ok(&["image", "create", "i", "--pool", "p", "--size", &image_bytes.to_string()]);
    }

    /// What a node's metrics page says.
    pub fn metrics(&self, index: usize) -> String {
        cli::scrape::scrape(self.fleet.nodes[index].addresses.as_ref().unwrap().http).unwrap()
    }

    /// Starts a cluster and waits until every node serves.
    pub fn start(nodes: u64) -> Self {
        let mut cluster = Self::prepared(nodes);
        cluster.fleet.start_all().unwrap();
        cluster
    }

    /// A cluster with a pool `p` of as many copies as nodes, all of it clean, and an image `i`.
    pub fn with_image(nodes: u64, image_bytes: u64) -> Self {
        let cluster = Self::start(nodes);
        cluster.ok(&["pool", "create", "p", "--copies", &nodes.to_string(), "--pgs", "8"]);
        cluster.wait_clean();
        cluster.ok(&["image", "create", "i", "--pool", "p", "--size", &image_bytes.to_string()]);
        cluster
    }

    /// Administration in this process.
    pub fn admin(&self) -> Cluster {
        Cluster::at(&self.fleet.controls()).unwrap()
    }

    /// Waits until every placement group has every copy.
    pub fn wait_clean(&self) -> ClusterStatus {
        let mut admin = self.admin();
        ClusterStatus::wait_for(&mut admin, "a clean cluster", LIMIT, ClusterStatus::is_clean).unwrap()
    }

    /// A client with a thread of its own.
    pub fn client(&self) -> blocking::Cluster {
        blocking::Cluster::connect(&self.fleet.controls(), drystone::Options::default()).unwrap()
    }

    /// The command, against this cluster.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(args).env("DRYSTONE_CLUSTER", self.fleet.cluster_flag()).stdin(Stdio::null());
        command
    }

    /// Runs the command and demands success; returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "drystone {args:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the command and demands that it fails with exit code 1; returns what it said.
    pub fn fails(&self, args: &[&str]) -> String {
        failure(self.command(args))
    }
}

/// Runs a command that must fail with exit code 1, without a panic; returns what it said.
pub fn failure(mut command: Command) -> String {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap();
    if wait_for_end(&mut child, Deadline::after(LIMIT)).unwrap().is_none() {
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        panic!("{command:?} did not end by itself: {}", said(&output));
    }
    let output = child.wait_with_output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
    assert!(said.lines().any(|line| line.starts_with("error: ")), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// Standard error of a finished program.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until a condition holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Deadline::after(LIMIT);
    while !holds() {
        assert!(!deadline.passed(), "gave up waiting for {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Bytes that differ from block to block and from seed to seed.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}
