//! Requests submitted at this node, until they are answered.

use crate::bounds::{REQUEST_DEADLINE_MS, REQUESTS_MAX};
use crate::codec::RequestId;
use reactor::Mono;
use std::collections::BTreeMap;
use wire::Status;
use wire::control::{MetaReply, MetaRequest};

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// To be handed to a leader at the next occasion.
    Idle,
    /// Handed to a leader at this tick.
    Sent(u64),
    /// A read waiting for a leader's confirmation.
    Reading,
    /// A confirmed read, to be served when this index has been applied.
    ReadAt(u64),
}

/// A request in progress.
#[derive(Debug)]
pub struct Pending {
    /// The caller's.
    pub ticket: u64,
    /// The request.
    pub request: MetaRequest,
    /// When it fails.
    pub deadline: Mono,
    /// Some leader may have acted on it.
    pub maybe_done: bool,
    /// How far it is.
    pub stage: Stage,
}

/// All of them.
#[derive(Debug)]
pub struct Requests {
    /// Identifies this run of this node.
    pub session: u64,
    next_seq: u64,
    /// By sequence number.
    pub pending: BTreeMap<u64, Pending>,
    answers: Vec<(u64, MetaReply)>,
}

impl Requests {
    /// Of a new session.
    pub fn new(session: u64) -> Self {
        Self { session, next_seq: 1, pending: BTreeMap::new(), answers: Vec::new() }
    }

    /// Takes a request in, or answers it with `Busy`.
    pub fn submit(&mut self, now: Mono, ticket: u64, request: MetaRequest) {
        if self.pending.len() >= REQUESTS_MAX {
            self.answers.push((ticket, MetaReply::failed(Status::Busy)));
            return;
        }
        let deadline = now.plus_ms(REQUEST_DEADLINE_MS);
        let pending = Pending { ticket, request, deadline, maybe_done: false, stage: Stage::Idle };
        self.pending.insert(self.next_seq, pending);
        self.next_seq += 1;
    }

    /// Answers without taking in.
    pub fn refuse(&mut self, ticket: u64, status: Status) {
        self.answers.push((ticket, MetaReply::failed(status)));
    }

    /// The identity of a request in progress.
    pub fn id(&self, seq: u64) -> RequestId {
        let floor = self.pending.keys().next().copied().unwrap_or(self.next_seq);
        RequestId { session: self.session, seq, floor: floor.min(seq) }
    }

    /// Answers a request; later answers to the same are ignored.
    pub fn complete(&mut self, seq: u64, reply: MetaReply) {
        if let Some(pending) = self.pending.remove(&seq) {
            self.answers.push((pending.ticket, reply));
        }
    }

    /// Fails what is past its deadline: `Unknown` when a leader may have acted on it.
    pub fn expire(&mut self, now: Mono) {
        let late: Vec<u64> =
            self.pending.iter().filter(|(_, p)| p.deadline <= now).map(|(seq, _)| *seq).collect();
        for seq in late {
            self.fail(seq);
        }
    }

    fn fail(&mut self, seq: u64) {
        let maybe = self.pending.get(&seq).is_some_and(|pending| pending.maybe_done);
        self.complete(seq, MetaReply::failed(if maybe { Status::Unknown } else { Status::NotActive }));
    }

    /// Fails everything.
    pub fn fail_all(&mut self) {
        let all: Vec<u64> = self.pending.keys().copied().collect();
        all.into_iter().for_each(|seq| self.fail(seq));
    }

    /// The leader has changed: everything that waits for the old one is to be sent again.
    pub fn restart(&mut self) {
        for pending in self.pending.values_mut() {
            if !matches!(pending.stage, Stage::ReadAt(_)) {
                pending.stage = Stage::Idle;
            }
        }
    }

    /// Answers so far, in order.
    pub fn take_answers(&mut self) -> Vec<(u64, MetaReply)> {
        std::mem::take(&mut self.answers)
    }
}
