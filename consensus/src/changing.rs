//! Running: changes of the membership. The leader decides whether a change may begin and when its next step is due;
//! everybody applies the steps; who has been removed is told so and keeps quiet.

use crate::bounds::{ADDRESS_BYTES_MAX, CAUGHT_UP_ENTRIES, TRANSFER_RETRY_TICKS, VOTERS_MAX};
use crate::codec::{Body, Command, Op, RequestId, Verdict};
use crate::error::MetaError;
use crate::machine::refused;
use crate::members::{Members, VOTERS_KEY, shape, way};
use crate::node::{Ctx, MetaConfig};
use crate::planted::Bug;
use crate::running::Running;
use raft::eraftpb::{EntryType, MessageType};
use wire::control::{MetaReply, MetaRequest, VoterAddress, VoterInfo, VoterRole, Write};
use wire::{NodeId, Status};

fn write(members: &Members) -> Vec<Write> {
    vec![Write::Put { key: VOTERS_KEY.to_owned(), value: members.json(), lease: None }]
}

fn entry_of(members: Members) -> Op {
    Op::Members { writes: write(&members), members: Box::new(members) }
}

impl Running {
    /// Whether this node votes, as far as it knows.
    pub fn is_voter(&self, me: NodeId) -> bool {
        self.machine.members.is_voter(me) && !self.is_dismissed()
    }

    /// Whether somebody who has applied more than this node has said that it was removed.
    pub(crate) fn is_dismissed(&self) -> bool {
        self.machine.index < self.dismissed
    }

    /// Puts a step of a change into the log. The crate `raft` must know that it is one: no candidate may have such
    /// an entry committed and not applied.
    pub(crate) fn propose_members(&mut self, id: RequestId, members: Members) {
        let index = self.raw.raft.raft_log.last_index() + 1;
        let leaves = self.machine.members.is_joint();
        let command = Command { id, op: entry_of(members) };
        if self.raw.raft.has_pending_conf()
            || self.raw.propose_conf_change(command.encode(), shape(leaves)).is_err()
        {
            return;
        }
        let unstable = self.raw.raft.raft_log.unstable_entries();
        let entered =
            unstable.last().is_some_and(|entry| entry.get_entry_type() == EntryType::EntryConfChangeV2);
        if entered
            && self.raw.raft.raft_log.last_index() == index
            && let Some(serving) = &mut self.serving
        {
            serving.proposed(&self.machine, index, command);
        }
    }

    /// Answers a request about the voters at the leader; the first result is what enters the log.
    pub(crate) fn decide_members(&self, ctx: &Ctx<'_>, request: &MetaRequest) -> Result<Members, Verdict> {
        let under_way = self.serving.as_ref().is_none_or(|serving| serving.changes_members())
            || self.raw.raft.has_pending_conf();
        if under_way {
            return Err(refused(Status::ChangeUnderWay));
        }
        let members = &self.machine.members;
        let next = match request {
            MetaRequest::ChangeVoters { add, remove } => members.begun(add, remove, &ctx.config.addresses),
            _ => members.cancelled(),
        };
        let next = next.map_err(refused)?;
        let stay: Vec<NodeId> = next.target.iter().copied().filter(|n| members.voters.contains(n)).collect();
        let heard = stay.iter().filter(|node| self.is_heard(ctx.config.node, **node)).count();
        // The new ones count as good: they vote only when they have caught up.
        if 2 * (heard + next.learners.len()) <= next.target.len() && next.is_changing() {
            return Err(refused(Status::QuorumAtRisk));
        }
        Ok(next)
    }

    fn is_heard(&self, me: NodeId, node: NodeId) -> bool {
        node == me || self.raw.raft.prs().get(node.0).is_some_and(|progress| progress.recent_active)
    }

    /// Whether a member has what is committed, but for what is on its way.
    fn has_caught_up(&self, ctx: &Ctx<'_>, node: NodeId) -> bool {
        if ctx.config.planted.has(Bug::LearnerTakenForCaughtUp) {
            return true;
        }
        let log = &self.raw.raft.raft_log;
        self.raw.raft.prs().get(node.0).is_some_and(|progress| {
            progress.matched > 0 && progress.matched + CAUGHT_UP_ENTRIES >= log.committed
        }) && self.is_heard(ctx.config.node, node)
    }

    /// The next step of a change, when it is due. Every leader does this, so a change survives each of them.
    pub(crate) fn drive_members(&mut self, ctx: &mut Ctx<'_>) {
        let members = &self.machine.members;
        let busy = self.serving.as_ref().is_none_or(|serving| serving.changes_members() || serving.is_full());
        if busy || self.raw.raft.lead_transferee.is_some() {
            return;
        }
        if !members.is_changing() {
            return self.confirm_members();
        }
        if members.is_joint() {
            let next = members.left();
            return self.propose_members(RequestId::default(), next);
        }
        let good = members.target.iter().filter(|node| self.has_caught_up(ctx, **node)).count();
        let majority = 2 * good > members.target.len();
        if !majority || !members.learners.iter().all(|node| self.has_caught_up(ctx, *node)) {
            return;
        }
        // A leader that will not vote any more lets somebody lead who will.
        let me = ctx.config.node;
        if !members.target.contains(&me)
            && let Some(best) = self.best_voter(|node| node != me && members.target.contains(&node))
        {
            if self.ticks.is_multiple_of(TRANSFER_RETRY_TICKS) {
                self.raw.transfer_leader(best.0);
            }
            return;
        }
        let next = members.entered();
        let next = if ctx.config.planted.has(Bug::MembersNotJoint) { next.left() } else { next };
        self.propose_members(RequestId::default(), next);
    }

    /// Puts an entry behind the last step of a change: it takes the news that the change is complete to every disk.
    /// Until then a voter that restarts would ask the old voters for their votes.
    fn confirm_members(&mut self) {
        if self.confirmed_by.is_none() && self.machine.members.was_changed() {
            let index = self.raw.raft.raft_log.last_index() + 1;
            let proposed = self.raw.propose(Vec::new(), Vec::new()).is_ok();
            self.confirmed_by = proposed.then_some(index);
        }
    }

    /// The most advanced voter of these that can be heard.
    pub(crate) fn best_voter(&self, fits: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        let voters = self.machine.members.voters.iter().filter(|node| fits(**node));
        let heard = voters.filter_map(|node| {
            let progress = self.raw.raft.prs().get(node.0).filter(|progress| progress.recent_active)?;
            Some((progress.matched, *node))
        });
        heard.max().map(|(_, node)| node)
    }

    /// A step has been applied: the crate `raft` takes it into use.
    pub(crate) fn take_members(&mut self, ctx: &mut Ctx<'_>, before: &Members) -> Result<(), MetaError> {
        let index = self.machine.index;
        let members = self.machine.members.clone();
        let from = self.raw.raft.prs().conf().to_conf_state();
        for change in way(&from, &members) {
            self.raw.apply_conf_change(&change).map_err(|_| MetaError::BadEntry { index })?;
        }
        if self.is_leader() {
            for gone in before.all().into_iter().filter(|node| !members.contains(*node)) {
                if gone != ctx.config.node {
                    let voters = self.voter_addresses(ctx.config);
                    Self::send(ctx, gone, Body::NotMember { index, voters });
                }
            }
            if !members.is_voter(ctx.config.node) {
                // A leader of a group that it is no member of would count itself.
                let term = self.raw.raft.term;
                self.raw.raft.become_follower(term, 0);
            }
        }
        self.raw.mut_store().set_members(&members);
        self.confirmed_by = None;
        Ok(())
    }

    /// A candidate that was removed and does not know it is told so, also by those who were removed later: they may be
    /// the only ones it knows. It is heard all the same: it may be this voter that lags, and then its vote may be
    /// needed.
    pub(crate) fn answer_stranger(&mut self, ctx: &mut Ctx<'_>, from: NodeId, kind: MessageType) {
        let asks = matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        if asks && self.machine.index > 0 && !self.machine.members.contains(from) {
            let voters = self.voter_addresses(ctx.config);
            Self::send(ctx, from, Body::NotMember { index: self.machine.index, voters });
        }
    }

    /// Somebody says that this node was no member any more at an index. It counts when it is news.
    pub(crate) fn on_not_member(&mut self, index: u64, voters: Vec<VoterAddress>) {
        let sound = voters.len() <= VOTERS_MAX
            && voters.iter().all(|known| known.node != NodeId(0) && known.address.len() <= ADDRESS_BYTES_MAX);
        if sound && !self.is_leader() && index > self.machine.index && index >= self.dismissed {
            self.dismissed = index;
            self.successors = voters;
        }
    }

    /// Who votes, as far as this node knows, and the index of the log at which that was so.
    pub(crate) fn latest_voters(&self, config: &MetaConfig) -> (u64, Vec<VoterAddress>) {
        if self.is_dismissed() {
            return (self.dismissed, self.successors.clone());
        }
        (self.machine.index, self.voter_addresses(config))
    }

    fn voter_addresses(&self, config: &MetaConfig) -> Vec<VoterAddress> {
        let one = |node: &NodeId| VoterAddress { node: *node, address: self.address_or_empty(config, *node) };
        self.machine.members.voters.iter().map(one).collect()
    }

    fn address_or_empty(&self, config: &MetaConfig, node: NodeId) -> String {
        let configured = || config.addresses.iter().find(|known| known.node == node);
        let known = self.machine.members.address(node);
        known.or_else(|| configured().map(|known| known.address.as_str())).unwrap_or_default().to_owned()
    }

    /// The members as this leader sees them.
    pub(crate) fn show_members(&self, ctx: &Ctx<'_>) -> MetaReply {
        let members = &self.machine.members;
        let me = ctx.config.node;
        let (last, prs) = (self.raw.raft.raft_log.last_index(), self.raw.raft.prs());
        let one = |node: NodeId| VoterInfo {
            node,
            role: match node {
                _ if node == me => VoterRole::Leader,
                _ if members.learners.contains(&node) => VoterRole::Learner,
                _ if members.voters.contains(&node) => VoterRole::Voter,
                _ => VoterRole::Leaving,
            },
            address: self.address_or_empty(ctx.config, node),
            behind: prs.get(node.0).map_or(last, |progress| last.saturating_sub(progress.matched)),
            heard: self.is_heard(me, node),
        };
        let confirmed = if members.was_changed() { self.confirmed_by } else { Some(0) };
        let confirmed = confirmed.unwrap_or(u64::MAX);
        let knows = |node: &&NodeId| prs.get(node.0).is_some_and(|progress| progress.matched >= confirmed);
        let told = members.voters.iter().filter(knows).count();
        let all_told = members.voters.iter().all(|node| !self.is_heard(me, *node) || knows(&node));
        MetaReply::Voters {
            members: members.all().into_iter().map(one).collect(),
            target: members.target.clone(),
            settled: !members.is_changing() && all_told && 2 * told > members.voters.len(),
        }
    }
}
