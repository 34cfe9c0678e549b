//! The replicated state machine: applies log entries in order, the same on every voter.
//!
//! Decisions (did the compares hold, does the lease exist) were taken by the leader before an entry
//! entered the log, against everything before it in the log; an entry holds effects only. So replaying
//! the durable part of the log gives the durable keys, whatever has become of the ephemeral ones.

use crate::bounds::SESSIONS_MAX;
use crate::codec::{CodecError, Command, Op, RequestId, Verdict};
use crate::kv::Kv;
use crate::members::Members;
use crate::planted::{Bug, Planted};
use std::collections::BTreeMap;
use wire::control::{Change, MetaReply, Write};
use wire::{Revision, Status};

/// What became of a request, as remembered for retries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Applied at this revision.
    Applied(u64),
    /// This compare failed.
    CompareFailed(u32),
    /// Refused with this status.
    Refused(u8),
    /// The lease's time to live, 0 when ended.
    Lease(u64),
}

impl Outcome {
    /// As the caller sees it.
    pub fn reply(self) -> MetaReply {
        match self {
            Self::Applied(revision) => MetaReply::Applied { revision: Revision(revision) },
            Self::CompareFailed(index) => MetaReply::CompareFailed { index },
            Self::Refused(status) => MetaReply::Failed { status },
            Self::Lease(ttl_ms) => MetaReply::Lease { ttl_ms },
        }
    }
}

/// What is known of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Known {
    /// Not seen.
    New,
    /// Done, with this outcome.
    Done(Outcome),
    /// Its origin has given it up: it must not be done any more.
    GivenUp,
}

/// Outcomes of one session.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Session {
    /// Everything below has been given up or answered.
    pub floor: u64,
    /// Index of the last entry of this session.
    pub last_index: u64,
    /// Outcomes from `floor` on.
    pub outcomes: BTreeMap<u64, Outcome>,
}

/// Whether this replica knows the ephemeral keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ephemeral {
    /// Exactly those of every other voter at the same index.
    Known,
    /// Lost by a restart, or received with a gap.
    Lost,
}

/// What the watchers of this replica have been told.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Told {
    /// Everything applied.
    All,
    /// Nothing yet.
    Nothing,
    /// This state; what was applied since waits until the ephemeral part is known again.
    Until(Box<Kv>),
}

/// Something that happened to a lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseEvent {
    /// Created or changed.
    Set {
        /// The lease.
        lease: u64,
        /// Granted.
        ttl_ms: u64,
    },
    /// Gone.
    Ended(u64),
    /// All of them are gone.
    Reset,
}

/// Effects of an entry on the outside.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    /// A request is answered.
    pub done: Option<(RequestId, Outcome)>,
    /// To be told to watchers.
    pub changes: Option<(Revision, Vec<Change>)>,
    /// For the leader's timers.
    pub lease: Option<LeaseEvent>,
    /// The members have changed; these were they.
    pub members: Option<Members>,
}

/// The state machine.
pub struct Machine {
    pub(crate) kv: Kv,
    pub(crate) leases: BTreeMap<u64, u64>,
    pub(crate) sessions: BTreeMap<u64, Session>,
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) ephemeral: Ephemeral,
    pub(crate) members: Members,
    told: Told,
    pub(crate) planted: Planted,
}

impl Machine {
    /// Before the first entry. Nothing is told until the ephemeral part is known.
    pub fn new(planted: Planted) -> Self {
        Self {
            kv: Kv::default(),
            leases: BTreeMap::new(),
            sessions: BTreeMap::new(),
            index: 0,
            term: 0,
            ephemeral: Ephemeral::Lost,
            members: Members::default(),
            told: Told::Nothing,
            planted,
        }
    }

    /// The keys.
    pub fn kv(&self) -> &Kv {
        &self.kv
    }

    /// Who belongs to the group.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Whether watchers have been told everything applied.
    pub fn is_ready(&self) -> bool {
        self.told == Told::All
    }

    /// What is known of a request.
    pub fn known(&self, id: RequestId) -> Known {
        if self.planted.has(Bug::DedupForgotten) {
            return Known::New;
        }
        match self.sessions.get(&id.session) {
            None => Known::New,
            Some(session) => match session.outcomes.get(&id.seq) {
                Some(outcome) => Known::Done(*outcome),
                None if id.seq < session.floor => Known::GivenUp,
                None => Known::New,
            },
        }
    }

    fn remember(&mut self, id: RequestId, outcome: Outcome) {
        if id.session == 0 {
            return;
        }
        let session = self.sessions.entry(id.session).or_default();
        session.last_index = self.index;
        session.floor = session.floor.max(id.floor);
        session.outcomes = session.outcomes.split_off(&session.floor);
        session.outcomes.insert(id.seq, outcome);
        while self.sessions.len() > SESSIONS_MAX {
            let oldest = self.sessions.iter().min_by_key(|(id, s)| (s.last_index, **id)).map(|(id, _)| *id);
            match oldest {
                Some(oldest) => self.sessions.remove(&oldest),
                None => break,
            };
        }
    }

    /// Applies the entry at `index`. Entries come in order; bytes that are no command mean that voters
    /// of different versions are mixed, or worse: the caller must stop.
    pub fn apply(&mut self, index: u64, term: u64, data: &[u8]) -> Result<Applied, CodecError> {
        let command = if data.is_empty() { None } else { Some(Command::decode(data)?) };
        self.index = index;
        self.term = term;
        let Some(Command { id, op }) = command else { return Ok(Applied::default()) };
        match self.known(id) {
            Known::New => {}
            Known::Done(outcome) => return Ok(Applied { done: Some((id, outcome)), ..Applied::default() }),
            Known::GivenUp => return Ok(Applied::default()),
        }
        let at = Revision(index);
        let mut lease_event = None;
        let mut members_before = None;
        let (outcome, changes) = match op {
            Op::Txn { verdict: Verdict::CompareFailed(compare), .. } => {
                (Outcome::CompareFailed(compare), None)
            }
            Op::Txn { verdict: Verdict::Refused(status), .. } => (Outcome::Refused(status), None),
            Op::Txn { verdict: Verdict::Apply, writes, stripped } => {
                if stripped {
                    self.lose_ephemeral();
                }
                (Outcome::Applied(index), Some(self.write(at, writes)))
            }
            Op::LeaseSet { lease, ttl_ms } => {
                self.leases.insert(lease, ttl_ms);
                lease_event = Some(LeaseEvent::Set { lease, ttl_ms });
                (Outcome::Lease(ttl_ms), None)
            }
            Op::LeaseEnd { lease } => {
                self.leases.remove(&lease);
                lease_event = Some(LeaseEvent::Ended(lease));
                let changes = self.kv.delete_lease(lease);
                (Outcome::Lease(0), (!changes.is_empty()).then_some(changes))
            }
            Op::EphemeralReset => {
                self.leases.clear();
                lease_event = Some(LeaseEvent::Reset);
                let changes = self.kv.delete_ephemeral();
                self.ephemeral = Ephemeral::Known;
                (Outcome::Applied(index), Some(changes))
            }
            Op::Members { members, writes } => {
                members_before = Some(std::mem::replace(&mut self.members, *members));
                (Outcome::Applied(index), Some(self.write(at, writes)))
            }
        };
        self.remember(id, outcome);
        let changes = self.tell(at, changes);
        Ok(Applied { done: Some((id, outcome)), changes, lease: lease_event, members: members_before })
    }

    fn write(&mut self, at: Revision, writes: Vec<Write>) -> Vec<Change> {
        let mut changes = Vec::with_capacity(writes.len());
        for write in writes {
            match write {
                Write::Put { key, value, lease } => changes.push(self.kv.put(key, value, lease, at)),
                Write::Delete { key } => changes.extend(self.kv.delete(&key)),
                Write::DeletePrefix { prefix } => changes.extend(self.kv.delete_prefix(&prefix)),
            }
        }
        changes
    }

    /// Decides what watchers hear of an entry's changes. Revisions depend on the log alone: what is made up
    /// for here has the revision of the last change, like everywhere else.
    fn tell(&mut self, at: Revision, changes: Option<Vec<Change>>) -> Option<(Revision, Vec<Change>)> {
        if changes.is_some() {
            self.kv.set_revision(at);
        }
        let told = match &self.told {
            Told::All => return changes.map(|changes| (at, changes)),
            _ if self.ephemeral == Ephemeral::Lost => return None,
            Told::Nothing => Some(Kv::default().difference(&self.kv)),
            Told::Until(old) => Some(old.difference(&self.kv)).filter(|changes| !changes.is_empty()),
        };
        self.told = Told::All;
        told.map(|changes| (self.kv.revision(), changes))
    }

    fn lose_ephemeral(&mut self) {
        self.ephemeral = Ephemeral::Lost;
        if self.told == Told::All {
            self.told = Told::Until(Box::new(self.kv.clone()));
        }
    }

    /// Replaces the whole state by an image of a later index. The result is to be told to watchers.
    pub fn install(&mut self, image: crate::image::Image) -> Option<(Revision, Vec<Change>)> {
        let mut kv = Kv::default();
        for (key, item) in image.items {
            kv.insert(key, item);
        }
        kv.set_revision(image.revision);
        if self.told == Told::All {
            self.told = Told::Until(Box::new(std::mem::take(&mut self.kv)));
        }
        self.kv = kv;
        self.sessions = image.sessions;
        if let Some(members) = image.members {
            self.members = members;
        }
        self.index = image.index;
        self.term = image.term;
        self.leases.clear();
        self.ephemeral = Ephemeral::Lost;
        let known = image.ephemeral.is_some();
        if let Some(part) = image.ephemeral {
            self.take_ephemeral(part, image.revision);
        }
        if known && self.planted.has(Bug::WatchSkipsOnSnapshot) {
            self.told = Told::All;
            return None;
        }
        self.tell(Revision(self.index), None)
    }

    fn take_ephemeral(&mut self, part: crate::image::EphemeralPart, revision: Revision) {
        // The end of a lease whose keys were not known here may have gone by unnoticed.
        self.kv.set_revision(revision);
        self.kv.delete_ephemeral();
        self.leases = part.leases;
        for (key, item) in part.items {
            self.kv.insert(key, item);
        }
        self.ephemeral = Ephemeral::Known;
    }

    /// Takes the ephemeral part of another voter, which must be of exactly this index.
    pub fn install_ephemeral(
        &mut self,
        part: crate::image::EphemeralPart,
        revision: Revision,
    ) -> Option<(Revision, Vec<Change>)> {
        if self.ephemeral == Ephemeral::Known {
            return None;
        }
        self.take_ephemeral(part, revision);
        self.tell(Revision(self.index), None)
    }
}

/// A refusal.
pub fn refused(status: Status) -> Verdict {
    Verdict::Refused(status as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn txn(seq: u64, writes: Vec<Write>) -> Vec<u8> {
        let id = RequestId { session: 9, seq, floor: 1 };
        Command { id, op: Op::Txn { verdict: Verdict::Apply, writes, stripped: false } }.encode()
    }

    fn put(key: &str, lease: Option<u64>) -> Write {
        Write::Put { key: key.into(), value: "1".into(), lease }
    }

    fn reset() -> Vec<u8> {
        Command { id: RequestId::default(), op: Op::EphemeralReset }.encode()
    }

    #[test]
    fn nothing_is_told_before_the_ephemeral_part_is_known_and_then_everything() {
        let mut machine = Machine::new(Planted::none());
        let applied = machine.apply(1, 1, &txn(1, vec![put("/a", None)])).unwrap();
        assert!(applied.changes.is_none() && !machine.is_ready());
        let (at, changes) = machine.apply(2, 1, &reset()).unwrap().changes.unwrap();
        assert_eq!((at, changes.len()), (Revision(2), 1));
        assert!(machine.is_ready());
    }

    #[test]
    fn a_retried_entry_is_applied_once() {
        let mut machine = Machine::new(Planted::none());
        machine.apply(1, 1, &reset()).unwrap();
        let first = machine.apply(2, 1, &txn(1, vec![put("/a", None)])).unwrap();
        let again = machine.apply(3, 1, &txn(1, vec![put("/a", None)])).unwrap();
        assert_eq!(first.done, again.done);
        assert!(first.changes.is_some() && again.changes.is_none());
        assert_eq!(machine.kv().get("/a").unwrap().mod_revision, Revision(2));
    }

    #[test]
    fn sessions_are_bounded_and_the_oldest_goes() {
        let mut machine = Machine::new(Planted::none());
        for session in 1..=(SESSIONS_MAX as u64 + 3) {
            let id = RequestId { session, seq: 1, floor: 1 };
            let op = Op::Txn { verdict: Verdict::Apply, writes: vec![], stripped: false };
            machine.apply(session, 1, &Command { id, op }.encode()).unwrap();
        }
        assert_eq!(machine.sessions.len(), SESSIONS_MAX);
        assert_eq!(machine.known(RequestId { session: 1, seq: 1, floor: 1 }), Known::New);
        assert_eq!(
            machine.known(RequestId { session: 4, seq: 1, floor: 1 }),
            Known::Done(Outcome::Applied(4))
        );
    }

    #[test]
    fn a_stripped_entry_loses_the_ephemeral_part_until_a_reset() {
        let mut machine = Machine::new(Planted::none());
        machine.apply(1, 1, &reset()).unwrap();
        machine.apply(2, 1, &txn(1, vec![put("/l", Some(5))])).unwrap();
        let id = RequestId { session: 9, seq: 2, floor: 1 };
        let full = Command {
            id,
            op: Op::Txn {
                verdict: Verdict::Apply,
                writes: vec![put("/m", Some(5)), put("/d", None)],
                stripped: false,
            },
        };
        let stripped = full.without_ephemeral().unwrap();
        assert!(machine.apply(3, 1, &stripped.encode()).unwrap().changes.is_none());
        assert!(!machine.is_ready());
        let (_, changes) = machine.apply(4, 1, &reset()).unwrap().changes.unwrap();
        assert_eq!(changes.len(), 2, "{changes:?}");
        assert!(machine.kv().get("/l").is_none() && machine.kv().get("/d").is_some());
    }
}
