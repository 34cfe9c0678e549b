//! Changes that are sent again: nobody's later change is undone, whoever is primary by then.

use super::cluster::*;
use crate::PgState;
use crate::planted::Planted;
use reactor::ConnId;
use wire::frame::FLAG_RESENT;
use wire::{Epoch, FrameKind, Header, Status};

/// The change whose first try is never answered.
const FIRST: u64 = 0x1111;

/// Writes a block as the change `origin`.
fn write(c: &mut Cluster, conn: ConnId, fill: u8, origin: u64, flags: u8) -> u64 {
    let mut header = Header::new(FrameKind::Write, 0);
    header.object = object(1);
    (header.blocks, header.origin, header.flags) = (1, origin, flags);
    c.request(conn, header, Some(vec![fill; 4096]))
}

fn recognised(c: &Cluster, node: usize) -> u64 {
    c.nodes[&node].core.metrics.recognised.get()
}

fn memory_lost(c: &Cluster, node: usize) -> u64 {
    c.nodes[&node].core.metrics.memory_lost.get()
}

/// Every copy gets the first try of `FIRST` (value 2, after 1); its answer is lost.
fn unanswered(seed: u64, planted: Planted) -> (Cluster, ConnId) {
    let mut c = Cluster::with(seed, planted);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.world.borrow_mut().hold(0, CLIENT);
    let first = write(&mut c, conn, 2, FIRST, 0);
    c.wait("all have it", |c| (0..3).all(|node| c.presence(node, 1).version().unwrap().counter == 2));
    c.pass(5);
    assert!(!c.replies.contains_key(&first));
    c.world.borrow_mut().lose(0, CLIENT);
    (c, conn)
}

/// Another client writes 3, then the change is sent again to `node`: the block stays 3.
fn sent_again(c: &mut Cluster, node: usize) {
    let conn = c.dial(node, 50);
    assert_eq!(c.get(conn, 1, 0), 2);
    c.put(conn, 1, 0, 3);
    let again = write(c, conn, 2, FIRST, FLAG_RESENT);
    assert_eq!(c.status(again), Status::Ok);
    assert_eq!(c.get(conn, 1, 0), 3, "the other client's write was undone");
    assert_eq!(recognised(c, node), 1);
    // A change that nobody has seen is carried out, marked or not.
    let fresh = write(c, conn, 4, 0x2222, FLAG_RESENT);
    assert_eq!(c.status(fresh), Status::Ok);
    assert_eq!(c.get(conn, 1, 0), 4);
    c.assert_idle(node);
}

pub(super) fn second_try_at_the_next_primary(planted: Planted) {
    let (mut c, _) = unanswered(20, planted);
    c.crash(0);
    c.decide(1, &[1, 2], &[1, 2]);
    sent_again(&mut c, 1);
}

#[test]
fn a_second_try_at_the_next_primary_undoes_nothing() {
    second_try_at_the_next_primary(Planted::none());
}

#[test]
fn a_second_try_at_the_same_primary_undoes_nothing() {
    let (mut c, _) = unanswered(21, Planted::none());
    sent_again(&mut c, 0);
}

#[test]
fn a_restarted_primary_asks_its_members() {
    let (mut c, _) = unanswered(22, Planted::none());
    c.crash(1);
    c.crash(0);
    c.start(1);
    c.decide(1, &[1, 2], &[1, 2]);
    sent_again(&mut c, 1);
    assert_eq!(memory_lost(&c, 1), 0);
}

#[test]
fn a_restarted_member_is_taught() {
    let (mut c, _) = unanswered(23, Planted::none());
    for node in [1, 2] {
        c.crash(node);
        let left: Vec<usize> = (0..3).filter(|n| *n != node).collect();
        c.decide(0, &left, &left);
        c.start(node);
        c.decide(0, &[0, 1, 2], &left);
        c.wait("in sync again", |c| {
            c.obey_in_sync();
            c.record.in_sync.len() == 3
        });
    }
    c.crash(0);
    c.decide(2, &[1, 2], &[1, 2]);
    sent_again(&mut c, 2);
    assert_eq!(memory_lost(&c, 2), 0);
}

#[test]
fn a_member_that_is_pushed_an_object_learns_of_its_changes() {
    let mut c = Cluster::new(24);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    // Cut off, not restarted: it believes that it knows everything, and is not taught but pushed.
    c.paused.insert(2);
    c.decide(0, &[0, 1], &[0, 1]);
    let first = write(&mut c, conn, 2, FIRST, 0);
    assert_eq!(c.status(first), Status::Ok);
    c.paused.remove(&2);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    c.wait("recovered", |c| {
        c.obey_in_sync();
        c.reported(0, PgState::Clean)
    });
    c.crash(0);
    c.crash(1);
    c.decide(2, &[2], &[2]);
    sent_again(&mut c, 2);
}

#[test]
fn a_change_that_was_undone_is_carried_out_when_it_is_sent_again() {
    let mut c = Cluster::new(25);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.world.borrow_mut().hold(0, 2);
    write(&mut c, conn, 2, FIRST, 0);
    c.wait("one member has it", |c| c.presence(1, 1).version().unwrap().counter == 2);
    c.crash(0);
    c.world.borrow_mut().lose(0, 2);
    // The member without it decides what has happened.
    c.decide(2, &[1, 2], &[1, 2]);
    let conn = c.dial(2, 1);
    assert_eq!(c.get(conn, 1, 0), 1);
    c.wait("equal", |c| c.equal(&[1, 2]));
    c.crash(2);
    c.decide(1, &[1], &[1]);
    let conn = c.dial(1, 2);
    let again = write(&mut c, conn, 2, FIRST, FLAG_RESENT);
    assert_eq!(c.status(again), Status::Ok);
    assert_eq!(c.get(conn, 1, 0), 2, "answered, so it has to be there");
    assert_eq!(recognised(&c, 1), 0);
}

#[test]
fn a_second_try_waits_for_the_first_that_is_still_in_flight() {
    let mut c = Cluster::new(26);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.world.borrow_mut().hold(0, 2);
    write(&mut c, conn, 2, FIRST, 0);
    c.wait("a member has it", |c| c.presence(1, 1).version().unwrap().counter == 2);
    let conn = c.dial(0, 2);
    let again = write(&mut c, conn, 2, FIRST, FLAG_RESENT);
    c.pass(50);
    assert!(!c.replies.contains_key(&again), "not every copy has it");
    c.world.borrow_mut().release(0, 2);
    assert_eq!(c.status(again), Status::Ok);
    assert_eq!(c.presence(0, 1).version().unwrap().counter, 2, "carried out once");
    assert!(c.equal(&[0, 1, 2]));
    c.assert_idle(0);
}

#[test]
fn changes_not_yet_applied_by_a_taught_member_are_not_taken_for_done_by_it() {
    let mut c = Cluster::new(27);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    c.start(2);
    c.decide(0, &[0, 1, 2], &[0, 1]);
    // Its list of objects is compared: from here on it gets what is written.
    c.wait("asked to promise", |c| c.nodes[&2].core.pgs.iter().any(|(_, pg)| pg.promised == Epoch(3)));
    for n in 0..40 {
        write(&mut c, conn, 10 + n, FIRST + u64::from(n), 0);
        c.pass(0);
        c.step();
    }
    c.wait("taught", |c| {
        c.obey_in_sync();
        c.record.in_sync.len() == 3
    });
    c.crash(0);
    c.crash(1);
    c.decide(2, &[2], &[2]);
    let conn = c.dial(2, 2);
    for n in 0..40 {
        let again = write(&mut c, conn, 10 + n, FIRST + u64::from(n), FLAG_RESENT);
        assert_eq!(c.status(again), Status::Ok);
    }
    assert_eq!(c.get(conn, 1, 0), 49, "the last of them is there");
}

#[test]
fn when_every_process_has_died_the_memory_is_gone_and_that_is_counted() {
    let (mut c, _) = unanswered(28, Planted::none());
    for node in 0..3 {
        c.crash(node);
    }
    for node in 0..3 {
        c.start(node);
    }
    c.decide(1, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(1, 1);
    c.put(conn, 1, 0, 3);
    assert_eq!(memory_lost(&c, 1), 1);
    let again = write(&mut c, conn, 2, FIRST, FLAG_RESENT);
    assert_eq!(c.status(again), Status::Ok);
    assert_eq!(c.get(conn, 1, 0), 2, "not recognised: carried out again");
    // From here on everything is known again.
    c.crash(1);
    c.decide(0, &[0, 2], &[0, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 4);
    let again = write(&mut c, conn, 2, FIRST, FLAG_RESENT);
    assert_eq!(c.status(again), Status::Ok);
    assert_eq!(c.get(conn, 1, 0), 4);
    assert_eq!(memory_lost(&c, 0), 0);
}

/// Clients that insist, on one block, through crashes, restarts, breaks and new records.
struct Insistent {
    c: Cluster,
    incarnation: u64,
    value: u8,
    /// Losses of memory counted by processes that are gone.
    forgetful: u64,
    judged: u64,
}

impl Insistent {
    fn random(&mut self, n: u64) -> u64 {
        self.c.world.borrow_mut().random() % n
    }

    fn primary(&self) -> usize {
        (0..3).find(|n| self.c.record.primary == Some(slice(*n))).unwrap()
    }

    fn lost(&self) -> u64 {
        self.forgetful + self.c.nodes.keys().map(|node| memory_lost(&self.c, *node)).sum::<u64>()
    }

    fn decide(&mut self) {
        let awake: Vec<usize> = self.c.nodes.keys().copied().collect();
        let good = |n: &usize| self.c.record.in_sync.contains(&slice(*n));
        let in_sync: Vec<usize> = awake.iter().copied().filter(good).collect();
        let primary = in_sync[self.random(in_sync.len() as u64) as usize];
        self.c.decide(primary, &awake, &in_sync);
    }

    fn fault(&mut self) {
        let victim = self.random(3) as usize;
        let in_sync = |node: usize| self.c.record.in_sync.contains(&slice(node));
        let spare = (0..3).any(|n| n != victim && in_sync(n) && self.c.nodes.contains_key(&n));
        match self.random(6) {
            0 | 1 if spare && self.c.nodes.contains_key(&victim) => {
                self.forgetful += memory_lost(&self.c, victim);
                self.c.crash(victim);
            }
            2 | 3 if !self.c.nodes.contains_key(&victim) => self.c.start(victim),
            4 => self.c.world.borrow_mut().break_between(victim, (victim + 1) % 3),
            _ => {}
        }
        self.decide();
    }

    /// Sends until it is answered with success, with faults in between.
    fn insist(&mut self, fill: u8, origin: u64, mut flags: u8, faults: bool) {
        for _ in 0..200 {
            let primary = self.primary();
            self.c.lease(primary, 60_000);
            self.incarnation += 1;
            let conn = self.c.dial_as(primary, None, self.incarnation);
            let request = write(&mut self.c, conn, fill, origin, flags);
            let ms = 1 + self.random(20);
            self.c.pass(ms);
            self.c.obey_in_sync();
            if self.c.replies.get(&request).is_some_and(|reply| reply.header.status == Status::Ok) {
                return;
            }
            flags = FLAG_RESENT;
            if faults && self.random(3) == 0 {
                self.fault();
            }
        }
        panic!("never done");
    }

    fn read(&mut self) -> u8 {
        for _ in 0..200 {
            let primary = self.primary();
            self.c.lease(primary, 60_000);
            self.incarnation += 1;
            let conn = self.c.dial_as(primary, None, self.incarnation);
            let request = self.c.read(conn, 1, 0);
            self.c.pass(10);
            self.c.obey_in_sync();
            if self.c.replies.get(&request).is_some_and(|reply| reply.header.status == Status::Ok) {
                return self.c.byte_of(request);
            }
        }
        panic!("never readable");
    }

    fn round(&mut self, number: u64) {
        let (first, other) = (self.value % 240 + 1, self.value % 240 + 2);
        self.value = other;
        let lost_before = self.lost();
        let primary = self.primary();
        self.c.lease(primary, 60_000);
        self.incarnation += 1;
        let conn = self.c.dial_as(primary, None, self.incarnation);
        write(&mut self.c, conn, first, 2 * number + 1, 0);
        for _ in 0..self.random(60) {
            self.c.step();
        }
        for _ in 0..self.random(3) {
            self.fault();
        }
        // The client has given the first connection up; so it is fenced wherever it goes next.
        let seen = self.read();
        self.insist(other, 2 * number + 2, 0, true);
        for _ in 0..self.random(3) {
            self.fault();
        }
        self.insist(first, 2 * number + 1, FLAG_RESENT, true);
        let after = self.read();
        if self.lost() == lost_before {
            self.judged += 1;
            if seen == first {
                assert_eq!(after, other, "seen before the other write, it came back after it");
            } else {
                assert!(after == first || after == other, "{after} is neither {first} nor {other}");
            }
        }
        self.decide();
        assert_eq!(self.read(), after, "what was read stays");
    }
}

/// Returns how many rounds could be judged.
pub(super) fn schedule(seed: u64, planted: Planted) -> u64 {
    let mut c = Cluster::with(9000 + seed, planted);
    c.lease_ms = 60_000;
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let mut run = Insistent { c, incarnation: 0, value: 0, forgetful: 0, judged: 0 };
    for number in 0..30 {
        run.round(number);
    }
    run.judged
}

#[test]
fn a_change_takes_effect_once_in_random_schedules() {
    let mut judged = 0;
    for seed in 0..60 {
        println!("seed {seed}");
        judged += schedule(seed, Planted::none());
    }
    assert!(judged > 60 * 30 / 2, "memory was lost too often: {judged} rounds could be judged");
}

#[test]
fn memory_is_bounded_and_drops_the_oldest() {
    let mut c = Cluster::new(29);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    let all = crate::ORIGINS_PER_PG_MAX as u64 + 10;
    for n in 1..=all {
        let request = write(&mut c, conn, n as u8, n, 0);
        if n % 100 == 0 {
            assert_eq!(c.status(request), Status::Ok);
        }
    }
    let last = write(&mut c, conn, 0, all + 1, 0);
    assert_eq!(c.status(last), Status::Ok);
    for node in 0..3 {
        let pgs = &c.nodes[&node].core.pgs;
        let known: usize = pgs.iter().flat_map(|(_, pg)| &pg.locals).map(|local| local.origins.len()).sum();
        assert_eq!(known, crate::ORIGINS_PER_PG_MAX);
    }
    c.put(conn, 1, 0, 7);
    let oldest = write(&mut c, conn, 1, 1, FLAG_RESENT);
    assert_eq!(c.status(oldest), Status::Ok);
    let newest = write(&mut c, conn, 0, all + 1, FLAG_RESENT);
    assert_eq!(c.status(newest), Status::Ok);
    assert_eq!(recognised(&c, 0), 1, "the oldest is forgotten, the newest is not");
}
