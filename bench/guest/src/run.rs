//! One run: builds what the guest needs, boots it as often as the tests want, and follows what it says.
//!
//! The host knows which tests there are. Each of them must have said "ok": a guest that says nothing has failed.

use crate::boot::{BootPlan, Guest};
use crate::drives::{Bus, Cache, Drive, DrivePlan};
use crate::error::GuestError;
use crate::follow::Lines;
use crate::inside;
use crate::manifest::{ACKED, Ack, EXIT, LOG, Manifest, Phase, TestProgram};
use crate::prepare::{Tools, anew};
use crate::programs;
use cli::deadline::{Deadline, Stopwatch};
use cli::output;
use cli::stop::Stop;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A whole run, all boots together.
const RUN_LIMIT: Duration = Duration::from_secs(15 * 60);
/// From the start of QEMU to the first line of the guest's program.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How often the guest's file is looked at: it comes over 9p, which announces nothing.
const LOOK: Duration = Duration::from_millis(50);
/// How long a guest may take to switch off.
const OFF_LIMIT: Duration = Duration::from_secs(60);
/// Sizes of partitions.
const NODE_DISK: u64 = 512 << 20;
const NODE_FILES: u64 = 512 << 20;

/// Drives of the ordinary tests: without partitions, with them, two with sectors of 4 KiB to be pulled out, one with
/// zones, and one for the loop's own disks: two of the conformance suite's sizes, and one to measure on.
const TEST_DRIVES: [DrivePlan; 6] = [
    DrivePlan { bytes: NODE_DISK, partitions: &[], ..PLAIN },
    DrivePlan {
        serial: "parts",
        atomic_4k: true,
        partitions: &[NODE_DISK, NODE_DISK, NODE_DISK, NODE_FILES],
        ..PLAIN
    },
    DrivePlan { serial: "large", sector_bytes: 4096, atomic_4k: true, ..PLAIN },
    DrivePlan { serial: "large2", sector_bytes: 4096, atomic_4k: true, ..PLAIN },
    DrivePlan { serial: "loop", partitions: &[4 << 20, 8 << 20, 64 << 20], ..PLAIN },
    DrivePlan { serial: "zoned", zoned: true, bytes: NODE_DISK, partitions: &[], ..PLAIN },
];

const PLAIN: DrivePlan = DrivePlan {
    serial: "blank",
    bus: Bus::Nvme,
    cache: Cache::Volatile,
    sector_bytes: 512,
    atomic_4k: false,
    zoned: false,
    partitions: &[NODE_DISK],
    bytes: 0,
};

/// Cuts of the power of one cluster.
struct CutPlan {
    /// What its boots are called after.
    name: &'static str,
    bus: Bus,
    cache: Cache,
    /// The acknowledged writes after which each cut happens.
    after: &'static [u64],
    /// Further flags of the nodes.
    flags: &'static [&'static str],
}

const CUT_PLANS: [CutPlan; 3] = [
    CutPlan { name: "volatile", bus: Bus::Scsi, cache: Cache::Volatile, after: &[250, 700], flags: &[] },
    CutPlan { name: "nvme", bus: Bus::Nvme, cache: Cache::WriteThrough, after: &[400], flags: &[] },
    CutPlan {
        name: "passthrough",
        bus: Bus::Nvme,
        cache: Cache::WriteThrough,
        after: &[400],
        flags: &["--nvme", "passthrough"],
    },
];

/// Drives of the power-cut tests: one for each node, so that no node's flush covers another's write; one for the
/// nodes' files; and one that is written beside all flushes.
const CUT_SERIALS: [&str; 5] = ["cut1", "cut2", "cut3", "files", "lossy"];

/// A run.
pub struct Run<'a> {
    tools: &'a Tools,
    /// Everything of this run: images, the shared directory, the console's output.
    dir: PathBuf,
    drystone: PathBuf,
    /// fio's engine.
    engine: PathBuf,
    test_programs: Vec<TestProgram>,
    filter: Option<&'a str>,
    deadline: Deadline,
    stop: Stop,
    passed: usize,
    failed: Vec<String>,
}

/// A boot.
struct Boot<'a> {
    /// Its directory's name.
    name: String,
    drives: &'a [Drive],
    /// Power cuts before it.
    cuts: u32,
    /// Further flags of its nodes.
    flags: &'static [&'static str],
    /// What it runs.
    tests: Vec<String>,
}

impl<'a> Run<'a> {
    /// Makes its directory, in place of the last run's, and builds the programs.
    pub fn new(tools: &'a Tools, cache: &Path, filter: Option<&'a str>) -> Result<Self, GuestError> {
        let dir = cache.join("run");
        anew(&dir)?;
        let (drystone, engine) = programs::build_drystone()?;
        Ok(Self {
            tools,
            dir,
            drystone,
            engine,
            test_programs: programs::build_tests()?,
            filter,
            deadline: Deadline::after(RUN_LIMIT),
            stop: Stop::on_signals().map_err(GuestError::io("catch signals"))?,
            passed: 0,
            failed: Vec::new(),
        })
    }

    /// All boots. True when every test has passed.
    pub fn all(mut self) -> Result<bool, GuestError> {
        let watch = Stopwatch::start();
        let ordinary = self.tests_of(Phase::Tests, self.filter);
        let cuts = [Phase::FirstCut, Phase::Cut, Phase::AfterCut];
        // Power cuts are one story: its parts make no sense apart.
        let with_cuts = cuts.iter().any(|phase| !self.tests_of(*phase, self.filter).is_empty());
        if ordinary.is_empty() && !with_cuts {
            return Err(GuestError::Demand("no test has such a name; `guest ls` lists them".into()));
        }
        if !ordinary.is_empty() {
            let drives = make(&TEST_DRIVES, &self.dir)?;
            self.orderly(&Boot {
                name: "tests".into(),
                drives: &drives,
                cuts: 0,
                flags: &[],
                tests: ordinary,
            })?;
        }
        for plan in CUT_PLANS.iter().filter(|_| with_cuts) {
            self.power_cuts(plan)?;
        }
        if self.failed.is_empty() {
            remove_images(&self.dir);
        }
        let seconds = watch.elapsed().as_secs();
        output::line(&format!("guest: {seconds} s; logs in {}", self.dir.display()))?;
        for name in &self.failed {
            output::line(&format!("guest: FAILED {name}"))?;
        }
        output::line(&format!("guest: {} passed, {} failed", self.passed, self.failed.len()))?;
        Ok(self.failed.is_empty())
    }

    fn tests_of(&self, phase: Phase, filter: Option<&str>) -> Vec<String> {
        let fits = |test: &&inside::Test| filter.is_none_or(|filter| test.name.contains(filter));
        let of = inside::TESTS.iter().filter(|test| test.phases.contains(&phase)).filter(fits);
        of.map(|test| test.name.to_owned()).collect()
    }

    /// Boots for tests that come to an end; each of them must have passed.
    fn orderly(&mut self, boot: &Boot<'_>) -> Result<(), GuestError> {
        let mut guest = self.boot(boot)?;
        let said = self.follow(&mut guest, &self.share(boot)?, || false)?;
        if guest.ended(OFF_LIMIT)?.is_none() {
            let (what, seconds) = ("the guest to switch off".into(), OFF_LIMIT.as_secs());
            return Err(GuestError::TimedOut { what, seconds });
        }
        self.account(boot, &said);
        Ok(())
    }

    /// Every boot but the last ends when enough writes are acknowledged; the next one looks for them.
    fn power_cuts(&mut self, plan: &CutPlan) -> Result<(), GuestError> {
        let dir = self.dir.join(plan.name);
        std::fs::create_dir_all(&dir).map_err(GuestError::io(format!("make {}", dir.display())))?;
        let drive = |serial: &&'static str| DrivePlan { serial, bus: plan.bus, cache: plan.cache, ..PLAIN };
        let mut drives = make(&CUT_SERIALS.iter().map(drive).collect::<Vec<_>>(), &dir)?;
        let mut acked = Vec::new();
        for (cuts, writes) in plan.after.iter().enumerate() {
            lay_over(&mut drives, &dir, cuts)?;
            let tests = self.tests_of(if cuts == 0 { Phase::FirstCut } else { Phase::Cut }, None);
            let name = format!("{}/cut{}", plan.name, cuts + 1);
            let boot = Boot { name, drives: &drives, cuts: cuts as u32, flags: plan.flags, tests };
            acked = self.cut(&boot, acked, *writes)?;
        }
        let cuts = plan.after.len();
        lay_over(&mut drives, &dir, cuts)?;
        let tests = self.tests_of(Phase::AfterCut, None);
        let name = format!("{}/after", plan.name);
        let boot = Boot { name, drives: &drives, cuts: cuts as u32, flags: plan.flags, tests };
        write_acked(&self.share(&boot)?, &acked)?;
        self.orderly(&boot)?;
        if self.failed.is_empty() {
            remove_images(&dir);
        }
        Ok(())
    }

    /// Boots, waits for so many acknowledged writes more than there were, and cuts the power. Returns the list of
    /// all acknowledged writes.
    fn cut(&mut self, boot: &Boot<'_>, before: Vec<u8>, writes: u64) -> Result<Vec<u8>, GuestError> {
        let share = self.share(boot)?;
        let file = write_acked(&share, &before)?;
        let enough = before.len() as u64 + writes * Ack::BYTES as u64;
        let mut guest = self.boot(boot)?;
        let watch = Stopwatch::start();
        let reached = || std::fs::metadata(&file).is_ok_and(|meta| meta.len() >= enough);
        let mut said = self.follow(&mut guest, &share, reached)?;
        if reached() {
            guest.cut_power()?;
            output::line(&format!("ok {} ({} ms)", inside::UNTIL_THE_CUT, watch.elapsed().as_millis()))?;
            said.push(inside::UNTIL_THE_CUT.to_owned());
        }
        self.account(boot, &said);
        let acked = std::fs::read(&file).map_err(GuestError::io(format!("read {}", file.display())))?;
        let count = Ack::decode_all(&acked).len();
        eprintln!("guest: the power is off; {count} writes have been acknowledged in all");
        Ok(acked)
    }

    fn share(&self, boot: &Boot<'_>) -> Result<PathBuf, GuestError> {
        let share = self.dir.join(&boot.name).join("share");
        std::fs::create_dir_all(&share).map_err(GuestError::io(format!("make {}", share.display())))?;
        Ok(share)
    }

    fn boot(&self, boot: &Boot<'_>) -> Result<Guest, GuestError> {
        let share = self.share(boot)?;
        Manifest {
            drystone: self.drystone.clone(),
            engine: self.engine.clone(),
            test_programs: self.test_programs.clone(),
            volatile: boot.drives.iter().any(Drive::is_volatile),
            cuts: boot.cuts,
            flags: boot.flags.iter().map(ToString::to_string).collect(),
            tests: boot.tests.clone(),
        }
        .write(&share)?;
        let own = std::env::current_exe().map_err(GuestError::io("find this program"))?;
        let program = Some(vec![own.into(), "inside".into(), share.clone().into()]);
        eprintln!("guest: boot '{}'", boot.name);
        Guest::boot(&BootPlan { tools: self.tools, share: &share, drives: boot.drives, program })
    }

    /// Prints the guest's lines as they come, until it is done or `enough`. Returns the tests that have passed.
    fn follow(
        &self,
        guest: &mut Guest,
        share: &Path,
        enough: impl Fn() -> bool,
    ) -> Result<Vec<String>, GuestError> {
        let mut lines = Lines::of(&share.join(LOG));
        let (mut passed, mut any) = (Vec::new(), false);
        let begun = Deadline::after(BOOT_LIMIT);
        loop {
            // Looked at before the lines: what was said before the end is read after it.
            let over = share.join(EXIT).exists() || guest.ended(LOOK)?.is_some() || enough();
            for line in lines.new_ones()? {
                any = true;
                output::line(&line)?;
                let name = line.strip_prefix("ok ").and_then(|rest| rest.split(' ').next());
                passed.extend(name.map(str::to_owned));
            }
            if over {
                return Ok(passed);
            }
            self.stop.check()?;
            let late = |what: &str, limit: Duration| {
                Err(GuestError::TimedOut { what: what.into(), seconds: limit.as_secs() })
            };
            if !any && begun.passed() {
                return late("the guest's first line (see its console)", BOOT_LIMIT);
            }
            if self.deadline.passed() {
                return late("all tests to end", RUN_LIMIT);
            }
        }
    }

    fn account(&mut self, boot: &Boot<'_>, passed: &[String]) {
        for test in &boot.tests {
            if passed.contains(test) {
                self.passed += 1;
            } else {
                self.failed.push(format!("{test} (boot '{}')", boot.name));
            }
        }
    }
}

/// Images are large; those of a failure may explain it.
fn remove_images(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.extension().is_some_and(|kind| kind == "raw" || kind == "qcow2") {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn lay_over(drives: &mut [Drive], dir: &Path, number: usize) -> Result<(), GuestError> {
    drives.iter_mut().try_for_each(|drive| drive.lay_over(dir, number))
}

/// Hands the next boot the list of acknowledged writes.
fn write_acked(share: &Path, acked: &[u8]) -> Result<PathBuf, GuestError> {
    let file = share.join(ACKED);
    std::fs::write(&file, acked).map_err(GuestError::io(format!("write {}", file.display())))?;
    Ok(file)
}

fn make(plans: &[DrivePlan], dir: &Path) -> Result<Vec<Drive>, GuestError> {
    plans.iter().map(|plan| Drive::raw(*plan, dir)).collect()
}

/// A guest with the drives of the ordinary tests and a shell at this terminal.
pub fn shell(tools: &Tools, cache: &Path) -> Result<(), GuestError> {
    let dir = cache.join("shell");
    anew(&dir)?;
    let share = dir.join("share");
    std::fs::create_dir_all(&share).map_err(GuestError::io(format!("make {}", share.display())))?;
    let drives = make(&TEST_DRIVES, &dir)?;
    output::line(&format!("guest: files for both sides in {}", share.display()))?;
    Guest::boot(&BootPlan { tools, share: &share, drives: &drives, program: None })?.wait()?;
    Ok(())
}
