//! How a node comes to take part and keeps its authority.
//!
//! ```text
//! asking ──> waiting for slices ──> asking about disks ──> lease ──> writing /nodes/N and /live/N ──> waiting for the view ──> registered
//!                                     ^                                                                  │
//!                                     └──────────────────── lease lost: a new session ───────────────────┘
//! ```
//! Authority is counted from the moment a renewal was sent, less a margin for drift, and only when a
//! linearizable read after the renewal still finds `/live/N` with this session: a lease that had run out
//! and was created anew by the renewal itself gives none, because the key went with the old one.

use crate::claims::{Answers, Generations, Refusal};
use crate::config::{ControlConfig, ControlError, DRIFT_MARGIN_PERCENT};
use crate::planted::Bug;
use placement::{Cluster, Live, Node, key};
use reactor::{Mono, WallMs};
use wire::control::{Compare, KeyValue, MetaReply, MetaRequest, Write};
use wire::{DiskUuid, Revision, SessionId, SliceId};

/// Pause after a failed step, in milliseconds.
pub(crate) const RETRY_MS: u64 = 20;
/// Renewals on their way at once: more are not worth sending, the first to succeed does it.
const RENEWALS_MAX: u32 = 4;

/// What an answer belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// `Range` of `/cluster`.
    Cluster,
    /// `Txn` creating it.
    CreateCluster,
    /// `Range` of the node's record.
    Node,
    /// `Range` of the node's liveness.
    Live,
    /// `Range` of what is known of a disk.
    Disk(DiskUuid),
    /// `LeaseKeep` before the registration, sent then.
    Grant(Mono),
    /// The registration.
    Register(Mono),
    /// A renewal, sent then.
    Renew(Mono, SessionId),
    /// The read that confirms it.
    Confirm(Mono, SessionId),
    /// `/live/N` with other failed or full slices, or saying that the node leaves.
    News,
    /// `LeaseRevoke` of a clean stop.
    Revoke,
}

/// What the owner is to do.
#[derive(Clone, PartialEq, Debug)]
pub enum Do {
    /// Submit; the answer goes to `on_reply` with the same `Ask`.
    Submit(Ask, MetaRequest),
    /// The node is registered under this session: data cores get it, the lease and their PGs.
    Registered(SessionId),
    /// The session is over: data cores get the next one, and nothing else until it is registered.
    Lost(SessionId),
    /// Data cores may serve until then.
    Authority(Mono),
    /// These slices must not serve, and why.
    Refuse(Vec<(SliceId, String)>),
    /// The node cannot go on.
    Fail(ControlError),
    /// The lease is revoked, or could not be.
    Revoked,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    Asking,
    Waiting(Mono),
    Granting,
    Writing,
    AwaitingView { revision: Revision, until: Mono },
    Registered { revision: Revision },
    Left,
}

/// See the module.
pub struct Registrar {
    pub(crate) step: Step,
    pub(crate) session: SessionId,
    /// The first session: it names the process.
    pub(crate) process: SessionId,
    cluster_known: bool,
    pub(crate) node: Option<(Option<KeyValue>, Revision)>,
    pub(crate) live: Option<(Option<Live>, Revision)>,
    pub(crate) disks: Answers,
    /// Since when another process is alive in this one's place.
    pub(crate) twin_since: Option<Mono>,
    renewals: u32,
    next_renewal: Mono,
    /// The record to publish, once the data cores are ready.
    pub(crate) record: Option<Node>,
    pub(crate) generations: Generations,
    failed: Vec<wire::SliceId>,
    full: Vec<wire::SliceId>,
    /// A clean stop has begun.
    leaving: bool,
    /// What `/live/N` says.
    written: Option<Live>,
    news_in_flight: bool,
}

impl Registrar {
    /// Before anything.
    pub fn new(session: SessionId) -> Self {
        Self {
            step: Step::Waiting(Mono(0)),
            session,
            process: session,
            cluster_known: false,
            node: None,
            live: None,
            disks: Answers::new(),
            twin_since: None,
            generations: Generations::new(),
            renewals: 0,
            next_renewal: Mono(0),
            record: None,
            failed: Vec::new(),
            full: Vec::new(),
            leaving: false,
            written: None,
            news_in_flight: false,
        }
    }

    /// The session in use.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The first session of this process.
    pub fn process(&self) -> SessionId {
        self.process
    }

    /// Whether the node takes part.
    pub fn is_registered(&self) -> bool {
        matches!(self.step, Step::Registered { .. })
    }

    /// All data cores listen and all slices are open, or have failed.
    pub fn ready(&mut self, record: Node, generations: Generations) {
        self.record = Some(record);
        self.generations = generations;
    }

    /// The slices that cannot serve.
    pub fn set_failed(&mut self, failed: Vec<wire::SliceId>) {
        self.failed = failed;
    }

    /// The slices on which clients are to put nothing more.
    pub fn set_full(&mut self, full: Vec<wire::SliceId>) {
        self.full = full;
    }

    /// The process is about to stop: others are to take its PGs over.
    pub fn set_leaving(&mut self) {
        self.leaving = true;
    }

    /// Does what is due. `seen` is the view's revision, `live` the session under `/live/N` in it.
    pub fn on_tick(
        &mut self,
        config: &ControlConfig,
        now: Mono,
        seen: Revision,
        live: Option<SessionId>,
        fresh: SessionId,
    ) -> Vec<Do> {
        match self.step {
            Step::Waiting(until) if now >= until => self.ask(config, now),
            Step::AwaitingView { revision, until } if seen >= revision => {
                self.step = Step::Registered { revision };
                self.next_renewal = now;
                let mut todo = vec![Do::Registered(self.session), Do::Authority(until)];
                todo.extend(self.on_tick(config, now, seen, live, fresh));
                todo
            }
            Step::Registered { revision } if seen >= revision && live != Some(self.session) => {
                self.lost(config, now, fresh)
            }
            Step::Registered { .. } | Step::AwaitingView { .. } => self.renew(config, now),
            _ => Vec::new(),
        }
    }

    fn ask(&mut self, config: &ControlConfig, now: Mono) -> Vec<Do> {
        let range = |key: String| MetaRequest::Range { prefix: key, limit: 1 };
        if !self.cluster_known || self.node.is_none() || self.live.is_none() {
            self.step = Step::Asking;
            let mut todo = Vec::new();
            if !self.cluster_known {
                todo.push(Do::Submit(Ask::Cluster, range(key::CLUSTER.to_owned())));
            }
            todo.push(Do::Submit(Ask::Node, range(key::node(config.node))));
            todo.push(Do::Submit(Ask::Live, range(key::live(config.node))));
            self.node = None;
            self.live = None;
            self.disks.clear();
            return todo;
        }
        if self.record.is_none() {
            self.step = Step::Waiting(now);
            return Vec::new();
        }
        if let Some(todo) = self.wait_for_twin(config, now) {
            return todo;
        }
        let unknown: Vec<DiskUuid> =
            self.all_disks().map(|disk| disk.uuid).filter(|disk| !self.disks.contains_key(disk)).collect();
        if !unknown.is_empty() {
            self.step = Step::Asking;
            let asked = |disk| Do::Submit(Ask::Disk(disk), range(key::disk(disk)));
            return unknown.into_iter().map(asked).collect();
        }
        let refused = self.refused(config);
        let own = self.record.as_ref().map_or(0, |record| record.disks.len());
        // A node without a disk that may serve may still be needed as a voter: were it to stop, an administrator who
        // puts back copies of the disks of most nodes would find the whole cluster dumb. One that was given only other
        // nodes' disks has the wrong configuration.
        let theirs = |refusal: &Refusal| matches!(refusal, Refusal::OtherNode { .. });
        if own > 0 && refused.iter().filter(|(_, refusal)| theirs(refusal)).count() == own {
            let why: Vec<String> = refused.iter().map(|(_, refusal)| refusal.to_string()).collect();
            return vec![Do::Fail(ControlError::Disks(why.join("; ")))];
        }
        let slices = refused
            .iter()
            .flat_map(|(disk, refusal)| disk.slices.iter().map(move |slice| (slice.id, refusal.to_string())));
        let mut todo = vec![Do::Refuse(slices.collect())];
        self.step = Step::Granting;
        let keep = MetaRequest::LeaseKeep { lease: self.session.0, ttl_ms: config.lease_ttl_ms };
        todo.push(Do::Submit(Ask::Grant(now), keep));
        todo
    }

    fn lost(&mut self, config: &ControlConfig, now: Mono, fresh: SessionId) -> Vec<Do> {
        tracing::warn!(node = %config.node, session = %self.session, "lease lost, registering again");
        if !config.planted.has(Bug::KeepSessionAfterLostLease) {
            self.session = fresh;
        }
        self.node = None;
        self.live = None;
        self.disks.clear();
        self.written = None;
        self.renewals = 0;
        self.step = Step::Waiting(now);
        vec![Do::Lost(self.session)]
    }

    fn renew(&mut self, config: &ControlConfig, now: Mono) -> Vec<Do> {
        let mut todo = Vec::new();
        if self.written.as_ref() != Some(&self.live_now()) && !self.news_in_flight {
            todo.extend(self.write_news(config));
        }
        if now >= self.next_renewal && self.renewals < RENEWALS_MAX {
            self.renewals += 1;
            self.next_renewal = now.plus_ms(config.lease_renew_ms);
            let request = MetaRequest::LeaseKeep { lease: self.session.0, ttl_ms: config.lease_ttl_ms };
            todo.push(Do::Submit(Ask::Renew(now, self.session), request));
        }
        todo
    }

    fn live_now(&self) -> Live {
        let (failed, full) = (self.failed.clone(), self.full.clone());
        Live { session: self.session, failed, full, leaving: self.leaving }
    }

    /// The value of `/live/N`, which counts as written from now on.
    pub(crate) fn live_value(&mut self) -> Option<String> {
        let live = self.written.insert(self.live_now());
        serde_json::to_string(live).ok()
    }

    /// Only while the key is this session's: it must neither come back to life nor, held up on its way,
    /// replace that of a later session.
    fn write_news(&mut self, config: &ControlConfig) -> Option<Do> {
        let key = key::live(config.node);
        let value = self.live_value()?;
        self.news_in_flight = true;
        let lease = self.session.0;
        let compares = vec![Compare::Bound { key: key.clone(), lease }];
        let writes = vec![Write::Put { key, value, lease: Some(lease) }];
        Some(Do::Submit(Ask::News, MetaRequest::Txn { compares, writes }))
    }

    /// End of the authority that a renewal sent at `sent` gives.
    fn until(config: &ControlConfig, sent: Mono, now: Mono) -> Mono {
        if config.planted.has(Bug::LeaseWithoutMargin) {
            return now.plus_ms(config.lease_ttl_ms);
        }
        sent.plus_ms(config.lease_ttl_ms * (100 - DRIFT_MARGIN_PERCENT) / 100)
    }

    /// An answer. `wall` dates a new cluster, `fresh` is a session that was never used.
    pub fn on_reply(
        &mut self,
        config: &ControlConfig,
        now: Mono,
        wall: WallMs,
        fresh: SessionId,
        ask: Ask,
        reply: MetaReply,
    ) -> Vec<Do> {
        let retry = Step::Waiting(now.plus_ms(RETRY_MS));
        match (ask, reply) {
            (Ask::Cluster, MetaReply::Range { items, .. }) => self.on_cluster(config, now, wall, items),
            (Ask::CreateCluster, _) => {
                self.step = Step::Waiting(now);
                Vec::new()
            }
            (Ask::Node, MetaReply::Range { items, .. }) if self.step == Step::Asking => {
                let item = items.into_iter().find(|item| item.key == key::node(config.node));
                let revision = item.as_ref().map_or(Revision(0), |item| item.mod_revision);
                self.node = Some((item, revision));
                self.on_asked(config, now)
            }
            (Ask::Live, MetaReply::Range { items, .. }) if self.step == Step::Asking => {
                let item = items.into_iter().find(|item| item.key == key::live(config.node));
                let revision = item.as_ref().map_or(Revision(0), |item| item.mod_revision);
                self.live = Some((item.and_then(|item| serde_json::from_str(&item.value).ok()), revision));
                self.on_asked(config, now)
            }
            (Ask::Disk(disk), MetaReply::Range { items, .. }) if self.step == Step::Asking => {
                let item = items.into_iter().find(|item| item.key == key::disk(disk));
                let revision = item.as_ref().map_or(Revision(0), |item| item.mod_revision);
                let record = item.and_then(|item| serde_json::from_str(&item.value).ok());
                self.disks.insert(disk, (record, revision));
                if self.all_disks().all(|disk| self.disks.contains_key(&disk.uuid)) {
                    self.step = Step::Waiting(now);
                    return self.ask(config, now);
                }
                Vec::new()
            }
            (Ask::Grant(sent), MetaReply::Lease { ttl_ms }) if self.step == Step::Granting => {
                let next = if ttl_ms > 0 { self.register(config, sent) } else { None };
                if next.is_none() {
                    self.step = retry;
                }
                next.into_iter().collect()
            }
            (Ask::Register(sent), MetaReply::Applied { revision }) if self.step == Step::Writing => {
                self.step = Step::AwaitingView { revision, until: Self::until(config, sent, now) };
                Vec::new()
            }
            (Ask::Renew(sent, session), MetaReply::Lease { ttl_ms }) if session == self.session => {
                if ttl_ms == 0 {
                    return self.lost(config, now, fresh);
                }
                let request = MetaRequest::Range { prefix: key::live(config.node), limit: 1 };
                vec![Do::Submit(Ask::Confirm(sent, session), request)]
            }
            (Ask::Confirm(sent, session), MetaReply::Range { items, .. }) if session == self.session => {
                self.renewals = self.renewals.saturating_sub(1);
                let live = items.into_iter().find(|item| item.key == key::live(config.node));
                let live = live.and_then(|item| serde_json::from_str::<Live>(&item.value).ok());
                if live.is_some_and(|live| live.session == session) {
                    vec![Do::Authority(Self::until(config, sent, now))]
                } else {
                    self.lost(config, now, fresh)
                }
            }
            (Ask::Renew(_, session) | Ask::Confirm(_, session), _) => {
                if session == self.session {
                    self.renewals = self.renewals.saturating_sub(1);
                }
                Vec::new()
            }
            (Ask::News, reply) => {
                self.news_in_flight = false;
                if !matches!(reply, MetaReply::Applied { .. }) {
                    self.written = None; // tried again
                }
                Vec::new()
            }
            (Ask::Revoke, _) => vec![Do::Revoked],
            (Ask::Cluster | Ask::Node | Ask::Live | Ask::Disk(_), _) => {
                if self.step == Step::Asking {
                    self.step = retry;
                }
                Vec::new()
            }
            (Ask::Grant(_) | Ask::Register(_), _) => {
                if matches!(self.step, Step::Granting | Step::Writing) {
                    // A comparison may have failed: look again.
                    (self.node, self.live) = (None, None);
                    self.step = retry;
                }
                Vec::new()
            }
        }
    }

    fn on_cluster(
        &mut self,
        config: &ControlConfig,
        now: Mono,
        wall: WallMs,
        items: Vec<KeyValue>,
    ) -> Vec<Do> {
        let item = items.into_iter().find(|item| item.key == key::CLUSTER);
        let stored: Option<Cluster> = item.and_then(|item| serde_json::from_str(&item.value).ok());
        match stored {
            Some(cluster) if cluster.id == config.cluster => {
                self.cluster_known = true;
                self.on_asked(config, now)
            }
            Some(cluster) => {
                let (own, theirs) = (config.cluster, cluster.id);
                vec![Do::Fail(ControlError::OtherCluster { own, theirs })]
            }
            None if config.voters.iter().any(|voter| voter.node == config.node) => {
                let cluster = Cluster { id: config.cluster, created_ms: wall.0 };
                let Ok(value) = serde_json::to_string(&cluster) else { return Vec::new() };
                let key = key::CLUSTER.to_owned();
                let compares = vec![Compare::ModRevision { key: key.clone(), revision: Revision(0) }];
                let writes = vec![Write::Put { key, value, lease: None }];
                vec![Do::Submit(Ask::CreateCluster, MetaRequest::Txn { compares, writes })]
            }
            None => {
                // The voters are about to create it.
                self.step = Step::Waiting(now.plus_ms(RETRY_MS));
                Vec::new()
            }
        }
    }

    fn on_asked(&mut self, config: &ControlConfig, now: Mono) -> Vec<Do> {
        let (true, Some((node, _)), Some((live, _))) = (self.cluster_known, &self.node, &self.live) else {
            return Vec::new();
        };
        let other = live.as_ref().is_some_and(|live| live.session != self.session);
        if other
            && let Some(node) = node.as_ref().and_then(|item| serde_json::from_str::<Node>(&item.value).ok())
        {
            // The predecessor of this process holds the same disks, so their lock says that it is gone.
            let ours = |disk: &placement::Disk| config.disks.iter().any(|own| own.uuid == disk.uuid);
            if !node.disks.is_empty() && !node.disks.iter().any(ours) {
                let (host, control) = (node.host, node.control);
                return vec![Do::Fail(ControlError::NodeInUse { node: config.node, host, control })];
            }
        }
        self.step = Step::Waiting(now);
        self.ask(config, now)
    }

    /// Ends the lease, so that others take over at once.
    pub fn leave(&mut self) -> Do {
        let was_registered =
            matches!(self.step, Step::Registered { .. } | Step::AwaitingView { .. } | Step::Writing);
        self.step = Step::Left;
        if was_registered {
            Do::Submit(Ask::Revoke, MetaRequest::LeaseRevoke { lease: self.session.0 })
        } else {
            Do::Revoked
        }
    }
}
