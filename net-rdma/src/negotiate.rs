//! How a connection gets from TCP to RDMA, or stays, at any time of its life and without waiting for it.
//!
//! 1. The side that connected makes a queue pair and sends an `Offer` in a `Link` frame over TCP.
//! 2. The other makes one, connects it to the first's, and answers with its own offer. Or it declines.
//! 3. The first connects its queue pair and sends a probe over it, which the other answers in the same way. Only a
//!    path that has carried messages both ways is used: a wrong GID, another MTU on the way or a firewall show here.
//! 4. The first sends `Switch`, its last frame over TCP, and from then on sends over RDMA. The other does the same
//!    when it sees that. What comes over RDMA is delivered when the peer's `Switch` has come: frames stay in order.
//!
//! Until its switch each side sends over TCP as before. Without an answer in time the first gives up its queue pair and
//! says so; both go on over TCP as if nothing had been. After a switch there is no way back: if the queue pair breaks,
//! the connection ends, and the next one begins on TCP.

use crate::entry::{Path, Phase};
use crate::link::{Kind, Link, Signal};
use crate::offer::Offer;
use crate::queue_pair::QueuePair;
use crate::transport::RdmaTransport;
use crate::{OFFER_BYTES, RdmaError};
use reactor::backend::TransportIo;
use reactor::{CloseReason, ConnId, Event, Frame, IoBuf, Mono};
use std::net::SocketAddr;
use wire::frame::{LINK_ABANDON, LINK_OFFER, LINK_SWITCH};
use wire::{BlockCrcs, FrameKind, Header, Status, block_crc};

/// How long the other side may take to answer an offer, in milliseconds.
const ANSWER_MS: u64 = 2_000;
/// How long the probe's answer may take, in milliseconds: some retransmissions.
const PROBE_MS: u64 = 1_000;
/// How long the other side's switch may take after our answer, in milliseconds: more than it waits for the probe.
const SWITCH_MS: u64 = 5_000;
/// How often connections on TCP are looked at for whether to offer RDMA again, in milliseconds.
pub(crate) const OFFER_CHECK_MS: u64 = 1_000;

/// A frame of the negotiation.
fn link_frame(header: Header, payload: Option<[u8; OFFER_BYTES]>) -> Option<Frame> {
    let (mut header, mut crcs) = (header, BlockCrcs::default());
    let payload = match payload {
        Some(bytes) => {
            header.payload_len = OFFER_BYTES as u32;
            crcs.push(block_crc(&bytes));
            Some(IoBuf::copy_of(&bytes).ok()?)
        }
        None => None,
    };
    Some(Frame { header, crcs, payload })
}

fn read_offer(frame: &Frame) -> Result<Offer, crate::OfferError> {
    Offer::decode(frame.payload.as_ref().map_or(&[], |payload| payload.as_slice()), &frame.crcs)
}

impl RdmaTransport {
    /// Sends a frame of the negotiation over TCP. False when it could not be queued.
    fn tell(
        &mut self,
        io: &mut TransportIo<'_>,
        conn: ConnId,
        header: Header,
        payload: Option<[u8; OFFER_BYTES]>,
    ) -> bool {
        link_frame(header, payload)
            .is_some_and(|frame| self.beneath(io, |beneath, io| beneath.send(io, conn, frame)).is_ok())
    }

    fn tell_step(&mut self, io: &mut TransportIo<'_>, slot: u16, step: u16) -> bool {
        let Some(entry) = self.at(slot) else { return false };
        let (conn, attempt) = (entry.conn, u64::from(entry.owner.generation));
        self.tell(io, conn, Header { blocks: step, ..Header::new(FrameKind::Link, attempt) }, None)
    }

    /// A queue pair for a connection, with its receives posted.
    fn make_path(&mut self, io: &mut TransportIo<'_>, slot: u16) -> Result<Offer, RdmaError> {
        let shared = self.shared(io).ok_or(RdmaError::NoDevice)?;
        let Some(entry) = self.at(slot) else { return Err(RdmaError::NoDevice) };
        // Other than any queue pair's of this core in the last seconds.
        let psn = (io.now.0 >> 10) as u32 ^ u32::from(entry.owner.generation) << 8;
        let pair = QueuePair::new(&shared, entry.owner, psn)?;
        let link = Link::new(io.arena, &pair.window_keys()).map_err(|_| RdmaError::NoBuffers)?;
        let offer = pair.offer();
        entry.path = Some(Path { pair, link });
        self.push_out(io, slot);
        Ok(offer)
    }

    fn set_deadline(&mut self, slot: u16, now: Mono, ms: u64) {
        let due = now.plus_ms(ms);
        if let Some(entry) = self.at(slot) {
            entry.deadline = Some(due);
        }
        self.next_deadline = Some(self.next_deadline.map_or(due, |at| at.min(due)));
    }

    /// Makes an offer to the peer of a connection on TCP, if it is one that may accept.
    pub(crate) fn offer(&mut self, io: &mut TransportIo<'_>, conn: ConnId, to: SocketAddr) {
        if !self.port_up || !self.peers.may_try(to, io.now) || self.shared(io).is_none() {
            return;
        }
        let Some(slot) = self.insert(conn, Some(to), Phase::Offered, io.now) else { return };
        let offered = self.make_path(io, slot).map(|offer| {
            let attempt = self.at(slot).map_or(0, |entry| u64::from(entry.owner.generation));
            let header = Header { blocks: LINK_OFFER, ..Header::new(FrameKind::Link, attempt) };
            self.tell(io, conn, header, Some(offer.encode()))
        });
        match offered {
            Ok(true) => {
                io.stats.links.negotiating(conn);
                self.set_deadline(slot, io.now, ANSWER_MS);
            }
            // Its queue is full: another time.
            Ok(false) => drop(self.remove(slot)),
            Err(error) => {
                let pause_ms = self.peers.failed(to, io.now);
                io.stats.links.gave_up(conn, &error.to_string());
                tracing::warn!(%error, pause_ms, "RDMA is not offered");
                self.remove(slot);
            }
        }
    }

    /// Offers RDMA again where it was not possible before.
    pub(crate) fn offer_again(&mut self, io: &mut TransportIo<'_>) {
        self.offer_check = None;
        let waiting = self.outgoing.iter().filter(|(conn, _)| !self.slots.contains_key(conn));
        let due: Vec<_> = waiting
            .filter(|(_, to)| self.peers.may_try(**to, io.now))
            .map(|(conn, to)| (*conn, *to))
            .collect();
        for (conn, to) in due {
            self.offer(io, conn, to);
        }
        self.check_offers_later(io.now);
    }

    pub(crate) fn check_offers_later(&mut self, now: Mono) {
        if self.offer_check.is_none() && !self.outgoing.is_empty() {
            self.offer_check = Some(now.plus_ms(OFFER_CHECK_MS));
        }
    }

    /// A frame has come over TCP.
    pub(crate) fn frame_beneath(&mut self, io: &mut TransportIo<'_>, conn: ConnId, frame: Frame) {
        let slot = self.slots.get(&conn).copied();
        let entry = slot.and_then(|slot| self.at(slot));
        if !matches!(frame.header.kind, FrameKind::Link | FrameKind::LinkReply) {
            return match entry.filter(|entry| entry.peer_switched).map(|entry| entry.owner.slot) {
                Some(slot) => {
                    self.fail(io, slot, CloseReason::Broken(libc::EPROTO), "a frame behind the last")
                }
                None => io.events.push_back(Event::Frame { conn, frame }),
            };
        }
        let (phase, attempt) =
            entry.map_or((None, 0), |entry| (Some(entry.phase), u64::from(entry.owner.generation)));
        match (frame.header.kind, frame.header.blocks, slot, phase) {
            (FrameKind::Link, LINK_OFFER, None, _) => self.answer(io, conn, &frame),
            (FrameKind::Link, LINK_ABANDON, Some(slot), Some(Phase::Answered)) => self.abandoned(io, slot),
            (FrameKind::Link, LINK_ABANDON, Some(slot), Some(Phase::Offered | Phase::Probing)) => {
                self.gone(io, slot, "the peer gives up");
            }
            // We had given up ourselves.
            (FrameKind::Link, LINK_ABANDON, None, _) => {}
            (FrameKind::Link, LINK_SWITCH, Some(slot), Some(Phase::Answered | Phase::Switched)) => {
                self.peer_switched(io, slot);
            }
            (FrameKind::LinkReply, _, Some(slot), Some(Phase::Offered))
                if frame.header.request == attempt =>
            {
                self.answered(io, slot, &frame);
            }
            // To an offer that we have given up.
            (FrameKind::LinkReply, ..) => {}
            (_, step, _, _) => {
                tracing::warn!(?phase, step, "a peer breaks the rules of the negotiation");
                match slot {
                    Some(slot) => self.fail(io, slot, CloseReason::Broken(libc::EPROTO), "negotiation"),
                    None => self.beneath(io, |beneath, io| beneath.close(io, conn, false)),
                }
            }
        }
    }

    /// The other side offers RDMA.
    fn answer(&mut self, io: &mut TransportIo<'_>, conn: ConnId, frame: &Frame) {
        if !self.port_up {
            let later = frame.header.reply(FrameKind::LinkReply, Status::NotActive);
            self.tell(io, conn, later, None);
            return;
        }
        let made = match read_offer(frame) {
            Ok(peer) => self.accept(io, conn, &peer),
            Err(error) => {
                tracing::warn!(%error, "an RDMA offer is declined");
                None
            }
        };
        let Some((slot, offer)) = made else {
            let declined = frame.header.reply(FrameKind::LinkReply, Status::Invalid);
            self.tell(io, conn, declined, None);
            return;
        };
        let accepted = frame.header.reply(FrameKind::LinkReply, Status::Ok);
        if self.tell(io, conn, accepted, Some(offer.encode())) {
            io.stats.links.negotiating(conn);
            self.set_deadline(slot, io.now, SWITCH_MS);
        } else {
            self.remove(slot);
        }
    }

    /// Our side of what the peer offers; `None` when that is not possible.
    fn accept(&mut self, io: &mut TransportIo<'_>, conn: ConnId, peer: &Offer) -> Option<(u16, Offer)> {
        self.shared(io)?;
        let slot = self.insert(conn, None, Phase::Answered, io.now)?;
        let made = self.make_path(io, slot).and_then(|offer| {
            self.connect_pair(slot, peer)?;
            Ok(offer)
        });
        match made {
            Ok(offer) => Some((slot, offer)),
            Err(error) => {
                io.stats.links.gave_up(conn, &error.to_string());
                tracing::warn!(%error, peer = %peer.gid, "an RDMA offer is declined");
                self.remove(slot);
                None
            }
        }
    }

    fn connect_pair(&mut self, slot: u16, peer: &Offer) -> Result<(), RdmaError> {
        let Some(path) = self.at(slot).and_then(|entry| entry.path.as_mut()) else {
            return Err(RdmaError::NoDevice);
        };
        path.pair.connect(peer)?;
        path.link.grant(peer.receives);
        Ok(())
    }

    /// The other side has answered our offer.
    fn answered(&mut self, io: &mut TransportIo<'_>, slot: u16, frame: &Frame) {
        if frame.header.status == Status::NotActive {
            return self.gone(io, slot, "the peer's port is down");
        }
        if frame.header.status != Status::Ok {
            let Some(entry) = self.remove(slot) else { return };
            io.stats.links.declined(entry.conn);
            if let Some(to) = entry.to {
                self.peers.declined(to, io.now);
            }
            return;
        }
        let connected = match read_offer(frame) {
            Ok(peer) => self.connect_pair(slot, &peer).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(why) = connected {
            return self.give_up(io, slot, &why);
        }
        if let Some(entry) = self.at(slot) {
            entry.phase = Phase::Probing;
            entry.probed = io.now;
            if let Some(path) = &mut entry.path {
                path.link.signal(Kind::Probe);
            }
        }
        self.set_deadline(slot, io.now, PROBE_MS);
        self.mark_dirty(slot);
    }

    /// The path does not work: says so, and stays on TCP.
    pub(crate) fn give_up(&mut self, io: &mut TransportIo<'_>, slot: u16, why: &str) {
        // Nothing can come over it any more when the other side learns of it.
        let told = self.tell_step(io, slot, LINK_ABANDON);
        let conn = self.at(slot).map(|entry| entry.conn);
        self.gone(io, slot, why);
        if let Some(conn) = conn.filter(|_| !told) {
            self.beneath(io, |beneath, io| beneath.close(io, conn, false));
        }
    }

    /// There is no path any more; the connection goes on over TCP.
    fn gone(&mut self, io: &TransportIo<'_>, slot: u16, why: &str) {
        let Some(entry) = self.remove(slot) else { return };
        let pause_ms = entry.to.map(|to| self.peers.failed(to, io.now));
        let to = entry.to.map(|to| to.to_string());
        io.stats.rdma_refusals.add(1);
        io.stats.links.gave_up(entry.conn, why);
        tracing::warn!(to, why, pause_ms, "RDMA does not work with this peer; the connection stays on TCP");
    }

    /// The peer, whose offer we had accepted, does not go on: it has given up, or has died.
    fn abandoned(&mut self, io: &TransportIo<'_>, slot: u16) {
        if let Some(entry) = self.remove(slot) {
            io.stats.links.gave_up(entry.conn, "the peer has given up");
        }
    }

    /// A message of the negotiation has come over RDMA.
    pub(crate) fn signal(&mut self, io: &mut TransportIo<'_>, slot: u16, signal: Signal) {
        let Some(entry) = self.at(slot) else { return };
        match (signal, entry.phase, &mut entry.path) {
            (Signal::Probe, Phase::Answered, Some(path)) => path.link.signal(Kind::ProbeReply),
            (Signal::ProbeReply, Phase::Probing, _) => self.switch(io, slot),
            _ => self.fail(io, slot, CloseReason::Broken(libc::EPROTO), "a message of another phase"),
        }
    }

    /// From now on we send over RDMA.
    fn switch(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        if !self.tell_step(io, slot, LINK_SWITCH) {
            // Its queue is full, and nothing was promised yet.
            return self.give_up(io, slot, "no room for a frame over TCP");
        }
        let Some(entry) = self.at(slot) else { return };
        entry.phase = Phase::Switched;
        io.stats.rdma_switches.add(1);
        entry.patience.restart(io.now);
        entry.deadline = None;
        let round_trip_us = io.now.since(entry.probed) / 1000;
        let (to, conn) = (entry.to, entry.conn);
        // Only the side that made the offer has sent a probe. Time stands still within a batch of events: an answer in
        // the same one has measured nothing.
        let measured = Some(round_trip_us).filter(|us| to.is_some() && *us > 0);
        io.stats.links.switched(conn, measured);
        if let Some(to) = to {
            tracing::info!(%to, round_trip_us, "a connection uses RDMA");
            self.peers.works(to);
            self.set_deadline(slot, io.now, SWITCH_MS);
        }
    }

    /// The peer sends over RDMA: its last frame over TCP was this one.
    fn peer_switched(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        if self.at(slot).is_some_and(|entry| entry.phase == Phase::Answered) {
            self.switch(io, slot);
        }
        if let Some(entry) = self.at(slot) {
            entry.peer_switched = true;
            entry.deadline = None;
            let conn = entry.conn;
            self.beneath.forget_expected(conn);
        }
        self.deliver(io, slot);
        self.mark_dirty(slot);
    }

    /// Acts on phases that have lasted too long.
    pub(crate) fn expire(&mut self, io: &mut TransportIo<'_>) {
        self.next_deadline = None;
        for slot in 0..self.entries.len() as u16 {
            let Some(entry) = self.at(slot) else { continue };
            let Some(due) = entry.deadline else { continue };
            if due > io.now {
                self.next_deadline = Some(self.next_deadline.map_or(due, |at| at.min(due)));
                continue;
            }
            entry.deadline = None;
            match entry.phase {
                Phase::Offered => self.give_up(io, slot, "no answer to the offer"),
                Phase::Probing => self.give_up(io, slot, "no answer to the probe"),
                Phase::Answered => self.abandoned(io, slot),
                Phase::Switched => self.fail(io, slot, CloseReason::TimedOut, "the peer does not switch"),
            }
        }
    }
}
