//! Scrub: what it finds, what it leaves alone, and that it never gets in the way for long.

use super::cluster::{Cluster, PG, object, slice};
use crate::PgState;
use crate::msg::{CoreMsg, ScrubReport};
use crate::pg::Link;
use crate::planted::Planted;
use placement::ScrubDepth;
use reactor::{ConnId, Env};
use store::Presence;
use wire::{Status, Version};

/// Three equal copies of a few objects, and a connection to the primary.
fn ready(seed: u64) -> (Cluster, ConnId) {
    ready_with(seed, Planted::none())
}

fn ready_with(seed: u64, planted: Planted) -> (Cluster, ConnId) {
    let mut c = Cluster::with(seed, planted);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    c.wait_state(0, PgState::Clean);
    let conn = c.dial(0, 1);
    for index in 0..20 {
        c.put(conn, index, (index % 32) as u32, index as u8);
    }
    (c, conn)
}

/// Scrubs and waits for what is said of it.
fn scrub(c: &mut Cluster, depth: ScrubDepth) -> ScrubReport {
    c.world.borrow_mut().told.clear();
    c.tell(0, CoreMsg::Scrub { pg: PG, depth });
    c.wait("a scrub's report", |c| report(c).is_some());
    report(c).unwrap()
}

fn report(c: &Cluster) -> Option<ScrubReport> {
    c.told().iter().find_map(|(_, msg)| match msg {
        CoreMsg::Scrubbed(report) => Some(*report),
        _ => None,
    })
}

/// Damages the block of an object on a node's disk: the one that is full of `fill`.
fn rot(c: &mut Cluster, node: usize, fill: u8) {
    let mut world = c.world.borrow_mut();
    let disk = world.disks.get_mut(&node).unwrap();
    let mut hit = 0;
    for block in disk.blocks.values_mut().filter(|block| block.iter().all(|byte| *byte == fill)) {
        let mut bytes = block.to_vec();
        bytes[77] ^= 4;
        *block = bytes.into();
        hit += 1;
    }
    assert_eq!(hit, 1, "exactly one block is damaged");
}

#[test]
fn equal_copies_give_no_error_at_either_depth() {
    let (mut c, _) = ready(1);
    for depth in [ScrubDepth::Light, ScrubDepth::Deep] {
        assert_eq!(scrub(&mut c, depth), ScrubReport { pg: PG, depth, objects: 20, errors: 0 });
    }
    assert_eq!(c.nodes[&0].core.metrics.scrub_errors.get(), 0);
}

#[test]
fn silent_damage_on_one_copy_is_found_and_mended_by_a_deep_scrub_wherever_it_is() {
    for node in 0..3 {
        let (mut c, conn) = ready(10 + node as u64);
        rot(&mut c, node, 7);
        assert_eq!(scrub(&mut c, ScrubDepth::Light).errors, 0, "versions do not show it");
        assert_eq!(scrub(&mut c, ScrubDepth::Deep).errors, 1);
        c.wait("whole again", scrub_is_clean);
        assert_eq!(c.get(conn, 7, 7), 7);
        assert!(c.equal(&[0, 1, 2]));
    }
}

#[test]
fn damage_on_two_of_three_copies_is_mended_from_the_third() {
    damage_is_mended(Planted::none());
}

pub(super) fn damage_is_mended(planted: Planted) {
    let (mut c, conn) = ready_with(20, planted);
    rot(&mut c, 0, 9);
    rot(&mut c, 1, 9);
    assert_eq!(scrub(&mut c, ScrubDepth::Deep).errors, 1);
    c.wait("mended", scrub_is_clean);
    assert_eq!(c.get(conn, 9, 9), 9);
}

fn scrub_is_clean(c: &mut Cluster) -> bool {
    scrub(c, ScrubDepth::Deep).errors == 0
}

#[test]
fn a_copy_that_vanished_and_one_too_many_are_found_by_a_light_scrub() {
    let (mut c, _) = ready(30);
    // Behind the engine's back: a member loses an object, and another has one that nobody else has.
    let mut behind = |node: usize, work: &dyn Fn(&mut store::SliceStore, &mut dyn Env)| {
        let at = c.nodes.get_mut(&node).unwrap();
        work(at.core.store(0).unwrap(), &mut at.env);
        c.pass(50);
    };
    behind(1, &|store, env| {
        let Presence::Live(version) = store.lookup(object(3)) else { panic!("object 3 is there") };
        store.delete(env, 0, object(3), Version { counter: version.counter + 1, ..version }).unwrap();
    });
    behind(2, &|store, env| {
        let version = Version { epoch: wire::Epoch(1), counter: 1 };
        store.zero(env, 0, object(99), version, 0, 1).unwrap();
    });
    let extra = !matches!(c.presence(2, 99), Presence::Absent);
    let report = scrub(&mut c, ScrubDepth::Light);
    assert_eq!(report.errors, 1 + u64::from(extra));
    c.wait("copies equal again", |c| c.equal(&[0, 1, 2]));
    assert_eq!(scrub(&mut c, ScrubDepth::Light).errors, 0);
}

#[test]
fn clients_are_served_while_a_scrub_runs_and_what_they_write_is_no_error() {
    let (mut c, conn) = ready(40);
    c.world.borrow_mut().told.clear();
    c.tell(0, CoreMsg::Scrub { pg: PG, depth: ScrubDepth::Deep });
    let mut writes = Vec::new();
    for round in 0..30u8 {
        for index in 0..20 {
            writes.push(c.write(conn, index, 5, round));
        }
        writes.push(c.delete(conn, u64::from(round % 20)));
        c.pass(3);
    }
    for write in writes {
        assert_eq!(c.status(write), Status::Ok);
    }
    c.wait("the scrub's report", |c| report(c).is_some());
    assert_eq!(report(&c).unwrap().errors, 0);
}

#[test]
fn a_scrub_outlives_a_members_connection_and_ends_with_the_epoch() {
    let (mut c, conn) = ready(50);
    c.paused.insert(1);
    c.world.borrow_mut().told.clear();
    c.tell(0, CoreMsg::Scrub { pg: PG, depth: ScrubDepth::Deep });
    c.pass(100);
    assert_eq!(report(&c), None, "it waits for the member that does not answer");
    let held = c.write(conn, 0, 0, 1);
    c.pass(5);
    c.crash(1);
    c.decide(0, &[0, 2], &[0, 2]);
    assert_eq!(c.status(held), Status::Ok, "a check in progress ends with the epoch");
    c.pass(200);
    assert_eq!(report(&c), None, "and so does the scrub, unreported");
    assert_eq!(scrub(&mut c, ScrubDepth::Deep).errors, 0, "the next one goes through without the member");
    assert_eq!(c.record.acting, [slice(0), slice(2)]);
}

#[test]
fn a_scrub_waits_for_a_member_that_is_away_for_a_moment() {
    let (mut c, _) = ready(9);
    rot(&mut c, 2, 7);
    // Long enough after the last client for the scrub to begin at once.
    c.pass(50);
    c.world.borrow_mut().break_between(0, 2);
    c.wait("the connection is gone", |c| {
        let mut primaries = c.nodes[&0].core.pgs.iter().filter_map(|(_, pg)| pg.primary.as_deref());
        primaries.any(|primary| primary.members.iter().any(|member| member.link == Link::Down))
    });
    assert_eq!(scrub(&mut c, ScrubDepth::Deep).errors, 1, "its copies are not passed over");
    assert_eq!(scrub(&mut c, ScrubDepth::Deep).errors, 0);
}

#[test]
fn every_piece_of_an_object_is_read() {
    for block in [0, 7, 8, 15, 23, 31] {
        let (mut c, conn) = ready(10);
        c.put(conn, 100, 3, 200);
        c.put(conn, 100, block, 201);
        for node in 0..3 {
            rot(&mut c, node, 201);
            let found = scrub(&mut c, ScrubDepth::Deep);
            assert_eq!((found.errors, found.objects), (1, 21), "block {block} on node {node}");
            c.wait("mended", |c| scrub(c, ScrubDepth::Deep).errors == 0);
        }
        assert_eq!((c.get(conn, 100, 3), c.get(conn, 100, block)), (200, 201));
    }
}
