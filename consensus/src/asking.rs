//! Running: requests, at their origin and at the leader.

use crate::bounds::IMAGE_RESERVE_BYTES;
use crate::codec::{Body, Command, Op, RequestId, Verdict};
use crate::machine::Known;
use crate::node::Ctx;
use crate::planted::Bug;
use crate::requests::Stage;
use crate::running::Running;
use wire::control::{MetaReply, MetaRequest};
use wire::{NodeId, Status};

impl Running {
    pub(crate) fn expire_leases(&mut self, ctx: &mut Ctx<'_>) {
        let Some(serving) = &self.serving else { return };
        for lease in serving.expired(&self.machine, ctx.env.now()) {
            self.propose(RequestId::default(), Op::LeaseEnd { lease });
        }
    }

    /// Puts a command into the log; refusals are left to the origin's retry.
    pub(crate) fn propose(&mut self, id: RequestId, op: Op) {
        let index = self.raw.raft.raft_log.last_index() + 1;
        let command = Command { id, op };
        if self.raw.propose(Vec::new(), command.encode()).is_err() {
            return;
        }
        if self.raw.raft.raft_log.last_index() == index
            && let Some(serving) = &mut self.serving
        {
            serving.proposed(&self.machine, index, command);
        }
    }

    /// Hands waiting requests to the leader, if there is one.
    pub(crate) fn drive_requests(&mut self, ctx: &mut Ctx<'_>) {
        let Some(leader) = self.leader() else { return };
        let here = leader == ctx.config.node;
        if here && self.serving.is_none() {
            return;
        }
        let idle: Vec<u64> =
            ctx.requests.pending.iter().filter(|(_, p)| p.stage == Stage::Idle).map(|(s, _)| *s).collect();
        for seq in idle {
            let id = ctx.requests.id(seq);
            let Some(pending) = ctx.requests.pending.get_mut(&seq) else { continue };
            if matches!(pending.request, MetaRequest::Range { .. }) {
                if ctx.config.planted.has(Bug::ReadWithoutConfirmation) {
                    pending.stage = Stage::ReadAt(0);
                } else if self.reads.add_range(seq) {
                    pending.stage = Stage::Reading;
                }
                continue;
            }
            pending.stage = Stage::Sent(self.ticks);
            pending.maybe_done = true;
            let request = pending.request.clone();
            if here {
                self.on_request(ctx, id, request, leader);
            } else {
                Self::send(ctx, leader, Body::Forward { id, request });
            }
        }
    }

    pub(crate) fn answer(&mut self, ctx: &mut Ctx<'_>, to: NodeId, id: RequestId, reply: MetaReply) {
        if to == ctx.config.node {
            ctx.requests.complete(id.seq, reply);
        } else {
            Self::send(ctx, to, Body::Answer { session: id.session, seq: id.seq, reply });
        }
    }

    /// A request for the leader. Whatever is not answered here is answered when it has been applied, at
    /// its origin, or comes again.
    pub(crate) fn on_request(
        &mut self,
        ctx: &mut Ctx<'_>,
        id: RequestId,
        request: MetaRequest,
        from: NodeId,
    ) {
        if self.serving.is_none() || id.session == 0 {
            return;
        }
        if from != ctx.config.node && !crate::check::is_valid(&request) {
            return self.answer(ctx, from, id, MetaReply::failed(Status::Invalid));
        }
        match self.machine.known(id) {
            Known::Done(outcome) => return self.answer(ctx, from, id, outcome.reply()),
            Known::GivenUp => return,
            Known::New => {}
        }
        let forget = ctx.config.planted.has(Bug::DedupForgotten);
        let Some(serving) = &mut self.serving else { return };
        if serving.is_full() || self.journal.is_crowded() || serving.is_proposed(id) && !forget {
            return;
        }
        let op = match request {
            MetaRequest::Range { .. } => return,
            MetaRequest::Voters => {
                let reply = self.show_members(ctx);
                return self.answer(ctx, from, id, reply);
            }
            MetaRequest::ChangeVoters { .. } | MetaRequest::CancelVoters => {
                match self.decide_members(ctx, &request) {
                    Ok(members) => return self.propose_members(id, members),
                    Err(verdict) => Op::Txn { verdict, writes: Vec::new(), stripped: false },
                }
            }
            MetaRequest::Txn { compares, writes } => {
                let durable_max = self.journal.geometry.image_bytes_max().saturating_sub(IMAGE_RESERVE_BYTES);
                let verdict = serving.decide(&self.machine, &compares, &writes, durable_max);
                let applies = verdict == Verdict::Apply;
                let writes = if applies { writes } else { Vec::new() };
                Op::Txn { verdict, writes, stripped: false }
            }
            MetaRequest::LeaseRevoke { lease } => Op::LeaseEnd { lease },
            MetaRequest::LeaseKeep { lease, ttl_ms } => {
                match serving.keep(&self.machine, lease, ttl_ms, ctx.env.now()) {
                    Ok(ttl_ms) => return self.reads.add_keep(from, id, lease, ttl_ms),
                    Err(op) => op,
                }
            }
        };
        self.propose(id, op);
    }

    pub(crate) fn on_read_state(&mut self, ctx: &mut Ctx<'_>, index: u64, context: &[u8]) {
        let Some(group) = self.reads.confirmed(context) else { return };
        for seq in group.ranges {
            if let Some(pending) = ctx.requests.pending.get_mut(&seq) {
                pending.stage = Stage::ReadAt(index);
            }
        }
        for keep in group.keeps {
            // Leadership held after the renewal had come in, so no later leader counts from an earlier time.
            let holds = self.serving.as_ref().is_some_and(|s| s.holds(&self.machine, keep.lease));
            if holds {
                self.answer(ctx, keep.from, keep.id, MetaReply::Lease { ttl_ms: keep.ttl_ms });
            }
        }
    }

    /// Answers confirmed reads that the applied state has caught up with.
    pub(crate) fn serve_reads(&mut self, ctx: &mut Ctx<'_>) {
        if !self.machine.is_ready() {
            return;
        }
        let due: Vec<u64> = ctx
            .requests
            .pending
            .iter()
            .filter(|(_, p)| matches!(p.stage, Stage::ReadAt(index) if index <= self.machine.index))
            .map(|(seq, _)| *seq)
            .collect();
        for seq in due {
            let Some(pending) = ctx.requests.pending.get(&seq) else { continue };
            if let MetaRequest::Range { prefix, limit } = &pending.request {
                let reply = crate::reads::range(self.machine.kv(), prefix, *limit);
                ctx.requests.complete(seq, reply);
            }
        }
    }
}
