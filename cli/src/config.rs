//! A node's configuration: one TOML file, or the same values as flags of `drystone node`.
//!
//! Two tables keep apart what must be equal on every node (`[cluster]`) and what belongs to this process
//! alone (`[node]`). Each key is documented exactly once, here, at the field that receives it; the
//! `section!` macro keeps that text, and `docs/config.md` is printed from it (`reference`). Unknown keys
//! are refused: a misspelt key that is silently ignored is the worst kind of setting.

use crate::units::ByteSize;
use net_rdma::{Choice, ChoiceError};
use reactor::backend::Access;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use thiserror::Error;
use wire::{ClusterId, NodeId};

/// Port of the control core when the configuration names none.
pub const DEFAULT_CONTROL_PORT: u16 = 7700;
/// Port of the metrics page when the configuration names none.
pub const DEFAULT_HTTP_PORT: u16 = 7780;
/// Registered buffers of one data core: a client connection at full depth needs about 16 MiB, recovery
/// as much again.
pub const DEFAULT_BUFFER_BYTES: ByteSize = ByteSize(64 << 20);
/// Log and snapshots of the metadata group on a voter.
pub const DEFAULT_META_BYTES: ByteSize = ByteSize(consensus::bounds::REGION_BYTES_DEFAULT);
/// How long a loop polls after its last completion before it sleeps, microseconds.
pub const DEFAULT_SPIN_US: u32 = 50;
/// Smallest and largest buffer memory of one core that makes sense.
pub const BUFFER_BYTES_RANGE: std::ops::RangeInclusive<u64> = 8 << 20..=64 << 30;
/// Smallest and largest metadata region.
pub const META_BYTES_RANGE: std::ops::RangeInclusive<u64> = consensus::bounds::REGION_BYTES_MIN..=64 << 30;
/// Reading of scrubs, per node and second.
pub const DEFAULT_SCRUB_RATE: ByteSize = ByteSize(engine::SCRUB_BYTES_PER_SECOND);
/// Slowest and fastest scrubs: slower ones would not get through a disk in its life.
pub const SCRUB_RATE_RANGE: std::ops::RangeInclusive<u64> = 1 << 20..=64 << 30;
/// Shortest and longest time until a hanging disk is given up, in seconds: it is looked at once per second, and
/// a healthy drive may pause for one.
pub const DISK_TIMEOUT_RANGE: std::ops::RangeInclusive<u64> = 2..=600;
/// Longest time until an idle disk is asked whether it is there, in seconds: a day. 0: never.
pub const DISK_PROBE_RANGE: std::ops::RangeInclusive<u64> = 0..=86_400;
/// Data cores of one node: core numbers are 16 bits, and no machine here has more CPUs than this.
pub const CORES_MAX: u16 = 1024;

/// One documented key.
pub struct KeyDoc {
    /// As written in the file.
    pub key: &'static str,
    /// What the value looks like.
    pub example: &'static str,
    /// What happens without it.
    pub default: &'static str,
    /// What it means: the field's own doc comment.
    pub doc: &'static [&'static str],
}

macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $name:ident {
            $(
                $(#[doc = $doc:literal])+
                #[example = $example:literal]
                #[default = $default:literal]
                $key:ident: $type:ty,
            )+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $key: Option<$type>,)+
        }

        impl $name {
            /// What the table is for.
            pub const ABOUT: &'static [&'static str] = &[$($about),+];
            /// Its keys, in the order of definition.
            pub const KEYS: &'static [KeyDoc] = &[$(KeyDoc {
                key: stringify!($key),
                example: $example,
                default: $default,
                doc: &[$($doc),+],
            }),+];

            /// Takes from `other` every key it sets.
            pub fn merge(&mut self, other: Self) {
                $(if other.$key.is_some() { self.$key = other.$key; })+
            }
        }
    };
}

section! {
    /// What every node of the cluster must agree on. Copy this table to all hosts unchanged.
    ClusterSection {
        /// The cluster's identity: 32 hexadecimal digits, drawn once (`drystone node --new-config` prints a
        /// fresh one). It is written into every disk; a disk or node of another cluster is refused.
        #[example = "\"9f1c0a3e5b7d42689f1c0a3e5b7d4268\""]
        #[default = "none: it must be given"]
        id: ClusterId,
        /// The nodes that keep the metadata when the cluster is new (1, 3, 5 or 7 of them) and where their control
        /// cores are reached. Later changes (`drystone meta voters`) are kept with the metadata and win; a node that
        /// is not named here asks these. Never name a new node here before it votes.
        #[example = "[{ node = 1, address = \"10.0.0.1:7700\" }, { node = 2, address = \"10.0.0.2:7700\" }, { node = 3, address = \"10.0.0.3:7700\" }]"]
        #[default = "none: it must be given"]
        voters: Vec<Voter>,
    }
}

section! {
    /// What belongs to this process alone.
    NodeSection {
        /// The node's number: chosen by you, unique in the cluster, never used again for another machine.
        #[example = "1"]
        #[default = "none: it must be given"]
        id: NodeId,
        /// Name of the host, the failure domain: two copies of an object never share it.
        #[example = "\"rack2-host1\""]
        #[default = "the machine's host name"]
        host: String,
        /// Where the control core listens, for nodes, clients and tools. Port 0 lets the kernel choose
        /// (only for nodes that are not voters, or the single voter of a cluster).
        #[example = "\"10.0.0.1:7700\""]
        #[default = "the address given for this node under `voters`"]
        control: SocketAddr,
        /// Where the data cores listen, for clients and other nodes: the first at this address, the next
        /// at the next port, and so on. Port 0 lets the kernel choose for each.
        #[example = "\"10.0.0.1:7710\""]
        #[default = "the control address's IP, ports chosen by the kernel"]
        data: SocketAddr,
        /// Where `/metrics` and `/links` are served over HTTP. Port 0 lets the kernel choose.
        #[example = "\"10.0.0.1:7780\""]
        #[default = "the control address's IP, port 7780"]
        http: SocketAddr,
        /// Directory of the node's own files: the metadata region (`meta`), empty on a node that is no voter. Made
        /// when missing.
        #[example = "\"/var/lib/drystone\""]
        #[default = "none: it must be given"]
        data_dir: PathBuf,
        /// Disks prepared with `drystone disk prepare`: block devices or files. May be empty on a node
        /// that only votes.
        #[example = "[\"/dev/disk/by-id/nvme-SERIAL\", \"/dev/sdb\"]"]
        #[default = "no disks"]
        disks: Vec<PathBuf>,
        /// Data cores. Slices are dealt out to them evenly; the number may change at any restart.
        #[example = "4"]
        #[default = "the CPUs this process may use, at most one per slice"]
        cores: u16,
        /// CPUs to pin the data cores to, one number per core; the control core is never pinned. An empty list
        /// leaves the choice to the kernel.
        #[example = "[2, 3, 4, 5]"]
        #[default = "the first CPUs this process may use, when there are enough of them"]
        cpus: Vec<u16>,
        /// How long a core polls after the last completion before it sleeps, in microseconds. Longer costs
        /// CPU when nearly idle and saves wake-ups.
        #[example = "50"]
        #[default = "50"]
        spin_us: u32,
        /// Memory for I/O buffers of each data core. Registered with the kernel where the memlock limit
        /// allows it; a log line says where it does not.
        #[example = "\"64MiB\""]
        #[default = "64MiB"]
        buffer_bytes: ByteSize,
        /// Size of the metadata region in `data_dir`, fixed when the node first starts. The same on every
        /// voter: the smallest bounds what all can keep.
        #[example = "\"64MiB\""]
        #[default = "64MiB"]
        meta_bytes: ByteSize,
        /// Bytes that scrubs on this node may read from its own disks per second; the other copies' nodes read as
        /// much each. How often a pool is scrubbed is set with the pool.
        #[example = "\"100MiB\""]
        #[default = "48MiB"]
        scrub_rate: ByteSize,
        /// How data travels between this node, others and clients: `auto` takes RDMA where both ends reach each other
        /// by it and TCP otherwise, `rdma` does not start without a device, `tcp` is TCP only.
        #[example = "\"rdma\""]
        #[default = "auto"]
        transport: String,
        /// The RDMA device.
        #[example = "\"mlx5_0\""]
        #[default = "the one that has the address of `data`, or else the first that works"]
        rdma_device: String,
        /// Seconds after which a disk that ends none of its operations is given up: its slices leave their
        /// placement groups, which go on with other copies. Until then their writes wait. 2 to 600.
        #[example = "30"]
        #[default = "10"]
        disk_timeout: u32,
        /// Seconds without anything to do after which a disk is asked whether it is still there, by reading 4 KiB of
        /// it: otherwise nobody would notice that an idle disk is gone. It keeps drives with moving parts awake: where
        /// they are to sleep, set 0, which means never, and a `disk_timeout` longer than they need to wake. 0 to 86400.
        #[example = "600"]
        #[default = "60"]
        disk_probe: u32,
        /// Whether drives are polled for completions instead of interrupting: `auto` polls NVMe drives whose driver
        /// has queues for that (`nvme.poll_queues=N` on the kernel's command line, one for each core), `never` none.
        /// It saves each operation its interrupt, and keeps a core busy while one is under way.
        #[example = "\"never\""]
        #[default = "auto"]
        poll: Poll,
        /// How NVMe drives are read and written: `block` through the kernel's block layer, `passthrough` with NVMe
        /// commands of Drystone's own (io_uring commands; Linux 6.8 or later). Then every disk of the node has to be an
        /// NVMe namespace, or a partition of one, with a generic character device (`/dev/ng0n1`) and sectors without
        /// metadata: one that is not is refused. A disk that a running node takes goes through the block layer until
        /// its restart. The node needs CAP_SYS_ADMIN, or write access to those devices.
        #[example = "\"passthrough\""]
        #[default = "block"]
        nvme: Nvme,
    }
}

/// How NVMe drives are read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Nvme {
    /// Through the block layer.
    #[default]
    Block,
    /// With commands of our own.
    Passthrough,
}

impl From<Nvme> for Access {
    fn from(nvme: Nvme) -> Self {
        match nvme {
            Nvme::Block => Self::Block,
            Nvme::Passthrough => Self::Passthrough,
        }
    }
}

/// Whether drives are polled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Poll {
    /// Those that have queues for it.
    #[default]
    Auto,
    /// None.
    Never,
}

/// A member of the metadata group.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Voter {
    /// Its node number.
    pub node: NodeId,
    /// Its control core's address.
    pub address: SocketAddr,
}

impl std::str::FromStr for Voter {
    type Err = String;

    /// `1@10.0.0.1:7700`, as on the command line.
    fn from_str(text: &str) -> Result<Self, String> {
        let (node, address) = text.split_once('@').ok_or("write NODE@IP:PORT, like 1@10.0.0.1:7700")?;
        Ok(Self {
            node: node.parse().map_err(|_| format!("'{node}' is not a node number"))?,
            address: address.parse().map_err(|_| format!("'{address}' is not an IP:PORT address"))?,
        })
    }
}

/// The file as a whole, nothing required yet: flags may add what it leaves out.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// Shared by all nodes.
    #[serde(default)]
    pub cluster: ClusterSection,
    /// This process.
    #[serde(default)]
    pub node: NodeSection,
}

/// A complete, checked configuration.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// The metadata group.
    pub voters: Vec<Voter>,
    /// This node.
    pub id: NodeId,
    /// Failure domain.
    pub host: String,
    /// Control core's listener.
    pub control: SocketAddr,
    /// Data cores' listeners: port 0, or the first of consecutive ports.
    pub data: SocketAddr,
    /// Metrics listener.
    pub http: SocketAddr,
    /// The node's own files.
    pub data_dir: PathBuf,
    /// Its disks.
    pub disks: Vec<PathBuf>,
    /// Wanted data cores, if said.
    pub cores: Option<u16>,
    /// CPUs to pin to, if said.
    pub cpus: Option<Vec<u16>>,
    /// Polling window.
    pub spin_us: u32,
    /// Buffers per core.
    pub buffer_bytes: u64,
    /// Metadata region.
    pub meta_bytes: u64,
    /// Bytes per second for scrubs.
    pub scrub_rate: u64,
    /// How data travels.
    pub transport: Choice,
    /// The RDMA device, if said.
    pub rdma_device: Option<String>,
    /// Seconds until a disk that hangs is given up.
    pub disk_timeout: u32,
    /// Seconds after which an idle disk is asked whether it is there.
    pub disk_probe: u32,
    /// Whether drives are polled.
    pub poll: Poll,
    /// How disks are read and written.
    pub nvme: Nvme,
}

/// Why a configuration cannot be used. Every message names the key.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read configuration file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a wrong type; the parser's message shows the line.
    #[error("configuration file {path} is not valid:\n{message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column, key and what was expected.
        message: String,
    },
    /// A key that has no default is not set.
    #[error("{key} is not set: {meaning}")]
    Missing {
        /// `table.key`.
        key: &'static str,
        /// What it means.
        meaning: String,
    },
    /// A value that cannot be.
    #[error("{key} {problem}")]
    Bad {
        /// `table.key`.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl ConfigFile {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text).map_err(|message| ConfigError::Parse { path: path.into(), message })
    }

    /// Parses the text; the error is for a person.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string().trim_end().to_string())
    }

    /// Checks that it is complete and makes sense.
    pub fn resolve(self) -> Result<NodeConfig, ConfigError> {
        let Self { cluster, node } = self;
        let id = node.id.ok_or_else(|| missing("node.id", NodeSection::KEYS))?;
        let voters = cluster.voters.ok_or_else(|| missing("cluster.voters", ClusterSection::KEYS))?;
        check_voters(&voters)?;
        let own = voters.iter().find(|voter| voter.node == id).map(|voter| voter.address);
        let control = match (node.control, own) {
            (Some(control), _) => control,
            (None, Some(own)) => own,
            (None, None) => return Err(missing("node.control", NodeSection::KEYS)),
        };
        if control.port() == 0 && own.is_some() && voters.len() > 1 {
            return Err(bad(
                "node.control",
                "is port 0, but this node is a voter: the others must know its port",
            ));
        }
        let config = NodeConfig {
            cluster: cluster.id.ok_or_else(|| missing("cluster.id", ClusterSection::KEYS))?,
            voters,
            id,
            host: match node.host {
                Some(host) => host,
                None => host_name()?,
            },
            control,
            data: node.data.unwrap_or_else(|| SocketAddr::new(control.ip(), 0)),
            http: node.http.unwrap_or_else(|| SocketAddr::new(control.ip(), DEFAULT_HTTP_PORT)),
            data_dir: node.data_dir.ok_or_else(|| missing("node.data_dir", NodeSection::KEYS))?,
            disks: node.disks.unwrap_or_default(),
            cores: node.cores,
            cpus: node.cpus,
            spin_us: node.spin_us.unwrap_or(DEFAULT_SPIN_US),
            buffer_bytes: node.buffer_bytes.unwrap_or(DEFAULT_BUFFER_BYTES).0,
            meta_bytes: node.meta_bytes.unwrap_or(DEFAULT_META_BYTES).0,
            scrub_rate: node.scrub_rate.unwrap_or(DEFAULT_SCRUB_RATE).0,
            transport: match node.transport {
                Some(name) => {
                    name.parse().map_err(|error: ChoiceError| bad("node.transport", format!("is {error}")))?
                }
                None => Choice::Auto,
            },
            rdma_device: node.rdma_device,
            disk_timeout: node.disk_timeout.unwrap_or(engine::DISK_TIMEOUT_S),
            disk_probe: node.disk_probe.unwrap_or(engine::DISK_PROBE_S),
            poll: node.poll.unwrap_or_default(),
            nvme: node.nvme.unwrap_or_default(),
        };
        config.check()?;
        Ok(config)
    }
}

impl NodeConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if self.id == NodeId(0) {
            return Err(bad("node.id", "is 0: node numbers start at 1"));
        }
        if self.cluster == ClusterId(0) {
            return Err(bad("cluster.id", "is all zeroes: draw one with `drystone node --new-config`"));
        }
        if self.host.is_empty() {
            return Err(bad("node.host", "is empty"));
        }
        for (key, address) in [("node.control", self.control), ("node.data", self.data)] {
            if address.ip().is_unspecified() {
                let problem = format!(
                    "is {}: other hosts are told this address, so it must be one of this host's own",
                    address.ip()
                );
                return Err(bad(key, problem));
            }
        }
        if self.cores.is_some_and(|cores| cores == 0 || cores > CORES_MAX) {
            return Err(bad("node.cores", format!("must be between 1 and {CORES_MAX}")));
        }
        if let (Some(cores), Some(cpus)) = (self.cores, &self.cpus)
            && !cpus.is_empty()
            && cpus.len() != usize::from(cores)
        {
            let problem = format!("names {} CPUs for {cores} cores: one each", cpus.len());
            return Err(bad("node.cpus", problem));
        }
        in_range("node.buffer_bytes", self.buffer_bytes, BUFFER_BYTES_RANGE)?;
        in_range("node.meta_bytes", self.meta_bytes, META_BYTES_RANGE)?;
        in_range("node.scrub_rate", self.scrub_rate, SCRUB_RATE_RANGE)?;
        in_range("node.disk_timeout", u64::from(self.disk_timeout), DISK_TIMEOUT_RANGE)?;
        in_range("node.disk_probe", u64::from(self.disk_probe), DISK_PROBE_RANGE)?;
        if !self.meta_bytes.is_multiple_of(wire::BLOCK_BYTES as u64) {
            return Err(bad("node.meta_bytes", "must be a multiple of 4096"));
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if self.disks.iter().take(index).any(|earlier| earlier == disk) {
                return Err(bad("node.disks", format!("names {} twice", disk.display())));
            }
        }
        Ok(())
    }
}

fn check_voters(voters: &[Voter]) -> Result<(), ConfigError> {
    if !matches!(voters.len(), 1 | 3 | 5 | 7) {
        let problem = format!("names {} nodes: a metadata group has 1, 3, 5 or 7", voters.len());
        return Err(bad("cluster.voters", problem));
    }
    for (index, voter) in voters.iter().enumerate() {
        let earlier = || voters.iter().take(index);
        if earlier().any(|other| other.node == voter.node) {
            return Err(bad("cluster.voters", format!("names node {} twice", voter.node)));
        }
        if earlier().any(|other| other.address == voter.address) {
            return Err(bad("cluster.voters", format!("names address {} twice", voter.address)));
        }
        if voter.address.port() == 0 && voters.len() > 1 {
            return Err(bad("cluster.voters", format!("gives port 0 for node {}", voter.node)));
        }
    }
    Ok(())
}

fn in_range(key: &'static str, value: u64, range: std::ops::RangeInclusive<u64>) -> Result<(), ConfigError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = (ByteSize(*range.start()), ByteSize(*range.end()));
    Err(bad(key, format!("is {}: it must be between {low} and {high}", ByteSize(value))))
}

fn bad(key: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Bad { key, problem: problem.into() }
}

fn missing(key: &'static str, keys: &[KeyDoc]) -> ConfigError {
    let name = key.split_once('.').map_or(key, |(_, name)| name);
    let meaning = keys.iter().find(|doc| doc.key == name).map_or(String::new(), |doc| text_of(doc.doc));
    ConfigError::Missing { key, meaning }
}

/// Bytes this process may lock in memory; `None` without a limit.
pub fn host_allows_locking() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

fn host_name() -> Result<String, ConfigError> {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_string()).map_err(
        |error| bad("node.host", format!("is not set and the machine has no readable name: {error}")),
    )
}

/// A doc comment's lines as one paragraph.
fn text_of(lines: &[&str]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

/// `docs/config.md`.
pub fn reference() -> String {
    let mut out = String::from(
        "# Node configuration\n\n\
         Printed by `drystone node --print-config-reference` from the definitions in `cli/src/config.rs`; do\n\
         not edit here.\n\n\
         `drystone node --config FILE` reads one TOML file. Every key can also be given as a flag of\n\
         `drystone node` (`drystone node --help`), and a flag wins over the file. Unknown keys, wrong types\n\
         and missing keys are errors that name the key. Sizes are numbers of bytes or text such as `\"64MiB\"`.\n\
         `drystone node --new-config` prints a file to start from.\n",
    );
    for (table, about, keys) in [
        ("cluster", ClusterSection::ABOUT, ClusterSection::KEYS),
        ("node", NodeSection::ABOUT, NodeSection::KEYS),
    ] {
        let _ = write!(out, "\n## `[{table}]`\n\n{}\n", text_of(about));
        for key in keys {
            let _ = write!(
                out,
                "\n### `{}`\n\n{}\n\n- Default: {}.\n- Example: `{} = {}`\n",
                key.key,
                text_of(key.doc),
                key.default,
                key.key,
                key.example
            );
        }
    }
    out
}

/// A file to start from: one node that is also the only voter, everything else as comments.
pub fn starter(cluster: ClusterId, ip: IpAddr) -> String {
    let mut out = String::from("# Drystone node. The keys are explained in docs/config.md.\n");
    for (table, about, keys) in [
        ("cluster", ClusterSection::ABOUT, ClusterSection::KEYS),
        ("node", NodeSection::ABOUT, NodeSection::KEYS),
    ] {
        let _ = write!(out, "\n# {}\n[{table}]\n", text_of(about));
        for key in keys {
            let set = match (table, key.key) {
                ("cluster", "id") => format!("id = \"{cluster}\""),
                ("cluster", "voters") => {
                    format!(
                        "voters = [{{ node = 1, address = \"{}\" }}]",
                        SocketAddr::new(ip, DEFAULT_CONTROL_PORT)
                    )
                }
                ("node", "id") => "id = 1".to_string(),
                ("node", "data_dir") => "data_dir = \"/var/lib/drystone\"".to_string(),
                ("node", "disks") => "disks = []".to_string(),
                _ => format!("# {} = {}", key.key, key.example),
            };
            let _ = writeln!(out, "{set}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        [cluster]
        id = "9f1c0a3e5b7d42689f1c0a3e5b7d4268"
        voters = [{ node = 1, address = "127.0.0.1:7700" }]
        [node]
        id = 1
        data_dir = "/tmp/x"
        buffer_bytes = "16MiB"
    "#;

    fn resolve(text: &str) -> Result<NodeConfig, String> {
        ConfigFile::parse(text)?.resolve().map_err(|error| error.to_string())
    }

    #[test]
    fn a_complete_file_is_read_and_defaults_follow_from_it() {
        let config = resolve(GOOD).unwrap();
        assert_eq!(config.control.to_string(), "127.0.0.1:7700");
        assert_eq!(config.data.to_string(), "127.0.0.1:0");
        assert_eq!(config.buffer_bytes, 16 << 20);
    }

    #[test]
    fn every_mistake_names_its_key() {
        for (from, to, named) in [
            ("id = 1\n", "id = 1\ncolour = 3\n", "colour"),
            ("[cluster]", "[clutser]", "clutser"),
            ("id = 1\n", "id = \"one\"\n", "id = \"one\""),
            ("id = 1\n", "", "node.id is not set"),
            ("data_dir = \"/tmp/x\"", "", "node.data_dir is not set"),
            ("\"9f1c0a3e5b7d42689f1c0a3e5b7d4268\"", "\"xyz\"", "id = \"xyz\""),
            ("id = \"9f1c0a3e5b7d42689f1c0a3e5b7d4268\"", "", "cluster.id is not set"),
            (
                "voters = [{ node = 1, address = \"127.0.0.1:7700\" }]",
                "voters = []",
                "cluster.voters names 0",
            ),
            ("127.0.0.1:7700", "127.0.0.1", "address"),
            ("127.0.0.1:7700", "0.0.0.0:7700", "node.control is 0.0.0.0"),
            ("\"16MiB\"", "\"16Mi\"", "buffer_bytes"),
            ("\"16MiB\"", "1", "node.buffer_bytes is 1B"),
            ("\"16MiB\"", "\"16M", "buffer_bytes"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD, "{from}");
            let error = resolve(&text).unwrap_err();
            assert!(error.contains(named), "{to}: {error}");
        }
    }

    #[test]
    fn the_starter_file_is_valid_and_shows_every_key() {
        let text = starter(ClusterId(7), IpAddr::from([10, 0, 0, 1]));
        let config = resolve(&text).unwrap();
        assert_eq!(config.cluster, ClusterId(7));
        let uncommented: String = text
            .lines()
            .map(|l| l.strip_prefix("# ").filter(|l| l.contains(" = ")).unwrap_or(l))
            .fold(String::new(), |all, line| all + line + "\n");
        let mut all = ConfigFile::parse(&uncommented).unwrap();
        all.node.cores = Some(4);
        assert_eq!(all.resolve().unwrap().cpus, Some(vec![2, 3, 4, 5]));
    }

    #[test]
    fn the_reference_page_is_up_to_date() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/config.md");
        let stored = std::fs::read_to_string(page).unwrap();
        assert_eq!(stored, reference(), "run: drystone node --print-config-reference > docs/config.md");
    }
}
