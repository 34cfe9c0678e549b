//! Which object is in which slot, in memory: 32 bytes per slot and about 6 of hash table.
//!
//! Slots live in a chunked array. The hash tables hold slot numbers only; there are many small ones, so that
//! growing one moves some thousand entries and not millions: 14,336 in a slice whose objects have one block each,
//! about a millisecond. (pool, image) pairs are interned: their number
//! is small against that of objects.

use hashbrown::HashTable;
use wire::{Epoch, ImageId, ObjectId, PoolId, Version};

use crate::page::SlotState;
use crate::seg::Seg;
use crate::types::Presence;

/// Objects per hash table when the slice is fully written: 79 % of the 1024 buckets that hold up to 896,
/// three standard deviations below their limit.
const OBJECTS_PER_SHARD: u64 = 809;
/// End of the free list.
const NIL: u32 = u32::MAX;
const STATE_SHIFT: u32 = 30;
const IMAGE_MASK: u32 = (1 << STATE_SHIFT) - 1;
/// State of a slot that is purged and may not be reused before the next checkpoint.
const PURGED: u32 = 3;

/// What is known of a slot without its page.
#[derive(Clone, Copy, Default)]
struct Meta {
    /// State in the two upper bits, interned (pool, image) in the others.
    image: u32,
    /// Bit i: block i is written.
    mask: u32,
    index: u64,
    epoch: u64,
    /// Free and purged slots: the next one in their list.
    counter: u64,
}

#[derive(Clone, Copy, Default)]
struct Image {
    pool: u32,
    image: u64,
    slots: u64,
}

/// A list of slots through `Meta::counter`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotList {
    head: u32,
    tail: u32,
}

impl Default for SlotList {
    fn default() -> Self {
        Self { head: NIL, tail: NIL }
    }
}

pub(crate) struct Index {
    slots: Seg<Meta>,
    shards: Vec<HashTable<u32>>,
    /// Objects that a hash table makes room for when it gets its first.
    shard_room: usize,
    images: Vec<Image>,
    images_free: Vec<u32>,
    by_image: HashTable<u32>,
    free: SlotList,
    objects: u64,
    tombstones: u64,
    data_blocks: u64,
}

/// Finaliser of splitmix64: every input bit reaches every output bit. A fixed function: the order of
/// everything must be the same in every run, and digests on both ends of a connection.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn hash_image(pool: u32, image: u64) -> u64 {
    mix(mix(image).wrapping_add(u64::from(pool)).wrapping_add(0x9e37_79b9_7f4a_7c15))
}

fn hash_object(image: u32, index: u64) -> u64 {
    mix(index.wrapping_add(u64::from(image).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

impl Index {
    /// For a slice of `blocks` blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        let shards = (blocks / wire::OBJECT_BLOCKS as u64).div_ceil(OBJECTS_PER_SHARD).max(1);
        Self {
            slots: Seg::new(),
            shards: (0..shards).map(|_| HashTable::new()).collect(),
            shard_room: 0,
            images: Vec::new(),
            images_free: Vec::new(),
            by_image: HashTable::new(),
            free: SlotList::default(),
            objects: 0,
            tombstones: 0,
            data_blocks: 0,
        }
    }

    /// Slots there are, free ones included.
    pub(crate) fn slots(&self) -> u32 {
        self.slots.len() as u32
    }
    pub(crate) fn objects(&self) -> u64 {
        self.objects
    }
    pub(crate) fn tombstones(&self) -> u64 {
        self.tombstones
    }
    pub(crate) fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.bytes()
            + self.shards.iter().map(|s| s.allocation_size() + size_of::<HashTable<u32>>()).sum::<usize>()
            + self.images.capacity() * size_of::<Image>()
            + self.by_image.allocation_size()
    }

    fn find_image(&self, pool: u32, image: u64) -> Option<u32> {
        self.by_image
            .find(hash_image(pool, image), |id| {
                self.images.get(*id as usize).is_some_and(|i| i.image == image && i.pool == pool)
            })
            .copied()
    }

    /// Interns a pair; `None` when 2^30 pairs are there (no slice holds that many objects).
    fn intern(&mut self, pool: u32, image: u64) -> Option<u32> {
        if let Some(id) = self.find_image(pool, image) {
            if let Some(entry) = self.images.get_mut(id as usize) {
                entry.slots += 1;
            }
            return Some(id);
        }
        let entry = Image { pool, image, slots: 1 };
        let id = match self.images_free.pop() {
            Some(id) => id,
            None => {
                let id = u32::try_from(self.images.len()).ok().filter(|id| *id < IMAGE_MASK)?;
                self.images.push(Image::default());
                id
            }
        };
        if let Some(to) = self.images.get_mut(id as usize) {
            *to = entry;
        }
        let images = &self.images;
        self.by_image.insert_unique(hash_image(pool, image), id, |id| {
            images.get(*id as usize).map_or(0, |i| hash_image(i.pool, i.image))
        });
        Some(id)
    }

    fn release_image(&mut self, id: u32) {
        let Some(entry) = self.images.get_mut(id as usize) else { return };
        entry.slots = entry.slots.saturating_sub(1);
        if entry.slots == 0 {
            let hash = hash_image(entry.pool, entry.image);
            if let Ok(found) = self.by_image.find_entry(hash, |other| *other == id) {
                found.remove();
                self.images_free.push(id);
            }
        }
    }

    fn shard_of(&self, hash: u64) -> usize {
        ((((hash >> 20) & 0xffff_ffff) * self.shards.len() as u64) >> 32) as usize
    }

    /// The slot of an object, live or tombstone.
    #[inline]
    pub(crate) fn find(&self, object: ObjectId) -> Option<u32> {
        self.find_in(self.find_image(object.pool.0, object.image.0)?, object)
    }

    /// The same for one object of several: `last` is the one before and its image's number, and becomes this one's.
    #[inline]
    pub(crate) fn find_next(&self, last: &mut Option<(ObjectId, u32)>, object: ObjectId) -> Option<u32> {
        let image = match *last {
            Some((before, image)) if (before.pool, before.image) == (object.pool, object.image) => image,
            _ => self.find_image(object.pool.0, object.image.0)?,
        };
        *last = Some((object, image));
        self.find_in(image, object)
    }

    #[inline]
    fn find_in(&self, image: u32, object: ObjectId) -> Option<u32> {
        let hash = hash_object(image, object.index);
        self.shards
            .get(self.shard_of(hash))?
            .find(hash, |slot| {
                self.slots
                    .get(*slot as usize)
                    .is_some_and(|m| m.index == object.index && m.image & IMAGE_MASK == image)
            })
            .copied()
    }

    /// The object a slot holds or (purged) held; `None` for a free one.
    pub(crate) fn object(&self, slot: u32) -> Option<ObjectId> {
        let meta = self.slots.get(slot as usize)?;
        if meta.image >> STATE_SHIFT == 0 {
            return None;
        }
        let image = self.images.get((meta.image & IMAGE_MASK) as usize)?;
        Some(ObjectId { pool: PoolId(image.pool), image: ImageId(image.image), index: meta.index })
    }

    pub(crate) fn presence(&self, slot: u32) -> Presence {
        let Some(meta) = self.slots.get(slot as usize) else { return Presence::Absent };
        let version = Version { epoch: Epoch(meta.epoch), counter: meta.counter };
        match meta.image >> STATE_SHIFT {
            1 => Presence::Live(version),
            2 => Presence::Tombstone(version),
            _ => Presence::Absent,
        }
    }

    /// Written blocks.
    #[inline]
    pub(crate) fn mask(&self, slot: u32) -> u32 {
        self.slots.get(slot as usize).map_or(0, |m| m.mask)
    }

    /// Takes a slot for a new object: a free one, else a new one. `None` when there can be no more.
    pub(crate) fn insert(&mut self, object: ObjectId) -> Option<u32> {
        let slot = if self.free.head == NIL {
            if self.slots.len() as u64 >= crate::page::PAGES_MAX * crate::page::SLOTS_PER_PAGE as u64 {
                return None;
            }
            self.slots.push(Meta::default()) as u32
        } else {
            let slot = self.free.head;
            let next = self.slots.get(slot as usize).map_or(u64::from(NIL), |m| m.counter);
            self.free.head = next as u32;
            if self.free.head == NIL {
                self.free.tail = NIL;
            }
            slot
        };
        self.place(slot, object)?;
        Some(slot)
    }

    /// Puts an object into a given slot, not yet in the hash table's care before.
    pub(crate) fn place(&mut self, slot: u32, object: ObjectId) -> Option<()> {
        self.slots.grow(slot as usize + 1);
        let image = self.intern(object.pool.0, object.image.0)?;
        if let Some(meta) = self.slots.get_mut(slot as usize) {
            *meta =
                Meta { image: image | 1 << STATE_SHIFT, mask: 0, index: object.index, epoch: 0, counter: 0 };
        }
        let hash = hash_object(image, object.index);
        let shard = self.shard_of(hash);
        let slots = &self.slots;
        if let Some(shard) = self.shards.get_mut(shard) {
            let hash_of = |slot: &u32| {
                slots.get(*slot as usize).map_or(0, |m| hash_object(m.image & IMAGE_MASK, m.index))
            };
            if self.shard_room > 0 && shard.capacity() == 0 {
                shard.reserve(self.shard_room, hash_of);
            }
            shard.insert_unique(hash, slot, hash_of);
        }
        self.objects += 1;
        Some(())
    }

    /// Sets what a live or tombstone slot is now.
    pub(crate) fn set(&mut self, slot: u32, state: SlotState, version: Version, mask: u32) {
        let Some(meta) = self.slots.get_mut(slot as usize) else { return };
        let was = meta.image >> STATE_SHIFT;
        let now = state as u32;
        self.tombstones = self.tombstones + u64::from(now == 2) - u64::from(was == 2);
        self.data_blocks =
            self.data_blocks + u64::from(mask.count_ones()) - u64::from(meta.mask.count_ones());
        meta.image = meta.image & IMAGE_MASK | now << STATE_SHIFT;
        meta.mask = mask;
        meta.epoch = version.epoch.0;
        meta.counter = version.counter;
    }

    /// Takes an object out of the index; the slot keeps its identity in `list` until the list is released.
    pub(crate) fn remove(&mut self, slot: u32, list: &mut SlotList) {
        let Some(meta) = self.slots.get(slot as usize).copied() else { return };
        let image = meta.image & IMAGE_MASK;
        let hash = hash_object(image, meta.index);
        let shard = self.shard_of(hash);
        if let Some(shard) = self.shards.get_mut(shard)
            && let Ok(found) = shard.find_entry(hash, |other| *other == slot)
        {
            found.remove();
            self.objects -= 1;
        }
        self.tombstones -= u64::from(meta.image >> STATE_SHIFT == 2);
        self.data_blocks -= u64::from(meta.mask.count_ones());
        if let Some(meta) = self.slots.get_mut(slot as usize) {
            meta.image = image | PURGED << STATE_SHIFT;
            meta.mask = 0;
        }
        self.link(slot, list);
    }

    fn link(&mut self, slot: u32, list: &mut SlotList) {
        if let Some(meta) = self.slots.get_mut(slot as usize) {
            meta.counter = u64::from(list.head);
        }
        if list.head == NIL {
            list.tail = slot;
        }
        list.head = slot;
    }

    /// Gives up to `max` purged slots back for reuse. `true` when the list is empty.
    pub(crate) fn release(&mut self, list: &mut SlotList, max: usize) -> bool {
        for _ in 0..max {
            let slot = list.head;
            if slot == NIL {
                break;
            }
            let Some(meta) = self.slots.get_mut(slot as usize) else { break };
            list.head = meta.counter as u32;
            let image = meta.image & IMAGE_MASK;
            *meta = Meta::default();
            self.release_image(image);
            self.add_free(slot);
        }
        if list.head == NIL {
            list.tail = NIL;
        }
        list.head == NIL
    }

    /// Makes a slot without an identity available.
    pub(crate) fn add_free(&mut self, slot: u32) {
        self.slots.grow(slot as usize + 1);
        let mut free = self.free;
        self.link(slot, &mut free);
        self.free = free;
    }

    /// About so many objects will come in one go: hash tables are made for them at once. All of them hold about the
    /// same, and would else all grow at the same time.
    pub(crate) fn expect(&mut self, objects: u32) {
        let each = objects as usize / self.shards.len().max(1);
        // Three standard deviations more than the mean.
        self.shard_room = each + 3 * each.isqrt();
    }

    /// Makes slots up to `slots` exist (free, in no list: for open).
    pub(crate) fn grow(&mut self, slots: u32) {
        self.slots.grow(slots as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(image: u64, index: u64) -> ObjectId {
        ObjectId { pool: PoolId(1), image: ImageId(image), index }
    }

    #[test]
    fn finds_what_was_put_and_forgets_what_was_removed() {
        let mut index = Index::new(1 << 22);
        let version = Version { epoch: Epoch(3), counter: 9 };
        for i in 0..20_000 {
            let slot = index.insert(object(i % 7, i)).unwrap();
            index.set(slot, SlotState::Live, version, 0xff);
        }
        assert_eq!((index.objects(), index.data_blocks()), (20_000, 160_000));
        let mut list = SlotList::default();
        for i in (0..20_000).step_by(2) {
            let slot = index.find(object(i % 7, i)).unwrap();
            assert_eq!(index.object(slot), Some(object(i % 7, i)));
            index.remove(slot, &mut list);
            assert_eq!(index.find(object(i % 7, i)), None);
            assert_eq!(index.presence(slot), Presence::Absent);
        }
        assert!(!index.release(&mut list, 100));
        assert!(index.release(&mut list, usize::MAX));
        for i in 0..10_000 {
            assert!(index.insert(object(99, i)).unwrap() < 20_000, "freed slots are used first");
        }
        assert_eq!(index.slots(), 20_000);
        assert!((0..20_000).all(|i| index.find(object(i % 7, i)).is_some() == (i % 2 == 1)));
    }
}
