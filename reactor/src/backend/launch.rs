//! Starts a node's cores: one thread each, made and pinned by glommio, whose one long-lived task is our
//! loop. The loop never yields to glommio; it blocks in its own ring.

#![allow(clippy::disallowed_types, reason = "the only place that names glommio")]

use super::core::{Core, CoreError, CoreOptions};
use super::mesh::{MeshEnd, Poster};
use super::transport::Transport;
use crate::env::Service;
use glommio::{ExecutorJoinHandle, GlommioError, LocalExecutorBuilder, Placement, PoolPlacement};
use std::io;
use std::sync::mpsc;
use thiserror::Error;
use wire::CoreId;

/// Makes a core's service on the core's own thread.
pub type ServiceFactory = Box<dyn FnOnce() -> Box<dyn Service> + Send>;
/// Makes a core's transport on the core's own thread.
pub type TransportFactory = Box<dyn FnOnce() -> Box<dyn Transport> + Send>;

/// glommio's own rings are never used by the loop: the smallest that it accepts.
const EXECUTOR_RING_DEPTH: usize = 4;
/// glommio's own buffers are never used either; it raises this to its minimum of 64 KiB.
const EXECUTOR_IO_BYTES: usize = 0;

/// Where a core runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cpu {
    /// On this CPU alone.
    Pinned(usize),
    /// Wherever the process may.
    Floating,
}

/// One core of a node.
pub struct CorePlan {
    /// Its number.
    pub core: CoreId,
    /// Where it runs.
    pub cpu: Cpu,
    /// How it is made.
    pub options: CoreOptions,
    /// Its network.
    pub transport: TransportFactory,
    /// What it runs.
    pub service: ServiceFactory,
}

/// Why a node cannot start, or how it ended.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// A core's environment cannot be made, or broke.
    #[error("core {core}: {error}")]
    Core {
        /// Which.
        core: CoreId,
        /// Why.
        #[source]
        error: CoreError,
    },
    /// glommio cannot make the executor: no such CPU, or too little locked memory (it wants 512 KiB).
    #[error("core {core}: cannot start its executor: {why}")]
    Executor {
        /// Which.
        core: CoreId,
        /// Why.
        why: String,
    },
    /// A core's thread ended without a word: it panicked, and said so on standard error.
    #[error("core {0} died")]
    Died(CoreId),
    /// The mesh cannot be made.
    #[error("mesh between cores: {0}")]
    Mesh(#[source] io::Error),
}

/// The CPUs this process may run on, ascending.
pub fn allowed_cpus() -> Vec<usize> {
    // SAFETY: cpu_set_t is plain data, for which zero bytes are a valid (empty) set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid to write to and its size is given.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } != 0 {
        return Vec::new();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: reads a bit below CPU_SETSIZE.
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
        .collect()
}

type Outcome = Result<(), CoreError>;

/// What a core's thread reports.
enum Report {
    Started,
    Ended(Outcome),
}

/// Says `Died` when the thread unwinds before it could say how it ended.
struct EndGuard {
    core: CoreId,
    reports: mpsc::Sender<(CoreId, Option<Report>)>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        let _ = self.reports.send((self.core, None));
    }
}

/// A running node.
pub struct Running {
    handles: Vec<(CoreId, ExecutorJoinHandle<()>)>,
    posters: Vec<(CoreId, Poster)>,
    reports: mpsc::Receiver<(CoreId, Option<Report>)>,
    ended: Vec<CoreId>,
}

impl Running {
    /// Posts messages to a core from outside, for example from a signal handler's thread.
    pub fn poster(&self, core: CoreId) -> Option<Poster> {
        self.posters.iter().find(|(id, _)| *id == core).map(|(_, poster)| poster.clone())
    }

    /// Waits until a further core has ended and says which and how; `None` when all have.
    pub fn wait_any(&mut self) -> Option<(CoreId, Result<(), LaunchError>)> {
        while self.ended.len() < self.handles.len() {
            let (core, report) = self.reports.recv().ok()?;
            if self.ended.contains(&core) {
                continue; // its guard, after its own word
            }
            let result = match report {
                Some(Report::Started) => continue,
                Some(Report::Ended(outcome)) => outcome.map_err(|error| LaunchError::Core { core, error }),
                None => Err(LaunchError::Died(core)),
            };
            self.ended.push(core);
            return Some((core, result));
        }
        None
    }

    /// Waits until all cores have ended; the first failure counts.
    pub fn join(mut self) -> Result<(), LaunchError> {
        let mut first = Ok(());
        while let Some((_, result)) = self.wait_any() {
            first = first.and(result);
        }
        for (core, handle) in self.handles {
            if let Err(error) = handle.join() {
                first = first.and(Err(LaunchError::Executor { core, why: error.to_string() }));
            }
        }
        first
    }
}

/// Starts the cores of one node with a mesh between them. Returns when all run, or the first failure;
/// cores already started are not stopped then: the caller ends the process.
pub fn launch(plans: Vec<CorePlan>) -> Result<Running, LaunchError> {
    let ids: Vec<CoreId> = plans.iter().map(|plan| plan.core).collect();
    let ends = MeshEnd::build(&ids).map_err(LaunchError::Mesh)?;
    let (tx, reports) = mpsc::channel();
    let mut running = Running { handles: Vec::new(), posters: Vec::new(), reports, ended: Vec::new() };
    for (plan, mesh) in plans.into_iter().zip(ends) {
        let core = plan.core;
        running.posters.push((core, mesh.poster()));
        let handle = start(plan, mesh, tx.clone())
            .map_err(|error| LaunchError::Executor { core, why: error.to_string() })?;
        running.handles.push((core, handle));
    }
    drop(tx);
    let mut started = 0;
    while started < running.handles.len() {
        match running.reports.recv() {
            Ok((_, Some(Report::Started))) => started += 1,
            Ok((core, Some(Report::Ended(Err(error))))) => {
                return Err(LaunchError::Core { core, error });
            }
            // Ended in an orderly way before the others had started: remembered for `wait_any`.
            Ok((core, Some(Report::Ended(Ok(()))))) => running.ended.push(core),
            Ok((core, None)) if running.ended.contains(&core) => {}
            Ok((core, None)) => return Err(died(running, core)),
            Err(_) => break,
        }
    }
    Ok(running)
}

/// A thread that ended without a report: glommio's refusal if there is one, else a panic.
fn died(running: Running, core: CoreId) -> LaunchError {
    for (id, handle) in running.handles {
        if id == core
            && let Err(error) = handle.join()
        {
            return LaunchError::Executor { core, why: error.to_string() };
        }
    }
    LaunchError::Died(core)
}

fn start(
    plan: CorePlan,
    mesh: MeshEnd,
    reports: mpsc::Sender<(CoreId, Option<Report>)>,
) -> Result<ExecutorJoinHandle<()>, GlommioError<()>> {
    let CorePlan { core, cpu, options, transport, service } = plan;
    let (placement, pool) = match cpu {
        Cpu::Pinned(cpu) => (Placement::Fixed(cpu), PoolPlacement::Unbound(1)),
        Cpu::Floating => (Placement::Unbound, PoolPlacement::Unbound(1)),
    };
    let name = if core == wire::CONTROL_CORE { "control".to_owned() } else { format!("data{core}") };
    // Made here, so that it also speaks when glommio refuses before the task runs.
    let guard = EndGuard { core, reports };
    LocalExecutorBuilder::new(placement)
        .name(&name)
        .ring_depth(EXECUTOR_RING_DEPTH)
        .io_memory(EXECUTOR_IO_BYTES)
        .blocking_thread_pool_placement(pool)
        .spawn(move || async move {
            let guard = guard;
            let outcome = Core::new(options, transport(), mesh, service).and_then(|mut core| {
                let _ = guard.reports.send((guard.core, Some(Report::Started)));
                core.run()
            });
            let _ = guard.reports.send((guard.core, Some(Report::Ended(outcome))));
        })
}
