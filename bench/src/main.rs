//! `bench`: Drystone's figures in the one-core setting, printed as a table and written to
//! `target/bench/results.json`.
//!
//! Three single-reactor nodes with disks on tmpfs and fio with our engine share one core, so that the
//! figures are software cost and nothing else; plain fio on a tmpfs file on the same core, in the same
//! minute, is the yardstick R; what the machine's sockets cost is measured beside it (`echo`). `rows` says what
//! is measured and what is to be reached, `setting` makes the cluster and pins everything, `report` prints and
//! writes.
//!
//! This room may know the client, and the parts of `cli` that start nodes and fio. Start reading at `run`.

mod echo;
mod report;
mod rows;
mod setting;

use clap::Parser;
use cli::error::CliError;
use cli::fio::{FioResult, Target};
use cli::scrape::Counters;
use report::{Measured, Report};
use rows::{ROWS, Row};
use setting::Setting;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Measures Drystone's figures on one core of this machine.
#[derive(Parser, Debug)]
#[command(name = "bench", after_help = "Needs fio 3.33 and about 14 GiB free in /dev/shm.")]
struct Args {
    /// One short run of each row instead of five: to see that it works, not to quote
    #[arg(long)]
    quick: bool,
    /// Runs of each row; the median counts
    #[arg(long)]
    runs: Option<usize>,
    /// Seconds of each fio run
    #[arg(long)]
    seconds: Option<u32>,
    /// Only rows whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// The CPU to pin everything to [default: the last one this process may use]
    #[arg(long)]
    cpu: Option<usize>,
    /// Where the disks' files are made: a tmpfs
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Be the other end of the round trips measured (this program starts itself with it)
    #[arg(long = echo::FLAG, hide = true)]
    answer_to: Option<SocketAddr>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::output::report(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), CliError> {
    if let Some(to) = args.answer_to {
        return echo::answer(to);
    }
    let runs = args.runs.unwrap_or(if args.quick { 1 } else { 5 }).max(1);
    let seconds = args.seconds.unwrap_or(if args.quick { 1 } else { 4 });
    let wanted = |name: &str| args.only.as_ref().is_none_or(|part| name.contains(part.as_str()));
    cli::fio::check()?;
    let cpu = setting::pin(args.cpu)?;
    let mut report = Report::new(cpu, runs, seconds);

    if wanted(rows::START) || wanted(rows::RSS) {
        progress("starting and idling, three nodes with empty 10 GiB disks");
        let idle = setting::start_and_idle(&args.dir, runs)?;
        report.add_single(rows::START, "s", idle.start_to_active, rows::START_REACH);
        report.add_single(rows::RSS, "MB", idle.resident_mb, rows::RSS_REACH);
    }

    let rows: Vec<&Row> = ROWS.iter().filter(|row| wanted(row.name)).collect();
    if !rows.is_empty() {
        let mut setting = Setting::new(&args.dir)?;
        progress("filling the image and the plain file");
        setting.fill()?;
        for round in 1..=runs {
            for yardstick in &echo::YARDSTICKS {
                report.add_yardstick(yardstick, echo::measure_us(yardstick)?);
            }
            for row in &rows {
                progress(&format!("run {round} of {runs}: {}", row.name));
                measure(&mut setting, &mut report, row, seconds)?;
            }
        }
        setting.end()?;
    }
    report.print()?;
    report.write()
}

/// One run of a row: plain fio first, then fio on the cluster, on the same core.
fn measure(setting: &mut Setting, report: &mut Report, row: &Row, seconds: u32) -> Result<(), CliError> {
    let plain = setting.fio(row, &Target::File(setting.plain_file.clone()), seconds)?;
    let plain = Measured::of(row, &plain, plain.cpu, None);

    let counters = setting.counters()?;
    let cpu = setting.nodes_cpu()?;
    let result: FioResult = setting.fio(row, &setting.image_target(), seconds)?;
    let cpu: Duration = setting.nodes_cpu()?.saturating_sub(cpu) + result.cpu;
    let counted: Counters = setting.counters()?.since(&counters);
    report.add(row, plain, Measured::of(row, &result, cpu, Some(counted)));
    Ok(())
}

fn progress(text: &str) {
    eprintln!("bench: {text}");
}
