//! Which clients' changes a copy has seen, so that one that is sent again does not take effect twice.
//!
//! Every member (the primary's own slice too) remembers the last changes of a PG that it has applied, in
//! memory, as (object, origin, version). What a member knows belongs to the history of its copy: whatever
//! undoes a change (a push, a recovery's deletion) brings the primary's knowledge of that object with it.
//! A member that has restarted is taught by its primary; a primary that has restarted asks its members.

use crate::core::DataCore;
use crate::payload::{attach, bytes_of};
use crate::peer::request;
use crate::pg::{Link, Listing, Phase, Taught};
use crate::planted::Bug;
use crate::slab::Key;
use reactor::{ConnId, Env, Frame};
use std::collections::VecDeque;
use wire::OriginEntry;
use wire::frame::FLAG_RECOVERY;
use wire::{BlockCrcs, FrameKind, Header, ObjectId, Status, Version};

/// Changes remembered per copy of a PG. A primary has at most `CLIENT_OPS_MAX` (as many) under way when it
/// dies, so all of them are known to the next one; a change that is sent again later than this many others
/// of its PG is not recognised. Each takes 40 bytes, so a PG's memory is 80 KiB at most, and the list fits
/// one frame.
pub const ORIGINS_PER_PG_MAX: usize = crate::config::CLIENT_OPS_MAX;

/// What one copy of a PG has seen.
#[derive(Default)]
pub(crate) struct Origins {
    /// Oldest first. Grows to its bound and then allocates no more.
    ring: VecDeque<OriginEntry>,
    /// What a push that is on its way will put in place of an object's entries, with the push's version.
    stash: Vec<(Version, OriginEntry)>,
    /// Every change of the copy's history is in `ring`, or was once: false after a restart, until taught.
    complete: bool,
    /// Taught while changes were in flight: entries beyond the own copy are of changes not yet applied.
    ahead: bool,
}

impl std::fmt::Debug for Origins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Origins({}, complete: {})", self.ring.len(), self.complete)
    }
}

fn is_of(entry: &OriginEntry, object: ObjectId) -> bool {
    entry.image == object.image && entry.index == object.index
}

fn order(entry: &OriginEntry) -> (u64, u64, u64) {
    (entry.origin, entry.image.0, entry.index)
}

impl Origins {
    /// A change was applied.
    pub(crate) fn record(&mut self, object: ObjectId, origin: u64, version: Version) {
        if origin == 0 {
            return;
        }
        if self.ring.len() >= ORIGINS_PER_PG_MAX {
            self.ring.pop_front();
        }
        self.ring.push_back(OriginEntry { image: object.image, index: object.index, origin, version });
    }

    fn knows(&self, object: ObjectId, origin: u64) -> bool {
        origin != 0 && self.ring.iter().any(|entry| entry.origin == origin && is_of(entry, object))
    }

    /// What is known of one object.
    fn of(&self, object: ObjectId) -> impl Iterator<Item = &OriginEntry> {
        self.ring.iter().filter(move |entry| is_of(entry, object))
    }

    /// A push of `object` as `version` will come with this knowledge.
    fn expect(&mut self, object: ObjectId, version: Version, entries: impl Iterator<Item = OriginEntry>) {
        self.stash.retain(|(_, entry)| !is_of(entry, object));
        let room = ORIGINS_PER_PG_MAX.saturating_sub(self.stash.len());
        self.stash
            .extend(entries.filter(|entry| is_of(entry, object)).take(room).map(|entry| (version, entry)));
    }

    /// The copy of `object` was made equal to the primary's, at `version`.
    pub(crate) fn adopt(&mut self, object: ObjectId, version: Version) {
        self.ring.retain(|entry| !is_of(entry, object));
        let mut stash = std::mem::take(&mut self.stash);
        for (_, entry) in stash.iter().filter(|(of, entry)| *of == version && is_of(entry, object)) {
            self.record(object, entry.origin, entry.version);
        }
        stash.retain(|(_, entry)| !is_of(entry, object));
        self.stash = stash;
    }

    /// The copy of `object` is `version` again: what came behind it was not made.
    pub(crate) fn go_back(&mut self, object: ObjectId, version: Version) {
        self.ring.retain(|entry| !is_of(entry, object) || entry.version <= version);
    }

    /// Forgets what was announced and never came: another primary speaks now.
    pub(crate) fn forget_expected(&mut self) {
        self.stash.clear();
    }

    /// All that the primary knows, in place of what was known here.
    fn replace(&mut self, entries: impl Iterator<Item = OriginEntry>) {
        self.ring.clear();
        self.ring.extend(entries.take(ORIGINS_PER_PG_MAX));
        self.complete = true;
        self.ahead = true;
    }

    /// Adds, as older than everything known, what another copy of the same history knows. `have`: the own
    /// version of an object.
    fn learn(&mut self, entries: &[OriginEntry], have: impl Fn(&OriginEntry) -> Option<Version>) {
        let mut known: Vec<_> = self.ring.iter().map(order).collect();
        known.sort_unstable();
        for entry in entries.iter().rev() {
            let mine = have(entry).is_some_and(|version| entry.version <= version);
            if self.ring.len() < ORIGINS_PER_PG_MAX && mine && known.binary_search(&order(entry)).is_err() {
                self.ring.push_front(*entry);
            }
        }
    }

    fn encode<'a>(entries: impl Iterator<Item = &'a OriginEntry>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in entries {
            entry.encode(&mut bytes);
        }
        bytes
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.ring.len()
    }
}

/// The entries of a frame; `None` when they are damaged.
fn entries_of(frame: &Frame) -> Option<Vec<OriginEntry>> {
    let entries = OriginEntry::decode_all(bytes_of(frame)?)?;
    Some(entries.take(ORIGINS_PER_PG_MAX).collect())
}

impl DataCore {
    fn origins(&self, pg: Key, at: usize) -> Option<&Origins> {
        Some(&self.pgs.get(pg)?.locals.iter().find(|local| local.at == at)?.origins)
    }

    pub(crate) fn origins_mut(&mut self, pg: Key, at: usize) -> Option<&mut Origins> {
        Some(&mut self.pgs.get_mut(pg)?.locals.iter_mut().find(|local| local.at == at)?.origins)
    }

    /// Whether the own copy has seen this change.
    pub(crate) fn was_done(&self, pg: Key, object: ObjectId, origin: u64) -> bool {
        let Some(primary) = self.primary(pg) else { return false };
        let known = self.origins(pg, primary.at).is_some_and(|origins| origins.knows(object, origin));
        known && !self.bug(Bug::ForgetOrigins)
    }

    /// Drops what is known of changes that have not reached the own copy. Nothing of it is in flight.
    pub(crate) fn prune_origins(&mut self, pg: Key, at: usize) {
        let Some(pool) = self.pgs.get(pg).map(|pg| pg.id.pool) else { return };
        let Some(origins) = self.origins_mut(pg, at) else { return };
        if !origins.ahead {
            return;
        }
        origins.ahead = false;
        let mut ring = std::mem::take(&mut origins.ring);
        ring.retain(|entry| {
            let object = ObjectId { pool, image: entry.image, index: entry.index };
            let have = self.store_ref(at).and_then(|store| store.lookup(object).version());
            have.is_some_and(|have| entry.version <= have)
        });
        if let Some(origins) = self.origins_mut(pg, at) {
            origins.ring = ring;
        }
    }

    /// Whether this primary has to ask its members: it has restarted since it knew.
    pub(crate) fn wants_origins(&self, pg: Key) -> bool {
        let at = self.primary(pg).map(|primary| primary.at);
        !at.and_then(|at| self.origins(pg, at)).is_some_and(|origins| origins.complete)
    }

    /// A member's promise, with what it knows if that was asked for.
    pub(crate) fn answer_activated(
        &mut self,
        env: &mut dyn Env,
        conn: ConnId,
        pg: Key,
        at: usize,
        header: &Header,
    ) {
        let mut reply = header.reply(FrameKind::ActivateReply, Status::Ok);
        let mut bytes = Vec::new();
        if let Some(origins) = self.origins(pg, at) {
            reply.blocks = u16::from(origins.complete);
            if header.blocks == 1 {
                bytes = Origins::encode(origins.ring.iter());
            }
        }
        let silent = Header { blocks: 0, ..reply };
        let without = Frame { header: silent, crcs: BlockCrcs::default(), payload: None };
        self.send(env, conn, attach(reply, &bytes).unwrap_or(without));
    }

    /// A member has promised: what does it know?
    pub(crate) fn hear_origins(&mut self, pg: Key, index: usize, frame: &Frame) {
        let wanted = self.wants_origins(pg);
        let Some(id) = self.pgs.get(pg).map(|pg| pg.id) else { return };
        let Some(primary) = self.primary_mut(pg) else { return };
        let at = primary.at;
        let Some(member) = primary.members.get_mut(index) else { return };
        member.taught = if frame.header.blocks == 1 { Taught::Yes } else { Taught::No };
        if !wanted || !member.in_sync {
            return;
        }
        // Both are in sync: up to the own version of an object, their histories are one.
        let Some(entries) = entries_of(frame) else { return };
        let Some(mut origins) = self.origins_mut(pg, at).map(std::mem::take) else { return };
        origins.learn(&entries, |entry| {
            let object = ObjectId { pool: id.pool, image: entry.image, index: entry.index };
            self.store_ref(at)?.lookup(object).version()
        });
        if let Some(own) = self.origins_mut(pg, at) {
            *own = origins;
        }
    }

    /// Members are compared and the primary begins to serve: what nobody has told it by now, nobody knows.
    pub(crate) fn settle_origins(&mut self, pg: Key) {
        if !self.wants_origins(pg) {
            return;
        }
        let Some((entry, primary)) = self.pgs.get(pg).and_then(|pg| Some((pg, pg.primary.as_deref()?)))
        else {
            return;
        };
        let at = primary.at;
        let objects = self.group(at, entry.id).map_or(0, |group| group.objects);
        let told = |m: &crate::pg::MemberState| m.in_sync && m.taught == Taught::Yes && m.missing.is_empty();
        if !primary.members.iter().any(told) {
            self.metrics.memory_lost.add(1);
            if objects > 0
                && let Some(pg) = self.pgs.get(pg)
            {
                tracing::warn!(pg = %pg.id, "changes made before now are not recognised if they are sent again");
            }
        }
        if let Some(origins) = self.origins_mut(pg, at) {
            origins.complete = true;
        }
    }

    /// Teaches those members that lack nothing but the memory.
    pub(crate) fn teach_members(&mut self, env: &mut dyn Env, key: Key) {
        let Some(pg) = self.pgs.get_mut(key) else { return };
        let Some(primary) = pg.primary.as_deref_mut() else { return };
        if primary.phase != Phase::Active {
            return;
        }
        let mut due = Vec::new();
        for member in &mut primary.members {
            if member.taught == Taught::No
                && member.link == Link::Up
                && member.listing == Listing::Done
                && member.missing.is_empty()
            {
                member.taught = Taught::Sent;
                due.push((member.peer, member.slice));
            }
        }
        if due.is_empty() {
            return;
        }
        let mut header = Header::new(FrameKind::SubOrigins, key.tagged(request::ORIGINS));
        header.pg = pg.id;
        header.object.pool = pg.id.pool;
        (header.epoch, header.primary) = (primary.epoch, primary.slice);
        let at = primary.at;
        let Some(origins) = self.origins(key, at) else { return };
        let bytes = Origins::encode(origins.ring.iter());
        for (peer, slice) in due {
            header.slice = slice;
            match attach(header, &bytes) {
                Some(frame) => self.send_peer(env, peer, frame),
                // No memory for it now; housekeeping comes back to it.
                None => self.set_taught(key, slice, Taught::No),
            }
        }
    }

    fn set_taught(&mut self, key: Key, slice: wire::SliceId, taught: Taught) {
        let Some(primary) = self.primary_mut(key) else { return };
        if let Some(index) = primary.member_index(slice)
            && let Some(member) = primary.members.get_mut(index)
        {
            member.taught = taught;
        }
    }

    /// A member has been taught, or could not be.
    pub(crate) fn origins_reply(&mut self, key: Key, header: &Header) {
        let Some(primary) = self.primary(key) else { return };
        let epoch = primary.epoch;
        let sent = primary.member(header.slice).is_some_and(|member| member.taught == Taught::Sent);
        match header.status {
            Status::StaleEpoch if header.epoch > epoch => self.supersede(key, header.epoch),
            Status::Ok if sent && header.epoch == epoch => {
                self.set_taught(key, header.slice, Taught::Yes);
                self.check_in_sync(key);
            }
            _ if sent => self.set_taught(key, header.slice, Taught::No),
            _ => {}
        }
    }

    /// Sends ahead what is known of an object that a member is about to be made equal in.
    pub(crate) fn send_object_origins(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        index: usize,
        object: ObjectId,
        version: Version,
    ) {
        let Some(pg) = self.pgs.get(key) else { return };
        let Some(primary) = pg.primary.as_deref() else { return };
        let Some(member) = primary.members.get(index) else { return };
        let Some(origins) = self.origins(key, primary.at) else { return };
        let bytes = Origins::encode(origins.of(object));
        if bytes.is_empty() {
            return;
        }
        let mut header = Header::new(FrameKind::SubOrigins, 0);
        header.flags = FLAG_RECOVERY;
        header.pg = pg.id;
        (header.epoch, header.primary) = (primary.epoch, primary.slice);
        (header.object, header.version, header.slice) = (object, version, member.slice);
        let peer = member.peer;
        // Without memory for it the member knows nothing of the object, which is less and not wrong.
        if let Some(frame) = attach(header, &bytes) {
            self.send_peer(env, peer, frame);
        }
    }

    /// The primary tells this member what it knows, of one object or of all.
    pub(crate) fn sub_origins(&mut self, env: &mut dyn Env, conn: ConnId, pg: Key, at: usize, frame: &Frame) {
        let header = &frame.header;
        let Some(entries) = entries_of(frame) else {
            tracing::warn!("connection of a peer closed: damaged list of changes");
            return self.drop_inbound(env, conn, false);
        };
        let Some(origins) = self.origins_mut(pg, at) else { return };
        if header.flags & FLAG_RECOVERY != 0 {
            return origins.expect(header.object, header.version, entries.into_iter());
        }
        origins.replace(entries.into_iter());
        self.answer_status(env, conn, header, Status::Ok);
    }

    /// A sub-operation was taken: what it means for the memory.
    pub(crate) fn note_origin(&mut self, pg: Key, at: usize, header: &Header) {
        let Some(origins) = self.origins_mut(pg, at) else { return };
        if header.flags & FLAG_RECOVERY != 0 {
            origins.adopt(header.object, header.version);
        } else {
            origins.record(header.object, header.origin, header.version);
        }
    }
}
