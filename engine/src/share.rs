//! Background work beside clients: shared by weight, in the loop's own order of work, without sleeping.
//!
//! Every client operation that ends earns the background some credit; recovery and scrub spend it. A core
//! without clients gives the background everything. So the background takes a fixed part of a busy core's
//! work, however fast the machine is, and its pieces lie between client operations, a few apart.

use crate::config::{BACKGROUND_CREDIT_MAX_BYTES, BACKGROUND_SHARE, CLIENT_IDLE_MS, CLIENT_OP_COST_BYTES};
use reactor::Mono;

/// What the background may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Turn {
    /// No client is being served: as much as its own bounds allow.
    Alone,
    /// The next piece, beside clients.
    Beside,
    /// Nothing before more client operations have ended, or this moment has come without one.
    Wait(Mono),
}

/// The account of one core.
pub(crate) struct Share {
    /// In bytes; negative after a piece larger than what had been earned.
    credit: i64,
    /// When clients count as gone.
    idle_at: Mono,
}

impl Share {
    pub(crate) fn new() -> Self {
        Self { credit: 0, idle_at: Mono(0) }
    }

    /// A client operation of so many bytes has ended.
    #[inline]
    pub(crate) fn earn(&mut self, now: Mono, bytes: u64) {
        let (part, whole) = BACKGROUND_SHARE;
        let earned = (CLIENT_OP_COST_BYTES + bytes) * part / whole;
        self.credit = self.credit.saturating_add_unsigned(earned).min(BACKGROUND_CREDIT_MAX_BYTES);
        self.idle_at = now.plus_ms(CLIENT_IDLE_MS);
    }

    pub(crate) fn turn(&self, now: Mono) -> Turn {
        if now >= self.idle_at {
            Turn::Alone
        } else if self.credit > 0 {
            Turn::Beside
        } else {
            Turn::Wait(self.idle_at)
        }
    }

    /// A piece of background work of so many bytes begins.
    pub(crate) fn spend(&mut self, now: Mono, bytes: u64) {
        if now >= self.idle_at {
            // Nobody is owed what nobody wanted.
            self.credit = 0;
        } else {
            self.credit = self.credit.saturating_sub_unsigned(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_background_gets_its_share_of_a_busy_core_and_all_of_an_idle_one() {
        let mut share = Share::new();
        let mut now = Mono(1_000_000_000);
        assert_eq!(share.turn(now), Turn::Alone);
        let (mut client, mut background) = (0, 0u64);
        for op in 0..10_000 {
            now = now.plus_ns(100_000);
            let bytes = if op % 3 == 0 { 131_072 } else { 4_096 };
            share.earn(now, bytes);
            client += CLIENT_OP_COST_BYTES + bytes;
            while share.turn(now) == Turn::Beside {
                share.spend(now, 50_000);
                background += 50_000;
            }
        }
        let (part, whole) = BACKGROUND_SHARE;
        let fair = client * part / whole;
        assert!(background.abs_diff(fair) <= 50_000 + BACKGROUND_CREDIT_MAX_BYTES as u64);
        let Turn::Wait(until) = share.turn(now) else { panic!("it has spent all") };
        assert_eq!(share.turn(until), Turn::Alone);
    }

    #[test]
    fn what_is_not_used_does_not_pile_up() {
        let mut share = Share::new();
        let now = Mono(1_000_000_000);
        (0..1_000_000).for_each(|_| share.earn(now, 4_096));
        let mut pieces = 0;
        while share.turn(now) == Turn::Beside {
            share.spend(now, 131_072);
            pieces += 1;
        }
        assert_eq!(pieces, BACKGROUND_CREDIT_MAX_BYTES / 131_072 + 1);
    }
}
