//! What is under way on the primary: client operations, and per object the queues that order them.
//!
//! Operations of one object form two singly linked lists through the operation table: *in flight* (a
//! version is assigned, copies are being written) and *waiting* (for an overlapping write, a recovery of
//! the object, or whatever waits before them). An object without either has no entry at all, so that a
//! read of a quiet object touches one hash slot.

use crate::slab::{Key, Slab};
use reactor::{ConnId, IoBuf, Mono};
use store::Presence;
use wire::{BlockCrcs, Header, ObjectId, Version};

/// Bit of an operation's `pending` for the primary's own store.
pub(crate) const LOCAL: u32 = 1 << 31;
/// Bit of an operation's `pending` that holds its answer back while its PG is not active.
pub(crate) const HOLD: u32 = 1 << 30;
/// Most members beside the primary: bits 0..16 of `pending`. More copies than that are refused.
pub(crate) const MEMBERS_MAX: usize = 16;

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OpKind {
    Read,
    Write,
    Zero,
    Delete,
    /// Forgetting a tombstone everywhere; the primary's own idea, no client waits for it.
    Purge,
}

/// Where an operation stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// In its PG's queue: the PG is not active, or not yet at the operation's epoch.
    Queued,
    /// In its object's waiting list.
    Waiting,
    /// A read at the store, or a change with a version on its way to all copies.
    Started,
    /// A change whose PG was lost meanwhile: only the own store's completion is still awaited.
    Orphan,
}

/// Who wants an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Client {
    pub(crate) conn: ConnId,
}

/// One operation.
pub(crate) struct Op {
    pub(crate) kind: OpKind,
    pub(crate) stage: Stage,
    pub(crate) pg: Key,
    /// The object's entry; `NONE` for a read that did not have to wait.
    pub(crate) obj: Key,
    /// `None` once answered, or when the client has gone.
    pub(crate) client: Option<Client>,
    /// As requested; its epoch follows the PG's through contiguous epochs.
    pub(crate) header: Header,
    pub(crate) crcs: BlockCrcs,
    pub(crate) payload: Option<IoBuf>,
    /// Bit i = block i of the object is touched.
    pub(crate) mask: u32,
    /// Assigned when a change starts.
    pub(crate) version: Version,
    /// Who has not yet got it durably: member bits, `LOCAL`, `HOLD`.
    pub(crate) pending: u32,
    /// Order of start: resends follow it.
    pub(crate) seq: u64,
    pub(crate) arrived: Mono,
    /// Next in the object's list.
    pub(crate) next: Key,
    /// Reads that came back corrupt so far.
    pub(crate) retries: u8,
    /// Index of the own slice, once started.
    pub(crate) at: usize,
    /// A change sent again that was carried out before: it is only answered.
    pub(crate) done_before: bool,
}

impl Op {
    pub(crate) fn object(&self) -> ObjectId {
        self.header.object
    }
}

/// What keeps an object for itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exclusive {
    /// Nothing: operations may start.
    Free,
    /// A recovery (`recovery::Heal`) of this object.
    Heal(Key),
    /// A purge of its tombstone.
    Purge,
    /// A scrub (`scrub::Check`) compares its copies.
    Scrub(Key),
}

/// A queue of operations: head and tail of a list through the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue {
    pub(crate) head: Key,
    tail: Key,
}

impl Default for Queue {
    fn default() -> Self {
        Self { head: Key::NONE, tail: Key::NONE }
    }
}

impl Queue {
    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    pub(crate) fn push(&mut self, ops: &mut Slab<Op>, key: Key) {
        if let Some(op) = ops.get_mut(key) {
            op.next = Key::NONE;
        }
        match ops.get_mut(self.tail) {
            Some(last) if !self.tail.is_none() => last.next = key,
            _ => self.head = key,
        }
        self.tail = key;
    }

    pub(crate) fn push_front(&mut self, ops: &mut Slab<Op>, key: Key) {
        if let Some(op) = ops.get_mut(key) {
            op.next = self.head;
        }
        if self.head.is_none() {
            self.tail = key;
        }
        self.head = key;
    }

    pub(crate) fn pop(&mut self, ops: &mut Slab<Op>) -> Option<Key> {
        if self.head.is_none() {
            return None;
        }
        let key = self.head;
        self.head = ops.get(key).map_or(Key::NONE, |op| op.next);
        if self.head.is_none() {
            self.tail = Key::NONE;
        }
        Some(key)
    }

    /// Takes one out of the middle that has left the table already; `next` is what followed it. Lists
    /// are as short as one object's concurrency.
    pub(crate) fn unlink(&mut self, ops: &mut Slab<Op>, key: Key, next: Key) {
        let mut before = Key::NONE;
        let mut at = self.head;
        while !at.is_none() {
            if at == key {
                match ops.get_mut(before) {
                    Some(op) if !before.is_none() => op.next = next,
                    _ => self.head = next,
                }
                if self.tail == key {
                    self.tail = before;
                }
                return;
            }
            before = at;
            at = ops.get(at).map_or(Key::NONE, |op| op.next);
        }
    }

    /// The keys, first to last.
    pub(crate) fn iter<'a>(&self, ops: &'a Slab<Op>) -> impl Iterator<Item = (Key, &'a Op)> {
        let mut at = self.head;
        std::iter::from_fn(move || {
            let op = ops.get(at)?;
            let key = at;
            at = op.next;
            Some((key, op))
        })
    }
}

/// An object with something under way.
pub(crate) struct Obj {
    pub(crate) id: ObjectId,
    pub(crate) pg: Key,
    pub(crate) inflight: Queue,
    /// Union of the in-flight changes' blocks.
    pub(crate) inflight_mask: u32,
    pub(crate) waiting: Queue,
    pub(crate) exclusive: Exclusive,
    /// What the primary's store holds once everything started is through.
    pub(crate) presence: Presence,
}

impl Obj {
    /// Nothing is under way: the entry can go.
    pub(crate) fn is_idle(&self) -> bool {
        self.inflight.is_empty() && self.waiting.is_empty() && self.exclusive == Exclusive::Free
    }
}

/// Blocks `block .. block + blocks` as a mask; all of the object for a change of the whole object.
pub(crate) fn range_mask(block: u32, blocks: u16) -> u32 {
    if block >= 32 {
        return 0;
    }
    let ones = if blocks >= 32 { u32::MAX } else { (1u32 << blocks) - 1 };
    ones << block
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::FrameKind;

    fn op(ops: &mut Slab<Op>) -> Key {
        ops.insert(Op {
            kind: OpKind::Read,
            stage: Stage::Waiting,
            pg: Key::NONE,
            obj: Key::NONE,
            client: None,
            header: Header::new(FrameKind::Read, 0),
            crcs: BlockCrcs::default(),
            payload: None,
            mask: 0,
            version: Version::default(),
            pending: 0,
            seq: 0,
            arrived: Mono(0),
            next: Key::NONE,
            retries: 0,
            at: 0,
            done_before: false,
        })
    }

    #[test]
    fn queues_keep_order_through_removals_at_every_place() {
        for removed in 0..4 {
            let mut ops = Slab::with_capacity(4);
            let mut queue = Queue::default();
            let mut keys: Vec<Key> = (0..4).map(|_| op(&mut ops)).collect();
            for key in &keys[1..] {
                queue.push(&mut ops, *key);
            }
            queue.push_front(&mut ops, keys[0]);
            let gone = keys.remove(removed);
            let next = ops.remove(gone).unwrap().next;
            queue.unlink(&mut ops, gone, next);
            let last = op(&mut ops);
            queue.push(&mut ops, last);
            keys.push(last);
            let seen: Vec<Key> = std::iter::from_fn(|| queue.pop(&mut ops)).collect();
            assert_eq!(seen, keys, "removed {removed}");
            assert!(queue.is_empty());
        }
    }

    #[test]
    fn masks_cover_exactly_the_range() {
        assert_eq!(range_mask(0, 32), u32::MAX);
        assert_eq!(range_mask(31, 1), 1 << 31);
        assert_eq!(range_mask(4, 2), 0b11_0000);
        assert_eq!(range_mask(40, 1), 0);
    }
}
