//! The library over real TCP against a cluster that answers with wire frames, from Rust and from C.

#![allow(clippy::disallowed_methods, reason = "the test's server is threads and sockets")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on shall panic")]

mod blocking;
mod c_program;
#[path = "../../../tests/it/cluster.rs"]
#[allow(dead_code, reason = "shared with the client's tests, which use more of it")]
mod cluster;
mod header;
mod nonblocking;
mod server;
