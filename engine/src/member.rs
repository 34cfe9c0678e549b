//! The member's side: promising epochs, applying the primary's sub-operations, listing.
//!
//! A member obeys one primary: that of the highest epoch it has seen, once that primary has activated it.
//! It applies a change only to exactly the state the change was made for (the counter before it); what it
//! has applied already it confirms again. Every confirmation means durable.

use crate::config::*;
use crate::core::{DataCore, Life, ticket};
use crate::metrics::OpClass;
use crate::op::range_mask;
use crate::origins::ORIGINS_PER_PG_MAX;
use crate::peering::is_in;
use crate::pg::LocalMember;
use crate::planted::Bug;
use crate::scrub::verified;
use crate::slab::Key;
use reactor::{ConnId, Env, Frame, IoBuf, Mono};
use store::{ListCursor, ObjectData, Presence, StoreError};
use wire::frame::FLAG_RECOVERY;
use wire::{BLOCK_BYTES, BlockCrcs, Epoch, FrameKind, Header, OBJECT_BLOCKS, Status, Version};
use wire::{ListEntry, LookupEntry, OriginEntry};

/// A sub-operation that this core's store is working on.
pub(crate) struct SubOp {
    conn: ConnId,
    header: Header,
    pg: Key,
    /// Index of the slice.
    at: usize,
    arrived: Mono,
    /// Repetitions of the same change, confirmed with it.
    echoes: Vec<(ConnId, Header)>,
}

impl SubOp {
    pub(crate) fn new(conn: ConnId, header: Header, pg: Key, at: usize, arrived: Mono) -> Self {
        Self { conn, header, pg, at, arrived, echoes: Vec::new() }
    }
}

/// What is to be done with a sub-operation.
enum Verdict {
    Apply,
    /// It has been applied already.
    Repeated,
    Refuse(Status),
}

fn class_of(kind: FrameKind) -> OpClass {
    match kind {
        FrameKind::SubPush | FrameKind::SubPurge => OpClass::SubPush,
        FrameKind::SubRead | FrameKind::SubVerify => OpClass::SubRead,
        _ => OpClass::SubWrite,
    }
}

/// Whether range, mask, payload and number of checksums of a sub-operation fit together.
fn is_sound(frame: &Frame) -> bool {
    let header = &frame.header;
    let length = frame.payload.as_ref().map_or(0, IoBuf::len);
    let blocks = usize::from(header.blocks);
    let in_range = blocks > 0 && blocks <= OBJECT_BLOCKS && header.block as usize <= OBJECT_BLOCKS - blocks;
    if header.kind == FrameKind::SubOrigins {
        return length <= ORIGINS_PER_PG_MAX * OriginEntry::BYTES;
    }
    if header.kind == FrameKind::SubLookup {
        return length <= LOOKUP_OBJECTS * LookupEntry::BYTES;
    }
    let shape = match header.kind {
        FrameKind::SubWrite => in_range && length == blocks * BLOCK_BYTES,
        FrameKind::SubZero => in_range && length == 0,
        FrameKind::SubPush => {
            let count = header.block.count_ones() as usize;
            count == blocks && length == count * BLOCK_BYTES && frame.crcs.len() == count
        }
        _ => length == 0,
    };
    // Changes are compared with their checksums by the store (`apply`), once.
    shape && frame.crcs.len() * BLOCK_BYTES == length
}

impl DataCore {
    pub(crate) fn sub_frame(&mut self, env: &mut dyn Env, conn: ConnId, frame: Frame) {
        match frame.header.kind {
            FrameKind::Ping => return self.answer_status(env, conn, &frame.header, Status::Ok),
            FrameKind::Activate
            | FrameKind::List
            | FrameKind::SubWrite
            | FrameKind::SubZero
            | FrameKind::SubDelete
            | FrameKind::SubPush
            | FrameKind::SubRead
            | FrameKind::SubVerify
            | FrameKind::SubPurge
            | FrameKind::SubOrigins
            | FrameKind::SubDigests
            | FrameKind::SubLookup => {}
            FrameKind::Read | FrameKind::Write | FrameKind::Zero | FrameKind::Delete => {
                return self.answer_status(env, conn, &frame.header, Status::Invalid);
            }
            _ => return self.drop_inbound(env, conn, false),
        }
        if !matches!(self.life, Life::Running | Life::Draining(_)) {
            return self.answer_status(env, conn, &frame.header, Status::ShuttingDown);
        }
        if self.subs.len() >= SUB_OPS_MAX || !is_sound(&frame) {
            // Damaged on the way, or a peer beyond its bounds: it connects again and repeats.
            tracing::warn!(kind = ?frame.header.kind, "connection of a peer closed: unsound frame, or too many");
            return self.drop_inbound(env, conn, false);
        }
        let Some(at) = self.slice_at(frame.header.slice) else {
            return self.answer_status(env, conn, &frame.header, Status::NotFound);
        };
        if frame.header.kind == FrameKind::Activate {
            return self.activate(env, conn, at, frame.header);
        }
        if let Some(slice) = self.slices.get_mut(at)
            && !slice.parked.is_empty()
        {
            slice.parked.push_back((conn, frame));
            return;
        }
        self.sub_op(env, conn, at, frame);
    }

    /// Carries out a sub-operation, or puts it aside until the store has room.
    fn sub_op(&mut self, env: &mut dyn Env, conn: ConnId, at: usize, frame: Frame) {
        let header = frame.header;
        let pg = match self.obeys(&header) {
            Ok(pg) => pg,
            Err((status, promised)) => return self.refuse_sub(env, conn, &header, status, promised),
        };
        match header.kind {
            FrameKind::List => return self.list(env, conn, at, &header),
            FrameKind::SubRead => return self.sub_read(env, conn, at, pg, frame),
            FrameKind::SubVerify => return self.sub_verify(env, conn, at, pg, &header),
            FrameKind::SubOrigins => return self.sub_origins(env, conn, pg, at, &frame),
            FrameKind::SubDigests => return self.tell_digests(env, conn, at, &header),
            FrameKind::SubLookup => return self.tell_objects(env, conn, at, &frame),
            _ => {}
        }
        let presence = self.store_ref(at).map_or(Presence::Absent, |store| store.lookup(header.object));
        match self.verdict(&header, presence) {
            Verdict::Refuse(status) => self.answer_status(env, conn, &header, status),
            Verdict::Repeated => {
                if header.flags & FLAG_RECOVERY != 0 {
                    self.note_origin(pg, at, &header);
                }
                self.confirm_again(env, conn, at, &header);
            }
            Verdict::Apply if self.is_backfill_refused(at, &header) => {
                self.answer_status(env, conn, &header, Status::NoSpace);
            }
            Verdict::Apply => self.apply(env, conn, at, pg, presence, frame),
        }
    }

    /// Whether the sender is the primary that this member obeys now.
    fn obeys(&self, header: &Header) -> Result<Key, (Status, Epoch)> {
        let Some((key, pg)) = self.pg_key(header.pg).and_then(|key| Some((key, self.pgs.get(key)?))) else {
            return Err((Status::NotActive, Epoch(0)));
        };
        if self.bug(Bug::SkipEpochCheck) {
            return Ok(key);
        }
        if header.epoch < pg.promised {
            return Err((Status::StaleEpoch, pg.promised));
        }
        if pg.local(header.slice).is_none_or(|local| local.activated != header.epoch)
            || header.epoch != pg.promised
        {
            return Err((Status::NotActive, pg.promised));
        }
        if pg.promised_primary != Some(header.primary) {
            return Err((Status::NotPrimary, pg.promised));
        }
        Ok(key)
    }

    fn refuse_sub(
        &mut self,
        env: &mut dyn Env,
        conn: ConnId,
        header: &Header,
        status: Status,
        promised: Epoch,
    ) {
        if status == Status::StaleEpoch {
            self.metrics.stale_epochs.add(1);
        }
        let request = Header { epoch: promised, ..*header };
        self.answer_status(env, conn, &request, status);
    }

    fn verdict(&self, header: &Header, presence: Presence) -> Verdict {
        let version = header.version;
        let recovery = header.flags & FLAG_RECOVERY != 0;
        match header.kind {
            FrameKind::SubPush => Verdict::Apply,
            FrameKind::SubDelete if recovery && presence == Presence::Tombstone(version) => Verdict::Repeated,
            FrameKind::SubDelete if recovery => Verdict::Apply,
            FrameKind::SubPurge => match presence {
                Presence::Absent => Verdict::Repeated,
                Presence::Tombstone(have) if recovery || have == version => Verdict::Apply,
                Presence::Live(_) if recovery => Verdict::Apply,
                // Purged before, and made again since.
                Presence::Live(have) | Presence::Tombstone(have) if version.epoch <= have.epoch => {
                    Verdict::Repeated
                }
                _ => Verdict::Refuse(Status::OutOfSync),
            },
            _ => {
                if self.bug(Bug::AcceptOutOfOrderSubwrite) {
                    return Verdict::Apply;
                }
                let have = presence.version().unwrap_or(Version { epoch: Epoch(0), counter: 0 });
                if version.counter <= have.counter && version.epoch <= have.epoch {
                    // One primary's changes come in order, and it made us equal before the first one:
                    // being at or past this one means having it.
                    Verdict::Repeated
                } else if version.counter == have.counter + 1 && version.epoch >= have.epoch {
                    Verdict::Apply
                } else {
                    Verdict::Refuse(Status::OutOfSync)
                }
            }
        }
    }

    fn apply(
        &mut self,
        env: &mut dyn Env,
        conn: ConnId,
        at: usize,
        pg: Key,
        presence: Presence,
        frame: Frame,
    ) {
        let header = frame.header;
        let sub = SubOp::new(conn, header, pg, at, env.now());
        let key = self.subs.insert(sub);
        match self.store_sub(env, key, at, presence, &frame) {
            Ok(()) => {
                if let Some(slice) = self.slices.get(at) {
                    slice.metrics.writes.add(1);
                }
                self.note_origin(pg, at, &header);
                self.count_inflight(env, pg, at, true);
            }
            Err(error) => {
                self.subs.remove(key);
                if error == StoreError::Busy
                    && let Some(slice) = self.slices.get_mut(at)
                {
                    slice.parked.push_back((conn, frame));
                    return;
                }
                if error == StoreError::Corrupt {
                    // Damaged on the way: the primary connects again and repeats.
                    tracing::warn!(kind = ?header.kind, "connection of a peer closed: damaged payload");
                    return self.drop_inbound(env, conn, false);
                }
                let status = error.status();
                self.metrics.op(class_of(header.kind)).done(status, 0, env.now(), env.now());
                self.answer_status(env, conn, &header, status);
            }
        }
    }

    fn store_sub(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        at: usize,
        presence: Presence,
        frame: &Frame,
    ) -> Result<(), StoreError> {
        let header = &frame.header;
        let ticket = key.tagged(ticket::SUB);
        let (object, version) = (header.object, header.version);
        let data = frame.payload.as_slice();
        let store = self.store(at)?;
        match header.kind {
            FrameKind::SubWrite => store.write(env, ticket, object, version, header.block, data, &frame.crcs),
            FrameKind::SubZero => {
                debug_assert!(range_mask(header.block, header.blocks) != 0);
                store.zero(env, ticket, object, version, header.block, u32::from(header.blocks))
            }
            FrameKind::SubDelete => store.delete(env, ticket, object, version),
            FrameKind::SubPush => {
                store.replace(env, ticket, object, version, header.block, data, &frame.crcs)
            }
            FrameKind::SubPurge => {
                let have = presence.version().unwrap_or(version);
                if matches!(presence, Presence::Live(_)) {
                    // Recovery of something that the primary does not have at all.
                    store.delete(env, Key::NONE.tagged(ticket::NONE), object, have)?;
                }
                store.purge(env, ticket, object, have)
            }
            _ => Err(StoreError::Invalid),
        }
    }

    /// A repetition is confirmed when what it repeats is durable: with the last change of the object that
    /// the store is still working on, or now.
    fn confirm_again(&mut self, env: &mut dyn Env, conn: ConnId, at: usize, header: &Header) {
        let last = self
            .subs
            .iter_mut()
            .filter(|(_, sub)| sub.at == at && sub.header.object == header.object)
            .filter(|(_, sub)| !matches!(sub.header.kind, FrameKind::SubRead | FrameKind::SubVerify))
            .max_by_key(|(_, sub)| (sub.arrived, sub.header.version));
        match last {
            Some((_, sub)) => sub.echoes.push((conn, *header)),
            None => self.answer_status(env, conn, header, Status::Ok),
        }
    }

    /// The store has finished a sub-operation.
    pub(crate) fn sub_done(&mut self, env: &mut dyn Env, key: Key, result: Result<(), StoreError>) {
        let Some(sub) = self.subs.remove(key) else { return };
        let status = result.map_or_else(StoreError::status, |()| Status::Ok);
        let bytes = u64::from(sub.header.payload_len);
        self.metrics.op(class_of(sub.header.kind)).done(status, bytes, sub.arrived, env.now());
        self.answer_status(env, sub.conn, &sub.header, status);
        for (conn, header) in sub.echoes {
            self.answer_status(env, conn, &header, status);
        }
        self.count_inflight(env, sub.pg, sub.at, false);
    }

    /// A peer's connection is gone: what it left waiting for room must not be carried out after what it
    /// repeats on the next one.
    pub(crate) fn forget_parked(&mut self, conn: ConnId) {
        for slice in &mut self.slices {
            slice.parked.retain(|(from, _)| *from != conn);
        }
    }

    /// Tries again, in order, what waited for room in a store.
    pub(crate) fn retry_parked(&mut self, env: &mut dyn Env) {
        for at in 0..self.slices.len() {
            let count = self.slices.get(at).map_or(0, |slice| slice.parked.len());
            if count == 0 {
                continue;
            }
            let Some(slice) = self.slices.get_mut(at) else { continue };
            let mut waiting = std::mem::take(&mut slice.parked);
            while let Some((conn, frame)) = waiting.pop_front() {
                self.sub_op(env, conn, at, frame);
                let Some(slice) = self.slices.get_mut(at) else { break };
                if !slice.parked.is_empty() {
                    // No room yet: this one is in front again, the others stay behind it.
                    slice.parked.append(&mut waiting);
                    break;
                }
            }
        }
    }

    fn sub_read(&mut self, env: &mut dyn Env, conn: ConnId, at: usize, pg: Key, frame: Frame) {
        let header = frame.header;
        let key = self.subs.insert(SubOp::new(conn, header, pg, at, env.now()));
        let read = match self.store(at) {
            Ok(store) => store.read_object(key.tagged(ticket::SUB), header.object),
            Err(error) => Err(error),
        };
        if let Err(error) = read {
            self.subs.remove(key);
            self.answer_status(env, conn, &header, error.status());
        }
    }

    pub(crate) fn sub_read_done(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        result: Result<ObjectData, StoreError>,
    ) {
        let Some(sub) = self.subs.remove(key) else { return };
        if sub.header.kind == FrameKind::SubVerify {
            let status = result.as_ref().map_or_else(|error| error.status(), |_| Status::Ok);
            self.metrics.op(OpClass::SubRead).done(status, 0, sub.arrived, env.now());
            return match result {
                Ok(data) => {
                    let store = self.store_ref(sub.at);
                    let written = store.map_or(0, |store| store.written_mask(sub.header.object));
                    self.answer_verify(env, sub.conn, &sub.header, verified(&data, written))
                }
                Err(_) => self.answer_status(env, sub.conn, &sub.header, status),
            };
        }
        let (status, data) = match result {
            Ok(data) if matches!(data.presence, Presence::Live(_)) => (Status::Ok, Some(data)),
            Ok(_) => (Status::NotFound, None),
            Err(error) => (error.status(), None),
        };
        let mut header = sub.header.reply(FrameKind::SubReadReply, status);
        let (mut crcs, mut payload) = (BlockCrcs::default(), None);
        if let Some(data) = data {
            header.version = data.presence.version().unwrap_or_default();
            header.block = data.mask;
            header.blocks = data.mask.count_ones() as u16;
            crcs = data.crcs;
            payload = data.data;
        }
        header.payload_len = payload.as_ref().map_or(0, IoBuf::len) as u32;
        let bytes = u64::from(header.payload_len);
        self.metrics.op(OpClass::SubRead).done(status, bytes, sub.arrived, env.now());
        self.send(env, sub.conn, Frame { header, crcs, payload });
    }

    /// Answers one page of a listing: `block` is the cursor, the reply's `block` the next one, and its
    /// version's counter repeats which page it is.
    fn list(&mut self, env: &mut dyn Env, conn: ConnId, at: usize, request: &Header) {
        let started = env.now();
        let mut found = std::mem::take(&mut self.list_scratch);
        found.clear();
        let pg_count = self
            .pg_key(request.pg)
            .and_then(|key| self.pgs.get(key)?.update.as_ref())
            .map(|u| u.pool.pg_count);
        let (Some(pg_count), Some(store)) = (pg_count, self.store_ref(at)) else {
            return self.answer_status(env, conn, request, Status::NotActive);
        };
        let buckets = if request.origin == 0 { u64::MAX } else { request.origin };
        let filter = |object: &wire::ObjectId| {
            object.pool == request.pg.pool
                && is_in(*object, buckets)
                && placement::pg_of(*object, pg_count) == request.pg
        };
        let next = store.list(ListCursor(request.block), SCAN_SLOTS_PER_STEP as u32, filter, &mut found);
        let mut bytes = Vec::with_capacity(found.len() * ListEntry::BYTES);
        for entry in &found {
            ListEntry { object: entry.object, version: entry.version, tombstone: entry.tombstone }
                .encode(&mut bytes);
        }
        self.list_scratch = found;
        let mut header = request.reply(FrameKind::ListReply, Status::Ok);
        header.version = Version { epoch: Epoch(0), counter: u64::from(request.block) };
        header.block = next.map_or(0, |cursor| cursor.0);
        header.blocks = u16::from(next.is_some());
        self.metrics.op(OpClass::List).done(Status::Ok, bytes.len() as u64, started, env.now());
        self.answer_entries(env, conn, header, &bytes);
    }

    /// A primary asks for a promise. Only a record can tell that there is such an epoch and who its primary is:
    /// until this node has it, the question waits. Believing the sender would let one bad frame lock the PG
    /// out for as long as its epoch is ahead.
    fn activate(&mut self, env: &mut dyn Env, conn: ConnId, at: usize, header: Header) {
        let Some(key) = self.pg_entry(header.pg) else {
            return self.answer_status(env, conn, &header, Status::Busy);
        };
        let open = self.slices.get(at).is_some_and(|slice| slice.life == crate::slices::SliceLife::Open);
        let Some(pg) = self.pgs.get_mut(key) else { return };
        if header.epoch < pg.promised && !self.config.planted.has(Bug::SkipEpochCheck) {
            let promised = pg.promised;
            return self.refuse_sub(env, conn, &header, Status::StaleEpoch, promised);
        }
        if header.epoch == pg.promised && pg.promised_primary.is_some_and(|primary| primary != header.primary)
        {
            return self.answer_status(env, conn, &header, Status::NotPrimary);
        }
        if !open {
            return self.answer_status(env, conn, &header, Status::NotActive);
        }
        if pg.local(header.slice).is_none() {
            let slice = header.slice;
            pg.locals.push(LocalMember::new(at, slice));
        }
        let mut displaced = None;
        if let Some(local) = pg.local_mut(header.slice) {
            displaced = local.activating.replace((conn, header));
            local.origins.forget_expected();
        }
        // Whoever asked under another epoch asks again, if it is still primary.
        if let Some((conn, other)) = displaced.filter(|(_, other)| other.epoch != header.epoch) {
            self.answer_status(env, conn, &other, Status::NotActive);
        }
        self.answer_activate(env, key, at);
    }

    /// Confirms a promise once the control core has spoken of its epoch (a process that has just started does
    /// not remember what it promised before, and its control core's first word is younger than that), and
    /// once everything done before is durable and counted.
    pub(crate) fn answer_activate(&mut self, env: &mut dyn Env, key: Key, at: usize) {
        let Some(pg) = self.pgs.get_mut(key) else { return };
        let known = pg.update.as_ref().map(|update| update.record.epoch);
        let Some(local) = pg.locals.iter_mut().find(|local| local.at == at) else { return };
        let Some((conn, header)) = local.activating else { return };
        if known.is_none_or(|known| header.epoch > known) {
            return;
        }
        // Whoever was primary here under an older epoch is not any more.
        if self.primary(key).is_some_and(|primary| primary.epoch < header.epoch) {
            self.step_down(env, key, Status::StaleEpoch);
        }
        let Some(pg) = self.pgs.get(key) else { return };
        let (promised, primary, id) = (pg.promised, pg.promised_primary, pg.id);
        // The primary will want to know what the slice holds of the PG.
        if self.group(at, id).is_none() {
            return;
        }
        let local = self.pgs.get_mut(key).and_then(|pg| pg.locals.iter_mut().find(|local| local.at == at));
        let Some(local) = local.filter(|local| local.inflight == 0) else { return };
        local.activating = None;
        if header.epoch < promised && !self.config.planted.has(Bug::SkipEpochCheck) {
            return self.refuse_sub(env, conn, &header, Status::StaleEpoch, promised);
        }
        if header.epoch == promised && primary != Some(header.primary) {
            return self.answer_status(env, conn, &header, Status::NotPrimary);
        }
        local.activated = header.epoch;
        self.prune_origins(key, at);
        self.answer_activated(env, conn, key, at, &header);
    }

    pub(crate) fn answer_parked_activates(&mut self, env: &mut dyn Env, key: Key) {
        let slices: Vec<usize> = self
            .pgs
            .get(key)
            .map(|pg| {
                pg.locals.iter().filter(|local| local.activating.is_some()).map(|local| local.at).collect()
            })
            .unwrap_or_default();
        for at in slices {
            self.answer_activate(env, key, at);
        }
    }
}
