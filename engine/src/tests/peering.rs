//! What comparing members costs, and that it finds everything.

use super::cluster::*;
use crate::metrics::OpClass;
use crate::{CoreMsg, PgState};
use wire::{FrameKind, Status};

const OBJECTS: u64 = 640;

/// Ways in which a primary has compared its members: by digest, by history, by list.
fn ways(c: &Cluster, node: usize) -> (u64, u64, u64) {
    let metrics = &c.nodes[&node].core.metrics;
    assert_eq!(metrics.digest_mismatches.get(), 0);
    let (digest, history) = (&metrics.compared_by_digest, &metrics.compared_by_history);
    (digest.get(), history.get(), metrics.compared_by_list.get())
}

fn sent(c: &Cluster, node: usize, kind: FrameKind) -> usize {
    c.world.borrow().sent.iter().filter(|(from, of)| *from == node && *of == kind).count()
}

/// Three nodes with the same objects, those of the PG's only slice each.
fn filled(seed: u64, history_changes: usize) -> Cluster {
    let mut c = Cluster::new(seed);
    c.history_changes = history_changes;
    for node in 0..3 {
        c.crash(node);
        c.start(node);
    }
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    let writes: Vec<u64> = (0..OBJECTS).map(|n| c.write(conn, n, 0, 1)).collect();
    for request in writes {
        assert_eq!(c.status(request), Status::Ok);
    }
    c.world.borrow_mut().sent.clear();
    c
}

fn recovered(c: &mut Cluster, primary: usize) {
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(primary, PgState::Clean)
    });
    // Tombstones are purged here a little earlier than there.
    c.wait("equal", |c| c.equal(&[0, 1, 2]));
}

#[test]
fn a_short_outage_costs_what_changed_in_it() {
    let mut c = filled(1, store::HISTORY_CHANGES);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    let conn = c.dial(0, 2);
    for n in 0..10 {
        c.put(conn, n * 7, 1, 2);
    }
    let request = c.delete(conn, 5);
    assert_eq!(c.status(request), Status::Ok);
    assert_eq!(ways(&c, 0), (2, 0, 0), "equal members need their digests only");
    c.start(2);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    recovered(&mut c, 0);
    assert_eq!(ways(&c, 0), (2, 1, 0), "the others are still known, the returned one is asked by history");
    assert_eq!((sent(&c, 0, FrameKind::List), sent(&c, 0, FrameKind::SubLookup)), (0, 1));
    assert_eq!(sent(&c, 0, FrameKind::SubPush), 10);
}

#[test]
fn a_fresh_primary_knows_the_history_too() {
    let mut c = filled(2, store::HISTORY_CHANGES);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    let conn = c.dial(0, 2);
    for n in 0..10 {
        c.put(conn, n, 1, 2);
    }
    c.crash(0);
    c.start(2);
    c.decide(1, &[1, 2], &[1]);
    c.wait("compared", |c| ways(c, 1).1 == 1);
    c.start(0);
    c.decide(1, &[0, 1, 2], &[1]);
    recovered(&mut c, 1);
    assert_eq!(ways(&c, 1), (1, 1, 0));
    assert_eq!(sent(&c, 1, FrameKind::List), 0);
}

#[test]
fn after_a_restart_of_everything_digests_are_all_that_is_compared() {
    let mut c = filled(3, store::HISTORY_CHANGES);
    for node in 0..3 {
        c.crash(node);
    }
    for node in 0..3 {
        c.start(node);
    }
    c.decide(1, &[1, 0, 2], &[0, 1, 2]);
    c.wait_state(1, PgState::Clean);
    assert_eq!(ways(&c, 1), (2, 0, 0));
    assert!(c.world.borrow().sent.iter().all(|(_, kind)| *kind != FrameKind::List));
}

#[test]
fn what_the_history_does_not_know_is_listed_in_the_buckets_that_differ() {
    let mut c = filled(4, 0);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    let conn = c.dial(0, 2);
    c.put(conn, 17, 1, 2);
    c.put(conn, 10_000, 1, 2);
    c.start(2);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    recovered(&mut c, 0);
    assert_eq!(ways(&c, 0), (2, 0, 1));
    let listed = c.nodes[&2].core.metrics.op(OpClass::List).bytes.get() / wire::ListEntry::BYTES as u64;
    // Two buckets of 64, and ten objects in each on average.
    assert!((1..OBJECTS / 10).contains(&listed), "{listed} objects listed");
}

#[test]
fn a_history_that_is_too_short_is_no_harm() {
    for history in [1, 3, 20] {
        let mut c = filled(5, history);
        c.crash(2);
        c.decide(0, &[0, 1], &[0, 1]);
        let conn = c.dial(0, 2);
        for n in 0..40 {
            c.put(conn, n * 3, 1, 2);
        }
        c.start(2);
        c.decide(0, &[0, 1, 2], &[0, 1]);
        recovered(&mut c, 0);
        assert_eq!(ways(&c, 0), (2, 0, 1), "history of {history}");
        assert_eq!(sent(&c, 0, FrameKind::SubPush), 40);
    }
}

#[test]
fn a_change_that_only_the_former_primary_has_is_found() {
    for seed in 0..10 {
        let mut c = filled(600 + seed, 4);
        let conn = c.dial(0, 2);
        // Nothing of it reaches the others, nobody hears that it happened.
        c.world.borrow_mut().hold(0, 1);
        c.world.borrow_mut().hold(0, 2);
        c.write(conn, 100, 3, 9);
        c.delete(conn, 101);
        c.pass(50);
        c.crash(0);
        c.world.borrow_mut().lose(0, 1);
        c.world.borrow_mut().lose(0, 2);
        c.decide(1, &[1, 2], &[1, 2]);
        let conn = c.dial(1, 3);
        c.put(conn, 300, 0, 4);
        c.start(0);
        c.decide(1, &[0, 1, 2], &[1, 2]);
        recovered(&mut c, 1);
        assert_eq!((c.get(conn, 100, 3), c.get(conn, 101, 0)), (0, 1), "seed {seed}");
        let (_, _, listed) = ways(&c, 1);
        assert_eq!(listed, 1, "no history but the former primary's own names them");
    }
}

#[test]
fn an_empty_member_is_not_asked_for_one_object_after_the_other() {
    let mut c = filled(7, store::HISTORY_CHANGES);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    c.prepare(2);
    c.start(2);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    recovered(&mut c, 0);
    assert_eq!(sent(&c, 0, FrameKind::SubLookup), 0);
    assert_eq!(sent(&c, 0, FrameKind::SubPush), OBJECTS as usize);
}

#[test]
fn comparing_survives_broken_connections() {
    for seed in 0..30 {
        let mut c = filled(800 + seed, [0, 30, store::HISTORY_CHANGES][seed as usize % 3]);
        c.crash(2);
        c.decide(0, &[0, 1], &[0, 1]);
        let conn = c.dial(0, 2);
        for n in 0..50 {
            c.put(conn, n * 5, 1, 2);
        }
        c.start(2);
        c.decide(0, &[0, 1, 2], &[0, 1]);
        for _ in 0..6 {
            for _ in 0..(3 + seed) {
                c.step();
            }
            c.lease(0, 60_000);
            c.world.borrow_mut().break_between(0, 2);
        }
        recovered(&mut c, 0);
        ways(&c, 0);
        c.assert_idle(0);
        c.assert_idle(2);
    }
}

#[test]
fn sums_of_a_pool_without_a_placement_group_here_are_forgotten() {
    let mut c = filled(9, store::HISTORY_CHANGES);
    let counted = |c: &Cluster, node: usize| {
        c.nodes[&node].core.store_ref(0).unwrap().group(PG.pool, PG.index).is_some()
    };
    assert!(counted(&c, 2));
    c.decide(0, &[0, 1], &[0, 1]);
    c.tell(2, CoreMsg::PgGone { pg: PG });
    c.wait("sums forgotten", |c| !counted(c, 2));
    assert!(counted(&c, 0), "it is in use elsewhere");
}
