//! Connections that this core opens: one to every core that owns a member of a PG whose primary is here.
//!
//! A lost connection is opened again after a short, growing pause for as long as a PG needs it. What was
//! under way is sent again once the member has confirmed the epoch (`activate`).

use crate::config::*;
use crate::core::DataCore;
use crate::msg::{CoreMsg, Member};
use crate::pg::Link;
use crate::session::{Conn, hello_frame, parse_hello};
use crate::slab::Key;
use reactor::{CloseReason, ConnId, Env, Frame, Framing, Mono};
use std::net::SocketAddr;
use wire::control::{Hello, Role};
use wire::{BlockCrcs, FrameKind, Header, NodeId, SessionId};

/// Classes of request numbers (top byte).
pub(crate) mod request {
    /// A change of an object (`Op`).
    pub(crate) const OP: u8 = 1;
    /// `Activate` of a PG.
    pub(crate) const ACTIVATE: u8 = 2;
    /// `SubDigests`, `SubLookup` and `List` of a PG.
    pub(crate) const LIST: u8 = 3;
    /// A recovery's push, delete or purge (`Heal`).
    pub(crate) const PUSH: u8 = 4;
    /// A recovery's read from a good copy (`Heal`).
    pub(crate) const READ: u8 = 5;
    /// What a member is to know of a PG's changes (`origins`).
    pub(crate) const ORIGINS: u8 = 6;
    /// A scrub's `List` of a PG.
    pub(crate) const SCRUB_LIST: u8 = 7;
    /// A scrub asks for a copy (`scrub::Check`).
    pub(crate) const VERIFY: u8 = 8;
}

/// How far a connection to a peer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PeerState {
    /// Not connected; next attempt then.
    Down(Mono),
    /// Transport connecting, or hello sent and not answered.
    Opening(ConnId),
    Up(ConnId),
    /// No PG needs it any more.
    Forgotten,
}

/// A core of another node, or of this one.
pub(crate) struct Peer {
    pub(crate) addr: SocketAddr,
    pub(crate) node: NodeId,
    /// Its process, as far as the control core knows.
    process: Option<SessionId>,
    pub(crate) state: PeerState,
    /// Counts the connections, so that the peer can refuse what an older one still delivers.
    incarnation: u64,
    pause_ms: u64,
    /// Looks since something came from it (`reach`).
    pub(crate) quiet_ticks: u32,
    /// Looks since the last attempt to connect.
    pub(crate) state_ticks: u32,
}

impl DataCore {
    /// The peer at an address, made and connected when new.
    pub(crate) fn peer_at(&mut self, env: &mut dyn Env, member: &Member) -> usize {
        if let Some(&at) = self.peer_index.get(&member.addr) {
            if let Some(peer) = self.peers.get_mut(at) {
                peer.node = member.node;
                let before = peer.process;
                peer.process = member.session.or(before);
                match peer.state {
                    PeerState::Forgotten => {
                        peer.quiet_ticks = peer.quiet_ticks.min(UNREACHABLE_TICKS - REJOIN_TICKS);
                        self.connect_peer(env, at);
                    }
                    // Its process is another one: a host that vanished does not say goodbye.
                    PeerState::Up(conn) if before.is_some() && peer.process != before => {
                        env.close(conn, false)
                    }
                    _ => {}
                }
            }
            return at;
        }
        let at = self.peers.len();
        self.peers.push(Peer {
            addr: member.addr,
            node: member.node,
            process: member.session,
            state: PeerState::Down(Mono(0)),
            incarnation: 0,
            pause_ms: RECONNECT_MIN_MS,
            quiet_ticks: 0,
            state_ticks: 0,
        });
        self.peer_index.insert(member.addr, at);
        self.connect_peer(env, at);
        at
    }

    fn connect_peer(&mut self, env: &mut dyn Env, at: usize) {
        let Some(peer) = self.peers.get_mut(at) else { return };
        peer.incarnation += 1;
        let conn = env.connect(peer.addr, Framing::Frames);
        peer.state = PeerState::Opening(conn);
        peer.state_ticks = 0;
        self.conns.insert(conn, Conn::Peer(at));
        self.wake_in(env, REACH_TICK_MS);
    }

    pub(crate) fn connected(&mut self, env: &mut dyn Env, conn: ConnId) {
        let Some(Conn::Peer(at)) = self.conns.get(&conn) else { return };
        let Some(peer) = self.peers.get(*at) else { return };
        if peer.state != PeerState::Opening(conn) {
            return; // given up meanwhile: it must not pass for the newest
        }
        let hello = Hello {
            cluster: Some(self.config.cluster),
            role: Role::Node(self.config.node),
            session: self.session,
            incarnation: peer.incarnation,
            refused: 0,
        };
        if let Some(frame) = hello_frame(&hello, 0) {
            self.send(env, conn, frame);
        }
    }

    pub(crate) fn peer_frame(&mut self, env: &mut dyn Env, at: usize, from: ConnId, frame: Frame) {
        let Some(peer) = self.peers.get_mut(at) else { return };
        if peer.state == PeerState::Up(from) {
            peer.quiet_ticks = 0;
        }
        match (peer.state, frame.header.kind) {
            (PeerState::Opening(conn), FrameKind::Hello) if conn == from => {
                self.peer_hello(env, at, conn, &frame)
            }
            (PeerState::Up(conn), _) if conn == from => self.peer_reply(env, at, frame),
            (PeerState::Opening(conn), _) if conn == from => env.close(conn, false),
            // An older connection that we gave up: what it still says no longer counts.
            _ => {}
        }
    }

    fn peer_hello(&mut self, env: &mut dyn Env, at: usize, conn: ConnId, frame: &Frame) {
        let Some(peer) = self.peers.get_mut(at) else { return };
        let welcome = parse_hello(frame).is_some_and(|hello| {
            let known = hello.cluster == Some(self.config.cluster) && hello.role == Role::Node(peer.node);
            if !known || hello.refused != 0 {
                tracing::warn!(addr = %peer.addr, node = %peer.node, refused = hello.refused, "peer does not welcome us");
            }
            known && hello.refused == 0
        });
        if !welcome {
            return env.close(conn, false);
        }
        peer.state = PeerState::Up(conn);
        peer.quiet_ticks = 0;
        peer.pause_ms = RECONNECT_MIN_MS;
        self.metrics.peers_up.add(1);
        for (pg, member) in self.members_on(at) {
            self.send_activate(env, pg, member);
        }
    }

    fn peer_reply(&mut self, env: &mut dyn Env, at: usize, frame: Frame) {
        let (class, key) = Key::untag(frame.header.request);
        match (frame.header.kind, class) {
            (
                FrameKind::SubWriteReply
                | FrameKind::SubZeroReply
                | FrameKind::SubDeleteReply
                | FrameKind::SubPurgeReply,
                request::OP,
            ) => self.sub_reply(env, key, &frame.header),
            (FrameKind::ActivateReply, request::ACTIVATE) => self.activate_reply(env, key, &frame),
            (FrameKind::SubOriginsReply, request::ORIGINS) => self.origins_reply(key, &frame.header),
            (FrameKind::SubDigestsReply, request::LIST) => self.digests_reply(env, key, &frame),
            (FrameKind::SubLookupReply, request::LIST) => self.lookup_reply(env, key, &frame),
            (FrameKind::ListReply, request::LIST) => self.list_reply(env, key, &frame),
            (FrameKind::ListReply, request::SCRUB_LIST) => self.scrub_listed(key, &frame),
            (FrameKind::SubVerifyReply, request::VERIFY) => self.verify_reply(env, key, &frame),
            (
                FrameKind::SubPushReply | FrameKind::SubDeleteReply | FrameKind::SubPurgeReply,
                request::PUSH,
            ) => {
                self.push_reply(env, key, &frame.header);
            }
            (FrameKind::SubReadReply, request::READ) => self.heal_read_reply(env, key, frame),
            (FrameKind::Pong | FrameKind::Hello, _) => {}
            (FrameKind::Ping, _) => {
                if let Some(PeerState::Up(conn)) = self.peers.get(at).map(|peer| peer.state) {
                    self.answer_status(env, conn, &frame.header, wire::Status::Ok);
                }
            }
            (kind, _) => {
                let Some(peer) = self.peers.get(at) else { return };
                tracing::error!(node = %peer.node, addr = %peer.addr, ?kind, "a peer answers what was not asked: cut off");
                if let PeerState::Up(conn) = peer.state {
                    env.close(conn, false);
                }
            }
        }
    }

    pub(crate) fn peer_closed(&mut self, env: &mut dyn Env, at: usize, conn: ConnId, reason: CloseReason) {
        let jitter = env.random() % RECONNECT_MIN_MS;
        let now = env.now();
        let Some(peer) = self.peers.get_mut(at) else { return };
        match peer.state {
            PeerState::Up(current) if current == conn => self.metrics.peers_up.sub(1),
            PeerState::Opening(current) if current == conn => {}
            _ => return,
        }
        let node = peer.node;
        let retry = now.plus_ms(peer.pause_ms + jitter);
        peer.pause_ms = (peer.pause_ms * 2).min(RECONNECT_MAX_MS);
        peer.state = PeerState::Down(retry);
        self.wake_at(env, retry);
        for (pg, member) in self.members_on(at) {
            if let Some(member) = self.primary_mut(pg).and_then(|p| p.members.get_mut(member)) {
                member.link = Link::Down;
            }
        }
        if reason == CloseReason::Refused {
            self.tell(CoreMsg::PeerRefused { node });
        }
    }

    /// Every (PG, member number) that is reached through a peer.
    pub(crate) fn members_on(&self, peer: usize) -> Vec<(Key, usize)> {
        let mut found = Vec::new();
        for (key, pg) in self.pgs.iter() {
            if let Some(primary) = &pg.primary {
                for (at, member) in primary.members.iter().enumerate() {
                    if member.peer == peer {
                        found.push((key, at));
                    }
                }
            }
        }
        found
    }

    /// Connects what is due; returns when the next attempt is.
    pub(crate) fn retry_peers(&mut self, env: &mut dyn Env) -> Mono {
        let now = env.now();
        let mut next = Mono(u64::MAX);
        for at in 0..self.peers.len() {
            if let Some(PeerState::Down(due)) = self.peers.get(at).map(|peer| peer.state) {
                if due <= now {
                    self.connect_peer(env, at);
                } else {
                    next = next.min(due);
                }
            }
        }
        next
    }

    /// Lets go of peers that no PG needs.
    pub(crate) fn forget_peers(&mut self, env: &mut dyn Env) {
        let mut needed = vec![false; self.peers.len()];
        for (_, pg) in self.pgs.iter() {
            for member in pg.primary.iter().flat_map(|primary| &primary.members) {
                if let Some(slot) = needed.get_mut(member.peer) {
                    *slot = true;
                }
            }
        }
        for (peer, needed) in self.peers.iter_mut().zip(needed) {
            if needed {
                continue;
            }
            match peer.state {
                PeerState::Up(conn) => {
                    self.metrics.peers_up.sub(1);
                    peer.state = PeerState::Forgotten;
                    env.close(conn, true);
                }
                PeerState::Opening(conn) => {
                    peer.state = PeerState::Forgotten;
                    env.close(conn, false);
                }
                PeerState::Down(_) => peer.state = PeerState::Forgotten,
                PeerState::Forgotten => {}
            }
        }
    }

    /// Where a member of a PG is reached, and a header that asks it something as the PG's primary.
    pub(crate) fn question(
        &self,
        key: Key,
        index: usize,
        kind: FrameKind,
        request: u64,
    ) -> Option<(usize, Header)> {
        let pg = self.pgs.get(key)?;
        let primary = pg.primary.as_deref()?;
        let member = primary.members.get(index)?;
        let mut header = Header::new(kind, request);
        header.pg = pg.id;
        header.object.pool = pg.id.pool;
        header.epoch = primary.epoch;
        header.slice = member.slice;
        header.primary = primary.slice;
        Some((member.peer, header))
    }

    /// Sends a frame to a member's core if it is connected.
    pub(crate) fn send_peer(&mut self, env: &mut dyn Env, peer: usize, frame: Frame) {
        if let Some(PeerState::Up(conn)) = self.peers.get(peer).map(|peer| peer.state) {
            self.send(env, conn, frame);
        }
    }

    /// The same for a frame without payload.
    pub(crate) fn send_peer_header(&mut self, env: &mut dyn Env, peer: usize, header: Header) {
        self.send_peer(env, peer, Frame { header, crcs: BlockCrcs::default(), payload: None });
    }
}
