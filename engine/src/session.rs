//! Connections that others open to this core: hello, sessions and their fencing, answers.
//!
//! A session (a client instance, or a peer's core) numbers its connections. When a newer one says hello,
//! the older one is closed and what still waits from it is dropped *before* the newer one is welcomed:
//! a request delayed in the network must not be carried out after its sender gave it up and sent it again.

use crate::config::*;
use crate::core::{DataCore, Life};
use crate::hash::Table;
use crate::op::Stage;
use crate::payload::{attach, bytes_of};
use crate::planted::Bug;
use crate::slab::Key;
use reactor::{CloseReason, ConnId, Env, Frame, IoBuf, Mono};
use std::collections::VecDeque;
use std::net::SocketAddr;
use wire::control::{Hello, Role};
use wire::{BlockCrcs, FrameKind, Header, SessionId, Status};

/// A connection of this core.
pub(crate) enum Conn {
    /// Opened by somebody else.
    Inbound(Inbound),
    /// Opened by us; index into the peers.
    Peer(usize),
}

/// What is known of a connection that somebody opened.
pub(crate) struct Inbound {
    /// `None` until its hello.
    pub(crate) role: Option<Role>,
    session: SessionId,
    since: Mono,
    /// Its client operations under way.
    pub(crate) ops: u32,
}

struct Entry {
    incarnation: u64,
    conn: Option<ConnId>,
}

/// The last incarnation of every session, also of those that are gone: bounded, oldest forgotten first.
#[derive(Default)]
pub(crate) struct Sessions {
    entries: Table<SessionId, Entry>,
    order: VecDeque<SessionId>,
}

impl Sessions {
    /// Forgets the longest gone sessions beyond the bound. Sessions with a connection stay.
    fn make_room(&mut self) {
        let mut looked_at = 0;
        while self.entries.len() >= SESSIONS_MAX && looked_at < self.order.len() {
            let Some(oldest) = self.order.pop_front() else { return };
            if self.entries.get(&oldest).is_some_and(|entry| entry.conn.is_some()) {
                self.order.push_back(oldest);
                looked_at += 1;
            } else {
                self.entries.remove(&oldest);
            }
        }
    }
}

/// Encodes a hello frame.
pub(crate) fn hello_frame(hello: &Hello, kind_request: u64) -> Option<Frame> {
    let bytes = hello.encode();
    attach(Header::new(FrameKind::Hello, kind_request), &bytes)
}

/// Decodes and verifies a hello frame.
pub(crate) fn parse_hello(frame: &Frame) -> Option<Hello> {
    Hello::decode(bytes_of(frame)?).ok()
}

impl DataCore {
    pub(crate) fn accepted(&mut self, env: &mut dyn Env, conn: ConnId, from: SocketAddr) {
        if self.conns.len() >= CONNS_MAX || !matches!(self.life, Life::Running | Life::Draining(_)) {
            tracing::debug!(%from, "connection refused: too many, or stopping");
            env.close(conn, false);
            return;
        }
        let inbound = Inbound { role: None, session: SessionId(0), since: env.now(), ops: 0 };
        self.conns.insert(conn, Conn::Inbound(inbound));
        self.metrics.connections.add(1);
    }

    pub(crate) fn frame(&mut self, env: &mut dyn Env, conn: ConnId, frame: Frame) {
        match self.conns.get(&conn) {
            None => {} // fenced or closed: whatever still arrives is refused by silence
            Some(Conn::Peer(peer)) => self.peer_frame(env, *peer, conn, frame),
            Some(Conn::Inbound(inbound)) => match inbound.role {
                Some(Role::Client) => self.client_frame(env, conn, frame),
                Some(Role::Node(_)) => self.sub_frame(env, conn, frame),
                None => self.hello(env, conn, frame),
            },
        }
    }

    fn hello(&mut self, env: &mut dyn Env, conn: ConnId, frame: Frame) {
        let hello = match (frame.header.kind, parse_hello(&frame)) {
            (FrameKind::Hello, Some(hello)) => hello,
            _ => return self.drop_inbound(env, conn, false),
        };
        let foreign = match (hello.cluster, hello.role) {
            (Some(cluster), _) => cluster != self.config.cluster,
            (None, Role::Client) => false,
            (None, Role::Node(_)) => true,
        };
        if foreign {
            self.answer_hello(env, conn, frame.header.request, Status::WrongCluster);
            return self.drop_inbound(env, conn, true);
        }
        if self.life != Life::Running {
            self.answer_hello(env, conn, frame.header.request, Status::ShuttingDown);
            return self.drop_inbound(env, conn, true);
        }
        if !self.fence(env, conn, &hello) {
            self.answer_hello(env, conn, frame.header.request, Status::StaleEpoch);
            return self.drop_inbound(env, conn, true);
        }
        if let Some(Conn::Inbound(inbound)) = self.conns.get_mut(&conn) {
            inbound.role = Some(hello.role);
            inbound.session = hello.session;
        }
        self.answer_hello(env, conn, frame.header.request, Status::Ok);
    }

    /// Closes the session's older connection. False when this one is not the newest.
    fn fence(&mut self, env: &mut dyn Env, conn: ConnId, hello: &Hello) -> bool {
        let older = match self.sessions.entries.get_mut(&hello.session) {
            Some(entry)
                if hello.incarnation <= entry.incarnation
                    && !self.config.planted.has(Bug::OldIncarnationAccepted) =>
            {
                return false;
            }
            Some(entry) => {
                entry.incarnation = entry.incarnation.max(hello.incarnation);
                entry.conn.replace(conn)
            }
            None => {
                self.sessions.make_room();
                let entry = Entry { incarnation: hello.incarnation, conn: Some(conn) };
                self.sessions.entries.insert(hello.session, entry);
                self.sessions.order.push_back(hello.session);
                None
            }
        };
        if let Some(older) = older
            && !self.bug(Bug::OldIncarnationAccepted)
        {
            self.metrics.fenced.add(1);
            self.drop_inbound(env, older, false);
        }
        true
    }

    fn answer_hello(&mut self, env: &mut dyn Env, conn: ConnId, request: u64, refused: Status) {
        let hello = Hello {
            cluster: Some(self.config.cluster),
            role: Role::Node(self.config.node),
            session: self.session,
            incarnation: 0,
            refused: refused as u8,
        };
        if let Some(frame) = hello_frame(&hello, request) {
            self.send(env, conn, frame);
        }
    }

    /// Forgets a connection and everything that waits on its behalf, then closes it.
    pub(crate) fn drop_inbound(&mut self, env: &mut dyn Env, conn: ConnId, after_flush: bool) {
        self.forget_inbound(conn);
        env.close(conn, after_flush);
    }

    /// The connection is no more: changes with a version go on, unanswered; the rest is dropped.
    fn forget_inbound(&mut self, conn: ConnId) {
        let Some(Conn::Inbound(inbound)) = self.conns.remove(&conn) else { return };
        self.metrics.connections.sub(1);
        self.forget_parked(conn);
        if let Some(entry) = self.sessions.entries.get_mut(&inbound.session)
            && entry.conn == Some(conn)
        {
            entry.conn = None;
        }
        if inbound.ops > 0 {
            for (_, op) in self.ops.iter_mut() {
                if op.client.is_some_and(|client| client.conn == conn) {
                    op.client = None;
                    if op.stage != Stage::Started {
                        op.payload = None;
                    }
                }
            }
        }
    }

    pub(crate) fn closed(&mut self, env: &mut dyn Env, conn: ConnId, reason: CloseReason) {
        match self.conns.get(&conn) {
            Some(Conn::Peer(peer)) => {
                let peer = *peer;
                self.conns.remove(&conn);
                self.peer_closed(env, peer, conn, reason);
            }
            Some(Conn::Inbound(_)) => {
                if let CloseReason::Protocol(error) = reason {
                    tracing::warn!(%error, "connection closed: the peer does not speak our protocol");
                }
                self.forget_inbound(conn);
            }
            None => {}
        }
    }

    pub(crate) fn expire_hellos(&mut self, env: &mut dyn Env) {
        let limit = HELLO_TIMEOUT_MS * 1_000_000;
        let now = env.now();
        let mut silent: Vec<ConnId> = self
            .conns
            .iter()
            .filter(|(_, conn)| {
                matches!(conn, Conn::Inbound(inbound) if inbound.role.is_none() && now.since(inbound.since) > limit)
            })
            .map(|(id, _)| *id)
            .collect();
        silent.sort_unstable();
        for conn in silent {
            self.drop_inbound(env, conn, false);
        }
    }

    /// Sends a frame. A connection whose bounded queue is full belongs to somebody who does not read: it
    /// is closed, and whoever it was comes back.
    pub(crate) fn send(&mut self, env: &mut dyn Env, conn: ConnId, frame: Frame) {
        if env.send(conn, frame).is_err() {
            tracing::warn!("connection closed: its send queue is full");
            match self.conns.get(&conn) {
                Some(Conn::Inbound(_)) => self.drop_inbound(env, conn, false),
                // `Closed` follows and does the rest.
                Some(Conn::Peer(_)) | None => env.close(conn, false),
            }
        }
    }

    /// Answers a request with a bare status.
    pub(crate) fn answer_status(
        &mut self,
        env: &mut dyn Env,
        conn: ConnId,
        request: &Header,
        status: Status,
    ) {
        let Some(kind) = FrameKind::from_u8(request.kind as u8 + 1) else { return };
        let header = request.reply(kind, status);
        self.send(env, conn, Frame { header, crcs: BlockCrcs::default(), payload: None });
    }

    /// Answers a client's operation, once; the operation itself stays.
    pub(crate) fn answer(
        &mut self,
        env: &mut dyn Env,
        key: Key,
        status: Status,
        data: Option<(IoBuf, BlockCrcs)>,
    ) {
        let now = env.now();
        let Some(op) = self.ops.get_mut(key) else { return };
        let Some(client) = op.client.take() else { return };
        let Some(kind) = FrameKind::from_u8(op.header.kind as u8 + 1) else { return };
        let mut header = op.header.reply(kind, status);
        header.version = op.version;
        let (crcs, payload) = match data {
            Some((payload, crcs)) => (crcs, Some(payload)),
            None => (BlockCrcs::default(), None),
        };
        header.payload_len = payload.as_ref().map_or(0, IoBuf::len) as u32;
        let bytes = u64::from(op.header.blocks) * wire::BLOCK_BYTES as u64;
        self.share.earn(now, bytes);
        if let Some(class) = crate::append::class_of(op.kind) {
            self.metrics.op(class).done(status, bytes, op.arrived, now);
        }
        if status == Status::StaleEpoch {
            self.metrics.stale_epochs.add(1);
        }
        if let Some(Conn::Inbound(inbound)) = self.conns.get_mut(&client.conn) {
            inbound.ops = inbound.ops.saturating_sub(1);
            self.send(env, client.conn, Frame { header, crcs, payload });
        }
    }
}
