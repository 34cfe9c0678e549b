//! The environment conformance suite on the production backend over TCP.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use reactor::conformance::{Disks, Host, Kind, LoopDevice, Scenario, run};
use std::net::{IpAddr, Ipv4Addr};

fn check(host: Host, disks: Disks, wanted: impl Fn(&Scenario) -> bool) {
    let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let failed = run(Kind { host, disks, transport: net_tcp::TcpTransport::boxed, address }, wanted);
    assert!(failed.is_empty(), "{failed:#?}");
}

fn is_disk(scenario: &Scenario) -> bool {
    scenario.name.starts_with("disk")
}

#[test]
fn launched_cores_with_files_on_tmpfs() {
    check(Host::Launched, Disks::Files("/dev/shm"), |_| true);
}

#[test]
fn disks_on_a_file_system() {
    check(Host::Launched, Disks::Files("/tmp"), is_disk);
}

#[test]
fn disks_on_loop_devices() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("probe");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    // Says why on standard error where the machine has none.
    if LoopDevice::over(&path).is_some() {
        check(Host::Launched, Disks::Loop, is_disk);
    }
}

#[test]
fn foreign_hosts() {
    check(Host::Foreign, Disks::Files("/dev/shm"), |scenario| {
        !scenario.name.contains("the mesh keeps order")
    });
}
