//! Members that are alive and that a primary cannot reach.

use super::world::*;
use control::director::decide::{Wish, fulfil};
use control::director::hold::{CALM_MS, HOLD_MS};
use placement::PgRecord;
use std::collections::BTreeSet;
use wire::{PgId, SliceId};

const PG: PgId = PgId { pool: POOL, index: 0 };

/// The links between nodes that are cut.
type Cuts = BTreeSet<(u64, u64)>;

fn record(world: &World) -> PgRecord {
    world.view.pgs()[&PG].record.clone()
}

fn node_of(slice: SliceId) -> u64 {
    slice.0 / 10
}

fn is_cut(cuts: &Cuts, a: SliceId, b: SliceId) -> bool {
    cuts.contains(&(node_of(a), node_of(b))) || cuts.contains(&(node_of(b), node_of(a)))
}

/// What the primary's core does once it has waited for a member for long enough.
fn suffer(world: &mut World, cuts: &Cuts) {
    let now = record(world);
    let Some(primary) = now.primary else { return };
    let minimum = usize::from(world.view.pools()[&POOL].min_copies);
    let lost = |slice: &&SliceId| is_cut(cuts, primary, **slice);
    let count = now.acting.iter().filter(lost).count();
    let (slice, wish) = match now.acting.iter().find(lost) {
        None => return,
        Some(lost) if now.acting.len() - count >= minimum => (*lost, Wish::Unreachable),
        Some(_) => (primary, Wish::GivesAway),
    };
    let member = now.acting.iter().position(|s| *s == slice).unwrap();
    world.wish(PG, member, wish);
    world.direct(false);
}

fn serves(world: &World, cuts: &Cuts) -> bool {
    let now = record(world);
    now.primary.is_some_and(|primary| now.acting.iter().all(|slice| !is_cut(cuts, primary, *slice)))
}

#[test]
fn an_unreachable_member_leaves_the_acting_set_and_is_tried_more_and_more_seldom() {
    let mut world = World::new(3, 3, 2);
    world.live_on(1500);
    let target = record(&world).target;
    let cuts = Cuts::from([(node_of(target[0]), node_of(target[2]))]);
    suffer(&mut world, &cuts);
    let now = record(&world);
    assert_eq!((now.primary, now.acting.as_slice()), (Some(target[0]), &target[..2]));
    assert_eq!(now.in_sync.len(), 2);
    // Each trial stops the PG: count them.
    let mut trials = Vec::new();
    for step in 0..3000u64 {
        world.advance(100);
        if !serves(&world, &cuts) {
            trials.push(step * 100);
            suffer(&mut world, &cuts);
        }
        assert!(serves(&world, &cuts));
    }
    let pauses: Vec<u64> = trials.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!((4_800..=5_200).contains(&trials[0]), "{trials:?}");
    assert!(trials.len() <= 8, "{trials:?}");
    assert!(pauses.iter().all(|pause| *pause <= HOLD_MS.end() + 300), "{trials:?}");
    assert!(pauses.windows(2).all(|pair| pair[1] + 300 >= pair[0]), "{trials:?}");
    // The link is mended: within the longest pause the member is back, and after a calm time it starts anew.
    world.live_on(HOLD_MS.end() + 500);
    assert_eq!(record(&world).in_sync.len(), 3);
    world.live_on(CALM_MS + 500);
    suffer(&mut world, &cuts);
    assert_eq!(record(&world).acting.len(), 2);
    world.live_on(HOLD_MS.start() + 500);
    assert_eq!(record(&world).acting.len(), 3);
}

#[test]
fn a_new_process_is_not_held_responsible_for_the_one_before() {
    let mut world = World::new(3, 3, 2);
    world.live_on(1500);
    let target = record(&world).target;
    let cuts = Cuts::from([(node_of(target[0]), node_of(target[2]))]);
    suffer(&mut world, &cuts);
    world.advance(200);
    assert_eq!(record(&world).acting.len(), 2);
    world.register(node_of(target[2]));
    world.advance(200);
    assert_eq!(record(&world).acting.len(), 3);
}

#[test]
fn a_primary_that_reaches_nobody_is_replaced_by_a_member_that_reaches_the_others() {
    // Found out at once, or one member after the other.
    for first in [false, true] {
        let mut world = World::new(3, 3, 2);
        world.live_on(1500);
        let target = record(&world).target;
        let others = [node_of(target[1]), node_of(target[2])];
        let all = Cuts::from(others.map(|other| (node_of(target[0]), other)));
        if first {
            let cuts = Cuts::from([(node_of(target[0]), others[0])]);
            suffer(&mut world, &cuts);
            assert_eq!(record(&world).acting, [target[0], target[2]]);
        }
        suffer(&mut world, &all);
        world.advance(100);
        assert!(serves(&world, &all), "{:?}", record(&world));
        assert_eq!(record(&world).acting.len(), 2);
        let mut stops = 0;
        for _ in 0..1200 {
            world.advance(100);
            if !serves(&world, &all) {
                stops += 1;
                suffer(&mut world, &all);
                world.advance(50);
            }
            assert!(serves(&world, &all), "{:?}", record(&world));
            world.recover();
        }
        assert!(stops <= 8, "{stops}");
        world.live_on(HOLD_MS.end() + 8_000);
        assert_eq!(record(&world).in_sync.len(), 3);
    }
}

#[test]
fn wishes_about_reach_do_not_end_the_service_and_only_the_primary_gives_away() {
    let mut world = World::new(3, 3, 3);
    world.live_on(1500);
    let entry = world.view.pgs()[&PG].clone();
    let (old, pool) = (entry.record.clone(), world.view.pools()[&POOL].clone());
    let own = old.primary_session.unwrap();
    let wish = |slice, wish| fulfil(&entry, &pool, own, old.epoch, slice, wish);
    assert_eq!(wish(old.acting[1], Wish::Unreachable), None, "below the minimum");
    assert_eq!(wish(old.acting[1], Wish::GivesAway), None);
    assert_eq!(wish(old.acting[0], Wish::Unreachable), None);
    let given = wish(old.acting[0], Wish::GivesAway).unwrap();
    assert_eq!((given.primary, given.primary_session), (None, None));
    assert_eq!((given.acting.as_slice(), &given.in_sync), (&old.acting[1..], &old.in_sync));
}
