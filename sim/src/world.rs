//! A run of the cluster scenario: set up, work under faults, heal, converge, read back, judge.

use crate::check::history::show;
use crate::check::linear::{Verdict, judge};
use crate::check::replicas;
use crate::cluster::{Cluster, NodeState};
use crate::nemesis::Nemesis;
use crate::options::Options;
use crate::run::Planted;
use crate::workload::{Mode, image_name};
use control::admin::{self, Keys, PoolSpec};
use placement::{FailureDomain, ScrubDepth};
use simenv::clock::{MS, SEC};
use simenv::universe::Step;
use std::collections::BTreeMap;
use std::rc::Rc;
use wire::control::{MetaReply, MetaRequest};
use wire::{PgId, Revision};

/// Harness tags.
const TICK: u64 = 1;
const STRIKE: u64 = 2;
/// How often conditions are looked at.
const TICK_NS: u64 = 5 * MS;
/// From the start of the processes to PGs that are active and clean.
const START_LIMIT_NS: u64 = 30 * SEC;
/// Looks at PGs that are clean and then not, before they are said to go on changing.
const SETTLE_ROUNDS: usize = 20;
/// From the healing of everything to clients without unfinished operations and PGs that are clean.
const CONVERGE_LIMIT_NS: u64 = 90 * SEC;
/// For scrubbing all PGs.
const SCRUB_LIMIT_NS: u64 = 120 * SEC;
/// Rounds of scrubs: the first finds what faults have left, the second nothing.
const SCRUB_ROUNDS: usize = 3;
/// For reading every image once.
const READ_BACK_LIMIT_NS: u64 = 120 * SEC;
/// For the metadata's watch and a range read to agree.
const META_LIMIT_NS: u64 = 10 * SEC;
/// The pool's name.
const POOL: &str = "pool";
/// Keys a cluster of this size may have.
const RANGE_LIMIT: u32 = 10_000;
/// Violations after which a run ends.
const ENOUGH: usize = 3;

/// What a run showed.
pub struct Seen {
    /// Empty when all was well.
    pub violations: Vec<String>,
    /// Hash of the history.
    pub trace_hash: u64,
    /// Virtual time that passed.
    pub virtual_ns: u64,
    /// Client operations that ended.
    pub operations: u64,
    /// A line for a person.
    pub summary: String,
}

struct World {
    cluster: Cluster,
    nemesis: Nemesis,
    violations: Vec<String>,
    next_request: u64,
    striking: bool,
    /// When members have learned all there is to know of new PGs.
    settled_at: u64,
    /// Blocks whose history was too large to judge.
    undecided: u64,
    /// A scrub of everything has found nothing: disks are judged as they are, damage included.
    scrubbed: bool,
}

/// Runs the scenario.
pub fn run(options: Options, planted: Option<Planted>, trace: Option<(u64, u64)>) -> Seen {
    let options = Rc::new(options);
    let mut cluster = Cluster::new(options.clone(), planted);
    cluster.universe.trace.verbose = trace;
    let nemesis = Nemesis::new(options.seed, options.nodes, trace.is_some());
    let mut world = World {
        cluster,
        nemesis,
        violations: Vec::new(),
        next_request: 1,
        striking: false,
        settled_at: u64::MAX,
        undecided: 0,
        scrubbed: false,
    };
    world.cluster.universe.call_at(TICK_NS, TICK);
    if world.all().is_err() && world.violations.is_empty() {
        world.violations.push("the run ended early for no known reason".to_owned());
    }
    world.seen()
}

/// The run is over: a violation was noted.
struct Over;

impl World {
    fn seen(self) -> Seen {
        let history = self.cluster.desk.history.borrow();
        let net = self.cluster.universe.net.counters;
        let (scrubbed, bad) = self.cluster.scrubbed();
        let summary = format!(
            "{} writes acknowledged, {} reads, {} of unknown outcome {:?}; faults {:?}; {} frames, {} lost, {} corrupted, {} resets; {} sub-operations; {} losses of memory; {} blocks undecided; {} objects scrubbed, {} copies bad",
            history.acked_writes,
            history.answered_reads,
            history.unknown,
            history.errors,
            self.nemesis.counts,
            net.frames,
            net.lost,
            net.corrupted,
            net.resets,
            self.cluster.primaries.borrow().looked_at,
            history.memory.losses(),
            self.undecided,
            scrubbed,
            bad,
        );
        Seen {
            violations: self.violations,
            trace_hash: self.cluster.universe.trace.hash(),
            virtual_ns: self.cluster.universe.now,
            operations: history.acked_writes + history.answered_reads,
            summary,
        }
    }

    fn all(&mut self) -> Result<(), Over> {
        self.set_up()?;
        self.look_at_memory();
        self.settled_at = self.cluster.universe.now + SEC;
        for index in 0..self.cluster.clients.len() {
            self.cluster.start_client(index);
        }
        self.striking = true;
        let first = self.nemesis.next_at(&self.cluster);
        self.cluster.universe.call_at(first, STRIKE);
        let end = self.cluster.universe.now + self.cluster.options.safety_ns;
        while self.cluster.universe.now < end {
            self.step()?;
        }
        self.striking = false;
        self.nemesis.heal(&mut self.cluster);
        for index in 0..self.cluster.nodes.len() {
            if self.cluster.nodes[index].state != NodeState::Running {
                self.cluster.revive(index);
            }
        }
        self.converge()?;
        self.read_back()?;
        self.settle()?;
        if self.cluster.options.scrub.deep_secs > 0 {
            self.scrub_all()?;
        }
        self.judge_scrubs();
        self.judge_replicas();
        self.judge_history();
        if self.violations.is_empty() { Ok(()) } else { Err(Over) }
    }

    /// One step of the universe, and what the harness does at its own times.
    fn step(&mut self) -> Result<(), Over> {
        match self.cluster.universe.step() {
            Step::Went => {}
            Step::Harness(TICK) => {
                self.cluster.universe.call_at(self.cluster.universe.now + TICK_NS, TICK);
                self.look_at_memory();
                self.nemesis.mend_due(&mut self.cluster);
                self.gather();
                if self.violations.len() >= ENOUGH {
                    return Err(Over);
                }
            }
            Step::Harness(_) => {
                if self.striking {
                    self.nemesis.strike(&mut self.cluster);
                    let next = self.nemesis.next_at(&self.cluster);
                    self.cluster.universe.call_at(next, STRIKE);
                }
            }
            Step::Empty => {
                self.violations.push("nothing is left to happen".to_owned());
                return Err(Over);
            }
        }
        self.cluster.desk.now.set(self.cluster.universe.now);
        Ok(())
    }

    /// Whether a primary has begun to serve without anybody's memory since the last look. Only a process that
    /// is not its node's first may say so: the first ones know everything from the start.
    fn look_at_memory(&mut self) {
        let (lost, wrongly) = self.cluster.memory_lost();
        if let Some(node) = wrongly.filter(|_| self.cluster.universe.now > self.settled_at) {
            let now = simenv::trace::stamp(self.cluster.universe.now);
            self.violations.push(format!(
                "memory: at {now} node {node} says that nobody knows which changes were made, and has never died"
            ));
        }
        self.cluster.desk.history.borrow_mut().look_at_memory(lost);
    }

    /// Collects what checkers noted while the world ran.
    fn gather(&mut self) {
        self.violations.append(&mut self.cluster.desk.history.borrow_mut().violations);
        self.violations.append(&mut self.cluster.board.borrow_mut().violations);
        self.violations.append(&mut self.cluster.primaries.borrow_mut().violations);
    }

    /// Runs until a condition holds.
    fn until(
        &mut self,
        limit_ns: u64,
        what: &str,
        mut missing: impl FnMut(&Cluster) -> Option<String>,
    ) -> Result<(), Over> {
        let end = self.cluster.universe.now + limit_ns;
        let mut looked = 0;
        loop {
            self.step()?;
            let now = self.cluster.universe.now;
            if now < looked + TICK_NS {
                continue;
            }
            looked = now;
            match missing(&self.cluster) {
                None => {
                    self.gather();
                    return if self.violations.is_empty() { Ok(()) } else { Err(Over) };
                }
                Some(why) if now > end => {
                    self.gather();
                    let universe = &self.cluster.universe;
                    self.violations.push(format!(
                        "{what} not within {} s: {why}; buffers {:?}; network {:?}",
                        limit_ns / SEC,
                        universe.arena_pressure(),
                        universe.network_backlog()
                    ));
                    return Err(Over);
                }
                Some(_) => {}
            }
        }
    }

    fn ask(&mut self, request: MetaRequest) -> Result<Result<MetaReply, String>, Over> {
        let number = self.next_request;
        self.next_request += 1;
        let board = self.cluster.board.clone();
        board.borrow_mut().requests.push_back((number, request));
        let answered = board.clone();
        self.until(META_LIMIT_NS * 2, "answer of the metadata store", |_| {
            (!answered.borrow().answers.contains_key(&number)).then(|| "none came".to_owned())
        })?;
        let answer = board.borrow_mut().answers.remove(&number);
        Ok(answer.unwrap_or_else(|| Err("no answer".to_owned())))
    }

    /// What the watch has shown, as the administrator's transactions want it.
    fn keys(&self) -> Keys {
        let board = self.cluster.board.borrow();
        let mut keys = Keys::default();
        let items = board.keys.values().cloned().collect();
        let _ = keys.add(MetaReply::Range { revision: board.revision, items, more: false });
        keys
    }

    fn set_up(&mut self) -> Result<(), Over> {
        let nodes = self.cluster.nodes.len();
        self.until(START_LIMIT_NS, "all nodes live", |cluster| {
            let live = cluster.board.borrow().live().len();
            (live < nodes).then(|| format!("{live} of {nodes} are"))
        })?;
        let options = self.cluster.options.clone();
        let spec = PoolSpec {
            name: POOL.to_owned(),
            copies: options.copies,
            min_copies: Some(options.min_copies),
            pg_count: Some(options.pg_count),
            failure_domain: FailureDomain::Host,
            scrub: options.scrub,
        };
        self.change("pool", |keys| admin::create_pool(keys, &spec).map(|(_, request)| request))?;
        for image in 0..options.images {
            let name = image_name(image);
            self.change("image", |keys| {
                admin::create_image(keys, POOL, &name, options.image_bytes, 0).map(|(_, request)| request)
            })?;
        }
        self.until(START_LIMIT_NS, "all PGs active and clean", |cluster| {
            cluster.board.borrow().unclean(cluster.options.pg_count as usize)
        })
    }

    fn change(
        &mut self,
        what: &str,
        build: impl Fn(&Keys) -> Result<MetaRequest, admin::AdminError>,
    ) -> Result<(), Over> {
        let mut in_doubt = false;
        for _ in 0..20 {
            let request = match build(&self.keys()) {
                Ok(request) => request,
                // Its answer was lost, and the watch shows that it was done.
                Err(admin::AdminError::Exists { .. }) if in_doubt => return Ok(()),
                Err(error) => {
                    self.violations.push(format!("creating the {what}: {error}"));
                    return Err(Over);
                }
            };
            let answer = self.ask(request)?;
            in_doubt |= answer.is_err();
            if let Ok(MetaReply::Applied { revision }) = answer {
                return self.until(META_LIMIT_NS, "watch of a change", |cluster| {
                    let seen = cluster.board.borrow().revision;
                    (seen < revision).then(|| format!("at revision {seen}, made at {revision}"))
                });
            }
        }
        self.violations.push(format!("creating the {what} failed again and again"));
        Err(Over)
    }

    fn converge(&mut self) -> Result<(), Over> {
        self.cluster.desk.mode.set(Mode::Drain);
        self.until(CONVERGE_LIMIT_NS, "convergence after healing", |cluster| {
            let busy: usize = cluster.desk.busy.borrow().iter().sum();
            if busy > 0 {
                return Some(format!(
                    "{busy} client operations are unfinished: {:?}",
                    cluster.desk.busy.borrow()
                ));
            }
            cluster.board.borrow().unclean(cluster.options.pg_count as usize)
        })
    }

    fn read_back(&mut self) -> Result<(), Over> {
        self.cluster.desk.mode.set(Mode::ReadBack);
        self.until(READ_BACK_LIMIT_NS, "reading every image", |cluster| {
            let done = cluster.desk.read_back.borrow();
            (!done.iter().all(|done| *done)).then(|| format!("{done:?}"))
        })?;
        self.cluster.desk.mode.set(Mode::Drain);
        Ok(())
    }

    /// Waits until all PGs are clean in a view that is known to be up to date: the node that the harness
    /// watches may itself hear late of a change that makes a PG unclean.
    fn settle(&mut self) -> Result<(), Over> {
        for _ in 0..SETTLE_ROUNDS {
            self.until(CONVERGE_LIMIT_NS, "PGs clean after the read-back", |cluster| {
                cluster.board.borrow().unclean(cluster.options.pg_count as usize)
            })?;
            self.judge_metadata()?;
            let pgs = self.cluster.options.pg_count as usize;
            if self.cluster.board.borrow().unclean(pgs).is_none() {
                return Ok(());
            }
        }
        self.violations.push("PGs went on changing although nothing disturbed them".to_owned());
        Err(Over)
    }

    /// Scrubs every PG deeply until a whole round finds nothing: damage at rest must be mended then.
    fn scrub_all(&mut self) -> Result<(), Over> {
        let pgs: Vec<PgId> = self.cluster.board.borrow().pgs().into_iter().map(|(pg, _)| pg).collect();
        for _ in 0..SCRUB_ROUNDS {
            for pg in &pgs {
                self.change("wish for a scrub", |keys| admin::want_scrub(keys, *pg, ScrubDepth::Deep))?;
            }
            self.until(SCRUB_LIMIT_NS, "scrubs of all PGs", |cluster| cluster.board.borrow().unscrubbed())?;
            let errors: u64 =
                self.cluster.board.borrow().scrubs().iter().map(|(_, record)| record.errors).sum();
            self.until(CONVERGE_LIMIT_NS, "PGs clean after a scrub", |cluster| {
                cluster.board.borrow().unclean(cluster.options.pg_count as usize)
            })?;
            if errors == 0 {
                self.scrubbed = true;
                return Ok(());
            }
        }
        self.violations.push("scrub: one round after the other finds bad copies".to_owned());
        Err(Over)
    }

    /// The watch's view and a linearizable read of everything must agree.
    fn judge_metadata(&mut self) -> Result<(), Over> {
        let mut why = String::new();
        for _ in 0..20 {
            let answer = self.ask(MetaRequest::Range { prefix: "/".to_owned(), limit: RANGE_LIMIT })?;
            let (revision, items) = match answer {
                Ok(MetaReply::Range { revision, items, more: false }) => (revision, items),
                other => {
                    why = format!("{other:?}").chars().take(200).collect();
                    continue;
                }
            };
            self.until(META_LIMIT_NS, "the watch's arrival at the read's revision", |cluster| {
                let seen = cluster.board.borrow().revision;
                // Ephemeral keys move on all the time; the persistent ones have come to rest.
                (seen < revision && !agrees(cluster, &items, Revision(u64::MAX)))
                    .then(|| format!("at {seen} of {revision}"))
            })?;
            if agrees(&self.cluster, &items, revision) {
                return Ok(());
            }
            why = "keys differ".to_owned();
        }
        self.violations.push(format!("metadata: the watch and a read of all keys never agreed: {why}"));
        Err(Over)
    }

    /// What no disk has damaged, no scrub may call bad.
    fn judge_scrubs(&mut self) {
        let (_, bad) = self.cluster.scrubbed();
        let faults = self.cluster.options.faults;
        if bad > 0 && faults.damage == 0 && faults.write_fault == 0 {
            self.violations.push(format!("scrub: {bad} copies were called bad and no disk is"));
        }
    }

    fn judge_replicas(&mut self) {
        let slices: BTreeMap<_, _> = self
            .cluster
            .slices()
            .into_iter()
            .filter_map(|(disk, entry)| {
                let disk = self.cluster.universe.disks.get(disk)?;
                Some((entry.slice, replicas::contents_of(disk, entry.geometry(), self.scrubbed)))
            })
            .collect();
        simenv::trace::set_log_time(self.cluster.universe.now);
        let board = self.cluster.board.borrow();
        let pools = board.pools();
        let wrong = replicas::compare(&slices, &board.pgs(), |pg| {
            pools.iter().find(|pool| pool.id == pg.pool).map_or(1, |pool| pool.pg_count)
        });
        self.violations.extend(wrong.into_iter().map(|text| format!("replicas: {text}")).take(ENOUGH));
    }

    fn judge_history(&mut self) {
        let history = self.cluster.desk.history.borrow();
        let mut undecided = 0;
        for (place, ops) in history.blocks() {
            match judge(place, &ops, &history.memory) {
                Verdict::Legal => {}
                Verdict::Illegal(why) => {
                    self.violations.push(format!("linearizability: {why}"));
                    if self.violations.len() >= ENOUGH {
                        return;
                    }
                }
                Verdict::Undecided => {
                    undecided += 1;
                    if undecided == 1 && self.nemesis.is_verbose() {
                        eprintln!("undecided: {place}\n{}", show(&ops));
                    }
                }
            }
        }
        self.undecided = undecided;
    }
}

/// Whether the watch has the same persistent keys as a read gave, none of them newer than `revision`.
fn agrees(cluster: &Cluster, items: &[wire::control::KeyValue], revision: Revision) -> bool {
    let board = cluster.board.borrow();
    let read = items.iter().filter(|item| item.lease.is_none());
    let seen = board.keys.values().filter(|item| item.lease.is_none());
    board.keys.values().filter(|item| item.lease.is_none()).all(|item| item.mod_revision <= revision)
        && read.eq(seen)
}
