//! The durable memory: cuts, torn writes, rot, compaction, snapshots, foreign regions.

use crate::testing::{Options, World, put};
use crate::{MetaError, MetaNode};
use wire::NodeId;
use wire::control::MetaReply;

const RING_START: u64 = 256 + 2 + 2 * 512;

fn one(seed: u64) -> World {
    World::new(seed, Options { voters: 1, ..Options::default() })
}

/// Ring blocks that were written, by number on the disk.
fn ring(w: &World, node: usize) -> Vec<u64> {
    w.slots[node].env.written_blocks().into_iter().filter(|block| *block >= RING_START).collect()
}

#[test]
fn a_cut_at_any_moment_loses_nothing_acknowledged() {
    for seed in 0..300 {
        let mut w = one(seed);
        w.elect();
        let mut tickets = Vec::new();
        for i in 0..40u64 {
            let value = format!("\"{}\"", "x".repeat((seed * 37 + i * 211) as usize % 9_000));
            tickets.push((i, value.clone(), w.submit(0, put(&format!("/k{i}"), &value))));
            let pause = w.random.below(3);
            w.run_ms(pause);
        }
        let wait = w.random.below(4);
        w.run_ms(wait);
        w.crash(0);
        w.start(0);
        w.elect();
        let held = w.held(0);
        for (i, value, ticket) in tickets {
            if w.replies.contains_key(&ticket) {
                let key = format!("/k{i}");
                assert!(held.iter().any(|item| item.key == key && item.value == value), "seed {seed}: {key}");
            }
        }
        w.put(0, "/after", "1");
        w.crash(0);
        w.start(0);
        w.elect();
        assert_eq!(w.range(0, "/after").len(), 1);
    }
}

#[test]
fn rot_in_the_middle_stops_the_node_instead_of_forgetting() {
    let mut probe = one(1);
    probe.elect();
    for i in 0..10 {
        probe.put(0, &format!("/k{i}"), "1");
    }
    probe.run_ms(200); // the seal
    let blocks = ring(&probe, 0);
    assert!(blocks.len() > 8);
    let last = *blocks.last().unwrap();
    for block in blocks {
        for bit in [0u64, 5 * 8, 30 * 8 + 3, 100 * 8 + 1, 4095 * 8 + 7] {
            let mut w = one(1);
            w.elect();
            for i in 0..10 {
                w.put(0, &format!("/k{i}"), "1");
            }
            w.run_ms(200);
            w.crash(0);
            w.slots[0].env.block_mut(block).unwrap()[bit as usize / 8] ^= 1 << (bit % 8);
            w.start(0);
            let over = |w: &World| !w.failures().is_empty() || w.leader().is_some();
            assert!(w.run_until(2_000, over));
            if block == last {
                // The seal itself: it holds nothing that is needed.
                assert_eq!(w.range(0, "/k").len(), 10);
            } else {
                let failures = w.failures();
                assert!(matches!(failures[0].1, MetaError::LogDamaged { .. }), "{block} {bit}: {failures:?}");
                assert_eq!(w.call(0, put("/a", "1")), MetaReply::failed(wire::Status::NotActive));
            }
        }
    }
}

#[test]
fn the_log_is_compacted_again_and_again_and_never_fills() {
    let mut w = World::new(5, Options { voters: 1, region: 4 << 20, disk_us: 50, ..Options::default() });
    w.elect();
    let value = format!("\"{}\"", "v".repeat(20_000));
    for i in 0..600 {
        w.put(0, &format!("/k{}", i % 10), &value);
        if i % 97 == 0 {
            w.crash(0);
            w.start(0);
            w.elect();
        }
    }
    let status = w.node(0).status();
    assert!(status.snapshot_index > 400, "{status:?}");
    assert!(status.log_blocks.0 < status.log_blocks.1 / 2, "{status:?}");
    w.crash(0);
    w.start(0);
    w.elect();
    assert_eq!(w.range(0, "/k").len(), 10);
}

#[test]
fn full_is_a_state_and_deleting_gets_out_of_it() {
    let mut w = World::new(6, Options { voters: 1, region: 4 << 20, disk_us: 50, ..Options::default() });
    w.elect();
    let value = format!("\"{}\"", "v".repeat(60_000));
    let mut stored = 0;
    let full = loop {
        match w.call(0, put(&format!("/k{stored}"), &value)) {
            MetaReply::Applied { .. } => stored += 1,
            other => break other,
        }
    };
    assert_eq!(full, MetaReply::failed(wire::Status::NoSpace));
    assert!(stored > 8, "{stored}");
    w.put(0, "/k0", &value); // overwriting does not grow
    w.crash(0);
    w.start(0);
    w.elect();
    let delete = wire::control::Write::Delete { key: "/k1".into() };
    let txn = wire::control::MetaRequest::Txn { compares: vec![], writes: vec![delete] };
    assert!(matches!(w.call(0, txn), MetaReply::Applied { .. }));
    w.put(0, "/new", &value);
}

#[test]
fn a_late_voter_catches_up_by_snapshot_and_its_watcher_misses_nothing() {
    let options = Options { region: 4 << 20, disk_us: 50, loss: 20, doubled: 20, ..Options::default() };
    for seed in 0..6 {
        let mut w = World::new(seed, options.clone());
        let leader = w.elect();
        let late = (leader + 1) % 3;
        w.put(leader, "/gone", "1");
        w.converge();
        w.isolate(late);
        let value = format!("\"{}\"", "v".repeat(15_000));
        for i in 0..400 {
            w.put(leader, &format!("/k{}", i % 40), &value);
        }
        let delete = wire::control::Write::Delete { key: "/gone".into() };
        let txn = wire::control::MetaRequest::Txn { compares: vec![], writes: vec![delete] };
        assert!(matches!(w.call(leader, txn), MetaReply::Applied { .. }));
        let behind = w.node(late).status().applied_index;
        assert!(w.node(leader).status().snapshot_index > behind);
        w.heal();
        w.converge();
        let jump = &w.slots[late].watch.log;
        assert!(jump.iter().any(|(_, _, changes)| changes.len() >= 40), "no snapshot was installed");
        assert_eq!(w.held(late), w.held(leader));
        // And it remembers what it was sent.
        w.crash(late);
        w.start(late);
        w.converge();
        assert_eq!(w.held(late), w.held(leader));
    }
}

#[test]
fn a_cut_while_a_snapshot_is_received_or_saved_is_survived() {
    let options = Options { region: 4 << 20, disk_us: 2_000, ..Options::default() };
    for seed in 0..25 {
        let mut w = World::new(900 + seed, options.clone());
        let leader = w.elect();
        let late = (leader + 1) % 3;
        w.put(leader, "/first", "1");
        w.isolate(late);
        let value = format!("\"{}\"", "v".repeat(30_000));
        let tickets: Vec<u64> =
            (0..200).map(|i| w.submit(leader, put(&format!("/k{}", i % 20), &value))).collect();
        assert!(w.run_until(20_000, |w| tickets.iter().all(|t| w.replies.contains_key(t))));
        w.heal();
        for _ in 0..4 {
            let wait = w.random.below(400);
            w.run_ms(wait);
            w.crash(late);
            w.start(late);
        }
        w.converge();
        assert_eq!(w.held(late).len(), 21);
    }
}

#[test]
fn a_rotten_snapshot_stops_the_node() {
    let mut w = World::new(8, Options { voters: 1, region: 4 << 20, disk_us: 50, ..Options::default() });
    w.elect();
    let value = format!("\"{}\"", "v".repeat(20_000));
    for i in 0..100 {
        w.put(0, &format!("/k{i}"), &value);
        if w.node(0).status().snapshot_index > 0 {
            break;
        }
    }
    assert!(w.node(0).status().snapshot_index > 0);
    w.run_ms(500);
    w.crash(0);
    // The first snapshot goes to area A, behind the superblocks.
    w.slots[0].env.block_mut(256 + 2 + 3).unwrap()[99] ^= 4;
    w.start(0);
    assert!(w.run_until(2_000, |w| !w.failures().is_empty()));
    assert!(matches!(w.failures()[0].1, MetaError::SnapshotDamaged { .. }), "{:?}", w.failures());
}

#[test]
fn foreign_damaged_and_misused_regions_are_named() {
    let mut w = one(9);
    w.elect();
    w.put(0, "/a", "1");
    w.crash(0);
    let reopen = |w: &mut World, change: &dyn Fn(&mut crate::MetaConfig)| {
        let mut config = crate::MetaConfig {
            node: NodeId(1),
            voters: vec![NodeId(1)],
            addresses: Vec::new(),
            cluster: crate::testing::CLUSTER,
            disk: reactor::DiskIndex(0),
            region_offset: 1 << 20,
            region_len: 8 << 20,
            tokens: 0,
            planted: crate::planted::Planted::none(),
        };
        change(&mut config);
        w.slots[0].failed = None;
        w.open_with(0, config);
        assert!(w.run_until(1_000, |w| !w.failures().is_empty()), "{}", w.describe());
        w.crash(0);
        w.failures().remove(0).1
    };
    let other = wire::ClusterId(7);
    assert_eq!(reopen(&mut w, &|c| c.cluster = other), MetaError::OtherCluster(crate::testing::CLUSTER));
    let moved = reopen(&mut w, &|c| {
        c.node = NodeId(2);
        c.voters = vec![NodeId(2)];
    });
    assert_eq!(moved, MetaError::OtherNode(NodeId(1)));
    assert_eq!(reopen(&mut w, &|c| c.region_len = 6 << 20), MetaError::OtherSize);
    assert!(matches!(reopen(&mut w, &|c| c.region_len = 1 << 20), MetaError::Config(_)));
    assert!(matches!(reopen(&mut w, &|c| c.region_len = 1 << 40), MetaError::Config(_)));
    assert!(matches!(reopen(&mut w, &|c| c.disk = reactor::DiskIndex(3)), MetaError::Config(_)));
    assert!(matches!(reopen(&mut w, &|c| c.voters.push(NodeId(2))), MetaError::Config(_)));
    for block in [256, 257] {
        w.slots[0].env.block_mut(block).unwrap().fill(0);
    }
    assert_eq!(reopen(&mut w, &|_| {}), MetaError::SuperblockDamaged);
}

#[test]
fn one_damaged_superblock_of_two_is_survived() {
    for block in [256, 257] {
        let mut w = one(10);
        w.elect();
        w.put(0, "/a", "1");
        w.crash(0);
        w.slots[0].env.block_mut(block).unwrap()[50] ^= 1;
        w.start(0);
        w.elect();
        assert_eq!(w.range(0, "/a").len(), 1);
    }
}

#[test]
fn a_voter_whose_memory_was_wiped_stops_when_the_leader_counts_on_it() {
    let mut w = World::new(11, Options::default());
    let leader = w.elect();
    let wiped = (leader + 1) % 3;
    w.put(leader, "/a", "1");
    w.converge();
    w.crash(wiped);
    for block in w.slots[wiped].env.written_blocks() {
        w.slots[wiped].env.block_mut(block).unwrap().fill(0);
    }
    w.start(wiped);
    assert!(w.run_until(3_000, |w| !w.failures().is_empty()));
    assert!(matches!(w.failures()[0].1, MetaError::EntriesLost { .. }), "{:?}", w.failures());
    w.put(leader, "/a", "2");
}

#[test]
fn a_disk_queue_of_one_is_enough() {
    let mut w = one(12);
    w.slots[0].env.queue = 1;
    w.elect();
    for i in 0..20 {
        w.put(0, &format!("/k{i}"), &format!("\"{}\"", "v".repeat(30_000)));
    }
    assert_eq!(w.range(0, "/k").len(), 20);
    assert!(w.slots[0].node.as_ref().is_some_and(MetaNode::is_ready));
}

#[test]
fn a_log_full_of_what_never_committed_is_written_anew() {
    use crate::codec::{Body, EntryMsg, Packet, RaftMsg};
    let options = Options { region: 4 << 20, disk_us: 50, ..Options::default() };
    let mut w = World::new(13, options);
    let leader = w.elect();
    let alone = (leader + 1) % 3;
    w.put(leader, "/a", "1");
    w.converge();
    let (others, base) = ([leader, (leader + 2) % 3], w.node(alone).status());
    others.iter().for_each(|node| w.crash(*node));
    // One leader after another puts entries into this voter's log, and none lives to commit them.
    let mut taken = 0;
    for round in 0..120 {
        let term = base.term + 1 + round;
        let data = crate::codec::Command {
            id: crate::codec::RequestId { session: 1, seq: round, floor: 1 },
            op: crate::codec::Op::Txn {
                verdict: crate::codec::Verdict::Apply,
                writes: vec![wire::control::Write::Delete { key: "x".repeat(100_000) }],
                stripped: false,
            },
        };
        let entry = EntryMsg { term, index: base.last_index + 1, data: data.encode() };
        let message = RaftMsg {
            kind: 3,
            term,
            log_term: base.term,
            index: base.last_index,
            commit: base.commit_index,
            commit_term: 0,
            reject: false,
            reject_hint: 0,
            context: vec![],
            entries: vec![entry],
        };
        let from = World::id(others[round as usize % 2]);
        let packet = Packet { cluster: crate::testing::CLUSTER, from, body: Body::Raft(message) };
        w.with(alone, |meta, env| meta.on_message(env, from, &packet.encode()));
        w.run_ms(20);
        let status = w.node(alone).status();
        taken += u64::from(status.term == term);
    }
    assert!(w.failures().is_empty(), "{:?}", w.failures());
    assert!(taken > 110, "{taken} of 120 were taken");
    let before = w.node(alone).status();
    w.crash(alone);
    w.start(alone);
    w.run_ms(200);
    let after = w.node(alone).status();
    assert_eq!((after.term, after.last_index), (before.term, before.last_index));
    others.iter().for_each(|node| w.start(*node));
    w.converge();
    assert_eq!(w.range(alone, "/a").len(), 1);
}
