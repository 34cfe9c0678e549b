//! `instructions write|read N`: N operations of 4 KiB against three data cores, to be counted by callgrind.
//!
//! The cores are the ones that ship, with their stores, three copies of one PG between them; clock, disks and
//! network are the simulated ones, so that the same instructions run every time. The test beside it runs this
//! with two different N: the difference, divided by the operations, is the work for one operation on all
//! three nodes together, the simulated devices' share included. The command is for that test; a person runs
//! `cargo test -p instructions -- --nocapture`.
//!
//! Start reading at `main`.

mod client;

use client::{Client, Work};
use engine::metrics::CoreMetrics;
use engine::msg::{Member, PgUpdate};
use engine::{CoreMsg, DataCore, DataCoreConfig, Planted, SliceConfig};
use placement::{PgRecord, Pool};
use reactor::{DiskIndex, DiskInfo, Env, Event, Mono, Service};
use simenv::clock::{NodeClock, SEC, US};
use simenv::disk::DiskProfile;
use simenv::universe::{CoreIdx, CoreSpec, DiskId, Step, Universe};
use std::cell::RefCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use store::{DiskPlan, PrepareError, StoreOptions};
use wire::{
    BLOCK_BYTES, CONTROL_CORE, ClusterId, CoreId, DiskUuid, Epoch, NodeId, PgId, PoolId, Revision, SessionId,
    SliceId,
};

const CLUSTER: ClusterId = ClusterId(77);
/// The only PG.
pub const PG: PgId = PgId { pool: PoolId(1), index: 0 };
const NODES: u64 = 3;
const DISK_BYTES: u64 = 256 << 20;
const ARENA_BYTES: usize = 64 << 20;
const PORT: u16 = 7000;
/// Virtual time that everything may take.
const LIMIT_NS: u64 = 600 * SEC;

/// Why nothing could be counted.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("usage: instructions write|read OPERATIONS")]
    Usage,
    #[error("prepare a disk: {0}")]
    Prepare(#[from] PrepareError),
    #[error("no memory for a core's buffers")]
    NoBuffers(#[from] reactor::NoBuffers),
    #[error("{0} did not happen in {LIMIT_NS} ns of virtual time")]
    Late(&'static str),
    #[error("an operation failed")]
    Operation,
}

/// What the cores told their nodes' control cores.
type Told = Rc<RefCell<Vec<CoreMsg>>>;

/// A control core that only listens.
struct Control(Told);

impl Service for Control {
    fn start(&mut self, _: &mut dyn Env) {}
    fn event(&mut self, _: &mut dyn Env, event: Event) {
        if let Event::Mesh { msg, .. } = event
            && let Ok(msg) = CoreMsg::from_mesh(msg)
        {
            self.0.borrow_mut().push(msg);
        }
    }
    fn flush(&mut self, _: &mut dyn Env) {}
}

fn ip(node: u64) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, node as u8)
}

fn slice(node: u64) -> SliceId {
    SliceId(node * 10)
}

fn prepare(universe: &mut Universe, node: u64) -> Result<(DiskId, SliceConfig), Failed> {
    let plan = DiskPlan {
        cluster: CLUSTER,
        disk: DiskUuid(u128::from(node)),
        node: Some(NodeId(node)),
        disk_bytes: DISK_BYTES,
        slices: vec![slice(node)],
    };
    let info = DiskInfo { size_bytes: DISK_BYTES, atomic_bytes: 4096, write_through: true };
    let profile = DiskProfile {
        read_ns: 20 * US,
        write_ns: 20 * US,
        flush_ns: 50 * US,
        block_ns: 500,
        queue_depth: 1024,
    };
    let disk = universe.add_disk(info, profile);
    for (offset, mut bytes) in plan.writes()? {
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        if let Some(disk) = universe.disks.get_mut(disk) {
            disk.preload(offset, &bytes);
        }
    }
    let geometry = plan.layout()?.slices.first().map(|entry| entry.geometry()).ok_or(Failed::Usage)?;
    Ok((disk, SliceConfig { disk: DiskIndex(0), geometry }))
}

fn spawn(universe: &mut Universe, node: u64, told: &Told) -> Result<CoreIdx, Failed> {
    let (disk, slice_config) = prepare(universe, node)?;
    let host = universe.add_host(ip(node), NodeClock::default());
    let control = Box::new(Control(told.clone()));
    universe
        .spawn(host, CoreSpec { id: CONTROL_CORE, arena_bytes: 0, disks: Vec::new(), service: control })?;
    let config = DataCoreConfig {
        cluster: CLUSTER,
        node: NodeId(node),
        listen: SocketAddr::from((ip(node), PORT)),
        slices: vec![slice_config],
        metrics: Arc::new(CoreMetrics::new(&[slice(node)])),
        store: StoreOptions::default(),
        scrub_bytes_per_second: engine::SCRUB_BYTES_PER_SECOND,
        disk_timeout_s: engine::DISK_TIMEOUT_S,
        disk_probe_s: engine::DISK_PROBE_S,
        planted: Planted::none(),
    };
    let service = Box::new(DataCore::new(config));
    Ok(universe
        .spawn(host, CoreSpec { id: CoreId(0), arena_bytes: ARENA_BYTES, disks: vec![disk], service })?)
}

/// All nodes are members and in sync, the first is the primary.
fn update() -> PgUpdate {
    let slices: Vec<SliceId> = (1..=NODES).map(slice).collect();
    let pool = Pool {
        id: PG.pool,
        name: "p".into(),
        copies: 3,
        min_copies: 2,
        pg_count: 1,
        failure_domain: Default::default(),
        removing: false,
        scrub: Default::default(),
    };
    let record = PgRecord {
        epoch: Epoch(1),
        target: slices.clone(),
        acting: slices.clone(),
        primary: Some(slice(1)),
        primary_session: Some(SessionId(1)),
        in_sync: slices,
    };
    let member = |node| Member {
        slice: slice(node),
        node: NodeId(node),
        session: Some(SessionId(node)),
        addr: SocketAddr::from((ip(node), PORT)),
    };
    PgUpdate { pg: PG, pool, record, revision: Revision(1), members: (1..=NODES).map(member).collect() }
}

fn until(universe: &mut Universe, what: &'static str, mut done: impl FnMut() -> bool) -> Result<(), Failed> {
    while !done() {
        if universe.step() == Step::Empty || universe.now > LIMIT_NS {
            return Err(Failed::Late(what));
        }
    }
    Ok(())
}

fn run() -> Result<(), Failed> {
    let mut arguments = std::env::args().skip(1);
    let work = match arguments.next().as_deref() {
        Some("write") => Work::Write,
        Some("read") => Work::Read,
        _ => return Err(Failed::Usage),
    };
    let count: u64 = arguments.next().and_then(|count| count.parse().ok()).ok_or(Failed::Usage)?;

    let mut universe = Universe::new(1);
    let told = Told::default();
    let mut cores = Vec::new();
    for node in 1..=NODES {
        cores.push(spawn(&mut universe, node, &told)?);
    }
    let open = |msg: &CoreMsg| matches!(msg, CoreMsg::SliceOpened { result: Ok(_), .. });
    until(&mut universe, "the slices open", || {
        told.borrow().iter().filter(|msg| open(msg)).count() == NODES as usize
    })?;
    for (core, node) in cores.iter().zip(1..) {
        universe.tell(*core, CONTROL_CORE, CoreMsg::Identity { session: SessionId(node) }.into_mesh());
        universe.tell(*core, CONTROL_CORE, CoreMsg::Lease { until: Mono(2 * LIMIT_NS) }.into_mesh());
        universe.tell(*core, CONTROL_CORE, CoreMsg::Pg(update()).into_mesh());
    }
    let clean = |msg: &CoreMsg| matches!(msg, CoreMsg::PgReport(report) if report.state == "active+clean");
    until(&mut universe, "the PG is active", || told.borrow().iter().any(clean))?;

    let host = universe.add_host(ip(NODES + 1), NodeClock::default());
    let (client, progress) = Client::new(SocketAddr::from((ip(1), PORT)), work, count);
    let spec =
        CoreSpec { id: CoreId(0), arena_bytes: ARENA_BYTES, disks: Vec::new(), service: Box::new(client) };
    universe.spawn(host, spec)?;
    until(&mut universe, "all operations", || progress.borrow().failed || progress.borrow().done == count)?;
    if progress.borrow().failed { Err(Failed::Operation) } else { Ok(()) }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}
