//! From sent to finished: answers, and connections that end without one.

use crate::error::IoError;
use crate::io::Io;
use crate::map::ClusterMap;
use crate::options::{FAULT_TRIES_MAX, OnNoSpace};
use crate::part::{IoKind, PartState};
use crate::peer::is_sent_as;
use crate::send::backoff_ms;
use reactor::{CloseReason, ConnId, Env, Frame};
use wire::{BLOCK_BYTES, Status};

/// Pause before trying again where there was no space: an operator or a discard has to make some.
const NO_SPACE_PAUSE_MS: u64 = 100;

/// What becomes of a part after an answer.
enum Verdict {
    Done,
    Failed(IoError),
    /// Not now, or not there.
    Again,
    /// Damaged or device error: again a few times, then this error.
    Fault(IoError),
    /// Full, and the caller wants to wait.
    NoSpace,
}

/// Whether an answer says that the primary has not begun the change and will not. Everything else may
/// belong to a change that was made, or is still being made.
fn is_surely_not_done(status: Status) -> bool {
    matches!(
        status,
        Status::StaleEpoch
            | Status::NotPrimary
            | Status::NotActive
            | Status::Busy
            | Status::Corrupt
            | Status::ShuttingDown
    )
}

impl Io {
    /// Takes an answer. Answers that nobody waits for (any more) are ignored.
    pub(crate) fn reply(&mut self, env: &mut dyn Env, map: &ClusterMap, conn: ConnId, frame: &Frame) {
        let index = frame.header.request as u32;
        let Some(part) = self.parts.get(index) else { return };
        if !is_sent_as(part, frame.header.request) {
            return;
        }
        let peer_index = part.peer;
        let Some(peer) = self.peers.get_mut(peer_index) else { return };
        if peer.link.conn() != Some(conn) {
            return;
        }
        peer.heard(env.now());
        peer.failures = 0;
        peer.unlink_sent(&mut self.parts, index);
        self.in_flight -= 1;
        if !peer.waiting.is_empty() {
            self.reconsider_waiting(peer_index);
        }
        if !is_surely_not_done(frame.header.status)
            && let Some(part) = self.parts.get_mut(index)
        {
            part.maybe_done = true;
        }
        match self.judge(index, frame) {
            Verdict::Done => self.finish(index, Ok(())),
            Verdict::Failed(error) => self.finish(index, Err(error)),
            Verdict::Again => self.again(env, map, index),
            Verdict::NoSpace => self.again_after(env, index, NO_SPACE_PAUSE_MS),
            Verdict::Fault(error) => {
                let faults = self.parts.get_mut(index).map_or(u8::MAX, |part| {
                    part.faults = part.faults.saturating_add(1);
                    part.faults
                });
                if faults >= FAULT_TRIES_MAX {
                    self.finish(index, Err(error));
                } else {
                    self.again_after(env, index, backoff_ms(u32::from(faults)));
                }
            }
        }
    }

    fn judge(&mut self, index: u32, frame: &Frame) -> Verdict {
        let Some(part) = self.parts.get(index) else { return Verdict::Done };
        let header = &frame.header;
        let ours = part.kind.frames().is_some_and(|(_, reply)| reply == header.kind)
            && header.object == part.object
            && header.block == u32::from(part.block);
        if !ours {
            self.counters.corrupt += 1;
            return Verdict::Fault(IoError::Corrupt);
        }
        match header.status {
            Status::Ok if part.kind == IoKind::Read => self.deliver(index, frame),
            Status::Ok => Verdict::Done,
            Status::NoSpace => match self.options.on_no_space {
                OnNoSpace::Fail => Verdict::Failed(IoError::NoSpace),
                OnNoSpace::Wait => Verdict::NoSpace,
            },
            Status::Io => Verdict::Fault(IoError::Device),
            Status::Corrupt => {
                self.counters.corrupt += 1;
                Verdict::Fault(IoError::Corrupt)
            }
            Status::Invalid => Verdict::Failed(IoError::Invalid),
            Status::NotFound => Verdict::Failed(IoError::NotFound),
            Status::OutOfSync => Verdict::Again,
            status if status.is_retryable() => Verdict::Again,
            status => Verdict::Failed(IoError::Refused(status)),
        }
    }

    /// Verifies a read's payload and brings it to the caller's buffer, unless the transport already has.
    fn deliver(&mut self, index: u32, frame: &Frame) -> Verdict {
        let Some(part) = self.parts.get(index) else { return Verdict::Done };
        let Some(op) = self.ops.get_mut(part.op) else { return Verdict::Done };
        let payload = frame.payload.as_ref().map_or(&[][..], |payload| payload.as_slice());
        let good = payload.len() == part.len_bytes() && frame.crcs.matches(payload);
        #[cfg(feature = "planted")]
        let good = good
            || (self.options.bug == Some(crate::planted::Bug::ReadCrcIgnored)
                && payload.len() == part.len_bytes());
        if !good {
            self.counters.corrupt += 1;
            return Verdict::Fault(IoError::Corrupt);
        }
        let at = (part.image_offset() - op.offset.min(part.image_offset())) as usize;
        debug_assert!(at.is_multiple_of(BLOCK_BYTES));
        let Some(buf) = op.buf.as_mut() else { return Verdict::Done };
        if buf.is_foreign() {
            let mut target = buf.slice(at, payload.len());
            let in_place = std::ptr::eq(target.as_ptr(), payload.as_ptr());
            if !in_place && let Some(target) = target.as_mut_slice() {
                target.copy_from_slice(payload);
            }
        } else if let Some(target) = buf.as_mut_slice().and_then(|all| all.get_mut(at..at + payload.len())) {
            target.copy_from_slice(payload);
        }
        Verdict::Done
    }

    /// Tries again: at once when the map already knows better than the last try did, else after a pause.
    fn again(&mut self, env: &mut dyn Env, map: &ClusterMap, index: u32) {
        let Some(part) = self.parts.get_mut(index) else { return };
        let entry = map.pg(part.pg);
        if (entry.epoch, entry.peer) != (part.epoch, part.peer) {
            self.again_after(env, index, 0);
        } else {
            let pause = backoff_ms(part.retries);
            part.retries = part.retries.saturating_add(1);
            self.again_after(env, index, pause);
        }
    }

    fn again_after(&mut self, env: &mut dyn Env, index: u32, pause_ms: u64) {
        self.counters.retried += 1;
        let Some(op) = self.parts.get(index).and_then(|part| self.ops.get(part.op)) else { return };
        if op.doomed {
            let error = op.error.unwrap_or(IoError::TimedOut);
            return self.finish(index, Err(error));
        }
        if pause_ms == 0 {
            self.make_ready(index);
        } else {
            self.park(index, env.now().plus_ms(pause_ms));
        }
    }

    /// A connection ended: what was sent on it and not answered is sent again, on the next one.
    #[cfg_attr(
        not(feature = "planted"),
        allow(unused_variables, reason = "whatever ended it, the fate is unknown")
    )]
    pub(crate) fn peer_closed(&mut self, env: &mut dyn Env, conn: ConnId, reason: CloseReason) -> bool {
        let Some((peer_index, peer)) = self.peers.by_conn(conn) else { return false };
        peer.closed(env.now());
        self.counters.disconnects += 1;
        while let Some(peer) = self.peers.get_mut(peer_index)
            && let Some(index) = peer.oldest_sent()
        {
            peer.unlink_sent(&mut self.parts, index);
            self.in_flight -= 1;
            #[cfg(feature = "planted")]
            if self.options.bug == Some(crate::planted::Bug::WriteNotRetriedReportedOk)
                && self.parts.get(index).is_some_and(|part| part.kind == IoKind::Write)
            {
                self.finish(index, Ok(()));
                continue;
            }
            if let Some(part) = self.parts.get_mut(index) {
                part.state = PartState::Ready;
                part.maybe_done = true;
                #[cfg(feature = "planted")]
                if self.options.bug == Some(crate::planted::Bug::FlushedTakenForFailed)
                    && reason == crate::planted::FLUSHED
                {
                    self.last_origin = self.last_origin.wrapping_add(1).max(1);
                    (part.origin, part.maybe_done) = (self.last_origin, false);
                }
            }
            self.again_after(env, index, 0);
        }
        self.reconsider_waiting(peer_index);
        true
    }
}
