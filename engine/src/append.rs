//! Client operations on the primary: admission, order per object, and the start of a change.
//!
//! A change starts when nothing on its object keeps it waiting: it gets the object's next version, goes to
//! the own store, and at once to every other acting member. Several changes of one object may be in flight;
//! stores and connections keep their order.

use crate::config::*;
use crate::core::{DataCore, Life, ticket};
use crate::metrics::OpClass;
use crate::op::{Client, Exclusive, LOCAL, MEMBERS_MAX, Obj, Op, OpKind, Queue, Stage, range_mask};
use crate::peer::request;
use crate::pg::{Link, Pg, Phase};
use crate::planted::Bug;
use crate::session::Conn;
use crate::slab::Key;
use crate::slices::SliceLife;
use placement::pg_of;
use reactor::{ConnId, Env, Frame, IoBuf};
use store::{Presence, StoreError};
use wire::frame::{FLAG_RECOVERY, FLAG_RESENT};
use wire::{BLOCK_BYTES, BlockCrcs, Epoch, FrameKind, Header, OBJECT_BLOCKS, ObjectId, Status, Version};

/// How a client operation is counted; a purge is nobody's.
pub(crate) fn class_of(kind: OpKind) -> Option<OpClass> {
    match kind {
        OpKind::Read => Some(OpClass::Read),
        OpKind::Write => Some(OpClass::Write),
        OpKind::Zero => Some(OpClass::Zero),
        OpKind::Delete => Some(OpClass::Delete),
        OpKind::Purge => None,
    }
}

/// What becomes of an operation that arrives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Admission {
    Start,
    Queue,
    Refuse(Status),
}

/// Whether range and payload fit together and lie in the object.
fn check(kind: OpKind, header: &Header, payload: Option<&IoBuf>, crcs: &BlockCrcs) -> Result<(), Status> {
    if kind == OpKind::Delete {
        return if payload.is_none() { Ok(()) } else { Err(Status::Invalid) };
    }
    let blocks = usize::from(header.blocks);
    if blocks == 0 || blocks > OBJECT_BLOCKS || header.block as usize > OBJECT_BLOCKS - blocks {
        return Err(Status::Invalid);
    }
    match (kind, payload) {
        // The store compares bytes and checksums before it takes them, and before any member gets them:
        // doing it here too would read every block twice.
        (OpKind::Write, Some(data)) if data.len() == blocks * BLOCK_BYTES && crcs.len() == blocks => Ok(()),
        (OpKind::Write, _) | (_, Some(_)) => Err(Status::Invalid),
        (_, None) => Ok(()),
    }
}

impl DataCore {
    pub(crate) fn client_frame(&mut self, env: &mut dyn Env, conn: ConnId, frame: Frame) {
        let header = frame.header;
        let kind = match header.kind {
            FrameKind::Read => OpKind::Read,
            FrameKind::Write => OpKind::Write,
            FrameKind::Zero => OpKind::Zero,
            FrameKind::Delete => OpKind::Delete,
            FrameKind::Ping => return self.answer_status(env, conn, &header, Status::Ok),
            kind if (kind as u8).is_multiple_of(2)
                && kind != FrameKind::Control
                && kind != FrameKind::Hello =>
            {
                return self.answer_status(env, conn, &header, Status::Invalid);
            }
            _ => return self.drop_inbound(env, conn, false),
        };
        let admission = self.admission_of(env, conn, kind, &frame);
        let (pg, queue) = match admission {
            Ok((pg, Admission::Start)) => (pg, false),
            Ok((pg, Admission::Queue)) => (pg, true),
            Ok((_, Admission::Refuse(status))) | Err(status) => {
                if let Some(class) = class_of(kind) {
                    self.metrics.op(class).done(status, 0, env.now(), env.now());
                }
                return self.answer_status(env, conn, &header, status);
            }
        };
        let mask = if kind == OpKind::Delete { u32::MAX } else { range_mask(header.block, header.blocks) };
        let key = self.ops.insert(Op {
            kind,
            stage: Stage::Queued,
            pg,
            obj: Key::NONE,
            client: Some(Client { conn }),
            header,
            crcs: frame.crcs,
            payload: frame.payload,
            mask,
            version: Version::default(),
            pending: 0,
            seq: 0,
            arrived: env.now(),
            next: Key::NONE,
            retries: 0,
            at: 0,
            done_before: false,
        });
        if let Some(Conn::Inbound(inbound)) = self.conns.get_mut(&conn) {
            inbound.ops += 1;
        }
        if queue {
            if let Some(pg) = self.pgs.get_mut(pg) {
                pg.queue.push_back(key);
            }
        } else {
            self.begin(env, key);
        }
    }

    fn admission_of(
        &mut self,
        env: &mut dyn Env,
        conn: ConnId,
        kind: OpKind,
        frame: &Frame,
    ) -> Result<(Key, Admission), Status> {
        if self.life != Life::Running {
            return Err(Status::ShuttingDown);
        }
        let busy = match self.conns.get(&conn) {
            Some(Conn::Inbound(inbound)) => inbound.ops >= CONN_OPS_MAX,
            _ => true,
        };
        // What members send must always find memory: else two primaries could wait for each other's.
        let (used, all) = env.arena().usage();
        let full = kind == OpKind::Write && used / CLIENT_BUFFER_PARTS.0 > all / CLIENT_BUFFER_PARTS.1;
        if busy || full || self.ops.len() >= CLIENT_OPS_MAX {
            return Err(Status::Busy);
        }
        check(kind, &frame.header, frame.payload.as_ref(), &frame.crcs)?;
        let key = self.pg_key(frame.header.pg).ok_or(Status::NotPrimary)?;
        let pg = self.pgs.get(key).ok_or(Status::NotPrimary)?;
        let admission = self.admission(env, pg, frame.header.epoch);
        let pool = pg.update.as_ref().map(|update| &update.pool);
        if pool.is_none_or(|pool| pg_of(frame.header.object, pool.pg_count) != pg.id) {
            return Err(if pool.is_none() { Status::NotPrimary } else { Status::Invalid });
        }
        Ok((key, admission))
    }

    /// Whether an operation sent under `epoch` may start now.
    fn admission(&self, env: &dyn Env, pg: &Pg, epoch: Epoch) -> Admission {
        let Some(update) = &pg.update else { return Admission::Refuse(Status::NotPrimary) };
        let known = update.record.epoch;
        if !self.bug(Bug::SkipEpochCheck) {
            if epoch < known {
                return Admission::Refuse(Status::StaleEpoch);
            }
            if epoch > known {
                // The client knows the record before this core does: it will come.
                return Admission::Queue;
            }
        }
        let Some(primary) = pg.primary.as_deref() else {
            let mine = update.record.primary.is_some_and(|slice| pg.local(slice).is_some());
            let soon = mine && update.record.primary_session == self.process;
            return Admission::Refuse(if soon { Status::NotActive } else { Status::NotPrimary });
        };
        let copies = primary.members.len() + 1;
        if !self.lease_holds(env) || copies < usize::from(update.pool.min_copies) {
            return Admission::Refuse(Status::NotActive);
        }
        let active = primary.phase == Phase::Active && !primary.superseded;
        if active { Admission::Start } else { Admission::Queue }
    }

    /// Looks again at everything in a PG's queue.
    pub(crate) fn recheck_queue(&mut self, env: &mut dyn Env, key: Key) {
        let count = self.pgs.get(key).map_or(0, |pg| pg.queue.len());
        for _ in 0..count {
            let Some(at) = self.pgs.get_mut(key).and_then(|pg| pg.queue.pop_front()) else { return };
            let Some(op) = self.ops.get(at) else { continue };
            if op.client.is_none() {
                self.ops.remove(at);
                continue;
            }
            let epoch = op.header.epoch;
            let Some(pg) = self.pgs.get(key) else { return };
            match self.admission(env, pg, epoch) {
                Admission::Start => self.begin(env, at),
                Admission::Queue => {
                    if let Some(pg) = self.pgs.get_mut(key) {
                        pg.queue.push_back(at);
                    }
                }
                Admission::Refuse(status) => {
                    self.answer(env, at, status, None);
                    self.ops.remove(at);
                }
            }
        }
    }

    /// The same for all PGs: queues must not keep what nobody waits for any more.
    pub(crate) fn recheck_queues(&mut self, env: &mut dyn Env) {
        let keys: Vec<Key> =
            self.pgs.iter().filter(|(_, pg)| !pg.queue.is_empty()).map(|(key, _)| key).collect();
        for key in keys {
            self.recheck_queue(env, key);
        }
    }

    /// Refuses everything in a PG's queue.
    pub(crate) fn refuse_queue(&mut self, env: &mut dyn Env, key: Key, status: Status) {
        while let Some(at) = self.pgs.get_mut(key).and_then(|pg| pg.queue.pop_front()) {
            self.answer(env, at, status, None);
            self.ops.remove(at);
        }
    }

    /// Refuses everything that has not started, in all PGs: the node is stopping.
    pub(crate) fn refuse_queued(&mut self, env: &mut dyn Env) {
        let keys: Vec<Key> = self.pgs.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.refuse_queue(env, key, Status::ShuttingDown);
        }
    }

    /// An admitted operation: start it, or put it in its object's waiting list.
    fn begin(&mut self, env: &mut dyn Env, key: Key) {
        let Some(op) = self.ops.get(key) else { return };
        let (kind, object, pg) = (op.kind, op.object(), op.pg);
        if op.header.flags & FLAG_RESENT != 0 && kind != OpKind::Read {
            // Known now or never: the earlier try is through here, or fenced.
            let done_before = self.was_done(pg, object, op.header.origin);
            self.metrics.recognised.add(u64::from(done_before));
            if let Some(op) = self.ops.get_mut(key) {
                op.done_before = done_before;
            }
        }
        let known = self.obj_index.get(&object).copied();
        if kind == OpKind::Read && known.is_none() && !self.is_lacked(pg, object) {
            return self.start_read(env, key);
        }
        let Some(obj) = self.obj_entry(pg, object) else {
            return self.fail(env, key, Status::NotPrimary);
        };
        if self.may_start(key, obj, false) {
            self.launch(env, key, obj);
        } else {
            self.wait(key, obj, false);
            self.heal_for_waiting(env, obj);
            if self.bug(Bug::PushWithoutBlockingWrites) {
                self.progress(env, obj);
            }
        }
        self.drop_idle(obj);
    }

    /// Whether any acting member lacks an object.
    fn is_lacked(&self, pg: Key, object: ObjectId) -> bool {
        self.primary(pg).is_some_and(|primary| primary.lacking(object) != 0)
    }

    /// The object's entry, made when needed.
    pub(crate) fn obj_entry(&mut self, pg: Key, object: ObjectId) -> Option<Key> {
        if let Some(&key) = self.obj_index.get(&object) {
            return Some(key);
        }
        let at = self.primary(pg)?.at;
        let presence = self.store_ref(at)?.lookup(object);
        let key = self.objs.insert(Obj {
            id: object,
            pg,
            inflight: Queue::default(),
            inflight_mask: 0,
            waiting: Queue::default(),
            exclusive: Exclusive::Free,
            presence,
        });
        self.obj_index.insert(object, key);
        Some(key)
    }

    pub(crate) fn drop_idle(&mut self, key: Key) {
        if let Some(obj) = self.objs.get(key)
            && obj.is_idle()
        {
            self.obj_index.remove(&obj.id);
            self.objs.remove(key);
        }
    }

    pub(crate) fn wait(&mut self, key: Key, obj: Key, front: bool) {
        let Some(entry) = self.objs.get_mut(obj) else { return };
        if let Some(op) = self.ops.get_mut(key) {
            op.stage = Stage::Waiting;
            op.obj = obj;
        }
        if front {
            entry.waiting.push_front(&mut self.ops, key);
        } else {
            entry.waiting.push(&mut self.ops, key);
        }
    }

    /// Whether an operation may start now. `first`: it is at the head of the waiting list.
    pub(crate) fn may_start(&self, key: Key, obj: Key, first: bool) -> bool {
        let (Some(op), Some(obj)) = (self.ops.get(key), self.objs.get(obj)) else { return false };
        let Some(primary) = self.primary(op.pg) else { return false };
        if primary.phase != Phase::Active || primary.superseded {
            return false;
        }
        let lacking = primary.lacking(op.object());
        match op.kind {
            // Made before, and to be answered like a change that ends now: every copy has it, and all before.
            _ if op.done_before => {
                let alone = obj.exclusive == Exclusive::Free && obj.inflight.is_empty();
                (first || obj.waiting.is_empty()) && alone && lacking == 0
            }
            OpKind::Read => {
                let repairing = matches!(obj.exclusive, Exclusive::Heal(heal) if self.heals_own_copy(heal));
                let overlaps = obj.inflight_mask & op.mask != 0 && !self.bug(Bug::ReadOverlappingInflight);
                // A possible primary that lacks the object could later answer with something older.
                !repairing && !overlaps && primary.in_sync_of(lacking) == 0
            }
            OpKind::Purge => {
                first && obj.exclusive == Exclusive::Free && obj.inflight.is_empty() && lacking == 0
            }
            OpKind::Write | OpKind::Zero | OpKind::Delete => {
                let hindered = lacking != 0 && !self.goes_without(op.pg, obj, lacking);
                let mut blocked = obj.exclusive != Exclusive::Free || hindered;
                if self.bug(Bug::PushWithoutBlockingWrites) && matches!(obj.exclusive, Exclusive::Heal(_)) {
                    blocked = false;
                }
                if self.bug(Bug::ScrubWithoutHold) && matches!(obj.exclusive, Exclusive::Scrub(_)) {
                    blocked = hindered;
                }
                if self.bug(Bug::AcceptOutOfOrderSubwrite) && obj.exclusive == Exclusive::Free {
                    blocked = false;
                }
                // A delete replaces the object whole: it needs no recovery first.
                if op.kind == OpKind::Delete && obj.exclusive == Exclusive::Free {
                    blocked = false;
                }
                (first || obj.waiting.is_empty()) && !blocked
            }
        }
    }

    /// Whether a change of an object may leave out the members that lack it: recovery brings them the object with the
    /// change in it, and until then none of them can become primary. Waiting for recovery would cost the client the
    /// reading and sending of a whole object.
    fn goes_without(&self, pg: Key, obj: &Obj, lacking: u32) -> bool {
        let Some(pg) = self.pgs.get(pg) else { return false };
        let (Some(update), Some(primary)) = (&pg.update, pg.primary.as_deref()) else { return false };
        let copies = 1 + (primary.all_members() & !lacking).count_ones();
        // A deletion on its way to such a member makes up for what it lacks: what follows must not leave it out.
        let awaited = obj.inflight.iter(&self.ops).any(|(_, op)| op.pending & lacking != 0);
        let enough = copies >= u32::from(update.pool.min_copies).max(COPIES_BESIDE_RECOVERY_MIN);
        primary.in_sync_of(lacking) == 0 && !awaited && enough
    }

    /// Starts an operation that may.
    pub(crate) fn launch(&mut self, env: &mut dyn Env, key: Key, obj: Key) {
        match self.ops.get(key).map(|op| op.kind) {
            Some(OpKind::Read) => self.start_read(env, key),
            Some(_) => self.start_change(env, key, obj),
            None => {}
        }
    }

    /// Ends an operation that never started.
    pub(crate) fn fail(&mut self, env: &mut dyn Env, key: Key, status: Status) {
        if self.ops.get(key).is_some_and(|op| op.kind == OpKind::Purge) {
            self.purges = self.purges.saturating_sub(1);
        }
        self.answer(env, key, status, None);
        self.ops.remove(key);
    }

    fn start_change(&mut self, env: &mut dyn Env, key: Key, obj_key: Key) {
        let (Some(op), Some(obj)) = (self.ops.get(key), self.objs.get(obj_key)) else { return };
        let (kind, pg, object, presence) = (op.kind, op.pg, op.object(), obj.presence);
        let Some(primary) = self.primary(pg) else { return };
        let (at, epoch, mut members) = (primary.at, primary.epoch, primary.all_members());
        if kind != OpKind::Delete && !self.bug(Bug::AcceptOutOfOrderSubwrite) {
            members &= !primary.lacking(object);
        }
        if op.done_before {
            let status = if self.lease_holds(env) { Status::Ok } else { Status::Unknown };
            return self.fail(env, key, status);
        }
        let exists = matches!(presence, Presence::Live(_));
        let nothing = !exists && matches!(kind, OpKind::Zero | OpKind::Delete) && obj.inflight.is_empty();
        if nothing && primary.lacking(object) == 0 {
            // Nothing to remove, here or anywhere.
            let status = if self.lease_holds(env) { Status::Ok } else { Status::NotActive };
            return self.fail(env, key, status);
        }
        if self.is_full_for(primary, kind, &op.header, op.mask) {
            return self.fail(env, key, Status::NoSpace);
        }
        let version = match (kind, presence) {
            (OpKind::Purge, Presence::Tombstone(version)) => version,
            (OpKind::Purge, _) => return self.fail(env, key, Status::NotFound),
            _ => Version { epoch, counter: presence.version().map_or(0, |v| v.counter) + 1 },
        };
        if let Err(error) = self.store_change(env, key, at, version) {
            let status = if error == StoreError::NotOpen { Status::NotActive } else { error.status() };
            return self.fail(env, key, status);
        }
        let seq = self.next_seq();
        let (Some(op), Some(obj)) = (self.ops.get_mut(key), self.objs.get_mut(obj_key)) else { return };
        op.stage = Stage::Started;
        op.obj = obj_key;
        op.version = version;
        op.pending = LOCAL | members;
        op.seq = seq;
        op.at = at;
        let (mask, origin) = (op.mask, op.header.origin);
        obj.inflight.push(&mut self.ops, key);
        obj.inflight_mask |= mask;
        obj.presence = match kind {
            OpKind::Delete => Presence::Tombstone(version),
            OpKind::Purge => Presence::Absent,
            _ => Presence::Live(version),
        };
        if kind == OpKind::Purge {
            obj.exclusive = Exclusive::Purge;
        }
        if let Some(origins) = self.origins_mut(pg, at) {
            origins.record(object, origin, version);
        }
        self.count_inflight(env, pg, at, true);
        for index in (0..MEMBERS_MAX).filter(|index| members >> index & 1 == 1) {
            self.send_change(env, key, index);
        }
    }

    /// Hands a change to the own store.
    fn store_change(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        at: usize,
        version: Version,
    ) -> Result<(), StoreError> {
        let Some(op) = self.ops.get(key) else { return Err(StoreError::Invalid) };
        let ticket = key.tagged(ticket::OP);
        let (object, block, blocks) = (op.object(), op.header.block, u32::from(op.header.blocks));
        let slice = self.slices.get_mut(at).ok_or(StoreError::NotOpen)?;
        slice.metrics.writes.add(u64::from(slice.life == SliceLife::Open));
        let store = slice.open_store()?;
        match op.kind {
            OpKind::Write => {
                let data = op.payload.as_slice();
                store.write(env, ticket, object, version, block, data, &op.crcs)
            }
            OpKind::Zero => store.zero(env, ticket, object, version, block, blocks),
            OpKind::Delete => store.delete(env, ticket, object, version),
            OpKind::Purge => store.purge(env, ticket, object, version),
            OpKind::Read => Err(StoreError::Invalid),
        }
    }

    /// Sends a change to a member, now if it can be reached, else when it can.
    pub(crate) fn send_change(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let Some(op) = self.ops.get(key) else { return };
        let Some(primary) = self.primary(op.pg) else { return };
        let Some(member) = primary.members.get(index) else { return };
        if member.link != Link::Up {
            return;
        }
        let kind = match op.kind {
            OpKind::Write => FrameKind::SubWrite,
            OpKind::Zero => FrameKind::SubZero,
            OpKind::Delete => FrameKind::SubDelete,
            OpKind::Purge => FrameKind::SubPurge,
            OpKind::Read => return,
        };
        let mut header = Header::new(kind, key.tagged(request::OP));
        header.pg = op.header.pg;
        header.epoch = primary.epoch;
        header.object = op.object();
        header.version = op.version;
        header.block = op.header.block;
        header.blocks = op.header.blocks;
        header.slice = member.slice;
        header.primary = primary.slice;
        header.origin = op.header.origin;
        // A member that lacks the object takes a delete whatever it has.
        let whole = op.kind == OpKind::Delete && member.missing.contains(&op.object());
        if whole {
            header.flags |= FLAG_RECOVERY;
        }
        let pg = op.pg;
        header.payload_len = op.payload.as_ref().map_or(0, IoBuf::len) as u32;
        let frame = Frame { header, crcs: op.crcs.clone(), payload: op.payload.clone() };
        let peer = member.peer;
        if whole {
            self.send_object_origins(env, pg, index, header.object, header.version);
        }
        self.send_peer(env, peer, frame);
    }
}
