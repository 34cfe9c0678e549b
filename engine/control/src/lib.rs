//! `control`: the control core of a node. One per node, beside the data cores.
//!
//! It hosts the node's metadata voter (package `consensus`) or a connection to one, keeps the node's
//! lease, tells the data cores which PGs they take part in, carries what their primaries want into the
//! metadata, serves clients and tools, and runs the director on the node whose voter leads.
//!
//! Start reading at `core`: the events, and who handles them. `lease` is how a node comes to have
//! authority; `director::decide` is what a PG's next configuration is: everything that keeps data safe
//! across failures is in these two, and in `claims`, which keeps out disks that are not what they were.
//! `server` and `http` face strangers, `pages` is what `http` shows. `admin` builds the transactions
//! of administrators and is used by the command line as well. `voters` follows changes of who keeps the metadata.
//!
//! The package knows the environment's traits only; the simulator runs this very code.

pub mod admin;
pub mod claims;
mod config;
mod core;
pub mod director;
mod drive;
mod feed;
mod frames;
mod http;
mod lease;
mod links;
mod metrics;
mod mirror;
mod new_disks;
mod own_slices;
mod pages;
pub mod planted;
mod registration;
mod scrubs;
mod server;
mod slow_disks;
mod stats;
mod stop;
mod strays;
pub mod view;
mod voters;
mod wishes;

pub use config::{
    ControlConfig, ControlError, ControlStatus, DRIFT_MARGIN_PERCENT, LEASE_RENEW_MS, LEASE_TTL_MS,
    LinksPage, MetaRegion, Phase, StatusInner, Voter,
};
pub use core::ControlCore;
pub use metrics::ControlMetrics;
pub use new_disks::{NEW_DISKS_MAX, NewDiskError};
pub use planted::Planted;
