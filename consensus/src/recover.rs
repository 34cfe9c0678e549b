//! What the log blocks found on disk mean: which records count, whether the end is torn, and whether
//! something in the middle has rotted.
//!
//! One batch is written at a time, and the next begins only when the device has reported the previous
//! one durable. So after a cut at most the last batch is incomplete, and it begins exactly where the
//! readable log ends. A readable block of any other batch behind an unreadable one proves that the
//! unreadable one had once been durable: then nothing is cut off and the node refuses to start.

use crate::blocks::{Hard, Head, LogHead, Record};
use crate::error::MetaError;
use std::collections::BTreeMap;

/// Readable log blocks by number.
pub type Found = BTreeMap<u64, (LogHead, Vec<u8>)>;

/// A batch in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchAt {
    /// Its first block.
    pub first: u64,
    /// Its sequence.
    pub batch: u64,
    /// Highest index of an entry in it, 0 without.
    pub max_index: u64,
}

/// The recovered log.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Log {
    /// Hard state.
    pub hard: Hard,
    /// Entries behind the snapshot: term and data; the first has index `snapshot + 1`.
    pub entries: Vec<(u64, Vec<u8>)>,
    /// Batches from the snapshot's log start on.
    pub batches: Vec<BatchAt>,
    /// Where the next block goes.
    pub next_number: u64,
    /// The next batch's sequence.
    pub next_batch: u64,
    /// Blocks from `next_number` on that hold remains of a torn batch and must be erased before anything
    /// is written: later they could pass for proof of damage.
    pub erase: u64,
}

/// A whole batch at `number`, when every block of it is there.
fn batch_at(found: &Found, number: u64, after: u64) -> Option<(LogHead, Vec<u8>)> {
    let (first, _) = found.get(&number)?;
    if first.position != 0 || first.batch <= after {
        return None;
    }
    let mut payload = Vec::new();
    for position in 0..first.count {
        let (head, piece) = found.get(&(number + u64::from(position)))?;
        if head.batch != first.batch || head.position != position || head.count != first.count {
            return None;
        }
        payload.extend_from_slice(piece);
    }
    Some((*first, payload))
}

/// Takes one batch's records into the log. `None`: they contradict each other.
fn take(log: &mut Log, snapshot: u64, records: Vec<Record>) -> Option<u64> {
    let mut max_index = 0;
    for record in records {
        match record {
            Record::Hard(hard) => log.hard = log.hard.merge(hard),
            Record::Seal { commit } => log.hard.commit = log.hard.commit.max(commit),
            Record::Entry { index, term, data } => {
                max_index = max_index.max(index);
                let Some(at) = index.checked_sub(snapshot + 1) else { continue };
                let at = usize::try_from(at).ok()?;
                if at > log.entries.len() {
                    return None;
                }
                log.entries.truncate(at);
                log.entries.push((term, data));
            }
        }
    }
    Some(max_index)
}

/// Reads the log behind `head` (or from the very start).
pub fn recover(head: Option<&Head>, found: &Found) -> Result<Log, MetaError> {
    let snapshot = head.map_or(0, |head| head.index);
    let mut number = head.map_or(0, |head| head.log_start);
    let mut batch = head.map_or(0, |head| head.batch_before);
    let mut log = Log { hard: head.map(|head| head.hard).unwrap_or_default(), ..Log::default() };
    while let Some((first, payload)) = batch_at(found, number, batch) {
        let damaged = || MetaError::LogDamaged { block: number, last: number };
        let records = Record::decode_all(&payload).ok_or_else(damaged)?;
        let max_index = take(&mut log, snapshot, records).ok_or_else(damaged)?;
        log.batches.push(BatchAt { first: number, batch: first.batch, max_index });
        number += u64::from(first.count);
        batch = first.batch;
    }
    let mut torn = batch;
    for (at, (head, _)) in found.range(number..).filter(|(_, (head, _))| head.batch > batch) {
        let start = at.saturating_sub(u64::from(head.position));
        if start != number || (torn != batch && torn != head.batch) {
            let last = found.keys().next_back().copied().unwrap_or(*at);
            return Err(MetaError::LogDamaged { block: number, last });
        }
        torn = head.batch;
        log.erase = log.erase.max(u64::from(head.count));
    }
    log.next_number = number;
    log.next_batch = torn + 1;
    let last = snapshot + log.entries.len() as u64;
    log.hard.commit = log.hard.commit.max(snapshot).min(last);
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::{decode_log_block, encode_batch};
    use wire::BLOCK_BYTES;

    fn entry(index: u64, len: usize) -> Record {
        Record::Entry { index, term: 1, data: vec![7; len] }
    }

    /// Batches of these records as found on disk.
    fn disk(batches: &[Vec<Record>]) -> Found {
        let mut found = Found::new();
        let mut number = 0;
        for (i, records) in batches.iter().enumerate() {
            let mut payload = Vec::new();
            records.iter().for_each(|record| record.encode(&mut payload));
            let bytes = encode_batch(1, number, i as u64 + 1, &payload);
            for block in bytes.chunks(BLOCK_BYTES) {
                let (head, payload) = decode_log_block(block).unwrap();
                found.insert(head.number, (head, payload.to_vec()));
                number += 1;
            }
        }
        found
    }

    fn three() -> Found {
        let hard = Record::Hard(Hard { term: 1, vote: 2, commit: 0 });
        disk(&[vec![hard, entry(1, 10)], vec![entry(2, 10_000)], vec![entry(3, 9_000), entry(4, 5)]])
    }

    #[test]
    fn a_whole_log_is_read() {
        let log = recover(None, &three()).unwrap();
        assert_eq!((log.entries.len(), log.next_number, log.next_batch, log.erase), (4, 7, 4, 0));
        assert_eq!((log.hard.term, log.hard.vote), (1, 2));
    }

    #[test]
    fn any_torn_last_batch_is_cut_and_its_remains_are_named() {
        for lost in 1u8..8 {
            let mut found = three();
            for bit in 0..3 {
                if lost & 1 << bit != 0 {
                    found.remove(&(4 + bit));
                }
            }
            let log = recover(None, &found).unwrap();
            assert_eq!((log.entries.len(), log.next_number), (2, 4), "{lost}");
            assert_eq!(log.erase, if lost == 7 { 0 } else { 3 });
            assert_eq!(log.next_batch, if lost == 7 { 3 } else { 4 });
        }
    }

    #[test]
    fn damage_before_a_later_batch_is_refused() {
        for block in 0..4 {
            let mut found = three();
            found.remove(&block);
            let error = recover(None, &found).unwrap_err();
            assert!(matches!(error, MetaError::LogDamaged { last: 6, .. }), "{block}: {error}");
        }
    }

    #[test]
    fn a_rewritten_suffix_replaces_the_old_one() {
        let newer = Record::Entry { index: 2, term: 2, data: vec![9] };
        let log = recover(None, &disk(&[vec![entry(1, 1), entry(2, 1), entry(3, 1)], vec![newer]])).unwrap();
        assert_eq!(log.entries, [(1, vec![7]), (2, vec![9])]);
    }

    #[test]
    fn a_gap_between_entries_is_damage() {
        assert!(recover(None, &disk(&[vec![entry(1, 1), entry(3, 1)]])).is_err());
    }
}
