//! Live members that a primary has thrown out stay out for a while: taken back at once, they would be thrown out
//! again at once, and each time stops the PG's I/O.
//!
//! A member that is thrown out again soon after it was taken back stays out for twice as long. A member that its
//! primary could not reach may be fine for another one: what one primary held against it does not bind the next. Where
//! nobody serves there is nothing to stop, and the pause stays short.

use placement::PgRecord;
use reactor::Mono;
use std::collections::{BTreeMap, BTreeSet};
use wire::{PgId, SliceId};

/// How long a live member that a primary has thrown out stays out, in milliseconds: at first, and at most. The trial at
/// the end stops I/O for half a second if it is in vain: a hundredth of the time in the long run.
pub const HOLD_MS: std::ops::RangeInclusive<u64> = 5_000..=60_000;
/// A member that was not thrown out again for so long, in milliseconds, starts anew.
pub const CALM_MS: u64 = 60_000;

#[derive(Clone, Copy, Debug)]
struct Hold {
    /// While nobody serves the PG.
    first: Mono,
    until: Mono,
    pause_ms: u64,
    /// Who has thrown it out; `None` for one that stepped back itself, which counts for every primary.
    by: Option<SliceId>,
}

impl Hold {
    fn binds(&self, record: Option<&PgRecord>, now: Mono) -> bool {
        let Some(record) = record else { return now < self.until };
        let nobody = record.primary.is_none() && record.primary_session.is_none();
        let void = self.by.is_some() && (nobody || record.primary.is_some() && record.primary != self.by);
        !void && now < if record.primary.is_none() { self.first } else { self.until }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Holds {
    holds: BTreeMap<(PgId, SliceId), Hold>,
    /// When something about a hold changes.
    looks: BTreeSet<(Mono, PgId, SliceId)>,
}

impl Holds {
    /// A live member has left the acting set of a PG whose primary was `primary`.
    pub fn dropped(&mut self, pg: PgId, slice: SliceId, primary: Option<SliceId>, now: Mono) {
        let by = primary.filter(|primary| *primary != slice);
        let before = self.holds.get(&(pg, slice));
        if before.is_some_and(|hold| hold.by == by && now < hold.until) {
            return; // left out because it is held
        }
        let (first, most) = (*HOLD_MS.start(), *HOLD_MS.end());
        let pause_ms = before.map_or(first, |hold| (hold.pause_ms * 2).min(most));
        let hold = Hold { first: now.plus_ms(first), until: now.plus_ms(pause_ms), pause_ms, by };
        self.holds.insert((pg, slice), hold);
        self.looks.insert((hold.first, pg, slice));
    }

    /// Members that are not to be taken back into a PG with this record yet.
    pub fn of(&self, pg: PgId, record: Option<&PgRecord>, now: Mono) -> BTreeSet<SliceId> {
        let holds = self.holds.range((pg, SliceId(0))..=(pg, SliceId(u64::MAX)));
        let bound = holds.filter(|(_, hold)| hold.binds(record, now)).map(|((_, slice), _)| *slice);
        // One that has been taken back and serves is not thrown out by what was held against it as a member: it
        // would be taken back at once, because nobody serves then, and so on without end.
        bound.filter(|slice| record.is_none_or(|record| record.primary != Some(*slice))).collect()
    }

    /// PGs to look at: a hold of theirs is over, or would be if nobody served.
    pub fn due(&mut self, now: Mono) -> BTreeSet<PgId> {
        let mut pgs = BTreeSet::new();
        while let Some(&(at, pg, slice)) = self.looks.first().filter(|(at, ..)| *at <= now) {
            self.looks.remove(&(at, pg, slice));
            let Some(hold) = self.holds.get(&(pg, slice)) else { continue };
            let calm = hold.until.plus_ms(CALM_MS);
            let next = if now < hold.first {
                hold.first
            } else if now < hold.until {
                hold.until
            } else {
                calm
            };
            pgs.insert(pg);
            if now < calm {
                self.looks.insert((next, pg, slice));
            } else {
                self.holds.remove(&(pg, slice));
            }
        }
        pgs
    }

    /// What these slices were held for is over: their process is another one.
    pub fn release(&mut self, those: impl Fn(SliceId) -> bool) {
        self.holds.retain(|(_, slice), _| !those(*slice));
    }

    /// The PG is gone.
    pub fn forget(&mut self, pg: PgId) {
        let holds = self.holds.range((pg, SliceId(0))..=(pg, SliceId(u64::MAX)));
        let gone: Vec<(PgId, SliceId)> = holds.map(|(key, _)| *key).collect();
        for key in gone {
            self.holds.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::PoolId;

    #[test]
    fn nobody_is_held_out_of_what_it_serves() {
        let (pg, slice, now) = (PgId { pool: PoolId(1), index: 0 }, SliceId(3), Mono(0));
        let mut holds = Holds::default();
        holds.dropped(pg, slice, None, now);
        let again = now.plus_ms(*HOLD_MS.start() + 1);
        holds.dropped(pg, slice, None, again);
        // The second time it stays out for longer where somebody serves, as long as the first time where nobody does.
        let later = again.plus_ms(*HOLD_MS.start() + 1);
        let record = |primary: Option<u64>| PgRecord { primary: primary.map(SliceId), ..PgRecord::default() };
        assert_eq!(holds.of(pg, Some(&record(Some(4))), later), [slice].into());
        assert_eq!(holds.of(pg, Some(&record(None)), later), [].into());
        assert_eq!(
            holds.of(pg, Some(&record(Some(3))), later),
            [].into(),
            "taken back, it is not thrown out again"
        );
    }
}
