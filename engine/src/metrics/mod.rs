//! What a data core counts. One core writes, any thread reads: relaxed atomics without a locked
//! instruction. `export` turns the counters of all cores into Prometheus families.

mod export;

pub use export::families;

use crate::report::{PG_STATES, PgState};
use reactor::Mono;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use wire::{SliceId, Status};

/// A number that one core writes.
#[derive(Default, Debug)]
pub struct Cell64(AtomicU64);

impl Cell64 {
    /// Adds. A plain load and store: there is one writer.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
    #[inline]
    pub(crate) fn sub(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).saturating_sub(n), Ordering::Relaxed);
    }
    #[inline]
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
    /// The present value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the latency buckets, in microseconds: from a local read to a stuck write.
pub const LATENCY_BOUNDS_US: [u64; 18] = [
    10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000, 2_000_000, 5_000_000,
];

/// A latency histogram with fixed buckets.
#[derive(Default, Debug)]
pub struct Latency {
    buckets: [Cell64; LATENCY_BOUNDS_US.len() + 1],
    sum_ns: Cell64,
}

impl Latency {
    #[inline]
    pub(crate) fn record(&self, ns: u64) {
        let at = LATENCY_BOUNDS_US.iter().position(|&us| ns <= us * 1000).unwrap_or(LATENCY_BOUNDS_US.len());
        if let Some(bucket) = self.buckets.get(at) {
            bucket.add(1);
        }
        self.sum_ns.add(ns);
    }

    /// Samples so far.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Cell64::get).sum()
    }
}

/// Operations that are counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpClass {
    /// A client's read.
    Read,
    /// A client's write.
    Write,
    /// A client's discard or write-zeroes.
    Zero,
    /// A client's removal of an object.
    Delete,
    /// A primary's write, zero or delete, applied here as a member.
    SubWrite,
    /// A recovery push, delete or purge, applied here as a member.
    SubPush,
    /// A whole object read here for another node's repair.
    SubRead,
    /// A page of a PG's object list.
    List,
}

/// Operation classes and their label values, in the order of `CoreMetrics::ops`.
pub const OP_CLASSES: [(OpClass, &str); 8] = [
    (OpClass::Read, "read"),
    (OpClass::Write, "write"),
    (OpClass::Zero, "zero"),
    (OpClass::Delete, "delete"),
    (OpClass::SubWrite, "sub_write"),
    (OpClass::SubPush, "sub_push"),
    (OpClass::SubRead, "sub_read"),
    (OpClass::List, "list"),
];

/// Counters of one class of operations.
#[derive(Default, Debug)]
pub struct OpMetrics {
    /// Answered with `Ok`.
    pub ok: Cell64,
    /// Answered with anything else that a retry cures.
    pub retry: Cell64,
    /// Answered with an error.
    pub error: Cell64,
    /// Payload bytes of those answered with `Ok`.
    pub bytes: Cell64,
    /// From arrival to answer, of those answered with `Ok`.
    pub latency: Latency,
}

impl OpMetrics {
    #[inline]
    pub(crate) fn done(&self, status: Status, bytes: u64, started: Mono, now: Mono) {
        if status == Status::Ok {
            self.ok.add(1);
            self.bytes.add(bytes);
            self.latency.record(now.since(started));
        } else if status.is_retryable() {
            self.retry.add(1);
        } else {
            self.error.add(1);
        }
    }
}

/// Numbers of one slice.
#[derive(Default, Debug)]
pub struct SliceMetrics {
    /// Which, as text for the label.
    pub slice: SliceId,
    /// 1 while it is open.
    pub open: Cell64,
    /// Bytes it can hold.
    pub size_bytes: Cell64,
    /// Bytes in use.
    pub used_bytes: Cell64,
    /// Objects.
    pub objects: Cell64,
    /// Bytes of memory its index and caches hold.
    pub memory_bytes: Cell64,
    /// Reads that met a bad checksum.
    pub corrupt: Cell64,
    /// Mutations handed to the store.
    pub writes: Cell64,
    /// Reads handed to the store.
    pub reads: Cell64,
    /// Operations that failed on the device.
    pub failures: Cell64,
    /// Device operations ended.
    pub device_ops: Cell64,
    /// Time they took, each by itself.
    pub device_wait_ns: Cell64,
    /// Time in which there was at least one.
    pub device_busy_ns: Cell64,
}

impl SliceMetrics {
    fn of(slice: SliceId) -> Arc<Self> {
        Arc::new(Self { slice, ..Default::default() })
    }
}

/// Everything one data core counts.
#[derive(Default, Debug)]
pub struct CoreMetrics {
    /// By class, see `OP_CLASSES`.
    pub ops: [OpMetrics; OP_CLASSES.len()],
    /// Its slices: those of the start, and those that have come since. Locked when one comes and when somebody looks;
    /// who counts has its own.
    slices: Mutex<Vec<Arc<SliceMetrics>>>,
    /// PGs this core is primary of, by state, see `PG_STATES`.
    pub pg_states: [Cell64; PG_STATES.len()],
    /// PGs this core only follows.
    pub pgs_followed: Cell64,
    /// Client operations in flight.
    pub client_ops: Cell64,
    /// Of these, operations that wait for another operation, a recovery or an activation.
    pub client_ops_waiting: Cell64,
    /// Sub-operations in flight as a member.
    pub sub_ops: Cell64,
    /// Client and peer connections accepted and open.
    pub connections: Cell64,
    /// Connections to peers that are up.
    pub peers_up: Cell64,
    /// Connections closed because a newer one of the same session said hello.
    pub fenced: Cell64,
    /// Requests refused because of an older epoch.
    pub stale_epochs: Cell64,
    /// Sub-operations sent again after a reconnection.
    pub resent: Cell64,
    /// Changes that a client sent again and that had been carried out already.
    pub recognised: Cell64,
    /// PGs that began to serve when nobody was left who knew which changes had been made.
    pub memory_lost: Cell64,
    /// Members found equal to their primary by their digests.
    pub compared_by_digest: Cell64,
    /// Members whose differences all stood in the primary's history.
    pub compared_by_history: Cell64,
    /// Members that had to be listed.
    pub compared_by_list: Cell64,
    /// Members whose digests did not fit their lists: a bug, or damage.
    pub digest_mismatches: Cell64,
    /// Objects pushed to members.
    pub recovered_objects: Cell64,
    /// Bytes pushed to members.
    pub recovered_bytes: Cell64,
    /// Local copies rewritten from another member after a bad read.
    pub repaired: Cell64,
    /// Scrubs of a PG that went through.
    pub scrubs: Cell64,
    /// Objects whose copies a scrub compared.
    pub scrubbed_objects: Cell64,
    /// Copies that a scrub found bad or different.
    pub scrub_errors: Cell64,
    /// Members reported as out of sync.
    pub out_of_sync: Cell64,
    /// Tombstones purged.
    pub purged: Cell64,
    /// Objects erased that PGs had left behind.
    pub erased: Cell64,
    /// 1 while what PGs have left behind is being looked for.
    pub strays_pending: Cell64,
    /// Object copies still to be recovered.
    pub missing: Cell64,
    /// Bytes of the core's arena in use.
    pub buffer_used_bytes: Cell64,
    /// Bytes of the core's arena.
    pub buffer_bytes: Cell64,
}

impl CoreMetrics {
    /// Counters for a core that owns these slices.
    pub fn new(slices: &[SliceId]) -> Self {
        Self {
            slices: Mutex::new(slices.iter().map(|slice| SliceMetrics::of(*slice)).collect()),
            ..Default::default()
        }
    }

    /// All slices' counters.
    pub fn slices(&self) -> Vec<Arc<SliceMetrics>> {
        self.slices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The counters of a slice, made when there are none.
    pub fn slice(&self, slice: SliceId) -> Arc<SliceMetrics> {
        let mut slices = self.slices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = slices.iter().find(|known| known.slice == slice) {
            return known.clone();
        }
        let new = SliceMetrics::of(slice);
        slices.push(new.clone());
        new
    }

    #[inline]
    pub(crate) fn op(&self, class: OpClass) -> &OpMetrics {
        // The array has one entry per class, in the order of the enumeration.
        match self.ops.get(class as usize) {
            Some(op) => op,
            None => {
                let [first, ..] = &self.ops;
                first
            }
        }
    }

    pub(crate) fn pg_state(&self, state: PgState) -> Option<&Cell64> {
        self.pg_states.get(state as usize)
    }
}
