//! A node, put together: disks, metadata region, cores with their transports and services, signals.
//!
//! `layout` decides which core owns which slice and where it runs, `metrics` publishes what the loops count
//! about themselves, `assemble` builds the cores' plans, and `run` here keeps the process alive until it is
//! told to stop.

mod assemble;
mod late;
mod layout;
pub(crate) mod metrics;
mod notify;

use crate::children::Addresses;
use crate::config::NodeConfig;
use crate::deadline::Deadline;
use crate::error::CliError;
use crate::output;
use assemble::Assembled;
pub(crate) use assemble::locked_besides_buffers;
use control::{Phase, StatusInner};
use engine::CoreMsg;
use late::Opener;
use reactor::backend::{LaunchError, Running};
use rustix::process::Signal;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;
use wire::{CONTROL_CORE, CoreId};

/// How long a clean stop may take before the process ends anyway: the control core gives the data cores
/// two seconds and the metadata group one.
const STOP_LIMIT: Duration = Duration::from_secs(8);
/// How often the control core's progress is looked at until the node is registered.
const STARTING_POLL: Duration = Duration::from_millis(5);
/// How often a registered node is looked at.
const RUNNING_POLL: Duration = Duration::from_millis(100);

/// Asks the kernel to end this process when the one that started it ends.
pub fn die_with_parent() -> Result<(), CliError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| CliError::Io { what: "tie this process to its parent".into(), source: error.into() })
}

/// How a core ended.
type Ended = (CoreId, Result<(), LaunchError>);

/// Waits for the ends of cores in a thread of its own, so that the main thread can wait for several things.
#[allow(clippy::disallowed_methods, reason = "the process around the cores, outside the seam")]
fn watch_cores(mut running: Running) -> std::io::Result<Receiver<Ended>> {
    let (tell, ended) = channel();
    std::thread::Builder::new().name("watch".into()).spawn(move || {
        while let Some(end) = running.wait_any() {
            if tell.send(end).is_err() {
                return;
            }
        }
    })?;
    Ok(ended)
}

/// Runs a node until it is told to stop or cannot go on.
pub fn run(config: &NodeConfig, port_file: Option<&Path>) -> Result<(), CliError> {
    let failed = |why: String| CliError::Node { node: config.id, why };
    // Before any thread is started: signals that arrive early must not kill half a node.
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|source| CliError::Io { what: "catch signals".into(), source })?;
    let Assembled { plans, status, late } = assemble::assemble(config)?;
    let running = reactor::backend::launch(plans).map_err(|error| failed(error.to_string()))?;
    let poster = running.poster(CONTROL_CORE).ok_or_else(|| failed("it has no control core".into()))?;
    let mut opener = Opener::new(late, poster.clone());
    let ended = watch_cores(running).map_err(|error| failed(format!("cannot watch its cores: {error}")))?;
    let mut ready = false;
    let mut stopping: Option<Deadline> = None;
    let mut end: Option<Ended> = None;
    loop {
        let now = status.get();
        opener.look(&now.wanted_disks);
        match (&now.phase, end.take()) {
            (Phase::Failed(error), _) => return Err(failed(error.to_string())),
            (_, Some((_, Err(error)))) => return Err(failed(error.to_string())),
            (Phase::Stopped, _) => break,
            (_, Some((core, Ok(())))) if stopping.is_none() => {
                return Err(failed(format!("core {core} ended by itself")));
            }
            (Phase::Registered, None) if !ready => {
                ready = true;
                announce(config, &now, port_file)?;
            }
            _ => {}
        }
        if signals.pending().next().is_some() {
            if stopping.is_some() {
                return Err(failed("it was told twice to stop".into()));
            }
            tracing::info!(node = %config.id, "told to stop");
            notify::stopping();
            stopping = Some(Deadline::after(STOP_LIMIT));
            if poster.post(Box::new(CoreMsg::Stop)).is_err() {
                return Err(failed("the control core does not listen any more".into()));
            }
        }
        if stopping.is_some_and(|deadline| deadline.passed()) {
            return Err(failed(format!("it did not stop within {} s", STOP_LIMIT.as_secs())));
        }
        let patient = ready && stopping.is_none();
        match ended.recv_timeout(if patient { RUNNING_POLL } else { STARTING_POLL }) {
            Ok(news) => end = Some(news),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break, // every core has ended, each in order
        }
    }
    // The others end now; what they have to say still counts.
    let deadline = stopping.unwrap_or_else(|| Deadline::after(STOP_LIMIT));
    while let Ok((_, result)) = ended.recv_timeout(deadline.left()) {
        result.map_err(|error| failed(error.to_string()))?;
    }
    Ok(())
}

/// Tells whoever started the node that it serves, and where.
fn announce(config: &NodeConfig, now: &StatusInner, port_file: Option<&Path>) -> Result<(), CliError> {
    let addresses = Addresses {
        node: config.id,
        control: now.control.unwrap_or(config.control),
        http: now.http.unwrap_or(config.http),
    };
    let text = serde_json::to_string(&addresses).map_err(|error| CliError::Json(error.to_string()))?;
    if let Some(path) = port_file {
        write_whole(path, &text)?;
    }
    output::line(&format!("ready {text}"))?;
    notify::ready();
    Ok(())
}

/// Writes a file so that a reader sees all of it or nothing.
pub fn write_whole(path: &Path, text: &str) -> Result<(), CliError> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    std::fs::write(&part, text)
        .and_then(|()| std::fs::rename(&part, path))
        .map_err(|source| CliError::Io { what: format!("write {}", path.display()), source })
}
