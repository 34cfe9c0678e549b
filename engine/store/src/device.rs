//! What the store knows of its device: how long operations take, which is the oldest, and how to go on
//! without it.

use reactor::{DiskError, DiskOp, Env, Mono};
use wire::BLOCK_BYTES;

use crate::store::{Life, OpKind, Ops, SliceStore};
use crate::types::StoreError;

/// Copies of a slice's superblock, in its first blocks.
const SUPER_COPIES: u64 = 2;

impl Ops {
    /// Operations that the device has.
    pub(crate) fn under_way(&self) -> usize {
        self.kinds.len() - self.free.len()
    }
}

impl SliceStore {
    #[inline]
    pub(crate) fn op_started(&mut self, id: u32, now: Mono) {
        let id = id as usize;
        if self.ops.started.len() <= id {
            self.ops.started.resize(id + 1, now);
        }
        if let Some(started) = self.ops.started.get_mut(id) {
            *started = now;
        }
        // This one is the only one.
        if self.ops.under_way() == 1 {
            self.ops.busy_since = now;
        }
    }

    #[inline]
    pub(crate) fn op_ended(&mut self, id: usize, now: Mono) {
        let started = self.ops.started.get(id).copied().unwrap_or(now);
        self.counters.device_ops += 1;
        self.counters.device_wait_ns += now.since(started);
        if self.ops.under_way() == 0 {
            self.counters.device_busy_ns += now.since(self.ops.busy_since);
        }
    }

    /// Since when the oldest operation that the device has not ended is under way.
    pub fn oldest_operation(&self) -> Option<Mono> {
        let under_way = |(kind, started): (&OpKind, &Mono)| (*kind != OpKind::Idle).then_some(*started);
        self.ops.kinds.iter().zip(&self.ops.started).filter_map(under_way).min()
    }

    /// Operations ended, and time in which there was one under way, until now.
    pub fn device_use(&self, env: &dyn Env) -> (u64, u64) {
        let running = if self.ops.under_way() > 0 { env.now().since(self.ops.busy_since) } else { 0 };
        (self.counters.device_ops, self.counters.device_busy_ns + running)
    }

    /// Reads one copy of the superblock, so that a device that nobody uses shows whether it is still there. The other
    /// copy after one that could not be read: one bad sector is no dead device. Nothing is written, and nothing is done
    /// while the device has something to do anyway.
    pub fn probe(&mut self, env: &mut dyn Env) {
        let idle = self.ops.under_way() == 0 && !self.has_backlog();
        if self.life != Life::Running || !idle {
            return;
        }
        let Some(buf) = Self::buffer(env, BLOCK_BYTES) else { return };
        let copy = u64::from(self.counters.probes_failed) % SUPER_COPIES;
        let op = DiskOp::Read { offset: self.byte_of(copy), buf };
        self.submit(env, OpKind::Probe, op);
    }

    pub(crate) fn probed(&mut self, result: Result<(), DiskError>) {
        self.counters.probes_failed = if result.is_ok() { 0 } else { self.counters.probes_failed + 1 };
    }

    /// Probes in a row that could not read anything, up to the last one.
    pub fn probes_failed(&self) -> u32 {
        self.counters.probes_failed
    }

    /// Why the store has stopped by itself, if it has.
    pub fn failure(&self) -> Option<StoreError> {
        match self.life {
            Life::Failed(why) => Some(why),
            _ => None,
        }
    }

    /// Gives the store up: everything in progress fails now, and nothing is asked of the device any more.
    /// What it still ends brings back memory and nothing else.
    pub fn abandon(&mut self) {
        if self.abandoned || self.life == Life::Closed {
            return;
        }
        self.abandoned = true;
        self.opening = None;
        self.fail(StoreError::Abandoned);
        self.fail_reads(StoreError::Abandoned);
        self.ops.backlog.clear();
    }
}
