//! systemd's readiness protocol: one datagram to the socket that `NOTIFY_SOCKET` names.

#![allow(clippy::disallowed_methods, reason = "process start-up lies outside the seam")]

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Says that the node serves.
pub fn ready() {
    say("READY=1\nSTATUS=serving");
}

/// Says that the node is stopping.
pub fn stopping() {
    say("STOPPING=1");
}

/// Failures are logged, never fatal: a node that serves must not end because nobody listens.
fn say(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|to| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &to));
    if let Err(error) = sent {
        tracing::warn!("cannot notify systemd: {error}");
    }
}
