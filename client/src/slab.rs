//! A bounded slab: slots are recycled, keys of freed slots are recognised as stale.

/// "No slot", as a link between slots.
pub(crate) const NIL: u32 = u32::MAX;

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// At most `max` values in slots that keep their memory.
pub(crate) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    max: usize,
}

impl<T> Slab<T> {
    pub(crate) fn new(max: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), max }
    }

    /// How many values fit beside those there are.
    pub(crate) fn room(&self) -> usize {
        self.max - self.len()
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Stores a value; `None` when the slab is full.
    pub(crate) fn insert(&mut self, value: T) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            let slot = self.slots.get_mut(index as usize)?;
            slot.value = Some(value);
            return Some(index);
        }
        if self.slots.len() >= self.max {
            return None;
        }
        self.slots.push(Slot { generation: 1, value: Some(value) });
        // Freeing must not allocate: keep room for every slot in the free list.
        self.free.reserve(self.slots.len());
        Some((self.slots.len() - 1) as u32)
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<T> {
        let slot = self.slots.get_mut(index as usize)?;
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        Some(value)
    }

    #[inline]
    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        self.slots.get(index as usize)?.value.as_ref()
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.slots.get_mut(index as usize)?.value.as_mut()
    }

    /// A key that names this slot's present value and no later one.
    pub(crate) fn key(&self, index: u32) -> u64 {
        let generation = self.slots.get(index as usize).map_or(0, |slot| slot.generation);
        u64::from(generation) << 32 | u64::from(index)
    }

    /// The slot of a key, unless its value has gone since.
    pub(crate) fn index_of(&self, key: u64) -> Option<u32> {
        let index = key as u32;
        let slot = self.slots.get(index as usize)?;
        (slot.value.is_some() && slot.generation == (key >> 32) as u32).then_some(index)
    }

    /// All values with their slots, in slot order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(i, slot)| Some((i as u32, slot.value.as_ref()?)))
    }

    /// All values with their slots, in slot order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        self.slots.iter_mut().enumerate().filter_map(|(i, slot)| Some((i as u32, slot.value.as_mut()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_recycled_and_stale_keys_are_seen() {
        let mut slab = Slab::new(2);
        let a = slab.insert('a').unwrap();
        let b = slab.insert('b').unwrap();
        assert_eq!(slab.insert('c'), None);
        let key = slab.key(a);
        assert_eq!(slab.index_of(key), Some(a));
        assert_eq!(slab.remove(a), Some('a'));
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.index_of(key), None);
        assert_eq!(slab.insert('c'), Some(a));
        assert_eq!(slab.index_of(key), None);
        assert_ne!(slab.key(a), key);
        assert_eq!((slab.room(), slab.get(b)), (0, Some(&'b')));
        assert_eq!(slab.iter().map(|(_, v)| *v).collect::<String>(), "cb");
    }
}
