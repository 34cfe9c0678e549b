//! Running: images of the state between voters. A voter that lags too far gets the whole state as Raft's
//! snapshot; one that has lost its ephemeral keys by a restart gets those.

use crate::bounds::EPHEMERAL_WAIT_TICKS;
use crate::codec::{Body, Op, RequestId};
use crate::image::{self, Image, Parts};
use crate::machine::{Ephemeral, Known};
use crate::node::Ctx;
use crate::running::{Running, Search};
use crate::transfer::Received;
use raft::eraftpb::{Message, MessageType};
use wire::NodeId;

impl Running {
    /// Asks for the ephemeral part while it is lost here.
    pub(crate) fn seek_ephemeral(&mut self, ctx: &mut Ctx<'_>) {
        if self.machine.ephemeral == Ephemeral::Known {
            self.search = None;
            return;
        }
        if !self.is_leader() {
            self.search = None;
            let leader = self.leader().filter(|_| self.ticks.is_multiple_of(2));
            if let Some(leader) = leader.filter(|_| self.transfers.ephemeral_arriving().is_none()) {
                Self::send(ctx, leader, Body::WantEphemeral);
            }
            return;
        }
        if !self.raw.raft.apply_to_current_term() {
            return;
        }
        let ticks = self.ticks;
        let new = self.search.is_none();
        let search = self.search.get_or_insert_with(|| Search { since: ticks, ..Search::default() });
        let voters = self.machine.members().all_voters().len();
        let hopeless = 2 * (search.lost.len() + 1) > voters;
        if hopeless || ticks - search.since >= EPHEMERAL_WAIT_TICKS {
            if !search.reset_proposed {
                search.reset_proposed = true;
                self.propose(RequestId::default(), Op::EphemeralReset);
            }
        } else if new || (ticks - search.since).is_multiple_of(2) {
            for to in self.machine.members().all().into_iter().filter(|to| *to != ctx.config.node) {
                Self::send(ctx, to, Body::WantEphemeral);
            }
        }
    }

    pub(crate) fn offer_ephemeral(&mut self, ctx: &mut Ctx<'_>, to: NodeId) {
        if self.machine.ephemeral == Ephemeral::Lost {
            Self::send(ctx, to, Body::EphemeralLost);
        } else if !self.transfers.is_sending(to, false) {
            let bytes = image::encode(&self.machine, Parts::Ephemeral);
            let (term, index) = (self.raw.raft.term, self.machine.index);
            let chunk = self.transfers.start(to, false, term, index, bytes, self.ticks);
            Self::send(ctx, to, Body::Chunk(chunk));
        }
    }

    /// Starts to send the whole state as a snapshot.
    pub(crate) fn send_snapshot(&mut self, ctx: &mut Ctx<'_>, to: NodeId) {
        if self.transfers.is_sending(to, true) {
            return;
        }
        let bytes = image::encode(&self.machine, Parts::Whole);
        let (term, index) = (self.raw.raft.term, self.machine.index);
        let chunk = self.transfers.start(to, true, term, index, bytes, self.ticks);
        Self::send(ctx, to, Body::Chunk(chunk));
    }

    /// An image has arrived complete.
    pub(crate) fn on_image(&mut self, ctx: &mut Ctx<'_>, from: NodeId, received: Received) {
        let Ok(image) = image::decode(&received.bytes) else {
            ctx.counters.refused += 1;
            return;
        };
        if !received.whole {
            self.ephemeral_image = Some(image);
            self.take_ephemeral(ctx);
            return;
        }
        if !image.durable || image.index == 0 || received.term < self.raw.raft.term || self.is_leader() {
            return;
        }
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgSnapshot);
        message.from = from.0;
        message.to = ctx.config.node.0;
        message.term = received.term;
        // An older version's leader leaves them out: then they are the founders, whom only a founder knows.
        let members = image.members.as_ref().unwrap_or(self.machine.members());
        if members.voters.is_empty() {
            ctx.counters.refused += 1;
            return;
        }
        let conf_state = members.conf_state();
        let meta = message.mut_snapshot().mut_metadata();
        meta.index = image.index;
        meta.term = image.term;
        meta.set_conf_state(conf_state);
        if self.installing.is_none() {
            self.installing = Some(image);
            drop(self.raw.step(message));
            if self.raw.snap().is_none() {
                self.installing = None; // Raft had all of it
            }
        }
    }

    /// Takes over an ephemeral image when it is of exactly the applied index; keeps a later one.
    pub(crate) fn take_ephemeral(&mut self, ctx: &mut Ctx<'_>) {
        let Some(image) = self.ephemeral_image.take() else { return };
        if image.index > self.machine.index && self.machine.ephemeral == Ephemeral::Lost {
            self.ephemeral_image = Some(image);
        } else if image.index == self.machine.index
            && let Some(part) = image.ephemeral
        {
            let changes = self.machine.install_ephemeral(part, image.revision);
            ctx.tell(changes);
        }
    }

    pub(crate) fn install(&mut self, ctx: &mut Ctx<'_>, image: Image) {
        let (index, term) = (image.index, image.term);
        self.to_apply.retain(|entry| entry.index > index);
        let changes = self.machine.install(image);
        ctx.tell(changes);
        self.raw.mut_store().applied = (index, term);
        self.raw.advance_apply_to(index);
        // Requests whose entries lie inside the snapshot were answered there.
        let done: Vec<_> = ctx
            .requests
            .pending
            .keys()
            .filter_map(|seq| match self.machine.known(ctx.requests.id(*seq)) {
                Known::Done(outcome) => Some((*seq, outcome)),
                _ => None,
            })
            .collect();
        for (seq, outcome) in done {
            ctx.requests.complete(seq, outcome.reply());
        }
    }
}
