//! The data path while nothing fails, or nothing more than a connection.

use super::cluster::*;
use crate::PgState;
use store::Presence;
use wire::{Epoch, FrameKind, Header, Status, Version};

#[test]
fn a_write_is_on_every_member_and_reads_back() {
    let mut c = Cluster::new(1);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 3, 7);
    for node in 0..3 {
        assert_eq!(
            c.presence(node, 1),
            Presence::Live(Version { epoch: Epoch(1), counter: 1 }),
            "node {node}"
        );
    }
    assert_eq!(c.get(conn, 1, 3), 7);
    assert_eq!(c.get(conn, 1, 4), 0, "an unwritten block is zero");
    assert_eq!(c.get(conn, 9, 0), 0, "an unwritten object is zero");
    c.wait_state(0, PgState::Clean);
    (0..3).for_each(|node| c.assert_idle(node));
}

#[test]
fn changes_of_one_object_are_pipelined_and_stay_in_order() {
    let mut c = Cluster::new(2);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    let writes: Vec<u64> = (1..=100).map(|n| c.write(conn, 1, n % 4, n as u8)).collect();
    for request in writes {
        assert_eq!(c.status(request), Status::Ok);
    }
    for block in 0..4 {
        assert_eq!(c.get(conn, 1, block), if block == 0 { 100 } else { 96 + block as u8 });
    }
    assert!(c.equal(&[0, 1, 2]));
    assert_eq!(c.presence(2, 1).version().unwrap().counter, 100);
    (0..3).for_each(|node| c.assert_idle(node));
}

#[test]
fn a_read_waits_for_the_write_it_overlaps_and_no_other() {
    let mut c = Cluster::new(3);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.world.borrow_mut().hold(0, 2);
    let write = c.write(conn, 1, 0, 2);
    let beside = c.read(conn, 1, 1);
    let over = c.read(conn, 1, 0);
    assert_eq!(c.status(beside), Status::Ok);
    c.pass(50);
    assert!(!c.replies.contains_key(&over) && !c.replies.contains_key(&write));
    c.world.borrow_mut().release(0, 2);
    assert_eq!(c.status(over), Status::Ok);
    assert_eq!(c.byte_of(over), 2);
    assert_eq!(c.status(write), Status::Ok);
}

#[test]
fn zero_and_delete_reach_every_member_and_tombstones_are_purged() {
    let mut c = Cluster::new(4);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.put(conn, 1, 1, 1);
    let mut zero = Header::new(FrameKind::Zero, 0);
    zero.object = object(1);
    zero.blocks = 1;
    let zero = c.request(conn, zero, None);
    assert_eq!(c.status(zero), Status::Ok);
    assert_eq!((c.get(conn, 1, 0), c.get(conn, 1, 1)), (0, 1));
    let delete = c.delete(conn, 1);
    assert_eq!(c.status(delete), Status::Ok);
    assert_eq!(c.get(conn, 1, 1), 0);
    c.wait("purged", |c| (0..3).all(|node| c.presence(node, 1) == Presence::Absent));
    c.put(conn, 1, 1, 9);
    assert_eq!(c.get(conn, 1, 1), 9);
    assert!(c.equal(&[0, 1, 2]));
    (0..3).for_each(|node| c.assert_idle(node));
}

#[test]
fn a_broken_connection_loses_and_repeats_nothing() {
    for seed in 0..40 {
        let mut c = Cluster::new(100 + seed);
        c.decide(0, &[0, 1, 2], &[0, 1, 2]);
        let conn = c.dial(0, 1);
        let mut requests = Vec::new();
        for n in 1..=60u32 {
            requests.push(c.write(conn, u64::from(n % 3), n % 5, n as u8));
            if n % 20 == 7 {
                for _ in 0..(seed * 3 % 50) {
                    c.step();
                }
                c.world.borrow_mut().break_between(0, 1 + (n as usize + seed as usize) % 2);
            }
        }
        for request in requests {
            assert_eq!(c.status(request), Status::Ok, "seed {seed}");
        }
        assert!(c.equal(&[0, 1, 2]), "seed {seed}");
        assert!(
            !c.told().iter().any(|(_, msg)| matches!(msg, crate::CoreMsg::OutOfSync { .. })),
            "seed {seed}"
        );
        (0..3).for_each(|node| c.assert_idle(node));
    }
}

#[test]
fn a_restarted_member_gets_what_it_had_not_confirmed() {
    for seed in 0..40 {
        let mut c = Cluster::new(200 + seed);
        c.decide(0, &[0, 1, 2], &[0, 1, 2]);
        let conn = c.dial(0, 1);
        c.put(conn, 1, 0, 1);
        let requests: Vec<u64> =
            (0..30u32).map(|n| c.write(conn, u64::from(n % 4), n % 8, n as u8)).collect();
        for _ in 0..seed * 4 {
            c.step();
        }
        c.crash(2);
        c.pass(20);
        c.start(2);
        c.announce();
        for request in requests {
            assert_eq!(c.status(request), Status::Ok, "seed {seed}");
        }
        assert!(c.equal(&[0, 1, 2]), "seed {seed}");
    }
}

/// Damages every block of a node that holds this byte and no other; how many.
fn damage(c: &Cluster, node: usize, byte: u8) -> usize {
    let mut world = c.world.borrow_mut();
    let blocks = &mut world.disks.get_mut(&node).unwrap().blocks;
    let hit = blocks.values_mut().filter(|block| block.iter().all(|found| *found == byte));
    hit.map(|block| block[17] ^= 1).count()
}

#[test]
fn a_bad_local_copy_is_answered_from_another_and_repaired() {
    let mut c = Cluster::new(5);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 2, 0x5a);
    assert_eq!(damage(&c, 0, 0x5a), 1);
    assert_eq!(c.get(conn, 1, 2), 0x5a);
    assert_eq!(c.nodes[&0].core.metrics.repaired.get(), 1);
    let reads_elsewhere =
        |c: &Cluster| c.world.borrow().sent.iter().filter(|(_, kind)| *kind == FrameKind::SubRead).count();
    let before = reads_elsewhere(&c);
    assert_eq!(c.get(conn, 1, 2), 0x5a, "and from the repaired copy");
    assert_eq!(reads_elsewhere(&c), before);
    assert!(c.equal(&[0, 1, 2]));
    c.assert_idle(0);
}

#[test]
fn a_bad_copy_with_a_change_that_no_other_has_goes_back_behind_it() {
    let mut c = Cluster::new(7);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 2, 0x5a);
    c.world.borrow_mut().hold(0, 1);
    c.world.borrow_mut().hold(0, 2);
    c.write(conn, 1, 5, 9);
    c.wait("only the primary to have it", |c| c.presence(0, 1).version().unwrap().counter == 2);
    c.pass(50);
    c.crash(0);
    c.world.borrow_mut().release(0, 1);
    c.world.borrow_mut().release(0, 2);
    assert_eq!(damage(&c, 0, 0x5a), 1);
    c.start(0);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    assert_eq!((c.get(conn, 1, 2), c.get(conn, 1, 5)), (0x5a, 0));
    c.wait_state(0, PgState::Clean);
    assert!(c.equal(&[0, 1, 2]));
}

#[test]
fn a_copy_that_is_bad_everywhere_is_an_error_and_never_data() {
    let mut c = Cluster::new(6);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 2, 0x5a);
    (0..3).for_each(|node| assert_eq!(damage(&c, node, 0x5a), 1));
    let request = c.read(conn, 1, 2);
    assert_eq!(c.status(request), Status::Corrupt);
    c.put(conn, 1, 2, 0x66);
    assert_eq!(c.get(conn, 1, 2), 0x66, "a new write makes it whole");
    c.assert_idle(0);
}
