//! Client processes: `ClientCore` driven by a generator of operations, everything recorded in the history.

use crate::apps::ledger::Ledger;
use crate::check::history::{History, Pending, Place, fill};
use crate::meta;
use crate::options::Options;
use client::{ClientCore, ImageHandle, IoDone, IoError, Op, OpenMode};
use reactor::{Env, Event, IoBuf, Service, Token};
use simenv::clock::Nanos;
use simenv::rng::Stream;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use wire::BLOCK_BYTES;

/// What the clients are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Operate at random.
    Work,
    /// Start nothing new.
    Drain,
    /// Read every block of the image once.
    ReadBack,
}

/// What clients and harness share.
pub struct Desk {
    /// What clients did.
    pub history: RefCell<History>,
    /// What they are to do.
    pub mode: Cell<Mode>,
    /// Virtual time, set by the harness before every step.
    pub now: Cell<Nanos>,
    /// Per client number: operations under way.
    pub busy: RefCell<Vec<usize>>,
    /// Per client number: the whole image was read back.
    pub read_back: RefCell<Vec<bool>>,
    /// Errors other than timeouts are legal now (damage was injected, or space may run out).
    pub tolerate: Tolerance,
    /// More is broken than redundancy survives: the two below are kept.
    pub beyond: bool,
    /// Operations under way, by client number and its own count.
    pub open_ops: RefCell<BTreeMap<(usize, u64), (Place, u64)>>,
    /// The second workload's expectations.
    pub ledger: RefCell<Ledger>,
    /// What clients of the metadata store did.
    pub meta: RefCell<meta::history::History>,
    /// Ranges of the read-back that could not be read, and why.
    pub unread: RefCell<Vec<(Place, u64, IoError)>>,
}

/// Which errors the options make legal.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// Media errors: the only good copy may be out of reach.
    pub media: bool,
    /// No space left.
    pub no_space: bool,
}

/// The token of the generator's timer; the client's own begin with another byte.
const WORK: Token = Token(0xaa << 56);
/// Blocks read by one operation of the final read-back.
const READ_BACK_BLOCKS: u64 = 32;
/// Operations of the read-back under way.
const READ_BACK_DEPTH: usize = 4;
/// Reads begin with this in their buffer, so that a reply that fills nothing is seen.
const POISON: u8 = 0xee;
/// The few blocks that hot operations hit.
const HOT_BLOCKS: u64 = 6;

/// A client process.
pub struct WorkClient {
    core: ClientCore,
    desk: Rc<Desk>,
    options: Rc<Options>,
    number: usize,
    image: usize,
    rng: Stream,
    handle: Option<ImageHandle>,
    opening: bool,
    under_way: BTreeMap<u64, Pending>,
    next_user: u64,
    cursor: u64,
    /// Ranges to read once more.
    again: Vec<(u64, u64)>,
    /// Operations to start now.
    burst: u64,
    flushes: usize,
}

/// The name of an image of the workload.
pub fn image_name(image: usize) -> String {
    format!("image-{image}")
}

impl WorkClient {
    /// A client process of number `number`.
    pub fn new(
        number: usize,
        addrs: Vec<SocketAddr>,
        client_options: client::Options,
        options: Rc<Options>,
        desk: Rc<Desk>,
        rng: Stream,
    ) -> Self {
        Self {
            core: ClientCore::new(addrs, client_options),
            image: number % options.images,
            desk,
            options,
            number,
            rng,
            handle: None,
            opening: false,
            under_way: BTreeMap::new(),
            next_user: 1,
            cursor: 0,
            again: Vec::new(),
            burst: 0,
            flushes: 0,
        }
    }

    fn go(&mut self, env: &mut dyn Env) {
        self.admin(env);
        while let Some(done) = self.core.poll() {
            self.done(done);
        }
        match self.desk.mode.get() {
            Mode::Work => {
                // A burst, so that operations overlap, and then a pause: what matters is how they meet faults
                // and each other, not how many there are.
                for _ in 0..std::mem::take(&mut self.burst) {
                    if self.under_way.len() + self.flushes >= self.options.depth {
                        break;
                    }
                    self.random_op(env);
                }
            }
            Mode::Drain => {}
            Mode::ReadBack => while self.under_way.len() < READ_BACK_DEPTH && self.read_next(env) {},
        }
        let mut busy = self.desk.busy.borrow_mut();
        if let Some(busy) = busy.get_mut(self.number) {
            *busy = self.under_way.len() + self.flushes;
        }
    }

    fn admin(&mut self, env: &mut dyn Env) {
        while let Some(done) = self.core.poll_admin() {
            if let client::AdminDone::Opened { result, .. } = done {
                self.opening = false;
                self.handle = result.ok();
            }
        }
        if self.handle.is_none() && !self.opening {
            self.opening = true;
            self.core.open(env, &image_name(self.image), OpenMode::ReadWrite);
        }
    }

    fn blocks(&self) -> u64 {
        self.options.image_bytes / BLOCK_BYTES as u64
    }

    fn draw_range(&mut self) -> (Place, u64) {
        let total = self.blocks();
        let hot = self.rng.chance(self.options.hot_ppm);
        let first = self.rng.below(if hot { HOT_BLOCKS.min(total) } else { total });
        let max = self.options.op_blocks_max.min(total - first);
        let blocks = if self.rng.coin() { 1 } else { self.rng.between(1, max) };
        (Place { image: self.image, block: first }, blocks)
    }

    fn random_op(&mut self, env: &mut dyn Env) {
        let Some(handle) = self.handle else { return };
        if self.rng.chance(20_000) {
            if self.core.submit(env, handle, Op::Flush, 0).is_ok() {
                self.flushes += 1;
            }
            return;
        }
        let (first, blocks) = self.draw_range();
        let now = self.desk.now.get();
        let len = blocks as usize * BLOCK_BYTES;
        let offset = first.block * BLOCK_BYTES as u64;
        let user = self.next_user;
        let (op, pending) = if self.rng.chance(self.options.read_ppm) {
            let Some(buf) = poisoned(env, len) else { return };
            let pending = self.desk.history.borrow_mut().begin_read(self.number, now, first, blocks);
            (Op::Read { offset, buf }, pending)
        } else if self.rng.chance(self.options.zero_ppm) {
            let pending = self.desk.history.borrow_mut().begin_zero(self.number, now, first, blocks);
            let len = len as u64;
            let op =
                if self.rng.coin() { Op::Discard { offset, len } } else { Op::WriteZeroes { offset, len } };
            (op, pending)
        } else {
            let Ok(mut buf) = env.alloc(len) else { return };
            let pending = self.desk.history.borrow_mut().begin_write(self.number, now, first, blocks);
            fill_all(&mut buf, first, pending.value.unwrap_or(0));
            (Op::Write { offset, buf }, pending)
        };
        self.next_user += 1;
        // A refused operation stays in the history as one of unknown outcome: harmless, it is never seen.
        if self.core.submit(env, handle, op, user).is_ok() {
            self.began(user, pending);
        }
    }

    fn began(&mut self, user: u64, pending: Pending) {
        if self.desk.beyond {
            let range = (pending.first, pending.blocks);
            self.desk.open_ops.borrow_mut().insert((self.number, user), range);
        }
        self.under_way.insert(user, pending);
    }

    /// Starts the next read of the read-back; false when there is none.
    fn read_next(&mut self, env: &mut dyn Env) -> bool {
        let Some(handle) = self.handle else { return false };
        let left = self.blocks().saturating_sub(self.cursor);
        let again = self.again.pop();
        if left == 0 && again.is_none() {
            if self.under_way.is_empty()
                && let Some(done) = self.desk.read_back.borrow_mut().get_mut(self.number)
            {
                *done = true;
            }
            return false;
        }
        let (block, blocks) = again.unwrap_or((self.cursor, left.min(READ_BACK_BLOCKS)));
        let first = Place { image: self.image, block };
        let Some(buf) = poisoned(env, blocks as usize * BLOCK_BYTES) else {
            self.again.extend(again);
            return false;
        };
        let pending =
            self.desk.history.borrow_mut().begin_read(self.number, self.desk.now.get(), first, blocks);
        let user = self.next_user;
        self.next_user += 1;
        let op = Op::Read { offset: block * BLOCK_BYTES as u64, buf };
        if self.core.submit(env, handle, op, user).is_err() {
            self.again.extend(again);
            return false;
        }
        self.began(user, pending);
        if again.is_none() {
            self.cursor += blocks;
        }
        true
    }

    fn done(&mut self, done: IoDone) {
        let reading_back = self.desk.mode.get() == Mode::ReadBack;
        let mut history = self.desk.history.borrow_mut();
        let Some(pending) = self.under_way.remove(&done.user) else {
            self.flushes = self.flushes.saturating_sub(1);
            return;
        };
        if self.desk.beyond {
            self.desk.open_ops.borrow_mut().remove(&(self.number, done.user));
        }
        match (done.result, done.buf) {
            (Ok(()), Some(buf)) if pending.value.is_none() => history.read_done(&pending, buf.as_slice()),
            (Ok(()), _) => history.change_done(&pending),
            (Err(error), _) => {
                history.unknown(&error.to_string());
                let legal = match error {
                    IoError::TimedOut => true,
                    IoError::Device | IoError::Corrupt => self.desk.tolerate.media,
                    IoError::NoSpace => self.desk.tolerate.no_space,
                    _ => false,
                };
                if reading_back && self.desk.beyond {
                    self.desk.unread.borrow_mut().push((pending.first, pending.blocks, error));
                } else if reading_back && error == IoError::TimedOut {
                    // A slow disk and an impatient client: read it again.
                    self.again.push((pending.first.block, pending.blocks));
                } else if !legal || reading_back {
                    history.violations.push(format!(
                        "error: client {}'s operation of {} on {}+{} failed: {error}",
                        self.number,
                        simenv::trace::stamp(pending.at),
                        pending.first,
                        pending.blocks
                    ));
                }
            }
        }
    }
}

fn poisoned(env: &dyn Env, len: usize) -> Option<IoBuf> {
    let mut buf = env.alloc(len).ok()?;
    buf.as_mut_slice()?.fill(POISON);
    Some(buf)
}

fn fill_all(buf: &mut IoBuf, first: Place, value: u64) {
    let Some(bytes) = buf.as_mut_slice() else { return };
    for (nth, block) in bytes.chunks_mut(BLOCK_BYTES).enumerate() {
        fill(value + nth as u64, Place { image: first.image, block: first.block + nth as u64 }, block);
    }
}

impl Service for WorkClient {
    fn start(&mut self, env: &mut dyn Env) {
        self.core.start(env);
        env.set_timer(env.now(), WORK);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { token: WORK } => {
                self.burst = self.rng.between(1, self.options.depth as u64);
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
