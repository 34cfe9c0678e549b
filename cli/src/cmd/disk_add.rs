//! `drystone disk add`: a further disk for a node that runs.

use super::Global;
use super::disk::{DEFAULT_CONFIG, DEFAULT_SLICES, create_sparse};
use crate::cluster::Cluster;
use crate::config::ConfigFile;
use crate::deadline::Deadline;
use crate::disks::{self, Existing, Prepared};
use crate::error::{CliError, DiskProblem};
use crate::output;
use crate::units::ByteSize;
use clap::Args;
use placement::{Disk, Live, NewDisk, Node, key};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::DiskSuper;
use wire::control::Write;
use wire::{ClusterId, DiskUuid, NodeId, Revision};

/// How long a node may take to open an empty disk: some reads and writes of each slice, and two transactions. One that
/// has data needs longer, and is taken all the same when this is over.
const TAKE_LIMIT: Duration = Duration::from_secs(60);

/// Which disk, and whose it is to be.
#[derive(Args, Debug)]
pub struct AddArgs {
    /// A block device or file on this host
    pub disk: PathBuf,
    /// The node that is to take it; the one of the configuration when not given
    #[arg(long, value_name = "ID")]
    pub node: Option<NodeId>,
    /// Slices of a disk that is not prepared yet
    #[arg(long, default_value_t = DEFAULT_SLICES)]
    pub slices: u32,
    /// Make the file, this large and sparse, if it does not exist
    #[arg(long, value_name = "SIZE")]
    pub create: Option<ByteSize>,
    /// Destroy whatever is on the disk
    #[arg(long)]
    pub overwrite: bool,
    /// The node's configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `disk add`.
pub fn add(global: &Global, args: &AddArgs) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    let path = absolute(&args.disk)?;
    let what = || format!("add {}", path.display());
    let node = node_of(args)?;
    if !is_up(&mut cluster, node)? {
        let why = format!("node {node} is not up: put the disk into its node.disks and start it");
        return Err(CliError::Refused { what: what(), why });
    }
    let id = cluster_id(&mut cluster)?;
    let superblock = ready_disk(&mut cluster, &path, args, id, node)?;
    take_up(&mut cluster, node, superblock.disk, &path)?;
    output::done(
        global,
        &format!(
            "disk {} on {} serves on node {node} and is being filled. {}",
            superblock.disk,
            path.display(),
            lasting(args.config.as_deref(), &path, node)
        ),
    )
}

/// The cluster's identity.
pub(super) fn cluster_id(cluster: &mut Cluster) -> Result<ClusterId, CliError> {
    let found = cluster.get::<placement::Cluster>(key::CLUSTER)?.map(|(found, _)| found.id);
    found.ok_or(CliError::NotFound { kind: "key", name: key::CLUSTER.into() })
}

/// A path as the node's process understands it.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path)
        .map_err(|source| CliError::Io { what: format!("find {}", path.display()), source })
}

fn node_of(args: &AddArgs) -> Result<NodeId, CliError> {
    let configured = || ConfigFile::read(&config_file(args.config.as_deref())?).ok()?.node.id;
    args.node.or_else(configured).ok_or_else(|| CliError::Refused {
        what: format!("add {}", args.disk.display()),
        why: "to which node? Give --node or --config".into(),
    })
}

fn config_file(given: Option<&Path>) -> Option<PathBuf> {
    let default = || Some(PathBuf::from(DEFAULT_CONFIG)).filter(|path| path.exists());
    given.map(Path::to_path_buf).or_else(default)
}

/// Whether the node's process is there to be told.
pub(super) fn is_up(cluster: &mut Cluster, node: NodeId) -> Result<bool, CliError> {
    Ok(cluster.get::<Live>(&key::live(node))?.is_some())
}

/// The disk's superblock, made if it is blank. What is sure to be refused is refused here, before anything is written.
fn ready_disk(
    cluster: &mut Cluster,
    path: &Path,
    args: &AddArgs,
    id: ClusterId,
    node: NodeId,
) -> Result<DiskSuper, CliError> {
    let problem = |problem| CliError::Disk { path: path.into(), problem };
    if let Some(size) = args.create
        && !path.exists()
    {
        create_sparse(path, size)?;
    }
    let existing = if args.overwrite { Existing::Overwrite } else { Existing::Keep };
    if existing == Existing::Keep
        && let Ok(found) = disks::peek(path)
    {
        if found.cluster != id {
            return Err(problem(DiskProblem::OtherCluster { found: found.cluster, ours: id }));
        }
        if let Some(owner) = found.node.filter(|owner| *owner != node) {
            return Err(problem(DiskProblem::OtherNode { found: owner, ours: node }));
        }
        let nodes: Vec<Node> = cluster.list(key::NODES)?;
        let all = nodes.iter().flat_map(|node| node.disks.iter().map(move |disk| (node.id, disk)));
        let live = cluster.get::<Live>(&key::live(node))?.map(|(live, _)| live.failed).unwrap_or_default();
        // One that the node was started without may come back: the node sees whether it is the same.
        let missing = |owner: NodeId, disk: &Disk| {
            owner == node && disk.slices.iter().all(|slice| live.contains(&slice.id))
        };
        return match all.into_iter().find(|(_, disk)| disk.uuid == found.disk) {
            Some((owner, same)) if !missing(owner, same) => {
                let why = format!(
                    "node {owner} has disk {} already ({}): this is the same disk again, or a copy of it",
                    found.disk, same.path
                );
                Err(CliError::Refused { what: format!("add {}", path.display()), why })
            }
            _ => Ok(found),
        };
    }
    let (Prepared::Fresh(made) | Prepared::Already(made)) =
        disks::prepare(path, id, Some(node), args.slices as usize, existing)?;
    Ok(made)
}

/// Has a running node take a prepared disk, and waits until it has or has refused it.
pub(super) fn take_up(
    cluster: &mut Cluster,
    node: NodeId,
    disk: DiskUuid,
    path: &Path,
) -> Result<(), CliError> {
    let name = key::new_disk(node, disk);
    let wish = NewDisk { path: path.display().to_string(), refused: None };
    let value = serde_json::to_string(&wish).map_err(|error| CliError::Json(error.to_string()))?;
    cluster.txn(vec![], vec![Write::Put { key: name.clone(), value, lease: None }])?;
    let forget = |cluster: &mut Cluster| cluster.txn(vec![], vec![Write::Delete { key: name.clone() }]);
    let deadline = Deadline::after(TAKE_LIMIT);
    let what = format!("have node {node} take {}", path.display());
    loop {
        match cluster.get::<NewDisk>(&name)? {
            Some((NewDisk { refused: Some(why), .. }, _)) => {
                forget(cluster)?;
                return Err(CliError::Refused { what, why });
            }
            Some(_) => {}
            None => {
                let has = |(record, _): (Node, Revision)| record.disks.iter().any(|one| one.uuid == disk);
                return match cluster.get(&key::node(node))?.is_some_and(has) {
                    true => Ok(()),
                    false => Err(CliError::Refused { what, why: "the wish was withdrawn".into() }),
                };
            }
        }
        if deadline.passed() {
            // It goes on opening a disk with data; only a node that does not even begin is not waited for.
            return Err(CliError::TimedOut {
                what: format!("node {node} to take {} (it goes on trying)", path.display()),
                seconds: TAKE_LIMIT.as_secs(),
            });
        }
        cluster.wait_for_change()?;
    }
}

/// What is to be done for the disk to be there after the next start of its node.
pub(super) fn lasting(config: Option<&Path>, path: &Path, node: NodeId) -> String {
    let path = path.display();
    let Some(file) = config_file(config) else {
        return format!("Add \"{path}\" to node.disks of node {node}, or it starts without it next time.");
    };
    let named = ConfigFile::read(&file).ok().and_then(|found| found.node.disks).unwrap_or_default();
    let file = file.display();
    match named.iter().any(|disk| disk.display().to_string() == path.to_string()) {
        true => format!("{file} names it."),
        false => {
            format!("Add \"{path}\" to node.disks in {file}, or node {node} starts without it next time.")
        }
    }
}
