//! Disks that a node takes while it runs.
//!
//! An administrator writes `/new-disks/NODE/UUID`. The node sees it and tells whoever assembled it
//! (`StatusInner::wanted_disks`), who opens the disk outside all loops, since that may wait for the drive, and answers
//! `DiskOpened`. The data cores open the slices, in steps, beside everything else. Only then is the disk judged as those
//! of a start are (`claims`), since a slice shows by opening how far it has come; and one transaction makes it the node's:
//! its place in `/nodes/N`, its record in `/disks/UUID`, and the end of the wish. Until then nothing counts on it. What is
//! refused is said in the wish, for whoever waits.

use crate::claims::{self, Generations, Refusal};
use crate::core::ControlCore;
use crate::drive::Asker;
use crate::lease::RETRY_MS;
use crate::stop::Stop;
use engine::CoreMsg;
use engine::msg::{Opened, OpenedDisk};
use placement::{Disk, NewDisk, Node, key};
use reactor::{Env, Mono};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;
use wire::control::{Compare, MetaReply, MetaRequest, Write};
use wire::{CoreId, DiskUuid, NodeId, SliceId};

/// Wishes looked at, of one node: an administrator has a hand full of new disks at a time.
pub const NEW_DISKS_MAX: usize = 16;

/// Why a running node does not take a disk.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum NewDiskError {
    /// It is one of its disks.
    #[error("node {node} has disk {disk} already ({path}): this is the same disk again, or a copy of it")]
    Twice {
        /// The node.
        node: NodeId,
        /// The disk.
        disk: DiskUuid,
        /// Where it has it.
        path: String,
    },
    /// It is not what the cluster remembers.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It cannot be opened.
    #[error("{0}")]
    Unopened(String),
    /// One of its slices cannot be opened.
    #[error("slice {slice} of disk {disk} does not open: {why}")]
    Slice {
        /// The disk.
        disk: DiskUuid,
        /// The slice.
        slice: SliceId,
        /// Why not.
        why: String,
    },
}

/// How far one is.
enum Stage {
    /// It is being opened.
    Wanted,
    /// Its slices are being opened; what they have said, and whose they are.
    Opening { disk: Disk, opened: BTreeMap<SliceId, Result<Opened, String>> },
    /// The wish is to be told.
    Refused(String),
}

struct Wish {
    ticket: u64,
    stage: Stage,
    in_flight: bool,
    not_before: Mono,
}

/// See the module.
#[derive(Default)]
pub(crate) struct NewDisks {
    wishes: BTreeMap<DiskUuid, Wish>,
    /// Slices that data cores have opened for nothing.
    turned_away: BTreeSet<SliceId>,
    tickets: u64,
}

impl NewDisks {
    /// A slice has opened or failed; whether it is one of a disk that is not the node's yet.
    pub(crate) fn heard(&mut self, slice: SliceId, result: Result<Opened, String>) -> bool {
        for wish in self.wishes.values_mut() {
            if let Stage::Opening { disk, opened } = &mut wish.stage
                && disk.slices.iter().any(|own| own.id == slice)
            {
                // What has failed once does not serve in this process.
                if !matches!(opened.get(&slice), Some(Err(_))) {
                    opened.insert(slice, result);
                }
                return true;
            }
        }
        self.turned_away.contains(&slice)
    }

    /// Whether a slice of this process is nobody's.
    pub(crate) fn is_strange(&self, slice: SliceId) -> bool {
        let of = |wish: &Wish| match &wish.stage {
            Stage::Opening { disk, .. } => disk.slices.iter().any(|own| own.id == slice),
            _ => false,
        };
        self.turned_away.contains(&slice) || self.wishes.values().any(of)
    }

    /// A transaction about it has been answered.
    pub(crate) fn on_reply(&mut self, disk: DiskUuid, reply: &MetaReply, now: Mono) {
        if let Some(wish) = self.wishes.get_mut(&disk) {
            wish.in_flight = false;
            if !matches!(reply, MetaReply::Applied { .. }) {
                wish.not_before = now.plus_ms(RETRY_MS);
            }
        }
    }
}

impl ControlCore {
    /// What became of a disk that was wanted.
    pub(crate) fn disk_opened(&mut self, ticket: u64, result: Result<OpenedDisk, String>) {
        let Some((uuid, wish)) = self.new_disks.wishes.iter_mut().find(|(_, wish)| wish.ticket == ticket)
        else {
            return;
        };
        let opened = match result {
            Ok(opened) if opened.disk.uuid == *uuid => opened,
            Ok(opened) => {
                wish.stage = Stage::Refused(format!("there is disk {} now", opened.disk.uuid));
                return;
            }
            Err(why) => {
                wish.stage = Stage::Refused(NewDiskError::Unopened(why).to_string());
                return;
            }
        };
        tracing::info!(disk = %uuid, path = opened.disk.path, "opening the slices of a new disk");
        wish.stage = Stage::Opening { disk: opened.disk, opened: BTreeMap::new() };
        for (core, slices) in opened.slices {
            self.feed.order(core, CoreMsg::OpenSlices { slices });
        }
    }

    /// Does what is due.
    pub(crate) fn plan_new_disks(&mut self, env: &mut dyn Env) {
        if self.stop != Stop::No || !self.mirror.is_ready() {
            return;
        }
        let prefix = key::new_disks_of(self.config.node);
        let wish = |uuid: &str, value: &str| Some((uuid.parse().ok()?, serde_json::from_str(value).ok()?));
        let asked: BTreeMap<DiskUuid, NewDisk> = self
            .mirror
            .range(&prefix)
            .filter_map(|item| wish(item.key.strip_prefix(&prefix)?, &item.value))
            .take(NEW_DISKS_MAX)
            .collect();
        if asked.is_empty() && self.new_disks.wishes.is_empty() {
            return;
        }
        let over = |(uuid, wish): (&DiskUuid, &Wish)| {
            (!wish.in_flight && asked.get(uuid).is_none_or(|new| new.refused.is_some())).then_some(*uuid)
        };
        let over: Vec<DiskUuid> = self.new_disks.wishes.iter().filter_map(over).collect();
        over.into_iter().for_each(|uuid| self.end_wish(uuid));
        for (uuid, new) in asked.into_iter().filter(|(_, new)| new.refused.is_none()) {
            if !self.new_disks.wishes.contains_key(&uuid) {
                self.begin_wish(uuid, &new);
            }
            self.further_wish(env, uuid, new);
        }
        self.tell_wanted();
    }

    fn begin_wish(&mut self, disk: DiskUuid, new: &NewDisk) {
        self.new_disks.tickets += 1;
        let stage = match self.may_come(disk) {
            Ok(()) => Stage::Wanted,
            Err(error) => Stage::Refused(error.to_string()),
        };
        tracing::info!(%disk, path = new.path, "a new disk");
        let ticket = self.new_disks.tickets;
        self.new_disks.wishes.insert(disk, Wish { ticket, stage, in_flight: false, not_before: Mono(0) });
    }

    /// What is known of a disk before it is opened.
    fn may_come(&self, disk: DiskUuid) -> Result<(), NewDiskError> {
        let node = self.config.node;
        let known = self.view.disk(disk).map(|(record, _)| record);
        let empty = Disk { uuid: disk, path: String::new(), slices: Vec::new() };
        claims::judge(node, self.registrar.process(), &empty, &Generations::new(), known)?;
        match self.config.disks.iter().find(|own| own.uuid == disk) {
            Some(own) => Err(NewDiskError::Twice { node, disk, path: own.path.clone() }),
            None => Ok(()),
        }
    }

    /// The next step of a wish that stands.
    fn further_wish(&mut self, env: &mut dyn Env, uuid: DiskUuid, new: NewDisk) {
        let registered = self.registrar.is_registered();
        let Some(wish) = self.new_disks.wishes.get_mut(&uuid) else { return };
        if wish.in_flight || env.now() < wish.not_before || !registered {
            return;
        }
        if let Stage::Opening { disk, opened } = &wish.stage {
            if disk.slices.iter().any(|slice| !opened.contains_key(&slice.id)) {
                return;
            }
            match self.registration_of(uuid) {
                Ok(Some(request)) => return self.ask_for(env, uuid, request),
                Ok(None) => return, // the map is not complete yet
                Err(error) => self.turn_away(uuid, &error),
            }
        }
        let Some(Wish { stage: Stage::Refused(why), .. }) = self.new_disks.wishes.get(&uuid) else { return };
        tracing::error!(disk = %uuid, path = new.path, why, "a new disk is refused");
        let (key, refused) = (key::new_disk(self.config.node, uuid), Some(why.clone()));
        let Ok(value) = serde_json::to_string(&NewDisk { refused, ..new }) else { return };
        let compares = vec![Compare::Exists { key: key.clone() }];
        let writes = vec![Write::Put { key, value, lease: None }];
        self.ask_for(env, uuid, MetaRequest::Txn { compares, writes });
    }

    fn ask_for(&mut self, env: &mut dyn Env, uuid: DiskUuid, request: MetaRequest) {
        if let Some(wish) = self.new_disks.wishes.get_mut(&uuid) {
            wish.in_flight = true;
            self.ask(env, Asker::NewDisk(uuid), request);
        }
    }

    /// The transaction that makes a disk the node's. It compares what the judgement was made from, and that this very
    /// process still has its lease.
    fn registration_of(&self, uuid: DiskUuid) -> Result<Option<MetaRequest>, NewDiskError> {
        let Some(Wish { stage: Stage::Opening { disk, opened }, .. }) = self.new_disks.wishes.get(&uuid)
        else {
            return Ok(None);
        };
        let (node, process) = (self.config.node, self.registrar.process());
        let mut disk = disk.clone();
        let mut generations = Generations::new();
        for slice in &mut disk.slices {
            match opened.get(&slice.id) {
                Some(Ok(opened)) => {
                    slice.size_bytes = opened.size_bytes;
                    generations.insert(slice.id, opened.generation);
                }
                Some(Err(why)) => {
                    return Err(NewDiskError::Slice { disk: uuid, slice: slice.id, why: why.clone() });
                }
                None => return Ok(None),
            }
        }
        let (disk_key, node_key, wish_key) = (key::disk(uuid), key::node(node), key::new_disk(node, uuid));
        let revision = |key: &str| self.mirror.get(key).map_or(wire::Revision(0), |item| item.mod_revision);
        let known = self.view.disk(uuid).map(|(record, _)| record);
        claims::judge(node, process, &disk, &generations, known)?;
        let Some(item) = self.mirror.get(&node_key) else { return Ok(None) };
        let Ok(mut record) = serde_json::from_str::<Node>(&item.value) else { return Ok(None) };
        let claim = claims::record(node, process, &disk, &generations, known);
        record.disks.retain(|other| other.uuid != uuid);
        record.disks.push(disk);
        let (Ok(value), Some(claim)) = (serde_json::to_string(&record), claims::put(uuid, &claim)) else {
            return Ok(None);
        };
        let compares = vec![
            Compare::Exists { key: wish_key.clone() },
            Compare::Bound { key: key::live(node), lease: self.registrar.session().0 },
            Compare::ModRevision { revision: revision(&node_key), key: node_key.clone() },
            Compare::ModRevision { revision: revision(&disk_key), key: disk_key },
        ];
        let writes =
            vec![Write::Put { key: node_key, value, lease: None }, claim, Write::Delete { key: wish_key }];
        Ok(Some(MetaRequest::Txn { compares, writes }))
    }

    /// A wish that is not there any more: fulfilled, or given up.
    fn end_wish(&mut self, uuid: DiskUuid) {
        let (node, process) = (self.config.node, self.registrar.process());
        let claimed = self.view.disk(uuid).is_some_and(|(record, _)| {
            record.node == node && record.process == process && record.retired.is_none()
        });
        let has = |record: &Node| record.disks.iter().any(|disk| disk.uuid == uuid);
        let registered = claimed && self.view.nodes().get(&node).is_some_and(has);
        if !registered {
            self.turn_away(uuid, &NewDiskError::Unopened("nobody wants it any more".into()));
        }
        let Some(wish) = self.new_disks.wishes.remove(&uuid) else { return };
        let Stage::Opening { disk, opened } = wish.stage else { return };
        tracing::info!(disk = %uuid, path = disk.path, "a new disk serves");
        self.config.disks.push(disk);
        for (slice, result) in opened {
            if let Ok(opened) = &result {
                self.marks.heard(slice, opened.generation);
            }
            self.opened.insert(slice, result);
        }
        self.tell_failed();
        self.check_ready();
    }

    /// Gives back what has been opened for nothing.
    fn turn_away(&mut self, uuid: DiskUuid, error: &NewDiskError) {
        let Some(wish) = self.new_disks.wishes.get_mut(&uuid) else { return };
        let why = error.to_string();
        if let Stage::Opening { disk, .. } = std::mem::replace(&mut wish.stage, Stage::Refused(why.clone())) {
            for slice in disk.slices {
                self.new_disks.turned_away.insert(slice.id);
                let msg = CoreMsg::GiveUp { slice: slice.id, why: why.clone(), spared: false };
                self.feed.order(CoreId(slice.core), msg);
            }
        }
    }

    /// Whoever assembled the node learns what is to be opened.
    fn tell_wanted(&mut self) {
        let prefix = key::new_disks_of(self.config.node);
        let mut wanted = Vec::new();
        for (uuid, wish) in
            self.new_disks.wishes.iter().filter(|(_, wish)| matches!(wish.stage, Stage::Wanted))
        {
            let item = self.mirror.get(&format!("{prefix}{uuid}"));
            if let Some(new) = item.and_then(|item| serde_json::from_str::<NewDisk>(&item.value).ok()) {
                wanted.push((wish.ticket, new.path));
            }
        }
        self.config.status.set(|status| status.wanted_disks = wanted);
    }
}
