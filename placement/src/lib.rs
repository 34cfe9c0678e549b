//! `placement`: where data lives. Topology, pools and images as the metadata store keeps them (`map`),
//! and the rule that assigns slices to placement groups. Pure functions, no I/O, knows `wire` only.
//!
//! Start reading at `map`: its table of keys is the cluster's whole persistent state.

pub mod map;

pub use map::*;
