//! Listing: where neither digests nor history say what a member lacks, the primary lists its own objects and
//! the member's, in the buckets that differ, and compares them one by one.

use crate::config::SCAN_SLOTS_PER_STEP;
use crate::core::DataCore;
use crate::peer::request;
use crate::peering::{is_in, presence_of};
use crate::pg::{Link, Listing, Phase};
use crate::slab::Key;
use placement::pg_of;
use reactor::{Env, Frame};
use store::{ListCursor, Presence};
use wire::{FrameKind, ListEntry};

impl DataCore {
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
    pub(crate) fn scan_step(&mut self, env: &mut dyn Env, key: Key, cursor: u32) {
        let mut found = std::mem::take(&mut self.list_scratch);
        found.clear();
        let next = self.own_page(key, cursor, &mut found);
        let done = match self.primary_mut(key) {
            None => true,
            Some(primary) => {
                let wanted = primary.members.iter().fold(0, |mask, member| mask | member.mask);
                let listed = found.iter().map(|entry| entry.object);
                primary.own.extend(listed.filter(|object| is_in(*object, wanted)));
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

    /// The own objects are known: starts listing every member that differs.
    fn scanned(&mut self, env: &mut dyn Env, key: Key) {
        let Some(primary) = self.primary_mut(key) else { return };
        primary.own.sort_unstable();
        primary.phase = Phase::Comparing;
        let words = primary.own.len().div_ceil(64);
        let mut start = Vec::new();
        for (index, member) in primary.members.iter_mut().enumerate() {
            if member.listing == Listing::Differs {
                member.listing = Listing::Running { cursor: 0 };
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
            let buckets = member.mask;
            self.ask_page(env, key, index, request::LIST, cursor, buckets);
        }
    }

    /// Asks a member for a page of its objects in some digest buckets (0: all); the answer goes to whom `class`
    /// says.
    pub(crate) fn ask_page(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        index: usize,
        class: u8,
        cursor: u32,
        buckets: u64,
    ) {
        let Some((peer, mut header)) = self.question(key, index, FrameKind::List, key.tagged(class)) else {
            return;
        };
        header.block = cursor;
        header.origin = buckets;
        self.send_peer_header(env, peer, header);
    }

    pub(crate) fn list_reply(&mut self, env: &mut dyn Env, key: Key, frame: &Frame) {
        let header = &frame.header;
        // `request` tells the PG, not the page: the reply names the page it answers.
        let Ok(cursor) = u32::try_from(header.version.counter) else { return };
        let Some((index, bytes)) = self.expected(env, key, frame, Listing::Running { cursor }) else {
            return;
        };
        let Some(entries) = ListEntry::decode_all(bytes) else { return self.resync_link(env, key, index) };
        let Some(primary) = self.pgs.get_mut(key).and_then(|pg| pg.primary.as_deref_mut()) else { return };
        let own_store = self.slices.get(primary.at).and_then(|slice| slice.store.as_ref());
        let Some(member) = primary.members.get_mut(index) else { return };
        for entry in entries {
            let own = own_store.map_or(Presence::Absent, |store| store.lookup(entry.object));
            member.compare(entry.object, own, presence_of(&entry));
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
    pub(crate) fn sweep_step(&mut self, env: &mut dyn Env, key: Key) {
        let Some(pg) = self.pgs.get_mut(key) else { return };
        let Some(primary) = pg.primary.as_deref_mut() else { return };
        let own_store = self.slices.get(primary.at).and_then(|slice| slice.store.as_ref());
        let mut finished = None;
        let mut more = false;
        for (index, member) in primary.members.iter_mut().enumerate() {
            let Listing::Sweeping { at } = member.listing else { continue };
            let end = (at + SCAN_SLOTS_PER_STEP).min(primary.own.len());
            for (offset, object) in primary.own.get(at..end).unwrap_or(&[]).iter().enumerate() {
                let bit = at + offset;
                let seen = member.seen.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 == 1);
                if !seen && is_in(*object, member.mask) {
                    let own = own_store.map_or(Presence::Absent, |store| store.lookup(*object));
                    member.compare(*object, own, Presence::Absent);
                }
            }
            if end < primary.own.len() {
                member.listing = Listing::Sweeping { at: end };
            } else {
                finished = Some(index);
            }
            more = true;
            break;
        }
        if let Some(index) = finished {
            self.check_explained(key, index);
            self.compared(env, key, index);
        }
        if more && self.primary(key).is_some_and(|p| p.phase == Phase::Comparing) {
            self.scans.push_back(key);
        }
    }

    /// After everything has been compared, what is missing must account for all that the digests said.
    fn check_explained(&self, key: Key, index: usize) {
        let Some(member) = self.primary(key).and_then(|primary| primary.members.get(index)) else { return };
        if member.unexplained() != 0 {
            tracing::error!(slice = %member.slice, "digests differ by more than the lists");
            self.metrics.digest_mismatches.add(1);
        }
    }
}
