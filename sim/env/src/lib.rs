//! `simenv`: the simulated environment. The traits of `reactor::env` over virtual time and one seed.
//!
//! `universe` holds the queue of events and the cores that it feeds; `disk` and `net` are the simulated
//! devices with their faults; `env` gives a service the environment's traits over them; `trace` hashes what
//! happens. It knows `wire` and `reactor` only, so any room may use it in its own tests; whole clusters,
//! workloads and checkers are in `sim`.
//!
//! Start reading at `universe`.

pub mod clock;
pub mod disk;
pub mod env;
pub mod net;
pub mod rng;
pub mod trace;
pub mod universe;

pub use env::SimEnv;
pub use universe::{CoreSpec, Step, Universe};
