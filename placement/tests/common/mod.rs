//! Clusters for the tests.
#![allow(dead_code)] // every test binary uses its own part

use placement::{Disk, Node, Slice};
use std::net::SocketAddr;
use wire::{DiskUuid, NodeId, SliceId};

pub const GIB: u64 = 1 << 30;

/// A node with `disks` disks of `slices` slices each, slices dealt to `cores` cores in turn.
pub fn node(id: u64, host: &str, disks: u64, slices: u64, cores: u16, slice_bytes: u64) -> Node {
    let disk = |d: u64| Disk {
        uuid: DiskUuid(u128::from(id) << 64 | u128::from(d)),
        path: String::new(),
        slices: (0..slices)
            .map(|s| Slice {
                id: SliceId(id * 10_000 + d * 100 + s),
                core: ((d * slices + s) % u64::from(cores)) as u16,
                size_bytes: slice_bytes,
            })
            .collect(),
    };
    let at: SocketAddr = ([127, 0, 0, 1], 7000).into();
    Node {
        id: NodeId(id),
        host: host.to_owned(),
        control: at,
        cores: vec![at; cores.into()],
        http: None,
        disks: (0..disks).map(disk).collect(),
        version: String::new(),
        problems: Vec::new(),
    }
}

/// Equal nodes 1..=count on hosts of their own.
pub fn cluster(count: u64, disks: u64, slices: u64, cores: u16) -> Vec<Node> {
    (1..=count).map(|id| node(id, &format!("host{id}"), disks, slices, cores, 10 * GIB)).collect()
}
