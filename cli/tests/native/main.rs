//! The client library against real nodes: from Rust in the caller's thread and with a thread of its own, and
//! from C.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod blocking;
mod c_program;
#[path = "../common/mod.rs"]
mod common;
mod nonblocking;

const MIB: u64 = 1 << 20;
