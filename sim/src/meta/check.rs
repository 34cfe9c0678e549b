//! Strict serializability of a history of transactions, by replay.
//!
//! The store says in which order it did things: every transaction is answered with its revision, every read
//! with the revision it was made at. That order is not believed but checked: replayed on a model, it must
//! explain every read, every compare and every event of a watch, and an operation that began after another
//! had ended must come behind it. Since the order is given, replay decides; no search is needed.
//!
//! A transaction of unknown outcome counts as done where something it wrote was seen, at the revision that the
//! sighting names. One that nobody saw may have been done or not: what only it could explain is excused and
//! counted, key by key (`Judged::excused`). Keys bound to leases vanish without a transaction: `locks` looks at
//! those.

use super::client::LOCKS;
use super::history::{Call, History, Outcome, Stamp, Watch, writer};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use wire::Revision;
use wire::control::{Change, Compare, KeyValue, MetaRequest, Write};

/// What was found.
#[derive(Default, Debug)]
pub struct Judged {
    /// What was wrong.
    pub violations: Vec<String>,
    /// Transactions in the order.
    pub applied: usize,
    /// Of them, of unknown outcome to their client.
    pub found: usize,
    /// Of unknown outcome, and nobody saw anything of them.
    pub unseen: usize,
    /// Reads compared with the model.
    pub reads: usize,
    /// Compares that did not hold, explained.
    pub refused: usize,
    /// Events of watches compared with the model.
    pub events: usize,
    /// What only an unseen transaction could explain.
    pub excused: usize,
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} transactions applied ({} of unknown outcome, {} more unseen), {} reads, {} refused by compares, \
             {} watch events, {} excused",
            self.applied, self.found, self.unseen, self.reads, self.refused, self.events, self.excused
        )
    }
}

/// A durable key of the model.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Item<'a> {
    value: &'a str,
    at: Revision,
}

/// All states of all keys: per key, what it was from a revision on.
#[derive(Default)]
struct Model<'a> {
    keys: BTreeMap<&'a str, Vec<(Revision, Option<Item<'a>>)>>,
}

impl<'a> Model<'a> {
    fn at(&self, key: &str, revision: Revision) -> Option<&Item<'a>> {
        let states = self.keys.get(key)?;
        let end = states.partition_point(|(from, _)| *from <= revision);
        states.get(end.checked_sub(1)?)?.1.as_ref()
    }

    fn set(&mut self, key: &'a str, revision: Revision, item: Option<Item<'a>>) {
        self.keys.entry(key).or_default().push((revision, item));
    }

    fn apply(&mut self, revision: Revision, writes: &'a [Write]) {
        for write in writes {
            match write {
                Write::Put { key, value, .. } => {
                    self.set(key, revision, Some(Item { value, at: revision }));
                }
                Write::Delete { key } => self.set(key, revision, None),
                Write::DeletePrefix { prefix } => {
                    let keys: Vec<&str> =
                        self.keys.keys().copied().filter(|key| key.starts_with(prefix.as_str())).collect();
                    keys.into_iter().for_each(|key| self.set(key, revision, None));
                }
            }
        }
    }

    fn holds(&self, compare: &Compare, revision: Revision) -> bool {
        match compare {
            Compare::ModRevision { key, revision: wanted } => {
                self.at(key, revision).map_or(Revision(0), |item| item.at) == *wanted
            }
            Compare::Exists { key } => self.at(key, revision).is_some(),
            Compare::Bound { .. } => false,
        }
    }

    /// Revisions within a span, both included, at which one of these keys changed; and the span's start.
    fn moments(&self, compares: &[Compare], from: Revision, to: Revision) -> BTreeSet<Revision> {
        let mut moments = BTreeSet::from([from]);
        for states in compares.iter().filter_map(|compare| self.keys.get(key_of(compare))) {
            let start = states.partition_point(|(at, _)| *at < from);
            moments.extend(states.iter().skip(start).map(|(at, _)| *at).take_while(|at| *at <= to));
        }
        moments
    }
}

fn key_of(compare: &Compare) -> &str {
    match compare {
        Compare::ModRevision { key, .. } | Compare::Exists { key } | Compare::Bound { key, .. } => key,
    }
}

fn is_lock(key: &str) -> bool {
    key.starts_with(LOCKS)
}

fn parts(call: &Call) -> (&[Compare], &[Write]) {
    match &call.request {
        MetaRequest::Txn { compares, writes } => (compares, writes),
        _ => (&[], &[]),
    }
}

struct Judge<'a> {
    history: &'a History,
    judged: Judged,
    /// Who was applied when.
    order: BTreeMap<Revision, usize>,
    placed: BTreeMap<usize, Revision>,
    model: Model<'a>,
    /// Keys that an unseen transaction may have changed, from when on.
    fuzzy: BTreeMap<&'a str, Stamp>,
    /// Prefixes under which one may have deleted everything.
    fuzzy_below: Vec<(&'a str, Stamp)>,
}

/// Judges a history.
pub fn judge(history: &History) -> Judged {
    let mut judge = Judge {
        history,
        judged: Judged::default(),
        order: BTreeMap::new(),
        placed: BTreeMap::new(),
        model: Model::default(),
        fuzzy: BTreeMap::new(),
        fuzzy_below: Vec::new(),
    };
    judge.find_order();
    judge.replay();
    judge.real_time_and_refusals();
    judge.reads();
    for watch in history.watches() {
        judge.watch(watch);
    }
    judge.judged
}

impl<'a> Judge<'a> {
    fn wrong(&mut self, text: String) {
        if self.judged.violations.len() < 5 {
            self.judged.violations.push(text.chars().take(600).collect());
        }
    }

    /// What cannot be, unless an unseen transaction of before `end` has touched the key.
    fn wrong_about(&mut self, key: &str, end: Stamp, text: String) {
        let below = self.fuzzy_below.iter().any(|(prefix, from)| key.starts_with(prefix) && *from < end);
        match self.fuzzy.get(key).is_some_and(|from| *from < end) || below {
            true => self.judged.excused += 1,
            false => self.wrong(text),
        }
    }

    fn place(&mut self, call: usize, revision: Revision, how: &str) {
        if let Some(other) = self.placed.get(&call).filter(|other| **other != revision) {
            let text = format!(
                "one transaction is revision {other} and revision {revision} ({how}): {:?}",
                self.history.calls.get(call)
            );
            return self.wrong(text);
        }
        if let Some(other) = self.order.get(&revision).filter(|other| **other != call) {
            let text = format!(
                "revision {revision} is two transactions ({how}): {:?} and {:?}",
                self.history.calls.get(call),
                self.history.calls.get(*other)
            );
            return self.wrong(text);
        }
        self.order.insert(revision, call);
        self.placed.insert(call, revision);
    }

    fn sighted(&mut self, item: &KeyValue, how: &str) {
        let Some(call) = writer(&item.value).filter(|call| *call < self.history.calls.len()) else {
            return self.wrong(format!("{} holds what nobody wrote: {}", item.key, item.value));
        };
        let Some(known) = self.history.calls.get(call) else { return };
        match &known.outcome {
            Outcome::CompareFailed(_) | Outcome::NotDone(_) => {
                let text = format!(
                    "done at {} ({how}) although its client was told otherwise: {known:?}",
                    item.mod_revision
                );
                self.wrong(text);
            }
            _ => {
                let writes = parts(known).1;
                let is_its = |write: &Write| matches!(write, Write::Put { key, value, .. } if *key == item.key && *value == item.value);
                if !writes.iter().any(is_its) {
                    return self.wrong(format!("{} holds what was written elsewhere: {known:?}", item.key));
                }
                self.place(call, item.mod_revision, how);
            }
        }
    }

    /// Whose turn was when: what clients were told, and what was seen.
    fn find_order(&mut self) {
        let history = self.history;
        for (at, call) in history.calls.iter().enumerate() {
            if let Outcome::Applied(revision) = call.outcome {
                self.place(at, revision, "as answered");
            }
        }
        let told = self.placed.len();
        for call in &history.calls {
            if let Outcome::Read(_, items) = &call.outcome {
                items.iter().for_each(|item| self.sighted(item, "as read"));
            }
        }
        for watch in history.watches() {
            for change in watch.events.iter().flat_map(|(_, changes)| changes) {
                if let Change::Put(item) = change {
                    self.sighted(item, "as watched");
                }
            }
        }
        self.judged.applied = self.placed.len();
        self.judged.found = self.placed.len() - told;
        for (at, call) in history.calls.iter().enumerate() {
            let is_unseen = call.outcome == Outcome::Unknown && !self.placed.contains_key(&at);
            let writes = parts(call).1;
            if !is_unseen || writes.is_empty() {
                continue;
            }
            self.judged.unseen += 1;
            for write in writes {
                match write {
                    Write::Put { key, .. } | Write::Delete { key } => {
                        let from = self.fuzzy.entry(key).or_insert(call.start);
                        *from = (*from).min(call.start);
                    }
                    Write::DeletePrefix { prefix } => self.fuzzy_below.push((prefix, call.start)),
                }
            }
        }
    }

    /// Builds the model, and checks each transaction's compares against what was before it.
    fn replay(&mut self) {
        let history = self.history;
        for (revision, at) in self.order.clone() {
            let Some(call) = history.calls.get(at) else { continue };
            let (compares, writes) = parts(call);
            let before = Revision(revision.0.saturating_sub(1));
            for compare in compares.iter().filter(|compare| !is_lock(key_of(compare))) {
                if !self.model.holds(compare, before) {
                    let text = format!(
                        "{compare:?} held at {revision}, but the key was {:?}: {call:?}",
                        self.model.at(key_of(compare), before)
                    );
                    self.wrong_about(key_of(compare), call.end.unwrap_or(Stamp::MAX), text);
                }
            }
            self.model.apply(revision, writes);
        }
    }

    /// Whatever began after another had ended comes behind it; and a compare that failed must have failed at
    /// some moment between what came before and what came after.
    fn real_time_and_refusals(&mut self) {
        let history = self.history;
        let position = |at: usize, call: &Call| match call.outcome {
            Outcome::Read(revision, _) => Some((revision, false)),
            _ => self.placed.get(&at).map(|revision| (*revision, true)),
        };
        let positions: Vec<_> =
            history.calls.iter().enumerate().map(|(at, call)| position(at, call)).collect();
        // All starts and ends in the order in which they were.
        let mut moments: Vec<(Stamp, usize, bool)> = Vec::new();
        for (at, call) in history.calls.iter().enumerate() {
            moments.push((call.start, at, true));
            moments.extend(call.end.map(|end| (end, at, false)));
        }
        moments.sort_unstable();
        let mut floors = vec![Revision(0); history.calls.len()];
        let mut floor = Revision(0);
        for (_, at, is_start) in &moments {
            match (is_start, positions.get(*at).copied().flatten()) {
                (true, _) => floors[*at] = floor,
                // Of unknown outcome: it may have been done after its client gave up.
                (false, Some((revision, _))) if history.calls[*at].outcome != Outcome::Unknown => {
                    floor = floor.max(revision);
                }
                _ => {}
            }
        }
        let mut ceilings = vec![Revision(u64::MAX); history.calls.len()];
        let mut ceiling = Revision(u64::MAX);
        for (_, at, is_start) in moments.iter().rev() {
            match (is_start, positions.get(*at).copied().flatten()) {
                (false, _) => ceilings[*at] = ceiling,
                (true, Some((revision, is_write))) => {
                    ceiling = ceiling.min(Revision(revision.0 - u64::from(is_write)));
                }
                _ => {}
            }
        }
        for (at, call) in history.calls.iter().enumerate() {
            let (floor, ceiling) = (floors[at], ceilings[at]);
            if let Some((revision, is_write)) = positions[at]
                && (revision < floor || is_write && revision == floor)
            {
                self.wrong(format!("{revision} began after {floor} had been seen: {call:?}"));
            }
            if let Outcome::CompareFailed(index) = call.outcome {
                self.refusal(call, index as usize, floor, ceiling);
            }
        }
    }

    fn refusal(&mut self, call: &Call, index: usize, floor: Revision, ceiling: Revision) {
        let compares = parts(call).0;
        if compares.iter().any(|compare| is_lock(key_of(compare))) {
            return;
        }
        self.judged.refused += 1;
        let explains = |at: &Revision| {
            compares.iter().take(index).all(|compare| self.model.holds(compare, *at))
                && compares.get(index).is_some_and(|compare| !self.model.holds(compare, *at))
        };
        let explained = self.model.moments(compares, floor, ceiling).iter().any(explains);
        if !explained {
            let text =
                format!("compare {index} failed, at no moment from {floor} to {ceiling} would it: {call:?}");
            let end = call.end.unwrap_or(Stamp::MAX);
            match compares.iter().map(key_of).find(|key| self.fuzzy.contains_key(key)) {
                Some(key) => self.wrong_about(key, end, text),
                None => self.wrong(text),
            }
        }
    }

    /// Every read shows exactly what the model holds.
    fn reads(&mut self) {
        let history = self.history;
        for call in &history.calls {
            let (Outcome::Read(revision, items), MetaRequest::Range { prefix, .. }) =
                (&call.outcome, &call.request)
            else {
                continue;
            };
            self.judged.reads += 1;
            let mut shown: BTreeMap<&str, &KeyValue> =
                items.iter().map(|item| (item.key.as_str(), item)).collect();
            let keys: Vec<&str> = self
                .model
                .keys
                .range(prefix.as_str()..)
                .map(|(key, _)| *key)
                .take_while(|key| key.starts_with(prefix.as_str()) && !is_lock(key))
                .collect();
            let end = call.end.unwrap_or(Stamp::MAX);
            for key in keys {
                let shown = shown.remove(key).map(|item| (item.value.as_str(), item.mod_revision));
                let held = self.model.at(key, *revision).map(|item| (item.value, item.at));
                if shown != held {
                    let text = format!(
                        "client {} read {key} at {revision} as {shown:.80?}, it was {held:.80?} (call of {})",
                        call.client,
                        simenv::trace::stamp(call.at)
                    );
                    self.wrong_about(key, end, text);
                }
            }
            if let Some(key) = shown.keys().find(|key| !is_lock(key)) {
                self.wrong(format!("client {} read {key} at {revision}, which nobody wrote", call.client));
            }
        }
    }

    /// Whoever applies a watch's events has, after each, exactly the keys of that revision.
    fn watch(&mut self, watch: &Watch) {
        let mut mirror: BTreeMap<&str, (&str, Revision)> = BTreeMap::new();
        let mut seen = Revision(0);
        let name = format!("the watch of client {}", watch.client);
        for (nth, (revision, changes)) in watch.events.iter().enumerate() {
            if *revision <= seen && nth > 0 {
                return self.wrong(format!("{name}: revision {revision} came after {seen}"));
            }
            let mut touched: BTreeSet<&str> = BTreeSet::new();
            for change in changes {
                match change {
                    Change::Put(item) if is_lock(&item.key) => {}
                    Change::Delete { key } if is_lock(key) => {}
                    Change::Put(item) => {
                        let now = (item.value.as_str(), item.mod_revision);
                        if mirror.insert(&item.key, now).is_some_and(|before| before.1 >= now.1) {
                            self.wrong(format!("{name}: {} at {} came again", item.key, item.mod_revision));
                        }
                        touched.insert(&item.key);
                    }
                    Change::Delete { key } => {
                        if mirror.remove(key.as_str()).is_none() {
                            self.wrong(format!("{name}: {key} was deleted twice"));
                        }
                        touched.insert(key);
                    }
                }
            }
            let between: Vec<usize> =
                self.order.range(Revision(seen.0 + 1)..=*revision).map(|(_, call)| *call).collect();
            let history = self.history;
            for writes in between.into_iter().filter_map(|at| history.calls.get(at)).map(|call| parts(call).1)
            {
                for write in writes {
                    match write {
                        Write::Put { key, .. } | Write::Delete { key } => {
                            touched.insert(key);
                        }
                        Write::DeletePrefix { prefix } => {
                            touched.extend(
                                self.model
                                    .keys
                                    .keys()
                                    .copied()
                                    .filter(|key| key.starts_with(prefix.as_str())),
                            );
                        }
                    }
                }
            }
            for key in touched.into_iter().filter(|key| !is_lock(key)) {
                let shown = mirror.get(key).copied();
                let held = self.model.at(key, *revision).map(|item| (item.value, item.at));
                if shown != held {
                    let text = format!(
                        "{name}: after revision {revision} {key} is {shown:.80?}, it should be {held:.80?}"
                    );
                    self.wrong_about(key, Stamp::MAX, text);
                }
            }
            self.judged.events += 1;
            seen = (*revision).max(seen);
        }
    }
}
