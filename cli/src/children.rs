//! Nodes as child processes on this machine: for the demonstration, the benchmark and the process tests.
//!
//! Every node gets a directory with its disk file, its metadata region and its log. Control ports are
//! reserved by binding port 0 first, all others are the kernel's choice. A node counts as started when it
//! has printed its `ready` line. Dropping a `Fleet` kills what still runs; a node also ends when the
//! process that started it does.

use crate::deadline::Deadline;
use crate::error::CliError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use wire::{ClusterId, NodeId};

/// How long a node may take until it serves, on a slow machine under load.
pub const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long a node may take to stop cleanly.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Longest `ready` line.
const READY_LINE_BYTES_MAX: usize = 64 << 10;

/// Where a node serves: what it prints when it is ready.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Addresses {
    /// The node.
    pub node: NodeId,
    /// Its control core.
    pub control: SocketAddr,
    /// Its metrics page.
    pub http: SocketAddr,
}

/// A cluster to be made of child processes.
#[derive(Clone, Debug)]
pub struct FleetPlan {
    /// The `drystone` program.
    pub binary: PathBuf,
    /// Directory for the nodes' directories; must exist.
    pub dir: PathBuf,
    /// Nodes, all of them voters.
    pub nodes: u64,
    /// Bytes of each node's disk file (sparse).
    pub disk_bytes: u64,
    /// Slices of each disk.
    pub slices: u32,
    /// Further flags of `drystone node`.
    pub flags: Vec<String>,
    /// `RUST_LOG` of the nodes.
    pub log: String,
}

/// A node of the fleet.
pub struct FleetNode {
    /// Its number.
    pub id: NodeId,
    /// Its host's name.
    pub host: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Its disk.
    pub disk: PathBuf,
    /// Further disks, if it has any.
    pub more_disks: Vec<PathBuf>,
    /// Its control address.
    pub control: SocketAddr,
    /// Whether it keeps metadata.
    pub voter: bool,
    /// Where it serves, once it does.
    pub addresses: Option<Addresses>,
    child: Option<Child>,
}

/// Nodes on this machine.
pub struct Fleet {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its nodes.
    pub nodes: Vec<FleetNode>,
    plan: FleetPlan,
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> CliError {
    let what = what.into();
    move |source| CliError::Io { what, source }
}

/// Where ports for nodes are looked for: below those that the kernel gives to outgoing connections (32768 and up by
/// default), so that none of these takes a port between its choice and the node's start, or while a node is down.
const NODE_PORTS: std::ops::Range<u16> = 16_000..32_000;

/// Ports that nothing uses now; none is given twice by this process. Where they begin is drawn, so that processes
/// that run side by side do not meet.
#[allow(clippy::disallowed_methods, reason = "reserves ports for child processes, outside the seam")]
pub fn free_ports(count: usize) -> Result<Vec<SocketAddr>, CliError> {
    static NEXT: Mutex<Option<u16>> = Mutex::new(None);
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    let width = NODE_PORTS.end - NODE_PORTS.start;
    let mut at = match *next {
        Some(at) => at,
        None => (crate::disks::random_u128()? % u128::from(width)) as u16,
    };
    let mut free = Vec::new();
    for _ in 0..width {
        if free.len() == count {
            break;
        }
        let addr = SocketAddr::from(([127, 0, 0, 1], NODE_PORTS.start + at));
        at = (at + 1) % width;
        if std::net::TcpListener::bind(addr).is_ok() {
            free.push(addr);
        }
    }
    *next = Some(at);
    if free.len() < count {
        return Err(io("reserve a port")(std::io::ErrorKind::AddrInUse.into()));
    }
    Ok(free)
}

impl Fleet {
    /// Makes directories and prepares disks; starts nothing.
    pub fn prepare(plan: FleetPlan) -> Result<Self, CliError> {
        let controls = free_ports(plan.nodes as usize)?;
        let mut fleet = Self { cluster: ClusterId(crate::disks::random_u128()?), nodes: Vec::new(), plan };
        for control in controls {
            let disk = fleet.next_dir().join("disk");
            fleet.add(control, disk, true)?;
        }
        Ok(fleet)
    }

    /// A fleet without nodes yet, whatever the plan says of their number: `add` brings them.
    pub fn empty(plan: FleetPlan) -> Result<Self, CliError> {
        Ok(Self { cluster: ClusterId(crate::disks::random_u128()?), nodes: Vec::new(), plan })
    }

    /// The directory of the node that `add` makes next.
    pub fn next_dir(&self) -> PathBuf {
        self.plan.dir.join(format!("node{}", self.nodes.len() + 1))
    }

    /// Makes the next node's directory and prepares its disk; starts nothing. All voters must be there before
    /// the first node is started.
    pub fn add(&mut self, control: SocketAddr, disk: PathBuf, voter: bool) -> Result<usize, CliError> {
        let (index, dir) = (self.nodes.len(), self.next_dir());
        std::fs::create_dir_all(&dir).map_err(io(format!("make {}", dir.display())))?;
        let id = NodeId(index as u64 + 1);
        let (host, more_disks) = (format!("host{id}"), Vec::new());
        let node =
            FleetNode { id, host, dir, disk, more_disks, control, voter, addresses: None, child: None };
        self.nodes.push(node);
        self.prepare_disk(index)?;
        Ok(index)
    }

    /// Gives a node that does not run one more disk, and prepares it.
    pub fn add_disk(&mut self, index: usize, disk: PathBuf) -> Result<(), CliError> {
        self.prepare_at(&disk)?;
        self.node(index)?.more_disks.push(disk);
        Ok(())
    }

    /// Prepares a node's disk. The file is made if it does not exist.
    pub fn prepare_disk(&self, index: usize) -> Result<(), CliError> {
        self.prepare_at(&self.nodes.get(index).ok_or(CliError::NoCluster)?.disk)
    }

    fn prepare_at(&self, disk: &Path) -> Result<(), CliError> {
        run_to_end(
            Command::new(&self.plan.binary)
                .args(["disk", "prepare"])
                .arg(disk)
                .args(["--create", &self.plan.disk_bytes.to_string()])
                .args(["--slices", &self.plan.slices.to_string()])
                .args(["--cluster-id", &self.cluster.to_string()]),
        )
        .map(|_| ())
    }

    /// Control addresses of all nodes, as `--cluster` wants them.
    pub fn cluster_flag(&self) -> String {
        self.nodes.iter().map(|node| node.control.to_string()).collect::<Vec<_>>().join(",")
    }

    /// Control addresses of all nodes.
    pub fn controls(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.control).collect()
    }

    /// The command line of a node.
    pub fn command(&self, node: &FleetNode) -> Command {
        let mut command = Command::new(&self.plan.binary);
        command.arg("node").args(["--cluster-id", &self.cluster.to_string()]);
        for voter in self.nodes.iter().filter(|node| node.voter) {
            command.args(["--voter", &format!("{}@{}", voter.id, voter.control)]);
        }
        command
            .args(["--id", &node.id.to_string()])
            .args(["--host", &node.host])
            .args(["--control", &node.control.to_string()])
            .args(["--http", &SocketAddr::new(node.control.ip(), 0).to_string()])
            .arg("--data-dir")
            .arg(&node.dir)
            .arg("--disk")
            .arg(&node.disk)
            .args(node.more_disks.iter().flat_map(|disk| [Path::new("--disk"), disk.as_path()]))
            .arg("--die-with-parent")
            .args(&self.plan.flags)
            .env("RUST_LOG", &self.plan.log)
            // Ctrl-C at the terminal is for the parent, which stops its children in its own order.
            .process_group(0)
            .stdin(Stdio::null());
        command
    }

    /// Further flags for nodes started from now on.
    pub fn add_flags(&mut self, flags: &[&str]) {
        self.plan.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
    }

    /// Starts all nodes at once and waits until each is ready.
    pub fn start_all(&mut self) -> Result<(), CliError> {
        for index in 0..self.nodes.len() {
            self.spawn(index)?;
        }
        for index in 0..self.nodes.len() {
            self.wait_ready(index)?;
        }
        Ok(())
    }

    fn node(&mut self, index: usize) -> Result<&mut FleetNode, CliError> {
        let count = self.nodes.len();
        self.nodes.get_mut(index).ok_or_else(|| CliError::Refused {
            what: format!("use node at index {index}"),
            why: format!("the fleet has {count}"),
        })
    }

    /// Starts a node without waiting for it. Its log is appended to `log` in its directory.
    pub fn spawn(&mut self, index: usize) -> Result<(), CliError> {
        let node = self.nodes.get(index).ok_or(CliError::NoCluster)?;
        let log_path = node.dir.join("log");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(io(format!("open {}", log_path.display())))?;
        let mut command = self.command(node);
        command.stdout(Stdio::piped()).stderr(log);
        let child = command.spawn().map_err(io(format!("start {}", self.plan.binary.display())))?;
        let node = self.node(index)?;
        node.addresses = None;
        node.child = Some(child);
        Ok(())
    }

    /// Waits for a node's `ready` line.
    pub fn wait_ready(&mut self, index: usize) -> Result<&Addresses, CliError> {
        let node = self.node(index)?;
        let failed = |why: String| CliError::Node { node: node.id, why };
        let stdout = node.child.as_mut().and_then(|child| child.stdout.as_mut());
        let stdout = stdout.ok_or_else(|| failed("it was not started".into()))?;
        match ready_line(stdout, Deadline::after(READY_LIMIT)).map_err(io("read a node's output"))? {
            Ready::Yes(addresses) => Ok(node.addresses.insert(addresses)),
            Ready::Ended => {
                let log = last_lines(&node.dir.join("log"));
                Err(CliError::Node { node: node.id, why: format!("it ended before it was ready:\n{log}") })
            }
            Ready::TooLate => Err(CliError::TimedOut {
                what: format!("node {} to be ready:\n{}", node.id, last_lines(&node.dir.join("log"))),
                seconds: READY_LIMIT.as_secs(),
            }),
        }
    }

    /// The process number of a running node.
    pub fn pid(&self, index: usize) -> Option<u32> {
        self.nodes.get(index)?.child.as_ref().map(Child::id)
    }

    /// How a node's process ended, if it was started, has ended, and nobody has asked it to.
    pub fn ended(&mut self, index: usize) -> Option<std::process::ExitStatus> {
        self.nodes.get_mut(index)?.child.as_mut()?.try_wait().ok().flatten()
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self, index: usize) -> Result<(), CliError> {
        let node = self.node(index)?;
        if let Some(mut child) = node.child.take() {
            child.kill().and_then(|()| child.wait()).map_err(io(format!("kill node {}", node.id)))?;
        }
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, index: usize, signal: Signal) -> Result<(), CliError> {
        let pid = self.pid(index).and_then(|pid| Pid::from_raw(pid as i32));
        let pid =
            pid.ok_or(CliError::Refused { what: "signal a node".into(), why: "it is not running".into() })?;
        kill_process(pid, signal).map_err(|error| io("signal a node")(error.into()))
    }

    /// SIGTERM, and waits for a clean end; an unclean one is an error.
    pub fn stop(&mut self, index: usize) -> Result<(), CliError> {
        self.signal(index, Signal::TERM)?;
        self.wait_for_stop(index)
    }

    /// Waits for the clean end of a node that was told to stop. Told once: a node takes a second signal for
    /// impatience, and ends at once.
    fn wait_for_stop(&mut self, index: usize) -> Result<(), CliError> {
        let node = self.node(index)?;
        let id = node.id;
        let Some(mut child) = node.child.take() else { return Ok(()) };
        let Some(status) =
            wait_for_end(&mut child, Deadline::after(STOP_LIMIT)).map_err(io("wait for a node"))?
        else {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(CliError::TimedOut {
                what: format!("node {id} to stop"),
                seconds: STOP_LIMIT.as_secs(),
            });
        };
        if status.success() {
            return Ok(());
        }
        let log = last_lines(&self.node(index)?.dir.join("log"));
        Err(CliError::Node { node: id, why: format!("it ended with {status}:\n{log}") })
    }

    /// Stops every node that runs, all at the same time.
    pub fn stop_all(&mut self) -> Result<(), CliError> {
        for index in 0..self.nodes.len() {
            if self.pid(index).is_some() {
                self.signal(index, Signal::TERM)?;
            }
        }
        let mut first = Ok(());
        for index in 0..self.nodes.len() {
            if self.pid(index).is_some() {
                first = first.and(self.wait_for_stop(index));
            }
        }
        first
    }

    /// How a node that should not be able to run ends: exit code and what it said.
    pub fn run_expecting_failure(&mut self, index: usize) -> Result<(i32, String), CliError> {
        let node = self.nodes.get(index).ok_or(CliError::NoCluster)?;
        let child = self.command(node).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(io("start a node"))?;
        let status = wait_for_end(&mut child, Deadline::after(READY_LIMIT)).map_err(io("wait for a node"))?;
        let Some(status) = status else {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(CliError::TimedOut { what: "a node to fail".into(), seconds: READY_LIMIT.as_secs() });
        };
        let mut said = String::new();
        if let Some(stderr) = child.stderr.as_mut() {
            stderr.read_to_string(&mut said).map_err(io("read a node's errors"))?;
        }
        Ok((status.code().unwrap_or(-1), said))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut child) = node.child.take() {
                let _ = child.kill().and_then(|()| child.wait());
            }
        }
    }
}

/// Waits for a child's end without a busy loop: its pidfd becomes readable then.
pub fn wait_for_end(
    child: &mut Child,
    deadline: Deadline,
) -> std::io::Result<Option<std::process::ExitStatus>> {
    let pid = Pid::from_raw(child.id() as i32).ok_or(std::io::ErrorKind::NotFound)?;
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if deadline.passed() {
            return Ok(None);
        }
        wait_readable(&fd, deadline.left())?;
    }
}

/// Sleeps until a descriptor is readable or the time is over. A signal ends it early.
pub fn wait_readable(fd: &impl std::os::fd::AsFd, limit: Duration) -> std::io::Result<()> {
    let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

enum Ready {
    Yes(Addresses),
    Ended,
    TooLate,
}

fn ready_line(stdout: &mut ChildStdout, deadline: Deadline) -> std::io::Result<Ready> {
    let mut text = Vec::new();
    loop {
        if let Some(addresses) = parse_ready(&text) {
            return Ok(Ready::Yes(addresses));
        }
        if deadline.passed() || text.len() > READY_LINE_BYTES_MAX {
            return Ok(Ready::TooLate);
        }
        wait_readable(stdout, deadline.left().min(Duration::from_millis(200)))?;
        let mut fds = [PollFd::new(stdout, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? == 0 {
            continue;
        }
        let mut part = [0u8; 4096];
        match stdout.read(&mut part)? {
            0 => return Ok(Ready::Ended),
            bytes => text.extend_from_slice(part.get(..bytes).unwrap_or(&[])),
        }
    }
}

fn parse_ready(text: &[u8]) -> Option<Addresses> {
    let text = std::str::from_utf8(text).ok()?;
    let complete = text.rfind('\n').and_then(|end| text.get(..end))?;
    complete.lines().find_map(|line| serde_json::from_str(line.strip_prefix("ready ")?).ok())
}

/// Runs a program to its end; a failure carries what it said.
pub fn run_to_end(command: &mut Command) -> Result<Vec<u8>, CliError> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.stdin(Stdio::null()).output().map_err(|error| CliError::Program {
        program: program.clone(),
        why: format!("cannot be started: {error}"),
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(CliError::Program { program, why: format!("ended with {}: {}", output.status, said.trim()) })
}

/// The end of a log, for error messages.
pub fn last_lines(path: &Path) -> String {
    const LINES: usize = 12;
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(LINES)..).unwrap_or(&[]).join("\n")
}
