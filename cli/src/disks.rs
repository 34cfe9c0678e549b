//! Disks outside a running loop: preparing them, reading their superblocks, claiming them for a node.
//!
//! Every function here holds the lock that a running node holds (`DiskFile`), so a disk in use is never
//! touched. Superblocks are read and written through a second, ordinary file handle.

use crate::error::{CliError, DiskProblem};
use reactor::backend::{Access, DiskFile};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use store::{DiskPlan, DiskSuper, SuperError};
use wire::{BLOCK_BYTES, ClusterId, DiskUuid, NodeId, SliceId};

/// An open, locked disk with its superblock.
pub struct OwnDisk {
    /// The lock, and what the loops do I/O through.
    pub file: Arc<DiskFile>,
    /// Its superblock.
    pub superblock: DiskSuper,
}

fn problem(path: &Path, problem: impl Into<DiskProblem>) -> CliError {
    CliError::Disk { path: path.into(), problem: problem.into() }
}

fn open(path: &Path, write: bool) -> Result<File, CliError> {
    OpenOptions::new().read(true).write(write).open(path).map_err(|error| problem(path, error))
}

/// The two copies of the superblock as they are on the disk; short reads are filled with zeroes.
fn read_copies(path: &Path) -> Result<[Vec<u8>; 2], CliError> {
    let file = open(path, false)?;
    let mut copies = [Vec::new(), Vec::new()];
    for (copy, at) in copies.iter_mut().zip(DiskSuper::offsets()) {
        copy.resize(BLOCK_BYTES, 0);
        let mut got = 0;
        while let Some(rest) = copy.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, at + got as u64) {
                Ok(0) => break,
                Ok(bytes) => got += bytes,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(problem(path, error)),
            }
        }
    }
    Ok(copies)
}

/// Reads the superblock of a locked disk, whatever cluster it belongs to.
pub fn read_super(file: &DiskFile) -> Result<DiskSuper, CliError> {
    choose(file.path(), file.info().size_bytes)
}

fn choose(path: &Path, bytes: u64) -> Result<DiskSuper, CliError> {
    let [first, second] = read_copies(path)?;
    DiskSuper::choose(&first, &second, bytes, None).map_err(|error| {
        let copy = |block: &[u8]| match DiskSuper::decode(block, bytes, None) {
            Ok(_) => "good".to_string(),
            Err(error) => error.to_string(),
        };
        let what = match error {
            SuperError::Blank => DiskProblem::Blank,
            SuperError::NotOurs => DiskProblem::Foreign,
            SuperError::Truncated => DiskProblem::Truncated { now: bytes },
            SuperError::BadVersion(version) => DiskProblem::Version(version),
            _ => DiskProblem::Superblock { first: copy(&first), second: copy(&second) },
        };
        problem(path, what)
    })
}

/// Locks a disk and reads its superblock.
pub fn open_disk(path: &Path, access: Access) -> Result<OwnDisk, CliError> {
    let file = DiskFile::open_for(path, access)?;
    let superblock = read_super(&file)?;
    Ok(OwnDisk { file, superblock })
}

/// Reads the superblock of a disk that a node may be using: without the lock, and writing nothing.
pub fn peek(path: &Path) -> Result<DiskSuper, CliError> {
    use std::io::{Seek, SeekFrom};
    let bytes = open(path, false)?.seek(SeekFrom::End(0)).map_err(|error| problem(path, error))?;
    choose(path, bytes)
}

/// Locks a disk for a node: it must be of the node's cluster, and the node's own or nobody's yet. A disk
/// that is nobody's is claimed.
pub fn open_for_node(
    path: &Path,
    access: Access,
    cluster: ClusterId,
    node: NodeId,
) -> Result<OwnDisk, CliError> {
    let mut disk = open_disk(path, access)?;
    let found = &mut disk.superblock;
    if found.cluster != cluster {
        return Err(problem(path, DiskProblem::OtherCluster { found: found.cluster, ours: cluster }));
    }
    match found.node {
        Some(owner) if owner == node => {}
        Some(owner) => return Err(problem(path, DiskProblem::OtherNode { found: owner, ours: node })),
        None => {
            found.node = Some(node);
            write_super(path, found)?;
        }
    }
    Ok(disk)
}

/// Writes both copies, the second only when the first is durable: a torn write leaves one good copy.
fn write_super(path: &Path, superblock: &DiskSuper) -> Result<(), CliError> {
    let file = open(path, true)?;
    let block = superblock.encode();
    let [first, second] = DiskSuper::offsets();
    for at in [second, first] {
        file.write_all_at(&block, at).and_then(|()| file.sync_all()).map_err(|error| problem(path, error))?;
    }
    Ok(())
}

/// What `prepare` should do with a disk that holds something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Existing {
    /// Refuse.
    Keep,
    /// Destroy it.
    Overwrite,
}

/// What became of `prepare`.
pub enum Prepared {
    /// The disk is ready and empty.
    Fresh(DiskSuper),
    /// It was prepared for this cluster already; nothing was changed.
    Already(DiskSuper),
}

/// Prepares a disk for a cluster. Doing it again changes nothing, so that configuration management can
/// call it at every run.
pub fn prepare(
    path: &Path,
    cluster: ClusterId,
    node: Option<NodeId>,
    slices: usize,
    existing: Existing,
) -> Result<Prepared, CliError> {
    let file = DiskFile::open(path)?;
    if existing == Existing::Keep {
        match read_super(&file) {
            Ok(found) if found.cluster == cluster && found.slices.len() == slices => {
                return Ok(Prepared::Already(found));
            }
            Ok(found) => {
                let (disk, cluster, slices) = (found.disk, found.cluster, found.slices.len());
                return Err(problem(path, DiskProblem::Prepared { disk, cluster, slices }));
            }
            Err(CliError::Disk { problem: DiskProblem::Blank, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let plan = DiskPlan {
        cluster,
        disk: DiskUuid(random_u128()?),
        node,
        disk_bytes: file.info().size_bytes,
        slices: (0..slices).map(|_| random_slice()).collect::<Result<_, _>>()?,
    };
    let layout = |error: store::PrepareError| problem(path, DiskProblem::Layout(error.to_string()));
    let superblock = plan.layout().map_err(layout)?;
    let handle = open(path, true)?;
    let io = |error| problem(path, DiskProblem::Io(error));
    // While slices are laid out the disk must read as blank, so that a run cut short is repeated.
    for at in DiskSuper::offsets() {
        handle.write_all_at(&[0; BLOCK_BYTES], at).map_err(io)?;
    }
    handle.sync_all().map_err(io)?;
    let writes = plan.writes().map_err(layout)?;
    let last_two = writes.len().saturating_sub(2);
    for (index, (at, bytes)) in writes.iter().enumerate() {
        if index >= last_two {
            handle.sync_all().map_err(io)?;
        }
        handle.write_all_at(bytes, *at).map_err(io)?;
    }
    handle.sync_all().map_err(io)?;
    Ok(Prepared::Fresh(superblock))
}

fn random_bytes<const N: usize>() -> Result<[u8; N], CliError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| CliError::Io {
        what: "draw random numbers".into(),
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(bytes)
}

/// 128 random bits.
pub fn random_u128() -> Result<u128, CliError> {
    random_bytes().map(u128::from_le_bytes)
}

/// A slice's identity: 63 random bits, never zero.
fn random_slice() -> Result<SliceId, CliError> {
    let bits = u64::from_le_bytes(random_bytes()?);
    Ok(SliceId((bits >> 1).max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const CLUSTER: ClusterId = ClusterId(7);

    fn blank(dir: &tempfile::TempDir, name: &str, bytes: u64) -> PathBuf {
        let path = dir.path().join(name);
        #[allow(clippy::disallowed_methods, reason = "a test makes its own disk")]
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    fn problem_of(error: CliError) -> DiskProblem {
        match error {
            CliError::Disk { problem, .. } => problem,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn preparing_twice_changes_nothing_and_force_makes_it_new() {
        let dir = tempfile::tempdir().unwrap();
        let path = blank(&dir, "d", 256 << 20);
        let Prepared::Fresh(first) = prepare(&path, CLUSTER, None, 4, Existing::Keep).unwrap() else {
            panic!("was not blank")
        };
        let Prepared::Already(again) = prepare(&path, CLUSTER, None, 4, Existing::Keep).unwrap() else {
            panic!("was prepared anew")
        };
        assert_eq!(first, again);
        let error = problem_of(prepare(&path, CLUSTER, None, 8, Existing::Keep).err().unwrap());
        assert!(matches!(error, DiskProblem::Prepared { slices: 4, .. }), "{error}");
        let Prepared::Fresh(new) = prepare(&path, CLUSTER, None, 8, Existing::Overwrite).unwrap() else {
            panic!("was not prepared anew")
        };
        assert_ne!(new.disk, first.disk);
        assert_eq!(new.slices.len(), 8);
    }

    #[test]
    fn what_cannot_be_a_nodes_disk_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = blank(&dir, "d", 256 << 20);
        let open = |cluster, node| open_for_node(&path, Access::Block, cluster, NodeId(node)).map(|_| ());
        assert!(matches!(problem_of(open(CLUSTER, 1).unwrap_err()), DiskProblem::Blank));

        prepare(&path, CLUSTER, None, 4, Existing::Keep).unwrap();
        let error = problem_of(open(ClusterId(8), 1).unwrap_err());
        assert!(matches!(error, DiskProblem::OtherCluster { found: CLUSTER, .. }), "{error}");
        open(CLUSTER, 1).unwrap();
        let error = problem_of(open(CLUSTER, 2).unwrap_err());
        assert!(matches!(error, DiskProblem::OtherNode { found: NodeId(1), .. }), "{error}");

        let held = open_disk(&path, Access::Block).unwrap();
        let error = open(CLUSTER, 1).unwrap_err();
        assert!(matches!(error, CliError::DiskOpen(reactor::backend::DiskOpenError::InUse(_))), "{error}");
        drop(held);

        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        let error = problem_of(open(CLUSTER, 1).unwrap_err());
        assert!(matches!(error, DiskProblem::Truncated { .. }), "{error}");
        file.set_len(256 << 20).unwrap();

        // One bad copy is survived, two are not.
        file.write_all_at(&[0xff], 100).unwrap();
        open(CLUSTER, 1).unwrap();
        file.write_all_at(&[0xff], store::superblock::DISK_SUPER_B_BYTES + 100).unwrap();
        let error = problem_of(open(CLUSTER, 1).unwrap_err());
        assert!(matches!(error, DiskProblem::Superblock { .. }), "{error}");

        file.write_all_at(&[0x55; 1 << 20], 0).unwrap();
        assert!(matches!(problem_of(open(CLUSTER, 1).unwrap_err()), DiskProblem::Foreign));
    }
}
