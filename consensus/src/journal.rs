//! The durable memory of a voter: drives the region on the environment's disk.
//!
//! `append` queues records; `pump` writes all that is queued as one batch, one device write that is
//! durable when it completes, and one at a time; whoever appended learns from `Event::Durable`. Snapshots
//! go to the area that holds the older one: data first, then the head block. A snapshot received from the
//! leader is a barrier in the queue: records before it are written before, records behind it after.
//!
//! `journal_open` reads everything back.

use crate::blocks::{Geometry, Hard, Head, LOG_PAYLOAD_BYTES, Record, encode_batch};
use crate::bounds::{COMPACT_ENTRIES, COMPACT_RING_PARTS, IO_BYTES_MAX, RING_RESERVE_BLOCKS};
use crate::error::MetaError;
use crate::planted::{Bug, Planted};
use crate::recover::BatchAt;
use reactor::{DiskError, DiskIndex, DiskOp, Env, IoBuf, Token};
use std::collections::{BTreeMap, VecDeque};
use wire::BLOCK_BYTES;

/// What the journal reports.
#[derive(Debug)]
pub enum Event {
    /// Every record up to this sequence number is durable.
    Durable(u64),
    /// The snapshot up to this index is durable.
    Snapshot {
        /// Its last entry.
        index: u64,
        /// It came from the leader and stands for this sequence number.
        installed: Option<u64>,
    },
}

/// Where the region lies.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The disk.
    pub disk: DiskIndex,
    /// Start of the region in bytes.
    pub offset: u64,
    /// Token bits of the owner; the low 32 bits are ours.
    pub tokens: u64,
}

/// Numbers operations and keeps those that the environment had no room for.
#[derive(Debug)]
pub struct Ops {
    place: Place,
    next: u32,
    refused: VecDeque<(DiskOp, Token)>,
}

impl Ops {
    pub(crate) fn new(place: Place) -> Self {
        Self { place, next: 0, refused: VecDeque::new() }
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    fn submit(&mut self, env: &mut dyn Env, op: DiskOp) -> u64 {
        self.next = self.next.wrapping_add(1);
        let token = Token(self.place.tokens & !0xffff_ffff | u64::from(self.next));
        self.refused.push_back((op, token));
        self.retry(env);
        token.0
    }

    /// Submits what was refused, in order.
    pub(crate) fn retry(&mut self, env: &mut dyn Env) {
        while let Some((op, token)) = self.refused.pop_front() {
            if let Err((_, op)) = env.submit(self.place.disk, op, token) {
                self.refused.push_front((op, token));
                return;
            }
        }
    }

    /// Reads `len` bytes at `offset` of the region.
    pub(crate) fn read(&mut self, env: &mut dyn Env, offset: u64, len: usize) -> Result<u64, MetaError> {
        let buf = buffer(env, len)?;
        Ok(self.submit(env, DiskOp::Read { offset: self.place.offset + offset, buf }))
    }

    /// Writes `bytes` at `offset` of the region, durably.
    pub(crate) fn write(&mut self, env: &mut dyn Env, offset: u64, bytes: &[u8]) -> Result<u64, MetaError> {
        let mut buf = buffer(env, bytes.len())?;
        buf.as_mut_slice().ok_or(MetaError::NoBuffers)?.copy_from_slice(bytes);
        let op = DiskOp::Write { offset: self.place.offset + offset, bufs: vec![buf], durable: true };
        Ok(self.submit(env, op))
    }

    /// Makes durable what an earlier run may have left in the device's cache.
    pub(crate) fn flush(&mut self, env: &mut dyn Env) -> u64 {
        self.submit(env, DiskOp::Flush)
    }
}

fn buffer(env: &mut dyn Env, len: usize) -> Result<IoBuf, MetaError> {
    // The arena belongs to the data path: when it is exhausted, consensus must go on all the same.
    env.alloc(len).or_else(|_| IoBuf::heap(len)).map_err(|_| MetaError::NoBuffers)
}

/// A batch on its way to the device.
#[derive(Debug)]
struct Writing {
    ops: Vec<u64>,
    upto: u64,
}

#[derive(Debug)]
enum Queued {
    Record(Record),
    Install(Image),
}

/// A snapshot to be written.
#[derive(Debug)]
struct Image {
    index: u64,
    term: u64,
    bytes: Vec<u8>,
}

/// A snapshot being written.
#[derive(Debug)]
struct Saving {
    image: Image,
    crc: u32,
    area: usize,
    log_start: u64,
    batch_before: u64,
    installed: bool,
    upto: u64,
    written: usize,
    op: u64,
    head: bool,
}

/// Entries that Raft may still need, being written again so that what lies before them can be freed.
#[derive(Debug)]
struct Rewrite {
    first_seq: u64,
    last_seq: u64,
    /// First block, once known.
    at: Option<u64>,
}

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    pub(crate) ops: Ops,
    pub(crate) geometry: Geometry,
    pub(crate) log_id: u64,
    pub(crate) next_number: u64,
    pub(crate) next_batch: u64,
    pub(crate) log_start: u64,
    pub(crate) batches: VecDeque<BatchAt>,
    pub(crate) newest_area: usize,
    pub(crate) snapshot_index: u64,
    pub(crate) hard: Hard,
    pub(crate) planted: Planted,
    queue: VecDeque<(u64, Queued)>,
    next_seq: u64,
    writing: Option<Writing>,
    saving: Option<Saving>,
    entries_written: u64,
    needs_seal: bool,
    rewrite: Option<Rewrite>,
}

impl Journal {
    pub(crate) fn new(ops: Ops, geometry: Geometry, log_id: u64, planted: Planted) -> Self {
        Self {
            ops,
            geometry,
            log_id,
            next_number: 0,
            next_batch: 1,
            log_start: 0,
            batches: VecDeque::new(),
            newest_area: 1,
            snapshot_index: 0,
            hard: Hard::default(),
            planted,
            queue: VecDeque::new(),
            next_seq: 0,
            writing: None,
            saving: None,
            entries_written: 0,
            needs_seal: false,
            rewrite: None,
        }
    }

    /// Queues a record; the result is its sequence number.
    pub fn append(&mut self, mut record: Record) -> u64 {
        if let Record::Hard(hard) = &mut record {
            self.hard = self.hard.merge(*hard);
            if self.planted.has(Bug::VoteNotPersisted) {
                hard.vote = 0;
            }
        }
        self.push(Queued::Record(record))
    }

    fn push(&mut self, queued: Queued) -> u64 {
        self.next_seq += 1;
        self.queue.push_back((self.next_seq, queued));
        self.next_seq
    }

    /// Queues a snapshot that replaces the log: entries appended before it do not count any more.
    pub fn install(&mut self, index: u64, term: u64, bytes: Vec<u8>) -> Result<u64, MetaError> {
        self.check_size(&bytes)?;
        Ok(self.push(Queued::Install(Image { index, term, bytes })))
    }

    /// Starts to save a snapshot of applied state. Only when `may_save`.
    pub fn save(
        &mut self,
        env: &mut dyn Env,
        index: u64,
        term: u64,
        bytes: Vec<u8>,
    ) -> Result<(), MetaError> {
        self.check_size(&bytes)?;
        let (log_start, batch_before) = self.needed_from(index);
        self.start_saving(env, Image { index, term, bytes }, log_start, batch_before, None)
    }

    /// First block that a snapshot up to `index` would leave, and the batch before it.
    fn needed_from(&self, index: u64) -> (u64, u64) {
        match self.batches.iter().find(|batch| batch.max_index > index) {
            Some(batch) => (batch.first, batch.batch.saturating_sub(1)),
            None => (self.next_number, self.next_batch.saturating_sub(1)),
        }
    }

    /// Whether saving the same snapshot again would free a good part of the ring.
    pub fn would_free(&self, index: u64) -> bool {
        self.needed_from(index).0.saturating_sub(self.log_start) > self.geometry.ring_blocks / 4
    }

    /// Whether elections and entries that never committed fill the ring although nothing can be applied.
    pub fn wants_rewrite(&self) -> bool {
        self.rewrite.is_none() && self.is_crowded()
    }

    /// Writes again what is needed behind the snapshot; once it is durable, `would_free` sees the rest.
    pub fn rewrite(&mut self, records: impl Iterator<Item = Record>) -> u64 {
        let first_seq = self.next_seq + 1;
        self.append(Record::Hard(self.hard));
        for record in records {
            self.append(record);
        }
        self.rewrite = Some(Rewrite { first_seq, last_seq: self.next_seq, at: None });
        self.next_seq
    }

    fn rewritten(&mut self, upto: u64) {
        let Some(Rewrite { last_seq, at: Some(first), .. }) = self.rewrite else { return };
        if last_seq <= upto {
            self.rewrite = None;
            while self.batches.front().is_some_and(|batch| batch.first < first) {
                self.batches.pop_front();
            }
        }
    }

    fn check_size(&self, bytes: &[u8]) -> Result<(), MetaError> {
        let max = self.geometry.image_bytes_max();
        if bytes.len() as u64 > max {
            return Err(MetaError::SnapshotTooLarge { bytes: bytes.len() as u64, max });
        }
        Ok(())
    }

    fn start_saving(
        &mut self,
        env: &mut dyn Env,
        image: Image,
        log_start: u64,
        batch_before: u64,
        installs: Option<u64>,
    ) -> Result<(), MetaError> {
        let crc = crc32fast::hash(&image.bytes);
        let mut saving = Saving {
            image,
            crc,
            area: 1 - self.newest_area,
            log_start,
            batch_before,
            installed: installs.is_some(),
            upto: installs.unwrap_or(0),
            written: 0,
            op: 0,
            head: false,
        };
        self.save_next(env, &mut saving)?;
        self.saving = Some(saving);
        Ok(())
    }

    /// Writes the next piece of the snapshot, or its head behind the last.
    fn save_next(&mut self, env: &mut dyn Env, saving: &mut Saving) -> Result<(), MetaError> {
        let area = self.geometry.area_offset(saving.area);
        let rest = saving.image.bytes.get(saving.written..).unwrap_or(&[]);
        if rest.is_empty() {
            let head = Head {
                log_id: self.log_id,
                index: saving.image.index,
                term: saving.image.term,
                log_start: saving.log_start,
                batch_before: saving.batch_before,
                len: saving.image.bytes.len() as u64,
                crc: saving.crc,
                hard: self.hard,
            };
            saving.head = true;
            saving.op = self.ops.write(env, area, &head.encode())?;
            return Ok(());
        }
        let len = rest.len().min(IO_BYTES_MAX);
        let mut piece = rest.get(..len).unwrap_or(&[]).to_vec();
        piece.resize(len.div_ceil(BLOCK_BYTES) * BLOCK_BYTES, 0);
        let offset = area + (BLOCK_BYTES + saving.written) as u64;
        saving.written += len;
        saving.op = self.ops.write(env, offset, &piece)?;
        Ok(())
    }

    /// Whether a snapshot may be started.
    pub fn may_save(&self) -> bool {
        self.saving.is_none() && !self.queue.iter().any(|(_, queued)| matches!(queued, Queued::Install(_)))
    }

    /// Whether the log is long enough that a snapshot should be taken.
    pub fn wants_compaction(&self) -> bool {
        let used = self.next_number.saturating_sub(self.log_start);
        used > self.geometry.ring_blocks / COMPACT_RING_PARTS || self.entries_written > COMPACT_ENTRIES
    }

    /// Blocks in use, and those that what is queued will need.
    fn filled(&self) -> u64 {
        let used = self.next_number.saturating_sub(self.log_start);
        let queued: usize = self.queue.iter().map(|(_, q)| queued_len(q)).sum();
        used + queued.div_ceil(LOG_PAYLOAD_BYTES) as u64
    }

    /// Whether the ring is so full that a leader should take no more proposals.
    pub fn is_crowded(&self) -> bool {
        self.filled() > self.geometry.ring_blocks / 2
    }

    /// Whether entries of so many bytes may be received.
    pub fn has_room(&self, bytes: usize) -> bool {
        let needed = (bytes / LOG_PAYLOAD_BYTES) as u64 + 1;
        self.filled() + needed + RING_RESERVE_BLOCKS <= self.geometry.ring_blocks
    }

    /// Most bytes of uncommitted entries that every voter with such a ring has room for.
    pub fn uncommitted_max(&self) -> u64 {
        self.geometry.ring_blocks / 4 * LOG_PAYLOAD_BYTES as u64
    }

    /// Whether nothing is queued or being written, and the last batch has no seal behind it yet.
    pub fn wants_seal(&self) -> bool {
        self.needs_seal && self.writing.is_none() && self.queue.is_empty()
    }

    /// Starts the next write when none is in progress.
    pub fn pump(&mut self, env: &mut dyn Env) -> Result<(), MetaError> {
        self.ops.retry(env);
        if self.writing.is_some() {
            return Ok(());
        }
        if let Some((_, Queued::Install(_))) = self.queue.front() {
            if self.saving.is_some() {
                return Ok(()); // the area it would need is being written
            }
            if let Some((seq, Queued::Install(image))) = self.queue.pop_front() {
                let (start, before) = (self.next_number, self.next_batch.saturating_sub(1));
                return self.start_saving(env, image, start, before, Some(seq));
            }
        }
        if self.saving.as_ref().is_some_and(|saving| saving.installed) {
            return Ok(());
        }
        self.write_batch(env)
    }

    fn write_batch(&mut self, env: &mut dyn Env) -> Result<(), MetaError> {
        let used = self.next_number.saturating_sub(self.log_start);
        let room = self.geometry.ring_blocks.saturating_sub(used) as usize * LOG_PAYLOAD_BYTES;
        let mut payload = Vec::new();
        let mut batch = BatchAt { first: self.next_number, batch: self.next_batch, max_index: 0 };
        let mut upto = 0;
        let mut seal_only = true;
        while let Some((seq, Queued::Record(record))) = self.queue.front() {
            if let Some(rewrite) = &mut self.rewrite
                && rewrite.first_seq == *seq
            {
                if !payload.is_empty() {
                    break; // it starts a batch of its own: a snapshot will point there
                }
                rewrite.at = Some(self.next_number);
            }
            let len = payload.len() + record.encoded_len();
            if len > room || (!payload.is_empty() && len > IO_BYTES_MAX) {
                break;
            }
            if let Record::Entry { index, .. } = record {
                batch.max_index = batch.max_index.max(*index);
                self.entries_written += 1;
            }
            seal_only &= matches!(record, Record::Seal { .. });
            record.encode(&mut payload);
            upto = *seq;
            self.queue.pop_front();
        }
        if payload.is_empty() {
            return Ok(()); // nothing to do, or the ring is full until a snapshot is saved
        }
        let bytes = encode_batch(self.log_id, self.next_number, self.next_batch, &payload);
        let blocks = (bytes.len() / BLOCK_BYTES) as u64;
        let ops = self.write_ring(env, self.next_number, &bytes)?;
        self.next_number += blocks;
        self.next_batch += 1;
        self.batches.push_back(batch);
        self.needs_seal = !seal_only;
        self.writing = Some(Writing { ops, upto });
        Ok(())
    }

    /// Writes consecutive blocks from `number` on: one operation, two where the ring wraps.
    pub(crate) fn write_ring(
        &mut self,
        env: &mut dyn Env,
        number: u64,
        bytes: &[u8],
    ) -> Result<Vec<u64>, MetaError> {
        let place = number % self.geometry.ring_blocks.max(1);
        let before_end = (self.geometry.ring_blocks - place) as usize * BLOCK_BYTES;
        let (first, second) = bytes.split_at(before_end.min(bytes.len()));
        let mut ops = vec![self.ops.write(env, self.geometry.ring_offset(number), first)?];
        if !second.is_empty() {
            ops.push(self.ops.write(env, self.geometry.ring_offset(0), second)?);
        }
        Ok(ops)
    }

    /// Takes a completion.
    pub fn on_disk(
        &mut self,
        env: &mut dyn Env,
        token: Token,
        result: Result<(), DiskError>,
    ) -> Result<Option<Event>, MetaError> {
        result?;
        if let Some(writing) = &mut self.writing
            && let Some(at) = writing.ops.iter().position(|op| *op == token.0)
        {
            writing.ops.swap_remove(at);
            if !writing.ops.is_empty() {
                return Ok(None);
            }
            let upto = writing.upto;
            self.writing = None;
            self.rewritten(upto);
            return Ok(Some(Event::Durable(upto)));
        }
        match self.saving.take() {
            Some(saving) if saving.op == token.0 && saving.head => Ok(Some(self.saved(saving))),
            Some(mut saving) if saving.op == token.0 => {
                self.save_next(env, &mut saving)?;
                self.saving = Some(saving);
                Ok(None)
            }
            other => {
                self.saving = other;
                Ok(None)
            }
        }
    }

    fn saved(&mut self, saving: Saving) -> Event {
        self.newest_area = saving.area;
        self.log_start = saving.log_start;
        self.snapshot_index = saving.image.index;
        self.entries_written = 0;
        while self.batches.front().is_some_and(|batch| batch.first < saving.log_start) {
            self.batches.pop_front();
        }
        let installed = saving.installed.then_some(saving.upto);
        Event::Snapshot { index: saving.image.index, installed }
    }

    /// Blocks in use and in all.
    pub fn usage(&self) -> (u64, u64) {
        (self.next_number.saturating_sub(self.log_start), self.geometry.ring_blocks)
    }
}

fn queued_len(queued: &Queued) -> usize {
    match queued {
        Queued::Record(record) => record.encoded_len(),
        Queued::Install(_) => 0,
    }
}

/// Ring blocks by number while they are being read.
pub(crate) type Blocks = BTreeMap<u64, (crate::blocks::LogHead, Vec<u8>)>;
