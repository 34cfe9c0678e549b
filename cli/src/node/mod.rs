//! A node, put together: disks, metadata region, cores with their transports and services, signals.
//!
//! `layout` decides which core owns which slice and where it runs, `metrics` publishes what the loops count
//! about themselves, `assemble` builds the cores' plans, and `run` here keeps the process alive until it is
//! told to stop.

mod assemble;
mod layout;
mod metrics;
mod notify;

use crate::children::Addresses;
use crate::config::NodeConfig;
use crate::deadline::Deadline;
use crate::error::CliError;
use crate::output;
use assemble::Assembled;
use control::{Phase, StatusInner};
use engine::CoreMsg;
use rustix::process::Signal;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::Path;
use std::time::Duration;
use wire::CONTROL_CORE;

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

/// Runs a node until it is told to stop or cannot go on.
pub fn run(config: &NodeConfig, port_file: Option<&Path>) -> Result<(), CliError> {
    let failed = |why: String| CliError::Node { node: config.id, why };
    // Before any thread is started: signals that arrive early must not kill half a node.
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|source| CliError::Io { what: "catch signals".into(), source })?;
    let Assembled { plans, status } = assemble::assemble(config)?;
    let running = reactor::backend::launch(plans).map_err(|error| failed(error.to_string()))?;
    let poster = running.poster(CONTROL_CORE).ok_or_else(|| failed("it has no control core".into()))?;
    let mut ready = false;
    let mut stopping: Option<Deadline> = None;
    loop {
        let now = status.get();
        match &now.phase {
            Phase::Failed(error) => return Err(failed(error.to_string())),
            Phase::Stopped => break,
            Phase::Registered if !ready => {
                ready = true;
                announce(config, &now, port_file)?;
            }
            _ => {}
        }
        if signals.pending().next().is_some() {
            if stopping.is_some() {
                return Err(failed("it was told twice to stop".into()));
            }
            tracing::info!(node = %config.id, "stopping");
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
        std::thread::park_timeout(if patient { RUNNING_POLL } else { STARTING_POLL });
    }
    running.join().map_err(|error| failed(error.to_string()))
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
fn write_whole(path: &Path, text: &str) -> Result<(), CliError> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    std::fs::write(&part, text)
        .and_then(|()| std::fs::rename(&part, path))
        .map_err(|source| CliError::Io { what: format!("write {}", path.display()), source })
}
