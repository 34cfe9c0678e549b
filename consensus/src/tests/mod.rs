//! Tests of whole groups.

mod decoders;
mod disk;
mod faults;
mod group;
mod leases;
#[cfg(feature = "planted")]
mod planted;
