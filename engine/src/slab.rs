//! A table whose slots are reused, with keys that notice reuse.
//!
//! A key is 56 bits: slot number and the slot's turn. The top byte of a ticket or request number stays
//! free for whoever hands keys out, so that one 64-bit number says whose it is.

use reactor::prefetch_all;

/// A slot and its turn. `Key::NONE` never names a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key(u64);

/// Bits of a key.
pub(crate) const KEY_BITS: u32 = 56;
const TURN_MASK: u32 = (1 << 24) - 1;

impl Key {
    pub(crate) const NONE: Key = Key((1 << KEY_BITS) - 1);

    fn new(slot: u32, turn: u32) -> Self {
        Self(u64::from(turn) << 32 | u64::from(slot))
    }

    fn slot(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }

    fn turn(self) -> u32 {
        (self.0 >> 32) as u32 & TURN_MASK
    }

    /// This key with a class in the top byte.
    pub(crate) fn tagged(self, class: u8) -> u64 {
        u64::from(class) << KEY_BITS | self.0
    }

    /// The class and the key of a tagged number.
    pub(crate) fn untag(number: u64) -> (u8, Key) {
        ((number >> KEY_BITS) as u8, Key(number & Self::NONE.0))
    }

    pub(crate) fn is_none(self) -> bool {
        self == Self::NONE
    }
}

struct Slot<T> {
    turn: u32,
    value: Option<T>,
}

/// The table. It grows to the bound its user keeps and never shrinks: no allocation in steady state.
pub(crate) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    /// Room for `capacity` values without an allocation.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { slots: Vec::with_capacity(capacity), free: Vec::with_capacity(capacity) }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn insert(&mut self, value: T) -> Key {
        if let Some(at) = self.free.pop()
            && let Some(slot) = self.slots.get_mut(at as usize)
        {
            slot.value = Some(value);
            return Key::new(at, slot.turn);
        }
        let at = self.slots.len() as u32;
        self.slots.push(Slot { turn: 0, value: Some(value) });
        Key::new(at, 0)
    }

    /// The `nth` value from here on will be inserted soon, if none is removed: its place is asked of memory.
    #[inline]
    pub(crate) fn coming(&self, nth: usize) {
        let Some(free) = self.free.len().checked_sub(nth + 1).and_then(|at| self.free.get(at)) else {
            return;
        };
        if let Some(slot) = self.slots.get(*free as usize) {
            prefetch_all(slot);
        }
    }

    #[inline]
    pub(crate) fn get(&self, key: Key) -> Option<&T> {
        let slot = self.slots.get(key.slot())?;
        if slot.turn == key.turn() { slot.value.as_ref() } else { None }
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.slot())?;
        if slot.turn == key.turn() { slot.value.as_mut() } else { None }
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.slot())?;
        if slot.turn != key.turn() {
            return None;
        }
        let value = slot.value.take()?;
        slot.turn = (slot.turn + 1) & TURN_MASK;
        self.free.push(key.slot() as u32);
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(at, slot)| Some((Key::new(at as u32, slot.turn), slot.value.as_ref()?)))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Key, &mut T)> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter_map(|(at, slot)| Some((Key::new(at as u32, slot.turn), slot.value.as_mut()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_slot_is_not_reached_by_its_old_key() {
        let mut slab = Slab::with_capacity(2);
        let first = slab.insert(1);
        assert_eq!(slab.remove(first), Some(1));
        let second = slab.insert(2);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&2));
        assert_eq!(slab.len(), 1);
        assert!(slab.get(Key::NONE).is_none());
    }

    #[test]
    fn tags_survive() {
        let mut slab = Slab::with_capacity(1);
        let key = slab.insert(());
        slab.remove(key);
        let key = slab.insert(());
        assert_eq!(Key::untag(key.tagged(0xa5)), (0xa5, key));
    }
}
