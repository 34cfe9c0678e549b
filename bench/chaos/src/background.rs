//! What recovery and scrub cost clients: fio's latencies while the cluster rests, while it brings a node up to date
//! that has missed a change of everything, and while it compares all copies of everything.
//!
//! The three states take turns, so that a machine that is slower for a while is so for all of them.

use crate::error::ChaosError;
use crate::isolate::Isolation;
use crate::rig::{POOL, Programs, Rig, RigPlan};
use cli::deadline::{Deadline, Stopwatch};
use cli::error::CliError;
use cli::fio::{FioJob, FioResult};
use cli::health::ClusterStatus;
use cli::output::Table;
use cli::stop::Stop;
use serde_json::json;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use wire::OBJECT_BYTES;

const IMAGE: &str = "background";
/// Recovered in some seconds when nothing else is to be done, and in more than a run beside clients.
const IMAGE_BYTES: u64 = 1 << 30;
/// The node that misses changes.
const VICTIM: usize = 2;
/// What clients do: fio's name of it, and operations under way.
const JOBS: [(&str, u32); 3] = [("randwrite", 1), ("randwrite", 16), ("randread", 16)];
/// Beyond its seconds a run may take so long.
const RUN_LIMIT: Duration = Duration::from_secs(300);

/// What is measured.
#[derive(Clone, Debug)]
pub struct BackgroundPlan {
    /// How often.
    pub rounds: usize,
    /// Length of each run of fio.
    pub seconds: u32,
}

/// What the cluster does beside clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum During {
    /// Nothing.
    Rest,
    /// It recovers.
    Recovery,
    /// It compares all copies of everything.
    Scrub,
}

impl fmt::Display for During {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rest => "rest",
            Self::Recovery => "recovery",
            Self::Scrub => "scrub",
        })
    }
}

/// One run of fio.
struct Run {
    job: (&'static str, u32),
    during: During,
    fio: FioResult,
    /// Bytes per second that were recovered meanwhile.
    recovered: f64,
    /// There was still something to recover at its end.
    to_the_end: bool,
}

/// Everything.
pub struct Measured {
    runs: Vec<Run>,
    /// Bytes per second of recovery without clients.
    alone: Vec<f64>,
}

struct Bench {
    rig: Rig,
    seconds: u32,
}

/// Measures.
pub fn measure(
    plan: &BackgroundPlan,
    isolation: &Isolation,
    programs: &Programs,
    stop: &Stop,
) -> Result<Measured, ChaosError> {
    let setting = RigPlan { disk_bytes: 4 << 30, ..RigPlan::default() };
    let mut rig = Rig::start(&setting, isolation, programs, 0, stop)?;
    rig.admin.create_image(IMAGE, POOL, IMAGE_BYTES)?;
    let mut bench = Bench { rig, seconds: plan.seconds };
    bench.overwrite()?;
    let mut measured = Measured { runs: Vec::new(), alone: Vec::new() };
    for round in 1..=plan.rounds {
        measured.alone.push(bench.alone()?);
        for job in JOBS {
            for during in [During::Rest, During::Recovery, During::Scrub] {
                bench.rig.wait_clean()?;
                let run = bench.run(job, during)?;
                eprintln!(
                    "background: {round}/{}: {} at depth {}, {during}: p99 {:.0} us",
                    plan.rounds, job.0, job.1, run.fio.p99_us
                );
                measured.runs.push(run);
            }
        }
    }
    bench.rig.wait_clean()?;
    bench.rig.end()?;
    Ok(measured)
}

impl Bench {
    fn fio(&mut self, job: &FioJob) -> Result<FioResult, ChaosError> {
        let mut run = job.spawn(&self.rig.fio_target(IMAGE), self.rig.dir())?;
        let deadline = Deadline::after(Duration::from_secs(self.seconds.into()) + RUN_LIMIT);
        let slow = || CliError::TimedOut { what: "a run of fio to end".into(), seconds: RUN_LIMIT.as_secs() };
        Ok(run.wait_until(deadline)?.ok_or_else(slow)?)
    }

    /// Changes every object.
    fn overwrite(&mut self) -> Result<(), ChaosError> {
        let extra = vec![format!("--size={IMAGE_BYTES}")];
        self.fio(&FioJob { name: "overwrite".into(), rw: "write", bs: "1m", depth: 16, extra })?;
        Ok(())
    }

    fn missing(&mut self) -> Result<u64, ChaosError> {
        Ok(ClusterStatus::read(&mut self.rig.admin)?.pgs.missing)
    }

    /// A node misses a change of everything, is back, and nothing is recovered yet.
    fn fall_behind(&mut self) -> Result<(), ChaosError> {
        self.rig.wait_clean()?;
        self.rig.command(&["set", "norecover"])?;
        self.rig.kill(VICTIM)?;
        self.rig.wait_replaced(VICTIM)?;
        self.overwrite()?;
        self.rig.start_nodes(&[VICTIM])?;
        let objects = IMAGE_BYTES / OBJECT_BYTES as u64;
        self.rig.wait_until("all that the node has missed to be known", |rig| {
            Ok(ClusterStatus::read(&mut rig.admin)?.pgs.missing >= objects)
        })
    }

    /// Recovers without clients.
    fn alone(&mut self) -> Result<f64, ChaosError> {
        self.fall_behind()?;
        let watch = Stopwatch::start();
        self.rig.command(&["unset", "norecover"])?;
        self.rig.wait_clean()?;
        Ok(IMAGE_BYTES as f64 / watch.elapsed().as_secs_f64())
    }

    fn run(&mut self, job: (&'static str, u32), during: During) -> Result<Run, ChaosError> {
        if during == During::Recovery {
            self.fall_behind()?;
            self.rig.command(&["unset", "norecover"])?;
        }
        let scrubs = (during == During::Scrub).then(|| Scrubs::start(&self.rig)).transpose()?;
        let before = self.missing()?;
        let watch = Stopwatch::start();
        let extra = [
            format!("--size={IMAGE_BYTES}"),
            "--norandommap".into(),
            "--time_based".into(),
            format!("--runtime={}", self.seconds),
        ];
        let fio = FioJob { name: "clients".into(), rw: job.0, bs: "4k", depth: job.1, extra: extra.to_vec() };
        let fio = self.fio(&fio)?;
        let after = self.missing()?;
        let bytes = before.saturating_sub(after) * OBJECT_BYTES as u64;
        let recovered = bytes as f64 / watch.elapsed().as_secs_f64();
        if let Some(scrubs) = scrubs {
            scrubs.end()?;
        }
        Ok(Run { job, during, fio, recovered, to_the_end: during != During::Recovery || after > 0 })
    }
}

/// Deep scrubs, one after the other, until they are ended.
struct Scrubs {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<(), ChaosError>>,
}

impl Scrubs {
    fn start(rig: &Rig) -> Result<Self, ChaosError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, call) = (stop.clone(), rig.caller());
        let work = move || {
            while !flag.load(Ordering::Relaxed) {
                call(&["pg", "scrub", "--deep", "--pool", POOL])?;
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("scrubs".into()).spawn(work);
        Ok(Self { stop, thread: thread.map_err(ChaosError::io("start a thread"))? })
    }

    fn end(self) -> Result<(), ChaosError> {
        self.stop.store(true, Ordering::Relaxed);
        let panicked = |_| ChaosError::Demand("the thread that scrubs panicked".into());
        self.thread.join().map_err(panicked)?
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

impl Measured {
    fn of(&self, job: (&str, u32), during: During, what: impl Fn(&Run) -> f64) -> f64 {
        let runs = self.runs.iter().filter(|run| run.job == job && run.during == during);
        median(runs.map(what).collect())
    }

    /// Prints medians.
    pub fn print(&self) -> Result<(), CliError> {
        let headings =
            ["CLIENTS", ">DEPTH", "BESIDE", ">IOPS", ">p50 us", ">p99 us", ">p99 ratio", ">MB/s", ""];
        let mut table = Table::new(&headings);
        for job in JOBS {
            let rest = self.of(job, During::Rest, |run| run.fio.p99_us);
            for during in [During::Rest, During::Recovery, During::Scrub] {
                let of = |what: fn(&Run) -> f64| self.of(job, during, what);
                let recovered = of(|run| run.recovered / 1e6);
                let runs = self.runs.iter().filter(|run| run.job == job && run.during == during);
                let short = runs.filter(|run| !run.to_the_end).count();
                table.row([
                    job.0.to_string(),
                    job.1.to_string(),
                    during.to_string(),
                    format!("{:.0}", of(|run| run.fio.iops)),
                    format!("{:.0}", of(|run| run.fio.p50_us)),
                    format!("{:.0}", of(|run| run.fio.p99_us)),
                    format!("{:.2}", of(|run| run.fio.p99_us) / rest.max(1.0)),
                    if during == During::Recovery { format!("{recovered:.0}") } else { "-".into() },
                    if short > 0 { format!("{short} runs outlasted it") } else { String::new() },
                ]);
            }
        }
        table.print()?;
        let alone = median(self.alone.clone()) / 1e6;
        cli::output::line(&format!("recovery without clients: {alone:.0} MB/s"))
    }

    /// Writes every run to a file.
    pub fn write(&self, path: &Path) -> Result<(), ChaosError> {
        let one = |run: &Run| {
            json!({
                "clients": run.job.0,
                "depth": run.job.1,
                "beside": run.during.to_string(),
                "iops": run.fio.iops,
                "p50_us": run.fio.p50_us,
                "p99_us": run.fio.p99_us,
                "longest_us": run.fio.longest.as_micros() as u64,
                "recovered_bytes_per_second": run.recovered,
                "to_the_end": run.to_the_end,
            })
        };
        let runs: Vec<_> = self.runs.iter().map(one).collect();
        let root = json!({ "runs": runs, "recovery_alone_bytes_per_second": self.alone });
        let text = serde_json::to_string_pretty(&root).map_err(|error| CliError::Json(error.to_string()))?;
        std::fs::write(path, text).map_err(ChaosError::io(format!("write {}", path.display())))
    }
}
