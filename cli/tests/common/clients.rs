//! Clients that write and read back all the time, so that a test can disturb the cluster and see what they noticed.

use super::{pattern, wait_until};
use cli::deadline::Stopwatch;
use drystone::OpenMode;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const BLOCK: u64 = 4096;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
    /// Microseconds.
    slowest: AtomicU64,
}

/// Running clients. Any error of theirs is a panic, which `finish` passes on.
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<BTreeMap<u64, u64>>>,
}

impl Clients {
    /// So many clients of image `i`, each with blocks of its own below `image_bytes`.
    #[allow(clippy::disallowed_methods, reason = "clients beside a cluster of processes")]
    pub fn start(addresses: &[SocketAddr], count: u64, image_bytes: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let start = |seed| {
            let (shared, addresses) = (shared.clone(), addresses.to_vec());
            std::thread::spawn(move || run(&addresses, seed, count, image_bytes / BLOCK, &shared))
        };
        let threads = (0..count).map(start).collect();
        Self { shared, threads }
    }

    /// Waits for so many further operations.
    pub fn more(&self, count: u64) {
        let until = self.shared.done.load(Ordering::Relaxed) + count;
        wait_until("operations to go on", || {
            assert!(!self.threads.iter().any(|thread| thread.is_finished()), "a client has failed");
            self.shared.done.load(Ordering::Relaxed) >= until
        });
    }

    /// The longest operation that ended since this was asked last.
    pub fn slowest(&self) -> Duration {
        Duration::from_micros(self.shared.slowest.swap(0, Ordering::Relaxed))
    }

    /// Stops them; the seed of what each block must hold now.
    pub fn finish(mut self) -> BTreeMap<u64, u64> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn run(
    addresses: &[SocketAddr],
    seed: u64,
    clients: u64,
    blocks: u64,
    shared: &Shared,
) -> BTreeMap<u64, u64> {
    let client = drystone::blocking::Cluster::connect(addresses, drystone::Options::default()).unwrap();
    let image = client.open("i", OpenMode::ReadWrite).unwrap();
    let mut written = BTreeMap::new();
    let mut read = vec![0; BLOCK as usize];
    let mut state = seed;
    while !shared.stop.load(Ordering::Relaxed) {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let block = (state >> 33) % (blocks / clients) * clients + seed;
        let data = pattern(state, BLOCK as usize);
        for write in [true, false] {
            let watch = Stopwatch::start();
            if write {
                image.write_at(block * BLOCK, &data).unwrap();
            } else {
                image.read_at(block * BLOCK, &mut read).unwrap();
                assert!(read == data, "block {block} does not read as written");
            }
            let took = watch.elapsed().as_micros();
            shared.slowest.fetch_max(u64::try_from(took).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        written.insert(block, state);
        shared.done.fetch_add(1, Ordering::Relaxed);
    }
    written
}

/// Reads back what the clients wrote.
pub fn verify(cluster: &super::TestCluster, written: &BTreeMap<u64, u64>) {
    let image = cluster.client().open("i", OpenMode::ReadOnly).unwrap();
    let mut read = vec![0; BLOCK as usize];
    for (block, seed) in written {
        image.read_at(block * BLOCK, &mut read).unwrap();
        assert!(read == pattern(*seed, BLOCK as usize), "block {block} lost its last acknowledged write");
    }
}
