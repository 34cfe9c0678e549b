//! The director: what must hold is checked at every record written.
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

mod random;
mod reach;
mod world;

use control::Planted;
use control::director::Director;
#[cfg(feature = "planted")]
use control::director::decide::Wish;
use placement::{DrainScope, PgRecord, Pool, key};
use wire::NodeId;
#[cfg(feature = "planted")]
use wire::PgId;
use world::*;

#[test]
fn a_new_pool_gets_its_pgs_at_once() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    assert_eq!(world.view.pgs().len(), PGS as usize);
    for entry in world.view.pgs().values() {
        assert_eq!((entry.record.epoch.0, entry.record.acting.len()), (1, 3));
        assert_eq!(entry.record.primary, entry.record.target.first().copied());
    }
}

#[test]
fn a_dead_primary_stays_until_its_lease_is_over_and_is_replaced_then() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    world.dead.insert(1);
    world.director.refused(&world.view, NodeId(1));
    world.advance(900);
    assert!(world.view.pgs().values().all(|entry| entry.record.epoch.0 == 1));
    world.expire(1);
    world.direct(false);
    for entry in world.view.pgs().values() {
        let record = &entry.record;
        assert_eq!((record.epoch.0, record.acting.len(), record.in_sync.len()), (2, 2, 2));
        assert!(world.view.up(record.primary.unwrap()).is_some());
    }
}

#[test]
fn a_restarted_primary_goes_on_without_waiting_under_a_new_epoch() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    world.register(2);
    world.direct(false);
    for entry in world.view.pgs().values() {
        let record = &entry.record;
        assert_eq!((record.epoch.0, record.in_sync.len()), (2, 3));
        assert_eq!(record.primary_session, world.view.up(record.primary.unwrap()));
    }
}

#[test]
fn a_whole_cluster_restart_waits_for_the_last_node_and_keeps_everybody_in_sync() {
    let mut world = World::new(3, 3, 2);
    world.advance(100);
    for id in 1..=3 {
        world.expire(id);
    }
    world.director = Director::new(Planted::none());
    world.director.lead(&world.view, world.now);
    let epochs: Vec<u64> = world.view.pgs().values().map(|e| e.record.epoch.0).collect();
    world.register(1);
    world.direct(false);
    world.register(2);
    world.direct(false);
    assert_eq!(epochs, world.view.pgs().values().map(|e| e.record.epoch.0).collect::<Vec<_>>());
    world.register(3);
    world.direct(false);
    for entry in world.view.pgs().values() {
        assert_eq!(entry.record.in_sync.len(), 3);
        assert!(entry.record.primary_session.is_some_and(|s| world.live(s)));
    }
}

#[test]
fn below_the_minimum_nobody_serves_and_nothing_is_forgotten() {
    let mut world = World::new(3, 3, 2);
    world.advance(1500);
    world.expire(2);
    world.direct(false);
    world.expire(3);
    world.direct(false);
    for entry in world.view.pgs().values() {
        assert_eq!(entry.record.primary, None);
        assert!(entry.record.in_sync.len() >= 2, "{:?}", entry.record);
    }
    world.register(3);
    world.direct(false);
    for entry in world.view.pgs().values() {
        let record = &entry.record;
        assert!(record.primary.is_some() && record.acting.len() == 2, "{record:?}");
    }
}

#[test]
fn a_node_drained_of_primaries_gives_them_away_at_once_and_gets_them_back_when_it_is_over() {
    let mut world = World::new(3, 3, 2);
    world.live_on(1500);
    assert!(world.primaries_of(1) > 0);
    world.drain(1, Some(DrainScope::Primaries));
    world.live_on(1500); // less than the time that a preferred primary waits for quiet
    assert_eq!((world.primaries_of(1), world.copies_of(1)), (0, PGS as usize));
    world.live_on(10_000);
    assert_eq!(world.primaries_of(1), 0, "taken back");
    world.drain(1, None);
    world.live_on(10_000);
    assert!(world.primaries_of(1) > 0);
}

#[test]
fn a_disk_that_is_registered_later_is_given_pgs_and_led_ones_too() {
    let mut world = World::new(3, 3, 2);
    world.live_on(1500);
    let (disk, slices) = (wire::DiskUuid(33), [32, 33].map(wire::SliceId));
    world.add_disk(3, disk, slices);
    world.live_on(10_000);
    for slice in slices {
        let (held, led) = world.held_by(slice);
        assert!((1..=3).contains(&held) && led <= held, "slice {slice} has {held} of 2 PGs and leads {led}");
    }
    assert_eq!(world.copies_of(3), PGS as usize);
}

#[test]
fn a_drained_node_gives_its_primaries_away_while_another_is_down_and_keeps_what_nobody_else_can_serve() {
    let mut world = World::new(3, 3, 1);
    world.live_on(1500);
    world.expire(3);
    world.drain(1, Some(DrainScope::Primaries));
    world.live_on(1500);
    assert_eq!((world.primaries_of(1), world.primaries_of(2)), (0, PGS as usize));
    world.expire(2);
    world.live_on(1500);
    assert_eq!(world.primaries_of(1), PGS as usize, "the last copy serves, drained or not");
    world.register(2);
    world.live_on(1500);
    assert_eq!((world.primaries_of(1), world.primaries_of(2)), (0, PGS as usize));
}

#[test]
fn a_drained_node_keeps_its_copies_only_where_there_is_no_other_place() {
    let mut world = World::new(4, 3, 2);
    world.live_on(1500);
    assert!(world.copies_of(4) > 0);
    world.drain(4, Some(DrainScope::Everything));
    world.live_on(3000);
    assert_eq!(world.copies_of(4), 0);
    // Three nodes are left for three copies: the next one gives its primaries only.
    world.drain(3, Some(DrainScope::Everything));
    world.live_on(3000);
    assert_eq!((world.primaries_of(3), world.primaries_of(4)), (0, 0));
    for entry in world.view.pgs().values() {
        assert_eq!((entry.record.acting.len(), entry.record.in_sync.len()), (3, 3));
    }
    world.drain(4, None);
    world.live_on(3000);
    assert_eq!(world.copies_of(3), 0, "there is room again");
}

#[test]
fn a_leaving_node_is_replaced_while_it_still_works_and_only_with_its_consent() {
    let mut world = World::new(3, 3, 2);
    world.live_on(1500);
    world.leave(1);
    world.advance(100);
    let waiting = |world: &World| world.view.pgs().values().filter(|e| e.record.primary.is_none()).count();
    assert!(waiting(&world) > 0, "primaries are replaced without consent");
    for entry in world.view.pgs().values().filter(|entry| entry.record.primary.is_some()) {
        assert!(entry.record.acting.iter().all(|slice| slice.0 / 10 != 1), "{:?}", entry.record);
    }
    world.consent();
    assert_eq!((waiting(&world), world.primaries_of(1)), (0, 0));
    // Its end changes nothing more.
    let records: Vec<PgRecord> = world.view.pgs().values().map(|entry| entry.record.clone()).collect();
    world.expire(1);
    world.advance(100);
    assert_eq!(records, world.view.pgs().values().map(|entry| entry.record.clone()).collect::<Vec<_>>());
}

#[test]
fn the_number_of_copies_of_a_pool_can_be_changed() {
    let mut world = World::new(4, 2, 1);
    world.live_on(1500);
    for copies in [3, 4, 1, 2] {
        world.set_copies(copies);
        world.live_on(6000);
        for entry in world.view.pgs().values() {
            let record = &entry.record;
            let lengths = (record.target.len(), record.acting.len(), record.in_sync.len());
            assert_eq!(lengths, (copies.into(), copies.into(), copies.into()), "{record:?}");
            assert!(record.primary.is_some());
        }
    }
}

#[test]
fn a_removed_pool_is_cleared_away() {
    let mut world = World::new(3, 3, 2);
    world.direct(false);
    let pool = Pool { removing: true, ..world.view.pools()[&POOL].clone() };
    world.put(&key::pool(POOL), &pool);
    world.advance(200);
    assert!(world.view.pgs().is_empty() && world.view.pools().is_empty());
    assert!(!world.kv.keys().any(|key| key.starts_with("/pg/") || key.starts_with("/pool")));
}

#[cfg(feature = "planted")]
#[test]
fn the_planted_bugs_of_the_director_break_the_invariants() {
    use control::planted::Bug;
    for bug in [Bug::DemoteBeforeLeaseExpiry, Bug::PickStalePrimary] {
        let caught = std::panic::catch_unwind(|| {
            let mut world = World::new(3, 3, 1);
            world.director = Director::new(Planted::with(bug));
            world.director.lead(&world.view, world.now);
            world.advance(1500);
            for index in (0..PGS).filter(|_| bug == Bug::PickStalePrimary) {
                world.wish(PgId { pool: POOL, index }, 1, Wish::OutOfSync);
                world.wish(PgId { pool: POOL, index }, 2, Wish::OutOfSync);
            }
            for id in 1..=3 {
                world.director.refused(&world.view, NodeId(id));
                world.direct(false);
            }
            for id in 1..=3 {
                world.expire(id);
                world.direct(false);
                world.register(id);
                world.direct(false);
            }
        });
        assert!(caught.is_err(), "{bug:?} went unnoticed");
    }
}
