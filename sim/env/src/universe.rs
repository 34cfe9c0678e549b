//! The universe: one queue of events over virtual time, and the cores that it feeds.
//!
//! A core runs as production's loop does: it wakes, reaps a batch of what has arrived, gives each event to
//! its service, calls `flush` once, and what was submitted meanwhile leaves at the end of the batch. A
//! batch takes virtual time, so a busy core reaps larger ones. A dead core's number is never used again,
//! so whatever is still addressed to it falls into the void.

use crate::clock::{MS, Nanos, NodeClock, US};
use crate::disk::{DiskProfile, SimDisk};
use crate::env::SimEnv;
use crate::net::{NetAction, SimNet};
use crate::rng::Stream;
use crate::trace::Trace;
use reactor::{Arena, DiskInfo, Event, MESH_RING_MESSAGES, MeshMsg, Mono, Service, Token};
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::net::Ipv4Addr;
use wire::{CoreId, Header};

/// A host: node or client machine. An index into `Universe::hosts`.
pub type HostId = usize;
/// A core of one process's life. An index into `Universe::cores`.
pub type CoreIdx = usize;
/// A disk, an index into `Universe::disks`.
pub type DiskId = usize;

/// Something that will happen.
#[derive(Debug)]
pub(crate) enum Action {
    Start(CoreIdx),
    Wake(CoreIdx),
    /// A timer of the core is due: the earliest that waits, see `Core::timers`.
    Timer(CoreIdx),
    Disk(DiskId, u64),
    Mesh {
        from: CoreIdx,
        to: CoreIdx,
    },
    Net(NetAction),
    Harness(u64),
}

struct Entry {
    at: Nanos,
    /// Seeded: decides among events of the same moment.
    tie: u32,
    seq: u64,
    what: Action,
}

impl Entry {
    fn key(&self) -> (Nanos, u32, u64) {
        (self.at, self.tie, self.seq)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

/// A core to bring to life.
pub struct CoreSpec {
    /// Its number on the node.
    pub id: CoreId,
    /// Its arena's size in bytes.
    pub arena_bytes: usize,
    /// Its disks, in the order of `DiskIndex`.
    pub disks: Vec<DiskId>,
    /// What it runs.
    pub service: Box<dyn Service>,
}

/// A core.
pub struct Core {
    /// Where it runs.
    pub host: HostId,
    /// Its number on the node.
    pub id: CoreId,
    pub(crate) arena: Arena,
    pub(crate) rng: Stream,
    pub(crate) disks: Vec<DiskId>,
    service: Option<Box<dyn Service>>,
    inbox: VecDeque<Event>,
    /// Set and not delivered yet: by time, then by the order of setting, as production keeps them. How late
    /// each alarm is varies; which timer it brings does not.
    timers: BinaryHeap<Reverse<(Mono, u64, Token)>>,
    alive: bool,
    wake_queued: bool,
    busy_until: Nanos,
    /// When what the running batch submits leaves the core.
    pub(crate) depart: Nanos,
}

/// A machine.
pub struct Host {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its clock.
    pub clock: NodeClock,
    /// It has power.
    pub powered: bool,
    /// Its process is stopped (SIGSTOP): the kernel goes on.
    pub paused: bool,
    /// The living cores of its process.
    pub cores: Vec<CoreIdx>,
    pub(crate) next_port: u16,
}

/// How the cores are scheduled, and the universe's other sizes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SchedOptions {
    /// Mean delay from an event's arrival to the batch that reaps it.
    pub wake_ns: Nanos,
    /// Virtual time per event of a batch.
    pub event_ns: Nanos,
    /// Most events in a batch.
    pub batch_max: usize,
    /// Chance per batch that the operating system takes the core away, parts per million.
    pub stall_ppm: u32,
    /// How long, at most.
    pub stall_ns: Nanos,
}

impl Default for SchedOptions {
    fn default() -> Self {
        Self { wake_ns: 4 * US, event_ns: 700, batch_max: 64, stall_ppm: 0, stall_ns: 10 * MS }
    }
}

/// Sees what passes, for checkers. Must not influence anything.
pub trait Observer {
    /// A frame was handed to the network by a living core.
    fn frame_sent(&mut self, at: Nanos, from: HostId, to: HostId, header: &Header);
    /// A mesh message was posted.
    fn mesh_posted(&mut self, at: Nanos, host: HostId, from: CoreId, to: CoreId, msg: &MeshMsg);
}

#[derive(Default)]
struct Ring {
    queue: VecDeque<MeshMsg>,
    stalled: usize,
    last_at: Nanos,
}

/// What `Universe::step` did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Something of the simulated world.
    Went,
    /// A time that the harness asked for has come; its tag.
    Harness(u64),
    /// Nothing is left to happen.
    Empty,
}

/// Everything there is.
pub struct Universe {
    /// Virtual time.
    pub now: Nanos,
    /// Scheduling.
    pub sched: SchedOptions,
    /// Machines.
    pub hosts: Vec<Host>,
    /// Cores, dead ones included.
    pub cores: Vec<Core>,
    /// Disks.
    pub disks: Vec<SimDisk>,
    /// The network.
    pub net: SimNet,
    /// Hash and print of what is delivered.
    pub trace: Trace,
    /// Checkers that look on.
    pub observer: Option<Box<dyn Observer>>,
    /// Events delivered.
    pub delivered: u64,
    queue: BinaryHeap<Entry>,
    rings: BTreeMap<(CoreIdx, CoreIdx), Ring>,
    seq: u64,
    rng: Stream,
    pub(crate) disk_rng: Stream,
    core_rng: Stream,
    batch: Vec<Event>,
}

impl Universe {
    /// An empty universe. Equal seeds and equal calls give equal histories.
    pub fn new(seed: u64) -> Self {
        Self {
            now: 0,
            sched: SchedOptions::default(),
            hosts: Vec::new(),
            cores: Vec::new(),
            disks: Vec::new(),
            net: SimNet::new(Stream::new(seed, "net"), Stream::new(seed, "rdma")),
            trace: Trace::default(),
            observer: None,
            delivered: 0,
            queue: BinaryHeap::new(),
            rings: BTreeMap::new(),
            seq: 0,
            rng: Stream::new(seed, "schedule"),
            disk_rng: Stream::new(seed, "disk"),
            core_rng: Stream::new(seed, "core"),
            batch: Vec::new(),
        }
    }

    /// Adds a machine with power and no process.
    pub fn add_host(&mut self, ip: Ipv4Addr, clock: NodeClock) -> HostId {
        self.hosts.push(Host { ip, clock, powered: true, paused: false, cores: Vec::new(), next_port: 1024 });
        self.net.add_host();
        self.hosts.len() - 1
    }

    /// Adds a disk.
    pub fn add_disk(&mut self, info: DiskInfo, profile: DiskProfile) -> DiskId {
        let rng = self.disk_rng.fork();
        self.disks.push(SimDisk::new(info, profile, rng));
        self.disks.len() - 1
    }

    /// Brings a core to life on a host. Fails when its arena cannot be had.
    pub fn spawn(&mut self, host: HostId, spec: CoreSpec) -> Result<CoreIdx, reactor::NoBuffers> {
        let core = Core {
            host,
            id: spec.id,
            arena: Arena::new(spec.arena_bytes)?,
            rng: self.core_rng.fork(),
            disks: spec.disks,
            service: Some(spec.service),
            inbox: VecDeque::new(),
            timers: BinaryHeap::new(),
            alive: true,
            wake_queued: false,
            busy_until: 0,
            depart: 0,
        };
        self.cores.push(core);
        let index = self.cores.len() - 1;
        if let Some(host) = self.hosts.get_mut(host) {
            host.cores.push(index);
        }
        let delay = self.rng.latency(100 * US);
        self.at(self.now + delay, Action::Start(index));
        Ok(index)
    }

    /// Asks for `Step::Harness(tag)` at a time.
    pub fn call_at(&mut self, at: Nanos, tag: u64) {
        self.at(at, Action::Harness(tag));
    }

    pub(crate) fn at(&mut self, at: Nanos, what: Action) {
        self.seq += 1;
        let tie = self.rng.bits() as u32;
        self.queue.push(Entry { at: at.max(self.now), tie, seq: self.seq, what });
    }

    pub(crate) fn set_timer(&mut self, core: CoreIdx, at: Mono, due: Nanos, token: Token) {
        let set = self.seq;
        if let Some(core) = self.cores.get_mut(core) {
            core.timers.push(Reverse((at, set, token)));
        }
        self.at(due, Action::Timer(core));
    }

    /// One alarm, one timer. Every alarm that has rung belongs to a timer that is due, and one fewer has
    /// been taken: the earliest that waits is never early.
    fn timer_due(&mut self, core: CoreIdx) {
        let timer = self.cores.get_mut(core).and_then(|core| core.timers.pop());
        if let Some(Reverse((_, _, token))) = timer {
            self.deliver(core, Event::Timer { token });
        }
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<Nanos> {
        self.queue.peek().map(|entry| entry.at)
    }

    /// Lets the next thing happen.
    pub fn step(&mut self) -> Step {
        let Some(entry) = self.queue.pop() else { return Step::Empty };
        self.now = self.now.max(entry.at);
        crate::trace::set_log_time(self.now);
        match entry.what {
            Action::Harness(tag) => return Step::Harness(tag),
            Action::Start(core) => self.start_core(core),
            Action::Wake(core) => self.run_core(core),
            Action::Timer(core) => self.timer_due(core),
            Action::Disk(disk, op) => {
                if let Some((from, op, result)) = self.disks.get_mut(disk).and_then(|disk| disk.complete(op))
                {
                    let event = Event::DiskDone { disk: from.index, token: from.token, result, op };
                    self.deliver(from.core, event);
                }
            }
            Action::Mesh { from, to } => self.mesh_arrives(from, to),
            Action::Net(action) => self.net_action(action),
        }
        Step::Went
    }

    /// Whether the core's process lives.
    pub fn is_alive(&self, core: CoreIdx) -> bool {
        self.cores.get(core).is_some_and(|core| core.alive)
    }

    pub(crate) fn is_paused(&self, core: CoreIdx) -> bool {
        self.cores.get(core).and_then(|core| self.hosts.get(core.host)).is_some_and(|host| host.paused)
    }

    /// Puts an event into a core's inbox and sees that it wakes.
    pub(crate) fn deliver(&mut self, core: CoreIdx, event: Event) {
        let Some(target) = self.cores.get_mut(core) else { return };
        if !target.alive {
            return;
        }
        target.inbox.push_back(event);
        self.wake(core);
    }

    fn wake(&mut self, core: CoreIdx) {
        let Some(target) = self.cores.get_mut(core) else { return };
        if target.wake_queued || !target.alive {
            return;
        }
        target.wake_queued = true;
        let busy_until = target.busy_until;
        let delay = self.rng.latency(self.sched.wake_ns);
        self.at(busy_until.max(self.now + delay), Action::Wake(core));
    }

    fn start_core(&mut self, index: CoreIdx) {
        if self.is_paused(index) {
            self.at(self.now + MS, Action::Start(index));
            return;
        }
        let now = self.now;
        let Some(core) = self.cores.get_mut(index) else { return };
        if !core.alive {
            return;
        }
        core.depart = now + US;
        let Some(mut service) = core.service.take() else { return };
        service.start(&mut SimEnv { universe: self, core: index });
        if let Some(core) = self.cores.get_mut(index) {
            core.service = Some(service);
        }
    }

    /// One batch: reap, step each, flush.
    fn run_core(&mut self, index: CoreIdx) {
        let stall =
            if self.rng.chance(self.sched.stall_ppm) { self.rng.below(self.sched.stall_ns) } else { 0 };
        let paused = self.is_paused(index);
        let now = self.now;
        let sched = self.sched;
        let Some(core) = self.cores.get_mut(index) else { return };
        core.wake_queued = false;
        if !core.alive || paused || core.service.is_none() {
            return;
        }
        let count = core.inbox.len().min(sched.batch_max);
        if count == 0 {
            return;
        }
        core.depart = now + sched.event_ns * count as u64 + stall;
        core.busy_until = core.depart;
        let mut batch = std::mem::take(&mut self.batch);
        batch.extend(core.inbox.drain(..count));
        let Some(mut service) = core.service.take() else { return };
        let (host, id) = (core.host, core.id);
        self.delivered += count as u64;
        for event in batch.drain(..) {
            self.trace.event(now, host, id, &event);
            service.event(&mut SimEnv { universe: self, core: index }, event);
        }
        service.flush(&mut SimEnv { universe: self, core: index });
        self.batch = batch;
        let finished = service.finished();
        if let Some(core) = self.cores.get_mut(index) {
            core.service = Some(service);
        }
        if finished {
            self.end_core(index);
        } else if self.cores.get(index).is_some_and(|core| !core.inbox.is_empty()) {
            self.wake(index);
        }
    }

    /// Living cores whose arena is in use by more than a quarter, with the bytes used, for a report.
    pub fn arena_pressure(&self) -> Vec<String> {
        let pressed = self.cores.iter().filter(|core| core.alive).filter_map(|core| {
            let (used, all) = core.arena.usage();
            (used > all / 4).then(|| format!("{}: {used} of {all}", crate::trace::place(core.host, core.id)))
        });
        pressed.collect()
    }

    /// Looks into the service of a living core.
    pub fn service(&mut self, core: CoreIdx) -> Option<&mut Box<dyn Service>> {
        self.cores.get_mut(core).and_then(|core| core.service.as_mut())
    }

    pub(crate) fn post(&mut self, from: CoreIdx, to: CoreId, msg: MeshMsg) -> Result<(), MeshMsg> {
        let Some((host, id, depart)) = self.cores.get(from).map(|core| (core.host, core.id, core.depart))
        else {
            return Err(msg);
        };
        let peers = self.hosts.get(host).map(|host| host.cores.as_slice()).unwrap_or(&[]);
        let peer =
            peers.iter().find(|&&core| self.cores.get(core).is_some_and(|core| core.id == to)).copied();
        let Some(peer) = peer else { return Err(msg) };
        if let Some(observer) = &mut self.observer {
            observer.mesh_posted(self.now, host, id, to, &msg);
        }
        let ring = self.rings.entry((from, peer)).or_default();
        if ring.queue.len() >= MESH_RING_MESSAGES {
            return Err(msg);
        }
        ring.queue.push_back(msg);
        let at = ring.last_at.max(depart + self.rng.latency(US));
        ring.last_at = at;
        self.at(at, Action::Mesh { from, to: peer });
        Ok(())
    }

    /// A message for a core from outside its node: how the harness asks a process to stop.
    pub fn tell(&mut self, core: CoreIdx, from: CoreId, msg: MeshMsg) {
        self.deliver(core, Event::Mesh { from, msg });
    }

    fn mesh_arrives(&mut self, from: CoreIdx, to: CoreIdx) {
        let paused = self.is_paused(to);
        let Some(sender) = self.cores.get(from).map(|core| core.id) else { return };
        let Some(ring) = self.rings.get_mut(&(from, to)) else { return };
        if paused {
            ring.stalled += 1;
            return;
        }
        if let Some(msg) = ring.queue.pop_front() {
            self.deliver(to, Event::Mesh { from: sender, msg });
        }
    }

    /// Stops a host's process (SIGSTOP). Its kernel goes on: connections stay, disks finish.
    pub fn pause(&mut self, host: HostId) {
        if let Some(host) = self.hosts.get_mut(host) {
            host.paused = true;
        }
    }

    /// Lets a stopped process go on.
    pub fn resume(&mut self, host: HostId) {
        let Some(target) = self.hosts.get_mut(host) else { return };
        if !target.paused {
            return;
        }
        target.paused = false;
        for core in target.cores.clone() {
            if self.cores.get(core).is_some_and(|core| !core.inbox.is_empty()) {
                self.wake(core);
            }
            let stalled: Vec<(CoreIdx, usize)> = self
                .rings
                .iter_mut()
                .filter(|((_, to), ring)| *to == core && ring.stalled > 0)
                .map(|((from, _), ring)| (*from, std::mem::take(&mut ring.stalled)))
                .collect();
            for (from, count) in stalled {
                for _ in 0..count {
                    let at = self.now + self.rng.latency(US);
                    self.at(at, Action::Mesh { from, to: core });
                }
            }
        }
        self.net_kick_host(host);
    }

    /// Ends a host's process at once (SIGKILL): memory is gone, the kernel closes its sockets, the disk's
    /// kernel state stays.
    pub fn kill(&mut self, host: HostId) {
        let cores = match self.hosts.get_mut(host) {
            Some(host) => {
                host.paused = false;
                std::mem::take(&mut host.cores)
            }
            None => return,
        };
        for disk in &mut self.disks {
            disk.kill(&cores);
        }
        self.net_process_died(&cores);
        for core in cores {
            self.bury(core);
        }
    }

    /// Cuts a host's power: memory and everything not durable are gone, and nobody is told.
    pub fn power_off(&mut self, host: HostId, disks: &[DiskId]) {
        let cores = match self.hosts.get_mut(host) {
            Some(host) => {
                host.paused = false;
                host.powered = false;
                std::mem::take(&mut host.cores)
            }
            None => return,
        };
        for &disk in disks {
            if let Some(disk) = self.disks.get_mut(disk) {
                disk.power_cut();
            }
        }
        self.net_power_lost(&cores);
        for core in cores {
            self.bury(core);
        }
    }

    /// Gives a host power again; its process is the caller's to start. A rebooted machine's monotonic
    /// clock has a new origin.
    pub fn power_on(&mut self, host: HostId) {
        let origin = self.rng.below(1 << 40);
        if let Some(target) = self.hosts.get_mut(host) {
            target.powered = true;
            target.clock.origin = origin;
        }
        self.net_kick_host(host);
    }

    /// A core whose service has finished: its sockets close, its process lives on while others do.
    fn end_core(&mut self, index: CoreIdx) {
        if let Some(host) = self.cores.get(index).map(|core| core.host)
            && let Some(host) = self.hosts.get_mut(host)
        {
            host.cores.retain(|&core| core != index);
        }
        for disk in &mut self.disks {
            disk.kill(&[index]);
        }
        self.net_process_died(&[index]);
        self.bury(index);
    }

    fn bury(&mut self, index: CoreIdx) {
        if let Some(core) = self.cores.get_mut(index) {
            core.alive = false;
            core.service = None;
            core.inbox.clear();
            core.timers.clear();
            if let Ok(tiny) = Arena::new(0) {
                core.arena = tiny;
            }
        }
        self.rings.retain(|(from, to), _| *from != index && *to != index);
    }
}
