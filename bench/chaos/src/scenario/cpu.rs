//! A machine with too much to do.

use super::{Scenario, usual};
use crate::error::ChaosError;
use crate::stage::Stage;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Busy threads beside the cluster, for each CPU.
const BUSY_PER_CPU: usize = 4;
/// A cluster is at rest when its placement groups' epochs have not changed for so long: primaries that are to be
/// handed over have been by then.
const AT_REST: Duration = Duration::from_secs(3);

/// Every CPU is wanted by four others.
pub const OVERSUBSCRIBED: Scenario = Scenario {
    name: "oversubscribed",
    about: "four busy threads per CPU beside the cluster: nobody may be taken for dead",
    needs_links: false,
    setting: usual,
    run: oversubscribed,
};

/// Threads that compute. They end when this is dropped.
struct Busy {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    fn start(threads: usize) -> Result<Self, ChaosError> {
        let mut busy = Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        for _ in 0..threads {
            let stop = busy.stop.clone();
            let work = move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            };
            let thread = std::thread::Builder::new().name("busy".into()).spawn(work);
            busy.threads.push(thread.map_err(ChaosError::io("start a busy thread"))?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn oversubscribed(stage: &mut Stage) -> Result<(), ChaosError> {
    let before = wait_at_rest(stage)?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let time = stage.form.oversubscribed;
    stage.say(&format!("{} busy threads on {cpus} CPUs for {} s", BUSY_PER_CPU * cpus, time.as_secs()));
    let busy = Busy::start(BUSY_PER_CPU * cpus)?;
    stage.rig.hold(time)?;
    let after = stage.rig.epochs()?;
    drop(busy);
    stage.say(&format!("the longest operation so far took {:?}", stage.timeline.slowest()));
    if after != before {
        return Err(ChaosError::Demand(format!(
            "{} change(s) of members or primaries although no node was away",
            after.saturating_sub(before)
        )));
    }
    Ok(())
}

/// Waits until nothing changes by itself any more; returns the sum of epochs.
fn wait_at_rest(stage: &mut Stage) -> Result<u64, ChaosError> {
    let mut known = stage.rig.epochs()?;
    let mut since = cli::deadline::Stopwatch::start();
    stage.rig.wait_until("placement groups to be at rest", |rig| {
        let now = rig.epochs()?;
        if now != known {
            (known, since) = (now, cli::deadline::Stopwatch::start());
        }
        Ok(since.elapsed() >= AT_REST)
    })?;
    Ok(known)
}
