//! Members that are alive and cannot be reached: the link between two nodes is cut, in one direction or both.

use super::cluster::*;
use crate::{CoreMsg, PgState};
use wire::{Epoch, SliceId, Status};

/// What the primary wants because of members out of reach: (epoch, slice, whether it gives the PG away).
fn wishes(c: &Cluster, from: usize) -> Vec<(Epoch, SliceId, bool)> {
    let wish = |(node, msg): &(usize, CoreMsg)| match msg {
        CoreMsg::Unreachable { epoch, slice, .. } if *node == from => Some((*epoch, *slice, false)),
        CoreMsg::GivesAway { epoch, slice, .. } if *node == from => Some((*epoch, *slice, true)),
        _ => None,
    };
    c.told().iter().filter_map(wish).collect()
}

/// Frames of these directions are lost in silence from now on.
fn cut(c: &Cluster, directions: &[(usize, usize)]) {
    for (from, to) in directions {
        c.world.borrow_mut().hold(*from, *to);
    }
}

fn mend(c: &Cluster, a: usize, b: usize) {
    c.world.borrow_mut().lose(a, b);
    c.world.borrow_mut().lose(b, a);
}

fn now_ms(c: &Cluster) -> u64 {
    c.world.borrow().now / 1_000_000
}

/// The director follows a wish to go on without a member.
fn go_on_with(c: &mut Cluster, primary: usize, acting: &[usize]) {
    c.decide(primary, acting, acting);
}

#[test]
fn an_active_pg_goes_on_without_a_member_behind_a_cut_link() {
    for directions in [&[(0, 2)][..], &[(2, 0)], &[(0, 2), (2, 0)]] {
        let mut c = Cluster::new(40);
        c.decide(0, &[0, 1, 2], &[0, 1, 2]);
        let conn = c.dial(0, 1);
        c.put(conn, 1, 0, 1);
        c.pass(5_000); // an idle connection is no silent one
        assert!(wishes(&c, 0).is_empty());
        cut(&c, directions);
        let (write, since) = (c.write(conn, 1, 0, 2), now_ms(&c));
        c.wait("a wish", |c| !wishes(c, 0).is_empty());
        assert!(now_ms(&c) - since <= 1_700, "{} ms", now_ms(&c) - since);
        assert_eq!(wishes(&c, 0), [(Epoch(1), slice(2), false)]);
        assert!(!c.replies.contains_key(&write), "confirmed without a member that acts");
        go_on_with(&mut c, 0, &[0, 1]);
        assert_eq!(c.status(write), Status::Ok);
        assert_eq!(c.get(conn, 1, 0), 2);
        // The member comes back as soon as it can be reached.
        mend(&c, 0, 2);
        c.pass(3_000);
        let before = wishes(&c, 0).len();
        c.decide(0, &[0, 1, 2], &[0, 1]);
        c.wait("recovered", |c| {
            c.obey_in_sync();
            c.reported(0, PgState::Clean)
        });
        assert!(c.equal(&[0, 1, 2]));
        assert_eq!(wishes(&c, 0).len(), before);
    }
}

#[test]
fn a_pg_that_is_being_activated_goes_on_without_a_member_behind_a_cut_link() {
    let mut c = Cluster::new(41);
    cut(&c, &[(0, 2)]);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    c.wait("a wish", |c| !wishes(c, 0).is_empty());
    assert_eq!(wishes(&c, 0), [(Epoch(1), slice(2), false)]);
    go_on_with(&mut c, 0, &[0, 1]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
}

#[test]
fn a_member_that_was_added_and_cannot_be_reached_is_left_out_again_soon() {
    let mut c = Cluster::new(42);
    cut(&c, &[(0, 2), (2, 0)]);
    c.decide(0, &[0, 1], &[0, 1]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    c.wait("a wish", |c| !wishes(c, 0).is_empty());
    go_on_with(&mut c, 0, &[0, 1]);
    c.put(conn, 1, 0, 2);
    c.pass(5_000);
    // The second time it does not take the full bound.
    c.decide(0, &[0, 1, 2], &[0, 1]);
    let since = now_ms(&c);
    let last = c.record.epoch;
    c.wait("another wish", |c| wishes(c, 0).iter().any(|(epoch, ..)| *epoch == last));
    assert!(now_ms(&c) - since <= 700, "{} ms", now_ms(&c) - since);
}

#[test]
fn a_wish_that_finds_no_ear_is_repeated() {
    let mut c = Cluster::new(43);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    c.wait_state(0, PgState::Clean);
    cut(&c, &[(0, 2)]);
    c.wait("repeated", |c| wishes(c, 0).len() >= 3);
    assert!(wishes(&c, 0).iter().all(|wish| *wish == (Epoch(1), slice(2), false)));
}

#[test]
fn a_primary_that_was_paused_does_not_blame_its_members() {
    let mut c = Cluster::new(44);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    for _ in 0..5 {
        c.paused.insert(0);
        c.pass(4_000);
        c.paused.remove(&0);
        c.pass(200);
    }
    c.put(conn, 1, 0, 2);
    assert!(wishes(&c, 0).is_empty(), "{:?}", wishes(&c, 0));
}

#[test]
fn without_a_lease_nobody_is_blamed() {
    let mut c = Cluster::new(45);
    c.lease_ms = 1_000;
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    c.wait_state(0, PgState::Clean);
    cut(&c, &[(0, 1), (0, 2)]);
    c.pass(5_000);
    assert!(wishes(&c, 0).is_empty(), "{:?}", wishes(&c, 0));
}

#[test]
fn a_primary_cut_off_from_all_others_stops_and_gives_the_pg_away() {
    let mut c = Cluster::new(46);
    c.min_copies = 2;
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    cut(&c, &[(0, 1), (0, 2)]);
    let write = c.write(conn, 1, 0, 2);
    c.wait("given away", |c| wishes(c, 0).iter().any(|(.., away)| *away));
    let given = *wishes(&c, 0).last().unwrap();
    assert_eq!(given, (c.record.epoch, slice(0), true));
    assert_ne!(c.status(write), Status::Ok);
    let read = c.read(conn, 1, 0);
    // Neither a mended link nor its own epoch told again makes it serve: others may have taken over.
    mend(&c, 0, 1);
    mend(&c, 0, 2);
    c.announce();
    c.pass(3_000);
    let again = wishes(&c, 0).len();
    c.wait("said again", |c| wishes(c, 0).len() > again);
    assert!(c.replies.get(&read).is_none_or(|reply| reply.header.status != Status::Ok));
    c.decide(1, &[1, 2], &[1, 2]);
    let second = c.dial(1, 1);
    let now = c.get(second, 1, 0);
    assert!(now == 1 || now == 2);
    c.put(second, 1, 0, 3);
    assert_eq!(c.get(second, 1, 0), 3);
}

#[test]
fn a_primary_waits_where_nobody_could_serve_without_it() {
    let mut c = Cluster::new(47);
    c.min_copies = 3;
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    cut(&c, &[(0, 2), (2, 0)]);
    let write = c.write(conn, 1, 0, 2);
    c.pass(5_000);
    assert!(wishes(&c, 0).is_empty() && !c.replies.contains_key(&write));
    mend(&c, 0, 2);
    assert_eq!(c.status(write), Status::Ok);
    assert!(c.equal(&[0, 1, 2]));
}
