//! Disks that can be broken: loop devices, small file systems, and a client that notices.

#![allow(clippy::disallowed_methods, reason = "a client of its own thread beside the test")]

use super::{LIMIT, TestCluster, pattern};
use cli::deadline::Deadline;
use cli::health::ClusterStatus;
use drystone::OpenMode;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Runs a system tool and demands success; returns what it printed.
pub fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Whether this machine lets us make loop devices and mount them. Where it does not, tests that need them
/// say so and end.
pub fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !may {
        eprintln!("not run: loop devices and mounts need root");
    }
    may
}

/// A loop device over a file, detached when dropped.
pub struct Loop {
    pub device: PathBuf,
    pub file: PathBuf,
}

impl Loop {
    /// Over a new sparse file.
    pub fn new(file: &Path, bytes: u64) -> Self {
        std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(file)
            .and_then(|file| file.set_len(bytes))
            .unwrap();
        let device = tool("losetup", &["--find", "--show", file.to_str().unwrap()]).into();
        Self { device, file: file.into() }
    }

    /// The device loses its contents and its end, as a drive that is pulled.
    pub fn shrink(&self, bytes: u64) {
        let device = self.device.to_str().unwrap();
        // A write that comes between the two makes the file large again.
        super::wait_until("the device to be small", || {
            std::fs::OpenOptions::new().write(true).open(&self.file).unwrap().set_len(bytes).unwrap();
            tool("losetup", &["--set-capacity", device]);
            tool("blockdev", &["--getsize64", device]) == bytes.to_string()
        });
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Detached when its last user closes it.
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// A mounted file system, unmounted when dropped.
pub struct Mount {
    pub at: PathBuf,
    /// What it lies on, if that is ours.
    _device: Option<Loop>,
    frozen: bool,
}

impl Mount {
    /// A file system in memory that holds so many bytes.
    pub fn tmpfs(at: &Path, bytes: u64) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={bytes}");
        tool("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", at.to_str().unwrap()]);
        Self { at: at.into(), _device: None, frozen: false }
    }

    /// A file system on a loop device, which can be frozen.
    pub fn ext4(at: &Path, file: &Path, bytes: u64) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let device = Loop::new(file, bytes);
        tool("mkfs.ext4", &["-q", device.device.to_str().unwrap()]);
        tool("mount", &[device.device.to_str().unwrap(), at.to_str().unwrap()]);
        Self { at: at.into(), _device: Some(device), frozen: false }
    }

    /// From now on writes to it do not end.
    pub fn freeze(&mut self) {
        tool("fsfreeze", &["--freeze", self.at.to_str().unwrap()]);
        self.frozen = true;
    }

    /// They do again.
    pub fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.at).status();
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.thaw();
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// A client that writes and reads an image all the time, and remembers what it was told.
pub struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<Vec<(u64, u64)>>>,
}

const BLOCK: usize = 4096;
/// Blocks it works on: some in every placement group.
const BLOCKS: u64 = 8192;

impl Load {
    /// Begins on image `i`, which must have 32 MiB. An error of the client is a panic of its thread.
    pub fn start(cluster: &TestCluster) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = cluster.client();
        let (stopped, done) = (stop.clone(), rounds.clone());
        let thread = std::thread::spawn(move || {
            let image = client.open("i", OpenMode::ReadWrite).unwrap();
            let mut written = std::collections::BTreeMap::new();
            let mut read = vec![0; BLOCK];
            let mut round = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                round += 1;
                let block = round.wrapping_mul(0x9e37_79b9) % BLOCKS;
                image.write_at(block * BLOCK as u64, &pattern(round, BLOCK)).unwrap();
                written.insert(block, round);
                // An old one: its copies are where recovery and damage meet.
                let old = written.range(round.wrapping_mul(31) % BLOCKS..).next().or(written.iter().next());
                let (block, seed) = old.map(|(block, seed)| (*block, *seed)).unwrap();
                image.read_at(block * BLOCK as u64, &mut read).unwrap();
                assert!(read == pattern(seed, BLOCK), "block {block} is not what was written");
                done.fetch_add(1, Ordering::Relaxed);
            }
            written.into_iter().collect()
        });
        Self { stop, rounds, thread: Some(thread) }
    }

    /// Waits until it has done so much more.
    pub fn more(&self, rounds: u64) {
        let until = self.rounds.load(Ordering::Relaxed) + rounds;
        super::wait_until("the client to get on", || {
            assert!(!self.thread.as_ref().unwrap().is_finished(), "the client has failed");
            self.rounds.load(Ordering::Relaxed) >= until
        });
    }

    /// Ends it; every block must read as it was last written.
    pub fn finish(mut self, cluster: &TestCluster) {
        self.stop.store(true, Ordering::Relaxed);
        let written = self.thread.take().unwrap().join().expect("the client saw no error");
        let image = cluster.client().open("i", OpenMode::ReadOnly).unwrap();
        let mut read = vec![0; BLOCK];
        for (block, seed) in written {
            image.read_at(block * BLOCK as u64, &mut read).unwrap();
            assert!(read == pattern(seed, BLOCK), "block {block} lost its last acknowledged write");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Waits until `status` complains of something that contains all of these.
pub fn wait_for_problem(cluster: &TestCluster, words: &[&str]) -> ClusterStatus {
    let mut admin = cluster.admin();
    let deadline = Deadline::after(LIMIT);
    let named = |status: &ClusterStatus| {
        status.problems.iter().any(|problem| words.iter().all(|word| problem.contains(word)))
    };
    loop {
        let status = ClusterStatus::read(&mut admin).unwrap();
        if named(&status) {
            return status;
        }
        assert!(!deadline.passed(), "nothing says {words:?}: {:?}", status.problems);
        admin.wait_for_change().unwrap();
    }
}

/// Waits until every placement group has every copy, none of them on a disk that has failed.
pub fn wait_clean_elsewhere(cluster: &TestCluster, disk: &Path) {
    let mut admin = cluster.admin();
    let deadline = Deadline::after(LIMIT);
    loop {
        let status = ClusterStatus::read(&mut admin).unwrap();
        let nodes: Vec<placement::Node> = admin.list(placement::key::NODES).unwrap();
        let gone: Vec<wire::SliceId> = nodes
            .iter()
            .flat_map(|node| &node.disks)
            .filter(|one| Path::new(&one.path) == disk)
            .flat_map(|one| one.slices.iter().map(|slice| slice.id))
            .collect();
        let records: Vec<placement::PgRecord> = admin.list(placement::key::PGS).unwrap();
        let free = |record: &placement::PgRecord| {
            record
                .target
                .iter()
                .chain(&record.acting)
                .chain(&record.in_sync)
                .all(|slice| !gone.contains(slice))
        };
        if status.is_clean() && records.iter().all(free) {
            return;
        }
        assert!(!deadline.passed(), "{}: {records:?}", status.summary());
        admin.wait_for_change().unwrap();
    }
}

/// A file for what a process says.
#[allow(clippy::disallowed_methods, reason = "a test's log is no disk")]
pub fn log_file(path: &Path) -> std::fs::File {
    std::fs::File::create(path).unwrap()
}
