//! The node's own slices: open, failed, or not allowed to serve.

use crate::claims::Refusal;
use crate::core::ControlCore;
use engine::CoreMsg;
use placement::{Node, SliceStat};
use std::net::SocketAddr;
use wire::{CoreId, DiskUuid, SliceId};

impl ControlCore {
    pub(crate) fn slice_failed(&mut self, slice: SliceId, why: &str) {
        if !matches!(self.opened.get(&slice), Some(Err(_))) {
            tracing::error!(%slice, why, "a slice has failed");
            self.opened.insert(slice, Err(why.to_owned()));
            self.tell_failed();
        }
    }

    /// The other slices of the disk go, too, whichever cores they belong to.
    pub(crate) fn disk_failed(&mut self, slice: SliceId, why: &str, spared: bool) {
        let disk = self.config.disks.iter().find(|disk| disk.slices.iter().any(|own| own.id == slice));
        let others = disk.into_iter().flat_map(|disk| &disk.slices).filter(|own| own.id != slice);
        for other in others {
            let msg = CoreMsg::GiveUp { slice: other.id, why: why.to_owned(), spared };
            self.feed.order(CoreId(other.core), msg);
        }
    }

    /// A slice of this node, or one that was its own at the last start, must not serve.
    pub(crate) fn refuse_slice(&mut self, slice: SliceId, why: String) {
        let known = self.opened.get(&slice).and_then(|result| result.as_ref().err());
        if known.is_some() {
            return;
        }
        let mut own = self.config.disks.iter().flat_map(|disk| &disk.slices);
        match own.find(|own| own.id == slice).map(|own| own.core) {
            Some(core) => {
                self.feed.order(CoreId(core), CoreMsg::GiveUp { slice, why: why.clone(), spared: false });
            }
            None => {
                let state = format!("failed: {why}");
                self.stats.slice(slice, SliceStat { state, ..SliceStat::default() });
            }
        }
        self.slice_failed(slice, &why);
    }

    /// What the cluster knows of a disk has changed: one of this node's may have been retired.
    pub(crate) fn disk_touched(&mut self, disk: DiskUuid) {
        let retired = self.view.disk(disk).is_some_and(|(record, _)| record.retired.is_some());
        let own = self.config.disks.iter().find(|own| own.uuid == disk);
        if let Some(own) = own.filter(|_| retired) {
            let slices: Vec<SliceId> = own.slices.iter().map(|slice| slice.id).collect();
            let why = Refusal::Retired { disk }.to_string();
            slices.into_iter().for_each(|slice| self.refuse_slice(slice, why.clone()));
        }
    }

    /// Failed slices with disk, path and reason, for `/metrics`.
    pub(crate) fn failed_slices(&self) -> Vec<[String; 4]> {
        let published = self.view.nodes().get(&self.config.node).map(|node| node.disks.as_slice());
        let disks = || self.config.disks.iter().chain(published.unwrap_or(&[]));
        let failed = self.opened.iter().filter_map(|(slice, result)| Some((*slice, result.as_ref().err()?)));
        failed
            .map(|(slice, why)| {
                let disk = disks().find(|disk| disk.slices.iter().any(|one| one.id == slice));
                let (uuid, path) = disk.map(|d| (d.uuid.to_string(), d.path.clone())).unwrap_or_default();
                [slice.to_string(), uuid, path, why.clone()]
            })
            .collect()
    }

    pub(crate) fn tell_failed(&mut self) {
        let failed: Vec<(SliceId, String)> = self
            .opened
            .iter()
            .filter_map(|(slice, result)| Some((*slice, result.as_ref().err()?.clone())))
            .collect();
        self.registrar.set_failed(failed.iter().map(|(slice, _)| *slice).collect());
        self.config.status.set(|status| status.failed_slices = failed);
    }

    /// Everything that the registration says is known.
    pub(crate) fn check_ready(&mut self) {
        let Some(control) = self.control_addr else { return };
        let cores: Vec<SocketAddr> = (0..self.config.data_cores)
            .filter_map(|core| self.listening.get(&CoreId(core)).copied())
            .collect();
        let mut disks = self.config.disks.clone();
        let mut slices = disks.iter_mut().flat_map(|disk| &mut disk.slices);
        let all_open = slices.all(|slice| match self.opened.get(&slice.id) {
            Some(Ok(opened)) => {
                slice.size_bytes = opened.size_bytes;
                true
            }
            Some(Err(_)) => true,
            None => false,
        });
        if cores.len() == usize::from(self.config.data_cores) && all_open {
            let (id, host, version) =
                (self.config.node, self.config.host.clone(), self.config.version.clone());
            let (problems, http) = (self.config.problems.clone(), self.http_addr);
            let node = Node { id, host, control, cores, http, disks, version, problems };
            self.registrar.ready(node, self.marks.generations().clone());
        }
    }
}
