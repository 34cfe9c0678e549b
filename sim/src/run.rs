//! One seed, from its options to its verdict.

use crate::options::{Flavour, Focus, Options};
use crate::{meta, solo, world};
use simenv::rng::Stream;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Which world a seed builds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Scenario {
    /// A whole cluster with clients.
    Cluster,
    /// One slice store alone.
    Store,
    /// A whole cluster of which more is broken than redundancy survives.
    Beyond,
    /// A whole cluster under the second workload.
    Apps,
    /// The metadata store alone, under clients of its own.
    Meta,
}

impl Scenario {
    /// Every one.
    pub const ALL: [Self; 5] = [Self::Cluster, Self::Store, Self::Beyond, Self::Apps, Self::Meta];

    fn of_word(word: &str) -> Option<Self> {
        use clap::ValueEnum;
        Self::from_str(word, false).ok()
    }
}

/// A deliberate bug in one of the rooms.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Planted {
    /// In the slice store.
    Store(store::Bug),
    /// In the data core.
    Engine(engine::planted::Bug),
    /// In the control core.
    Control(control::planted::Bug),
    /// In the metadata store.
    Consensus(consensus::planted::Bug),
    /// In the client.
    Client(client::planted::Bug),
}

impl Planted {
    /// The store's switch.
    pub fn store(self) -> Option<store::Bug> {
        if let Self::Store(bug) = self { Some(bug) } else { None }
    }
    /// The data core's switch.
    pub fn engine(self) -> engine::Planted {
        if let Self::Engine(bug) = self { engine::Planted::with(bug) } else { engine::Planted::none() }
    }
    /// The control core's switch.
    pub fn control(self) -> control::Planted {
        if let Self::Control(bug) = self { control::Planted::with(bug) } else { control::Planted::none() }
    }
    /// The metadata store's switch.
    pub fn consensus(self) -> consensus::planted::Planted {
        match self {
            Self::Consensus(bug) => consensus::planted::Planted::with(bug),
            _ => consensus::planted::Planted::none(),
        }
    }
    /// The client's switch.
    pub fn client(self) -> Option<client::planted::Bug> {
        if let Self::Client(bug) = self { Some(bug) } else { None }
    }
}

/// How to run a seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// Forces the scenario; otherwise the seed draws it.
    pub scenario: Option<Scenario>,
    /// A deliberate bug.
    pub planted: Option<Planted>,
    /// Print every event between these virtual times.
    pub trace: Option<(u64, u64)>,
    /// Where a deliberate bug is looked for.
    pub focus: Focus,
    /// Forces how connections go; otherwise the seed draws it.
    pub flavour: Option<Flavour>,
}

/// What a seed showed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// The scenario it ran.
    pub scenario: Scenario,
    /// Every derived option, for a report.
    pub options: String,
    /// What went wrong; empty when nothing did.
    pub violations: Vec<String>,
    /// Hash of everything delivered.
    pub trace_hash: u64,
    /// Virtual time that passed.
    pub virtual_ns: u64,
    /// Client operations, or mutations of the store.
    pub operations: u64,
    /// What happened, in a line.
    pub summary: String,
}

/// Which scenario a seed draws.
pub fn scenario_of(seed: u64) -> Scenario {
    if Stream::new(seed, "scenario").chance(250_000) {
        return Scenario::Store;
    }
    Stream::new(seed, "cluster scenario")
        .weighted((12, Scenario::Cluster), &[(3, Scenario::Apps), (3, Scenario::Meta), (1, Scenario::Beyond)])
}

fn options_of(seed: u64, scenario: Scenario, how: How) -> Options {
    let options = match scenario {
        Scenario::Beyond => Options::draw_beyond(seed),
        Scenario::Apps => Options::draw_apps(seed),
        Scenario::Meta => Options::draw_meta(seed),
        _ => Options::draw_for(seed, how.focus),
    };
    options.with(how.flavour)
}

/// Runs a seed. A panic of the code under test is a violation like any other.
pub fn run(seed: u64, how: How) -> Outcome {
    let scenario = how.scenario.unwrap_or_else(|| scenario_of(seed));
    let options = match scenario {
        Scenario::Cluster | Scenario::Beyond | Scenario::Apps => options_of(seed, scenario, how).to_string(),
        Scenario::Store => solo::SoloOptions::draw(seed).to_string(),
        _ => options_of(seed, scenario, how).to_string(),
    };
    let mut outcome = Outcome {
        seed,
        scenario,
        options,
        violations: Vec::new(),
        trace_hash: 0,
        virtual_ns: 0,
        operations: 0,
        summary: String::new(),
    };
    let result = catch_unwind(AssertUnwindSafe(|| match scenario {
        Scenario::Cluster | Scenario::Beyond | Scenario::Apps | Scenario::Meta => {
            let options = options_of(seed, scenario, how);
            let world = if scenario == Scenario::Meta { meta::run } else { world::run };
            let seen = world(options, how.planted, how.trace);
            (seen.violations, seen.trace_hash, seen.virtual_ns, seen.operations, seen.summary)
        }
        Scenario::Store => {
            let seen = solo::run(seed, how.planted.and_then(Planted::store), how.trace);
            let summary = format!("{} mutations", seen.mutations);
            (seen.violations, seen.trace_hash, seen.virtual_ns, seen.mutations, summary)
        }
    }));
    match result {
        Ok((violations, trace_hash, virtual_ns, operations, summary)) => {
            outcome.summary = summary;
            outcome.violations = violations;
            outcome.trace_hash = trace_hash;
            outcome.virtual_ns = virtual_ns;
            outcome.operations = operations;
        }
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "(no text)".to_owned());
            outcome.violations.push(format!(
                "panic at {}: {text}{}",
                simenv::trace::stamp(simenv::trace::log_time()),
                take_panic_place()
            ));
        }
    }
    outcome
}

/// A seed and how it is to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Job {
    /// The seed.
    pub seed: u64,
    /// Its scenario; otherwise it draws its own.
    pub scenario: Option<Scenario>,
    /// How connections go; otherwise it draws that.
    pub flavour: Option<Flavour>,
}

/// Reads a file of past failures: one seed a line, optionally followed by a scenario and a flavour, then `#` and a
/// comment. The error is the line that is none.
pub fn parse_seeds(text: &str) -> Result<Vec<Job>, String> {
    use clap::ValueEnum;
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines
        .filter(|line| !line.is_empty())
        .map(|line| {
            let mut words = line.split_whitespace();
            let seed = words.next().and_then(|word| word.parse().ok()).ok_or_else(|| line.to_owned())?;
            let mut job = Job { seed, scenario: None, flavour: None };
            for word in words {
                match (Scenario::of_word(word), Flavour::from_str(word, false)) {
                    (Some(scenario), _) => job.scenario = Some(scenario),
                    (None, Ok(flavour)) => job.flavour = Some(flavour),
                    (None, Err(_)) => return Err(line.to_owned()),
                }
            }
            Ok(job)
        })
        .collect()
}

thread_local! {
    static PANIC_PLACE: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
}

/// Keeps where a panic happened for the report, instead of printing it in the middle of everything.
pub fn catch_panic_places() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        PANIC_PLACE.with(|slot| *slot.borrow_mut() = place);
    }));
}

fn take_panic_place() -> String {
    PANIC_PLACE.with(|slot| std::mem::take(&mut *slot.borrow_mut()))
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {} ({:?}): {} violation(s)", self.seed, self.scenario, self.violations.len())?;
        for violation in self.violations.iter().take(5) {
            writeln!(f, "  - {violation}")?;
        }
        writeln!(f, "  {}", self.summary)?;
        writeln!(
            f,
            "  virtual time {} s, trace hash {:016x}",
            simenv::trace::stamp(self.virtual_ns),
            self.trace_hash
        )?;
        writeln!(f, "  {}", self.options.replace('\n', "\n  "))
    }
}
