//! Peers that do not give what they owe, or take what they were not given.

use super::message::Immediate;
use super::*;
use crate::link::stall::STALL_MS;
use reactor::Mono;

/// What `transport` does at most so often, in milliseconds.
const LOOK_MS: u64 = 500;

/// The next posted receive of an end gets a message with this head, which the peer gives no credits with.
fn message(end: &mut End, kind: Kind, head: &[u8]) -> Result<Option<Signal>, LinkError> {
    let receive = end.receives.pop_front().expect("the end posts its receives again");
    write_to(receive.head, head);
    let imm = Immediate { kind, credits: 0, value: 0 }.encode();
    end.link.received(receive.slot, head.len() as u32, imm)
}

/// The device of an end has done all that it was asked for.
fn complete_all(end: &mut End) {
    while let Some(Posted { seq, .. }) = end.sends.pop_front() {
        end.link.completed(seq);
    }
}

fn large_head(end: &End) -> Vec<u8> {
    let Frame { header, crcs, .. } = frame(1, 8192, &end.arena);
    let mut head = Vec::new();
    header.encode_into(&crcs, &mut head);
    head.resize(HEAD_BYTES, 0);
    Descriptor { addr: 1 << 20, key: 1, len: 8192, window: 0 }.encode_into(&mut head);
    head
}

/// How many messages an end takes from a peer that returns nothing, until it refuses one.
fn taken_without_credits(kind: Kind, head: impl Fn(&End) -> Vec<u8>) -> Option<usize> {
    let mut end = End::new(4 << 20);
    end.fill();
    for count in 0..20 * usize::from(RECEIVES) * usize::from(RECEIVES) {
        let head = head(&end);
        match message(&mut end, kind, &head) {
            Ok(_) => {}
            Err(LinkError::Uncredited) => return Some(count),
            Err(other) => panic!("{other}"),
        }
        end.fill();
        complete_all(&mut end);
        end.deliver(false);
        end.fill();
    }
    None
}

#[test]
fn a_peer_that_sends_more_than_it_was_granted_is_refused() {
    // What it was granted: its first receives, and those told of with our credits, of which it returns none.
    let granted = usize::from(RECEIVES) + usize::from(RECEIVES) * usize::from(RECEIVES);
    for (kind, taken) in [
        (Kind::Credits, taken_without_credits(Kind::Credits, |_| Vec::new())),
        (Kind::Large, taken_without_credits(Kind::Large, large_head)),
    ] {
        let taken =
            taken.unwrap_or_else(|| panic!("{kind:?}: it may send for ever, and what it is owed grows"));
        assert!((usize::from(RECEIVES)..=granted).contains(&taken), "{kind:?}: {taken}");
    }
}

#[test]
fn a_peer_that_never_returns_credits_is_given_up_in_time_and_not_before() {
    let mut pair = Pair::new(4 << 20);
    let mut now = Mono(7);
    let mut patience = Patience::new(now);
    assert_eq!(patience.look(&pair.ends[0].link, now), Stall::Nothing);
    (0..2 * RECEIVES).for_each(|_| pair.take(Step::Push { side: 0, len: 100 }));
    pair.ends[0].fill();
    // The device has done its part; the peer takes everything and posts nothing again.
    let sent = pair.ends[0].sends.len();
    assert!(sent < usize::from(RECEIVES), "the last credit is kept");
    (0..sent).for_each(|_| {
        pair.perform(0, true);
    });
    let end = &mut pair.ends[0];
    end.fill();
    assert!(end.sends.is_empty(), "there is nothing to send with");
    for _ in 0..STALL_MS / LOOK_MS {
        assert_eq!(patience.look(&end.link, now), Stall::Waiting, "at {now:?}");
        now = now.plus_ms(LOOK_MS);
    }
    assert_eq!(patience.look(&end.link, now), Stall::Over);
}

#[test]
fn a_peer_that_never_says_done_is_given_up_and_one_that_is_slow_is_not() {
    for says_done in [false, true] {
        let mut pair = Pair::new(4 << 20);
        let mut now = Mono(7);
        let mut patience = Patience::new(now);
        KEYS.iter().for_each(|_| pair.take(Step::Push { side: 0, len: 8192 }));
        pair.ends[0].fill();
        while !pair.ends[0].sends.is_empty() {
            pair.perform(0, true);
        }
        // It reads everything at once.
        pair.ends[1].fill();
        KEYS.iter().for_each(|_| {
            pair.perform(1, true);
        });
        pair.ends[1].fill();
        assert_eq!(patience.look(&pair.ends[0].link, now), Stall::Waiting);
        // And says so of one payload every four seconds.
        let mut seen = Vec::new();
        for _ in KEYS {
            now = now.plus_ms(STALL_MS - 2 * LOOK_MS);
            if says_done {
                pair.perform(1, true);
                pair.ends[0].fill();
            }
            seen.push(patience.look(&pair.ends[0].link, now));
        }
        assert_eq!(seen.contains(&Stall::Over), !says_done, "{seen:?}");
    }
}
