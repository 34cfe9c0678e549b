//! `drystone disk ls`, `retire`, `replace`: the disks of a running cluster, and the end of one.

use super::{Global, disk_add};
use crate::cluster::{Cluster, decode, wall_ms};
use crate::deadline::Deadline;
use crate::disk_status::{DiskStatus, millis};
use crate::disks::{self, Existing, Prepared};
use crate::error::CliError;
use crate::health::ClusterStatus;
use crate::output::{self, Table};
use crate::units::ByteSize;
use clap::Args;
use control::claims;
use placement::{Disk, DiskRecord, Live, Node, PgRecord, Retired, SliceMark, key};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use wire::control::{Compare, MetaReply, Write};
use wire::{DiskUuid, NodeId, Revision, SessionId, SliceId};

/// How long placement groups may take to go on without a disk: a lease, and a transaction for each.
const LEAVE_LIMIT: Duration = Duration::from_secs(60);
/// Transactions tried again when somebody else was faster.
const TRIES: usize = 10;

/// Which disk, and how much may be lost with it.
#[derive(Args, Debug)]
pub struct RetireArgs {
    /// The disk: its identity, or its path on its node, as `disk ls` shows them
    pub disk: String,
    /// The disk's node, when a path alone says too little
    #[arg(long, value_name = "ID")]
    pub node: Option<NodeId>,
    /// Although nothing is wrong with it: gives up one good copy of all that it holds
    #[arg(long)]
    pub force: bool,
    /// Although it holds the only copy of something, which is lost then
    #[arg(long)]
    pub accept_data_loss: bool,
}

/// The same, and what takes its place.
#[derive(Args, Debug)]
pub struct ReplaceArgs {
    /// The disk that goes
    #[command(flatten)]
    pub old: RetireArgs,
    /// The disk that takes its place: a block device or file on this host
    pub new: PathBuf,
    /// Slices of the new disk; as many as the old one has when not given
    #[arg(long)]
    pub slices: Option<u32>,
    /// Make the file, this large and sparse, if it does not exist
    #[arg(long, value_name = "SIZE")]
    pub create: Option<ByteSize>,
    /// Destroy whatever is on the new disk
    #[arg(long)]
    pub overwrite: bool,
    /// Put the new path in the old one's place in this configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `disk ls`.
pub fn list(global: &Global) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    let status = ClusterStatus::read(&mut cluster)?;
    if global.json {
        return output::json(&status.disks);
    }
    let mut table =
        Table::new(&["NODE", "HOST", "DISK", "PATH", ">SLICES", ">USED", ">SIZE", ">PER OP", "STATE"]);
    for disk in &status.disks {
        table.row([
            disk.node.to_string(),
            disk.host.clone(),
            disk.disk.to_string(),
            disk.path.clone(),
            format!("{}/{}", disk.slices - disk.slices_failed, disk.slices),
            ByteSize(disk.used_bytes).to_string(),
            ByteSize(disk.size_bytes).to_string(),
            if disk.service_us == 0 { "-".to_owned() } else { millis(disk.service_us) },
            disk.state(),
        ]);
    }
    table.print()
}

/// `disk retire`.
pub fn retire(global: &Global, args: &RetireArgs) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    let old = find(&mut cluster, args)?;
    may_go(&mut cluster, &old, args)?;
    take_out(&mut cluster, &old, None)?;
    output::done(
        global,
        &format!("{} is retired: take it out of node.disks of node {}", old.name(), old.status.node),
    )
}

/// `disk replace`.
pub fn replace(global: &Global, args: &ReplaceArgs) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    let old = find(&mut cluster, &args.old)?;
    may_go(&mut cluster, &old, &args.old)?;
    let id = disk_add::cluster_id(&mut cluster)?;
    let new_path = disk_add::absolute(&args.new)?;
    if let Some(config) = &args.config {
        // Found out before anything is changed.
        edited(config, &old.status.path, &args.new)?;
    }
    if let Some(size) = args.create
        && !args.new.exists()
    {
        super::disk::create_sparse(&args.new, size)?;
    }
    let existing = if args.overwrite { Existing::Overwrite } else { Existing::Keep };
    let slices = args.slices.map_or(old.disk.slices.len(), |slices| slices as usize);
    let (Prepared::Fresh(new) | Prepared::Already(new)) =
        disks::prepare(&args.new, id, Some(old.status.node), slices, existing)?;
    if new.disk == old.disk.uuid {
        return Err(refused("replace a disk by itself", "--overwrite prepares it anew".into()));
    }
    take_out(&mut cluster, &old, Some(new.disk))?;
    let (node, path) = (old.status.node, args.new.display());
    let up = disk_add::is_up(&mut cluster, node)?;
    let taken = if up { disk_add::take_up(&mut cluster, node, new.disk, &new_path) } else { Ok(()) };
    let edit = match &args.config {
        Some(config) => {
            let text = edited(config, &old.status.path, &args.new)?;
            crate::node::write_whole(config, &text)?;
            format!("{} names it now.", config.display())
        }
        None if Path::new(&old.status.path) == args.new => "The configuration need not change.".to_owned(),
        None => format!("Put {path} in the place of {} in node.disks of node {node}.", old.status.path),
    };
    let (name, disk) = (old.name(), new.disk);
    if let Err(error) = taken {
        let why =
            format!("{error}. {edit} It is taken with the next start of node {node}, or by `disk add`.");
        return Err(refused(
            &format!("put disk {disk} at once into the place of {name}, which is retired"),
            why,
        ));
    }
    let when = match up {
        true => "and is being filled",
        false => "when its node starts",
    };
    output::done(global, &format!("{name} is retired, disk {disk} on {path} takes its place {when}. {edit}"))
}

fn refused(what: &str, why: String) -> CliError {
    CliError::Refused { what: what.into(), why }
}

/// The configuration with one path instead of the other.
fn edited(config: &Path, old: &str, new: &Path) -> Result<String, CliError> {
    let text = std::fs::read_to_string(config)
        .map_err(|source| CliError::Io { what: format!("read {}", config.display()), source })?;
    let quoted = format!("\"{old}\"");
    let what = "change the configuration";
    match text.matches(&quoted).count() {
        1 => Ok(text.replace(&quoted, &format!("\"{}\"", new.display()))),
        0 => Err(refused(what, format!("{} does not name {old}", config.display()))),
        _ => Err(refused(what, format!("{} names {old} more than once", config.display()))),
    }
}

/// A disk of the cluster.
struct Found {
    disk: Disk,
    status: DiskStatus,
    slices: BTreeSet<SliceId>,
}

impl Found {
    fn name(&self) -> String {
        format!("disk {} ({}) of node {}", self.disk.uuid, self.status.path, self.status.node)
    }

    fn is_good(&self) -> bool {
        self.status.up && self.status.slices_failed == 0
    }
}

fn find(cluster: &mut Cluster, args: &RetireArgs) -> Result<Found, CliError> {
    let status = ClusterStatus::read(cluster)?;
    let wanted = |disk: &&DiskStatus| {
        let named = disk.disk.to_string() == args.disk.to_lowercase() || disk.path == args.disk;
        named && args.node.is_none_or(|node| node == disk.node)
    };
    let mut found = status.disks.iter().filter(wanted);
    let (Some(one), None) = (found.next(), found.next()) else {
        let several = status.disks.iter().any(|disk| wanted(&disk));
        return Err(if several {
            refused("choose a disk", format!("several nodes have a disk {}: name one with --node", args.disk))
        } else {
            CliError::NotFound { kind: "disk", name: args.disk.clone() }
        });
    };
    let node: Option<(Node, Revision)> = cluster.get(&key::node(one.node))?;
    let disk = node.and_then(|(node, _)| node.disks.into_iter().find(|disk| disk.uuid == one.disk));
    let disk = disk.ok_or(CliError::NotFound { kind: "disk", name: args.disk.clone() })?;
    let slices = disk.slices.iter().map(|slice| slice.id).collect();
    Ok(Found { disk, status: one.clone(), slices })
}

/// Refuses what would cost more than was said.
fn may_go(cluster: &mut Cluster, old: &Found, args: &RetireArgs) -> Result<(), CliError> {
    let what = format!("retire {}", old.name());
    if old.is_good() && !args.force {
        let why = "it serves; --force gives up its copies although they are good".into();
        return Err(CliError::Refused { what, why });
    }
    if args.accept_data_loss {
        return Ok(());
    }
    let nodes: Vec<Node> = cluster.list(key::NODES)?;
    let mut up = BTreeSet::new();
    for node in &nodes {
        let Some((live, _)) = cluster.get::<Live>(&key::live(node.id))? else { continue };
        let slices = node.disks.iter().flat_map(|disk| &disk.slices).map(|slice| slice.id);
        up.extend(slices.filter(|slice| !live.failed.contains(slice)));
    }
    let items = cluster.range(key::PGS)?;
    for item in &items {
        let record: PgRecord = decode(item)?;
        let good = |slice: &&SliceId| up.contains(slice) && !old.slices.contains(slice);
        let held = record.in_sync.iter().any(|slice| old.slices.contains(slice));
        if held && record.in_sync.iter().find(good).is_none() {
            let pg = key::parse_pg(&item.key).map_or(item.key.clone(), |pg| pg.to_string());
            let why = format!(
                "placement group {pg} has no other complete copy that is up; --accept-data-loss gives it up"
            );
            return Err(CliError::Refused { what, why });
        }
    }
    Ok(())
}

/// Retires the disk, waits until no placement group counts on it, and takes it off the map.
fn take_out(cluster: &mut Cluster, old: &Found, replaced_by: Option<DiskUuid>) -> Result<(), CliError> {
    let name = key::disk(old.disk.uuid);
    update(cluster, &name, |found: Option<DiskRecord>| {
        let marks = old.slices.iter().map(|slice| SliceMark { slice: *slice, generation: 0 });
        let mut record = found.unwrap_or_else(|| DiskRecord {
            node: old.status.node,
            process: SessionId(0),
            slices: marks.collect(),
            retired: None,
        });
        record.retired = Some(Retired { at_ms: wall_ms(), replaced_by });
        claims::put(old.disk.uuid, &record)
    })?;
    wait_until_left(cluster, old)?;
    update(cluster, &key::node(old.status.node), |found: Option<Node>| {
        let mut node = found?;
        node.disks.retain(|disk| disk.uuid != old.disk.uuid);
        let value = serde_json::to_string(&node).ok()?;
        Some(Write::Put { key: key::node(old.status.node), value, lease: None })
    })
}

/// A running node gives its slices up; the director gives their placement groups other members.
fn wait_until_left(cluster: &mut Cluster, old: &Found) -> Result<(), CliError> {
    let deadline = Deadline::after(LEAVE_LIMIT);
    loop {
        let records: Vec<PgRecord> = cluster.list(key::PGS)?;
        let acts = |record: &PgRecord| record.acting.iter().any(|slice| old.slices.contains(slice));
        let left = records.iter().filter(|record| acts(record)).count();
        if left == 0 || cluster.get::<Live>(&key::live(old.status.node))?.is_none() {
            return Ok(());
        }
        if deadline.passed() {
            let what = format!("{left} placement group(s) to go on without {}", old.name());
            return Err(CliError::TimedOut { what, seconds: LEAVE_LIMIT.as_secs() });
        }
        cluster.wait_for_change()?;
    }
}

/// Reads a key, changes it, and writes it if it is still what was read. `None` leaves it as it is.
fn update<T: serde::de::DeserializeOwned>(
    cluster: &mut Cluster,
    name: &str,
    change: impl Fn(Option<T>) -> Option<Write>,
) -> Result<(), CliError> {
    for _ in 0..TRIES {
        let (value, revision) =
            cluster.get(name)?.map_or((None, Revision(0)), |(value, revision)| (Some(value), revision));
        let Some(write) = change(value) else { return Ok(()) };
        let compares = vec![Compare::ModRevision { key: name.to_owned(), revision }];
        if matches!(cluster.txn(compares, vec![write])?, MetaReply::Applied { .. }) {
            return Ok(());
        }
    }
    Err(CliError::Changed { what: name.to_owned() })
}
