//! A client process of the metadata store's workload.

use super::Mix;
use super::history::Hold;
use crate::cluster::{CONTROL_PORT, node_ip};
use crate::options::Options;
use crate::workload::{Desk, Mode};
use client::{AdminDone, AdminError, AdminTicket, ClientCore};
use reactor::{Env, Event, Mono, Service, Token};
use simenv::rng::Stream;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use wire::control::{Change, Compare, MetaReply, MetaRequest, VoterAddress, Write};
use wire::{NodeId, Revision};

/// Where all keys of the workload are.
const ALL: &str = "/t/";
/// Registers, lists, the set, one key per client, and locks.
const REGISTERS: &str = "/t/r/";
const LISTS: &str = "/t/a/";
const SET: &str = "/t/s/";
const MARKS: &str = "/t/d/";
/// The keys bound to leases.
pub const LOCKS: &str = "/t/l/";
/// The token of the timer; the client's own begin with another byte.
const WORK: Token = Token(0xae << 56);
/// Calls of a client under way, at most.
const DEPTH: usize = 3;
/// A list that is longer begins anew.
const LIST_MAX: usize = 400;
/// More than all keys there are.
const LIMIT: u32 = 10_000;
/// Of a granted time to live, in percent, what the owner relies on: clocks run up to 4 % apart from true time,
/// in both directions.
const RELIED_ON_PERCENT: u64 = 90;

/// What a call was made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum For {
    Work,
    Grant,
    Take,
    Renewal,
    LastRead,
}

/// What a client knows of the lock it is after.
#[derive(Clone, Debug)]
struct Lock {
    key: String,
    lease: u64,
    /// When the last renewal that may be granted was sent.
    sent: Mono,
    /// Until when the lease surely lives, by the own clock.
    sure: Mono,
    /// In `History::holds`, once it is held.
    hold: Option<usize>,
    /// When it is given back.
    ends: Mono,
    asking: bool,
}

/// A client process.
pub struct MetaClient {
    core: ClientCore,
    desk: Rc<Desk>,
    think_ns: u64,
    mix: Mix,
    number: usize,
    /// Nodes that may vote.
    nodes: usize,
    rng: Stream,
    calls: BTreeMap<AdminTicket, (usize, For)>,
    watch: usize,
    seen: BTreeMap<String, (String, Revision)>,
    lock: Option<Lock>,
    tick: bool,
    last_reads: Option<VecDeque<&'static str>>,
}

impl MetaClient {
    /// A client process of number `number`.
    pub fn new(
        number: usize,
        addrs: Vec<SocketAddr>,
        client_options: client::Options,
        options: &Options,
        mix: Mix,
        desk: Rc<Desk>,
        rng: Stream,
    ) -> Self {
        let watch = desk.meta.borrow_mut().open_watch(number);
        Self {
            core: ClientCore::new(addrs, client_options),
            desk,
            think_ns: options.think_ns,
            mix,
            number,
            nodes: options.nodes,
            rng,
            calls: BTreeMap::new(),
            watch,
            seen: BTreeMap::new(),
            lock: None,
            tick: false,
            last_reads: None,
        }
    }

    fn go(&mut self, env: &mut dyn Env) {
        while let Some(done) = self.core.poll_admin() {
            match done {
                AdminDone::Meta { ticket, result } => self.answered(env, ticket, result),
                AdminDone::Watch { revision, changes, .. } => self.watched(revision, changes),
                AdminDone::Opened { .. } => {}
            }
        }
        let tick = std::mem::take(&mut self.tick);
        match self.desk.mode.get() {
            Mode::Work => {
                self.look_after_lock(env, tick);
                if tick && self.calls.len() < DEPTH {
                    self.random_call(env);
                }
            }
            Mode::Drain => self.lock = None,
            Mode::ReadBack => self.read_last(env),
        }
        if let Some(busy) = self.desk.busy.borrow_mut().get_mut(self.number) {
            *busy = self.calls.len();
        }
    }

    fn call(&mut self, env: &mut dyn Env, what: For, request: MetaRequest) {
        let at = self.desk.now.get();
        let call = self.desk.meta.borrow_mut().begin(self.number, at, request.clone());
        let ticket = self.core.meta(env, request);
        self.calls.insert(ticket, (call, what));
    }

    fn answered(&mut self, env: &mut dyn Env, ticket: AdminTicket, result: Result<MetaReply, AdminError>) {
        let Some((call, what)) = self.calls.remove(&ticket) else { return };
        self.desk.meta.borrow_mut().end(call, result.clone());
        match what {
            For::Work | For::LastRead => {}
            For::Grant | For::Take | For::Renewal => self.lock_answer(env, what, result),
        }
    }

    fn watched(&mut self, revision: Revision, changes: Vec<Change>) {
        for change in &changes {
            match change {
                Change::Put(item) => {
                    self.seen.insert(item.key.clone(), (item.value.clone(), item.mod_revision));
                }
                Change::Delete { key } => {
                    self.seen.remove(key);
                }
            }
        }
        self.desk.meta.borrow_mut().watched(self.watch, revision, changes);
    }

    /// What every value of the next call begins with.
    fn value(&self, rest: &str) -> String {
        format!("{{\"o\":{}{rest}}}", self.desk.meta.borrow().next_call())
    }

    fn padding(&mut self) -> String {
        // Long ones are as many as short ones: together they fill the log.
        let bytes = if self.rng.coin() { self.rng.below(self.mix.value_bytes) } else { 0 };
        if bytes == 0 { String::new() } else { format!(",\"p\":\"{}\"", "-".repeat(bytes as usize)) }
    }

    fn key(&mut self, prefix: &str) -> String {
        format!("{prefix}{}", self.rng.below(self.mix.keys))
    }

    fn unchanged(&self, key: &str) -> Compare {
        let revision = self.seen.get(key).map_or(Revision(0), |(_, revision)| *revision);
        Compare::ModRevision { key: key.to_owned(), revision }
    }

    fn put(&self, key: String, rest: &str) -> Write {
        Write::Put { key, value: self.value(rest), lease: None }
    }

    /// With it, whatever deletes is seen.
    fn mark(&self) -> Write {
        self.put(format!("{MARKS}{}", self.number), "")
    }

    /// Other voters, sensible or not: one for another, two more, two fewer, or not after all.
    fn other_voters(&mut self) -> MetaRequest {
        let mut draw = || self.rng.below(self.nodes as u64) as usize;
        let (a, b, c) = (draw(), draw(), draw());
        let (add, remove) = match self.rng.below(10) {
            0..=4 => (vec![a], vec![b]),
            5 | 6 => (vec![a, b], Vec::new()),
            7 | 8 => (Vec::new(), vec![a, c]),
            _ => return MetaRequest::CancelVoters,
        };
        let address = |index: usize| VoterAddress {
            node: NodeId(index as u64 + 1),
            address: SocketAddr::from((node_ip(index), CONTROL_PORT)).to_string(),
        };
        MetaRequest::ChangeVoters {
            add: add.into_iter().map(address).collect(),
            remove: remove.into_iter().map(|index| NodeId(index as u64 + 1)).collect(),
        }
    }

    fn random_call(&mut self, env: &mut dyn Env) {
        let request = if self.mix.voters_ppm > 0 && self.rng.chance(self.mix.voters_ppm) {
            self.other_voters()
        } else if self.rng.chance(self.mix.read_ppm) {
            let one = self.key(REGISTERS);
            let prefix = self.rng.pick(&[&one, REGISTERS, LISTS, SET]).copied().unwrap_or(REGISTERS);
            MetaRequest::Range { prefix: prefix.to_owned(), limit: LIMIT }
        } else {
            let (compares, writes) = self.random_change();
            MetaRequest::Txn { compares, writes }
        };
        self.call(env, For::Work, request);
    }

    fn random_change(&mut self) -> (Vec<Compare>, Vec<Write>) {
        let padding = self.padding();
        let key = self.key(REGISTERS);
        if self.rng.chance(self.mix.put_ppm) {
            return (Vec::new(), vec![self.put(key, &padding)]);
        }
        if self.rng.chance(self.mix.several_ppm) {
            let other = self.key(REGISTERS);
            let compares = vec![self.unchanged(&key), self.unchanged(&other)];
            let writes = match self.rng.below(3) {
                0 => vec![Write::Delete { key }, self.put(other, ""), self.mark()],
                1 => vec![self.put(key, ""), self.put(other, &padding)],
                _ => vec![self.mark(), Write::Delete { key: other }, self.put(key, "")],
            };
            return (compares, writes);
        }
        if self.rng.chance(self.mix.append_ppm) {
            return self.append();
        }
        if self.rng.chance(self.mix.add_ppm) {
            if self.rng.chance(30_000) {
                return (Vec::new(), vec![Write::DeletePrefix { prefix: SET.to_owned() }, self.mark()]);
            }
            let key = format!("{SET}{}", self.desk.meta.borrow().next_call());
            return (vec![self.unchanged(&key)], vec![self.put(key, "")]);
        }
        match self.rng.below(3) {
            0 => (vec![Compare::Exists { key: key.clone() }], vec![self.put(key, &padding)]),
            _ => (vec![self.unchanged(&key)], vec![self.put(key, &padding)]),
        }
    }

    /// The list as it was seen, and the call's own number behind it.
    fn append(&mut self) -> (Vec<Compare>, Vec<Write>) {
        let key = self.key(LISTS);
        let before = self.seen.get(&key).and_then(|(value, _)| value.split_once('[')).map(|(_, list)| list);
        let before = before.and_then(|list| list.split_once(']')).map_or("", |(list, _)| list);
        let before = if before.len() > LIST_MAX { "" } else { before };
        let comma = if before.is_empty() { "" } else { "," };
        let number = self.desk.meta.borrow().next_call();
        let list = format!(",\"l\":[{before}{comma}{number}]");
        (vec![self.unchanged(&key)], vec![self.put(key, &list)])
    }

    /// Goes on with the lock: notes that it is held, renews its lease, gives it back, or tries for one.
    fn look_after_lock(&mut self, env: &mut dyn Env, tick: bool) {
        if self.number >= self.mix.lockers {
            return;
        }
        let now = env.now();
        let Some(lock) = &mut self.lock else {
            if tick && self.rng.below(8) == 0 {
                self.begin_lock(env);
            }
            return;
        };
        if let Some(hold) = lock.hold {
            if now >= lock.sure {
                self.lock = None;
                return;
            }
            if let Some(hold) = self.desk.meta.borrow_mut().holds.get_mut(hold) {
                hold.until = self.desk.now.get();
            }
        }
        let half = self.mix.ttl_ms * 1_000_000 / 3;
        if lock.hold.is_some() && now >= lock.ends {
            self.give_back(env);
        } else if !lock.asking && now.since(lock.sent) > half {
            lock.asking = true;
            lock.sent = now;
            let request = MetaRequest::LeaseKeep { lease: lock.lease, ttl_ms: self.mix.ttl_ms };
            self.call(env, For::Renewal, request);
        }
    }

    fn begin_lock(&mut self, env: &mut dyn Env) {
        let now = env.now();
        let lease = 1 << 40 | self.desk.meta.borrow().next_call() as u64;
        let key = format!("{LOCKS}{}", self.rng.below(2));
        let ends = now.plus_ms(self.mix.ttl_ms * self.rng.between(1, 6));
        self.lock = Some(Lock { key, lease, sent: now, sure: now, hold: None, ends, asking: true });
        self.call(env, For::Grant, MetaRequest::LeaseKeep { lease, ttl_ms: self.mix.ttl_ms });
    }

    fn give_back(&mut self, env: &mut dyn Env) {
        // From now on it is not held, whatever becomes of the request.
        let Some(lock) = self.lock.take() else { return };
        match self.rng.below(3) {
            0 => {}
            1 => self.call(env, For::Work, MetaRequest::LeaseRevoke { lease: lock.lease }),
            _ => {
                let compares = vec![Compare::Bound { key: lock.key.clone(), lease: lock.lease }];
                let writes = vec![Write::Delete { key: lock.key }, self.mark()];
                self.call(env, For::Work, MetaRequest::Txn { compares, writes });
            }
        }
    }

    fn lock_answer(&mut self, env: &mut dyn Env, what: For, result: Result<MetaReply, AdminError>) {
        let now = env.now();
        let Some(lock) = &mut self.lock else { return };
        match (what, result) {
            (For::Grant | For::Renewal, Ok(MetaReply::Lease { ttl_ms })) if ttl_ms > 0 => {
                // A lease that had ended is created anew, without its keys: only a grant that arrives while
                // the old one surely lives prolongs what is held.
                if what == For::Renewal && now >= lock.sure {
                    self.lock = None;
                    return;
                }
                lock.asking = false;
                lock.sure = lock.sent.plus_ms(ttl_ms * RELIED_ON_PERCENT / 100);
                if what == For::Grant {
                    lock.asking = true;
                    let (key, lease) = (lock.key.clone(), lock.lease);
                    let compares = vec![Compare::ModRevision { key: key.clone(), revision: Revision(0) }];
                    let writes = vec![Write::Put { key, value: self.value(""), lease: Some(lease) }];
                    self.call(env, For::Take, MetaRequest::Txn { compares, writes });
                }
            }
            (For::Take, Ok(MetaReply::Applied { .. })) if now < lock.sure => {
                lock.asking = false;
                let at = self.desk.now.get();
                let hold = Hold {
                    key: lock.key.clone(),
                    client: self.number,
                    lease: lock.lease,
                    from: at,
                    until: at,
                };
                let mut history = self.desk.meta.borrow_mut();
                lock.hold = Some(history.holds.len());
                history.holds.push(hold);
            }
            // Somebody else has it, or nobody knows: the lease runs out by itself.
            _ => self.lock = None,
        }
    }

    /// After everything: what is there.
    fn read_last(&mut self, env: &mut dyn Env) {
        let left =
            self.last_reads.get_or_insert_with(|| VecDeque::from([REGISTERS, LISTS, SET, MARKS, LOCKS]));
        if !self.calls.is_empty() {
            return;
        }
        match left.pop_front() {
            Some(prefix) => {
                let request = MetaRequest::Range { prefix: prefix.to_owned(), limit: LIMIT };
                self.call(env, For::LastRead, request);
            }
            None => {
                if let Some(done) = self.desk.read_back.borrow_mut().get_mut(self.number) {
                    *done = true;
                }
            }
        }
    }
}

impl Service for MetaClient {
    fn start(&mut self, env: &mut dyn Env) {
        self.core.start(env);
        self.core.watch(env, vec![ALL.to_owned()]);
        env.set_timer(env.now(), WORK);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { token: WORK } => {
                self.tick = true;
                let pause = self.rng.latency(self.think_ns);
                env.set_timer(env.now().plus_ns(pause), WORK);
            }
            event => self.core.event(env, event),
        }
    }

    fn flush(&mut self, env: &mut dyn Env) {
        self.core.flush(env);
        self.go(env);
    }
}
