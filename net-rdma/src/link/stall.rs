//! How long a peer may owe something and do nothing.

use super::Link;
use reactor::Mono;

/// Nothing from the peer or the device for so long, although something is owed: the connection ends, as a TCP
/// connection does whose bytes nobody acknowledges.
pub(crate) const STALL_MS: u64 = 5_000;

/// Whether the peer of a link still does what it owes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stall {
    /// It owes nothing.
    Nothing,
    /// It does, and there is time.
    Waiting,
    /// Its time is over.
    Over,
}

/// What was seen of a link, and when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    progress: u64,
    since: Mono,
}

impl Patience {
    pub(crate) fn new(now: Mono) -> Self {
        Self { progress: 0, since: now }
    }

    /// The time counts from now on.
    pub(crate) fn restart(&mut self, now: Mono) {
        self.since = now;
    }

    /// Looks at the link.
    pub(crate) fn look(&mut self, link: &Link, now: Mono) -> Stall {
        let awaits = link.awaits_peer();
        if !awaits || link.progress() != self.progress {
            (self.progress, self.since) = (link.progress(), now);
        }
        match awaits {
            false => Stall::Nothing,
            true if now.since(self.since) >= STALL_MS * 1_000_000 => Stall::Over,
            true => Stall::Waiting,
        }
    }
}
