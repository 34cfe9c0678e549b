//! The simulator's command line. It alone knows real time and threads: a seed runs in one thread, and
//! several seeds run beside each other.
#![allow(clippy::disallowed_methods, reason = "measures itself, reads the seed file, one thread per job")]

use clap::Parser;
use sim::options::{Flavour, Focus};
use sim::planted::{self, Case};
use sim::run::{How, Job, Outcome, Scenario, catch_panic_places, parse_seeds, run};
use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Runs whole Drystone clusters in virtual time under injected faults, and judges what clients saw.
///
/// Everything follows from a seed: sizes, workload, faults, and the order of all events. A seed that fails
/// is printed with every derived option and fails again in the same way.
#[derive(Parser)]
#[command(
    name = "sim",
    after_help = "Examples:
  sim --seeds 300                 300 fresh seeds from the system's entropy
  sim --seeds 300 --from 1        seeds 1 to 300
  sim --for 300                   fresh seeds for five minutes
  sim --seed 17 --trace           one seed, with every event on standard error
  sim --replay-file sim/seeds.txt the failures of the past
  sim --planted                   proof that deliberate bugs are noticed"
)]
struct Args {
    /// Run this one seed.
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "replay_file", "planted"])]
    seed: Option<u64>,
    /// Run this many fresh seeds.
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["replay_file", "planted"])]
    seeds: Option<u64>,
    /// Run fresh seeds for so long; those that have begun then are finished.
    #[arg(long = "for", value_name = "SECONDS", conflicts_with_all = ["seed", "seeds", "replay_file", "planted"])]
    for_secs: Option<u64>,
    /// First of the fresh seeds; drawn from the system's entropy when absent.
    #[arg(long, value_name = "SEED")]
    from: Option<u64>,
    /// Run the seeds of a file: one a line, optionally followed by a scenario and a flavour, then `#` and a comment.
    #[arg(long, value_name = "FILE", conflicts_with = "planted")]
    replay_file: Option<String>,
    /// Run every planted bug until it is noticed, and some seeds without one.
    #[arg(long)]
    planted: bool,
    /// Only planted bugs whose name contains this.
    #[arg(long, value_name = "TEXT", requires = "planted")]
    bug: Option<String>,
    /// Only this scenario; otherwise each seed draws its own.
    #[arg(long)]
    scenario: Option<Scenario>,
    /// Only seeds that break more than redundancy survives: the same as `--scenario beyond`.
    #[arg(long, conflicts_with_all = ["scenario", "planted"])]
    over_tolerance: bool,
    /// Draw some options so that the seeds lead to this corner more often, as `--planted` does.
    #[arg(long, default_value = "none")]
    focus: Focus,
    /// Whether connections go over to RDMA; otherwise each seed draws how many do.
    #[arg(long)]
    flavour: Option<Flavour>,
    /// Run each seed twice and compare the hashes of everything delivered.
    #[arg(long)]
    twice: bool,
    /// Seeds run beside each other; as many as there are cores when absent.
    #[arg(long, value_name = "COUNT")]
    jobs: Option<usize>,
    /// Print every event and log line to standard error.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Print events from this virtual second on.
    #[arg(long, value_name = "SECOND", requires = "trace", default_value_t = 0)]
    trace_from: u64,
    /// Print events up to this virtual second.
    #[arg(long, value_name = "SECOND", requires = "trace", default_value_t = u64::MAX / 1_000_000_000)]
    trace_to: u64,
}

/// Virtual time in front of each log line of the services.
struct VirtualTime;

impl tracing_subscriber::fmt::time::FormatTime for VirtualTime {
    fn format_time(&self, w: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        write!(w, "{}", simenv::trace::stamp(simenv::trace::log_time()))
    }
}

/// The nodes' own log lines, as `RUST_LOG` chooses them, with virtual times.
fn start_log() {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let wanted = std::env::var("RUST_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let lines = tracing_subscriber::fmt::layer()
        .with_timer(VirtualTime)
        .with_ansi(false)
        .with_writer(std::io::stderr);
    let filter = wanted.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    tracing_subscriber::registry().with(lines).with(filter).init();
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    if args.over_tolerance {
        args.scenario = Some(Scenario::Beyond);
    }
    catch_panic_places();
    if args.trace {
        start_log();
    }
    if args.planted {
        return run_planted(&args);
    }
    let jobs = match seeds_of(&args) {
        Ok(jobs) => jobs,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    run_seeds(&args, jobs)
}

fn seeds_of(args: &Args) -> Result<Vec<Job>, String> {
    let job = |seed| Job { seed, scenario: args.scenario, flavour: args.flavour };
    if let Some(seed) = args.seed {
        return Ok(vec![job(seed)]);
    }
    if let Some(file) = &args.replay_file {
        let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {file}: {error}"))?;
        return parse_seeds(&text).map_err(|line| format!("{file}: not a seed: {line}"));
    }
    let from = match args.from {
        Some(from) => from,
        None => u64::from(getrandom::u32().map_err(|error| format!("no entropy: {error}"))?) << 16,
    };
    let count = args.seeds.unwrap_or(if args.for_secs.is_some() { SEEDS_IN_TIME_MAX } else { 1 });
    Ok((0..count).map(|nth| job(from.wrapping_add(nth))).collect())
}

fn workers(args: &Args) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    args.jobs.unwrap_or(cores).max(1)
}

/// How long a seed may take. One takes seconds: this one goes round and round without virtual time passing.
const SEED_LIMIT: Duration = Duration::from_secs(120);

/// Seeds that are drawn for a run that ends by the clock: more than a day's.
const SEEDS_IN_TIME_MAX: u64 = 1_000_000;

/// Which seeds run, and since when.
#[derive(Default)]
struct Running(Mutex<BTreeMap<u64, Instant>>);

impl Running {
    fn seeds(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the program when a seed takes too long; returns when `ended` says so.
    fn watch(&self, ended: &Receiver<()>) {
        while ended.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
            let stuck =
                self.seeds().iter().find(|(_, since)| since.elapsed() > SEED_LIMIT).map(|(seed, _)| *seed);
            if let Some(seed) = stuck {
                println!("FAILED seed {seed}: not done after {SEED_LIMIT:?}");
                std::process::exit(1);
            }
        }
    }
}

/// Works through a queue on several threads; `work` gets an item, `done` its result, one at a time.
fn in_parallel<T: Send, R: Send>(
    threads: usize,
    items: Vec<T>,
    until: Option<Instant>,
    work: impl Fn(T) -> R + Sync,
    done: impl FnMut(R) + Send,
) {
    let queue = Mutex::new(VecDeque::from(items));
    let done = Mutex::new(done);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while until.is_none_or(|until| Instant::now() < until) {
                    let item = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(item) = item else { return };
                    let result = work(item);
                    (done.lock().unwrap_or_else(PoisonError::into_inner))(result);
                }
            });
        }
    });
}

fn run_seeds(args: &Args, jobs: Vec<Job>) -> ExitCode {
    let began = Instant::now();
    let single = args.seed.is_some();
    let first = jobs.first().map_or(0, |job| job.seed);
    let (count, mut ran, mut failed, mut virtual_ns, mut operations) = (jobs.len(), 0u64, 0u64, 0u64, 0u64);
    let trace = args.trace.then_some((args.trace_from * 1_000_000_000, args.trace_to * 1_000_000_000));
    let (twice, focus, for_secs) = (args.twice, args.focus, args.for_secs);
    let running = Running::default();
    let work = |Job { seed, scenario, flavour }: Job| {
        let how = How { scenario, trace, focus, flavour, ..How::default() };
        running.seeds().insert(seed, Instant::now());
        let mut outcome = run(seed, how);
        if twice {
            let again = run(seed, how);
            if again.trace_hash != outcome.trace_hash {
                outcome.violations.push(format!(
                    "determinism: two runs of the seed have the hashes {:016x} and {:016x}",
                    outcome.trace_hash, again.trace_hash
                ));
            }
        }
        running.seeds().remove(&seed);
        outcome
    };
    let report = |outcome: Outcome| {
        ran += 1;
        virtual_ns += outcome.virtual_ns;
        operations += outcome.operations;
        if !outcome.violations.is_empty() {
            failed += 1;
            println!("FAILED {outcome}");
        } else if single {
            println!("{outcome}");
        } else if ran.is_multiple_of(50) {
            match for_secs {
                Some(secs) => println!(
                    "{ran} seeds in {:.0} of {secs} s, {failed} failed",
                    began.elapsed().as_secs_f64()
                ),
                None => println!("{ran} of {count} seeds, {failed} failed"),
            }
        }
        let _ = std::io::stdout().flush();
    };
    let (end, ended) = channel();
    let watched = &running;
    std::thread::scope(|scope| {
        scope.spawn(move || watched.watch(&ended));
        let until = args.for_secs.map(|secs| began + Duration::from_secs(secs));
        in_parallel(if single { 1 } else { workers(args) }, jobs, until, work, report);
        drop(end);
    });
    let took = began.elapsed().as_secs_f64().max(0.001);
    let virtual_s = virtual_ns as f64 / 1e9;
    println!(
        "{ran} seeds from {first}, {failed} failed; {operations} client operations, {virtual_s:.0} simulated \
         seconds in {took:.1} s: {:.0} seeds/min, {:.0} simulated seconds per second",
        ran as f64 * 60.0 / took,
        virtual_s / took
    );
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn run_planted(args: &Args) -> ExitCode {
    let began = Instant::now();
    let first = args.from.unwrap_or(1);
    let wanted = args.bug.clone().unwrap_or_default();
    let named = args.bug.is_some();
    let cases: Vec<Case> = planted::cases().into_iter().filter(|case| case.name.contains(&wanted)).collect();
    let (cases, left_out): (Vec<Case>, Vec<Case>) =
        cases.into_iter().partition(|case| named || case.left_out.is_none());
    let all = cases.len();
    let (mut caught, mut missed) = (0, Vec::new());
    println!("{:<40} {:>5} {:>7}  noticed by", "bug", "seeds", "seconds");
    let clock = || began.elapsed();
    let work = |case: Case| {
        let result = planted::hunt(&case, first, &clock);
        (case, result)
    };
    in_parallel(workers(args), cases, None, work, |(case, result)| {
        let seeds = result.seeds.map_or_else(|| "-".to_owned(), |seeds| seeds.to_string());
        let by: String = result.by.chars().take(110).collect();
        println!("{:<40} {seeds:>5} {:>7.1}  {by}", case.name, result.took.as_secs_f64());
        match result.seeds {
            Some(_) => caught += 1,
            None => missed.push(case.name),
        }
    });
    let control = planted::control_run(first);
    if let Some(outcome) = &control {
        println!("without a bug: FAILED {outcome}");
    } else {
        println!("without a bug: {} seeds of each scenario and corner are green", planted::CONTROL_SEEDS);
    }
    for case in &left_out {
        println!("left out: {}: {}", case.name, case.left_out.unwrap_or_default());
    }
    println!("{caught} of {all} planted bugs noticed; missed: {missed:?}");
    if missed.is_empty() && control.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
