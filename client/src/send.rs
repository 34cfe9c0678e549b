//! From ready to sent: finding the primary's connection, building the frame, waiting when there is none.

use crate::frames::Identity;
use crate::io::Io;
use crate::map::ClusterMap;
use crate::options::IN_FLIGHT_MAX;
use crate::part::{IoKind, PartState};
use crate::peer::Link;
use crate::slab::NIL;
use reactor::{ConnId, Env, Frame, Mono};
use wire::frame::FLAG_RESENT;
use wire::{BlockCrcs, Header};

/// First pause of a part that was refused; doubles with each refusal.
const BACKOFF_MIN_MS: u64 = 2;
/// Longest such pause: how long a PG's readiness can go unnoticed when no map change announces it.
const BACKOFF_MAX_MS: u64 = 100;

/// The pause after so many fruitless tries.
pub(crate) fn backoff_ms(retries: u32) -> u64 {
    BACKOFF_MIN_MS.saturating_mul(1 << retries.min(10)).min(BACKOFF_MAX_MS)
}

impl Io {
    /// Sends what may be sent.
    pub(crate) fn pump(&mut self, env: &mut dyn Env, map: &ClusterMap) {
        while self.in_flight < IN_FLIGHT_MAX
            && let Some(index) = self.ready.pop_front()
        {
            self.dispatch(env, map, index);
        }
    }

    /// Brings a part to its primary's connection, or to where it waits for one.
    fn dispatch(&mut self, env: &mut dyn Env, map: &ClusterMap, index: u32) {
        let Some(part) = self.parts.get_mut(index) else { return };
        let entry = map.pg(part.pg);
        (part.epoch, part.peer) = (entry.epoch, entry.peer);
        let Some(peer) = self.peers.get_mut(entry.peer) else {
            return self.park(index, env.now().plus_ms(BACKOFF_MAX_MS));
        };
        match peer.link {
            Link::Up(conn) => return self.transmit(env, conn, index),
            Link::Down { retry_at } if env.now() >= retry_at => {
                let session = map.session_of(peer.node);
                self.peers.connect(env, entry.peer, session);
            }
            Link::Down { retry_at } => self.wake_by(retry_at),
            Link::Connecting(_) | Link::Greeting(_) | Link::Closing(_) => {}
        }
        self.wait(index);
    }

    fn wait(&mut self, index: u32) {
        let Some(part) = self.parts.get_mut(index) else { return };
        if let Some(peer) = self.peers.get_mut(part.peer) {
            part.state = PartState::Waiting;
            peer.waiting.push(index);
        }
    }

    fn transmit(&mut self, env: &mut dyn Env, conn: ConnId, index: u32) {
        let Some(part) = self.parts.get_mut(index) else { return };
        let (Some(op), Some((kind, _))) = (self.ops.get(part.op), part.kind.frames()) else { return };
        self.tries = self.tries.wrapping_add(1);
        let request = u64::from(self.tries) << 32 | u64::from(index);
        let mut header = Header::new(kind, request);
        header.pg = part.pg;
        header.epoch = part.epoch;
        header.object = part.object;
        header.block = u32::from(part.block);
        header.blocks = u16::from(part.blocks);
        if part.kind.changes() {
            header.origin = part.origin;
            header.flags = if part.maybe_done { FLAG_RESENT } else { 0 };
        }
        let at = (part.image_offset() - op.offset.min(part.image_offset())) as usize;
        let data = op.buf.as_ref().map(|buf| buf.slice(at, part.len_bytes()));
        let mut frame = Frame { header, crcs: BlockCrcs::default(), payload: None };
        if part.kind == IoKind::Write
            && let Some(data) = &data
        {
            // Anew for each try: a caller that changed its buffer meanwhile gets the new bytes written,
            // not an endless mismatch.
            frame.crcs = BlockCrcs::of(data.as_slice());
            frame.header.payload_len = data.len() as u32;
            frame.payload = Some(data.clone());
        }
        if env.send(conn, frame).is_err() {
            // The connection's queue is full: the next answer from it makes room.
            return self.wait(index);
        }
        if part.kind == IoKind::Read
            && let Some(into) = data.filter(reactor::IoBuf::is_foreign)
        {
            env.expect(conn, request, into);
        }
        part.state = PartState::InFlight { request };
        let peer = part.peer;
        if let Some(peer) = self.peers.get_mut(peer) {
            if peer.sent == 0 {
                // Silence counts from here: nothing was due before.
                peer.heard(env.now());
            }
            peer.link_sent(&mut self.parts, index);
        }
        self.in_flight += 1;
        self.counters.sent += 1;
    }

    /// Puts a part aside until a time, or until the map changes.
    pub(crate) fn park(&mut self, index: u32, until: Mono) {
        if let Some(part) = self.parts.get_mut(index) {
            part.state = PartState::Parked { until };
            self.parked.push(index);
            self.wake_by(until);
        }
    }

    /// Wants `tick` at this time or earlier.
    pub(crate) fn wake_by(&mut self, at: Mono) {
        self.wake_at = Some(self.wake_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Makes a part ready that is in no queue.
    pub(crate) fn make_ready(&mut self, index: u32) {
        if let Some(part) = self.parts.get_mut(index) {
            part.state = PartState::Ready;
            self.ready.push_back(index);
        }
    }

    /// Parts that waited for this peer look for their place again.
    pub(crate) fn reconsider_waiting(&mut self, peer: u32) {
        let Some(peer) = self.peers.get_mut(peer) else { return };
        let mut waiting = std::mem::take(&mut peer.waiting);
        for index in waiting.drain(..) {
            if let Some(part) = self.parts.get_mut(index) {
                part.state = PartState::Ready;
                self.ready.push_back(index);
            }
        }
        peer.waiting = waiting;
    }

    /// Parts whose time has come become ready; peers are looked after.
    pub(crate) fn tick(&mut self, env: &mut dyn Env, late: bool) {
        let now = env.now();
        self.wake_at = None;
        let mut at = 0;
        while let Some(index) = self.parked.get(at).copied() {
            match self.parts.get(index).map(|part| part.state) {
                Some(PartState::Parked { until }) if until > now => {
                    self.wake_by(until);
                    at += 1;
                }
                _ => {
                    self.parked.swap_remove(at);
                    self.make_ready(index);
                }
            }
        }
        for index in 0..self.peers.len() {
            let Some(peer) = self.peers.get_mut(index) else { continue };
            peer.watch(env, now, late);
            if !peer.waiting.is_empty() {
                match peer.link {
                    Link::Down { retry_at } if retry_at > now => self.wake_by(retry_at),
                    Link::Down { .. } | Link::Up(_) => self.reconsider_waiting(index),
                    Link::Connecting(_) | Link::Greeting(_) | Link::Closing(_) => {}
                }
            }
        }
        self.expire(env, now);
    }

    /// The map is another one: connections to processes that are gone are given up, and parts that waited
    /// for news go where the map now says.
    pub(crate) fn map_changed(&mut self, env: &mut dyn Env, map: &ClusterMap, nodes: bool) {
        if nodes {
            for (_, peer) in self.peers.iter_mut() {
                if !matches!(peer.link, Link::Down { .. }) && peer.session != map.session_of(peer.node) {
                    peer.close(env);
                }
            }
            self.peers.sweep(env, |index| map.refers_to(index));
        }
        let mut at = 0;
        while let Some(index) = self.parked.get(at).copied() {
            let news = self.parts.get(index).is_none_or(|part| {
                let entry = map.pg(part.pg);
                entry.peer != NIL && (entry.epoch, entry.peer) != (part.epoch, part.peer)
            });
            if news {
                self.parked.swap_remove(at);
                self.make_ready(index);
            } else {
                at += 1;
            }
        }
        for index in 0..self.peers.len() {
            let moved = |part: &crate::part::Part| map.pg(part.pg).peer != index;
            let parts = &self.parts;
            let Some(peer) = self.peers.get_mut(index) else { continue };
            if peer.waiting.iter().any(|i| parts.get(*i).is_none_or(moved)) {
                self.reconsider_waiting(index);
            }
        }
    }

    /// The greeting was answered.
    pub(crate) fn peer_up(&mut self, env: &mut dyn Env, conn: ConnId, welcome: bool) -> bool {
        let Some((index, peer)) = self.peers.by_conn(conn) else { return false };
        peer.heard(env.now());
        if peer.link == Link::Greeting(conn) {
            if welcome {
                peer.link = Link::Up(conn);
                self.reconsider_waiting(index);
            } else {
                peer.close(env);
            }
        }
        true
    }

    /// The transport is connected.
    pub(crate) fn peer_connected(&mut self, env: &mut dyn Env, conn: ConnId, me: &mut Identity) -> bool {
        self.peers.connected(env, conn, me)
    }
}
