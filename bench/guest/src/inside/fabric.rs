//! Tests of a cluster whose nodes and clients reach each other by RDMA, over soft RoCE.

use super::cluster::{IMAGE, Nodes, POOL};
use super::power_cut::Writer;
use super::system::{LIMIT, wait_until};
use super::{Context, offers, pattern, rdma};
use crate::error::{GuestError, demand};
use crate::manifest::Ack;
use crate::program;
use cli::deadline::{Deadline, Stopwatch};
use cli::fio::{FioJob, Target};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of each node's disk, a sparse file in memory.
const DISK_BYTES: u64 = 384 << 20;
/// Blocks of the image that is written, and how many writes come in each part of a test.
const BLOCKS: u64 = 1024;
const WRITES: u64 = 120;
/// Connections of a node that use RDMA.
const CONNECTIONS: &str = "drystone_rdma_connections";
/// Connections of a node that have switched to it.
const SWITCHES: &str = "drystone_rdma_switches_total";
/// What a link's row says after its port went down.
const PORT_DOWN: &str = "the port is down";
/// Those that broke while they used it.
const BREAKS: &str = "drystone_rdma_breaks_total";
/// Work requests of a node, and the times that some were handed to the device.
const WORK: &str = "drystone_rdma_work_requests_total";
const DOORBELLS: &str = "drystone_rdma_doorbells_total";
/// Seconds of each measurement.
const SECONDS: u32 = 2;
/// Queue depths at which RDMA and TCP are compared.
const DEPTHS: [u32; 2] = [1, 32];

/// Three nodes on files in memory, in a directory that is removed afterwards.
struct Fabric {
    nodes: Nodes,
    _files: tempfile::TempDir,
}

impl Fabric {
    fn start(context: &Context, transport: &str) -> Result<Self, GuestError> {
        let files = tempfile::tempdir_in("/dev/shm").map_err(GuestError::io("make a directory"))?;
        let disks: Vec<Vec<PathBuf>> =
            (1..=3).map(|number| vec![files.path().join(format!("disk{number}"))]).collect();
        let flags = ["--transport", transport];
        let nodes = Nodes::start_with(context, files.path(), &disks, DISK_BYTES, &flags)?;
        Ok(Self { nodes, _files: files })
    }

    /// The same with an image, a client, and its first writes.
    fn with_load(context: &Context, transport: &str) -> Result<(Self, Load), GuestError> {
        let fabric = Self::start(context, transport)?;
        fabric.nodes.make_image(BLOCKS * pattern::BLOCK as u64)?;
        let writer = Writer::open(&fabric.nodes.controls(), BLOCKS, 1)?;
        let mut load = Load { writer, acked: Vec::new() };
        load.more()?;
        Ok((fabric, load))
    }

    /// What `status --links` shows of connections that nodes' data cores have made to each other: the cells of each row.
    fn rows_between_nodes(&self) -> Result<Vec<Vec<String>>, GuestError> {
        let page = self.nodes.command(&["status", "--links"])?;
        let cells = |line: &str| -> Vec<String> {
            line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect()
        };
        let wanted = |row: &Vec<String>| {
            row.iter().any(|cell| cell == "out") && row.get(1).is_some_and(|core| core != "control")
        };
        Ok(page.lines().map(cells).filter(wanted).collect())
    }

    /// The sum of a counter over all nodes.
    fn sum(&self, name: &str) -> Result<f64, GuestError> {
        (0..3).map(|index| self.nodes.counter(index, name)).sum()
    }
}

/// A client of the image and what it has written.
struct Load {
    writer: Writer,
    acked: Vec<Ack>,
}

impl Load {
    /// Some more writes.
    fn more(&mut self) -> Result<(), GuestError> {
        self.writer.write(WRITES, |ack| {
            self.acked.push(ack);
            Ok(())
        })
    }

    /// Every block holds its last acknowledged write.
    fn verify(&mut self) -> Result<(), GuestError> {
        self.writer.verify(&self.acked)
    }
}

pub fn net_rdma_passes_the_conformance_suite(context: &Context) -> Result<(), GuestError> {
    let _device = rdma::make()?;
    let tests = context.manifest.test_program("net-rdma", "conformance")?;
    let said = program::run(Command::new(&tests.path).arg("--test-threads=1"))?;
    demand(said.contains("test result: ok. 2 passed"), || said.clone())
}

/// Verified I/O, small and large, and a node that is killed in the middle and comes back.
pub fn three_nodes_serve_over_rdma_and_one_dies(context: &Context) -> Result<(), GuestError> {
    let _device = rdma::make()?;
    let (mut fabric, mut load) = Fabric::with_load(context, "rdma")?;
    fabric.nodes.round_trip("large", Path::new("/dev/shm"))?;
    verify_with_fio(context, &fabric.nodes)?;
    demand(fabric.sum(SWITCHES)? >= 6.0, || "no node has used RDMA".into())?;
    let links = fabric.nodes.command(&["status", "--links"])?;
    let measured = |line: &&str| line.contains("rdma") && line.contains(" us");
    demand(links.lines().filter(measured).count() >= 3, || format!("links are not shown as RDMA:\n{links}"))?;
    let broken = fabric.sum(BREAKS)?;
    demand(broken == 0.0, || format!("{broken} connections have broken without cause"))?;
    fabric.nodes.kill(2)?;
    load.more()?;
    fabric.nodes.restart(2)?;
    load.more()?;
    fabric.nodes.wait_clean()?;
    demand(fabric.nodes.counter(2, SWITCHES)? >= 1.0, || "the returned node does not use RDMA".into())?;
    load.verify()?;
    fabric.nodes.end(&[])
}

/// A node stands still, is replaced, and wakes with messages of before in its queues.
pub fn a_paused_node_is_replaced_and_wakes_over_rdma(context: &Context) -> Result<(), GuestError> {
    let _device = rdma::make()?;
    let (fabric, mut load) = Fabric::with_load(context, "rdma")?;
    fabric.nodes.pause(0)?;
    load.more()?;
    fabric.nodes.resume(0)?;
    load.more()?;
    fabric.nodes.wait_clean()?;
    load.verify()?;
    fabric.nodes.end(&[])
}

/// The path of RDMA fails under I/O, and later works again; TCP, on another path, always does.
pub fn a_link_goes_down_and_tcp_takes_over_until_it_is_back(context: &Context) -> Result<(), GuestError> {
    let device = rdma::make()?;
    let (fabric, mut load) = Fabric::with_load(context, "auto")?;
    wait_until("nodes to use RDMA", || Ok(fabric.sum(SWITCHES)? >= 6.0))?;
    device.set("down")?;
    load.more()?;
    wait_until("all RDMA connections to end", || Ok(fabric.sum(CONNECTIONS)? == 0.0))?;
    demand(fabric.sum(BREAKS)? > 0.0, || "no connection has broken".into())?;
    load.more()?;
    let shown = fabric.rows_between_nodes()?;
    let why = |row: &Vec<String>| row.last().is_some_and(|why| why == PORT_DOWN);
    demand(shown.iter().any(why), || format!("no link says why it is on TCP: {shown:?}"))?;
    demand(shown.iter().all(|row| row.iter().any(|cell| cell == "tcp")), || {
        format!("not all on TCP: {shown:?}")
    })?;
    let before = fabric.sum(SWITCHES)?;
    device.set("up")?;
    wait_until("nodes to use RDMA again", || Ok(fabric.sum(SWITCHES)? >= before + 6.0))?;
    load.more()?;
    let both = |row: &Vec<String>| why(row) && row.iter().filter(|cell| *cell == "rdma").count() == 2;
    wait_until("links to be shown as RDMA, with what had happened", || {
        Ok(fabric.rows_between_nodes()?.iter().any(both))
    })?;
    fabric.nodes.wait_clean()?;
    load.verify()?;
    fabric.nodes.end(&[])
}

/// The device is removed while nodes and a client have it open: they let go of it and go on over TCP.
pub fn a_device_is_removed_and_tcp_takes_over(context: &Context) -> Result<(), GuestError> {
    let device = rdma::make()?;
    let (fabric, mut load) = Fabric::with_load(context, "auto")?;
    wait_until("nodes to use RDMA", || Ok(fabric.sum(SWITCHES)? >= 6.0))?;
    // Returns when nobody has the device open any more; the client is one of those, and has to be at work.
    let removing = std::thread::Builder::new().spawn(move || drop(device));
    let removing = removing.map_err(GuestError::io("start a thread"))?;
    let deadline = Deadline::after(LIMIT);
    while !removing.is_finished() {
        load.more()?;
        let late =
            || GuestError::TimedOut { what: "the device to be removed".into(), seconds: LIMIT.as_secs() };
        if deadline.passed() {
            return Err(late());
        }
    }
    demand(fabric.sum(CONNECTIONS)? == 0.0, || "connections use a device that is gone".into())?;
    load.more()?;
    fabric.nodes.wait_clean()?;
    load.verify()?;
    fabric.nodes.end(&[])
}

/// Offers that cannot be meant, a peer that is nowhere, steps out of order: others do not notice.
pub fn forged_offers_harm_nobody(context: &Context) -> Result<(), GuestError> {
    let _device = rdma::make()?;
    let (fabric, mut load) = Fabric::with_load(context, "rdma")?;
    let core = fabric.nodes.data_address(0)?;
    let accepted = offers::answer_to(core, &offers::with_mtu(9))?;
    demand(!accepted, || "an offer with an impossible MTU was accepted".into())?;
    let accepted = offers::answer_to(core, &[7; 32])?;
    demand(!accepted, || "bytes that are no offer were accepted".into())?;
    // Accepted or not, as the device sees it: there is nobody at the other end.
    offers::answer_to(core, &offers::from_nowhere())?;
    offers::switch_without_probe(core)?;
    demand(offers::switch_without_offer(core)?, || "a switch without an offer was taken".into())?;
    load.more()?;
    let broken = fabric.nodes.counter(1, BREAKS)? + fabric.nodes.counter(2, BREAKS)?;
    demand(broken == 0.0, || format!("{broken} connections of others have broken"))?;
    load.verify()?;
    fabric.nodes.end(&[])
}

/// Stock fio writes an image through the engine, reads it back and verifies it.
fn verify_with_fio(context: &Context, nodes: &Nodes) -> Result<(), GuestError> {
    nodes.command(&["image", "create", "fio", "--pool", POOL, "--size", "4MiB"])?;
    let extra = ["--size=100%", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
    fio(context, nodes, "fio", "randwrite", 8, &extra.map(str::to_owned)).map(|_| ())
}

struct Measured {
    ios: u64,
    iops: f64,
    p50_us: f64,
    cpu_us_per_op: f64,
}

/// One run of fio on the image, with the CPU time of nodes and fio.
fn fio(
    context: &Context,
    nodes: &Nodes,
    image: &str,
    rw: &'static str,
    depth: u32,
    extra: &[String],
) -> Result<Measured, GuestError> {
    let job = FioJob { name: "fabric".into(), rw, bs: "4k", depth, extra: extra.to_vec() };
    let (engine, image) = (context.manifest.engine.clone(), image.to_owned());
    let target = Target::Image { engine, cluster: nodes.cluster_flag(), image };
    let before = nodes.cpu_time()?;
    let mut run = job.spawn(&target, Path::new("/dev/shm"))?;
    let late = || GuestError::TimedOut { what: "fio to end".into(), seconds: LIMIT.as_secs() };
    let result = run.wait_until(Deadline::after(LIMIT))?.ok_or_else(late)?;
    demand(result.ios > 0, || "fio has done nothing".into())?;
    let cpu = nodes.cpu_time()?.saturating_sub(before) + result.cpu;
    let cpu_us_per_op = cpu.as_secs_f64() * 1e6 / result.ios as f64;
    Ok(Measured { ios: result.ios, iops: result.iops, p50_us: result.p50_us, cpu_us_per_op })
}

/// Not a test of speed: says what both cost, in one boot, one after the other.
pub fn rdma_and_tcp_are_compared(context: &Context) -> Result<(), GuestError> {
    let _device = rdma::make()?;
    let watch = Stopwatch::start();
    let mut lines = Vec::new();
    for transport in ["rdma", "tcp"] {
        let fabric = Fabric::start(context, transport)?;
        fabric.nodes.make_image(16 << 20)?;
        let extra =
            [format!("--runtime={SECONDS}"), "--time_based".into(), format!("--transport={transport}")];
        for rw in ["randwrite", "randread"] {
            for depth in DEPTHS {
                let before = (fabric.sum(WORK)?, fabric.sum(DOORBELLS)?);
                let run = fio(context, &fabric.nodes, IMAGE, rw, depth, &extra)?;
                let per_op = |after: f64, before: f64| (after - before) / run.ios as f64;
                let work = per_op(fabric.sum(WORK)?, before.0);
                let bells = per_op(fabric.sum(DOORBELLS)?, before.1);
                lines.push(format!(
                    "figure {rw} depth {depth} {transport}: {:.0} IOPS, p50 {:.0} us, CPU {:.0} us per operation, \
                     nodes' work requests {work:.2} and doorbells {bells:.2} per operation",
                    run.iops, run.p50_us, run.cpu_us_per_op
                ));
            }
        }
        let used = fabric.sum(SWITCHES)? > 0.0;
        demand(used == (transport == "rdma"), || format!("{transport} was asked for and not used"))?;
        fabric.nodes.end(&[])?;
    }
    lines.push(format!("figure all of it in {} s", watch.elapsed().as_secs()));
    lines.iter().try_for_each(|line| super::say(&context.share, line))
}
