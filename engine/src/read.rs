//! Reads on the primary.
//!
//! A read that overlaps a change in flight waits for it: the change could still be lost, and a reader must
//! never see what others may not find later. Lease and PG are checked again when the data is there. A bad
//! block is never returned: the own copy is repaired from another member, then read again.

use crate::core::{DataCore, ticket};
use crate::op::Stage;
use crate::slab::Key;
use reactor::Env;
use store::{ReadData, StoreError};
use wire::Status;

/// How often one read may ask for a repair before it gives up.
const REPAIRS_MAX: u8 = 2;

impl DataCore {
    pub(crate) fn start_read(&mut self, env: &mut dyn Env, key: Key) {
        let Some(op) = self.ops.get_mut(key) else { return };
        op.stage = Stage::Started;
        op.obj = Key::NONE;
        let (pg, object, block, blocks) = (op.pg, op.object(), op.header.block, u32::from(op.header.blocks));
        let Some(at) = self.primary(pg).map(|p| p.at) else {
            return self.fail(env, key, Status::NotPrimary);
        };
        if let Some(slice) = self.slices.get(at) {
            slice.metrics.reads.add(1);
        }
        let result = match self.store(at) {
            Ok(store) => store.read(key.tagged(ticket::OP), object, block, blocks),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            let status = match error {
                // The slice is on its way out: a new record is due.
                StoreError::NotOpen
                | StoreError::Failed(_)
                | StoreError::Damaged
                | StoreError::Abandoned
                | StoreError::Io => Status::NotActive,
                other => other.status(),
            };
            self.fail(env, key, status);
        }
    }

    pub(crate) fn read_done(&mut self, env: &mut dyn Env, key: Key, result: Result<ReadData, StoreError>) {
        // A key of an earlier turn: the PG was lost meanwhile and the client has its answer.
        let Some(op) = self.ops.get_mut(key) else { return };
        match result {
            Ok(read) => {
                op.version = read.presence.version().unwrap_or_default();
                let pg = op.pg;
                if self.primary(pg).is_none_or(|primary| primary.superseded) {
                    self.answer(env, key, Status::StaleEpoch, None);
                } else if self.lease_holds(env) {
                    self.answer(env, key, Status::Ok, Some((read.data, read.crcs)));
                } else {
                    self.answer(env, key, Status::NotActive, None);
                }
                self.ops.remove(key);
            }
            Err(StoreError::Corrupt | StoreError::Io) if op.retries < REPAIRS_MAX && op.client.is_some() => {
                op.retries += 1;
                self.read_again_repaired(env, key);
            }
            Err(
                StoreError::Failed(_) | StoreError::Damaged | StoreError::Abandoned | StoreError::NotOpen,
            ) => self.fail(env, key, Status::NotActive),
            Err(error) => self.fail(env, key, error.status()),
        }
    }

    /// Waits for a repair of the own copy, ahead of everything else that waits.
    fn read_again_repaired(&mut self, env: &mut dyn Env, key: Key) {
        let Some((pg, object)) = self.ops.get(key).map(|op| (op.pg, op.object())) else { return };
        let Some(obj) = self.obj_entry(pg, object) else {
            return self.fail(env, key, Status::NotActive);
        };
        tracing::warn!(%object, "bad local copy: repairing it from another member");
        self.wait(key, obj, true);
        self.repair(env, obj);
    }
}
