//! `placement`: where data lives. Topology, pools and images as the metadata store keeps them (`map`),
//! and the rule that assigns slices to placement groups. Pure functions, no I/O, knows `wire` only.
//!
//! - `map`: the JSON values and their keys: the cluster's whole persistent state. Start reading there.
//! - `topology`: the slices and the failure domains they lie in.
//! - `assign`: the rule: an ordered list of slices for every PG of a pool, balanced, moving little; at once or in
//!   bounded steps.
//! - `fair`: how many PGs each slice should hold.
//! - `primary`: which member of each PG comes first, so that slices and cores serve alike.

mod assign;
mod fair;
pub mod map;
mod primary;
mod topology;

pub use assign::{Assigner, COPIES_MAX, LOOKS_PER_STEP, PG_COUNT_MAX, PlacementError, Rule, assign};
pub use fair::TOLERANCE_PERCENT;
pub use map::*;
pub use topology::{Spot, Topology};
