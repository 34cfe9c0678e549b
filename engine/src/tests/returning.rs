//! Members that were away.

use super::cluster::*;
use crate::PgState;
use store::Presence;
use wire::Status;

#[test]
fn a_stale_member_is_recovered_while_clients_write() {
    for seed in 0..20 {
        let mut c = Cluster::new(400 + seed);
        c.decide(0, &[0, 1, 2], &[0, 1, 2]);
        let conn = c.dial(0, 1);
        for n in 0..40 {
            c.put(conn, n, 0, 1);
        }
        c.crash(2);
        c.decide(0, &[0, 1], &[0, 1]);
        for n in 0..20 {
            c.put(conn, n, 1, 2);
            c.put(conn, 100 + n, 0, 3);
        }
        c.start(2);
        c.decide(0, &[0, 1, 2], &[0, 1]);
        let writes: Vec<u64> = (0..60u64).map(|n| c.write(conn, n, 2, 4)).collect();
        for request in writes {
            assert_eq!(c.status(request), Status::Ok, "seed {seed}");
        }
        c.wait("recovered", |c| {
            c.obey_in_sync();
            c.reported(0, PgState::Clean)
        });
        assert!(c.equal(&[0, 1, 2]), "seed {seed}");
        // The recovered copy is as good as the others: it serves alone.
        c.crash(0);
        c.crash(1);
        c.decide(2, &[2], &[2]);
        let conn = c.dial(2, 1);
        assert_eq!((c.get(conn, 5, 0), c.get(conn, 5, 1), c.get(conn, 5, 2)), (1, 2, 4));
        assert_eq!((c.get(conn, 105, 0), c.get(conn, 30, 1)), (3, 0));
    }
}

#[test]
fn what_was_deleted_while_a_member_was_away_stays_deleted() {
    let mut c = Cluster::new(1);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.put(conn, 2, 0, 1);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    for index in [1, 2] {
        let request = c.delete(conn, index);
        assert_eq!(c.status(request), Status::Ok);
    }
    c.put(conn, 2, 5, 8);
    assert!(matches!(c.presence(1, 1), Presence::Tombstone(_)), "kept while a member is away");
    c.start(2);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    c.wait("recovered and purged", |c| {
        c.obey_in_sync();
        c.reported(0, PgState::Clean) && (0..3).all(|node| c.presence(node, 1) == Presence::Absent)
    });
    assert!(c.equal(&[0, 1, 2]));
    assert_eq!((c.get(conn, 1, 0), c.get(conn, 2, 0), c.get(conn, 2, 5)), (0, 0, 8));
}

#[test]
fn an_object_purged_everywhere_else_is_removed_from_a_returning_member() {
    let mut c = Cluster::new(2);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    let request = c.delete(conn, 1);
    assert_eq!(c.status(request), Status::Ok);
    // Placement gave the PG up on node 2 for a while: two copies are whole.
    c.record.target = vec![slice(0), slice(1)];
    for node in [0, 1] {
        let mut update = c.update();
        update.pool.copies = 2;
        update.revision.0 += 50;
        c.tell(node, crate::CoreMsg::Pg(update));
    }
    c.pass(1500);
    c.wait("purged", |c| [0, 1].iter().all(|node| c.presence(*node, 1) == Presence::Absent));
    c.start(2);
    assert!(matches!(c.presence(2, 1), Presence::Live(_)));
    c.decide(0, &[0, 1, 2], &[0, 1]);
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(0, PgState::Clean)
    });
    assert_eq!(c.presence(2, 1), Presence::Absent);
    assert_eq!(c.get(conn, 1, 0), 0);
}

#[test]
fn recovery_survives_broken_connections() {
    for seed in 0..20 {
        let mut c = Cluster::new(500 + seed);
        c.decide(0, &[0, 1], &[0, 1]);
        let conn = c.dial(0, 1);
        for n in 0..50 {
            c.put(conn, n, (n % 32) as u32, n as u8 + 1);
        }
        c.decide(0, &[0, 1, 2], &[0, 1]);
        for _ in 0..4 {
            for _ in 0..(20 + seed * 7) {
                c.step();
            }
            // Idle steps go from timer to timer: seconds may have passed.
            c.lease(0, 60_000);
            c.world.borrow_mut().break_between(0, 2);
            let n = seed % 50;
            c.put(conn, n, 31, 99);
        }
        c.wait("recovered", |c| {
            c.obey_in_sync();
            c.reported(0, PgState::Clean)
        });
        assert!(c.equal(&[0, 1, 2]), "seed {seed}");
        c.assert_idle(0);
        c.assert_idle(2);
    }
}

#[test]
fn a_primary_can_stop_while_it_recovers_a_member() {
    // Its closing store refuses every read at once: the next attempt must not follow in the same turn.
    for seed in 0..30 {
        let mut c = Cluster::new(700 + seed);
        c.decide(0, &[0, 1], &[0, 1]);
        let conn = c.dial(0, 1);
        for n in 0..50 {
            c.put(conn, n, 0, n as u8 + 1);
        }
        c.decide(0, &[0, 1, 2], &[0, 1]);
        c.wait("recovering", |c| c.reported(0, PgState::Recovering));
        for _ in 0..seed {
            c.step();
        }
        c.tell(0, crate::CoreMsg::Stop);
        c.wait("stopped", |c| {
            c.told().iter().any(|(node, msg)| *node == 0 && matches!(msg, crate::CoreMsg::Stopped))
        });
    }
}

#[test]
fn a_member_that_missed_a_write_is_reported_and_recovered() {
    let mut c = Cluster::new(3);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    // A disk of the past: node 2 comes back without its last change and nobody was told.
    let past = c.world.borrow().disks[&2].blocks.clone();
    c.put(conn, 1, 0, 2);
    c.crash(2);
    c.world.borrow_mut().disks.get_mut(&2).unwrap().blocks = past;
    c.start(2);
    c.announce();
    let write = c.write(conn, 1, 1, 3);
    c.wait("reported", |c| {
        c.told().iter().any(|(_, msg)| matches!(msg, crate::CoreMsg::OutOfSync { failed: false, .. }))
    });
    assert!(!c.replies.contains_key(&write));
    c.decide(0, &[0, 1, 2], &[0, 1]);
    assert_eq!(c.status(write), Status::Ok);
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(0, PgState::Clean)
    });
    assert!(c.equal(&[0, 1, 2]));
    assert_eq!((c.get(conn, 1, 0), c.get(conn, 1, 1)), (2, 3));
}
