//! Failover, measured: how long a client that writes one block after the other waits when a node dies, hangs, is
//! cut off, or stops.
//!
//! A trial: the cluster is clean and primaries are where placement wants them; the victim is primary of some of
//! the writer's placement groups; the harm is done; writes go on and every one of the victim's groups has
//! another primary; the longest time between two completed writes in that interval is the figure. Then the harm
//! is undone and the next trial waits for a clean cluster.

use crate::error::ChaosError;
use crate::isolate::Isolation;
use crate::rig::{POOL, Programs, Rig, RigPlan};
use crate::rng::Rng;
use crate::trials::{Kind, Trial, Trials};
use crate::writer::{BLOCK, Writer};
use cli::deadline::Stopwatch;
use cli::stop::Stop;
use std::time::Duration;

/// The writer's image: all placement groups of the pool.
const IMAGE: &str = "failover";
const BLOCKS: u64 = 16_384;
const PGS: u32 = 16;
/// Writes after the change that have to complete, so that every placement group is written to.
const WRITES_AFTER: u64 = 200;
/// How long primaries may take to come back to where placement wants them before a trial begins without that.
const SETTLE: Duration = Duration::from_secs(20);

/// What is measured.
#[derive(Clone, Debug)]
pub struct FailoverPlan {
    /// The kinds, in order.
    pub kinds: Vec<Kind>,
    /// Trials of each.
    pub trials: usize,
    /// Seed of the choices.
    pub seed: u64,
}

struct Bench {
    // Dropped in this order: the writer before the cluster that it uses.
    writer: Writer,
    rig: Rig,
    rng: Rng,
}

/// Measures.
pub fn measure(
    plan: &FailoverPlan,
    isolation: &Isolation,
    programs: &Programs,
    stop: &Stop,
) -> Result<Trials, ChaosError> {
    let setting = RigPlan { disk_bytes: 4 << 30, pgs: PGS, ..RigPlan::default() };
    let mut rig = Rig::start(&setting, isolation, programs, 0, stop)?;
    rig.admin.create_image(IMAGE, POOL, BLOCKS * BLOCK)?;
    let rng = Rng::new(plan.seed, "failover");
    let writer = Writer::start(&rig.controls(), IMAGE, BLOCKS, Rng::new(plan.seed, "writer"))?;
    let mut bench = Bench { rig, writer, rng };
    let mut trials = Trials::new(plan.seed, plan.trials);
    bench.go_on(WRITES_AFTER)?;
    for &kind in &plan.kinds {
        if let Some(why) = bench.missing(kind) {
            eprintln!("failover: {kind}: skipped: {why}");
            trials.skip(kind, why);
            continue;
        }
        for number in 1..=plan.trials {
            let trial = bench.trial(kind)?;
            eprintln!(
                "failover: {kind} {number}/{}: longest gap {:.1} ms ({:.1} ms when the node was back)",
                plan.trials,
                trial.gap.as_secs_f64() * 1e3,
                trial.back.as_secs_f64() * 1e3
            );
            trials.add(kind, trial);
        }
    }
    let Bench { mut rig, writer, .. } = bench;
    writer.finish()?;
    rig.wait_clean()?;
    rig.scrub()?;
    rig.end()?;
    Ok(trials)
}

impl Bench {
    /// Why a kind cannot be measured here.
    fn missing(&self, kind: Kind) -> Option<String> {
        match kind {
            Kind::Cut if !self.rig.net.has_links() => {
                Some("nodes have no network namespaces of their own".into())
            }
            Kind::Drain if !self.rig.has_command(&["node", "drain"]) => {
                Some("this version has no `drystone node drain`".into())
            }
            _ => None,
        }
    }

    /// Waits until so many more writes have completed.
    fn go_on(&mut self, writes: u64) -> Result<(), ChaosError> {
        let until = self.writer.writes() + writes;
        let writer = &self.writer;
        self.rig.wait_until("writes to go on", |_| Ok(writer.writes() >= until))
    }

    fn trial(&mut self, kind: Kind) -> Result<Trial, ChaosError> {
        self.settle()?;
        let victim = self.rig.some_primary(&mut self.rng)?;
        let errors = self.writer.errors();
        self.go_on(WRITES_AFTER)?;
        self.writer.begin();
        self.harm(kind, victim)?;
        let gap = self.writer.gap();
        self.writer.begin();
        self.undo(kind, victim)?;
        self.rig.wait_clean()?;
        self.go_on(WRITES_AFTER)?;
        Ok(Trial { gap, back: self.writer.gap(), errors: self.writer.errors() - errors })
    }

    /// Waits for a clean cluster with primaries where placement wants them: handing them over is another event.
    fn settle(&mut self) -> Result<(), ChaosError> {
        self.rig.wait_clean()?;
        let watch = Stopwatch::start();
        self.rig.wait_until("primaries to be where placement wants them", |rig| {
            let records = rig.records()?;
            let settled = records.values().all(|record| record.primary == record.target.first().copied());
            Ok(settled || watch.elapsed() > SETTLE)
        })
    }

    /// Does the harm and waits until the writer is past it.
    fn harm(&mut self, kind: Kind, victim: usize) -> Result<(), ChaosError> {
        match kind {
            Kind::Kill => self.rig.kill(victim)?,
            Kind::Hang => self.rig.pause(victim)?,
            Kind::Cut => self.rig.net.cut(victim)?,
            Kind::Stop => self.rig.stop_node(victim)?,
            Kind::Drain => {
                // Of three nodes none can take the copies of another: its primaries are what clients notice.
                self.rig.command(&["node", "drain", &(victim + 1).to_string(), "--primaries-only"])?;
            }
            Kind::Power => {
                for index in 0..self.rig.nodes() {
                    self.rig.kill(index)?;
                }
                self.rig.start_nodes(&(0..self.rig.nodes()).collect::<Vec<_>>())?;
                return self.go_on(WRITES_AFTER);
            }
        }
        self.rig.wait_replaced(victim)?;
        self.go_on(WRITES_AFTER)
    }

    fn undo(&mut self, kind: Kind, victim: usize) -> Result<(), ChaosError> {
        match kind {
            Kind::Kill | Kind::Stop => self.rig.start_nodes(&[victim]),
            Kind::Hang => self.rig.resume(victim),
            Kind::Cut => self.rig.net.join(victim),
            Kind::Drain => self.rig.command(&["node", "undrain", &(victim + 1).to_string()]).map(|_| ()),
            Kind::Power => Ok(()),
        }
    }
}
