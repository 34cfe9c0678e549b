//! Disks and clocks that are not what they should be, as the control core sees them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

mod rig;

use control::Phase;
use control::admin::{self, PoolSpec};
use control::claims;
use engine::CoreMsg;
use engine::msg::{Extent, Opened, OpenedDisk};
use placement::{
    Disk, DiskRecord, FailureDomain, NewDisk, PgRecord, Retired, Slice, SliceMark, SliceStat, key,
};
use reactor::Framing;
use rig::*;
use std::collections::BTreeMap;
use wire::control::{Compare, Hello, MetaReply, MetaRequest, Write};
use wire::{DiskUuid, PgId, Revision, SliceId};

const PGS: usize = 16;

fn registered(rig: &Rig, nodes: &[usize]) -> bool {
    nodes.iter().all(|node| rig.status(*node).phase == Phase::Registered)
}

/// Three nodes of two slices on one disk each, and a pool of three copies.
fn cluster(clocks: &[i64]) -> (Rig, Vec<usize>, Client) {
    let mut rig = Rig::new(&[1, 2, 3]);
    let nodes: Vec<usize> = (1..=3).map(|id| rig.start_node(id)).collect();
    rig.set_clocks(&nodes.iter().copied().zip(clocks.iter().copied()).collect::<Vec<_>>());
    rig.until(3000, "all registered", |rig| registered(rig, &nodes));
    let mut client = rig.client();
    client.connect(&mut rig, address(1), Framing::Frames);
    let _: Hello = client.hello(&mut rig, None);
    let spec = PoolSpec {
        name: "p".into(),
        copies: 3,
        min_copies: None,
        pg_count: Some(PGS as u32),
        failure_domain: FailureDomain::Host,
        scrub: Default::default(),
    };
    let keys = client.read(&mut rig, &admin::reads_create_pool());
    let (_, txn) = admin::create_pool(&keys, &spec).unwrap();
    assert!(matches!(client.ask(&mut rig, txn), MetaReply::Applied { .. }));
    rig.until(1000, "PGs", |rig| records(rig, nodes[0]).len() == PGS);
    (rig, nodes, client)
}

fn records(rig: &Rig, node: usize) -> BTreeMap<PgId, PgRecord> {
    rig.core(node).view().pgs().iter().map(|(pg, entry)| (*pg, entry.record.clone())).collect()
}

fn given_up(rig: &Rig, node: usize) -> Vec<(u16, SliceId, String)> {
    rig.with_told(node, |(_, core, msg)| match msg {
        CoreMsg::GiveUp { slice, why, .. } => Some((core.0, *slice, why.clone())),
        _ => None,
    })
}

/// The record of a node's disk.
fn disk_record(rig: &mut Rig, client: &mut Client, disk: DiskUuid) -> (DiskRecord, Revision) {
    let request = MetaRequest::Range { prefix: key::disk(disk), limit: 1 };
    let MetaReply::Range { items, .. } = client.ask(rig, request) else { panic!("no range") };
    (serde_json::from_str(&items[0].value).unwrap(), items[0].mod_revision)
}

const NEW: DiskUuid = DiskUuid(77);
const NEW_SLICES: [SliceId; 2] = [SliceId(771), SliceId(772)];

/// Somebody wishes that node 2 takes a disk; how often, by now.
fn wish(rig: &mut Rig, client: &mut Client, nodes: &[usize], ticket: u64) {
    let new = NewDisk { path: "/dev/new".into(), refused: None };
    let (key, value) = (key::new_disk(wire::NodeId(2), NEW), serde_json::to_string(&new).unwrap());
    let writes = vec![Write::Put { key, value, lease: None }];
    assert!(matches!(
        client.ask(rig, MetaRequest::Txn { compares: vec![], writes }),
        MetaReply::Applied { .. }
    ));
    let wanted = vec![(ticket, "/dev/new".to_owned())];
    rig.until(2000, "the node to want it", |rig| rig.status(nodes[1]).wanted_disks == wanted);
}

/// It has been opened, and so have its slices, with these generations.
fn open(rig: &mut Rig, nodes: &[usize], ticket: u64, generations: [u64; 2]) {
    let slice = |core: u16| Slice { id: NEW_SLICES[usize::from(core)], core, size_bytes: 1 << 30 };
    let disk = Disk { uuid: NEW, path: "/dev/new".into(), slices: vec![slice(0), slice(1)] };
    let slices = [0, 1].map(|core| (wire::CoreId(core), Vec::new())).to_vec();
    rig.tell(nodes[1], 0, CoreMsg::DiskOpened { ticket, result: Ok(OpenedDisk { disk, slices }) });
    rig.run(50);
    for ((core, slice), generation) in (0..).zip(NEW_SLICES).zip(generations) {
        assert!(
            !records(rig, nodes[0]).values().any(|record| record.names(slice)),
            "nothing counts on it yet"
        );
        let result = Ok(Opened { size_bytes: 1 << 30, generation });
        rig.tell(nodes[1], core, CoreMsg::SliceOpened { slice, result });
        rig.run(50);
    }
}

/// Why the wish was refused.
fn refusal(rig: &mut Rig, client: &mut Client) -> Option<String> {
    let request = MetaRequest::Range { prefix: key::NEW_DISKS.into(), limit: 1 };
    let MetaReply::Range { items, .. } = client.ask(rig, request) else { panic!("no range") };
    serde_json::from_str::<NewDisk>(&items.first()?.value).unwrap().refused
}

#[test]
fn a_running_node_takes_a_disk_claims_it_and_is_given_placement_groups_for_it() {
    let (mut rig, nodes, mut client) = cluster(&[]);
    let session = rig.status(nodes[1]).session;
    wish(&mut rig, &mut client, &nodes, 1);
    open(&mut rig, &nodes, 1, [3, 4]);
    rig.until(5000, "placement groups on it", |rig| {
        let records = records(rig, nodes[0]);
        NEW_SLICES.iter().all(|slice| records.values().any(|record| record.names(*slice)))
    });
    let (known, _) = disk_record(&mut rig, &mut client, NEW);
    assert_eq!((known.node.0, known.slices.iter().map(|mark| mark.generation).collect()), (2, vec![3, 4]));
    assert_eq!((refusal(&mut rig, &mut client), rig.status(nodes[1]).session), (None, session));
    // It is the node's own now: again it is the same, and its failure counts.
    let request = MetaRequest::Range { prefix: key::NEW_DISKS.into(), limit: 1 };
    let MetaReply::Range { items, .. } = client.ask(&mut rig, request) else { panic!("no range") };
    assert!(items.is_empty());
    let why = "gone".to_owned();
    rig.tell(nodes[1], 0, CoreMsg::SliceFailed { slice: NEW_SLICES[0], why, extent: Extent::Disk });
    rig.until(2000, "the other slice to go", |rig| {
        given_up(rig, nodes[1]).iter().any(|(_, s, _)| *s == NEW_SLICES[1])
    });
}

#[test]
fn an_older_copy_of_a_disk_gets_nothing_from_a_running_node() {
    let (mut rig, nodes, mut client) = cluster(&[]);
    let marks = NEW_SLICES.map(|slice| SliceMark { slice, generation: 9 }).to_vec();
    let known =
        DiskRecord { node: wire::NodeId(2), process: wire::SessionId(5), slices: marks, retired: None };
    let writes = vec![claims::put(NEW, &known).unwrap()];
    client.ask(&mut rig, MetaRequest::Txn { compares: vec![], writes });
    wish(&mut rig, &mut client, &nodes, 1);
    open(&mut rig, &nodes, 1, [10, 9]);
    rig.run(500);
    let why = refusal(&mut rig, &mut client).expect("it is refused");
    assert!(why.contains("is an older copy of itself"), "{why}");
    assert_eq!(given_up(&rig, nodes[1]).len(), 2, "its slices are closed");
    assert!(!rig.core(nodes[0]).view().nodes()[&wire::NodeId(2)].disks.iter().any(|disk| disk.uuid == NEW));
    assert_eq!(disk_record(&mut rig, &mut client, NEW).0, known, "what is remembered stays");
    // What the closed slices still say is no failure of the node's own.
    let why = "given up".to_owned();
    rig.tell(nodes[1], 0, CoreMsg::SliceFailed { slice: NEW_SLICES[0], why, extent: Extent::Disk });
    rig.run(500);
    assert!(rig.status(nodes[1]).failed_slices.is_empty());
}

#[test]
fn a_wish_that_is_withdrawn_leaves_nothing_behind() {
    let (mut rig, nodes, mut client) = cluster(&[]);
    wish(&mut rig, &mut client, &nodes, 1);
    let key = key::new_disk(wire::NodeId(2), NEW);
    let writes = vec![Write::Delete { key }];
    client.ask(&mut rig, MetaRequest::Txn { compares: vec![], writes });
    rig.until(1000, "it to be forgotten", |rig| rig.status(nodes[1]).wanted_disks.is_empty());
    // The disk comes after all: nobody waits for it. The next wish is another one.
    open(&mut rig, &nodes, 1, [3, 4]);
    rig.run(500);
    assert!(!records(&rig, nodes[0]).values().any(|record| record.names(NEW_SLICES[0])));
    wish(&mut rig, &mut client, &nodes, 2);
    // The same when it is half open.
    let slice = |core: u16| Slice { id: NEW_SLICES[usize::from(core)], core, size_bytes: 1 << 30 };
    let disk = Disk { uuid: NEW, path: "/dev/new".into(), slices: vec![slice(0), slice(1)] };
    let result = Ok(OpenedDisk { disk, slices: Vec::new() });
    rig.tell(nodes[1], 0, CoreMsg::DiskOpened { ticket: 2, result });
    rig.run(50);
    let writes = vec![Write::Delete { key: key::new_disk(wire::NodeId(2), NEW) }];
    client.ask(&mut rig, MetaRequest::Txn { compares: vec![], writes });
    rig.until(1000, "its slices to be closed", |rig| given_up(rig, nodes[1]).len() == 2);
}

#[test]
fn placement_groups_leave_a_failed_slice_for_another_of_its_host() {
    let (mut rig, nodes, _) = cluster(&[]);
    let broken = slice(2, 0);
    assert!(records(&rig, nodes[0]).values().any(|record| record.names(broken)));
    let why = "device is gone".to_owned();
    rig.tell(nodes[1], 0, CoreMsg::SliceFailed { slice: broken, why, extent: Extent::Slice });
    rig.until(2000, "other slices", |rig| {
        let records = records(rig, nodes[0]);
        let moved = |record: &PgRecord| {
            let other = record.target.contains(&slice(2, 1)) && record.acting.len() == 3;
            other && !record.target.contains(&broken) && !record.acting.contains(&broken)
        };
        records.values().all(moved)
    });
    assert!(given_up(&rig, nodes[1]).is_empty());
    // While the node is down nothing says that its slice has been mended.
    rig.kill(nodes[1]);
    rig.run(3000);
    assert!(records(&rig, nodes[0]).values().all(|record| !record.target.contains(&broken)));
}

#[test]
fn a_failed_disk_takes_its_slices_on_other_cores_along() {
    let (mut rig, nodes, _) = cluster(&[]);
    let why = "device is gone".to_owned();
    rig.tell(nodes[1], 0, CoreMsg::SliceFailed { slice: slice(2, 0), why, extent: Extent::Disk });
    rig.until(1000, "the other core to hear", |rig| !given_up(rig, nodes[1]).is_empty());
    assert_eq!(given_up(&rig, nodes[1]), [(1, slice(2, 1), "device is gone".to_owned())]);
}

#[test]
fn a_disk_that_is_retired_under_a_running_node_is_given_up() {
    let (mut rig, nodes, mut client) = cluster(&[]);
    let disk = rig.config(2).disks[0].uuid;
    let (mut record, revision) = disk_record(&mut rig, &mut client, disk);
    record.retired = Some(Retired { at_ms: 1, replaced_by: None });
    let compares = vec![Compare::ModRevision { key: key::disk(disk), revision }];
    let writes = vec![claims::put(disk, &record).unwrap()];
    assert!(matches!(client.ask(&mut rig, MetaRequest::Txn { compares, writes }), MetaReply::Applied { .. }));
    rig.until(2000, "both slices to go", |rig| {
        let gone = |record: &PgRecord| {
            !record.acting.contains(&slice(2, 0)) && !record.acting.contains(&slice(2, 1))
        };
        given_up(rig, nodes[1]).len() == 2 && records(rig, nodes[0]).values().all(gone)
    });
    assert!(registered(&rig, &nodes), "the node lives, as a voter for one");
    // Started anew it has nothing to serve with, and lives all the same.
    rig.kill(nodes[1]);
    rig.run(2000);
    let config = rig.config(2);
    let again = rig.start(config, Some(nodes[1]));
    rig.until(3000, "it to live without a disk", |rig| {
        let retired = given_up(rig, again).iter().filter(|(.., why)| why.contains("retired")).count();
        retired == 2 && registered(rig, &[again])
    });
}

#[test]
fn the_slowest_disk_of_all_hears_from_when_on_it_is_an_outlier() {
    let mut rig = Rig::new(&[1, 2, 3]);
    let nodes: Vec<usize> = (1..=4).map(|id| rig.start_node(id)).collect();
    rig.until(3000, "all registered", |rig| registered(rig, &nodes));
    let told = |rig: &Rig, node: usize| {
        rig.with_told(nodes[node], |(_, core, msg)| match msg {
            CoreMsg::SlowFrom { slice, us } => Some((core.0, *slice, *us)),
            _ => None,
        })
    };
    for (node, id) in (0..4).zip(1..) {
        for core in 0..2 {
            let stat = SliceStat {
                service_us: if id == 3 { 131_072 } else { 4096 },
                state: "open".into(),
                ..SliceStat::default()
            };
            let slice = slice(id, core);
            rig.tell(nodes[node], core, CoreMsg::SliceStat { slice, stat, generation: 1 });
        }
    }
    rig.until(3000, "it to hear", |rig| told(rig, 2).len() >= 2);
    let last: Vec<_> = told(&rig, 2).into_iter().rev().take(2).collect();
    assert!(last.contains(&(0, slice(3, 0), 65_536)) && last.contains(&(1, slice(3, 1), 65_536)), "{last:?}");
    rig.run(3000);
    // The others hear at most of a time before all had spoken, and that it is over.
    assert!([0, 1, 3].iter().all(|node| told(&rig, *node).last().is_none_or(|(.., us)| *us == 0)));
}

#[test]
fn generations_are_recorded_while_a_node_runs_and_never_go_back() {
    let (mut rig, nodes, mut client) = cluster(&[]);
    let disk = rig.config(2).disks[0].uuid;
    let mark = |rig: &mut Rig, client: &mut Client| disk_record(rig, client, disk).0.slices[0].generation;
    let before = mark(&mut rig, &mut client);
    let say = |rig: &mut Rig, generation| {
        let msg = CoreMsg::SliceStat { slice: slice(2, 0), stat: Default::default(), generation };
        rig.tell(nodes[1], 0, msg);
    };
    say(&mut rig, before + 500);
    rig.run(2 * claims::MARK_MS);
    assert_eq!(mark(&mut rig, &mut client), before + 500);
    say(&mut rig, before);
    rig.run(2 * claims::MARK_MS);
    assert_eq!(mark(&mut rig, &mut client), before + 500);
}

/// What a cluster does whose third node dies and returns: how its records change, and when.
fn history(clocks: &[i64]) -> Vec<(u64, BTreeMap<PgId, PgRecord>)> {
    let (mut rig, nodes, _) = cluster(clocks);
    let mut history = Vec::new();
    let mut watch = |rig: &mut Rig, ms: u64| {
        for _ in 0..ms {
            rig.run(1);
            let now = records(rig, nodes[0]);
            if history.last().is_none_or(|(_, last)| *last != now) {
                history.push((rig.now_ms(), now));
            }
        }
    };
    watch(&mut rig, 500);
    rig.kill(nodes[2]);
    watch(&mut rig, 3000);
    let config = rig.config(3);
    let again = rig.start(config, Some(nodes[2]));
    watch(&mut rig, 3000);
    assert!(registered(&rig, &[nodes[0], nodes[1], again]));
    history
}

#[test]
fn wall_clocks_that_are_hours_or_years_apart_change_nothing() {
    const HOUR_MS: i64 = 3_600_000;
    let right = history(&[0, 0, 0]);
    assert!(right.len() > 2, "something happens");
    for wrong in [[-9 * HOUR_MS, 0, 24 * HOUR_MS], [400 * 24 * HOUR_MS, -30 * 365 * 24 * HOUR_MS, 0]] {
        assert!(history(&wrong) == right, "{wrong:?}");
    }
}
