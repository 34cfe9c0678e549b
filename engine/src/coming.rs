//! What the events of a batch will need is asked of memory before the first of them is handled.
//!
//! The payloads of a batch pass through the processor's caches and leave little else in them. Met one event after the
//! other, each operation, PG and read would be waited for; asked for together, they come while others are on their
//! way. Nothing is decided here, and nothing changes.

use crate::core::{DataCore, TOKEN_SLICES};
use crate::slab::{KEY_BITS, Key};
use reactor::{DiskOp, Event, Token, prefetch};
use std::collections::VecDeque;

/// Events looked at: with more, what comes first could be gone again when the last is handled.
const COMING_MAX: usize = 64;

impl DataCore {
    pub(crate) fn look_ahead(&self, events: &VecDeque<Event>) {
        let mut news = 0;
        for event in events.iter().take(COMING_MAX) {
            match event {
                Event::DiskDone { token, op: DiskOp::Read { buf, .. }, .. } => {
                    if let Some(byte) = buf.as_slice().first() {
                        prefetch(byte);
                    }
                    self.read_coming(*token);
                }
                Event::Frame { frame, .. } => {
                    if let Some(primary) = self.pg_key(frame.header.pg).and_then(|pg| self.primary(pg)) {
                        prefetch(primary);
                    }
                    self.ops.coming(news);
                    news += 1;
                }
                _ => {}
            }
        }
    }

    /// A device read of a client's read has ended.
    fn read_coming(&self, token: Token) {
        let at = ((token.0 >> KEY_BITS) as u8).checked_sub(TOKEN_SLICES);
        let store = at.and_then(|at| self.store_ref(usize::from(at)));
        let Some(ticket) = store.and_then(|store| store.coming(token)) else { return };
        let Some(op) = self.ops.get(Key::untag(ticket).1) else { return };
        prefetch(&op.header);
        prefetch(&op.crcs);
        prefetch(&op.arrived);
        if let Some(primary) = self.primary(op.pg) {
            prefetch(primary);
        }
    }
}
