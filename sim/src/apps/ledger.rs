//! What every block may hold, kept up to date by what its owner is told.
//!
//! A region has one owner at a time, and a client performs its operations on a block in the order in which it
//! submitted them, although long ones may complete in another. So the ledger keeps that order, and a read
//! must find the last change submitted before it, unless that one's outcome is unknown:
//!
//! - what a process has *given up* (its time limit was over) has happened or not. The client promises that it
//!   does not happen behind the back of its process: the next change or read of the block decides.
//! - what a process had under way when it *died*, or what another process had given up, may lie in some queue
//!   for a while. It stays possible until it has been seen. It happens once.

use super::{Kind, Mix};
use std::collections::{BTreeMap, BTreeSet};

/// What a block holds: the serial number of a page, 0 for zeroes.
pub type Value = u64;
/// One life of a client process.
pub type ProcessId = u64;
/// A position in the order of submission. Operations have even ones.
pub type Seq = u64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    UnderWay,
    Done,
    GivenUp,
    Orphan,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Change {
    seq: Seq,
    value: Value,
    process: ProcessId,
    fate: Fate,
    /// A read has found it while it was under way.
    seen: bool,
    /// It came from outside the order: `seq` is only the latest place where it can be.
    late: bool,
}

impl Change {
    /// It may come whenever it likes.
    fn is_loose(&self, process: ProcessId) -> bool {
        self.fate == Fate::Orphan || self.fate == Fate::GivenUp && self.process != process
    }
}

/// What is known of a block.
#[derive(Clone, Default, Debug)]
struct Shadow {
    base: Value,
    /// By `seq`.
    changes: Vec<Change>,
}

/// What may be read at a point.
struct Expected {
    now: Value,
    /// What `now` was before a change that is under way, if one is.
    before: Option<Value>,
    /// The change that `now` comes from.
    by: Option<Seq>,
    /// Changes after it that may have happened.
    maybe: Vec<Seq>,
}

impl Shadow {
    fn expected(&self, process: ProcessId, at: Seq) -> Expected {
        let mut expected = Expected { now: self.base, before: None, by: None, maybe: Vec::new() };
        for change in self.changes.iter().filter(|change| change.seq < at && !change.is_loose(process)) {
            match change.fate {
                Fate::Done | Fate::UnderWay => {
                    expected.before = (change.fate == Fate::UnderWay).then_some(expected.now);
                    (expected.now, expected.by) = (change.value, Some(change.seq));
                    expected.maybe.clear();
                }
                Fate::GivenUp => expected.maybe.push(change.seq),
                Fate::Orphan => {}
            }
        }
        expected
    }

    fn find(&mut self, what: impl Fn(&Change) -> bool) -> Option<&mut Change> {
        self.changes.iter_mut().find(|change| what(change))
    }

    /// A change from outside the order turns out to lie before this point.
    fn place(&mut self, what: Change, at: Seq) {
        self.changes.retain(|change| *change != what);
        let place = self.changes.partition_point(|change| change.seq < at);
        self.changes.insert(place, Change { seq: at - 1, fate: Fate::Done, late: true, ..what });
    }

    /// A read submitted at `at` found `value`. Whether that came late; the error says what should be there.
    fn read(&mut self, process: ProcessId, at: Seq, value: Value, lenient: bool) -> Result<bool, String> {
        let expected = self.expected(process, at);
        if value == expected.now {
            self.changes.retain(|change| !expected.maybe.contains(&change.seq));
            if let Some(by) = expected.by
                && let Some(change) = self.find(|change| change.seq == by)
            {
                change.seen = true;
            }
            return Ok(false);
        }
        let maybe = self.find(|change| expected.maybe.contains(&change.seq) && change.value == value);
        if let Some(change) = maybe {
            change.fate = Fate::Done;
            let happened = change.seq;
            self.changes.retain(|change| !expected.maybe.contains(&change.seq) || change.seq == happened);
            return Ok(false);
        }
        if lenient && expected.before == Some(value) {
            return Ok(false);
        }
        // It may also have been seen already, by a read that was submitted later and answered earlier.
        let next_own = self
            .changes
            .iter()
            .filter(|change| change.seq > at && !change.late && !change.is_loose(process))
            .map(|change| change.seq)
            .min()
            .unwrap_or(Seq::MAX);
        let loose = |change: &Change| {
            let seen_early = change.late && change.seq > at && change.seq < next_own;
            change.value == value && (change.is_loose(process) || seen_early)
        };
        if let Some(change) = self.find(loose).copied() {
            self.place(change, at);
            return Ok(value < expected.now);
        }
        Err(format!("holds {value} and should hold {}; it knows of {:?}", expected.now, self.changes))
    }

    /// Nothing is under way: only what may still come is kept.
    fn settle(&mut self, process: ProcessId) {
        let expected = self.expected(process, Seq::MAX);
        self.base = expected.now;
        self.changes.retain(|change| change.is_loose(process) || expected.maybe.contains(&change.seq));
    }
}

/// A piece of an image.
#[derive(Clone, Debug)]
pub struct Region {
    /// The image, as the workload numbers them.
    pub image: usize,
    /// Its first block in the image.
    pub first: u64,
    /// What happens in it.
    pub kind: Kind,
    /// The client that may touch it.
    pub owner: usize,
    /// Something was written to it.
    pub touched: bool,
    /// An older value has come after a newer one: a write of a dead process.
    pub haunted: bool,
    shadows: Vec<Shadow>,
    unsettled: BTreeSet<u64>,
}

/// All regions.
#[derive(Default, Debug)]
pub struct Ledger {
    /// See `Region`.
    pub regions: Vec<Region>,
    next_serial: u64,
    next_process: u64,
    next_seq: Seq,
    processes: BTreeMap<usize, ProcessId>,
    /// A part of a change may fail by itself while others are still under way.
    lenient: bool,
    /// Changes acknowledged.
    pub acked: u64,
    /// Reads answered.
    pub reads: u64,
    /// Hand-overs.
    pub handed: u64,
    /// Logs whose head and records were compared.
    pub logs: u64,
}

impl Region {
    /// Its length in blocks.
    pub fn blocks(&self) -> u64 {
        self.shadows.len() as u64
    }
}

impl Ledger {
    /// The regions of a seed. `lenient`: operations may end with other errors than a timeout.
    pub fn new(mix: &Mix, images: usize, clients: usize, lenient: bool) -> Self {
        let region = |(at, kind): (usize, &Kind)| Region {
            image: at % images,
            first: (at / images) as u64 * mix.region_blocks,
            kind: *kind,
            owner: at % clients,
            touched: false,
            haunted: false,
            shadows: vec![Shadow::default(); mix.region_blocks as usize],
            unsettled: BTreeSet::new(),
        };
        Self {
            regions: mix.regions.iter().enumerate().map(region).collect(),
            next_serial: 1,
            lenient,
            ..Self::default()
        }
    }

    /// A process of a client begins, and so its former one has ended.
    pub fn begin_process(&mut self, client: usize) -> ProcessId {
        self.next_process += 1;
        if let Some(former) = self.processes.insert(client, self.next_process) {
            self.died(former);
        }
        self.next_process
    }

    /// So many serial numbers, one behind the other; the first.
    pub fn serials(&mut self, count: u64) -> u64 {
        self.next_serial += count;
        self.next_serial - count
    }

    /// The place of the next operation in the order of submission.
    pub fn submitted(&mut self) -> Seq {
        self.next_seq += 2;
        self.next_seq
    }

    fn shadow(&mut self, region: usize, at: u64) -> Option<&mut Shadow> {
        self.regions.get_mut(region)?.shadows.get_mut(at as usize)
    }

    /// A change of a block goes out.
    pub fn begin(&mut self, process: ProcessId, region: usize, at: u64, seq: Seq, value: Value) {
        if let Some(region) = self.regions.get_mut(region) {
            region.touched = true;
            region.unsettled.insert(at);
        }
        if let Some(shadow) = self.shadow(region, at) {
            let fate = Fate::UnderWay;
            shadow.changes.push(Change { seq, value, process, fate, seen: false, late: false });
        }
    }

    /// It has ended: acknowledged, or with an unknown outcome.
    pub fn end(&mut self, region: usize, at: u64, seq: Seq, acknowledged: bool) {
        let change = self.shadow(region, at).and_then(|shadow| shadow.find(|change| change.seq == seq));
        if let Some(change) = change {
            change.fate = if acknowledged || change.seen { Fate::Done } else { Fate::GivenUp };
        }
    }

    /// Whatever a process had not heard of may still come.
    fn died(&mut self, process: ProcessId) {
        let shadows = self.regions.iter_mut().flat_map(|region| region.shadows.iter_mut());
        for change in shadows.flat_map(|shadow| shadow.changes.iter_mut()) {
            if change.process == process && change.fate == Fate::UnderWay {
                change.fate = if change.seen { Fate::Done } else { Fate::Orphan };
            }
        }
    }

    /// The owner has nothing under way in a region.
    pub fn settle(&mut self, process: ProcessId, region: usize) {
        let Some(region) = self.regions.get_mut(region) else { return };
        for at in std::mem::take(&mut region.unsettled) {
            if let Some(shadow) = region.shadows.get_mut(at as usize) {
                shadow.settle(process);
            }
        }
    }

    /// The owner has read a block, by an operation submitted at `seq`. The error says what is wrong.
    pub fn read(
        &mut self,
        process: ProcessId,
        region: usize,
        at: u64,
        seq: Seq,
        value: Value,
    ) -> Result<(), String> {
        let lenient = self.lenient;
        let Some(shadow) = self.shadow(region, at) else { return Ok(()) };
        let late = shadow.read(process, seq, value, lenient)?;
        if let Some(region) = self.regions.get_mut(region) {
            region.haunted |= late;
            region.unsettled.insert(at);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One block with its client, whose operations are numbered by when they are submitted.
    struct Block(Ledger, ProcessId);

    impl Block {
        fn new() -> Self {
            let mix = Mix { regions: vec![Kind::Pages], ..Mix::draw(1, 1) };
            let mut ledger = Ledger::new(&mix, 1, 1, false);
            let process = ledger.begin_process(0);
            Self(ledger, process)
        }
        fn submit(&mut self, value: Value) -> Seq {
            let seq = self.0.submitted();
            self.0.begin(self.1, 0, 0, seq, value);
            seq
        }
        fn write(&mut self, value: Value) {
            let seq = self.submit(value);
            self.0.end(0, 0, seq, true);
        }
        fn give_up(&mut self, value: Value) {
            let seq = self.submit(value);
            self.0.end(0, 0, seq, false);
        }
        fn read(&mut self, value: Value) -> bool {
            let seq = self.0.submitted();
            self.0.read(self.1, 0, 0, seq, value).is_ok()
        }
    }

    #[test]
    fn what_was_acknowledged_is_there_and_what_was_replaced_is_not() {
        let mut block = Block::new();
        block.write(5);
        block.write(6);
        assert!(block.read(6) && !block.read(5) && !block.read(0));
        block.0.settle(block.1, 0);
        assert!(block.read(6) && !block.read(5) && !block.read(0));
    }

    #[test]
    fn the_order_is_that_of_submission_whatever_completes_first() {
        let mut block = Block::new();
        block.write(5);
        let early = block.0.submitted();
        let change = block.submit(6);
        assert!(block.read(6), "performed before it, reported or not");
        block.0.end(0, 0, change, true);
        assert!(block.0.read(block.1, 0, 0, early, 6).is_err());
        assert!(block.0.read(block.1, 0, 0, early, 5).is_ok());
    }

    #[test]
    fn what_was_given_up_may_have_happened_but_not_behind_the_back_of_its_process() {
        for settled in [false, true] {
            let mut block = Block::new();
            block.give_up(5);
            if settled {
                block.0.settle(block.1, 0);
            }
            assert!(block.read(5) && !block.read(0), "it happens for good");
            block.give_up(6);
            assert!(block.read(5) && !block.read(6), "its process has read the block since");
            block.give_up(7);
            block.write(8);
            assert!(block.read(8) && !block.read(7), "or has changed it");
        }
    }

    #[test]
    fn what_a_dead_process_had_under_way_may_come_late_and_once() {
        let mut block = Block::new();
        block.submit(5);
        assert!(!block.read(0), "what is under way comes before what is submitted later");
        block.1 = block.0.begin_process(0);
        block.write(6);
        let early = block.0.submitted();
        assert!(block.read(6) && block.read(5) && !block.read(6));
        assert!(block.0.read(block.1, 0, 0, early, 5).is_ok(), "its answer came later than the others'");
        assert!(block.0.regions[0].haunted);
        block.write(7);
        assert!(block.read(7) && !block.read(5));
    }
}
