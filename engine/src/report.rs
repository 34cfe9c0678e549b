//! What the core tells the control core about its PGs and members, and the gauges.

use crate::config::*;
use crate::core::DataCore;
use crate::msg::{CoreMsg, PgReport};
use crate::op::Stage;
use crate::pg::{Link, Phase};
use crate::slab::Key;
use crate::slices::SliceLife;
use reactor::{Env, Mono};

/// A PG's condition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PgState {
    /// Every copy that the pool asks for is there, in sync and complete.
    Clean,
    /// Serving with fewer copies, or with some not yet known to be in sync.
    Degraded,
    /// Serving while copies are being made equal.
    Recovering,
    /// Serving with fewer copies, and making some of them equal.
    DegradedRecovering,
    /// As `Recovering`, and a slice is too full for it.
    TooFull,
    /// As `DegradedRecovering`, and a slice is too full for it.
    DegradedTooFull,
    /// Members are being asked and compared; not serving.
    Peering,
    /// Fewer copies than the pool's minimum; not serving.
    Incomplete,
    /// The node's lease is over; not serving.
    Down,
}

/// All states and their names, in the order of the enumeration.
pub const PG_STATES: [(PgState, &str); 9] = [
    (PgState::Clean, "active+clean"),
    (PgState::Degraded, "active+degraded"),
    (PgState::Recovering, "active+recovering"),
    (PgState::DegradedRecovering, "active+degraded+recovering"),
    (PgState::TooFull, "active+recovering+toofull"),
    (PgState::DegradedTooFull, "active+degraded+recovering+toofull"),
    (PgState::Peering, "peering"),
    (PgState::Incomplete, "incomplete"),
    (PgState::Down, "down"),
];

impl PgState {
    /// The name in reports, `status` and metrics.
    pub fn name(self) -> &'static str {
        PG_STATES.iter().find(|(state, _)| *state == self).map_or("unknown", |(_, name)| name)
    }
}

impl DataCore {
    fn state_of(&self, env: &dyn Env, key: Key) -> Option<PgState> {
        let pg = self.pgs.get(key)?;
        let (primary, update) = (pg.primary.as_deref()?, pg.update.as_ref()?);
        let copies = primary.members.len() + 1;
        let all = usize::from(update.pool.copies);
        let in_sync = update.record.acting.iter().all(|slice| update.record.in_sync.contains(slice));
        Some(if copies < usize::from(update.pool.min_copies) {
            PgState::Incomplete
        } else if !self.lease_holds(env) {
            PgState::Down
        } else if primary.phase != Phase::Active {
            PgState::Peering
        } else {
            let too_full = primary.members.iter().any(|m| m.too_full && !m.missing.is_empty());
            match (primary.missing() > 0, copies >= all) {
                (true, true) if too_full => PgState::TooFull,
                (true, false) if too_full => PgState::DegradedTooFull,
                (true, true) => PgState::Recovering,
                (true, false) => PgState::DegradedRecovering,
                (false, true) if in_sync && primary.members.iter().all(|m| m.desynced.is_none()) => {
                    PgState::Clean
                }
                (false, _) => PgState::Degraded,
            }
        })
    }

    /// A PG's state may have changed: report it at the end of this batch.
    pub(crate) fn report_later(&mut self, key: Key) {
        self.report_counts(key);
        self.reports_due = true;
    }

    /// A PG's counts have changed: report them with the next interval.
    pub(crate) fn report_counts(&mut self, key: Key) {
        if let Some(primary) = self.primary_mut(key)
            && !primary.report_due
        {
            primary.report_due = true;
            self.reports.push(key);
        }
    }

    /// Reports what has changed; returns when the next report is due, if one is.
    pub(crate) fn send_reports(&mut self, env: &mut dyn Env) -> Option<Mono> {
        let now = env.now();
        let mut next = None;
        let mut due = std::mem::take(&mut self.reports);
        due.retain(|&key| {
            let state = self.state_of(env, key);
            let held = self.pgs.get(key).and_then(|pg| self.group(pg.primary.as_ref()?.at, pg.id));
            let objects = held.map_or(0, |group| group.objects);
            let (Some(pg), Some(state)) = (self.pgs.get_mut(key), state) else { return false };
            let id = pg.id;
            let Some(primary) = pg.primary.as_deref_mut() else { return false };
            let report = (state, primary.epoch, objects, primary.missing());
            let before = primary.reported;
            let urgent = before.is_none_or(|was| (was.0, was.1) != (report.0, report.1));
            let at = primary.reported_at.plus_ms(REPORT_INTERVAL_MS);
            if !urgent && before != Some(report) && now < at {
                next = Some(next.map_or(at, |earlier: Mono| earlier.min(at)));
                return true;
            }
            primary.report_due = false;
            if before == Some(report) {
                return false;
            }
            primary.reported = Some(report);
            primary.reported_at = now;
            let (state, epoch, objects, missing) = report;
            self.tell(CoreMsg::PgReport(PgReport {
                pg: id,
                epoch,
                state: state.name().to_owned(),
                objects,
                missing,
            }));
            false
        });
        due.append(&mut self.reports);
        self.reports = due;
        next
    }

    /// Tells the control core of members that have caught up.
    pub(crate) fn check_in_sync(&mut self, key: Key) {
        let Some(pg) = self.pgs.get_mut(key) else { return };
        let id = pg.id;
        let Some(primary) = pg.primary.as_deref_mut() else { return };
        if primary.phase != Phase::Active {
            return;
        }
        let epoch = primary.epoch;
        let mut caught_up = Vec::new();
        for member in &mut primary.members {
            if !member.in_sync && !member.announced && member.link == Link::Up && member.is_complete() {
                member.announced = true;
                caught_up.push(member.slice);
            }
        }
        if caught_up.is_empty() {
            return;
        }
        for slice in caught_up {
            self.tell(CoreMsg::InSync { pg: id, epoch, slice });
        }
        self.report_later(key);
    }

    /// Once in a while everything that waits for the control core is said again: a transaction may have
    /// lost a race.
    pub(crate) fn repeat_reports(&mut self, env: &mut dyn Env) {
        let keys: Vec<Key> = self.pgs.iter().map(|(key, _)| key).collect();
        for key in keys {
            let Some(pg) = self.pgs.get_mut(key) else { continue };
            let id = pg.id;
            let mut lost = Vec::new();
            match pg.primary.as_deref_mut() {
                Some(primary) => {
                    for member in &mut primary.members {
                        (member.announced, member.left_out) = (false, false);
                        if let Some(failed) = member.desynced {
                            lost.push((primary.epoch, member.slice, failed));
                        }
                    }
                }
                None => {
                    // A record names a slice of ours as primary that has failed, or given the PG away.
                    let record = pg.update.as_ref().map(|update| &update.record);
                    let named = record.and_then(|record| Some((record.epoch, record.primary?)));
                    if let Some((epoch, slice)) = named
                        && let Some(at) = pg.local(slice).map(|local| local.at)
                        && self.slices.get(at).is_some_and(|s| matches!(s.life, SliceLife::Failed(_)))
                    {
                        lost.push((epoch, slice, true));
                    }
                    if let Some((epoch, slice)) = named
                        && pg.gave_away == epoch
                        && pg.local(slice).is_some()
                    {
                        self.tell(CoreMsg::GivesAway { pg: id, epoch, slice });
                    }
                }
            }
            for (epoch, slice, failed) in lost {
                self.tell(CoreMsg::OutOfSync { pg: id, epoch, slice, failed });
            }
            self.teach_members(env, key);
            self.check_in_sync(key);
            self.report_counts(key);
        }
        let _ = self.send_reports(env);
    }

    /// A slice has stopped: its PGs need other primaries.
    pub(crate) fn slice_failed(&mut self, env: &mut dyn Env, at: usize) {
        let keys: Vec<Key> = self
            .pgs
            .iter()
            .filter(|(_, pg)| pg.primary.as_ref().is_some_and(|primary| primary.at == at))
            .map(|(key, _)| key)
            .collect();
        for key in keys {
            if let Some(pg) = self.pgs.get(key)
                && let Some(primary) = &pg.primary
            {
                let (pg, epoch, slice) = (pg.id, primary.epoch, primary.slice);
                self.tell(CoreMsg::OutOfSync { pg, epoch, slice, failed: true });
            }
            self.step_down(env, key, wire::Status::NotActive);
        }
        // What waits for this slice's store waits in vain.
        if let Some(slice) = self.slices.get_mut(at) {
            let parked = std::mem::take(&mut slice.parked);
            for (conn, frame) in parked {
                self.answer_status(env, conn, &frame.header, wire::Status::Io);
            }
        }
    }

    /// Sets the gauges.
    pub(crate) fn gauge(&mut self, env: &mut dyn Env) {
        let metrics = &self.metrics;
        let mut states = [0u64; PG_STATES.len()];
        let (mut followed, mut missing) = (0, 0);
        for (key, pg) in self.pgs.iter() {
            match (self.state_of(env, key), pg.primary.as_deref()) {
                (Some(state), Some(primary)) => {
                    missing += primary.missing();
                    if let Some(count) = states.get_mut(state as usize) {
                        *count += 1;
                    }
                }
                _ => followed += 1,
            }
        }
        for ((state, _), count) in PG_STATES.iter().zip(states) {
            if let Some(cell) = metrics.pg_state(*state) {
                cell.set(count);
            }
        }
        metrics.pgs_followed.set(followed);
        metrics.missing.set(missing);
        metrics.client_ops.set(self.ops.len() as u64);
        let waiting =
            self.ops.iter().filter(|(_, op)| matches!(op.stage, Stage::Queued | Stage::Waiting)).count();
        metrics.client_ops_waiting.set(waiting as u64);
        metrics.sub_ops.set(self.subs.len() as u64);
        let (used, all) = env.arena().usage();
        metrics.buffer_used_bytes.set(used as u64);
        metrics.buffer_bytes.set(all as u64);
    }
}
