//! The client: first it fills every block once, then it keeps some operations under way until `count` are
//! done.

use crate::PG;
use reactor::{ConnId, Env, Event, Frame, Framing, IoBuf, Service};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use wire::control::{Hello, Role};
use wire::{
    BLOCK_BYTES, BlockCrcs, Epoch, FrameKind, Header, ImageId, OBJECT_BLOCKS, ObjectId, SessionId, Status,
    block_crc,
};

/// Operations under way: enough that commits are shared, as at depth 128 of a benchmark with three cores.
const DEPTH: u64 = 32;
/// Objects in use: their pages fit the cache, and no block is in use twice at a time.
const OBJECTS: u64 = 16;
const BLOCKS: u64 = OBJECTS * OBJECT_BLOCKS as u64;

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Writes of 4 KiB.
    Write,
    /// Reads of 4 KiB.
    Read,
}

/// How far it is.
#[derive(Default)]
pub struct Progress {
    /// Operations of the counted kind that are done.
    pub done: u64,
    /// One failed.
    pub failed: bool,
}

/// The client.
pub struct Client {
    to: SocketAddr,
    conn: ConnId,
    work: Work,
    count: u64,
    sent: u64,
    answered: u64,
    data: Option<IoBuf>,
    progress: Rc<RefCell<Progress>>,
}

impl Client {
    /// A client of the primary at `to`, and where to see how far it is.
    pub fn new(to: SocketAddr, work: Work, count: u64) -> (Self, Rc<RefCell<Progress>>) {
        let progress = Rc::new(RefCell::new(Progress::default()));
        let own = progress.clone();
        (Self { to, conn: ConnId(0), work, count, sent: 0, answered: 0, data: None, progress: own }, progress)
    }

    fn hello(&mut self, env: &mut dyn Env) -> Option<()> {
        let hello =
            Hello { cluster: None, role: Role::Client, session: SessionId(99), incarnation: 1, refused: 0 };
        let bytes = hello.encode();
        let mut header = Header::new(FrameKind::Hello, 0);
        header.payload_len = bytes.len() as u32;
        let payload = IoBuf::copy_of(&bytes).ok()?;
        let frame = Frame { header, crcs: BlockCrcs::one(block_crc(&bytes)), payload: Some(payload) };
        env.send(self.conn, frame).ok()
    }

    /// The next operation: a prime step through the blocks, so that neighbours in time are none in place.
    fn next(&mut self, env: &mut dyn Env) -> Option<()> {
        let filling = self.sent < BLOCKS;
        let block = if filling { self.sent } else { self.sent * 97 % BLOCKS };
        let write = filling || self.work == Work::Write;
        let mut header = Header::new(if write { FrameKind::Write } else { FrameKind::Read }, self.sent + 1);
        header.pg = PG;
        header.epoch = Epoch(1);
        header.object = ObjectId { pool: PG.pool, image: ImageId(1), index: block / OBJECT_BLOCKS as u64 };
        header.block = (block % OBJECT_BLOCKS as u64) as u32;
        header.blocks = 1;
        let frame = if write {
            header.payload_len = BLOCK_BYTES as u32;
            if self.data.is_none() {
                let mut data = env.alloc(BLOCK_BYTES).ok()?;
                data.as_mut_slice()?.fill(0x5a);
                self.data = Some(data);
            }
            let payload = self.data.clone()?;
            Frame { header, crcs: BlockCrcs::of(payload.as_slice()), payload: Some(payload) }
        } else {
            Frame { header, crcs: BlockCrcs::default(), payload: None }
        };
        env.send(self.conn, frame).ok()?;
        self.sent += 1;
        Some(())
    }

    fn pump(&mut self, env: &mut dyn Env) {
        // Reads begin when everything is there to be read.
        let all = if self.answered < BLOCKS { BLOCKS } else { BLOCKS + self.count };
        while self.sent < all && self.sent - self.answered < DEPTH {
            if self.next(env).is_none() {
                self.progress.borrow_mut().failed = true;
                return;
            }
        }
    }
}

impl Service for Client {
    fn start(&mut self, env: &mut dyn Env) {
        self.conn = env.connect(self.to, Framing::Frames);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Connected { .. } => {
                let greeted = self.hello(env).is_some();
                self.progress.borrow_mut().failed |= !greeted;
            }
            Event::Frame { frame, .. } if frame.header.kind == FrameKind::Hello => self.pump(env),
            Event::Frame { frame, .. } => {
                self.answered += 1;
                let mut progress = self.progress.borrow_mut();
                progress.done = self.answered.saturating_sub(BLOCKS);
                progress.failed |= frame.header.status != Status::Ok;
                drop(progress);
                self.pump(env);
            }
            Event::Closed { .. } => self.progress.borrow_mut().failed = true,
            _ => {}
        }
    }

    fn flush(&mut self, _: &mut dyn Env) {}
}
