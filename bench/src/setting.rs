//! The setting: one core, tmpfs, three nodes, one image, one plain file.

use crate::rows::Row;
use cli::children::{Fleet, FleetPlan};
use cli::cluster::Cluster;
use cli::deadline::{Deadline, Stopwatch};
use cli::error::CliError;
use cli::fio::{FioJob, FioResult, Target};
use cli::health::ClusterStatus;
use cli::procfs;
use cli::scrape::{Counters, fleet_counters};
use control::admin::PoolSpec;
use placement::FailureDomain;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::path::{Path, PathBuf};
use std::time::Duration;

const NODES: u64 = 3;
const SLICES: u32 = 4;
const POOL: &str = "bench";
const IMAGE: &str = "bench";
/// Bytes of the image and of the plain file: more than any cache inside the nodes holds.
const IMAGE_BYTES: u64 = 1 << 30;
/// Bytes of each node's disk while measuring. A store that overwrites nothing touches all of it in time,
/// and three of these must fit the machine's memory.
const DISK_BYTES: u64 = 3 << 30;
/// Bytes of each node's disk for the idle figures.
const IDLE_DISK_BYTES: u64 = 10 << 30;
/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(120);

fn io(what: &str) -> impl FnOnce(std::io::Error) -> CliError {
    let what = what.to_string();
    move |source| CliError::Io { what, source }
}

/// Confines this process and everything it starts to one CPU, and says which.
pub fn pin(wanted: Option<usize>) -> Result<usize, CliError> {
    let failed = |error: rustix::io::Errno| io("pin to a CPU")(error.into());
    let allowed = sched_getaffinity(None).map_err(failed)?;
    let last = (0..CpuSet::MAX_CPU).rev().find(|cpu| allowed.is_set(*cpu)).unwrap_or(0);
    let cpu = wanted.unwrap_or(last);
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).map_err(failed)?;
    Ok(cpu)
}

fn beside_this_program(name: &str) -> Result<PathBuf, CliError> {
    let path = std::env::current_exe().map_err(io("find this program"))?.with_file_name(name);
    path.canonicalize().map_err(io(&format!("find {} (make bench builds it)", path.display())))
}

fn fleet(dir: &Path, disk_bytes: u64) -> Result<Fleet, CliError> {
    Fleet::prepare(FleetPlan {
        binary: beside_this_program("drystone")?,
        dir: dir.to_path_buf(),
        nodes: NODES,
        disk_bytes,
        slices: SLICES,
        flags: ["--cores", "1", "--cpus", "none"].map(String::from).to_vec(),
        log: "warn".into(),
    })
}

fn make_pool(cluster: &mut Cluster) -> Result<(), CliError> {
    cluster.create_pool(&PoolSpec {
        name: POOL.into(),
        copies: NODES as u8,
        min_copies: None,
        pg_count: None,
        failure_domain: FailureDomain::Host,
        scrub: Default::default(),
    })?;
    ClusterStatus::wait_for(cluster, "the new pool", LIMIT, ClusterStatus::is_clean).map(|_| ())
}

fn temp_dir(base: &Path) -> Result<tempfile::TempDir, CliError> {
    let dir = tempfile::Builder::new().prefix("drystone-bench-").tempdir_in(base);
    dir.map_err(io(&format!("make a directory in {}", base.display())))
}

/// Starting and idling.
pub struct Idle {
    /// Seconds from starting three processes to every PG serving, each run.
    pub start_to_active: Vec<f64>,
    /// Resident megabytes of the largest node, each run.
    pub resident_mb: Vec<f64>,
}

/// Starts a cluster that has a pool and no data, several times.
pub fn start_and_idle(base: &Path, runs: usize) -> Result<Idle, CliError> {
    let dir = temp_dir(base)?;
    let mut fleet = fleet(dir.path(), IDLE_DISK_BYTES)?;
    fleet.start_all()?;
    make_pool(&mut Cluster::at(&fleet.controls())?)?;
    fleet.stop_all()?;
    let mut idle = Idle { start_to_active: Vec::new(), resident_mb: Vec::new() };
    for _ in 0..runs {
        let watch = Stopwatch::start();
        for index in 0..fleet.nodes.len() {
            fleet.spawn(index)?;
        }
        let mut cluster = Cluster::at(&fleet.controls())?;
        let active = |status: &ClusterStatus| status.is_active() && status.nodes_up() == NODES as usize;
        ClusterStatus::wait_for(&mut cluster, "every PG to serve", LIMIT, active)?;
        idle.start_to_active.push(watch.elapsed().as_secs_f64());
        drop(cluster);
        for index in 0..fleet.nodes.len() {
            fleet.wait_ready(index)?;
        }
        let resident = (0..fleet.nodes.len())
            .filter_map(|index| procfs::resident_bytes(fleet.pid(index)?).ok())
            .max()
            .unwrap_or(0);
        idle.resident_mb.push(resident as f64 / 1e6);
        fleet.stop_all()?;
    }
    Ok(idle)
}

/// Three nodes under load.
pub struct Setting {
    // Dropped in this order: nodes before their files.
    fleet: Fleet,
    cluster: Cluster,
    engine: PathBuf,
    /// What plain fio works on.
    pub plain_file: PathBuf,
    dir: tempfile::TempDir,
}

impl Setting {
    /// Starts the nodes and makes the image.
    pub fn new(base: &Path) -> Result<Self, CliError> {
        let dir = temp_dir(base)?;
        let mut fleet = fleet(dir.path(), DISK_BYTES)?;
        fleet.start_all()?;
        let mut cluster = Cluster::at(&fleet.controls())?;
        make_pool(&mut cluster)?;
        cluster.create_image(IMAGE, POOL, IMAGE_BYTES)?;
        let engine = beside_this_program("libdrystone_fio.so")?;
        Ok(Self { fleet, cluster, engine, plain_file: dir.path().join("plain"), dir })
    }

    /// The image, through our engine.
    pub fn image_target(&self) -> Target {
        let cluster = self.fleet.cluster_flag();
        Target::Image { engine: self.engine.clone(), cluster, image: IMAGE.into() }
    }

    /// Writes the image and the plain file from front to end: reads must find data. The image as often as
    /// it takes until every byte of the disks has been written once, as the plain file's has: a file on
    /// tmpfs gets its memory when a page is first touched, which costs as much as a whole write and which
    /// no drive has.
    pub fn fill(&mut self) -> Result<(), CliError> {
        let whole_disk = DISK_BYTES.div_ceil(IMAGE_BYTES) + 1;
        for (target, passes) in
            [(self.image_target(), whole_disk), (Target::File(self.plain_file.clone()), 1)]
        {
            let job = FioJob {
                name: "fill".into(),
                rw: "write",
                bs: "1m",
                depth: 16,
                extra: vec![format!("--size={IMAGE_BYTES}"), format!("--loops={passes}")],
            };
            self.run(&job, &target)?;
        }
        ClusterStatus::wait_for(&mut self.cluster, "a clean cluster", LIMIT, ClusterStatus::is_clean)
            .map(|_| ())
    }

    /// Runs a row on a target.
    pub fn fio(&self, row: &Row, target: &Target, seconds: u32) -> Result<FioResult, CliError> {
        let job = FioJob {
            name: row.name.into(),
            rw: row.rw,
            bs: row.bs,
            depth: row.depth,
            extra: vec![
                format!("--size={IMAGE_BYTES}"),
                "--time_based".into(),
                format!("--runtime={seconds}"),
                // Without a map of blocks done, fio's own cost does not grow with the run.
                "--norandommap".into(),
            ],
        };
        self.run(&job, target)
    }

    fn run(&self, job: &FioJob, target: &Target) -> Result<FioResult, CliError> {
        let mut run = job.spawn(target, self.dir.path())?;
        run.wait_until(Deadline::after(LIMIT))?.ok_or_else(|| CliError::TimedOut {
            what: format!("fio run {}", job.name),
            seconds: LIMIT.as_secs(),
        })
    }

    /// CPU time of all nodes so far, the kernel's threads that work for them included.
    pub fn nodes_cpu(&self) -> Result<Duration, CliError> {
        (0..self.fleet.nodes.len())
            .filter_map(|index| self.fleet.pid(index))
            .map(|pid| procfs::cpu_time(pid).map(|time| time.own).map_err(io("read a node's CPU time")))
            .sum()
    }

    /// The nodes' own counters.
    pub fn counters(&self) -> Result<Counters, CliError> {
        fleet_counters(&self.fleet)
    }

    /// Stops the nodes cleanly.
    pub fn end(mut self) -> Result<(), CliError> {
        self.fleet.stop_all()
    }
}
