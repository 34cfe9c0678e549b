//! Connections to the cores that serve PGs: one per address.

use crate::frames::{self, Identity};
use crate::part::{Part, PartState};
use crate::slab::{NIL, Slab};
use reactor::{ConnId, Env, Mono};
use std::net::SocketAddr;
use wire::{FrameKind, NodeId, SessionId};

/// Pause before the first reconnect. Doubles with each failure, up to `RECONNECT_MAX_MS`.
const RECONNECT_MIN_MS: u64 = 2;
/// Longest pause between two tries to connect: bounds what a dead node costs, and how long its return
/// goes unnoticed.
const RECONNECT_MAX_MS: u64 = 100;
/// A peer with something outstanding that has said nothing for so long is asked for a sign of life.
const PING_AFTER_MS: u64 = 500;
/// A peer that has not answered a ping for so long is given up. Beyond a node's liveness lease, so that
/// this only decides when the network between us and a live node is gone.
const SILENT_MS: u64 = 3000;

/// A connection's stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Link {
    Down {
        retry_at: Mono,
    },
    Connecting(ConnId),
    Greeting(ConnId),
    Up(ConnId),
    /// We closed it and wait for the transport to let go of the buffers.
    Closing(ConnId),
}

impl Link {
    pub(crate) fn conn(self) -> Option<ConnId> {
        match self {
            Self::Down { .. } => None,
            Self::Connecting(c) | Self::Greeting(c) | Self::Up(c) | Self::Closing(c) => Some(c),
        }
    }
}

/// A core that is or was primary of some PG.
pub(crate) struct Peer {
    pub addr: SocketAddr,
    pub node: NodeId,
    /// The node's process when the connection was made: another one knows nothing of what we sent.
    pub session: Option<SessionId>,
    pub link: Link,
    /// Tries to connect since the last answer to an operation.
    pub failures: u32,
    /// Parts that wait for the connection, or for room in it.
    pub waiting: Vec<u32>,
    /// Parts sent and not answered, oldest first.
    sent_head: u32,
    sent_tail: u32,
    pub sent: u32,
    pub last_heard: Mono,
    pinged: Option<Mono>,
    /// Not in use: its place can be given to another address.
    vacant: bool,
}

impl Peer {
    fn new(addr: SocketAddr, node: NodeId) -> Self {
        Self {
            addr,
            node,
            session: None,
            link: Link::Down { retry_at: Mono(0) },
            failures: 0,
            waiting: Vec::new(),
            sent_head: NIL,
            sent_tail: NIL,
            sent: 0,
            last_heard: Mono(0),
            pinged: None,
            vacant: false,
        }
    }

    /// Notes a sign of life.
    #[inline]
    pub(crate) fn heard(&mut self, now: Mono) {
        self.last_heard = now;
        self.pinged = None;
    }

    /// Appends a part to those sent.
    pub(crate) fn link_sent(&mut self, parts: &mut Slab<Part>, index: u32) {
        let tail = self.sent_tail;
        match parts.get_mut(tail) {
            Some(last) => last.sent_next = index,
            None => self.sent_head = index,
        }
        if let Some(part) = parts.get_mut(index) {
            (part.sent_prev, part.sent_next) = (tail, NIL);
        }
        self.sent_tail = index;
        self.sent += 1;
    }

    /// Takes a part out of those sent.
    pub(crate) fn unlink_sent(&mut self, parts: &mut Slab<Part>, index: u32) {
        let Some(part) = parts.get(index) else { return };
        let (before, behind) = (part.sent_prev, part.sent_next);
        match parts.get_mut(before) {
            Some(part) => part.sent_next = behind,
            None => self.sent_head = behind,
        }
        match parts.get_mut(behind) {
            Some(part) => part.sent_prev = before,
            None => self.sent_tail = before,
        }
        self.sent = self.sent.saturating_sub(1);
    }

    /// The oldest part sent and not answered.
    pub(crate) fn oldest_sent(&self) -> Option<u32> {
        (self.sent_head != NIL).then_some(self.sent_head)
    }

    /// Gives the connection up; `Closed` will follow.
    pub(crate) fn close(&mut self, env: &mut dyn Env) {
        match self.link {
            Link::Connecting(conn) | Link::Greeting(conn) | Link::Up(conn) => {
                env.close(conn, false);
                self.link = Link::Closing(conn);
            }
            Link::Down { .. } | Link::Closing(_) => {}
        }
    }

    /// The connection is no more: when to try again.
    pub(crate) fn closed(&mut self, now: Mono) {
        let pause = RECONNECT_MIN_MS.saturating_mul(1 << self.failures.min(10)).min(RECONNECT_MAX_MS);
        self.failures = self.failures.saturating_add(1);
        self.link = Link::Down { retry_at: now.plus_ms(pause) };
        self.pinged = None;
    }

    /// Looks after silence. `late` says that this client itself was not running for a while, so that an
    /// answer may lie unread: patience starts anew.
    pub(crate) fn watch(&mut self, env: &mut dyn Env, now: Mono, late: bool) {
        let due = match self.link {
            Link::Up(_) => self.sent > 0,
            Link::Greeting(_) => true,
            _ => false,
        };
        let Some(conn) = self.link.conn().filter(|_| due) else { return };
        match self.pinged {
            Some(at) if late || at > now => self.pinged = Some(now),
            Some(at) if now.since(at) >= SILENT_MS * 1_000_000 => self.close(env),
            Some(_) => {}
            None if now.since(self.last_heard) >= PING_AFTER_MS * 1_000_000 => {
                self.pinged = Some(now);
                // Refused when the queue is full: then the frames in it serve as well.
                let _ = env.send(conn, frames::bare(FrameKind::Ping, 0));
            }
            None => {}
        }
    }
}

/// All peers. Their numbers stay valid while a PG refers to them.
#[derive(Default)]
pub(crate) struct Peers {
    list: Vec<Peer>,
}

impl Peers {
    #[inline]
    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut Peer> {
        self.list.get_mut(index as usize)
    }

    pub(crate) fn len(&self) -> u32 {
        self.list.len() as u32
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Peer)> {
        self.list.iter_mut().enumerate().map(|(i, peer)| (i as u32, peer))
    }

    /// The peer at an address.
    pub(crate) fn index_of(&mut self, addr: SocketAddr, node: NodeId) -> u32 {
        if let Some((index, peer)) = self.iter_mut().find(|(_, peer)| !peer.vacant && peer.addr == addr) {
            peer.node = node;
            return index;
        }
        if let Some((index, peer)) = self.iter_mut().find(|(_, peer)| peer.vacant) {
            *peer = Peer::new(addr, node);
            return index;
        }
        self.list.push(Peer::new(addr, node));
        self.len() - 1
    }

    pub(crate) fn by_conn(&mut self, conn: ConnId) -> Option<(u32, &mut Peer)> {
        self.iter_mut().find(|(_, peer)| peer.link.conn() == Some(conn))
    }

    /// Starts connecting a peer that is down.
    pub(crate) fn connect(&mut self, env: &mut dyn Env, index: u32, session: Option<SessionId>) {
        let Some(peer) = self.get_mut(index) else { return };
        if let Link::Down { .. } = peer.link {
            peer.session = session;
            peer.last_heard = env.now();
            peer.link = Link::Connecting(env.connect(peer.addr, reactor::Framing::Frames));
        }
    }

    /// The transport is connected: greet.
    pub(crate) fn connected(&mut self, env: &mut dyn Env, conn: ConnId, identity: &mut Identity) -> bool {
        let Some((_, peer)) = self.by_conn(conn) else { return false };
        if peer.link == Link::Connecting(conn) {
            peer.heard(env.now());
            peer.link = Link::Greeting(conn);
            if identity.hello().is_none_or(|hello| env.send(conn, hello).is_err()) {
                peer.close(env);
            }
        }
        true
    }

    /// Closes connections to peers that no PG refers to and that owe us nothing; frees their places.
    pub(crate) fn sweep(&mut self, env: &mut dyn Env, in_use: impl Fn(u32) -> bool) {
        for (index, peer) in self.iter_mut() {
            if peer.vacant || peer.sent > 0 || !peer.waiting.is_empty() || in_use(index) {
                continue;
            }
            match peer.link {
                Link::Down { .. } => peer.vacant = true,
                _ => peer.close(env),
            }
        }
    }
}

/// Whether a part is on its way under this request.
pub(crate) fn is_sent_as(part: &Part, request: u64) -> bool {
    part.state == PartState::InFlight { request }
}
