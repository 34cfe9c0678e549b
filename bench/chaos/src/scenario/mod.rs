//! The scenarios: what is done to the cluster while clients and fio work. Each is bounded in count and time.
//! `stage` makes the cluster and the clients, and demands what must hold afterwards.

mod capacity;
mod cpu;
mod disks;
mod membership;
mod network;
mod planted;
mod processes;

use crate::error::ChaosError;
use crate::stage::{Form, Setting, Stage};

/// A disturbance with a name.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// Whether nodes need links, or disks with file systems, of their own.
    pub needs_links: bool,
    /// What it starts with.
    pub setting: fn(&Form) -> Setting,
    /// What it does.
    pub run: fn(&mut Stage) -> Result<(), ChaosError>,
}

fn usual(_: &Form) -> Setting {
    Setting::default()
}

pub use planted::ROLLED_BACK;

/// All of them, those first that find most.
pub const ALL: [Scenario; 22] = [
    processes::HEAL,
    processes::SPLITBRAIN,
    network::PARTITION,
    network::SLOW_NETWORK,
    processes::POWER,
    processes::ROLLING_RESTART,
    processes::CONTROL_PLANE,
    processes::DEGRADED_HOST,
    processes::MINSIZE_1,
    capacity::ENOSPC,
    capacity::FULL_DISK,
    disks::EIO_ALL,
    disks::EIO_WRITES,
    disks::EIO_READS,
    disks::SLOW_DISK,
    disks::HANG,
    membership::NEW_DISK,
    membership::ADD_OSD,
    membership::INTERRUPTED_REBALANCE,
    membership::RM_DEGRADED,
    membership::DRAIN,
    cpu::OVERSUBSCRIBED,
];
