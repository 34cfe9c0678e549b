//! Reads and renewals that wait for proof of leadership: all that come together share one round of
//! heartbeats (Raft's ReadIndex).

use crate::bounds::{CONFIRM_MAX, RANGE_BYTES_MAX, RANGE_ITEMS_MAX, RETRY_TICKS};
use crate::codec::RequestId;
use crate::kv::{Kv, key_value};
use crate::requests::{Requests, Stage};
use std::collections::BTreeMap;
use wire::NodeId;
use wire::control::MetaReply;

/// A renewal waiting for proof.
#[derive(Debug)]
pub struct Keep {
    /// Its origin.
    pub from: NodeId,
    /// Its identity.
    pub id: RequestId,
    /// The lease.
    pub lease: u64,
    /// Granted.
    pub ttl_ms: u64,
}

/// What shares one round.
#[derive(Debug, Default)]
pub struct Group {
    /// Reads of this node.
    pub ranges: Vec<u64>,
    /// Renewals, when this node leads.
    pub keeps: Vec<Keep>,
    asked_at: u64,
}

/// All of them.
#[derive(Debug)]
pub struct Reads {
    session: u64,
    next: u64,
    gathering: Group,
    asked: BTreeMap<u64, Group>,
}

impl Reads {
    /// Contexts carry the session, so that those of two voters never meet.
    pub fn new(session: u64) -> Self {
        Self { session, next: 0, gathering: Group::default(), asked: BTreeMap::new() }
    }

    fn len(&self) -> usize {
        let of = |group: &Group| group.ranges.len() + group.keeps.len();
        of(&self.gathering) + self.asked.values().map(of).sum::<usize>()
    }

    /// Takes a read in; `false`: no room now.
    pub fn add_range(&mut self, seq: u64) -> bool {
        let room = self.len() < CONFIRM_MAX;
        if room {
            self.gathering.ranges.push(seq);
        }
        room
    }

    /// Takes a renewal in; without room it is dropped and comes again.
    pub fn add_keep(&mut self, from: NodeId, id: RequestId, lease: u64, ttl_ms: u64) {
        if self.len() < CONFIRM_MAX {
            self.gathering.keeps.push(Keep { from, id, lease, ttl_ms });
        }
    }

    /// The context to ask for, when anything has gathered.
    pub fn take_group(&mut self, tick: u64, requests: &Requests) -> Option<Vec<u8>> {
        self.gathering.ranges.retain(|seq| requests.pending.contains_key(seq));
        if self.gathering.ranges.is_empty() && self.gathering.keeps.is_empty() {
            return None;
        }
        let mut group = std::mem::take(&mut self.gathering);
        group.asked_at = tick;
        self.next += 1;
        self.asked.insert(self.next, group);
        let mut context = self.session.to_le_bytes().to_vec();
        context.extend_from_slice(&self.next.to_le_bytes());
        Some(context)
    }

    /// The group that a confirmed context stands for.
    pub fn confirmed(&mut self, context: &[u8]) -> Option<Group> {
        let (session, number) = context.split_at_checked(8)?;
        if u64::from_le_bytes(session.try_into().ok()?) != self.session {
            return None;
        }
        self.asked.remove(&u64::from_le_bytes(number.try_into().ok()?))
    }

    /// Gives up rounds that got no answer: reads are asked again, renewals come again by themselves.
    pub fn expire(&mut self, tick: u64, requests: &mut Requests) {
        self.asked.retain(|_, group| {
            let keep = tick.saturating_sub(group.asked_at) < RETRY_TICKS;
            if !keep {
                again(group, requests);
            }
            keep
        });
    }

    /// The leader has changed.
    pub fn clear(&mut self, requests: &mut Requests) {
        self.asked.values().for_each(|group| again(group, requests));
        again(&self.gathering, requests);
        self.asked.clear();
        self.gathering = Group::default();
    }
}

fn again(group: &Group, requests: &mut Requests) {
    for seq in &group.ranges {
        if let Some(pending) = requests.pending.get_mut(seq) {
            pending.stage = Stage::Idle;
        }
    }
}

/// Answers a read from this state.
pub fn range(kv: &Kv, prefix: &str, limit: u32) -> MetaReply {
    let limit = (limit as usize).min(RANGE_ITEMS_MAX);
    let mut bytes = 0;
    let mut more = false;
    let mut items = Vec::new();
    for (key, item) in kv.range(prefix) {
        bytes += key.len() + item.value.len() + 64;
        if items.len() >= limit || (bytes > RANGE_BYTES_MAX && !items.is_empty()) {
            more = true;
            break;
        }
        items.push(key_value(key, item));
    }
    MetaReply::Range { revision: kv.revision(), items, more }
}
