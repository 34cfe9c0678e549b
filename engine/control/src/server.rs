//! Connections that others have opened to this node: clients, tools, other nodes.
//!
//! Nothing that a peer sends can do more than close its own connection. Everything that waits for a peer
//! is bounded; a peer that does not keep up is disconnected and gets a fresh snapshot when it is back.

use crate::config::*;
use crate::frames::{self, Received};
use crate::mirror::Mirror;
use reactor::{ConnId, Env, Frame, IoBuf, Mono, Net};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use wire::control::{Change, ControlMsg, Hello, KeyValue, MetaReply, MetaRequest, Role};
use wire::frame::CONTROL_PAYLOAD_BYTES_MAX;
use wire::{ClusterId, NodeId, Revision, SessionId, Status};

/// What a peer asked for that the server cannot do by itself.
#[derive(Debug)]
pub enum Asked {
    /// A metadata request; the answer goes to `Server::reply`.
    Meta {
        /// The connection.
        conn: ConnId,
        /// The peer's ticket.
        ticket: u64,
        /// The request.
        request: MetaRequest,
    },
    /// Consensus bytes from a node.
    Raft {
        /// The node that the connection belongs to.
        from: NodeId,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A node could not be reached.
    Refused(NodeId),
}

/// Who this node is, in its hellos.
#[derive(Clone, Copy, Debug)]
pub struct Me {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// The running session.
    pub session: SessionId,
}

enum Out {
    Frame(Box<Frame>),
    Snapshot { revision: Revision, items: VecDeque<Rc<KeyValue>> },
}

struct Session {
    since: Mono,
    role: Option<Role>,
    requests: usize,
    prefixes: Rc<Vec<String>>,
    subscribed: bool,
    /// The snapshot comes when the mirror is ready; changes only after it.
    awaits_snapshot: bool,
    out: VecDeque<Out>,
    out_bytes: usize,
    snapshots: usize,
    /// Another member of the metadata group sends its messages here.
    carries: bool,
    /// Closed by us; only `Closed` is awaited.
    closing: bool,
}

impl Session {
    fn push(&mut self, frame: Frame) {
        self.out_bytes += frame.payload.as_ref().map_or(0, IoBuf::len);
        self.out.push_back(Out::Frame(Box::new(frame)));
    }
}

/// Numbers for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ServerCounters {
    /// Connections closed because of what they sent.
    pub garbage: u64,
    /// Connections closed because they did not keep up.
    pub slow: u64,
    /// Connections refused because there were too many, or of another cluster.
    pub refused: u64,
}

/// All such connections.
#[derive(Default)]
pub struct Server {
    sessions: BTreeMap<ConnId, Session>,
    requests: usize,
    counters: ServerCounters,
    /// Connections with something to send.
    pending: std::collections::BTreeSet<ConnId>,
}

impl Server {
    /// Connections and subscribers.
    pub fn sizes(&self) -> (usize, usize) {
        (self.sessions.len(), self.sessions.values().filter(|s| s.subscribed).count())
    }

    /// Whether this node lives from us.
    pub fn feeds(&self, node: NodeId) -> bool {
        self.sessions.values().any(|s| s.subscribed && s.role == Some(Role::Node(node)))
    }

    /// Counters.
    pub fn counters(&self) -> ServerCounters {
        self.counters
    }

    /// A new connection.
    pub fn accept(&mut self, env: &mut dyn Env, conn: ConnId) {
        if self.sessions.len() >= CONNS_MAX {
            self.counters.refused += 1;
            env.close(conn, false);
            return;
        }
        let session = Session {
            since: env.now(),
            role: None,
            requests: 0,
            prefixes: Rc::new(Vec::new()),
            subscribed: false,
            awaits_snapshot: false,
            out: VecDeque::new(),
            out_bytes: 0,
            snapshots: 0,
            carries: false,
            closing: false,
        };
        self.sessions.insert(conn, session);
    }

    /// A connection has ended.
    pub fn closed(&mut self, conn: ConnId) {
        self.sessions.remove(&conn);
        self.pending.remove(&conn);
    }

    fn garbage(&mut self, env: &mut dyn Env, conn: ConnId, why: &dyn std::fmt::Display) {
        tracing::debug!(conn = conn.0, %why, "closing a control connection");
        self.counters.garbage += 1;
        self.close(env, conn, false);
    }

    fn close(&mut self, env: &mut dyn Env, conn: ConnId, after_flush: bool) {
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.closing = true;
            session.subscribed = false;
            session.out.clear();
            session.out_bytes = 0;
        }
        self.pending.remove(&conn);
        env.close(conn, after_flush);
    }

    /// A frame arrived.
    pub fn frame(
        &mut self,
        env: &mut dyn Env,
        me: Me,
        mirror: &Mirror,
        conn: ConnId,
        frame: &Frame,
    ) -> Option<Asked> {
        let session = self.sessions.get(&conn)?;
        if session.closing {
            return None;
        }
        let role = session.role;
        match (frames::decode(frame), role) {
            (Ok(Received::Hello(hello)), None) => {
                self.on_hello(env, me, conn, hello);
                None
            }
            (Ok(Received::Control(msg)), Some(role)) => self.on_control(env, mirror, conn, role, msg),
            (Ok(Received::Ping(header)), Some(_)) => {
                self.send(conn, frames::pong(&header));
                None
            }
            (Ok(Received::Pong), Some(_)) => None,
            (Ok(_), _) => {
                self.garbage(env, conn, &"out of order");
                None
            }
            (Err(error), _) => {
                self.garbage(env, conn, &error);
                None
            }
        }
    }

    fn on_hello(&mut self, env: &mut dyn Env, me: Me, conn: ConnId, hello: Hello) {
        let refused = match (hello.cluster, hello.role) {
            (Some(cluster), _) if cluster != me.cluster => Status::WrongCluster,
            (None, Role::Node(_)) => Status::WrongCluster,
            (_, Role::Node(node)) if node == me.node => Status::Invalid,
            _ => Status::Ok,
        };
        let answer = Hello {
            cluster: Some(me.cluster),
            role: Role::Node(me.node),
            session: me.session,
            incarnation: hello.incarnation,
            refused: refused as u8,
        };
        let Some(frame) = frames::hello(&answer) else { return };
        if refused != Status::Ok {
            self.counters.refused += 1;
            let sent = env.send(conn, frame).is_ok();
            self.close(env, conn, sent);
            return;
        }
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.role = Some(hello.role);
        }
        self.send(conn, frame);
    }

    fn on_control(
        &mut self,
        env: &mut dyn Env,
        mirror: &Mirror,
        conn: ConnId,
        role: Role,
        msg: ControlMsg,
    ) -> Option<Asked> {
        match (msg, role) {
            (ControlMsg::Meta { ticket, request }, _) => {
                let session = self.sessions.get_mut(&conn)?;
                if session.requests >= CONN_REQUESTS_MAX || self.requests >= CLIENT_REQUESTS_MAX {
                    let reply = MetaReply::failed(Status::Busy);
                    self.send_msg(conn, &ControlMsg::MetaReply { ticket, reply });
                    return None;
                }
                session.requests += 1;
                self.requests += 1;
                Some(Asked::Meta { conn, ticket, request })
            }
            (ControlMsg::Subscribe { prefixes }, _) => {
                self.subscribe(env, mirror, conn, prefixes);
                None
            }
            (ControlMsg::Raft { bytes }, Role::Node(from)) => {
                self.sessions.get_mut(&conn)?.carries = true;
                Some(Asked::Raft { from, bytes })
            }
            (ControlMsg::Refused { node }, _) => Some(Asked::Refused(node)),
            // Statistics travel as keys; peers may still say so.
            (ControlMsg::Stats { .. } | ControlMsg::Error { .. }, _) => None,
            _ => {
                self.garbage(env, conn, &"a message that only servers send");
                None
            }
        }
    }

    fn subscribe(&mut self, env: &mut dyn Env, mirror: &Mirror, conn: ConnId, prefixes: Vec<String>) {
        let Some(session) = self.sessions.get_mut(&conn) else { return };
        let too_long = prefixes.iter().any(|prefix| prefix.len() > PREFIX_BYTES_MAX);
        if prefixes.len() > PREFIXES_MAX || too_long || session.snapshots >= SNAPSHOTS_MAX {
            self.garbage(env, conn, &"subscription beyond its bounds");
            return;
        }
        session.prefixes = Rc::new(prefixes);
        session.subscribed = true;
        session.awaits_snapshot = true;
        if mirror.is_ready() {
            self.snapshot(mirror, conn);
        }
    }

    fn snapshot(&mut self, mirror: &Mirror, conn: ConnId) {
        let Some(session) = self.sessions.get_mut(&conn) else { return };
        // One pass in key order, so that overlapping prefixes give each key once.
        let prefixes = session.prefixes.clone();
        let mut items: BTreeMap<&str, Rc<KeyValue>> = BTreeMap::new();
        for prefix in prefixes.iter() {
            items.extend(mirror.range(prefix).map(|item| (item.key.as_str(), item.clone())));
        }
        let items = items.into_values().collect();
        session.snapshots += 1;
        session.awaits_snapshot = false;
        session.out.push_back(Out::Snapshot { revision: mirror.revision(), items });
        self.pending.insert(conn);
    }

    /// The mirror can be read: who subscribed meanwhile gets its snapshot.
    pub fn ready(&mut self, mirror: &Mirror) {
        let awaits = |s: &Session| s.subscribed && s.awaits_snapshot;
        let waiting: Vec<ConnId> =
            self.sessions.iter().filter(|(_, s)| awaits(s)).map(|(conn, _)| *conn).collect();
        for conn in waiting {
            self.snapshot(mirror, conn);
        }
    }

    /// The mirror has changed; to be followed by `ready`. Subscribers with the same prefixes share one encoded message.
    pub fn changes(&mut self, env: &mut dyn Env, revision: Revision, changes: &[Change]) {
        let mut encoded: BTreeMap<Rc<Vec<String>>, Option<Frame>> = BTreeMap::new();
        let mut too_large = Vec::new();
        for (conn, session) in self.sessions.iter_mut().filter(|(_, s)| s.subscribed && !s.awaits_snapshot) {
            let frame = match encoded.get(&session.prefixes) {
                Some(frame) => frame.clone(),
                None => {
                    let watched: Vec<Change> = changes
                        .iter()
                        .filter(|change| {
                            let key = match change {
                                Change::Put(item) => &item.key,
                                Change::Delete { key } => key,
                            };
                            session.prefixes.iter().any(|prefix| key.starts_with(prefix.as_str()))
                        })
                        .cloned()
                        .collect();
                    let frame = if watched.is_empty() {
                        None
                    } else {
                        let msg = ControlMsg::Changes { revision, changes: watched };
                        let frame = frames::control(&msg);
                        if frame.is_none() {
                            too_large.push(session.prefixes.clone());
                        }
                        frame
                    };
                    encoded.insert(session.prefixes.clone(), frame.clone());
                    frame
                }
            };
            if let Some(frame) = frame {
                session.push(frame);
                self.pending.insert(*conn);
            }
        }
        if !too_large.is_empty() {
            // A change that fits no frame (a huge prefix deleted): whoever watches it starts over with a
            // snapshot, which comes in parts.
            let hit = |s: &Session| s.subscribed && too_large.contains(&s.prefixes);
            let conns: Vec<ConnId> = self.sessions.iter().filter(|(_, s)| hit(s)).map(|(c, _)| *c).collect();
            conns.into_iter().for_each(|conn| self.close(env, conn, false));
        }
    }

    /// The answer to `Asked::Meta`. The connection may be gone.
    pub fn reply(&mut self, conn: ConnId, ticket: u64, reply: MetaReply) {
        self.requests = self.requests.saturating_sub(1);
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.requests = session.requests.saturating_sub(1);
            self.send_msg(conn, &ControlMsg::MetaReply { ticket, reply });
        }
    }

    /// Sends a message of the metadata group back over a connection on which its member sends its own.
    pub fn carry(&self, env: &mut dyn Env, to: NodeId, msg: &ControlMsg) {
        let its = |s: &Session| s.carries && !s.closing && s.role == Some(Role::Node(to));
        if let Some((conn, _)) = self.sessions.iter().rev().find(|(_, session)| its(session))
            && let Some(frame) = frames::control(msg)
        {
            // Lost where there is no room, as any of these may be.
            let _ = Net::send(env, *conn, frame);
        }
    }

    fn send_msg(&mut self, conn: ConnId, msg: &ControlMsg) {
        if let Some(frame) = frames::control(msg) {
            self.send(conn, frame);
        }
    }

    fn send(&mut self, conn: ConnId, frame: Frame) {
        if let Some(session) = self.sessions.get_mut(&conn)
            && !session.closing
        {
            session.push(frame);
            self.pending.insert(conn);
        }
    }

    /// Whether something waits for a later step.
    pub fn has_work(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Sends what can be sent, and gives up on those who do not keep up.
    pub fn pump(&mut self, env: &mut dyn Env) {
        for conn in self.pending.iter().copied().collect::<Vec<_>>() {
            let Some(session) = self.sessions.get_mut(&conn) else {
                self.pending.remove(&conn);
                continue;
            };
            let done = drain(env, conn, session);
            if session.out.len() > OUTBOX_FRAMES_MAX || session.out_bytes > OUTBOX_BYTES_MAX {
                tracing::info!(conn = conn.0, "closing a control connection that does not keep up");
                self.counters.slow += 1;
                self.close(env, conn, false);
            } else if done {
                self.pending.remove(&conn);
            }
        }
    }

    /// Ends connections that have not said hello in time.
    pub fn on_tick(&mut self, env: &mut dyn Env) {
        let now = env.now();
        let late = |s: &Session| s.role.is_none() && !s.closing && now > s.since.plus_ms(HELLO_TIMEOUT_MS);
        let conns: Vec<ConnId> = self.sessions.iter().filter(|(_, s)| late(s)).map(|(c, _)| *c).collect();
        for conn in conns {
            self.garbage(env, conn, &"no hello");
        }
    }
}

/// Sends from the outbox; whether it is empty.
fn drain(env: &mut dyn Env, conn: ConnId, session: &mut Session) -> bool {
    let mut parts = 0;
    while let Some(front) = session.out.front_mut() {
        match front {
            Out::Frame(frame) => {
                if Net::send(env, conn, frame.as_ref().clone()).is_err() {
                    return false;
                }
                session.out_bytes =
                    session.out_bytes.saturating_sub(frame.payload.as_ref().map_or(0, IoBuf::len));
                session.out.pop_front();
            }
            Out::Snapshot { revision, items } => {
                if parts == PARTS_PER_STEP {
                    return false;
                }
                parts += 1;
                let mut take = part_len(items);
                let frame = loop {
                    let part = items.iter().take(take).map(|item| item.as_ref().clone()).collect();
                    let more = take < items.len();
                    let msg = ControlMsg::Snapshot { revision: *revision, items: part, more };
                    match frames::control(&msg) {
                        Some(frame) => break frame,
                        None if take > 1 => take /= 2,
                        None => return false, // no memory now; a single item always fits
                    }
                };
                if Net::send(env, conn, frame).is_err() {
                    return false;
                }
                items.drain(..take);
                if items.is_empty() {
                    session.out.pop_front();
                    session.snapshots = session.snapshots.saturating_sub(1);
                }
            }
        }
    }
    true
}

/// How many items go into the next part.
fn part_len(items: &VecDeque<Rc<KeyValue>>) -> usize {
    let mut bytes = 0;
    let fits = items.iter().take(SNAPSHOT_PART_ITEMS).take_while(|item| {
        bytes += item.key.len() + item.value.len();
        bytes <= SNAPSHOT_PART_BYTES
    });
    let count = fits.count();
    // One that is larger than a part still fits a frame.
    const { assert!(SNAPSHOT_PART_BYTES * 2 < CONTROL_PAYLOAD_BYTES_MAX) };
    count.max(1).min(items.len())
}
