//! Timers of one core: a binary heap, ordered by time and then by the order of setting.

use crate::env::{Mono, Token};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Room from the start, so that ordinary use never grows the heap.
const TIMERS_RESERVED: usize = 1024;

pub(crate) struct TimerHeap {
    heap: BinaryHeap<Reverse<(Mono, u64, Token)>>,
    set: u64,
}

impl TimerHeap {
    pub(crate) fn new() -> Self {
        Self { heap: BinaryHeap::with_capacity(TIMERS_RESERVED), set: 0 }
    }

    pub(crate) fn set(&mut self, at: Mono, token: Token) {
        self.set += 1;
        self.heap.push(Reverse((at, self.set, token)));
    }

    /// When the next one is due.
    pub(crate) fn next_due(&self) -> Option<Mono> {
        self.heap.peek().map(|Reverse((at, _, _))| *at)
    }

    /// Takes one whose time has come.
    pub(crate) fn pop_due(&mut self, now: Mono) -> Option<Token> {
        if self.next_due()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, _, token))| token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_ones_come_in_order_of_time_then_of_setting() {
        let mut timers = TimerHeap::new();
        for (at, token) in [(30, 1), (10, 2), (20, 3), (10, 4)] {
            timers.set(Mono(at), Token(token));
        }
        let mut due = Vec::new();
        while let Some(token) = timers.pop_due(Mono(20)) {
            due.push(token.0);
        }
        assert_eq!(due, [2, 4, 3]);
        assert_eq!(timers.next_due(), Some(Mono(30)));
    }
}
