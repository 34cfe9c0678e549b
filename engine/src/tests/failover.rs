//! Changes of the primary, and what the one before left behind.

use super::cluster::*;
use crate::PgState;
use crate::planted::Planted;
use wire::Status;

/// Writes once with success, then once more such that only `reached` of the members get it, then ends the
/// primary.
fn crash_in_the_middle(c: &mut Cluster, reached: usize) {
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    let missed = 3 - reached;
    c.world.borrow_mut().hold(0, missed);
    let write = c.write(conn, 1, 0, 2);
    c.wait("the other member has it", |c| c.presence(reached, 1).version().unwrap().counter == 2);
    c.pass(5);
    assert!(!c.replies.contains_key(&write));
    c.crash(0);
    c.world.borrow_mut().lose(0, missed);
}

#[test]
fn an_unacknowledged_write_is_undone_by_a_primary_without_it() {
    let mut c = Cluster::new(1);
    crash_in_the_middle(&mut c, 1);
    c.decide(2, &[1, 2], &[1, 2]);
    let conn = c.dial(2, 1);
    assert_eq!(c.get(conn, 1, 0), 1);
    c.wait("equal", |c| c.equal(&[1, 2]));
    c.put(conn, 1, 0, 3);
    assert_eq!(c.get(conn, 1, 0), 3);
    assert!(c.equal(&[1, 2]));
    c.wait_state(2, PgState::Degraded);
}

#[test]
fn an_unacknowledged_write_survives_with_a_primary_that_has_it() {
    let mut c = Cluster::new(2);
    crash_in_the_middle(&mut c, 1);
    c.decide(1, &[1, 2], &[1, 2]);
    let conn = c.dial(1, 1);
    assert_eq!(c.get(conn, 1, 0), 2);
    // Once read it must stay, whoever comes next: the read waited for the other member to have it.
    c.crash(1);
    c.decide(2, &[2], &[2]);
    let conn = c.dial(2, 2);
    assert_eq!(c.get(conn, 1, 0), 2);
}

#[test]
fn the_old_primary_comes_back_with_a_write_nobody_knows() {
    let mut c = Cluster::new(3);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.put(conn, 2, 0, 1);
    c.world.borrow_mut().hold(0, 1);
    c.world.borrow_mut().hold(0, 2);
    c.write(conn, 1, 0, 9);
    c.write(conn, 3, 0, 9);
    c.wait("the primary has it", |c| c.presence(0, 3).version().is_some());
    c.pass(5);
    c.crash(0);
    c.world.borrow_mut().lose(0, 1);
    c.world.borrow_mut().lose(0, 2);
    c.decide(1, &[1, 2], &[1, 2]);
    let conn = c.dial(1, 1);
    c.put(conn, 2, 0, 5);
    c.start(0);
    c.decide(1, &[0, 1, 2], &[1, 2]);
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(1, PgState::Clean)
    });
    assert!(c.equal(&[0, 1, 2]));
    assert_eq!((c.get(conn, 1, 0), c.get(conn, 2, 0), c.get(conn, 3, 0)), (1, 5, 0));
}

#[test]
fn a_paused_primary_that_wakes_neither_writes_nor_answers() {
    let mut c = Cluster::new(4);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    c.lease(0, 100);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.paused.insert(0);
    // They reach the old primary's socket and wait there.
    let (late_read, late_write) = (c.read(conn, 1, 0), c.write(conn, 1, 0, 9));
    c.pass(200);
    c.record.epoch.0 += 0;
    let before = c.record.clone();
    c.decide(1, &[1, 2], &[1, 2]);
    // The paused node's control core sleeps too: it has not heard.
    let news = c.record.clone();
    let second = c.dial(1, 1);
    c.put(second, 1, 0, 2);
    c.record = before;
    c.paused.remove(&0);
    assert_ne!(c.status(late_read), Status::Ok);
    assert_ne!(c.status(late_write), Status::Ok);
    c.record = news;
    assert_eq!(c.get(second, 1, 0), 2);
    assert!(c.equal(&[1, 2]));
}

#[test]
fn members_refuse_a_primary_of_an_older_epoch() {
    let mut c = Cluster::new(5);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    // Node 0 keeps its lease (a clock gone wrong) and hears nothing of the new epoch.
    c.record.epoch.0 += 1;
    c.record.primary = Some(slice(1));
    c.record.acting = vec![slice(1), slice(2)];
    c.record.in_sync = c.record.acting.clone();
    c.record.primary_session = c.update().members[1].session;
    for node in [1, 2] {
        let update = c.update();
        c.tell(node, crate::CoreMsg::Pg(update));
        c.lease(node, 60_000);
    }
    let second = c.dial(1, 1);
    c.put(second, 1, 0, 2);
    let mut header = wire::Header::new(wire::FrameKind::Write, 0);
    header.object = object(1);
    header.blocks = 1;
    header.epoch = wire::Epoch(1);
    let late = c.request(conn, header, Some(vec![9; 4096]));
    c.pass(200);
    assert!(!c.replies.contains_key(&late), "neither done nor refused: the next record decides");
    assert_eq!(c.get(second, 1, 0), 2);
    assert!(c.equal(&[1, 2]));
    c.lease(0, 0);
    assert_eq!(c.status(late), Status::Unknown, "and without a lease there is nothing left to wait for");
}

/// A sub-write of an old epoch arrives after the next primary has compared its members.
pub(super) fn late_sub_write(planted: Planted) {
    let mut c = Cluster::with(8, planted);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.world.borrow_mut().hold(0, 1);
    c.world.borrow_mut().hold(0, 2);
    c.write(conn, 1, 0, 9);
    c.wait("the primary has it", |c| c.presence(0, 1).version().unwrap().counter == 2);
    c.paused.insert(0);
    c.decide(1, &[1, 2], &[1, 2]);
    let second = c.dial(1, 1);
    assert_eq!(c.get(second, 1, 0), 1);
    c.world.borrow_mut().release(0, 2);
    c.pass(50);
    c.crash(1);
    c.decide(2, &[2], &[2]);
    let third = c.dial(2, 1);
    assert_eq!(c.get(third, 1, 0), 1, "what was read before stays");
}

#[test]
fn a_late_sub_write_of_an_older_epoch_is_refused() {
    late_sub_write(Planted::none());
}

/// A sub-write is lost with its connection.
pub(super) fn lost_sub_write(planted: Planted) {
    let mut c = Cluster::with(9, planted);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.world.borrow_mut().hold(0, 2);
    let write = c.write(conn, 1, 0, 2);
    c.wait("the primary has it", |c| c.presence(0, 1).version().unwrap().counter == 2);
    c.world.borrow_mut().lose(0, 2);
    assert_eq!(c.status(write), Status::Ok);
    c.crash(0);
    c.crash(1);
    c.decide(2, &[2], &[2]);
    let conn = c.dial(2, 1);
    assert_eq!(c.get(conn, 1, 0), 2, "acknowledged, so every member has it");
}

#[test]
fn a_sub_write_lost_with_its_connection_is_sent_again() {
    lost_sub_write(Planted::none());
}

#[test]
fn writes_in_flight_are_completed_without_a_member_that_left() {
    let mut c = Cluster::new(6);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.world.borrow_mut().hold(0, 2);
    let writes: Vec<u64> = (0..20u32).map(|n| c.write(conn, 1, n % 3, n as u8 + 10)).collect();
    c.pass(20);
    assert!(writes.iter().all(|request| !c.replies.contains_key(request)));
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    for request in writes {
        assert_eq!(c.status(request), Status::Ok);
    }
    assert_eq!(c.get(conn, 1, 1), 29);
    assert!(c.equal(&[0, 1]));
    c.assert_idle(0);
}

#[test]
fn a_new_member_joins_while_writes_are_in_flight() {
    for seed in 0..30 {
        let mut c = Cluster::new(300 + seed);
        c.decide(0, &[0, 1], &[0, 1]);
        let conn = c.dial(0, 1);
        for n in 0..10 {
            c.put(conn, n, 0, 1);
        }
        let writes: Vec<u64> =
            (0..40u32).map(|n| c.write(conn, u64::from(n % 10), n % 3, n as u8 + 10)).collect();
        for _ in 0..seed * 5 {
            c.step();
        }
        c.decide(0, &[0, 1, 2], &[0, 1]);
        for request in writes {
            // What arrived after the change was sent under the old epoch.
            assert!(matches!(c.status(request), Status::Ok | Status::StaleEpoch), "seed {seed}");
        }
        c.wait("recovered", |c| {
            c.obey_in_sync();
            c.reported(0, PgState::Clean)
        });
        assert!(c.equal(&[0, 1, 2]), "seed {seed}");
        c.assert_idle(0);
    }
}

#[test]
fn a_restarted_primary_does_not_serve_under_its_old_epoch() {
    let mut c = Cluster::new(7);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    let record = c.record.clone();
    c.crash(0);
    c.start(0);
    c.record = record;
    c.announce();
    c.lease(0, 60_000);
    let conn = c.dial(0, 2);
    let request = c.read(conn, 1, 0);
    assert_ne!(c.status(request), Status::Ok);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 3);
    assert_eq!(c.get(conn, 1, 0), 1);
}
