//! Random histories: nodes die, vanish, return, restart, leave and are drained, primaries report members in and out
//! of sync, leaders change, transactions are late and lose races.

use super::world::*;
use control::Planted;
use control::director::Director;
use control::director::decide::Wish;
use placement::DrainScope;
use proptest::prelude::*;
use std::collections::BTreeSet;
use wire::{NodeId, PgId, SliceId};

#[derive(Clone, Debug)]
enum Step {
    Die(u64),
    Expire(u64),
    Register(u64),
    Wish(u32, usize, u8),
    Leader,
    Advance(u64),
    Late,
    Settle,
    Consent,
    Join,
    Drain(u64, Option<DrainScope>),
    Leave(u64),
    Copies(u8),
}

const WISHES: [Wish; 5] = [Wish::InSync, Wish::OutOfSync, Wish::Failed, Wish::Unreachable, Wish::GivesAway];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = 1u64..6;
    let scopes = [None, Some(DrainScope::Primaries), Some(DrainScope::Everything)];
    let scope = prop::sample::select(scopes.to_vec());
    let step = prop_oneof![
        2 => node.clone().prop_map(Step::Die),
        3 => node.clone().prop_map(Step::Expire),
        4 => node.clone().prop_map(Step::Register),
        2 => (node.clone(), scope).prop_map(|(node, scope)| Step::Drain(node, scope)),
        2 => node.prop_map(Step::Leave),
        1 => (1u8..4).prop_map(Step::Copies),
        5 => (0..PGS, 0usize..5, 0u8..5).prop_map(|(pg, member, wish)| Step::Wish(pg, member, wish)),
        1 => Just(Step::Leader),
        4 => (50u64..3000).prop_map(Step::Advance),
        2 => Just(Step::Late),
        2 => Just(Step::Settle),
        2 => Just(Step::Consent),
        1 => Just(Step::Join),
    ];
    prop::collection::vec(step, 1..40)
}

fn run(world: &mut World, nodes: u64, step: Step) {
    match step {
        Step::Die(id) if id <= nodes => {
            world.dead.insert(id);
        }
        Step::Expire(id) if id <= nodes => world.expire(id),
        Step::Register(id) if id <= nodes => world.register(id),
        Step::Wish(index, member, wish) => {
            let wish = WISHES[usize::from(wish) % WISHES.len()];
            world.wish(PgId { pool: POOL, index }, member, wish);
        }
        Step::Leader => {
            // The old leader's transactions may still arrive after the new one has begun.
            world.director = Director::new(Planted::none());
            world.director.lead(&world.view, world.now);
        }
        Step::Advance(ms) => world.advance(ms),
        Step::Late => world.direct(true),
        Step::Settle => world.settle_late(),
        Step::Consent => world.consent(),
        Step::Join => world.register(nodes + 1),
        Step::Drain(id, scope) if id <= nodes => world.drain(id, scope),
        Step::Leave(id) if id <= nodes => world.leave(id),
        Step::Copies(copies) => world.set_copies(copies),
        _ => {}
    }
    world.direct(false);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn records_stay_safe_and_heal(
        nodes in 3u64..6, copies in 2u8..4, spare in 0u8..2, history in steps(),
    ) {
        let mut world = World::new(nodes, copies, copies - spare);
        for step in history {
            run(&mut world, nodes, step);
        }
        // Everybody comes back; a process that is dead but still has its lease loses it first.
        for id in 1..=nodes {
            let leaving = world.view.live().get(&NodeId(id)).is_some_and(|live| live.leaving);
            if world.dead.contains(&id) || leaving {
                world.expire(id);
                world.register(id);
            }
        }
        // Hand-overs that failed make a leader wait for long before it tries again.
        run(&mut world, nodes, Step::Leader);
        world.live_on(24_000);
        world.advance(1000);
        let emptied = world.view.emptied();
        let copies = usize::from(world.view.pools()[&POOL].copies);
        let room = world.view.nodes().len() - emptied.len() >= copies;
        prop_assert_eq!(world.view.pgs().len(), PGS as usize);
        for (pg, entry) in world.view.pgs() {
            let record = &entry.record;
            let set = |list: &[SliceId]| list.iter().copied().collect::<BTreeSet<_>>();
            prop_assert_eq!(set(&record.acting), set(&record.target), "{} {:?}", pg, record);
            prop_assert_eq!(set(&record.in_sync), set(&record.target), "{} {:?}", pg, record);
            prop_assert_eq!(record.target.len(), copies);
            let home = |slice: &SliceId| NodeId(slice.0 / 10);
            let drained = |slice: &SliceId| world.view.drains().contains_key(&home(slice));
            if world.view.drains().is_empty() {
                prop_assert_eq!(record.primary, record.target.first().copied(), "{} {:?}", pg, record);
            } else if record.target.iter().any(|slice| !drained(slice)) {
                prop_assert!(!drained(&record.primary.unwrap()), "{} {:?}", pg, record);
            }
            if room {
                prop_assert!(!record.target.iter().any(|s| emptied.contains(&home(s))), "{} {:?}", pg, record);
            }
        }
    }
}
