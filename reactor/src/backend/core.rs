//! The loop: reap a batch, give it to the service, flush once, submit, and sleep when there is nothing.
//!
//! `CoreEnv` is everything but the service and implements the environment's traits; `Core` joins the two
//! and turns. One turn costs at most one system call: the one that submits is the one that waits. Polled drives
//! cost one more while operations are under way there (`polled`).

use super::clock;
use super::disk::Disks;
use super::disk_file::DiskFile;
use super::idle::{PREEMPTED_NS, SpinPolicy, Spun};
use super::late_disks::LateDisks;
use super::mesh::{MeshEnd, Poster};
use super::polled::{PollRing, Polling};
use super::ring::{Class, Completion, Ring, RingKind};
use super::rng::Stream;
use super::stats::{CoreStats, STALL_NS};
use super::timers::TimerHeap;
use super::transport::{Polled, Transport, TransportIo};
use crate::buf::{Arena, IoBuf};
use crate::env::*;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use wire::CoreId;

/// Completions reaped in one batch: bounds the time between two submissions.
const BATCH_COMPLETIONS: usize = 256;
/// Events given to the service in one batch.
const BATCH_EVENTS: usize = 512;
/// Time after which a batch ends early, in nanoseconds, and how many events lie between two looks at the clock: a few
/// heavy events, such as those that open a large slice, must not hold up what the others have asked for.
const BATCH_NS: u64 = 1_000_000;
/// See `BATCH_NS`.
const LOOK_EVENTS: usize = 4;
/// A loop with n disk operations under way sleeps until n / 8 completions (of any kind) have come, at most
/// 16, or `ring::BATCH_WAIT_US` are over: at depth 1 it wakes at once.
const WAIT_BATCH_FRACTION: usize = 8;
const WAIT_BATCH_MAX: usize = 16;
/// Longest sleep: a safety net, not a clock; everything that matters wakes the ring.
const PARK_MAX: Duration = Duration::from_secs(1);

/// What to look at when the kernel refuses a ring.
fn setup_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "is it disabled by sysctl kernel.io_uring_disabled, or by the container's seccomp profile?"
        }
        io::ErrorKind::OutOfMemory => "too little locked memory: raise `ulimit -l` or LimitMEMLOCK=",
        io::ErrorKind::Unsupported => "the kernel has no io_uring",
        io::ErrorKind::InvalidInput => "the kernel is too old: 6.1 or later",
        _ => "see the kernel's log",
    }
}

/// Why a core cannot start or go on.
#[derive(Debug, Error)]
pub enum CoreError {
    /// The kernel refuses a ring.
    #[error("io_uring cannot be set up: {0} ({hint})", hint = setup_hint(.0))]
    RingSetup(#[source] io::Error),
    /// The ring failed while running.
    #[error("io_uring failed: {0}")]
    RingEnter(#[source] io::Error),
    /// No eventfd for the mesh.
    #[error("eventfd: {0}")]
    Waker(#[source] io::Error),
    /// No memory for the arena.
    #[error("no memory for {0} bytes of buffers")]
    Arena(usize),
    /// The network that was asked for cannot be had.
    #[error("{0}")]
    Transport(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No randomness from the kernel.
    #[error("no random seed: {0}")]
    Seed(getrandom::Error),
}

/// How a core is made.
#[derive(Clone)]
pub struct CoreOptions {
    /// Its disks, in the order of `DiskIndex`.
    pub disks: Vec<Arc<DiskFile>>,
    /// Disks that come while it runs.
    pub late_disks: LateDisks,
    /// Size of its arena. Memory is taken when first used.
    pub arena_bytes: usize,
    /// At most so much of the arena, from its start, is registered with the kernel, which takes that
    /// memory at once.
    pub registered_bytes_max: usize,
    /// Whether drives are polled. Not for a core that is waited for through its eventfd, which polled completions
    /// do not reach.
    pub polling: Polling,
    /// Longest spin before parking; zero never spins.
    pub spin: Duration,
    /// Entries of the submission queue.
    pub ring_entries: u32,
    /// The core may be polled from different threads (one after the other). Costs a little speed.
    pub movable: bool,
    /// Where it counts.
    pub stats: Arc<CoreStats>,
}

impl Default for CoreOptions {
    fn default() -> Self {
        Self {
            disks: Vec::new(),
            late_disks: LateDisks::default(),
            arena_bytes: 64 << 20,
            registered_bytes_max: 4 << 20,
            polling: Polling::Never,
            spin: Duration::from_micros(20),
            ring_entries: 512,
            movable: false,
            stats: Arc::default(),
        }
    }
}

/// Everything a core has but its service.
pub(crate) struct CoreEnv {
    // The ring is drained and dropped before whatever the kernel may write to: see `Drop`.
    ring: Ring,
    transport: Box<dyn Transport>,
    disks: Disks,
    /// Where the kernel puts the eventfd's count.
    wake_count: Box<u64>,
    events: VecDeque<Event>,
    completions: Vec<Completion>,
    timers: TimerHeap,
    mesh: MeshEnd,
    random: Stream,
    arena: Arena,
    now: Mono,
    spin: SpinPolicy,
    stats: Arc<CoreStats>,
}

impl CoreEnv {
    fn new(options: CoreOptions, transport: Box<dyn Transport>, mesh: MeshEnd) -> Result<Self, CoreError> {
        let stats = options.stats;
        let arena = Arena::new(options.arena_bytes).map_err(|_| CoreError::Arena(options.arena_bytes))?;
        let commands = options.disks.iter().any(|disk| disk.namespace().is_some());
        let kind = RingKind { movable: options.movable, polled: false, commands };
        let mut ring = Ring::new(options.ring_entries, kind, stats.clone())?;
        let mut polled = PollRing::new(options.polling, &options.disks, || {
            Ring::new(options.ring_entries, RingKind { polled: true, ..kind }, stats.clone())
        });
        if !options.disks.is_empty() && options.registered_bytes_max > 0 {
            polled.register_arena(&arena, options.registered_bytes_max);
            ring.register_arena(&arena, options.registered_bytes_max);
        }
        let disks = Disks::new(options.disks, options.late_disks, polled, &mut ring, stats.clone());
        let mut env = Self {
            ring,
            transport,
            disks,
            wake_count: Box::new(0),
            events: VecDeque::with_capacity(2 * BATCH_EVENTS),
            completions: Vec::with_capacity(BATCH_COMPLETIONS),
            timers: TimerHeap::new(),
            mesh,
            random: Stream::seeded().map_err(CoreError::Seed)?,
            arena,
            now: clock::mono(),
            spin: SpinPolicy::new(options.spin.as_nanos() as u64),
            stats,
        };
        env.arm_waker();
        Ok(env)
    }

    fn arm_waker(&mut self) {
        let fd = io_uring::types::Fd(self.mesh.waker().fd());
        let into = (&raw mut *self.wake_count).cast::<u8>();
        let entry = io_uring::opcode::Read::new(fd, into, size_of::<u64>() as u32).build();
        // SAFETY: `wake_count` is boxed, lives until the ring is drained, and nobody reads it.
        unsafe { self.ring.push(entry, Class::Wake, 0) }
    }

    fn net<R>(&mut self, call: impl FnOnce(&mut dyn Transport, &mut TransportIo<'_>) -> R) -> R {
        let mut io = TransportIo {
            ring: &mut self.ring,
            arena: &self.arena,
            events: &mut self.events,
            now: self.now,
            stats: &self.stats,
        };
        call(self.transport.as_mut(), &mut io)
    }

    pub(crate) fn refresh_now(&mut self) {
        self.now = self.now.max(clock::mono());
    }

    /// Turns what the service asked for into submissions.
    pub(crate) fn prepare(&mut self) {
        self.net(|transport, io| transport.prepare(io));
    }

    /// When something must happen although nothing arrives.
    pub(crate) fn next_due(&self) -> Option<Mono> {
        match (self.timers.next_due(), self.transport.deadline()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Whether a turn would find something without sleeping. No system call.
    fn has_work(&mut self) -> bool {
        self.net(|transport, io| transport.poll(io)) == Polled::Something
            || !self.events.is_empty()
            || self.ring.has_completions()
            || self.mesh.waker().pending()
    }

    /// Submits what is queued and, when there is nothing to do, waits for at most `wait`.
    pub(crate) fn enter(&mut self, mut wait: Duration) -> Result<(), CoreError> {
        if self.disks.is_polling() {
            wait = wait.min(self.disks.look(self.now)?);
        }
        if wait.is_zero() || self.has_work() {
            if self.ring.queued() > 0 || self.ring.has_deferred() {
                self.ring.enter(0, None)?;
            }
            return Ok(());
        }
        self.refresh_now();
        wait = wait.min(PARK_MAX);
        if let Some(due) = self.next_due() {
            wait = wait.min(Duration::from_nanos(due.since(self.now)));
            if wait.is_zero() {
                if self.ring.queued() > 0 || self.ring.has_deferred() {
                    self.ring.enter(0, None)?;
                }
                return Ok(());
            }
        }
        let window = self.spin.window().min(wait.as_nanos() as u64);
        if window > 0 && self.spin_for(window)? {
            return Ok(());
        }
        self.park(wait)
    }

    /// Looks for completions for `window_ns` without sleeping. True when something came.
    fn spin_for(&mut self, window_ns: u64) -> Result<bool, CoreError> {
        // What submitting brings at once would have come without spinning: nothing is learnt from it.
        if self.ring.queued() > 0 || self.ring.has_deferred() {
            self.ring.enter(0, None)?;
            if self.has_work() {
                return Ok(true);
            }
        }
        self.stats.spins.add(1);
        self.refresh_now();
        let until = self.now.plus_ns(window_ns);
        let mut spun = Spun::Hit;
        let found = loop {
            let found = self.ring.has_deferred() || self.has_work();
            let before = self.now;
            self.refresh_now();
            if self.now.since(before) > PREEMPTED_NS {
                spun = Spun::Preempted;
            }
            if found {
                self.ring.enter(0, None)?;
                break true;
            }
            if self.now >= until {
                break false;
            }
            std::hint::spin_loop();
        };
        if found && spun == Spun::Hit {
            self.stats.spin_hits.add(1);
        } else if spun == Spun::Hit {
            spun = Spun::Miss;
        }
        self.spin.learn(spun);
        Ok(found)
    }

    fn park(&mut self, wait: Duration) -> Result<(), CoreError> {
        self.stats.parks.add(1);
        self.stats.arena_used_bytes.set(self.arena.usage().0 as u64);
        let armed = self.net(|transport, io| transport.arm(io)) == Polled::Nothing;
        let asleep = armed && self.mesh.waker().park();
        let entered = if asleep {
            // With much under way, sleeping until several have come saves a switch for each.
            let batch = (self.disks.in_flight() / WAIT_BATCH_FRACTION).clamp(1, WAIT_BATCH_MAX);
            self.ring.enter(batch as u32, Some(wait))
        } else {
            self.ring.enter(0, None)
        };
        if asleep {
            self.mesh.waker().unpark();
        }
        entered
    }

    /// Turns completions, due timers and letters into events. Reads the clock once.
    pub(crate) fn collect(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.reap(&mut completions, BATCH_COMPLETIONS);
        self.disks.reap_polled(&mut completions, BATCH_COMPLETIONS, self.now);
        self.net(|transport, io| transport.poll(io));
        // After reaping, not before: a process stopped between the two would judge its lease by a time
        // before the requests that it then answers.
        self.refresh_now();
        self.stats.completions.add(completions.len() as u64);
        for completion in completions.drain(..) {
            match completion.class {
                Class::Disk => self.disks.completed(&mut self.ring, &mut self.events, &completion),
                Class::Net => self.net(|transport, io| {
                    transport.completed(io, completion.data, completion.result, completion.flags);
                }),
                Class::Wake => self.arm_waker(),
                Class::None => {}
            }
        }
        self.completions = completions;
        let events = &mut self.events;
        self.mesh.receive(|from, msg| events.push_back(Event::Mesh { from, msg }));
        while let Some(token) = self.timers.pop_due(self.now) {
            self.events.push_back(Event::Timer { token });
        }
    }

    pub(crate) fn poster(&self) -> Poster {
        self.mesh.poster()
    }

    pub(crate) fn register_eventfd(&mut self, fd: std::os::fd::RawFd) -> io::Result<()> {
        self.ring.register_eventfd(fd)
    }

    /// Has the transport's device wake whoever waits for the eventfd. False when there is something to do first.
    pub(crate) fn arm(&mut self) -> Result<bool, CoreError> {
        if self.net(|transport, io| transport.arm(io)) == Polled::Something {
            return Ok(false);
        }
        if self.ring.queued() > 0 {
            self.ring.enter(0, None)?;
        }
        Ok(!self.ring.has_completions())
    }

    pub(crate) fn is_quiet(&mut self) -> bool {
        let ring_quiet = !self.ring.has_deferred() && self.ring.queued() == 0;
        ring_quiet && !self.has_work() && !self.disks.is_polling()
    }
}

impl Drop for CoreEnv {
    fn drop(&mut self) {
        let polled_ended = self.disks.drain_polled();
        if self.ring.drain() && polled_ended {
            return;
        }
        // The kernel may still write into buffers: better to leak them than to have it write into
        // memory that belongs to somebody else by then.
        tracing::error!("operations did not end in time; their memory is not freed");
        std::mem::forget(self.arena.clone());
        std::mem::forget(std::mem::replace(&mut self.wake_count, Box::new(0)));
        let nothing: Box<dyn Transport> = Box::new(super::NoTransport::default());
        std::mem::forget(std::mem::replace(&mut self.transport, nothing));
        self.disks.leak();
    }
}

/// A service and its environment.
pub(crate) struct Core<S: Service + ?Sized> {
    pub(crate) env: CoreEnv,
    // A box, so that the core can be moved whatever the service's size.
    pub(crate) service: Box<S>,
}

impl<S: Service + ?Sized> Core<S> {
    /// Makes the environment and starts the service in it.
    pub(crate) fn new(
        options: CoreOptions,
        transport: Box<dyn Transport>,
        mesh: MeshEnd,
        service: impl FnOnce() -> Box<S>,
    ) -> Result<Self, CoreError> {
        let mut env = CoreEnv::new(options, transport, mesh)?;
        let mut service = service();
        service.start(&mut env);
        Ok(Self { env, service })
    }

    /// Submits, waits at most `wait` when there is nothing to do, and handles one batch. Returns how many
    /// events it had.
    pub(crate) fn turn(&mut self, wait: Duration) -> Result<usize, CoreError> {
        self.env.prepare();
        self.env.enter(wait)?;
        self.env.collect();
        Ok(self.dispatch())
    }

    fn dispatch(&mut self) -> usize {
        self.env.stats.iterations.add(1);
        // What the service causes meanwhile belongs to the next batch.
        let most = self.env.events.len().min(BATCH_EVENTS);
        let mut batch = 0;
        if most > 1 {
            self.service.coming(&self.env.events);
        }
        while batch < most {
            let Some(event) = self.env.events.pop_front() else { break };
            self.service.event(&mut self.env, event);
            batch += 1;
            if batch % LOOK_EVENTS == 0 && clock::mono().since(self.env.now) > BATCH_NS {
                break;
            }
        }
        if self.env.events.is_empty() {
            // Back to its beginning: the next batch finds the memory that this one has in the cache.
            self.env.events.clear();
        }
        if batch > 0 {
            self.service.flush(&mut self.env);
            let stats = &self.env.stats;
            stats.events.add(batch as u64);
            stats.heap_allocations.set(super::heap::allocations_of_this_thread());
            let lag = clock::mono().since(self.env.now);
            stats.lag_sum_ns.add(lag);
            stats.lag_max_ns.raise_to(lag);
            if lag > STALL_NS {
                stats.stalls.add(1);
            }
        }
        batch
    }

    /// Turns until the service is finished.
    pub(crate) fn run(&mut self) -> Result<(), CoreError> {
        while !self.service.finished() {
            self.turn(PARK_MAX)?;
        }
        Ok(())
    }
}

impl Clock for CoreEnv {
    fn now(&self) -> Mono {
        self.now
    }
    fn wall(&self) -> WallMs {
        clock::wall()
    }
}

impl Rng for CoreEnv {
    fn random(&mut self) -> u64 {
        self.random.next()
    }
}

impl Timers for CoreEnv {
    fn set_timer(&mut self, at: Mono, token: Token) {
        self.timers.set(at, token);
    }
}

impl Disk for CoreEnv {
    fn disk_info(&self, disk: DiskIndex) -> Option<DiskInfo> {
        self.disks.info(disk)
    }
    fn submit(&mut self, disk: DiskIndex, op: DiskOp, token: Token) -> Result<(), (Full, DiskOp)> {
        self.disks.submit(&mut self.ring, &mut self.events, disk, op, token)
    }
}

impl Net for CoreEnv {
    fn listen(&mut self, at: SocketAddr, framing: Framing, token: Token) -> Result<SocketAddr, NetError> {
        self.net(|transport, io| transport.listen(io, at, framing, token))
    }
    fn connect(&mut self, to: SocketAddr, framing: Framing) -> ConnId {
        self.net(|transport, io| transport.connect(io, to, framing))
    }
    fn send(&mut self, conn: ConnId, frame: Frame) -> Result<(), Full> {
        self.net(|transport, io| transport.send(io, conn, frame))
    }
    fn send_bytes(&mut self, conn: ConnId, bytes: IoBuf) -> Result<(), Full> {
        self.net(|transport, io| transport.send_bytes(io, conn, bytes))
    }
    fn close(&mut self, conn: ConnId, after_flush: bool) {
        self.net(|transport, io| transport.close(io, conn, after_flush));
    }
    fn expect(&mut self, conn: ConnId, request: u64, into: IoBuf) {
        self.transport.expect(conn, request, into);
    }
}

impl Mesh for CoreEnv {
    fn core(&self) -> CoreId {
        self.mesh.core()
    }
    fn post(&mut self, to: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        self.mesh.post(to, msg)
    }
}

impl Buffers for CoreEnv {
    fn arena(&self) -> &Arena {
        &self.arena
    }
}
