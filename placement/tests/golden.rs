//! Assignments as tables that a person can check. A change of the rule shows as a change of these
//! files, and means that existing clusters would move data: `UPDATE_GOLDEN=1 cargo test -p placement`.
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

mod common;

use common::{GIB, cluster, node};
use placement::{FailureDomain, Node, Rule, Topology, assign};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use wire::SliceId;

fn name(nodes: &[Node], slice: SliceId) -> String {
    for node in nodes {
        for (d, disk) in node.disks.iter().enumerate() {
            for (s, it) in disk.slices.iter().enumerate() {
                if it.id == slice {
                    return format!("{}/d{d}/s{s}", node.host);
                }
            }
        }
    }
    format!("slice {slice}")
}

fn table(title: &str, nodes: &[Node], lists: &[Vec<SliceId>], before: Option<&[Vec<SliceId>]>) -> String {
    let mut out = format!("{title}\n\n  PG  primary, then the other copies (* = new here)\n");
    let mut count: BTreeMap<SliceId, (u32, u32)> = BTreeMap::new();
    for node in nodes {
        for slice in node.disks.iter().flat_map(|d| &d.slices) {
            count.insert(slice.id, (0, 0));
        }
    }
    for (pg, list) in lists.iter().enumerate() {
        let cells: Vec<String> = list
            .iter()
            .map(|s| {
                let new = before.and_then(|b| b.get(pg)).is_some_and(|b| !b.contains(s));
                format!("{}{}", name(nodes, *s), if new { "*" } else { "" })
            })
            .collect();
        writeln!(out, "{pg:>4}  {}", cells.join("  ")).unwrap();
        for (place, slice) in list.iter().enumerate() {
            let entry = count.entry(*slice).or_default();
            entry.0 += 1;
            entry.1 += u32::from(place == 0);
        }
    }
    out.push_str("\nslice             size    core  PGs  primary\n");
    for node in nodes {
        for slice in node.disks.iter().flat_map(|d| &d.slices) {
            let (pgs, primary) = count[&slice.id];
            let gib = slice.size_bytes / GIB;
            writeln!(
                out,
                "{:<16} {gib:>4} GiB  {:>4}  {pgs:>3}  {primary:>7}",
                name(nodes, slice.id),
                slice.core
            )
            .unwrap();
        }
    }
    out
}

fn golden(file: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, wanted, "{} differs", path.display());
}

#[test]
fn three_hosts_three_copies() {
    let nodes = cluster(3, 1, 2, 2);
    let rule = Rule { copies: 3, pg_count: 24, failure_domain: FailureDomain::Host, seed: 1 };
    let lists = assign(&Topology::new(&nodes), &rule, &[]).unwrap();
    golden("three-hosts.txt", &table("3 hosts, 2 slices each, 3 copies, 24 PGs", &nodes, &lists, None));
}

#[test]
fn five_hosts_and_then_one_leaves_and_one_joins() {
    let mut nodes = cluster(5, 1, 1, 1);
    let rule = Rule { copies: 2, pg_count: 30, failure_domain: FailureDomain::Host, seed: 7 };
    let first = assign(&Topology::new(&nodes), &rule, &[]).unwrap();
    let gone = nodes.remove(4);
    let second = assign(&Topology::new(&nodes), &rule, &first).unwrap();
    nodes.push(node(6, "host6", 1, 1, 1, 10 * GIB));
    let third = assign(&Topology::new(&nodes), &rule, &second).unwrap();
    let mut with_gone = nodes.clone();
    with_gone.push(gone);
    let text = [
        table("5 hosts, 2 copies, 30 PGs", &with_gone, &first, None),
        table("host5 has left", &with_gone, &second, Some(&first)),
        table("host6 has joined", &with_gone, &third, Some(&second)),
    ]
    .join("\n");
    golden("leave-and-join.txt", &text);
}

#[test]
fn unequal_disks_share_by_size() {
    let nodes = vec![
        node(1, "big", 1, 2, 2, 40 * GIB),
        node(2, "mid", 1, 2, 2, 20 * GIB),
        node(3, "small", 1, 1, 1, 10 * GIB),
        node(4, "tiny", 1, 1, 1, 5 * GIB),
    ];
    let rule = Rule { copies: 2, pg_count: 24, failure_domain: FailureDomain::Host, seed: 3 };
    let lists = assign(&Topology::new(&nodes), &rule, &[]).unwrap();
    golden("unequal.txt", &table("unequal hosts, 2 copies, 24 PGs", &nodes, &lists, None));
}

#[test]
fn one_host_with_copies_on_its_disks() {
    let nodes = vec![node(1, "alone", 4, 2, 4, 10 * GIB)];
    let rule = Rule { copies: 2, pg_count: 16, failure_domain: FailureDomain::Disk, seed: 1 };
    let lists = assign(&Topology::new(&nodes), &rule, &[]).unwrap();
    golden("one-host.txt", &table("1 host, 4 disks, 2 copies on different disks", &nodes, &lists, None));
}
