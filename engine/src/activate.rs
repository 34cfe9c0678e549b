//! How a primary gets from a record to serving: settled, activated, compared, active.

use crate::core::DataCore;
use crate::op::{HOLD, OpKind, Stage};
use crate::peer::{PeerState, request};
use crate::pg::{Link, Listing, Phase};
use crate::planted::Bug;
use crate::slab::Key;
use reactor::{Env, Frame};
use wire::{FrameKind, Header, Status};

/// Pause before a member that would not activate is asked again, in milliseconds.
const ACTIVATE_RETRY_MS: u64 = 20;

impl DataCore {
    /// Moves a primary forward as far as it can go now.
    pub(crate) fn advance(&mut self, env: &mut dyn Env, key: Key) {
        loop {
            let Some(pg) = self.pgs.get_mut(key) else { return };
            let Some(primary) = pg.primary.as_deref_mut() else { return };
            match primary.phase {
                Phase::Settling => {
                    let settled = pg.locals.iter().all(|l| l.slice != primary.slice || l.inflight == 0);
                    let (at, id) = (primary.at, pg.id);
                    // What the own slice holds of the PG has to be known, for comparing.
                    if !settled || self.group(at, id).is_none() {
                        return;
                    }
                    if let Some(primary) = self.primary_mut(key) {
                        primary.phase = Phase::Activating;
                    }
                    self.prune_origins(key, at);
                }
                Phase::Activating => {
                    if primary.members.iter().any(|member| member.link != Link::Up) {
                        return self.activate_members(env, key);
                    }
                    primary.phase = Phase::Comparing;
                    primary.hints = None;
                }
                Phase::Scanning { .. } => return,
                Phase::Comparing => {
                    if primary.members.iter().all(|member| member.listing == Listing::Done) {
                        return self.become_active(env, key);
                    }
                    return self.compare_members(env, key);
                }
                Phase::Active => return,
            }
        }
    }

    fn activate_members(&mut self, env: &mut dyn Env, key: Key) {
        let count = self.primary(key).map_or(0, |p| p.members.len());
        for index in 0..count {
            self.send_activate(env, key, index);
        }
    }

    /// Asks a member to promise the epoch, unless that is under way or done.
    pub(crate) fn send_activate(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let wants_origins = self.wants_origins(key);
        let Some(pg) = self.pgs.get_mut(key) else { return };
        let id = pg.id;
        let Some(primary) = pg.primary.as_deref_mut() else { return };
        if primary.phase == Phase::Settling {
            return;
        }
        let Some(member) = primary.members.get_mut(index) else { return };
        let up = matches!(self.peers.get(member.peer).map(|peer| peer.state), Some(PeerState::Up(_)));
        if member.link != Link::Down || !up {
            return;
        }
        member.link = Link::Activating;
        let mut header = Header::new(FrameKind::Activate, key.tagged(request::ACTIVATE));
        header.pg = id;
        header.object.pool = id.pool;
        header.epoch = primary.epoch;
        header.slice = member.slice;
        header.primary = primary.slice;
        header.blocks = u16::from(wants_origins);
        let peer = member.peer;
        self.send_peer_header(env, peer, header);
    }

    pub(crate) fn activate_reply(&mut self, env: &mut dyn Env, key: Key, frame: &Frame) {
        let header = &frame.header;
        let Some(primary) = self.primary_mut(key) else { return };
        let (epoch, slice) = (primary.epoch, header.slice);
        let Some(index) = primary.member_index(slice) else { return };
        let Some(member) = primary.members.get_mut(index) else { return };
        if header.status == Status::StaleEpoch {
            if header.epoch > epoch {
                self.supersede(key, header.epoch);
            }
            return;
        }
        if header.epoch != epoch || member.link != Link::Activating {
            return;
        }
        if header.status != Status::Ok {
            // It cannot follow now (its store is not open, or it stops): a new record is due, or it
            // will be asked again.
            tracing::debug!(pg = %header.pg, %slice, status = %header.status, "member does not activate");
            member.link = Link::Down;
            return self.wake_in(env, ACTIVATE_RETRY_MS);
        }
        member.link = Link::Up;
        let listing = member.listing;
        self.hear_origins(key, index, frame);
        if listing == Listing::Done {
            self.resend(env, key, index);
        }
        self.ask_again(env, key, index);
        self.advance(env, key);
        self.teach_members(env, key);
    }

    /// Asks again the members that are connected and did not activate.
    pub(crate) fn retry_activates(&mut self, env: &mut dyn Env) {
        let due: Vec<(Key, usize)> = self
            .pgs
            .iter()
            .filter_map(|(key, pg)| Some((key, pg.primary.as_ref()?)))
            .flat_map(|(key, primary)| {
                let down = primary.members.iter().enumerate().filter(|(_, member)| member.link == Link::Down);
                down.map(move |(index, _)| (key, index))
            })
            .collect();
        for (key, index) in due {
            self.send_activate(env, key, index);
        }
    }

    /// Sends a member again everything that it has not confirmed, in the order of the first time. What it
    /// has already it confirms again.
    fn resend(&mut self, env: &mut dyn Env, key: Key, index: usize) {
        let bit = 1u32 << index;
        let mut due: Vec<(u64, Key)> = self
            .ops
            .iter()
            .filter(|(_, op)| op.pg == key && op.stage == Stage::Started && op.kind != OpKind::Read)
            .filter(|(_, op)| op.pending & bit != 0)
            .map(|(at, op)| (op.seq, at))
            .collect();
        due.sort_unstable_by_key(|(seq, _)| *seq);
        for (_, at) in due {
            if self.bug(Bug::ForgetResend) {
                self.bits_done(env, at, bit);
                continue;
            }
            let lacks = match (self.ops.get(at), self.primary(key)) {
                (Some(op), Some(primary)) => primary.lacking(op.object()) & bit != 0,
                _ => continue,
            };
            // What it lacks as a whole, recovery brings.
            if !lacks {
                self.metrics.resent.add(1);
                self.send_change(env, at, index);
            }
        }
        self.resend_heals(env, key, index);
        self.resend_checks(env, key, index);
    }

    fn become_active(&mut self, env: &mut dyn Env, key: Key) {
        self.settle_origins(key);
        let Some(primary) = self.primary_mut(key) else { return };
        primary.phase = Phase::Active;
        primary.served = true;
        (primary.own, primary.hints) = (Vec::new(), None);
        let held: Vec<Key> = self
            .ops
            .iter()
            .filter(|(_, op)| op.pg == key && op.pending & HOLD != 0)
            .map(|(at, _)| at)
            .collect();
        for at in held {
            self.bits_done(env, at, HOLD);
        }
        // Objects in flight that an in-sync member lacks hold up their clients: first.
        let objs: Vec<Key> = self.objs.iter().filter(|(_, obj)| obj.pg == key).map(|(at, _)| at).collect();
        for at in objs {
            self.heal_for_inflight(env, at);
            self.progress(env, at);
        }
        self.teach_members(env, key);
        self.recheck_queue(env, key);
        self.want_recovery(key);
        self.want_purge(key);
        self.check_in_sync(key);
        self.report_later(key);
    }
}
