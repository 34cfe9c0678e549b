//! The environment conformance suite over the simulated environment: what the simulator shows holds in
//! production only as far as both pass it.

use reactor::conformance::{CorePlan, LIMIT_MS, World, all};
use reactor::{DiskInfo, Service};
use simenv::clock::{MS, NodeClock, US};
use simenv::disk::DiskProfile;
use simenv::universe::{CoreSpec, Step, Universe};
use std::net::{Ipv4Addr, SocketAddr};

/// Hosts that a scenario may name.
const HOSTS: usize = 8;
/// Virtual time between two looks at the scenario's condition.
const LOOK_NS: u64 = 50 * US;
/// The harness's only tag.
const LOOK: u64 = 1;

/// Seeds per scenario, unless the environment variable `CONFORMANCE_SEEDS` asks for another number.
const SEEDS: u64 = 12;

fn seeds() -> u64 {
    std::env::var("CONFORMANCE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS)
}

struct Simulated {
    universe: Universe,
}

impl Simulated {
    fn new(seed: u64, rdma_ppm: u32) -> Self {
        let mut universe = Universe::new(seed);
        universe.net.options.rdma_ppm = rdma_ppm;
        for host in 0..HOSTS {
            let drift_ppm = (seed % 200) as i32 - 100;
            universe.add_host(ip(host), NodeClock { origin: seed * 1000, drift_ppm, wall_skew_ms: 0 });
        }
        Self { universe }
    }
}

fn ip(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, 1 + node as u8)
}

impl World for Simulated {
    fn start(&mut self, cores: Vec<CorePlan>) -> Result<(), String> {
        for plan in cores {
            let disks = plan
                .disks
                .iter()
                .map(|&size_bytes| {
                    let info = DiskInfo { size_bytes, atomic_bytes: 4096, write_through: false };
                    let profile = DiskProfile {
                        read_ns: 80 * US,
                        write_ns: 20 * US,
                        flush_ns: 200 * US,
                        block_ns: US,
                        queue_depth: 256,
                    };
                    self.universe.add_disk(info, profile)
                })
                .collect();
            let service: Box<dyn Service> = (plan.service)();
            let spec = CoreSpec { id: plan.core, arena_bytes: plan.arena_bytes, disks, service };
            self.universe.spawn(plan.node, spec).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn listen_address(&self, node: usize) -> SocketAddr {
        SocketAddr::from((ip(node), 0))
    }

    fn refusing_address(&self, node: usize) -> SocketAddr {
        SocketAddr::from((ip(node), 9))
    }

    fn run_until(&mut self, done: &mut dyn FnMut() -> bool) -> bool {
        let end = self.universe.now + LIMIT_MS * MS;
        loop {
            // A look follows only after a while, so `start` of every core has run by the first one.
            self.universe.call_at(self.universe.now + LOOK_NS, LOOK);
            while self.universe.step() != Step::Harness(LOOK) {}
            if done() {
                return true;
            }
            if self.universe.now >= end {
                return false;
            }
        }
    }
}

/// Every scenario with every seed. Returns how many connections have switched to RDMA.
fn all_conform(rdma_ppm: u32) -> u64 {
    let (mut failures, mut switches) = (Vec::new(), 0);
    for scenario in all() {
        for seed in 1..=seeds() {
            let mut world = Simulated::new(seed, rdma_ppm);
            if let Err(error) = (scenario.run)(&mut world) {
                failures.push(format!("{} (seed {seed}): {error}", scenario.name));
                break;
            }
            switches += world.universe.net.counters.switches;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    switches
}

#[test]
fn the_simulated_environment_conforms() {
    assert_eq!(all_conform(0), 0);
}

#[test]
fn the_simulated_environment_conforms_over_rdma() {
    assert!(all_conform(1_000_000) > seeds());
}
