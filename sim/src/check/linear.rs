//! Is a block's history one that a single register could have had?
//!
//! Three ways, by what the history allows. A block that one client alone touches is judged in the order of
//! submission, which the client promises to keep. One that several touch, with unique values, is judged by
//! the zones of Gibbons and Korach ("Testing shared memories", 1997), in n log n. With zeroing among the
//! writes, values are no longer unique, and an exhaustive search with memory (Wing and Gong, Lowe) decides.

use super::history::{Did, OpRecord, Place, Stamp, Value, show};
use std::collections::{BTreeMap, BTreeSet};

/// States the exhaustive search may visit for one block before it gives up (and says so).
const SEARCH_STATES_MAX: usize = 200_000;

/// The verdict about a block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// A register could have done this.
    Legal,
    /// None could; why, for a person.
    Illegal(String),
    /// The search was too large.
    Undecided,
}

/// Judges one block's operations, given in order of submission.
pub fn judge(place: Place, ops: &[OpRecord]) -> Verdict {
    let clients: BTreeSet<usize> = ops.iter().map(|op| op.client).collect();
    let zeroed = ops.iter().any(|op| op.did == Did::Write(0));
    let verdict = if clients.len() <= 1 {
        in_order(ops)
    } else if zeroed {
        search(ops)
    } else {
        zones(ops)
    };
    match verdict {
        Verdict::Illegal(why) => Verdict::Illegal(format!("{place}: {why}\n{}", show(ops))),
        other => other,
    }
}

/// One client's operations take effect in the order of submission; those of unknown outcome at any time
/// after it, or never.
pub fn in_order(ops: &[OpRecord]) -> Verdict {
    let mut now: Value = 0;
    let mut maybe: Vec<Value> = Vec::new();
    for op in ops {
        match op.did {
            Did::Write(value) if op.end.is_some() => now = value,
            Did::Write(value) => maybe.push(value),
            Did::Read(value) if value == now => {}
            Did::Read(value) => match maybe.iter().position(|other| *other == value) {
                Some(at) => {
                    maybe.swap_remove(at);
                    now = value;
                }
                None => {
                    return Verdict::Illegal(format!(
                        "read {value} where {now} was written before (or one of {maybe:?})"
                    ));
                }
            },
        }
    }
    Verdict::Legal
}

struct Zone {
    value: Value,
    /// Smallest end of the write and its reads.
    first_end: Stamp,
    /// Largest start among them.
    last_start: Stamp,
}

/// Unique values: every read names its write.
pub fn zones(ops: &[OpRecord]) -> Verdict {
    let mut zones: BTreeMap<Value, Zone> = BTreeMap::new();
    zones.insert(0, Zone { value: 0, first_end: 0, last_start: 0 });
    let mut starts: BTreeMap<Value, Stamp> = BTreeMap::from([(0, 0)]);
    for op in ops {
        if let Did::Write(value) = op.did {
            starts.insert(value, op.start);
            let first_end = op.end.unwrap_or(Stamp::MAX);
            zones.insert(value, Zone { value, first_end, last_start: op.start });
        }
    }
    for op in ops {
        let (Did::Read(value), Some(end)) = (op.did, op.end) else { continue };
        let Some(start) = starts.get(&value) else {
            return Verdict::Illegal(format!("read {value}, which nobody wrote here"));
        };
        if *start > end {
            return Verdict::Illegal(format!("read {value} before it was written"));
        }
        if let Some(zone) = zones.get_mut(&value) {
            zone.first_end = zone.first_end.min(end);
            zone.last_start = zone.last_start.max(op.start);
        }
    }
    let (mut forward, backward): (Vec<&Zone>, Vec<&Zone>) =
        zones.values().partition(|zone| zone.first_end < zone.last_start);
    forward.sort_by_key(|zone| zone.first_end);
    for pair in forward.windows(2) {
        if let [a, b] = pair
            && b.first_end < a.last_start
        {
            return Verdict::Illegal(format!(
                "values {} and {} each appear on both sides of the other",
                a.value, b.value
            ));
        }
    }
    for zone in backward {
        let at = forward.partition_point(|other| other.first_end < zone.last_start);
        let around = at.checked_sub(1).and_then(|at| forward.get(at));
        if let Some(other) = around
            && zone.first_end < other.last_start
        {
            return Verdict::Illegal(format!(
                "value {} lies wholly between two appearances of {}",
                zone.value, other.value
            ));
        }
    }
    Verdict::Legal
}

/// Any values: search for an order, remembering the states that led nowhere.
pub fn search(ops: &[OpRecord]) -> Verdict {
    // A write of unknown outcome whose value nobody saw constrains nothing.
    let seen: BTreeSet<Value> =
        ops.iter().filter_map(|op| if let Did::Read(value) = op.did { Some(value) } else { None }).collect();
    let ops: Vec<&OpRecord> = ops
        .iter()
        .filter(|op| op.end.is_some() || matches!(op.did, Did::Write(value) if seen.contains(&value)))
        .collect();
    let mut visited: BTreeSet<(Vec<u64>, Value)> = BTreeSet::new();
    let mut stack: Vec<(Vec<u64>, Value)> = vec![(vec![0; ops.len().div_ceil(64)], 0)];
    while let Some((done, value)) = stack.pop() {
        if !visited.insert((done.clone(), value)) {
            continue;
        }
        if visited.len() > SEARCH_STATES_MAX {
            return Verdict::Undecided;
        }
        let is_done = |at: usize| done.get(at / 64).is_some_and(|word| word >> (at % 64) & 1 == 1);
        let open: Vec<usize> = (0..ops.len()).filter(|&at| !is_done(at)).collect();
        let mut left = open.iter().filter_map(|&at| ops.get(at));
        if left.all(|op| op.end.is_none()) {
            return Verdict::Legal;
        }
        let horizon = open.iter().filter_map(|&at| ops.get(at)?.end).min().unwrap_or(Stamp::MAX);
        for at in open {
            let Some(op) = ops.get(at) else { continue };
            if op.start > horizon {
                break;
            }
            let after = match op.did {
                Did::Write(written) => written,
                Did::Read(seen) if seen == value => value,
                Did::Read(_) => continue,
            };
            let mut next = done.clone();
            if let Some(word) = next.get_mut(at / 64) {
                *word |= 1 << (at % 64);
            }
            stack.push((next, after));
        }
    }
    Verdict::Illegal("no order of these operations explains what was read".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use simenv::rng::Stream;

    fn op(client: usize, did: Did, start: Stamp, end: Option<Stamp>) -> OpRecord {
        OpRecord { client, did, start, end, at: 0 }
    }

    #[test]
    fn one_client_reads_what_it_wrote_last() {
        let legal = [op(0, Did::Write(1), 1, Some(2)), op(0, Did::Read(1), 3, Some(4))];
        assert_eq!(in_order(&legal), Verdict::Legal);
        let stale = [legal[0], op(0, Did::Write(2), 3, Some(4)), op(0, Did::Read(1), 5, Some(6))];
        assert!(matches!(in_order(&stale), Verdict::Illegal(_)));
        let order = [op(0, Did::Write(1), 1, Some(9)), op(0, Did::Read(0), 2, Some(8))];
        assert!(matches!(in_order(&order), Verdict::Illegal(_)), "submitted later, so it comes later");
    }

    #[test]
    fn an_unknown_write_may_appear_late_but_once() {
        let write = op(0, Did::Write(1), 1, None);
        let second = op(0, Did::Write(2), 2, Some(3));
        let read = |value, at| op(0, Did::Read(value), at, Some(at + 1));
        assert_eq!(in_order(&[write, second, read(2, 4), read(1, 6)]), Verdict::Legal);
        assert!(matches!(in_order(&[write, second, read(1, 4), read(2, 6)]), Verdict::Illegal(_)));
        assert_eq!(zones(&[write, second, read(2, 4), read(1, 6)]), Verdict::Legal);
        assert!(matches!(zones(&[write, second, read(1, 4), read(2, 6), read(1, 8)]), Verdict::Illegal(_)));
    }

    /// Small random histories, legal and not: the fast algorithm must agree with the exhaustive one.
    #[test]
    fn zones_agree_with_exhaustive_search() {
        let mut rng = Stream::new(3, "histories");
        let (mut legal, mut illegal) = (0, 0);
        for _ in 0..20_000 {
            let count = rng.between(2, 7);
            let mut stamps: Vec<Stamp> = (1..=2 * count).collect();
            rng.shuffle(&mut stamps);
            let mut ops = Vec::new();
            let mut written = vec![0];
            for nth in 0..count as usize {
                let (a, b) = (stamps[2 * nth], stamps[2 * nth + 1]);
                let did = if rng.coin() {
                    written.push(nth as u64 + 1);
                    Did::Write(nth as u64 + 1)
                } else {
                    Did::Read(*rng.pick(&written).unwrap())
                };
                let unknown = matches!(did, Did::Write(_)) && rng.chance(150_000);
                ops.push(op(nth % 2, did, a.min(b), (!unknown).then_some(a.max(b))));
            }
            ops.sort_by_key(|op| op.start);
            let fast = zones(&ops);
            let slow = search(&ops);
            assert_eq!(
                matches!(fast, Verdict::Legal),
                matches!(slow, Verdict::Legal),
                "{fast:?} {slow:?}\n{}",
                show(&ops)
            );
            match fast {
                Verdict::Legal => legal += 1,
                _ => illegal += 1,
            }
        }
        assert!(legal > 2000 && illegal > 2000, "{legal} legal, {illegal} illegal");
    }

    #[test]
    fn zeroing_is_judged_by_search() {
        let ops = [
            op(0, Did::Write(1), 1, Some(2)),
            op(1, Did::Write(0), 3, Some(6)),
            op(0, Did::Read(1), 4, Some(5)),
            op(0, Did::Read(0), 7, Some(8)),
        ];
        assert_eq!(judge(Place { image: 0, block: 0 }, &ops), Verdict::Legal);
        let mut late = ops;
        late[3].did = Did::Read(1);
        assert!(matches!(judge(Place { image: 0, block: 0 }, &late), Verdict::Illegal(_)));
    }
}
