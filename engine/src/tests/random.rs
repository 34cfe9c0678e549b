//! Random schedules: crashes, pauses, restarts, lost and late frames, and new records at random moments,
//! while a client writes unique values to several blocks at once, gives up, and tries again. Every block
//! must read as the last acknowledged value or one written since without an answer, what was read must
//! stay, and all copies must be equal in the end.

use super::cluster::*;
use crate::planted::Planted;
use crate::{CoreMsg, PgState};
use reactor::ConnId;
use std::collections::BTreeMap;
use wire::{Epoch, FrameKind, Header, SliceId, Status};

/// More objects than are recovered at once.
const OBJECTS: u64 = 24;
const BLOCKS: u32 = 2;
const ROUNDS: usize = 40;
/// Leases are short, so that they end within a schedule.
const LEASE_MS: u64 = 30;

/// What was asked of a block in one round.
#[derive(Default)]
struct Asked {
    write: Option<(u64, u8)>,
    read: Option<u64>,
}

struct Run {
    c: Cluster,
    /// Values that each block may read as; none = never written.
    may: BTreeMap<(u64, u32), Vec<u8>>,
    value: u8,
    incarnation: u64,
    faults: u64,
    late: Vec<ConnId>,
    /// A primary of the past that has not heard.
    stale: Option<(usize, Epoch)>,
}

impl Run {
    fn random(&mut self, n: u64) -> u64 {
        self.c.world.borrow_mut().random() % n
    }

    fn awake(&self) -> Vec<usize> {
        self.c.nodes.keys().copied().filter(|node| !self.c.paused.contains(node)).collect()
    }

    fn primary(&self) -> Option<usize> {
        (0..3).find(|n| self.c.record.primary == Some(slice(*n)))
    }

    /// The director: awake nodes act; in sync stays who was and is awake; the primary is one of those. A
    /// primary that may still believe in its lease is replaced only when that is over.
    fn decide(&mut self) {
        let awake = self.awake();
        let epoch = self.c.record.epoch;
        let lost: Vec<SliceId> = {
            let told = self.c.told();
            let out = told.iter().filter_map(|(_, msg)| match msg {
                CoreMsg::OutOfSync { epoch: at, slice, .. } if *at == epoch => Some(*slice),
                _ => None,
            });
            out.collect()
        };
        let good = |n: &usize| self.c.record.in_sync.contains(&slice(*n)) && !lost.contains(&slice(*n));
        let in_sync: Vec<usize> = awake.iter().copied().filter(good).collect();
        if in_sync.is_empty() {
            return;
        }
        let mut primary = in_sync[self.random(in_sync.len() as u64) as usize];
        if let Some(current) = self.primary()
            && in_sync.contains(&current)
            && self.random(4) > 0
        {
            primary = current;
        }
        if self.primary() != Some(primary) {
            self.c.pass(LEASE_MS + 1);
        }
        self.c.decide(primary, &awake, &in_sync);
    }

    fn fault(&mut self) {
        self.faults += 1;
        let awake = self.awake();
        let (a, b) = (self.random(3) as usize, self.random(3) as usize);
        let spare = |run: &mut Self, n: u64| {
            let victim = awake[n as usize % awake.len()];
            let others = awake.iter().any(|n| *n != victim && run.c.record.in_sync.contains(&slice(*n)));
            others.then_some(victim)
        };
        match self.random(10) {
            0 | 1 if awake.len() > 1 => {
                let n = self.random(3);
                if let Some(victim) = spare(self, n) {
                    self.c.crash(victim);
                    self.decide();
                }
            }
            2 if awake.len() > 1 => {
                let n = self.random(3);
                if let Some(victim) = spare(self, n) {
                    self.c.paused.insert(victim);
                    self.decide();
                }
            }
            3..=5 => {
                if let Some(paused) = self.c.paused.pop_first() {
                    let update = self.c.update();
                    self.c.pass(1);
                    self.c.tell(paused, CoreMsg::Pg(update));
                    self.decide();
                } else if let Some(dead) = (0..3).find(|n| !self.c.nodes.contains_key(n)) {
                    self.c.start(dead);
                    self.decide();
                }
            }
            6 => self.c.world.borrow_mut().break_between(a, b),
            7 => self.c.world.borrow_mut().hold(a, b),
            8 => self.c.world.borrow_mut().release(a, b),
            _ => self.decide(),
        }
    }

    fn run_a_while(&mut self, faults: bool) {
        for _ in 0..self.random(300) {
            if faults && self.random(60) == 0 {
                self.fault();
            }
            self.c.step();
        }
    }

    /// Old epoch, old primary: it must not answer with what is no longer so.
    fn ask_stale(&mut self, node: usize, epoch: Epoch) {
        let keys: Vec<(u64, u32)> = self.may.keys().copied().collect();
        if keys.is_empty() {
            return;
        }
        let (object_index, block) = keys[self.random(keys.len() as u64) as usize];
        self.incarnation += 1;
        let conn = self.c.dial_as(node, None, self.incarnation);
        let mut header = Header::new(FrameKind::Read, 0);
        header.object = object(object_index);
        (header.block, header.blocks, header.epoch) = (block, 1, epoch);
        let request = self.c.request(conn, header, None);
        self.run_a_while(false);
        self.judge((object_index, block), &Asked { write: None, read: Some(request) });
    }

    /// Asks several things of the primary at once, runs a while, and judges the answers.
    fn round(&mut self, faults: bool) {
        let Some(primary) = self.primary() else { return };
        self.c.lease(primary, LEASE_MS);
        let (asked_node, epoch) = (primary, self.c.record.epoch);
        self.incarnation += 1;
        let conn = self.c.dial_as(primary, None, self.incarnation);
        if faults && self.random(6) == 0 {
            // Everything behind the hello is late.
            self.c.world.borrow_mut().hold_conn(conn);
            self.late.push(conn);
        }
        let mut asked: BTreeMap<(u64, u32), Asked> = BTreeMap::new();
        let share = 1 + self.random(4);
        for object in 0..OBJECTS {
            for block in 0..BLOCKS {
                if self.random(4) >= share {
                    continue;
                }
                let entry = asked.entry((object, block)).or_default();
                let what = self.random(4);
                if what < 2 {
                    self.value = self.value % 250 + 1;
                    entry.write = Some((self.c.write(conn, object, block, self.value), self.value));
                }
                if what > 0 {
                    entry.read = Some(self.c.read(conn, object, block));
                }
            }
        }
        self.run_a_while(faults);
        self.c.obey_in_sync();
        for (at, asked) in &asked {
            self.judge(*at, asked);
        }
        // What the client gave up is fenced when it says hello again; before that it may still be done.
        self.fence();
        if let Some((node, epoch)) = self.stale.take()
            && self.c.nodes.contains_key(&node)
        {
            self.c.paused.remove(&node);
            self.ask_stale(node, epoch);
        }
        if faults && self.primary() != Some(asked_node) {
            self.stale = Some((asked_node, epoch));
        }
        if let Some(late) = self.late.pop()
            && self.random(2) == 0
        {
            self.c.world.borrow_mut().release_conn(late);
        }
    }

    /// The client connects anew everywhere: nothing of before is carried out from then on.
    fn fence(&mut self) {
        for node in self.awake() {
            self.incarnation += 1;
            self.c.dial_as(node, None, self.incarnation);
        }
        self.c.pass(1);
    }

    fn judge(&mut self, at: (u64, u32), asked: &Asked) {
        let answer = |c: &Cluster, request: u64| c.replies.get(&request).map(|reply| reply.header.status);
        let mut may = self.may.get(&at).cloned().unwrap_or_default();
        let before = may.clone();
        if let Some((request, value)) = asked.write {
            match answer(&self.c, request) {
                Some(Status::Ok) => may = vec![value],
                Some(status) => {
                    assert!(status.is_retryable(), "{status}");
                    may.push(value);
                }
                None => may.push(value),
            }
        }
        if let Some(request) = asked.read
            && answer(&self.c, request) == Some(Status::Ok)
        {
            let seen = self.c.byte_of(request);
            let known = before.contains(&seen) || (before.is_empty() && seen == 0);
            let fresh = asked.write.is_some_and(|(_, value)| value == seen);
            assert!(known || fresh, "{at:?} reads {seen}, may be {before:?}, written {:?}", asked.write);
            let acked = asked.write.is_some_and(|(request, _)| answer(&self.c, request) == Some(Status::Ok));
            if !acked {
                // Sent in order on one connection: the read is behind the write, and what it saw stays.
                may = vec![seen];
                if let Some((_, value)) = asked.write
                    && value != seen
                {
                    may.push(value);
                }
                if seen == 0 && before.is_empty() {
                    may.retain(|value| *value != 0);
                    if asked.write.is_none() {
                        may.clear();
                    } else {
                        may.push(0);
                    }
                }
            }
        } else if before.is_empty() && may.len() == 1 && asked.write.is_some() {
            let acked = asked.write.is_some_and(|(request, _)| answer(&self.c, request) == Some(Status::Ok));
            if !acked {
                may.push(0); // never written before: nothing may be there yet
            }
        }
        if may.is_empty() {
            self.may.remove(&at);
        } else {
            self.may.insert(at, may);
        }
    }

    fn settle(&mut self) {
        for a in 0..3 {
            for b in 0..3 {
                self.c.world.borrow_mut().release(a, b);
            }
        }
        self.c.paused.clear();
        for node in 0..3 {
            if !self.c.nodes.contains_key(&node) {
                self.c.start(node);
            }
        }
        for round in 0.. {
            self.decide();
            for _ in 0..40 {
                let primary = self.primary().unwrap();
                self.c.lease(primary, LEASE_MS * 10);
                self.c.pass(50);
                self.c.obey_in_sync();
                if self.c.reported(primary, PgState::Clean) && self.c.equal(&[0, 1, 2]) {
                    return;
                }
            }
            assert!(round < 5, "never clean and equal");
        }
    }
}

fn schedule(seed: u64, planted: Planted) -> u64 {
    let mut c = Cluster::with(7000 + seed, planted);
    c.lease_ms = LEASE_MS;
    c.news_ns = 3_000_000;
    let mut run =
        Run { c, may: BTreeMap::new(), value: 0, incarnation: 0, faults: 0, late: Vec::new(), stale: None };
    run.c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    for _ in 0..ROUNDS {
        run.round(true);
    }
    run.settle();
    for _ in 0..4 {
        run.round(false);
    }
    run.settle();
    let primary = run.primary().unwrap();
    run.c.assert_idle(primary);
    run.faults
}

#[test]
fn nothing_acknowledged_is_lost_in_random_schedules() {
    let mut faults = 0;
    for seed in 0..150 {
        println!("seed {seed}");
        faults += schedule(seed, Planted::none());
    }
    assert!(faults > 5000, "the schedules are too tame: {faults} faults");
}

/// The schedules see bugs: each of these is noticed by one of them, or by a late or lost sub-write
/// a change sent again, damage that a scrub is to mend, or a PG that comes back.
#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_noticed() {
    use crate::planted::Bug;
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    // A member's read has to wait for a page while a change overtakes it, a checkpoint has to meet a bad page: the
    // simulator meets these.
    let elsewhere = [Bug::ScrubWithoutHold, Bug::StoppedStoreUnnoticed];
    for bug in Bug::all().iter().filter(|bug| !elsewhere.contains(bug)) {
        let planted = Planted::with(*bug);
        let late = std::panic::catch_unwind(|| super::failover::late_sub_write(planted)).is_err()
            || std::panic::catch_unwind(|| super::failover::lost_sub_write(planted)).is_err()
            || std::panic::catch_unwind(|| super::origins::second_try_at_the_next_primary(planted)).is_err()
            || std::panic::catch_unwind(|| super::scrub::damage_is_mended(planted)).is_err()
            || std::panic::catch_unwind(|| super::strays::returned(planted)).is_err();
        let mut seeds = 0..if late { 1 } else { 600 };
        let noticed =
            seeds.find(|seed| late || std::panic::catch_unwind(|| schedule(*seed, planted)).is_err());
        println!("{}: {noticed:?}", bug.name());
        if noticed.is_none() {
            missed.push(bug.name());
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "{missed:?}");
}
