//! How long to spin before parking.
//!
//! Spinning pays when the next completion comes within microseconds from hardware or from another CPU.
//! It costs when the peer that would produce it waits for this very CPU. The loop cannot know which, so it
//! learns: a spin that finds nothing quarters the window, and once the window is nothing the loop parks at
//! once and only tries again after an ever longer series of parks. A spin during which somebody else ran on
//! this CPU (the clock jumps) is worse than fruitless, even when it finds something: parking would have let
//! them run at once. It takes the whole window.

/// Below this a window is not worth a clock reading.
const WINDOW_MIN_NS: u64 = 1_000;
/// Parks between two probes, at first and at most.
const PROBE_EVERY_MIN: u32 = 64;
const PROBE_EVERY_MAX: u32 = 16_384;

/// A jump of the clock between two looks that only another task on this CPU explains.
pub(crate) const PREEMPTED_NS: u64 = 3_000;

/// What a spin came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Spun {
    /// Something came while only we ran.
    Hit,
    /// Nothing came.
    Miss,
    /// Somebody else ran here.
    Preempted,
}

pub(crate) struct SpinPolicy {
    full_ns: u64,
    window_ns: u64,
    /// Parks still to go before the next probe, while the window is nothing.
    until_probe: u32,
    probe_every: u32,
}

impl SpinPolicy {
    pub(crate) fn new(full_ns: u64) -> Self {
        Self { full_ns, window_ns: full_ns, until_probe: 0, probe_every: PROBE_EVERY_MIN }
    }

    /// How long to spin now, in nanoseconds; zero means park at once.
    pub(crate) fn window(&mut self) -> u64 {
        if self.window_ns > 0 || self.full_ns == 0 {
            return self.window_ns;
        }
        if self.until_probe > 0 {
            self.until_probe -= 1;
            return 0;
        }
        self.until_probe = self.probe_every;
        self.full_ns
    }

    /// Takes the outcome of a spin into account.
    pub(crate) fn learn(&mut self, spun: Spun) {
        if spun == Spun::Hit {
            self.window_ns = self.full_ns;
            self.probe_every = PROBE_EVERY_MIN;
        } else if self.window_ns > 0 {
            self.window_ns = if spun == Spun::Preempted { 0 } else { self.window_ns / 4 };
            if self.window_ns < WINDOW_MIN_NS {
                self.window_ns = 0;
                self.until_probe = self.probe_every;
            }
        } else {
            self.probe_every = (self.probe_every * 2).min(PROBE_EVERY_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fruitless_window_falls_to_nothing_and_is_probed_ever_more_rarely() {
        let mut policy = SpinPolicy::new(20_000);
        let mut spent = Vec::new();
        for park in 0..100_000u32 {
            let window = policy.window();
            if window > 0 {
                policy.learn(Spun::Miss);
                spent.push(park);
            }
        }
        assert!(spent.len() < 20, "{} spins in 100,000 parks", spent.len());
        assert!(spent[..3].windows(2).all(|w| w[1] == w[0] + 1), "the first misses follow each other");
    }

    #[test]
    fn one_hit_restores_the_window() {
        let mut policy = SpinPolicy::new(20_000);
        while policy.window() > 0 {
            policy.learn(Spun::Miss);
        }
        while policy.window() == 0 {}
        policy.learn(Spun::Hit);
        assert_eq!(policy.window(), 20_000);
    }

    #[test]
    fn one_preemption_ends_spinning_until_the_next_probe() {
        let mut policy = SpinPolicy::new(20_000);
        assert_eq!(policy.window(), 20_000);
        policy.learn(Spun::Preempted);
        assert_eq!(policy.window(), 0);
    }

    #[test]
    fn zero_means_never() {
        let mut policy = SpinPolicy::new(0);
        assert!((0..1000).all(|_| policy.window() == 0));
    }
}
