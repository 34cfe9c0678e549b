//! Seeded random numbers, integers only, one stream per concern.
//!
//! A stream is named by a salt, so that one more draw in the network does not shift what the disks or the
//! workload draw: a seed stays comparable while the simulator grows.

/// One stream: xoshiro256++ (Blackman and Vigna, public domain), seeded through splitmix64.
#[derive(Clone, Debug)]
pub struct Stream {
    state: [u64; 4],
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Stream {
    /// The stream `salt` of a seed.
    pub fn new(seed: u64, salt: &str) -> Self {
        let mut mixed = seed;
        for byte in salt.bytes() {
            mixed = splitmix(&mut mixed) ^ u64::from(byte);
        }
        Self { state: std::array::from_fn(|_| splitmix(&mut mixed)) }
    }

    /// A stream of its own, split off this one.
    pub fn fork(&mut self) -> Self {
        let mut seed = self.bits();
        Self { state: std::array::from_fn(|_| splitmix(&mut seed)) }
    }

    /// 64 uniformly distributed bits.
    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let out = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (mut c, mut d) = (c ^ a, d ^ b);
        let (b2, a2) = (b ^ c, a ^ d);
        c ^= b << 17;
        d = d.rotate_left(45);
        self.state = [a2, b2, c, d];
        out
    }

    /// Uniform in `0..n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in `lo..=hi`.
    pub fn between(&mut self, lo: u64, hi: u64) -> u64 {
        lo + self.below(hi.saturating_sub(lo).saturating_add(1))
    }

    /// True in `ppm` of a million draws. Zero draws nothing, so that a switched-off fault costs no draw.
    pub fn chance(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.below(1_000_000) < u64::from(ppm)
    }

    /// A fair coin.
    pub fn coin(&mut self) -> bool {
        self.bits() >> 63 == 1
    }

    /// One of several, all equally likely; `None` of an empty slice.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len() as u64) as usize)
    }

    /// One of several values with weights; the first when all weights are zero.
    pub fn weighted<T: Copy>(&mut self, first: (u32, T), rest: &[(u32, T)]) -> T {
        let total = u64::from(first.0) + rest.iter().map(|(w, _)| u64::from(*w)).sum::<u64>();
        let mut at = self.below(total);
        for (weight, value) in std::iter::once(&first).chain(rest) {
            if at < u64::from(*weight) {
                return *value;
            }
            at -= u64::from(*weight);
        }
        first.1
    }

    /// A duration around `mean` with a long tail: mostly 0.5 to 1.5 times, sometimes 4, rarely 20 times.
    pub fn latency(&mut self, mean: u64) -> u64 {
        let spread = match self.below(100) {
            0 => 19 * mean,
            1..=9 => 3 * mean,
            _ => mean,
        };
        mean / 2 + self.below(spread.max(1))
    }

    /// Shuffles a slice.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Stream;

    #[test]
    fn streams_are_reproducible_and_differ_by_seed_and_salt() {
        let draw = |seed, salt| {
            let mut stream = Stream::new(seed, salt);
            [stream.bits(), stream.bits(), stream.bits()]
        };
        assert_eq!(draw(1, "net"), draw(1, "net"));
        assert_ne!(draw(1, "net"), draw(2, "net"));
        assert_ne!(draw(1, "net"), draw(1, "disk"));
    }

    #[test]
    fn bounds_hold_and_are_reached() {
        let mut stream = Stream::new(7, "bounds");
        let mut seen = [0u32; 5];
        for _ in 0..1000 {
            let value = stream.between(3, 7);
            assert!((3..=7).contains(&value));
            seen[(value - 3) as usize] += 1;
        }
        assert!(seen.iter().all(|&count| count > 100), "{seen:?}");
        assert!(!(0..1000).any(|_| stream.chance(0)));
        assert!((0..1000).all(|_| stream.chance(1_000_000)));
    }
}
