//! What scenarios are made of: services from plain functions, and logs that the check can read.

use super::{CorePlan, World};
use crate::env::{Env, Event, Service};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use wire::CoreId;

/// A list that services append to and the check looks at.
pub(super) struct Log<T>(Arc<Mutex<Vec<T>>>);

impl<T> Clone for Log<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Clone> Log<T> {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    pub(super) fn push(&self, item: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(item);
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) fn all(&self) -> Vec<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn last(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last().cloned()
    }
}

/// Where a service publishes the address it got.
pub(super) type Address = Log<SocketAddr>;

/// A service made of a state and plain functions.
pub(super) struct Actor<S> {
    pub(super) state: S,
    pub(super) start: fn(&mut S, &mut dyn Env),
    pub(super) event: fn(&mut S, &mut dyn Env, Event),
    pub(super) flush: fn(&mut S, &mut dyn Env),
}

impl<S> Actor<S> {
    pub(super) fn new(
        state: S,
        start: fn(&mut S, &mut dyn Env),
        event: fn(&mut S, &mut dyn Env, Event),
    ) -> Self {
        Self { state, start, event, flush: |_, _| {} }
    }
}

impl<S> Service for Actor<S> {
    fn start(&mut self, env: &mut dyn Env) {
        (self.start)(&mut self.state, env);
    }
    fn event(&mut self, env: &mut dyn Env, event: Event) {
        (self.event)(&mut self.state, env, event);
    }
    fn flush(&mut self, env: &mut dyn Env) {
        (self.flush)(&mut self.state, env);
    }
}

/// Arena of a core whose scenario does not care.
pub(super) const ARENA_BYTES: usize = 8 << 20;

/// A core of `node` with number `core`.
pub(super) fn core<S: 'static>(
    node: usize,
    core: u16,
    disks: &[u64],
    make: impl FnOnce() -> Actor<S> + Send + 'static,
) -> CorePlan {
    CorePlan {
        node,
        core: CoreId(core),
        disks: disks.to_vec(),
        arena_bytes: ARENA_BYTES,
        service: Box::new(move || Box::new(make())),
    }
}

/// Runs until `log` has `count` entries.
pub(super) fn run_for<T: Clone>(
    world: &mut dyn World,
    what: &str,
    log: &Log<T>,
    count: usize,
) -> Result<(), String> {
    if world.run_until(&mut || log.len() >= count) {
        Ok(())
    } else {
        Err(format!("{what}: {} of {count} in time", log.len()))
    }
}

/// An error unless the two are equal.
pub(super) fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, due: T) -> Result<(), String> {
    if is == due { Ok(()) } else { Err(format!("{what}: {is:?}, due {due:?}")) }
}

/// An error unless `holds`.
pub(super) fn check(holds: bool, what: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.into()) }
}

/// Recognisable contents: byte `i` of the pattern numbered `seed`.
pub(super) fn pattern(seed: u64, bytes: &mut [u8]) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = (seed.wrapping_mul(31).wrapping_add(i as u64 / 7).wrapping_mul(0x9e37_79b9) >> 13) as u8;
    }
}

/// Whether `bytes` are the pattern numbered `seed`.
pub(super) fn has_pattern(seed: u64, bytes: &[u8]) -> bool {
    let mut due = vec![0; bytes.len()];
    pattern(seed, &mut due);
    due == bytes
}
