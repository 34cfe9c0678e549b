//! A network namespace per node, joined by a bridge: links that can be cut, one direction of one pair of nodes
//! at a time too, and slowed down. Clients are at the bridge.
//!
//! A namespace is held by an open file of this process, so it ends with this process and needs no name. A
//! direction is cut by giving the sender a false hardware address for the receiver: frames are sent and nobody
//! takes them, as with a broken switch, and neither side is told.

use crate::error::ChaosError;
use crate::isolate::{BRIDGE, Isolation, ip};
use cli::children::{free_ports, run_to_end};
use cli::error::CliError;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

/// The bridge's address: where clients are. The network is the one that is set aside for documentation, so
/// that a packet which escaped would reach nobody.
pub const HUB: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
/// Control port of every node: nobody else uses a node's namespace.
const PORT: u16 = 7700;

/// How a slow link is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlowBy {
    /// The kernel's emulator of networks.
    Netem,
    /// A token bucket so narrow that it queues and drops: kernels without netem.
    Bucket,
}

/// A node's end.
struct End {
    /// Its namespace; `None` on loopback.
    space: Option<File>,
    /// Our end of its link.
    link: String,
    control: SocketAddr,
}

/// The network of one cluster.
pub struct Net {
    hub: Option<File>,
    ends: Vec<End>,
    /// Tells apart the links of clusters that follow each other: the kernel removes old ones in its own time.
    generation: u32,
}

#[allow(clippy::disallowed_methods, reason = "a handle to a namespace, not a disk")]
fn open_space(path: &str) -> Result<File, ChaosError> {
    File::open(path).map_err(ChaosError::io(format!("open {path}")))
}

fn address(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, index as u8 + 1)
}

fn hardware(index: usize) -> String {
    format!("02:00:00:00:00:{:02x}", index + 1)
}

fn enter(space: &File) -> Result<(), ChaosError> {
    move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| ChaosError::io("enter a network namespace")(error.into()))
}

/// A process in a new network namespace, until we have a handle to it.
struct Holder(Child);

impl Holder {
    fn start() -> Result<Self, ChaosError> {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--", "sh", "-c"])
            .arg("ip link set lo up && echo up && exec cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut holder = Self(child.map_err(ChaosError::io("start a process in a namespace"))?);
        let mut line = String::new();
        let said = holder.0.stdout.as_mut().map(|out| BufReader::new(out).read_line(&mut line));
        match said {
            Some(Ok(_)) if line.trim() == "up" => Ok(holder),
            _ => Err(ChaosError::Impossible("no process runs in a network namespace of its own".into())),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

impl Net {
    /// A network without nodes.
    pub fn new(isolation: &Isolation, generation: u32) -> Result<Self, ChaosError> {
        let hub = match isolation {
            Isolation::Own => Some(open_space("/proc/thread-self/ns/net")?),
            Isolation::Shared { .. } => None,
        };
        Ok(Self { hub, ends: Vec::new(), generation })
    }

    /// Connects one more node; returns its control address.
    pub fn add(&mut self) -> Result<SocketAddr, ChaosError> {
        let index = self.ends.len();
        let end = if self.hub.is_some() {
            let link = format!("c{}n{}", self.generation, index + 1);
            let space = self.connect(index, &link)?;
            End { space: Some(space), link, control: SocketAddr::new(IpAddr::V4(address(index)), PORT) }
        } else {
            let control = free_ports(1)?.first().copied().ok_or(CliError::NoCluster)?;
            End { space: None, link: String::new(), control }
        };
        let control = end.control;
        self.ends.push(end);
        if self.hub.is_some() {
            self.inside(index, || {
                ip(&format!("addr add {}/24 dev eth0", address(index)))?;
                ip("link set eth0 up")
            })?;
        }
        Ok(control)
    }

    fn connect(&self, index: usize, link: &str) -> Result<File, ChaosError> {
        let holder = Holder::start()?;
        let pid = holder.0.id();
        let mac = hardware(index);
        ip(&format!("link add {link} type veth peer name eth0 address {mac} netns {pid}"))?;
        ip(&format!("link set {link} master {BRIDGE} up"))?;
        open_space(&format!("/proc/{pid}/ns/net"))
    }

    /// Whether links can be cut.
    pub fn has_links(&self) -> bool {
        self.hub.is_some()
    }

    fn end(&self, index: usize) -> Result<&End, ChaosError> {
        self.ends.get(index).ok_or_else(|| ChaosError::Impossible(format!("there is no node {}", index + 1)))
    }

    /// Runs something where a node is: processes started there see its network only.
    pub fn inside<T>(
        &self,
        index: usize,
        act: impl FnOnce() -> Result<T, ChaosError>,
    ) -> Result<T, ChaosError> {
        let (Some(hub), Some(space)) = (&self.hub, &self.end(index)?.space) else { return act() };
        enter(space)?;
        let result = act();
        enter(hub)?;
        result
    }

    fn link(&self, index: usize) -> Result<&str, ChaosError> {
        match &self.end(index)?.link {
            link if link.is_empty() => Err(ChaosError::Impossible("nodes share the loopback device".into())),
            link => Ok(link),
        }
    }

    /// Pulls a node's cable.
    pub fn cut(&self, index: usize) -> Result<(), ChaosError> {
        ip(&format!("link set {} down", self.link(index)?))
    }

    /// Plugs it in again.
    pub fn join(&self, index: usize) -> Result<(), ChaosError> {
        ip(&format!("link set {} up", self.link(index)?))
    }

    /// From now on nothing that `from` sends reaches `to`.
    pub fn lose(&self, from: usize, to: usize) -> Result<(), ChaosError> {
        self.link(from)?;
        let nobody = format!("02:00:00:00:ff:{:02x}", to + 1);
        self.inside(from, || {
            ip(&format!("neigh replace {} lladdr {nobody} nud permanent dev eth0", address(to)))
        })
    }

    /// From now on it does again.
    pub fn deliver(&self, from: usize, to: usize) -> Result<(), ChaosError> {
        self.link(from)?;
        self.inside(from, || ip(&format!("neigh del {} dev eth0", address(to))))
    }

    /// Makes a node's link slow and lossy in both directions, by what the kernel has.
    pub fn slow(&self, index: usize) -> Result<SlowBy, ChaosError> {
        let netem = |device: &str| tc(&format!("qdisc add dev {device} root netem delay 20ms 10ms loss 1%"));
        let bucket = |device: &str| {
            tc(&format!("qdisc add dev {device} root tbf rate 16mbit burst 16kb latency 40ms"))
        };
        let link = self.link(index)?.to_string();
        let by = if netem(&link).is_ok() { SlowBy::Netem } else { SlowBy::Bucket };
        match by {
            SlowBy::Netem => self.inside(index, || netem("eth0"))?,
            SlowBy::Bucket => {
                bucket(&link)?;
                self.inside(index, || bucket("eth0"))?;
            }
        }
        Ok(by)
    }

    /// Makes it as fast as it was.
    pub fn quicken(&self, index: usize) -> Result<(), ChaosError> {
        tc(&format!("qdisc del dev {} root", self.link(index)?))?;
        self.inside(index, || tc("qdisc del dev eth0 root"))
    }
}

fn tc(words: &str) -> Result<(), ChaosError> {
    run_to_end(Command::new("tc").args(words.split_whitespace())).map(|_| ()).map_err(Into::into)
}
