//! The metadata store under clients of its own, judged for strict serializability.
//!
//! Control cores only, without data cores or disks: voters of the Raft group, and sometimes nodes that are none and
//! forward; in every other seed clients change who votes. Clients (`client`) put, compare and put, append to lists,
//! fill sets, move values between keys, watch, and hold locks with leases, through the ordinary client library and
//! any node. `history` keeps what they asked and heard; `check` replays it; `locks` looks at who held what when.

pub mod check;
pub mod client;
pub mod history;
pub mod locks;

use crate::cluster::Cluster;
use crate::nemesis::Nemesis;
use crate::options::Options;
use crate::run::Planted;
use crate::workload::Mode;
use crate::world::Seen;
use simenv::clock::{MS, SEC};
use simenv::rng::Stream;
use simenv::universe::Step;
use std::rc::Rc;

/// What a seed decides about this workload: each has its own mix.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Keys of each kind.
    pub keys: u64,
    /// Longest value in bytes; some are.
    pub value_bytes: u64,
    /// Blind puts, parts per million.
    pub put_ppm: u32,
    /// Reads, parts per million.
    pub read_ppm: u32,
    /// Of the rest: changes of several keys, parts per million.
    pub several_ppm: u32,
    /// Appends to lists, parts per million.
    pub append_ppm: u32,
    /// Additions to the set, parts per million.
    pub add_ppm: u32,
    /// Clients that also try for a lock.
    pub lockers: usize,
    /// Time to live of their leases.
    pub ttl_ms: u64,
    /// Calls that ask for other voters, parts per million; 0 when nobody does.
    pub voters_ppm: u32,
}

/// What a seed is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    /// Anything.
    Mixed,
    /// Voters die all the time and are soon back.
    Deaths,
    /// Two voters that cannot reach each other, and a third between them that dies and is soon back: what
    /// either of them becomes is decided by what it remembers.
    Bridge,
    /// Power cuts of one and of all.
    Power,
    /// Nobody dies: voters stop for a while, or are cut off from the others, while long values fill the logs.
    Apart,
}

impl Mix {
    /// What a seed decides.
    pub fn draw(rng: &mut Stream, style: Style) -> Self {
        Self {
            keys: rng.weighted((1, 1), &[(2, 3), (1, 8)]),
            value_bytes: match style {
                Style::Apart => rng.weighted((1, 60_000), &[(1, 20_000), (1, 100)]),
                _ => rng.weighted((3, 60), &[(1, 4_000)]),
            },
            put_ppm: rng.weighted((1, 200_000), &[(2, 500_000)]),
            read_ppm: rng.weighted((1, 100_000), &[(2, 300_000)]),
            several_ppm: rng.weighted((1, 0), &[(2, 300_000)]),
            append_ppm: rng.weighted((1, 0), &[(2, 300_000)]),
            add_ppm: rng.weighted((1, 0), &[(2, 300_000)]),
            lockers: rng.below(4) as usize,
            ttl_ms: rng.weighted((1, 600), &[(2, 1_500), (1, 4_000)]),
            voters_ppm: 0,
        }
    }
}

const TICK: u64 = 1;
const STRIKE: u64 = 2;
const TICK_NS: u64 = 5 * MS;
/// From the healing of everything to answers for everybody: a request fails after ten seconds at the latest.
const SETTLE_LIMIT_NS: u64 = 60 * SEC;

/// Runs the scenario.
pub fn run(options: Options, planted: Option<Planted>, trace: Option<(u64, u64)>) -> Seen {
    let options = Rc::new(options);
    let mut cluster = Cluster::new(options.clone(), planted);
    cluster.universe.trace.verbose = trace;
    let mut nemesis = Nemesis::new(options.seed, options.nodes, trace.is_some());
    for index in 0..cluster.clients.len() {
        cluster.start_client(index);
    }
    let mut violations = Vec::new();
    let end = SEC + options.safety_ns;
    cluster.universe.call_at(TICK_NS, TICK);
    cluster.universe.call_at(SEC, STRIKE);
    let mut healed = None;
    loop {
        match cluster.universe.step() {
            Step::Went => {}
            Step::Harness(TICK) => {
                let now = cluster.universe.now;
                cluster.universe.call_at(now + TICK_NS, TICK);
                nemesis.mend_due(&mut cluster);
                violations.append(&mut cluster.board.borrow_mut().violations);
                if now > end && healed.is_none() {
                    heal(&mut cluster, &mut nemesis);
                    healed = Some(now);
                }
                if let Some(since) = healed {
                    match missing(&cluster) {
                        None => break,
                        Some(why) if now > since + SETTLE_LIMIT_NS => {
                            violations
                                .push(format!("meta: not at rest within {} s: {why}", SETTLE_LIMIT_NS / SEC));
                            break;
                        }
                        Some(_) => {}
                    }
                }
            }
            Step::Harness(_) => {
                if healed.is_none() {
                    nemesis.strike(&mut cluster);
                    let next = nemesis.next_at(&cluster);
                    cluster.universe.call_at(next, STRIKE);
                }
            }
            Step::Empty => {
                violations.push("nothing is left to happen".to_owned());
                break;
            }
        }
        cluster.desk.now.set(cluster.universe.now);
    }
    finish(&cluster, &nemesis, violations)
}

fn heal(cluster: &mut Cluster, nemesis: &mut Nemesis) {
    nemesis.heal_all_but_disks(cluster);
    for index in 0..cluster.nodes.len() {
        cluster.revive(index);
    }
    cluster.desk.mode.set(Mode::Drain);
}

/// What is still awaited: everybody's last answer, and watches that have seen what the last reads saw.
fn missing(cluster: &Cluster) -> Option<String> {
    let busy: usize = cluster.desk.busy.borrow().iter().sum();
    if busy > 0 {
        return Some(format!("{busy} requests have no answer"));
    }
    if cluster.desk.mode.get() == Mode::Drain {
        cluster.desk.mode.set(Mode::ReadBack);
        return Some("last reads".to_owned());
    }
    let done = cluster.desk.read_back.borrow();
    if !done.iter().all(|done| *done) {
        return Some(format!("last reads {done:?}"));
    }
    let history = cluster.desk.meta.borrow();
    let last = history.last_change();
    let behind = history.watches().filter(|watch| watch.is_open && watch.seen < last).count();
    (behind > 0).then(|| format!("{behind} watches have not seen revision {last}"))
}

fn finish(cluster: &Cluster, nemesis: &Nemesis, mut violations: Vec<String>) -> Seen {
    let history = cluster.desk.meta.borrow();
    violations.extend(history.violations.iter().cloned());
    let judged = check::judge(&history);
    violations.extend(judged.violations.iter().map(|text| format!("meta: {text}")));
    let mut locks = locks::Judged::default();
    // A reset of all leases needs voters that have lost their memory (docs/metadata.md): without deaths there
    // is none.
    if cluster.options.faults.nobody_dies() {
        locks = locks::judge(&history.holds);
        violations.extend(locks.violations.iter().map(|text| format!("meta: {text}")));
    }
    let summary = format!(
        "{} calls: {judged}; {} holds of locks judged; {} watches; faults {:?}",
        history.calls.len(),
        locks.holds,
        history.watches().count(),
        nemesis.counts,
    );
    Seen {
        violations,
        trace_hash: cluster.universe.trace.hash(),
        virtual_ns: cluster.universe.now,
        operations: history.calls.len() as u64,
        summary,
    }
}
