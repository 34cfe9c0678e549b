//! Opening the journal: reads the whole region (superblocks, snapshot heads, ring, then the newest
//! snapshot), decides what counts, erases what a torn write left, and flushes the device, because an
//! earlier run's last write may sit in its cache and everything read is from now on treated as durable.

use crate::blocks::{Geometry, Head, SUPER_BLOCKS, Super, VERSION, decode_log_block};
use crate::bounds::{IO_BYTES_MAX, REGION_BYTES_MIN};
use crate::error::MetaError;
use crate::journal::{Blocks, Journal, Ops, Place};
use crate::planted::Planted;
use crate::recover::{Log, recover};
use reactor::{DiskError, DiskOp, Env, Token};
use wire::{BLOCK_BYTES, ClusterId, NodeId};

/// What the journal remembered.
#[derive(Debug)]
pub struct Recovered {
    /// The newest snapshot: index, term and image bytes.
    pub snapshot: Option<(u64, u64, Vec<u8>)>,
    /// The log behind it.
    pub log: Log,
    /// The voters the group was created with, before any change; none for a node that joined later.
    pub founders: Vec<NodeId>,
}

/// Who is opening.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The voter.
    pub node: NodeId,
    /// The group's founders, when this node is one of them and the region is blank; else none.
    pub voters: Vec<NodeId>,
}

#[derive(Debug)]
enum Step {
    Supers,
    Head(usize),
    Ring(u64),
    /// The region is blank and stays so until somebody wants this node.
    Blank,
    Format(u8),
    Image {
        head: Head,
        area: usize,
        done: usize,
    },
    Erase,
    Flush,
}

/// A journal being opened.
#[derive(Debug)]
pub struct Opening {
    ops: Ops,
    who: Identity,
    geometry: Geometry,
    planted: Planted,
    step: Step,
    waiting: Vec<u64>,
    supers: Vec<Option<Super>>,
    blank: bool,
    heads: Vec<Option<Head>>,
    found: Blocks,
    image: Vec<u8>,
    journal: Option<Journal>,
    recovered: Option<Recovered>,
}

/// How far opening is.
pub enum Progress {
    /// Go on.
    Busy(Box<Opening>),
    /// The region is blank, and this node is no founder: `format` goes on.
    Blank(Box<Opening>),
    /// Done.
    Open(Box<Journal>, Recovered),
}

impl Opening {
    /// Starts to read.
    pub fn start(
        env: &mut dyn Env,
        place: Place,
        len_bytes: u64,
        who: Identity,
        planted: Planted,
    ) -> Result<Self, MetaError> {
        let block = BLOCK_BYTES as u64;
        let info = env.disk_info(place.disk).ok_or(MetaError::Config("no such disk"))?;
        if len_bytes < REGION_BYTES_MIN || !place.offset.is_multiple_of(block) {
            return Err(MetaError::Config("the metadata region is too small or not aligned to 4096 bytes"));
        }
        if place.offset.checked_add(len_bytes).is_none_or(|end| end > info.size_bytes) {
            return Err(MetaError::Config("the metadata region lies outside the disk"));
        }
        let mut ops = Ops::new(place);
        let first = ops.read(env, 0, SUPER_BLOCKS as usize * BLOCK_BYTES)?;
        Ok(Self {
            ops,
            who,
            geometry: Geometry::of_region(len_bytes),
            planted,
            step: Step::Supers,
            waiting: vec![first],
            supers: Vec::new(),
            blank: true,
            heads: Vec::new(),
            found: Blocks::new(),
            image: Vec::new(),
            journal: None,
            recovered: None,
        })
    }

    /// Submits what was refused.
    pub fn retry(&mut self, env: &mut dyn Env) {
        self.ops.retry(env);
        if let Some(journal) = &mut self.journal {
            journal.ops.retry(env);
        }
    }

    /// Takes a completion.
    pub fn on_disk(
        mut self: Box<Self>,
        env: &mut dyn Env,
        token: Token,
        result: Result<(), DiskError>,
        op: &DiskOp,
    ) -> Result<Progress, MetaError> {
        let Some(at) = self.waiting.iter().position(|waiting| *waiting == token.0) else {
            return Ok(Progress::Busy(self));
        };
        result?;
        self.waiting.swap_remove(at);
        let bytes = match op {
            DiskOp::Read { buf, .. } => buf.as_slice(),
            _ => &[],
        };
        match &self.step {
            Step::Supers => self.took_supers(env, bytes)?,
            Step::Head(area) => {
                let area = *area;
                self.took_head(env, area, bytes)?;
            }
            Step::Ring(next) => {
                let next = *next;
                self.took_ring(env, next, bytes)?;
            }
            Step::Blank => {}
            Step::Format(0) => {
                self.step = Step::Format(1);
                let second = self.new_super(env).encode();
                let op = self.ops.write(env, BLOCK_BYTES as u64, &second)?;
                self.waiting.push(op);
            }
            Step::Format(_) => self.found_all(env)?,
            Step::Image { .. } => self.took_image(env, bytes)?,
            Step::Erase if !self.waiting.is_empty() => {}
            Step::Erase => self.flush(env),
            Step::Flush => {
                if let (Some(journal), Some(recovered)) = (self.journal.take(), self.recovered.take()) {
                    return Ok(Progress::Open(Box::new(journal), recovered));
                }
            }
        }
        if matches!(self.step, Step::Blank) {
            return Ok(Progress::Blank(self));
        }
        Ok(Progress::Busy(self))
    }

    /// Formats a blank region.
    pub fn format(&mut self, env: &mut dyn Env) -> Result<(), MetaError> {
        let new = self.new_super(env);
        self.step = Step::Format(0);
        let op = self.ops.write(env, 0, &new.encode())?;
        self.supers = vec![Some(new)];
        self.waiting.push(op);
        Ok(())
    }

    fn took_supers(&mut self, env: &mut dyn Env, bytes: &[u8]) -> Result<(), MetaError> {
        if let Some(version) = bytes.chunks(BLOCK_BYTES).filter_map(Super::version).find(|v| *v != VERSION) {
            return Err(MetaError::OtherVersion(version));
        }
        self.supers = bytes.chunks(BLOCK_BYTES).map(Super::decode).collect();
        self.blank = bytes.iter().all(|byte| *byte == 0);
        self.read_head(env, 0)
    }

    fn read_head(&mut self, env: &mut dyn Env, area: usize) -> Result<(), MetaError> {
        self.step = Step::Head(area);
        let op = self.ops.read(env, self.geometry.area_offset(area), BLOCK_BYTES)?;
        self.waiting.push(op);
        Ok(())
    }

    fn took_head(&mut self, env: &mut dyn Env, area: usize, bytes: &[u8]) -> Result<(), MetaError> {
        self.heads.push(Head::decode(bytes));
        if area == 0 { self.read_head(env, 1) } else { self.read_ring(env, 0) }
    }

    fn read_ring(&mut self, env: &mut dyn Env, from: u64) -> Result<(), MetaError> {
        let blocks = (self.geometry.ring_blocks - from).min((IO_BYTES_MAX / BLOCK_BYTES) as u64);
        self.step = Step::Ring(from);
        let op = self.ops.read(env, self.geometry.ring_offset(from), blocks as usize * BLOCK_BYTES)?;
        self.waiting.push(op);
        Ok(())
    }

    fn took_ring(&mut self, env: &mut dyn Env, from: u64, bytes: &[u8]) -> Result<(), MetaError> {
        let mut place = from;
        for block in bytes.chunks(BLOCK_BYTES) {
            if let Some((head, payload)) = decode_log_block(block)
                && head.number % self.geometry.ring_blocks == place
            {
                self.found.insert(head.number, (head, payload.to_vec()));
            }
            place += 1;
        }
        if place < self.geometry.ring_blocks {
            return self.read_ring(env, place);
        }
        if self.supers.iter().any(Option::is_some) {
            return self.found_all(env);
        }
        // Only a region without any trace of an earlier life may be formatted.
        if !self.blank || !self.found.is_empty() || self.heads.iter().any(Option::is_some) {
            return Err(MetaError::SuperblockDamaged);
        }
        if self.who.voters.is_empty() {
            self.step = Step::Blank;
            return Ok(());
        }
        self.format(env)
    }

    fn new_super(&mut self, env: &mut dyn Env) -> Super {
        match self.supers.iter().flatten().next() {
            Some(known) => known.clone(),
            None => Super {
                cluster: self.who.cluster,
                node: self.who.node,
                log_id: env.random(),
                geometry: self.geometry,
                voters: self.who.voters.clone(),
            },
        }
    }

    fn check_super(&self) -> Result<u64, MetaError> {
        let known = self.supers.iter().flatten().next().ok_or(MetaError::SuperblockDamaged)?;
        if self.supers.iter().flatten().any(|other| other != known) {
            return Err(MetaError::SuperblockDamaged);
        }
        if known.cluster != self.who.cluster {
            return Err(MetaError::OtherCluster(known.cluster));
        }
        if known.node != self.who.node {
            return Err(MetaError::OtherNode(known.node));
        }
        if known.geometry != self.geometry {
            return Err(MetaError::OtherSize);
        }
        Ok(known.log_id)
    }

    /// Everything but the snapshot's data has been read.
    fn found_all(&mut self, env: &mut dyn Env) -> Result<(), MetaError> {
        let log_id = self.check_super()?;
        self.found.retain(|_, (head, _)| head.log_id == log_id);
        let newest = self
            .heads
            .iter()
            .enumerate()
            .filter_map(|(area, head)| head.filter(|head| head.log_id == log_id).map(|head| (head, area)))
            .max_by_key(|(head, _)| head.index);
        match newest {
            Some((head, area)) if head.len > self.geometry.image_bytes_max() => {
                let _ = area;
                Err(MetaError::SnapshotDamaged { index: head.index })
            }
            Some((head, area)) => self.read_image(env, head, area, 0),
            None => self.assemble(env, log_id, None),
        }
    }

    fn read_image(
        &mut self,
        env: &mut dyn Env,
        head: Head,
        area: usize,
        done: usize,
    ) -> Result<(), MetaError> {
        let rest = (head.len as usize).saturating_sub(done);
        if rest == 0 {
            self.image.truncate(head.len as usize);
            if crc32fast::hash(&self.image) != head.crc {
                return Err(MetaError::SnapshotDamaged { index: head.index });
            }
            return self.assemble(env, head.log_id, Some((head, area)));
        }
        let len = rest.min(IO_BYTES_MAX).div_ceil(BLOCK_BYTES) * BLOCK_BYTES;
        let offset = self.geometry.area_offset(area) + (BLOCK_BYTES + done) as u64;
        self.step = Step::Image { head, area, done };
        let op = self.ops.read(env, offset, len)?;
        self.waiting.push(op);
        Ok(())
    }

    fn took_image(&mut self, env: &mut dyn Env, bytes: &[u8]) -> Result<(), MetaError> {
        let Step::Image { head, area, done } = self.step else { return Ok(()) };
        self.image.extend_from_slice(bytes);
        self.read_image(env, head, area, done + bytes.len())
    }

    fn assemble(
        &mut self,
        env: &mut dyn Env,
        log_id: u64,
        snapshot: Option<(Head, usize)>,
    ) -> Result<(), MetaError> {
        let head = snapshot.map(|(head, _)| head);
        let log = recover(head.as_ref(), &self.found)?;
        self.found.clear();
        let place = self.ops.place();
        let ops = std::mem::replace(&mut self.ops, Ops::new(place));
        let mut journal = Journal::new(ops, self.geometry, log_id, self.planted);
        journal.next_number = log.next_number;
        journal.next_batch = log.next_batch;
        journal.log_start = head.map_or(0, |head| head.log_start);
        journal.batches = log.batches.iter().copied().collect();
        journal.newest_area = snapshot.map_or(1, |(_, area)| area);
        journal.snapshot_index = head.map_or(0, |head| head.index);
        journal.hard = log.hard;
        let erase = log.erase as usize * BLOCK_BYTES;
        if erase > 0 {
            self.waiting = journal.write_ring(env, log.next_number, &vec![0; erase])?;
            self.step = Step::Erase;
        }
        let image = std::mem::take(&mut self.image);
        let founders = self.supers.iter().flatten().next().map(|known| known.voters.clone());
        let founders = founders.unwrap_or_default();
        let snapshot = head.map(|head| (head.index, head.term, image));
        self.recovered = Some(Recovered { snapshot, log, founders });
        self.journal = Some(journal);
        if erase == 0 {
            self.flush(env);
        }
        Ok(())
    }

    fn flush(&mut self, env: &mut dyn Env) {
        self.step = Step::Flush;
        if let Some(journal) = &mut self.journal {
            self.waiting = vec![journal.ops.flush(env)];
        }
    }
}
