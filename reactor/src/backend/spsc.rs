//! A bounded ring between two threads: one pushes, one pops, neither waits.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Keeps the two ends' counters on cache lines of their own.
#[repr(align(128))]
struct Padded(AtomicUsize);

struct Shared<T> {
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
    /// Pops so far. Written by the consumer alone.
    head: Padded,
    /// Pushes so far. Written by the producer alone.
    tail: Padded,
}

// SAFETY: a slot is touched by the producer only while `tail - head` says it is free and by the consumer
// only while it says it is filled; the release stores and acquire loads of the counters hand it over.
// `T: Send` because values cross threads.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn slot(&self, count: usize) -> *mut MaybeUninit<T> {
        // The length is a power of two, so the mask is always inside.
        self.slots.get(count & (self.slots.len() - 1)).map_or(std::ptr::null_mut(), UnsafeCell::get)
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        let tail = self.tail.0.load(Ordering::Acquire);
        let mut head = self.head.0.load(Ordering::Acquire);
        while head != tail {
            // SAFETY: both ends are gone, and slots from head to tail hold values not yet popped.
            unsafe { (*self.slot(head)).assume_init_drop() };
            head = head.wrapping_add(1);
        }
    }
}

/// The pushing end.
pub(crate) struct Producer<T> {
    shared: Arc<Shared<T>>,
    tail: usize,
    head_seen: usize,
}

/// The popping end.
pub(crate) struct Consumer<T> {
    shared: Arc<Shared<T>>,
    head: usize,
    tail_seen: usize,
}

/// A ring with room for `capacity` values, rounded up to a power of two.
pub(crate) fn ring<T>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    let slots =
        (0..capacity.max(1).next_power_of_two()).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect();
    let shared =
        Arc::new(Shared { slots, head: Padded(AtomicUsize::new(0)), tail: Padded(AtomicUsize::new(0)) });
    (Producer { shared: shared.clone(), tail: 0, head_seen: 0 }, Consumer { shared, head: 0, tail_seen: 0 })
}

impl<T> Producer<T> {
    /// Pushes, or gives the value back when the ring is full.
    pub(crate) fn push(&mut self, value: T) -> Result<(), T> {
        let room = self.shared.slots.len();
        if self.tail.wrapping_sub(self.head_seen) == room {
            self.head_seen = self.shared.head.0.load(Ordering::Acquire);
            if self.tail.wrapping_sub(self.head_seen) == room {
                return Err(value);
            }
        }
        // SAFETY: fewer than `room` values are inside, so this slot is free; only this end, borrowed
        // mutably, writes it, and the consumer reads it only after the release store below.
        unsafe { (*self.shared.slot(self.tail)).write(value) };
        self.tail = self.tail.wrapping_add(1);
        self.shared.tail.0.store(self.tail, Ordering::Release);
        Ok(())
    }
}

impl<T> Consumer<T> {
    /// Pops the oldest value.
    pub(crate) fn pop(&mut self) -> Option<T> {
        if self.head == self.tail_seen {
            self.tail_seen = self.shared.tail.0.load(Ordering::Acquire);
            if self.head == self.tail_seen {
                return None;
            }
        }
        // SAFETY: the acquire load showed that the producer filled this slot; it will not touch it again
        // until the release store below, and the value is read out exactly once.
        let value = unsafe { (*self.shared.slot(self.head)).assume_init_read() };
        self.head = self.head.wrapping_add(1);
        self.shared.head.0.store(self.head, Ordering::Release);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn order_and_fullness() {
        let (mut tx, mut rx) = ring(4);
        for i in 0..4 {
            tx.push(i).unwrap();
        }
        assert_eq!(tx.push(4), Err(4));
        assert_eq!(rx.pop(), Some(0));
        tx.push(4).unwrap();
        assert_eq!((0..5).map_while(|_| rx.pop()).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(rx.pop(), None);
    }

    #[test]
    fn values_left_inside_are_dropped_once() {
        let counted = Arc::new(());
        let (mut tx, mut rx) = ring(8);
        for _ in 0..6 {
            tx.push(counted.clone()).unwrap();
        }
        drop(rx.pop());
        assert_eq!(Arc::strong_count(&counted), 6);
        drop(tx);
        assert_eq!(Arc::strong_count(&counted), 6);
        drop(rx);
        assert_eq!(Arc::strong_count(&counted), 1);
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the ring is about threads")]
    fn two_threads_lose_and_reorder_nothing() {
        const COUNT: u64 = 1_000_000;
        let (mut tx, mut rx) = ring::<Box<u64>>(16);
        let producer = std::thread::spawn(move || {
            for i in 0..COUNT {
                let mut value = Box::new(i);
                while let Err(back) = tx.push(value) {
                    value = back;
                    std::thread::yield_now();
                }
            }
        });
        for i in 0..COUNT {
            let value = loop {
                match rx.pop() {
                    Some(value) => break value,
                    None => std::thread::yield_now(),
                }
            };
            assert_eq!(*value, i);
        }
        producer.join().unwrap();
        assert!(rx.pop().is_none());
    }
}
