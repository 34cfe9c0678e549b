//! Giving primaries to other members while their present ones work: when, how many at once, and what follows when
//! one gets no consent.
//!
//! A hand-over has two halves. The director writes a record without a primary; the node of the former one, once its
//! core serves no longer, writes the record with the next (`decide::finish_hand_over`).

use placement::PgRecord;
use reactor::Mono;
use std::collections::BTreeMap;
use wire::{PgId, SliceId};

/// How long a PG must be clean, and the cluster without arrivals and departures, before its primary is
/// handed to the preferred member, in milliseconds.
pub const HAND_OVER_AFTER_MS: u64 = 2_000;
/// Hand-overs at once: each stops its PG for some milliseconds.
pub const HAND_OVERS: usize = 8;
/// How long the present primary may take to consent before it is reinstated, in milliseconds.
pub const CONSENT_MS: u64 = 300;
/// After hand-overs that got no consent there are none for so long, in milliseconds; twice as long after
/// the next that get none. They were in vain and cost their PGs `CONSENT_MS`.
pub const HAND_OVER_PAUSE_MS: std::ops::RangeInclusive<u64> = 5_000..=600_000;

/// Why a PG should have another primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// Placement prefers another member: there is time.
    Preferred,
    /// An administrator has drained its node: at once.
    Drained,
}

/// The first half is written, or on its way.
#[derive(Clone, Copy, Debug)]
struct UnderWay {
    deadline: Mono,
    former: SliceId,
}

/// Whether a PG between the halves is to be left alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Halfway {
    /// The consent may still come.
    Wait,
    /// There is no hand-over, or no more.
    GoOn,
}

/// See the module.
#[derive(Debug)]
pub struct HandOvers {
    /// PGs that would like another primary, and since when.
    wanted: BTreeMap<PgId, (Why, Mono)>,
    under_way: BTreeMap<PgId, UnderWay>,
    /// None before then.
    from: Mono,
    /// The next pause after a failure.
    pause_ms: u64,
    /// The last one has succeeded: several at once may be tried.
    succeeded: bool,
    /// Last arrival or departure of a node.
    quiet_since: Mono,
}

impl HandOvers {
    /// Nothing wanted yet.
    pub fn new(now: Mono) -> Self {
        Self {
            wanted: BTreeMap::new(),
            under_way: BTreeMap::new(),
            from: now,
            pause_ms: *HAND_OVER_PAUSE_MS.start(),
            succeeded: false,
            quiet_since: now,
        }
    }

    /// A node has come or gone.
    pub fn disturbed(&mut self, now: Mono) {
        self.quiet_since = now;
    }

    /// The PG is gone.
    pub fn forget(&mut self, pg: PgId) {
        self.wanted.remove(&pg);
        self.under_way.remove(&pg);
    }

    /// Its primary is fine as it is.
    pub fn unwanted(&mut self, pg: PgId) {
        self.wanted.remove(&pg);
    }

    /// A record that names a primary has been written.
    pub fn written(&mut self, pg: PgId, record: &PgRecord) {
        if let Some(done) = self.under_way.remove(&pg) {
            self.wanted.remove(&pg);
            if record.primary != Some(done.former) {
                self.succeeded = true;
                self.pause_ms = *HAND_OVER_PAUSE_MS.start();
            }
        }
    }

    /// The PG's record names a primary: a first half that was begun has not been written.
    pub fn not_begun(&mut self, pg: PgId) {
        self.under_way.remove(&pg);
    }

    /// What a PG without a primary waits for. `members_up`: all acting members are there.
    pub fn halfway(&mut self, pg: PgId, members_up: bool, now: Mono) -> Halfway {
        let Some(under_way) = self.under_way.get(&pg) else { return Halfway::GoOn };
        if now < under_way.deadline && members_up {
            return Halfway::Wait;
        }
        self.under_way.remove(&pg);
        if members_up {
            tracing::warn!(%pg, "no consent to a hand-over, its primary stays");
            self.failed(now);
        }
        Halfway::GoOn
    }

    fn failed(&mut self, now: Mono) {
        self.succeeded = false;
        // Those that fail together are one trial: what stood in the way of one stood in the way of all.
        if now >= self.from {
            self.from = now.plus_ms(self.pause_ms);
            self.pause_ms = (self.pause_ms * 2).min(*HAND_OVER_PAUSE_MS.end());
        }
    }

    fn may_begin(&self, why: Why, since: Mono, now: Mono) -> bool {
        let at_once = if self.succeeded { HAND_OVERS } else { 1 };
        let ripe = match why {
            Why::Drained => true,
            Why::Preferred => {
                now >= since.plus_ms(HAND_OVER_AFTER_MS)
                    && now >= self.quiet_since.plus_ms(HAND_OVER_AFTER_MS)
            }
        };
        ripe && self.under_way.len() < at_once && now >= self.from
    }

    /// The PG would like another primary than this one; whether the first half is to be written now.
    pub fn want(&mut self, pg: PgId, why: Why, former: SliceId, now: Mono) -> bool {
        let wanted = self.wanted.entry(pg).or_insert((why, now));
        wanted.0 = why;
        let since = wanted.1;
        if !self.may_begin(why, since, now) {
            return false;
        }
        self.under_way.insert(pg, UnderWay { deadline: now.plus_ms(CONSENT_MS), former });
        true
    }

    /// PGs to look at: those that wait for a consent for too long, and some that may begin.
    pub fn due(&self, now: Mono) -> Vec<PgId> {
        let late = self.under_way.iter().filter(|(_, one)| one.deadline <= now).map(|(pg, _)| *pg);
        let ripe = self.wanted.iter().filter(|(_, (why, since))| self.may_begin(*why, *since, now));
        let ripe = ripe.map(|(pg, _)| *pg).filter(|pg| !self.under_way.contains_key(pg));
        late.chain(ripe.take(HAND_OVERS)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::PoolId;

    fn pg(index: u32) -> PgId {
        PgId { pool: PoolId(1), index }
    }

    fn at(ms: u64) -> Mono {
        Mono(0).plus_ms(ms)
    }

    /// Wants the PGs' hand-overs; those that are begun.
    fn begun(hand_overs: &mut HandOvers, pgs: std::ops::Range<u32>, now: Mono) -> Vec<u32> {
        pgs.filter(|index| hand_overs.want(pg(*index), Why::Drained, SliceId(1), now)).collect()
    }

    #[test]
    fn hand_overs_that_fail_together_are_one_trial() {
        let mut hand_overs = HandOvers::new(at(0));
        hand_overs.succeeded = true;
        assert_eq!(begun(&mut hand_overs, 0..9, at(0)).len(), HAND_OVERS);
        for index in 0..8 {
            assert_eq!(hand_overs.halfway(pg(index), true, at(CONSENT_MS)), Halfway::GoOn);
        }
        let first = *HAND_OVER_PAUSE_MS.start();
        assert!(begun(&mut hand_overs, 0..9, at(CONSENT_MS + first - 1)).is_empty());
        let again = CONSENT_MS + first;
        assert_eq!(
            begun(&mut hand_overs, 0..9, at(again)),
            [0],
            "one after the pause, not eight times twice as long"
        );
        assert_eq!(hand_overs.halfway(pg(0), true, at(again + CONSENT_MS)), Halfway::GoOn);
        assert!(begun(&mut hand_overs, 0..9, at(again + CONSENT_MS + 2 * first - 1)).is_empty());
        assert_eq!(begun(&mut hand_overs, 0..9, at(again + CONSENT_MS + 2 * first)), [0], "twice as long");
    }
}
