//! What a core counts about itself. Written by the core alone, readable from anywhere.

use super::links::LinkTable;
use std::sync::atomic::{AtomicU64, Ordering};

/// A batch that takes longer than this from reaping to the end of its flush counts as a stall: the bound
/// that every step of a loop has to keep.
pub const STALL_NS: u64 = 5_000_000;

/// A number with one writer and any number of readers.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds; for the one writer only (a plain load and store, no locked instruction).
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Sets; for the one writer only.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn raise_to(&self, n: u64) {
        if n > self.get() {
            self.set(n);
        }
    }
}

/// Counters of one core's loop. All but the marked ones only grow.
#[derive(Default, Debug)]
pub struct CoreStats {
    /// `io_uring_enter` calls.
    pub enters: Counter,
    /// Turns of the loop.
    pub iterations: Counter,
    /// Events given to the service.
    pub events: Counter,
    /// Completions reaped from the ring.
    pub completions: Counter,
    /// Times the loop spun for a while before parking.
    pub spins: Counter,
    /// Spins that found something.
    pub spin_hits: Counter,
    /// Times the loop slept in the kernel.
    pub parks: Counter,
    /// Longest time from reaping a batch to the end of its flush, in nanoseconds.
    pub lag_max_ns: Counter,
    /// Sum of those times, in nanoseconds: with `iterations`, the mean.
    pub lag_sum_ns: Counter,
    /// Batches that took longer than `STALL_NS`.
    pub stalls: Counter,
    /// Disk operations completed.
    pub disk_ops: Counter,
    /// Those found by polling.
    pub polled_ops: Counter,
    /// Disk operations in flight (gauge).
    pub disk_in_flight: Counter,
    /// Connections that use RDMA (gauge).
    pub rdma_connections: Counter,
    /// Connections that have switched to RDMA.
    pub rdma_switches: Counter,
    /// Times work was handed to the RDMA device: everything of a connection in one turn.
    pub rdma_doorbells: Counter,
    /// Work requests handed over.
    pub rdma_work_requests: Counter,
    /// Times RDMA was tried with a peer in vain: the connection stayed on TCP.
    pub rdma_refusals: Counter,
    /// Connections that broke while they used RDMA.
    pub rdma_breaks: Counter,
    /// Heap allocations of the core's thread, when the binary counts them (`CountingHeap`).
    pub heap_allocations: Counter,
    /// Bytes of the arena in use (gauge, sampled at every park).
    pub arena_used_bytes: Counter,
    /// Bytes of the arena registered with the kernel (gauge).
    pub arena_registered_bytes: Counter,
    /// The connections there are now.
    pub links: LinkTable,
}
