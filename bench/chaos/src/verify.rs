//! Stock fio through Drystone's engine beside everything else: pass after pass of random writes that fio reads
//! back and verifies itself.

use crate::error::ChaosError;
use cli::deadline::{Deadline, Stopwatch};
use cli::error::CliError;
use cli::fio::{FioJob, Target};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a pass.
pub const IMAGE_BYTES: u64 = 2 << 20;
/// Writes per second: leaves the CPUs time for the nodes.
const RATE: u64 = 400;
/// A pass that takes longer hangs.
const PASS_LIMIT: Duration = Duration::from_secs(300);
/// How often a pass under way is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// fio at work.
pub struct Verify {
    stop: Arc<AtomicBool>,
    /// Stop in the middle of a pass.
    give_up: Arc<AtomicBool>,
    passes: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<(), CliError>>>,
}

impl Verify {
    /// Starts it on an image of `IMAGE_BYTES`.
    pub fn start(target: Target, dir: &Path) -> Result<Self, ChaosError> {
        let (stop, give_up) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let passes = Arc::new(AtomicU64::new(0));
        let (flag, abandon, count) = (stop.clone(), give_up.clone(), passes.clone());
        let dir = dir.to_path_buf();
        let work = move || {
            // The last pass is made after the disturbance too: it reads what was written during it.
            while !flag.load(Ordering::Relaxed) {
                pass(&target, &dir, &abandon)?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("fio".into()).spawn(work);
        Ok(Self {
            stop,
            give_up,
            passes,
            thread: Some(thread.map_err(ChaosError::io("start fio's thread"))?),
        })
    }

    /// What fio has found, if it gave up.
    pub fn failure(&mut self) -> Option<ChaosError> {
        match self.thread.take_if(|thread| thread.is_finished())?.join() {
            Ok(Ok(())) => Some(ChaosError::Demand("fio ended too early".into())),
            Ok(Err(error)) => Some(error.into()),
            Err(_) => Some(ChaosError::Demand("fio's thread panicked".into())),
        }
    }

    /// Passes made so far.
    pub fn passes(&self) -> u64 {
        self.passes.load(Ordering::Relaxed)
    }

    /// Lets the present pass end; returns how many there were.
    pub fn finish(mut self) -> Result<u64, ChaosError> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result?,
            Some(Err(_)) => return Err(ChaosError::Demand("fio's thread panicked".into())),
            None => {}
        }
        Ok(self.passes.load(Ordering::Relaxed))
    }
}

impl Drop for Verify {
    fn drop(&mut self) {
        // A fio that outlived its cluster would go on with the next one at the same addresses.
        self.stop.store(true, Ordering::Relaxed);
        self.give_up.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pass(target: &Target, dir: &Path, give_up: &AtomicBool) -> Result<(), CliError> {
    let job = FioJob {
        name: "verify".into(),
        rw: "randwrite",
        bs: "4k",
        depth: 8,
        extra: vec![
            format!("--size={IMAGE_BYTES}"),
            format!("--rate_iops={RATE}"),
            "--verify=crc32c".into(),
            "--verify_state_save=0".into(),
        ],
    };
    let mut run = job.spawn(target, dir)?;
    let watch = Stopwatch::start();
    while run.wait_until(Deadline::after(LOOK))?.is_none() {
        if give_up.load(Ordering::Relaxed) {
            return Ok(()); // dropping the run ends fio
        }
        if watch.elapsed() > PASS_LIMIT {
            return Err(CliError::TimedOut { what: "fio's pass".into(), seconds: PASS_LIMIT.as_secs() });
        }
    }
    Ok(())
}
