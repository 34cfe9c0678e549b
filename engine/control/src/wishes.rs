//! What primaries on this node want in their PGs' records: members that are in sync again or no longer,
//! and consent to a hand-over. Each becomes a transaction that compares the record's revision; when the
//! record has changed meanwhile the wish is looked at again, and forgotten when it no longer applies.

use crate::config::{WISH_TXNS_MAX, WISHES_MAX, WISHES_PER_TXN};
use crate::director::decide::{Wish, finish_hand_over, fulfil};
use crate::director::put_record;
use crate::view::{PgEntry, View};
use engine::msg::PgReport;
use placement::{PgRecord, key};
use std::collections::{BTreeMap, BTreeSet};
use wire::control::{Compare, MetaReply, MetaRequest};
use wire::{CoreId, Epoch, PgId, Revision, SessionId, SliceId};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Member {
    epoch: Epoch,
    wish: Wish,
}

/// A transaction to submit.
#[derive(Clone, PartialEq, Debug)]
pub struct WishTxn {
    /// For `on_reply`.
    pub batch: u64,
    /// The request.
    pub request: MetaRequest,
}

/// See the module.
#[derive(Default)]
pub struct Wishes {
    members: BTreeMap<(PgId, SliceId), Member>,
    /// Epochs under which our core has said that it is not (or no longer) primary.
    consents: BTreeMap<PgId, Epoch>,
    due: BTreeSet<PgId>,
    /// PGs whose wish is on its way, with the revision it was computed from.
    busy: BTreeMap<PgId, Revision>,
    in_flight: BTreeMap<u64, Vec<PgId>>,
    next_batch: u64,
}

impl Wishes {
    /// A primary's core wishes something about a member.
    pub fn add(&mut self, pg: PgId, epoch: Epoch, slice: SliceId, wish: Wish) {
        if self.members.len() < WISHES_MAX {
            let member = Member { epoch, wish };
            // A bad wish of the same epoch outweighs a good one.
            let keep = self.members.get(&(pg, slice)).is_some_and(|old| {
                old.epoch > epoch || old.epoch == epoch && old.wish != Wish::InSync && wish == Wish::InSync
            });
            if !keep {
                self.members.insert((pg, slice), member);
                self.due.insert(pg);
            }
        }
    }

    /// A core has reported a PG: it acts under no earlier epoch any more. From the core of the former
    /// primary, and under a record without a primary, that is its consent.
    pub fn reported(&mut self, view: &View, own: SessionId, from: CoreId, report: &PgReport) {
        let Some(PgEntry { record, .. }) = view.pgs().get(&report.pg) else { return };
        let asked = record.primary.is_none() && record.primary_session == Some(own);
        let former = record.acting.first().and_then(|slice| view.home(*slice));
        let is_former = former
            .is_some_and(|home| CoreId(home.core) == from && view.node_of_session(own) == Some(home.node));
        if asked && is_former && report.epoch >= record.epoch {
            self.consents.insert(report.pg, report.epoch);
            self.due.insert(report.pg);
        }
    }

    /// The PG's record has changed.
    pub fn touched(&mut self, pg: PgId) {
        if self.consents.contains_key(&pg) || self.wishes_of(pg).next().is_some() {
            self.due.insert(pg);
        }
    }

    /// The session is over, and with it everything wished under it.
    pub fn clear(&mut self) {
        *self = Self { next_batch: self.next_batch, ..Self::default() };
    }

    fn wishes_of(&self, pg: PgId) -> impl Iterator<Item = (SliceId, Member)> + '_ {
        let range = (pg, SliceId(0))..=(pg, SliceId(u64::MAX));
        self.members.range(range).map(|((_, slice), member)| (*slice, *member))
    }

    /// Whether `plan` would find something now.
    pub fn has_work(&self) -> bool {
        !self.due.is_empty() && self.in_flight.len() < WISH_TXNS_MAX
    }

    /// The transactions that are due.
    pub fn plan(&mut self, view: &View, own: SessionId) -> Vec<WishTxn> {
        let mut txns = Vec::new();
        while self.in_flight.len() < WISH_TXNS_MAX {
            let (mut pgs, mut compares, mut writes) = (Vec::new(), Vec::new(), Vec::new());
            while pgs.len() < WISHES_PER_TXN {
                let Some(pg) = self.due.pop_first() else { break };
                if self.busy.contains_key(&pg) {
                    continue; // due again when it is answered
                }
                let Some((record, revision)) = self.look_at(view, own, pg) else { continue };
                if let Some(write) = put_record(pg, &record) {
                    compares.push(Compare::ModRevision { key: key::pg(pg), revision });
                    writes.push(write);
                    pgs.push(pg);
                    self.busy.insert(pg, revision);
                }
            }
            if pgs.is_empty() {
                break;
            }
            self.next_batch += 1;
            self.in_flight.insert(self.next_batch, pgs);
            txns.push(WishTxn { batch: self.next_batch, request: MetaRequest::Txn { compares, writes } });
        }
        txns
    }

    /// The record that fulfils the PG's first wish that still applies; others are forgotten.
    fn look_at(&mut self, view: &View, own: SessionId, pg: PgId) -> Option<(PgRecord, Revision)> {
        let Some((entry, pool)) = view.pgs().get(&pg).zip(view.pools().get(&pg.pool)) else {
            self.forget(pg);
            return None;
        };
        if self.consents.contains_key(&pg) {
            match finish_hand_over(view, entry, pool, own) {
                Some(record) => return Some((record, entry.revision)),
                None => {
                    self.consents.remove(&pg);
                }
            }
        }
        let wishes: Vec<(SliceId, Member)> = self.wishes_of(pg).collect();
        let mut found = None;
        for (slice, member) in wishes {
            let next = fulfil(entry, pool, own, member.epoch, slice, member.wish);
            match next {
                Some(record) if found.is_none() => found = Some((record, entry.revision)),
                Some(_) => {}
                // A wish of an epoch that the view has not reached yet stays.
                None if member.epoch > entry.record.epoch => {}
                None => {
                    self.members.remove(&(pg, slice));
                }
            }
        }
        found
    }

    fn forget(&mut self, pg: PgId) {
        let slices: Vec<SliceId> = self.wishes_of(pg).map(|(slice, _)| slice).collect();
        for slice in slices {
            self.members.remove(&(pg, slice));
        }
        self.consents.remove(&pg);
    }

    /// An answer. Conflicts and failures are tried again: at once where the record is another one by
    /// now, else when it changes or at the next `retry`.
    pub fn on_reply(&mut self, view: &View, batch: u64, reply: &MetaReply) {
        let Some(pgs) = self.in_flight.remove(&batch) else { return };
        let conflict = match reply {
            MetaReply::CompareFailed { index } => pgs.get(*index as usize).copied(),
            _ => None,
        };
        let failed = matches!(reply, MetaReply::Failed { .. });
        for pg in pgs {
            let used = self.busy.remove(&pg);
            let changed = view.pgs().get(&pg).map(|entry| entry.revision) != used;
            if changed || conflict.is_some() && conflict != Some(pg) && !failed {
                self.due.insert(pg);
            }
        }
    }

    /// Everything that is not on its way is looked at again.
    pub fn retry(&mut self) {
        let busy = &self.busy;
        let pgs = self.members.keys().map(|(pg, _)| *pg).chain(self.consents.keys().copied());
        let idle: Vec<PgId> = pgs.filter(|pg| !busy.contains_key(pg)).collect();
        self.due.extend(idle);
    }
}
