//! Which PG is scrubbed when: the schedule of the PGs whose primary is on this node.
//!
//! `/scrub/POOL/INDEX` says when a PG was scrubbed last, and whether somebody wants it scrubbed now; so the schedule
//! survives restarts and follows the primary. Each data core scrubs one PG at a time, the most overdue first.
//! Due dates are spread over half an interval, lest everything that was created together come due together.

use crate::view::View;
use engine::CoreMsg;
use engine::msg::ScrubReport;
use placement::{ScrubDepth, ScrubPlan, ScrubRecord, key};
use reactor::Mono;
use std::collections::{BTreeMap, VecDeque};
use wire::control::{Compare, MetaReply, MetaRequest, Write};
use wire::{CoreId, NodeId, PgId, Revision, SessionId};

/// Time between two looks at the schedule when nothing has happened, in milliseconds. A scrub under way is asked for
/// again as often: the core forgets it when it is not, or not yet, primary.
const LOOK_MS: u64 = 5_000;
/// Longest time until PGs that have just changed are looked at, in milliseconds: many change together.
const SOON_MS: u64 = 500;
/// Pause after a record could not be written, in milliseconds.
const RETRY_MS: u64 = 500;

/// What a record on its way says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Writing {
    /// The first of `found`.
    Found,
    /// That the PG is new. It is empty then, and as good as scrubbed: a pool's first scrub is as far away as any.
    New,
}

/// See the module.
#[derive(Default)]
pub struct Scrubs {
    /// What each core is doing.
    running: BTreeMap<CoreId, (PgId, ScrubDepth)>,
    /// Found and not yet written down: at most one for each core, and what a repeated request brings.
    found: VecDeque<ScrubReport>,
    /// A PG of which nothing is written down yet.
    unknown: Option<PgId>,
    writing: Option<Writing>,
    next_look: Mono,
    next_write: Mono,
    now: Mono,
}

/// A fixed spread: the same PG and date give the same number.
fn spread(pg: PgId, last_ms: u64) -> u64 {
    let word = u64::from(pg.pool.0) << 32 | u64::from(pg.index);
    let mixed = (word ^ last_ms.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// By how many milliseconds something is overdue that was done at `last_ms` and is to be done every `secs`; `None`
/// when it is not due. A last time in the future is somebody's wrong clock: due.
fn overdue(pg: PgId, secs: u64, last_ms: u64, now_ms: u64) -> Option<u64> {
    let interval_ms = secs.saturating_mul(1000);
    if interval_ms == 0 {
        return None;
    }
    if last_ms > now_ms.saturating_add(interval_ms) {
        return Some(0);
    }
    let half = (interval_ms / 2).max(1);
    let due_ms =
        last_ms.saturating_add(interval_ms - interval_ms / 4).saturating_add(spread(pg, last_ms) % half);
    now_ms.checked_sub(due_ms)
}

/// What is due for a PG, and how urgent it is: what somebody waits for is most urgent.
fn due(pg: PgId, plan: ScrubPlan, record: &ScrubRecord, now_ms: u64) -> Option<(u64, ScrubDepth)> {
    if let Some(depth) = record.wanted {
        return Some((u64::MAX, depth));
    }
    let deep = overdue(pg, plan.deep_secs, record.deep_ms, now_ms).map(|by| (by, ScrubDepth::Deep));
    let light = overdue(pg, plan.light_secs, record.light_ms, now_ms).map(|by| (by, ScrubDepth::Light));
    // A deep one serves for both.
    deep.or(light)
}

/// The record after a run.
fn after(before: &ScrubRecord, report: &ScrubReport, wall_ms: u64) -> ScrubRecord {
    ScrubRecord {
        light_ms: wall_ms,
        deep_ms: if report.depth == ScrubDepth::Deep { wall_ms } else { before.deep_ms },
        objects: report.objects,
        errors: report.errors,
        wanted: before.wanted.filter(|wanted| *wanted > report.depth),
    }
}

impl Scrubs {
    /// Somebody wants a scrub, or one is written down: look again.
    pub fn touched(&mut self) {
        self.next_look = Mono(0);
    }

    /// The PG's record has changed: a scrub of it under way has ended with its epoch.
    pub fn pg_touched(&mut self, pg: PgId) {
        self.running.retain(|_, (running, _)| *running != pg);
        self.next_look = self.next_look.min(self.now.plus_ms(SOON_MS));
    }

    /// The session is over; its primaries are none any more.
    pub fn clear(&mut self) {
        self.running.clear();
        self.found.clear();
    }

    /// A core has been through a PG.
    pub fn reported(&mut self, from: CoreId, report: ScrubReport) {
        if self.running.get(&from).is_some_and(|(pg, _)| *pg == report.pg) {
            self.running.remove(&from);
        }
        if !self.found.iter().any(|known| known.pg == report.pg && known.depth == report.depth) {
            self.found.push_back(report);
        }
        self.next_look = Mono(0);
    }

    /// What the cores are to scrub now.
    pub fn look(&mut self, view: &View, node: NodeId, now: Mono, wall_ms: u64) -> Vec<(CoreId, CoreMsg)> {
        self.now = now;
        // What is found and not written down yet would be due again.
        if now < self.next_look || !self.found.is_empty() || self.writing.is_some() {
            return Vec::new();
        }
        self.next_look = now.plus_ms(LOOK_MS);
        let mut best: BTreeMap<CoreId, (u64, ScrubDepth, PgId)> = BTreeMap::new();
        for (pg, entry) in view.pgs() {
            let Some(home) = entry.record.primary.and_then(|slice| view.home(slice)) else { continue };
            let core = CoreId(home.core);
            if home.node != node || self.running.contains_key(&core) {
                continue;
            }
            let Some(pool) = view.pools().get(&pg.pool).filter(|pool| !pool.removing) else { continue };
            let (record, revision) = view.scrub(*pg);
            if revision == Revision(0) {
                self.unknown = Some(*pg);
                continue;
            }
            let never = ScrubPlan { light_secs: 0, deep_secs: 0 };
            let plan = if view.settings().noscrub { never } else { pool.scrub };
            if let Some((by, depth)) = due(*pg, plan, &record, wall_ms)
                && best.get(&core).is_none_or(|(most, ..)| by > *most)
            {
                best.insert(core, (by, depth, *pg));
            }
        }
        self.running.extend(best.into_iter().map(|(core, (_, depth, pg))| (core, (pg, depth))));
        let ask = |(core, (pg, depth)): (&CoreId, &(PgId, ScrubDepth))| {
            (*core, CoreMsg::Scrub { pg: *pg, depth: *depth })
        };
        self.running.iter().map(ask).collect()
    }

    /// The record that is to be written.
    pub fn plan(&mut self, view: &View, session: SessionId, wall_ms: u64) -> Option<MetaRequest> {
        if self.writing.is_some() || self.now < self.next_write {
            return None;
        }
        let node = view.node_of_session(session)?;
        let (pg, next, writing) = match self.found.front().copied() {
            Some(report) => (report.pg, after(&view.scrub(report.pg).0, &report, wall_ms), Writing::Found),
            None => {
                let next = ScrubRecord { light_ms: wall_ms, deep_ms: wall_ms, ..ScrubRecord::default() };
                (self.unknown.take()?, next, Writing::New)
            }
        };
        let revision = view.scrub(pg).1;
        if !view.pgs().contains_key(&pg) || writing == Writing::New && revision != Revision(0) {
            if writing == Writing::Found {
                self.found.pop_front();
            }
            return None;
        }
        let value = serde_json::to_string(&next).ok()?;
        let name = key::scrub(pg);
        // Not after the PG's removal, and not by a node that is primary of nothing any more.
        let compares = vec![
            Compare::ModRevision { key: name.clone(), revision },
            Compare::Exists { key: key::pg(pg) },
            Compare::Bound { key: key::live(node), lease: session.0 },
        ];
        self.writing = Some(writing);
        Some(MetaRequest::Txn { compares, writes: vec![Write::Put { key: name, value, lease: None }] })
    }

    /// The answer. What could not be written is tried again, from what the view says then.
    pub fn on_reply(&mut self, reply: &MetaReply, now: Mono) {
        let written = self.writing.take();
        if matches!(reply, MetaReply::Applied { .. }) {
            if written == Some(Writing::Found) {
                self.found.pop_front();
            }
            self.next_look = Mono(0);
        } else {
            self.next_write = now.plus_ms(RETRY_MS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::PoolId;

    const PG: PgId = PgId { pool: PoolId(1), index: 7 };
    const DAY_MS: u64 = 24 * 3600 * 1000;

    #[test]
    fn due_dates_lie_between_three_and_five_quarters_of_the_interval_and_differ() {
        let secs = DAY_MS / 1000;
        let mut dates = std::collections::BTreeSet::new();
        for index in 0..100 {
            let pg = PgId { index, ..PG };
            let last = 1_000 * DAY_MS;
            assert_eq!(overdue(pg, secs, last, last + DAY_MS * 3 / 4 - 1), None);
            let by = overdue(pg, secs, last, last + DAY_MS * 5 / 4).expect("due by now");
            dates.insert(by);
        }
        assert!(dates.len() > 90, "they are spread");
    }

    #[test]
    fn never_means_never_and_a_clock_that_was_wrong_does_not_put_it_off_for_ever() {
        assert_eq!(overdue(PG, 0, 0, u64::MAX), None);
        let now = 1_000 * DAY_MS;
        assert_eq!(overdue(PG, 3600, now + 400 * DAY_MS, now), Some(0));
        assert_eq!(overdue(PG, 3600, now + 1_000, now), None, "a clock may be a little ahead");
    }

    #[test]
    fn what_is_wanted_comes_first_and_a_deep_scrub_serves_for_a_light_one() {
        let plan = ScrubPlan::default();
        let now = 1_000 * DAY_MS;
        let fresh = ScrubRecord { light_ms: now, deep_ms: now, ..ScrubRecord::default() };
        assert_eq!(due(PG, plan, &fresh, now), None);
        let wanted = ScrubRecord { wanted: Some(ScrubDepth::Light), ..fresh.clone() };
        assert_eq!(due(PG, plan, &wanted, now), Some((u64::MAX, ScrubDepth::Light)));
        let old = ScrubRecord { light_ms: now - 2 * DAY_MS, ..fresh };
        assert_eq!(due(PG, plan, &old, now).map(|(_, depth)| depth), Some(ScrubDepth::Light));
        assert_eq!(
            due(PG, plan, &ScrubRecord::default(), now).map(|(_, depth)| depth),
            Some(ScrubDepth::Deep)
        );
    }
}
