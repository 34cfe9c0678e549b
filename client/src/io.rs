//! Operations under way: acceptance, splitting, order, completion. `send` moves their parts to the peers,
//! `reply` takes the answers.

use crate::error::{IoError, SubmitError};
use crate::map::ClusterMap;
use crate::op::{ImageHandle, ImageInfo, IoDone, Op, Ticket};
use crate::options::{IMAGES_MAX, IN_FLIGHT_MAX, MAX_IO_BYTES, OPS_MAX, OpenMode, Options, PARTS_MAX};
use crate::order::OrderTable;
use crate::part::{IoKind, OpState, Part, PartState, object, pieces, split};
use crate::peer::Peers;
use crate::slab::{NIL, Slab};
use placement::pg_of;
use reactor::{Env, IoBuf, Mono};
use std::collections::VecDeque;
use wire::{BLOCK_BYTES, ImageId, OBJECT_BYTES, PoolId};

/// An open image.
pub(crate) struct ImageState {
    pub id: ImageId,
    pub pool: PoolId,
    pub pg_count: u32,
    pub size_bytes: u64,
    pub mode: OpenMode,
    /// Gone from the cluster, or going and not opened for that.
    pub removed: bool,
    /// The caller closed it; it goes with its last operation.
    closing: bool,
    /// Operations under way.
    outstanding: u32,
    /// Changes and flushes under way, in order of submission.
    head: u32,
    tail: u32,
}

/// Numbers since the client was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Parts sent, retries included.
    pub sent: u64,
    /// Parts that had to be sent again or later.
    pub retried: u64,
    /// Answers whose bytes did not match their checksums.
    pub corrupt: u64,
    /// Connections to data cores that ended.
    pub disconnects: u64,
}

pub(crate) struct Io {
    pub(crate) options: Options,
    pub(crate) ops: Slab<OpState>,
    pub(crate) parts: Slab<Part>,
    pub(crate) images: Slab<ImageState>,
    pub(crate) peers: Peers,
    order: OrderTable,
    /// Parts that may be sent.
    pub(crate) ready: VecDeque<u32>,
    /// Parts that wait for a time or a newer map.
    pub(crate) parked: Vec<u32>,
    pub(crate) in_flight: usize,
    /// When `tick` is wanted, at the latest.
    pub(crate) wake_at: Option<Mono>,
    /// Tries so far: makes request numbers unique.
    pub(crate) tries: u32,
    /// The origin of the last part: begins at the session, which is drawn at random, and counts.
    pub(crate) last_origin: u64,
    done: VecDeque<IoDone>,
    released: Vec<u32>,
    pub(crate) counters: Counters,
}

/// What an accepted operation does to which bytes.
struct Plan {
    image: u32,
    kind: IoKind,
    offset: u64,
    len: u64,
}

impl Io {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            options,
            ops: Slab::new(OPS_MAX),
            parts: Slab::new(PARTS_MAX),
            images: Slab::new(IMAGES_MAX),
            peers: Peers::default(),
            order: OrderTable::new(),
            ready: VecDeque::with_capacity(IN_FLIGHT_MAX),
            parked: Vec::new(),
            in_flight: 0,
            wake_at: None,
            tries: 0,
            last_origin: 0,
            done: VecDeque::with_capacity(IN_FLIGHT_MAX),
            released: Vec::with_capacity(IN_FLIGHT_MAX),
            counters: Counters::default(),
        }
    }

    /// Whether anything is accepted and not completed.
    pub(crate) fn is_busy(&self) -> bool {
        self.ops.len() > 0
    }

    /// The next completion.
    pub(crate) fn poll(&mut self) -> Option<IoDone> {
        let done = self.done.pop_front();
        if done.is_none() {
            // Back to its beginning: the next ones find memory that is in the cache.
            self.done.clear();
        }
        done
    }

    /// Whether `poll` has something.
    pub(crate) fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// Makes an image of the map usable.
    pub(crate) fn open(&mut self, map: &ClusterMap, id: ImageId, mode: OpenMode) -> Option<ImageHandle> {
        let image = map.image(id)?;
        let index = self.images.insert(ImageState {
            id,
            pool: image.pool,
            pg_count: map.pool(image.pool).map_or(0, |pool| pool.pg_count),
            size_bytes: image.size_bytes,
            mode,
            removed: false,
            closing: false,
            outstanding: 0,
            head: NIL,
            tail: NIL,
        })?;
        Some(ImageHandle(self.images.key(index)))
    }

    /// Takes no more operations for an image; those under way complete.
    pub(crate) fn close(&mut self, handle: ImageHandle) {
        let Some(index) = self.images.index_of(handle.0) else { return };
        if let Some(image) = self.images.get_mut(index) {
            image.closing = true;
            if image.outstanding == 0 {
                self.images.remove(index);
            }
        }
    }

    /// An open image as it is now.
    pub(crate) fn info(&self, handle: ImageHandle) -> Option<ImageInfo> {
        let image = self.images.get(self.images.index_of(handle.0)?)?;
        let (id, pool, size_bytes, removed) = (image.id, image.pool, image.size_bytes, image.removed);
        (!image.closing).then_some(ImageInfo { id, pool, size_bytes, removed })
    }

    fn plan(&self, handle: ImageHandle, op: &Op) -> Result<Plan, SubmitError> {
        let index = self.images.index_of(handle.0).ok_or(SubmitError::NotOpen)?;
        let image = self.images.get(index).filter(|image| !image.closing).ok_or(SubmitError::NotOpen)?;
        if image.removed {
            return Err(SubmitError::ImageRemoved);
        }
        let object_bytes = OBJECT_BYTES as u64;
        let (kind, offset, len) = match op {
            Op::Read { offset, buf } => (IoKind::Read, *offset, buf.len() as u64),
            Op::Write { offset, buf } => (IoKind::Write, *offset, buf.len() as u64),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len } => (IoKind::Zero, *offset, *len),
            Op::Flush => (IoKind::Flush, 0, 0),
            Op::DeleteObjects { first, count } => {
                (IoKind::Delete, first.saturating_mul(object_bytes), count.saturating_mul(object_bytes))
            }
        };
        let allowed = match kind {
            IoKind::Read | IoKind::Flush => true,
            IoKind::Write | IoKind::Zero => image.mode != OpenMode::ReadOnly,
            IoKind::Delete => image.mode == OpenMode::Removal,
        };
        if !allowed {
            return Err(SubmitError::NotAllowed);
        }
        if kind != IoKind::Flush {
            let block = BLOCK_BYTES as u64;
            if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
                return Err(SubmitError::Unaligned);
            }
            if len == 0 {
                return Err(SubmitError::Empty);
            }
            if len > MAX_IO_BYTES {
                return Err(SubmitError::TooLong);
            }
            // Objects behind the end are what a shrunk image leaves behind: removal may name them.
            let limit = if kind == IoKind::Delete { u64::MAX } else { image.size_bytes };
            if offset.checked_add(len).is_none_or(|end| end > limit) {
                return Err(SubmitError::OutOfRange { size_bytes: image.size_bytes });
            }
        }
        if matches!(op, Op::Read { buf, .. } if !buf.is_unique()) {
            return Err(SubmitError::BufferShared);
        }
        if self.ops.room() <= self.done.len() || self.parts.room() < pieces(offset, len) {
            return Err(SubmitError::Busy);
        }
        Ok(Plan { image: index, kind, offset, len })
    }

    /// Accepts an operation: splits it and takes its place in the order.
    pub(crate) fn submit(
        &mut self,
        now: Mono,
        handle: ImageHandle,
        op: Op,
        user: u64,
    ) -> Result<Ticket, (SubmitError, Op)> {
        let plan = match self.plan(handle, &op) {
            Ok(plan) => plan,
            Err(error) => return Err((error, op)),
        };
        let buf = match op {
            Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
            Op::Discard { .. } | Op::WriteZeroes { .. } | Op::Flush | Op::DeleteObjects { .. } => None,
        };
        Ok(self.accept(now, &plan, buf, user))
    }

    fn accept(&mut self, now: Mono, plan: &Plan, buf: Option<IoBuf>, user: u64) -> Ticket {
        let state = OpState {
            kind: plan.kind,
            image: plan.image,
            offset: plan.offset,
            buf,
            user,
            parts_left: 0,
            error: None,
            doomed: false,
            deadline: self.options.io_timeout_ms.map(|ms| now.plus_ms(ms)),
            prev: NIL,
            next: NIL,
        };
        // `plan` has seen that there is room.
        let Some(index) = self.ops.insert(state) else { return Ticket(0) };
        let ticket = Ticket(self.ops.key(index));
        if plan.kind != IoKind::Read {
            self.append(index, plan.image);
        }
        let Some(image) = self.images.get_mut(plan.image) else { return ticket };
        image.outstanding += 1;
        let (id, pool, pg_count) = (image.id, image.pool, image.pg_count);
        let mut count = 0;
        for piece in split(plan.offset, plan.len) {
            let object = object(pool, id, piece);
            let pg = pg_of(object, pg_count);
            // 0 is the origin of no change.
            self.last_origin = self.last_origin.wrapping_add(1).max(1);
            let blocks = (piece.block, piece.blocks);
            let part = Part::new(index, plan.kind, object, pg, blocks, self.last_origin);
            let Some(part) = self.parts.insert(part) else { break };
            count += 1;
            self.order.insert(&mut self.parts, part);
            self.start(part);
        }
        if let Some(op) = self.ops.get_mut(index) {
            op.parts_left = count;
        }
        if plan.kind == IoKind::Flush {
            self.complete_flushes(plan.image);
        }
        ticket
    }

    /// A new part is ready, or waits for those before it.
    fn start(&mut self, index: u32) {
        let Some(part) = self.parts.get_mut(index) else { return };
        #[cfg(feature = "planted")]
        if self.options.bug == Some(crate::planted::Bug::OverlapOrderIgnored) {
            part.waits = 0;
        }
        if part.waits == 0 {
            part.state = PartState::Ready;
            self.ready.push_back(index);
        } else {
            part.state = PartState::Blocked;
        }
    }

    /// Ends a part, which is in no queue and not in flight, and lets those go on that waited for it.
    pub(crate) fn finish(&mut self, index: u32, result: Result<(), IoError>) {
        let Some(op_index) = self.parts.get(index).map(|part| part.op) else { return };
        let mut released = std::mem::take(&mut self.released);
        self.order.remove(&mut self.parts, index, &mut released);
        for next in released.drain(..) {
            if let Some(part) = self.parts.get_mut(next) {
                part.state = PartState::Ready;
                self.ready.push_back(next);
            }
        }
        self.released = released;
        let Some(op) = self.ops.get_mut(op_index) else { return };
        op.parts_left = op.parts_left.saturating_sub(1);
        if let Err(error) = result {
            op.error = op.error.or(Some(error));
        }
        if op.parts_left == 0 {
            self.complete(op_index);
        }
    }

    /// Reports an operation, and the flushes that waited for nothing else.
    fn complete(&mut self, index: u32) {
        if let Some(image) = self.report(index) {
            self.complete_flushes(image);
        }
    }

    fn complete_flushes(&mut self, image: u32) {
        while let Some(head) = self.images.get(image).map(|image| image.head)
            && self.ops.get(head).is_some_and(|op| op.kind == IoKind::Flush)
        {
            self.report(head);
        }
    }

    fn report(&mut self, index: u32) -> Option<u32> {
        let ticket = Ticket(self.ops.key(index));
        if self.ops.get(index)?.kind != IoKind::Read {
            self.unlink(index);
        }
        let op = self.ops.remove(index)?;
        let result = op.error.map_or(Ok(()), Err);
        self.done.push_back(IoDone { ticket, user: op.user, result, buf: op.buf });
        if let Some(image) = self.images.get_mut(op.image) {
            image.outstanding = image.outstanding.saturating_sub(1);
            if image.closing && image.outstanding == 0 {
                self.images.remove(op.image);
                return None;
            }
        }
        Some(op.image)
    }

    fn append(&mut self, index: u32, image: u32) {
        let Some(image) = self.images.get_mut(image) else { return };
        let tail = image.tail;
        image.tail = index;
        match self.ops.get_mut(tail) {
            Some(last) => last.next = index,
            None => image.head = index,
        }
        if let Some(op) = self.ops.get_mut(index) {
            op.prev = tail;
        }
    }

    fn unlink(&mut self, index: u32) {
        let Some((before, behind, image)) = self.ops.get(index).map(|op| (op.prev, op.next, op.image)) else {
            return;
        };
        let Some(image) = self.images.get_mut(image) else { return };
        match self.ops.get_mut(before) {
            Some(op) => op.next = behind,
            None => image.head = behind,
        }
        match self.ops.get_mut(behind) {
            Some(op) => op.prev = before,
            None => image.tail = before,
        }
    }

    /// Compares open images with the map: sizes change, images vanish.
    pub(crate) fn images_changed(&mut self, env: &mut dyn Env, map: &ClusterMap) {
        for (_, image) in self.images.iter_mut() {
            match map.image(image.id) {
                Some(now) => {
                    image.size_bytes = now.size_bytes;
                    image.removed |= now.removing && image.mode != OpenMode::Removal;
                }
                None => image.removed = true,
            }
            if let Some(pool) = map.pool(image.pool) {
                image.pg_count = pool.pg_count;
            }
        }
        let removed: Vec<u32> =
            self.images.iter().filter(|(_, image)| image.removed).map(|(index, _)| index).collect();
        if !removed.is_empty() {
            let doomed: Vec<u32> =
                self.ops.iter().filter(|(_, op)| removed.contains(&op.image)).map(|(i, _)| i).collect();
            self.doom(env, &doomed, IoError::ImageRemoved, false);
        }
    }

    /// Ends operations whose time is over.
    pub(crate) fn expire(&mut self, env: &mut dyn Env, now: Mono) {
        if self.options.io_timeout_ms.is_none() {
            return;
        }
        let late = |op: &OpState| !op.doomed && op.deadline.is_some_and(|at| at <= now);
        if self.ops.iter().any(|(_, op)| late(op)) {
            let doomed: Vec<u32> = self.ops.iter().filter(|(_, op)| late(op)).map(|(i, _)| i).collect();
            self.doom(env, &doomed, IoError::TimedOut, true);
        }
    }

    /// Ends operations with an error. Parts that are not on their way end now. Those that are end with
    /// their answer or, with `abort`, with their connection: only once it is closed does the transport no
    /// longer touch the caller's memory.
    fn doom(&mut self, env: &mut dyn Env, doomed: &[u32], error: IoError, abort: bool) {
        for index in doomed {
            if let Some(op) = self.ops.get_mut(*index) {
                op.doomed = true;
                op.error = op.error.or(Some(error));
            }
        }
        let is_doomed = |ops: &Slab<OpState>, part: &Part| ops.get(part.op).is_some_and(|op| op.doomed);
        let mut ending = Vec::new();
        for (index, part) in self.parts.iter().filter(|(_, part)| is_doomed(&self.ops, part)) {
            match part.state {
                PartState::InFlight { .. } => {
                    if abort && let Some(peer) = self.peers.get_mut(part.peer) {
                        peer.close(env);
                    }
                }
                PartState::Blocked | PartState::Ready | PartState::Waiting | PartState::Parked { .. } => {
                    ending.push(index);
                }
            }
        }
        let (parts, ops) = (&self.parts, &self.ops);
        let goes = |index: &u32| parts.get(*index).is_none_or(|part| is_doomed(ops, part));
        self.ready.retain(|index| !goes(index));
        self.parked.retain(|index| !goes(index));
        for (_, peer) in self.peers.iter_mut() {
            peer.waiting.retain(|index| !goes(index));
        }
        for index in ending {
            // Those that another one's end has made ready meanwhile are in the queue again.
            self.ready.retain(|ready| *ready != index);
            self.finish(index, Err(error));
        }
        for index in doomed {
            let flush = self.ops.get(*index).is_some_and(|op| op.doomed && op.kind == IoKind::Flush);
            if flush {
                self.complete(*index);
            }
        }
    }
}
