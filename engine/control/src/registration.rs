//! What a node registers: its record, its liveness, and its disks, as far as they may serve.

use crate::claims::{self, Refusal};
use crate::config::{ControlConfig, ControlError};
use crate::lease::{Ask, Do, RETRY_MS, Registrar, Step};
use placement::{Disk, Node, key};
use reactor::Mono;
use wire::DiskUuid;
use wire::control::{Compare, MetaRequest, Write};

/// How long another process may be alive under this node's number and disks, at another address, before
/// it counts as a second node and not as a predecessor that has just ended: three times a lease.
const TWIN_TIMES: u64 = 3;

impl Registrar {
    /// The node's record as it was, and the disks in it that this process does not have.
    fn missing(&self) -> Vec<Disk> {
        let before = self.node.as_ref().and_then(|(item, _)| item.as_ref());
        let before: Option<Node> = before.and_then(|item| serde_json::from_str(&item.value).ok());
        let own = self.record.iter().flat_map(|record| &record.disks);
        let own: Vec<DiskUuid> = own.map(|disk| disk.uuid).collect();
        let disks = before.into_iter().flat_map(|node| node.disks);
        disks.filter(|disk| !own.contains(&disk.uuid)).collect()
    }

    pub(crate) fn all_disks(&self) -> impl Iterator<Item = Disk> {
        let own = self.record.iter().flat_map(|record| record.disks.clone());
        own.chain(self.missing()).collect::<Vec<_>>().into_iter()
    }

    /// Disks that must not serve. One that is missing and retired is of no interest any more.
    pub(crate) fn refused(&self, config: &ControlConfig) -> Vec<(Disk, Refusal)> {
        let known = |disk: &Disk| self.disks.get(&disk.uuid).and_then(|(record, _)| record.as_ref());
        let own = self.record.iter().flat_map(|record| &record.disks).filter_map(|disk| {
            let verdict = claims::judge(config.node, self.process, disk, &self.generations, known(disk));
            verdict.err().map(|refusal| (disk.clone(), refusal))
        });
        let missing = self.missing().into_iter().filter(|disk| {
            known(disk).is_some_and(|record| record.retired.is_none() && record.node == config.node)
        });
        let missing = missing.map(|disk| {
            let refusal = Refusal::Missing { disk: disk.uuid, path: disk.path.clone() };
            (disk, refusal)
        });
        own.chain(missing).collect()
    }

    /// Another process that is alive under this number and has these disks is this one's predecessor, whose
    /// lease has not ended yet, when it had the same address: nobody else can have it. At another address
    /// it may be a second node with copies of the disks; then its lease does not end.
    pub(crate) fn wait_for_twin(&mut self, config: &ControlConfig, now: Mono) -> Option<Vec<Do>> {
        let (record, (live, _), (item, _)) =
            (self.record.as_ref()?, self.live.as_ref()?, self.node.as_ref()?);
        let theirs: Option<Node> = item.as_ref().and_then(|item| serde_json::from_str(&item.value).ok());
        let moved = |node: &Node| node.host != record.host || node.control != record.control;
        let other = live.as_ref().is_some_and(|live| live.session != self.session);
        let Some(twin) = theirs.filter(moved).filter(|_| other) else {
            self.twin_since = None;
            return None;
        };
        let since = *self.twin_since.get_or_insert(now);
        if now >= since.plus_ms(config.lease_ttl_ms * TWIN_TIMES) {
            let (node, host, control) = (config.node, twin.host, twin.control);
            return Some(vec![Do::Fail(ControlError::NodeInUse { node, host, control })]);
        }
        (self.node, self.live) = (None, None);
        self.step = Step::Waiting(now.plus_ms(RETRY_MS));
        Some(Vec::new())
    }

    pub(crate) fn register(&mut self, config: &ControlConfig, sent: Mono) -> Option<Do> {
        let refused = self.refused(config);
        let mut record = self.record.clone()?;
        record.disks.retain(|disk| {
            let refusal = refused.iter().find(|(other, _)| other.uuid == disk.uuid);
            refusal.is_none_or(|(_, refusal)| refusal.keeps_its_place())
        });
        let is_missing = |refusal: &Refusal| matches!(refusal, Refusal::Missing { .. });
        record.disks.extend(refused.iter().filter(|(_, r)| is_missing(r)).map(|(disk, _)| disk.clone()));
        let record = serde_json::to_string(&record).ok()?;
        let live = self.live_value()?;
        let (node_revision, live_revision) = (self.node.as_ref()?.1, self.live.as_ref()?.1);
        let (node_key, live_key) = (key::node(config.node), key::live(config.node));
        self.step = Step::Writing;
        let mut compares = vec![
            Compare::Exists { key: key::CLUSTER.to_owned() },
            Compare::ModRevision { key: node_key.clone(), revision: node_revision },
            Compare::ModRevision { key: live_key.clone(), revision: live_revision },
        ];
        let lease = Some(self.session.0);
        let mut writes = vec![
            Write::Put { key: node_key, value: record, lease: None },
            Write::Put { key: live_key, value: live, lease },
        ];
        for (disk, (known, revision)) in &self.disks {
            compares.push(Compare::ModRevision { key: key::disk(*disk), revision: *revision });
            let own = self.record.iter().flat_map(|record| &record.disks).find(|own| own.uuid == *disk);
            let serves = !refused.iter().any(|(other, _)| other.uuid == *disk);
            if let Some(own) = own.filter(|_| serves) {
                let known = known.as_ref();
                let new = claims::record(config.node, self.process, own, &self.generations, known);
                writes.push(claims::put(*disk, &new)?);
            }
        }
        Some(Do::Submit(Ask::Register(sent), MetaRequest::Txn { compares, writes }))
    }
}
