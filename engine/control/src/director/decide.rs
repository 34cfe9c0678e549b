//! The next configuration of one PG: a pure function of the map.
//!
//! What must hold, whatever the director believes:
//! - A primary is live and in sync, and its process is the one named in the record.
//! - `in_sync` shrinks only in a record that names a primary, and only by members that are not acting:
//!   the set that may hold acknowledged writes is recorded before the first write of an epoch.
//! - It never becomes empty.
//! - Nobody replaces a primary whose process still has its lease, except with that process's consent: it
//!   may be out of our sight and serve reads all the same. Until then the record names no primary, keeps
//!   `primary_session`, and has the former primary first in `acting`.
//!
//! A drained node's slice becomes primary only where no other in-sync member is up.

use crate::view::{PgEntry, View};
use placement::{PgRecord, Pool};
use std::collections::BTreeSet;
use wire::{Epoch, NodeId, SessionId, SliceId};

/// What a decision depends on besides the record.
#[derive(Clone, Copy)]
pub struct Situation<'a> {
    /// The map.
    pub view: &'a View,
    /// The PG's pool.
    pub pool: &'a Pool,
    /// Where placement wants the copies.
    pub target: &'a [SliceId],
    /// The director has just begun: members that are not here yet are on their way.
    pub settling: bool,
    /// Nodes that have gone since it began: they are not on their way.
    pub lost: &'a BTreeSet<NodeId>,
    /// Members that are not to be taken back yet.
    pub held: &'a BTreeSet<SliceId>,
    /// A member's process has changed without leaving: begin a new epoch even if nothing else changes.
    pub restarted: bool,
    /// The process that may still act as primary has said that it does not.
    pub consent: bool,
    /// Test switch: any live member may become primary.
    pub any_primary: bool,
}

/// Who may become primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fence {
    /// Any in-sync member: no process can believe itself primary.
    Free,
    /// Only this slice, in the same process.
    Only(SliceId),
    /// Nobody, until the process that holds authority is gone.
    Nobody,
}

impl Situation<'_> {
    fn up(&self, slice: SliceId) -> bool {
        self.view.up(slice).is_some() && !self.held.contains(&slice)
    }

    fn fence(&self, record: &PgRecord) -> Fence {
        let Some(session) = record.primary_session else { return Fence::Free };
        let Some(node) = self.view.node_of_session(session) else { return Fence::Free };
        if self.consent {
            return Fence::Free;
        }
        let Some(former) = record.primary.or(record.acting.first().copied()) else { return Fence::Nobody };
        let failed = self.view.live().get(&node).is_some_and(|live| live.failed.contains(&former));
        match self.view.home(former) {
            // Its core has given the slice up and never serves it again in this process.
            Some(home) if home.node == node && failed => Fence::Free,
            Some(home) if home.node == node => Fence::Only(former),
            _ => Fence::Nobody,
        }
    }

    /// Members of the next epoch: the targets that are up; while they do not all hold everything, also
    /// the other in-sync members that are up; and a primary that must hand over first.
    fn acting(&self, record: &PgRecord, fence: Fence) -> Vec<SliceId> {
        let mut acting: Vec<SliceId> = self.target.iter().copied().filter(|s| self.up(*s)).collect();
        let complete = self.target.iter().all(|s| self.up(*s) && record.in_sync.contains(s));
        if let Fence::Only(former) = fence
            && self.up(former)
            && record.in_sync.contains(&former)
            && !acting.contains(&former)
        {
            acting.push(former);
        }
        if !complete {
            for slice in record.acting.iter().chain(&record.in_sync) {
                if record.in_sync.contains(slice) && self.up(*slice) && !acting.contains(slice) {
                    acting.push(*slice);
                }
            }
        }
        acting
    }

    /// The record to write, or `None` when the present one is as good as it can be now.
    pub fn next(&self, entry: &PgEntry) -> Option<PgRecord> {
        let old = &entry.record;
        let on_its_way = |slice: &SliceId| {
            let gone = |home: crate::view::Home| {
                !self.view.live().contains_key(&home.node) && !self.lost.contains(&home.node)
            };
            self.view.home(*slice).is_some_and(gone)
        };
        if self.settling && old.acting.iter().any(on_its_way) {
            return None;
        }
        let fence = self.fence(old);
        let mut acting = self.acting(old, fence);
        let synced: Vec<SliceId> = acting.iter().copied().filter(|s| old.in_sync.contains(s)).collect();
        let enough = acting.len() >= usize::from(self.pool.min_copies.max(1));
        let eligible = if self.any_primary { &acting } else { &synced };
        let primary = match fence {
            _ if !enough => None,
            Fence::Free => eligible.iter().find(|s| !self.view.is_drained(**s)).or(eligible.first()).copied(),
            Fence::Only(former) => eligible.contains(&former).then_some(former),
            Fence::Nobody => None,
        };
        let mut new = PgRecord { target: self.target.to_vec(), ..old.clone() };
        if let Some(primary) = primary {
            new.primary = Some(primary);
            new.primary_session = self.view.up(primary);
            new.in_sync = synced;
            if self.any_primary && !new.in_sync.contains(&primary) {
                new.in_sync.push(primary);
            }
        } else {
            if fence == Fence::Free && old.primary.is_none() && old.primary_session.is_none()
                || fence == Fence::Free && self.settling && !self.serves(old)
            {
                // Nobody acts on the old record and nobody could on a new one. (While the cluster
                // starts that is also true of a record that names a process of the past.)
                return (new.target != old.target).then_some(new);
            }
            new.primary = None;
            if fence == Fence::Free {
                new.primary_session = None;
            }
            if let Fence::Only(former) = fence {
                acting.retain(|slice| *slice != former);
                acting.insert(0, former);
            }
        }
        new.acting = acting;
        let changed = new.acting != old.acting
            || new.primary != old.primary
            || new.primary_session != old.primary_session
            || self.restarted && new.primary.is_some();
        if changed {
            new.epoch = Epoch(old.epoch.0 + 1);
            return Some(new);
        }
        (new.target != old.target || new.in_sync != old.in_sync).then_some(new)
    }

    /// Whether the process that the record names as primary's is there.
    fn serves(&self, record: &PgRecord) -> bool {
        record.primary.is_some()
            && record.primary_session.is_some_and(|s| self.view.node_of_session(s).is_some())
    }

    /// The record of a PG that does not exist yet.
    pub fn first(&self) -> Option<PgRecord> {
        let acting: Vec<SliceId> = self.target.iter().copied().filter(|s| self.up(*s)).collect();
        let all = acting.len() == self.target.len();
        let enough = acting.len() >= usize::from(self.pool.min_copies.max(1));
        if !(all || enough && !self.settling) {
            return None;
        }
        let primary = acting.first().copied()?;
        Some(PgRecord {
            epoch: Epoch(1),
            target: self.target.to_vec(),
            in_sync: acting.clone(),
            acting,
            primary: Some(primary),
            primary_session: self.view.up(primary),
        })
    }

    /// Whether a drained node should give its primary to another member, which can take it now. The PG need not
    /// be clean for that: what the new primary lacks nobody has acknowledged.
    pub fn wants_relief(&self, record: &PgRecord) -> bool {
        let Some(primary) = record.primary.filter(|primary| self.view.is_drained(*primary)) else {
            return false;
        };
        let takes = |slice: &&SliceId| self.up(**slice) && !self.view.is_drained(**slice);
        record.acting.iter().filter(takes).any(|slice| record.in_sync.contains(slice))
            && self.fence(record) == Fence::Only(primary)
    }

    /// Whether the PG is clean and another member should be its primary.
    pub fn wants_hand_over(&self, record: &PgRecord) -> bool {
        let allowed = |slice: &SliceId| self.target.contains(slice) || record.primary == Some(*slice);
        let ready = |slice: &SliceId| {
            self.up(*slice) && record.acting.contains(slice) && record.in_sync.contains(slice)
        };
        record.primary.is_some()
            && record.primary != self.target.first().copied()
            && record.acting.iter().all(allowed)
            && self.target.iter().all(ready)
            && self.fence(record) == record.primary.map_or(Fence::Nobody, Fence::Only)
    }
}

/// The first half of a hand-over: nobody is primary until the present one consents.
pub fn begin_hand_over(record: &PgRecord) -> PgRecord {
    let mut new = record.clone();
    if let Some(former) = new.primary.take() {
        new.acting.retain(|slice| *slice != former);
        new.acting.insert(0, former);
        new.epoch = Epoch(new.epoch.0 + 1);
    }
    new
}

/// The second half, written by the node that gives the primary away, once its core has said that it
/// serves no longer. Members are the director's business: nobody joins here, and nobody is reinstated.
pub fn finish_hand_over(view: &View, entry: &PgEntry, pool: &Pool, own: SessionId) -> Option<PgRecord> {
    let record = &entry.record;
    let former = record.acting.first()?;
    if record.primary.is_some() || record.primary_session != Some(own) {
        return None;
    }
    let others = record.target.iter().chain(&record.in_sync);
    let held = others.filter(|slice| !record.acting.contains(slice)).copied().collect();
    let situation = Situation {
        view,
        pool,
        target: &record.target,
        settling: false,
        lost: &BTreeSet::new(),
        held: &held,
        restarted: false,
        consent: true,
        any_primary: false,
    };
    situation.next(entry).filter(|next| next.primary.is_some_and(|primary| primary != *former))
}

/// A primary's wish about a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// It holds everything.
    InSync,
    /// It missed something.
    OutOfSync,
    /// Its store cannot serve.
    Failed,
    /// The primary cannot reach it.
    Unreachable,
    /// It is the primary itself, which has stopped: it cannot reach enough of the others.
    GivesAway,
}

/// The record after a primary's wish; `None` when it does not apply (any more). `own` is the process
/// that wishes: only the primary of this very epoch may.
pub fn fulfil(
    entry: &PgEntry,
    pool: &Pool,
    own: SessionId,
    epoch: Epoch,
    slice: SliceId,
    wish: Wish,
) -> Option<PgRecord> {
    let record = &entry.record;
    let primary = record.primary?;
    if record.epoch != epoch || record.primary_session != Some(own) || !record.acting.contains(&slice) {
        return None;
    }
    let mut new = record.clone();
    if wish == Wish::InSync {
        if new.in_sync.contains(&slice) {
            return None;
        }
        new.in_sync.push(slice);
        return Some(new); // no new epoch: nobody has to act differently
    }
    if slice == primary {
        if !matches!(wish, Wish::Failed | Wish::GivesAway) {
            return None; // everybody is measured by the primary
        }
        // The wish is the consent: its core has stopped serving. It still holds every acknowledged write.
        new.epoch = Epoch(epoch.0 + 1);
        new.primary = None;
        new.primary_session = None;
        new.acting.retain(|s| *s != slice);
        return Some(new);
    }
    if wish == Wish::GivesAway {
        return None;
    }
    new.epoch = Epoch(epoch.0 + 1);
    new.in_sync.retain(|s| *s != slice);
    if matches!(wish, Wish::Failed | Wish::Unreachable) {
        new.acting.retain(|s| *s != slice);
    }
    if wish == Wish::Unreachable && new.acting.len() < usize::from(pool.min_copies.max(1)) {
        return None; // it may well be the primary that is cut off: not for it to end the PG's service
    }
    if new.acting.len() < usize::from(pool.min_copies.max(1)) {
        // Below the minimum nothing is served. The primary's process stays named: it may come back to
        // it, nobody else may.
        new.in_sync = record.in_sync.clone();
        new.primary = None;
        new.acting.retain(|s| *s != primary);
        new.acting.insert(0, primary);
    }
    Some(new)
}
