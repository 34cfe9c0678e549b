//! `drystone node`: be a node of the cluster until told to stop. What else can be done with nodes is in `nodes`.

use super::Global;
use super::nodes::{self, NodeCommand};
use crate::config::{ClusterSection, ConfigFile, NodeSection, Nvme, Poll, Voter, reference, starter};
use crate::error::CliError;
use crate::units::ByteSize;
use crate::{disks, node, output};
use clap::Args;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use wire::{ClusterId, NodeId};

/// A node's configuration: a file, flags, or both; a flag wins. Or what to do with nodes.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:
  drystone node --new-config > /etc/drystone/node.toml     a file to start from
  drystone node --config /etc/drystone/node.toml
  drystone node --config /etc/drystone/node.toml --cores 2
  drystone node --cluster-id 9f1c0a3e5b7d42689f1c0a3e5b7d4268 --voter 1@127.0.0.1:7700 \\
      --id 1 --data-dir /tmp/n1 --disk /tmp/d1

When the node serves, it prints a line `ready {…}` with its addresses and, under systemd, says so there.
SIGTERM or Ctrl-C stops it cleanly.")]
pub struct NodeArgs {
    /// Something else than running one
    #[command(subcommand)]
    pub command: Option<NodeCommand>,
    /// Configuration file (docs/config.md explains every key)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The cluster's identity: 32 hexadecimal digits [cluster.id]
    #[arg(long, value_name = "HEX")]
    pub cluster_id: Option<ClusterId>,
    /// A member of the metadata group; once for each [cluster.voters]
    #[arg(long = "voter", value_name = "NODE@IP:PORT")]
    pub voters: Vec<Voter>,
    /// This node's number [node.id]
    #[arg(long, value_name = "NUMBER")]
    pub id: Option<NodeId>,
    /// Name of the host, the failure domain [node.host]
    #[arg(long)]
    pub host: Option<String>,
    /// Where the control core listens [node.control]
    #[arg(long, value_name = "IP:PORT")]
    pub control: Option<SocketAddr>,
    /// Where the data cores listen [node.data]
    #[arg(long, value_name = "IP:PORT")]
    pub data: Option<SocketAddr>,
    /// Where /metrics is served [node.http]
    #[arg(long, value_name = "IP:PORT")]
    pub http: Option<SocketAddr>,
    /// Directory of the node's own files [node.data_dir]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// A prepared disk; once for each [node.disks]
    #[arg(long = "disk", value_name = "PATH")]
    pub disks: Vec<PathBuf>,
    /// Data cores [node.cores]
    #[arg(long)]
    pub cores: Option<u16>,
    /// CPUs to pin the data cores to, separated by commas; `none` leaves it to the kernel [node.cpus]
    #[arg(long, value_name = "LIST", value_parser = cpu_list)]
    pub cpus: Option<Cpus>,
    /// Microseconds a core polls before it sleeps [node.spin_us]
    #[arg(long)]
    pub spin_us: Option<u32>,
    /// Buffers of each data core [node.buffer_bytes]
    #[arg(long, value_name = "SIZE")]
    pub buffer_bytes: Option<ByteSize>,
    /// Size of the metadata region [node.meta_bytes]
    #[arg(long, value_name = "SIZE")]
    pub meta_bytes: Option<ByteSize>,
    /// Bytes per second that scrubs may read [node.scrub_rate]
    #[arg(long, value_name = "SIZE")]
    pub scrub_rate: Option<ByteSize>,
    /// The RDMA device [node.rdma_device]
    #[arg(long, value_name = "NAME")]
    pub rdma_device: Option<String>,
    /// Seconds after which a disk that hangs is given up [node.disk_timeout]
    #[arg(long, value_name = "SECONDS")]
    pub disk_timeout: Option<u32>,
    /// Seconds without anything to do after which a disk is asked whether it is there; 0: never [node.disk_probe]
    #[arg(long, value_name = "SECONDS")]
    pub disk_probe: Option<u32>,
    /// Whether drives are polled [node.poll]
    #[arg(long, value_name = "WHEN")]
    pub poll: Option<Poll>,
    /// How NVMe drives are read and written [node.nvme]
    #[arg(long, value_name = "HOW")]
    pub nvme: Option<Nvme>,
    /// Also write the addresses, as JSON, to this file once the node serves
    #[arg(long, value_name = "FILE")]
    pub port_file: Option<PathBuf>,
    /// Print docs/config.md and exit
    #[arg(long)]
    pub print_config_reference: bool,
    /// Print a configuration file to start from, with a new cluster identity, and exit
    #[arg(long)]
    pub new_config: bool,
    /// End with the process that started this one (demonstration and tests)
    #[arg(long, hide = true)]
    pub die_with_parent: bool,
}

/// A list of CPU numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus(pub Vec<u16>);

fn cpu_list(text: &str) -> Result<Cpus, String> {
    if text == "none" {
        return Ok(Cpus(Vec::new()));
    }
    let one = |part: &str| part.trim().parse().map_err(|_| format!("'{part}' is not a CPU number"));
    text.split(',').map(one).collect::<Result<_, _>>().map(Cpus)
}

impl NodeArgs {
    /// The flags in the form of a file.
    fn as_file(&self, transport: Option<net_rdma::Choice>) -> ConfigFile {
        ConfigFile {
            cluster: ClusterSection {
                id: self.cluster_id,
                voters: (!self.voters.is_empty()).then(|| self.voters.clone()),
            },
            node: NodeSection {
                id: self.id,
                host: self.host.clone(),
                control: self.control,
                data: self.data,
                http: self.http,
                data_dir: self.data_dir.clone(),
                disks: (!self.disks.is_empty()).then(|| self.disks.clone()),
                cores: self.cores,
                cpus: self.cpus.clone().map(|cpus| cpus.0),
                spin_us: self.spin_us,
                buffer_bytes: self.buffer_bytes,
                meta_bytes: self.meta_bytes,
                scrub_rate: self.scrub_rate,
                transport: transport.map(|choice| choice.to_string()),
                rdma_device: self.rdma_device.clone(),
                disk_timeout: self.disk_timeout,
                disk_probe: self.disk_probe,
                poll: self.poll,
                nvme: self.nvme,
            },
        }
    }
}

/// Runs the command.
pub fn run(global: &Global, args: NodeArgs) -> Result<(), CliError> {
    if let Some(command) = args.command {
        return nodes::run(global, command);
    }
    if args.print_config_reference {
        return output::line(reference().trim_end());
    }
    if args.new_config {
        let cluster = ClusterId(disks::random_u128()?);
        return output::line(starter(cluster, IpAddr::from([127, 0, 0, 1])).trim_end());
    }
    if args.die_with_parent {
        node::die_with_parent()?;
    }
    let mut file = match &args.config {
        Some(path) => ConfigFile::read(path)?,
        None => ConfigFile::default(),
    };
    let flags = args.as_file(global.transport);
    file.cluster.merge(flags.cluster);
    file.node.merge(flags.node);
    node::run(&file.resolve()?, args.port_file.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read() {
        assert_eq!(cpu_list("1,3"), Ok(Cpus(vec![1, 3])));
        assert_eq!(cpu_list("none"), Ok(Cpus(Vec::new())));
        assert!(cpu_list("1,x").is_err());
    }
}
