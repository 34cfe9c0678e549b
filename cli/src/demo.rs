//! The demonstration: three nodes on this machine, stock fio through Drystone's engine, a node that dies
//! in the middle of a verified write run and comes back, and a table.
//!
//! Everything made here is gone afterwards, also after Ctrl-C: child processes and the directory belong to
//! values that clean up when they are dropped, and children end with this process whatever happens to it.

use crate::children::{Fleet, FleetPlan};
use crate::cluster::Cluster;
use crate::cmd::demo::DemoArgs;
use crate::deadline::{Deadline, Stopwatch};
use crate::error::CliError;
use crate::fio::{self, FioJob, FioResult, Target};
use crate::health::ClusterStatus;
use crate::output::{self, Table};
use crate::procfs;
use crate::stop::Stop;
use crate::units::ByteSize;
use control::admin::PoolSpec;
use indicatif::{ProgressBar, ProgressStyle};
use placement::FailureDomain;
use std::path::{Path, PathBuf};
use std::time::Duration;

const NODES: u64 = 3;
const PGS: u32 = 16;
const SLICES: u32 = 4;
const POOL: &str = "demo";
const IMAGE: &str = "disk1";
/// The image's data and the store's own, three times over, with room to write everything twice.
const DISK_BYTES: u64 = 8 << 30;
/// Region of the image that the 4 KiB runs use, all of it written by the first run.
const SMALL_REGION: ByteSize = ByteSize(512 << 20);
/// Region that is being written while the node dies, behind the first.
const CRASH_REGION: ByteSize = ByteSize(256 << 20);
/// Writes per second while the node dies: makes the run last long enough for the death to fall into it.
const CRASH_RATE: u64 = 8192;
/// When the node is killed, and when it is started again, after the start of the run.
const KILL_AFTER: Duration = Duration::from_secs(2);
const RESTART_AFTER: Duration = Duration::from_secs(4);
/// The longest that any step may take before the demonstration calls itself failed.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// How often the display is refreshed while something runs.
const REFRESH: Duration = Duration::from_millis(100);
/// Which node dies.
const VICTIM: usize = 1;

/// Runs it; the last line printed says how it ended.
pub fn run(args: &DemoArgs) -> Result<(), CliError> {
    let outcome = Demo::new(args).and_then(|mut demo| {
        let told = demo.tell();
        let kept = told.and_then(|()| if args.keep { demo.keep() } else { Ok(()) });
        kept.and(demo.end())
    });
    match &outcome {
        Ok(()) => output::line("demo: ok")?,
        Err(error) => {
            let why = error.to_string();
            output::line(&format!("demo: FAILED: {}", why.lines().next().unwrap_or("?")))?;
        }
    }
    outcome
}

struct Demo<'a> {
    // Dropped in this order: nodes before the directory that their files are in.
    fleet: Fleet,
    cluster: Cluster,
    dir: tempfile::TempDir,
    args: &'a DemoArgs,
    target: Target,
    stop: Stop,
    bar: ProgressBar,
    clock: Stopwatch,
    table: Table,
}

fn io(what: &str) -> impl FnOnce(std::io::Error) -> CliError {
    let what = what.to_string();
    move |source| CliError::Io { what, source }
}

/// The engine beside this program, as cargo and packages put it.
fn find_engine(args: &DemoArgs, binary: &Path) -> Result<PathBuf, CliError> {
    let beside = binary.with_file_name("libdrystone_fio.so");
    let path = args.engine.clone().unwrap_or(beside);
    // fio resolves the path from its own directory.
    path.canonicalize().map_err(|source| CliError::Io {
        what: format!("find the fio engine {} (cargo build --release -p drystone_fio)", path.display()),
        source,
    })
}

impl<'a> Demo<'a> {
    fn new(args: &'a DemoArgs) -> Result<Self, CliError> {
        let stop = Stop::on_signals().map_err(io("catch signals"))?;
        if args.image_size.0 < SMALL_REGION.0 + CRASH_REGION.0 {
            return Err(CliError::Refused {
                what: "run the demonstration".into(),
                why: format!("--image-size must be at least {}", ByteSize(SMALL_REGION.0 + CRASH_REGION.0)),
            });
        }
        fio::check()?;
        let binary = std::env::current_exe().map_err(io("find this program"))?;
        let engine = find_engine(args, &binary)?;
        let base = args.dir.clone().unwrap_or_else(std::env::temp_dir);
        let dir = tempfile::Builder::new().prefix("drystone-demo-").tempdir_in(&base);
        let dir = dir.map_err(io(&format!("make a directory in {}", base.display())))?;
        let fleet = Fleet::prepare(FleetPlan {
            binary,
            dir: dir.path().to_path_buf(),
            nodes: NODES,
            disk_bytes: DISK_BYTES.max(2 * args.image_size.0),
            slices: SLICES,
            flags: ["--cores", "1", "--cpus", "none", "--meta-bytes", "64MiB"].map(String::from).to_vec(),
            log: "info".into(),
        })?;
        let target = Target::Image { engine, cluster: fleet.cluster_flag(), image: IMAGE.into() };
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        Ok(Self {
            cluster: Cluster::at(&fleet.controls())?,
            fleet,
            dir,
            args,
            target,
            stop,
            bar: ProgressBar::no_length().with_style(style),
            clock: Stopwatch::start(),
            table: Table::new(&["RUN", ">IOPS", ">MB/s", ">p50 us", ">p99 us", ">CPU us/op"]),
        })
    }

    /// A line that stays, with the time since the start.
    fn say(&self, text: &str) -> Result<(), CliError> {
        let line = format!("[{:6.1} s] {text}", self.clock.elapsed().as_secs_f64());
        self.bar.suspend(|| output::line(&line))
    }

    fn tell(&mut self) -> Result<(), CliError> {
        self.start()?;
        self.verified_writes()?;
        self.measure()?;
        self.death_of_a_node()?;
        self.say("done")?;
        self.bar.suspend(|| output::line("").and_then(|()| self.table.print()))?;
        output::line("")
    }

    fn start(&mut self) -> Result<(), CliError> {
        self.say(&format!("starting {NODES} nodes in {}", self.dir.path().display()))?;
        let watch = Stopwatch::start();
        self.fleet.start_all()?;
        self.cluster.create_pool(&PoolSpec {
            name: POOL.into(),
            copies: NODES as u8,
            min_copies: None,
            pg_count: Some(PGS),
            failure_domain: FailureDomain::Host,
            scrub: Default::default(),
        })?;
        self.wait_clean("the pool's placement groups")?;
        self.cluster.create_image(IMAGE, POOL, self.args.image_size.0)?;
        self.say(&format!(
            "three nodes serve after {:.1} s: pool {POOL} (3 copies, {PGS} PGs), image {IMAGE} ({})",
            watch.elapsed().as_secs_f64(),
            self.args.image_size
        ))
    }

    fn wait_clean(&mut self, what: &str) -> Result<ClusterStatus, CliError> {
        let (bar, stop) = (&self.bar, &self.stop);
        ClusterStatus::wait_for(&mut self.cluster, what, STEP_LIMIT, |status| {
            bar.set_message(format!("waiting for {what}: {}", status.summary()));
            bar.tick();
            stop.asked() || status.is_clean()
        })
        .and_then(|status| self.stop.check().map(|()| status))
    }

    /// CPU time of all nodes so far.
    fn nodes_cpu(&self) -> Duration {
        (0..self.fleet.nodes.len())
            .filter_map(|index| procfs::cpu_time(self.fleet.pid(index)?).ok())
            .map(|time| time.own)
            .sum()
    }

    /// Runs fio to its end, showing that it is alive, with something to do meanwhile.
    fn fio(
        &mut self,
        job: &FioJob,
        mut meanwhile: impl FnMut(&mut Self, Duration) -> Result<(), CliError>,
    ) -> Result<FioResult, CliError> {
        let mut run = job.spawn(&self.target, self.dir.path())?;
        let watch = Stopwatch::start();
        loop {
            let elapsed = watch.elapsed();
            self.bar.set_message(format!("fio {}: {:.1} s", job.name, elapsed.as_secs_f64()));
            self.bar.tick();
            self.stop.check()?;
            if let Some(result) = run.wait_until(Deadline::after(REFRESH))? {
                return Ok(result);
            }
            if elapsed > STEP_LIMIT {
                return Err(CliError::TimedOut {
                    what: format!("fio run {}", job.name),
                    seconds: STEP_LIMIT.as_secs(),
                });
            }
            meanwhile(self, elapsed)?;
        }
    }

    fn verified_writes(&mut self) -> Result<(), CliError> {
        self.say("fio: random writes of 4 KiB, then everything is read back and verified (crc32c)")?;
        let job = FioJob {
            name: "verify".into(),
            rw: "randwrite",
            bs: "4k",
            depth: 64,
            extra: vec![
                format!("--size={}", SMALL_REGION.0),
                "--verify=crc32c".into(),
                "--verify_fatal=1".into(),
            ],
        };
        let result = self.fio(&job, |_, _| Ok(()))?;
        self.say(&format!("      {} operations, every block verified", result.ios))
    }

    fn measure(&mut self) -> Result<(), CliError> {
        let small = format!("--size={}", SMALL_REGION.0);
        let whole = format!("--size={}", self.args.image_size.0);
        for (name, rw, bs, depth, size) in [
            ("randread-4k-d1", "randread", "4k", 1, &small),
            ("randwrite-4k-d1", "randwrite", "4k", 1, &small),
            ("randread-4k-d128", "randread", "4k", 128, &small),
            ("randwrite-4k-d128", "randwrite", "4k", 128, &small),
            ("write-1m-d16", "write", "1m", 16, &whole),
            ("read-1m-d16", "read", "1m", 16, &whole),
        ] {
            let job = FioJob {
                name: name.into(),
                rw,
                bs,
                depth,
                extra: vec![size.clone(), "--time_based".into(), format!("--runtime={}", self.args.seconds)],
            };
            let before = self.nodes_cpu();
            let result = self.fio(&job, |_, _| Ok(()))?;
            let cpu = self.nodes_cpu().saturating_sub(before) + result.cpu;
            self.row(name, &result, cpu)?;
        }
        Ok(())
    }

    fn row(&mut self, name: &str, result: &FioResult, cpu: Duration) -> Result<(), CliError> {
        let per_op = cpu.as_secs_f64() * 1e6 / result.ios.max(1) as f64;
        self.table.row([
            name.to_string(),
            format!("{:.0}", result.iops),
            format!("{:.0}", result.bytes_per_second / 1e6),
            format!("{:.0}", result.p50_us),
            format!("{:.0}", result.p99_us),
            format!("{per_op:.1}"),
        ]);
        self.say(&format!("fio: {name}: {:.0} IOPS, p50 {:.0} us", result.iops, result.p50_us))
    }

    fn death_of_a_node(&mut self) -> Result<(), CliError> {
        let victim = self.fleet.nodes.get(VICTIM).map_or(0, |node| node.id.0);
        self.say(&format!(
            "fio: verified random writes; node {victim} will be killed in the middle of them"
        ))?;
        let job = FioJob {
            name: "crash".into(),
            rw: "randwrite",
            bs: "4k",
            depth: 32,
            extra: vec![
                format!("--offset={}", SMALL_REGION.0),
                format!("--size={}", CRASH_REGION.0),
                format!("--rate_iops={CRASH_RATE}"),
                "--verify=crc32c".into(),
                "--verify_fatal=1".into(),
            ],
        };
        let (mut killed, mut restarted) = (false, false);
        let result = self.fio(&job, |demo, elapsed| {
            if !killed && elapsed >= KILL_AFTER {
                killed = true;
                demo.fleet.kill(VICTIM)?;
                demo.say(&format!("      node {victim} killed with SIGKILL"))?;
            }
            if !restarted && elapsed >= RESTART_AFTER {
                restarted = true;
                demo.fleet.spawn(VICTIM)?;
                demo.say(&format!("      node {victim} started again"))?;
            }
            Ok(())
        })?;
        if !restarted {
            return Err(CliError::Refused {
                what: "show a node's death".into(),
                why: "fio was done before it happened".into(),
            });
        }
        self.fleet.wait_ready(VICTIM)?;
        self.say(&format!(
            "      fio noticed nothing but a pause: {} operations, all verified, the longest took {:.0} ms",
            result.ios,
            result.longest.as_secs_f64() * 1e3
        ))?;
        let watch = Stopwatch::start();
        let status = self.wait_clean("every PG to be clean again")?;
        self.say(&format!("clean again {:.1} s later: {}", watch.elapsed().as_secs_f64(), status.summary()))
    }

    fn keep(&mut self) -> Result<(), CliError> {
        let cluster = self.fleet.cluster_flag();
        let engine = match &self.target {
            Target::Image { engine, .. } => engine.display().to_string(),
            Target::File(_) => String::new(),
        };
        self.bar.finish_and_clear();
        output::line(&format!(
            "The cluster keeps running; in another terminal:\n\n  \
             export DRYSTONE_CLUSTER={cluster}\n  \
             drystone status\n  \
             drystone image ls\n  \
             drystone meta get /\n  \
             fio --name=t --ioengine=external:{engine} --cluster=$DRYSTONE_CLUSTER --image={IMAGE} \\\n      \
             --rw=randrw --bs=4k --iodepth=32 --thread"
        ))?;
        for node in &self.fleet.nodes {
            if let Some(addresses) = &node.addresses {
                let log = node.dir.join("log");
                output::line(&format!(
                    "  node {}: control {}, metrics http://{}/metrics, log {}",
                    node.id,
                    addresses.control,
                    addresses.http,
                    log.display()
                ))?;
            }
        }
        output::line("\nCtrl-C stops it and removes everything.")?;
        while !self.stop.asked() {
            // A node that dies by itself is worth an error, not a cluster that silently limps.
            self.cluster.wait_for_change()?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), CliError> {
        self.bar.finish_and_clear();
        self.fleet.stop_all()
    }
}
