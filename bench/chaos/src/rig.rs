//! A cluster of node processes to do harm to: its network, its disks, and what is known of its state.

mod disks;

use crate::error::ChaosError;
use crate::faulty::{Fault, FaultyDisk};
use crate::isolate::{self, Isolation};
use crate::net::Net;
use crate::rng::Rng;
use cli::children::{Fleet, FleetPlan, last_lines, run_to_end};
use cli::cluster::{Cluster, decode};
use cli::deadline::Deadline;
use cli::error::CliError;
use cli::fio::Target;
use cli::health::ClusterStatus;
use cli::scrape::scrape;
use cli::stop::Stop;
use control::admin::PoolSpec;
use disks::{Mount, add_faulty};
use placement::{FailureDomain, Node, PgRecord, key};
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use wire::{NodeId, PgId, SliceId};

/// The pool of all images.
pub const POOL: &str = "p";
/// Longest wait for any state of the cluster, on a slow machine.
pub const LIMIT: Duration = Duration::from_secs(120);
/// How often a condition that nobody announces is looked at.
const LOOK: Duration = Duration::from_millis(40);
/// Slices of a disk.
const SLICES: u32 = 2;

/// What a cluster looks like.
#[derive(Clone, Debug)]
pub struct RigPlan {
    /// Nodes at the start.
    pub nodes: usize,
    /// The first so many of them keep metadata.
    pub voters: usize,
    /// Bytes of a disk.
    pub disk_bytes: u64,
    /// Copies.
    pub copies: u8,
    /// Fewest live copies that serve; by default a majority.
    pub min_copies: Option<u8>,
    /// Placement groups.
    pub pgs: u32,
    /// Whether every node has a second disk that can be made to fail.
    pub faulty_disks: bool,
    /// Further flags of the nodes.
    pub flags: &'static [&'static str],
}

impl Default for RigPlan {
    /// Three nodes with one disk each, three copies.
    fn default() -> Self {
        Self {
            nodes: 3,
            voters: 3,
            disk_bytes: 2 << 30,
            copies: 3,
            min_copies: None,
            pgs: 16,
            faulty_disks: false,
            flags: &[],
        }
    }
}

/// Programs that this one starts.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `drystone`.
    pub drystone: PathBuf,
    /// The fio engine.
    pub engine: PathBuf,
}

impl Programs {
    /// Those beside this program.
    pub fn find() -> Result<Self, ChaosError> {
        let exe = std::env::current_exe().map_err(ChaosError::io("find this program"))?;
        let beside = |name: &str| {
            let path = exe.with_file_name(name);
            path.canonicalize()
                .map_err(ChaosError::io(format!("find {} (`make chaos` builds it)", path.display())))
        };
        Ok(Self { drystone: beside("drystone")?, engine: beside("libdrystone_fio.so")? })
    }
}

/// A cluster at work.
pub struct Rig {
    // Dropped in this order: nodes before the network and the directory that they use.
    fleet: Fleet,
    /// Its network.
    pub net: Net,
    /// Administration.
    pub admin: Cluster,
    programs: Programs,
    /// Nodes that ought to run.
    running: BTreeSet<usize>,
    /// Every node's second disk, where it has one.
    pub faulty: Vec<FaultyDisk>,
    mounts: Vec<Mount>,
    dir: tempfile::TempDir,
    stop: Stop,
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A process does not end before its operations have.
        self.faulty.iter().for_each(|disk| disk.set(Fault::None));
    }
}

impl Rig {
    /// Starts a cluster with its pool and waits until that is clean.
    pub fn start(
        plan: &RigPlan,
        isolation: &Isolation,
        programs: &Programs,
        generation: u32,
        stop: &Stop,
    ) -> Result<Self, ChaosError> {
        let base = isolation.base();
        let dir = tempfile::Builder::new().prefix("drystone-chaos-").tempdir_in(&base);
        let dir = dir.map_err(ChaosError::io(format!("make a directory in {}", base.display())))?;
        let mut fleet = Fleet::empty(FleetPlan {
            binary: programs.drystone.clone(),
            dir: dir.path().to_path_buf(),
            nodes: 0,
            disk_bytes: plan.disk_bytes,
            slices: SLICES,
            flags: ["--cores", "1", "--cpus", "none", "--meta-bytes", "16MiB"].map(String::from).to_vec(),
            log: "info".into(),
        })?;
        let (mut net, mut mounts) = (Net::new(isolation, generation)?, Vec::new());
        for index in 0..plan.nodes {
            add(&mut fleet, &mut net, &mut mounts, index < plan.voters)?;
        }
        fleet.add_flags(plan.flags);
        let mut faulty = Vec::new();
        for index in 0..if plan.faulty_disks { plan.nodes } else { 0 } {
            faulty.push(add_faulty(&mut fleet, index, plan.disk_bytes)?);
        }
        let admin = Cluster::at(&fleet.controls())?;
        let (programs, stop, running) = (programs.clone(), stop.clone(), BTreeSet::new());
        let mut rig = Self { fleet, net, admin, programs, running, faulty, mounts, dir, stop };
        rig.start_nodes(&(0..plan.nodes).collect::<Vec<_>>())?;
        rig.admin.create_pool(&PoolSpec {
            name: POOL.into(),
            copies: plan.copies,
            min_copies: plan.min_copies,
            pg_count: Some(plan.pgs),
            failure_domain: FailureDomain::Host,
            scrub: Default::default(),
        })?;
        rig.wait_clean()?;
        Ok(rig)
    }

    /// Control addresses of all nodes.
    pub fn controls(&self) -> Vec<SocketAddr> {
        self.fleet.controls()
    }

    /// How many nodes there are, running or not.
    pub fn nodes(&self) -> usize {
        self.fleet.nodes.len()
    }

    /// The directory of everything.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// An image as fio sees it.
    pub fn fio_target(&self, image: &str) -> Target {
        Target::Image {
            engine: self.programs.engine.clone(),
            cluster: self.fleet.cluster_flag(),
            image: image.into(),
        }
    }

    /// An error if somebody pressed Ctrl-C or a node has ended without being asked to.
    pub fn check(&mut self) -> Result<(), ChaosError> {
        self.stop.check()?;
        for index in self.running.clone() {
            if let Some(status) = self.fleet.ended(index) {
                let log = self.log_of(index).map(|log| last_lines(&log)).unwrap_or_default();
                return Err(ChaosError::Demand(format!("node {} ended with {status}:\n{log}", index + 1)));
            }
        }
        Ok(())
    }

    fn log_of(&self, index: usize) -> Option<PathBuf> {
        self.fleet.nodes.get(index).map(|node| node.dir.join("log"))
    }

    /// The nodes' logs.
    pub fn logs(&self) -> Vec<PathBuf> {
        (0..self.nodes()).filter_map(|index| self.log_of(index)).collect()
    }

    /// Starts nodes, all at once, and waits until each serves.
    pub fn start_nodes(&mut self, indices: &[usize]) -> Result<(), ChaosError> {
        for &index in indices {
            self.spawn(index)?;
        }
        for &index in indices {
            self.fleet.wait_ready(index)?;
            self.stop.check()?;
        }
        Ok(())
    }

    /// Starts a node's process.
    pub fn spawn(&mut self, index: usize) -> Result<(), ChaosError> {
        let fleet = &mut self.fleet;
        self.net.inside(index, || fleet.spawn(index).map_err(Into::into))?;
        self.running.insert(index);
        Ok(())
    }

    /// One more node, without metadata, not started.
    pub fn add(&mut self) -> Result<usize, ChaosError> {
        add(&mut self.fleet, &mut self.net, &mut self.mounts, false)
    }

    /// SIGKILL.
    pub fn kill(&mut self, index: usize) -> Result<(), ChaosError> {
        self.running.remove(&index);
        Ok(self.fleet.kill(index)?)
    }

    /// SIGTERM, and waits for the clean end.
    pub fn stop_node(&mut self, index: usize) -> Result<(), ChaosError> {
        self.running.remove(&index);
        Ok(self.fleet.stop(index)?)
    }

    /// SIGSTOP: the process is there and does nothing.
    pub fn pause(&mut self, index: usize) -> Result<(), ChaosError> {
        Ok(self.fleet.signal(index, Signal::STOP)?)
    }

    /// SIGCONT.
    pub fn resume(&mut self, index: usize) -> Result<(), ChaosError> {
        Ok(self.fleet.signal(index, Signal::CONT)?)
    }

    /// A node's metadata region.
    pub fn meta(&self, index: usize) -> Result<PathBuf, ChaosError> {
        let node = self.fleet.nodes.get(index).ok_or(CliError::NoCluster)?;
        Ok(node.dir.join("meta"))
    }

    /// Runs the command on this cluster and returns what it printed.
    pub fn command(&self, args: &[&str]) -> Result<String, ChaosError> {
        (self.caller())(args)
    }

    /// The same for another thread.
    pub fn caller(&self) -> impl Fn(&[&str]) -> Result<String, ChaosError> + Send + 'static {
        let (program, cluster) = (self.programs.drystone.clone(), self.fleet.cluster_flag());
        move |args| {
            let mut command = Command::new(&program);
            command.args(args).env("DRYSTONE_CLUSTER", &cluster).stdin(Stdio::null());
            Ok(String::from_utf8_lossy(&run_to_end(&mut command)?).into_owned())
        }
    }

    /// Whether the command exists in this version.
    pub fn has_command(&self, args: &[&str]) -> bool {
        let mut command = Command::new(&self.programs.drystone);
        run_to_end(command.args(args).arg("--help")).is_ok()
    }

    /// Waits for a condition that has to be looked for.
    pub fn wait_until(
        &mut self,
        what: &str,
        mut holds: impl FnMut(&mut Self) -> Result<bool, ChaosError>,
    ) -> Result<(), ChaosError> {
        let deadline = Deadline::after(LIMIT);
        while !holds(self)? {
            self.check()?;
            if deadline.passed() {
                let now = ClusterStatus::read(&mut self.admin).map(|status| status.summary());
                return Err(ChaosError::Demand(format!(
                    "gave up after {} s waiting for {what}; the cluster: {}",
                    LIMIT.as_secs(),
                    now.unwrap_or_else(|error| error.to_string())
                )));
            }
            std::thread::park_timeout(LOOK);
        }
        Ok(())
    }

    /// Lets things run as they are for so long.
    pub fn hold(&mut self, time: Duration) -> Result<(), ChaosError> {
        let deadline = Deadline::after(time);
        while !deadline.passed() {
            self.check()?;
            std::thread::park_timeout(LOOK.min(deadline.left()));
        }
        Ok(())
    }

    /// Waits until every node that ought to run is up and every placement group is clean.
    pub fn wait_clean(&mut self) -> Result<ClusterStatus, ChaosError> {
        let deadline = Deadline::after(LIMIT);
        loop {
            self.check()?;
            let status = ClusterStatus::read(&mut self.admin)?;
            if status.is_clean() && status.nodes_up() == self.running.len() {
                return Ok(status);
            }
            if deadline.passed() {
                let what = format!("every placement group to be clean ({})", status.summary());
                return Err(CliError::TimedOut { what, seconds: LIMIT.as_secs() }.into());
            }
            self.admin.wait_for_change()?;
        }
    }

    /// All placement groups' records.
    pub fn records(&mut self) -> Result<BTreeMap<PgId, PgRecord>, ChaosError> {
        let items = self.admin.range(key::PGS)?;
        let pgs = items.iter().filter_map(|item| Some((key::parse_pg(&item.key)?, item)));
        pgs.map(|(pg, item)| Ok((pg, decode(item)?))).collect()
    }

    /// A node's slices, as it registered.
    pub fn slices(&mut self, index: usize) -> Result<BTreeSet<SliceId>, ChaosError> {
        let found = self.admin.get::<Node>(&key::node(NodeId(index as u64 + 1)))?;
        let disks = found.map(|(node, _)| node.disks).unwrap_or_default();
        Ok(disks.iter().flat_map(|disk| disk.slices.iter().map(|slice| slice.id)).collect())
    }

    /// Of how many placement groups each node is primary.
    pub fn primaries(&mut self) -> Result<Vec<usize>, ChaosError> {
        let records = self.records()?;
        let mut counts = Vec::new();
        for index in 0..self.nodes() {
            let own = self.slices(index)?;
            let has = |record: &&PgRecord| record.primary.is_some_and(|slice| own.contains(&slice));
            counts.push(records.values().filter(has).count());
        }
        Ok(counts)
    }

    /// A random node that is primary of something.
    pub fn some_primary(&mut self, rng: &mut Rng) -> Result<usize, ChaosError> {
        let counts = self.primaries()?;
        let able: Vec<usize> =
            counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(index, _)| index).collect();
        let chosen = able.get(rng.below(able.len() as u64) as usize).copied();
        chosen.ok_or_else(|| ChaosError::Demand("no node is primary of anything".into()))
    }

    /// Waits until a node is primary of nothing and every placement group has a primary.
    pub fn wait_replaced(&mut self, index: usize) -> Result<(), ChaosError> {
        let own = self.slices(index)?;
        self.wait_until(&format!("others to replace node {}", index + 1), |rig| {
            let records = rig.records()?;
            let other = |record: &PgRecord| record.primary.is_some_and(|slice| !own.contains(&slice));
            Ok(records.values().all(other))
        })
    }

    /// The node that leads the metadata group, by what nodes say of themselves.
    pub fn meta_leader(&mut self) -> Result<usize, ChaosError> {
        let mut leader = None;
        self.wait_until("a leader of the metadata group", |rig| {
            for index in rig.running.clone() {
                let http =
                    rig.fleet.nodes.get(index).and_then(|node| node.addresses.as_ref()).map(|at| at.http);
                let page = http.and_then(|http| scrape(http).ok()).unwrap_or_default();
                if page.lines().any(|line| line.starts_with("drystone_raft_leader") && line.ends_with(" 1")) {
                    leader = Some(index);
                }
            }
            Ok(leader.is_some())
        })?;
        leader.ok_or_else(|| ChaosError::Demand("the metadata group has no leader".into()))
    }

    /// The sum of all placement groups' epochs: rises with every change of members or primaries.
    pub fn epochs(&mut self) -> Result<u64, ChaosError> {
        Ok(self.records()?.values().map(|record| record.epoch.0).sum())
    }

    /// Compares all copies deeply; an error if any is bad or different.
    pub fn scrub(&mut self) -> Result<(), ChaosError> {
        let text = self.command(&["--json", "pg", "scrub", "--deep", "--pool", POOL])?;
        let found: serde_json::Value = serde_json::from_str(&text).map_err(|error| {
            ChaosError::Demand(format!("the scrub's answer is not understood ({error}): {text}"))
        })?;
        let of = |name: &str| -> u64 {
            let records = found.as_object().into_iter().flatten();
            records.filter_map(|(_, record)| record.get(name)?.as_u64()).sum()
        };
        match (of("errors"), of("objects")) {
            (0, 0) => Err(ChaosError::Demand("the scrub looked at nothing".into())),
            (0, _) => Ok(()),
            (bad, all) => Err(ChaosError::Demand(format!(
                "a deep scrub found {bad} of {all} objects with a bad or different copy: {text}"
            ))),
        }
    }

    /// Stops every node cleanly and checks every disk with all its data.
    pub fn end(&mut self) -> Result<(), ChaosError> {
        self.running.clear();
        self.fleet.stop_all()?;
        self.check_disks()?;
        self.no_panics()
    }

    /// An error if a node's log tells of a panic.
    fn no_panics(&self) -> Result<(), ChaosError> {
        for log in self.logs() {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(line) = text.lines().find(|line| line.contains("panicked at")) {
                return Err(ChaosError::Demand(format!("{}: {line}", log.display())));
            }
        }
        Ok(())
    }
}

fn add(fleet: &mut Fleet, net: &mut Net, mounts: &mut Vec<Mount>, voter: bool) -> Result<usize, ChaosError> {
    let control = net.add()?;
    let place = fleet.next_dir().join("disks");
    std::fs::create_dir_all(&place).map_err(ChaosError::io(format!("make {}", place.display())))?;
    if net.has_links() {
        isolate::mount_tmpfs(&place, None)?;
        mounts.push(Mount(place.clone()));
    }
    Ok(fleet.add(control, place.join("disk"), voter)?)
}
