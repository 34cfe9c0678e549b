//! From record to record: what a change of a PG's configuration does to this core's part in it.
//!
//! - Not primary (any more): what waits is refused, what is in flight is forgotten (its outcome unknown).
//! - Primary of the very next epoch in the same process: *contiguous*. Changes in flight are kept and
//!   completed against the new members; members that stay keep what is known of them.
//! - Primary otherwise: *fresh*. Nothing is known of the members; everything is compared.

use crate::config::{PGS_MAX, SUPERSEDED_TICKS_MAX};
use crate::core::DataCore;
use crate::msg::{CoreMsg, PgReport, PgUpdate};
use crate::op::{HOLD, LOCAL, MEMBERS_MAX, OpKind, Stage};
use crate::pg::{Link, LocalMember, MemberState, Pg, Phase, Primary};
use crate::slab::Key;
use crate::slices::SliceLife;
use placement::PgRecord;
use reactor::{Env, Mono};
use std::collections::BTreeSet;
use wire::{Epoch, PgId, PoolId, SliceId, Status};

impl DataCore {
    pub(crate) fn pg_entry(&mut self, id: PgId) -> Option<Key> {
        if let Some(key) = self.pg_key(id) {
            return Some(key);
        }
        if self.pgs.len() >= PGS_MAX {
            tracing::error!(pg = %id, "too many placement groups on one core");
            return None;
        }
        let key = self.pgs.insert(Pg::new(id));
        self.pg_index.insert(id, key);
        Some(key)
    }

    pub(crate) fn pg_update(&mut self, env: &mut dyn Env, update: PgUpdate) {
        let Some(key) = self.pg_entry(update.pg) else { return };
        let mine: Vec<(usize, SliceId)> = update
            .members
            .iter()
            .filter_map(|member| Some((self.slice_at(member.slice)?, member.slice)))
            .collect();
        let Some(pg) = self.pgs.get_mut(key) else { return };
        if pg.update.as_ref().is_some_and(|known| update.revision < known.revision) {
            return;
        }
        pg.gone = false;
        for (at, slice) in mine {
            if pg.local(slice).is_none() {
                pg.locals.push(LocalMember::new(at, slice));
            }
        }
        let epoch = update.record.epoch;
        if epoch > pg.promised {
            pg.promised = epoch;
            pg.promised_primary = update.record.primary;
        } else if epoch == pg.promised && update.record.primary.is_some() {
            pg.promised_primary = update.record.primary;
        }
        // Compared with the record before, not with the locals: those stay as long as another slice of the core does.
        let stays = |slice: SliceId| update.members.iter().any(|member| member.slice == slice);
        let before = pg.update.iter().flat_map(|before| &before.members);
        let left = before.map(|member| member.slice).any(|slice| pg.local(slice).is_some() && !stays(slice));
        pg.update = Some(update);
        if left {
            self.look_for_strays(env);
        }
        self.answer_parked_activates(env, key);
        self.reconsider(env, key);
    }

    pub(crate) fn pg_gone(&mut self, env: &mut dyn Env, id: PgId) {
        let Some(key) = self.pg_key(id) else { return };
        self.step_down(env, key, Status::NotPrimary);
        if let Some(pg) = self.pgs.get_mut(key) {
            pg.gone = true;
            pg.update = None;
        }
        self.refuse_queue(env, key, Status::NotPrimary);
        self.forget_pgs();
        self.look_for_strays(env);
    }

    /// Turns away who waits for a record that may never come: the primary of an epoch that was over before this
    /// node heard of it, and in which it took part. One that still is primary asks again.
    pub(crate) fn turn_away_strangers(&mut self, env: &mut dyn Env) {
        let mut waiting = Vec::new();
        for (_, pg) in self.pgs.iter_mut().filter(|(_, pg)| pg.update.is_none()) {
            waiting.extend(pg.locals.iter_mut().filter_map(|local| local.activating.take()));
            pg.gone = true;
        }
        for (conn, header) in waiting {
            self.answer_status(env, conn, &header, Status::NotActive);
        }
    }

    /// Removes the entries of PGs that are gone and have nothing in flight.
    pub(crate) fn forget_pgs(&mut self) {
        let gone: Vec<(Key, PgId)> = self
            .pgs
            .iter()
            .filter(|(_, pg)| pg.gone && pg.locals.iter().all(LocalMember::is_idle))
            .map(|(key, pg)| (key, pg.id))
            .collect();
        for (key, id) in &gone {
            self.pgs.remove(*key);
            self.pg_index.remove(id);
        }
        if gone.is_empty() {
            return;
        }
        // What slices keep for pools that have no PG here any more.
        let pools: BTreeSet<PoolId> = self.pgs.iter().map(|(_, pg)| pg.id.pool).collect();
        for store in self.slices.iter_mut().filter_map(|slice| slice.store.as_mut()) {
            store.track_only(|pool| pools.contains(&pool));
        }
    }

    pub(crate) fn reconsider_all(&mut self, env: &mut dyn Env) {
        let keys: Vec<Key> = self.pgs.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.reconsider(env, key);
        }
    }

    /// Which of this core's slices may act as primary under the record, if any.
    fn my_primary(&self, pg: &Pg, record: &PgRecord) -> Option<(usize, SliceId)> {
        let slice = record.primary?;
        let local = pg.local(slice)?;
        let open = self.slices.get(local.at).is_some_and(|s| s.life == SliceLife::Open);
        let this_process = record.primary_session.is_some() && record.primary_session == self.process;
        // A higher promise means that somebody acts under a newer record than the one known here.
        let newest = pg.promised == record.epoch && pg.gave_away != record.epoch;
        let fits = record.acting.len() <= MEMBERS_MAX + 1;
        (open && this_process && newest && fits).then_some((local.at, slice))
    }

    /// Brings this core's part in a PG in line with its record.
    fn reconsider(&mut self, env: &mut dyn Env, key: Key) {
        let Some(pg) = self.pgs.get(key) else { return };
        let Some(update) = pg.update.clone() else { return };
        let record = &update.record;
        let before = pg.primary.as_ref().map(|p| (p.slice, p.epoch, p.served));
        let mine = self.my_primary(pg, record);
        self.track_groups(env, key);
        match (mine, before) {
            (None, _) => {
                self.step_down(env, key, Status::NotPrimary);
                // The director takes a working primary away only with its consent: this is it. Nothing
                // is served under the record that asked.
                if record.primary.is_none()
                    && self.process.is_some()
                    && record.primary_session == self.process
                {
                    let (pg, epoch) = (update.pg, record.epoch);
                    let state = "handed-over".into();
                    self.tell(CoreMsg::PgReport(PgReport { pg, epoch, state, objects: 0, missing: 0 }));
                }
            }
            (Some((_, slice)), Some((was, epoch, ..))) if was == slice && epoch == record.epoch => {
                self.refresh(env, key, &update);
            }
            (Some((at, slice)), Some((was, epoch, true)))
                if was == slice && Epoch(epoch.0 + 1) == record.epoch =>
            {
                self.contiguous(env, key, at, &update);
            }
            (Some((at, slice)), _) => {
                self.step_down(env, key, Status::StaleEpoch);
                self.fresh(env, key, at, slice, &update);
            }
        }
        self.recheck_queue(env, key);
        self.report_later(key);
    }

    /// Same epoch: in-sync marks and addresses may have changed.
    fn refresh(&mut self, env: &mut dyn Env, key: Key, update: &PgUpdate) {
        let mut moved = Vec::new();
        for member in &update.members {
            let peer = match self.primary(key).and_then(|p| p.member(member.slice)) {
                Some(_) => self.peer_at(env, member),
                None => continue,
            };
            let in_sync = update.record.in_sync.contains(&member.slice);
            let Some(primary) = self.primary_mut(key) else { return };
            let Some(index) = primary.member_index(member.slice) else { continue };
            let Some(state) = primary.members.get_mut(index) else { continue };
            state.in_sync = in_sync;
            state.node = member.node;
            if state.peer != peer {
                state.peer = peer;
                state.link = crate::pg::Link::Down;
                moved.push(index);
            }
        }
        for index in moved {
            self.send_activate(env, key, index);
        }
        self.advance(env, key);
        self.want_recovery(key);
        self.want_purge(key);
    }

    fn new_members(&mut self, env: &mut dyn Env, slice: SliceId, update: &PgUpdate) -> Vec<MemberState> {
        let mut members = Vec::new();
        for acting in update.record.acting.iter().filter(|acting| **acting != slice) {
            let in_sync = update.record.in_sync.contains(acting);
            match update.members.iter().find(|member| member.slice == *acting) {
                Some(member) => {
                    let peer = self.peer_at(env, member);
                    members.push(MemberState::new(member, peer, in_sync));
                }
                None => tracing::error!(pg = %update.pg, slice = %acting, "acting member without an address"),
            }
        }
        members
    }

    fn fresh(&mut self, env: &mut dyn Env, key: Key, at: usize, slice: SliceId, update: &PgUpdate) {
        let members = self.new_members(env, slice, update);
        let complete =
            members.len() + 1 == update.record.acting.len() && update.record.acting.contains(&slice);
        if !complete {
            tracing::error!(pg = %update.pg, "record names members that cannot be resolved");
            return;
        }
        if let Some(pg) = self.pgs.get_mut(key) {
            pg.primary = Some(Box::new(Primary {
                at,
                slice,
                epoch: update.record.epoch,
                phase: Phase::Settling,
                served: false,
                superseded: false,
                superseded_ticks: 0,
                members,
                own: Vec::new(),
                hints: None,
                reported: None,
                reported_at: Mono(0),
                report_due: false,
                in_recovery: None,
                in_purging: false,
            }));
        }
        self.advance(env, key);
    }

    fn contiguous(&mut self, env: &mut dyn Env, key: Key, at: usize, update: &PgUpdate) {
        self.abandon_heals(env, key);
        self.abandon_scrubs(key);
        let Some(slice) = self.primary(key).map(|p| p.slice) else { return };
        let mut members = self.new_members(env, slice, update);
        if members.len() + 1 != update.record.acting.len() {
            self.step_down(env, key, Status::NotPrimary);
            return;
        }
        let Some(primary) = self.primary_mut(key) else { return };
        let mut old = std::mem::take(&mut primary.members);
        // Bit of the old numbering for each new member; 0 = it has to be listed.
        let mut kept = Vec::with_capacity(members.len());
        for member in &mut members {
            let was = old.iter().position(|o| o.slice == member.slice);
            let mut bit = 0;
            if let Some(was) = was
                && let Some(known) = old.get_mut(was)
                && known.listing == crate::pg::Listing::Done
                && known.desynced.is_none()
            {
                member.listing = crate::pg::Listing::Done;
                member.missing = std::mem::take(&mut known.missing);
                bit = 1u32 << was;
            }
            kept.push(bit);
        }
        primary.at = at;
        primary.members = members;
        let before = primary.epoch;
        primary.epoch = update.record.epoch;
        primary.superseded = false;
        primary.phase = Phase::Activating;
        primary.own = Vec::new();
        self.carry_over(key, before, update.record.epoch, &kept);
        self.advance(env, key);
    }

    /// Operations under way follow their PG into the next epoch.
    fn carry_over(&mut self, key: Key, before: Epoch, after: Epoch, kept: &[u32]) {
        for (_, op) in self.ops.iter_mut() {
            if op.pg != key || op.stage == Stage::Orphan {
                continue;
            }
            // Nobody else was primary in between: what was admitted stays admitted.
            if op.header.epoch == before {
                op.header.epoch = after;
            }
            if op.stage == Stage::Started && op.kind != OpKind::Read {
                let mut pending = (op.pending & LOCAL) | HOLD;
                for (index, bit) in kept.iter().enumerate() {
                    // A member that is yet to be listed counts as lacking everything in flight.
                    if *bit == 0 || op.pending & bit != 0 {
                        pending |= 1 << index;
                    }
                }
                op.pending = pending;
            }
        }
    }

    /// Ends this core's time as primary of a PG. Changes in flight may or may not have been made.
    pub(crate) fn step_down(&mut self, env: &mut dyn Env, key: Key, waiting: Status) {
        if self.primary(key).is_none() {
            return;
        }
        self.abandon_heals(env, key);
        self.abandon_scrubs(key);
        let ops: Vec<Key> = self.ops.iter().filter(|(_, op)| op.pg == key).map(|(at, _)| at).collect();
        for at in ops {
            let Some((stage, kind, pending)) = self.ops.get(at).map(|op| (op.stage, op.kind, op.pending))
            else {
                continue;
            };
            match stage {
                Stage::Queued | Stage::Orphan => {}
                Stage::Waiting => {
                    self.answer(env, at, waiting, None);
                    self.ops.remove(at);
                }
                Stage::Started if kind == OpKind::Read => {
                    self.answer(env, at, waiting, None);
                    self.ops.remove(at);
                }
                Stage::Started => {
                    self.answer(env, at, Status::Unknown, None);
                    if kind == OpKind::Purge {
                        self.purges = self.purges.saturating_sub(1);
                    }
                    if pending & LOCAL == 0 {
                        self.ops.remove(at);
                    } else if let Some(op) = self.ops.get_mut(at) {
                        op.stage = Stage::Orphan;
                        op.payload = None;
                        op.obj = Key::NONE;
                    }
                }
            }
        }
        let objs: Vec<(Key, wire::ObjectId)> =
            self.objs.iter().filter(|(_, obj)| obj.pg == key).map(|(at, obj)| (at, obj.id)).collect();
        for (at, id) in objs {
            self.objs.remove(at);
            self.obj_index.remove(&id);
        }
        if let Some(pg) = self.pgs.get_mut(key) {
            pg.primary = None;
        }
        self.reports_due = true;
    }

    /// A member has shown a newer epoch: start nothing more until its record arrives. That record may
    /// well name this process again; then what is in flight goes on. What was shown is no promise of ours:
    /// it may be wrong, and only records are believed for good.
    pub(crate) fn supersede(&mut self, key: Key, epoch: Epoch) {
        let Some(pg) = self.pgs.get_mut(key) else { return };
        if let Some(primary) = pg.primary.as_deref_mut()
            && primary.epoch < epoch
            && !primary.superseded
        {
            primary.superseded = true;
            primary.superseded_ticks = 0;
        }
    }

    /// Primaries that were shown a newer epoch and whose lease is over wait for nothing any more. While the
    /// lease holds nobody else can have become primary without asking this process; so a record that has not
    /// come after several ticks does not exist, or is of no consequence yet. Members are asked for the
    /// promise once more: they hold the present record, or a newer one.
    pub(crate) fn end_superseded(&mut self, env: &mut dyn Env) {
        if self.lease_holds(env) {
            for (_, pg) in self.pgs.iter_mut() {
                let id = pg.id;
                let Some(primary) = pg.primary.as_deref_mut().filter(|primary| primary.superseded) else {
                    continue;
                };
                primary.superseded_ticks += 1;
                if primary.superseded_ticks < SUPERSEDED_TICKS_MAX {
                    continue;
                }
                tracing::error!(pg = %id, epoch = %primary.epoch, "no record of the newer epoch that a member has shown");
                primary.superseded = false;
                for member in primary.members.iter_mut().filter(|member| member.link == Link::Activating) {
                    member.link = Link::Down;
                }
            }
            self.retry_activates(env);
            return;
        }
        let ended: Vec<Key> = self
            .pgs
            .iter()
            .filter(|(_, pg)| pg.primary.as_ref().is_some_and(|primary| primary.superseded))
            .map(|(key, _)| key)
            .collect();
        for key in ended {
            self.step_down(env, key, Status::StaleEpoch);
        }
    }

    /// Own change in flight of a PG: one more (`+1`) or one less, with what waits for none being left.
    pub(crate) fn count_inflight(&mut self, env: &mut dyn Env, key: Key, slice_at: usize, up: bool) {
        let Some(local) =
            self.pgs.get_mut(key).and_then(|pg| pg.locals.iter_mut().find(|l| l.at == slice_at))
        else {
            return;
        };
        if up {
            local.inflight += 1;
            return;
        }
        local.inflight = local.inflight.saturating_sub(1);
        if local.inflight == 0 {
            let waiting = local.activating.is_some();
            if waiting {
                self.answer_activate(env, key, slice_at);
            }
            if self.primary(key).is_some_and(|p| p.phase == Phase::Settling) {
                self.advance(env, key);
            }
        }
    }
}
