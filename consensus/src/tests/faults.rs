//! Random work under random faults, checked for linearizability.
//!
//! The store hands out its order itself: every write is answered with its revision, every read with the
//! store's revision. So a history is linearizable when that order explains every answer and does not
//! contradict real time: an operation that began after another had ended comes behind it.

use crate::Standing;
use crate::planted::Planted;
use crate::testing::{Options, World};
use std::collections::BTreeMap;
use wire::control::{Change, Compare, MetaReply, MetaRequest, Write};
use wire::{Revision, Status};

const KEYS: u64 = 4;

#[derive(Clone, Debug)]
enum What {
    Write { key: String, value: String, expected: Option<Revision> },
    Read { key: String },
}

#[derive(Clone, Debug)]
struct Operation {
    what: What,
    began: u64,
    ticket: u64,
    /// The node it was given to, and the count of its starts: a crash there leaves it without an answer.
    node: usize,
    life: u32,
}

/// Everything that a run has shown.
struct History {
    operations: Vec<Operation>,
    /// Per revision, what the watchers were told: key and value.
    told: BTreeMap<Revision, (String, Option<String>)>,
}

fn pick(w: &mut World) -> Option<usize> {
    let up: Vec<usize> = (0..w.slots.len()).filter(|n| w.slots[*n].node.is_some()).collect();
    let at = w.random.below(up.len() as u64) as usize;
    up.get(at).copied()
}

fn begin(w: &mut World, seen: &[Revision], number: u64) -> Option<Operation> {
    let node = pick(w)?;
    let k = w.random.below(KEYS);
    let key = format!("/r/{k}");
    let began = w.now;
    let life = w.slots[node].life();
    if w.random.chance(400) {
        let request = MetaRequest::Range { prefix: key.clone(), limit: 10 };
        return Some(Operation {
            what: What::Read { key },
            began,
            ticket: w.submit(node, request),
            node,
            life,
        });
    }
    // Some values are long, so that logs wrap, are compacted, and batches have many blocks.
    let long = if w.random.chance(300) { w.random.below(40_000) as usize } else { 0 };
    let value = format!("\"{number}{}\"", "-".repeat(long));
    let expected = w.random.chance(500).then(|| seen[k as usize]);
    let compares = expected.iter().map(|r| Compare::ModRevision { key: key.clone(), revision: *r }).collect();
    let writes = vec![Write::Put { key: key.clone(), value: value.clone(), lease: None }];
    let ticket = w.submit(node, MetaRequest::Txn { compares, writes });
    Some(Operation { what: What::Write { key, value, expected }, began, ticket, node, life })
}

/// Asks for a change of the voters, sensible or not.
fn change_voters(w: &mut World) {
    let nodes = w.slots.len() as u64;
    let mut draw = || w.random.below(nodes) as usize;
    let (asker, a, b, c) = (draw(), draw(), draw(), draw());
    let request = match w.random.below(10) {
        0..=4 => World::change_request(&[a], &[b]),
        5 | 6 => World::change_request(&[a, b], &[]),
        7 | 8 => World::change_request(&[], &[a, c]),
        _ => MetaRequest::CancelVoters,
    };
    if w.slots[asker].node.is_some() {
        w.submit(asker, request);
    }
}

fn disturb(w: &mut World) {
    if w.options.spares > 0 && w.random.chance(400) {
        return change_voters(w);
    }
    let voters = w.slots.len();
    let node = w.random.below(voters as u64) as usize;
    let other = w.random.below(voters as u64) as usize;
    match w.random.below(9) {
        0 | 1 if w.slots[node].node.is_some() => w.crash(node),
        2..=4 => (0..voters).for_each(|n| {
            if w.slots[n].node.is_none() {
                w.start(n);
            }
        }),
        5 => w.isolate(node),
        6 => w.link(node, other, false),
        7 => {
            let paused = w.random.chance(500);
            w.pause(node, paused);
        }
        _ => w.heal(),
    }
}

fn note(w: &World, told: &mut BTreeMap<Revision, (String, Option<String>)>) -> Result<(), String> {
    for slot in &w.slots {
        for (_, revision, changes) in &slot.watch.log {
            let [Change::Put(item)] = changes.as_slice() else { continue };
            if item.mod_revision != *revision || !item.key.starts_with("/r/") {
                continue;
            }
            let now = (item.key.clone(), Some(item.value.clone()));
            let before = told.entry(*revision).or_insert_with(|| now.clone());
            if *before != now {
                return Err(format!("revision {revision} is two different things"));
            }
        }
    }
    Ok(())
}

/// Runs a group under faults; `Err` says what was wrong.
pub fn run(seed: u64, voters: u64, spares: u64, planted: Planted) -> Result<u64, String> {
    let mut setup = crate::testing::Random(seed ^ 0x5eed);
    let options = Options {
        voters,
        spares,
        region: 4 << 20,
        loss: setup.below(4) * 15,
        doubled: setup.below(3) * 30,
        delay_us: [200, 2_000, 30_000][setup.below(3) as usize],
        disk_us: [100, 3_000, 30_000][setup.below(3) as usize],
        planted,
    };
    let mut w = World::new(seed, options);
    let mut history = History { operations: Vec::new(), told: BTreeMap::new() };
    let mut seen = vec![Revision(0); KEYS as usize];
    for number in 0..250 {
        let burst = 1 + w.random.below(3);
        for part in 0..burst {
            let operation = begin(&mut w, &seen, number * 10 + part);
            history.operations.extend(operation);
        }
        let wait = w.random.below(60);
        w.run_ms(wait);
        for (k, revision) in seen.iter_mut().enumerate() {
            if let Some(node) = pick(&mut w) {
                let item = w.node(node).kv().get(&format!("/r/{k}"));
                *revision = item.map_or(*revision, |item| item.mod_revision.max(*revision));
            }
        }
        if w.random.chance(100) {
            note(&w, &mut history.told)?;
            disturb(&mut w);
        }
    }
    note(&w, &mut history.told)?;
    w.heal();
    for node in 0..w.slots.len() {
        w.pause(node, false);
        if w.slots[node].node.is_none() {
            w.start(node);
        }
    }
    if !w.failures().is_empty() {
        return Err(format!("stopped: {:?}", w.failures()));
    }
    w.run_ms(8_000);
    w.converge();
    note(&w, &mut history.told)?;
    let mut last = BTreeMap::new();
    let voters: Vec<usize> =
        (0..w.slots.len()).filter(|node| w.node(*node).standing() == Standing::Voter).collect();
    for node in voters {
        for item in w.range(node, "/r/") {
            last.insert(item.key.clone(), item.mod_revision);
            history.told.entry(item.mod_revision).or_insert((item.key, Some(item.value)));
        }
    }
    check(&w, &history, &last)?;
    Ok(w.trace)
}

fn check(w: &World, history: &History, last: &BTreeMap<String, Revision>) -> Result<(), String> {
    // A value is unique: whatever was applied twice has two revisions.
    let mut revision_of: BTreeMap<&str, Revision> = BTreeMap::new();
    for (revision, (_, value)) in &history.told {
        let Some(value) = value else { continue };
        if let Some(other) = revision_of.insert(value, *revision) {
            return Err(format!("one write is revision {other} and {revision}"));
        }
    }
    // (end, begin, position): positions may not contradict real time.
    let mut spans: Vec<(u64, u64, u64, bool)> = Vec::new();
    for operation in &history.operations {
        let Some((ended, reply)) = w.replies.get(&operation.ticket) else {
            if w.slots[operation.node].life() == operation.life {
                return Err(format!("no answer to {operation:?}"));
            }
            continue;
        };
        match (&operation.what, reply) {
            (What::Write { key, value, expected }, MetaReply::Applied { revision }) => {
                match history.told.get(revision) {
                    Some((k, Some(v))) if k == key && v == value => {}
                    // A watcher may see only the snapshot behind it; then a later write must be there.
                    None if last.get(key).is_some_and(|last| last > revision) => {}
                    other => return Err(format!("{revision} was acknowledged for {key}, it is {other:?}")),
                }
                let mut earlier = history.told.range(..revision).rev().filter(|(_, (k, _))| k == key);
                if let (Some(expected), Some((before, _))) = (expected, earlier.next())
                    && before > expected
                {
                    return Err(format!("a compare with {expected} held although {before} was written"));
                }
                if last.get(key).is_none_or(|last| last < revision) {
                    return Err(format!("acknowledged revision {revision} of {key} is lost"));
                }
                spans.push((*ended, operation.began, revision.0, true));
            }
            (What::Write { key, expected, .. }, MetaReply::CompareFailed { .. }) => {
                let expected = expected.unwrap_or_default();
                let other = history.told.iter().any(|(r, (k, _))| k == key && *r > expected);
                if !other {
                    return Err(format!("a compare with {expected} of {key} failed without a reason"));
                }
            }
            (What::Read { key }, MetaReply::Range { revision, items, .. }) => {
                for item in items.iter().filter(|item| item.key == *key) {
                    let known = history.told.get(&item.mod_revision);
                    if known.is_some_and(|(k, v)| k != key || v.as_ref() != Some(&item.value)) {
                        return Err(format!("{key} was read as {} at {}", item.value, item.mod_revision));
                    }
                    let mut between = history.told.range(item.mod_revision..=*revision).skip(1);
                    if between.any(|(_, (k, _))| k == key) {
                        return Err(format!("{key} was read at {revision} with an older value"));
                    }
                }
                spans.push((*ended, operation.began, revision.0, false));
            }
            (_, MetaReply::Failed { status }) => {
                let status = Status::from_u8(*status);
                if !matches!(status, Status::Unknown | Status::NotActive | Status::Busy) {
                    return Err(format!("{operation:?} failed with {status}"));
                }
                if let What::Write { value, .. } = &operation.what
                    && status == Status::NotActive
                    && revision_of.contains_key(value.as_str())
                {
                    return Err(format!("{value:.20} was said not to be done, and was"));
                }
            }
            other => return Err(format!("strange answer: {other:?}")),
        }
    }
    spans.sort_unstable();
    for (i, (ended, _, position, _)) in spans.iter().enumerate() {
        for (_, began, later, write) in spans.iter().skip(i + 1) {
            if began > ended && (later < position || (*write && later == position)) {
                return Err(format!("position {later} began after position {position} had ended"));
            }
        }
    }
    Ok(())
}

#[test]
fn histories_under_faults_are_linearizable() {
    // `CONSENSUS_SEEDS=from-to` looks further.
    let wanted = std::env::var("CONSENSUS_SEEDS").unwrap_or_default();
    let range = wanted.split_once('-').and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    for seed in range.unwrap_or(0..40) {
        run(seed, 3, 0, Planted::none()).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn histories_of_one_and_five_voters_are_linearizable() {
    for seed in 0..10 {
        run(seed, 1, 0, Planted::none()).unwrap_or_else(|error| panic!("seed {seed}, 1 voter: {error}"));
        run(seed, 5, 0, Planted::none()).unwrap_or_else(|error| panic!("seed {seed}, 5 voters: {error}"));
    }
}

#[test]
fn histories_with_changing_voters_are_linearizable() {
    for seed in 0..60 {
        let (voters, spares) = [(3, 1), (3, 2), (1, 3), (5, 2)][seed as usize % 4];
        run(seed, voters, spares, Planted::none())
            .unwrap_or_else(|error| panic!("seed {seed}, {voters} voters, {spares} more: {error}"));
    }
}

#[test]
fn a_seed_repeats_under_faults() {
    assert_eq!(run(99, 3, 2, Planted::none()), run(99, 3, 2, Planted::none()));
    for seed in 100..104 {
        assert_eq!(run(seed, 3, 0, Planted::none()), run(seed, 3, 0, Planted::none()), "seed {seed}");
    }
}
