//! How a connection gets from TCP to RDMA, or stays.
//!
//! 1. The side that connected makes a queue pair and sends an `Offer` in a `Link` frame, its first over TCP.
//! 2. The other makes one, connects it to the first's, and answers with its own offer: its last frame over TCP. Or it
//!    declines, and both stay on TCP.
//! 3. The first connects its queue pair and sends a probe over it, which the other answers in the same way. Only a
//!    path that has carried messages both ways is used: a wrong GID, another MTU on the way or a firewall show here.
//! 4. The first commits, with a message over RDMA, and from then on both use RDMA only. Or, without an answer in time,
//!    it gives up its queue pair first and then says over TCP that the connection stays there.
//!
//! Frames that a side wants to send between its offer or answer and the decision wait. Since TCP is in order, whatever
//! was sent over it before the answer has been received before anything comes over RDMA.

use crate::entry::{Path, Phase};
use crate::link::{Kind, Link, Signal};
use crate::offer::Offer;
use crate::queue_pair::QueuePair;
use crate::transport::RdmaTransport;
use crate::{OFFER_BYTES, RdmaError};
use reactor::backend::TransportIo;
use reactor::{CloseReason, ConnId, Event, Frame, IoBuf, Mono};
use wire::{BlockCrcs, FrameKind, Header, Status, block_crc};

/// How long the other side may take to answer an offer, in milliseconds.
const ANSWER_MS: u64 = 500;
/// How long the probe's answer may take, in milliseconds: some retransmissions.
const PROBE_MS: u64 = 300;
/// How long the decision may take after our answer, in milliseconds: more than the other side waits.
const COMMIT_MS: u64 = 2_000;

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

    /// TCP is there: makes the offer.
    pub(crate) fn offer(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        let Some(conn) = self.at(slot).map(|entry| entry.conn) else { return };
        let offer = match self.make_path(io, slot) {
            Ok(offer) => offer,
            Err(error) => {
                tracing::warn!(%error, "RDMA is not offered");
                return self.stay(io, slot);
            }
        };
        if !self.tell(io, conn, Header::new(FrameKind::Link, 0), Some(offer.encode())) {
            return self.stay(io, slot);
        }
        if let Some(entry) = self.at(slot) {
            entry.phase = Phase::Offered;
        }
        self.set_deadline(slot, io.now, ANSWER_MS);
    }

    /// A frame has come over TCP.
    pub(crate) fn frame_beneath(&mut self, io: &mut TransportIo<'_>, conn: ConnId, frame: Frame) {
        let slot = self.slots.get(&conn).copied();
        let phase = slot.and_then(|slot| self.at(slot)).map(|entry| entry.phase);
        match (frame.header.kind, slot, phase) {
            (FrameKind::Link, Some(slot), Some(Phase::Answered)) if frame.header.blocks == 1 => {
                self.stay(io, slot);
            }
            (FrameKind::Link, None, None) if frame.header.blocks == 0 => self.answer(io, conn, &frame),
            (FrameKind::LinkReply, Some(slot), Some(Phase::Offered)) => self.answered(io, slot, &frame),
            // Behind our giving up.
            (FrameKind::LinkReply, None, None) => {}
            // What the other side sent before it saw our offer.
            (kind, _, None | Some(Phase::Offered | Phase::Connecting)) if kind != FrameKind::Link => {
                io.events.push_back(Event::Frame { conn, frame });
            }
            (kind, slot, _) => {
                tracing::debug!(?kind, ?phase, "not expected over TCP now");
                match slot {
                    Some(slot) => self.fail(io, slot, CloseReason::Broken(libc::EPROTO), "a frame over TCP"),
                    None => self.beneath(io, |beneath, io| beneath.close(io, conn, false)),
                }
            }
        }
    }

    /// The other side offers RDMA.
    fn answer(&mut self, io: &mut TransportIo<'_>, conn: ConnId, frame: &Frame) {
        let made = match read_offer(frame) {
            Ok(peer) => self.connect_to(io, conn, &peer),
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
            self.set_deadline(slot, io.now, COMMIT_MS);
        } else {
            self.stay(io, slot);
        }
    }

    /// Our side of what the peer offers; `None` when that is not possible.
    fn connect_to(&mut self, io: &mut TransportIo<'_>, conn: ConnId, peer: &Offer) -> Option<(u16, Offer)> {
        self.shared(io)?;
        let slot = self.insert(conn, None, Phase::Answered, io.now)?;
        let made = self.make_path(io, slot).and_then(|offer| {
            self.connect_pair(slot, peer)?;
            Ok(offer)
        });
        match made {
            Ok(offer) => Some((slot, offer)),
            Err(error) => {
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
        if frame.header.status != Status::Ok {
            if let Some(to) = self.at(slot).and_then(|entry| entry.to) {
                self.peers.declined(to, io.now);
            }
            return self.stay(io, slot);
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
    fn give_up(&mut self, io: &mut TransportIo<'_>, slot: u16, why: &str) {
        let Some(entry) = self.at(slot) else { return };
        let (conn, to) = (entry.conn, entry.to);
        // Nothing can be sent over it any more when the other side learns of it.
        entry.path = None;
        let pause_ms = to.map(|to| self.peers.failed(to, io.now));
        let to = to.map(|to| to.to_string());
        tracing::warn!(to, why, pause_ms, "RDMA does not work with this peer; the connection stays on TCP");
        let given_up = Header { blocks: 1, ..Header::new(FrameKind::Link, 0) };
        if self.tell(io, conn, given_up, None) {
            self.stay(io, slot);
        } else {
            self.fail(io, slot, CloseReason::Broken(libc::ENOBUFS), "no room for a frame over TCP");
        }
    }

    /// The connection stays on TCP: what has waited is sent there.
    fn stay(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        let Some(entry) = self.remove(slot) else { return };
        let conn = entry.conn;
        if entry.to.is_some() {
            io.events.push_back(Event::Connected { conn });
        }
        for frame in entry.held {
            // As many as its queue takes, which is empty but for the negotiation.
            if self.beneath(io, |beneath, io| beneath.send(io, conn, frame)).is_err() {
                self.beneath(io, |beneath, io| beneath.close(io, conn, false));
                return;
            }
        }
        if entry.draining {
            self.beneath(io, |beneath, io| beneath.close(io, conn, true));
        }
    }

    /// A message of the negotiation has come over RDMA.
    pub(crate) fn signal(&mut self, io: &mut TransportIo<'_>, slot: u16, signal: Signal) {
        let Some(entry) = self.at(slot) else { return };
        let phase = entry.phase;
        let Some(path) = &mut entry.path else { return };
        match (signal, phase) {
            (Signal::Probe, Phase::Answered) => path.link.signal(Kind::ProbeReply),
            (Signal::ProbeReply, Phase::Probing) => {
                path.link.signal(Kind::Commit);
                let conn = entry.conn;
                io.events.push_back(Event::Connected { conn });
                self.open(io, slot);
            }
            (Signal::Commit, Phase::Answered) => self.open(io, slot),
            _ => self.fail(io, slot, CloseReason::Broken(libc::EPROTO), "a message of another phase"),
        }
    }

    /// RDMA it is.
    fn open(&mut self, io: &mut TransportIo<'_>, slot: u16) {
        let Some(entry) = self.at(slot) else { return };
        entry.phase = Phase::Open;
        entry.deadline = None;
        entry.progress.1 = io.now;
        let held = std::mem::take(&mut entry.held);
        if let Some(path) = &mut entry.path {
            for frame in held {
                // The link's queue is as long as the one that held them.
                let _ = path.link.push(frame);
            }
        }
        let round_trip_us = io.now.since(entry.probed) / 1000;
        let to = entry.to;
        if let Some(to) = to {
            tracing::info!(%to, round_trip_us, "a connection uses RDMA");
            self.peers.works(to);
        }
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
                Phase::Answered => self.fail(io, slot, CloseReason::TimedOut, "no decision after our answer"),
                Phase::Connecting | Phase::Open => {}
            }
        }
    }
}
