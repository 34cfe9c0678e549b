//! Sockets and their options.

use reactor::NetError;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Connections the kernel may hold before they are accepted: a restart of all clients at once.
const BACKLOG: i32 = 1024;
/// Seconds of silence before the kernel asks whether the peer is alive, between questions, and how many.
const KEEPALIVE_IDLE_S: i32 = 3;
const KEEPALIVE_INTERVAL_S: i32 = 1;
const KEEPALIVE_PROBES: i32 = 3;
/// Congestion control: one that sends at once, the first that the kernel grants. Hosts with BBR as their default pace
/// every burst by a timer, which costs more than the burst.
const CONGESTION: [&[u8]; 2] = [b"cubic", b"reno"];
/// How long sent bytes may stay unacknowledged before the connection is broken, in milliseconds.
const USER_TIMEOUT_MS: i32 = 5_000;

/// A socket address as the kernel wants it.
pub(crate) struct RawAddr {
    pub(crate) storage: libc::sockaddr_storage,
    pub(crate) len: libc::socklen_t,
}

impl RawAddr {
    pub(crate) fn empty() -> Self {
        Self {
            // SAFETY: sockaddr_storage is plain data, for which zero bytes are a valid value.
            storage: unsafe { std::mem::zeroed() },
            len: size_of::<libc::sockaddr_storage>() as libc::socklen_t,
        }
    }

    pub(crate) fn of(addr: SocketAddr) -> Self {
        let mut raw = Self::empty();
        match addr {
            SocketAddr::V4(v4) => {
                let sin = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: sockaddr_storage is large enough and aligned for every address type.
                unsafe { (&raw mut raw.storage).cast::<libc::sockaddr_in>().write(sin) };
                raw.len = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            }
            SocketAddr::V6(v6) => {
                let sin6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                // SAFETY: as above.
                unsafe { (&raw mut raw.storage).cast::<libc::sockaddr_in6>().write(sin6) };
                raw.len = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            }
        }
        raw
    }

    pub(crate) fn get(&self) -> SocketAddr {
        if i32::from(self.storage.ss_family) == libc::AF_INET6 {
            // SAFETY: the family says that this is a sockaddr_in6, which the storage has room for.
            let sin6 = unsafe { (&raw const self.storage).cast::<libc::sockaddr_in6>().read() };
            SocketAddr::V6(SocketAddrV6::new(
                Ipv6Addr::from(sin6.sin6_addr.s6_addr),
                u16::from_be(sin6.sin6_port),
                sin6.sin6_flowinfo,
                sin6.sin6_scope_id,
            ))
        } else {
            // SAFETY: all-zero or AF_INET, both of which read as a sockaddr_in.
            let sin = unsafe { (&raw const self.storage).cast::<libc::sockaddr_in>().read() };
            SocketAddr::V4(SocketAddrV4::new(
                Ipv4Addr::from(sin.sin_addr.s_addr.to_ne_bytes()),
                u16::from_be(sin.sin_port),
            ))
        }
    }

    pub(crate) fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// A stream socket of the address's family. Not marked non-blocking: io_uring would then give EAGAIN
/// back instead of waiting.
pub(crate) fn stream(addr: SocketAddr) -> Result<OwnedFd, i32> {
    let family = if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: plain system call; the result is checked before it becomes an owned descriptor.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: `fd` is a fresh descriptor that nobody else owns.
    if fd < 0 { Err(last_errno()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

fn set(fd: &OwnedFd, level: i32, option: i32, value: i32) -> Result<(), i32> {
    // SAFETY: passes a live i32 and its size.
    let done = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Options of every connection: no delay, and an end within seconds when the peer is gone.
pub(crate) fn tune(fd: &OwnedFd) -> Result<(), i32> {
    set(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    choose_congestion(fd);
    set(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE_IDLE_S)?;
    set(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)?;
    set(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
    set(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
}

/// Chooses the congestion control. To be called before there is a connection: a socket that has begun with pacing goes
/// on with it whatever is chosen later. A kernel that grants none of ours keeps its own.
fn choose_congestion(fd: &OwnedFd) {
    for name in CONGESTION {
        // SAFETY: passes a live byte string and its length.
        let done = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_CONGESTION,
                name.as_ptr().cast(),
                name.len() as libc::socklen_t,
            )
        };
        if done == 0 {
            return;
        }
    }
}

/// A listening socket and the address it got.
pub(crate) fn listen(at: SocketAddr) -> Result<(OwnedFd, SocketAddr), NetError> {
    let error = |errno| if errno == libc::EADDRINUSE { NetError::InUse } else { NetError::Os(errno) };
    let fd = stream(at).map_err(error)?;
    set(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).map_err(error)?;
    // What it accepts is connected before anybody could choose.
    choose_congestion(&fd);
    let addr = RawAddr::of(at);
    // SAFETY: the address is live and its length is its own.
    if unsafe { libc::bind(fd.as_raw_fd(), addr.as_ptr(), addr.len) } != 0 {
        return Err(error(last_errno()));
    }
    // SAFETY: plain system call on an owned descriptor.
    if unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) } != 0 {
        return Err(error(last_errno()));
    }
    let mut bound = RawAddr::empty();
    // SAFETY: storage and length are valid to write to, and the length says how much room there is.
    let got =
        unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut bound.storage).cast(), &raw mut bound.len) };
    if got != 0 {
        return Err(error(last_errno()));
    }
    Ok((fd, bound.get()))
}

/// Ends both directions, so that outstanding operations on the socket complete.
pub(crate) fn shut(fd: &OwnedFd, how: i32) {
    // SAFETY: plain system call on an owned descriptor. It fails when the peer is gone already: fine.
    unsafe { libc::shutdown(fd.as_raw_fd(), how) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_kernel_form() {
        for text in ["127.0.0.1:80", "10.1.2.3:65535", "[::1]:1", "[fe80::1234]:4096"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(RawAddr::of(addr).get(), addr);
        }
    }

    fn congestion_of(fd: &OwnedFd) -> Vec<u8> {
        let (mut name, mut len) = ([0u8; 16], 16);
        // SAFETY: name and length are valid to write to, and the length says how much room there is.
        let got = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_CONGESTION,
                name.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        assert_eq!(got, 0);
        name.into_iter().take_while(|byte| *byte != 0).collect()
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the peer of an accepted socket, outside any loop")]
    fn accepted_connections_never_had_another_congestion_control() {
        let (listener, at) = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let _there = std::net::TcpStream::connect(at).unwrap();
        // SAFETY: plain system call; the result is checked before it becomes an owned descriptor.
        let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
        assert!(fd >= 0);
        // SAFETY: `fd` is a fresh descriptor that nobody else owns.
        let accepted = congestion_of(&unsafe { OwnedFd::from_raw_fd(fd) });
        assert!(CONGESTION.contains(&accepted.as_slice()), "{:?}", String::from_utf8_lossy(&accepted));
    }

    #[test]
    fn a_taken_address_is_told_apart() {
        let (_fd, at) = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        assert_ne!(at.port(), 0);
        assert_eq!(listen(at).unwrap_err(), NetError::InUse);
    }
}
