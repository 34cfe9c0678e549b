//! Random schedules: crashes, restarts, broken connections and new records at random moments, while a
//! client writes unique values and retries. Every block must read as the last acknowledged value, or as one
//! of those written since without an answer, and all copies must be equal in the end.

use super::cluster::*;
use crate::planted::Planted;
use crate::{CoreMsg, PgState};
use std::collections::BTreeMap;
use wire::{SliceId, Status};

const OBJECTS: u64 = 3;
const BLOCKS: u32 = 2;

/// What a block may read as.
#[derive(Default)]
struct Block {
    /// Values that may be there: the last acknowledged one and those without an answer since.
    may: Vec<u8>,
}

struct Run {
    c: Cluster,
    blocks: BTreeMap<(u64, u32), Block>,
    value: u8,
    incarnation: u64,
    faults: u64,
}

fn live(c: &Cluster) -> Vec<usize> {
    c.nodes.keys().copied().collect()
}

impl Run {
    fn random(&mut self, n: u64) -> u64 {
        self.c.world.borrow_mut().random() % n
    }

    /// The director: members are the live nodes, in sync stays who was and lives; the primary is one of
    /// those. Never leaves the PG without an in-sync member.
    fn decide(&mut self) {
        let alive = live(&self.c);
        let was: Vec<usize> = (0..3).filter(|n| self.c.record.in_sync.contains(&slice(*n))).collect();
        let lost: Vec<SliceId> = {
            let epoch = self.c.record.epoch;
            let told = self.c.told();
            let out = told.iter().filter_map(|(_, msg)| match msg {
                CoreMsg::OutOfSync { epoch: at, slice, .. } if *at == epoch => Some(*slice),
                _ => None,
            });
            out.collect()
        };
        let in_sync: Vec<usize> =
            alive.iter().copied().filter(|n| was.contains(n) && !lost.contains(&slice(*n))).collect();
        if in_sync.is_empty() {
            return;
        }
        let mut primary = in_sync[self.random(in_sync.len() as u64) as usize];
        let current = (0..3).find(|n| self.c.record.primary == Some(slice(*n)));
        if let Some(current) = current
            && in_sync.contains(&current)
            && self.random(3) > 0
        {
            primary = current;
        }
        self.c.decide(primary, &alive, &in_sync);
    }

    fn fault(&mut self) {
        self.faults += 1;
        let alive = live(&self.c);
        match self.random(6) {
            0 | 1 if alive.len() > 1 => {
                let victim = alive[self.random(alive.len() as u64) as usize];
                let stays_in_sync =
                    alive.iter().any(|n| *n != victim && self.c.record.in_sync.contains(&slice(*n)));
                if stays_in_sync {
                    self.c.crash(victim);
                    self.decide();
                }
            }
            2 | 3 => {
                if let Some(dead) = (0..3).find(|n| !alive.contains(n)) {
                    self.c.start(dead);
                    self.decide();
                }
            }
            4 => {
                let (a, b) = (self.random(3) as usize, self.random(3) as usize);
                self.c.world.borrow_mut().break_between(a, b);
            }
            _ => self.decide(),
        }
    }

    /// One attempt at the present primary: its status, or none when nobody answered in time.
    fn attempt(&mut self, op: &mut dyn FnMut(&mut Cluster, reactor::ConnId) -> u64) -> Option<(Status, u64)> {
        let primary = (0..3).find(|n| self.c.record.primary == Some(slice(*n)))?;
        self.incarnation += 1;
        let conn = self.c.dial_as(primary, None, self.incarnation);
        let request = op(&mut self.c, conn);
        for _ in 0..400 {
            if let Some(reply) = self.c.replies.get(&request) {
                return Some((reply.header.status, request));
            }
            if self.random(150) == 0 {
                self.fault();
            }
            self.c.step();
        }
        None
    }

    fn write(&mut self, object: u64, block: u32) {
        self.value = self.value.wrapping_add(1).max(1);
        let value = self.value;
        self.blocks.entry((object, block)).or_default().may.push(value);
        for _ in 0..60 {
            match self.attempt(&mut |c, conn| c.write(conn, object, block, value)) {
                Some((Status::Ok, _)) => {
                    self.blocks.entry((object, block)).or_default().may = vec![value];
                    return;
                }
                Some((status, _)) => assert!(status.is_retryable(), "{status}"),
                None => {}
            }
            self.c.obey_in_sync();
            // A member out of sync, or a node without a record: the director looks every now and then.
            if self.random(3) == 0 {
                self.decide();
            }
        }
        panic!("a write never succeeds");
    }

    fn read(&mut self, object: u64, block: u32) {
        for _ in 0..60 {
            if let Some((Status::Ok, request)) = self.attempt(&mut |c, conn| c.read(conn, object, block)) {
                let value = self.c.byte_of(request);
                let expected = self.blocks.entry((object, block)).or_default();
                let fits = expected.may.contains(&value) || (expected.may.is_empty() && value == 0);
                assert!(fits, "object {object} block {block} reads {value}, may be {:?}", expected.may);
                expected.may = vec![value];
                return;
            }
            self.c.obey_in_sync();
            if self.random(3) == 0 {
                self.decide();
            }
        }
        panic!("a read never succeeds");
    }

    fn settle(&mut self) {
        for node in 0..3 {
            if !live(&self.c).contains(&node) {
                self.c.start(node);
            }
        }
        for round in 0.. {
            self.decide();
            let primary = (0..3).find(|n| self.c.record.primary == Some(slice(*n))).unwrap();
            for _ in 0..60 {
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
    let c = Cluster::with(7000 + seed, planted);
    let mut run = Run { c, blocks: BTreeMap::new(), value: 0, incarnation: 0, faults: 0 };
    run.c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    for _ in 0..60 {
        let (object, block) = (run.random(OBJECTS), run.random(u64::from(BLOCKS)) as u32);
        match run.random(3) {
            0 => run.read(object, block),
            _ => run.write(object, block),
        }
    }
    run.settle();
    for object in 0..OBJECTS {
        for block in 0..BLOCKS {
            run.read(object, block);
        }
    }
    run.faults
}

#[test]
fn nothing_acknowledged_is_lost_in_random_schedules() {
    let faults: u64 = (0..200).map(|seed| schedule(seed, Planted::none())).sum();
    assert!(faults > 2000, "the schedules are too tame: {faults} faults");
}

/// The schedules see bugs: each of these is noticed by one of them.
#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_noticed() {
    use crate::planted::Bug;
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for bug in Bug::all() {
        let noticed = (0..300).find(|seed| std::panic::catch_unwind(|| schedule(*seed, Planted::with(*bug))).is_err());
        println!("{}: {noticed:?}", bug.name());
        if noticed.is_none() {
            missed.push(bug.name());
        }
    }
    let _ = std::panic::take_hook();
    // No schedule here lets a lease end or a connection overtake another.
    missed.retain(|name| {
        ![Bug::ReadFromStalePrimary, Bug::OldIncarnationAccepted].iter().any(|bug| bug.name() == *name)
    });
    assert!(missed.is_empty(), "{missed:?}");
}
