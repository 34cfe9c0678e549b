//! Recovery of single objects: making members equal to the primary, and the primary's own copy whole.
//!
//! A `Heal` holds its object while it runs: changes that arrive wait, so that what is read here is what the
//! members then have. A client's operation that cannot go on without a member that lacks its object starts one
//! at once, ahead of the background's round. A heal that finds the own copy bad fetches a good one from an in-sync member
//! first; a client's read that met a bad block starts one for just that.

use crate::config::*;
use crate::core::{DataCore, ticket};
use crate::op::{Exclusive, LOCAL, OpKind};
use crate::peer::request;
use crate::pg::{Link, Listing, MemberState, Phase};
use crate::share::Turn;
use crate::slab::Key;
use reactor::{Env, Frame, IoBuf, Mono};
use std::ops::Bound;
use store::{ObjectData, Presence, StoreError};
use wire::frame::{FLAG_BACKGROUND, FLAG_RECOVERY};
use wire::{BLOCK_BYTES, BlockCrcs, FrameKind, Header, ObjectId, Status};

/// How far a heal is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Changes in flight must become durable here first.
    Draining,
    /// The own store reads the object.
    Reading,
    /// A member reads the object for us.
    Asking(usize),
    /// The good copy waits for room in the own store.
    Fetched,
    /// The own store writes the good copy.
    Storing,
    /// Members are getting it.
    Sending,
    /// Its PG was lost while the own store was writing.
    Orphan,
}

/// The recovery of one object.
pub(crate) struct Heal {
    pg: Key,
    obj: Key,
    object: ObjectId,
    step: Step,
    /// Members that have not confirmed yet.
    targets: u32,
    /// The own copy is bad.
    repair: bool,
    /// Members that were asked for a good copy.
    asked: u32,
    background: bool,
    presence: Presence,
    data: Option<ObjectData>,
    /// Index of the own slice.
    at: usize,
}

impl DataCore {
    pub(crate) fn heals_own_copy(&self, key: Key) -> bool {
        self.heals.get(key).is_some_and(|heal| heal.repair)
    }

    /// Begins a heal of an object that nothing holds. False when there is nothing to do.
    fn start_heal(&mut self, env: &mut dyn Env, obj_key: Key, repair: bool, background: bool) -> bool {
        let Some(obj) = self.objs.get(obj_key) else { return false };
        let (pg, object, free) = (obj.pg, obj.id, obj.exclusive == Exclusive::Free);
        let Some(primary) = self.primary(pg) else { return false };
        let targets = primary.lacking(object);
        if !free || primary.phase != Phase::Active || primary.superseded || (targets == 0 && !repair) {
            return false;
        }
        let heal = Heal {
            pg,
            obj: obj_key,
            object,
            step: Step::Draining,
            targets,
            repair,
            asked: 0,
            background,
            presence: Presence::Absent,
            data: None,
            at: primary.at,
        };
        let key = self.heals.insert(heal);
        self.heals_background += usize::from(background);
        if let Some(obj) = self.objs.get_mut(obj_key) {
            obj.exclusive = Exclusive::Heal(key);
        }
        self.step_heal(env, key);
        true
    }

    /// The head of an object's waiting list may need members to have the object first.
    pub(crate) fn heal_for_waiting(&mut self, env: &mut dyn Env, obj: Key) {
        self.start_heal(env, obj, false, false);
    }

    /// Changes in flight that a possible primary lacks wait for recovery to bring them.
    pub(crate) fn heal_for_inflight(&mut self, env: &mut dyn Env, obj_key: Key) {
        let Some(obj) = self.objs.get(obj_key) else { return };
        let lacking = self.primary(obj.pg).map_or(0, |p| p.lacking(obj.id));
        if obj.inflight.iter(&self.ops).any(|(_, op)| op.pending & lacking != 0) {
            self.start_heal(env, obj_key, false, false);
        }
    }

    /// A read met a bad block in the own copy.
    pub(crate) fn repair(&mut self, env: &mut dyn Env, obj: Key) {
        self.start_heal(env, obj, true, false);
    }

    /// A change of the object became durable here, or ended: a heal may have waited for that.
    pub(crate) fn heal_after_local(&mut self, env: &mut dyn Env, obj: Key) {
        if let Some(Exclusive::Heal(key)) = self.objs.get(obj).map(|obj| obj.exclusive)
            && self.heals.get(key).is_some_and(|heal| heal.step == Step::Draining)
        {
            self.step_heal(env, key);
        }
    }

    fn step_heal(&mut self, env: &mut dyn Env, key: Key) {
        let Some(heal) = self.heals.get(key) else { return };
        match heal.step {
            Step::Draining => {}
            Step::Fetched => return self.store_repair(env, key),
            _ => return,
        }
        let Some(obj) = self.objs.get(heal.obj) else { return };
        let (at, object, presence) = (heal.at, heal.object, obj.presence);
        if heal.repair {
            if obj.inflight.is_empty() {
                self.ask(env, key);
            }
            return;
        }
        if obj.inflight.iter(&self.ops).any(|(_, op)| op.pending & LOCAL != 0) {
            return;
        }
        let mut step = Step::Sending;
        if matches!(presence, Presence::Live(_)) {
            let read = match self.store(at) {
                Ok(store) => store.read_object(key.tagged(ticket::HEAL_READ), object),
                Err(error) => Err(error),
            };
            match read {
                Ok(()) => step = Step::Reading,
                Err(StoreError::Busy) => return self.heals_parked.push(key),
                Err(error) => return self.end_heal(env, key, error.status()),
            }
        }
        if let Some(heal) = self.heals.get_mut(key) {
            heal.step = step;
            heal.presence = presence;
        }
        if step == Step::Sending {
            self.send_to_all(env, key);
        }
    }

    pub(crate) fn heal_read_done(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        result: Result<ObjectData, StoreError>,
    ) {
        let Some(heal) = self.heals.get_mut(key) else { return };
        if heal.step != Step::Reading {
            return;
        }
        match result {
            Ok(data) => {
                heal.presence = data.presence;
                heal.data = Some(data);
                heal.step = Step::Sending;
                self.send_to_all(env, key);
            }
            Err(StoreError::Corrupt | StoreError::Io) if heal.asked == 0 => {
                heal.repair = true;
                heal.step = Step::Draining;
                let idle = self.objs.get(heal.obj).is_some_and(|obj| obj.inflight.is_empty());
                if idle {
                    self.step_heal(env, key);
                } else {
                    // What is in flight waits for this push, and the repair would wait for it.
                    self.end_heal(env, key, Status::NotActive);
                }
            }
            Err(error) => self.end_heal(env, key, error.status()),
        }
    }

    /// Asks the next in-sync member for a good copy.
    fn ask(&mut self, env: &mut dyn Env, key: Key) {
        let Some(heal) = self.heals.get_mut(key) else { return };
        let Some(pg) = self.pgs.get(heal.pg) else { return };
        let Some(primary) = pg.primary.as_deref() else { return };
        let good = |(index, member): &(usize, &MemberState)| {
            member.in_sync
                && member.link == Link::Up
                && member.listing == Listing::Done
                && member.desynced.is_none()
                && heal.asked >> index & 1 == 0
        };
        let members = || primary.members.iter().enumerate().filter(good);
        let equal = members().find(|(_, member)| !member.missing.contains(&heal.object));
        // No copy like the own one: what the others differ in was never acknowledged, so one of them is as right. (A
        // change that comes with it is not recognised when it is sent again.)
        let Some((index, member)) = equal.or_else(|| members().next()) else {
            tracing::error!(object = %heal.object, "no good copy is left to read");
            return self.end_heal(env, key, Status::Corrupt);
        };
        heal.asked |= 1 << index;
        heal.step = Step::Asking(index);
        let mut header = Header::new(FrameKind::SubRead, key.tagged(request::READ));
        header.pg = pg.id;
        header.epoch = primary.epoch;
        header.object = heal.object;
        header.slice = member.slice;
        header.primary = primary.slice;
        let peer = member.peer;
        self.send_peer_header(env, peer, header);
    }

    /// A member's copy of an object whose own copy is bad.
    pub(crate) fn heal_read_reply(&mut self, env: &mut dyn Env, key: Key, frame: Frame) {
        let header = frame.header;
        let Some(heal) = self.heals.get_mut(key) else { return };
        let Step::Asking(index) = heal.step else { return };
        let Some(primary) = self.pgs.get(heal.pg).and_then(|pg| pg.primary.as_deref()) else { return };
        if primary.member_index(header.slice) != Some(index) {
            return;
        }
        if header.status == Status::StaleEpoch && header.epoch > primary.epoch {
            let pg = heal.pg;
            return self.supersede(pg, header.epoch);
        }
        let own = self.objs.get(heal.obj).and_then(|obj| obj.presence.version());
        let lacks = primary.members.get(index).is_some_and(|member| member.missing.contains(&heal.object));
        let fits = own == Some(header.version) || lacks;
        let blocks = header.block.count_ones() as usize;
        let data = frame.payload;
        let length = data.as_ref().map_or(0, IoBuf::len);
        let whole = length == blocks * BLOCK_BYTES
            && data.as_ref().is_none_or(|data| frame.crcs.matches(data.as_slice()))
            && frame.crcs.len() == blocks;
        if header.status != Status::Ok || !whole || !fits {
            return self.ask(env, key);
        }
        if own != Some(header.version) {
            tracing::warn!(object = %heal.object, version = %header.version, "taken from a copy that differs in a change which nobody was told of");
        }
        let presence = Presence::Live(header.version);
        heal.presence = presence;
        heal.data = Some(ObjectData { presence, mask: header.block, data, crcs: frame.crcs });
        heal.step = Step::Fetched;
        self.store_repair(env, key);
    }

    fn store_repair(&mut self, env: &mut dyn Env, key: Key) {
        let Some(heal) = self.heals.get(key) else { return };
        let (Some(data), Presence::Live(version)) = (&heal.data, heal.presence) else { return };
        let (pg, at) = (heal.pg, heal.at);
        let ticket = key.tagged(ticket::HEAL_STORE);
        let bufs = data.data.as_slice();
        let stored =
            match self.slices.get_mut(at).ok_or(StoreError::NotOpen).and_then(|slice| slice.open_store()) {
                Ok(store) => store.replace(env, ticket, heal.object, version, data.mask, bufs, &data.crcs),
                Err(error) => Err(error),
            };
        match stored {
            Ok(()) => {
                let (object, obj) = (heal.object, heal.obj);
                if let Some(heal) = self.heals.get_mut(key) {
                    heal.step = Step::Storing;
                    heal.data = None;
                }
                if let Some(obj) = self.objs.get_mut(obj) {
                    obj.presence = Presence::Live(version);
                }
                if let Some(origins) = self.origins_mut(pg, at) {
                    origins.go_back(object, version);
                }
                self.count_inflight(env, pg, at, true);
            }
            Err(StoreError::Busy) => self.heals_parked.push(key),
            Err(error) => self.end_heal(env, key, error.status()),
        }
    }

    pub(crate) fn heal_stored(&mut self, env: &mut dyn Env, key: Key, result: Result<(), StoreError>) {
        let Some(heal) = self.heals.get_mut(key) else { return };
        let (pg, at, step) = (heal.pg, heal.at, heal.step);
        if step == Step::Orphan {
            self.heals.remove(key);
            return self.count_inflight(env, pg, at, false);
        }
        heal.repair = false;
        heal.step = Step::Draining;
        let more = heal.targets != 0;
        self.count_inflight(env, pg, at, false);
        match result {
            Ok(()) => {
                self.metrics.repaired.add(1);
                if more { self.step_heal(env, key) } else { self.end_heal(env, key, Status::Ok) }
            }
            Err(error) => self.end_heal(env, key, error.status()),
        }
    }

    fn send_to_all(&mut self, env: &mut dyn Env, key: Key) {
        let count = self.heals.get(key).and_then(|heal| self.primary(heal.pg)).map_or(0, |p| p.members.len());
        for index in 0..count {
            self.send_push(env, key, index);
        }
    }

    fn send_push(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let Some(heal) = self.heals.get(key) else { return };
        let Some(pg) = self.pgs.get(heal.pg) else { return };
        let Some(primary) = pg.primary.as_deref() else { return };
        let Some(member) = primary.members.get(index) else { return };
        if heal.step != Step::Sending || heal.targets >> index & 1 == 0 || member.link != Link::Up {
            return;
        }
        let kind = match heal.presence {
            Presence::Live(_) => FrameKind::SubPush,
            Presence::Tombstone(_) => FrameKind::SubDelete,
            Presence::Absent => FrameKind::SubPurge,
        };
        let mut header = Header::new(kind, key.tagged(request::PUSH));
        header.flags = FLAG_RECOVERY;
        if heal.background && !member.in_sync {
            header.flags |= FLAG_BACKGROUND;
        }
        header.pg = pg.id;
        header.epoch = primary.epoch;
        header.object = heal.object;
        header.version = heal.presence.version().unwrap_or_default();
        header.slice = member.slice;
        header.primary = primary.slice;
        let (mut crcs, mut payload) = (BlockCrcs::default(), None);
        if let Some(data) = &heal.data {
            header.block = data.mask;
            header.blocks = data.mask.count_ones() as u16;
            crcs = data.crcs.clone();
            payload = data.data.clone();
        }
        header.payload_len = payload.as_ref().map_or(0, IoBuf::len) as u32;
        self.metrics.recovered_bytes.add(u64::from(header.payload_len));
        let (peer, pg) = (member.peer, heal.pg);
        self.send_object_origins(env, pg, index, header.object, header.version);
        self.send_peer(env, peer, Frame { header, crcs, payload });
    }

    /// A member is reachable again: what heals want of it goes out again.
    pub(crate) fn resend_heals(&mut self, env: &mut dyn Env, pg: Key, index: usize) {
        let keys: Vec<Key> =
            self.heals.iter().filter(|(_, heal)| heal.pg == pg).map(|(key, _)| key).collect();
        for key in keys {
            if let Some(heal) = self.heals.get_mut(key)
                && heal.step == Step::Asking(index)
            {
                heal.asked &= !(1 << index);
                self.ask(env, key);
            } else {
                self.send_push(env, key, index);
            }
        }
        self.want_recovery(pg);
    }

    pub(crate) fn push_reply(&mut self, env: &mut dyn Env, key: Key, header: &Header) {
        let now = env.now();
        let Some(heal) = self.heals.get_mut(key) else { return };
        let (pg, obj, object) = (heal.pg, heal.obj, heal.object);
        let Some(primary) = self.pgs.get_mut(pg).and_then(|pg| pg.primary.as_deref_mut()) else { return };
        let epoch = primary.epoch;
        let Some(index) = primary.member_index(header.slice) else { return };
        let Some(member) = primary.members.get_mut(index) else { return };
        let bit = 1u32 << index;
        if heal.step != Step::Sending || heal.targets & bit == 0 {
            return;
        }
        match header.status {
            Status::Ok => {
                heal.targets &= !bit;
                let last = heal.targets == 0;
                member.missing.remove(&object);
                self.metrics.recovered_objects.add(1);
                let covered: Vec<Key> = match self.objs.get(obj) {
                    Some(obj) => obj.inflight.iter(&self.ops).map(|(at, _)| at).collect(),
                    None => Vec::new(),
                };
                for at in covered {
                    self.bits_done(env, at, bit);
                }
                self.note_room(pg, index, Status::Ok);
                self.teach_members(env, pg);
                self.check_in_sync(pg);
                if last {
                    self.end_heal(env, key, Status::Ok);
                }
            }
            Status::StaleEpoch => {
                if header.epoch > epoch {
                    self.supersede(pg, header.epoch);
                }
            }
            Status::NotActive | Status::NotPrimary | Status::NotFound => {
                if member.link == Link::Up {
                    member.link = Link::Down;
                    self.send_activate(env, pg, index);
                }
            }
            Status::ShuttingDown => {}
            status => {
                if status != Status::NoSpace || !member.too_full {
                    tracing::warn!(%object, slice = %header.slice, %status, "member cannot take an object");
                }
                heal.targets &= !bit;
                let last = heal.targets == 0;
                member.retry_at = now.plus_ms(RECOVERY_RETRY_MS);
                let in_sync = member.in_sync;
                match status {
                    Status::Io => self.desync(pg, index, true),
                    Status::NoSpace if in_sync => self.desync(pg, index, false),
                    _ => {}
                }
                self.note_room(pg, index, status);
                if last {
                    self.end_heal(env, key, status);
                }
            }
        }
    }

    /// Lets the object go. After a failure, whoever still cannot start hears the reason.
    fn end_heal(&mut self, env: &mut dyn Env, key: Key, status: Status) {
        let Some(heal) = self.heals.remove(key) else { return };
        self.heals_background -= usize::from(heal.background).min(self.heals_background);
        if status != Status::Ok {
            self.pause_targets(env, &heal);
        }
        let Some(obj) = self.objs.get_mut(heal.obj) else { return };
        obj.exclusive = Exclusive::Free;
        if status != Status::Ok {
            let reason = match status {
                Status::NoSpace | Status::Corrupt => status,
                _ => Status::NotActive,
            };
            while let Some(at) = self.objs.get_mut(heal.obj).and_then(|obj| obj.waiting.pop(&mut self.ops)) {
                // A read of a bad block has nothing better to find; others may start where nothing hinders.
                // Nobody waits for it: its client has sent it again, or given it up.
                let abandoned = |op: &crate::op::Op| op.client.is_none() && op.kind != OpKind::Purge;
                if self.ops.get(at).is_some_and(abandoned) {
                    self.ops.remove(at);
                    continue;
                }
                let hopeless = heal.repair && self.ops.get(at).is_some_and(|op| op.retries > 0);
                if !hopeless && self.may_start(at, heal.obj, true) {
                    self.launch(env, at, heal.obj);
                } else {
                    self.fail(env, at, reason);
                }
            }
        }
        self.progress(env, heal.obj);
        self.want_recovery(heal.pg);
        self.want_purge(heal.pg);
        self.report_counts(heal.pg);
    }

    /// The background leaves the members of a heal that failed alone for a while. What failed once may fail
    /// at once and every time, when the own store closes for instance: the next attempt in the same turn
    /// would be the first of an endless number.
    fn pause_targets(&mut self, env: &mut dyn Env, heal: &Heal) {
        let until = env.now().plus_ms(RECOVERY_RETRY_MS);
        let Some(primary) = self.pgs.get_mut(heal.pg).and_then(|pg| pg.primary.as_deref_mut()) else {
            return;
        };
        for (index, member) in primary.members.iter_mut().enumerate() {
            if heal.targets >> index & 1 == 1 {
                member.retry_at = member.retry_at.max(until);
            }
        }
    }

    /// The PG's configuration changes: heals start over under the next one, if at all.
    pub(crate) fn abandon_heals(&mut self, _env: &mut dyn Env, pg: Key) {
        let keys: Vec<Key> =
            self.heals.iter().filter(|(_, heal)| heal.pg == pg).map(|(key, _)| key).collect();
        for key in keys {
            let Some(heal) = self.heals.get_mut(key) else { continue };
            if heal.step == Step::Orphan {
                continue;
            }
            self.heals_background -= usize::from(heal.background).min(self.heals_background);
            heal.background = false;
            if let Some(obj) = self.objs.get_mut(heal.obj) {
                obj.exclusive = Exclusive::Free;
            }
            if heal.step == Step::Storing {
                heal.step = Step::Orphan;
            } else {
                self.heals.remove(key);
            }
        }
    }

    /// Tries again what a full store made wait.
    pub(crate) fn retry_heals(&mut self, env: &mut dyn Env) {
        if self.heals_parked.is_empty() {
            return;
        }
        for key in std::mem::take(&mut self.heals_parked) {
            self.step_heal(env, key);
        }
    }

    /// PGs whose members paused, or whose links came back, join the round again.
    pub(crate) fn resume_recovery(&mut self) {
        let keys: Vec<Key> =
            self.pgs.iter().filter(|(_, pg)| pg.primary.is_some()).map(|(key, _)| key).collect();
        for key in keys {
            self.want_recovery(key);
            self.want_purge(key);
        }
    }

    /// Starts background heals up to the bound: few while clients are served, one PG after the other.
    pub(crate) fn pump_recovery(&mut self, env: &mut dyn Env) {
        self.retry_heals(env);
        while self.has_round() {
            let bound = match self.background_turn(env) {
                Turn::Alone => RECOVERY_PARALLEL,
                Turn::Beside => RECOVERY_PARALLEL_BUSY,
                Turn::Wait(_) => return,
            };
            if self.heals_background >= bound {
                return;
            }
            let Some(key) = self.next_in_round() else { return };
            let started = match self.next_missing(env.now(), key) {
                Some(object) => match self.obj_entry(key, object) {
                    Some(obj) => {
                        let started = self.start_heal(env, obj, false, true);
                        if started {
                            self.charge_heal(env, key, object);
                        }
                        self.drop_idle(obj);
                        started
                    }
                    None => false,
                },
                None => false,
            };
            if started {
                self.want_recovery(key);
            }
        }
    }

    /// A recovery in the background costs its share: what is read here, and what is sent to one member.
    fn charge_heal(&mut self, env: &mut dyn Env, key: Key, object: ObjectId) {
        let at = self.primary(key).map(|primary| primary.at);
        let store = at.and_then(|at| self.store_ref(at));
        let blocks = store.map_or(0, |store| store.written_mask(object).count_ones());
        let bytes = 2 * u64::from(blocks) * wire::BLOCK_BYTES as u64;
        self.share.spend(env.now(), RECOVERY_COST_BYTES + bytes);
    }

    /// The next object to recover on some reachable member of a PG, going round.
    fn next_missing(&mut self, now: Mono, key: Key) -> Option<ObjectId> {
        let primary = self.pgs.get_mut(key)?.primary.as_deref_mut()?;
        for member in &mut primary.members {
            if member.link != Link::Up || member.missing.is_empty() || now < member.retry_at {
                continue;
            }
            let after = member.next.map_or(Bound::Unbounded, Bound::Excluded);
            let found =
                member.missing.range((after, Bound::Unbounded)).next().or_else(|| member.missing.first());
            member.next = found.copied();
            if let Some(object) = found {
                return Some(*object);
            }
        }
        None
    }
}
