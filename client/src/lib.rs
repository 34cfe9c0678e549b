//! `client`: images of one cluster as a state machine without threads, sockets or clocks.
//!
//! `ClientCore` keeps a map of the placement groups it needs, splits operations at object borders, sends
//! each part to the core that is the PG's primary, and sends it again until it is answered. Overlapping
//! operations of one client are performed in the order of submission, others in any order; every
//! completion means durable (`docs/client.md`).
//!
//! This room may know `wire`, `placement` and the traits of `reactor`. The simulator drives it as it is;
//! `client/native` puts it on a real network and behind a C interface.
//!
//! Start reading at `core`, then `io` (acceptance and order), `send`, `reply`; `control` and `map` are how
//! it knows the cluster.

mod control;
mod core;
mod error;
mod frames;
mod io;
mod map;
mod op;
mod open;
mod options;
mod order;
mod part;
mod peer;
#[cfg(feature = "planted")]
pub mod planted;
mod reply;
mod send;
mod slab;
mod watch;

pub use self::core::ClientCore;
pub use error::{AdminError, IoError, SubmitError};
pub use io::Counters;
pub use op::{AdminDone, AdminTicket, ImageHandle, ImageInfo, IoDone, Op, Ticket};
pub use options::{
    FAULT_TRIES_MAX, IMAGES_MAX, IN_FLIGHT_MAX, MAX_IO_BYTES, OPS_MAX, OnNoSpace, OpenMode, Options,
    PARTS_MAX,
};
