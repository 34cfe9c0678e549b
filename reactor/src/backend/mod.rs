//! The production environment: one loop per core on one io_uring.
//!
//! `core` is the loop, `ring` its io_uring, `polled` a second one for drives that are polled, `disk_file` and `disk`
//! the drives, `device` what the kernel says of them, `namespace` and `nvme` those that take commands, `links` which
//! connections there are, `mesh` the rings between cores, `transport` the seam behind which `net-tcp` and `net-rdma` live. `launch` starts a node's cores on threads that glommio pins; `foreign` drives
//! the same loop from somebody else's thread (fio, QEMU), for which `host_thread` can make one.
//!
//! Nothing outside this module and the transports names io_uring, glommio, sockets or threads. Start
//! reading at `core`.

mod clock;
mod core;
mod device;
mod disk;
mod disk_file;
mod foreign;
mod heap;
mod host_thread;
mod idle;
mod late_disks;
mod launch;
mod links;
mod mesh;
mod namespace;
mod nvme;
mod polled;
mod ring;
mod rng;
mod spsc;
mod stats;
mod timers;
mod transport;

pub use self::core::{CoreError, CoreOptions};
pub use self::device::{Device, DeviceError};
pub use self::disk::DISK_OPS_MAX;
pub use self::disk_file::{DiskFile, DiskOpenError};
pub use self::foreign::ForeignCore;
pub use self::heap::{CountingHeap, allocations_of_this_thread};
pub use self::host_thread::HostThread;
pub use self::late_disks::{LATE_DISKS_MAX, LateDisks, TooManyDisks};
pub use self::launch::{
    CorePlan, Cpu, LaunchError, Running, ServiceFactory, TransportFactory, allowed_cpus, launch,
};
pub use self::links::{Link, LinkState, LinkTable};
pub use self::mesh::{OUTSIDE, Poster};
pub use self::namespace::{Access, PassthroughError};
pub use self::polled::Polling;
pub use self::ring::Ring;
pub use self::stats::{CoreStats, Counter, STALL_NS};
pub use self::transport::{NoTransport, Polled, Transport, TransportIo};
