//! Tests of whole groups.

mod decoders;
mod disk;
mod faults;
mod group;
mod leases;
mod members;
#[cfg(feature = "planted")]
mod planted;
