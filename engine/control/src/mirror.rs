//! A node's copy of every key, as text: what subscriptions are served from. The same on voters (fed by
//! their own replica) and on other nodes (fed by a voter's subscription).

use std::collections::BTreeMap;
use std::ops::Bound;
use std::rc::Rc;
use wire::Revision;
use wire::control::{Change, KeyValue};

/// All keys as of one revision.
#[derive(Debug, Default)]
pub struct Mirror {
    items: BTreeMap<String, Rc<KeyValue>>,
    revision: Revision,
    ready: bool,
}

impl Mirror {
    /// The revision up to which every change is in here.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether the keys are those of `revision`.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// One key.
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.items.get(key).map(Rc::as_ref)
    }

    /// All keys with a prefix, in order. Handles are shared: a snapshot for a subscriber is cheap and
    /// stays as it is while the mirror goes on.
    pub fn range<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a Rc<KeyValue>> + 'a {
        self.items
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(_, item)| item)
    }

    /// Takes over some of the changes of the next revision. Until `finish` the mirror is between two
    /// revisions and not ready.
    pub fn apply(&mut self, changes: &[Change]) {
        self.ready = false;
        for change in changes {
            match change {
                Change::Put(item) => {
                    self.items.insert(item.key.clone(), Rc::new(item.clone()));
                }
                Change::Delete { key } => {
                    self.items.remove(key);
                }
            }
        }
    }

    /// All changes up to this revision have been taken over.
    pub fn finish(&mut self, revision: Revision) {
        self.revision = self.revision.max(revision);
        self.ready = true;
    }

    /// The changes that lead from what is here to `items`, the complete state at a later revision.
    pub fn difference(&self, items: &[KeyValue]) -> Vec<Change> {
        let new: BTreeMap<&str, &KeyValue> = items.iter().map(|item| (item.key.as_str(), item)).collect();
        let mut changes: Vec<Change> = self
            .items
            .keys()
            .filter(|key| !new.contains_key(key.as_str()))
            .map(|key| Change::Delete { key: key.clone() })
            .collect();
        for item in items {
            if self.get(&item.key) != Some(item) {
                changes.push(Change::Put(item.clone()));
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: &str, revision: u64) -> KeyValue {
        KeyValue { key: key.into(), value: "1".into(), mod_revision: Revision(revision), lease: None }
    }

    #[test]
    fn a_new_snapshot_becomes_the_changes_that_were_missed() {
        let mut mirror = Mirror::default();
        assert!(!mirror.is_ready());
        mirror.apply(&[Change::Put(item("/a", 1)), Change::Put(item("/b", 1))]);
        assert!(!mirror.is_ready());
        mirror.finish(Revision(1));
        let now = [item("/b", 5), item("/c", 4)];
        let missed = mirror.difference(&now);
        assert_eq!(missed.len(), 3);
        mirror.apply(&missed);
        mirror.finish(Revision(5));
        let keys: Vec<&str> = mirror.range("/").map(|kv| kv.key.as_str()).collect();
        assert_eq!((keys, mirror.revision()), (vec!["/b", "/c"], Revision(5)));
        assert!(mirror.difference(&now).is_empty());
    }

    #[test]
    fn a_snapshot_taken_stays_as_it_was() {
        let mut mirror = Mirror::default();
        mirror.apply(&[Change::Put(item("/a", 1))]);
        let taken: Vec<_> = mirror.range("/").cloned().collect();
        mirror.apply(&[Change::Put(item("/a", 2))]);
        assert_eq!(taken[0].mod_revision, Revision(1));
    }
}
