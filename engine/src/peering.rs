//! Comparing: what does every member hold that the primary does not, and the other way round?
//!
//! The primary is authoritative: whatever a member has that the primary has not (or not with this very
//! stamp) is pushed, deleted or purged. Nobody is asked what was acknowledged: a primary comes from the
//! members that hold everything that was.
//!
//! Three ways, from cheap to dear, so that a short outage costs what changed in it and not what is stored:
//! 1. Digests (`store::Group`): equal ones end it.
//! 2. The primary's history: objects that changed last, the latest first, are looked up on the member. Each
//!    difference found is taken out of the digests; when nothing is left in them, everything is found.
//! 3. Lists of the buckets that still differ (`listing`).

use crate::config::{LOOKUP_OBJECTS, SCAN_SLOTS_PER_STEP, SCAN_STEPS_PER_EVENT};
use crate::core::DataCore;
use crate::op::{OpKind, Stage};
use crate::payload::{attach, bytes_of};
use crate::peer::request;
use crate::pg::{Link, Listing, MemberState, Phase};
use crate::planted::Bug;
use crate::slab::Key;
use reactor::{ConnId, Env, Frame};
use std::collections::BTreeMap;
use store::{DIGEST_BUCKETS, Digests, Group, Presence, bucket_of, digest_of};
use wire::{FrameKind, Header, ListEntry, LookupEntry, ObjectId, PgId, Status};

/// What an entry of a list says.
pub(crate) fn presence_of(entry: &ListEntry) -> Presence {
    if entry.tombstone { Presence::Tombstone(entry.version) } else { Presence::Live(entry.version) }
}

/// Whether an object lies in one of these digest buckets.
pub(crate) fn is_in(object: ObjectId, buckets: u64) -> bool {
    buckets >> bucket_of(object) & 1 == 1
}

fn group_of(object: ObjectId, count: u32) -> u32 {
    placement::pg_of(object, count).index
}

fn encode(digests: &Digests) -> Vec<u8> {
    digests.iter().flat_map(|digest| digest.to_le_bytes()).collect()
}

/// `None` when it is not exactly one digest per bucket.
fn decode(bytes: &[u8]) -> Option<Digests> {
    let (words, rest) = bytes.as_chunks::<8>();
    let words: &[[u8; 8]; DIGEST_BUCKETS] = words.try_into().ok()?;
    rest.is_empty().then(|| words.map(u64::from_le_bytes))
}

impl MemberState {
    /// An object on both sides; a difference goes from the digests into `missing`.
    pub(crate) fn compare(&mut self, object: ObjectId, own: Presence, theirs: Presence) {
        if own != theirs
            && self.missing.insert(object)
            && let Some(digest) = self.diff.get_mut(bucket_of(object))
        {
            *digest ^= digest_of(object, own) ^ digest_of(object, theirs);
        }
    }

    /// Buckets whose digests differ by more than what is known to be missing.
    pub(crate) fn unexplained(&self) -> u64 {
        let differs = self.diff.iter().enumerate().filter(|(_, digest)| **digest != 0);
        differs.fold(0, |mask, (bucket, _)| mask | 1 << bucket)
    }
}

impl DataCore {
    /// Begins to keep account of a PG's pool on those of its slices that are open.
    pub(crate) fn track_groups(&mut self, env: &mut dyn Env, key: Key) {
        let Some(pg) = self.pgs.get(key) else { return };
        let Some(update) = &pg.update else { return };
        let (pool, count) = (pg.id.pool, update.pool.pg_count);
        for local in &pg.locals {
            let Some(slice) = self.slices.get_mut(local.at) else { continue };
            let started = slice.life == crate::slices::SliceLife::Open
                && slice.store.as_mut().is_some_and(|store| store.track(pool, count, group_of));
            if started && !self.tracking.contains(&local.at) {
                self.tracking.push_back(local.at);
            }
        }
        if !self.tracking.is_empty() {
            self.wake_in(env, 0);
        }
    }

    /// What a slice of this core holds of a PG; `None` while that is not known.
    pub(crate) fn group(&self, at: usize, id: PgId) -> Option<&Group> {
        self.store_ref(at)?.group(id.pool, id.index)
    }

    /// Works off passes over slices, scans and sweeps, a bounded number of steps; goes on in the next batch.
    pub(crate) fn pump_scans(&mut self, env: &mut dyn Env) {
        if let Some(at) = self.tracking.pop_front() {
            let store = self.slices.get_mut(at).and_then(|slice| slice.store.as_mut());
            if store.is_none_or(|store| store.track_step(SCAN_SLOTS_PER_STEP as u32)) {
                self.tracked(env, at);
            } else {
                self.tracking.push_back(at);
            }
        }
        for _ in 0..SCAN_STEPS_PER_EVENT {
            let Some(key) = self.scans.pop_front() else { break };
            match self.primary(key).map(|p| p.phase) {
                Some(Phase::Scanning { cursor }) => self.scan_step(env, key, cursor),
                Some(Phase::Comparing) => self.sweep_step(env, key),
                _ => {}
            }
        }
        if !self.scans.is_empty() || !self.tracking.is_empty() {
            self.wake_in(env, 0);
        }
    }

    /// A slice knows what it holds of each PG: those that have waited for that go on.
    fn tracked(&mut self, env: &mut dyn Env, at: usize) {
        let on_slice = |pg: &crate::pg::Pg| pg.locals.iter().any(|local| local.at == at);
        let keys: Vec<Key> = self.pgs.iter().filter(|(_, pg)| on_slice(pg)).map(|(key, _)| key).collect();
        for key in keys {
            self.answer_activate(env, key, at);
            self.advance(env, key);
        }
    }

    /// Moves the comparison forward: members not asked yet are asked for their digests; once all others are
    /// done or known to differ, the own objects are listed for those that differ.
    pub(crate) fn compare_members(&mut self, env: &mut dyn Env, key: Key) {
        let believe = self.bug(Bug::SkipListOnFreshPrimary);
        let Some(primary) = self.primary_mut(key) else { return };
        let mut start = Vec::new();
        for (index, member) in primary.members.iter_mut().enumerate() {
            if member.listing == Listing::Needed {
                member.missing.clear();
                member.listing = Listing::Digests;
                start.push(index);
            }
        }
        let settled = |member: &MemberState| matches!(member.listing, Listing::Done | Listing::Differs);
        if primary.members.iter().all(settled) {
            primary.own.clear();
            primary.phase = Phase::Scanning { cursor: 0 };
            self.scans.push_back(key);
            return self.pump_scans(env);
        }
        for index in start {
            if believe {
                self.compared(env, key, index);
            } else {
                self.ask_again(env, key, index);
            }
        }
    }

    /// Asks a member what it is being asked for, the first time or after its connection came back.
    pub(crate) fn ask_again(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let member = self.primary(key).and_then(|primary| primary.members.get(index));
        let Some(member) = member.filter(|member| member.link == Link::Up) else { return };
        match member.listing {
            Listing::Digests => self.ask_member(env, key, index, FrameKind::SubDigests, 0, &[]),
            Listing::Looking { from } => {
                let mut bytes = Vec::with_capacity(member.asked.len() * LookupEntry::BYTES);
                for object in &member.asked {
                    LookupEntry { image: object.image, index: object.index }.encode(&mut bytes);
                }
                self.ask_member(env, key, index, FrameKind::SubLookup, from as u32, &bytes);
            }
            Listing::Running { .. } => self.send_list(env, key, index),
            Listing::Needed | Listing::Differs | Listing::Sweeping { .. } | Listing::Done => {}
        }
    }

    fn ask_member(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        index: usize,
        kind: FrameKind,
        number: u32,
        bytes: &[u8],
    ) {
        let request = key.tagged(request::LIST);
        let Some((peer, mut header)) = self.question(key, index, kind, request) else { return };
        header.block = number;
        match attach(header, bytes) {
            Some(frame) => self.send_peer(env, peer, frame),
            None => self.resync_link(env, key, index),
        }
    }

    /// A reply that answers what this primary asks of that member now: the member's number, and the payload. Any
    /// other is seen to here.
    pub(crate) fn expected<'a>(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        frame: &'a Frame,
        asked: Listing,
    ) -> Option<(usize, &'a [u8])> {
        let header = &frame.header;
        let primary = self.primary(key)?;
        let (epoch, phase) = (primary.epoch, primary.phase);
        let index = primary.member_index(header.slice)?;
        let listing = primary.members.get(index)?.listing;
        if header.status == Status::StaleEpoch && header.epoch > epoch {
            self.supersede(key, header.epoch);
            return None;
        }
        if header.epoch != epoch || phase != Phase::Comparing || listing != asked {
            return None;
        }
        let Some(bytes) = bytes_of(frame).filter(|_| header.status == Status::Ok) else {
            tracing::warn!(pg = %header.pg, slice = %header.slice, status = %header.status, "comparing failed");
            self.resync_link(env, key, index);
            return None;
        };
        Some((index, bytes))
    }

    /// A member's digests.
    pub(crate) fn digests_reply(&mut self, env: &mut dyn Env, key: Key, frame: &Frame) {
        let Some((index, bytes)) = self.expected(env, key, frame, Listing::Digests) else { return };
        let Some(theirs) = decode(bytes) else { return self.resync_link(env, key, index) };
        let Some((id, at)) = self.pgs.get(key).and_then(|pg| Some((pg.id, pg.primary.as_ref()?.at))) else {
            return;
        };
        let Some(own) = self.group(at, id).map(|group| group.digests) else { return };
        // A member without any object: the history would name them all one by one.
        let empty = theirs.iter().all(|digest| *digest == 0);
        if own != theirs && !empty && self.primary(key).is_some_and(|primary| primary.hints.is_none()) {
            let hints = self.store_ref(at).map(|store| store.history(id.pool, id.index));
            if let Some(primary) = self.primary_mut(key) {
                primary.hints = hints;
            }
        }
        let Some(member) = self.primary_mut(key).and_then(|primary| primary.members.get_mut(index)) else {
            return;
        };
        member.diff = own.iter().zip(&theirs).map(|(own, theirs)| own ^ theirs).collect();
        if own == theirs {
            self.metrics.compared_by_digest.add(1);
            self.compared(env, key, index);
        } else if empty {
            self.differs(env, key, index);
        } else {
            self.look_up(env, key, index, 0);
        }
    }

    /// Asks a member for the next objects of the history in buckets that differ, from hint `from` on.
    fn look_up(&mut self, env: &mut dyn Env, key: Key, index: usize, from: usize) {
        let Some(primary) = self.primary_mut(key) else { return };
        let hints = primary.hints.as_deref().unwrap_or(&[]);
        let Some(member) = primary.members.get_mut(index) else { return };
        let unexplained = member.unexplained();
        member.asked.clear();
        let mut at = from;
        while let Some(object) = hints.get(at)
            && member.asked.len() < LOOKUP_OBJECTS
        {
            if is_in(*object, unexplained) {
                member.asked.push(*object);
            }
            at += 1;
        }
        if !member.asked.is_empty() {
            member.listing = Listing::Looking { from: at };
            return self.ask_again(env, key, index);
        }
        self.differs(env, key, index);
    }

    /// The history does not explain all of a member's difference: the buckets with the rest of it are listed.
    fn differs(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        if self.bug(Bug::TrustHistory) {
            return self.compared(env, key, index);
        }
        let Some(member) = self.primary_mut(key).and_then(|primary| primary.members.get_mut(index)) else {
            return;
        };
        member.asked = Vec::new();
        member.mask = member.unexplained();
        member.listing = Listing::Differs;
        self.metrics.compared_by_list.add(1);
        self.advance(env, key);
    }

    /// What a member holds of the objects that it was asked for.
    pub(crate) fn lookup_reply(&mut self, env: &mut dyn Env, key: Key, frame: &Frame) {
        let from = frame.header.version.counter as usize;
        let Some((index, bytes)) = self.expected(env, key, frame, Listing::Looking { from }) else { return };
        let Some(entries) = ListEntry::decode_all(bytes) else { return self.resync_link(env, key, index) };
        let theirs: BTreeMap<ObjectId, Presence> =
            entries.map(|entry| (entry.object, presence_of(&entry))).collect();
        let Some(primary) = self.pgs.get_mut(key).and_then(|pg| pg.primary.as_deref_mut()) else { return };
        let own_store = self.slices.get(primary.at).and_then(|slice| slice.store.as_ref());
        let Some(member) = primary.members.get_mut(index) else { return };
        for object in std::mem::take(&mut member.asked) {
            let own = own_store.map_or(Presence::Absent, |store| store.lookup(object));
            member.compare(object, own, theirs.get(&object).copied().unwrap_or(Presence::Absent));
        }
        if member.unexplained() == 0 {
            self.metrics.compared_by_history.add(1);
            self.compared(env, key, index);
        } else {
            self.look_up(env, key, index, from);
        }
    }

    /// A member is compared: its changes in flight are now either confirmed by it or missing.
    pub(crate) fn compared(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let bit = 1u32 << index;
        let Some(primary) = self.pgs.get_mut(key).and_then(|pg| pg.primary.as_deref_mut()) else { return };
        let Some(member) = primary.members.get_mut(index) else { return };
        member.listing = Listing::Done;
        (member.diff, member.seen, member.asked) = Default::default();
        if !member.missing.is_empty() {
            tracing::info!(slice = %member.slice, missing = member.missing.len(), "member has to be recovered");
        }
        let in_sync = member.in_sync;
        let settled: Vec<Key> = self
            .ops
            .iter()
            .filter(|(_, op)| op.pg == key && op.stage == Stage::Started && op.kind != OpKind::Read)
            .filter(|(_, op)| op.pending & bit != 0)
            // Lacking it and yet a possible primary: the answer must wait until recovery has brought it.
            .filter(|(_, op)| !in_sync || !member.missing.contains(&op.object()))
            .map(|(at, _)| at)
            .collect();
        for at in settled {
            self.bits_done(env, at, bit);
        }
        self.advance(env, key);
    }

    /// Starts over with a member: activate, and list if it was being listed.
    pub(crate) fn resync_link(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let Some(member) = self.primary_mut(key).and_then(|p| p.members.get_mut(index)) else { return };
        member.link = Link::Down;
        if matches!(member.listing, Listing::Digests | Listing::Looking { .. } | Listing::Running { .. }) {
            member.listing = Listing::Needed;
        }
        self.wake_in(env, crate::config::RECONNECT_MAX_MS);
    }

    /// The member's side: its digests of a PG.
    pub(crate) fn tell_digests(&mut self, env: &mut dyn Env, conn: ConnId, at: usize, request: &Header) {
        let bytes = match self.group(at, request.pg) {
            Some(group) => encode(&group.digests),
            None => return self.answer_status(env, conn, request, Status::NotActive),
        };
        self.answer_entries(env, conn, request.reply(FrameKind::SubDigestsReply, Status::Ok), &bytes);
    }

    /// The member's side: what it holds of some objects.
    pub(crate) fn tell_objects(&mut self, env: &mut dyn Env, conn: ConnId, at: usize, frame: &Frame) {
        let request = &frame.header;
        let bytes = bytes_of(frame).filter(|bytes| !bytes.is_empty());
        let asked = bytes.and_then(LookupEntry::decode_all);
        let (Some(asked), Some(store)) = (asked, self.store_ref(at)) else {
            tracing::warn!("connection of a peer closed: damaged list of objects");
            return self.drop_inbound(env, conn, false);
        };
        let mut held = Vec::new();
        for entry in asked.take(LOOKUP_OBJECTS) {
            let object = ObjectId { pool: request.pg.pool, image: entry.image, index: entry.index };
            let (version, tombstone) = match store.lookup(object) {
                Presence::Absent => continue,
                Presence::Live(version) => (version, false),
                Presence::Tombstone(version) => (version, true),
            };
            ListEntry { object, version, tombstone }.encode(&mut held);
        }
        let mut reply = request.reply(FrameKind::SubLookupReply, Status::Ok);
        reply.version.counter = u64::from(request.block);
        self.answer_entries(env, conn, reply, &held);
    }
}
