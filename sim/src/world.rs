//! A run of the cluster scenario: set up, work under faults, heal, converge, read back, judge.

use crate::beyond::{self, Beyond};
use crate::cluster::{Cluster, NodeState};
use crate::moves::Moves;
use crate::nemesis::Nemesis;
use crate::options::Options;
use crate::run::Planted;
use crate::workload::{Mode, image_name};
use control::admin::{self, Keys, PoolSpec};
use placement::{FailureDomain, ScrubDepth};
use simenv::clock::{MS, SEC};
use simenv::universe::Step;
use std::rc::Rc;
use wire::PgId;
use wire::control::{MetaReply, MetaRequest};

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
pub(crate) const META_LIMIT_NS: u64 = 10 * SEC;
/// The pool's name.
const POOL: &str = "pool";
/// Keys a cluster of this size may have.
pub(crate) const RANGE_LIMIT: u32 = 10_000;
/// Violations after which a run ends.
pub(crate) const ENOUGH: usize = 3;

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

/// A run under way.
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    pub(crate) nemesis: Nemesis,
    pub(crate) violations: Vec<String>,
    next_request: u64,
    striking: bool,
    /// The request that makes an image grow, while it is under way.
    growing: Option<u64>,
    pub(crate) moves: Moves,
    /// What goes beyond what redundancy survives, if anything does.
    pub(crate) beyond: Option<Beyond>,
    /// Reads that failed when everything was read at the end.
    pub(crate) unread: u64,
    /// When members have learned all there is to know of new PGs.
    settled_at: u64,
    /// Blocks whose history was too large to judge.
    pub(crate) undecided: u64,
    /// A scrub of everything has found nothing: disks are judged as they are, damage included.
    pub(crate) scrubbed: bool,
}

/// Runs the scenario.
pub fn run(options: Options, planted: Option<Planted>, trace: Option<(u64, u64)>) -> Seen {
    let options = Rc::new(options);
    let mut cluster = Cluster::new(options.clone(), planted);
    cluster.universe.trace.verbose = trace;
    let nemesis = Nemesis::new(options.seed, options.nodes, trace.is_some());
    let moves = Moves::new(options.seed);
    let beyond = options.beyond.clone().map(|plan| Beyond::new(options.seed, plan, options.nodes));
    let mut world = World {
        cluster,
        nemesis,
        violations: Vec::new(),
        next_request: 1,
        striking: false,
        growing: None,
        moves,
        beyond,
        unread: 0,
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
pub(crate) struct Over;

impl World {
    fn seen(self) -> Seen {
        let history = self.cluster.desk.history.borrow();
        let net = self.cluster.universe.net.counters;
        let (scrubbed, bad) = self.cluster.scrubbed();
        let ledger = self.cluster.desk.ledger.borrow();
        let apps = match ledger.regions.is_empty() {
            true => String::new(),
            false => format!(
                "; {} changes and {} reads of programs, {} hand-overs, {} logs opened",
                ledger.acked, ledger.reads, ledger.handed, ledger.logs
            ),
        };
        let beyond = self.beyond.as_ref().map_or(String::new(), |beyond| {
            format!("; {beyond}, {} PGs not clean, {} reads failed", self.unclean_pgs().len(), self.unread)
        });
        let summary = format!(
            "{} writes acknowledged, {} reads, {} of unknown outcome {:?}; faults {:?}; {} frames, {} lost, {} corrupted, {} resets; {} connections, {} over RDMA, {} payloads fetched, {} queue pairs broken, {} by silence; {} sub-operations; {} losses of memory; {} blocks undecided; {} objects scrubbed, {} copies bad; {} moves, {} objects erased behind them{beyond}{apps}",
            history.acked_writes,
            history.answered_reads,
            history.unknown,
            history.errors,
            self.nemesis.counts,
            net.frames,
            net.lost,
            net.corrupted,
            net.resets,
            net.connections,
            net.switches,
            net.fetches,
            net.breaks,
            net.stalls,
            self.cluster.primaries.borrow().looked_at,
            history.memory.losses(),
            self.undecided,
            scrubbed,
            bad,
            self.moves.made,
            self.cluster.strays_erased(),
        );
        Seen {
            violations: self.violations,
            trace_hash: self.cluster.universe.trace.hash(),
            virtual_ns: self.cluster.universe.now,
            operations: history.acked_writes + history.answered_reads + ledger.acked + ledger.reads,
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
        self.prepare_blow();
        let end = self.cluster.universe.now + self.cluster.options.safety_ns;
        while self.cluster.universe.now < end {
            self.step()?;
        }
        self.striking = false;
        if self.beyond.is_some() {
            return self.end_beyond();
        }
        self.nemesis.heal(&mut self.cluster);
        self.revive_all();
        self.converge()?;
        self.read_back(READ_BACK_LIMIT_NS)?;
        self.settle()?;
        if self.cluster.options.scrub.deep_secs > 0 {
            self.scrub_all()?;
        }
        if self.cluster.options.move_every_ns > 0 {
            self.sweep()?;
            self.settle()?;
        }
        self.judge_scrubs();
        self.judge_replicas(|_| true);
        self.judge_history();
        if self.violations.is_empty() { Ok(()) } else { Err(Over) }
    }

    /// Every node that does not run is started again.
    pub(crate) fn revive_all(&mut self) {
        for index in 0..self.cluster.nodes.len() {
            if self.cluster.nodes[index].state != NodeState::Running {
                self.cluster.revive(index);
            }
        }
    }

    /// The faults are over.
    pub(crate) fn is_healing(&self) -> bool {
        !self.striking
    }

    /// Why not every PG is clean, if so.
    pub(crate) fn unclean(&self) -> Option<String> {
        self.cluster.board.borrow().unclean(self.cluster.options.pg_count as usize)
    }

    /// One step of the universe, and what the harness does at its own times.
    fn step(&mut self) -> Result<(), Over> {
        match self.cluster.universe.step() {
            Step::Went => {}
            Step::Harness(TICK) => {
                self.cluster.universe.call_at(self.cluster.universe.now + TICK_NS, TICK);
                self.look_at_memory();
                self.nemesis.mend_due(&mut self.cluster);
                self.grow_images();
                self.move_copies(POOL);
                self.gather();
                if self.violations.len() >= ENOUGH {
                    return Err(Over);
                }
            }
            Step::Harness(tag @ (beyond::COPY | beyond::HIT)) => self.blow(tag),
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

    /// Runs until a condition holds; that it does not within the limit is a violation.
    pub(crate) fn until(
        &mut self,
        limit_ns: u64,
        what: &str,
        missing: impl FnMut(&Cluster) -> Option<String>,
    ) -> Result<(), Over> {
        let why = self.wait(limit_ns, missing)?;
        let Some(why) = why else { return Ok(()) };
        let universe = &self.cluster.universe;
        self.violations.push(format!(
            "{what} not within {} s: {why}; buffers {:?}; network {:?}",
            limit_ns / SEC,
            universe.arena_pressure(),
            universe.network_backlog()
        ));
        Err(Over)
    }

    /// Runs until a condition holds, or for so long; then it says why it does not hold.
    pub(crate) fn wait(
        &mut self,
        limit_ns: u64,
        mut missing: impl FnMut(&Cluster) -> Option<String>,
    ) -> Result<Option<String>, Over> {
        let end = self.cluster.universe.now + limit_ns;
        let mut looked = 0;
        loop {
            self.step()?;
            let now = self.cluster.universe.now;
            if now < looked + TICK_NS {
                continue;
            }
            looked = now;
            let why = missing(&self.cluster);
            if why.is_none() || now > end {
                self.gather();
                return if self.violations.is_empty() { Ok(why) } else { Err(Over) };
            }
        }
    }

    /// Has the harness's client make a request; its number for `answered`.
    pub(crate) fn post(&mut self, request: MetaRequest) -> u64 {
        self.next_request += 1;
        self.cluster.board.borrow_mut().requests.push_back((self.next_request, request));
        self.next_request
    }

    /// Whether a request has been answered; its answer is forgotten.
    pub(crate) fn answered(&self, number: u64) -> bool {
        self.cluster.board.borrow_mut().answers.remove(&number).is_some()
    }

    pub(crate) fn ask(&mut self, request: MetaRequest) -> Result<Result<MetaReply, String>, Over> {
        let number = self.post(request);
        let board = self.cluster.board.clone();
        let mut answer = None;
        self.until(META_LIMIT_NS * 2, "answer of the metadata store", |_| {
            answer = board.borrow_mut().answers.remove(&number);
            answer.is_none().then(|| "none came".to_owned())
        })?;
        Ok(answer.unwrap_or_else(|| Err("no answer".to_owned())))
    }

    /// What the watch has shown, as the administrator's transactions want it.
    pub(crate) fn keys(&self) -> Keys {
        let board = self.cluster.board.borrow();
        let mut keys = Keys::default();
        let items = board.keys.values().cloned().collect();
        let _ = keys.add(MetaReply::Range { revision: board.revision, items, more: false });
        keys
    }

    /// Images that began shorter grow while the second workload is at work, one request after the other.
    fn grow_images(&mut self) {
        let options = self.cluster.options.clone();
        let due = self.settled_at.saturating_add(options.safety_ns / 3);
        if !self.striking
            || options.first_image_bytes() == options.image_bytes
            || self.cluster.universe.now < due
        {
            return;
        }
        if self.growing.is_some_and(|number| !self.answered(number)) {
            return;
        }
        self.growing = None;
        let sizes = self.cluster.board.borrow().image_sizes();
        let short = sizes.into_iter().find(|(_, size)| *size < options.image_bytes);
        let Some((name, _)) = short else { return };
        if let Ok((_, request)) = admin::resize_image(&self.keys(), &name, options.image_bytes, false) {
            self.growing = Some(self.post(request));
        }
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
                admin::create_image(keys, POOL, &name, options.first_image_bytes(), 0)
                    .map(|(_, request)| request)
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

    pub(crate) fn read_back(&mut self, limit_ns: u64) -> Result<(), Over> {
        self.cluster.desk.mode.set(Mode::ReadBack);
        self.until(limit_ns, "reading every image", |cluster| {
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
}
