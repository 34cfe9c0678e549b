//! Watching key prefixes for somebody: a mirror of the keys turns snapshots, which come with every new
//! connection, into the changes since the last one.

use crate::op::AdminTicket;
use std::collections::BTreeMap;
use wire::Revision;
use wire::control::{Change, KeyValue};

pub(crate) struct Watch {
    pub ticket: AdminTicket,
    pub prefixes: Vec<String>,
    /// Revisions of the keys as last reported; `None` before the first report.
    mirror: Option<BTreeMap<String, Revision>>,
    /// Up to which the mirror is complete.
    revision: Revision,
}

impl Watch {
    pub(crate) fn new(ticket: AdminTicket, prefixes: Vec<String>) -> Self {
        Self { ticket, prefixes, mirror: None, revision: Revision(0) }
    }

    fn covers(&self, key: &str) -> bool {
        self.prefixes.iter().any(|prefix| key.starts_with(prefix.as_str()))
    }

    /// Whether a snapshot of these prefixes has everything that is watched.
    pub(crate) fn is_within(&self, prefixes: &[String]) -> bool {
        self.prefixes.iter().all(|mine| prefixes.iter().any(|p| mine.starts_with(p.as_str())))
    }

    /// What a snapshot changes. The first report comes even when there are no keys.
    pub(crate) fn snapshot(&mut self, revision: Revision, items: &[KeyValue]) -> Option<Vec<Change>> {
        let first = self.mirror.is_none();
        let mut old = self.mirror.take().unwrap_or_default();
        let mut mirror = BTreeMap::new();
        let mut changes = Vec::new();
        for item in items.iter().filter(|item| self.covers(&item.key)) {
            if old.remove(&item.key) != Some(item.mod_revision) {
                changes.push(Change::Put(item.clone()));
            }
            mirror.insert(item.key.clone(), item.mod_revision);
        }
        changes.extend(old.into_keys().map(|key| Change::Delete { key }));
        self.mirror = Some(mirror);
        self.revision = revision;
        (first || !changes.is_empty()).then_some(changes)
    }

    /// What of one revision's changes is watched.
    pub(crate) fn changes(&mut self, revision: Revision, changes: &[Change]) -> Option<Vec<Change>> {
        // Before the first snapshot with these prefixes, changes belong to an earlier subscription.
        self.mirror.as_ref()?;
        let mut seen = Vec::new();
        // A transaction may write a key several times, at one revision: the last counts.
        let last: BTreeMap<&str, usize> =
            changes.iter().enumerate().map(|(at, change)| (key_and_revision(change).0, at)).collect();
        for (at, change) in changes.iter().enumerate() {
            let (key, now) = key_and_revision(change);
            if !self.covers(key) || last.get(key) != Some(&at) {
                continue;
            }
            let mirror = self.mirror.as_mut()?;
            let before = match now {
                Some(revision) => mirror.insert(key.to_owned(), revision),
                None => mirror.remove(key),
            };
            if before != now {
                seen.push(change.clone());
            }
        }
        self.revision = self.revision.max(revision);
        (!seen.is_empty()).then_some(seen)
    }
}

fn key_and_revision(change: &Change) -> (&str, Option<Revision>) {
    match change {
        Change::Put(item) => (&item.key, Some(item.mod_revision)),
        Change::Delete { key } => (key, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: &str, revision: u64) -> KeyValue {
        KeyValue { key: key.into(), value: "1".into(), mod_revision: Revision(revision), lease: None }
    }

    #[test]
    fn a_second_snapshot_brings_only_what_changed() {
        let mut watch = Watch::new(AdminTicket(1), vec!["/a/".into()]);
        assert_eq!(watch.changes(Revision(1), &[Change::Put(item("/a/0", 1))]), None);
        let first =
            watch.snapshot(Revision(5), &[item("/a/1", 2), item("/a/2", 3), item("/b/1", 4)]).unwrap();
        assert_eq!(first, vec![Change::Put(item("/a/1", 2)), Change::Put(item("/a/2", 3))]);
        assert_eq!(watch.snapshot(Revision(6), &[item("/a/1", 2), item("/a/2", 3)]), None);
        let second = watch.snapshot(Revision(9), &[item("/a/2", 8), item("/a/3", 9)]).unwrap();
        assert_eq!(
            second,
            vec![
                Change::Put(item("/a/2", 8)),
                Change::Put(item("/a/3", 9)),
                Change::Delete { key: "/a/1".into() }
            ]
        );
        let third = watch.changes(Revision(10), &[Change::Put(item("/b/1", 10))]);
        assert_eq!(third, None);
        let gone = Change::Delete { key: "/a/3".into() };
        assert_eq!(watch.changes(Revision(11), std::slice::from_ref(&gone)), Some(vec![gone]));
    }

    #[test]
    fn of_a_key_that_one_transaction_writes_twice_the_last_value_is_told() {
        let mut watch = Watch::new(AdminTicket(1), vec!["/a/".into()]);
        watch.snapshot(Revision(5), &[]);
        let value = |text: &str| Change::Put(KeyValue { value: text.into(), ..item("/a/1", 6) });
        assert_eq!(watch.changes(Revision(6), &[value("1"), value("2")]), Some(vec![value("2")]));
        let gone = Change::Delete { key: "/a/2".into() };
        let came_and_went = [Change::Put(item("/a/2", 7)), gone.clone()];
        assert_eq!(watch.changes(Revision(7), &came_and_went), None);
        let replaced = [gone, Change::Put(item("/a/2", 8))];
        assert_eq!(watch.changes(Revision(8), &replaced), Some(vec![Change::Put(item("/a/2", 8))]));
    }
}
