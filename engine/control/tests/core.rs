//! Control cores with real metadata voters, in virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

mod rig;

use control::admin::{self, PoolSpec};
use control::{ControlError, Phase};
use engine::CoreMsg;
use engine::msg::{PgReport, PgUpdate};
use placement::{Cluster, Disk, FailureDomain, PgRecord, SliceStat, key};
use reactor::Framing;
use rig::*;
use std::collections::BTreeMap;
use wire::control::{Change, ControlMsg, KeyValue, MetaReply, MetaRequest, Write};
use wire::{ClusterId, CoreId, DiskUuid, Epoch, FrameKind, NodeId, PgId, PoolId, SessionId, Status};

fn registered(rig: &Rig, nodes: &[usize]) -> bool {
    nodes.iter().all(|node| rig.status(*node).phase == Phase::Registered)
}

fn cluster(ids: &[u64]) -> (Rig, Vec<usize>) {
    let mut rig = Rig::new(ids);
    let nodes: Vec<usize> = ids.iter().map(|id| rig.start_node(*id)).collect();
    rig.until(3000, "all registered", |rig| registered(rig, &nodes));
    (rig, nodes)
}

fn create_pool(rig: &mut Rig, client: &mut Client, name: &str, copies: u8, domain: FailureDomain) -> PoolId {
    let spec = PoolSpec {
        name: name.into(),
        copies,
        min_copies: None,
        pg_count: Some(16),
        failure_domain: domain,
        scrub: Default::default(),
    };
    let keys = client.read(rig, &admin::reads_create_pool());
    let (pool, txn) = admin::create_pool(&keys, &spec).unwrap();
    assert!(matches!(client.ask(rig, txn), MetaReply::Applied { .. }));
    pool.id
}

fn range(prefix: &str) -> MetaRequest {
    MetaRequest::Range { prefix: prefix.into(), limit: 10_000 }
}

fn items(reply: MetaReply) -> Vec<KeyValue> {
    match reply {
        MetaReply::Range { items, .. } => items,
        other => panic!("{other:?}"),
    }
}

fn records(rig: &mut Rig, client: &mut Client) -> BTreeMap<PgId, PgRecord> {
    let items = items(client.ask(rig, range(key::PGS)));
    items
        .iter()
        .map(|kv| (key::parse_pg(&kv.key).unwrap(), serde_json::from_str(&kv.value).unwrap()))
        .collect()
}

/// The latest update of every PG that a node's cores were told.
fn fed(rig: &Rig, node: usize) -> BTreeMap<(CoreId, PgId), PgUpdate> {
    let updates = rig.with_told(node, |(_, core, msg)| match msg {
        CoreMsg::Pg(update) => Some(((*core, update.pg), update.clone())),
        _ => None,
    });
    updates.into_iter().collect()
}

fn identities(rig: &Rig, node: usize) -> Vec<SessionId> {
    rig.with_told(node, |(_, core, msg)| match msg {
        CoreMsg::Identity { session } if core.0 == 0 => Some(*session),
        _ => None,
    })
}

#[test]
fn a_single_node_registers_serves_and_directs() {
    let (mut rig, nodes) = cluster(&[1]);
    assert!(rig.now_ms() < 1500, "registered after {} ms", rig.now_ms());
    let mut client = rig.client();
    client.connect(&mut rig, address(1), Framing::Frames);
    let hello = client.hello(&mut rig, None);
    assert_eq!((hello.cluster, hello.refused), (Some(CLUSTER), 0));
    let cluster: Cluster =
        serde_json::from_str(&items(client.ask(&mut rig, range(key::CLUSTER)))[0].value).unwrap();
    assert_eq!(cluster.id, CLUSTER);

    client.tell(&mut rig, &ControlMsg::Subscribe { prefixes: vec![key::POOLS.into(), key::PGS.into()] });
    let pool = create_pool(&mut rig, &mut client, "rbd", 1, FailureDomain::Host);
    rig.until(500, "PGs", |rig| rig.core(nodes[0]).view().pgs_of_pool(pool).count() == 16);
    rig.run(20);
    let records = records(&mut rig, &mut client);
    assert_eq!(records.len(), 16);

    // The subscription: an empty snapshot, then the pool, then the PGs, each revision once and in order.
    let messages = client.messages(&rig);
    let snapshot = messages.iter().find_map(|msg| match msg {
        ControlMsg::Snapshot { revision, items, more: false } => Some((*revision, items.len())),
        _ => None,
    });
    let (at, found) = snapshot.unwrap();
    assert_eq!(found, 0);
    let mut last = at;
    let mut keys = Vec::new();
    for msg in &messages {
        if let ControlMsg::Changes { revision, changes } = msg {
            assert!(*revision > last, "revisions rise");
            last = *revision;
            for change in changes {
                let Change::Put(item) = change else { panic!("{change:?}") };
                keys.push(item.key.clone());
            }
        }
    }
    assert_eq!(keys.len(), 17, "the pool and its PGs and nothing else: {keys:?}");

    // The data cores know every PG, their session and a lease.
    let fed = fed(&rig, nodes[0]);
    assert_eq!(fed.len(), 16, "one member per PG");
    for ((core, pg), update) in &fed {
        assert_eq!(update.record, records[pg]);
        let member = &update.members[0];
        assert_eq!(member.addr.port(), 8010 + core.0);
        assert_eq!(member.session, update.record.primary_session);
    }
    let session = rig.status(nodes[0]).session.unwrap();
    assert_eq!(identities(&rig, nodes[0]), [session]);
    assert!(rig.told(nodes[0]).iter().any(|(_, msg)| msg.starts_with("Lease")));
}

#[test]
fn statistics_are_written_and_leave_with_their_pool() {
    let (mut rig, nodes) = cluster(&[1]);
    let mut client = rig.client();
    client.open(&mut rig, 1);
    let pool = create_pool(&mut rig, &mut client, "p", 1, FailureDomain::Host);
    rig.until(500, "PGs", |rig| fed(rig, nodes[0]).len() == 16);
    let pg = PgId { pool, index: 3 };
    let core = fed(&rig, nodes[0]).keys().find(|(_, p)| *p == pg).unwrap().0;
    let report = PgReport { pg, epoch: Epoch(1), state: "active+clean".into(), objects: 7, missing: 0 };
    rig.tell(nodes[0], core.0, CoreMsg::PgReport(report));
    let stat = SliceStat {
        size_bytes: 1 << 30,
        used_bytes: 5,
        objects: 7,
        state: "open".into(),
        ..SliceStat::default()
    };
    rig.tell(nodes[0], 0, CoreMsg::SliceStat { slice: slice(1, 0), stat, generation: 2 });
    rig.run(500);
    let stats = items(client.ask(&mut rig, range(key::STATS)));
    assert_eq!(stats.len(), 1);
    assert!(stats[0].value.contains("\"1.3\":{\"state\":\"active+clean\""), "{}", stats[0].value);
    assert!(stats[0].value.contains("\"used_bytes\":5") && stats[0].lease.is_some());

    let keys = client.read(&mut rig, &admin::reads_remove_pool());
    let txn = admin::remove_pool(&keys, "p").unwrap();
    assert!(matches!(client.ask(&mut rig, txn), MetaReply::Applied { .. }));
    rig.run(600);
    for prefix in [key::POOLS, key::POOL_NAMES, key::PGS] {
        assert_eq!(items(client.ask(&mut rig, range(prefix))), [], "{prefix}");
    }
    let stats = items(client.ask(&mut rig, range(key::STATS)));
    assert!(!stats[0].value.contains("1.3"), "{}", stats[0].value);
    assert!(rig.told(nodes[0]).iter().filter(|(_, msg)| msg.starts_with("PgGone")).count() == 16);
}

#[test]
fn metrics_please_promtool_and_http_survives_strangers() {
    let (mut rig, _) = cluster(&[1]);
    let mut get = |text: &[u8]| {
        let mut client = rig.client();
        client.connect(&mut rig, http_address(1), Framing::Raw);
        client.send_bytes(&mut rig, text);
        rig.until(6000, "an end", |rig| client.is_closed(rig));
        client.bytes(&rig)
    };
    let metrics = get(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = metrics.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(body.contains("drystone_raft_leader 1\n") && body.contains("drystone_registered 1\n"), "{body}");
    assert!(body.contains("drystone_build_info{version=\"test\"} 1"));
    assert!(body.contains("drystone_threshold_ratio{threshold=\"nearfull\"} 0.85"), "{body}");
    assert!(body.contains("drystone_flag{flag=\"norecover\"} 0") && body.contains("drystone_full_slices 0"));
    assert!(get(b"GET /healthz HTTP/1.1\r\n\r\n").ends_with("\r\n\r\nok\n"));
    assert!(get(b"GET /links HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n[]"));
    assert!(get(b"GET /nothing HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(get(b"\x16\x03\x01 garbage").starts_with("HTTP/1.1 400"));
    assert!(get(&vec![b'A'; 100_000]).starts_with("HTTP/1.1 400"));
    assert_eq!(get(b"GET /met"), "", "half a request is closed after a while");
    promtool(body);
}

/// Debian's package prometheus brings it; without it the text has only been looked at above.
fn promtool(text: &str) {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let started = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = started else {
        eprintln!("promtool is not installed");
        return;
    };
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.trim().is_empty(), "promtool: {said}\n{text}");
}

#[test]
fn strangers_are_turned_away_and_nothing_else_is_harmed() {
    let (mut rig, nodes) = cluster(&[1]);
    let mut good = rig.client();
    good.open(&mut rig, 1);

    let mut wrong = rig.client();
    wrong.connect(&mut rig, address(1), Framing::Frames);
    let hello = wrong.hello(&mut rig, Some(ClusterId(666)));
    assert_eq!(Status::from_u8(hello.refused), Status::WrongCluster);
    rig.until(100, "closed", |rig| wrong.is_closed(rig));

    let closes = |rig: &mut Rig, greet: bool, kind: FrameKind, bytes: &[u8]| {
        let mut client = rig.client();
        client.connect(rig, address(1), Framing::Frames);
        if greet {
            client.hello(rig, None);
        }
        client.send(rig, frame(kind, bytes));
        rig.until(100, "closed", |rig| client.is_closed(rig));
    };
    closes(&mut rig, false, FrameKind::Hello, b"not a hello");
    closes(&mut rig, false, FrameKind::Control, &ControlMsg::Subscribe { prefixes: vec![] }.encode());
    closes(&mut rig, true, FrameKind::Control, &[0xff; 300]);
    closes(&mut rig, true, FrameKind::Write, &[0; 4096]);
    let raft = ControlMsg::Raft { bytes: vec![1, 2, 3] };
    closes(&mut rig, true, FrameKind::Control, &raft.encode());
    let many = ControlMsg::Subscribe { prefixes: vec!["/".into(); 1000] };
    closes(&mut rig, true, FrameKind::Control, &many.encode());

    let silent = {
        let mut client = rig.client();
        client.connect(&mut rig, address(1), Framing::Frames);
        client
    };
    rig.until(6000, "the silent one is closed", |rig| silent.is_closed(rig));

    let bad = MetaRequest::Txn {
        compares: vec![],
        writes: vec![Write::Put { key: "/x".into(), value: "no json".into(), lease: None }],
    };
    assert_eq!(good.ask(&mut rig, bad), MetaReply::failed(Status::Invalid));
    assert!(registered(&rig, &nodes) && !good.is_closed(&rig));
}

#[test]
fn a_large_snapshot_comes_in_parts_and_changes_follow_without_a_gap() {
    let (mut rig, _) = cluster(&[1]);
    let mut writer = rig.client();
    writer.open(&mut rig, 1);
    let put = |n: usize| MetaRequest::Txn {
        compares: vec![],
        writes: vec![Write::Put {
            key: format!("/x/{n:03}"),
            value: format!("\"{}\"", "v".repeat(50_000)),
            lease: None,
        }],
    };
    for n in 0..20 {
        assert!(matches!(writer.ask(&mut rig, put(n)), MetaReply::Applied { .. }));
    }
    let mut client = rig.client();
    client.open(&mut rig, 1);
    client.tell(&mut rig, &ControlMsg::Subscribe { prefixes: vec!["/x/".into(), "/x/0".into()] });
    for n in 20..25 {
        writer.ask(&mut rig, put(n));
    }
    rig.run(50);
    let mut seen = Vec::new();
    let mut parts = 0;
    for msg in client.messages(&rig) {
        match msg {
            ControlMsg::Snapshot { items, .. } => {
                assert!(parts == 0 || seen.len() < 25, "no part behind the changes");
                parts += 1;
                seen.extend(items.into_iter().map(|item| item.key));
            }
            ControlMsg::Changes { changes, .. } => {
                for change in changes {
                    let Change::Put(item) = change else { panic!() };
                    seen.push(item.key);
                }
            }
            _ => {}
        }
    }
    let all: Vec<String> = (0..25).map(|n| format!("/x/{n:03}")).collect();
    assert_eq!(seen, all);
    assert!(parts >= 4, "{parts} parts");
}

#[test]
fn three_nodes_fail_over_when_a_primary_is_killed() {
    for kill_leader in [false, true] {
        let (mut rig, nodes) = cluster(&[1, 2, 3]);
        let leader = nodes.iter().position(|n| rig.status(*n).leading).unwrap();
        let victim = if kill_leader { leader } else { (leader + 1) % 3 };
        let witness = nodes[(victim + 1) % 3];
        let mut client = rig.client();
        client.open(&mut rig, witness as u64 + 1);
        create_pool(&mut rig, &mut client, "p", 3, FailureDomain::Host);
        rig.until(1000, "PGs", |rig| nodes.iter().all(|n| fed(rig, *n).len() == 16));
        rig.run(1234);
        rig.kill(nodes[victim]);
        let gone = NodeId(victim as u64 + 1);
        let took = rig.until(2000, "failover", |rig| {
            let updates = fed(rig, witness);
            updates.values().all(|update| {
                let primary = update.record.primary;
                let home = primary.and_then(|p| update.members.iter().find(|m| m.slice == p));
                update.record.acting.len() == 2 && home.is_some_and(|member| member.node != gone)
            })
        });
        eprintln!("failover after {took} ms (leader killed: {kill_leader})");
        for (pg, record) in records(&mut rig, &mut client) {
            assert_eq!((record.in_sync.len(), record.epoch), (2, Epoch(2)), "{pg}");
        }
    }
}

#[test]
fn a_killed_node_returns_recovers_and_gets_its_primaries_back() {
    let (mut rig, nodes) = cluster(&[1, 2, 3]);
    let mut client = rig.client();
    client.open(&mut rig, 1);
    create_pool(&mut rig, &mut client, "p", 3, FailureDomain::Host);
    rig.until(1000, "PGs", |rig| nodes.iter().all(|n| fed(rig, *n).len() == 16));
    let leader = nodes.iter().position(|n| rig.status(*n).leading).unwrap();
    let victim = if leader == 2 { 1 } else { 2 };
    rig.kill(nodes[victim]);
    rig.run(1500);
    let mut config = rig.config(victim as u64 + 1);
    config.status = Default::default();
    let back = rig.start(config, Some(nodes[victim]));
    rig.until(2000, "back", |rig| rig.status(back).phase == Phase::Registered);
    rig.run(200);
    let records_now = records(&mut rig, &mut client);
    assert!(records_now.values().all(|r| r.acting.len() == 3 && r.in_sync.len() == 2));
    // What the primaries' cores do: recover, report, and say so when they are not primary any more.
    let all: Vec<usize> = (0..3).map(|n| if n == victim { back } else { nodes[n] }).collect();
    for _ in 0..100 {
        for node in &all {
            for ((core, pg), update) in fed(&rig, *node) {
                let record = &update.record;
                let session = rig.status(*node).session;
                if record.primary_session != session {
                    continue;
                }
                let epoch = record.epoch;
                let report = PgReport { pg, epoch, state: "peering".into(), objects: 0, missing: 0 };
                rig.tell(*node, core.0, CoreMsg::PgReport(report));
                for slice in record.acting.iter().filter(|s| !record.in_sync.contains(s)) {
                    rig.tell(*node, core.0, CoreMsg::InSync { pg, epoch, slice: *slice });
                }
            }
        }
        rig.run(100);
    }
    for (pg, record) in records(&mut rig, &mut client) {
        assert_eq!((record.acting.len(), record.in_sync.len()), (3, 3), "{pg}");
        assert_eq!(record.primary, record.target.first().copied(), "{pg}");
    }
}

#[test]
fn a_node_that_is_no_voter_takes_part_and_changes_voters() {
    let (mut rig, nodes) = cluster(&[1, 2, 3]);
    let extra = rig.start_node(4);
    let took = rig.until(1000, "the fourth registers", |rig| registered(rig, &[extra]));
    eprintln!("registered after {took} ms");
    let mut client = rig.client();
    client.open(&mut rig, 4);
    create_pool(&mut rig, &mut client, "p", 3, FailureDomain::Host);
    rig.until(1000, "its cores are fed", |rig| !fed(rig, extra).is_empty());
    // Whatever voter it uses: it survives the loss of any one of them.
    let session = rig.status(extra).session;
    for node in &nodes {
        let cut = rig.status(*node).session;
        rig.cut(*node, true);
        rig.run(4000);
        rig.cut(*node, false);
        rig.until(8000, "the lease of the lost one is replaced", |rig| rig.status(*node).session != cut);
        rig.until(8000, "all are back", |rig| registered(rig, &nodes) && registered(rig, &[extra]));
    }
    let items = items(client.ask(&mut rig, range(key::LIVE)));
    assert_eq!(items.len(), 4);
    assert!(session.is_some());
}

#[test]
fn a_lost_lease_means_a_new_session_and_no_authority_under_the_old_one() {
    let (mut rig, nodes) = cluster(&[1, 2, 3]);
    let leader = nodes.iter().position(|n| rig.status(*n).leading).unwrap();
    let cut = nodes[(leader + 1) % 3];
    let old = rig.status(cut).session.unwrap();
    rig.run(1000);
    rig.cut(cut, true);
    let at = rig.now_ms();
    rig.run(3000);
    let last = rig.with_told(cut, |(_, _, msg)| match msg {
        CoreMsg::Lease { until } => Some(until.0 / MS),
        _ => None,
    });
    let end = *last.iter().max().unwrap();
    assert!(end <= at + 900, "authority until {end}, cut at {at}");
    rig.cut(cut, false);
    rig.until(5000, "registered again", |rig| {
        registered(rig, &[cut]) && rig.status(cut).session != Some(old)
    });
    let told = identities(&rig, cut);
    assert_eq!(told.first(), Some(&old));
    assert!(told[1..].iter().all(|session| *session != old), "{told:?}");
}

/// The cores of a node say of every PG that waits for it that they do not serve it any more.
fn consent(rig: &mut Rig, node: usize) -> usize {
    let asked: Vec<PgUpdate> = fed(rig, node)
        .into_values()
        .filter(|update| {
            update.record.primary.is_none() && update.record.primary_session == rig.status(node).session
        })
        .collect();
    for update in &asked {
        let (pg, epoch) = (update.pg, update.record.epoch);
        let report = PgReport { pg, epoch, state: "handed-over".into(), objects: 0, missing: 0 };
        let core = (update.record.acting[0].0 % 10) as u16;
        rig.tell(node, core, CoreMsg::PgReport(report));
    }
    asked.len()
}

#[test]
fn a_stop_does_not_wait_for_ever_for_others_to_take_over() {
    let (mut rig, nodes) = cluster(&[1, 2, 3]);
    let mut client = rig.client();
    client.open(&mut rig, 1);
    create_pool(&mut rig, &mut client, "p", 3, FailureDomain::Host);
    rig.until(1000, "PGs", |rig| nodes.iter().all(|n| fed(rig, *n).len() == 16));
    rig.tell(nodes[0], 0, CoreMsg::Stop);
    // No core consents.
    let stops = |rig: &Rig| rig.told(nodes[0]).iter().filter(|(_, msg)| msg == "Stop").count();
    let took = rig.until(2_000, "cores told to stop", |rig| stops(rig) == 2);
    assert!(took >= 900, "it did not wait: {took} ms");
}

#[test]
fn a_clean_stop_hands_over_at_once() {
    for stop_leader in [false, true] {
        let (mut rig, nodes) = cluster(&[1, 2, 3]);
        let leader = nodes.iter().position(|n| rig.status(*n).leading).unwrap();
        let victim = if stop_leader { leader } else { (leader + 1) % 3 };
        let node = nodes[victim];
        let witness = nodes[(victim + 1) % 3];
        let mut client = rig.client();
        client.open(&mut rig, witness as u64 + 1);
        create_pool(&mut rig, &mut client, "p", 3, FailureDomain::Host);
        rig.until(1000, "PGs", |rig| nodes.iter().all(|n| fed(rig, *n).len() == 16));
        rig.run(2000);
        let gone = NodeId(victim as u64 + 1);
        let acts = |update: &PgUpdate| {
            let acts = |m: &engine::msg::Member| m.node == gone && update.record.acting.contains(&m.slice);
            update.members.iter().any(acts)
        };
        rig.tell(node, 0, CoreMsg::Stop);
        let from = rig.now_ms();
        // While its cores still work, and primaries with their consent.
        rig.until(100, "members replaced, primaries asked", |rig| {
            let all = fed(rig, witness);
            all.values().all(|update| !acts(update) || update.record.primary.is_none())
        });
        let asked = consent(&mut rig, node);
        assert!(asked > 0, "it was primary of nothing");
        rig.until(100, "taken over", |rig| {
            fed(rig, witness).values().all(|update| update.record.primary.is_some() && !acts(update))
        });
        let took = rig.now_ms() - from;
        eprintln!("taken over after {took} ms (leader stopped: {stop_leader})");
        let stops = |rig: &Rig| rig.told(node).iter().filter(|(_, msg)| msg == "Stop").count();
        rig.until(100, "cores told to stop", |rig| stops(rig) == 2);
        for core in 0..2 {
            rig.tell(node, core, CoreMsg::Stopped);
        }
        rig.until(1500, "stopped", |rig| rig.status(node).phase == Phase::Stopped);
    }
}

#[test]
fn whole_cluster_restart_is_fast() {
    let (mut rig, nodes) = cluster(&[1, 2, 3]);
    let mut client = rig.client();
    client.open(&mut rig, 1);
    create_pool(&mut rig, &mut client, "p", 3, FailureDomain::Host);
    rig.until(1000, "PGs", |rig| nodes.iter().all(|n| fed(rig, *n).len() == 16));
    for node in &nodes {
        rig.kill(*node);
    }
    rig.run(500);
    let again: Vec<usize> = (1..=3u64)
        .map(|id| {
            let config = rig.config(id);
            rig.start(config, Some(nodes[id as usize - 1]))
        })
        .collect();
    let took = rig.until(1000, "all PGs have a live primary", |rig| {
        again.iter().all(|node| {
            let updates = fed(rig, *node);
            updates.len() == 16
                && updates.values().all(|u| {
                    let sessions = || u.members.iter().filter_map(|m| m.session);
                    u.record.in_sync.len() == 3
                        && u.record.primary_session.is_some_and(|s| sessions().any(|live| live == s))
                })
        })
    });
    eprintln!("restarted within {took} ms");
}

#[test]
fn impostors_and_foreign_disks_are_refused() {
    let (mut rig, nodes) = cluster(&[1, 2, 3]);
    // The same number with other disks, while the first is running.
    let mut config = rig.config(4);
    config.voters.truncate(3);
    let four = rig.start(config, None);
    rig.until(2000, "four", |rig| registered(rig, &[four]));
    let mut config = rig.config(4);
    config.control_listen = address(44);
    config.http_listen = None;
    config.disks =
        vec![Disk { uuid: DiskUuid(0x44), path: String::new(), slices: config.disks[0].slices.clone() }];
    let impostor = rig.start(config, None);
    rig.until(2000, "refused", |rig| {
        matches!(rig.status(impostor).phase, Phase::Failed(ControlError::NodeInUse { .. }))
    });
    assert!(registered(&rig, &nodes) && registered(&rig, &[four]));

    // A voter's region of another cluster.
    rig.kill(nodes[2]);
    let mut config = rig.config(3);
    config.cluster = ClusterId(0xbad);
    let foreign = rig.start(config, Some(nodes[2]));
    rig.until(2000, "refused", |rig| matches!(rig.status(foreign).phase, Phase::Failed(_)));
    let Phase::Failed(error) = rig.status(foreign).phase else { panic!() };
    assert!(error.to_string().contains("belongs to cluster"), "{error}");
}

#[test]
fn a_failed_slice_is_published_and_its_pgs_move_on() {
    let (mut rig, nodes) = cluster(&[1, 2, 3]);
    let mut client = rig.client();
    client.open(&mut rig, 1);
    create_pool(&mut rig, &mut client, "p", 3, FailureDomain::Host);
    rig.until(1000, "PGs", |rig| nodes.iter().all(|n| fed(rig, *n).len() == 16));
    rig.run(1500);
    let broken = slice(2, 0);
    let result = Err("device error (errno 5)".to_owned());
    rig.tell(nodes[1], 0, CoreMsg::SliceOpened { slice: broken, result });
    rig.until(500, "moved on", |rig| {
        fed(rig, nodes[0])
            .values()
            .all(|update| !update.record.acting.contains(&broken) && update.record.primary.is_some())
    });
    let live = items(client.ask(&mut rig, range(&key::live(NodeId(2)))));
    assert!(live[0].value.contains(&format!("\"failed\":[{}]", broken.0)), "{}", live[0].value);
    assert_eq!(rig.status(nodes[1]).failed_slices.len(), 1);
}

#[test]
fn administrators_get_helpful_errors() {
    let (mut rig, _) = cluster(&[1]);
    let mut client = rig.client();
    client.open(&mut rig, 1);
    let keys = client.read(&mut rig, &admin::reads_create_pool());
    let spec = |name: &str, copies| PoolSpec {
        name: name.into(),
        copies,
        min_copies: None,
        pg_count: None,
        failure_domain: FailureDomain::Host,
        scrub: Default::default(),
    };
    let error = admin::create_pool(&keys, &spec("p", 3)).unwrap_err();
    assert!(error.to_string().starts_with("3 copies need 3 different hosts"), "{error}");
    assert!(admin::create_pool(&keys, &spec("a/b", 1)).is_err());
    assert!(admin::create_pool(&keys, &spec("null", 1)).is_ok());
    create_pool(&mut rig, &mut client, "p", 1, FailureDomain::Host);

    let image = |rig: &mut Rig, client: &mut Client, pool: &str, name: &str, size| {
        let keys = client.read(rig, &admin::reads_create_image(name));
        let (image, txn) = admin::create_image(&keys, pool, name, size, 0)?;
        assert!(matches!(client.ask(rig, txn), MetaReply::Applied { .. }));
        Ok::<_, admin::AdminError>(image)
    };
    let error = image(&mut rig, &mut client, "q", "disk", 1 << 20).unwrap_err();
    assert_eq!(error.to_string(), "there is no pool \"q\"; there is \"p\"");
    assert!(image(&mut rig, &mut client, "p", "disk", 1000).is_err());
    let first = image(&mut rig, &mut client, "p", "disk", 1 << 20).unwrap();
    let second = image(&mut rig, &mut client, "p", "disk2", 1 << 20).unwrap();
    assert!(second.id > first.id);
    let error = image(&mut rig, &mut client, "p", "disk", 1 << 20).unwrap_err();
    assert_eq!(error.to_string(), "image \"disk\" exists already");

    let keys = client.read(&mut rig, &admin::reads_remove_pool());
    let error = admin::remove_pool(&keys, "p").unwrap_err();
    assert!(error.to_string().contains("still holds 2 image(s)"), "{error}");

    let mut keys = client.read(&mut rig, &admin::reads_image_id("disk"));
    let id = admin::image_id(&keys, "disk").unwrap();
    keys.add(client.ask(&mut rig, range(&key::image(id)))).unwrap();
    assert!(admin::resize_image(&keys, "disk", 4096, false).is_err());
    let (_, txn) = admin::resize_image(&keys, "disk", 1 << 21, false).unwrap();
    assert!(matches!(client.ask(&mut rig, txn.clone()), MetaReply::Applied { .. }));
    assert!(matches!(client.ask(&mut rig, txn), MetaReply::CompareFailed { .. }), "it is stale by now");
}
