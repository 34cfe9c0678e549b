//! What can go wrong before a connection exists.

use std::io;
use thiserror::Error;

/// Why RDMA cannot be used.
#[derive(Debug, Error)]
pub enum RdmaError {
    /// This program was built without RDMA.
    #[error("this program was built without RDMA (cargo feature rdma)")]
    NotBuilt,
    /// The machine has none, or its driver is not loaded.
    #[error("no RDMA device")]
    NoDevice,
    /// The machine has others.
    #[error("no RDMA device named {0}")]
    NoSuchDevice(String),
    /// The device does not open.
    #[error("RDMA device {device} cannot be opened: {error}")]
    Open {
        /// Its name.
        device: String,
        /// What the system said.
        error: io::Error,
    },
    /// The port is down or does not exist.
    #[error("port {port} of RDMA device {device} is not active")]
    PortDown {
        /// The device's name.
        device: String,
        /// The port, from 1.
        port: u8,
    },
    /// No address to speak from.
    #[error("port {port} of RDMA device {device} has no usable GID")]
    NoGid {
        /// The device's name.
        device: String,
        /// The port, from 1.
        port: u8,
    },
    /// Without memory windows a peer could reach all of the registered memory.
    #[error("RDMA device {0} has no memory windows of type 2, without which a peer could read all buffers")]
    NoWindows(String),
    /// Something that connections need cannot be made.
    #[error("RDMA {what}: {error}")]
    Make {
        /// What.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The core's buffers are exhausted.
    #[error("no buffer memory left for an RDMA connection")]
    NoBuffers,
    /// The core has as many RDMA connections as its completion queue has room for.
    #[error("no room for another RDMA connection: {0} at most")]
    TooMany(usize),
    /// No protection domain.
    #[error("protection domain: {0}")]
    ProtectionDomain(io::Error),
    /// The arena cannot be registered; most often the limit on locked memory.
    #[error("cannot register {bytes} bytes with the RDMA device: {error} (see ulimit -l)")]
    Register {
        /// How much was asked for.
        bytes: usize,
        /// What the system said.
        error: io::Error,
    },
}
