//! GIDs: the addresses of an RDMA port, and which of them to use.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// A GID: 16 bytes, for RoCE an IPv6 (or mapped IPv4) address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// As an IP address, IPv4 where it is a mapped one.
    pub fn ip(self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.0);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }

    /// How much this one is to be preferred: routable RoCE v2 addresses over link-local ones over RoCE v1,
    /// IPv4 over IPv6. `None` for an empty entry of the table.
    pub fn preference(self, roce_v2: bool) -> Option<u8> {
        if self.0 == [0; 16] {
            return None;
        }
        Some(match (roce_v2, self.ip()) {
            (true, IpAddr::V4(_)) => 4,
            (true, IpAddr::V6(v6)) if !v6.is_unicast_link_local() => 3,
            (true, IpAddr::V6(_)) => 2,
            // InfiniBand and RoCE v1.
            (false, _) => 1,
        })
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(text: &str) -> Gid {
        Gid(text.parse::<Ipv6Addr>().unwrap().octets())
    }

    #[test]
    fn routable_roce_v2_comes_first_and_empty_entries_never() {
        let v4 = gid("::ffff:10.0.0.1");
        assert_eq!(v4.to_string(), "10.0.0.1");
        let order = [
            v4.preference(true),
            gid("2001:db8::1").preference(true),
            gid("fe80::1").preference(true),
            v4.preference(false),
            gid("::").preference(true),
        ];
        assert!(order.windows(2).all(|w| w[0] > w[1]), "{order:?}");
    }
}
