//! The simulator's command line.

use clap::Parser;
use sim::run::{How, Outcome, Scenario, run};
use std::process::ExitCode;

/// Runs whole Drystone clusters in virtual time, from a seed, with faults, and judges what clients saw.
#[derive(Parser)]
struct Args {
    /// Replay this one seed.
    #[arg(long, conflicts_with_all = ["seeds", "replay_file"])]
    seed: Option<u64>,
    /// Run this many fresh seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// First of the fresh seeds.
    #[arg(long)]
    from: Option<u64>,
    /// Only this scenario.
    #[arg(long)]
    scenario: Option<Scenario>,
    /// Print every event.
    #[arg(long)]
    trace: bool,
    /// Replay file.
    #[arg(long)]
    replay_file: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    sim::run::catch_panic_places();
    let how = How { scenario: args.scenario, planted: None, trace: args.trace.then_some((0, u64::MAX)) };
    let seeds: Vec<u64> = match (args.seed, args.seeds) {
        (Some(seed), _) => vec![seed],
        (_, Some(count)) => (args.from.unwrap_or(1)..args.from.unwrap_or(1) + count).collect(),
        _ => vec![1],
    };
    let mut failed = 0;
    let mut virtual_ns = 0;
    let mut operations = 0;
    for seed in seeds {
        let outcome: Outcome = run(seed, how);
        virtual_ns += outcome.virtual_ns;
        operations += outcome.operations;
        if args.seed.is_some() {
            println!("{}", outcome.summary);
        }
        if !outcome.violations.is_empty() {
            failed += 1;
            println!("{outcome}");
        }
    }
    println!("failed {failed}, {} virtual s, {operations} ops", virtual_ns / 1_000_000_000);
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
