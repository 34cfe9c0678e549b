//! `engine`: the data core of a node. It owns slices (crate `store`) and takes part in the placement groups
//! whose members they are: as primary it orders and replicates client operations, as member it follows.
//!
//! A PG's record in the metadata store is the configuration; the control core sends it here with every
//! change (`msg`), and everything done carries its epoch. Members obey one primary per epoch; a primary
//! serves only while its node's lease lasts, and only after all acting members have promised its epoch and
//! have been compared with it.
//!
//! It may know `wire`, `placement`, `store` and `reactor`'s traits. Start reading at `core` (tables, routing),
//! then `append`, `commit` and `read` (the data path), `member` (the other side), `origins` (changes sent
//! again), `config_change`, `activate`, `peering` and `listing` (from record to serving), `recovery`, `priority`,
//! `purge` and `scrub` (the background), which `share` keeps from getting in clients' way, `slices` and
//! `disk_health` (what a disk does, and when it goes).

mod activate;
mod append;
mod coming;
mod commit;
mod config;
mod config_change;
mod core;
mod disk_health;
mod hash;
mod listing;
mod member;
pub mod metrics;
pub mod msg;
mod op;
mod origins;
mod payload;
mod peer;
mod peering;
mod pg;
pub mod planted;
mod priority;
mod purge;
mod reach;
mod read;
mod recovery;
mod report;
mod scrub;
mod session;
mod share;
mod slab;
mod slices;
mod strays;
#[cfg(test)]
mod tests;

pub use crate::core::DataCore;
pub use config::{DISK_PROBE_S, DISK_TIMEOUT_S, DataCoreConfig, SCRUB_BYTES_PER_SECOND, SliceConfig};
pub use msg::CoreMsg;
pub use origins::ORIGINS_PER_PG_MAX;
pub use planted::Planted;
pub use report::PgState;
