//! The simulated network and scheduler: order, partitions, resets, crashes, pauses, and same seed same
//! history.

mod probe;

use probe::{Seen, address, closings, frames, pair, probe, run, world};
use reactor::{CloseReason, ConnId};
use simenv::clock::{MS, SEC};

#[test]
fn same_seed_same_history() {
    let history = |seed| {
        let (mut u, ..) = pair(seed, 50);
        u.net.options.reset_ppm = 5_000;
        u.net.options.loss_ppm = 5_000;
        run(&mut u, SEC);
        (u.trace.hash(), u.delivered)
    };
    assert_eq!(history(1), history(1));
    assert_ne!(history(1), history(2));
    assert!(history(1).1 > 1000);
}

#[test]
fn frames_of_a_connection_keep_their_order_and_an_old_one_may_race_a_new_one() {
    let mut raced = 0;
    for seed in 0..60 {
        let (mut u, server, client) = pair(seed, 100);
        u.net.options.reset_ppm = 2_000;
        u.net.options.loss_ppm = 20_000;
        run(&mut u, 3 * SEC);
        let seen = frames(&server);
        let mut last: Vec<(ConnId, u64)> = Vec::new();
        for (conn, request) in &seen {
            match last.iter_mut().find(|(id, _)| id == conn) {
                Some((_, previous)) => {
                    assert!(*request > *previous, "seed {seed}: {request} after {previous}");
                    *previous = *request;
                }
                None => last.push((*conn, *request)),
            }
        }
        assert!(!closings(&client).is_empty());
        raced += u32::from(seen.windows(2).any(|w| w[1].0 < w[0].0));
        let log = server.borrow();
        for (at, event) in log.seen.iter().enumerate() {
            if let Seen::Closed(conn, _) = event {
                let after = log.seen.iter().skip(at + 1);
                assert!(!after.into_iter().any(|s| matches!(s, Seen::Frame(c, _) if c == conn)));
            }
        }
    }
    assert!(raced > 3, "no old connection ever delivered after a new one: {raced}");
}

#[test]
fn dead_processes_refuse_and_unreachable_hosts_time_out() {
    let mut u = world(1, 2);
    let client = probe(&mut u, 1, Some(address(0)), 1000, 0);
    run(&mut u, 100 * MS);
    assert!(closings(&client).iter().all(|reason| *reason == CloseReason::Refused));
    assert!(closings(&client).len() > 5);

    u.kill(1);
    u.set_blocked(1, 0, true);
    let client = probe(&mut u, 1, Some(address(0)), 1000, 0);
    run(&mut u, 900 * MS);
    assert_eq!(closings(&client), vec![]);
    run(&mut u, 300 * MS);
    assert_eq!(closings(&client), vec![CloseReason::TimedOut]);
}

#[test]
fn an_asymmetric_partition_holds_one_direction_and_loses_nothing_when_it_heals() {
    for seed in 0..20 {
        // Slow enough that what the blocked direction holds stays below the bound of its queue.
        let (mut u, server, client) = pair(seed, 200);
        run(&mut u, 100 * MS);
        u.set_blocked(0, 1, true);
        run(&mut u, 50 * MS);
        let (sent, answered) = (frames(&server).len(), frames(&client).len());
        run(&mut u, 500 * MS);
        assert!(frames(&server).len() > sent + 1000, "the open direction goes on");
        assert_eq!(frames(&client).len(), answered, "the blocked one is silent");
        u.set_blocked(0, 1, false);
        run(&mut u, 500 * MS);
        let requests: Vec<u64> = frames(&client).iter().map(|(_, request)| *request).collect();
        assert!(requests.len() > 4000, "seed {seed}: {}", requests.len());
        assert!(requests.windows(2).all(|w| w[1] == w[0] + 1), "seed {seed}: a gap or a repetition");
    }
}

#[test]
fn a_connection_that_only_one_end_knows_is_noticed_without_a_word() {
    for seed in 0..20 {
        let (mut u, server, client) = pair(seed, 1000);
        run(&mut u, 100 * MS);
        // The client gives up what it cannot get through; the server, with nothing to say, is not told.
        u.set_blocked(1, 0, true);
        run(&mut u, 5500 * MS);
        assert!(closings(&client).contains(&CloseReason::Broken(110)), "seed {seed}");
        assert_eq!(closings(&server), vec![], "seed {seed}");
        u.set_blocked(1, 0, false);
        run(&mut u, 4 * SEC);
        assert_eq!(closings(&server), vec![CloseReason::Broken(104)], "seed {seed}: its kernel asks");
    }
}

#[test]
fn unacknowledged_bytes_end_a_connection_on_the_sender_only() {
    let (mut u, server, client) = pair(4, 1000);
    run(&mut u, 100 * MS);
    u.set_blocked(1, 0, true);
    run(&mut u, 5500 * MS);
    assert_eq!(closings(&client).first(), Some(&CloseReason::Broken(110)));
    assert_eq!(closings(&server), vec![], "the other side is half-open");
}

#[test]
fn send_queues_are_bounded() {
    let (mut u, _server, client) = pair(5, 1000);
    u.net.options.send_queue_frames = 16;
    run(&mut u, 50 * MS);
    u.set_blocked(1, 0, true);
    run(&mut u, 200 * MS);
    assert!(client.borrow().seen.contains(&Seen::Refused));
}

#[test]
fn a_power_loss_tells_nobody_and_the_reboot_resets() {
    let (mut u, _server, client) = pair(6, 1000);
    run(&mut u, 50 * MS);
    u.power_off(0, &[]);
    run(&mut u, 2 * SEC);
    assert_eq!(closings(&client), vec![], "no end was sent");
    u.power_on(0);
    run(&mut u, SEC);
    assert_eq!(closings(&client).first(), Some(&CloseReason::Broken(104)));
    assert!(closings(&client).contains(&CloseReason::Refused), "nothing listens after the reboot");
}

#[test]
fn a_killed_process_ends_its_connections() {
    for seed in 0..20 {
        let (mut u, _server, client) = pair(seed, 1000);
        run(&mut u, 50 * MS);
        u.kill(0);
        run(&mut u, 100 * MS);
        let first = closings(&client).first().copied();
        assert!(matches!(first, Some(CloseReason::Peer | CloseReason::Broken(104))), "{first:?}");
    }
}

#[test]
fn a_paused_process_does_nothing_and_then_finds_everything_waiting() {
    let (mut u, server, client) = pair(8, 1000);
    run(&mut u, 50 * MS);
    u.pause(0);
    run(&mut u, MS);
    let before = frames(&server).len();
    run(&mut u, 2 * SEC);
    assert_eq!(frames(&server).len(), before);
    assert_eq!(closings(&client), vec![], "the kernel keeps the connection");
    u.resume(0);
    run(&mut u, SEC);
    assert!(frames(&server).len() > before + 2500);
}

#[test]
fn a_receiver_without_memory_shuts_its_window() {
    let mut u = world(9, 2);
    let server = probe(&mut u, 0, None, 0, 0);
    run(&mut u, 2 * MS);
    let client = probe(&mut u, 1, Some(address(0)), 200, 64 * 1024);
    run(&mut u, SEC);
    assert!(frames(&server).len() > 1000 && frames(&client).len() > 1000);
}
