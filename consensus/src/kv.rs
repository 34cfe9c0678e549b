//! The keys: an ordered map with revisions. Plain data; who may change it is `machine`'s business.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use wire::Revision;
use wire::control::{Change, KeyValue};

/// Bytes that a key costs in a snapshot besides its own and its value's.
pub const ITEM_OVERHEAD_BYTES: u64 = 24;

/// A key's value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// JSON text.
    pub value: String,
    /// When the key came to be.
    pub create_revision: Revision,
    /// When it was last written.
    pub mod_revision: Revision,
    /// The lease it is bound to: then it is ephemeral.
    pub lease: Option<u64>,
}

/// All keys of a replica as of `revision`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Kv {
    items: BTreeMap<String, Item>,
    by_lease: BTreeMap<u64, BTreeSet<String>>,
    revision: Revision,
    durable_bytes: u64,
    ephemeral_bytes: u64,
}

fn cost(key: &str, value: &str) -> u64 {
    key.len() as u64 + value.len() as u64 + ITEM_OVERHEAD_BYTES
}

impl Kv {
    /// One key.
    pub fn get(&self, key: &str) -> Option<&Item> {
        self.items.get(key)
    }

    /// All keys with a prefix, in key order.
    pub fn range<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Item)> + 'a {
        self.items
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, item)| (key.as_str(), item))
    }

    /// The revision of the last applied transaction: never falls, and has gaps.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Bytes that the keys without a lease cost in a snapshot.
    pub fn durable_bytes(&self) -> u64 {
        self.durable_bytes
    }

    /// Bytes of the keys bound to a lease.
    pub fn ephemeral_bytes(&self) -> u64 {
        self.ephemeral_bytes
    }

    /// The keys of a lease.
    pub fn keys_of(&self, lease: u64) -> impl Iterator<Item = &str> {
        self.by_lease.get(&lease).into_iter().flatten().map(String::as_str)
    }

    pub(crate) fn set_revision(&mut self, revision: Revision) {
        self.revision = self.revision.max(revision);
    }

    pub(crate) fn put(&mut self, key: String, value: String, lease: Option<u64>, at: Revision) -> Change {
        let create_revision = self.items.get(&key).map_or(at, |item| item.create_revision);
        let change =
            Change::Put(KeyValue { key: key.clone(), value: value.clone(), mod_revision: at, lease });
        self.insert(key, Item { value, create_revision, mod_revision: at, lease });
        change
    }

    /// Puts an item as it is.
    pub(crate) fn insert(&mut self, key: String, item: Item) {
        self.forget(&key);
        match item.lease {
            Some(lease) => {
                self.ephemeral_bytes += cost(&key, &item.value);
                self.by_lease.entry(lease).or_default().insert(key.clone());
            }
            None => self.durable_bytes += cost(&key, &item.value),
        }
        self.items.insert(key, item);
    }

    fn forget(&mut self, key: &str) -> bool {
        let Some(item) = self.items.remove(key) else { return false };
        let bytes = cost(key, &item.value);
        match item.lease {
            Some(lease) => {
                self.ephemeral_bytes = self.ephemeral_bytes.saturating_sub(bytes);
                if let Some(keys) = self.by_lease.get_mut(&lease) {
                    keys.remove(key);
                    if keys.is_empty() {
                        self.by_lease.remove(&lease);
                    }
                }
            }
            None => self.durable_bytes = self.durable_bytes.saturating_sub(bytes),
        }
        true
    }

    pub(crate) fn delete(&mut self, key: &str) -> Option<Change> {
        self.forget(key).then(|| Change::Delete { key: key.to_owned() })
    }

    pub(crate) fn delete_prefix(&mut self, prefix: &str) -> Vec<Change> {
        let keys: Vec<String> = self.range(prefix).map(|(key, _)| key.to_owned()).collect();
        keys.iter().filter_map(|key| self.delete(key)).collect()
    }

    pub(crate) fn delete_lease(&mut self, lease: u64) -> Vec<Change> {
        let keys: Vec<String> = self.keys_of(lease).map(str::to_owned).collect();
        keys.iter().filter_map(|key| self.delete(key)).collect()
    }

    pub(crate) fn delete_ephemeral(&mut self) -> Vec<Change> {
        let leases: Vec<u64> = self.by_lease.keys().copied().collect();
        leases.into_iter().flat_map(|lease| self.delete_lease(lease)).collect()
    }

    /// The changes that make `self` equal to `to`.
    pub(crate) fn difference(&self, to: &Kv) -> Vec<Change> {
        let mut changes: Vec<Change> = self
            .items
            .keys()
            .filter(|key| !to.items.contains_key(*key))
            .map(|key| Change::Delete { key: key.clone() })
            .collect();
        for (key, item) in &to.items {
            if self.items.get(key) != Some(item) {
                changes.push(Change::Put(key_value(key, item)));
            }
        }
        changes
    }
}

/// A key as it travels.
pub fn key_value(key: &str, item: &Item) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: item.value.clone(),
        mod_revision: item.mod_revision,
        lease: item.lease,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_by_kind_and_come_back() {
        let mut kv = Kv::default();
        kv.put("/a".into(), "1".into(), None, Revision(1));
        kv.put("/b".into(), "22".into(), Some(7), Revision(2));
        assert_eq!(kv.durable_bytes(), 3 + ITEM_OVERHEAD_BYTES);
        assert_eq!(kv.ephemeral_bytes(), 4 + ITEM_OVERHEAD_BYTES);
        kv.put("/a".into(), "333".into(), None, Revision(3));
        assert_eq!(kv.durable_bytes(), 5 + ITEM_OVERHEAD_BYTES);
        assert_eq!(
            kv.get("/a").map(|i| (i.create_revision, i.mod_revision)),
            Some((Revision(1), Revision(3)))
        );
        assert_eq!(kv.delete_lease(7), vec![Change::Delete { key: "/b".into() }]);
        kv.delete_prefix("/");
        assert_eq!((kv.durable_bytes(), kv.ephemeral_bytes(), kv.len()), (0, 0, 0));
    }

    #[test]
    fn a_difference_turns_one_state_into_the_other() {
        let mut old = Kv::default();
        let mut new = Kv::default();
        old.put("/gone".into(), "0".into(), None, Revision(1));
        old.put("/same".into(), "0".into(), None, Revision(1));
        new.put("/same".into(), "0".into(), None, Revision(1));
        new.put("/new".into(), "0".into(), None, Revision(2));
        let changes = old.difference(&new);
        assert_eq!(changes.len(), 2);
        assert!(new.difference(&new.clone()).is_empty());
    }

    #[test]
    fn a_prefix_range_stops_at_its_end() {
        let mut kv = Kv::default();
        for key in ["/a", "/ab", "/b", "/a/1"] {
            kv.put(key.into(), "0".into(), None, Revision(1));
        }
        let keys: Vec<_> = kv.range("/a").map(|(k, _)| k).collect();
        assert_eq!(keys, ["/a", "/a/1", "/ab"]);
    }
}
