//! What clients of the metadata store asked, what they heard, and what watches told.

use client::AdminError;
use wire::control::{Change, KeyValue, MetaReply, MetaRequest, Write};
use wire::{Revision, Status};

/// A position in the one order of everything that clients did.
pub type Stamp = u64;

/// What became of a call.
#[derive(Clone, PartialEq, Debug)]
pub enum Outcome {
    /// No answer, or one that says that it is unknown.
    Unknown,
    /// Applied at this revision.
    Applied(Revision),
    /// This compare did not hold.
    CompareFailed(u32),
    /// The keys at this revision.
    Read(Revision, Vec<KeyValue>),
    /// Granted time to live, milliseconds.
    Lease(u64),
    /// It was certainly not done.
    NotDone(String),
}

/// A call of a client.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which client.
    pub client: usize,
    /// What it asked.
    pub request: MetaRequest,
    /// When.
    pub start: Stamp,
    /// When it was answered.
    pub end: Option<Stamp>,
    /// Virtual time of the start, for people.
    pub at: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// A client process's watch.
#[derive(Clone, Debug)]
pub struct Watch {
    /// Which client.
    pub client: usize,
    /// What came, with revisions.
    pub events: Vec<(Revision, Vec<Change>)>,
    /// Up to where.
    pub seen: Revision,
    /// Its process lives.
    pub is_open: bool,
}

/// A time during which a client was sure to hold a lock.
#[derive(Clone, Debug)]
pub struct Hold {
    /// The lock.
    pub key: String,
    /// Who.
    pub client: usize,
    /// The lease it was bound to.
    pub lease: u64,
    /// From then on, virtual time.
    pub from: u64,
    /// It was surely held then.
    pub until: u64,
}

/// Everything.
#[derive(Default, Debug)]
pub struct History {
    /// All calls in order of their start. A call's position is the number in what it writes.
    pub calls: Vec<Call>,
    watches: Vec<Watch>,
    /// All holds.
    pub holds: Vec<Hold>,
    clock: Stamp,
    /// What was found wrong at once.
    pub violations: Vec<String>,
}

impl History {
    /// The number that the next call will have.
    pub fn next_call(&self) -> usize {
        self.calls.len()
    }

    /// A call goes out.
    pub fn begin(&mut self, client: usize, at: u64, request: MetaRequest) -> usize {
        self.clock += 1;
        let outcome = Outcome::Unknown;
        self.calls.push(Call { client, request, start: self.clock, end: None, at, outcome });
        self.calls.len() - 1
    }

    /// It has ended.
    pub fn end(&mut self, call: usize, result: Result<MetaReply, AdminError>) {
        self.clock += 1;
        let now = self.clock;
        let Some(call) = self.calls.get_mut(call) else { return };
        call.end = Some(now);
        call.outcome = match (result, &call.request) {
            (Ok(MetaReply::Applied { revision }), MetaRequest::Txn { .. }) => Outcome::Applied(revision),
            (Ok(MetaReply::CompareFailed { index }), MetaRequest::Txn { .. }) => {
                Outcome::CompareFailed(index)
            }
            (Ok(MetaReply::Range { revision, items, more: false }), MetaRequest::Range { .. }) => {
                Outcome::Read(revision, items)
            }
            (
                Ok(MetaReply::Lease { ttl_ms }),
                MetaRequest::LeaseKeep { .. } | MetaRequest::LeaseRevoke { .. },
            ) => Outcome::Lease(ttl_ms),
            // The lease that a lock was to be bound to has ended.
            (Ok(MetaReply::Failed { status }), MetaRequest::Txn { writes, .. })
                if status == Status::NotFound as u8
                    && writes.iter().any(|write| matches!(write, Write::Put { lease: Some(_), .. })) =>
            {
                Outcome::NotDone("no such lease".to_owned())
            }
            // Who votes is no part of the history.
            (Ok(_), MetaRequest::ChangeVoters { .. } | MetaRequest::CancelVoters) => {
                Outcome::NotDone("voters".to_owned())
            }
            (Err(AdminError::OutcomeUnknown), _) => Outcome::Unknown,
            (Err(error @ (AdminError::Unreachable { .. } | AdminError::NoAnswer { .. })), _) => {
                Outcome::NotDone(error.to_string())
            }
            (other, request) => {
                let text = format!("meta: {request:?} was answered with {other:?}");
                self.violations.push(text.chars().take(400).collect());
                Outcome::Unknown
            }
        };
    }

    /// A client process begins to watch; the number of its watch.
    pub fn open_watch(&mut self, client: usize) -> usize {
        for watch in self.watches.iter_mut().filter(|watch| watch.client == client) {
            watch.is_open = false;
        }
        self.watches.push(Watch { client, events: Vec::new(), seen: Revision(0), is_open: true });
        self.watches.len() - 1
    }

    /// News of a watch.
    pub fn watched(&mut self, watch: usize, revision: Revision, changes: Vec<Change>) {
        let Some(watch) = self.watches.get_mut(watch) else { return };
        watch.seen = watch.seen.max(revision);
        watch.events.push((revision, changes));
    }

    /// All watches.
    pub fn watches(&self) -> impl Iterator<Item = &Watch> {
        self.watches.iter()
    }

    /// The last revision at which a call is known to have changed something.
    pub fn last_change(&self) -> Revision {
        let applied = self.calls.iter().filter_map(|call| match call.outcome {
            Outcome::Applied(revision) => Some(revision),
            _ => None,
        });
        applied.max().unwrap_or_default()
    }
}

/// The number of the call that wrote a value: all values of this workload begin with it.
pub fn writer(value: &str) -> Option<usize> {
    let rest = value.strip_prefix("{\"o\":")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
    rest.get(..digits)?.parse().ok()
}
