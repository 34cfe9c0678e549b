//! Purging tombstones: once a PG is whole (every wanted member acts, is in sync and lacks nothing), a
//! deletion that all of them have confirmed needs no trace any more. A slice that comes back later with the
//! object is told by comparison: the primary does not have it.

use crate::config::PURGE_PARALLEL;
use crate::core::{DataCore, Life};
use crate::op::{Op, OpKind, Stage};
use crate::pg::{Link, Phase};
use crate::slab::Key;
use reactor::Env;
use wire::{BlockCrcs, FrameKind, Header, ObjectId, Version};

/// Tombstones looked at in one turn of a PG: those of objects in use are passed over.
const LOOK_AT: usize = 16;

impl DataCore {
    /// Whether every member that placement wants acts, is in sync and lacks nothing.
    pub(crate) fn is_whole(&self, key: Key) -> bool {
        let Some(pg) = self.pgs.get(key) else { return false };
        let (Some(primary), Some(update)) = (pg.primary.as_deref(), &pg.update) else { return false };
        primary.phase == Phase::Active
            && update.record.is_whole(update.pool.copies)
            && primary.members.iter().all(|member| member.link == Link::Up && member.is_complete())
    }

    /// Puts a PG in the round of purging if it has something to purge and may.
    pub(crate) fn want_purge(&mut self, key: Key) {
        let Some(pg) = self.pgs.get(key) else { return };
        let waiting = pg.primary.as_deref().is_some_and(|primary| {
            let group = self.group(primary.at, pg.id);
            !primary.in_purging && group.is_some_and(|group| !group.tombstones.is_empty())
        });
        if waiting && self.is_whole(key) {
            if let Some(primary) = self.primary_mut(key) {
                primary.in_purging = true;
            }
            self.purging.push_back(key);
        }
    }

    pub(crate) fn pump_purges(&mut self, env: &mut dyn Env) {
        while self.purges < PURGE_PARALLEL && self.life == Life::Running {
            let Some(key) = self.purging.pop_front() else { return };
            if let Some(primary) = self.primary_mut(key) {
                primary.in_purging = false;
            }
            if self.lease_holds(env) && self.is_whole(key) && self.purge_one(env, key) {
                self.want_purge(key);
            }
        }
    }

    /// Starts one purge; false when there is none to start now.
    fn purge_one(&mut self, env: &mut dyn Env, key: Key) -> bool {
        let Some((id, at)) = self.pgs.get(key).and_then(|pg| Some((pg.id, pg.primary.as_ref()?.at))) else {
            return false;
        };
        let idle = |object: &&ObjectId| !self.obj_index.contains_key(*object);
        let Some(group) = self.group(at, id) else { return false };
        let Some(object) = group.tombstones.iter().take(LOOK_AT).find(idle).copied() else { return false };
        let Some(obj) = self.obj_entry(key, object) else { return false };
        let mut header = Header::new(FrameKind::SubPurge, 0);
        header.pg = id;
        header.object = object;
        let op = self.ops.insert(Op {
            kind: OpKind::Purge,
            stage: Stage::Waiting,
            pg: key,
            obj,
            client: None,
            header,
            crcs: BlockCrcs::default(),
            payload: None,
            mask: u32::MAX,
            version: Version::default(),
            pending: 0,
            seq: 0,
            arrived: env.now(),
            next: Key::NONE,
            retries: 0,
            at: 0,
            done_before: false,
        });
        self.purges += 1;
        if self.may_start(op, obj, true) {
            self.launch(env, op, obj);
        } else {
            self.fail(env, op, wire::Status::Busy);
        }
        let started = self.objs.get(obj).is_some_and(|obj| !obj.is_idle());
        self.drop_idle(obj);
        started
    }
}
