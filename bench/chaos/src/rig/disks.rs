//! The disks of a rig's nodes: where they are, how full they may get, the second ones that fail on purpose, and
//! whether all are in order at the end.

use super::Rig;
use crate::error::ChaosError;
use crate::faulty::FaultyDisk;
use crate::isolate;
use cli::children::Fleet;
use cli::error::CliError;
use placement::{Node, key};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use wire::{NodeId, SliceId};

/// A disk's own tmpfs. It is unmounted when dropped.
pub(super) struct Mount(pub(super) PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        isolate::unmount(&self.0);
    }
}

impl Rig {
    /// Where a node's disk is, and how large its own file system is.
    pub fn disk(&self, index: usize) -> Result<PathBuf, ChaosError> {
        let node = self.fleet.nodes.get(index).ok_or(CliError::NoCluster)?;
        Ok(node.disk.clone())
    }

    /// Replaces a stopped node's disk by a new, empty one.
    pub fn replace_disk(&mut self, index: usize) -> Result<(), ChaosError> {
        let disk = self.disk(index)?;
        std::fs::remove_file(&disk).map_err(ChaosError::io(format!("remove {}", disk.display())))?;
        Ok(self.fleet.prepare_disk(index)?)
    }

    /// The slices of a node's second disk.
    pub fn faulty_slices(&mut self, index: usize) -> Result<BTreeSet<SliceId>, ChaosError> {
        let lacks = || ChaosError::Demand(format!("node {} has no second disk", index + 1));
        let path = self.faulty.get(index).ok_or_else(lacks)?.path.display().to_string();
        let found = self.admin.get::<Node>(&key::node(NodeId(index as u64 + 1)))?;
        let disks = found.map(|(node, _)| node.disks).unwrap_or_default();
        let disk = disks.iter().find(|disk| disk.path == path).ok_or_else(lacks)?;
        Ok(disk.slices.iter().map(|slice| slice.id).collect())
    }

    /// Checks every disk of every node, all of which are stopped, with all its data.
    pub(super) fn check_disks(&self) -> Result<(), ChaosError> {
        for index in 0..self.nodes() {
            self.check_disk(index, &self.disk(index)?)?;
        }
        for (index, disk) in self.faulty.iter().enumerate() {
            self.check_disk(index, &disk.path)?;
        }
        Ok(())
    }

    /// Runs the offline check on a stopped node's disk; an error carries what it found.
    fn check_disk(&self, index: usize, disk: &Path) -> Result<(), ChaosError> {
        let mut command = Command::new(&self.programs.drystone);
        command.args(["disk", "check", "--data"]).arg(disk).stdin(Stdio::null());
        let output = command.output().map_err(ChaosError::io("run `drystone disk check`"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(ChaosError::Demand(format!(
            "the disk of node {} is not in order: {}{}",
            index + 1,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )))
    }

    /// Changes how much a node's disk may hold; it was made sparse.
    pub fn limit_disk(&self, index: usize, bytes: u64) -> Result<(), ChaosError> {
        match self.mounts.get(index) {
            Some(mount) => isolate::resize_tmpfs(&mount.0, bytes),
            None => Err(ChaosError::Impossible("disks have no file system of their own".into())),
        }
    }

    /// Bytes that a node's disk takes now.
    pub fn disk_used(&self, index: usize) -> Result<u64, ChaosError> {
        use std::os::unix::fs::MetadataExt;
        let disk = self.disk(index)?;
        let meta = std::fs::metadata(&disk).map_err(ChaosError::io(format!("look at {}", disk.display())))?;
        Ok(meta.blocks() * 512)
    }
}

/// Gives a node that does not run a second disk, which can be made to fail.
pub(super) fn add_faulty(fleet: &mut Fleet, index: usize, bytes: u64) -> Result<FaultyDisk, ChaosError> {
    let dir = fleet.nodes.get(index).ok_or(CliError::NoCluster)?.dir.clone();
    let disk = FaultyDisk::mount(&dir.join("faulty"), &dir.join("faulty-bytes"), bytes)?;
    fleet.add_disk(index, disk.path.clone())?;
    Ok(disk)
}
