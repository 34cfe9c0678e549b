//! What a leader knows beyond the replicated state: proposals that are not applied yet, and when leases
//! end. It exists only while this voter leads, has applied an entry of its own term, and knows the
//! ephemeral keys.
//!
//! A transaction is decided here, before it enters the log, against the applied state overlaid with
//! every proposal of this term. That holds when it is applied: a leader's proposals commit in order and
//! with everything before them, or not at all.

use crate::bounds::{EPHEMERAL_BYTES_MAX, LEASE_TTL_MAX_MS, LEASE_TTL_MIN_MS, LEASES_MAX, PROPOSALS_MAX};
use crate::codec::{Command, Op, RequestId, Verdict};
use crate::kv::{ITEM_OVERHEAD_BYTES, Kv};
use crate::machine::{LeaseEvent, Machine, refused};
use crate::planted::{Bug, Planted};
use reactor::Mono;
use std::collections::{BTreeMap, VecDeque};
use wire::Status;
use wire::control::{Compare, Write};

struct Proposal {
    index: u64,
    id: RequestId,
    op: Op,
    durable_growth: u64,
    ephemeral_growth: u64,
}

/// A key as it will be when everything proposed has been applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct View {
    /// 0 = does not exist.
    revision: u64,
    lease: Option<u64>,
    bytes: u64,
}

const ABSENT: View = View { revision: 0, lease: None, bytes: 0 };

impl View {
    fn of(kv: &Kv, key: &str) -> Self {
        kv.get(key).map_or(ABSENT, |item| Self {
            revision: item.mod_revision.0,
            lease: item.lease,
            bytes: size(key, &item.value),
        })
    }

    /// The view after one write at `index`.
    fn after(self, key: &str, write: &Write, index: u64) -> Self {
        match write {
            Write::Put { key: put, value, lease } if put == key => {
                Self { revision: index, lease: *lease, bytes: size(key, value) }
            }
            Write::Delete { key: gone } if gone == key => ABSENT,
            Write::DeletePrefix { prefix } if key.starts_with(prefix.as_str()) => ABSENT,
            _ => self,
        }
    }
}

fn size(key: &str, value: &str) -> u64 {
    key.len() as u64 + value.len() as u64 + ITEM_OVERHEAD_BYTES
}

/// The leader's own knowledge.
pub struct Serving {
    proposals: VecDeque<Proposal>,
    deadlines: BTreeMap<u64, Mono>,
    planted: Planted,
}

impl Serving {
    /// A new leader gives every lease its whole time to live: it cannot know when it was last renewed.
    pub fn new(machine: &Machine, now: Mono, planted: Planted) -> Self {
        let mut this = Self { proposals: VecDeque::new(), deadlines: BTreeMap::new(), planted };
        for (lease, ttl_ms) in &machine.leases {
            this.extend(*lease, *ttl_ms, now);
        }
        this
    }

    /// A lease may not end before `now` + its time to live.
    fn extend(&mut self, lease: u64, ttl_ms: u64, now: Mono) {
        let ttl_ms = if self.planted.has(Bug::LeaseExpiresEarly) { ttl_ms / 4 } else { ttl_ms };
        let until = now.plus_ms(ttl_ms);
        let deadline = self.deadlines.entry(lease).or_insert(until);
        *deadline = (*deadline).max(until);
    }

    /// This process was paused: owners could not renew meanwhile.
    pub fn stalled(&mut self, ns: u64) {
        for deadline in self.deadlines.values_mut() {
            *deadline = deadline.plus_ns(ns);
        }
    }

    /// Whether no more proposals fit.
    pub fn is_full(&self) -> bool {
        self.proposals.len() >= PROPOSALS_MAX
    }

    /// Whether a step of a change of the members is proposed and not applied.
    pub fn changes_members(&self) -> bool {
        self.proposals.iter().any(|proposal| matches!(proposal.op, Op::Members { .. }))
    }

    /// Whether this request is proposed and not applied.
    pub fn is_proposed(&self, id: RequestId) -> bool {
        self.proposals.iter().any(|p| p.id.session == id.session && p.id.seq == id.seq)
    }

    /// Notes that `command` has entered the log at `index`.
    pub fn proposed(&mut self, machine: &Machine, index: u64, command: Command) {
        let (durable_growth, ephemeral_growth) = match &command.op {
            Op::Txn { writes, .. } => self.growth(machine, writes),
            _ => (0, 0),
        };
        let proposal = Proposal { index, id: command.id, op: command.op, durable_growth, ephemeral_growth };
        self.proposals.push_back(proposal);
    }

    /// Everything up to `index` has been applied.
    pub fn applied(&mut self, index: u64, event: Option<LeaseEvent>, now: Mono) {
        while self.proposals.front().is_some_and(|proposal| proposal.index <= index) {
            self.proposals.pop_front();
        }
        match event {
            Some(LeaseEvent::Set { lease, ttl_ms }) => self.extend(lease, ttl_ms, now),
            Some(LeaseEvent::Ended(lease)) => {
                self.deadlines.remove(&lease);
            }
            Some(LeaseEvent::Reset) => self.deadlines.clear(),
            None => {}
        }
    }

    fn view(&self, machine: &Machine, key: &str) -> View {
        let mut view = View::of(machine.kv(), key);
        for proposal in &self.proposals {
            match &proposal.op {
                Op::Txn { writes, .. } | Op::Members { writes, .. } => {
                    view = writes.iter().fold(view, |view, write| view.after(key, write, proposal.index));
                }
                Op::LeaseEnd { lease } if view.lease == Some(*lease) => view = ABSENT,
                Op::EphemeralReset if view.lease.is_some() => view = ABSENT,
                _ => {}
            }
        }
        view
    }

    /// The lease's time to live once everything proposed is applied.
    fn lease(&self, machine: &Machine, lease: u64) -> Option<u64> {
        let mut ttl = machine.leases.get(&lease).copied();
        for proposal in &self.proposals {
            match &proposal.op {
                Op::LeaseSet { lease: set, ttl_ms } if *set == lease => ttl = Some(*ttl_ms),
                Op::LeaseEnd { lease: ended } if *ended == lease => ttl = None,
                Op::EphemeralReset => ttl = None,
                _ => {}
            }
        }
        ttl
    }

    /// Bytes by which writes may make the durable and the ephemeral keys grow.
    fn growth(&self, machine: &Machine, writes: &[Write]) -> (u64, u64) {
        let (mut durable, mut ephemeral) = (0u64, 0u64);
        for write in writes {
            if let Write::Put { key, value, lease } = write {
                let grown = size(key, value).saturating_sub(self.view(machine, key).bytes);
                if lease.is_some() { ephemeral += grown } else { durable += grown }
            }
        }
        (durable, ephemeral)
    }

    /// Decides a transaction. `durable_max` bounds the durable keys.
    pub fn decide(
        &self,
        machine: &Machine,
        compares: &[Compare],
        writes: &[Write],
        durable_max: u64,
    ) -> Verdict {
        for (at, compare) in compares.iter().enumerate() {
            let holds = match compare {
                Compare::ModRevision { key, revision } => self.view(machine, key).revision == revision.0,
                Compare::Exists { key } => self.view(machine, key).revision != 0,
                Compare::Bound { key, lease } => self.view(machine, key).lease == Some(*lease),
            };
            if !holds {
                return Verdict::CompareFailed(at as u32);
            }
        }
        let (durable, ephemeral) = self.growth(machine, writes);
        let proposed = |f: fn(&Proposal) -> u64| self.proposals.iter().map(f).sum::<u64>();
        let durable_after = machine.kv().durable_bytes() + proposed(|p| p.durable_growth) + durable;
        let ephemeral_after = machine.kv().ephemeral_bytes() + proposed(|p| p.ephemeral_growth) + ephemeral;
        // What does not grow is always let in: deleting and overwriting is how one gets out of being full.
        if durable > 0 && durable_after > durable_max
            || ephemeral > 0 && ephemeral_after > EPHEMERAL_BYTES_MAX
        {
            return refused(Status::NoSpace);
        }
        self.check_kinds(machine, writes)
    }

    /// Leases must exist, and a key does not change between durable and ephemeral without a deletion: a
    /// voter that reads its log back sees no ephemeral writes, and must come to the same durable keys.
    fn check_kinds(&self, machine: &Machine, writes: &[Write]) -> Verdict {
        for (at, write) in writes.iter().enumerate() {
            let Write::Put { key, lease, .. } = write else { continue };
            if lease.is_some_and(|lease| self.lease(machine, lease).is_none()) {
                return refused(Status::NotFound);
            }
            let earlier = writes.get(..at).unwrap_or(&[]);
            let before = earlier.iter().fold(self.view(machine, key), |v, w| v.after(key, w, u64::MAX));
            if before != ABSENT && before.lease.is_some() != lease.is_some() {
                return refused(Status::Invalid);
            }
        }
        Verdict::Apply
    }

    /// Renews a lease, or says what must enter the log first. `Ok` is the time to live, to be answered
    /// once leadership is confirmed.
    pub fn keep(&mut self, machine: &Machine, lease: u64, ttl_ms: u64, now: Mono) -> Result<u64, Op> {
        let ttl_ms = ttl_ms.clamp(LEASE_TTL_MIN_MS, LEASE_TTL_MAX_MS);
        if machine.leases.get(&lease) == Some(&ttl_ms) && self.lease(machine, lease) == Some(ttl_ms) {
            self.extend(lease, ttl_ms, now);
            return Ok(ttl_ms);
        }
        let known = self.lease(machine, lease).is_some();
        if !known && machine.leases.len() + self.proposals.len() >= LEASES_MAX {
            let verdict = refused(Status::NoSpace);
            return Err(Op::Txn { verdict, writes: Vec::new(), stripped: false });
        }
        Err(Op::LeaseSet { lease, ttl_ms })
    }

    /// Whether a renewal may be confirmed: the lease is there and is not about to end.
    pub fn holds(&self, machine: &Machine, lease: u64) -> bool {
        machine.leases.contains_key(&lease) && self.lease(machine, lease).is_some()
    }

    /// Leases whose time is over and whose end is not yet proposed.
    pub fn expired(&self, machine: &Machine, now: Mono) -> Vec<u64> {
        self.deadlines
            .iter()
            .filter(|(lease, deadline)| **deadline < now && self.holds(machine, **lease))
            .map(|(lease, _)| *lease)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::Revision;

    fn put(key: &str, lease: Option<u64>) -> Write {
        Write::Put { key: key.into(), value: "1".into(), lease }
    }

    fn absent(key: &str) -> Compare {
        Compare::ModRevision { key: key.into(), revision: Revision(0) }
    }

    fn setup() -> (Machine, Serving) {
        let mut machine = Machine::new(Planted::none());
        let command = |op| Command { id: RequestId::default(), op };
        machine.apply(1, 1, &command(Op::EphemeralReset).encode()).unwrap();
        machine.apply(2, 1, &command(Op::LeaseSet { lease: 7, ttl_ms: 1000 }).encode()).unwrap();
        let serving = Serving::new(&machine, Mono(0), Planted::none());
        (machine, serving)
    }

    fn propose(machine: &Machine, serving: &mut Serving, index: u64, op: Op) {
        serving.proposed(machine, index, Command { id: RequestId::default(), op });
    }

    fn txn(writes: Vec<Write>) -> Op {
        Op::Txn { verdict: Verdict::Apply, writes, stripped: false }
    }

    #[test]
    fn compares_see_proposals_that_are_not_applied() {
        let (machine, mut serving) = setup();
        assert_eq!(serving.decide(&machine, &[absent("/a")], &[], 1 << 20), Verdict::Apply);
        propose(&machine, &mut serving, 3, txn(vec![put("/a", None)]));
        assert_eq!(serving.decide(&machine, &[absent("/a")], &[], 1 << 20), Verdict::CompareFailed(0));
        let at_three = Compare::ModRevision { key: "/a".into(), revision: Revision(3) };
        assert_eq!(serving.decide(&machine, &[at_three], &[], 1 << 20), Verdict::Apply);
        propose(&machine, &mut serving, 4, txn(vec![Write::DeletePrefix { prefix: "/".into() }]));
        assert_eq!(serving.decide(&machine, &[absent("/a")], &[], 1 << 20), Verdict::Apply);
    }

    #[test]
    fn kinds_do_not_mix_and_leases_must_exist() {
        let (machine, mut serving) = setup();
        propose(&machine, &mut serving, 3, txn(vec![put("/d", None), put("/e", Some(7))]));
        let refuse = |status| refused(status);
        let decide = |writes: &[Write]| serving.decide(&machine, &[], writes, 1 << 20);
        assert_eq!(decide(&[put("/d", Some(7))]), refuse(Status::Invalid));
        assert_eq!(decide(&[put("/e", None)]), refuse(Status::Invalid));
        assert_eq!(decide(&[put("/x", Some(8))]), refuse(Status::NotFound));
        assert_eq!(decide(&[Write::Delete { key: "/e".into() }, put("/e", None)]), Verdict::Apply);
    }

    #[test]
    fn a_key_is_bound_to_the_lease_it_was_put_with_last() {
        let (machine, mut serving) = setup();
        let bound = |lease| Compare::Bound { key: "/e".into(), lease };
        assert_eq!(serving.decide(&machine, &[bound(7)], &[], 1 << 20), Verdict::CompareFailed(0));
        propose(&machine, &mut serving, 3, txn(vec![put("/e", Some(7))]));
        assert_eq!(serving.decide(&machine, &[bound(7)], &[], 1 << 20), Verdict::Apply);
        assert_eq!(serving.decide(&machine, &[bound(8)], &[], 1 << 20), Verdict::CompareFailed(0));
        propose(&machine, &mut serving, 4, txn(vec![put("/e", Some(8))]));
        assert_eq!(serving.decide(&machine, &[bound(7)], &[], 1 << 20), Verdict::CompareFailed(0));
        propose(&machine, &mut serving, 5, txn(vec![Write::Delete { key: "/e".into() }]));
        assert_eq!(serving.decide(&machine, &[bound(8)], &[], 1 << 20), Verdict::CompareFailed(0));
    }

    #[test]
    fn full_refuses_growth_and_nothing_else() {
        let (machine, mut serving) = setup();
        propose(&machine, &mut serving, 3, txn(vec![put("/d", None)]));
        let decide = |writes: &[Write]| serving.decide(&machine, &[], writes, 30);
        assert_eq!(decide(&[put("/e", None)]), refused(Status::NoSpace));
        assert_eq!(decide(&[put("/d", None)]), Verdict::Apply);
        assert_eq!(decide(&[Write::Delete { key: "/d".into() }]), Verdict::Apply);
    }

    #[test]
    fn a_lease_about_to_end_is_created_anew() {
        let (machine, mut serving) = setup();
        assert_eq!(serving.keep(&machine, 7, 1000, Mono(0)), Ok(1000));
        assert!(serving.expired(&machine, Mono(999_999_999)).is_empty());
        assert_eq!(serving.expired(&machine, Mono(1_000_000_001)), [7]);
        propose(&machine, &mut serving, 3, Op::LeaseEnd { lease: 7 });
        assert!(serving.expired(&machine, Mono(u64::MAX)).is_empty());
        let again = serving.keep(&machine, 7, 1000, Mono(0));
        assert_eq!(again, Err(Op::LeaseSet { lease: 7, ttl_ms: 1000 }));
    }
}
