//! A soft-RoCE device for tests of RDMA: `rxe0` on one end of a pair of virtual interfaces.

use super::system::{module, text, tool, wait_until};
use crate::error::GuestError;
use std::path::{Path, PathBuf};

/// The kernel's RDMA devices.
const DEVICES: &str = "/sys/class/infiniband";
/// The device's name.
const NAME: &str = "rxe0";
/// Its interface, that one's other end, and its address: from a range for documentation and tests.
const INTERFACE: &str = "rdma-a";
const OTHER_END: &str = "rdma-b";
const ADDRESS: &str = "198.18.0.1";
/// Jumbo frames, as networks for RoCE have them: a block of 4 KiB is then one packet.
const MTU: &str = "9000";
/// What the kernel calls a GID that travels in UDP.
const ROCE_V2: &str = "RoCE v2";

/// An RDMA device, removed with its interface when dropped.
pub struct Rxe {
    /// Its name.
    pub name: &'static str,
    /// Index of its GID of RoCE v2 for that address.
    pub gid_index: u32,
}

/// A soft-RoCE device on an interface of its own.
pub fn make() -> Result<Rxe, GuestError> {
    module("veth", &[])?;
    let pair = ["link", "add", INTERFACE, "mtu", MTU, "type", "veth", "peer", "name", OTHER_END, "mtu", MTU];
    tool("ip", &pair)?;
    tool("ip", &["address", "add", &format!("{ADDRESS}/24"), "dev", INTERFACE])?;
    for end in [INTERFACE, OTHER_END] {
        tool("ip", &["link", "set", end, "up"])?;
    }
    make_rxe(INTERFACE)
}

/// A soft-RoCE device on an interface that is up and has `ADDRESS`.
pub fn make_rxe(interface: &str) -> Result<Rxe, GuestError> {
    for name in ["rdma_rxe", "ib_uverbs", "rdma_ucm"] {
        module(name, &[])?;
    }
    tool("rdma", &["link", "add", NAME, "type", "rxe", "netdev", interface])?;
    // Dropped from here on if anything below fails.
    let mut device = Rxe { name: NAME, gid_index: 0 };
    let port = Path::new(DEVICES).join(NAME).join("ports/1");
    wait_until("the RDMA port to be active", || Ok(text(port.join("state"))?.ends_with("ACTIVE")))?;
    wait_until("a GID of RoCE v2 for the interface's address", || {
        Ok(v2_gid(&port, ADDRESS).map(|index| device.gid_index = index).is_some())
    })?;
    for node in ["/dev/infiniband/uverbs0", "/dev/infiniband/rdma_cm"] {
        let node = PathBuf::from(node);
        wait_until(&format!("{}", node.display()), || Ok(node.exists()))?;
    }
    Ok(device)
}

impl Rxe {
    /// Takes its interface down, or up again.
    pub fn set(&self, state: &str) -> Result<(), GuestError> {
        tool("ip", &["link", "set", INTERFACE, state]).map(|_| ())
    }
}

impl Drop for Rxe {
    fn drop(&mut self) {
        let _ = tool("rdma", &["link", "delete", self.name]);
        let _ = tool("ip", &["link", "delete", INTERFACE]);
    }
}

/// The index of the port's GID of RoCE v2 that stands for an IPv4 address.
fn v2_gid(port: &Path, address: &str) -> Option<u32> {
    let address: std::net::Ipv4Addr = address.parse().ok()?;
    let wanted = address.to_ipv6_mapped();
    let entries = std::fs::read_dir(port.join("gids")).ok()?;
    let mut indices: Vec<u32> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    indices.sort_unstable();
    indices.into_iter().find(|index| {
        let gid = text(port.join(format!("gids/{index}")));
        let kind = text(port.join(format!("gid_attrs/types/{index}")));
        gid.is_ok_and(|gid| gid.parse() == Ok(wanted)) && kind.is_ok_and(|kind| kind == ROCE_V2)
    })
}
