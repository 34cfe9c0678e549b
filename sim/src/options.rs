//! Swarm options: every seed draws its own mix of sizes and faults, and prints all of it.

use crate::apps::Mix;
use crate::beyond::{Blow, Plan};
use crate::meta::{self, Style};
use placement::ScrubPlan;
use simenv::clock::{MS, Nanos, SEC, US};
use simenv::disk::DiskProfile;
use simenv::net::NetOptions;
use simenv::rng::Stream;
use simenv::universe::SchedOptions;
use std::fmt;

/// A kind of fault, with the weight it has among the others in a seed (0: never).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultWeights {
    /// A node's process is killed and started again later.
    pub kill: u32,
    /// A node's power is cut and comes back later.
    pub power: u32,
    /// Every node's power is cut at once.
    pub blackout: u32,
    /// A node's process is stopped and continued later.
    pub pause: u32,
    /// A node's process is asked to stop, and started again.
    pub stop: u32,
    /// Hosts cannot reach each other, both ways.
    pub partition: u32,
    /// Hosts cannot reach each other, one way.
    pub one_way: u32,
    /// Two nodes cannot reach each other, while others reach both.
    pub link: u32,
    /// A link holds everything for a while.
    pub clog: u32,
    /// A connection is reset.
    pub reset: u32,
    /// A disk becomes slow for a while.
    pub slow_disk: u32,
    /// A client's process is killed and a new one started.
    pub client_kill: u32,
    /// Data at rest on the one disk that may be damaged rots or becomes unreadable.
    pub damage: u32,
    /// A data write on that disk is lost or lands elsewhere.
    pub write_fault: u32,
}

impl FaultWeights {
    /// No node's process ever ends.
    pub fn nobody_dies(&self) -> bool {
        self.kill + self.power + self.blackout + self.stop == 0
    }
}

impl Style {
    fn faults(self, rng: &mut Stream) -> FaultWeights {
        let mut some = |weight: u32| if rng.coin() { weight } else { 0 };
        let links = FaultWeights {
            partition: some(5),
            one_way: some(5),
            clog: some(4),
            reset: some(4),
            client_kill: some(2),
            ..FaultWeights::default()
        };
        match self {
            Self::Mixed => FaultWeights {
                kill: some(6),
                power: some(6),
                blackout: some(1),
                pause: some(6),
                stop: some(3),
                slow_disk: some(3),
                ..links
            },
            Self::Deaths => FaultWeights { kill: 30, stop: some(5), pause: some(5), ..links },
            Self::Bridge => FaultWeights { kill: 30, link: 15, ..FaultWeights::default() },
            Self::Power => FaultWeights { power: 12, blackout: 12, kill: some(5), ..links },
            Self::Apart => FaultWeights { pause: some(6), partition: 8, one_way: some(4), ..links },
        }
    }
}

/// A corner that a deliberate bug hides in: some of a seed's options are drawn to lead there more often. The
/// bug must still be met by the seed's own faults and noticed by the ordinary checkers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Focus {
    /// Anywhere: the seed as it is.
    #[default]
    None,
    /// Connections that break, and links that hold what is sent on them.
    Breaks,
    /// The same, and clients that soon give up on what they sent.
    GivingUp,
    /// Nodes that die and come back in quick succession.
    Churn,
    /// Nodes that are stopped or cut off while their clocks run apart.
    Isolation,
    /// Nodes that are stopped for about as long as a lease holds, and go on.
    Pauses,
    /// Power cuts, of single nodes and of all at once.
    Power,
    /// A disk whose data decays, and scrubs that look for that.
    Decay,
    /// Copies that are moved away and soon back.
    Moves,
}

/// How connections go, where a run asks for something else than its seed draws.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Flavour {
    /// None switches to RDMA: as all seeds were before there was another.
    Tcp,
    /// All that may switch to RDMA.
    Rdma,
}

/// Everything that a seed decides.
#[derive(Clone, Debug)]
pub struct Options {
    /// The seed.
    pub seed: u64,
    /// Nodes.
    pub nodes: usize,
    /// Voters of the metadata group, the first nodes.
    pub voters: usize,
    /// Data cores of each node.
    pub cores: u16,
    /// Disks of each node.
    pub disks: usize,
    /// Slices of each disk, a power of two.
    pub slices: usize,
    /// Bytes of each slice.
    pub slice_bytes: u64,
    /// Disks keep completed writes through a power cut.
    pub write_through: bool,
    /// The disks' atomic unit.
    pub atomic_bytes: u32,
    /// How fast disks are.
    pub disk: DiskProfile,
    /// Bytes of each core's arena.
    pub arena_bytes: usize,
    /// Copies in the pool.
    pub copies: u8,
    /// Fewest copies that serve.
    pub min_copies: u8,
    /// PGs of the pool.
    pub pg_count: u32,
    /// Client processes.
    pub clients: usize,
    /// Images; client `i` uses image `i % images`.
    pub images: usize,
    /// Bytes of each image.
    pub image_bytes: u64,
    /// Operations each client keeps under way, at most.
    pub depth: usize,
    /// Largest operation in blocks.
    pub op_blocks_max: u64,
    /// Mean pause of a client between two looks for work.
    pub think_ns: Nanos,
    /// Discards and write-zeroes among changes, parts per million.
    pub zero_ppm: u32,
    /// Reads among operations, parts per million.
    pub read_ppm: u32,
    /// Operations that hit the few hot blocks, parts per million.
    pub hot_ppm: u32,
    /// Clients give up on an operation after this long; 0: never.
    pub io_timeout_ms: u64,
    /// The network.
    pub net: NetOptions,
    /// The cores.
    pub sched: SchedOptions,
    /// Clocks run at most this much faster or slower, parts per million.
    pub drift_ppm: u32,
    /// One-off I/O errors per million operations on the disk that may be damaged.
    pub transient_error_ppm: u32,
    /// How long faults are injected.
    pub safety_ns: Nanos,
    /// Mean time between two faults.
    pub fault_every_ns: Nanos,
    /// Mean time until a fault ends.
    pub fault_for_ns: Nanos,
    /// Mean time until a killed process is back; 0: as for other faults.
    pub down_for_ns: Nanos,
    /// Only one node is ever faulty at a time, and the next only when all PGs are clean again. Always so
    /// where data at rest is damaged: no redundancy survives damage to the only good copy.
    pub gentle: bool,
    /// Which faults.
    pub faults: FaultWeights,
    /// See `StoreOptions`: a block freed too early is reused at once, so that it shows.
    pub eager_reuse: bool,
    /// Each store's checkpoint interval in dirty objects: small ones reach checkpoints often.
    pub dirty_objects_max: u32,
    /// Changes each slice remembers: short histories leave members to be listed.
    pub history_changes: usize,
    /// Bytes of each store's page cache.
    pub page_cache_bytes: usize,
    /// How often PGs are scrubbed.
    pub scrub: ScrubPlan,
    /// Mean time between two things an administrator does that move copies; 0: nothing.
    pub move_every_ns: Nanos,
    /// More is broken than redundancy survives.
    pub beyond: Option<Plan>,
    /// Clients run the second workload.
    pub apps: Option<Mix>,
    /// Clients use the metadata store and nothing else.
    pub meta: Option<meta::Mix>,
}

impl Options {
    /// Whether the images may need more space than one node surely has.
    pub fn may_fill_up(&self) -> bool {
        let data = self.image_bytes * self.images as u64;
        data * 2 > self.slice_bytes
    }

    /// The same with another share of RDMA.
    pub fn with(mut self, flavour: Option<Flavour>) -> Self {
        self.net.rdma_ppm = match flavour {
            None => self.net.rdma_ppm,
            Some(Flavour::Tcp) => 0,
            Some(Flavour::Rdma) => 1_000_000,
        };
        self
    }

    /// What a seed decides, with a focus.
    pub fn draw_for(seed: u64, focus: Focus) -> Self {
        let mut options = Self::draw(seed);
        if focus == Focus::None {
            return options;
        }
        // Several clients on few blocks, little else to do, and everything soon over.
        (options.clients, options.images, options.image_bytes) = (4, 1, 4096 * 40);
        (options.hot_ppm, options.op_blocks_max) = (600_000, options.op_blocks_max.min(4));
        (options.depth, options.think_ns, options.read_ppm) = (4, 4 * MS, 500_000);
        (options.safety_ns, options.fault_every_ns, options.gentle) = (10 * SEC, 500 * MS, false);
        options.faults = match focus {
            Focus::None => options.faults,
            Focus::Breaks | Focus::GivingUp => {
                if focus == Focus::GivingUp {
                    options.io_timeout_ms = 500;
                    // A queue pair that breaks takes with it what TCP may still bring after the next connection's.
                    options.net.rdma_ppm = 0;
                }
                (options.net.reset_ppm, options.net.corrupt_ppm) = (1_000, 300);
                options.fault_for_ns = 3 * SEC;
                FaultWeights { reset: 20, clog: 20, kill: 3, ..FaultWeights::default() }
            }
            Focus::Churn => {
                options.fault_for_ns = 700 * MS;
                FaultWeights { kill: 20, power: 10, reset: 10, blackout: 1, ..FaultWeights::default() }
            }
            Focus::Power => {
                options.fault_for_ns = 300 * MS;
                options.write_through = false;
                // The longer a write takes, the more of them the power cut finds under way.
                options.net = draw_rdma(seed, NetOptions::default());
                (options.disk.write_ns, options.disk.flush_ns) = (MS, 5 * MS);
                FaultWeights { kill: 5, power: 20, blackout: 20, ..FaultWeights::default() }
            }
            Focus::Decay => {
                (options.copies, options.gentle) = (3, true);
                options.scrub = ScrubPlan { light_secs: 2, deep_secs: 3 };
                FaultWeights { kill: 2, damage: 20, write_fault: 5, ..FaultWeights::default() }
            }
            Focus::Moves => {
                (options.nodes, options.pg_count) = (options.nodes.max(4), options.pg_count.max(8));
                (options.move_every_ns, options.image_bytes) = (500 * MS, 4096 * 4096);
                FaultWeights { kill: 2, reset: 5, client_kill: 5, ..FaultWeights::default() }
            }
            Focus::Pauses => {
                // Long enough for a lease to end, short enough that the node is back before others act on that.
                options.fault_for_ns = 2 * SEC;
                options.drift_ppm = 40_000;
                FaultWeights { pause: 20, client_kill: 10, ..FaultWeights::default() }
            }
            Focus::Isolation => {
                options.fault_for_ns = 4 * SEC;
                options.fault_every_ns = SEC;
                options.drift_ppm = 40_000;
                FaultWeights {
                    pause: 10,
                    partition: 20,
                    one_way: 10,
                    client_kill: 10,
                    ..FaultWeights::default()
                }
            }
        };
        options
    }

    /// What a seed decides that goes beyond what redundancy survives: sizes as ever, few other faults.
    pub fn draw_beyond(seed: u64) -> Self {
        let mut options = Self::draw(seed);
        let plan = Plan::draw(seed, options.nodes);
        // Several changes of every block, and some that nobody touches any more.
        options.image_bytes = options.image_bytes.min(4096 * 512);
        options.slice_bytes = (16 << 20) + 2 * options.images as u64 * options.image_bytes;
        options.safety_ns = 14 * SEC;
        (options.gentle, options.fault_every_ns) = (false, 2 * SEC);
        let light = FaultWeights { reset: 4, client_kill: 2, ..FaultWeights::default() };
        options.faults = match plan.blow {
            // The others must stay whole, or the old copy is the best there is.
            Blow::OneBack => light,
            // A log's last write that was lost looks like a log that ended earlier: no process may die.
            Blow::WriteFaults => FaultWeights { pause: 2, partition: 2, clog: 2, ..light },
            _ => FaultWeights { kill: 3, power: 3, pause: 2, partition: 2, ..light },
        };
        if plan.blow == Blow::OneBack {
            // The others must be enough to go on, or nobody replaces what is away.
            (options.copies, options.min_copies) = (3, options.min_copies.min(2));
        }
        options.beyond = Some(plan);
        // Who holds what is the plan's to know.
        options.move_every_ns = 0;
        options
    }

    /// What a seed decides for the second workload: everything else as ever.
    pub fn draw_apps(seed: u64) -> Self {
        let mut options = Self::draw(seed);
        options.clients = options.clients.max(2);
        let mix = Mix::draw(seed, options.images);
        options.image_bytes = 4096 * mix.per_image(options.images) * mix.region_blocks;
        options.slice_bytes = (16 << 20) + 2 * options.images as u64 * options.image_bytes;
        // A program has several operations.
        options.think_ns = options.think_ns.clamp(12 * MS, 100 * MS);
        options.apps = Some(mix);
        options
    }

    /// What a seed decides for the metadata store's own workload: control cores and nothing else.
    pub fn draw_meta(seed: u64) -> Self {
        let mut options = Self::draw(seed);
        let mut rng = Stream::new(seed, "meta");
        let style = rng.weighted(
            (3, Style::Mixed),
            &[(2, Style::Deaths), (2, Style::Bridge), (2, Style::Power), (3, Style::Apart)],
        );
        options.meta = Some(meta::Mix::draw(&mut rng, style));
        (options.nodes, options.voters) = rng.weighted((4, (3, 3)), &[(1, (4, 3)), (1, (5, 5))]);
        let mut changes = Stream::new(seed, "voters");
        if changes.coin()
            && let Some(mix) = &mut options.meta
        {
            mix.voters_ppm = changes.weighted((2, 10_000), &[(1, 40_000)]);
            options.nodes = options.nodes.max(changes.between(4, 5) as usize);
        }
        (options.cores, options.disks, options.gentle) = (0, 0, false);
        options.clients = rng.between(2, 5) as usize;
        options.safety_ns = rng.between(10, 25) * SEC;
        options.think_ns = rng.weighted((2, 20 * MS), &[(1, 60 * MS)]);
        options.faults = style.faults(&mut rng);
        (options.fault_every_ns, options.fault_for_ns) = match style {
            Style::Mixed => (rng.between(200, 2_000) * MS, rng.between(50, 3_000) * MS),
            Style::Deaths => (rng.between(60, 400) * MS, rng.between(20, 300) * MS),
            Style::Bridge => (rng.between(60, 250) * MS, rng.between(500, 4_000) * MS),
            Style::Power => (rng.between(200, 800) * MS, rng.between(20, 400) * MS),
            Style::Apart => (rng.between(500, 2_000) * MS, rng.between(500, 5_000) * MS),
        };
        if style == Style::Bridge {
            options.down_for_ns = rng.between(10, 60) * MS;
        }
        if matches!(style, Style::Deaths | Style::Power | Style::Bridge) {
            // The longer messages and writes are on their way, the more of them a death finds there.
            options.net.latency_ns = rng.weighted((1, MS), &[(2, 10 * MS), (1, 30 * MS)]);
            options.disk.write_ns = rng.weighted((1, 100 * US), &[(2, 5 * MS), (1, 20 * MS)]);
            options.write_through &= style != Style::Power;
        }
        options
    }

    /// Bytes of each image when it is made.
    pub fn first_image_bytes(&self) -> u64 {
        self.apps.as_ref().map_or(self.image_bytes, |mix| mix.first_regions as u64 * mix.region_blocks * 4096)
    }

    /// What a seed decides.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Stream::new(seed, "options");
        let rng = &mut rng;
        let nodes = rng.weighted((8, 3), &[(2, 4), (1, 5)]);
        let (faults, gentle) = draw_faults(rng);
        let slices = rng.weighted((3, 1), &[(3, 2), (1, 4)]);
        let image_bytes = 4096 * rng.weighted((2, 256), &[(2, 1024), (1, 40), (1, 4096)]);
        let depth = rng.weighted((2, 4), &[(2, 1), (2, 12), (1, 40)]);
        let images = rng.weighted((3, 1), &[(2, 2)]);
        let clients = rng.weighted((3, images), &[(3, images + 1), (1, images + 2)]);
        Self {
            seed,
            nodes,
            voters: 3,
            cores: rng.weighted((3, 1), &[(3, 2), (1, 3)]),
            disks: rng.weighted((4, 1), &[(1, 2)]),
            slices,
            // One slice may get all PGs. Copy-on-write, log and reserve want as much again.
            slice_bytes: rng.weighted((1, 16 << 20), &[(1, 48 << 20)]) + 2 * images as u64 * image_bytes,
            write_through: rng.chance(400_000),
            atomic_bytes: if rng.coin() { 4096 } else { 512 },
            disk: draw_disk(rng),
            arena_bytes: rng.weighted((3, 16 << 20), &[(1, 8 << 20)]),
            // Beside the one damaged copy, one may be on a node that is away: a third is needed.
            copies: if faults.damage > 0 { 3 } else { rng.weighted((8, 3), &[(2, 2)]) },
            min_copies: rng.weighted((2, 2), &[(1, 1)]),
            pg_count: rng.weighted((2, 4), &[(2, 8), (1, 1), (1, 16), (1, 33)]),
            clients,
            images,
            image_bytes,
            depth,
            op_blocks_max: rng.weighted((3, 1), &[(3, 4), (2, 16), (1, 70)]),
            // Some 50 to 500 operations a second: what matters is what they meet, not how many there are.
            think_ns: depth as u64 * rng.weighted((2, 3 * MS), &[(1, MS), (1, 10 * MS)]),
            zero_ppm: rng.weighted((2, 0), &[(1, 50_000), (1, 200_000)]),
            read_ppm: rng.weighted((2, 500_000), &[(1, 200_000), (1, 800_000)]),
            hot_ppm: rng.weighted((1, 0), &[(1, 300_000), (1, 800_000)]),
            io_timeout_ms: rng.weighted((3, 0), &[(1, 500), (1, 3_000)]),
            net: draw_rdma(seed, draw_net(rng)),
            sched: draw_sched(rng),
            // Leases allow for 10 % between two clocks.
            drift_ppm: rng.weighted((1, 0), &[(2, 200), (1, 40_000)]),
            transient_error_ppm: 0,
            safety_ns: rng.between(8, 30) * SEC,
            fault_every_ns: rng.weighted((2, 2 * SEC), &[(1, 500 * MS), (1, 6 * SEC)]),
            fault_for_ns: rng.weighted((2, 2 * SEC), &[(1, 300 * MS), (1, 5 * SEC)]),
            down_for_ns: 0,
            gentle,
            faults,
            eager_reuse: rng.coin(),
            dirty_objects_max: rng.weighted((2, 16), &[(1, 200), (1, 65_536)]),
            history_changes: Stream::new(seed, "history").weighted((2, 65_536), &[(1, 8), (1, 60)]),
            page_cache_bytes: rng.weighted((2, 1 << 20), &[(1, 64 << 10)]),
            scrub: draw_scrub(seed),
            move_every_ns: draw_moves(seed),
            beyond: None,
            apps: None,
            meta: None,
        }
    }
}

/// In a third of the seeds copies are moved about.
fn draw_moves(seed: u64) -> Nanos {
    let mut rng = Stream::new(seed, "how often copies move");
    rng.weighted((4, 0), &[(1, 3 * SEC), (1, 800 * MS)])
}

/// Half of the seeds scrub, every few seconds.
fn draw_scrub(seed: u64) -> ScrubPlan {
    let mut rng = Stream::new(seed, "scrub");
    if rng.coin() {
        return ScrubPlan { light_secs: 0, deep_secs: 0 };
    }
    ScrubPlan {
        light_secs: rng.weighted((2, 2), &[(1, 0)]),
        deep_secs: rng.weighted((2, 4), &[(1, 1), (1, 10)]),
    }
}

fn draw_disk(rng: &mut Stream) -> DiskProfile {
    DiskProfile {
        read_ns: rng.weighted((2, 70 * US), &[(1, 15 * US), (1, 500 * US)]),
        write_ns: rng.weighted((2, 20 * US), &[(1, 100 * US), (1, MS)]),
        flush_ns: rng.weighted((1, 50 * US), &[(2, 500 * US), (1, 5 * MS)]),
        block_ns: 800,
        queue_depth: rng.weighted((3, 1024), &[(1, 64)]),
    }
}

fn draw_net(rng: &mut Stream) -> NetOptions {
    NetOptions {
        latency_ns: rng.weighted((2, 30 * US), &[(1, 200 * US), (1, 2 * MS)]),
        kib_ns: rng.weighted((2, 800), &[(1, 8_000)]),
        window_bytes: rng.weighted((1, 64 << 10), &[(1, 1 << 20)]),
        user_timeout_ns: rng.weighted((1, 2 * SEC), &[(1, 10 * SEC), (1, 120 * SEC)]),
        reset_ppm: rng.weighted((3, 0), &[(1, 50), (1, 1_000)]),
        loss_ppm: rng.weighted((2, 0), &[(1, 200), (1, 3_000)]),
        corrupt_ppm: rng.weighted((3, 0), &[(1, 300)]),
        ..NetOptions::default()
    }
}

/// In two of three seeds a part of the connections, or all, go over to RDMA. A stream of its own: everything else that a
/// seed draws is what it was when there was only TCP.
fn draw_rdma(seed: u64, net: NetOptions) -> NetOptions {
    let mut rng = Stream::new(seed, "share of RDMA");
    NetOptions {
        rdma_ppm: rng.weighted((3, 0), &[(3, 400_000), (3, 1_000_000)]),
        credits_kept_ppm: rng.weighted((3, 0), &[(1, 20_000), (1, 200_000)]),
        // The longest are longer than a peer waits.
        credits_kept_ns: rng.weighted((2, 100 * MS), &[(1, 2 * SEC), (1, 12 * SEC)]),
        ..net
    }
}

fn draw_sched(rng: &mut Stream) -> SchedOptions {
    SchedOptions {
        wake_ns: rng.weighted((2, 4 * US), &[(1, 60 * US)]),
        event_ns: rng.weighted((2, 700), &[(1, 5_000)]),
        batch_max: rng.weighted((2, 64), &[(1, 1), (1, 512)]),
        stall_ppm: rng.weighted((2, 0), &[(1, 500)]),
        stall_ns: 30 * MS,
    }
}

/// Each kind of fault is on in about half of the seeds, so that rare mixes get runs of their own.
fn draw_faults(rng: &mut Stream) -> (FaultWeights, bool) {
    let mut some = |weight: u32| if rng.coin() { weight } else { 0 };
    let mut faults = FaultWeights {
        kill: some(6),
        power: some(6),
        blackout: some(1),
        pause: some(5),
        stop: some(2),
        partition: some(4),
        one_way: some(4),
        link: 0,
        clog: some(3),
        reset: some(4),
        slow_disk: some(2),
        client_kill: some(2),
        damage: 0,
        write_fault: 0,
    };
    let gentle = rng.chance(400_000);
    if gentle && rng.chance(700_000) {
        faults.damage = 20;
        faults.write_fault = if rng.coin() { 10 } else { 0 };
    }
    if gentle {
        faults.blackout = 0;
    }
    (faults, gentle)
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#?}")
    }
}
