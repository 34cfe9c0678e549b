//! Nodes of one cluster in this guest, on drives.

use super::system::LIMIT;
use super::{Context, system::utf8};
use crate::error::{GuestError, demand};
use crate::program;
use cli::children::{Fleet, FleetPlan, last_lines};
use cli::cluster::Cluster;
use cli::health::ClusterStatus;
use cli::scrape::scrape;
use rustix::process::Signal;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use wire::ClusterId;

/// The pool of all images, and the image.
pub const POOL: &str = "p";
pub const IMAGE: &str = "i";
/// The identity of all clusters here: the same in every boot, and drives are fresh.
const CLUSTER: ClusterId = ClusterId(0x6775_6573_7400_0000_0000_0000_0000_0001);
/// Nodes' control ports: the guest has the network for itself.
const FIRST_PORT: u16 = 7701;
/// Slices of a disk, copies, placement groups: small, for a slow machine.
const SLICES: u32 = 2;
const COPIES: &str = "3";
const PGS: &str = "8";

/// Flags of every node: small ones, on a machine of two processors.
const FLAGS: [&str; 6] = ["--cores", "1", "--cpus", "none", "--meta-bytes", "16MiB"];
/// Bytes of the file that goes into an image and out again.
const ROUND_TRIP_BYTES: usize = 12 << 20;

/// What a node counts when it polls its drives.
const POLLED: &str = "drystone_loop_disk_operations_polled_total";

/// A cluster at work. Dropping it kills its nodes.
pub struct Nodes {
    fleet: Fleet,
    drystone: PathBuf,
}

impl Nodes {
    /// Prepares disks where that has not been done and starts a node for each list of them, with further flags of
    /// `drystone node`. Nodes' files are in `dir`. Disks that do not exist are made as files of `disk_bytes`.
    pub fn start_with(
        context: &Context,
        dir: &Path,
        disks: &[Vec<PathBuf>],
        disk_bytes: u64,
        flags: &[&str],
    ) -> Result<Self, GuestError> {
        let drystone = context.manifest.drystone.clone();
        let mut fleet = Fleet::empty(FleetPlan {
            binary: drystone.clone(),
            dir: dir.into(),
            nodes: 0,
            disk_bytes,
            slices: SLICES,
            flags: FLAGS.iter().chain(flags).map(ToString::to_string).collect(),
            log: "info".into(),
        })?;
        fleet.cluster = CLUSTER;
        for (index, disks) in disks.iter().enumerate() {
            let control = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT + index as u16));
            let (first, more) =
                disks.split_first().ok_or_else(|| GuestError::Missing("a node's disk".into()))?;
            fleet.add(control, first.clone(), true)?;
            for disk in more {
                prepare(&drystone, disk)?;
            }
            if let Some(node) = fleet.nodes.last_mut() {
                node.more_disks = more.to_vec();
            }
        }
        fleet.start_all()?;
        Ok(Self { fleet, drystone })
    }

    /// A pool of three copies with an image, all of it clean.
    pub fn make_image(&self, bytes: u64) -> Result<(), GuestError> {
        self.make_image_of(bytes, PGS)
    }

    /// The same with another number of placement groups.
    pub fn make_image_of(&self, bytes: u64, pgs: &str) -> Result<(), GuestError> {
        self.make_pool_of(pgs)?;
        self.command(&["image", "create", IMAGE, "--pool", POOL, "--size", &bytes.to_string()]).map(|_| ())
    }

    /// A pool of three copies, clean.
    pub fn make_pool(&self) -> Result<(), GuestError> {
        self.make_pool_of(PGS)
    }

    fn make_pool_of(&self, pgs: &str) -> Result<(), GuestError> {
        self.command(&["pool", "create", POOL, "--copies", COPIES, "--pgs", pgs])?;
        self.wait_clean().map(|_| ())
    }

    /// Administration in this process.
    pub fn admin(&self) -> Result<Cluster, GuestError> {
        Ok(Cluster::at(&self.fleet.controls())?)
    }

    /// Control addresses, as `--cluster` wants them.
    pub fn cluster_flag(&self) -> String {
        self.fleet.cluster_flag()
    }

    /// Control addresses.
    pub fn controls(&self) -> Vec<SocketAddr> {
        self.fleet.controls()
    }

    /// Waits until every placement group has every copy.
    pub fn wait_clean(&self) -> Result<ClusterStatus, GuestError> {
        self.wait_for("a clean cluster", ClusterStatus::is_clean)
    }

    /// Waits for a state. An error carries the ends of the nodes' logs.
    pub fn wait_for(
        &self,
        what: &str,
        good: impl Fn(&ClusterStatus) -> bool,
    ) -> Result<ClusterStatus, GuestError> {
        ClusterStatus::wait_for(&mut self.admin()?, what, LIMIT, good)
            .map_err(|error| GuestError::Demand(format!("{error}\n{}", self.logs())))
    }

    fn logs(&self) -> String {
        let logs = self.fleet.nodes.iter().map(|node| (node.id, last_lines(&node.dir.join("log"))));
        logs.map(|(id, log)| format!("node {id}:\n{log}\n")).collect()
    }

    /// Disk operations of a node that were found by polling.
    pub fn polled(&self, index: usize) -> Result<f64, GuestError> {
        self.counter(index, POLLED)
    }

    /// The sum over a node's cores of what its metrics page has under this name.
    pub fn counter(&self, index: usize, name: &str) -> Result<f64, GuestError> {
        let node = self.fleet.nodes.get(index).and_then(|node| node.addresses.as_ref());
        let http = node.ok_or_else(|| GuestError::Missing(format!("node {}", index + 1)))?.http;
        let page = scrape(http)?;
        let lines = page.lines().filter(|line| line.starts_with(name));
        Ok(lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum())
    }

    /// CPU time of all nodes that run.
    pub fn cpu_time(&self) -> Result<Duration, GuestError> {
        let pids = (0..self.fleet.nodes.len()).filter_map(|index| self.fleet.pid(index));
        let times = pids.map(|pid| cli::procfs::cpu_time(pid).map(|time| time.total()));
        times.sum::<Result<Duration, _>>().map_err(GuestError::io("read the nodes' CPU time"))
    }

    /// Whether a node has a file open whose path begins like this.
    pub fn has_open(&self, index: usize, path: &str) -> Result<bool, GuestError> {
        let missing = || GuestError::Missing(format!("the process of node {}", index + 1));
        let dir = format!("/proc/{}/fd", self.fleet.pid(index).ok_or_else(missing)?);
        let entries = std::fs::read_dir(&dir).map_err(GuestError::io(format!("list {dir}")))?;
        let mut targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        Ok(targets.any(|target| target.to_string_lossy().starts_with(path)))
    }

    /// Kills a node.
    pub fn kill(&mut self, index: usize) -> Result<(), GuestError> {
        Ok(self.fleet.kill(index)?)
    }

    /// Stops a node's process in the middle of whatever it does, until `resume`.
    pub fn pause(&self, index: usize) -> Result<(), GuestError> {
        Ok(self.fleet.signal(index, Signal::STOP)?)
    }

    /// Lets it go on.
    pub fn resume(&self, index: usize) -> Result<(), GuestError> {
        Ok(self.fleet.signal(index, Signal::CONT)?)
    }

    /// Starts a node again and waits until it serves.
    pub fn restart(&mut self, index: usize) -> Result<(), GuestError> {
        self.fleet.spawn(index)?;
        self.fleet.wait_ready(index)?;
        Ok(())
    }

    /// Where a node's first data core listens.
    pub fn data_address(&self, index: usize) -> Result<SocketAddr, GuestError> {
        let missing = || GuestError::Missing(format!("the data address of node {}", index + 1));
        let node = self.fleet.nodes.get(index).ok_or_else(missing)?;
        let text = self.command(&["meta", "get", &placement::key::node(node.id)])?;
        let value = text.find('{').and_then(|at| text.get(at..)).ok_or_else(missing)?;
        let mut values = serde_json::Deserializer::from_str(value).into_iter::<placement::Node>();
        let node = values.next().and_then(Result::ok).ok_or_else(missing)?;
        node.cores.first().copied().ok_or_else(missing)
    }

    /// Imports a file as an image of this name, exports it and compares.
    pub fn round_trip(&self, name: &str, dir: &Path) -> Result<(), GuestError> {
        let (source, target) = (dir.join("source"), dir.join("target"));
        let mut rng = super::pattern::Rng::new(7);
        let bytes: Vec<u8> = (0..ROUND_TRIP_BYTES / 8).flat_map(|_| rng.bits().to_le_bytes()).collect();
        let failed = |path: &Path| GuestError::io(format!("use {}", path.display()));
        std::fs::write(&source, &bytes).map_err(failed(&source))?;
        self.command(&["image", "import", utf8(&source)?, name, "--pool", POOL])?;
        self.command(&["image", "export", name, utf8(&target)?])?;
        let back = std::fs::read(&target).map_err(failed(&target))?;
        demand(back == bytes, || "the exported image differs from what was imported".into())?;
        [source, target].iter().try_for_each(|path| std::fs::remove_file(path).map_err(failed(path)))
    }

    /// Runs the command on this cluster and returns what it printed.
    pub fn command(&self, args: &[&str]) -> Result<String, GuestError> {
        let mut command = Command::new(&self.drystone);
        program::run(command.args(args).env("DRYSTONE_CLUSTER", self.fleet.cluster_flag()))
    }

    /// Stops all nodes in order and checks every disk with all its data, but for those that are gone.
    pub fn end(mut self, gone: &[PathBuf]) -> Result<(), GuestError> {
        self.fleet.stop_all()?;
        for node in &self.fleet.nodes {
            let log = std::fs::read_to_string(node.dir.join("log")).unwrap_or_default();
            let panicked = log.lines().find(|line| line.contains("panicked at"));
            demand(panicked.is_none(), || format!("node {}: {}", node.id, panicked.unwrap_or("")))?;
            let disks = std::iter::once(&node.disk).chain(&node.more_disks);
            for disk in disks.filter(|disk| !gone.contains(disk)) {
                check(&self.drystone, disk, true)?;
            }
        }
        Ok(())
    }
}

/// `drystone disk prepare`, for the cluster of all tests.
pub fn prepare(drystone: &Path, disk: &Path) -> Result<String, GuestError> {
    let mut command = Command::new(drystone);
    command.args(["disk", "prepare", utf8(disk)?, "--slices", &SLICES.to_string()]);
    program::run(command.args(["--cluster-id", &CLUSTER.to_string()]))
}

/// `drystone disk check`: an error carries what it found.
pub fn check(drystone: &Path, disk: &Path, data: bool) -> Result<String, GuestError> {
    let mut command = Command::new(drystone);
    command.args(["disk", "check", utf8(disk)?]);
    if data {
        command.arg("--data");
    }
    program::run(&mut command)
}
