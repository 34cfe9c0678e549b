//! What a slice holds of each placement group, in short: digests, counts, tombstones, and which objects
//! changed last.
//!
//! Two copies of a group are compared by their *digests*: objects fall into `DIGEST_BUCKETS` buckets by their
//! identity, and a bucket's digest is the XOR of a 64-bit hash of (object, version, tombstone or not) over all
//! its objects. Equal digests mean equal objects at equal versions, but for one chance in 2^64; a change costs
//! two hashes, and order does not matter. Digests are not on disk: after opening, one pass over the index in
//! bounded steps makes them (`track_step`), and every mutation keeps them.
//!
//! The *history* says which slots changed last. It is a hint for finding a difference quickly, never a proof:
//! the digests say when everything has been found.

use std::collections::{BTreeSet, VecDeque};

use wire::{ObjectId, PoolId};

use crate::index::mix;
use crate::store::SliceStore;
use crate::types::Presence;

/// Buckets of a group's digests: one bit each in a word, half a KiB per copy of a group, and a single lost
/// object makes two copies compare a 64th of what they hold.
pub const DIGEST_BUCKETS: usize = 64;
/// Changes that a slice remembers when nothing else is said: 8 bytes each, half a MiB at most.
pub const HISTORY_CHANGES: usize = 65_536;

/// Objects of one group that `history` returns at most: their look-up takes about two milliseconds.
pub const HINTS_MAX: usize = 8_192;

/// Digests of the objects of one placement group, by bucket.
pub type Digests = [u64; DIGEST_BUCKETS];
/// Which of `count` groups of its pool an object belongs to.
pub type GroupOf = fn(ObjectId, u32) -> u32;

/// What a slice holds of one placement group, mutations not yet durable included.
#[derive(Debug)]
pub struct Group {
    /// See the module.
    pub digests: Digests,
    /// Objects that exist.
    pub objects: u64,
    /// Objects that were deleted and not purged yet.
    pub tombstones: BTreeSet<ObjectId>,
}

impl Group {
    const fn new() -> Self {
        Self { digests: [0; DIGEST_BUCKETS], objects: 0, tombstones: BTreeSet::new() }
    }

    fn change(&mut self, object: ObjectId, before: Presence, after: Presence) {
        if let Some(digest) = self.digests.get_mut(bucket_of(object)) {
            *digest ^= digest_of(object, before) ^ digest_of(object, after);
        }
        match before {
            Presence::Absent => {}
            Presence::Live(_) => self.objects = self.objects.saturating_sub(1),
            Presence::Tombstone(_) if matches!(after, Presence::Tombstone(_)) => {}
            Presence::Tombstone(_) => {
                self.tombstones.remove(&object);
            }
        }
        match after {
            Presence::Absent => {}
            Presence::Live(_) => self.objects += 1,
            Presence::Tombstone(_) if matches!(before, Presence::Tombstone(_)) => {}
            Presence::Tombstone(_) => {
                self.tombstones.insert(object);
            }
        }
    }
}

/// What a group without any object is.
static EMPTY: Group = Group::new();

/// Both ends of a comparison must hash alike: the wire protocol names these functions.
fn identity(object: ObjectId) -> u64 {
    let image = mix(object.image.0.wrapping_add(u64::from(object.pool.0) << 40) ^ 0x2545_f491_4f6c_dd1d);
    mix(image.wrapping_add(object.index).wrapping_add(0x9e37_79b9_7f4a_7c15))
}

/// The bucket of an object.
#[inline]
pub fn bucket_of(object: ObjectId) -> usize {
    (identity(object) >> 58) as usize
}

/// What an object adds to its bucket's digest; zero when there is none.
#[inline]
pub fn digest_of(object: ObjectId, presence: Presence) -> u64 {
    let (version, kind) = match presence {
        Presence::Absent => return 0,
        Presence::Live(version) => (version, 0),
        Presence::Tombstone(version) => (version, 1),
    };
    let epoch = mix(identity(object) ^ version.epoch.0.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mix(epoch.wrapping_add(version.counter << 1 | kind))
}

/// The groups of one pool.
struct TrackedPool {
    pool: PoolId,
    count: u32,
    of: GroupOf,
    /// Slots before it are counted; `u32::MAX`: all are.
    cursor: u32,
    /// Objects of the log that are in the history already; `None`: all are.
    seeded: Option<usize>,
    groups: Vec<Option<Box<Group>>>,
}

impl TrackedPool {
    fn change(&mut self, group: u32, object: ObjectId, before: Presence, after: Presence) {
        if let Some(entry) = self.groups.get_mut(group as usize) {
            entry.get_or_insert_with(|| Box::new(Group::new())).change(object, before, after);
        }
    }
}

/// Everything this module keeps for a slice.
pub(crate) struct Groups {
    pools: Vec<TrackedPool>,
    /// Slots that changed and their groups, oldest first.
    history: VecDeque<(u32, u32)>,
    history_max: usize,
}

impl Groups {
    pub(crate) fn new(history_max: usize) -> Self {
        Self { pools: Vec::new(), history: VecDeque::new(), history_max }
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        let groups = self.pools.iter().flat_map(|pool| pool.groups.iter().flatten());
        groups.map(|group| size_of::<Group>() + group.tombstones.len() * size_of::<ObjectId>()).sum::<usize>()
            + self.pools.iter().map(|pool| pool.groups.capacity() * 8).sum::<usize>()
            + self.history.capacity() * 8
    }

    fn at(&self, pool: PoolId) -> Option<&TrackedPool> {
        self.pools.iter().find(|tracked| tracked.pool == pool)
    }

    fn remember(&mut self, slot: u32, group: u32) {
        if self.history.back() == Some(&(slot, group)) || self.history_max == 0 {
            return;
        }
        if self.history.len() >= self.history_max {
            self.history.pop_front();
        }
        self.history.push_back((slot, group));
    }

    /// An object in `slot` has changed.
    #[inline]
    pub(crate) fn changed(&mut self, slot: u32, object: ObjectId, before: Presence, after: Presence) {
        let Some(pool) = self.pools.iter_mut().find(|tracked| tracked.pool == object.pool) else { return };
        let group = (pool.of)(object, pool.count);
        if slot < pool.cursor {
            pool.change(group, object, before, after);
        }
        self.remember(slot, group);
    }
}

impl SliceStore {
    /// Begins to keep account of a pool's groups, from scratch unless it is being kept for the same number
    /// of groups. `true` when there is a pass over the index to be made (`track_step`).
    pub fn track(&mut self, pool: PoolId, count: u32, of: GroupOf) -> bool {
        if self.groups.at(pool).is_some_and(|tracked| tracked.count == count) {
            return false;
        }
        self.groups.pools.retain(|tracked| tracked.pool != pool);
        let groups = (0..count).map(|_| None).collect();
        self.groups.pools.push(TrackedPool { pool, count, of, cursor: 0, seeded: Some(0), groups });
        true
    }

    /// Forgets pools that are not wanted any more.
    pub fn track_only(&mut self, wanted: impl Fn(PoolId) -> bool) {
        self.groups.pools.retain(|tracked| wanted(tracked.pool));
    }

    /// Goes on with the pass over the index, looking at no more than `max` slots; `true` when it is done for
    /// all pools.
    pub fn track_step(&mut self, max: u32) -> bool {
        let Some(at) = self.groups.pools.iter().position(|tracked| tracked.cursor != u32::MAX) else {
            return true;
        };
        if self.seed_step(at, max) {
            self.count_step(at, max);
        }
        self.groups.pools.iter().all(|tracked| tracked.cursor == u32::MAX)
    }

    /// Puts into the history what the log says: a process that has just opened the slice has no other. `true`
    /// when that is done.
    fn seed_step(&mut self, at: usize, max: u32) -> bool {
        let Some(pool) = self.groups.pools.get_mut(at) else { return true };
        let Some(from) = pool.seeded else { return true };
        let (id, count, of) = (pool.pool, pool.count, pool.of);
        let end = from.saturating_add(max as usize).min(self.active.objects());
        pool.seeded = (end < self.active.objects()).then_some(end);
        for head in from..end {
            if let Some(slot) = self.active.slot_at(head)
                && let Some(object) = self.index.object(slot).filter(|object| object.pool == id)
            {
                self.groups.remember(slot, of(object, count));
            }
        }
        end == from
    }

    fn count_step(&mut self, at: usize, max: u32) {
        let Some(pool) = self.groups.pools.get_mut(at) else { return };
        let end = pool.cursor.saturating_add(max.max(1)).min(self.index.slots());
        for slot in pool.cursor..end {
            let presence = self.index.presence(slot);
            if presence != Presence::Absent
                && let Some(object) = self.index.object(slot).filter(|object| object.pool == pool.pool)
            {
                pool.change((pool.of)(object, pool.count), object, Presence::Absent, presence);
            }
        }
        pool.cursor = if end < self.index.slots() { end } else { u32::MAX };
    }

    /// What the slice holds of a group; `None` while that is not known (see `track`).
    pub fn group(&self, pool: PoolId, group: u32) -> Option<&Group> {
        let tracked = self.groups.at(pool).filter(|tracked| tracked.cursor == u32::MAX)?;
        Some(tracked.groups.get(group as usize)?.as_deref().unwrap_or(&EMPTY))
    }

    /// Objects of a group that changed last, each once, the latest first, as far as remembered and up to
    /// `HINTS_MAX`. Some may
    /// have been removed, others may be missing.
    pub fn history(&self, pool: PoolId, group: u32) -> Vec<ObjectId> {
        let Some(tracked) = self.groups.at(pool) else { return Vec::new() };
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        for (slot, of) in self.groups.history.iter().rev() {
            if found.len() >= HINTS_MAX {
                break;
            }
            if *of == group
                && seen.insert(*slot)
                && let Some(object) = self.index.object(*slot)
                && object.pool == pool
                && (tracked.of)(object, tracked.count) == group
            {
                found.push(object);
            }
        }
        found
    }
}
