//! The environment conformance suite on the production backend over RDMA, on the machine's own device: soft RoCE in
//! the guest. Without a device it fails.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use net_rdma::{Device, DeviceOptions, RdmaTransport};
use reactor::backend::Transport;
use reactor::conformance::{Disks, Host, Kind, run};
use std::net::IpAddr;

fn transport() -> Box<dyn Transport> {
    let device = Device::open(&DeviceOptions::default()).unwrap();
    Box::new(RdmaTransport::over(net_tcp::TcpTransport::beneath(), device))
}

/// Every scenario about the network, with each core's connections over the device.
fn check(host: Host) {
    // Once for both tests.
    let _ = tracing_subscriber::fmt().with_test_writer().try_init();
    let address: IpAddr = Device::open(&DeviceOptions::default()).unwrap().gid().1.ip();
    let kind = Kind { host, disks: Disks::Files("/dev/shm"), transport, address };
    let failed = run(kind, |scenario| {
        scenario.name.starts_with("net")
            && (host == Host::Launched || !scenario.name.contains("the mesh keeps order"))
    });
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn launched_cores() {
    check(Host::Launched);
}

#[test]
fn foreign_hosts() {
    check(Host::Foreign);
}
