//! Members that this core cannot reach although the metadata group still counts them as alive: the link between just
//! these two is cut, in one direction or both, or their host hangs.
//!
//! A change needs every acting member, so such a member stops its PGs. What counts is how long nothing has come from
//! its core while somebody here needs it; an idle connection is pinged, so that silence means something. It is counted
//! in ticks of this loop, and a loop that was stopped itself counts one tick for all of it: whoever was paused does
//! not blame its peers. A member that answers pings and not its requests has a disk that hangs, which it finds out
//! itself (`disk_health`).
//!
//! Where enough members for the pool's minimum remain, the primary wishes an epoch without the others. Where not,
//! but enough of the others could serve without it, it is itself the one cut off: it stops and gives the PG away.

use crate::config::*;
use crate::core::{DataCore, Life};
use crate::msg::CoreMsg;
use crate::peer::{Peer, PeerState};
use crate::pg::Pg;
use crate::slab::Key;
use reactor::{Env, Frame};
use std::collections::BTreeSet;
use wire::{BlockCrcs, FrameKind, Header, SliceId, Status};

/// What a primary does about members out of reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Remedy {
    /// Go on without them.
    LeaveOut,
    /// Let others go on without this primary.
    GiveAway,
    /// Nobody could serve: wait for the link.
    Wait,
}

impl Peer {
    pub(crate) fn out_of_reach(&self) -> bool {
        self.quiet_ticks >= UNREACHABLE_TICKS
    }
}

impl DataCore {
    /// Looks after the connections to peers; once per `REACH_TICK_MS`.
    pub(crate) fn watch_peers(&mut self, env: &mut dyn Env) {
        let mut idle = Vec::new();
        for (at, peer) in self.peers.iter_mut().enumerate() {
            if peer.state == PeerState::Forgotten {
                continue;
            }
            peer.quiet_ticks = peer.quiet_ticks.saturating_add(1);
            peer.state_ticks = peer.state_ticks.saturating_add(1);
            match peer.state {
                // `Closed` follows and does the rest.
                PeerState::Up(conn) if peer.out_of_reach() => {
                    tracing::warn!(node = %peer.node, addr = %peer.addr, "connection given up: the peer is silent");
                    env.close(conn, false);
                }
                PeerState::Up(_) if peer.quiet_ticks.is_multiple_of(PING_TICKS) => idle.push(at),
                PeerState::Opening(conn) if peer.state_ticks >= OPENING_TICKS => env.close(conn, false),
                _ => {}
            }
        }
        for at in idle {
            let header = Header::new(FrameKind::Ping, 0);
            self.send_peer(env, at, Frame { header, crcs: BlockCrcs::default(), payload: None });
        }
        // Without a lease somebody else decides, and what is said now must not be believed later.
        if self.life == Life::Running && self.lease_holds(env) && self.peers.iter().any(Peer::out_of_reach) {
            self.go_on_without(env);
        }
    }

    /// Whether there is a peer to look after.
    pub(crate) fn watches_peers(&self) -> bool {
        self.peers.iter().any(|peer| peer.state != PeerState::Forgotten)
    }

    fn reaches(&self, peer: usize) -> bool {
        !self.peers.get(peer).is_some_and(Peer::out_of_reach)
    }

    fn remedy(&self, pg: &Pg) -> Option<Remedy> {
        let (primary, update) = (pg.primary.as_deref()?, pg.update.as_ref()?);
        let lost = primary.members.iter().filter(|member| !self.reaches(member.peer)).count();
        if lost == 0 {
            return None;
        }
        let minimum = usize::from(update.pool.min_copies.max(1));
        if primary.members.len() + 1 - lost >= minimum {
            return Some(Remedy::LeaveOut);
        }
        let record = &update.record;
        let all: BTreeSet<SliceId> = record.acting.iter().chain(&record.target).copied().collect();
        let others = all.iter().filter(|slice| **slice != primary.slice).count();
        let heir = |slice: &SliceId| *slice != primary.slice && record.acting.contains(slice);
        let gives = others >= minimum && record.in_sync.iter().any(heir);
        Some(if gives { Remedy::GiveAway } else { Remedy::Wait })
    }

    fn go_on_without(&mut self, env: &mut dyn Env) {
        let found: Vec<(Key, Remedy)> =
            self.pgs.iter().filter_map(|(key, pg)| Some((key, self.remedy(pg)?))).collect();
        for (key, remedy) in found {
            match remedy {
                Remedy::LeaveOut => self.leave_out(key),
                Remedy::GiveAway => self.give_away(env, key),
                Remedy::Wait => {}
            }
        }
    }

    /// The control core is asked for an epoch without the members out of reach.
    fn leave_out(&mut self, key: Key) {
        let lost: Vec<usize> = match self.primary(key) {
            Some(primary) => {
                let lost = |(_, m): &(usize, &crate::pg::MemberState)| !m.left_out && !self.reaches(m.peer);
                primary.members.iter().enumerate().filter(lost).map(|(index, _)| index).collect()
            }
            None => return,
        };
        for index in lost {
            let Some(pg) = self.pgs.get_mut(key) else { return };
            let id = pg.id;
            let Some(primary) = pg.primary.as_deref_mut() else { return };
            let epoch = primary.epoch;
            let Some(member) = primary.members.get_mut(index) else { continue };
            member.left_out = true;
            let slice = member.slice;
            tracing::warn!(pg = %id, %slice, node = %member.node, "member is out of reach");
            self.metrics.out_of_sync.add(1);
            self.tell(CoreMsg::Unreachable { pg: id, epoch, slice });
        }
    }

    /// Ends this core's time as primary of a PG for good as far as its present epoch goes, and says so.
    fn give_away(&mut self, env: &mut dyn Env, key: Key) {
        let Some(pg) = self.pgs.get_mut(key) else { return };
        let Some((epoch, slice)) = pg.primary.as_deref().map(|primary| (primary.epoch, primary.slice)) else {
            return;
        };
        pg.gave_away = epoch;
        let id = pg.id;
        tracing::warn!(pg = %id, %slice, "the primary is cut off from the other members: others may take over");
        self.step_down(env, key, Status::NotActive);
        self.tell(CoreMsg::GivesAway { pg: id, epoch, slice });
    }
}
