//! `net-rdma`: the reactor's `Transport` over RDMA. **It does not carry connections yet.**
//!
//! What is here, behind feature `rdma` (off by default, it links libibverbs): finding a device and its
//! active port, choosing the GID that RoCE v2 should use, a protection domain, and the registration of a
//! core's whole buffer arena as one memory region, so that payloads can later go wire, arena, drive without
//! a copy. What is not: queue pairs, completion queues and everything above them. `listen` is refused with
//! "not supported" and `connect` ends at once in `Closed(Broken(EOPNOTSUPP))`; a node therefore runs on
//! `net-tcp`, and nothing pretends otherwise.
//!
//! This room may know `wire` and `reactor`. Start reading at `device`, then `transport`.

#[cfg(feature = "rdma")]
mod device;
mod error;
mod gid;
#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "driven by the verbs transport only"))]
mod link;
#[cfg(feature = "rdma")]
mod transport;

#[cfg(feature = "rdma")]
pub use device::{Device, DeviceOptions, Region};
pub use error::RdmaError;
pub use gid::Gid;
#[cfg(feature = "rdma")]
pub use transport::RdmaTransport;
