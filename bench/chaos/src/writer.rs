//! The client of the failover trials: 4 KiB random writes, one at a time, and the longest time between two
//! completions.

use crate::error::ChaosError;
use crate::rng::Rng;
use cli::cluster::Cluster;
use cli::deadline::{Deadline, Stopwatch};
use client::{Op, OpenMode, Options};
use reactor::IoBuf;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a write.
pub const BLOCK: u64 = wire::BLOCK_BYTES as u64;
/// How often the writer looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(200);

/// What the writer has seen, as the measuring side reads it.
#[derive(Default)]
struct Seen {
    writes: AtomicU64,
    errors: AtomicU64,
    /// When the last write completed, microseconds since the start.
    last_us: AtomicU64,
    /// The longest time between two completions since somebody began to measure.
    gap_us: AtomicU64,
}

/// A writer at work.
pub struct Writer {
    seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), ChaosError>>>,
}

impl Writer {
    /// Starts it.
    pub fn start(
        addresses: &[SocketAddr],
        image: &'static str,
        blocks: u64,
        mut rng: Rng,
    ) -> Result<Self, ChaosError> {
        let (seen, stop) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
        let (count, flag, addresses) = (seen.clone(), stop.clone(), addresses.to_vec());
        let work = move || write(&addresses, image, blocks, &mut rng, &count, &flag);
        let thread = std::thread::Builder::new().name("writer".into()).spawn(work);
        let thread = Some(thread.map_err(ChaosError::io("start the writer"))?);
        Ok(Self { seen, stop, thread })
    }

    /// Forgets what was the longest time so far.
    pub fn begin(&self) {
        self.seen.gap_us.store(0, Ordering::SeqCst);
    }

    /// The longest time between two completions since `begin`.
    pub fn gap(&self) -> Duration {
        Duration::from_micros(self.seen.gap_us.load(Ordering::SeqCst))
    }

    /// Writes completed so far.
    pub fn writes(&self) -> u64 {
        self.seen.writes.load(Ordering::SeqCst)
    }

    /// Writes that failed so far.
    pub fn errors(&self) -> u64 {
        self.seen.errors.load(Ordering::SeqCst)
    }

    /// Ends it.
    pub fn finish(mut self) -> Result<(), ChaosError> {
        self.stop.store(true, Ordering::SeqCst);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(ChaosError::Demand("the writer panicked".into())),
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write(
    addresses: &[SocketAddr],
    image: &str,
    blocks: u64,
    rng: &mut Rng,
    seen: &Seen,
    stop: &AtomicBool,
) -> Result<(), ChaosError> {
    let mut cluster = Cluster::with_options(addresses, Options::default())?;
    let image = cluster.open(image, OpenMode::ReadWrite)?;
    let bytes: Vec<u8> = (0..BLOCK).map(|_| rng.bits() as u8).collect();
    let no_memory = |error| ChaosError::Demand(format!("no memory: {error}"));
    let mut buf = Some(IoBuf::copy_of(&bytes).map_err(no_memory)?);
    let clock = Stopwatch::start();
    while !stop.load(Ordering::SeqCst) {
        if let Some(buf) = buf.take() {
            let op = Op::Write { offset: rng.below(blocks) * BLOCK, buf };
            cluster
                .submit(image, op, 0)
                .map_err(|(error, _)| ChaosError::Demand(format!("submit: {error}")))?;
        }
        let Some(done) = cluster.next_io_until(Deadline::after(LOOK))? else { continue };
        buf = done.buf;
        let now = clock.elapsed().as_micros() as u64;
        let gap = now - seen.last_us.swap(now, Ordering::SeqCst);
        seen.gap_us.fetch_max(gap, Ordering::SeqCst);
        match done.result {
            Ok(()) => seen.writes.fetch_add(1, Ordering::SeqCst),
            Err(_) => seen.errors.fetch_add(1, Ordering::SeqCst),
        };
    }
    Ok(())
}
