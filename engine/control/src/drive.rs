//! What happens between events: the metadata store is heard and asked, and everybody who lives from it
//! gets the turn.

use crate::config::{ControlError, Phase};
use crate::core::ControlCore;
use crate::lease::{Ask, Do};
use crate::links::{Uplink, UplinkOut};
use crate::stop::Stop;
use crate::view::Touched;
use consensus::{MetaNode, MetaOutput};
use reactor::{ConnId, Env};
use std::rc::Rc;
use wire::control::{Change, ControlMsg, MetaReply, MetaRequest};
use wire::{ClusterId, DiskUuid, NodeId, Revision, SessionId, Status};

/// Changes parsed in one step: some five microseconds each with what follows from them.
const CHANGES_PER_STEP: usize = 256;
/// Rounds of asking and hearing in one step: a single voter answers at once, and answers lead to new
/// questions.
const ROUNDS: usize = 4;

/// The way to the metadata store.
pub enum Meta {
    /// Before the start.
    None,
    /// A voter of our own.
    Voter(Box<MetaNode>),
    /// Another node's.
    Remote(Box<Uplink>),
}

/// Who waits for an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asker {
    /// A connection's request.
    Client {
        /// The connection.
        conn: ConnId,
        /// Its ticket.
        ticket: u64,
    },
    /// The node's registration and lease.
    Registrar(Ask),
    /// The director's transaction.
    Director(u64),
    /// A transaction of primaries' wishes.
    Wishes(u64),
    /// The statistics of this session.
    Stats(SessionId),
    /// What a scrub found.
    Scrubs,
    /// Generations of the node's slices.
    Marks,
    /// A disk that the running node takes.
    NewDisk(DiskUuid),
}

/// Changes that are being taken over.
pub struct Incoming {
    revision: Revision,
    changes: Rc<Vec<Change>>,
    at: usize,
}

impl ControlCore {
    /// Asks the metadata store.
    pub(crate) fn ask(&mut self, env: &mut dyn Env, asker: Asker, request: MetaRequest) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, asker);
        match &mut self.meta {
            Meta::Voter(node) => node.submit(env, ticket, request),
            Meta::Remote(uplink) => uplink.submit(env, ticket, request),
            Meta::None => self.answered(env, ticket, MetaReply::failed(Status::NotActive)),
        }
    }

    /// Does everything that is due; whether something is left over for the next step.
    pub(crate) fn drive(&mut self, env: &mut dyn Env) -> bool {
        if self.stop == Stop::Done {
            self.feed.pump(env, &self.view);
            return self.feed.has_work();
        }
        let mut budget = CHANGES_PER_STEP;
        for round in 0..ROUNDS {
            if let Some(node) = self.member() {
                node.flush(env);
            }
            let heard = self.hear(env);
            self.follow_voters(env);
            while budget > 0 && !self.incoming.is_empty() {
                budget = self.take_over_some(env, budget);
            }
            if self.incoming.is_empty() {
                self.check_leadership(env);
                self.plan(env, round == 0);
            }
            if !heard {
                break;
            }
        }
        if let Some(node) = self.member() {
            node.flush(env);
        }
        self.drive_stop(env);
        self.feed.pump(env, &self.view);
        self.server.pump(env);
        !self.incoming.is_empty()
            || self.feed.has_work()
            || self.server.has_work()
            || self.director.has_work(env.now())
            || self.wishes.has_work()
    }

    /// Takes what the metadata store has to say; whether there was anything.
    fn hear(&mut self, env: &mut dyn Env) -> bool {
        let mut heard = self.hear_spare(env);
        loop {
            let output = match &mut self.meta {
                Meta::Voter(node) => node.poll(),
                _ => None,
            };
            let Some(output) = output else { break };
            heard = true;
            match output {
                MetaOutput::Send { to, bytes } => self.carry(env, to, bytes),
                MetaOutput::Reply { ticket, reply } => self.answered(env, ticket, reply),
                MetaOutput::Changes { revision, changes } => self.changed(revision, changes),
                MetaOutput::Leader { leader, term, is_me } => {
                    tracing::info!(node = %self.config.node, ?leader, term, is_me, "metadata leader");
                }
                MetaOutput::Failed(error) => self.fail(error.into()),
            }
        }
        let outputs = match &mut self.meta {
            Meta::Remote(uplink) => uplink.take(),
            _ => Vec::new(),
        };
        for output in outputs {
            heard = true;
            match output {
                UplinkOut::Reply(ticket, reply) => self.answered(env, ticket, reply),
                UplinkOut::Changes(revision, changes) => self.changed(revision, changes),
                UplinkOut::Snapshot(revision, items) => {
                    self.take_over_all(env);
                    let changes = self.mirror.difference(&items);
                    self.changed(revision, changes);
                }
                UplinkOut::OtherCluster(theirs) => self.other_cluster(theirs),
            }
        }
        heard
    }

    /// A voter belongs to another cluster. Before the registration that is a mistake in the configuration
    /// that trying again cannot cure; later it may be one misdirected address among good ones.
    fn other_cluster(&mut self, theirs: ClusterId) {
        let own = self.config.cluster;
        if self.config.status.get().phase == Phase::Starting {
            self.fail(ControlError::OtherCluster { own, theirs });
        } else {
            tracing::error!(node = %self.config.node, %own, %theirs, "a voter belongs to another cluster");
        }
    }

    /// Raft's messages may be lost: what cannot be sent now is not kept. A member that has just come back may not know
    /// where a leader is that joined meanwhile, and hears of it only in the entries that answers to that leader bring:
    /// then they go back on the leader's own connection.
    pub(crate) fn carry(&mut self, env: &mut dyn Env, to: NodeId, bytes: Vec<u8>) {
        let msg = ControlMsg::Raft { bytes };
        if self.link_to(to).is_none_or(|link| !link.send(env, &msg)) {
            self.server.carry(env, to, &msg);
        }
    }

    pub(crate) fn changed(&mut self, revision: Revision, changes: Vec<Change>) {
        self.incoming.push_back(Incoming { revision, changes: Rc::new(changes), at: 0 });
    }

    fn take_over_all(&mut self, env: &mut dyn Env) {
        while !self.incoming.is_empty() {
            self.take_over_some(env, usize::MAX);
        }
    }

    /// Parses at most so many changes; how many more may be parsed.
    fn take_over_some(&mut self, env: &mut dyn Env, budget: usize) -> usize {
        let Some(incoming) = self.incoming.front_mut() else { return budget };
        let (revision, changes) = (incoming.revision, incoming.changes.clone());
        let from = incoming.at;
        let to = from.saturating_add(budget).min(changes.len());
        incoming.at = to;
        let part = changes.get(from..to).unwrap_or(&[]);
        self.mirror.apply(part);
        for change in part {
            let touched = self.view.apply(change);
            self.touched(env, touched);
        }
        if to == changes.len() {
            self.incoming.pop_front();
            self.mirror.finish(revision);
            self.server.changes(env, revision, &changes);
            if self.incoming.is_empty() {
                self.server.ready(&self.mirror);
            }
        }
        // A change without contents costs a step, too: the loop must end.
        budget.saturating_sub((to - from).max(1))
    }

    fn touched(&mut self, env: &mut dyn Env, touched: Touched) {
        self.director.touched(&self.view, touched, env.now());
        match touched {
            Touched::Pg(pg) => {
                self.feed.touch_one(pg);
                self.wishes.touched(pg);
                self.scrubs.pg_touched(pg);
                let primary = self.view.pgs().get(&pg).and_then(|entry| entry.record.primary);
                let home = primary.and_then(|slice| self.view.home(slice));
                if home.is_none_or(|home| home.node != self.config.node) {
                    self.stats.forget(pg);
                }
            }
            Touched::Live { node, .. } => {
                self.feed.full(self.view.full());
                self.feed.touch(self.view.pgs_of_node(node));
            }
            Touched::Node(_) => self.feed.touch(self.view.pgs().keys().copied()),
            Touched::Pool(pool) => {
                self.scrubs.touched(); // its schedule may be another
                self.feed.touch(self.view.pgs_of_pool(pool).map(|(pg, _)| *pg));
                if !self.view.pools().contains_key(&pool) {
                    self.stats.forget_pool(pool);
                }
            }
            Touched::Scrub(_) => self.scrubs.touched(),
            Touched::Settings => {
                self.scrubs.touched();
                self.feed.settings(*self.view.settings());
                self.look_for_full();
            }
            Touched::Disk(disk) => self.disk_touched(disk),
            Touched::Drain(_) | Touched::Cluster | Touched::Image(_) | Touched::Other => {}
        }
    }

    fn check_leadership(&mut self, env: &mut dyn Env) {
        let serving = match &self.meta {
            Meta::Voter(node) => node.is_serving() && self.mirror.is_ready(),
            _ => false,
        };
        if serving != self.director.is_leading() {
            if serving {
                self.director.lead(&self.view, env.now());
            } else {
                self.director.resign();
            }
            self.config.status.set(|status| status.leading = serving);
        }
    }

    /// Asks for everything that is due; the director's part is large and done once per step.
    fn plan(&mut self, env: &mut dyn Env, direct: bool) {
        let now = env.now();
        let node = self.config.node;
        let seen = self.mirror.revision();
        let live = self.view.live().get(&node).map(|live| live.session);
        let todo = self.registrar.on_tick(&self.config, now, seen, live, self.fresh);
        self.registrar_does(env, todo);
        self.plan_new_disks(env);
        let plans = if direct { self.director.plan(&self.view, now) } else { Vec::new() };
        for plan in plans {
            self.ask(env, Asker::Director(plan.batch), plan.request);
        }
        if self.registrar.is_registered() {
            let session = self.registrar.session();
            for txn in self.wishes.plan(&self.view, session) {
                self.ask(env, Asker::Wishes(txn.batch), txn.request);
            }
            if let Some(request) = self.stats.plan(node, session, now) {
                self.ask(env, Asker::Stats(session), request);
            }
            if self.stop == Stop::No {
                self.plan_scrubs(env);
                let own = &self.config.disks;
                for (core, msg) in self.slow_disks.look(&self.mirror, &self.view, own, now) {
                    self.feed.order(core, msg);
                }
            }
            let process = self.registrar.process();
            if let Some(request) = self.marks.plan(&self.config, &self.view, session, process, now) {
                self.ask(env, Asker::Marks, request);
            }
        }
    }

    fn plan_scrubs(&mut self, env: &mut dyn Env) {
        let (now, wall_ms) = (env.now(), env.wall().0);
        for (core, msg) in self.scrubs.look(&self.view, self.config.node, now, wall_ms) {
            self.feed.send(core, msg);
        }
        if let Some(request) = self.scrubs.plan(&self.view, self.registrar.session(), wall_ms) {
            self.ask(env, Asker::Scrubs, request);
        }
    }

    pub(crate) fn registrar_does(&mut self, env: &mut dyn Env, todo: Vec<Do>) {
        for one in todo {
            match one {
                Do::Submit(ask, request) => self.ask(env, Asker::Registrar(ask), request),
                Do::Registered(session) => {
                    tracing::info!(node = %self.config.node, %session, "registered");
                    self.feed.open(&self.view, session);
                    self.stats.restart();
                    self.config.status.set(|status| {
                        status.phase = Phase::Registered;
                        status.session = Some(session);
                    });
                }
                Do::Lost(session) => {
                    self.feed.shut(session);
                    self.wishes.clear();
                    self.scrubs.clear();
                    self.fresh = SessionId(env.random().max(1));
                    self.config.status.set(|status| {
                        status.phase = Phase::Starting;
                        status.session = Some(session);
                    });
                }
                Do::Authority(until) => {
                    self.authority = self.authority.max(until);
                    if matches!(self.stop, Stop::No | Stop::HandingOver { .. }) {
                        self.feed.lease(self.authority);
                    }
                }
                Do::Refuse(slices) => {
                    slices.into_iter().for_each(|(slice, why)| self.refuse_slice(slice, why));
                }
                Do::Fail(error) => self.fail(error),
                Do::Revoked => self.revoked(env),
            }
        }
    }

    pub(crate) fn answered(&mut self, env: &mut dyn Env, ticket: u64, reply: MetaReply) {
        let Some(asker) = self.tickets.remove(&ticket) else { return };
        let now = env.now();
        match asker {
            Asker::Client { conn, ticket } => self.server.reply(conn, ticket, reply),
            Asker::Registrar(ask) => {
                let wall = env.wall();
                let todo = self.registrar.on_reply(&self.config, now, wall, self.fresh, ask, reply);
                self.registrar_does(env, todo);
            }
            Asker::Director(batch) => self.director.on_reply(batch, &reply, now),
            Asker::Wishes(batch) => self.wishes.on_reply(&self.view, batch, &reply),
            Asker::Scrubs => self.scrubs.on_reply(&reply, now),
            Asker::Marks => self.marks.on_reply(),
            Asker::NewDisk(disk) => self.new_disks.on_reply(disk, &reply, now),
            Asker::Stats(session) => {
                if session == self.registrar.session() {
                    self.stats.on_reply(matches!(reply, MetaReply::Applied { .. }));
                }
            }
        }
    }
}
