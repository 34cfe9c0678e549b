//! The checker: every block is a register, every write has a value of its own, and for each block there must be
//! an order of all operations that agrees with real time and explains every read.
//!
//! With unique values that question has a quick answer (Gibbons and Korach, "Testing shared memories"): put a
//! write and all reads of its value into one *zone*. A zone reaches from the earliest end of its operations to
//! the latest start. If that is forward in time, the block must have held the value during the whole zone, so
//! two forward zones may not overlap. If it is backward, the value was there at some moment inside, so a
//! backward zone may not lie wholly within a forward one.
//!
//! A write without an answer may take effect at any time from its start on, or never: it has no end of its own,
//! and counts only if somebody read it.
//!
//! This module knows nothing of clusters. Times are ticks of one counter that all clients share.

use std::collections::BTreeMap;
use thiserror::Error;

/// The end of an operation that has got no answer.
pub const UNKNOWN: u64 = u64::MAX;
/// What a block holds before the first write: zeroes.
pub const BLANK: Stamp = Stamp(0);

/// The value that one write writes, all blocks of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Stamp(pub u64);

/// What an operation did with a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Wrote it.
    Write,
    /// Read it.
    Read,
}

/// An operation's part in one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// Number of the block in its image.
    pub block: u32,
    /// What was written or read.
    pub stamp: Stamp,
    /// Which of the two.
    pub access: Access,
    /// Tick of the start.
    pub start: u64,
    /// Tick of the end, or `UNKNOWN`.
    pub end: u64,
}

/// How a history contradicts itself.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Violation {
    /// Nobody wrote that.
    #[error("block {block}: a read from tick {start} to {end} returned value {stamp:?}, which nobody wrote")]
    Phantom {
        /// The block.
        block: u32,
        /// The value.
        stamp: Stamp,
        /// The read's start.
        start: u64,
        /// The read's end.
        end: u64,
    },
    /// A read ended before the write of its value had begun.
    #[error(
        "block {block}: value {stamp:?} was read by tick {read_end}, and its write began at {write_start}"
    )]
    FromTheFuture {
        /// The block.
        block: u32,
        /// The value.
        stamp: Stamp,
        /// The read's end.
        read_end: u64,
        /// The write's start.
        write_start: u64,
    },
    /// Two values that the block must have held at the same time.
    #[error(
        "block {block}: value {older:?} had to be there from tick {} to {} and {newer:?} from {} to {}: one of \
         them was lost, came back, or was read when it was stale",
        .older_zone.0, .older_zone.1, .newer_zone.0, .newer_zone.1
    )]
    Contradiction {
        /// The block.
        block: u32,
        /// The value with the zone that is forward in time.
        older: Stamp,
        /// Its zone.
        older_zone: (u64, u64),
        /// The other value.
        newer: Stamp,
        /// Its zone, from its earlier to its later tick.
        newer_zone: (u64, u64),
    },
}

/// A write and the reads of its value.
#[derive(Clone, Copy, Debug)]
struct Zone {
    stamp: Stamp,
    /// Earliest end of its operations.
    first_end: u64,
    /// Latest start.
    last_start: u64,
}

impl Zone {
    fn is_forward(&self) -> bool {
        self.first_end < self.last_start
    }
}

/// Checks the history of one block, whose value before it was `BLANK`. At most one write of each value.
pub fn check_block(block: u32, events: &[Event]) -> Result<(), Violation> {
    let mut zones = BTreeMap::new();
    let mut writes = BTreeMap::from([(BLANK, 0)]);
    zones.insert(BLANK, Zone { stamp: BLANK, first_end: 0, last_start: 0 });
    for event in events.iter().filter(|event| event.access == Access::Write) {
        writes.insert(event.stamp, event.start);
        zones.insert(event.stamp, Zone { stamp: event.stamp, first_end: event.end, last_start: event.start });
    }
    for event in events.iter().filter(|event| event.access == Access::Read) {
        let (Event { stamp, start, end, .. }, zone) = (*event, zones.get_mut(&event.stamp));
        let Some(zone) = zone else { return Err(Violation::Phantom { block, stamp, start, end }) };
        let write_start = writes.get(&stamp).copied().unwrap_or(0);
        if end < write_start {
            return Err(Violation::FromTheFuture { block, stamp, read_end: end, write_start });
        }
        zone.first_end = zone.first_end.min(end);
        zone.last_start = zone.last_start.max(start);
    }
    // Never answered and never read: it need not have happened.
    zones.retain(|_, zone| zone.first_end != UNKNOWN);
    compare(block, zones.into_values().collect())
}

fn compare(block: u32, zones: Vec<Zone>) -> Result<(), Violation> {
    let contradiction = |older: &Zone, newer: &Zone| Violation::Contradiction {
        block,
        older: older.stamp,
        older_zone: (older.first_end, older.last_start),
        newer: newer.stamp,
        newer_zone: (newer.first_end.min(newer.last_start), newer.first_end.max(newer.last_start)),
    };
    let (mut forward, backward): (Vec<Zone>, Vec<Zone>) = zones.into_iter().partition(Zone::is_forward);
    forward.sort_by_key(|zone| zone.first_end);
    for pair in forward.windows(2) {
        if let [older, newer] = pair
            && newer.first_end < older.last_start
        {
            return Err(contradiction(older, newer));
        }
    }
    for zone in &backward {
        // Forward zones do not overlap, so only the last one that begins before this zone can enclose it.
        let after = forward.partition_point(|other| other.first_end < zone.last_start);
        if let Some(around) = after.checked_sub(1).and_then(|at| forward.get(at))
            && zone.first_end < around.last_start
        {
            return Err(contradiction(around, zone));
        }
    }
    Ok(())
}

/// Checks every block. On failure also returns all that happened to the block, in order of start.
pub fn check(mut events: Vec<Event>) -> Result<(), (Violation, Vec<Event>)> {
    events.sort_by_key(|event| (event.block, event.start));
    for of_block in events.chunk_by(|a, b| a.block == b.block) {
        let Some(first) = of_block.first() else { continue };
        check_block(first.block, of_block).map_err(|violation| (violation, of_block.to_vec()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(stamp: u64, start: u64, end: u64) -> Event {
        Event { block: 7, stamp: Stamp(stamp), access: Access::Write, start, end }
    }

    fn read(stamp: u64, start: u64, end: u64) -> Event {
        Event { access: Access::Read, ..write(stamp, start, end) }
    }

    #[test]
    fn what_a_register_may_do_passes() {
        for history in [
            vec![],
            vec![read(0, 1, 2)],
            vec![write(1, 1, 2), read(1, 3, 4)],
            // Concurrent writes in either order; a read beside a write sees either value.
            vec![write(1, 1, 4), write(2, 2, 5), read(1, 6, 7)],
            vec![write(1, 1, 4), write(2, 2, 5), read(2, 6, 7)],
            vec![write(1, 1, 2), write(2, 3, 8), read(1, 4, 5), read(2, 6, 7)],
            // Without an answer: never, late, or at once.
            vec![write(1, 1, 2), write(2, 3, UNKNOWN), read(1, 4, 5)],
            vec![write(1, 1, 2), write(2, 3, UNKNOWN), read(1, 4, 5), read(2, 6, 7)],
        ] {
            assert_eq!(check_block(7, &history), Ok(()), "{history:?}");
        }
    }

    #[test]
    fn what_it_may_not_is_found() {
        for history in [
            // A lost write, seen as blank and as an older value.
            vec![write(1, 1, 2), read(0, 3, 4)],
            vec![write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)],
            // A stale read between fresh ones.
            vec![write(1, 1, 2), write(2, 3, 10), read(2, 4, 5), read(1, 6, 7)],
            // A write without an answer that was there and went away.
            vec![write(1, 1, 2), write(2, 3, UNKNOWN), read(2, 4, 5), read(1, 6, 7)],
            // Two concurrent writes seen in both orders.
            vec![write(1, 1, 9), write(2, 2, 10), read(1, 11, 12), read(2, 13, 14), read(1, 15, 16)],
        ] {
            let found = check_block(7, &history);
            assert!(
                matches!(found, Err(Violation::Contradiction { block: 7, .. })),
                "{history:?}: {found:?}"
            );
        }
        let found = check_block(7, &[read(9, 1, 2)]);
        assert!(matches!(found, Err(Violation::Phantom { .. })), "{found:?}");
        let found = check_block(7, &[read(1, 1, 2), write(1, 3, 4)]);
        assert!(matches!(found, Err(Violation::FromTheFuture { .. })), "{found:?}");
    }

    #[test]
    fn blocks_are_told_apart() {
        let other = Event { block: 8, ..read(0, 3, 4) };
        assert!(check(vec![write(1, 1, 2), other]).is_ok());
        let (violation, events) = check(vec![other, read(0, 3, 4), write(1, 1, 2)]).unwrap_err();
        assert!(matches!(violation, Violation::Contradiction { block: 7, .. }), "{violation}");
        assert_eq!(events, [write(1, 1, 2), read(0, 3, 4)]);
    }

    /// The definition: tries every order that agrees with real time.
    fn linearizable(left: &[Event], value: Stamp) -> bool {
        let done = left.iter().all(|event| event.access == Access::Write && event.end == UNKNOWN);
        done || left.iter().enumerate().any(|(index, next)| {
            let first = left.iter().all(|other| next.start < other.end);
            let fits = next.access == Access::Write || next.stamp == value;
            let mut rest = left.to_vec();
            rest.remove(index);
            first && fits && linearizable(&rest, next.stamp)
        })
    }

    /// Up to seven operations on one block, with times all different.
    fn histories() -> impl Strategy<Value = Vec<Event>> {
        let op = (any::<u16>(), any::<u16>(), 0usize..8, 0u8..10);
        prop::collection::vec(op, 1..8).prop_map(|drafts| {
            let mut times: Vec<(u16, usize)> = Vec::new();
            for (index, (a, b, ..)) in drafts.iter().enumerate() {
                times.extend([(*a, 2 * index), (*b, 2 * index + 1)]);
            }
            times.sort();
            let tick = |slot: usize| times.iter().position(|(_, at)| *at == slot).unwrap() as u64 + 1;
            let count = drafts.len();
            let of = |(index, (_, _, value, kind)): (usize, &(u16, u16, usize, u8))| {
                let (a, b) = (tick(2 * index), tick(2 * index + 1));
                let (start, end) = (a.min(b), a.max(b));
                match kind {
                    0..5 => read((value % (count + 1)) as u64, start, end),
                    5 => write(index as u64 + 1, start, UNKNOWN),
                    _ => write(index as u64 + 1, start, end),
                }
            };
            drafts.iter().enumerate().map(of).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn zones_say_what_the_definition_says(history in histories()) {
            let found = check_block(7, &history);
            prop_assert_eq!(found.is_ok(), linearizable(&history, BLANK), "{:?}", found);
        }
    }
}
