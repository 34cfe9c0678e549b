//! `chaos`: real node processes, harmed on purpose while clients write, and what must hold meanwhile and
//! afterwards; and `failover`, the same harm measured with a stopwatch.
//!
//! `isolate` puts this program into namespaces of its own, `net` makes a link per node that can be cut, `rig` is
//! a cluster of processes, `load` are clients whose operations `history` checks, `verify` is stock fio beside
//! them. `scenario/` has what is done to the cluster, `stage` what surrounds every scenario, `failover` the
//! trials with their `writer`, `background` what recovery and scrub cost clients. docs/chaos.md explains what is
//! demanded.
//!
//! This room may know the client, and the parts of `cli` that start nodes and fio. Start reading at `stage`.

mod background;
mod error;
mod failover;
mod faulty;
mod history;
mod isolate;
mod load;
mod net;
mod rig;
mod rng;
mod scenario;
mod stage;
mod trials;
mod verify;
mod writer;

use background::BackgroundPlan;
use clap::{Args, Parser, Subcommand};
use cli::deadline::Stopwatch;
use cli::error::CliError;
use cli::output::{self, Table};
use cli::stop::Stop;
use error::ChaosError;
use failover::FailoverPlan;
use isolate::Isolation;
use rig::Programs;
use stage::{Form, Surroundings};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use trials::Kind;

/// How long the machine is kept busy, in seconds: short form, full form.
const OVERSUBSCRIBED_SECONDS: (u64, u64) = (30, 600);

/// Harms a cluster of real processes on this machine and checks what clients see.
#[derive(Parser, Debug)]
#[command(name = "chaos")]
struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run scenarios and check every read, every copy and every disk
    Run(RunArgs),
    /// Measure the longest pause that a client sees
    Failover(FailoverArgs),
    /// Measure what recovery and scrub cost clients
    Background(BackgroundArgs),
    /// Show that lost writes are seen: all disks are put back to an older state, and the check must fail
    Prove(Common),
    /// List scenarios
    Ls,
}

/// What both share.
#[derive(Args, Debug)]
struct Common {
    /// Seed of all choices [default: a fresh one, printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Nodes on the machine's loopback, even where they could have networks of their own
    #[arg(long)]
    loopback: bool,
    /// Where results and the evidence of failures go [default: target/chaos]
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct RunArgs {
    #[command(flatten)]
    common: Common,
    /// Only these scenarios
    names: Vec<String>,
    /// Each disturbance once
    #[arg(long)]
    short: bool,
    /// Seconds for which `oversubscribed` keeps the machine busy
    #[arg(long, value_name = "SECONDS")]
    oversubscribed: Option<u64>,
    /// Go through all scenarios so many times, with another seed each time
    #[arg(long, default_value_t = 1)]
    repeat: u64,
    /// Go on with the next scenario after a failure
    #[arg(long)]
    keep_going: bool,
}

#[derive(Args, Debug)]
struct FailoverArgs {
    #[command(flatten)]
    common: Common,
    /// Only these kinds
    #[arg(value_enum)]
    kinds: Vec<Kind>,
    /// Trials of each kind
    #[arg(long, default_value_t = 50)]
    trials: usize,
    /// Report only: a gap that is too long is no failure
    #[arg(long)]
    no_limits: bool,
}

#[derive(Args, Debug)]
struct BackgroundArgs {
    #[command(flatten)]
    common: Common,
    /// How often everything is measured
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each fio run
    #[arg(long, default_value_t = 5)]
    seconds: u32,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Failover(args) => failover(&args),
        Command::Background(args) => background(&args),
        Command::Prove(common) => prove(&common),
        Command::Ls => list(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list() -> Result<bool, ChaosError> {
    let mut table = Table::new(&["NAME", "WHAT HAPPENS"]);
    for scenario in &scenario::ALL {
        table.row([scenario.name.to_string(), scenario.about.to_string()]);
    }
    table.print()?;
    Ok(true)
}

impl Common {
    /// Namespaces, programs, signals, and the directory for results. The program starts anew inside.
    fn prepare(&self) -> Result<(Isolation, Programs, Stop, PathBuf), ChaosError> {
        let isolation = isolate::enter(self.loopback)?;
        if let Isolation::Shared { why } = &isolation {
            eprintln!("chaos: nodes share this machine's loopback, nothing is cut or slowed down: {why}");
        }
        let stop = Stop::on_signals().map_err(ChaosError::io("catch signals"))?;
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
        let out = self.out.clone().unwrap_or_else(|| target.join("chaos"));
        std::fs::create_dir_all(&out).map_err(ChaosError::io(format!("make {}", out.display())))?;
        Ok((isolation, Programs::find()?, stop, out))
    }

    fn seed(&self) -> Result<u64, ChaosError> {
        let fresh = || getrandom::u64().map_err(|error| ChaosError::Demand(format!("no seed: {error}")));
        // Short enough to be typed.
        self.seed.map_or_else(|| fresh().map(|seed| seed % 1_000_000_000), Ok)
    }
}

/// How a scenario ended, as a row of the table.
fn row(name: &str, seed: u64, took: Duration, outcome: &Result<stage::Passed, ChaosError>) -> [String; 7] {
    let (operations, passes, slowest, result) = match outcome {
        Ok(passed) => (
            passed.operations.to_string(),
            passed.passes.to_string(),
            format!("{:.0}", passed.slowest.as_secs_f64() * 1e3),
            "ok".to_string(),
        ),
        Err(error) => {
            let result = match error {
                ChaosError::Impossible(why) => format!("skipped: {why}"),
                error if error.interrupted() => "interrupted".to_string(),
                _ => "FAILED".to_string(),
            };
            ("-".into(), "-".into(), "-".into(), result)
        }
    };
    let seconds = format!("{:.1}", took.as_secs_f64());
    [name.into(), seed.to_string(), seconds, operations, slowest, passes, result]
}

fn run(args: &RunArgs) -> Result<bool, ChaosError> {
    if let Some(unknown) = args.names.iter().find(|name| scenario::ALL.iter().all(|s| s.name != **name)) {
        return Err(ChaosError::Demand(format!("there is no scenario '{unknown}'; `chaos ls` lists them")));
    }
    let (isolation, programs, stop, out) = args.common.prepare()?;
    cli::fio::check()?;
    let first_seed = args.common.seed()?;
    let seconds = if args.short { OVERSUBSCRIBED_SECONDS.0 } else { OVERSUBSCRIBED_SECONDS.1 };
    let oversubscribed = Duration::from_secs(args.oversubscribed.unwrap_or(seconds));
    let form = Form { short: args.short, oversubscribed };
    let around =
        Surroundings { isolation: &isolation, programs: &programs, stop: &stop, form, evidence: Some(&out) };
    let headings = ["SCENARIO", ">SEED", ">SECONDS", ">OPERATIONS", ">SLOWEST ms", ">FIO PASSES", "RESULT"];
    let mut table = Table::new(&headings);
    let (mut generation, mut failed) = (0, None);
    let wanted = |name: &str| args.names.is_empty() || args.names.iter().any(|wanted| wanted == name);
    'all: for round in 0..args.repeat {
        let seed = first_seed + round;
        for scenario in scenario::ALL.iter().filter(|scenario| wanted(scenario.name)) {
            eprintln!("chaos: {} (seed {seed}): {}", scenario.name, scenario.about);
            let watch = Stopwatch::start();
            let outcome = stage::play(scenario, seed, generation, &around);
            generation += 1;
            table.row(row(scenario.name, seed, watch.elapsed(), &outcome));
            match outcome {
                Err(error) if error.interrupted() => {
                    table.print()?;
                    return Err(CliError::Interrupted.into());
                }
                Err(ChaosError::Impossible(why)) => eprintln!("  skipped: {why}"),
                Err(error) => {
                    eprintln!("  FAILED: {error}");
                    failed.get_or_insert(scenario.name);
                    if !args.keep_going {
                        break 'all;
                    }
                }
                Ok(_) => {}
            }
        }
    }
    table.print()?;
    output::line(&match failed {
        None => "chaos: ok".to_string(),
        Some(name) => format!("chaos: FAILED in {name}; `--seed {first_seed} {name}` makes the same choices"),
    })?;
    Ok(failed.is_none())
}

fn prove(common: &Common) -> Result<bool, ChaosError> {
    let (isolation, programs, stop, _) = common.prepare()?;
    let form = Form { short: true, oversubscribed: Duration::ZERO };
    let around =
        Surroundings { isolation: &isolation, programs: &programs, stop: &stop, form, evidence: None };
    let (scenario, seed) = (&scenario::ROLLED_BACK, common.seed()?);
    eprintln!("chaos: {} (seed {seed}): {}", scenario.name, scenario.about);
    match stage::play(scenario, seed, 0, &around) {
        Err(ChaosError::History(violation)) => {
            output::line(&format!("chaos: seen: {violation}"))?;
            Ok(true)
        }
        Err(error) => Err(error),
        Ok(_) => Err(ChaosError::Demand("lost writes were not seen".into())),
    }
}

fn failover(args: &FailoverArgs) -> Result<bool, ChaosError> {
    let (isolation, programs, stop, out) = args.common.prepare()?;
    let kinds = if args.kinds.is_empty() { trials::ALL.to_vec() } else { args.kinds.clone() };
    let plan = FailoverPlan { kinds, trials: args.trials, seed: args.common.seed()? };
    eprintln!("failover: seed {}", plan.seed);
    let trials = failover::measure(&plan, &isolation, &programs, &stop)?;
    trials.print()?;
    let path = out.join("failover.json");
    trials.write(&path)?;
    output::line(&format!("written to {}", path.display()))?;
    let reached = trials.reached();
    output::line(match (reached, args.no_limits) {
        (true, _) => "failover: ok",
        (false, true) => "failover: reported; not every limit was kept",
        (false, false) => "failover: FAILED: not every limit was kept",
    })?;
    Ok(reached || args.no_limits)
}

fn background(args: &BackgroundArgs) -> Result<bool, ChaosError> {
    let (isolation, programs, stop, out) = args.common.prepare()?;
    cli::fio::check()?;
    let plan = BackgroundPlan { rounds: args.rounds, seconds: args.seconds };
    let measured = background::measure(&plan, &isolation, &programs, &stop)?;
    measured.print()?;
    let path = out.join("background.json");
    measured.write(&path)?;
    output::line(&format!("written to {}", path.display()))?;
    Ok(true)
}
