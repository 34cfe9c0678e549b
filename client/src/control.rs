//! The control connection: one at a time, to any node, for the map and for metadata requests.
//!
//! Addresses are tried in turn, starting at a random one. A subscription is replaced only after the
//! snapshot of the last one is complete, so that parts of two snapshots never mix.

use crate::error::AdminError;
use crate::frames::{self, Identity};
use reactor::{CloseReason, ConnId, Env, Frame, Framing, Mono};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use wire::control::{Change, ControlMsg, KeyValue, MetaReply, MetaRequest};
use wire::{ClusterId, FrameKind, HeaderError, Revision, Status};

/// Pause after every address was tried once; doubles with each round, up to `ROUND_PAUSE_MAX_MS`.
const ROUND_PAUSE_MIN_MS: u64 = 20;
/// Longest pause between rounds: how long a cluster's return goes unnoticed.
const ROUND_PAUSE_MAX_MS: u64 = 500;
/// Silence after which the node is asked for a sign of life, with operations under way and without.
const PING_AFTER_BUSY_MS: u64 = 250;
const PING_AFTER_IDLE_MS: u64 = 1000;
/// How long a ping may go unanswered, with operations under way and without. While operations are under
/// way the map must be fresh within the failover time of two seconds, even if the node it comes from hangs.
const SILENT_BUSY_MS: u64 = 1000;
const SILENT_IDLE_MS: u64 = 5000;
/// Pause before a metadata request is repeated that the store could not take just now.
const META_RETRY_MS: u64 = 50;
/// Most entries of a snapshot: a million keys is ten times the largest cluster in mind.
const SNAPSHOT_ITEMS_MAX: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down { retry_at: Mono },
    Connecting(ConnId),
    Greeting(ConnId),
    Up(ConnId),
    Closing(ConnId),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Subscription {
    /// Nothing asked for on this connection.
    None,
    /// Asked for; the snapshot is not complete.
    Pending,
    /// Snapshot complete; changes flow.
    Complete,
}

/// A metadata request under way.
struct Call {
    request: MetaRequest,
    deadline: Mono,
    /// On the present connection.
    sent: bool,
    retry_at: Mono,
    last: Status,
}

/// News from the control connection.
pub(crate) enum News {
    /// Everything with these prefixes, as of now.
    Snapshot { revision: Revision, prefixes: Vec<String>, items: Vec<KeyValue> },
    /// What changed.
    Changes { revision: Revision, changes: Vec<Change> },
    /// A metadata request ended.
    Meta { ticket: u64, result: Result<MetaReply, AdminError> },
}

pub(crate) struct Control {
    /// Given at creation.
    addrs: Vec<SocketAddr>,
    /// Learned from the map.
    learned: Vec<SocketAddr>,
    cursor: usize,
    /// Tries since the last success.
    failures: u32,
    link: Link,
    at: Option<SocketAddr>,
    last_heard: Mono,
    pinged: Option<Mono>,
    last_close: Option<CloseReason>,
    /// Prefixes wanted, sorted, none covering another.
    wanted: Vec<String>,
    /// Prefixes of the subscription on this connection.
    subscribed: Vec<String>,
    subscription: Subscription,
    staged: Vec<KeyValue>,
    /// The latest revision that was passed on. A node that lags behind it (cut off, or just restarted)
    /// must not take the map back in time.
    newest: Revision,
    calls: BTreeMap<u64, Call>,
    next_ticket: u64,
    /// The greeting's refusal by the address tried last.
    refusal: Option<(SocketAddr, Status)>,
    /// When `tick` is wanted, at the latest.
    wake_at: Option<Mono>,
}

impl Control {
    pub(crate) fn new(addrs: Vec<SocketAddr>) -> Self {
        Self {
            addrs,
            learned: Vec::new(),
            cursor: 0,
            failures: 0,
            link: Link::Down { retry_at: Mono(0) },
            at: None,
            last_heard: Mono(0),
            pinged: None,
            last_close: None,
            wanted: Vec::new(),
            subscribed: Vec::new(),
            subscription: Subscription::None,
            staged: Vec::new(),
            newest: Revision(0),
            calls: BTreeMap::new(),
            next_ticket: 1,
            refusal: None,
            wake_at: None,
        }
    }

    pub(crate) fn start(&mut self, env: &mut dyn Env) {
        // Clients of one configuration spread over the nodes.
        self.cursor = env.random() as usize % self.addrs.len().max(1);
        self.connect(env);
    }

    pub(crate) fn conn(&self) -> Option<ConnId> {
        match self.link {
            Link::Down { .. } => None,
            Link::Connecting(c) | Link::Greeting(c) | Link::Up(c) | Link::Closing(c) => Some(c),
        }
    }

    /// The node that serves the map now.
    pub(crate) fn connected_to(&self) -> Option<SocketAddr> {
        self.at.filter(|_| matches!(self.link, Link::Up(_)))
    }

    /// Addresses of live nodes, tried after the given ones.
    pub(crate) fn learn(&mut self, addrs: impl Iterator<Item = SocketAddr>) {
        self.learned.clear();
        self.learned.extend(addrs);
    }

    fn connect(&mut self, env: &mut dyn Env) {
        let known = self.addrs.len() + self.learned.len();
        let place = self.cursor % known.max(1);
        let addr = self.addrs.get(place).or_else(|| self.learned.get(place - self.addrs.len().min(place)));
        let Some(addr) = addr.copied() else { return };
        self.at = Some(addr);
        self.last_heard = env.now();
        self.link = Link::Connecting(env.connect(addr, Framing::Frames));
    }

    pub(crate) fn connected(&mut self, env: &mut dyn Env, me: &mut Identity) {
        let Link::Connecting(conn) = self.link else { return };
        self.heard(env.now());
        self.link = Link::Greeting(conn);
        if me.hello().is_none_or(|hello| env.send(conn, hello).is_err()) {
            self.drop_link(env);
        }
    }

    fn heard(&mut self, now: Mono) {
        self.last_heard = now;
        self.pinged = None;
    }

    /// Gives the connection up; the next address follows when it is closed.
    fn drop_link(&mut self, env: &mut dyn Env) {
        if let Some(conn) = self.conn().filter(|_| !matches!(self.link, Link::Closing(_))) {
            env.close(conn, false);
            self.link = Link::Closing(conn);
        }
    }

    pub(crate) fn closed(&mut self, env: &mut dyn Env, reason: CloseReason) -> Vec<News> {
        self.last_close = Some(reason);
        self.subscription = Subscription::None;
        self.subscribed.clear();
        self.staged = Vec::new();
        self.cursor = self.cursor.wrapping_add(1);
        let known = (self.addrs.len() + self.learned.len()).max(1) as u32;
        self.failures = self.failures.saturating_add(1);
        let rounds = self.failures / known;
        let pause = match self.failures % known {
            // Another address: at once.
            rest if rest != 0 => 0,
            _ => ROUND_PAUSE_MIN_MS.saturating_mul(1 << rounds.min(10)).min(ROUND_PAUSE_MAX_MS),
        };
        self.pinged = None;
        let retry_at = env.now().plus_ms(pause);
        self.link = Link::Down { retry_at };
        self.wake_by(retry_at);
        if pause == 0 {
            self.connect(env);
        }
        self.lost_calls()
    }

    /// A transaction that was sent and not answered may have been applied; all else is asked again.
    fn lost_calls(&mut self) -> Vec<News> {
        let mut lost = Vec::new();
        for (ticket, call) in &mut self.calls {
            if std::mem::take(&mut call.sent) && matches!(call.request, MetaRequest::Txn { .. }) {
                lost.push(*ticket);
            }
        }
        lost.iter().filter_map(|ticket| self.end_call(*ticket, Err(AdminError::OutcomeUnknown))).collect()
    }

    fn end_call(&mut self, ticket: u64, result: Result<MetaReply, AdminError>) -> Option<News> {
        self.calls.remove(&ticket).map(|_| News::Meta { ticket, result })
    }

    /// The greeting was answered.
    pub(crate) fn hello(&mut self, env: &mut dyn Env, frame: &Frame, me: &mut Identity) {
        let Link::Greeting(conn) = self.link else { return };
        self.heard(env.now());
        let Some(hello) = frames::decode_hello(frame) else { return self.drop_link(env) };
        let other: Option<ClusterId> = hello.cluster.filter(|c| me.cluster.is_some_and(|mine| mine != *c));
        let status = if other.is_some() { Status::WrongCluster } else { Status::from_u8(hello.refused) };
        if status != Status::Ok {
            self.refusal = self.at.map(|at| (at, status));
            return self.drop_link(env);
        }
        me.cluster = me.cluster.or(hello.cluster);
        self.link = Link::Up(conn);
        self.failures = 0;
        self.refusal = None;
        self.subscribe(env);
        self.send_calls(env);
    }

    /// Subscribes to what is wanted, unless that is the case or a snapshot is still coming.
    fn subscribe(&mut self, env: &mut dyn Env) {
        let Link::Up(conn) = self.link else { return };
        if self.subscription == Subscription::Pending || self.wanted == self.subscribed {
            return;
        }
        let msg = ControlMsg::Subscribe { prefixes: self.wanted.clone() };
        if frames::control(&msg).is_none_or(|frame| env.send(conn, frame).is_err()) {
            return self.drop_link(env);
        }
        self.subscribed = self.wanted.clone();
        self.subscription = Subscription::Pending;
        self.staged.clear();
    }

    /// Sets the key prefixes to subscribe to.
    pub(crate) fn want(&mut self, env: &mut dyn Env, mut prefixes: Vec<String>) {
        prefixes.sort_unstable();
        prefixes.dedup();
        let mut wanted: Vec<String> = Vec::with_capacity(prefixes.len());
        for prefix in prefixes {
            if !wanted.iter().any(|shorter| prefix.starts_with(shorter.as_str())) {
                wanted.push(prefix);
            }
        }
        self.wanted = wanted;
        self.subscribe(env);
    }

    /// Asks for a whole snapshot again, also of what is subscribed to already.
    pub(crate) fn renew(&mut self, env: &mut dyn Env) {
        self.subscribed.clear();
        self.subscribe(env);
    }

    /// Whether the map holds everything under these prefixes and follows it.
    pub(crate) fn covers(&self, prefixes: &[String]) -> bool {
        self.subscription == Subscription::Complete
            && prefixes.iter().all(|p| self.subscribed.iter().any(|s| p.starts_with(s.as_str())))
    }

    /// Starts a metadata request.
    pub(crate) fn call(
        &mut self,
        env: &mut dyn Env,
        request: MetaRequest,
        timeout_ms: u64,
    ) -> Result<u64, AdminError> {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        if frames::control(&ControlMsg::Meta { ticket, request: request.clone() }).is_none() {
            return Err(AdminError::TooLarge);
        }
        let now = env.now();
        let deadline = now.plus_ms(timeout_ms);
        let call = Call { request, deadline, sent: false, retry_at: now, last: Status::Unknown };
        self.calls.insert(ticket, call);
        self.send_calls(env);
        Ok(ticket)
    }

    fn send_calls(&mut self, env: &mut dyn Env) {
        let Link::Up(conn) = self.link else { return };
        let now = env.now();
        for (ticket, call) in &mut self.calls {
            if call.sent || call.retry_at > now {
                continue;
            }
            let msg = ControlMsg::Meta { ticket: *ticket, request: call.request.clone() };
            let Some(frame) = frames::control(&msg) else { continue };
            if env.send(conn, frame).is_err() {
                return;
            }
            call.sent = true;
        }
    }

    /// Takes a control message.
    pub(crate) fn message(&mut self, env: &mut dyn Env, frame: &Frame) -> Option<News> {
        self.heard(env.now());
        if !matches!(self.link, Link::Up(_)) {
            return None;
        }
        let Some(msg) = frames::checked(frame).and_then(|bytes| ControlMsg::decode(bytes).ok()) else {
            self.drop_link(env);
            return None;
        };
        match msg {
            ControlMsg::MetaReply { ticket, reply } => self.answered(env, ticket, reply),
            ControlMsg::Snapshot { revision, items, more } => self.snapshot(env, revision, items, more),
            ControlMsg::Changes { revision, changes } => {
                // While a new snapshot is coming these still belong to the earlier subscription.
                self.newest = self.newest.max(revision);
                Some(News::Changes { revision, changes })
            }
            ControlMsg::Error { .. } => {
                self.drop_link(env);
                None
            }
            ControlMsg::Meta { .. }
            | ControlMsg::Subscribe { .. }
            | ControlMsg::Raft { .. }
            | ControlMsg::Refused { .. }
            | ControlMsg::Stats { .. } => None,
        }
    }

    fn snapshot(
        &mut self,
        env: &mut dyn Env,
        revision: Revision,
        items: Vec<KeyValue>,
        more: bool,
    ) -> Option<News> {
        if self.subscription != Subscription::Pending {
            return None;
        }
        self.staged.extend(items);
        if self.staged.len() > SNAPSHOT_ITEMS_MAX {
            self.drop_link(env);
            return None;
        }
        if more {
            return None;
        }
        if revision < self.newest {
            // Not the next address at once: it may be that none has caught up yet.
            self.failures = (self.addrs.len() + self.learned.len()).saturating_sub(1) as u32;
            self.drop_link(env);
            return None;
        }
        self.newest = revision;
        self.subscription = Subscription::Complete;
        let items = std::mem::take(&mut self.staged);
        let prefixes = self.subscribed.clone();
        self.subscribe(env);
        Some(News::Snapshot { revision, prefixes, items })
    }

    fn answered(&mut self, env: &mut dyn Env, ticket: u64, reply: MetaReply) -> Option<News> {
        let call = self.calls.get_mut(&ticket)?;
        if let MetaReply::Failed { status } = reply {
            let status = Status::from_u8(status);
            let safe = !matches!(call.request, MetaRequest::Txn { .. });
            if status == Status::Unknown && !safe {
                return self.end_call(ticket, Err(AdminError::OutcomeUnknown));
            }
            if status.is_retryable() {
                call.sent = false;
                call.last = status;
                call.retry_at = env.now().plus_ms(META_RETRY_MS);
                let at = call.retry_at;
                self.wake_by(at);
                return None;
            }
        }
        self.end_call(ticket, Ok(reply))
    }

    /// Why nothing was heard, as the caller of a request should be told.
    pub(crate) fn unreachable(&self) -> AdminError {
        if let Some((at, status)) = self.refusal {
            return AdminError::Refused { at: at.to_string(), status };
        }
        if let Some(CloseReason::Protocol(HeaderError::Protocol(_))) = self.last_close
            && let Some(at) = self.at
        {
            return AdminError::Refused { at: at.to_string(), status: Status::WrongVersion };
        }
        let tried: Vec<String> = self.addrs.iter().map(SocketAddr::to_string).collect();
        AdminError::Unreachable { tried: tried.join(","), last: self.last_close }
    }

    /// Whether a node answers at present.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// When `tick` is wanted, at the latest; `None` when the usual housekeeping is soon enough.
    pub(crate) fn wake_at(&self) -> Option<Mono> {
        self.wake_at
    }

    fn wake_by(&mut self, at: Mono) {
        self.wake_at = Some(self.wake_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Looks after time: reconnects, repeats, gives up, asks for signs of life.
    pub(crate) fn tick(&mut self, env: &mut dyn Env, busy: bool, late: bool) -> Vec<News> {
        let now = env.now();
        let mut news = Vec::new();
        self.wake_at = None;
        match self.link {
            Link::Down { retry_at } if retry_at <= now => self.connect(env),
            Link::Down { retry_at } => self.wake_by(retry_at),
            Link::Greeting(conn) | Link::Up(conn) => self.watch(env, conn, busy, late),
            Link::Connecting(_) | Link::Closing(_) => {}
        }
        let expired: Vec<u64> =
            self.calls.iter().filter(|(_, call)| call.deadline <= now).map(|(ticket, _)| *ticket).collect();
        for ticket in expired {
            news.extend(self.expire_call(ticket));
        }
        self.send_calls(env);
        let due = |call: &Call| if call.sent { call.deadline } else { call.retry_at.max(now.plus_ms(1)) };
        // What waits for a connection is sent when it comes: only its deadline counts until then.
        let up = self.is_up();
        let due = |call: &Call| if up { due(call).min(call.deadline) } else { call.deadline };
        if let Some(at) = self.calls.values().map(due).min() {
            self.wake_by(at);
        }
        news
    }

    fn expire_call(&mut self, ticket: u64) -> Option<News> {
        let call = self.calls.get(&ticket)?;
        let error = if call.sent && matches!(call.request, MetaRequest::Txn { .. }) {
            AdminError::OutcomeUnknown
        } else if self.is_up() {
            AdminError::NoAnswer { last: call.last }
        } else {
            self.unreachable()
        };
        self.end_call(ticket, Err(error))
    }

    fn watch(&mut self, env: &mut dyn Env, conn: ConnId, busy: bool, late: bool) {
        let now = env.now();
        let (ping_after, silent) = if busy || self.link == Link::Greeting(conn) {
            (PING_AFTER_BUSY_MS, SILENT_BUSY_MS)
        } else {
            (PING_AFTER_IDLE_MS, SILENT_IDLE_MS)
        };
        match self.pinged {
            // This client itself did not run for a while: an answer may lie unread.
            Some(at) if late || at > now => self.pinged = Some(now),
            Some(at) if now.since(at) >= silent * 1_000_000 => self.drop_link(env),
            Some(_) => {}
            None if now.since(self.last_heard) >= ping_after * 1_000_000 => {
                self.pinged = Some(now);
                let _ = env.send(conn, frames::bare(FrameKind::Ping, 0));
            }
            None => {}
        }
    }

    /// A sign of life without content.
    pub(crate) fn pong(&mut self, now: Mono) {
        self.heard(now);
    }
}
