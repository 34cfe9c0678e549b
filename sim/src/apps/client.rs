//! A client process of the second workload: it runs the programs of the regions it owns, and compares
//! everything it reads with the ledger.

use super::ledger::{ProcessId, Seq};
use super::page::{Page, Seen, look};
use super::program::{Action, LogAt, check_log, draw};
use super::{Kind, Mix};
use crate::options::Options;
use crate::workload::{Desk, Mode, image_name};
use client::{AdminDone, AdminTicket, ClientCore, ImageHandle, IoDone, IoError, Op, OpenMode};
use reactor::{Env, Event, IoBuf, Service, Token};
use simenv::rng::Stream;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use wire::BLOCK_BYTES;

/// The token of the timer; the client's own begin with another byte.
const WORK: Token = Token(0xad << 56);
/// Blocks read at a time when a region is looked at as a whole.
const LOOK_BLOCKS: u64 = 32;
/// A region that waits for its next program gets it at one tick of so many.
const STARTS_ONE_IN: u64 = 3;
/// Reads begin with this in their buffer, so that a reply that fills nothing is seen.
const POISON: u8 = 0xdd;

/// What an operation under way is.
#[derive(Clone, Copy, Debug)]
enum What {
    /// Pages with serial numbers from here on.
    Write(u64),
    Zero,
    Read,
    /// A read that will be written back.
    Modify,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    seq: Seq,
    region: usize,
    at: u64,
    blocks: u64,
    what: What,
}

/// A region as its owner works on it.
struct Task {
    kind: Kind,
    in_flight: usize,
    /// Whoever takes a region over reads all of it first: up to here.
    looked: u64,
    notes: Vec<Option<[u64; 2]>>,
    program: VecDeque<Action>,
    /// An operation failed: what is there has to be looked at before going on.
    broken: bool,
    log: LogAt,
    /// The present program is not the first.
    has_run: bool,
}

impl Task {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            in_flight: 0,
            looked: 0,
            notes: Vec::new(),
            program: VecDeque::new(),
            broken: false,
            log: LogAt::default(),
            has_run: false,
        }
    }

    fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.program.is_empty()
    }
}

/// A client process.
pub struct AppClient {
    core: ClientCore,
    desk: Rc<Desk>,
    options: Rc<Options>,
    mix: Mix,
    number: usize,
    process: ProcessId,
    rng: Stream,
    handles: Vec<Option<ImageHandle>>,
    opening: BTreeMap<AdminTicket, usize>,
    tasks: BTreeMap<usize, Task>,
    under_way: BTreeMap<u64, Flight>,
    next_user: u64,
    tick: bool,
    /// The final look at everything has begun.
    looking: bool,
}

impl AppClient {
    /// A client process of number `number`.
    pub fn new(
        number: usize,
        addrs: Vec<SocketAddr>,
        client_options: client::Options,
        options: Rc<Options>,
        mix: Mix,
        desk: Rc<Desk>,
        rng: Stream,
    ) -> Self {
        let process = desk.ledger.borrow_mut().begin_process(number);
        Self {
            core: ClientCore::new(addrs, client_options),
            handles: vec![None; options.images],
            desk,
            options,
            mix,
            number,
            process,
            rng,
            opening: BTreeMap::new(),
            tasks: BTreeMap::new(),
            under_way: BTreeMap::new(),
            next_user: 1,
            tick: false,
            looking: false,
        }
    }

    fn go(&mut self, env: &mut dyn Env) {
        self.open(env);
        while let Some(done) = self.core.poll() {
            self.done(done);
        }
        match self.desk.mode.get() {
            Mode::Work => self.work(env),
            Mode::Drain => self.tasks.values_mut().for_each(|task| task.program.clear()),
            Mode::ReadBack => self.read_back(env),
        }
        if let Some(busy) = self.desk.busy.borrow_mut().get_mut(self.number) {
            *busy = self.under_way.len();
        }
    }

    fn open(&mut self, env: &mut dyn Env) {
        while let Some(done) = self.core.poll_admin() {
            if let AdminDone::Opened { ticket, result } = done
                && let Some(image) = self.opening.remove(&ticket)
                && let Some(handle) = self.handles.get_mut(image)
            {
                *handle = result.ok();
            }
        }
        for image in 0..self.handles.len() {
            let missing = self.handles.get(image).is_some_and(Option::is_none);
            if missing && !self.opening.values().any(|other| *other == image) {
                let ticket = self.core.open(env, &image_name(image), OpenMode::ReadWrite);
                self.opening.insert(ticket, image);
            }
        }
    }

    /// The regions of this client.
    fn owned(&self) -> Vec<usize> {
        let ledger = self.desk.ledger.borrow();
        let mine = ledger.regions.iter().enumerate().filter(|(_, region)| region.owner == self.number);
        mine.map(|(at, _)| at).collect()
    }

    /// The image's handle and the region's place in it, when it is open and long enough.
    fn place(&self, region: usize) -> Option<(ImageHandle, usize, u64)> {
        let ledger = self.desk.ledger.borrow();
        let region = ledger.regions.get(region)?;
        let handle = self.handles.get(region.image).copied().flatten()?;
        let end = (region.first + region.blocks()) * BLOCK_BYTES as u64;
        (self.core.info(handle)?.size_bytes >= end).then_some((handle, region.image, region.first))
    }

    fn work(&mut self, env: &mut dyn Env) {
        let tick = std::mem::take(&mut self.tick);
        let owned = self.owned();
        self.tasks.retain(|region, _| owned.contains(region));
        for region in owned {
            let Some(kind) = self.desk.ledger.borrow().regions.get(region).map(|region| region.kind) else {
                continue;
            };
            let mut task = self.tasks.remove(&region).unwrap_or_else(|| Task::new(kind));
            if !self.look_on(env, region, &mut task) {
                self.tasks.insert(region, task);
                continue;
            }
            if task.is_idle() && tick && self.rng.below(STARTS_ONE_IN) == 0 {
                if task.has_run && self.hands_over(region) {
                    continue;
                }
                task.program = draw(kind, &self.mix, &mut task.log, &mut self.rng);
                task.has_run = true;
            }
            while task.in_flight < self.mix.depth && self.next(env, region, &mut task) {}
            self.tasks.insert(region, task);
        }
    }

    /// Gives the region to another client, or not.
    fn hands_over(&mut self, region: usize) -> bool {
        if !self.rng.chance(self.mix.hand_over_ppm) {
            return false;
        }
        let to = self.rng.below(self.options.clients as u64) as usize;
        if to == self.number {
            return false;
        }
        let mut ledger = self.desk.ledger.borrow_mut();
        ledger.handed += 1;
        if let Some(region) = ledger.regions.get_mut(region) {
            region.owner = to;
        }
        true
    }

    /// Goes on looking at the region as a whole; true when that is done.
    fn look_on(&mut self, env: &mut dyn Env, region: usize, task: &mut Task) -> bool {
        if task.broken && task.in_flight == 0 {
            *task = Task::new(task.kind);
        }
        let blocks = self.mix.region_blocks;
        if task.broken {
            return false;
        }
        if task.looked < blocks {
            // One read at a time: they are many and few are needed.
            if task.in_flight == 0 {
                let some = LOOK_BLOCKS.min(blocks - task.looked);
                self.start(env, region, task, Action::Read { at: task.looked, blocks: some });
            }
            return false;
        }
        true
    }

    /// Starts the program's next step; false when it has to wait.
    fn next(&mut self, env: &mut dyn Env, region: usize, task: &mut Task) -> bool {
        let Some(action) = task.program.front().copied() else { return false };
        if action == Action::Barrier {
            if task.in_flight > 0 {
                return false;
            }
            task.program.pop_front();
            return true;
        }
        let started = self.start(env, region, task, action);
        if started {
            task.program.pop_front();
        }
        started
    }

    fn start(&mut self, env: &mut dyn Env, region: usize, task: &mut Task, action: Action) -> bool {
        let Some((handle, image, first)) = self.place(region) else { return false };
        let offset = |at: u64| (first + at) * BLOCK_BYTES as u64;
        let len = |blocks: u64| blocks * BLOCK_BYTES as u64;
        let (op, at, blocks, what) = match action {
            Action::Write { at, blocks, note } => {
                let Ok(mut buf) = env.alloc(len(blocks) as usize) else { return false };
                let serial = self.desk.ledger.borrow_mut().serials(blocks);
                let Some(bytes) = buf.as_mut_slice() else { return false };
                for (nth, bytes) in (0u64..).zip(bytes.chunks_mut(BLOCK_BYTES)) {
                    let note = [note[0], note[1] + nth];
                    let block = first + at + nth;
                    Page { serial: serial + nth, image: image as u64, block, note }.write(bytes);
                }
                (Op::Write { offset: offset(at), buf }, at, blocks, What::Write(serial))
            }
            Action::Zero { at, blocks, discard } => {
                let (offset, len) = (offset(at), len(blocks));
                let op = if discard { Op::Discard { offset, len } } else { Op::WriteZeroes { offset, len } };
                (op, at, blocks, What::Zero)
            }
            Action::Read { at, blocks } | Action::Modify { at, blocks } => {
                let Ok(mut buf) = env.alloc(len(blocks) as usize) else { return false };
                if let Some(bytes) = buf.as_mut_slice() {
                    bytes.fill(POISON);
                }
                let what = if matches!(action, Action::Read { .. }) { What::Read } else { What::Modify };
                (Op::Read { offset: offset(at), buf }, at, blocks, what)
            }
            Action::Flush => (Op::Flush, 0, 0, What::Flush),
            Action::Barrier => return false,
        };
        let user = self.next_user;
        if self.core.submit(env, handle, op, user).is_err() {
            return false;
        }
        self.next_user += 1;
        task.in_flight += 1;
        let seq = self.desk.ledger.borrow_mut().submitted();
        let flight = Flight { seq, region, at, blocks, what };
        self.under_way.insert(user, flight);
        self.begin(&flight);
        true
    }

    fn begin(&self, flight: &Flight) {
        let mut ledger = self.desk.ledger.borrow_mut();
        for nth in 0..flight.blocks {
            match flight.what {
                What::Write(serial) => {
                    ledger.begin(self.process, flight.region, flight.at + nth, flight.seq, serial + nth);
                }
                What::Zero => ledger.begin(self.process, flight.region, flight.at + nth, flight.seq, 0),
                What::Read | What::Modify | What::Flush => {}
            }
        }
    }

    fn done(&mut self, done: IoDone) {
        let Some(flight) = self.under_way.remove(&done.user) else { return };
        match done.result {
            Ok(()) => self.succeeded(&flight, done.buf.as_ref()),
            Err(error) => self.failed(&flight, error),
        }
        if let Some(task) = self.tasks.get_mut(&flight.region) {
            task.in_flight = task.in_flight.saturating_sub(1);
            if task.in_flight == 0 {
                self.desk.ledger.borrow_mut().settle(self.process, flight.region);
            }
        }
    }

    fn succeeded(&mut self, flight: &Flight, buf: Option<&IoBuf>) {
        match flight.what {
            What::Flush => {}
            What::Write(_) | What::Zero => {
                let mut ledger = self.desk.ledger.borrow_mut();
                ledger.acked += 1;
                for nth in 0..flight.blocks {
                    ledger.end(flight.region, flight.at + nth, flight.seq, true);
                }
            }
            What::Read | What::Modify => {
                let Some(buf) = buf else { return };
                let notes = self.compare(flight, buf.as_slice());
                let Some(task) = self.tasks.get_mut(&flight.region) else { return };
                if matches!(flight.what, What::Modify) {
                    let note = notes.first().copied().flatten().unwrap_or_default();
                    let note = [note[0], note[1] + 1];
                    task.program.push_front(Action::Write { at: flight.at, blocks: flight.blocks, note });
                } else if task.looked == flight.at && task.looked < self.mix.region_blocks {
                    task.looked += flight.blocks;
                    task.notes.extend(notes);
                    if task.looked >= self.mix.region_blocks {
                        self.open_log(flight.region);
                    }
                }
            }
        }
    }

    /// The whole region was read: what a log's head says must be there, whatever the ledger thinks.
    fn open_log(&mut self, region: usize) {
        let Some(task) = self.tasks.get_mut(&region).filter(|task| task.kind == Kind::Log) else { return };
        let notes = std::mem::take(&mut task.notes);
        let checked = check_log(&notes);
        let mut ledger = self.desk.ledger.borrow_mut();
        ledger.logs += 1;
        match checked {
            Ok(log) => task.log = log,
            // A dead process's write that came late is one that no head counts.
            Err(_) if ledger.regions.get(region).is_some_and(|region| region.haunted) => {}
            Err(why) => self
                .desk
                .history
                .borrow_mut()
                .violations
                .push(format!("apps: client {} opens the log of region {region}: {why}", self.number)),
        }
    }

    /// Compares what was read with the ledger; what the pages say.
    fn compare(&self, flight: &Flight, bytes: &[u8]) -> Vec<Option<[u64; 2]>> {
        let mut ledger = self.desk.ledger.borrow_mut();
        ledger.reads += 1;
        let mut notes = Vec::new();
        for (at, bytes) in (flight.at..).zip(bytes.chunks(BLOCK_BYTES)) {
            let place =
                ledger.regions.get(flight.region).map(|region| (region.image as u64, region.first + at));
            let seen = look(bytes);
            let wrong = match seen {
                Seen::Zeroes => ledger.read(self.process, flight.region, at, flight.seq, 0).err(),
                Seen::Page(page) if place == Some((page.image, page.block)) => {
                    ledger.read(self.process, flight.region, at, flight.seq, page.serial).err()
                }
                Seen::Page(_) => Some("holds the page of another place".to_owned()),
                Seen::Garbage => Some(format!("holds no page: {:02x?}", bytes.get(..24).unwrap_or(&[]))),
            };
            notes.push(if let Seen::Page(page) = seen { Some(page.note) } else { None });
            if let Some(wrong) = wrong {
                let (image, block) = place.unwrap_or_default();
                self.desk.history.borrow_mut().violations.push(format!(
                    "apps: at {} client {} (process {}) reads image {image} block {block}, which {wrong}",
                    simenv::trace::stamp(self.desk.now.get()),
                    self.number,
                    self.process,
                ));
            }
        }
        notes
    }

    fn failed(&mut self, flight: &Flight, error: IoError) {
        self.desk.history.borrow_mut().unknown(&error.to_string());
        let mut ledger = self.desk.ledger.borrow_mut();
        for nth in 0..flight.blocks {
            if matches!(flight.what, What::Write(_) | What::Zero) {
                ledger.end(flight.region, flight.at + nth, flight.seq, false);
            }
        }
        let legal = match error {
            IoError::TimedOut => true,
            IoError::Device | IoError::Corrupt => self.desk.tolerate.media && !self.looking,
            IoError::NoSpace => self.desk.tolerate.no_space,
            _ => false,
        };
        if !legal {
            self.desk.history.borrow_mut().violations.push(format!(
                "apps: client {}'s {:?} of region {} at {}+{} failed: {error}",
                self.number, flight.what, flight.region, flight.at, flight.blocks
            ));
        }
        if let Some(task) = self.tasks.get_mut(&flight.region) {
            // What comes after depends on it.
            task.program.clear();
            task.broken = true;
        }
    }

    /// Looks at every region once more, whole.
    fn read_back(&mut self, env: &mut dyn Env) {
        let owned = self.owned();
        if !self.looking {
            self.looking = true;
            self.tasks.clear();
        }
        let mut all = true;
        for region in owned {
            let Some((kind, touched)) =
                self.desk.ledger.borrow().regions.get(region).map(|region| (region.kind, region.touched))
            else {
                continue;
            };
            let mut task = self.tasks.remove(&region).unwrap_or_else(|| Task::new(kind));
            // A part by which the image has not grown in time.
            if touched || self.place(region).is_some() {
                all &= self.look_on(env, region, &mut task);
            }
            self.tasks.insert(region, task);
        }
        let all = all && self.handles.iter().all(Option::is_some);
        if let Some(done) = self.desk.read_back.borrow_mut().get_mut(self.number) {
            *done = all;
        }
    }
}

impl Service for AppClient {
    fn start(&mut self, env: &mut dyn Env) {
        self.core.start(env);
        env.set_timer(env.now(), WORK);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { token: WORK } => {
                self.tick = true;
                let pause = self.rng.latency(self.options.think_ns);
                env.set_timer(env.now().plus_ns(pause), WORK);
            }
            event => self.core.event(env, event),
        }
    }

    fn flush(&mut self, env: &mut dyn Env) {
        self.core.flush(env);
        self.go(env);
    }
}
