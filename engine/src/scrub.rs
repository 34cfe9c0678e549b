//! Scrub: the primary of a PG looks whether all copies of every object are there and equal, before a reader or
//! the loss of a disk finds out.
//!
//! A light run compares versions and which blocks are written, which is in memory; a deep one has every copy read,
//! piece by piece, and compared with its checksums, and the checksums compared with each other. A `Check` holds its
//! object for one piece: changes wait, reads go on. What differs is given to recovery: a bad own copy is fetched from another member, any other is
//! made equal to the primary's.
//!
//! The control core says which PG is due (`CoreMsg::Scrub`) and hears how it went. A run ends with its epoch,
//! unreported: the control core asks the next primary.

use crate::config::*;
use crate::core::{DataCore, Life, ticket};
use crate::msg::{CoreMsg, ScrubReport};
use crate::op::{Exclusive, LOCAL};
use crate::payload::bytes_of;
use crate::peer::request;
use crate::pg::{Link, Listing, MemberState, Phase};
use crate::planted::Bug;
use crate::share::Turn;
use crate::slab::{Key, Slab};
use placement::ScrubDepth;
use reactor::{Env, Frame, Mono};
use std::collections::VecDeque;
use store::{ObjectData, Presence, StoreError};
use wire::{
    BLOCK_BYTES, Epoch, FrameKind, Header, Holds, ListEntry, ObjectId, PgId, Status, VerifyEntry, block_crc,
};

/// What a light check costs of the rate: a message to each member.
const LIGHT_COST_BYTES: u64 = BLOCK_BYTES as u64;

/// Where a run finds the objects to check next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// The primary's own, from this cursor on.
    Own(u32),
    /// A member's, from this cursor on: those that the primary lacks. The flag says that the page is asked for.
    Member(usize, u32, bool),
    /// All are checked, or being checked.
    End,
}

/// The scrub of one PG.
struct Run {
    pg: Key,
    epoch: Epoch,
    depth: ScrubDepth,
    source: Source,
    /// Found and not yet checked, and the first block of the piece that is next: at most what one page of a
    /// listing holds.
    queue: VecDeque<(ObjectId, u32)>,
    objects: u64,
    errors: u64,
    /// The last object with an error: its other pieces do not count again.
    bad: Option<ObjectId>,
}

/// The check of one object.
struct Check {
    pg: Key,
    obj: Key,
    object: ObjectId,
    depth: ScrubDepth,
    /// The piece's first block.
    from: u32,
    /// Asked; before, changes in flight must end.
    asked: bool,
    /// Who has not answered: member bits, `LOCAL`.
    waiting: u32,
    own: Result<VerifyEntry, Bad>,
    members: Vec<(usize, Result<VerifyEntry, Bad>)>,
}

/// A copy cannot be read, or is not what was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Bad(Status);

/// Scrubs on this core: one PG after the other.
pub(crate) struct Scrubs {
    runs: VecDeque<Run>,
    checks: Slab<Check>,
    /// The rate allows the next check then.
    next_at: Mono,
}

impl Scrubs {
    pub(crate) fn new() -> Self {
        Self { runs: VecDeque::new(), checks: Slab::with_capacity(SCRUB_PARALLEL), next_at: Mono(0) }
    }
}

/// Blocks of the piece that begins with block `from`.
fn piece(from: u32) -> u32 {
    (u32::MAX >> (32 - SCRUB_PIECE_BLOCKS)).checked_shl(from).unwrap_or(0)
}

/// What was read of an object, of which the blocks of `written` exist, for comparing.
pub(crate) fn verified(data: &ObjectData, written: u32) -> VerifyEntry {
    let mut bytes = Vec::with_capacity(data.crcs.len() * size_of::<u32>());
    for crc in data.crcs.as_slice() {
        bytes.extend_from_slice(&crc.to_le_bytes());
    }
    VerifyEntry { digest: block_crc(&bytes), ..known(data.presence, written) }
}

/// What is known of an object without reading it.
pub(crate) fn known(presence: Presence, written: u32) -> VerifyEntry {
    let holds = match presence {
        Presence::Absent => Holds::Nothing,
        Presence::Live(_) => Holds::Object,
        Presence::Tombstone(_) => Holds::Tombstone,
    };
    VerifyEntry { holds, version: presence.version().unwrap_or_default(), mask: written, digest: 0 }
}

/// A member whose copy counts, as far as is known: it follows, and recovery has nothing to do there.
fn is_comparable(member: &MemberState, object: ObjectId) -> bool {
    member.link == Link::Up
        && member.listing == Listing::Done
        && member.desynced.is_none()
        && !member.missing.contains(&object)
}

impl DataCore {
    /// The control core wants a PG scrubbed.
    pub(crate) fn scrub(&mut self, id: PgId, depth: ScrubDepth) {
        let Some(key) = self.pg_key(id) else { return };
        let Some(epoch) = self.primary(key).map(|primary| primary.epoch) else { return };
        let known = self.scrubs.runs.iter().any(|run| run.pg == key && run.depth == depth);
        if !known && self.scrubs.runs.len() < SCRUBS_QUEUED_MAX {
            let (source, queue) = (Source::Own(0), VecDeque::new());
            let run = Run { pg: key, epoch, depth, source, queue, objects: 0, errors: 0, bad: None };
            self.scrubs.runs.push_back(run);
        }
    }

    /// Goes on with the first run: a bounded number of steps, as fast as the rate allows.
    pub(crate) fn pump_scrubs(&mut self, env: &mut dyn Env) {
        for _ in 0..SCAN_STEPS_PER_EVENT {
            let Some(run) = self.scrubs.runs.front() else { return };
            let (key, epoch, source) = (run.pg, run.epoch, run.source);
            let Some(primary) = self.primary(key).filter(|primary| primary.epoch == epoch) else {
                self.scrubs.runs.pop_front();
                continue;
            };
            // A copy that cannot be asked now would be passed over: its member comes back, or the epoch ends.
            let all_here = primary.members.iter().all(|m| m.link == Link::Up && m.desynced.is_none());
            let active = primary.phase == Phase::Active && !primary.superseded;
            let ready = active && all_here && self.lease_holds(env);
            if self.life != Life::Running || !ready {
                return;
            }
            let parallel = match self.background_turn(env) {
                Turn::Alone => SCRUB_PARALLEL,
                Turn::Beside => SCRUB_PARALLEL_BUSY,
                Turn::Wait(_) => return,
            };
            if self.scrubs.checks.len() >= parallel {
                return;
            }
            if env.now() < self.scrubs.next_at {
                let at = self.scrubs.next_at;
                return self.wake_at(env, at);
            }
            let next = self.scrubs.runs.front_mut().and_then(|run| run.queue.pop_front());
            if let Some((object, from)) = next {
                if self.start_check(env, key, object, from) {
                    continue;
                }
                // Recovery or a purge has it. Their end is an event; then it is asked for again.
                if let Some(run) = self.scrubs.runs.front_mut() {
                    run.queue.push_back((object, from));
                }
                return;
            }
            match source {
                Source::Own(cursor) => self.scrub_own_page(key, cursor),
                Source::Member(_, _, true) => return,
                Source::Member(index, cursor, false) => self.scrub_ask_page(env, key, index, cursor),
                Source::End if self.scrubs.checks.len() == 0 => self.end_scrub(),
                Source::End => return,
            }
        }
        self.wake_in(env, 0);
    }

    fn end_scrub(&mut self) {
        let Some(run) = self.scrubs.runs.pop_front() else { return };
        let Some(pg) = self.pgs.get(run.pg).map(|pg| pg.id) else { return };
        self.metrics.scrubs.add(1);
        let (depth, objects, errors) = (run.depth, run.objects, run.errors);
        self.tell(CoreMsg::Scrubbed(ScrubReport { pg, depth, objects, errors }));
    }

    /// Queues a page of the primary's own objects.
    fn scrub_own_page(&mut self, key: Key, cursor: u32) {
        let mut found = std::mem::take(&mut self.list_scratch);
        found.clear();
        let next = self.own_page(key, cursor, &mut found);
        if let Some(run) = self.scrubs.runs.front_mut() {
            run.queue.extend(found.iter().map(|entry| (entry.object, 0)));
            run.source = next.map_or(Source::Member(0, 0, false), |next| Source::Own(next.0));
        }
        self.list_scratch = found;
    }

    /// Asks a member for a page of its objects, or goes on to the next member.
    fn scrub_ask_page(&mut self, env: &mut dyn Env, key: Key, index: usize, cursor: u32) {
        let Some(primary) = self.primary(key) else { return };
        let next = match primary.members.get(index) {
            None => Source::End,
            Some(member) if member.link == Link::Up && member.listing == Listing::Done => {
                self.ask_page(env, key, index, request::SCRUB_LIST, cursor, 0);
                Source::Member(index, cursor, true)
            }
            // What it lacks or has too much is found when it is listed.
            Some(_) => Source::Member(index + 1, 0, false),
        };
        if let Some(run) = self.scrubs.runs.front_mut() {
            run.source = next;
        }
    }

    /// A page of a member's objects: those that the primary does not have are checked.
    pub(crate) fn scrub_listed(&mut self, key: Key, frame: &Frame) {
        let header = &frame.header;
        let Some(primary) = self.primary(key) else { return };
        let (at, epoch, index) = (primary.at, primary.epoch, primary.member_index(header.slice));
        let own_store = self.slices.get(at).and_then(|slice| slice.store.as_ref());
        let Some(run) = self.scrubs.runs.front_mut().filter(|run| run.pg == key && run.epoch == epoch) else {
            return;
        };
        let Source::Member(asked, cursor, true) = run.source else { return };
        if index != Some(asked) || header.version.counter != u64::from(cursor) {
            return;
        }
        let bytes = bytes_of(frame).filter(|_| header.status == Status::Ok);
        let Some(entries) = bytes.and_then(ListEntry::decode_all) else {
            // Refused, or damaged on its way: what only this member has is for the next scrub to find.
            run.source = Source::Member(asked + 1, 0, false);
            if header.status == Status::StaleEpoch && header.epoch > epoch {
                self.supersede(key, header.epoch);
            }
            return;
        };
        for entry in entries {
            if own_store.is_some_and(|store| store.lookup(entry.object) == Presence::Absent) {
                run.queue.push_back((entry.object, 0));
            }
        }
        run.source = if header.blocks == 1 {
            Source::Member(asked, header.block, false)
        } else {
            Source::Member(asked + 1, 0, false)
        };
    }

    /// Begins the check of a piece of an object; false when recovery or a purge has it.
    fn start_check(&mut self, env: &mut dyn Env, pg: Key, object: ObjectId, from: u32) -> bool {
        let Some(depth) = self.scrubs.runs.front().map(|run| run.depth) else { return true };
        let Some(obj_key) = self.obj_entry(pg, object) else { return true };
        let Some(obj) = self.objs.get_mut(obj_key) else { return true };
        if obj.exclusive != Exclusive::Free {
            return false;
        }
        let (asked, waiting) = (false, 0);
        let (own, members) = (Ok(VerifyEntry::default()), Vec::new());
        let check = Check { pg, obj: obj_key, object, depth, from, asked, waiting, own, members };
        let key = self.scrubs.checks.insert(check);
        obj.exclusive = Exclusive::Scrub(key);
        if let Some(run) = self.scrubs.runs.front_mut().filter(|_| from == 0) {
            run.objects += 1;
            self.metrics.scrubbed_objects.add(1);
        }
        self.step_check(env, key);
        true
    }

    /// A change of the object ended: a check may have waited for that.
    pub(crate) fn check_after_change(&mut self, env: &mut dyn Env, obj: Key) {
        if let Some(Exclusive::Scrub(key)) = self.objs.get(obj).map(|obj| obj.exclusive) {
            self.step_check(env, key);
        }
    }

    /// Asks for all copies once nothing is in flight.
    fn step_check(&mut self, env: &mut dyn Env, key: Key) {
        let Some(check) = self.scrubs.checks.get(key) else { return };
        let Some(obj) = self.objs.get(check.obj) else { return };
        if check.asked || !obj.inflight.is_empty() {
            return;
        }
        let (pg, object, depth, presence) = (check.pg, check.object, check.depth, obj.presence);
        let blocks = piece(check.from);
        let Some(primary) = self.primary(pg) else { return };
        let at = primary.at;
        let mut waiting = 0;
        for (index, member) in primary.members.iter().enumerate() {
            if is_comparable(member, object) {
                waiting |= 1 << index;
            }
        }
        let written = self.store_ref(at).map_or(0, |store| store.written_mask(object));
        let mut cost = LIGHT_COST_BYTES;
        if depth == ScrubDepth::Deep && matches!(presence, Presence::Live(_)) {
            let ticket = key.tagged(ticket::SCRUB);
            let read = self.store(at).and_then(|store| store.read_blocks(ticket, object, blocks));
            if read.is_err() {
                // No room, or the slice is on its way out: not now, and the next run will come.
                return self.drop_check(env, key);
            }
            waiting |= LOCAL;
            cost += u64::from((written & blocks).count_ones()) * BLOCK_BYTES as u64;
        }
        self.share.spend(env.now(), cost);
        let pause_ns = cost.saturating_mul(1_000_000_000) / self.config.scrub_bytes_per_second.max(1);
        self.scrubs.next_at = self.scrubs.next_at.max(env.now()).plus_ns(pause_ns);
        if let Some(check) = self.scrubs.checks.get_mut(key) {
            check.asked = true;
            check.waiting = waiting;
            check.own = Ok(known(presence, written));
        }
        for index in 0..crate::op::MEMBERS_MAX {
            self.send_verify(env, key, index);
        }
        if waiting == 0 {
            self.judge(env, key);
        }
    }

    fn send_verify(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let Some(check) = self.scrubs.checks.get(key).filter(|check| check.waiting >> index & 1 == 1) else {
            return;
        };
        let up = self.primary(check.pg).and_then(|primary| primary.members.get(index)).map(|m| m.link);
        let request = key.tagged(request::VERIFY);
        let question = self.question(check.pg, index, FrameKind::SubVerify, request);
        let Some((peer, mut header)) = question.filter(|_| up == Some(Link::Up)) else { return };
        header.object = check.object;
        header.blocks = u16::from(check.depth == ScrubDepth::Deep);
        header.block = piece(check.from);
        self.send_peer_header(env, peer, header);
    }

    /// A member is reachable again: what a scrub wants of it goes out again.
    pub(crate) fn resend_checks(&mut self, env: &mut dyn Env, pg: Key, index: usize) {
        let checks = self.scrubs.checks.iter();
        let keys: Vec<Key> = checks.filter(|(_, check)| check.pg == pg).map(|(key, _)| key).collect();
        for key in keys {
            self.send_verify(env, key, index);
        }
        if let Some(run) = self.scrubs.runs.front_mut()
            && run.pg == pg
            && let Source::Member(asked, cursor, true) = run.source
            && asked == index
        {
            run.source = Source::Member(asked, cursor, false);
        }
    }

    /// The own store has read an object.
    pub(crate) fn check_read_done(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        result: Result<ObjectData, StoreError>,
    ) {
        let Some(check) = self.scrubs.checks.get_mut(key) else { return };
        check.own = match (result, check.own) {
            (Ok(data), Ok(known)) => Ok(verified(&data, known.mask)),
            (Ok(_), Err(bad)) => Err(bad),
            (Err(error @ (StoreError::Corrupt | StoreError::Io)), _) => Err(Bad(error.status())),
            (Err(_), _) => return self.drop_check(env, key),
        };
        check.waiting &= !LOCAL;
        if check.waiting == 0 {
            self.judge(env, key);
        }
    }

    pub(crate) fn verify_reply(&mut self, env: &mut dyn Env, key: Key, frame: &Frame) {
        let header = &frame.header;
        let Some(check) = self.scrubs.checks.get_mut(key) else { return };
        let pg = check.pg;
        let Some(primary) = self.pgs.get_mut(pg).and_then(|pg| pg.primary.as_deref_mut()) else { return };
        let epoch = primary.epoch;
        let Some(index) = primary.member_index(header.slice) else { return };
        let bit = 1u32 << index;
        if check.waiting & bit == 0 {
            return;
        }
        match header.status {
            Status::Ok => {
                // One that is damaged or no entry says nothing of the copy.
                if let Some(entry) = bytes_of(frame).and_then(VerifyEntry::decode) {
                    check.members.push((index, Ok(entry)));
                }
            }
            status @ (Status::Corrupt | Status::Io) => check.members.push((index, Err(Bad(status)))),
            Status::StaleEpoch if header.epoch > epoch => return self.supersede(pg, header.epoch),
            Status::StaleEpoch | Status::ShuttingDown => return,
            Status::NotActive | Status::NotPrimary | Status::NotFound => {
                if let Some(member) = primary.members.get_mut(index)
                    && member.link == Link::Up
                {
                    member.link = Link::Down;
                    self.send_activate(env, pg, index);
                }
                return;
            }
            // Too busy: its copy is not judged this time.
            _ => {}
        }
        check.waiting &= !bit;
        if check.waiting == 0 {
            self.judge(env, key);
        }
    }

    /// Everybody has answered: what is bad or different goes to recovery.
    fn judge(&mut self, env: &mut dyn Env, key: Key) {
        let Some(check) = self.scrubs.checks.remove(key) else { return };
        let (pg, obj, object) = (check.pg, check.obj, check.object);
        self.queue_next_piece(&check);
        if let Some(obj) = self.objs.get_mut(obj) {
            obj.exclusive = Exclusive::Free;
        }
        let mut wrong = 0;
        for (index, found) in &check.members {
            let same = match (&check.own, found) {
                (_, Err(Bad(status))) => {
                    tracing::error!(%object, member = index, %status, "scrub: bad copy");
                    false
                }
                (Ok(own), Ok(found)) if own != found => {
                    tracing::error!(%object, member = index, ?own, ?found, "scrub: copies differ");
                    false
                }
                _ => true,
            };
            if !same {
                wrong += 1;
                self.lacks(pg, *index, object);
            }
        }
        if let Err(Bad(status)) = check.own {
            tracing::error!(%object, %status, "scrub: bad own copy");
            wrong += 1;
        }
        self.metrics.scrub_errors.add(wrong);
        if let Some(run) = self.scrubs.runs.front_mut()
            && wrong > 0
            && run.bad != Some(object)
        {
            run.errors += 1;
            run.bad = Some(object);
        }
        if check.own.is_err() && !self.bug(Bug::ScrubRepairsNothing) {
            self.repair(env, obj);
        }
        self.want_recovery(pg);
        self.report_later(pg);
        self.progress(env, obj);
    }

    /// After one piece of an object comes the next one with written blocks.
    fn queue_next_piece(&mut self, check: &Check) {
        let Ok(own) = check.own else { return };
        if check.depth == ScrubDepth::Light || own.holds != Holds::Object {
            return;
        }
        let mut from = check.from + SCRUB_PIECE_BLOCKS;
        while piece(from) != 0 && own.mask & piece(from) == 0 {
            from += SCRUB_PIECE_BLOCKS;
        }
        if let Some(run) = self.scrubs.runs.front_mut().filter(|run| run.pg == check.pg)
            && piece(from) != 0
        {
            run.queue.push_front((check.object, from));
        }
    }

    /// A member's copy of an object is not the primary's.
    fn lacks(&mut self, pg: Key, index: usize, object: ObjectId) {
        if self.bug(Bug::ScrubRepairsNothing) {
            return;
        }
        if let Some(member) = self.primary_mut(pg).and_then(|primary| primary.members.get_mut(index))
            && member.listing == Listing::Done
        {
            member.missing.insert(object);
        }
    }

    /// Gives a check up without a judgement.
    fn drop_check(&mut self, env: &mut dyn Env, key: Key) {
        let Some(check) = self.scrubs.checks.remove(key) else { return };
        if let Some(obj) = self.objs.get_mut(check.obj) {
            obj.exclusive = Exclusive::Free;
        }
        self.progress(env, check.obj);
    }

    /// The PG's configuration changes: its scrubs end.
    pub(crate) fn abandon_scrubs(&mut self, pg: Key) {
        self.scrubs.runs.retain(|run| run.pg != pg);
        let checks = self.scrubs.checks.iter();
        let keys: Vec<Key> = checks.filter(|(_, check)| check.pg == pg).map(|(key, _)| key).collect();
        for key in keys {
            if let Some(check) = self.scrubs.checks.remove(key)
                && let Some(obj) = self.objs.get_mut(check.obj)
            {
                obj.exclusive = Exclusive::Free;
            }
        }
    }

    /// A member's side: says what it holds, after reading it when asked to.
    pub(crate) fn sub_verify(
        &mut self,
        env: &mut dyn Env,
        conn: reactor::ConnId,
        at: usize,
        pg: Key,
        header: &Header,
    ) {
        let store = self.store_ref(at);
        let presence = store.map_or(Presence::Absent, |store| store.lookup(header.object));
        if header.blocks == 0 || !matches!(presence, Presence::Live(_)) {
            let written = store.map_or(0, |store| store.written_mask(header.object));
            return self.answer_verify(env, conn, header, known(presence, written));
        }
        let key = self.subs.insert(crate::member::SubOp::new(conn, *header, pg, at, env.now()));
        let ticket = key.tagged(ticket::SUB);
        let read = self.store(at).and_then(|store| store.read_blocks(ticket, header.object, header.block));
        if let Err(error) = read {
            self.subs.remove(key);
            self.answer_status(env, conn, header, error.status());
        }
    }

    pub(crate) fn answer_verify(
        &mut self,
        env: &mut dyn Env,
        conn: reactor::ConnId,
        request: &Header,
        entry: VerifyEntry,
    ) {
        let mut bytes = Vec::with_capacity(VerifyEntry::BYTES);
        entry.encode(&mut bytes);
        self.answer_entries(env, conn, request.reply(FrameKind::SubVerifyReply, Status::Ok), &bytes);
    }
}
