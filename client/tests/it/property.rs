//! Whatever happens to the cluster: every operation completes, and every read sees exactly the changes
//! submitted before it, because one client's overlapping operations are performed in order.

use crate::cluster::{Misdeed, PGS};
use crate::world::{NODES, World, empty, filled, sound_tags, tags};
use client::{ImageHandle, Op, Options, SubmitError, Ticket};
use reactor::IoBuf;
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use wire::{BLOCK_BYTES, OBJECT_BLOCKS, Status};

/// Few objects, so that operations overlap; the last one is cut short.
const BLOCKS: u64 = 4 * OBJECT_BLOCKS as u64 - 7;

struct Reading {
    expected: Vec<u64>,
    /// The caller's own memory, for reads that let the transport deliver in place.
    memory: Option<Vec<u64>>,
}

struct Run {
    world: World,
    image: ImageHandle,
    /// What each block says after everything submitted so far.
    model: Vec<u64>,
    next_tag: u64,
    reads: BTreeMap<Ticket, Reading>,
    changes: BTreeSet<Ticket>,
    /// Changes each flush has to wait for.
    flushes: BTreeMap<Ticket, BTreeSet<Ticket>>,
    outstanding: usize,
}

impl Run {
    fn new(seed: u64, options: Options) -> Self {
        let (world, image) = World::opened(seed, options, BLOCKS * BLOCK_BYTES as u64);
        Self {
            world,
            image,
            model: vec![0; BLOCKS as usize],
            next_tag: 1,
            reads: BTreeMap::new(),
            changes: BTreeSet::new(),
            flushes: BTreeMap::new(),
            outstanding: 0,
        }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.world.env.draw(below)
    }

    fn range(&mut self) -> (u64, u64) {
        let first = self.draw(BLOCKS);
        let longest = if self.draw(5) == 0 { BLOCKS - first } else { 8.min(BLOCKS - first) };
        (first, 1 + self.draw(longest))
    }

    fn read_buffer(&mut self, count: u64) -> (IoBuf, Option<Vec<u64>>) {
        if self.draw(2) == 0 {
            return (empty(count as usize), None);
        }
        let mut memory = vec![u64::MAX; count as usize * BLOCK_BYTES / 8];
        let ptr = NonNull::new(memory.as_mut_ptr().cast()).unwrap();
        // SAFETY: the vector's memory is kept, unmoved and untouched, in `reads` until the read has
        // completed.
        let buf = unsafe { IoBuf::foreign(ptr, count as usize * BLOCK_BYTES) };
        (buf, Some(memory))
    }

    fn submit(&mut self) {
        let (first, count) = self.range();
        let (offset, len) = (first * BLOCK_BYTES as u64, count * BLOCK_BYTES as u64);
        let span = first as usize..(first + count) as usize;
        let kind = self.draw(10);
        let mut reading = None;
        let mut after = None;
        let op = match kind {
            0..=3 => {
                let (buf, memory) = self.read_buffer(count);
                reading = Some(Reading { expected: self.model[span.clone()].to_vec(), memory });
                Op::Read { offset, buf }
            }
            4..=7 => {
                after = Some(self.next_tag);
                self.next_tag += 1;
                Op::Write { offset, buf: filled(count as usize, self.next_tag - 1) }
            }
            8 => {
                after = Some(0);
                if self.draw(2) == 0 { Op::Discard { offset, len } } else { Op::WriteZeroes { offset, len } }
            }
            _ => Op::Flush,
        };
        let ticket = match self.world.submit(self.image, op, first) {
            Ok(ticket) => ticket,
            Err(SubmitError::Busy) => return,
            Err(error) => panic!("refused: {error}"),
        };
        self.outstanding += 1;
        if let Some(tag) = after {
            self.model[span].fill(tag);
            self.changes.insert(ticket);
        } else if let Some(reading) = reading {
            self.reads.insert(ticket, reading);
        } else {
            self.flushes.insert(ticket, self.changes.clone());
        }
    }

    fn is_up(&self, node: usize) -> bool {
        self.world.cluster.nodes[node].up
    }

    fn misfortune(&mut self) {
        let node = self.draw(NODES as u64) as usize;
        match self.draw(10) {
            0 => {
                let conns = self.world.conns_to(|to| (200..300).contains(&to.port()));
                if let Some(conn) = conns.get(node % conns.len().max(1)) {
                    self.world.cut(*conn);
                }
            }
            1 => {
                let conns = self.world.conns_to(|to| (100..200).contains(&to.port()));
                conns.into_iter().for_each(|conn| self.world.cut(conn));
            }
            2 if self.is_up(node) && self.world.cluster.nodes.iter().filter(|n| n.up).count() > 1 => {
                self.world.kill(node);
            }
            3 if !self.is_up(node) => self.world.cluster.revive(node),
            4 if self.is_up(node) => {
                let slice = self.world.cluster.nodes[node].slice;
                let pg = self.draw(u64::from(PGS)) as u32;
                self.world.cluster.set_primary(pg, Some(slice));
            }
            5 => {
                let pg = self.draw(u64::from(PGS)) as u32;
                self.world.cluster.set_primary(pg, None);
            }
            6 if self.world.cluster.misdeeds.is_empty() => {
                self.world.cluster.misdeeds.push(Misdeed::FlipBit);
            }
            7 | 8 => {
                let all = [
                    Status::Busy,
                    Status::NotActive,
                    Status::NotPrimary,
                    Status::StaleEpoch,
                    Status::Unknown,
                    Status::ShuttingDown,
                ];
                let status = all[self.draw(all.len() as u64) as usize];
                self.world.cluster.misdeeds.push(Misdeed::Refuse(status));
            }
            _ => {}
        }
    }

    /// Takes completions and compares them with the model.
    fn check(&mut self) -> Result<(), String> {
        while let Some(done) = self.world.client.poll() {
            self.outstanding -= 1;
            if let Err(error) = done.result {
                return Err(format!("an operation failed: {error}"));
            }
            self.changes.remove(&done.ticket);
            if let Some(before) = self.flushes.remove(&done.ticket) {
                let early: Vec<_> = before.intersection(&self.changes).collect();
                if !early.is_empty() {
                    return Err(format!("a flush completed before {early:?}"));
                }
            }
            let Some(reading) = self.reads.remove(&done.ticket) else { continue };
            let bytes: Vec<u8> = match (&reading.memory, &done.buf) {
                (Some(memory), _) => memory.iter().flat_map(|word| word.to_le_bytes()).collect(),
                (None, Some(buf)) => buf.as_slice().to_vec(),
                (None, None) => return Err("a read brought no buffer".into()),
            };
            let found = sound_tags(&bytes).ok_or("a damaged block was delivered")?;
            if found != reading.expected {
                return Err(format!("read {found:?} instead of {:?}", reading.expected));
            }
        }
        Ok(())
    }

    fn heal(&mut self) {
        self.world.cluster.misdeeds.clear();
        for node in 0..NODES {
            if !self.world.cluster.nodes[node].up {
                self.world.cluster.revive(node);
            }
        }
        for pg in 0..PGS {
            let slice = self.world.cluster.nodes[pg as usize % NODES].slice;
            self.world.cluster.set_primary(pg, Some(slice));
        }
    }

    fn run(&mut self) -> Result<(), String> {
        for _ in 0..2500 {
            if self.outstanding < 30 && self.draw(3) == 0 {
                self.submit();
            }
            if self.draw(60) == 0 {
                self.misfortune();
            }
            self.world.step();
            self.check()?;
        }
        self.heal();
        for _ in 0..50_000 {
            if self.outstanding == 0 {
                return self.final_state();
            }
            self.world.step();
            self.check()?;
        }
        Err(format!("{} operations never complete", self.outstanding))
    }

    fn final_state(&mut self) -> Result<(), String> {
        if self.world.client.is_busy() || !(self.flushes.is_empty() && self.changes.is_empty()) {
            return Err("something is left".into());
        }
        for (block, tag) in self.model.iter().enumerate() {
            let key = (crate::cluster::IMAGE, block as u64);
            let stored = self.world.cluster.blocks.get(&key).map_or(0, |bytes| tags(bytes)[0]);
            if stored != *tag {
                return Err(format!("block {block} holds {stored} instead of {tag}"));
            }
        }
        Ok(())
    }
}

#[test]
fn every_read_sees_exactly_what_was_submitted_before_it() {
    let mut retried = 0;
    for seed in 0..150 {
        let mut run = Run::new(seed, Options::default());
        run.world.env.queue_frames = if seed % 3 == 0 { 4 } else { 4096 };
        run.world.env.deliver_in_place = seed % 4 != 0;
        if let Err(why) = run.run() {
            panic!("seed {seed}: {why}");
        }
        retried += run.world.client.counters().retried;
    }
    assert!(retried > 1000, "misfortune has to reach the client, only {retried} parts were sent again");
}

#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_seen() {
    use client::planted::Bug;
    // A change that takes effect twice shows only beside other clients: that one is the simulator's to see.
    for (bug, name) in Bug::ALL.into_iter().filter(|(bug, _)| *bug != Bug::FlushedTakenForFailed) {
        let options = Options { bug: Some(bug), ..Options::default() };
        let seen = (0..150).find(|seed| Run::new(*seed, options).run().is_err());
        assert!(seen.is_some(), "{name} stays unseen");
    }
}
