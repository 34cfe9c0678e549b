//! `MetaNode`: one voter of the metadata group, as its owner sees it.

use crate::bounds::{META_TICK_MS, STALL_TICKS, VOTERS_MAX};
use crate::check;
use crate::codec::{Body, Packet};
use crate::error::MetaError;
use crate::journal::Place;
use crate::journal_open::{Identity, Opening, Progress};
use crate::kv::Kv;
use crate::planted::{Bug, Planted};
use crate::requests::Requests;
use crate::running::Running;
use reactor::{DiskError, DiskIndex, DiskOp, Env, Mono, Token};
use std::collections::VecDeque;
use wire::control::{Change, MetaReply, MetaRequest, VoterAddress};
use wire::{ClusterId, NodeId, Revision, Status};

/// What a voter must know.
#[derive(Clone, Debug)]
pub struct MetaConfig {
    /// This node; not 0.
    pub node: NodeId,
    /// The voters that found the group, the same on each of them. They count when this node is one of them and its
    /// region is blank; who belongs to the group later is in the region. A node that is none of them waits with a
    /// blank region until the group wants it.
    pub voters: Vec<NodeId>,
    /// Where nodes are reached, as far as configured: published when the members change.
    pub addresses: Vec<VoterAddress>,
    /// The cluster.
    pub cluster: ClusterId,
    /// The disk that holds the region.
    pub disk: DiskIndex,
    /// Start of the region in bytes, a multiple of 4096.
    pub region_offset: u64,
    /// Length of the region in bytes, at least `REGION_BYTES_MIN`, fixed for the life of the region. The
    /// same on every voter: the smallest bounds the keys of all.
    pub region_len: u64,
    /// Tokens of disk operations: the upper 32 bits are these, the lower 32 bits are the node's own.
    pub tokens: u64,
    /// Deliberate bugs, for tests.
    pub planted: Planted,
}

/// What a voter gives to its owner.
#[derive(Clone, PartialEq, Debug)]
pub enum MetaOutput {
    /// Carry these bytes to this voter's `on_message`. May be lost, doubled, delayed or reordered.
    Send {
        /// The voter.
        to: NodeId,
        /// At most `MESSAGE_BYTES_MAX`.
        bytes: Vec<u8>,
    },
    /// A submitted request is answered.
    Reply {
        /// From `submit`.
        ticket: u64,
        /// The answer.
        reply: MetaReply,
    },
    /// The local replica has changed. The first of a run holds everything, and says that the replica is
    /// ready; from then on revisions rise, and a consumer that applies all `changes` has exactly `kv()`.
    /// Every transaction is in exactly one of them; a snapshot taken from the leader is one as well.
    Changes {
        /// The store's revision after them.
        revision: Revision,
        /// In write order.
        changes: Vec<Change>,
    },
    /// Leader or term have changed.
    Leader {
        /// The leader, as far as this voter knows.
        leader: Option<NodeId>,
        /// Raft's term.
        term: u64,
        /// This voter leads.
        is_me: bool,
    },
    /// This voter has stopped for good. The last output but for replies.
    Failed(MetaError),
}

/// Counters, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MetaCounters {
    /// Messages of unknown nodes.
    pub foreign_node: u64,
    /// Messages of other clusters.
    pub foreign_cluster: u64,
    /// Messages that could not be decoded.
    pub malformed: u64,
    /// Messages that decode but that no voter sends.
    pub refused: u64,
    /// Entries not taken because the log had no room; they come again.
    pub throttled: u64,
}

/// A voter's state at a glance, for metrics and `status`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MetaStatus {
    /// The replica can be read and watched.
    pub ready: bool,
    /// Leader known to this voter.
    pub leader: Option<NodeId>,
    /// Raft's term.
    pub term: u64,
    /// Last entry in the log, last committed and last applied.
    pub last_index: u64,
    /// See `last_index`.
    pub commit_index: u64,
    /// See `last_index`.
    pub applied_index: u64,
    /// Last entry covered by the snapshot on disk.
    pub snapshot_index: u64,
    /// Log blocks in use and in all.
    pub log_blocks: (u64, u64),
    /// Requests of this node in progress.
    pub requests: usize,
}

/// What the parts need from the node.
pub(crate) struct Ctx<'a> {
    pub env: &'a mut dyn Env,
    pub out: &'a mut VecDeque<MetaOutput>,
    pub requests: &'a mut Requests,
    pub config: &'a MetaConfig,
    pub counters: &'a mut MetaCounters,
}

impl Ctx<'_> {
    pub fn tell(&mut self, changes: Option<(Revision, Vec<Change>)>) {
        if let Some((revision, changes)) = changes {
            self.out.push_back(MetaOutput::Changes { revision, changes });
        }
    }
}

/// What a node is in the group, as far as it knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// The region is being read, or has failed.
    Unknown,
    /// The region is blank: nobody has wanted this node yet.
    Blank,
    /// Not a member, or not any more.
    Outside,
    /// Is being filled.
    Learner,
    /// Votes.
    Voter,
}

enum Phase {
    /// Between two phases, inside one call.
    Moving,
    Opening(Box<Opening>),
    Blank(Box<Opening>),
    Running(Box<Running>),
    Failed,
}

/// One voter of the metadata group.
pub struct MetaNode {
    config: MetaConfig,
    phase: Phase,
    requests: Requests,
    out: VecDeque<MetaOutput>,
    counters: MetaCounters,
    last_tick: Option<Mono>,
    empty: Kv,
}

impl MetaNode {
    /// Starts to open the region (a blank one is formatted). Becomes ready by events: the first
    /// `MetaOutput::Changes`. Errors come as `MetaOutput::Failed`.
    pub fn open(env: &mut dyn Env, config: MetaConfig) -> Self {
        // Session 0 stands for the leader itself.
        let session = env.random().max(1);
        let mut this = Self {
            phase: Phase::Moving,
            requests: Requests::new(session),
            out: VecDeque::new(),
            counters: MetaCounters::default(),
            last_tick: None,
            empty: Kv::default(),
            config,
        };
        match this.start(env) {
            Ok(opening) => this.phase = Phase::Opening(Box::new(opening)),
            Err(error) => this.fail(error),
        }
        this
    }

    fn start(&mut self, env: &mut dyn Env) -> Result<Opening, MetaError> {
        let config = &self.config;
        let mut sorted = config.voters.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if config.node == NodeId(0) || config.voters.contains(&NodeId(0)) {
            return Err(MetaError::Config("node 0 cannot vote"));
        }
        if !config.voters.contains(&config.node) {
            sorted.clear();
        } else if sorted.len() != config.voters.len()
            || sorted.len() > VOTERS_MAX
            || sorted.len().is_multiple_of(2)
        {
            return Err(MetaError::Config("voters must be 1, 3, 5 or 7 different nodes"));
        }
        let place = Place { disk: config.disk, offset: config.region_offset, tokens: config.tokens };
        // Order in the configuration file must not matter.
        let who = Identity { cluster: config.cluster, node: config.node, voters: sorted };
        Opening::start(env, place, config.region_len, who, config.planted)
    }

    fn fail(&mut self, error: MetaError) {
        self.phase = Phase::Failed;
        self.requests.fail_all();
        self.out.push_back(MetaOutput::Failed(error));
    }

    /// Runs `f` on the running part; its error stops the node.
    fn run(
        &mut self,
        env: &mut dyn Env,
        f: impl FnOnce(&mut Running, &mut Ctx<'_>) -> Result<(), MetaError>,
    ) {
        let Self { config, phase, requests, out, counters, .. } = self;
        let Phase::Running(running) = phase else { return };
        let result = f(running, &mut Ctx { env, out, requests, config, counters });
        if let Err(error) = result {
            self.fail(error);
        }
    }

    /// A disk operation with one of our tokens ended.
    pub fn on_disk(&mut self, env: &mut dyn Env, token: Token, result: Result<(), DiskError>, op: DiskOp) {
        match std::mem::replace(&mut self.phase, Phase::Moving) {
            Phase::Opening(opening) => match opening.on_disk(env, token, result, &op) {
                Ok(Progress::Busy(opening)) => self.phase = Phase::Opening(opening),
                Ok(Progress::Blank(opening)) => self.phase = Phase::Blank(opening),
                Ok(Progress::Open(journal, recovered)) => {
                    let Self { config, requests, out, counters, .. } = self;
                    let mut ctx = Ctx { env, out, requests, config, counters };
                    match Running::new(&mut ctx, *journal, recovered) {
                        Ok(running) => self.phase = Phase::Running(Box::new(running)),
                        Err(error) => self.fail(error),
                    }
                }
                Err(error) => self.fail(error),
            },
            other => {
                self.phase = other;
                self.run(env, |running, ctx| running.on_disk(ctx, token, result));
            }
        }
    }

    /// To be called every `META_TICK_MS`.
    pub fn on_tick(&mut self, env: &mut dyn Env) {
        let now = env.now();
        let tick_ns = META_TICK_MS * 1_000_000;
        let gap = self.last_tick.map_or(0, |last| now.since(last));
        let stalled = if gap > STALL_TICKS * tick_ns { gap - tick_ns } else { 0 };
        let stalled = if self.config.planted.has(Bug::LeaderPauseForgotten) { 0 } else { stalled };
        self.last_tick = Some(now);
        if let Phase::Opening(opening) = &mut self.phase {
            opening.retry(env);
        }
        if !matches!(self.phase, Phase::Running(_)) {
            self.requests.expire(now);
        }
        self.run(env, |running, ctx| running.on_tick(ctx, stalled));
    }

    /// Bytes of `MetaOutput::Send` from another voter. `from` is who the connection belongs to.
    pub fn on_message(&mut self, env: &mut dyn Env, from: NodeId, bytes: &[u8]) {
        let Ok(packet) = Packet::decode(bytes) else {
            self.counters.malformed += 1;
            return;
        };
        if packet.cluster != self.config.cluster {
            self.counters.foreign_cluster += 1;
        } else if packet.from != from || from == self.config.node || !self.admits(from, &packet.body) {
            self.counters.foreign_node += 1;
        } else if matches!(self.phase, Phase::Blank(_)) {
            self.wanted(env, &packet.body);
        } else {
            self.run(env, |running, ctx| running.on_body(ctx, from, packet.body));
        }
    }

    fn admits(&self, from: NodeId, body: &Body) -> bool {
        match &self.phase {
            Phase::Running(running) => running.machine.members().contains(from) || body.is_for_strangers(),
            _ => true,
        }
    }

    /// A leader fills this node: from now on it has a region. The message itself comes again.
    fn wanted(&mut self, env: &mut dyn Env, body: &Body) {
        if !body.is_leaders() {
            return;
        }
        if let Phase::Blank(mut opening) = std::mem::replace(&mut self.phase, Phase::Moving) {
            match opening.format(env) {
                Ok(()) => self.phase = Phase::Opening(opening),
                Err(error) => self.fail(error),
            }
        }
    }

    /// What this node is in the group.
    pub fn standing(&self) -> Standing {
        let me = self.config.node;
        match &self.phase {
            Phase::Blank(_) => Standing::Blank,
            Phase::Running(running) if running.is_voter(me) => Standing::Voter,
            Phase::Running(running) if running.is_dismissed() => Standing::Outside,
            Phase::Running(running) if running.machine.members().contains(me) => Standing::Learner,
            Phase::Running(_) => Standing::Outside,
            Phase::Moving | Phase::Opening(_) | Phase::Failed => Standing::Unknown,
        }
    }

    /// Where a member is reached, when a change of the members has said so. Known before the replica is ready.
    pub fn address_of(&self, node: NodeId) -> Option<&str> {
        match &self.phase {
            Phase::Running(running) => running.machine.members().address(node),
            _ => None,
        }
    }

    /// All members of the group, as far as this node knows.
    pub fn members(&self) -> Vec<NodeId> {
        match &self.phase {
            Phase::Running(running) => running.machine.members().all(),
            _ => Vec::new(),
        }
    }

    /// Who votes as far as this node knows, and the index of the log, so the revision, at which that was so.
    /// Addresses that nobody has told are empty.
    pub fn latest_voters(&self) -> Option<(u64, Vec<VoterAddress>)> {
        match &self.phase {
            Phase::Running(running) => Some(running.latest_voters(&self.config)),
            _ => None,
        }
    }

    /// Takes a request; exactly one `Reply` with this ticket follows, at the latest after
    /// `REQUEST_DEADLINE_MS`. Malformed requests fail with `Invalid`. When no answer can be had:
    /// `NotActive` means that nothing was done, `Unknown` that it may have been.
    pub fn submit(&mut self, env: &mut dyn Env, ticket: u64, request: MetaRequest) {
        if !check::is_valid(&request) {
            self.requests.refuse(ticket, Status::Invalid);
        } else if matches!(self.phase, Phase::Failed) {
            self.requests.refuse(ticket, Status::NotActive);
        } else {
            self.requests.submit(env.now(), ticket, request);
        }
    }

    /// Answers every request in progress: this node is not the way to the store any more. `Unknown` where a leader may
    /// have acted on it.
    pub fn abandon_requests(&mut self) {
        self.requests.fail_all();
    }

    /// To be called after every batch of calls: closes the group commit, and lets messages out.
    pub fn flush(&mut self, env: &mut dyn Env) {
        self.run(env, |running, ctx| running.flush(ctx));
    }

    /// The next output.
    pub fn poll(&mut self) -> Option<MetaOutput> {
        for (ticket, reply) in self.requests.take_answers() {
            self.out.push_back(MetaOutput::Reply { ticket, reply });
        }
        self.out.pop_front()
    }

    /// The local replica: what has been applied here. Complete only when `is_ready`; may be behind the
    /// leader's. Linearizable reads are `MetaRequest::Range`.
    pub fn kv(&self) -> &Kv {
        match &self.phase {
            Phase::Running(running) => running.machine.kv(),
            _ => &self.empty,
        }
    }

    /// Whether the replica is complete, so that watchers can be served: ephemeral keys are known and
    /// `Changes` has told everything in `kv()`.
    pub fn is_ready(&self) -> bool {
        matches!(&self.phase, Phase::Running(running) if running.machine.is_ready())
    }

    /// Whether this voter leads and serves requests.
    pub fn is_serving(&self) -> bool {
        matches!(&self.phase, Phase::Running(running) if running.serving.is_some())
    }

    /// The leader, as far as this voter knows.
    pub fn leader(&self) -> Option<NodeId> {
        match &self.phase {
            Phase::Running(running) => running.leader(),
            _ => None,
        }
    }

    /// The host of `peer` says that its process is gone (connection refused or reset). A hint that makes
    /// elections faster; wrong hints are harmless.
    pub fn on_peer_gone(&mut self, env: &mut dyn Env, peer: NodeId) {
        self.run(env, |running, ctx| {
            running.on_peer_gone(ctx, peer);
            Ok(())
        });
    }

    /// Hands leadership to another voter, before a clean stop. Goes on working until dropped.
    pub fn resign(&mut self, env: &mut dyn Env) {
        self.run(env, |running, _| {
            running.resign();
            Ok(())
        });
    }

    /// Messages that were ignored, by reason.
    pub fn counters(&self) -> MetaCounters {
        self.counters
    }

    /// State at a glance.
    pub fn status(&self) -> MetaStatus {
        let requests = self.requests.pending.len();
        let Phase::Running(running) = &self.phase else {
            return MetaStatus { requests, ..MetaStatus::default() };
        };
        MetaStatus {
            ready: running.machine.is_ready(),
            leader: running.leader(),
            term: running.raw.raft.term,
            last_index: running.raw.raft.raft_log.last_index(),
            commit_index: running.raw.raft.raft_log.committed,
            applied_index: running.machine.index,
            snapshot_index: running.journal.snapshot_index,
            log_blocks: running.journal.usage(),
            requests,
        }
    }
}
