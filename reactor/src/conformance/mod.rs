//! The environment conformance suite: what every environment must do, as scenarios that run anywhere.
//!
//! A scenario is one or two services and a check. It sees the environment's traits and a `World` that
//! builds cores and lets them run: the production backend with threads and real sockets, the simulator
//! in virtual time. Both must pass every scenario of `all()`; that is what makes a result of the
//! simulator say something about production.
//!
//! Start reading at `World`; the scenarios are in `disk`, `net` and `core`. `real` is the production backend as a world,
//! with whichever transport.

mod core;
mod disk;
mod net;
mod probe;
mod real;

pub use self::real::{Disks, Host, Kind, LoopDevice, Real, run};
use crate::env::Service;
use std::net::SocketAddr;
use wire::CoreId;

/// Builds a service on the core that will run it.
pub type ServiceFactory = Box<dyn FnOnce() -> Box<dyn Service> + Send>;

/// A core that a scenario wants.
pub struct CorePlan {
    /// Which node it belongs to: cores with the same number share a mesh, others have only the network.
    pub node: usize,
    /// Its number on the node: 0, 1, … (any `CoreId`, unique on the node).
    pub core: CoreId,
    /// Sizes in bytes (multiples of 4096) of its disks, in the order of `DiskIndex`. A disk is fresh and
    /// reads as zeroes.
    pub disks: Vec<u64>,
    /// Size of its arena, in bytes. The environment may round up to 256 KiB, and no further.
    pub arena_bytes: usize,
    /// Makes its service.
    pub service: ServiceFactory,
}

/// An environment under test. One `World` serves one scenario.
pub trait World {
    /// Starts all cores of the scenario; called once. `Service::start` of each has run, or runs before
    /// `run_until` returns true.
    fn start(&mut self, cores: Vec<CorePlan>) -> Result<(), String>;

    /// Where a core of `node` may listen: an address with port 0. `Net::listen` on it returns an address
    /// to which cores of every node can connect.
    fn listen_address(&self, node: usize) -> SocketAddr;

    /// An address where a host answers and nothing listens: connecting to it is refused.
    fn refusing_address(&self, node: usize) -> SocketAddr;

    /// Lets the cores run until `done` says true, which is asked again and again from the caller's
    /// thread, or until the world has run for `LIMIT_MS` of its own time (real or virtual): then false.
    /// May be called several times. Cores keep running between calls where time is real.
    fn run_until(&mut self, done: &mut dyn FnMut() -> bool) -> bool;
}

/// How long a scenario may take, in milliseconds of the world's own time.
pub const LIMIT_MS: u64 = 20_000;

/// A named scenario. The error says what was seen and what was due.
pub struct Scenario {
    /// Unique name, for reports.
    pub name: &'static str,
    /// Runs it in a fresh world.
    pub run: fn(&mut dyn World) -> Result<(), String>,
}

/// Every scenario.
pub fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(disk::scenarios());
    all.extend(net::scenarios());
    all.extend(core::scenarios());
    all
}
