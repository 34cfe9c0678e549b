//! What PGs leave behind on slices: erased once the control core says so, and nothing else is.

use super::cluster::*;
use crate::CoreMsg;
use crate::config::STRAYS_RETRY_MS;
use crate::msg::Leavings;
use crate::planted::Planted;
use std::collections::BTreeSet;
use store::Presence;
use wire::*;

const OBJECTS: u64 = 60;

/// Objects on all three nodes, a tombstone among them; the PG has left node 2, which has been told.
fn left(seed: u64, planted: Planted) -> Cluster {
    let mut c = Cluster::with(seed, planted);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    (0..OBJECTS).for_each(|n| c.put(conn, n, 0, 1));
    c.decide(0, &[0, 1], &[0, 1, 2]);
    let request = c.delete(conn, 0);
    assert_eq!(c.status(request), Status::Ok);
    c.copies = 2;
    c.record.target = vec![slice(0), slice(1)];
    c.decide_for(&[0, 1], 0, &[0, 1], &[0, 1]);
    c.tell(2, CoreMsg::PgGone { pg: PG });
    c
}

fn settled() -> Leavings {
    Leavings::Of { pg_count: 1, settled: BTreeSet::from([0]) }
}

/// Questions that node 2 has asked so far.
fn asked(c: &Cluster) -> usize {
    c.told().iter().filter(|(node, msg)| *node == 2 && matches!(msg, CoreMsg::AskLeavings { .. })).count()
}

fn answer(c: &mut Cluster, leavings: Leavings) {
    c.tell(2, CoreMsg::Leavings { slice: slice(2), pool: PG.pool, leavings });
}

fn here(c: &Cluster) -> usize {
    (0..OBJECTS).filter(|n| c.presence(2, *n) != Presence::Absent).count()
}

fn next_question(c: &mut Cluster) {
    let before = asked(c);
    c.wait("another question", |c| asked(c) > before);
}

#[test]
fn what_was_left_behind_goes_when_it_may_and_not_before() {
    let mut c = left(1, Planted::none());
    next_question(&mut c);
    answer(&mut c, Leavings::Unknown);
    c.pass(3_000);
    assert_eq!(here(&c), OBJECTS as usize, "erased although nothing was known");
    next_question(&mut c);
    answer(&mut c, Leavings::Of { pg_count: 1, settled: BTreeSet::new() });
    c.pass(3_000);
    assert_eq!(here(&c), OBJECTS as usize, "erased although its other copies are not in sync");
    next_question(&mut c);
    answer(&mut c, settled());
    c.wait("erased", |c| here(c) == 0);
    c.wait("durable", |c| c.nodes[&2].core.metrics.erased.get() == OBJECTS);
    assert_eq!(c.nodes[&2].core.store_ref(0).unwrap().stats().objects, 0, "tombstones too");
    let before = asked(&c);
    c.pass(30_000);
    assert_eq!(asked(&c), before, "there is nothing left to ask for");
    assert!(c.equal(&[0, 1]));
    c.lease(0, 60_000);
    let conn = c.dial(0, 2);
    assert_eq!(c.get(conn, 7, 0), 1);
}

#[test]
fn a_pg_that_comes_back_is_left_alone_whatever_was_said_before() {
    returned(Planted::none());
}

pub(super) fn returned(planted: Planted) {
    let mut c = left(2, planted);
    next_question(&mut c);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    answer(&mut c, settled());
    c.wait("in sync again", |c| {
        c.obey_in_sync();
        c.record.in_sync.contains(&slice(2)) && c.equal(&[0, 1, 2])
    });
    c.pass(2_000);
    assert_eq!(c.nodes[&2].core.metrics.erased.get(), 0);
    assert!(c.equal(&[0, 1, 2]));
}

#[test]
fn a_pg_that_comes_back_in_the_middle_gets_back_what_is_gone() {
    for seed in 0..20 {
        let mut c = left(100 + seed, Planted::none());
        next_question(&mut c);
        answer(&mut c, settled());
        c.wait("some erased", |c| here(c) < OBJECTS as usize);
        for _ in 0..seed {
            c.step();
        }
        c.decide(0, &[0, 1, 2], &[0, 1]);
        c.wait("in sync again", |c| {
            c.obey_in_sync();
            c.record.in_sync.contains(&slice(2)) && c.equal(&[0, 1, 2])
        });
        c.pass(2_000);
        assert!(c.equal(&[0, 1, 2]), "seed {seed}");
        c.crash(2);
        c.start(2);
        c.decide(0, &[0, 1, 2], &[0, 1]);
        c.wait("equal after a restart", |c| c.equal(&[0, 1, 2]));
    }
}

#[test]
fn a_removed_pool_goes_whole_once_none_of_its_pgs_is_here() {
    let mut c = left(3, Planted::none());
    next_question(&mut c);
    // Another node's core still has the PG: there it stays.
    c.tell(0, CoreMsg::Leavings { slice: slice(0), pool: PG.pool, leavings: Leavings::PoolRemoved });
    answer(&mut c, Leavings::PoolRemoved);
    c.wait("erased", |c| here(c) == 0);
    assert!(matches!(c.presence(0, 5), Presence::Live(_)));
}

#[test]
fn a_busy_store_delays_erasing_by_moments_only() {
    const MANY: u64 = 100;
    let mut c = Cluster::with(7, Planted::none());
    c.dirty_objects_max = 64;
    c.crash(2);
    c.start(2);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    for n in 0..MANY {
        let mut header = Header::new(FrameKind::Write, 0);
        (header.object, header.blocks) = (object(n), OBJECT_BLOCKS as u16);
        let request = c.request(conn, header, Some(vec![1; OBJECT_BLOCKS * BLOCK_BYTES]));
        assert_eq!(c.status(request), Status::Ok);
    }
    c.copies = 2;
    c.record.target = vec![slice(0), slice(1)];
    c.decide_for(&[0, 1], 0, &[0, 1], &[0, 1]);
    c.tell(2, CoreMsg::PgGone { pg: PG });
    next_question(&mut c);
    // Checkpoints take a while on this disk, and nothing is accepted that would make the next one too large.
    c.world.borrow_mut().disks.get_mut(&2).unwrap().slow_ns = 5_000_000;
    answer(&mut c, settled());
    c.pass(STRAYS_RETRY_MS - 1_000);
    assert_eq!(c.nodes[&2].core.metrics.erased.get(), MANY, "before a second pass was due");
    assert_eq!(c.nodes[&2].core.store_ref(0).unwrap().stats().objects, 0);
}
