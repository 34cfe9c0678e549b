//! Costs that are counted, not timed, and must not get worse: heap allocations and system calls of the
//! nodes per operation at depth 128.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use cli::scrape::{Counters, fleet_counters};
use common::{TestCluster, pattern};
use drystone::{AdminDone, Client, ImageHandle, IoBuf, Op, OpenMode, Options};
use std::time::Duration;

const DEPTH: usize = 128;
const BLOCK: u64 = 4096;
const IMAGE_BYTES: u64 = 32 << 20;
/// Operations until pools, maps and caches have reached their size, and operations that are counted.
const WARM_UP: u64 = 40_000;
const COUNTED: u64 = 40_000;
/// Allocations per operation: none on the data path; housekeeping once a second may make some.
const ALLOCATIONS_MAX: f64 = 0.02;
/// `io_uring_enter` calls per operation and node at depth 128.
const ENTERS_MAX: f64 = 0.5;

struct Load {
    client: Client,
    image: ImageHandle,
    spare: Vec<IoBuf>,
    state: u64,
}

impl Load {
    fn new(cluster: &TestCluster) -> Self {
        let mut client = Client::new(&cluster.fleet.controls(), Options::default()).unwrap();
        let ticket = client.open("i", OpenMode::ReadWrite);
        let image = loop {
            match client.next_admin() {
                Some(AdminDone::Opened { ticket: of, result }) if of == ticket => break result.unwrap(),
                Some(_) => {}
                None => drop(client.poll(Some(Duration::from_secs(1))).unwrap()),
            }
        };
        let buffer = |seed| IoBuf::copy_of(&pattern(seed, BLOCK as usize)).unwrap();
        Self { client, image, spare: (0..DEPTH as u64).map(buffer).collect(), state: 1 }
    }

    /// Performs operations on random blocks with as many under way as there are buffers.
    fn run(&mut self, count: u64, write: bool) {
        let (mut started, mut done) = (0, 0);
        while done < count {
            while started < count
                && let Some(buf) = self.spare.pop()
            {
                self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let offset = (self.state >> 33) % (IMAGE_BYTES / BLOCK) * BLOCK;
                let op = if write { Op::Write { offset, buf } } else { Op::Read { offset, buf } };
                self.client.submit(self.image, op, started).map_err(|(error, _)| error).unwrap();
                started += 1;
            }
            self.client.poll(Some(Duration::from_secs(1))).unwrap();
            while let Some(io) = self.client.next_io() {
                io.result.unwrap();
                self.spare.push(io.buf.unwrap());
                done += 1;
            }
        }
    }

    fn counted(&mut self, cluster: &TestCluster, write: bool) -> Counters {
        self.run(WARM_UP, write);
        let before = fleet_counters(&cluster.fleet).unwrap();
        self.run(COUNTED, write);
        fleet_counters(&cluster.fleet).unwrap().since(&before)
    }
}

#[test]
fn nodes_neither_allocate_nor_call_the_kernel_for_every_operation() {
    let cluster = TestCluster::with_image(3, IMAGE_BYTES);
    let mut load = Load::new(&cluster);
    for (what, write) in [("write", true), ("read", false)] {
        let counted = load.counted(&cluster, write);
        let allocations = counted.allocations / COUNTED as f64;
        let enters = counted.enters / COUNTED as f64 / cluster.fleet.nodes.len() as f64;
        println!("{what}: {allocations:.4} allocations, {enters:.3} system calls per operation and node");
        assert!(allocations <= ALLOCATIONS_MAX, "{what}: {allocations} allocations per operation");
        assert!(enters < ENTERS_MAX, "{what}: {enters} io_uring_enter calls per operation and node");
    }
}
