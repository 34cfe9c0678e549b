//! `drystone`: images of a Drystone cluster, on a real network, for Rust and C programs.
//!
//! `Client` puts `client::ClientCore` on the reactor's loop with TCP, in the caller's thread: submit,
//! poll, and an eventfd to wait on; no other thread, no wake-up. Use several in several threads.
//! `blocking` is a convenience on top, with a thread of its own. `capi` is the C interface, whose header
//! `include/drystone.h` is generated from it. `docs/client.md` has the rules of ordering and failure.
//!
//! This room may know `client`, `wire`, `reactor` and the transports. Start reading at `nonblocking`.

pub mod blocking;
pub mod capi;
mod errno;
mod nonblocking;

pub use client::{
    AdminDone, AdminError, AdminTicket, Counters, IMAGES_MAX, ImageHandle, ImageInfo, IoDone, IoError,
    MAX_IO_BYTES, OPS_MAX, OnNoSpace, Op, OpenMode, Options, SubmitError, Ticket,
};
pub use net_rdma::{Choice as TransportChoice, ChoiceError as TransportChoiceError};
pub use nonblocking::{Client, Hosting};
pub use reactor::IoBuf;
pub use reactor::backend::CoreError;
pub use wire::BLOCK_BYTES;
pub use wire::control::{Change, Compare, KeyValue, MetaReply, MetaRequest, Write};
