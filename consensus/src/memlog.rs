//! The log as Raft reads it: entries in memory, from a little before the last snapshot on. The durable
//! copy is `journal`'s; this one is what the crate `raft` calls its storage.

use crate::blocks::Hard;
use crate::bounds::{KEEP_BYTES, KEEP_ENTRIES};
use crate::codec::data_of;
use crate::members::Members;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use std::collections::VecDeque;

/// Entries in memory.
pub struct MemLog {
    entries: VecDeque<Entry>,
    /// Index and term of the entry before the first.
    before: (u64, u64),
    hard: Hard,
    conf_state: ConfState,
    /// Index and term of the last applied entry: what a snapshot would cover.
    pub(crate) applied: (u64, u64),
}

fn cost(entry: &Entry) -> u64 {
    data_of(entry).len() as u64 + 32
}

impl MemLog {
    /// From what was recovered: the snapshot's index and term, hard state and entries behind,
    /// and the members at the snapshot: the log behind it says what has become of them.
    pub fn new(members: &Members, before: (u64, u64), hard: Hard, entries: VecDeque<Entry>) -> Self {
        Self { entries, before, hard, conf_state: members.conf_state(), applied: before }
    }

    /// The members as of the last applied entry.
    pub fn set_members(&mut self, members: &Members) {
        self.conf_state = members.conf_state();
    }

    /// Last index.
    pub fn last(&self) -> u64 {
        self.before.0 + self.entries.len() as u64
    }

    fn at(&self, index: u64) -> Option<&Entry> {
        let at = index.checked_sub(self.before.0 + 1)?;
        self.entries.get(usize::try_from(at).ok()?)
    }

    /// Term of an entry, when it is still known.
    pub fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.before.0 {
            return Some(self.before.1);
        }
        self.at(index).map(|entry| entry.term)
    }

    /// Entries behind `index`.
    pub fn behind(&self, index: u64) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.index > index)
    }

    /// Appends; an entry replaces everything from its index on.
    pub fn append(&mut self, entries: &[Entry]) {
        for entry in entries {
            let keep = entry.index.saturating_sub(self.before.0 + 1);
            self.entries.truncate(usize::try_from(keep).unwrap_or(usize::MAX));
            self.entries.push_back(entry.clone());
        }
    }

    /// Forgets everything: a snapshot up to here replaces it.
    pub fn reset(&mut self, index: u64, term: u64) {
        self.entries.clear();
        self.before = (index, term);
    }

    /// Drops entries covered by the snapshot up to `index`, but for a tail that spares late voters one.
    pub fn compact(&mut self, index: u64) {
        let mut bytes: u64 = 0;
        let mut from = index;
        while from > self.before.0 && index - from < KEEP_ENTRIES {
            bytes += self.at(from).map_or(0, cost);
            if bytes > KEEP_BYTES {
                break;
            }
            from -= 1;
        }
        while self.before.0 < from {
            let Some(entry) = self.entries.pop_front() else { break };
            self.before = (entry.index, entry.term);
        }
    }
}

impl Storage for MemLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let mut hard = HardState::default();
        hard.term = self.hard.term;
        hard.vote = self.hard.vote;
        hard.commit = self.hard.commit;
        Ok(RaftState::new(hard, self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.before.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let max: u64 = max_size.into().unwrap_or(u64::MAX);
        let mut bytes: u64 = 0;
        let mut out = Vec::new();
        for index in low..high {
            let entry = self.at(index).ok_or(raft::Error::Store(StorageError::Unavailable))?;
            bytes = bytes.saturating_add(cost(entry));
            if bytes > max && !out.is_empty() {
                break;
            }
            out.push(entry.clone());
        }
        Ok(out)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.before.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        self.term_of(index).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let (index, term) = self.applied;
        if index == 0 || index < request_index {
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        let mut snapshot = Snapshot::default();
        let meta = snapshot.mut_metadata();
        meta.index = index;
        meta.term = term;
        meta.set_conf_state(self.conf_state.clone());
        Ok(snapshot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::entry;

    fn log() -> MemLog {
        let entries = (11..=15).map(|index| entry(2, index, vec![0; 10])).collect();
        MemLog::new(&Members::founded(&[wire::NodeId(1)]), (10, 1), Hard::default(), entries)
    }

    #[test]
    fn an_append_in_the_middle_cuts_the_rest() {
        let mut log = log();
        log.append(&[entry(3, 13, vec![])]);
        assert_eq!((log.last(), log.term_of(13), log.term_of(12)), (13, Some(3), Some(2)));
    }

    #[test]
    fn compaction_keeps_a_tail_and_the_term_before_it() {
        let mut log = log();
        log.append(&(16..=3000).map(|i| entry(2, i, vec![])).collect::<Vec<_>>());
        log.compact(2900);
        assert_eq!(log.first_index().unwrap(), 2900 - KEEP_ENTRIES + 1);
        assert_eq!(log.term(2900 - KEEP_ENTRIES).unwrap(), 2);
        assert_eq!(log.last(), 3000);
        let some = log.entries(2950, 2960, 100, GetEntriesContext::empty(false)).unwrap();
        assert_eq!(some.len(), 3);
    }
}
