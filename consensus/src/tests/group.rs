//! Elections, replication, transactions and watches of a group.

use crate::testing::{Options, World, put};
use wire::control::{Compare, MetaReply, MetaRequest, Write};
use wire::{Revision, Status};

fn world(seed: u64, voters: u64) -> World {
    World::new(seed, Options { voters, ..Options::default() })
}

#[test]
fn a_single_voter_serves_and_remembers_through_restarts() {
    let mut w = world(1, 1);
    let mut last = Revision(0);
    for round in 0..4 {
        w.elect();
        for i in 0..20 {
            last = w.put(0, &format!("/k/{i}"), &round.to_string());
        }
        assert_eq!(w.range(0, "/k/").len(), 20);
        w.crash(0);
        w.start(0);
    }
    w.elect();
    let items = w.range(0, "/k/");
    assert!(items.iter().all(|item| item.value == "3") && items.len() == 20);
    assert_eq!(items.iter().map(|item| item.mod_revision).max(), Some(last));
}

#[test]
fn three_voters_elect_replicate_and_answer_anywhere() {
    let mut w = world(2, 3);
    w.elect();
    for node in 0..3 {
        w.put(node, &format!("/n/{node}"), "true");
    }
    for node in 0..3 {
        assert_eq!(w.range(node, "/n/").len(), 3);
    }
    w.converge();
    assert_eq!(w.held(0), w.held(1));
    assert_eq!(w.held(0), w.held(2));
}

#[test]
fn a_dead_leader_is_replaced_within_a_second() {
    let mut worst = 0;
    for seed in 0..40 {
        let mut w = world(1000 + seed, 3);
        let old = w.elect();
        w.put(old, "/a", "1");
        let asker = (old + 1) % 3;
        w.run_ms(seed * 7);
        w.crash(old);
        let from = w.now;
        let ticket = w.submit(asker, put("/a", "2"));
        assert!(w.run_until(3_000, |w| w.replies.contains_key(&ticket)));
        assert!(matches!(w.replies[&ticket].1, MetaReply::Applied { .. }));
        worst = worst.max((w.now - from) / 1_000_000);
        assert_eq!(w.range(asker, "/a")[0].value, "2");
    }
    assert!(worst < 1_000, "{worst} ms");
}

#[test]
fn a_hint_that_the_leader_is_gone_shortens_the_election() {
    for seed in 0..20 {
        let mut w = world(77 + seed, 3);
        let old = w.elect();
        w.put(old, "/a", "1");
        w.converge();
        w.crash(old);
        w.run_ms(1); // what the leader has said arrives before the end of its connections
        let from = w.now;
        for node in (0..3).filter(|node| *node != old) {
            w.with(node, |meta, env| meta.on_peer_gone(env, World::id(old)));
        }
        w.elect();
        assert!(w.now - from < 120_000_000, "seed {seed}: {} ms", (w.now - from) / 1_000_000);
    }
}

#[test]
fn a_resigning_leader_hands_over_at_once() {
    let mut w = world(78, 3);
    let old = w.elect();
    w.put(old, "/a", "1");
    w.converge();
    let from = w.now;
    w.with(old, |meta, env| meta.resign(env));
    assert!(w.run_until(1_000, |w| w.leader().is_some_and(|leader| leader != old)));
    assert!(w.now - from < 100_000_000, "{} ms", (w.now - from) / 1_000_000);
}

#[test]
fn a_leader_cut_off_steps_down_and_follows_when_healed() {
    let mut w = world(3, 3);
    let old = w.elect();
    w.put(old, "/a", "1");
    w.isolate(old);
    let lost = w.submit(old, put("/a", "\"lost\""));
    assert!(w.run_until(3_000, |w| !w.node(old).is_serving()));
    let new = w.elect();
    assert_ne!(new, old);
    w.put(new, "/a", "2");
    assert!(w.run_until(7_000, |w| w.replies.contains_key(&lost)));
    // It had entered the old leader's log: nobody knows.
    assert_eq!(w.replies[&lost].1, MetaReply::failed(Status::Unknown));
    w.heal();
    w.converge();
    assert_eq!(w.range(old, "/a")[0].value, "2");
    assert_eq!(w.node(old).leader(), Some(World::id(w.leader().unwrap())));
}

#[test]
fn without_a_majority_requests_fail_and_nothing_is_pretended() {
    let mut w = world(4, 3);
    let leader = w.elect();
    let alone = (leader + 1) % 3;
    w.put(leader, "/a", "1");
    w.crash(leader);
    w.crash((leader + 2) % 3);
    w.run_ms(2_000);
    assert_eq!(w.call(alone, put("/a", "2")), MetaReply::failed(Status::NotActive));
    let read = MetaRequest::Range { prefix: "/".into(), limit: 1 };
    assert_eq!(w.call(alone, read), MetaReply::failed(Status::NotActive));
    assert_eq!(w.node(alone).kv().get("/a").unwrap().value, "1");
}

#[test]
fn transactions_compare_then_write_all_or_nothing() {
    let mut w = world(5, 3);
    let node = (w.elect() + 1) % 3;
    let first = w.put(node, "/a", "1");
    let txn = |compares, writes| MetaRequest::Txn { compares, writes };
    let put = |key: &str, value: &str| Write::Put { key: key.into(), value: value.into(), lease: None };
    let at = |revision| Compare::ModRevision { key: "/a".into(), revision };
    let absent = |key: &str| Compare::ModRevision { key: key.into(), revision: Revision(0) };
    let exists = |key: &str| Compare::Exists { key: key.into() };
    let failed = |index| MetaReply::CompareFailed { index };
    let both = vec![put("/b", "1"), put("/c", "1")];
    assert_eq!(w.call(node, txn(vec![exists("/a"), absent("/a")], both.clone())), failed(1));
    assert_eq!(w.call(node, txn(vec![at(Revision(first.0 + 1))], both.clone())), failed(0));
    assert!(w.range(node, "/").len() == 1);
    let reply = w.call(node, txn(vec![at(first), absent("/b")], both));
    let MetaReply::Applied { revision } = reply else { panic!("{reply:?}") };
    let items = w.range(node, "/");
    assert_eq!(items.len(), 3);
    assert!(items[1..].iter().all(|item| item.mod_revision == revision));
    let wipe =
        vec![Write::DeletePrefix { prefix: "/".into() }, put("/z", "0"), Write::Delete { key: "/q".into() }];
    w.call(node, txn(vec![], wipe));
    assert_eq!(w.range(node, "/").len(), 1);
    w.converge();
    let last = w.slots[node].watch.log.last().unwrap();
    assert_eq!(last.2.len(), 4, "three deletions and a put in one event: {last:?}");
}

#[test]
fn bad_values_are_refused_without_a_trace() {
    let mut w = world(6, 1);
    w.elect();
    assert_eq!(w.call(0, put("/a", "{not json")), MetaReply::failed(Status::Invalid));
    assert_eq!(w.call(0, put("", "1")), MetaReply::failed(Status::Invalid));
    assert!(w.range(0, "/").is_empty());
}

#[test]
fn concurrent_creations_of_one_key_have_one_winner() {
    let mut w = world(7, 3);
    w.elect();
    let create = |value: usize| MetaRequest::Txn {
        compares: vec![Compare::ModRevision { key: "/one".into(), revision: Revision(0) }],
        writes: vec![Write::Put { key: "/one".into(), value: value.to_string(), lease: None }],
    };
    let tickets: Vec<u64> = (0..30).map(|i| w.submit(i % 3, create(i))).collect();
    assert!(w.run_until(5_000, |w| tickets.iter().all(|t| w.replies.contains_key(t))));
    let won = |t: &&u64| matches!(w.replies[*t].1, MetaReply::Applied { .. });
    assert_eq!(tickets.iter().filter(won).count(), 1);
}

#[test]
fn five_voters_survive_two_crashes() {
    let mut w = world(8, 5);
    let leader = w.elect();
    w.put(leader, "/a", "1");
    w.crash(leader);
    w.crash((leader + 1) % 5);
    let leader = w.elect();
    w.put(leader, "/a", "2");
    for node in 0..5 {
        if w.slots[node].node.is_none() {
            w.start(node);
        }
    }
    w.converge();
    assert!((0..5).all(|node| w.held(node) == w.held(leader)));
}

#[test]
fn strangers_and_garbage_are_counted_and_ignored() {
    let mut w = world(9, 3);
    let leader = w.elect();
    w.put(leader, "/a", "1");
    let other = crate::codec::Packet {
        cluster: wire::ClusterId(1),
        from: World::id((leader + 1) % 3),
        body: crate::codec::Body::WantEphemeral,
    };
    let stranger =
        crate::codec::Packet { cluster: crate::testing::CLUSTER, from: wire::NodeId(99), ..other.clone() };
    w.with(leader, |meta, env| {
        meta.on_message(env, stranger.from, &stranger.encode());
        meta.on_message(env, other.from, &[1, 2, 3]);
        meta.on_message(env, other.from, &other.encode());
    });
    let counters = w.node(leader).counters();
    assert_eq!((counters.foreign_node, counters.malformed, counters.foreign_cluster), (1, 1, 1));
    w.put(leader, "/a", "2");
}

#[test]
fn too_many_requests_are_answered_busy() {
    let mut w = world(10, 1);
    w.elect();
    let max = crate::bounds::REQUESTS_MAX as u64;
    w.with(0, |meta, env| (0..=max).for_each(|i| meta.submit(env, 1_000_000 + i, put("/a", "1"))));
    assert_eq!(w.replies[&(1_000_000 + max)].1, MetaReply::failed(Status::Busy));
    assert!(w.run_until(1_000, |w| (0..max).all(|i| w.replies.contains_key(&(1_000_000 + i)))));
    assert!((0..max).all(|i| matches!(w.replies[&(1_000_000 + i)].1, MetaReply::Applied { .. })));
}

#[test]
fn many_requests_share_a_device_write() {
    let mut w = world(11, 1);
    w.elect();
    w.run_ms(200);
    let before = w.slots[0].env.writes;
    w.with(0, |meta, env| (0..100).for_each(|i| meta.submit(env, 5_000 + i, put(&format!("/k{i}"), "1"))));
    assert!(w.run_until(1_000, |w| (0..100).all(|i| w.replies.contains_key(&(5_000 + i)))));
    assert_eq!(w.slots[0].env.writes - before, 1);
}

#[test]
fn a_seed_repeats_exactly() {
    let run = || {
        let options = Options { loss: 50, doubled: 50, delay_us: 5_000, ..Options::default() };
        let mut w = World::new(42, options);
        for i in 0..30 {
            w.submit(i % 3, put(&format!("/k{}", i % 5), &i.to_string()));
            w.run_ms(37);
        }
        w.crash(1);
        w.run_ms(1_000);
        w.start(1);
        w.run_ms(3_000);
        (w.trace, w.replies)
    };
    assert_eq!(run(), run());
}
