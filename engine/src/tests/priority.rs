//! What background recovery does first, what an administrator pauses, and what full slices leave out.

use super::cluster::*;
use crate::{CoreMsg, PgState};
use placement::Settings;
use reactor::{Frame, IoBuf, Net};
use store::Presence;
use wire::*;

/// A placement group of a second pool.
const OTHER: PgId = PgId { pool: PoolId(2), index: 0 };
const OBJECTS: u64 = 100;

fn set(c: &mut Cluster, settings: Settings) {
    for node in 0..3 {
        c.tell(node, CoreMsg::Settings(settings));
    }
}

fn full(c: &mut Cluster, slices: &[SliceId]) {
    for node in 0..3 {
        c.tell(node, CoreMsg::Full { slices: slices.iter().copied().collect() });
    }
}

/// Node 2 lacks objects: all of `from..to`.
fn node_2_lacks(c: &mut Cluster, from: u64, to: u64) -> reactor::ConnId {
    c.decide(0, &[0, 1], &[0, 1]);
    let conn = c.dial(0, 1);
    for n in from..to {
        c.put(conn, n, 0, 1);
    }
    conn
}

/// A cluster whose node 2 lacks objects 0..20, which nobody brings it; changes need so many copies.
fn unrecovered(min_copies: u8) -> (Cluster, reactor::ConnId) {
    let mut c = Cluster::new(1);
    let conn = node_2_lacks(&mut c, 0, 20);
    c.min_copies = min_copies;
    set(&mut c, Settings { norecover: true, ..Settings::default() });
    c.decide(0, &[0, 1, 2], &[0, 1]);
    c.wait_state(0, PgState::Recovering);
    c.pass(3_000);
    assert!((0..20).all(|n| c.presence(2, n) == Presence::Absent), "recovered all the same");
    (c, conn)
}

fn recover(c: &mut Cluster) {
    set(c, Settings { norebalance: true, ..Settings::default() });
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(0, PgState::Clean)
    });
    assert!(c.equal(&[0, 1, 2]));
}

#[test]
fn norecover_pauses_the_background_and_writes_go_on_without_whoever_lacks_the_object() {
    let (mut c, conn) = unrecovered(2);
    c.put(conn, 7, 1, 2);
    assert_eq!((c.presence(2, 7), c.presence(2, 8)), (Presence::Absent, Presence::Absent));
    c.put(conn, 30, 1, 2);
    assert!(matches!(c.presence(2, 30), Presence::Live(_)), "a new object lacks nowhere");
    recover(&mut c);
    assert_eq!(c.get(conn, 7, 1), 2);
}

#[test]
fn a_write_is_not_left_to_the_only_copy_whatever_the_minimum() {
    let mut c = Cluster::new(1);
    c.decide(0, &[0], &[0]);
    let conn = c.dial(0, 1);
    c.put(conn, 7, 0, 1);
    set(&mut c, Settings { norecover: true, ..Settings::default() });
    c.decide(0, &[0, 1, 2], &[0]);
    c.wait_state(0, PgState::Recovering);
    c.put(conn, 7, 1, 2);
    assert!(c.equal(&[0, 1, 2]));
}

#[test]
fn a_write_that_needs_every_copy_brings_its_object_first() {
    let (mut c, conn) = unrecovered(3);
    c.put(conn, 7, 1, 2);
    assert!(matches!(c.presence(2, 7), Presence::Live(_)));
    assert_eq!(c.presence(2, 8), Presence::Absent);
    recover(&mut c);
}

#[test]
fn a_write_behind_a_deletion_reaches_the_member_that_the_deletion_made_whole() {
    let (mut c, conn) = unrecovered(2);
    let requests: Vec<u64> =
        (0..20).flat_map(|n| [c.write(conn, n, 0, 5), c.delete(conn, n), c.write(conn, n, 1, 6)]).collect();
    for request in requests {
        assert_eq!(c.status(request), Status::Ok);
    }
    assert!((0..20).all(|n| matches!(c.presence(2, n), Presence::Live(_))));
    recover(&mut c);
}

#[test]
fn norebalance_pauses_what_only_moves_until_a_copy_is_lost() {
    let mut c = Cluster::new(2);
    c.copies = 2;
    node_2_lacks(&mut c, 0, 20);
    set(&mut c, Settings { norebalance: true, ..Settings::default() });
    c.decide(0, &[0, 1, 2], &[0, 1]);
    c.wait_state(0, PgState::Recovering);
    c.pass(3_000);
    assert!((0..20).all(|n| c.presence(2, n) == Presence::Absent), "moved all the same");
    // Now the third copy is the second one.
    c.crash(1);
    c.decide(0, &[0, 2], &[0]);
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(0, PgState::Clean)
    });
    assert!(c.equal(&[0, 2]));
}

/// Tells the cores of the same record for the second pool, with copies of its own.
fn announce_other(c: &mut Cluster, copies: u8) {
    for node in 0..3 {
        let mut update = c.update();
        update.pg = OTHER;
        update.pool.id = OTHER.pool;
        update.pool.copies = copies;
        c.tell(node, CoreMsg::Pg(update));
    }
}

fn put_other(c: &mut Cluster, conn: reactor::ConnId, index: u64) {
    let mut header = Header::new(FrameKind::Write, 1_000_000 + index);
    header.pg = OTHER;
    header.epoch = c.record.epoch;
    header.object = ObjectId { pool: OTHER.pool, ..object(index) };
    header.blocks = 1;
    let data = [5u8; BLOCK_BYTES];
    header.payload_len = data.len() as u32;
    let payload = Some(IoBuf::copy_of(&data).unwrap());
    c.client_env.send(conn, Frame { header, crcs: BlockCrcs::of(&data), payload }).unwrap();
    assert_eq!(c.status(1_000_000 + index), Status::Ok);
}

#[test]
fn lacking_copies_come_before_copies_that_only_move() {
    let mut c = Cluster::new(3);
    c.copies = 2;
    let conn = node_2_lacks(&mut c, 0, OBJECTS);
    announce_other(&mut c, 3);
    for n in 0..OBJECTS {
        put_other(&mut c, conn, n);
    }
    // The one that only moves is told first.
    c.decide(0, &[0, 1, 2], &[0, 1]);
    announce_other(&mut c, 3);
    let other_in_sync = |c: &mut Cluster| {
        c.told().iter().any(|(_, msg)| matches!(msg, CoreMsg::InSync { pg, .. } if *pg == OTHER))
    };
    c.wait("the degraded one to be whole", other_in_sync);
    let moved = (0..OBJECTS).filter(|n| c.presence(2, *n) != Presence::Absent).count();
    assert!(moved <= OBJECTS as usize / 3, "{moved} objects were moved before those that were lacking");
    c.wait("the other one to be moved", |c| {
        c.told().iter().any(|(_, msg)| matches!(msg, CoreMsg::InSync { pg, .. } if *pg == PG))
    });
}

#[test]
fn a_nearly_full_slice_takes_only_what_it_has_room_for_already_and_goes_on_when_there_is_more() {
    let mut c = Cluster::new(4);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    c.put(conn, 1, 0, 2);
    for n in 10..30 {
        c.put(conn, n, 0, 3);
    }
    let delete = c.delete(conn, 29);
    assert_eq!(c.status(delete), Status::Ok);
    c.start(2);
    // Any slice with something in it is too full.
    set(&mut c, Settings { backfillfull_percent: 0, ..Settings::default() });
    c.decide(0, &[0, 1, 2], &[0, 1]);
    c.wait_state(0, PgState::TooFull);
    c.wait("the overwritten object", |c| c.presence(2, 1) == c.presence(0, 1));
    c.pass(3_000);
    assert!((10..29).all(|n| c.presence(2, n) == Presence::Absent));
    assert!(c.reported(0, PgState::TooFull));
    // A write goes on without the member that has no room for its object.
    c.put(conn, 12, 1, 4);
    assert_eq!(c.presence(2, 12), Presence::Absent);
    assert!(!c.told().iter().any(|(_, msg)| matches!(msg, CoreMsg::OutOfSync { .. })));
    set(&mut c, Settings::default());
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(0, PgState::Clean) && c.equal(&[0, 1, 2])
    });
}

#[test]
fn writes_that_need_space_are_refused_while_any_copy_is_on_a_full_slice() {
    let mut c = Cluster::new(5);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.put(conn, 2, 0, 1);
    for slice_full in [slice(0), slice(2)] {
        full(&mut c, &[slice_full]);
        c.pass(1);
        for (index, block) in [(9, 0), (1, 1)] {
            let request = c.write(conn, index, block, 2);
            assert_eq!(c.status(request), Status::NoSpace, "object {index} block {block}");
        }
        c.put(conn, 1, 0, 3);
        assert_eq!((c.get(conn, 1, 0), c.get(conn, 1, 1)), (3, 0));
    }
    let request = c.delete(conn, 2);
    assert_eq!(c.status(request), Status::Ok);
    // Somebody else's slice is nobody's business here.
    full(&mut c, &[SliceId(77)]);
    c.pass(1);
    c.put(conn, 9, 0, 4);
    assert!(!c.told().iter().any(|(_, msg)| matches!(msg, CoreMsg::OutOfSync { .. })));
    c.wait_state(0, PgState::Clean);
    assert!(c.equal(&[0, 1, 2]));
}
