//! `sim`: whole clusters in one thread, in virtual time, from one seed.
//!
//! `simenv` is the simulated environment. Here are what runs on it (`cluster`, `workload`, `admin`, and
//! `solo` for a slice store alone), the faults (`nemesis`), what every seed draws (`options`), and the
//! checkers that judge a run (`check`). `planted` proves that the checkers see deliberate bugs.
//!
//! This room may know every other one but the transports. Start reading at `run`.

pub mod admin;
pub mod apps;
pub mod beyond;
pub mod check;
pub mod cluster;
mod judge;
pub mod meta;
pub mod moves;
pub mod nemesis;
pub mod options;
pub mod planted;
pub mod run;
pub mod solo;
pub mod workload;
pub mod world;
