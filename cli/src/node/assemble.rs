//! From a configuration to the plans of a node's cores.

use super::late::LatePlan;
use super::layout;
use super::metrics::{DataCollector, LoopCollector};
use crate::config::{NodeConfig, Poll, host_allows_locking};
use crate::disks::{self, OwnDisk};
use crate::error::{CliError, DiskProblem};
use crate::links;
use control::{ControlConfig, ControlCore, ControlStatus, LinksPage, MetaRegion, Voter};
use engine::metrics::CoreMetrics;
use engine::{DataCore, Planted};
use engine::{DataCoreConfig, SliceConfig};
use net_rdma::Plan;
use net_tcp::TcpTransport;
use placement::{Disk, Slice};
use prometheus::Registry;
use reactor::DiskIndex;
use reactor::backend::{
    CoreOptions, CorePlan, CoreStats, Cpu, DiskFile, LateDisks, Polling, Transport, allowed_cpus,
};
use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;
use store::StoreOptions;
use wire::{CONTROL_CORE, CoreId, SliceId};

/// Buffers of the control core: connections of tools and nodes with messages of up to 1 MiB.
const CONTROL_BUFFER_BYTES: usize = 32 << 20;
/// What glommio locks for each core's executor, which counts against the same limit as our buffers.
const EXECUTOR_LOCKED_BYTES: u64 = 512 << 10;
/// What a ring itself may lock.
const RING_LOCKED_BYTES: u64 = 256 << 10;

/// A node that is ready to be launched.
pub struct Assembled {
    /// Its cores.
    pub plans: Vec<CorePlan>,
    /// What becomes of it.
    pub status: Arc<ControlStatus>,
    /// How it takes further disks.
    pub late: LatePlan,
}

/// Opens and checks everything that a node needs and plans its cores.
pub fn assemble(config: &NodeConfig) -> Result<Assembled, CliError> {
    let failed = |why: String| CliError::Node { node: config.id, why };
    network(config).check().map_err(|error| failed(error.to_string()))?;
    let (disks, problems) = open_disks(config)?;
    let meta = meta_file(config)?;

    let allowed = allowed_cpus();
    let slices: usize = disks.iter().map(|disk| disk.superblock.slices.len()).sum();
    let cores = layout::core_count(config.cores, allowed.len(), slices);
    let hands = layout::deal(&disks, cores);
    let cpus = layout::cpus(config.cpus.as_deref(), &allowed, cores);
    let polling = match config.poll {
        Poll::Auto => Polling::Auto,
        Poll::Never => Polling::Never,
    };
    let rings = match disks.iter().any(|disk| disk.file.is_polled(polling)) {
        true => 2,
        false => 1,
    };
    let registered = registered_bytes(config, cores, rings);
    tracing::info!(
        node = %config.id, cores, slices, ?cpus, registered_bytes_per_core = registered, "node starts"
    );

    let registry = Registry::new();
    let status = Arc::new(ControlStatus::default());
    let mut plans = Vec::new();
    let mut loops = Vec::new();
    let mut data = Vec::new();
    let files: Vec<Arc<DiskFile>> = disks.iter().map(|disk| disk.file.clone()).collect();
    let late = LatePlan {
        disks: LateDisks::behind(files.len()),
        cluster: config.cluster,
        node: config.id,
        cores: hands.len() as u16,
        dealt: Arc::new(AtomicUsize::new(slices)),
    };
    for (index, (hand, cpu)) in hands.iter().zip(cpus).enumerate() {
        let core = CoreId(index as u16);
        let stats = Arc::<CoreStats>::default();
        loops.push((core, stats.clone()));
        let ids: Vec<SliceId> = hand.iter().map(|slice| slice.geometry.slice).collect();
        let metrics = Arc::new(CoreMetrics::new(&ids));
        data.push((core, metrics.clone()));
        let options = CoreOptions {
            disks: files.clone(),
            late_disks: late.disks.clone(),
            arena_bytes: config.buffer_bytes as usize,
            registered_bytes_max: registered,
            polling,
            spin: Duration::from_micros(u64::from(config.spin_us)),
            stats,
            ..CoreOptions::default()
        };
        let scrub_rate = (config.scrub_rate / hands.len() as u64).max(1);
        plans.push(data_core(config, core, cpu, options, hand.clone(), metrics, scrub_rate));
    }
    let stats = Arc::<CoreStats>::default();
    loops.push((CONTROL_CORE, stats.clone()));
    let linked = loops.clone();
    let collector = LoopCollector::new(loops).map_err(|error| failed(error.to_string()))?;
    registry.register(Box::new(collector)).map_err(|error| failed(error.to_string()))?;
    let collector = DataCollector::new(data).map_err(|error| failed(error.to_string()))?;
    registry.register(Box::new(collector)).map_err(|error| failed(error.to_string()))?;

    let mut control = control_config(config, &disks, &hands, &meta, registry, status.clone());
    control.problems = problems;
    control.links = Some(LinksPage::new(move || links::page(&linked)));
    plans.push(control_core(control, meta, stats, config.spin_us));
    Ok(Assembled { plans, status, late })
}

/// The node's disks, and what is wrong with those that it has to do without. A node starts as long as one of
/// its disks can be used: a broken one must not take the others with it.
fn open_disks(config: &NodeConfig) -> Result<(Vec<OwnDisk>, Vec<String>), CliError> {
    let (mut disks, mut problems) = (Vec::<OwnDisk>::new(), Vec::new());
    let mut first = None;
    for path in &config.disks {
        match disks::open_for_node(path, config.nvme.into(), config.cluster, config.id) {
            Ok(disk) => {
                let same = disks.iter().find(|other| other.superblock.disk == disk.superblock.disk);
                if let Some(other) = same {
                    let problem = DiskProblem::Twice { other: other.file.path().into() };
                    return Err(CliError::Disk { path: path.clone(), problem });
                }
                disks.push(disk);
            }
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "the node starts without a disk");
                problems.push(error.to_string());
                first = first.or(Some(error));
            }
        }
    }
    match first {
        Some(error) if disks.is_empty() => Err(error),
        _ => Ok((disks, problems)),
    }
}

fn data_core(
    config: &NodeConfig,
    core: CoreId,
    cpu: Cpu,
    options: CoreOptions,
    slices: Vec<SliceConfig>,
    metrics: Arc<CoreMetrics>,
    scrub_bytes_per_second: u64,
) -> CorePlan {
    let port = match config.data.port() {
        0 => 0,
        first => first.saturating_add(core.0),
    };
    let service = DataCoreConfig {
        cluster: config.cluster,
        node: config.id,
        listen: SocketAddr::new(config.data.ip(), port),
        slices,
        metrics,
        store: StoreOptions { cluster: Some(config.cluster), ..StoreOptions::default() },
        scrub_bytes_per_second,
        disk_timeout_s: config.disk_timeout,
        disk_probe_s: config.disk_probe,
        planted: Planted::default(),
    };
    let network = network(config);
    CorePlan {
        core,
        cpu,
        options,
        transport: Box::new(move || data_transport(&network)),
        service: Box::new(move || Box::new(DataCore::new(service))),
    }
}

/// How this node's data travels.
fn network(config: &NodeConfig) -> Plan {
    Plan { choice: config.transport, device: config.rdma_device.clone(), address: Some(config.data.ip()) }
}

/// A data core's transport. That the device is there was checked when the node started.
fn data_transport(plan: &Plan) -> Box<dyn Transport> {
    plan.transport(TcpTransport::boxed, TcpTransport::beneath).unwrap_or_else(|error| {
        tracing::error!(%error, "RDMA cannot be used; this core uses TCP");
        TcpTransport::boxed()
    })
}

fn control_config(
    config: &NodeConfig,
    disks: &[OwnDisk],
    hands: &[Vec<SliceConfig>],
    meta: &DiskFile,
    registry: Registry,
    status: Arc<ControlStatus>,
) -> ControlConfig {
    let published = |disk: &OwnDisk| Disk {
        uuid: disk.superblock.disk,
        path: disk.file.path().display().to_string(),
        slices: disk
            .superblock
            .slices
            .iter()
            .map(|entry| Slice {
                id: entry.slice,
                core: layout::owner(hands, entry.slice),
                size_bytes: entry.len,
            })
            .collect(),
    };
    ControlConfig {
        node: config.id,
        host: config.host.clone(),
        cluster: config.cluster,
        control_listen: config.control,
        advertise: config.control.ip(),
        http_listen: Some(config.http),
        links: None,
        voters: config.voters.iter().map(|v| Voter { node: v.node, addr: v.address }).collect(),
        meta: Some(MetaRegion { disk: DiskIndex(0), offset: 0, len: meta.info().size_bytes }),
        data_cores: hands.len() as u16,
        disks: disks.iter().map(published).collect(),
        problems: Vec::new(),
        session: None,
        lease_ttl_ms: control::LEASE_TTL_MS,
        lease_renew_ms: control::LEASE_RENEW_MS,
        registry,
        status,
        version: env!("CARGO_PKG_VERSION").to_string(),
        planted: Default::default(),
        meta_planted: Default::default(),
    }
}

fn control_core(config: ControlConfig, meta: Arc<DiskFile>, stats: Arc<CoreStats>, spin_us: u32) -> CorePlan {
    let options = CoreOptions {
        disks: vec![meta],
        arena_bytes: CONTROL_BUFFER_BYTES,
        // Metadata writes are few: the locked memory is better spent on data.
        registered_bytes_max: 0,
        spin: Duration::from_micros(u64::from(spin_us)),
        stats,
        ..CoreOptions::default()
    };
    CorePlan {
        core: CONTROL_CORE,
        cpu: Cpu::Floating,
        options,
        transport: Box::new(TcpTransport::boxed),
        service: Box::new(move || Box::new(ControlCore::new(config))),
    }
}

/// The metadata region: a file in the node's directory, made with its full size when the node first
/// starts, and locked like a disk. A node that does not vote has one, too, without contents: it may become a voter.
fn meta_file(config: &NodeConfig) -> Result<Arc<DiskFile>, CliError> {
    let failed =
        |what: &str, path: &Path, source| CliError::Io { what: format!("{what} {}", path.display()), source };
    let dir = &config.data_dir;
    std::fs::create_dir_all(dir).map_err(|error| failed("make directory", dir, error))?;
    let path = dir.join("meta");
    if !path.exists() {
        // Made under another name first: a file under the final one always has its full size.
        let part = dir.join("meta.part");
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&part)
            .and_then(|file| file.set_len(config.meta_bytes).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&part, &path))
            .map_err(|error| failed("make", &path, error))?;
    }
    let file = DiskFile::open(&path)?;
    if file.info().size_bytes != config.meta_bytes {
        tracing::warn!(
            path = %path.display(),
            has = file.info().size_bytes,
            configured = config.meta_bytes,
            "the metadata region keeps the size it was made with"
        );
    }
    Ok(file)
}

/// Locked memory of a node with so many data cores, its buffers apart.
pub fn locked_besides_buffers(cores: u16, rings: u64) -> u64 {
    (u64::from(cores) + 1) * (EXECUTOR_LOCKED_BYTES + rings * RING_LOCKED_BYTES)
}

/// How much of each data core's buffers to register: all of it where the memlock limit allows, else an
/// equal share of what is left of the limit. The ring says so in the log when even that is refused.
///
/// A core that polls has two rings, and the kernel counts what is registered for each.
fn registered_bytes(config: &NodeConfig, cores: u16, rings: u64) -> usize {
    let wanted = config.buffer_bytes;
    let Some(limit) = host_allows_locking() else { return wanted as usize };
    let share =
        limit.saturating_sub(locked_besides_buffers(cores, rings)) / (u64::from(cores.max(1)) * rings);
    if share < wanted {
        tracing::info!(
            limit_bytes = limit,
            wanted_bytes_per_core = wanted,
            possible_bytes_per_core = share,
            "the memlock limit is too low to register all buffers: the rest works, a little slower \
             (LimitMEMLOCK= in systemd, or ulimit -l)"
        );
    }
    wanted.min(share) as usize
}
