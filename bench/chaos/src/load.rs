//! Clients that write and read the same blocks all the time, and remember every operation for the checker.
//!
//! Each is a client library in a thread of its own, several operations deep. Every write has a stamp that no
//! other has; a block says which write and which block it is, and all of it is compared when it is read.

use crate::error::ChaosError;
use crate::history::{Access, BLANK, Event, Stamp, UNKNOWN};
use crate::rng::Rng;
use cli::cluster::{Cluster, OpenImage};
use cli::deadline::{Deadline, Stopwatch};
use cli::error::CliError;
use client::{IoDone, IoError, Op, OpenMode, Options};
use reactor::IoBuf;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a block.
pub const BLOCK: u64 = wire::BLOCK_BYTES as u64;
/// Blocks of the longest operation: more than an object holds, so that some touch several.
const BLOCKS_MAX: u64 = 40;
/// Half of all operations fall into so many blocks, so that clients meet.
const HOT_BLOCKS: u64 = 96;
/// An operation that takes longer hangs, and the run fails.
const OP_LIMIT_MS: u64 = 120_000;
/// First word of a block that was written.
pub const MAGIC: u64 = 0x6472_7973_746f_6e65;

/// How clients share an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// All write everywhere.
    Everywhere,
    /// Each writes blocks of its own, all read everything. For power cuts of the whole cluster: what was under
    /// way may then take effect twice, which only other writers of the same block could see.
    OwnBlocks,
}

/// Which errors a client may see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tolerance {
    /// None at all.
    Nothing,
    /// `NoSpace` to writes.
    NoSpace,
}

/// What clients do.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The image.
    pub image: &'static str,
    /// Blocks of it in use: a multiple of the clients.
    pub blocks: u64,
    /// Clients.
    pub clients: u64,
    /// Operations of each at once.
    pub depth: usize,
    /// Operations of each per second: leaves the CPUs time for the nodes.
    pub rate: u64,
    /// Who writes what.
    pub sharing: Sharing,
    /// What may fail.
    pub tolerance: Tolerance,
}

/// What all clients of a cluster share: the order of events.
#[derive(Default)]
pub struct Timeline {
    ticks: AtomicU64,
    stamps: AtomicU64,
    /// Operations that got an answer.
    answered: AtomicU64,
    /// Writes refused for want of space.
    no_space: AtomicU64,
    /// The longest operation since somebody looked, microseconds.
    slowest_us: AtomicU64,
    /// Time of all operations together, microseconds.
    total_us: AtomicU64,
}

impl Timeline {
    fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Operations that got an answer so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Writes refused for want of space so far.
    pub fn no_space(&self) -> u64 {
        self.no_space.load(Ordering::Relaxed)
    }

    /// Operations that got an answer so far, and the sum of the time they took.
    pub fn total(&self) -> (u64, Duration) {
        (self.answered(), Duration::from_micros(self.total_us.load(Ordering::Relaxed)))
    }

    /// The longest operation so far.
    pub fn slowest(&self) -> Duration {
        Duration::from_micros(self.slowest_us.load(Ordering::Relaxed))
    }
}

/// Fills a block.
fn fill(block: &mut [u8], stamp: Stamp, number: u64) {
    let mut filler = Rng::new(stamp.0 ^ number.rotate_left(40), "");
    for (index, word) in block.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => MAGIC,
            1 => stamp.0,
            2 => number,
            _ => filler.bits(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Which write a block's contents are of; `None` when they are none's.
fn recognise(block: &[u8], number: u64) -> Option<Stamp> {
    if block.iter().all(|byte| *byte == 0) {
        return Some(BLANK);
    }
    let stamp = Stamp(u64::from_le_bytes(block.get(8..16)?.try_into().ok()?));
    let mut expected = vec![0; block.len()];
    fill(&mut expected, stamp, number);
    (expected == block).then_some(stamp)
}

/// Clients at work.
pub struct Load {
    /// What they share.
    pub timeline: Arc<Timeline>,
    stop: Arc<AtomicBool>,
    /// Stop without waiting for operations under way.
    give_up: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<Vec<Event>, ChaosError>>>,
}

impl Load {
    /// Starts clients of the cluster at these addresses.
    pub fn start(
        plan: &LoadPlan,
        timeline: Arc<Timeline>,
        addresses: &[SocketAddr],
        rng: &mut Rng,
    ) -> Result<Self, ChaosError> {
        let (stop, give_up) = (Arc::default(), Arc::default());
        let mut load = Self { timeline, stop, give_up, clients: Vec::new() };
        for number in 0..plan.clients {
            let (plan, addresses) = (plan.clone(), addresses.to_vec());
            let timeline = load.timeline.clone();
            let (stop, give_up) = (load.stop.clone(), load.give_up.clone());
            let rng = Rng::new(rng.bits(), "client");
            let work = move || Worker::new(plan, number, timeline, &addresses, rng)?.run(&stop, &give_up);
            let thread = std::thread::Builder::new().name(format!("client{number}")).spawn(work);
            load.clients.push(thread.map_err(ChaosError::io("start a client"))?);
        }
        Ok(load)
    }

    /// Why a client gave up, if one did. Others are not waited for.
    pub fn failure(&mut self) -> Option<ChaosError> {
        let index = self.clients.iter().position(JoinHandle::is_finished)?;
        match self.clients.swap_remove(index).join() {
            Ok(Ok(_)) => Some(ChaosError::Demand("a client ended too early".into())),
            Ok(Err(error)) => Some(error),
            Err(_) => Some(ChaosError::Demand("a client panicked".into())),
        }
    }

    /// Lets every operation under way end; returns all that happened.
    pub fn finish(mut self) -> Result<Vec<Event>, ChaosError> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        let mut first = Ok(());
        for client in std::mem::take(&mut self.clients) {
            match client.join() {
                Ok(Ok(events)) => all.extend(events),
                Ok(Err(error)) => first = first.and(Err(error)),
                Err(_) => first = first.and(Err(ChaosError::Demand("a client panicked".into()))),
            }
        }
        first.map(|()| all)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // A client that outlived its cluster would go on with the next one at the same addresses.
        self.stop.store(true, Ordering::Relaxed);
        self.give_up.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }
}

/// An operation under way.
struct Pending {
    access: Access,
    first: u64,
    blocks: u64,
    stamp: Stamp,
    start: u64,
    since: Stopwatch,
}

struct Worker {
    plan: LoadPlan,
    number: u64,
    timeline: Arc<Timeline>,
    cluster: Cluster,
    image: OpenImage,
    rng: Rng,
    pending: BTreeMap<u64, Pending>,
    events: Vec<Event>,
}

fn options() -> Options {
    Options { io_timeout_ms: Some(OP_LIMIT_MS), ..Options::default() }
}

fn buffer(bytes: u64) -> Result<IoBuf, ChaosError> {
    IoBuf::heap(bytes as usize).map_err(|error| CliError::Client(error.to_string()).into())
}

impl Worker {
    fn new(
        plan: LoadPlan,
        number: u64,
        timeline: Arc<Timeline>,
        addresses: &[SocketAddr],
        rng: Rng,
    ) -> Result<Self, ChaosError> {
        let mut cluster = Cluster::with_options(addresses, options())?;
        let image = cluster.open(plan.image, OpenMode::ReadWrite)?;
        let (pending, events) = (BTreeMap::new(), Vec::new());
        Ok(Self { plan, number, timeline, cluster, image, rng, pending, events })
    }

    fn run(mut self, stop: &AtomicBool, give_up: &AtomicBool) -> Result<Vec<Event>, ChaosError> {
        let clock = Stopwatch::start();
        let mut submitted = 0;
        while !stop.load(Ordering::Relaxed) || !self.pending.is_empty() {
            if give_up.load(Ordering::Relaxed) {
                break;
            }
            let due = Duration::from_micros(submitted * 1_000_000 / self.plan.rate.max(1));
            let wait = due.saturating_sub(clock.elapsed());
            let may_submit = !stop.load(Ordering::Relaxed) && self.pending.len() < self.plan.depth;
            if may_submit && wait.is_zero() {
                submitted += 1;
                self.submit(submitted)?;
                continue;
            }
            let until = if may_submit { wait } else { Duration::from_millis(100) };
            if let Some(done) = self.cluster.next_io_until(Deadline::after(until))? {
                self.take(done)?;
            }
            // After a long pause the rate is kept from there on, not caught up with.
            let behind = clock.elapsed().as_millis() as u64 * self.plan.rate / 1000;
            submitted = submitted.max(behind.saturating_sub(self.plan.rate / 10));
        }
        Ok(self.events)
    }

    /// Where the next operation goes: often to the hot blocks, sometimes long.
    fn choose(&mut self, access: Access) -> (u64, u64) {
        let span = if self.rng.percent(50) { HOT_BLOCKS.min(self.plan.blocks) } else { self.plan.blocks };
        let first = self.rng.below(span);
        if access == Access::Write && self.plan.sharing == Sharing::OwnBlocks {
            return (first - first % self.plan.clients + self.number, 1);
        }
        let blocks = if self.rng.percent(10) { self.rng.between(2, BLOCKS_MAX) } else { 1 };
        (first, blocks.min(self.plan.blocks - first))
    }

    fn submit(&mut self, user: u64) -> Result<(), ChaosError> {
        let access = if self.rng.percent(60) { Access::Write } else { Access::Read };
        let (first, blocks) = self.choose(access);
        let mut buf = buffer(blocks * BLOCK)?;
        let mut stamp = BLANK;
        if access == Access::Write {
            stamp = Stamp(self.timeline.stamps.fetch_add(1, Ordering::Relaxed) + 1);
            let bytes = buf.as_mut_slice().unwrap_or(&mut []);
            for (number, block) in (first..).zip(bytes.chunks_exact_mut(BLOCK as usize)) {
                fill(block, stamp, number);
            }
        }
        let offset = first * BLOCK;
        let op = match access {
            Access::Write => Op::Write { offset, buf },
            Access::Read => Op::Read { offset, buf },
        };
        let since = Stopwatch::start();
        let start = self.timeline.tick();
        self.pending.insert(user, Pending { access, first, blocks, stamp, start, since });
        let refused = |(error, _): (client::SubmitError, Op)| ChaosError::Demand(format!("submit: {error}"));
        self.cluster.submit(self.image, op, user).map_err(refused)
    }

    fn take(&mut self, done: IoDone) -> Result<(), ChaosError> {
        let Some(op) = self.pending.remove(&done.user) else { return Ok(()) };
        let end = self.timeline.tick();
        let took = op.since.elapsed();
        self.timeline.slowest_us.fetch_max(took.as_micros() as u64, Ordering::Relaxed);
        self.timeline.total_us.fetch_add(took.as_micros() as u64, Ordering::Relaxed);
        match (done.result, op.access) {
            (Ok(()), Access::Write) => self.remember_write(&op, end),
            (Ok(()), Access::Read) => {
                let bytes = done.buf.as_ref().map_or(&[][..], IoBuf::as_slice);
                remember_read(&mut self.events, &op, end, bytes)?;
            }
            (Err(IoError::NoSpace), Access::Write) if self.plan.tolerance == Tolerance::NoSpace => {
                // Of several objects some may have had room.
                self.remember_write(&op, UNKNOWN);
                self.timeline.no_space.fetch_add(1, Ordering::Relaxed);
            }
            (Err(error), access) => {
                return Err(ChaosError::Demand(format!(
                    "client {}: {access:?} of {} block(s) at block {} failed after {took:?}: {error}",
                    self.number, op.blocks, op.first
                )));
            }
        }
        self.timeline.answered.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn remember_write(&mut self, op: &Pending, end: u64) {
        self.events.extend((op.first..op.first + op.blocks).map(|block| Event {
            block: block as u32,
            stamp: op.stamp,
            access: Access::Write,
            start: op.start,
            end,
        }));
    }
}

fn remember_read(events: &mut Vec<Event>, op: &Pending, end: u64, bytes: &[u8]) -> Result<(), ChaosError> {
    for (number, block) in (op.first..).zip(bytes.chunks_exact(BLOCK as usize)) {
        let Some(stamp) = recognise(block, number) else {
            let head: Vec<String> = block.iter().take(32).map(|byte| format!("{byte:02x}")).collect();
            return Err(ChaosError::Demand(format!(
                "block {number} holds what no write wrote: {} ...",
                head.join(" ")
            )));
        };
        let (block, start) = (number as u32, op.start);
        events.push(Event { block, stamp, access: Access::Read, start, end });
    }
    Ok(())
}

/// Reads the whole image, as the last events of a history.
pub fn read_back(
    plan: &LoadPlan,
    timeline: &Timeline,
    addresses: &[SocketAddr],
) -> Result<Vec<Event>, ChaosError> {
    const CHUNK_BLOCKS: u64 = 256;
    let mut cluster = Cluster::with_options(addresses, options())?;
    let image = cluster.open(plan.image, OpenMode::ReadOnly)?;
    let mut events = Vec::new();
    for first in (0..plan.blocks).step_by(CHUNK_BLOCKS as usize) {
        let blocks = CHUNK_BLOCKS.min(plan.blocks - first);
        let (since, start) = (Stopwatch::start(), timeline.tick());
        let op = Pending { access: Access::Read, first, blocks, stamp: BLANK, start, since };
        let read = Op::Read { offset: first * BLOCK, buf: buffer(blocks * BLOCK)? };
        cluster
            .submit(image, read, first)
            .map_err(|(error, _)| ChaosError::Demand(format!("read back: {error}")))?;
        let done = cluster.next_io()?;
        done.result.map_err(|error| ChaosError::Demand(format!("read back block {first}: {error}")))?;
        let bytes = done.buf.as_ref().map_or(&[][..], IoBuf::as_slice);
        remember_read(&mut events, &op, timeline.tick(), bytes)?;
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_recognised_whole_and_in_its_place_only() {
        let mut block = vec![0; BLOCK as usize];
        assert_eq!(recognise(&block, 5), Some(BLANK));
        fill(&mut block, Stamp(9), 5);
        assert_eq!(recognise(&block, 5), Some(Stamp(9)));
        assert_eq!(recognise(&block, 6), None);
        let mut other = vec![0; BLOCK as usize];
        fill(&mut other, Stamp(10), 5);
        if let (Some(half), Some(of_other)) = (block.get_mut(2048..), other.get(2048..)) {
            half.copy_from_slice(of_other);
        }
        assert_eq!(recognise(&block, 5), None, "a torn block");
    }
}
