//! The end of changes: counting confirmations, answering, and letting go what waited.

use crate::core::DataCore;
use crate::msg::CoreMsg;
use crate::op::{HOLD, LOCAL, OpKind, Stage};
use crate::pg::Link;
use crate::planted::Bug;
use crate::slab::Key;
use reactor::Env;
use store::StoreError;
use wire::{Header, Status};

impl DataCore {
    /// The own store has made a change durable, or failed to.
    pub(crate) fn local_done(&mut self, env: &mut dyn Env, key: Key, result: Result<(), StoreError>) {
        let Some(op) = self.ops.get(key) else { return };
        let (pg, stage, object, obj, at) = (op.pg, op.stage, op.header.object, op.obj, op.at);
        if stage == Stage::Orphan {
            self.ops.remove(key);
            return self.count_inflight(env, pg, at, false);
        }
        match result {
            Ok(()) => {
                self.bits_done(env, key, LOCAL);
                self.count_inflight(env, pg, at, false);
                self.heal_after_local(env, obj);
            }
            // The store stops with its first failed write; the slice is being given up (`slice_failed`),
            // and what became of this change is for the next primary to say.
            Err(error) => {
                tracing::error!(%object, %error, "own store could not keep a change");
                if let Some(entry) = self.pgs.get(pg)
                    && let Some(primary) = &entry.primary
                {
                    let (pg, epoch, slice) = (entry.id, primary.epoch, primary.slice);
                    self.tell(CoreMsg::OutOfSync { pg, epoch, slice, failed: true });
                }
                if let Some(op) = self.ops.get_mut(key) {
                    op.pending &= !LOCAL;
                }
                self.count_inflight(env, pg, at, false);
                self.step_down(env, pg, Status::NotActive);
            }
        }
    }

    /// A member's answer to a change.
    pub(crate) fn sub_reply(&mut self, env: &mut dyn Env, key: Key, header: &Header) {
        let Some(op) = self.ops.get(key) else { return };
        if op.stage != Stage::Started || op.kind == OpKind::Read {
            return;
        }
        let (pg, object, deletes) = (op.pg, op.object(), op.kind == OpKind::Delete);
        let Some(primary) = self.primary_mut(pg) else { return };
        let epoch = primary.epoch;
        let Some(index) = primary.member_index(header.slice) else { return };
        match header.status {
            Status::Ok => {
                let whole = deletes || self.bug(Bug::AcceptOutOfOrderSubwrite);
                let Some(primary) = self.primary_mut(pg) else { return };
                if whole
                    && let Some(member) = primary.members.get_mut(index)
                    && member.missing.remove(&object)
                {
                    // It took the deletion whatever it had: there is nothing left to recover.
                    self.teach_members(env, pg);
                    self.check_in_sync(pg);
                }
                self.bits_done(env, key, 1 << index);
            }
            Status::StaleEpoch if header.epoch > epoch => self.supersede(pg, header.epoch),
            // Sent under an epoch before this one; sent again when the member has activated this one.
            Status::StaleEpoch => {}
            Status::NotActive | Status::NotPrimary | Status::NotFound => {
                // It restarted, or its core has not heard of us: activate, then send again.
                if let Some(member) = primary.members.get_mut(index)
                    && member.link == Link::Up
                {
                    member.link = Link::Down;
                    self.send_activate(env, pg, index);
                }
            }
            Status::ShuttingDown => {}
            Status::NoSpace => {
                // Others have applied it, so it stays in flight (readers wait) until a new epoch has
                // taken the full member out of the in-sync set. The client hears the reason now.
                self.answer(env, key, Status::NoSpace, None);
                self.desync(pg, index, false);
            }
            Status::OutOfSync => self.desync(pg, index, false),
            status => {
                tracing::warn!(%object, slice = %header.slice, %status, "member failed a change");
                self.desync(pg, index, true);
            }
        }
    }

    /// A member cannot follow: the control core is asked for an epoch without it.
    pub(crate) fn desync(&mut self, pg: Key, index: usize, failed: bool) {
        let Some(entry) = self.pgs.get_mut(pg) else { return };
        let id = entry.id;
        let Some(primary) = entry.primary.as_deref_mut() else { return };
        let epoch = primary.epoch;
        let Some(member) = primary.members.get_mut(index) else { return };
        if member.desynced.is_some_and(|before| before || !failed) {
            return;
        }
        member.desynced = Some(failed);
        let slice = member.slice;
        tracing::warn!(pg = %id, %slice, failed, "member is out of sync");
        self.metrics.out_of_sync.add(1);
        self.tell(CoreMsg::OutOfSync { pg: id, epoch, slice, failed });
    }

    /// Some copies of a change are durable. With the last of them the change ends.
    pub(crate) fn bits_done(&mut self, env: &mut dyn Env, key: Key, bits: u32) {
        let Some(op) = self.ops.get_mut(key) else { return };
        if op.pending & bits == 0 {
            return;
        }
        op.pending &= !bits;
        let pending = op.pending;
        if pending == 0 {
            self.finish(env, key);
        } else if self.bug(Bug::AckBeforeAllMembers) && pending & HOLD == 0 {
            self.answer(env, key, Status::Ok, None);
        }
    }

    /// Every copy has the change.
    fn finish(&mut self, env: &mut dyn Env, key: Key) {
        // The copies are there, but a primary whose lease is over no longer speaks for them.
        let status = if self.lease_holds(env) { Status::Ok } else { Status::Unknown };
        self.answer(env, key, status, None);
        let Some(op) = self.ops.remove(key) else { return };
        match op.kind {
            OpKind::Delete => self.want_purge(op.pg),
            OpKind::Purge => {
                self.purges = self.purges.saturating_sub(1);
                self.metrics.purged.add(1);
            }
            _ => {}
        }
        // `remove` took the operation out of the table, its successor is still in `op.next`.
        let obj_key = op.obj;
        let next = op.next;
        if let Some(obj) = self.objs.get_mut(obj_key) {
            obj.inflight.unlink(&mut self.ops, key, next);
            obj.inflight_mask = obj.inflight.iter(&self.ops).fold(0, |mask, (_, op)| mask | op.mask);
            if op.kind == OpKind::Purge {
                obj.exclusive = crate::op::Exclusive::Free;
            }
        }
        self.heal_after_local(env, obj_key);
        self.check_after_change(env, obj_key);
        self.progress(env, obj_key);
    }

    /// Starts what waits on an object, in order, as far as it may.
    pub(crate) fn progress(&mut self, env: &mut dyn Env, obj_key: Key) {
        while let Some(obj) = self.objs.get(obj_key) {
            let head = obj.waiting.head;
            let Some(op) = self.ops.get(head) else { break };
            let abandoned = op.client.is_none() && op.kind != OpKind::Purge;
            if !abandoned && !self.may_start(head, obj_key, true) {
                self.heal_for_waiting(env, obj_key);
                break;
            }
            if let Some(obj) = self.objs.get_mut(obj_key) {
                obj.waiting.pop(&mut self.ops);
            }
            if abandoned {
                self.ops.remove(head);
            } else {
                self.launch(env, head, obj_key);
            }
        }
        self.drop_idle(obj_key);
    }
}
