//! A cluster in the universe: nodes with their disks and processes, client machines, and the harness's own.

use crate::admin::{Admin, Board};
use crate::apps::client::AppClient;
use crate::apps::ledger::Ledger;
use crate::check::history::History;
use crate::check::primaries::{Primaries, Watcher};
use crate::meta::client::MetaClient;
use crate::options::Options;
use crate::run::Planted;
use crate::workload::{Desk, Mode, Tolerance, WorkClient};
use control::{ControlConfig, ControlCore, LEASE_RENEW_MS, LEASE_TTL_MS, MetaRegion, Voter};
use engine::metrics::CoreMetrics;
use engine::{CoreMsg, DataCore, DataCoreConfig, SCRUB_BYTES_PER_SECOND, SliceConfig};
use placement::{Disk, Slice};
use reactor::{DiskIndex, DiskInfo, Service};
use simenv::clock::NodeClock;
use simenv::rng::Stream;
use simenv::universe::{CoreSpec, DiskId, HostId, Universe};
use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use store::{DiskPlan, DiskSuper, SliceEntry, StoreOptions};
use wire::{CONTROL_CORE, ClusterId, CoreId, DiskUuid, NodeId, SliceId};

/// The cluster's name.
const CLUSTER: ClusterId = ClusterId(0x51e0);
/// Where control cores listen.
pub(crate) const CONTROL_PORT: u16 = 700;
/// Bytes of the metadata store's region: small, so that its log wraps and snapshots are taken.
const META_BYTES: u64 = 4 << 20;
/// Bytes of a control core's and a client's arena.
const SMALL_ARENA_BYTES: usize = 8 << 20;

/// Clients of the metadata store's own workload give up on a request after this long: the store itself does
/// after 5 s, and both shall happen.
const META_TIMEOUT_MS: u64 = 4_000;

/// How a node is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeState {
    /// Its process runs.
    Running,
    /// Its process is stopped by a signal.
    Paused,
    /// It was asked to stop and is finishing.
    Stopping,
    /// It has power and no process.
    Dead,
    /// It has no power.
    Off,
}

/// A node.
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its machine.
    pub host: HostId,
    /// How it is.
    pub state: NodeState,
    /// Its data disks.
    pub disks: Vec<DiskId>,
    /// What is on them.
    pub layouts: Vec<DiskSuper>,
    meta_disk: DiskId,
    /// Its processes so far.
    starts: u64,
}

/// What a process counts, kept after its end.
struct Counted {
    node: usize,
    /// Its node's first process.
    first: bool,
    metrics: Arc<CoreMetrics>,
    /// Losses of memory seen so far.
    lost: u64,
}

/// The cluster.
pub struct Cluster {
    /// The world it lives in.
    pub universe: Universe,
    /// What the seed decided.
    pub options: Rc<Options>,
    /// Its nodes.
    pub nodes: Vec<Node>,
    /// The clients' machines.
    pub clients: Vec<HostId>,
    /// The harness's client.
    pub board: Rc<RefCell<Board>>,
    /// The workload.
    pub desk: Rc<Desk>,
    /// The looker-on.
    pub primaries: Rc<RefCell<Primaries>>,
    /// From now on, clients that are started give up on operations after this long.
    pub patience_ms: Option<u64>,
    planted: Option<Planted>,
    rng: Stream,
    counted: Vec<Counted>,
}

pub(crate) fn node_ip(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, 1 + index as u8)
}

impl Cluster {
    /// Prepares disks, and starts every node's process and the harness's client.
    pub fn new(options: Rc<Options>, planted: Option<Planted>) -> Self {
        let mut universe = Universe::new(options.seed);
        universe.sched = options.sched;
        universe.net.options = options.net;
        let mut rng = Stream::new(options.seed, "cluster");
        let primaries = Rc::new(RefCell::new(Primaries::default()));
        universe.observer = Some(Box::new(Watcher(primaries.clone())));
        universe.trace.describe_mesh =
            |msg| msg.downcast_ref::<CoreMsg>().map_or_else(String::new, |msg| format!("{msg:?}"));
        let nodes =
            (0..options.nodes).map(|index| prepare(&mut universe, &options, &mut rng, index)).collect();
        let clients = (0..options.clients)
            .map(|index| {
                let clock = draw_clock(&options, &mut rng);
                universe.add_host(Ipv4Addr::new(10, 0, 1, 1 + index as u8), clock)
            })
            .collect();
        let harness = universe.add_host(Ipv4Addr::new(10, 0, 2, 1), NodeClock::default());
        let tolerance = Tolerance {
            media: options.faults.damage > 0
                || options.faults.write_fault > 0
                || options.beyond.as_ref().is_some_and(|plan| plan.hurts_media()),
            no_space: options.may_fill_up(),
        };
        let desk = Desk {
            history: RefCell::new(History::default()),
            mode: Cell::new(Mode::Work),
            now: Cell::new(0),
            busy: RefCell::new(vec![0; options.clients]),
            read_back: RefCell::new(vec![false; options.clients]),
            tolerate: tolerance,
            beyond: options.beyond.is_some(),
            open_ops: RefCell::default(),
            meta: RefCell::default(),
            ledger: RefCell::new(options.apps.as_ref().map_or_else(Ledger::default, |mix| {
                Ledger::new(mix, options.images, options.clients, tolerance.media || tolerance.no_space)
            })),
            unread: RefCell::default(),
        };
        let board = Rc::new(RefCell::new(Board::default()));
        let mut cluster = Self {
            universe,
            options,
            nodes,
            clients,
            board: board.clone(),
            desk: Rc::new(desk),
            primaries,
            patience_ms: None,
            planted,
            rng,
            counted: Vec::new(),
        };
        for index in 0..cluster.nodes.len() {
            cluster.start_node(index);
        }
        let admin = Admin::new(cluster.control_addrs(), board);
        cluster.spawn(harness, CoreId(0), SMALL_ARENA_BYTES, Vec::new(), Box::new(admin));
        cluster
    }

    fn spawn(
        &mut self,
        host: HostId,
        id: CoreId,
        arena_bytes: usize,
        disks: Vec<DiskId>,
        service: Box<dyn Service>,
    ) {
        let spawned = self.universe.spawn(host, CoreSpec { id, arena_bytes, disks, service });
        assert!(spawned.is_ok(), "no memory for an arena");
    }

    /// Where control cores listen.
    pub fn control_addrs(&self) -> Vec<SocketAddr> {
        (0..self.nodes.len()).map(|index| SocketAddr::from((node_ip(index), CONTROL_PORT))).collect()
    }

    /// Starts a node's process: a control core and its data cores.
    pub fn start_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.state = NodeState::Running;
        node.starts += 1;
        let first = node.starts == 1;
        let (id, host, meta_disk, data_disks) = (node.id, node.host, node.meta_disk, node.disks.clone());
        let cores = self.options.cores;
        // Slices are dealt to cores in turn; a core sees all disks, as in production.
        let mut per_core: Vec<Vec<SliceConfig>> = vec![Vec::new(); usize::from(cores)];
        let mut disks = Vec::new();
        let mut next = 0;
        for (disk_index, layout) in node.layouts.iter().enumerate() {
            let mut slices = Vec::new();
            for entry in &layout.slices {
                let core = next % usize::from(cores);
                next += 1;
                if let Some(list) = per_core.get_mut(core) {
                    list.push(SliceConfig { disk: DiskIndex(disk_index as u16), geometry: entry.geometry() });
                }
                slices.push(Slice { id: entry.slice, core: core as u16, size_bytes: entry.len });
            }
            disks.push(Disk { uuid: layout.disk, path: String::new(), slices });
        }
        let voters: Vec<Voter> = (0..self.options.voters.min(self.nodes.len()))
            .map(|index| Voter {
                node: NodeId(index as u64 + 1),
                addr: SocketAddr::from((node_ip(index), CONTROL_PORT)),
            })
            .collect();
        let control = ControlConfig {
            node: id,
            host: format!("host-{}", id.0),
            cluster: CLUSTER,
            control_listen: SocketAddr::from((node_ip(index), CONTROL_PORT)),
            advertise: IpAddr::V4(node_ip(index)),
            http_listen: None,
            links: None,
            voters,
            meta: Some(MetaRegion { disk: DiskIndex(0), offset: 0, len: META_BYTES }),
            data_cores: cores,
            disks,
            problems: Vec::new(),
            session: None,
            lease_ttl_ms: LEASE_TTL_MS,
            lease_renew_ms: LEASE_RENEW_MS,
            registry: Default::default(),
            status: Arc::default(),
            version: "sim".to_owned(),
            planted: self.planted.map(Planted::control).unwrap_or_default(),
            meta_planted: self.planted.map(Planted::consensus).unwrap_or_default(),
        };
        self.spawn(
            host,
            CONTROL_CORE,
            SMALL_ARENA_BYTES,
            vec![meta_disk],
            Box::new(ControlCore::new(control)),
        );
        for (core, slices) in per_core.into_iter().enumerate() {
            let ids: Vec<SliceId> = slices.iter().map(|slice| slice.geometry.slice).collect();
            let metrics = Arc::new(CoreMetrics::new(&ids));
            self.counted.push(Counted { node: index, first, metrics: metrics.clone(), lost: 0 });
            let config = DataCoreConfig {
                cluster: CLUSTER,
                node: id,
                listen: SocketAddr::from((node_ip(index), 0)),
                slices,
                metrics,
                store: StoreOptions {
                    cluster: Some(CLUSTER),
                    page_cache_bytes: self.options.page_cache_bytes,
                    dirty_objects_max: self.options.dirty_objects_max,
                    history_changes: self.options.history_changes,
                    planted: self.planted.and_then(Planted::store),
                    eager_reuse: self.options.eager_reuse,
                },
                scrub_bytes_per_second: SCRUB_BYTES_PER_SECOND,
                disk_timeout_s: engine::DISK_TIMEOUT_S,
                disk_probe_s: engine::DISK_PROBE_S,
                planted: self.planted.map(Planted::engine).unwrap_or_default(),
            };
            let arena = self.options.arena_bytes;
            let service = Box::new(DataCore::new(config));
            self.spawn(host, CoreId(core as u16), arena, data_disks.clone(), service);
        }
    }

    /// Whether a primary has begun to serve without anybody's memory since the last call, and a node whose
    /// first process has done so.
    pub fn memory_lost(&mut self) -> (bool, Option<NodeId>) {
        let (mut lost, mut wrongly) = (false, None);
        for counted in &mut self.counted {
            let now = counted.metrics.memory_lost.get();
            if now > counted.lost {
                counted.lost = now;
                lost = true;
                if counted.first {
                    wrongly = self.nodes.get(counted.node).map(|node| node.id);
                }
            }
        }
        (lost, wrongly)
    }

    /// Objects that scrubs have compared, and copies that they found bad or different.
    pub fn scrubbed(&self) -> (u64, u64) {
        self.counted.iter().fold((0, 0), |(objects, bad), counted| {
            (objects + counted.metrics.scrubbed_objects.get(), bad + counted.metrics.scrub_errors.get())
        })
    }

    /// Objects erased that PGs had left behind.
    pub fn strays_erased(&self) -> u64 {
        self.counted.iter().map(|counted| counted.metrics.erased.get()).sum()
    }

    /// A node that still looks for what PGs have left behind.
    pub fn strays_pending(&self) -> Option<NodeId> {
        let cores = usize::from(self.options.cores);
        (0..).zip(&self.nodes).find_map(|(index, node)| {
            let process = self.counted.iter().rev().filter(|counted| counted.node == index).take(cores);
            let pending = process.map(|counted| counted.metrics.strays_pending.get()).sum::<u64>();
            (pending > 0).then_some(node.id)
        })
    }

    /// Kills a node's process.
    pub fn kill_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.state = NodeState::Dead;
        self.universe.kill(node.host);
    }

    /// Cuts a node's power.
    pub fn power_off(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.state = NodeState::Off;
        let mut disks = node.disks.clone();
        disks.push(node.meta_disk);
        self.universe.power_off(node.host, &disks);
    }

    /// Asks a node's process to stop cleanly.
    pub fn stop_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.state = NodeState::Stopping;
        let cores = self.universe.hosts.get(node.host).map(|host| host.cores.clone()).unwrap_or_default();
        for core in cores {
            if self.universe.cores.get(core).is_some_and(|core| core.id == CONTROL_CORE) {
                self.universe.tell(core, CONTROL_CORE, Box::new(CoreMsg::Stop));
            }
        }
    }

    /// Brings a node back, whatever had become of it.
    pub fn revive(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        let host = node.host;
        match node.state {
            NodeState::Running => {}
            NodeState::Paused => {
                node.state = NodeState::Running;
                self.universe.resume(host);
            }
            NodeState::Stopping | NodeState::Dead => {
                // A process that does not finish its stop is killed, as an init system does.
                self.universe.kill(host);
                self.start_node(index);
            }
            NodeState::Off => {
                self.universe.power_on(host);
                self.start_node(index);
            }
        }
    }

    /// Stops a node's process by signal.
    pub fn pause_node(&mut self, index: usize) {
        let Some(node) = self.nodes.get_mut(index) else { return };
        node.state = NodeState::Paused;
        self.universe.pause(node.host);
    }

    /// Starts client process `index` on its machine.
    pub fn start_client(&mut self, index: usize) {
        let Some(&host) = self.clients.get(index) else { return };
        let usual = (self.options.io_timeout_ms > 0).then_some(self.options.io_timeout_ms);
        let options = client::Options {
            io_timeout_ms: self.patience_ms.or(usual),
            on_no_space: client::OnNoSpace::Fail,
            bug: self.planted.and_then(Planted::client),
            ..client::Options::default()
        };
        let rng = self.rng.fork();
        let mut addrs = self.control_addrs();
        let first = index % addrs.len().max(1);
        addrs.rotate_left(first);
        let (all, desk) = (self.options.clone(), self.desk.clone());
        let service: Box<dyn Service> = match &self.options.apps {
            Some(mix) => Box::new(AppClient::new(index, addrs, options, all, mix.clone(), desk, rng)),
            None if let Some(mix) = &self.options.meta => {
                let options = client::Options { admin_timeout_ms: META_TIMEOUT_MS, ..options };
                Box::new(MetaClient::new(index, addrs, options, &all, mix.clone(), desk, rng))
            }
            None => Box::new(WorkClient::new(index, addrs, options, all, desk, rng)),
        };
        self.spawn(host, CoreId(0), SMALL_ARENA_BYTES, Vec::new(), service);
    }

    /// Kills client process `index`: what it had under way has an unknown outcome.
    pub fn kill_client(&mut self, index: usize) {
        if let Some(&host) = self.clients.get(index) {
            self.universe.kill(host);
        }
        if let Some(busy) = self.desk.busy.borrow_mut().get_mut(index) {
            *busy = 0;
        }
        self.desk.open_ops.borrow_mut().retain(|(client, _), _| *client != index);
    }

    /// All slices, with the disk they lie on.
    pub fn slices(&self) -> Vec<(DiskId, SliceEntry)> {
        self.nodes
            .iter()
            .flat_map(|node| node.disks.iter().zip(&node.layouts))
            .flat_map(|(&disk, layout)| layout.slices.iter().map(move |entry| (disk, *entry)))
            .collect()
    }
}

fn draw_clock(options: &Options, rng: &mut Stream) -> NodeClock {
    let drift = i64::from(options.drift_ppm);
    NodeClock {
        origin: rng.below(1 << 50),
        drift_ppm: (rng.below(2 * drift as u64 + 1) as i64 - drift) as i32,
        wall_skew_ms: rng.below(240_000) as i64 - 120_000,
    }
}

fn prepare(universe: &mut Universe, options: &Options, rng: &mut Stream, index: usize) -> Node {
    let clock = draw_clock(options, rng);
    let host = universe.add_host(node_ip(index), clock);
    let info = |size_bytes| DiskInfo {
        size_bytes,
        atomic_bytes: options.atomic_bytes,
        write_through: options.write_through,
    };
    let mut disks = Vec::new();
    let mut layouts = Vec::new();
    for disk in 0..options.disks {
        let id =
            universe.add_disk(info((1 << 20) + options.slice_bytes * options.slices as u64), options.disk);
        let number = (index * options.disks + disk) as u64;
        let slices = (0..options.slices as u64).map(|nth| SliceId(100 * (number + 1) + nth)).collect();
        let plan = DiskPlan {
            cluster: CLUSTER,
            disk: DiskUuid(u128::from(number) + 1),
            node: Some(NodeId(index as u64 + 1)),
            disk_bytes: universe.disks.get(id).map_or(0, |disk| disk.info().size_bytes),
            slices,
        };
        if let (Ok(layout), Ok(writes), Some(disk)) =
            (plan.layout(), plan.writes(), universe.disks.get_mut(id))
        {
            for (offset, bytes) in writes {
                disk.preload(offset, &bytes);
            }
            layouts.push(layout);
        }
        disks.push(id);
    }
    let meta_disk = universe.add_disk(info(META_BYTES), options.disk);
    Node { id: NodeId(index as u64 + 1), host, state: NodeState::Dead, disks, layouts, meta_disk, starts: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_seed_draws_reaches_the_network_and_the_scheduler() {
        for seed in 0..20 {
            let options = Rc::new(Options::draw(seed));
            let cluster = Cluster::new(options.clone(), None);
            assert_eq!(cluster.universe.net.options, options.net, "seed {seed}");
            assert_eq!(cluster.universe.sched, options.sched, "seed {seed}");
        }
    }
}
