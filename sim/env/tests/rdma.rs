//! Connections that go on over RDMA: what differs from TCP.

mod probe;

use probe::{Seen, Shared, address, closings, frames, mixed, pair, probe, run, world};
use reactor::CloseReason;
use simenv::clock::{MS, SEC};
use simenv::universe::Universe;

const EIO: CloseReason = CloseReason::Broken(5);
const ETIMEDOUT: CloseReason = CloseReason::Broken(110);
/// More than a switch takes that is not a late one.
const SWITCHED_NS: u64 = 20 * MS;

/// As `pair`; every connection switches, and this one has. One in `every` frames has a payload of `payload` bytes.
fn switched(seed: u64, period_us: u64, payload: usize, every: u64) -> (Universe, Shared, Shared) {
    for seed in seed * 1000.. {
        let mut u = world(seed, 2);
        u.net.options.rdma_ppm = 1_000_000;
        let server = probe(&mut u, 0, None, 0, 0);
        run(&mut u, 2 * MS);
        let client = mixed(&mut u, 1, Some(address(0)), period_us, payload, every);
        run(&mut u, SWITCHED_NS);
        // Some offers are late.
        if u.net.counters.switches == 1 {
            return (u, server, client);
        }
    }
    unreachable!("there are many seeds")
}

fn requests(log: &Shared) -> Vec<u64> {
    frames(log).iter().map(|(_, request)| *request).collect()
}

fn is_gapless(requests: &[u64]) -> bool {
    requests.iter().zip(1..).all(|(request, due)| *request == due)
}

#[test]
fn nothing_is_lost_or_overtaken_by_a_switch_at_any_moment() {
    for seed in 0..12 {
        let mut u = world(seed, 2);
        u.net.options.rdma_ppm = 1_000_000;
        let server = probe(&mut u, 0, None, 0, 0);
        run(&mut u, 2 * MS);
        let client = mixed(&mut u, 1, Some(address(0)), 200, 8192, 3);
        run(&mut u, 11 * SEC);
        assert_eq!(u.net.counters.switches, 1, "seed {seed}");
        assert!(u.net.counters.fetches > 100, "seed {seed}");
        assert!(is_gapless(&requests(&server)) && is_gapless(&requests(&client)), "seed {seed}");
        assert!(requests(&client).len() > 45_000, "seed {seed}: {}", requests(&client).len());
        assert_eq!(closings(&client), vec![], "seed {seed}");
    }
}

#[test]
fn without_a_share_nothing_switches_and_with_one_some_do() {
    let (mut u, ..) = pair(1, 1000);
    run(&mut u, SEC);
    assert_eq!(u.net.counters.switches, 0);
    let switches = |ppm| -> u64 {
        let one = |seed| {
            let mut u = world(seed, 2);
            u.net.options.rdma_ppm = ppm;
            probe(&mut u, 0, None, 0, 0);
            run(&mut u, 2 * MS);
            probe(&mut u, 1, Some(address(0)), 1000, 0);
            run(&mut u, 11 * SEC);
            u.net.counters.switches
        };
        (0..30).map(one).sum()
    };
    assert_eq!(switches(1_000_000), 30);
    assert!((5..25).contains(&switches(500_000)));
}

#[test]
fn same_seed_same_history() {
    let history = |seed| {
        let (mut u, ..) = switched(seed, 50, 8192, 2);
        u.net.options.reset_ppm = 2_000;
        u.net.options.credits_kept_ppm = 100_000;
        u.net.options.credits_kept_ns = 10 * MS;
        run(&mut u, SEC);
        assert!(u.net.counters.breaks > 3);
        (u.trace.hash(), u.delivered)
    };
    assert_eq!(history(1), history(1));
    assert_ne!(history(1), history(2));
}

#[test]
fn a_break_leaves_a_prefix_of_which_the_sender_knows_nothing() {
    let (mut unknown, mut told_failed) = (0, 0);
    for seed in 0..60 {
        let (mut u, server, client) = switched(seed, 20, 8192, 4);
        run(&mut u, 30 * MS);
        let before = requests(&server).len();
        assert!(u.reset_random_connection());
        run(&mut u, SEC / 2);
        let (first, _) = frames(&server)[0];
        let arrived: Vec<u64> =
            frames(&server).iter().filter(|(conn, _)| *conn == first).map(|(_, request)| *request).collect();
        assert!(is_gapless(&arrived), "seed {seed}: a gap");
        let (own, _) = frames(&client)[0];
        let answered = frames(&client).iter().filter(|(conn, _)| *conn == own).count();
        unknown += u32::from(arrived.len() > answered);
        told_failed += u32::from(closings(&client).contains(&EIO));
        assert!(arrived.len() >= before, "seed {seed}: what was taken is taken");
        assert!(
            !closings(&client).is_empty() && !closings(&server).is_empty(),
            "seed {seed}: both learn of it"
        );
    }
    assert!(unknown > 10, "what arrived was always answered: {unknown}");
    assert!(told_failed > 10, "{told_failed}");
}

#[test]
fn a_path_without_answers_breaks_long_before_tcp_would() {
    for (from, to) in [(1, 0), (0, 1)] {
        let (mut u, server, client) = switched(3, 1000, 0, 1);
        run(&mut u, 50 * MS);
        let before = requests(&server).len();
        u.set_blocked(from, to, true);
        run(&mut u, 400 * MS);
        assert_eq!(closings(&client), vec![]);
        run(&mut u, 400 * MS);
        assert_eq!(closings(&client).first(), Some(&EIO), "blocked from {from}");
        // Messages get there although no acknowledgement comes back, and no credits.
        let more = requests(&server).len() - before;
        assert!(if from == 1 { more < 5 } else { (30..=64).contains(&more) }, "{more} from {from}");
    }
}

#[test]
fn messages_land_in_a_stopped_process_as_far_as_it_has_receives_and_stay() {
    let (mut u, server, client) = switched(5, 1000, 0, 1);
    run(&mut u, 50 * MS);
    u.pause(0);
    run(&mut u, MS);
    let before = requests(&server).len();
    run(&mut u, 2 * SEC);
    assert!(u.net.counters.without_credits > 0, "credits are exhausted");
    assert_eq!(requests(&server).len(), before);
    // Their sender is gone without a word, and they are still there.
    u.power_off(1, &[]);
    u.resume(0);
    run(&mut u, SEC);
    let after = requests(&server);
    assert!(is_gapless(&after));
    assert!((30..=64).contains(&(after.len() - before)), "{}", after.len() - before);
    assert_eq!(closings(&client), vec![]);
}

#[test]
fn a_stopped_peer_that_owes_something_is_given_up_and_one_that_owes_nothing_is_not() {
    let (mut u, _server, client) = switched(6, 1000, 0, 1);
    run(&mut u, 50 * MS);
    u.pause(0);
    run(&mut u, 4500 * MS);
    assert_eq!(closings(&client), vec![]);
    run(&mut u, 1500 * MS);
    assert_eq!(closings(&client).first(), Some(&ETIMEDOUT));
    assert_eq!(u.net.counters.stalls, 1);

    // A second's worth of frames: all have landed.
    let (mut u, _server, client) = switched(6, 200_000, 0, 1);
    run(&mut u, 50 * MS);
    u.pause(0);
    run(&mut u, 9 * SEC);
    assert_eq!((closings(&client), u.net.counters.stalls), (vec![], 0));
}

#[test]
fn a_payload_that_was_not_fetched_dies_with_its_sender_and_with_it_all_behind() {
    let (mut u, server, _client) = switched(7, 1000, 8192, 10);
    run(&mut u, 50 * MS);
    u.pause(0);
    run(&mut u, 40 * MS);
    u.kill(1);
    u.resume(0);
    run(&mut u, SEC);
    let last = requests(&server).last().copied().unwrap_or(0);
    assert_eq!(last % 10, 9, "the next one has a payload: {last}");
    assert!(!closings(&server).is_empty(), "it waits for what does not come");
    assert!(is_gapless(&requests(&server)));

    // A stopped sender's memory can be read: it takes no process there.
    let (mut u, server, _client) = switched(7, 1000, 8192, 1);
    run(&mut u, 50 * MS);
    u.pause(0);
    run(&mut u, 20 * MS);
    let before = requests(&server).len();
    u.pause(1);
    u.resume(0);
    run(&mut u, SEC);
    assert!(requests(&server).len() > before + 10);
}

#[test]
fn a_sender_has_its_memory_back_when_all_was_fetched() {
    let (mut u, server, client) = switched(8, 5000, 128 * 1024, 1);
    run(&mut u, SEC);
    assert!(u.net.counters.fetches > 100);
    // A megabyte in all: without the windows' closing nothing more could have been sent.
    assert!(requests(&client).len() > 150, "{}", requests(&client).len());
    assert!(is_gapless(&requests(&server)));
}

#[test]
fn a_receiver_that_keeps_credits_holds_up_its_peer_and_loses_nothing() {
    let (mut u, server, client) = switched(9, 100, 4096, 2);
    u.net.options.credits_kept_ppm = 1_000_000;
    u.net.options.credits_kept_ns = 400 * MS;
    u.net.options.send_queue_frames = 32;
    run(&mut u, 5 * SEC);
    assert!(u.net.counters.without_credits > 0);
    assert!(client.borrow().seen.contains(&Seen::Refused), "nobody was told to wait");
    assert!(is_gapless(&requests(&server)) && closings(&client).is_empty());
    let slow = requests(&server).len();
    u.net.options.credits_kept_ppm = 0;
    run(&mut u, 2 * SEC);
    assert!(requests(&server).len() > slow + 10_000, "{} and {slow}", requests(&server).len());
}
