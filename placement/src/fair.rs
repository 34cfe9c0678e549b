//! Fair shares: how many PGs of a pool each slice should hold, and how far from that it may stay.

use crate::map::FailureDomain;
use crate::topology::Topology;
use std::collections::BTreeMap;

/// How far a slice may be from its fair share, in percent, before PGs move only for balance. Small
/// enough that the fullest slice does not fill noticeably early, large enough that the next joining or
/// leaving slice moves no PG but its own.
pub const TOLERANCE_PERCENT: u64 = 4;

/// Fixed-point unit of shares: 1/65536 PG.
pub(crate) const UNIT: u64 = 1 << 16;
/// A share that lacks so little of a whole PG, in `UNIT`s, lacks it by the rounding of the divisions that made it.
const ROUNDING: u64 = 64;

/// The bounds of one slice (or core).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Share {
    /// Fair share in `UNIT`s.
    pub fair: u64,
    /// Below this many PGs, PGs move here.
    pub low: u32,
    /// Above this many PGs, PGs move away.
    pub high: u32,
}

impl Share {
    /// `fair` in `UNIT`s; the bounds are `tolerance` percent away and at least the neighbouring integers.
    pub fn new(fair: u64, tolerance: u64) -> Self {
        let slack = fair * tolerance / 100;
        let low = (fair - slack) / UNIT;
        let high = (fair + slack).div_ceil(UNIT);
        Self { fair, low: low as u32, high: high as u32 }
    }

    /// The same share, but whoever should have a PG has one: below it the tolerance would leave a disk that is
    /// added, or comes back, without any for good.
    fn not_empty(self) -> Self {
        Self { low: self.low.max(u32::from(self.fair + ROUNDING >= UNIT)), ..self }
    }

    /// The same share with bounds at the neighbouring integers.
    pub fn tight(&self) -> Self {
        Self::new(self.fair, 0)
    }

    /// How far `load` is above the fair share, in `UNIT`s; negative when below.
    pub fn excess(&self, load: u32) -> i64 {
        (u64::from(load) * UNIT) as i64 - self.fair as i64
    }
}

/// The fair share of every slice of the topology, in its order.
///
/// A domain holds at most one copy of a PG. So its share is in proportion to its bytes, but at most
/// `pg_count`; what the capped domains cannot take is shared by the others.
pub(crate) fn shares(topology: &Topology, kind: FailureDomain, copies: u8, pg_count: u32) -> Vec<Share> {
    let mut weights: BTreeMap<u32, u128> = BTreeMap::new();
    for spot in topology.spots() {
        *weights.entry(spot.domain(kind)).or_default() += u128::from(spot.size_bytes);
    }
    let cap = u128::from(pg_count) * u128::from(UNIT);
    let domain_shares = fill(&weights, cap * u128::from(copies), cap);
    topology
        .spots()
        .iter()
        .map(|spot| {
            let domain = spot.domain(kind);
            let share = domain_shares.get(&domain).copied().unwrap_or_default();
            let weight = weights.get(&domain).copied().unwrap_or(1).max(1);
            // At most 2^64 bytes times 2^32 PGs times 2^16: 112 of 128 bits.
            let fair = share * u128::from(spot.size_bytes) / weight;
            Share::new(fair as u64, TOLERANCE_PERCENT).not_empty()
        })
        .collect()
}

/// Divides `total` in proportion to the weights, nobody getting more than `cap`.
fn fill(weights: &BTreeMap<u32, u128>, total: u128, cap: u128) -> BTreeMap<u32, u128> {
    let mut out = BTreeMap::new();
    let mut open: Vec<(u32, u128)> = weights.iter().map(|(&d, &w)| (d, w)).collect();
    let mut left = total;
    loop {
        let sum: u128 = open.iter().map(|&(_, w)| w).sum();
        if sum == 0 {
            return out;
        }
        // Those whose proportional share reaches the cap get the cap; then look again.
        let (capped, rest): (Vec<_>, Vec<_>) = open.iter().partition(|&&(_, w)| w * left >= cap * sum);
        if capped.is_empty() || rest.is_empty() {
            for (domain, weight) in open {
                out.insert(domain, (weight * left / sum).min(cap));
            }
            return out;
        }
        for (domain, _) in capped {
            out.insert(domain, cap);
            left = left.saturating_sub(cap);
        }
        open = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_never_gets_more_than_the_cap_and_the_rest_is_shared() {
        let weights = BTreeMap::from([(0, 100), (1, 10), (2, 10), (3, 20)]);
        let got = fill(&weights, 300, 100);
        assert_eq!(got, BTreeMap::from([(0, 100), (1, 50), (2, 50), (3, 100)]));
    }

    #[test]
    fn small_shares_are_bounded_by_the_neighbouring_integers() {
        let share = Share::new(5 * UNIT / 2, TOLERANCE_PERCENT);
        assert_eq!((share.low, share.high), (2, 3));
        let share = Share::new(100 * UNIT, TOLERANCE_PERCENT);
        assert_eq!((share.low, share.high), (96, 104));
    }
}
