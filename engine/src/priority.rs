//! What background recovery does first, and what it leaves alone.
//!
//! A PG that has fewer copies in sync than its pool asks for comes before one whose copies are all there and only
//! move to another place. An administrator can pause either. A slice above a threshold takes no further objects in
//! the background; changes of clients still recover the objects that they touch.

use crate::core::DataCore;
use crate::op::OpKind;
use crate::pg::{Phase, Primary};
use crate::slab::Key;
use placement::Settings;
use std::collections::{BTreeSet, VecDeque};
use store::Presence;
use wire::frame::FLAG_BACKGROUND;
use wire::{FrameKind, Header, SliceId, Status};

/// How much a PG needs what it recovers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Urgency {
    /// Copies are lacking.
    Degraded,
    /// All are there, and some are to be elsewhere.
    Misplaced,
}

/// PGs with something to recover, in turn.
#[derive(Debug, Default)]
pub(crate) struct Round {
    degraded: VecDeque<Key>,
    misplaced: VecDeque<Key>,
}

impl Round {
    fn queue(&mut self, urgency: Urgency) -> &mut VecDeque<Key> {
        match urgency {
            Urgency::Degraded => &mut self.degraded,
            Urgency::Misplaced => &mut self.misplaced,
        }
    }
}

/// What the control core says of the cluster.
#[derive(Debug, Default)]
pub(crate) struct Decreed {
    pub(crate) settings: Settings,
    /// Slices of any node that are to get no new data from clients.
    pub(crate) full: BTreeSet<SliceId>,
}

impl DataCore {
    /// How much an active primary needs its members' missing objects; `None` when none are missing.
    fn urgency(&self, key: Key) -> Option<Urgency> {
        let pg = self.pgs.get(key)?;
        let (primary, update) = (pg.primary.as_deref()?, pg.update.as_ref()?);
        if primary.phase != Phase::Active || primary.members.iter().all(|member| member.missing.is_empty()) {
            return None;
        }
        let in_sync = primary.members.iter().filter(|m| m.in_sync && m.desynced.is_none());
        let enough = 1 + in_sync.clone().count() >= usize::from(update.pool.copies);
        let whole = in_sync.clone().all(|member| member.missing.is_empty());
        Some(if enough && whole { Urgency::Misplaced } else { Urgency::Degraded })
    }

    /// Puts a PG in the background's round if it has something to recover.
    pub(crate) fn want_recovery(&mut self, key: Key) {
        let Some(urgency) = self.urgency(key) else { return };
        if let Some(primary) = self.primary_mut(key)
            && primary.in_recovery != Some(urgency)
        {
            // An entry in the other queue counts no more.
            primary.in_recovery = Some(urgency);
            self.recovering.queue(urgency).push_back(key);
        }
    }

    /// Whether a PG waits for the background that is not paused.
    pub(crate) fn has_round(&self) -> bool {
        let Settings { norecover, norebalance, .. } = self.decreed.settings;
        !norecover && !self.recovering.degraded.is_empty()
            || !norebalance && !self.recovering.misplaced.is_empty()
    }

    /// Takes the next PG out of the background's round.
    pub(crate) fn next_in_round(&mut self) -> Option<Key> {
        let Settings { norecover, norebalance, .. } = self.decreed.settings;
        for (urgency, paused) in [(Urgency::Degraded, norecover), (Urgency::Misplaced, norebalance)] {
            if paused {
                continue;
            }
            while let Some(key) = self.recovering.queue(urgency).pop_front() {
                if let Some(primary) = self.primary_mut(key)
                    && primary.in_recovery == Some(urgency)
                {
                    primary.in_recovery = None;
                    return Some(key);
                }
            }
        }
        None
    }

    /// As a member: whether this push is one that a nearly full slice leaves out.
    pub(crate) fn is_backfill_refused(&self, at: usize, header: &Header) -> bool {
        if header.flags & FLAG_BACKGROUND == 0 || header.kind != FrameKind::SubPush {
            return false;
        }
        let Some(store) = self.store_ref(at) else { return false };
        let grows = header.block & !store.written_mask(header.object) != 0
            || store.lookup(header.object) == Presence::Absent;
        let (used_bytes, free_bytes) = store.space();
        grows
            && Settings::reaches(
                used_bytes,
                used_bytes + free_bytes,
                self.decreed.settings.backfillfull_percent,
            )
    }

    /// As a primary: whether a client's write would take more space while one of the copies lies on a full slice.
    pub(crate) fn is_full_for(&self, primary: &Primary, kind: OpKind, header: &Header, mask: u32) -> bool {
        let full = &self.decreed.full;
        if full.is_empty() || kind != OpKind::Write {
            return false;
        }
        let concerned =
            full.contains(&primary.slice) || primary.members.iter().any(|m| full.contains(&m.slice));
        let written = self.store_ref(primary.at).map_or(u32::MAX, |s| s.written_mask(header.object));
        concerned && mask & !written != 0
    }

    /// A member has taken an object, or has no room for it.
    pub(crate) fn note_room(&mut self, key: Key, index: usize, status: Status) {
        let Some(primary) = self.primary_mut(key) else { return };
        let Some(member) = primary.members.get_mut(index) else { return };
        let too_full = status == Status::NoSpace;
        if member.too_full != too_full {
            member.too_full = too_full;
            if too_full {
                tracing::warn!(slice = %member.slice, "too full for recovery, which waits for space");
            }
            self.report_later(key);
        }
    }
}
