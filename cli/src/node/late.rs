//! Disks that the node takes while it runs: opened here, outside its loops, because that may wait for the drive.

use crate::disks;
use crate::error::CliError;
use engine::msg::OpenedDisk;
use engine::{CoreMsg, SliceConfig};
use placement::{Disk, Slice};
use reactor::backend::{Access, LATE_DISKS_MAX, LateDisks, Poster};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use wire::{ClusterId, CoreId, NodeId};

/// Disks that are being opened at once. One that hangs holds its thread for as long as it does.
const OPENING_MAX: usize = 8;

/// What opening needs to know.
#[derive(Clone)]
pub struct LatePlan {
    /// Where cores find what is opened.
    pub disks: LateDisks,
    /// Whose disks they must be.
    pub cluster: ClusterId,
    /// Likewise.
    pub node: NodeId,
    /// Data cores to deal slices to.
    pub cores: u16,
    /// Slices dealt, since the node started.
    pub dealt: Arc<AtomicUsize>,
}

impl LatePlan {
    /// Locks a disk, claims it if it is nobody's, and says which core gets which slice.
    fn open(&self, path: &Path) -> Result<OpenedDisk, CliError> {
        // Rings take NVMe commands only from their start on.
        let disk = disks::open_for_node(path, Access::Block, self.cluster, self.node)?;
        let refused = |error: reactor::backend::TooManyDisks| CliError::Refused {
            what: format!("take {}", path.display()),
            why: error.to_string(),
        };
        let index = self.disks.add(disk.file.clone()).map_err(refused)?;
        let entries = &disk.superblock.slices;
        let first = self.dealt.fetch_add(entries.len(), Ordering::Relaxed);
        let mut slices: BTreeMap<CoreId, Vec<SliceConfig>> = BTreeMap::new();
        let mut published = Vec::new();
        for (at, entry) in entries.iter().enumerate() {
            // Dealt on from where the last disk ended.
            let core = ((first + at) % usize::from(self.cores.max(1))) as u16;
            slices
                .entry(CoreId(core))
                .or_default()
                .push(SliceConfig { disk: index, geometry: entry.geometry() });
            published.push(Slice { id: entry.slice, core, size_bytes: entry.len });
        }
        let disk = Disk { uuid: disk.superblock.disk, path: path.display().to_string(), slices: published };
        Ok(OpenedDisk { disk, slices: slices.into_iter().collect() })
    }
}

/// Opens what the control core wants.
pub struct Opener {
    plan: LatePlan,
    control: Poster,
    /// The last wish that was heard.
    heard: u64,
    threads: Vec<JoinHandle<()>>,
}

impl Opener {
    /// One that answers to the control core.
    pub fn new(plan: LatePlan, control: Poster) -> Self {
        Self { plan, control, heard: 0, threads: Vec::with_capacity(LATE_DISKS_MAX) }
    }

    /// Looks at what is wanted now; each wish is heard once.
    #[allow(clippy::disallowed_methods, reason = "the process around the cores, outside the seam")]
    pub fn look(&mut self, wanted: &[(u64, String)]) {
        for (ticket, path) in wanted {
            if *ticket <= self.heard {
                continue;
            }
            self.threads.retain(|thread| !thread.is_finished());
            if self.threads.len() >= OPENING_MAX {
                return; // heard later
            }
            self.heard = *ticket;
            let (plan, control, ticket, path) =
                (self.plan.clone(), self.control.clone(), *ticket, PathBuf::from(path));
            let thread = std::thread::Builder::new().name("open-disk".into()).spawn(move || {
                let result = plan.open(&path).map_err(|error| error.to_string());
                if control.post(CoreMsg::DiskOpened { ticket, result }.into_mesh()).is_err() {
                    tracing::error!(path = %path.display(), "the control core does not hear of a new disk");
                }
            });
            match thread {
                Ok(thread) => self.threads.push(thread),
                Err(error) => tracing::error!(%error, "no thread to open a new disk"),
            }
        }
    }
}
