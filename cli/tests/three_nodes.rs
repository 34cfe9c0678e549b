//! Three nodes: replication, the death of a node, its return.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use cli::deadline::Stopwatch;
use common::clients::{self, Clients};
use common::{LIMIT, TestCluster, pattern, wait_until};
use drystone::OpenMode;
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use wire::{NodeId, SliceId};

/// The longest that one write may take when a node's process dies.
const FAILOVER_LIMIT: Duration = Duration::from_secs(3);
/// The longest that one operation may take while a living primary hands over to a returned node: nobody's
/// lease has to run out for it.
const HAND_OVER_LIMIT: Duration = Duration::from_millis(500);
const IMAGE_BYTES: u64 = 32 << 20;
const BLOCK: u64 = 4096;

/// Runs writers while `disturb` does harm; verifies everything afterwards and returns the longest write.
fn writes_survive(
    cluster: &mut TestCluster,
    disturb: impl FnOnce(&mut TestCluster, &dyn Fn(u64)),
) -> Duration {
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let addresses = cluster.fleet.controls();
    let (written, longest) = std::thread::scope(|scope| {
        // The writers see the cluster through its addresses only, so that it can be disturbed meanwhile.
        let writers: Vec<_> = (0..3)
            .map(|seed| {
                let (stop, done, addresses) = (&stop, &done, &addresses);
                scope.spawn(move || write_at(addresses, seed, stop, done))
            })
            .collect();
        let more_writes = |count: u64| {
            let until = done.load(Ordering::Relaxed) + count;
            wait_until("writes to go on", || done.load(Ordering::Relaxed) >= until);
        };
        let stopper = StopAtEnd(&stop);
        disturb(cluster, &more_writes);
        drop(stopper);
        let mut all = BTreeMap::new();
        let mut longest = Duration::ZERO;
        for writer in writers {
            let (written, slowest) = writer.join().unwrap();
            all.extend(written);
            longest = longest.max(slowest);
        }
        (all, longest)
    });
    clients::verify(cluster, &written);
    longest
}

/// Tells the writers to stop, also when the disturbance panics: the scope waits for them.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A write that takes longer has failed: the test ends instead of waiting for ever.
const WRITE_LIMIT_MS: u64 = 60_000;

/// Writes random blocks until told to stop; returns what each block must hold and the longest write.
fn write_at(
    addresses: &[std::net::SocketAddr],
    seed: u64,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> (BTreeMap<u64, u64>, Duration) {
    let options = drystone::Options { io_timeout_ms: Some(WRITE_LIMIT_MS), ..Default::default() };
    let client = drystone::blocking::Cluster::connect(addresses, options).unwrap();
    let image = client.open("i", OpenMode::ReadWrite).unwrap();
    let mut written = BTreeMap::new();
    let mut longest = Duration::ZERO;
    let mut state = seed;
    while !stop.load(Ordering::Relaxed) {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        // Writers keep to blocks of their own: which of two racing writes stays is nobody's promise.
        let block = (state >> 33) % (IMAGE_BYTES / BLOCK / 4) * 4 + seed % 4;
        let watch = Stopwatch::start();
        image.write_at(block * BLOCK, &pattern(state, BLOCK as usize)).unwrap();
        longest = longest.max(watch.elapsed());
        written.insert(block, state);
        done.fetch_add(1, Ordering::Relaxed);
    }
    (written, longest)
}

#[test]
fn writes_go_on_when_any_node_is_killed_and_all_copies_return() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    for victim in 0..3 {
        let longest = writes_survive(&mut cluster, |cluster, more_writes| {
            more_writes(200);
            cluster.fleet.kill(victim).unwrap();
            more_writes(500);
            cluster.fleet.spawn(victim).unwrap();
            cluster.fleet.wait_ready(victim).unwrap();
            more_writes(200);
        });
        assert!(longest < FAILOVER_LIMIT, "a write took {longest:?} when node {victim} died");
        cluster.wait_clean();
    }
}

#[test]
fn a_clean_stop_is_hardly_noticed() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let longest = writes_survive(&mut cluster, |cluster, more_writes| {
        more_writes(200);
        cluster.fleet.stop(1).unwrap();
        more_writes(200);
    });
    assert!(longest < FAILOVER_LIMIT, "a write took {longest:?} when a node was stopped cleanly");
    cluster.fleet.spawn(1).unwrap();
    cluster.wait_clean();
}

/// The slice that is primary of each PG; a PG without one is left out.
fn primaries(admin: &mut cli::cluster::Cluster) -> BTreeMap<String, SliceId> {
    let records = admin.range(placement::key::PGS).unwrap();
    let primary = |json: &str| serde_json::from_str::<placement::PgRecord>(json).unwrap().primary;
    records.iter().filter_map(|item| Some((item.key.clone(), primary(&item.value)?))).collect()
}

/// A node's slices.
fn slices_of(admin: &mut cli::cluster::Cluster, node: NodeId) -> BTreeSet<SliceId> {
    let (node, _) = admin.get::<placement::Node>(&placement::key::node(node)).unwrap().unwrap();
    node.disks.iter().flat_map(|disk| disk.slices.iter().map(|slice| slice.id)).collect()
}

#[test]
fn a_returned_node_gets_its_primaries_back_and_clients_hardly_notice() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let own = slices_of(&mut cluster.admin(), NodeId(2));
    let before = primaries(&mut cluster.admin());
    assert!(before.values().any(|slice| own.contains(slice)), "no primary to hand over");
    let clients = Clients::start(&cluster.fleet.controls(), 2, IMAGE_BYTES);
    clients.more(200);
    cluster.fleet.kill(1).unwrap();
    // Until somebody else has all of its primaries: from then on nothing but its return can disturb.
    let mut admin = cluster.admin();
    wait_until("other primaries", || {
        let now = primaries(&mut admin);
        now.len() == before.len() && now.values().all(|slice| !own.contains(slice))
    });
    clients.more(200);
    clients.slowest();
    cluster.fleet.spawn(1).unwrap();
    cluster.fleet.wait_ready(1).unwrap();
    wait_until("its primaries to be back", || primaries(&mut admin) == before);
    clients.more(200);
    let gap = clients.slowest();
    println!("the longest operation while the node returned and primaries were handed over: {gap:?}");
    assert!(gap < HAND_OVER_LIMIT, "an operation took {gap:?} while primaries were handed over");
    cluster.wait_clean();
    clients::verify(&cluster, &clients.finish());
}

#[test]
fn a_node_that_hangs_is_replaced_and_harmless_when_it_wakes() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    writes_survive(&mut cluster, |cluster, more_writes| {
        more_writes(200);
        cluster.fleet.signal(0, Signal::STOP).unwrap();
        more_writes(500);
        cluster.fleet.signal(0, Signal::CONT).unwrap();
        more_writes(500);
    });
    cluster.wait_clean();
}

#[test]
fn everything_survives_the_death_of_all_nodes() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let addresses = cluster.fleet.controls();
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_at(&addresses, 1, &stop, &done));
        wait_until("writes", || done.load(Ordering::Relaxed) >= 300);
        for node in 0..3 {
            cluster.fleet.kill(node).unwrap();
        }
        for node in 0..3 {
            cluster.fleet.spawn(node).unwrap();
        }
        let before = done.load(Ordering::Relaxed);
        wait_until("writes after the restart", || done.load(Ordering::Relaxed) >= before + 100);
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap().0
    });
    cluster.wait_clean();
    clients::verify(&cluster, &written);
}

#[test]
fn status_says_what_is_wrong_and_when_it_is_well_again() {
    let mut cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let status = |cluster: &TestCluster| -> serde_json::Value {
        serde_json::from_str(&cluster.ok(&["status", "--json"])).unwrap()
    };
    assert_eq!(status(&cluster)["health"], "ok");
    cluster.fleet.kill(2).unwrap();
    wait_until("status to show the dead node", || {
        let now = status(&cluster);
        now["health"] == "warning" && now["problems"].to_string().contains("node 3")
    });
    cluster.fleet.spawn(2).unwrap();
    cluster.ok(&["status", "--wait-clean", &LIMIT.as_secs().to_string()]);
    wait_until("status to be ok again", || status(&cluster)["health"] == "ok");
}
