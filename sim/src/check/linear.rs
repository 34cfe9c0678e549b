//! Is a block's history one that a single register could have had?
//!
//! A block that one client alone touches is judged in the order of submission, which the client promises to
//! keep. One that several touch is judged by an exhaustive search with memory (after Wing and Gong, and
//! Lowe) that keeps each client's own order; that order also keeps the search small.
//!
//! A change takes effect once, however often its client has to send it. The one exception: the nodes recognise
//! a change that is sent again by what their processes remember, so a change that was under way when all that
//! knew it had died (or that was outlived by thousands of others) may take effect again, until it is answered
//! (`Memory`). To the client itself this never shows: what it submits behind it waits.

use super::history::{Did, Memory, OpRecord, Place, Stamp, Value, show};
use std::collections::{BTreeMap, BTreeSet};

/// Points the exhaustive search may visit for one block before it gives up (and says so).
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
pub fn judge(place: Place, ops: &[OpRecord], memory: &Memory) -> Verdict {
    let clients: BTreeSet<usize> = ops.iter().map(|op| op.client).collect();
    let verdict = match clients.len() {
        0 | 1 => in_order(ops),
        _ => search(ops, &|op| memory.may_be_forgotten(op)),
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

/// How far a client's operations have taken effect: all before `first`, and of those from `first` on the ones
/// whose bit is set. Only reads are ever set: a write waits for what was submitted before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
struct LaneDone {
    first: usize,
    bits: u64,
}

impl LaneDone {
    fn has(self, at: usize) -> bool {
        at < self.first || (at - self.first < 64 && self.bits >> (at - self.first) & 1 == 1)
    }

    fn with(mut self, at: usize) -> Self {
        self.bits |= 1 << (at - self.first);
        while self.bits & 1 == 1 {
            self.bits >>= 1;
            self.first += 1;
        }
        self
    }
}

/// A point of the search: how many operations of each client have taken effect, what the block holds, and
/// which operations of unknown outcome were needed so far.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    done: Vec<LaneDone>,
    value: Value,
    /// Zeroings of unknown outcome that were needed; the earliest ones serve best.
    zeroed: usize,
    /// Writes of unknown outcome that were needed.
    used: Vec<Value>,
}

/// Which changes may take effect any number of times between submission and answer; all others do once.
pub type MayRepeat<'a> = &'a dyn Fn(&OpRecord) -> bool;

/// The operations as the search wants them.
struct Plan<'a> {
    may_repeat: MayRepeat<'a>,
    /// Per client, its operations of known outcome in order of submission.
    lanes: Vec<Vec<&'a OpRecord>>,
    /// Per client and operation, the earliest end from there on.
    ends: Vec<Vec<Stamp>>,
    /// Zeroings of unknown outcome, in order of submission.
    zeroings: Vec<&'a OpRecord>,
    /// Writes of unknown outcome.
    unknown: BTreeMap<Value, &'a OpRecord>,
}

impl<'a> Plan<'a> {
    fn new(ops: &'a [OpRecord], may_repeat: MayRepeat<'a>) -> Self {
        let mut by_client: BTreeMap<usize, Vec<&OpRecord>> = BTreeMap::new();
        let mut plan = Plan {
            may_repeat,
            lanes: Vec::new(),
            ends: Vec::new(),
            zeroings: Vec::new(),
            unknown: BTreeMap::new(),
        };
        for op in ops {
            match (op.end, op.did) {
                (Some(_), _) => by_client.entry(op.client).or_default().push(op),
                (None, Did::Write(0)) => plan.zeroings.push(op),
                (None, Did::Write(value)) => {
                    plan.unknown.insert(value, op);
                }
                (None, Did::Read(_)) => {}
            }
        }
        for lane in by_client.into_values() {
            let mut ends: Vec<Stamp> = lane.iter().map(|op| op.end.unwrap_or(Stamp::MAX)).collect();
            for at in (0..ends.len().saturating_sub(1)).rev() {
                ends[at] = ends[at].min(ends[at + 1]);
            }
            plan.lanes.push(lane);
            plan.ends.push(ends);
        }
        plan
    }

    /// What of a lane could come next as far as its own order goes: reads up to the next write, or that
    /// write. `horizon` sinks to the earliest end of what is left of the lane.
    fn candidates(&self, lane: usize, done: LaneDone, horizon: &mut Stamp, into: &mut Vec<(usize, usize)>) {
        let (Some(ops), Some(ends)) = (self.lanes.get(lane), self.ends.get(lane)) else { return };
        let mut reads_left = false;
        for (at, op) in ops.iter().enumerate().skip(done.first) {
            if op.start > *horizon {
                return;
            }
            if at - done.first >= 64 {
                *horizon = (*horizon).min(ends.get(at).copied().unwrap_or(Stamp::MAX));
                return;
            }
            if done.has(at) {
                continue;
            }
            if matches!(op.did, Did::Write(_)) {
                *horizon = (*horizon).min(ends.get(at).copied().unwrap_or(Stamp::MAX));
                if !reads_left {
                    into.push((lane, at));
                }
                return;
            }
            *horizon = (*horizon).min(op.end.unwrap_or(Stamp::MAX));
            reads_left = true;
            into.push((lane, at));
        }
    }

    /// Whether this operation may write the value once more, now and again later.
    fn repeats(&self, lane: usize, at: usize, value: Value, horizon: Stamp) -> bool {
        let op = self.lanes.get(lane).and_then(|ops| ops.get(at));
        op.is_some_and(|op| op.did == Did::Write(value) && op.start <= horizon && (self.may_repeat)(op))
    }

    /// What may take effect next after `point`; `None` when everything has.
    fn next(&self, point: &Point) -> Option<Vec<Point>> {
        // Whatever ended before another began comes before it.
        let mut horizon = Stamp::MAX;
        let mut candidates = Vec::new();
        for (lane, done) in point.done.iter().enumerate() {
            self.candidates(lane, *done, &mut horizon, &mut candidates);
        }
        if candidates.is_empty() {
            return None;
        }
        let mut after = Vec::new();
        let under_way = |value| candidates.iter().any(|(lane, at)| self.repeats(*lane, *at, value, horizon));
        for &(lane, at) in &candidates {
            let op = self.lanes.get(lane).and_then(|ops| ops.get(at)).filter(|op| op.start <= horizon);
            let Some(op) = op else { continue };
            let mut step = point.clone();
            if let Some(done) = step.done.get_mut(lane) {
                *done = done.with(at);
            }
            match op.did {
                Did::Write(value) => step.value = value,
                // A read of what is there changes nothing: it may as well come at once.
                Did::Read(value) if value == point.value => return Some(vec![step]),
                Did::Read(value) if under_way(value) => step.value = value,
                Did::Read(0) => {
                    let Some(by) = self.zeroings.get(point.zeroed).filter(|by| by.start <= horizon) else {
                        continue;
                    };
                    step.value = 0;
                    step.zeroed += usize::from(!(self.may_repeat)(by));
                }
                Did::Read(value) => {
                    let by = self.unknown.get(&value).filter(|by| by.start <= horizon);
                    let Some(by) = by.filter(|_| !point.used.contains(&value)) else { continue };
                    step.value = value;
                    if !(self.may_repeat)(by) {
                        step.used.push(value);
                        step.used.sort_unstable();
                    }
                }
            }
            after.push(step);
        }
        Some(after)
    }
}

/// Any values, several clients: search for an order, remembering the points that led nowhere. Each client's
/// operations keep their order of submission, except that reads are free among each other. One of unknown
/// outcome takes effect right before the first
/// read that needs it, for an effect that nobody reads is none.
pub fn search(ops: &[OpRecord], may_repeat: MayRepeat<'_>) -> Verdict {
    let plan = Plan::new(ops, may_repeat);
    let start =
        Point { done: vec![LaneDone::default(); plan.lanes.len()], value: 0, zeroed: 0, used: Vec::new() };
    let mut visited: BTreeSet<Point> = BTreeSet::new();
    let mut stack = vec![start];
    while let Some(point) = stack.pop() {
        let Some(after) = plan.next(&point) else { return Verdict::Legal };
        if !visited.insert(point) {
            continue;
        }
        if visited.len() > SEARCH_STATES_MAX {
            return Verdict::Undecided;
        }
        stack.extend(after);
    }
    Verdict::Illegal("no order of these operations explains what was read".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use simenv::rng::Stream;

    struct Zone {
        value: Value,
        /// Smallest end of the write and its reads.
        first_end: Stamp,
        /// Largest start among them.
        last_start: Stamp,
    }

    /// Unique values: every read names its write.
    fn zones(ops: &[OpRecord]) -> Verdict {
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
                ops.push(op(nth, did, a.min(b), (!unknown).then_some(a.max(b))));
            }
            ops.sort_by_key(|op| op.start);
            let fast = zones(&ops);
            let slow = search(&ops, &|_| false);
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
    fn a_change_that_may_be_forgotten_may_hide_what_others_wrote_until_it_is_answered_but_not_after() {
        let history = |end| {
            [
                op(0, Did::Write(1), 1, Some(end)),
                op(1, Did::Read(1), 2, Some(3)),
                op(1, Did::Write(2), 4, Some(5)),
                op(1, Did::Read(1), 8, Some(9)),
            ]
        };
        assert!(matches!(search(&history(7), &|_| false), Verdict::Illegal(_)));
        assert_eq!(search(&history(7), &|_| true), Verdict::Legal);
        let mut answered = history(3);
        answered[1].end = Some(2);
        assert!(matches!(search(&answered, &|_| true), Verdict::Illegal(_)));
    }

    #[test]
    fn zeroing_is_judged_by_search() {
        let ops = [
            op(0, Did::Write(1), 1, Some(2)),
            op(1, Did::Write(0), 3, Some(6)),
            op(0, Did::Read(1), 4, Some(5)),
            op(0, Did::Read(0), 7, Some(8)),
        ];
        assert_eq!(judge(Place { image: 0, block: 0 }, &ops, &Memory::default()), Verdict::Legal);
        let mut late = ops;
        late[3].did = Did::Read(1);
        assert!(matches!(
            judge(Place { image: 0, block: 0 }, &late, &Memory::default()),
            Verdict::Illegal(_)
        ));
    }
}
