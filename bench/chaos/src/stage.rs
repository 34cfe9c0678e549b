//! One scenario on one cluster: clients and fio at work, the disturbance, and what must hold afterwards.

use crate::error::ChaosError;
use crate::history::{self, Event};
use crate::isolate::Isolation;
use crate::load::{BLOCK, Load, LoadPlan, Sharing, Timeline, Tolerance, read_back};
use crate::rig::{LIMIT, POOL, Programs, Rig, RigPlan};
use crate::rng::Rng;
use crate::scenario::Scenario;
use crate::verify::{self, Verify};
use cli::deadline::{Deadline, Stopwatch};
use cli::stop::Stop;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The image that clients share, and its size: enough for every placement group, and read back in a moment.
pub const IMAGE: &str = "shared";
const BLOCKS: u64 = 8192;
/// fio's image.
const FIO_IMAGE: &str = "fio";

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// The form for every change: each disturbance once.
    pub short: bool,
    /// How long the machine is kept busy in `oversubscribed`.
    pub oversubscribed: Duration,
}

impl Form {
    /// Rounds of a scenario that makes one disturbance per round.
    pub fn rounds(&self) -> u64 {
        if self.short { 1 } else { 5 }
    }
}

/// What a scenario starts with.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The cluster.
    pub rig: RigPlan,
    /// The clients.
    pub load: LoadPlan,
    /// Whether fio works beside them.
    pub fio: bool,
}

impl Default for Setting {
    /// Three nodes, three copies, four clients.
    fn default() -> Self {
        Self {
            rig: RigPlan::default(),
            load: LoadPlan {
                image: IMAGE,
                blocks: BLOCKS,
                clients: 4,
                depth: 6,
                rate: 200,
                sharing: Sharing::Everywhere,
                tolerance: Tolerance::Nothing,
            },
            fio: true,
        }
    }
}

/// What a scenario works with.
pub struct Stage {
    // Dropped in this order: those who use the cluster before the cluster.
    load: Option<Load>,
    verify: Option<Verify>,
    /// The cluster.
    pub rig: Rig,
    /// The clients' common record.
    pub timeline: Arc<Timeline>,
    /// Choices.
    pub rng: Rng,
    /// How long and how often.
    pub form: Form,
    setting: Setting,
    clock: Stopwatch,
}

/// What a scenario that went well has shown.
#[derive(Clone, Copy, Debug)]
pub struct Passed {
    /// Operations of the clients.
    pub operations: u64,
    /// Passes of fio.
    pub passes: u64,
    /// The longest operation.
    pub slowest: Duration,
}

/// The surroundings of a run.
pub struct Surroundings<'a> {
    /// What this process may do.
    pub isolation: &'a Isolation,
    /// What it starts.
    pub programs: &'a Programs,
    /// Ctrl-C.
    pub stop: &'a Stop,
    /// How long and how often.
    pub form: Form,
    /// Where evidence of failures is kept; `None` where a failure is what is expected.
    pub evidence: Option<&'a Path>,
}

/// Runs a scenario from an empty cluster to the check of its disks.
pub fn play(
    scenario: &Scenario,
    seed: u64,
    generation: u32,
    around: &Surroundings<'_>,
) -> Result<Passed, ChaosError> {
    if scenario.needs_links && matches!(around.isolation, Isolation::Shared { .. }) {
        return Err(ChaosError::Impossible("nodes have no network namespaces of their own".into()));
    }
    let mut stage = Stage::open(scenario, seed, generation, around)?;
    let outcome = stage.play(scenario);
    if let (Err(error), Some(place)) = (&outcome, around.evidence)
        && !error.interrupted()
        && !matches!(error, ChaosError::Impossible(_))
    {
        let place = place.join(format!("{}-{seed}", scenario.name));
        let kept = stage.keep_evidence(&place, error);
        stage.say(&match kept {
            Ok(()) => format!("evidence is in {}", place.display()),
            Err(error) => format!("evidence cannot be kept: {error}"),
        });
    }
    outcome
}

impl Stage {
    fn open(
        scenario: &Scenario,
        seed: u64,
        generation: u32,
        around: &Surroundings<'_>,
    ) -> Result<Self, ChaosError> {
        let setting = (scenario.setting)(&around.form);
        let rig = Rig::start(&setting.rig, around.isolation, around.programs, generation, around.stop)?;
        let rng = Rng::new(seed, scenario.name);
        let (timeline, clock) = (Arc::new(Timeline::default()), Stopwatch::start());
        let (load, verify) = (None, None);
        let mut stage = Self { rig, timeline, rng, form: around.form, load, verify, setting, clock };
        let bytes = stage.setting.load.blocks * BLOCK;
        stage.rig.admin.create_image(IMAGE, POOL, bytes)?;
        stage.rig.admin.create_image(FIO_IMAGE, POOL, verify::IMAGE_BYTES)?;
        Ok(stage)
    }

    fn play(&mut self, scenario: &Scenario) -> Result<Passed, ChaosError> {
        let addresses = self.rig.controls();
        let timeline = self.timeline.clone();
        self.load = Some(Load::start(&self.setting.load, timeline, &addresses, &mut self.rng)?);
        if self.setting.fio {
            let dir = self.rig.dir().join("fio");
            std::fs::create_dir_all(&dir).map_err(ChaosError::io(format!("make {}", dir.display())))?;
            self.verify = Some(Verify::start(self.rig.fio_target(FIO_IMAGE), &dir)?);
        }
        self.operations(100)?;
        (scenario.run)(self)?;
        let passes = self.verify.take().map_or(Ok(0), Verify::finish)?;
        let events = self.load.take().map_or(Ok(Vec::new()), Load::finish)?;
        self.settle(events)?;
        let (operations, slowest) = (self.timeline.answered(), self.timeline.slowest());
        Ok(Passed { operations, passes, slowest })
    }

    /// What must hold once all is quiet.
    fn settle(&mut self, mut events: Vec<Event>) -> Result<(), ChaosError> {
        self.rig.wait_clean()?;
        events.extend(read_back(&self.setting.load, &self.timeline, &self.rig.controls())?);
        history::check(events).map_err(|(violation, story)| {
            self.tell_story(&story);
            violation
        })?;
        self.rig.scrub()?;
        self.rig.end()
    }

    fn tell_story(&self, story: &[Event]) {
        let mut text = String::new();
        for event in story {
            let _ = writeln!(text, "{event:?}");
        }
        let path = self.rig.dir().join("history");
        if let Err(error) = std::fs::write(&path, text) {
            self.say(&format!("the block's history cannot be written: {error}"));
        }
    }

    /// A line about what is being done.
    pub fn say(&self, text: &str) {
        eprintln!("  [{:6.1} s] {text}", self.clock.elapsed().as_secs_f64());
    }

    /// The error of a client, of fio or of a node, if one has given up.
    fn check(&mut self) -> Result<(), ChaosError> {
        self.rig.check()?;
        let found = self.load.as_mut().and_then(Load::failure);
        found.or_else(|| self.verify.as_mut().and_then(Verify::failure)).map_or(Ok(()), Err)
    }

    /// Waits until clients have had so many more answers.
    pub fn operations(&mut self, count: u64) -> Result<(), ChaosError> {
        let until = self.timeline.answered() + count;
        let deadline = Deadline::after(LIMIT);
        while self.timeline.answered() < until {
            self.check()?;
            if deadline.passed() {
                return Err(ChaosError::Demand(format!(
                    "clients got fewer than {count} answers in {} s",
                    LIMIT.as_secs()
                )));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until fio has written all of its image once.
    pub fn fio_wrote_all(&mut self) -> Result<(), ChaosError> {
        let deadline = Deadline::after(LIMIT);
        while self.verify.as_ref().is_some_and(|verify| verify.passes() == 0) {
            self.check()?;
            if deadline.passed() {
                return Err(ChaosError::Demand(format!("fio's first pass took over {} s", LIMIT.as_secs())));
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The mean time of so many more operations of the clients.
    pub fn mean_latency(&mut self, count: u64) -> Result<Duration, ChaosError> {
        let (operations, took) = self.timeline.total();
        self.operations(count)?;
        let (operations_now, took_now) = self.timeline.total();
        Ok((took_now - took) / (operations_now - operations).max(1) as u32)
    }

    /// Lets things be for a random time between two numbers of milliseconds.
    pub fn hold_between(&mut self, low: u64, high: u64) -> Result<(), ChaosError> {
        let time = Duration::from_millis(self.rng.between(low, high));
        self.rig.hold(time)
    }

    /// Copies what tells of a failure to a place that outlives us.
    fn keep_evidence(&mut self, place: &Path, error: &ChaosError) -> std::io::Result<()> {
        std::fs::create_dir_all(place)?;
        std::fs::write(place.join("error"), format!("{error}\n"))?;
        for (index, log) in self.rig.logs().iter().enumerate() {
            if log.exists() {
                std::fs::copy(log, place.join(format!("node{}.log", index + 1)))?;
            }
        }
        for (name, args) in
            [("status", &["status"][..]), ("pgs", &["pg", "ls"][..]), ("meta", &["meta", "get", "/"][..])]
        {
            let text = self.rig.command(args).unwrap_or_else(|error| error.to_string());
            std::fs::write(place.join(name), text)?;
        }
        // Whether what fio read is still so tells a lost write from a stale read.
        let image = place.join("fio-image").display().to_string();
        let _ = self.rig.command(&["image", "export", FIO_IMAGE, &image, "--force"]);
        for name in ["history", "fio/fio-verify.log"] {
            let from = self.rig.dir().join(name);
            if from.exists() {
                std::fs::copy(&from, place.join(name.replace('/', "-")))?;
            }
        }
        Ok(())
    }
}
