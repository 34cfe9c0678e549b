//! The kernel's clocks.

use crate::env::{Mono, WallMs};

fn read(clock: libc::clockid_t) -> (u64, u64) {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid timespec to write to; the clocks used here exist on every Linux, so the
    // call cannot fail (and would leave zero, not garbage, if it did).
    unsafe { libc::clock_gettime(clock, &raw mut ts) };
    (ts.tv_sec.max(0) as u64, ts.tv_nsec.max(0) as u64)
}

/// Monotonic time, not set back by anybody.
pub(crate) fn mono() -> Mono {
    let (s, ns) = read(libc::CLOCK_MONOTONIC);
    Mono(s.saturating_mul(1_000_000_000).saturating_add(ns))
}

/// Wall clock.
pub(crate) fn wall() -> WallMs {
    let (s, ns) = read(libc::CLOCK_REALTIME);
    WallMs(s.saturating_mul(1000).saturating_add(ns / 1_000_000))
}
