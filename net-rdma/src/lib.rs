//! `net-rdma`: the reactor's `Transport` over RDMA (RoCE v2, InfiniBand), for one core.
//!
//! A connection begins on TCP, over a transport beneath, and goes on over a queue pair when both sides can
//! (`negotiate`). `link` is what a connection does once it has one, as a state machine without verbs: credits, windows,
//! fetches, order. Behind feature `rdma` (off by default, it links libibverbs) are `transport`, which drives links
//! and owns a core's connections, `queue_pair` and `completion`, the verbs, `events`, what a device says by itself, and `device`: the device, its GID, and a
//! core's whole buffer arena as one memory region, so that payloads go wire, arena, drive without a copy.
//!
//! This room may know `wire` and `reactor`. Start reading at `negotiate`, then `link`.

mod choice;
#[cfg(feature = "rdma")]
mod completion;
#[cfg(feature = "rdma")]
mod device;
#[cfg(feature = "rdma")]
mod entry;
mod error;
#[cfg(feature = "rdma")]
mod events;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod gid;
#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "driven by the verbs transport only"))]
mod link;
#[cfg(feature = "rdma")]
mod negotiate;
mod offer;
#[cfg(feature = "rdma")]
mod peers;
#[cfg(feature = "rdma")]
mod queue_pair;
#[cfg(feature = "rdma")]
mod transport;

pub use choice::{Choice, ChoiceError, MakeTcp, Plan, TRANSPORT_VARIABLE};
#[cfg(feature = "rdma")]
pub use device::{Device, DeviceOptions, Limits};
pub use error::RdmaError;
pub use gid::Gid;
pub use offer::{OFFER_BYTES, Offer, OfferError};
#[cfg(feature = "rdma")]
pub use transport::{RDMA_CONNECTIONS_MAX, RdmaTransport};
