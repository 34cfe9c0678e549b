//! Comparing: the primary lists its own objects, then every member's, and notes what differs.
//!
//! The primary is authoritative: whatever a member has that the primary has not (or not with this very
//! stamp) is pushed, deleted or purged. Nobody is asked what was acknowledged: a primary comes from the
//! members that hold everything that was.

use crate::config::{SCAN_SLOTS_PER_STEP, SCAN_STEPS_PER_EVENT};
use crate::core::DataCore;
use crate::op::{OpKind, Stage};
use crate::peer::request;
use crate::pg::{Link, Listing, Phase};
use crate::planted::Bug;
use crate::slab::Key;
use placement::pg_of;
use reactor::{Env, Frame};
use store::{ListCursor, Presence};
use wire::ListEntry;
use wire::{FrameKind, Header, Status, block_crc};

/// Whether two slices' knowledge of an object is the same.
fn same(own: Presence, entry: &ListEntry) -> bool {
    match own {
        Presence::Absent => false,
        Presence::Live(version) => !entry.tombstone && entry.version == version,
        Presence::Tombstone(version) => entry.tombstone && entry.version == version,
    }
}

impl DataCore {
    /// Works off scans and sweeps, a bounded number of steps; goes on in the next batch.
    pub(crate) fn pump_scans(&mut self, env: &mut dyn Env) {
        for _ in 0..SCAN_STEPS_PER_EVENT {
            let Some(key) = self.scans.pop_front() else { return };
            match self.primary(key).map(|p| p.phase) {
                Some(Phase::Scanning { cursor }) => self.scan_step(env, key, cursor),
                Some(Phase::Comparing) => self.sweep_step(env, key),
                _ => {}
            }
        }
        if !self.scans.is_empty() {
            self.wake_in(env, 0);
        }
    }

    /// Appends a page of the primary's own objects; where the next one begins.
    pub(crate) fn own_page(
        &self,
        key: Key,
        cursor: u32,
        found: &mut Vec<store::ListEntry>,
    ) -> Option<ListCursor> {
        let pg = self.pgs.get(key)?;
        let (id, pg_count) = (pg.id, pg.update.as_ref()?.pool.pg_count);
        let at = pg.primary.as_ref()?.at;
        let filter = |object: &wire::ObjectId| object.pool == id.pool && pg_of(*object, pg_count) == id;
        self.store_ref(at)?.list(ListCursor(cursor), SCAN_SLOTS_PER_STEP as u32, filter, found)
    }

    /// Lists a part of the own objects.
    fn scan_step(&mut self, env: &mut dyn Env, key: Key, cursor: u32) {
        let mut found = std::mem::take(&mut self.list_scratch);
        found.clear();
        let next = self.own_page(key, cursor, &mut found);
        let done = match self.primary_mut(key) {
            None => true,
            Some(primary) => {
                if cursor == 0 {
                    primary.objects = 0;
                    primary.tombstones.clear();
                }
                for entry in &found {
                    primary.own.push(entry.object);
                    if entry.tombstone {
                        primary.tombstones.insert(entry.object);
                    } else {
                        primary.objects += 1;
                    }
                }
                if let Some(next) = next {
                    primary.phase = Phase::Scanning { cursor: next.0 };
                }
                next.is_none()
            }
        };
        self.list_scratch = found;
        if done {
            self.scanned(env, key);
        } else {
            self.scans.push_back(key);
        }
    }

    fn scanned(&mut self, env: &mut dyn Env, key: Key) {
        let believe = self.bug(Bug::SkipListOnFreshPrimary);
        let Some(primary) = self.primary_mut(key) else { return };
        primary.own.sort_unstable();
        primary.phase = Phase::Comparing;
        if believe {
            primary.members.iter_mut().for_each(|member| member.listing = Listing::Done);
        }
        self.advance(env, key);
    }

    /// Starts listing every member that needs it.
    pub(crate) fn list_members(&mut self, env: &mut dyn Env, key: Key) {
        let Some(primary) = self.primary_mut(key) else { return };
        let words = primary.own.len().div_ceil(64);
        let mut start = Vec::new();
        for (index, member) in primary.members.iter_mut().enumerate() {
            if member.listing == Listing::Needed {
                member.listing = Listing::Running { cursor: 0 };
                member.missing.clear();
                member.seen.clear();
                member.seen.resize(words, 0);
                start.push(index);
            }
        }
        for index in start {
            self.send_list(env, key, index);
        }
    }

    /// Asks a member for the next page.
    pub(crate) fn send_list(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let Some(member) = self.primary(key).and_then(|primary| primary.members.get(index)) else { return };
        if let (Listing::Running { cursor }, Link::Up) = (member.listing, member.link) {
            self.ask_page(env, key, index, request::LIST, cursor);
        }
    }

    /// Asks a member for a page of its objects; the answer goes to whom `class` says.
    pub(crate) fn ask_page(&mut self, env: &mut dyn Env, key: Key, index: usize, class: u8, cursor: u32) {
        let Some(pg) = self.pgs.get(key) else { return };
        let Some(primary) = pg.primary.as_deref() else { return };
        let Some(member) = primary.members.get(index) else { return };
        let mut header = Header::new(FrameKind::List, key.tagged(class));
        header.pg = pg.id;
        header.object.pool = pg.id.pool;
        header.epoch = primary.epoch;
        header.slice = member.slice;
        header.primary = primary.slice;
        header.block = cursor;
        let peer = member.peer;
        self.send_peer_header(env, peer, header);
    }

    pub(crate) fn list_reply(&mut self, env: &mut dyn Env, key: Key, frame: &Frame) {
        let header = &frame.header;
        let Some(pg) = self.pgs.get_mut(key) else { return };
        let Some(primary) = pg.primary.as_deref_mut() else { return };
        let (at, epoch, phase) = (primary.at, primary.epoch, primary.phase);
        let Some(index) = primary.member_index(header.slice) else { return };
        if header.status == Status::StaleEpoch && header.epoch > epoch {
            return self.supersede(key, header.epoch);
        }
        let Some(Listing::Running { cursor }) = primary.members.get(index).map(|member| member.listing)
        else {
            return;
        };
        // `request` tells the PG, not the page: the reply names the page it answers.
        if header.epoch != epoch || phase != Phase::Comparing || header.version.counter != u64::from(cursor) {
            return;
        }
        let bytes = frame.payload.as_ref().map_or(&[][..], |payload| payload.as_slice());
        let intact = bytes.is_empty() || frame.crcs.as_slice() == [block_crc(bytes)];
        let entries = ListEntry::decode_all(bytes);
        let (Status::Ok, true, Some(entries)) = (header.status, intact, entries) else {
            tracing::warn!(pg = %header.pg, slice = %header.slice, status = %header.status, "listing failed");
            return self.resync_link(env, key, index);
        };
        let own_store = self.slices.get(at).and_then(|slice| slice.store.as_ref());
        let Some(member) = primary.members.get_mut(index) else { return };
        for entry in entries {
            let own = own_store.map_or(Presence::Absent, |store| store.lookup(entry.object));
            if !same(own, &entry) {
                member.missing.insert(entry.object);
            }
            if let Ok(found) = primary.own.binary_search(&entry.object)
                && let Some(word) = member.seen.get_mut(found / 64)
            {
                *word |= 1 << (found % 64);
            }
        }
        if header.blocks == 1 {
            member.listing = Listing::Running { cursor: header.block };
            self.send_list(env, key, index);
        } else {
            member.listing = Listing::Sweeping { at: 0 };
            self.scans.push_back(key);
            self.pump_scans(env);
        }
    }

    /// Collects a part of what a member does not have at all.
    fn sweep_step(&mut self, env: &mut dyn Env, key: Key) {
        let Some(primary) = self.primary_mut(key) else { return };
        let mut finished = None;
        let mut more = false;
        for (index, member) in primary.members.iter_mut().enumerate() {
            let Listing::Sweeping { at } = member.listing else { continue };
            let end = (at + SCAN_SLOTS_PER_STEP).min(primary.own.len());
            for (offset, object) in primary.own.get(at..end).unwrap_or(&[]).iter().enumerate() {
                let bit = at + offset;
                if member.seen.get(bit / 64).is_none_or(|word| word >> (bit % 64) & 1 == 0) {
                    member.missing.insert(*object);
                }
            }
            if end < primary.own.len() {
                member.listing = Listing::Sweeping { at: end };
            } else {
                member.listing = Listing::Done;
                member.seen = Vec::new();
                finished = Some(index);
            }
            more = true;
            break;
        }
        if let Some(index) = finished {
            self.listed(env, key, index);
        }
        if more && self.primary(key).is_some_and(|p| p.phase == Phase::Comparing) {
            self.scans.push_back(key);
        }
    }

    /// A member's list is compared: its changes in flight are now either confirmed by it or missing.
    fn listed(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let bit = 1u32 << index;
        let Some(primary) = self.primary(key) else { return };
        let Some(member) = primary.members.get(index) else { return };
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
    fn resync_link(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let Some(member) = self.primary_mut(key).and_then(|p| p.members.get_mut(index)) else { return };
        member.link = Link::Down;
        if matches!(member.listing, Listing::Running { .. }) {
            member.listing = Listing::Needed;
        }
        self.wake_in(env, crate::config::RECONNECT_MAX_MS);
    }
}
