//! Whether a node's disks are what the cluster remembers of them.
//!
//! A slice that the records call in sync is believed to hold every acknowledged write. That is wrong when
//! its disk is not the one that held them: an older copy of it (a snapshot brought back, a clone started
//! instead of the original), or a disk that had been replaced and comes back. So the cluster remembers, per
//! slice, the highest generation that it has heard of (`Opened::generation`), and a process registers with
//! higher ones or not at all. Every open raises it; so does every checkpoint, which is recorded about once a
//! minute and at a clean stop (`Marks`).

use crate::config::ControlConfig;
use crate::view::View;
use placement::{Disk, DiskRecord, SliceMark, key};
use reactor::Mono;
use std::collections::BTreeMap;
use thiserror::Error;
use wire::control::{Compare, MetaRequest, Write};
use wire::{DiskUuid, NodeId, Revision, SessionId, SliceId};

/// Time between two records of generations, in milliseconds. A copy that a disk is exchanged for goes
/// unnoticed only when it is younger than this.
pub const MARK_MS: u64 = 60_000;
/// Disks in one transaction: some kilobytes each where there are many slices.
const DISKS_PER_TXN: usize = 16;

/// Generations of this node's slices, as their stores say.
pub type Generations = BTreeMap<SliceId, u64>;

/// Why a disk must not serve.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Refusal {
    /// An administrator has taken it out for good.
    #[error("disk {disk} has been retired: prepare it anew to use it again (`disk prepare --force`)")]
    Retired {
        /// The disk.
        disk: DiskUuid,
    },
    /// Another node has it.
    #[error("disk {disk} belongs to node {owner}: it must not be used by two nodes")]
    OtherNode {
        /// The disk.
        disk: DiskUuid,
        /// Its node.
        owner: NodeId,
    },
    /// The cluster has seen a later state of it.
    #[error(
        "disk {disk} is an older copy of itself: slice {slice} comes with generation {found}, the cluster has \
         seen {known}"
    )]
    OldCopy {
        /// The disk.
        disk: DiskUuid,
        /// One of its slices.
        slice: SliceId,
        /// As found.
        found: u64,
        /// As remembered.
        known: u64,
    },
    /// It was there, and the node was started without it.
    #[error("disk {disk} ({path}) is not there: it was when the node last started")]
    Missing {
        /// The disk.
        disk: DiskUuid,
        /// Where it was.
        path: String,
    },
}

impl Refusal {
    /// Whether the disk's slices stay in the map, as failed ones of this node.
    pub fn keeps_its_place(&self) -> bool {
        matches!(self, Self::OldCopy { .. } | Self::Missing { .. })
    }
}

/// Whether a disk of `node` may serve under `process`.
pub fn judge(
    node: NodeId,
    process: SessionId,
    disk: &Disk,
    generations: &Generations,
    known: Option<&DiskRecord>,
) -> Result<(), Refusal> {
    let Some(known) = known else { return Ok(()) };
    let disk = disk.uuid;
    if known.retired.is_some() {
        return Err(Refusal::Retired { disk });
    }
    if known.node != node {
        return Err(Refusal::OtherNode { disk, owner: known.node });
    }
    if known.process == process {
        return Ok(());
    }
    let old = known.slices.iter().find_map(|mark| {
        let found = *generations.get(&mark.slice)?;
        (found <= mark.generation).then_some((mark.slice, found, mark.generation))
    });
    match old {
        Some((slice, found, known)) => Err(Refusal::OldCopy { disk, slice, found, known }),
        None => Ok(()),
    }
}

/// The record of a disk that serves. Generations never go back, and a slice that did not open keeps its own.
pub fn record(
    node: NodeId,
    process: SessionId,
    disk: &Disk,
    generations: &Generations,
    known: Option<&DiskRecord>,
) -> DiskRecord {
    let remembered = |slice: SliceId| {
        let marks = known.into_iter().flat_map(|known| &known.slices);
        marks.filter(|mark| mark.slice == slice).map(|mark| mark.generation).max().unwrap_or(0)
    };
    let slices = disk.slices.iter().map(|slice| {
        let found = generations.get(&slice.id).copied().unwrap_or(0);
        SliceMark { slice: slice.id, generation: found.max(remembered(slice.id)) }
    });
    DiskRecord { node, process, slices: slices.collect(), retired: None }
}

/// The write of a disk's record. Serialising numbers and lists cannot fail.
pub fn put(disk: DiskUuid, record: &DiskRecord) -> Option<Write> {
    Some(Write::Put { key: key::disk(disk), value: serde_json::to_string(record).ok()?, lease: None })
}

/// Records of generations while the node runs.
#[derive(Default)]
pub struct Marks {
    generations: Generations,
    next: Mono,
    in_flight: bool,
}

impl Marks {
    /// A slice has opened or written a checkpoint.
    pub fn heard(&mut self, slice: SliceId, generation: u64) {
        let known = self.generations.entry(slice).or_default();
        *known = generation.max(*known);
    }

    /// What was heard.
    pub fn generations(&self) -> &Generations {
        &self.generations
    }

    /// The write that is due: `session` is the running one, `process` the first of this process.
    pub fn plan(
        &mut self,
        config: &ControlConfig,
        view: &View,
        session: SessionId,
        process: SessionId,
        now: Mono,
    ) -> Option<MetaRequest> {
        if now < self.next || self.in_flight {
            return None;
        }
        let request = self.write(config, view, session, process)?;
        self.next = now.plus_ms(MARK_MS);
        self.in_flight = true;
        Some(request)
    }

    /// What has risen since the records in the view; `None` when nothing has.
    pub fn write(
        &self,
        config: &ControlConfig,
        view: &View,
        session: SessionId,
        process: SessionId,
    ) -> Option<MetaRequest> {
        // Of an earlier session that was held up on its way it must not undo what a later one wrote.
        let live = Compare::Bound { key: key::live(config.node), lease: session.0 };
        let (mut compares, mut writes) = (vec![live], Vec::new());
        for disk in &config.disks {
            let Some((known, revision)) = view.disk(disk.uuid) else { continue };
            let ours = known.process == process && known.retired.is_none();
            let new = record(config.node, process, disk, &self.generations, Some(known));
            if !ours || new == *known || writes.len() >= DISKS_PER_TXN {
                continue;
            }
            compares.push(Compare::ModRevision { key: key::disk(disk.uuid), revision });
            writes.push(put(disk.uuid, &new)?);
        }
        (!writes.is_empty()).then_some(MetaRequest::Txn { compares, writes })
    }

    /// The answer; one that failed is tried again with the next.
    pub fn on_reply(&mut self) {
        self.in_flight = false;
    }
}

/// What the metadata store has answered about disks, with the revisions to compare against.
pub type Answers = BTreeMap<DiskUuid, (Option<DiskRecord>, Revision)>;

#[cfg(test)]
mod tests {
    use super::*;
    use placement::{Retired, Slice};

    const OWN: NodeId = NodeId(1);
    const NOW: SessionId = SessionId(20);
    const BEFORE: SessionId = SessionId(10);

    fn disk() -> Disk {
        let slices = (1..=2).map(|id| Slice { id: SliceId(id), core: 0, size_bytes: 1 });
        Disk { uuid: DiskUuid(7), path: "/dev/x".into(), slices: slices.collect() }
    }

    fn known(process: SessionId, generation: u64) -> DiskRecord {
        record(OWN, process, &disk(), &[(SliceId(1), generation), (SliceId(2), 5)].into(), None)
    }

    fn verdict(found: u64, known: &DiskRecord) -> Result<(), Refusal> {
        judge(OWN, NOW, &disk(), &[(SliceId(1), found), (SliceId(2), 6)].into(), Some(known))
    }

    #[test]
    fn a_slice_must_have_come_further_than_the_cluster_remembers() {
        assert_eq!(judge(OWN, NOW, &disk(), &Generations::new(), None), Ok(()));
        assert_eq!(verdict(9, &known(BEFORE, 8)), Ok(()));
        for found in [8, 3] {
            let refused = verdict(found, &known(BEFORE, 8));
            assert!(
                matches!(refused, Err(Refusal::OldCopy { slice: SliceId(1), known: 8, .. })),
                "{refused:?}"
            );
        }
        // A process that registers once more comes with what it has recorded itself.
        assert_eq!(verdict(8, &known(NOW, 8)), Ok(()));
    }

    #[test]
    fn retired_disks_and_those_of_other_nodes_are_refused() {
        let mut gone = known(BEFORE, 1);
        gone.retired = Some(Retired { at_ms: 0, replaced_by: None });
        assert!(matches!(verdict(9, &gone), Err(Refusal::Retired { .. })));
        let other = DiskRecord { node: NodeId(2), ..known(BEFORE, 1) };
        assert!(matches!(verdict(9, &other), Err(Refusal::OtherNode { owner: NodeId(2), .. })));
    }

    #[test]
    fn a_slice_that_did_not_open_is_not_forgotten() {
        let again = record(OWN, NOW, &disk(), &[(SliceId(2), 9)].into(), Some(&known(BEFORE, 8)));
        assert_eq!(again.slices.iter().map(|mark| mark.generation).collect::<Vec<_>>(), [8, 9]);
    }
}
