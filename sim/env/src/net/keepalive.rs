//! What a kernel asks a silent peer. A connection whose other end is gone without a word, or cannot be reached
//! any more, ends by itself even if nothing is sent on it.

use super::{BROKEN_RESET, BROKEN_TIMEOUT, NetAction};
use crate::clock::{Nanos, SEC};
use crate::universe::{Action, Universe};

// The times that `net-tcp` sets on its sockets.

/// From one answered question to the next.
const IDLE_NS: Nanos = 3 * SEC;
/// From an unanswered question to the next.
const INTERVAL_NS: Nanos = SEC;
/// Unanswered questions that end a connection.
const PROBES: u32 = 3;

impl Universe {
    /// Begins to ask on behalf of an end.
    pub(super) fn net_keep_alive(&mut self, index: usize, end: usize) {
        let ask = NetAction::KeepAlive { conn: index, end, missed: 0 };
        self.at(self.now + IDLE_NS, Action::Net(ask));
    }

    /// A question is due.
    pub(super) fn net_ask(&mut self, index: usize, end: usize, missed: u32) {
        let Some(conn) = self.net.conns.get(&index).filter(|conn| conn.is_open(end)) else { return };
        let Some((here, there)) = conn.hosts(end) else { return };
        let answer_under_way = conn.has_queued(1 - end);
        let powered = self.hosts.get(there).is_some_and(|host| host.powered);
        if !powered || self.net.blocked(here, there) || self.net.blocked(there, here) {
            if missed >= PROBES {
                return self.net_break(index, end, BROKEN_TIMEOUT);
            }
            let again = NetAction::KeepAlive { conn: index, end, missed: missed + 1 };
            return self.at(self.now + INTERVAL_NS, Action::Net(again));
        }
        if !conn.is_open(1 - end) && !answer_under_way {
            // "There is no such connection here."
            return self.net_break(index, end, BROKEN_RESET);
        }
        self.net_keep_alive(index, end);
    }
}
