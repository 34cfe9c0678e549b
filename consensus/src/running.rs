//! A voter in operation: drives Raft, the journal, and the state machine.
//!
//! The order that everything rests on: what a `Ready` wants remembered goes to the journal; what it wants
//! sent only afterwards waits in `waits` until the journal has reported it durable; Raft is told of that
//! at the same moment. A leader's own messages go out at once: its followers' answers, and its own
//! durable log, are counted separately.

use crate::blocks::{Hard, Record};
use crate::bounds::*;
use crate::codec::{Body, Command, Packet, RaftMsg, data_of};
use crate::error::MetaError;
use crate::guard;
use crate::image::{self, Image, Parts};
use crate::journal::{Event, Journal};
use crate::journal_open::Recovered;
use crate::machine::{Ephemeral, LeaseEvent, Machine};
use crate::members::Members;
use crate::memlog::MemLog;
use crate::node::{Ctx, MetaConfig, MetaOutput};
use crate::planted::Bug;
use crate::reads::Reads;
use crate::requests::Stage;
use crate::serving::Serving;
use crate::transfer::{Next, Transfers};
use raft::eraftpb::{Entry, Message, MessageType};
use raft::{RawNode, SnapshotStatus, StateRole};
use reactor::{DiskError, Env, Token};
use std::collections::{BTreeSet, VecDeque};
use wire::NodeId;
use wire::control::VoterAddress;

/// Rounds of `Ready` handled in one flush: each needs new input, so this is never reached; it bounds a
/// step all the same.
const READY_ROUNDS_MAX: usize = 64;

/// Messages that wait for the journal.
pub(crate) struct Wait {
    ready: u64,
    seq: u64,
    term: u64,
    messages: Vec<Message>,
}

/// Search of a new leader for ephemeral state that another voter still has.
#[derive(Default)]
pub(crate) struct Search {
    pub(crate) since: u64,
    pub(crate) lost: BTreeSet<NodeId>,
    pub(crate) reset_proposed: bool,
}

/// A voter in operation.
pub struct Running {
    pub(crate) raw: RawNode<MemLog>,
    pub(crate) journal: Journal,
    pub(crate) machine: Machine,
    pub(crate) serving: Option<Serving>,
    pub(crate) reads: Reads,
    pub(crate) transfers: Transfers,
    pub(crate) waits: VecDeque<Wait>,
    pub(crate) appended_seq: u64,
    pub(crate) durable_seq: u64,
    /// Term of the hard state that is durable.
    pub(crate) durable_term: u64,
    pub(crate) to_apply: VecDeque<Entry>,
    pub(crate) installing: Option<Image>,
    pub(crate) ephemeral_image: Option<Image>,
    /// Bytes of entries received since the last flush.
    pub(crate) received_bytes: usize,
    pub(crate) search: Option<Search>,
    pub(crate) ticks: u64,
    pub(crate) election_ticks: usize,
    pub(crate) timeout_of: (u64, u64, StateRole),
    pub(crate) told_leader: (u64, u64),
    /// The hard state is newer than what the journal was given.
    pub(crate) hard_changed: bool,
    /// An entry of this leader's that was sent when the present members had been committed: whoever has it knows
    /// them, even after a restart.
    pub(crate) confirmed_by: Option<u64>,
    /// This node was no member any more at this index; it has not seen that yet when it is behind.
    pub(crate) dismissed: u64,
    /// Who voted at that index.
    pub(crate) successors: Vec<VoterAddress>,
}

fn draw_timeout(env: &mut dyn Env) -> usize {
    let spread = (ELECTION_TICKS_END - ELECTION_TICKS_MIN) as u64;
    ELECTION_TICKS_MIN + (env.random() % spread) as usize
}

fn raft_config(config: &MetaConfig, applied: u64, uncommitted_max: u64) -> raft::Config {
    raft::Config {
        id: config.node.0,
        election_tick: ELECTION_TICKS_MIN,
        heartbeat_tick: HEARTBEAT_TICKS,
        min_election_tick: ELECTION_TICKS_MIN,
        max_election_tick: ELECTION_TICKS_END,
        applied,
        max_size_per_msg: APPEND_BYTES_MAX,
        max_inflight_msgs: APPENDS_INFLIGHT,
        max_uncommitted_size: UNCOMMITTED_BYTES_MAX.min(uncommitted_max).max(APPEND_BYTES_MAX),
        max_committed_size_per_ready: APPLY_BYTES_MAX,
        check_quorum: true,
        pre_vote: true,
        ..raft::Config::default()
    }
}

impl Running {
    /// From what the journal remembered.
    pub fn new(ctx: &mut Ctx<'_>, journal: Journal, recovered: Recovered) -> Result<Self, MetaError> {
        let mut machine = Machine::new(ctx.config.planted);
        machine.members = Members::founded(&recovered.founders);
        let mut before = (0, 0);
        if let Some((index, term, bytes)) = recovered.snapshot {
            let image = image::decode(&bytes).map_err(|_| MetaError::SnapshotDamaged { index })?;
            if image.index != index || !image.durable {
                return Err(MetaError::SnapshotDamaged { index });
            }
            machine.install(image);
            before = (index, term);
        }
        let entries = recovered.log.entries.into_iter().zip(before.0 + 1..);
        let entries = entries.map(|((term, data), index)| crate::codec::entry(term, index, data)).collect();
        let durable_term = recovered.log.hard.term;
        let log = MemLog::new(machine.members(), before, recovered.log.hard, entries);
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raft_config = raft_config(ctx.config, before.0, journal.uncommitted_max());
        let raw =
            RawNode::new(&raft_config, log, &logger).map_err(|error| MetaError::Raft(error.to_string()))?;
        let election_ticks = draw_timeout(ctx.env);
        let mut this = Self {
            timeout_of: (raw.raft.term, raw.raft.leader_id, raw.raft.state),
            raw,
            journal,
            machine,
            serving: None,
            reads: Reads::new(ctx.requests.session),
            transfers: Transfers::new(ctx.env.random() >> 16 << 16),
            waits: VecDeque::new(),
            appended_seq: 0,
            durable_seq: 0,
            durable_term,
            to_apply: VecDeque::new(),
            installing: None,
            ephemeral_image: None,
            received_bytes: 0,
            search: None,
            ticks: 0,
            election_ticks,
            told_leader: (0, 0),
            hard_changed: false,
            confirmed_by: None,
            dismissed: 0,
            successors: Vec::new(),
        };
        this.fix_timeout(ctx, false);
        // After a common start the first voter need not wait for a whole timeout; where a leader lives, the
        // others do not answer it.
        let voters = this.machine.members().all_voters();
        let rank = voters.iter().filter(|node| **node < ctx.config.node).count();
        this.raw.raft.election_elapsed = this.election_ticks.saturating_sub(START_TICKS * (rank + 1));
        if voters == [ctx.config.node] {
            // Nobody else could lead: no need to wait for an election timeout.
            let _ = this.raw.campaign();
            this.fix_timeout(ctx, false);
        }
        Ok(this)
    }

    /// The crate draws election timeouts from a source that no seed reaches: replace them, by a draw of our
    /// own whenever term, leader or role have changed.
    fn fix_timeout(&mut self, ctx: &mut Ctx<'_>, again: bool) {
        let now = (self.raw.raft.term, self.raw.raft.leader_id, self.raw.raft.state);
        if again || now != self.timeout_of {
            self.timeout_of = now;
            self.election_ticks = draw_timeout(ctx.env);
        }
        self.raw.raft.set_randomized_election_timeout(self.election_ticks);
    }

    /// Whether this voter leads.
    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// The leader that this voter follows, or itself.
    pub fn leader(&self) -> Option<NodeId> {
        (self.raw.raft.leader_id != 0).then_some(NodeId(self.raw.raft.leader_id))
    }

    pub(crate) fn send(ctx: &mut Ctx<'_>, to: NodeId, body: Body) {
        let bytes = Packet { cluster: ctx.config.cluster, from: ctx.config.node, body }.encode();
        ctx.out.push_back(MetaOutput::Send { to, bytes });
    }

    /// One tick has passed.
    pub fn on_tick(&mut self, ctx: &mut Ctx<'_>, stalled_ns: u64) -> Result<(), MetaError> {
        self.ticks += 1;
        if self.installing.is_some() || self.is_dismissed() {
            // Who was removed would only disturb. A candidate looks at the entries between applied and committed, and
            // those are in the snapshot that is still being written.
            self.raw.raft.election_elapsed = 0;
        }
        let campaigned = self.raw.tick() && !self.is_leader();
        self.fix_timeout(ctx, campaigned);
        let now = ctx.env.now();
        if let Some(serving) = &mut self.serving {
            serving.stalled(stalled_ns);
        }
        ctx.requests.expire(now);
        for pending in ctx.requests.pending.values_mut() {
            if matches!(pending.stage, Stage::Sent(at) if self.ticks.saturating_sub(at) >= RETRY_TICKS) {
                pending.stage = Stage::Idle;
            }
        }
        self.reads.expire(self.ticks, ctx.requests);
        let (again, failed) = self.transfers.tick(self.ticks);
        for (to, chunk) in again {
            Self::send(ctx, to, Body::Chunk(chunk));
        }
        for to in failed {
            self.raw.report_snapshot(to.0, SnapshotStatus::Failure);
        }
        if self.journal.wants_seal() {
            let commit = self.raw.raft.raft_log.committed;
            self.appended_seq = self.journal.append(Record::Seal { commit });
        }
        self.expire_leases(ctx);
        self.seek_ephemeral(ctx);
        self.drive_members(ctx);
        Ok(())
    }

    /// A packet of another voter of this cluster.
    pub fn on_body(&mut self, ctx: &mut Ctx<'_>, from: NodeId, body: Body) -> Result<(), MetaError> {
        match body {
            Body::Raft(message) => self.on_raft(ctx, from, message)?,
            Body::Forward { id, request } => self.on_request(ctx, id, request, from),
            Body::Answer { session, seq, reply } => {
                if session == ctx.requests.session {
                    ctx.requests.complete(seq, reply);
                }
            }
            Body::Chunk(chunk) => {
                let transfer = chunk.transfer;
                let (upto, received) = self.transfers.take(from, chunk, self.ticks);
                if let Some(upto) = upto {
                    Self::send(ctx, from, Body::ChunkAck { transfer, upto });
                }
                if let Some(received) = received {
                    self.on_image(ctx, from, received);
                }
            }
            Body::ChunkAck { transfer, upto } => {
                match self.transfers.acked(from, transfer, upto, self.ticks) {
                    Next::Send(chunk) => Self::send(ctx, from, Body::Chunk(chunk)),
                    Next::Done { whole: true } => self.raw.report_snapshot(from.0, SnapshotStatus::Finish),
                    Next::Done { whole: false } | Next::Nothing => {}
                }
            }
            Body::WantEphemeral => self.offer_ephemeral(ctx, from),
            Body::EphemeralLost => {
                if let Some(search) = &mut self.search {
                    search.lost.insert(from);
                }
            }
            Body::NotMember { index, voters } => self.on_not_member(index, voters),
        }
        self.fix_timeout(ctx, false);
        Ok(())
    }

    fn on_raft(&mut self, ctx: &mut Ctx<'_>, from: NodeId, message: RaftMsg) -> Result<(), MetaError> {
        let Ok(message) = message.into_message(from, ctx.config.node) else {
            ctx.counters.refused += 1;
            return Ok(());
        };
        // Raft counts a batch of entries as durable only as a whole: one that the ring cannot hold before the
        // next compaction would never be. The leader sends them again.
        let bytes: usize = message.entries.iter().map(|entry| data_of(entry).len() + 32).sum();
        if bytes > 0
            && message.get_msg_type() == MessageType::MsgAppend
            && !self.journal.has_room(self.received_bytes + bytes)
        {
            ctx.counters.throttled += 1;
            return Ok(());
        }
        self.received_bytes += bytes;
        if message.get_msg_type() == MessageType::MsgTimeoutNow && self.installing.is_some() {
            return Ok(()); // see `on_tick`
        }
        self.answer_stranger(ctx, from, message.get_msg_type());
        match guard::judge(&self.raw.raft, &message) {
            // An error means that Raft has ignored it: an unknown peer, or no leader to pass it on to.
            guard::Verdict::Step => drop(self.raw.step(message)),
            guard::Verdict::Drop => ctx.counters.refused += 1,
            guard::Verdict::Halt(error) => return Err(error),
        }
        Ok(())
    }

    /// A completion of the disk.
    pub fn on_disk(
        &mut self,
        ctx: &mut Ctx<'_>,
        token: Token,
        result: Result<(), DiskError>,
    ) -> Result<(), MetaError> {
        match self.journal.on_disk(ctx.env, token, result)? {
            Some(Event::Durable(upto)) => self.durable(ctx, upto),
            Some(Event::Snapshot { index, installed }) => {
                if let Some(upto) = installed {
                    self.durable(ctx, upto);
                    if let Some(image) = self.installing.take() {
                        self.install(ctx, image);
                    }
                }
                self.raw.mut_store().compact(index);
            }
            None => {}
        }
        self.fix_timeout(ctx, false);
        self.journal.pump(ctx.env)
    }

    /// Everything up to `upto` is durable: Raft may count on it, and what waited for it goes out.
    fn durable(&mut self, ctx: &mut Ctx<'_>, upto: u64) {
        self.durable_seq = self.durable_seq.max(upto);
        while self.waits.front().is_some_and(|wait| wait.seq <= self.durable_seq) {
            if let Some(wait) = self.waits.pop_front() {
                self.durable_term = self.durable_term.max(wait.term);
                self.raw.on_persist_ready(wait.ready);
                self.send_messages(ctx, wait.messages);
            }
        }
    }

    pub(crate) fn send_messages(&mut self, ctx: &mut Ctx<'_>, messages: Vec<Message>) {
        for message in messages {
            let to = NodeId(message.to);
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.send_snapshot(ctx, to);
            } else {
                Self::send(ctx, to, Body::Raft(RaftMsg::of(message)));
            }
        }
    }

    /// Handles everything that has come together: one journal write for all of it.
    pub fn flush(&mut self, ctx: &mut Ctx<'_>) -> Result<(), MetaError> {
        self.received_bytes = 0;
        for _ in 0..READY_ROUNDS_MAX {
            self.note_leader(ctx);
            self.drive_requests(ctx);
            let confirm = self.reads.take_group(self.ticks, ctx.requests);
            if let Some(context) = confirm {
                self.raw.read_index(context);
            }
            if self.raw.has_ready() {
                self.on_ready(ctx)?;
            }
            self.apply(ctx)?;
            self.journal.pump(ctx.env)?;
            self.serve_reads(ctx);
            if !self.raw.has_ready() {
                break;
            }
        }
        self.note_leader(ctx);
        self.maybe_compact(ctx)
    }

    fn on_ready(&mut self, ctx: &mut Ctx<'_>) -> Result<(), MetaError> {
        let mut ready = self.raw.ready();
        for state in ready.take_read_states() {
            self.on_read_state(ctx, state.index, &state.request_ctx);
        }
        let messages = ready.take_messages();
        self.send_messages(ctx, messages);
        self.hard_changed |= ready.hs().is_some();
        if self.hard_changed && ready.must_sync() {
            // A commit alone is not worth a write, but it goes before the next entries: who has a step of a change
            // of the members must know, after a restart, that the step before was committed.
            self.hard_changed = false;
            let raft = &self.raw.raft;
            let hard = Hard { term: raft.term, vote: raft.vote, commit: raft.raft_log.committed };
            self.appended_seq = self.journal.append(Record::Hard(hard));
        }
        if !ready.snapshot().is_empty() {
            let meta = ready.snapshot().get_metadata();
            let (index, term) = (meta.index, meta.term);
            self.raw.mut_store().reset(index, term);
            let mut next = Machine::new(ctx.config.planted);
            next.install(self.installing.clone().unwrap_or_default());
            self.raw.mut_store().set_members(next.members());
            let bytes = image::encode(&next, Parts::Durable);
            self.appended_seq = self.journal.install(index, term, bytes)?;
        }
        for entry in ready.entries() {
            self.appended_seq = self.journal.append(record_of(entry));
        }
        let entries = ready.take_entries();
        self.raw.mut_store().append(&entries);
        self.to_apply.extend(ready.take_committed_entries());
        // An answer to a heartbeat promises nothing that is not durable, once the term is; held back behind a
        // slow write it would cost the leader its quorum.
        let term = self.durable_term;
        let may_go = |m: &Message| m.get_msg_type() == MessageType::MsgHeartbeatResponse && m.term == term;
        let (now, later) = ready.take_persisted_messages().into_iter().partition(may_go);
        self.send_messages(ctx, now);
        let wait = Wait {
            ready: ready.number(),
            term: self.raw.raft.term,
            seq: if ready.must_sync() {
                self.appended_seq
            } else {
                self.waits.back().map_or(self.durable_seq, |wait| wait.seq)
            },
            messages: later,
        };
        self.raw.advance_append_async(ready);
        self.waits.push_back(wait);
        let upto = if ctx.config.planted.has(Bug::AckBeforeLogDurable) && self.installing.is_none() {
            self.appended_seq
        } else {
            self.durable_seq
        };
        self.durable(ctx, upto);
        Ok(())
    }

    /// Applies committed entries.
    fn apply(&mut self, ctx: &mut Ctx<'_>) -> Result<(), MetaError> {
        let before = self.machine.index;
        while !self.to_apply.is_empty() {
            if self.machine.ephemeral == Ephemeral::Lost
                && self.transfers.ephemeral_arriving() == Some(self.machine.index)
                && !self.is_leader()
            {
                break; // the image that is arriving fits only onto the entry before
            }
            let Some(entry) = self.to_apply.pop_front() else { break };
            let applied = self
                .machine
                .apply(entry.index, entry.term, data_of(&entry))
                .map_err(|_| MetaError::BadEntry { index: entry.index })?;
            ctx.tell(applied.changes);
            if let Some((id, outcome)) = applied.done
                && id.session == ctx.requests.session
            {
                ctx.requests.complete(id.seq, outcome.reply());
            }
            if let Some(serving) = &mut self.serving {
                serving.applied(entry.index, applied.lease, ctx.env.now());
            }
            if let Some(before) = applied.members {
                self.take_members(ctx, &before)?;
            }
            if applied.lease == Some(LeaseEvent::Reset) {
                self.ephemeral_image = None;
            }
            self.take_ephemeral(ctx);
        }
        if self.machine.index != before {
            self.raw.mut_store().applied = (self.machine.index, self.machine.term);
            self.raw.advance_apply_to(self.machine.index);
        }
        self.start_serving(ctx);
        Ok(())
    }

    fn start_serving(&mut self, ctx: &mut Ctx<'_>) {
        let ready = self.is_leader() && self.raw.raft.apply_to_current_term();
        if ready && self.machine.ephemeral == Ephemeral::Lost && self.search.is_none() {
            self.seek_ephemeral(ctx);
        }
        if ready && self.serving.is_none() && self.machine.ephemeral == Ephemeral::Known {
            self.serving = Some(Serving::new(&self.machine, ctx.env.now(), ctx.config.planted));
            self.drive_requests(ctx);
        }
    }

    /// Notices a change of leader or term.
    fn note_leader(&mut self, ctx: &mut Ctx<'_>) {
        let now = (self.raw.raft.leader_id, self.raw.raft.term);
        if now == self.told_leader {
            return;
        }
        self.told_leader = now;
        self.serving = None;
        self.search = None;
        self.confirmed_by = None;
        self.reads.clear(ctx.requests);
        ctx.requests.restart();
        let leader = self.leader();
        let is_me = self.is_leader();
        ctx.out.push_back(MetaOutput::Leader { leader, term: now.1, is_me });
    }

    fn maybe_compact(&mut self, ctx: &mut Ctx<'_>) -> Result<(), MetaError> {
        if !self.journal.wants_compaction() || !self.journal.may_save() {
            return Ok(());
        }
        let index = self.machine.index;
        if index > self.journal.snapshot_index || self.journal.would_free(index) {
            let bytes = image::encode(&self.machine, Parts::Durable);
            return self.journal.save(ctx.env, index, self.machine.term, bytes);
        }
        let tail = || self.raw.store().behind(index);
        let bytes: usize = tail().map(|entry| data_of(entry).len() + 32).sum();
        if self.journal.wants_rewrite() && self.journal.has_room(bytes) {
            let records: Vec<Record> = tail().map(record_of).collect();
            self.appended_seq = self.journal.rewrite(records.into_iter());
        }
        Ok(())
    }

    /// Another voter's process is known to be gone: do not wait for the whole timeout. The remaining
    /// voters stand one after the other, so that they do not split the vote.
    pub fn on_peer_gone(&mut self, ctx: &mut Ctx<'_>, peer: NodeId) {
        if self.is_leader() {
            self.raw.report_unreachable(peer.0);
        } else if self.leader() == Some(peer) {
            let me = ctx.config.node;
            let voters = self.machine.members().all_voters();
            let rank = voters.iter().filter(|node| **node != peer && **node < me).count();
            // From here on this voter answers candidates again.
            self.raw.raft.election_elapsed = self.raw.raft.election_elapsed.max(ELECTION_TICKS_MIN);
            self.election_ticks = (ELECTION_TICKS_MIN + 1 + 2 * rank).min(ELECTION_TICKS_END - 1);
            self.fix_timeout(ctx, false);
        }
    }

    /// Asks the most advanced other voter to lead (before a clean stop).
    pub fn resign(&mut self) {
        let me = NodeId(self.raw.raft.id);
        if self.is_leader()
            && let Some(best) = self.best_voter(|node| node != me)
        {
            self.raw.transfer_leader(best.0);
        }
    }
}

/// What of an entry goes to disk.
fn record_of(entry: &Entry) -> Record {
    let data = match Command::decode(data_of(entry)).ok().and_then(|command| command.without_ephemeral()) {
        Some(stripped) => stripped.encode(),
        None => data_of(entry).to_vec(),
    };
    Record::Entry { index: entry.index, term: entry.term, data }
}
