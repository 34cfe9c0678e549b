//! A node's clock: virtual time seen through an origin and a rate of its own.

use reactor::Mono;

/// Nanoseconds of virtual time since the simulation began: the one true time.
pub type Nanos = u64;
/// Nanoseconds in a microsecond.
pub const US: Nanos = 1_000;
/// Nanoseconds in a millisecond.
pub const MS: Nanos = 1_000_000;
/// Nanoseconds in a second.
pub const SEC: Nanos = 1_000_000_000;

/// `local(t) = origin + t + t * drift_ppm / 10^6`.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeClock {
    /// Reading at virtual time zero.
    pub origin: u64,
    /// How much faster (or slower) it runs, parts per million.
    pub drift_ppm: i32,
    /// Offset of the wall clock from the true one, milliseconds.
    pub wall_skew_ms: i64,
}

/// The wall clock at virtual time zero: 2026-01-01, in milliseconds since 1970.
const WALL_EPOCH_MS: i64 = 1_767_225_600_000;

impl NodeClock {
    /// The node's monotonic clock at virtual time `t`.
    pub fn local(&self, t: Nanos) -> Mono {
        let drift = i128::from(t) * i128::from(self.drift_ppm) / 1_000_000;
        let local = i128::from(self.origin) + i128::from(t) + drift;
        Mono(u64::try_from(local.max(0)).unwrap_or(u64::MAX))
    }

    /// The earliest virtual time at which `local` reads at least `at`; zero when that has passed.
    pub fn global(&self, at: Mono) -> Nanos {
        let elapsed = i128::from(at.0) - i128::from(self.origin);
        if elapsed <= 0 {
            return 0;
        }
        let rate = 1_000_000 + i128::from(self.drift_ppm);
        let mut t = u64::try_from(elapsed * 1_000_000 / rate).unwrap_or(u64::MAX);
        // Both divisions round down: step over the remainder so that a timer is never early.
        while t < u64::MAX && self.local(t) < at {
            t += 1;
        }
        t
    }

    /// The wall clock, milliseconds since 1970.
    pub fn wall_ms(&self, t: Nanos) -> u64 {
        u64::try_from(WALL_EPOCH_MS + self.wall_skew_ms + (t / MS) as i64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn global_is_the_first_moment_that_reads_at_least() {
        for drift_ppm in [-500, -1, 0, 1, 777] {
            let clock = NodeClock { origin: 12_345, drift_ppm, wall_skew_ms: 0 };
            for t in [1u64, 999, 1_000_003, 17 * SEC + 11] {
                let at = clock.local(t);
                let back = clock.global(at);
                assert!(clock.local(back) >= at);
                assert!(back == 0 || clock.local(back - 1) < at, "{drift_ppm} {t} {back}");
            }
        }
    }
}
