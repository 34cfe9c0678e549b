//! Disks that fail, vanish, hang or crawl: the slice goes, its node and its PG go on.

use super::cluster::*;
use crate::disk_health::{PROBES_MAX, READ_ERRORS_MAX, SLOW_OUT_TICKS};
use crate::{CoreMsg, DISK_PROBE_S, DISK_TIMEOUT_S};
use reactor::{ConnId, DiskError};
use wire::Status;

/// A clean PG with its primary on node 0, a client there, and an object of each byte up to `objects`.
fn clean(seed: u64, objects: u64) -> (Cluster, ConnId) {
    let mut cluster = Cluster::new(seed);
    cluster.lease_ms = 3_600_000;
    cluster.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = cluster.dial(0, 1);
    for index in 0..objects {
        cluster.put(conn, index, 0, index as u8);
    }
    (cluster, conn)
}

/// What the control core and the director do about node `bad`: the others take over under `primary`, and
/// serve everything that was written, and go on.
fn others_take_over(cluster: &mut Cluster, bad: usize, primary: usize, objects: u64) {
    let rest: Vec<usize> = (0..3).filter(|node| *node != bad).collect();
    cluster.decide(primary, &rest, &rest);
    let conn = cluster.dial(primary, 7);
    for index in 0..objects {
        assert_eq!(cluster.get(conn, index, 0), index as u8);
    }
    cluster.put(conn, 1000, 0, 0xcc);
    assert!(cluster.equal(&rest));
    // The node itself still answers.
    cluster.dial(bad, 9);
}

fn told_out_of_sync(cluster: &Cluster, from: usize, bad: usize) -> bool {
    cluster.told().iter().any(|(node, msg)| {
        *node == from && matches!(msg, CoreMsg::OutOfSync { slice: s, failed: true, .. } if *s == slice(bad))
    })
}

#[test]
fn a_write_error_on_a_member_takes_its_slice_out() {
    let (mut cluster, conn) = clean(1, 4);
    cluster.disk(2, |disk| disk.broken = Some(DiskError::Io(5)));
    let request = cluster.write(conn, 0, 1, 9);
    cluster.wait("the primary to notice", |c| told_out_of_sync(c, 0, 2));
    assert!(cluster.slice_failed(2).unwrap().contains("errno 5"));
    cluster.decide(0, &[0, 1], &[0, 1]);
    assert_eq!(cluster.status(request), Status::Ok);
    others_take_over(&mut cluster, 2, 0, 0);
}

#[test]
fn a_write_error_on_the_primary_takes_its_slice_out() {
    let (mut cluster, conn) = clean(2, 4);
    cluster.disk(0, |disk| disk.broken = Some(DiskError::Io(5)));
    let request = cluster.write(conn, 0, 1, 9);
    // The next primary says whether it took place.
    assert_eq!(cluster.status(request), Status::Unknown);
    assert!(cluster.slice_failed(0).is_some() && told_out_of_sync(&cluster, 0, 0));
    others_take_over(&mut cluster, 0, 1, 4);
}

#[test]
fn a_disk_that_fails_while_nobody_waits_for_it_is_noticed() {
    let (mut cluster, _) = clean(3, 200);
    cluster.disk(1, |disk| disk.broken = Some(DiskError::Io(5)));
    // What the store writes by itself, to settle or as a checkpoint.
    cluster.wait("its slice to go", |c| c.slice_failed(1).is_some());
    others_take_over(&mut cluster, 1, 0, 4);
}

#[test]
fn one_unreadable_read_is_answered_from_another_copy_and_many_take_the_slice_out() {
    let objects = u64::from(READ_ERRORS_MAX) * 2;
    let (mut cluster, conn) = clean(4, objects);
    cluster.disk(0, |disk| disk.unreadable = Some(DiskError::Io(5)));
    let mut asked = 0;
    while cluster.slice_failed(0).is_none() && asked < objects {
        let request = cluster.read(conn, asked, 0);
        let status = cluster.status(request);
        assert!(matches!(status, Status::Ok | Status::NotActive | Status::Io), "{status:?}");
        asked += 1;
    }
    cluster.wait("its slice to go", |c| c.slice_failed(0).is_some());
    assert!(cluster.slice_failed(0).unwrap().contains("too many read errors"));
    others_take_over(&mut cluster, 0, 1, objects);
}

#[test]
fn read_errors_do_not_take_out_the_only_copy() {
    let mut cluster = Cluster::new(5);
    cluster.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = cluster.dial(0, 1);
    let objects = u64::from(READ_ERRORS_MAX) * 3;
    (0..objects).for_each(|index| cluster.put(conn, index, 0, index as u8));
    cluster.decide(0, &[0], &[0]);
    let conn = cluster.dial(0, 2);
    cluster.disk(0, |disk| disk.unreadable = Some(DiskError::Io(5)));
    for index in 0..objects {
        let request = cluster.read(conn, index, 0);
        cluster.status(request);
    }
    cluster.pass(5_000);
    assert_eq!(cluster.slice_failed(0), None);
    // What can be read is served.
    cluster.disk(0, |disk| disk.unreadable = None);
    assert_eq!(cluster.get(conn, 3, 0), 3);
}

#[test]
fn a_disk_that_vanishes_goes_with_the_first_operation_that_says_so() {
    for (seed, node, error) in
        [(6, 0, DiskError::Gone), (7, 0, DiskError::Truncated), (8, 2, DiskError::Gone)]
    {
        let (mut cluster, conn) = clean(seed, 4);
        cluster.disk(node, |disk| disk.unreadable = Some(error));
        if node == 0 {
            let request = cluster.read(conn, 1, 0);
            assert_eq!(cluster.status(request), Status::NotActive);
        } else {
            cluster.disk(node, |disk| disk.broken = Some(error));
            cluster.write(conn, 1, 1, 1);
        }
        cluster.wait("its slice to go", |c| c.slice_failed(node).is_some());
        assert_eq!(cluster.slice_failed(node).unwrap(), error.to_string());
        others_take_over(&mut cluster, node, 1, 4);
    }
}

#[test]
fn an_idle_disk_that_vanishes_hangs_or_reads_nothing_is_noticed_within_a_bound() {
    let bound = DISK_PROBE_S + DISK_TIMEOUT_S.max(PROBES_MAX) + 3;
    for (seed, says) in [(21, "gone"), (22, "hangs"), (23, "does not answer")] {
        let (mut cluster, _) = clean(seed, 4);
        // What the stores still settle.
        cluster.pass(3_000);
        cluster.disk(1, |disk| match seed {
            21 => disk.broken = Some(DiskError::Gone),
            22 => disk.hangs = true,
            _ => disk.unreadable = Some(DiskError::Io(5)),
        });
        cluster.pass(u64::from(DISK_PROBE_S) * 1000 / 2);
        assert_eq!(cluster.slice_failed(1), None, "nobody has asked it anything");
        cluster.pass(u64::from(bound) * 1000 - u64::from(DISK_PROBE_S) * 1000 / 2);
        let why = cluster.slice_failed(1).unwrap_or_else(|| panic!("{says}: unnoticed after {bound} s"));
        assert!(why.contains(says), "{why}");
        others_take_over(&mut cluster, 1, 0, 4);
    }
}

#[test]
fn an_idle_disk_reads_one_block_per_interval_and_a_busy_one_nothing_beside_its_work() {
    let (mut cluster, conn) = clean(24, 4);
    cluster.pass(3_000);
    let ops = |c: &Cluster| c.nodes[&0].core.metrics.slices()[0].device_ops.get();
    let before = ops(&cluster);
    cluster.pass(u64::from(DISK_PROBE_S) * 10_000);
    let probes = ops(&cluster) - before;
    assert!((9..=10).contains(&probes), "{probes} operations in ten intervals");
    // A read now and then shows as much.
    assert_eq!(cluster.get(conn, 1, 0), 1);
    cluster.pass(1_000);
    let before = ops(&cluster);
    for _ in 0..20 {
        cluster.pass(u64::from(DISK_PROBE_S) * 500);
        assert_eq!(cluster.get(conn, 1, 0), 1);
    }
    cluster.pass(1_000);
    assert_eq!(ops(&cluster) - before, 20);
}

#[test]
fn a_members_disk_that_hangs_goes_after_the_timeout() {
    let (mut cluster, conn) = clean(9, 4);
    let begin = cluster.world.borrow().now;
    cluster.disk(1, |disk| disk.hangs = true);
    let request = cluster.write(conn, 0, 1, 9);
    cluster.wait("the primary to hear", |c| told_out_of_sync(c, 0, 1));
    let took_s = (cluster.world.borrow().now - begin) / 1_000_000_000;
    assert!((u64::from(DISK_TIMEOUT_S) - 1..=u64::from(DISK_TIMEOUT_S) + 3).contains(&took_s), "{took_s} s");
    assert!(cluster.slice_failed(1).unwrap().contains("hangs"));
    cluster.decide(0, &[0, 2], &[0, 2]);
    assert_eq!(cluster.status(request), Status::Ok);
}

#[test]
fn a_primarys_disk_that_hangs_goes_after_the_timeout_and_reads_and_writes_get_an_answer() {
    let (mut cluster, conn) = clean(10, 4);
    cluster.disk(0, |disk| disk.hangs = true);
    let requests = [cluster.write(conn, 0, 1, 9), cluster.read(conn, 2, 0), cluster.read(conn, 3, 0)];
    for (request, status) in requests.into_iter().zip([Status::Unknown, Status::NotActive, Status::NotActive])
    {
        assert_eq!(cluster.status(request), status);
    }
    assert!(cluster.slice_failed(0).unwrap().contains("hangs"));
    others_take_over(&mut cluster, 0, 2, 4);
    cluster.assert_idle(0);
    // It can stop although the disk never answers.
    cluster.tell(0, CoreMsg::Stop);
    cluster.wait("the core to stop", |c| {
        c.told().iter().any(|(node, msg)| *node == 0 && matches!(msg, CoreMsg::Stopped))
    });
}

#[test]
fn a_process_that_was_stopped_does_not_take_its_absence_for_a_hanging_disk() {
    let (mut cluster, conn) = clean(11, 4);
    for _ in 0..4 {
        let request = cluster.write(conn, 0, 1, 9);
        // The write is under way on every disk, and its process does not run for long.
        cluster.pass(0);
        cluster.paused.insert(1);
        cluster.pass(3_000 * u64::from(DISK_TIMEOUT_S));
        cluster.paused.remove(&1);
        cluster.status(request);
    }
    assert_eq!(cluster.slice_failed(1), None);
}

#[test]
fn a_disk_that_crawls_for_long_goes_and_one_that_pauses_stays() {
    let (mut cluster, conn) = clean(12, 4);
    cluster.disk(1, |disk| disk.slow_ns = 2_000_000_000);
    for _ in 0..5 {
        cluster.put(conn, 0, 1, 9);
    }
    cluster.disk(1, |disk| disk.slow_ns = 0);
    cluster.pass(60_000);
    assert_eq!(cluster.slice_failed(1), None);
    cluster.disk(1, |disk| disk.slow_ns = 2_000_000_000);
    let mut writes = 0;
    while cluster.slice_failed(1).is_none() {
        assert!(writes < 10 * SLOW_OUT_TICKS, "it stays for ever");
        writes += 1;
        let request = cluster.write(conn, 0, 1, 9);
        cluster.wait("an answer or the end", |c| {
            c.replies.contains_key(&request) || c.slice_failed(1).is_some()
        });
    }
    assert!(cluster.slice_failed(1).unwrap().contains("too slow"));
    others_take_over(&mut cluster, 1, 0, 4);
}

#[test]
fn a_disk_that_is_an_outlier_among_others_goes_and_one_that_is_as_slow_among_its_like_stays() {
    let (mut cluster, conn) = clean(15, 4);
    cluster.disk(1, |disk| disk.slow_ns = 60_000_000);
    let write_for_long = |cluster: &mut Cluster| {
        for _ in 0..40 * u64::from(SLOW_OUT_TICKS) {
            let request = cluster.write(conn, 0, 1, 9);
            cluster.wait("an answer or the end", |c| {
                c.replies.contains_key(&request) || c.slice_failed(1).is_some()
            });
            if cluster.slice_failed(1).is_some() {
                return;
            }
        }
    };
    write_for_long(&mut cluster);
    assert_eq!(cluster.slice_failed(1), None);
    cluster.tell(1, CoreMsg::SlowFrom { slice: slice(1), us: 40_000 });
    write_for_long(&mut cluster);
    assert!(cluster.slice_failed(1).unwrap().contains("slow beside the others"));
    others_take_over(&mut cluster, 1, 0, 4);
}

#[test]
fn a_disk_that_hangs_while_it_opens_does_not_hold_up_its_node() {
    let (mut cluster, _) = clean(13, 2);
    cluster.crash(2);
    cluster.disk(2, |disk| disk.hangs = true);
    cluster.spawn(2);
    cluster.wait("an answer", |c| c.slice_failed(2).is_some());
    cluster.tell(2, CoreMsg::Stop);
    cluster.wait("the core to stop", |c| {
        c.told().iter().any(|(node, msg)| *node == 2 && matches!(msg, CoreMsg::Stopped))
    });
}

#[test]
fn a_stop_does_not_wait_for_a_disk_that_hangs() {
    let (mut cluster, conn) = clean(14, 4);
    cluster.disk(0, |disk| disk.hangs = true);
    cluster.write(conn, 0, 1, 9);
    cluster.pass(100);
    let begin = cluster.world.borrow().now;
    cluster.tell(0, CoreMsg::Stop);
    cluster.wait("the core to stop", |c| {
        c.told().iter().any(|(node, msg)| *node == 0 && matches!(msg, CoreMsg::Stopped))
    });
    let took_ms = (cluster.world.borrow().now - begin) / 1_000_000;
    assert!(took_ms < 7_000, "{took_ms} ms");
}
