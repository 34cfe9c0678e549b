//! The ordering rule: overlapping operations are performed in the order of their submission.
//!
//! Every part under way is a member of one bucket, chosen by its object, in order of submission. A new part
//! counts the members before it that it conflicts with and is held back until as many have finished. Two
//! reads never conflict. Nothing allocates: the lists run through the parts themselves.

use crate::part::Part;
use crate::slab::{NIL, Slab};
use wire::ObjectId;

/// Buckets: at full depth (`PARTS_MAX`) two parts each on average, at fio's depth 128 nearly always one.
const BUCKETS: usize = 4096;

#[derive(Clone, Copy)]
struct Bucket {
    head: u32,
    tail: u32,
}

pub(crate) struct OrderTable {
    buckets: Box<[Bucket]>,
}

fn bucket_of(object: ObjectId) -> usize {
    // Fibonacci hashing: neighbouring objects land far apart, and the top bits are the well mixed ones.
    let key = object.index ^ object.image.0.rotate_left(40);
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as usize % BUCKETS
}

impl OrderTable {
    pub(crate) fn new() -> Self {
        Self { buckets: vec![Bucket { head: NIL, tail: NIL }; BUCKETS].into_boxed_slice() }
    }

    /// Takes up a new part behind all others and sets how many it has to wait for.
    pub(crate) fn insert(&mut self, parts: &mut Slab<Part>, index: u32) {
        let Some(part) = parts.get(index) else { return };
        let Some(bucket) = self.buckets.get_mut(bucket_of(part.object)) else { return };
        let mut waits = 0;
        let mut at = bucket.head;
        while let Some(other) = parts.get(at) {
            waits += u32::from(part.conflicts(other));
            at = other.next;
        }
        let tail = bucket.tail;
        bucket.tail = index;
        if bucket.head == NIL {
            bucket.head = index;
        }
        if let Some(last) = parts.get_mut(tail) {
            last.next = index;
        }
        if let Some(part) = parts.get_mut(index) {
            (part.prev, part.next, part.waits) = (tail, NIL, waits);
        }
    }

    /// Takes out a finished part and appends to `released` those that now wait for nobody.
    pub(crate) fn remove(&mut self, parts: &mut Slab<Part>, index: u32, released: &mut Vec<u32>) {
        let Some(part) = parts.remove(index) else { return };
        let Some(bucket) = self.buckets.get_mut(bucket_of(part.object)) else { return };
        match parts.get_mut(part.prev) {
            Some(before) => before.next = part.next,
            None => bucket.head = part.next,
        }
        match parts.get_mut(part.next) {
            Some(behind) => behind.prev = part.prev,
            None => bucket.tail = part.prev,
        }
        let mut at = part.next;
        while let Some(later) = parts.get_mut(at) {
            let next = later.next;
            if part.conflicts(later) && later.waits > 0 {
                later.waits -= 1;
                if later.waits == 0 {
                    released.push(at);
                }
            }
            at = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::part::IoKind;
    use proptest::prelude::*;
    use wire::{ImageId, PgId, PoolId};

    fn part(kind: IoKind, index: u64, block: u8, blocks: u8) -> Part {
        let object = ObjectId { pool: PoolId(1), image: ImageId(1), index };
        Part::new(0, kind, object, PgId::default(), (block, blocks), 0)
    }

    proptest! {
        /// Whatever finishes in whatever order: a part is free exactly when no earlier, unfinished part
        /// conflicts with it.
        #[test]
        fn a_part_waits_for_exactly_its_earlier_conflicts(
            ops in proptest::collection::vec((any::<bool>(), 0u64..3, 0u8..32, 1u8..8, any::<u16>()), 1..120)
        ) {
            let mut parts = Slab::new(200);
            let mut table = OrderTable::new();
            let mut live: Vec<u32> = Vec::new();
            let mut released = Vec::new();
            for (write, object, block, blocks, pick) in ops {
                let kind = if write { IoKind::Write } else { IoKind::Read };
                let index = parts.insert(part(kind, object, block, blocks.min(32 - block))).unwrap();
                table.insert(&mut parts, index);
                live.push(index);
                if pick % 3 == 0 {
                    let free: Vec<u32> =
                        live.iter().copied().filter(|i| parts.get(*i).unwrap().waits == 0).collect();
                    prop_assert!(!free.is_empty(), "the oldest never waits");
                    let done = free[usize::from(pick / 3) % free.len()];
                    released.clear();
                    table.remove(&mut parts, done, &mut released);
                    live.retain(|i| *i != done);
                    for i in &released {
                        prop_assert_eq!(parts.get(*i).unwrap().waits, 0);
                    }
                }
                for (place, i) in live.iter().enumerate() {
                    let this = parts.get(*i).unwrap();
                    let due = live[..place].iter().filter(|e| this.conflicts(parts.get(**e).unwrap())).count();
                    prop_assert_eq!(this.waits as usize, due);
                }
            }
        }
    }
}
