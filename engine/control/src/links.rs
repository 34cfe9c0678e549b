//! Connections that this node opens: a voter to every other voter, for consensus; any other node to one
//! voter at a time, for everything.

use crate::config::{RECONNECT_MAX_MS, RECONNECT_MIN_MS, Voter};
use crate::frames::{self, Received};
use crate::server::Me;
use reactor::{CloseReason, ConnId, Env, Frame, Framing, Mono};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use wire::control::{Change, ControlMsg, Hello, KeyValue, MetaReply, MetaRequest, Role};
use wire::{ClusterId, NodeId, Revision, Status};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Down(Mono),
    Connecting(ConnId),
    Greeting(ConnId, Mono),
    Up(ConnId),
    /// Given up: what it still brings no longer counts, as something before it is missing.
    Closing(ConnId),
}

/// How long a voter may take to answer a hello, in milliseconds.
const GREETING_MS: u64 = 1_000;

/// One outgoing connection with its backoff.
#[derive(Debug)]
pub struct Link {
    peer: NodeId,
    addr: SocketAddr,
    state: State,
    backoff_ms: u64,
    incarnation: u64,
}

/// What became of a link.
#[derive(Debug)]
pub enum Linked {
    /// Nothing to tell.
    Nothing,
    /// It can be used from now on.
    Up,
    /// It ended; the host says that nothing listens there, or that the process has gone.
    Gone,
    /// It ended.
    Down,
    /// A message.
    Message(ControlMsg),
    /// The peer refuses us.
    Refused(Status),
    /// The peer belongs to this other cluster.
    OtherCluster(ClusterId),
}

impl Link {
    /// Not connected.
    pub fn new(voter: Voter) -> Self {
        Self {
            peer: voter.node,
            addr: voter.addr,
            state: State::Down(Mono(0)),
            backoff_ms: RECONNECT_MIN_MS,
            incarnation: 0,
        }
    }

    /// The voter.
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    fn conn(&self) -> Option<ConnId> {
        match self.state {
            State::Down(_) => None,
            State::Connecting(conn) | State::Greeting(conn, _) | State::Up(conn) | State::Closing(conn) => {
                Some(conn)
            }
        }
    }

    /// Whether this connection is the link's.
    pub fn owns(&self, conn: ConnId) -> bool {
        self.conn() == Some(conn)
    }

    /// Whether messages can be sent.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// Connects when it is time, and gives up on a peer that does not greet.
    pub fn on_tick(&mut self, env: &mut dyn Env) {
        match self.state {
            State::Down(until) if env.now() >= until => {
                let conn = env.connect(self.addr, Framing::Frames);
                self.state = State::Connecting(conn);
            }
            State::Greeting(_, until) if env.now() > until => self.drop_connection(env),
            _ => {}
        }
    }

    /// The connection is established.
    pub fn connected(&mut self, env: &mut dyn Env, me: Me) {
        let State::Connecting(conn) = self.state else { return };
        self.incarnation += 1;
        let hello = Hello {
            cluster: Some(me.cluster),
            role: Role::Node(me.node),
            session: me.session,
            incarnation: self.incarnation,
            refused: 0,
        };
        self.state = State::Greeting(conn, env.now().plus_ms(GREETING_MS));
        if frames::hello(&hello).is_none_or(|frame| env.send(conn, frame).is_err()) {
            self.drop_connection(env);
        }
    }

    /// The connection has ended.
    pub fn closed(&mut self, env: &mut dyn Env, reason: CloseReason) -> Linked {
        self.state = State::Down(env.now().plus_ms(self.backoff_ms));
        self.backoff_ms = (self.backoff_ms * 2).min(RECONNECT_MAX_MS);
        match reason {
            CloseReason::Refused | CloseReason::Peer | CloseReason::Broken(_) => Linked::Gone,
            _ => Linked::Down,
        }
    }

    /// A frame arrived.
    pub fn frame(&mut self, env: &mut dyn Env, me: Me, frame: &Frame) -> Linked {
        let Some(conn) = self.conn() else { return Linked::Nothing };
        match (self.state, frames::decode(frame)) {
            (State::Greeting(..), Ok(Received::Hello(hello))) => {
                let refused = Status::from_u8(hello.refused);
                if hello.refused != 0 || hello.cluster != Some(me.cluster) {
                    self.drop_connection(env);
                    return match hello.cluster {
                        Some(theirs) if theirs != me.cluster => Linked::OtherCluster(theirs),
                        Some(_) => Linked::Refused(refused),
                        None => Linked::Refused(Status::WrongCluster),
                    };
                }
                if hello.role != Role::Node(self.peer) {
                    tracing::error!(addr = %self.addr, expected = %self.peer, found = ?hello.role,
                        "another node answers at a voter's address");
                    self.drop_connection(env);
                    return Linked::Nothing;
                }
                self.state = State::Up(conn);
                self.backoff_ms = RECONNECT_MIN_MS;
                Linked::Up
            }
            (State::Up(_), Ok(Received::Control(msg))) => Linked::Message(msg),
            (State::Up(_), Ok(Received::Pong)) => Linked::Nothing,
            (State::Up(_), Ok(Received::Ping(header))) => {
                let _ = env.send(conn, frames::pong(&header));
                Linked::Nothing
            }
            (State::Closing(_), _) => Linked::Nothing,
            _ => {
                self.drop_connection(env);
                Linked::Nothing
            }
        }
    }

    /// Sends, if that is possible now.
    pub fn send(&self, env: &mut dyn Env, msg: &ControlMsg) -> bool {
        let State::Up(conn) = self.state else { return false };
        frames::control(msg).is_some_and(|frame| env.send(conn, frame).is_ok())
    }

    /// Ends the connection; it will be made anew.
    pub fn drop_connection(&mut self, env: &mut dyn Env) {
        if let Some(conn) = self.conn().filter(|conn| self.state != State::Closing(*conn)) {
            env.close(conn, false);
            self.state = State::Closing(conn);
        }
    }
}

/// What an uplink has to tell.
#[derive(Debug, PartialEq)]
pub enum UplinkOut {
    /// A request is answered.
    Reply(u64, MetaReply),
    /// Everything, as of a revision.
    Snapshot(Revision, Vec<KeyValue>),
    /// The next changes.
    Changes(Revision, Vec<Change>),
    /// A voter belongs to this other cluster.
    OtherCluster(ClusterId),
}

/// What an uplink leaves behind.
#[derive(Debug)]
pub struct UplinkEnd {
    /// Requests that no voter was given.
    pub unsent: Vec<(u64, MetaRequest)>,
    /// Answers to all others.
    pub replies: Vec<(u64, MetaReply)>,
}

/// A node that is no voter uses one voter at a time: it watches everything there and sends its requests
/// there.
#[derive(Debug)]
pub struct Uplink {
    voters: Vec<Voter>,
    /// How many of `voters`, from the first on, are known to vote; the others are tried when those do not answer.
    present: usize,
    at: usize,
    link: Link,
    /// Parts of a snapshot that is still arriving.
    parts: Vec<KeyValue>,
    /// The latest revision passed on: a voter that lags behind it must not take this node back in time.
    newest: Revision,
    watching: bool,
    /// When the voter last brought something of the snapshot, or was to begin.
    snapshot_at: Mono,
    waiting: VecDeque<(u64, MetaRequest, Mono)>,
    /// Requests on their way, and when they were sent.
    sent: BTreeMap<u64, Mono>,
    out: Vec<UplinkOut>,
}

/// Requests that may wait for an uplink to come up.
const WAITING_MAX: usize = 256;
/// How long a request may wait for an uplink, in milliseconds: as long as a voter would try.
const WAITING_MS: u64 = 5_000;
/// A voter that leaves a request unanswered for so long, in milliseconds, hangs: another one is tried.
/// Longer than an election, short enough that a lost lease is soon replaced.
const UNANSWERED_MS: u64 = 1_500;
/// A voter that brings nothing of the snapshot for so long, in milliseconds, has none: it may be a voter no more, and
/// live from this very node.
const SNAPSHOT_MS: u64 = 3_000;
/// How long after its snapshot a node that votes no more is kept, in milliseconds; voters are tried again then.
const ASTRAY_MS: u64 = 1_000;
/// The same while there are requests on their way to it.
const ASTRAY_BUSY_MS: u64 = 3_000;

impl Uplink {
    /// Not connected. `voters` is not empty; `start` spreads nodes over them, `newest` is what the node has seen.
    pub fn new(voters: &[Voter], start: u64, newest: Revision) -> Option<Self> {
        let at = (start % voters.len().max(1) as u64) as usize;
        Some(Self {
            voters: voters.to_vec(),
            present: 0,
            at,
            link: Link::new(*voters.get(at)?),
            parts: Vec::new(),
            newest,
            watching: false,
            snapshot_at: Mono(0),
            waiting: VecDeque::new(),
            sent: BTreeMap::new(),
            out: Vec::new(),
        })
    }

    /// From now on this node can live from these, of whom the first `present` vote.
    pub fn set_voters(&mut self, voters: Vec<Voter>, present: usize) {
        if voters.is_empty() || voters == self.voters && present == self.present {
            return;
        }
        let peer = self.link.peer();
        // Whoever does not vote is followed by the first who does. As long as these stay the same each gets its
        // turn: those who are said to vote may be gone for good, and only the last of the others may know better.
        let at = voters.iter().position(|voter| voter.node == peer).filter(|at| *at < present);
        self.at = at.unwrap_or(voters.len() - 1);
        self.voters = voters;
        self.present = present;
    }

    /// Whether this node lives from one that votes no more, although voters are known. Such nodes could otherwise
    /// live from each other, in a circle of any length, and none of them would hear of anything again.
    fn is_astray(&self) -> bool {
        let mut present = self.voters.iter().take(self.present);
        self.present > 0 && present.all(|voter| voter.node != self.link.peer())
    }

    /// Whom this node lives from.
    pub fn peer(&self) -> NodeId {
        self.link.peer()
    }

    /// Tries the next voter.
    pub fn give_up(&mut self, env: &mut dyn Env) {
        self.link.drop_connection(env);
    }

    /// This node needs no uplink any more.
    pub fn end(mut self, env: &mut dyn Env) -> UplinkEnd {
        self.link.drop_connection(env);
        let unknown = MetaReply::failed(Status::Unknown);
        let heard = self.out.into_iter().filter_map(|out| match out {
            UplinkOut::Reply(ticket, reply) => Some((ticket, reply)),
            _ => None,
        });
        let sent = self.sent.into_keys().map(|ticket| (ticket, unknown.clone()));
        UplinkEnd {
            unsent: self.waiting.into_iter().map(|(ticket, request, _)| (ticket, request)).collect(),
            replies: heard.chain(sent).collect(),
        }
    }

    /// Whether this connection is the uplink's.
    pub fn owns(&self, conn: ConnId) -> bool {
        self.link.owns(conn)
    }

    /// The connection is established.
    pub fn connected(&mut self, env: &mut dyn Env, me: Me) {
        self.link.connected(env, me);
    }

    /// Housekeeping.
    pub fn on_tick(&mut self, env: &mut dyn Env) {
        self.link.on_tick(env);
        let now = env.now();
        while self.waiting.front().is_some_and(|(_, _, deadline)| *deadline <= now) {
            if let Some((ticket, ..)) = self.waiting.pop_front() {
                self.out.push(UplinkOut::Reply(ticket, MetaReply::failed(Status::NotActive)));
            }
        }
        if self.sent.values().any(|sent| now > sent.plus_ms(UNANSWERED_MS)) {
            self.link.drop_connection(env);
        }
        let silent = !self.watching && now > self.snapshot_at.plus_ms(SNAPSHOT_MS);
        // It has brought what it knew. A moment between two requests is best: the outcome of one on its way
        // would be unknown.
        let away = self.watching && self.is_astray() && now > self.snapshot_at.plus_ms(ASTRAY_MS);
        let idle = self.sent.is_empty() || now > self.snapshot_at.plus_ms(ASTRAY_BUSY_MS);
        if self.link.is_up() && (silent || away && idle) {
            self.link.drop_connection(env);
        }
    }

    /// The connection has ended: the next voter is tried.
    pub fn closed(&mut self, env: &mut dyn Env, reason: CloseReason) {
        self.link.closed(env, reason);
        let backoff = self.link.backoff_ms;
        self.at = (self.at + 1) % self.voters.len().max(1);
        if let Some(voter) = self.voters.get(self.at) {
            self.link = Link::new(*voter);
            self.link.backoff_ms = backoff;
            self.link.state = State::Down(env.now().plus_ms(RECONNECT_MIN_MS));
        }
        self.parts.clear();
        self.watching = false;
        for (ticket, _) in std::mem::take(&mut self.sent) {
            self.out.push(UplinkOut::Reply(ticket, MetaReply::failed(Status::Unknown)));
        }
    }

    /// A frame arrived.
    pub fn frame(&mut self, env: &mut dyn Env, me: Me, frame: &Frame) {
        match self.link.frame(env, me, frame) {
            Linked::Up => {
                self.snapshot_at = env.now();
                self.link.send(env, &ControlMsg::Subscribe { prefixes: vec!["/".to_owned()] });
                self.flush(env);
            }
            Linked::Message(msg) => self.on_message(env, msg),
            Linked::OtherCluster(theirs) => self.out.push(UplinkOut::OtherCluster(theirs)),
            _ => {}
        }
    }

    fn on_message(&mut self, env: &mut dyn Env, msg: ControlMsg) {
        match msg {
            ControlMsg::MetaReply { ticket, reply } => {
                if self.sent.remove(&ticket).is_some() {
                    self.out.push(UplinkOut::Reply(ticket, reply));
                }
            }
            ControlMsg::Snapshot { revision, items, more } => {
                self.snapshot_at = env.now();
                self.parts.extend(items);
                if !more && revision < self.newest {
                    // Another voter, or this one when it has caught up.
                    self.link.drop_connection(env);
                } else if !more {
                    self.newest = revision;
                    self.watching = true;
                    self.out.push(UplinkOut::Snapshot(revision, std::mem::take(&mut self.parts)));
                }
            }
            ControlMsg::Changes { revision, changes } if self.watching => {
                self.newest = self.newest.max(revision);
                self.out.push(UplinkOut::Changes(revision, changes));
            }
            ControlMsg::Error { .. } => {}
            _ => self.link.drop_connection(env),
        }
    }

    /// Sends a request to the voter; exactly one answer follows.
    pub fn submit(&mut self, env: &mut dyn Env, ticket: u64, request: MetaRequest) {
        if self.waiting.len() >= WAITING_MAX {
            self.out.push(UplinkOut::Reply(ticket, MetaReply::failed(Status::Busy)));
            return;
        }
        self.waiting.push_back((ticket, request, env.now().plus_ms(WAITING_MS)));
        self.flush(env);
    }

    fn flush(&mut self, env: &mut dyn Env) {
        while self.link.is_up() {
            let Some((ticket, request, _)) = self.waiting.pop_front() else { return };
            let msg = ControlMsg::Meta { ticket, request };
            if self.link.send(env, &msg) {
                self.sent.insert(ticket, env.now());
            } else {
                self.out.push(UplinkOut::Reply(ticket, MetaReply::failed(Status::Busy)));
            }
        }
    }

    /// Tells the voter that a node refused a connection.
    pub fn refused(&self, env: &mut dyn Env, node: NodeId) {
        self.link.send(env, &ControlMsg::Refused { node });
    }

    /// What has happened.
    pub fn take(&mut self) -> Vec<UplinkOut> {
        std::mem::take(&mut self.out)
    }
}
