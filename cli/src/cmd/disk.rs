//! `drystone disk`: disks before and beside a running node. (Those of a running cluster: `disk_retire`.)

use super::Global;
use super::disk_add::{self, AddArgs};
use super::disk_retire::{self, ReplaceArgs, RetireArgs};
use crate::config::ConfigFile;
use crate::disks::{self, Existing, Prepared};
use crate::error::CliError;
use crate::output::{self, Table};
use crate::units::ByteSize;
use crate::{checkup, config};
use clap::{Args, Subcommand};
use reactor::backend::{Device, DiskFile};
use serde::Serialize;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use store::DiskSuper;
use wire::{ClusterId, DiskUuid, NodeId, SliceId};

/// Where `disk prepare` finds the cluster's identity when no flag says it.
pub(super) const DEFAULT_CONFIG: &str = "/etc/drystone/node.toml";
/// Slices of a disk: for most hosts the disk's share of all cores they may ever have.
pub(super) const DEFAULT_SLICES: u32 = 8;

/// What to do with disks.
#[derive(Subcommand, Debug)]
pub enum DiskCommand {
    /// Prepare a disk or file for a cluster: divide it into slices
    ///
    /// Preparing a disk again changes nothing. A disk that holds anything else is refused without --force.
    #[command(after_help = "Examples:
  drystone disk prepare /dev/nvme0n1 --slices 8
  drystone disk prepare /srv/disk1 --create 100G --cluster-id 9f1c0a3e5b7d42689f1c0a3e5b7d4268
  drystone disk prepare /dev/sdb --force              destroys what is on it

The cluster's identity comes from --cluster-id, else from --config, else from /etc/drystone/node.toml.")]
    Prepare(PrepareArgs),
    /// Show what is on a disk
    Info {
        /// Block devices or files
        #[arg(required = true)]
        disks: Vec<PathBuf>,
    },
    /// Read a whole disk, explain what is wrong with it, and repair what is safe to repair
    ///
    /// The node that uses the disk must be stopped. Without --repair nothing is written.
    #[command(after_help = "Examples:
  drystone disk check /dev/nvme0n1
  drystone disk check /dev/nvme0n1 --data           also verify every block's checksum")]
    Check(CheckArgs),
    /// List the disks of the cluster: where they are, what state they are in
    #[command(visible_alias = "list")]
    Ls,
    /// Have a running node take a further disk; to be run on the node's host
    ///
    /// A blank disk is prepared first. The node opens it while it serves, and the disk is filled with its share.
    #[command(after_help = "Examples:
  drystone disk add /dev/nvme2n1                    for the node of /etc/drystone/node.toml
  drystone disk add /srv/disk2 --create 100G --node 3")]
    Add(AddArgs),
    /// Take a disk out of the cluster for good; it is refused should it come back
    ///
    /// Its placement groups go on with other copies, which are made on other disks. A disk whose slices all
    /// serve is refused without --force.
    #[command(after_help = "Examples:
  drystone disk retire 5d0c…                        a disk that has failed, by its identity
  drystone disk retire /dev/sdb --node 3            the same by its path")]
    Retire(RetireArgs),
    /// Retire a disk and prepare another one in its place; to be run on the disk's host
    ///
    /// The node takes the new disk while it runs, and the disk is filled from the other copies. A node that is not
    /// up takes it when it starts.
    #[command(after_help = "Examples:
  drystone disk replace /dev/sdb /dev/sdc --node 3 --config /etc/drystone/node.toml
  drystone disk replace /dev/sdb /dev/sdb --node 3  the new disk sits in the old one's slot")]
    Replace(ReplaceArgs),
}

/// A preparation.
#[derive(Args, Debug)]
pub struct PrepareArgs {
    /// Block devices or files
    #[arg(required = true)]
    pub disks: Vec<PathBuf>,
    /// Slices per disk: a power of two, at least the cores that the host may ever give the disk
    #[arg(long, default_value_t = DEFAULT_SLICES)]
    pub slices: u32,
    /// The cluster's identity
    #[arg(long, value_name = "HEX")]
    pub cluster_id: Option<ClusterId>,
    /// The node's configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Make the file, this large and sparse, if it does not exist
    #[arg(long, value_name = "SIZE")]
    pub create: Option<ByteSize>,
    /// Destroy whatever is on the disk
    #[arg(long)]
    pub force: bool,
}

/// A check.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// A block device or file
    pub disk: PathBuf,
    /// Read all data too and verify its checksums
    #[arg(long)]
    pub data: bool,
    /// Repair what is safe to repair: a damaged copy of a superblock from the good one
    #[arg(long)]
    pub repair: bool,
}

/// Runs the command.
pub fn run(global: &Global, command: DiskCommand) -> Result<(), CliError> {
    match command {
        DiskCommand::Prepare(args) => prepare(global, &args),
        DiskCommand::Info { disks } => info(global, &disks),
        DiskCommand::Check(args) => checkup::run(global, &args.disk, args.data, args.repair),
        DiskCommand::Ls => disk_retire::list(global),
        DiskCommand::Add(args) => disk_add::add(global, &args),
        DiskCommand::Retire(args) => disk_retire::retire(global, &args),
        DiskCommand::Replace(args) => disk_retire::replace(global, &args),
    }
}

#[derive(Serialize)]
struct DiskView<'a> {
    path: &'a Path,
    disk: DiskUuid,
    cluster: ClusterId,
    node: Option<NodeId>,
    size_bytes: u64,
    slices: Vec<SliceView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    changed: Option<bool>,
    /// What the kernel says of a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceView>,
}

#[derive(Serialize)]
struct DeviceView {
    logical_block_bytes: u32,
    physical_block_bytes: u32,
    atomic_write_bytes: u32,
    volatile_cache: bool,
    fua: bool,
    discard_max_bytes: u64,
    polls: bool,
}

impl From<Device> for DeviceView {
    fn from(device: Device) -> Self {
        Self {
            logical_block_bytes: device.logical_block_bytes,
            physical_block_bytes: device.physical_block_bytes,
            atomic_write_bytes: device.atomic_write_bytes,
            volatile_cache: device.volatile_cache,
            fua: device.fua,
            discard_max_bytes: device.discard_max_bytes,
            polls: device.polls,
        }
    }
}

impl DeviceView {
    /// For a person.
    fn sentence(&self) -> String {
        let cache = match (self.volatile_cache, self.fua) {
            (false, _) => "writes are durable when they complete",
            (true, true) => "volatile cache, durable writes one by one (FUA)",
            (true, false) => "volatile cache, durable writes by flushing",
        };
        let atomic = match self.atomic_write_bytes {
            0 => "nothing said of atomic writes".to_owned(),
            bytes => format!("atomic writes up to {}", ByteSize(u64::from(bytes))),
        };
        let discard = if self.discard_max_bytes > 0 { "discards" } else { "does not discard" };
        let polls = if self.polls { "has poll queues" } else { "no poll queues" };
        let (logical, physical) = (self.logical_block_bytes, self.physical_block_bytes);
        format!("sectors of {logical} bytes ({physical} physical); {cache}; {atomic}; {discard}; {polls}")
    }
}

#[derive(Serialize)]
struct SliceView {
    slice: SliceId,
    offset: u64,
    size_bytes: u64,
}

impl<'a> DiskView<'a> {
    fn of(path: &'a Path, superblock: &DiskSuper, changed: Option<bool>) -> Self {
        let slices = superblock.slices.iter();
        Self {
            path,
            disk: superblock.disk,
            cluster: superblock.cluster,
            node: superblock.node,
            size_bytes: superblock.disk_bytes,
            slices: slices
                .map(|entry| SliceView { slice: entry.slice, offset: entry.offset, size_bytes: entry.len })
                .collect(),
            changed,
            device: None,
        }
    }
}

/// The cluster that disks are prepared for.
fn cluster_of(args: &PrepareArgs) -> Result<ClusterId, CliError> {
    if let Some(id) = args.cluster_id {
        return Ok(id);
    }
    let default = PathBuf::from(DEFAULT_CONFIG);
    let path = args.config.clone().or_else(|| default.exists().then_some(default)).ok_or_else(|| {
        CliError::Refused {
            what: "prepare a disk".into(),
            why: format!("for which cluster? Give --cluster-id or --config, or write {DEFAULT_CONFIG}"),
        }
    })?;
    ConfigFile::read(&path)?.cluster.id.ok_or_else(|| {
        config::ConfigError::Missing { key: "cluster.id", meaning: format!("look into {}", path.display()) }
            .into()
    })
}

fn prepare(global: &Global, args: &PrepareArgs) -> Result<(), CliError> {
    let cluster = cluster_of(args)?;
    let existing = if args.force { Existing::Overwrite } else { Existing::Keep };
    let mut done = Vec::new();
    for path in &args.disks {
        if let Some(size) = args.create
            && !path.exists()
        {
            create_sparse(path, size)?;
        }
        let (superblock, fresh) = match disks::prepare(path, cluster, None, args.slices as usize, existing)? {
            Prepared::Fresh(superblock) => (superblock, true),
            Prepared::Already(superblock) => (superblock, false),
        };
        if !global.json {
            let what = if fresh { "prepared" } else { "was prepared already, nothing changed" };
            let (count, disk) = (superblock.slices.len(), superblock.disk);
            output::line(&format!("{}: {what}: disk {disk}, {count} slices", path.display()))?;
        }
        done.push((path, superblock, fresh));
    }
    if global.json {
        let views: Vec<DiskView<'_>> = done
            .iter()
            .map(|(path, superblock, fresh)| DiskView::of(path, superblock, Some(*fresh)))
            .collect();
        output::json(&views)?;
    }
    Ok(())
}

pub(super) fn create_sparse(path: &Path, size: ByteSize) -> Result<(), CliError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|file| file.set_len(size.0))
        .map_err(|source| CliError::Io { what: format!("create {}", path.display()), source })
}

fn info(global: &Global, paths: &[PathBuf]) -> Result<(), CliError> {
    let mut found = Vec::new();
    for path in paths {
        let device = DiskFile::device_at(path)?.map(DeviceView::from);
        found.push((path, disks::peek(path)?, device));
    }
    if global.json {
        let views: Vec<DiskView<'_>> = found
            .iter_mut()
            .map(|(path, superblock, device)| {
                let view = DiskView::of(path, superblock, None);
                DiskView { device: device.take(), ..view }
            })
            .collect();
        return output::json(&views);
    }
    for (path, superblock, device) in &found {
        let node = superblock.node.map_or("none yet".to_string(), |node| node.to_string());
        output::line(&format!(
            "{}\n  disk     {}\n  cluster  {}\n  node     {node}\n  size     {}",
            path.display(),
            superblock.disk,
            superblock.cluster,
            ByteSize(superblock.disk_bytes),
        ))?;
        if let Some(device) = device {
            output::line(&format!("  device   {}", device.sentence()))?;
        }
        let mut table = Table::new(&["  SLICE", ">OFFSET", ">SIZE"]);
        for entry in &superblock.slices {
            let cells =
                [format!("  {}", entry.slice), entry.offset.to_string(), ByteSize(entry.len).to_string()];
            table.row(cells);
        }
        table.print()?;
    }
    Ok(())
}
