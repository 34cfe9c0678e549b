//! Tests of a cluster whose disks are NVMe partitions.

use super::Context;
use super::cluster::{IMAGE, Nodes, POOL};
use super::drive::Drive;
use super::pattern;
use super::system::{LIMIT, Mount, utf8};
use crate::error::{GuestError, demand};
use cli::deadline::Deadline;
use cli::fio::{FioJob, Target};
use placement::PG_STRIPE_OBJECTS;
use std::path::Path;

/// Size of the image that fio verifies.
const FIO_BYTES: &str = "4MiB";
/// Blocks of the image that is written while a drive is pulled, and how many writes come before and after.
///
/// An image lies in no more placement groups than it has stripes. With two of them, every fourth time nothing at all is
/// on the drive that is pulled; with sixteen, once in 65,000 times.
const BLOCKS: u64 = 16 * PG_STRIPE_OBJECTS * wire::OBJECT_BYTES as u64 / pattern::BLOCK as u64;
const WRITES: u64 = 150;
/// Placement groups there.
const PULLED_PGS: &str = "32";

/// Where nodes keep their own files in a boot.
fn files(at: &Path) -> Result<Mount, GuestError> {
    Mount::fresh(&Drive::with_serial("parts")?.partition(4)?, at)
}

/// Flags of nodes that use NVMe commands of their own, and what they have open then.
const PASSTHROUGH: [&str; 2] = ["--nvme", "passthrough"];
const GENERIC: &str = "/dev/ng";

pub fn three_nodes_serve_an_image_from_partitions(context: &Context) -> Result<(), GuestError> {
    serve_from_partitions(context, &[])
}

pub fn three_nodes_serve_by_nvme_commands(context: &Context) -> Result<(), GuestError> {
    serve_from_partitions(context, &PASSTHROUGH)
}

fn serve_from_partitions(context: &Context, flags: &[&str]) -> Result<(), GuestError> {
    let files = files(Path::new("/run/serving"))?;
    let parts = Drive::with_serial("parts")?;
    let disks = (1..=3).map(|number| Ok(vec![parts.partition(number)?]));
    let disks = disks.collect::<Result<Vec<_>, GuestError>>()?;
    for disk in disks.iter().flatten() {
        wipe(disk)?;
    }
    let nodes = Nodes::start_with(context, files.path(), &disks, 0, flags)?;
    for index in 0..disks.len() {
        let generic = nodes.has_open(index, GENERIC)?;
        demand(generic != flags.is_empty(), || format!("node {} uses the other path", index + 1))?;
    }
    nodes.make_pool()?;
    nodes.round_trip(IMAGE, Path::new("/dev/shm"))?;
    verify_with_fio(context, &nodes)?;
    for index in 0..disks.len() {
        demand(nodes.polled(index)? > 0.0, || format!("node {} has polled for nothing", index + 1))?;
    }
    nodes.end(&[])
}

/// Stock fio writes an image through the engine, reads it back and verifies it.
fn verify_with_fio(context: &Context, nodes: &Nodes) -> Result<(), GuestError> {
    const NAME: &str = "fio";
    nodes.command(&["image", "create", NAME, "--pool", POOL, "--size", FIO_BYTES])?;
    let job = FioJob {
        name: "verify".into(),
        rw: "randwrite",
        bs: "4k",
        depth: 8,
        extra: ["--size=100%", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
            .map(str::to_owned)
            .to_vec(),
    };
    let (engine, image) = (context.manifest.engine.clone(), NAME.to_owned());
    let target = Target::Image { engine, cluster: nodes.cluster_flag(), image };
    let mut run = job.spawn(&target, Path::new("/dev/shm"))?;
    let late = || GuestError::TimedOut { what: "fio to end".into(), seconds: LIMIT.as_secs() };
    let result = run.wait_until(Deadline::after(LIMIT))?.ok_or_else(late)?;
    demand(result.ios > 0, || "fio has done nothing".into())
}

/// The third node has two disks; the drive of one is pulled while a client writes.
pub fn a_drive_is_pulled_and_its_node_lives_on(context: &Context) -> Result<(), GuestError> {
    pull(context, "large", &[])
}

pub fn a_drive_under_commands_is_pulled(context: &Context) -> Result<(), GuestError> {
    pull(context, "large2", &PASSTHROUGH)
}

fn pull(context: &Context, serial: &str, flags: &[&str]) -> Result<(), GuestError> {
    let files = files(Path::new("/run/pulled"))?;
    let (parts, pulled) = (Drive::with_serial("parts")?, Drive::with_serial(serial)?);
    let lost = pulled.partition(1)?;
    let disks =
        vec![vec![parts.partition(1)?], vec![parts.partition(2)?], vec![parts.partition(3)?, lost.clone()]];
    for disk in disks.iter().flatten() {
        wipe(disk)?;
    }
    let nodes = Nodes::start_with(context, files.path(), &disks, 0, flags)?;
    nodes.make_image_of(BLOCKS * pattern::BLOCK as u64, PULLED_PGS)?;
    let mut writer = super::power_cut::Writer::open(&nodes.controls(), BLOCKS, 1)?;
    let mut acked = Vec::new();
    writer.write(WRITES, |ack| {
        acked.push(ack);
        Ok(())
    })?;
    pulled.pull()?;
    writer.write(WRITES, |ack| {
        acked.push(ack);
        Ok(())
    })?;
    let path = utf8(&lost)?;
    let status = nodes.wait_for("the pulled disk to be named", |status| {
        status
            .problems
            .iter()
            .any(|problem| problem.to_string().contains(path) && problem.to_string().contains("failed"))
    })?;
    demand(status.nodes_up() == 3, || format!("{} of 3 nodes are up", status.nodes_up()))?;
    nodes.wait_for("every copy to be made elsewhere", |status| status.pgs.clean == status.pgs.total)?;
    writer.write(WRITES, |ack| {
        acked.push(ack);
        Ok(())
    })?;
    writer.verify(&acked)?;
    nodes.end(&[lost])
}

/// Forgets what an earlier test has left on a disk.
fn wipe(disk: &Path) -> Result<(), GuestError> {
    super::system::tool("blkdiscard", &["--zeroout", "--length", "1MiB", utf8(disk)?]).map(|_| ())
}
