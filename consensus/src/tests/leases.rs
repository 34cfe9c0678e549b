//! Leases and ephemeral keys.

use crate::testing::{Options, World, put, put_leased};
use wire::Status;
use wire::control::{Change, Compare, MetaReply, MetaRequest, Write};

const MS: u64 = 1_000_000;

fn keep(lease: u64, ttl_ms: u64) -> MetaRequest {
    MetaRequest::LeaseKeep { lease, ttl_ms }
}

fn granted(ttl_ms: u64) -> MetaReply {
    MetaReply::Lease { ttl_ms }
}

fn world(seed: u64) -> World {
    World::new(seed, Options::default())
}

#[test]
fn a_lease_without_renewal_ends_and_takes_its_keys_along() {
    let mut w = world(1);
    let node = (w.elect() + 1) % 3;
    let sent = w.now;
    assert_eq!(w.call(node, keep(7, 1_000)), granted(1_000));
    assert!(matches!(w.call(node, put_leased("/live/7", "1", 7)), MetaReply::Applied { .. }));
    w.put(node, "/stays", "1");
    assert!(w.run_until(3_000, |w| (0..3).all(|n| w.node(n).kv().get("/live/7").is_none())));
    let took = (w.now - sent) / MS;
    assert!((1_000..1_300).contains(&took), "{took} ms");
    let (_, _, changes) = w.slots[node].watch.log.last().unwrap();
    assert_eq!(*changes, [Change::Delete { key: "/live/7".into() }]);
    assert_eq!(w.range(node, "/").len(), 1);
}

#[test]
fn renewals_keep_a_lease_without_a_log_entry() {
    let mut w = world(2);
    let leader = w.elect();
    assert_eq!(w.call(1, keep(7, 500)), granted(500));
    w.call(1, put_leased("/live/7", "1", 7));
    w.converge();
    w.run_ms(100);
    let writes: u64 = w.slots.iter().map(|slot| slot.env.writes).sum();
    let index = w.node(leader).status().last_index;
    for _ in 0..20 {
        w.run_ms(200);
        assert_eq!(w.call(1, keep(7, 500)), granted(500));
    }
    assert_eq!(w.node(leader).status().last_index, index);
    assert_eq!(w.slots.iter().map(|slot| slot.env.writes).sum::<u64>(), writes);
    assert_eq!(w.range(2, "/live/").len(), 1);
}

#[test]
fn revoking_and_refusals() {
    let mut w = world(3);
    let node = w.elect();
    assert_eq!(w.call(node, put_leased("/l", "1", 9)), MetaReply::failed(Status::NotFound));
    w.call(node, keep(9, 60_000));
    w.call(node, put_leased("/l", "1", 9));
    w.put(node, "/d", "1");
    assert_eq!(w.call(node, put("/l", "1")), MetaReply::failed(Status::Invalid));
    assert_eq!(w.call(node, put_leased("/d", "1", 9)), MetaReply::failed(Status::Invalid));
    assert_eq!(w.call(node, keep(9, 1)), granted(crate::bounds::LEASE_TTL_MIN_MS));
    assert_eq!(w.call(node, MetaRequest::LeaseRevoke { lease: 9 }), granted(0));
    assert_eq!(w.range(node, "/").len(), 1);
}

#[test]
fn ephemeral_values_reach_every_voter_and_no_disk() {
    let mut w = World::new(4, Options { region: 4 << 20, disk_us: 50, ..Options::default() });
    let leader = w.elect();
    w.call(leader, keep(7, 60_000));
    let secret = "\"ephemeral-secret-value\"";
    assert!(matches!(w.call(leader, put_leased("/live/secret-key", secret, 7)), MetaReply::Applied { .. }));
    let value = format!("\"{}\"", "v".repeat(20_000));
    for i in 0..120 {
        w.put(leader, &format!("/k{}", i % 10), &value);
    }
    assert!(w.node(leader).status().snapshot_index > 0);
    w.converge();
    for node in 0..3 {
        assert_eq!(w.node(node).kv().get("/live/secret-key").unwrap().value, secret);
        assert!(!w.slots[node].env.disk_contains(b"ephemeral-secret"));
        assert!(!w.slots[node].env.disk_contains(b"secret-key"));
        assert!(w.slots[node].env.disk_contains(b"/k5"));
    }
}

#[test]
fn ephemeral_keys_survive_every_single_crash_and_leader_changes() {
    for seed in 0..20 {
        let mut w = world(50 + seed);
        w.elect();
        w.call(0, keep(7, 600_000));
        let MetaReply::Applied { revision } = w.call(1, put_leased("/live/7", "1", 7)) else { panic!() };
        for round in 0..6 {
            let victim = if round % 2 == 0 { w.elect() } else { w.random.below(3) as usize };
            w.crash(victim);
            let leader = w.elect();
            w.put(leader, "/d", &round.to_string());
            let wait = w.random.below(2_000);
            w.run_ms(wait);
            w.start(victim);
            w.converge();
            for node in 0..3 {
                let item = w.node(node).kv().get("/live/7").cloned();
                assert_eq!(item.map(|i| i.mod_revision), Some(revision), "seed {seed} round {round}");
            }
        }
    }
}

#[test]
fn a_restart_of_everybody_forgets_leases_and_ephemeral_keys_and_nothing_else() {
    let mut w = world(6);
    w.elect();
    w.call(0, keep(7, 600_000));
    w.call(0, put_leased("/live/7", "1", 7));
    // A durable write that depended on an ephemeral key must not come out differently afterwards.
    let txn = MetaRequest::Txn {
        compares: vec![Compare::Exists { key: "/live/7".into() }],
        writes: vec![Write::Put { key: "/d".into(), value: "2".into(), lease: None }],
    };
    assert!(matches!(w.call(0, txn), MetaReply::Applied { .. }));
    (0..3).for_each(|node| w.crash(node));
    (0..3).for_each(|node| w.start(node));
    let from = w.now;
    let leader = w.elect();
    assert!(w.now - from < 1_000 * MS);
    w.converge();
    assert_eq!(w.range(leader, "/").iter().map(|i| i.key.as_str()).collect::<Vec<_>>(), ["/d"]);
    assert_eq!(w.call(leader, put_leased("/live/7", "1", 7)), MetaReply::failed(Status::NotFound));
    assert_eq!(w.call(leader, keep(7, 600_000)), granted(600_000));
    assert!(matches!(w.call(leader, put_leased("/live/7", "1", 7)), MetaReply::Applied { .. }));
}

/// Owners renew through random nodes while leaders crash, get cut off and pause. A lease must hold as
/// long as its owner may believe in it: from the sending of a renewal that was granted.
pub fn owners_under_leader_changes(seed: u64, options: Options) -> Result<(), String> {
    let mut w = World::new(seed, options);
    w.elect();
    let ttl = 700;
    let mut valid_until = [0u64; 3];
    let mut asked: Vec<Option<(u64, u64)>> = vec![None; 3];
    let mut down: Option<usize> = None;
    let mut seen = [0usize; 3];
    for lease in 1..=3u64 {
        w.call(0, keep(lease, ttl));
        w.call(0, put_leased(&format!("/live/{lease}"), "1", lease));
        valid_until[lease as usize - 1] = w.now; // from here on counted by renewals
    }
    for round in 0..160 {
        for owner in 0..3 {
            if let Some((sent, ticket)) = asked[owner] {
                match w.replies.get(&ticket) {
                    Some((_, MetaReply::Lease { ttl_ms })) => {
                        let until = sent + ttl_ms * MS;
                        valid_until[owner] = valid_until[owner].max(until);
                        asked[owner] = None;
                    }
                    Some(_) => asked[owner] = None,
                    None => continue,
                }
            }
            let idle = w.random.below(10) < 3;
            let node = w.random.below(3) as usize;
            if !idle && w.slots[node].node.is_some() && w.slots[node].failed.is_none() {
                let sent = w.now;
                asked[owner] = Some((sent, w.submit(node, keep(owner as u64 + 1, ttl))));
            }
        }
        if round % 16 == 5 {
            match (down, w.leader()) {
                (None, Some(leader)) if round % 32 == 5 => w.isolate(leader),
                (None, Some(leader)) => {
                    w.crash(leader);
                    down = Some(leader);
                }
                _ => {}
            }
        }
        if round % 16 == 13 {
            w.heal();
            if let Some(node) = down.take() {
                w.start(node);
                // A minority has forgotten; it must learn again before the next may go.
                w.converge();
            }
        }
        let step = 20 + w.random.below(80);
        w.run_ms(step);
        for (node, slot) in w.slots.iter().enumerate() {
            let new = slot.watch.log.get(seen[node]..).unwrap_or(&[]);
            seen[node] = slot.watch.log.len();
            for (at, change) in new.iter().flat_map(|(at, _, changes)| changes.iter().map(move |c| (at, c))) {
                let Change::Delete { key } = change else { continue };
                let owner = key.trim_start_matches("/live/").parse::<usize>().map_err(|e| e.to_string())?;
                if *at < valid_until[owner - 1] {
                    let early = (valid_until[owner - 1] - at) / MS;
                    return Err(format!("seed {seed}: lease {owner} ended {early} ms early"));
                }
            }
        }
        // Owners whose key is gone put it again.
        if let Some(leader) = w.leader() {
            for owner in 1..=3u64 {
                let key = format!("/live/{owner}");
                if w.node(leader).kv().get(&key).is_none() && asked[owner as usize - 1].is_none() {
                    w.submit(leader, put_leased(&key, "1", owner));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn no_lease_ends_before_its_owner_thinks_so() {
    for seed in 0..40 {
        let options = Options { loss: 20, doubled: 20, delay_us: 20_000, ..Options::default() };
        owners_under_leader_changes(seed, options).unwrap();
    }
}

#[test]
fn a_paused_leader_does_not_blame_the_owners() {
    let mut w = World::new(12, Options { voters: 1, ..Options::default() });
    w.elect();
    w.call(0, keep(7, 1_000));
    w.call(0, put_leased("/live/7", "1", 7));
    w.pause(0, true);
    w.run_ms(5_000);
    w.pause(0, false);
    assert_eq!(w.call(0, keep(7, 1_000)), granted(1_000));
    assert_eq!(w.range(0, "/live/").len(), 1);
}
