//! Tests of power cuts: a writer that reports every acknowledged write, and what must be there after the cut.

use super::Context;
use super::cluster::{IMAGE, Nodes, check};
use super::drive::Drive;
use super::pattern::{self, BLOCK, Found, Rng};
use super::system::Mount;
use crate::error::{GuestError, demand};
use crate::manifest::{ACKED, Ack};
use cli::cluster::{Cluster, OpenImage};
use cli::deadline::Deadline;
use client::{IoDone, Op, OpenMode, Options};
use reactor::IoBuf;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Blocks of the image.
const BLOCKS: u64 = 4096;
/// Writes under way at once.
const DEPTH: usize = 8;
/// Blocks that are read at once when all are compared.
const READ_BLOCKS: u64 = 64;
/// Wrong blocks that an error names.
const WRONG_SHOWN: usize = 8;
/// More writes than any cut waits for.
const ENDLESS: u64 = 1 << 40;
/// Stamps of a boot begin at its number times this.
const STAMPS_PER_BOOT: u64 = 1 << 32;
/// Blocks written to the drive that nobody flushes: so many flushed, and as many not.
const LOSSY_BLOCKS: u64 = 32;
/// Their first stamps.
const FLUSHED: u64 = 1_000;
const UNFLUSHED: u64 = 2_000;

/// The nodes' drives.
fn disks() -> Result<Vec<Vec<PathBuf>>, GuestError> {
    ["cut1", "cut2", "cut3"]
        .iter()
        .map(|serial| Ok(vec![Drive::with_serial(serial)?.partition(1)?]))
        .collect()
}

fn files_device() -> Result<PathBuf, GuestError> {
    Drive::with_serial("files")?.partition(1)
}

fn nodes_on(context: &Context, dir: &Path, disks: &[Vec<PathBuf>]) -> Result<Nodes, GuestError> {
    let flags: Vec<&str> = context.manifest.flags.iter().map(String::as_str).collect();
    Nodes::start_with(context, dir, disks, 0, &flags)
}

const FILES_AT: &str = "/run/files";

/// Writes to an image at random, each block by one write at a time.
pub struct Writer {
    cluster: Cluster,
    image: OpenImage,
    blocks: u64,
    next_stamp: u64,
    rng: Rng,
    /// Blocks with a write under way, and its stamp.
    busy: BTreeMap<u64, u64>,
}

impl Writer {
    /// A client of the cluster's image. Stamps begin with those of `boot`.
    pub fn open(controls: &[SocketAddr], blocks: u64, boot: u64) -> Result<Self, GuestError> {
        let mut cluster = Cluster::with_options(controls, Options::default())?;
        let image = cluster.open(IMAGE, OpenMode::ReadWrite)?;
        let next_stamp = boot * STAMPS_PER_BOOT;
        Ok(Self { cluster, image, blocks, next_stamp, rng: Rng::new(boot + 1), busy: BTreeMap::new() })
    }

    /// So many writes; `acked` hears of each when it is acknowledged.
    pub fn write(
        &mut self,
        writes: u64,
        mut acked: impl FnMut(Ack) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let (mut begun, mut done) = (0, 0);
        while done < writes {
            while begun < writes && self.busy.len() < DEPTH {
                self.begin()?;
                begun += 1;
            }
            let io = self.next()?;
            let stamp = self.busy.remove(&io.user);
            io.result.map_err(|error| GuestError::Demand(format!("write of block {}: {error}", io.user)))?;
            let stamp = stamp.ok_or_else(|| GuestError::Demand("an answer to no write".into()))?;
            acked(Ack { stamp, block: io.user })?;
            done += 1;
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), GuestError> {
        let mut block = self.rng.below(self.blocks);
        while self.busy.contains_key(&block) {
            block = (block + 1) % self.blocks;
        }
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        let buf = IoBuf::copy_of(&pattern::block(stamp, block))
            .map_err(|error| GuestError::Demand(format!("no memory: {error}")))?;
        let op = Op::Write { offset: block * BLOCK as u64, buf };
        self.cluster
            .submit(self.image, op, block)
            .map_err(|(error, _)| GuestError::Demand(format!("submit: {error}")))?;
        self.busy.insert(block, stamp);
        Ok(())
    }

    fn next(&mut self) -> Result<IoDone, GuestError> {
        let limit = super::system::LIMIT;
        let done = self.cluster.next_io_until(Deadline::after(limit))?;
        let late = || GuestError::TimedOut { what: "an operation to end".into(), seconds: limit.as_secs() };
        done.ok_or_else(late)
    }

    /// Reads everything: each block must hold its last acknowledged write, or a later one that got no answer.
    pub fn verify(&mut self, acked: &[Ack]) -> Result<(), GuestError> {
        let mut last = BTreeMap::new();
        for ack in acked {
            let newest = last.entry(ack.block).or_insert(ack.stamp);
            *newest = ack.stamp.max(*newest);
        }
        let mut wrong = Vec::new();
        for first in (0..self.blocks).step_by(READ_BLOCKS as usize) {
            let bytes = READ_BLOCKS as usize * BLOCK;
            let buf =
                IoBuf::heap(bytes).map_err(|error| GuestError::Demand(format!("no memory: {error}")))?;
            let op = Op::Read { offset: first * BLOCK as u64, buf };
            self.cluster
                .submit(self.image, op, first)
                .map_err(|(error, _)| GuestError::Demand(format!("submit: {error}")))?;
            let io = self.next()?;
            io.result.map_err(|error| GuestError::Demand(format!("read of block {first}: {error}")))?;
            let buf = io.buf.ok_or_else(|| GuestError::Demand("a read without a buffer".into()))?;
            for (number, bytes) in (first..).zip(buf.as_slice().chunks_exact(BLOCK)) {
                let (found, acked) = (pattern::recognise(bytes, number), last.get(&number).copied());
                if !may_hold(found, acked) {
                    wrong.push((number, found, acked));
                }
            }
        }
        demand(wrong.is_empty(), || {
            let some: Vec<_> = wrong.iter().take(WRONG_SHOWN).collect();
            format!(
                "{} of {} blocks are wrong: (block, found, acknowledged): {some:?}",
                wrong.len(),
                last.len()
            )
        })
    }
}

/// Whether a block may hold this after that acknowledgement: the write itself or a later one, whole.
fn may_hold(found: Found, acked: Option<u64>) -> bool {
    match (found, acked) {
        (Found::Garbage, _) | (Found::Blank, Some(_)) => false,
        (Found::Blank | Found::Write(_), None) => true,
        (Found::Write(stamp), Some(acked)) => stamp >= acked,
    }
}

/// What all boots before have reported.
fn acknowledged(context: &Context) -> Result<Vec<Ack>, GuestError> {
    let path = context.share.join(ACKED);
    let bytes = std::fs::read(&path).map_err(GuestError::io(format!("read {}", path.display())))?;
    let acks = Ack::decode_all(&bytes);
    demand(!acks.is_empty(), || "nothing was acknowledged before the cut: nothing is tested".into())?;
    Ok(acks)
}

pub fn a_cluster_writes_until_the_power_is_cut(context: &Context) -> Result<(), GuestError> {
    let first = context.manifest.cuts == 0;
    let device = files_device()?;
    let files = if first {
        Mount::fresh(&device, Path::new(FILES_AT))
    } else {
        Mount::of(&device, Path::new(FILES_AT))
    };
    let files = files?;
    if first {
        write_to_the_lossy_drive()?;
    }
    let nodes = nodes_on(context, files.path(), &disks()?)?;
    if first {
        nodes.make_image(BLOCKS * BLOCK as u64)?;
    } else {
        nodes.wait_clean()?;
    }
    let path = context.share.join(ACKED);
    let mut report =
        OpenOptions::new().append(true).open(&path).map_err(GuestError::io("open the host's list"))?;
    let mut writer = Writer::open(&nodes.controls(), BLOCKS, u64::from(context.manifest.cuts) + 1)?;
    writer.write(ENDLESS, |ack| report.write_all(&ack.encode()).map_err(GuestError::io("report a write")))?;
    Err(GuestError::Demand("the power was not cut".into()))
}

pub fn acknowledged_writes_survive_a_power_cut(context: &Context) -> Result<(), GuestError> {
    let acks = acknowledged(context)?;
    let disks = disks()?;
    for disk in disks.iter().flatten() {
        check(&context.manifest.drystone, disk, false)?;
    }
    let files = Mount::of(&files_device()?, Path::new(FILES_AT))?;
    let nodes = nodes_on(context, files.path(), &disks)?;
    nodes.wait_clean()?;
    Writer::open(&nodes.controls(), BLOCKS, 0)?.verify(&acks)?;
    let writes: BTreeSet<u64> = acks.iter().map(|ack| ack.stamp).collect();
    demand(writes.len() == acks.len(), || "a write was acknowledged twice".into())?;
    nodes.end(&[])
}

pub fn disks_are_in_order_after_power_cuts(context: &Context) -> Result<(), GuestError> {
    for disk in disks()?.iter().flatten() {
        check(&context.manifest.drystone, disk, true)?;
    }
    Ok(())
}

/// Half of the blocks flushed, then the other half not. Nobody else uses the drive.
fn write_to_the_lossy_drive() -> Result<(), GuestError> {
    let path = Drive::with_serial("lossy")?.partition(1)?;
    let what = || format!("write to {}", path.display());
    let file = direct(&path).map_err(GuestError::io(what()))?;
    for number in 0..LOSSY_BLOCKS {
        write_block(&file, number, FLUSHED + number).map_err(GuestError::io(what()))?;
    }
    file.sync_all().map_err(GuestError::io(what()))?;
    for number in LOSSY_BLOCKS..2 * LOSSY_BLOCKS {
        write_block(&file, number, UNFLUSHED + number).map_err(GuestError::io(what()))?;
    }
    // Closing the last handle would flush.
    std::mem::forget(file);
    Ok(())
}

/// The page cache would decide by itself when the drive hears of a write.
fn direct(path: &Path) -> std::io::Result<File> {
    /// O_DIRECT of Linux on x86.
    const DIRECT: i32 = 0o40000;
    OpenOptions::new().read(true).write(true).custom_flags(DIRECT).open(path)
}

/// Through aligned memory, as direct I/O wants it.
fn write_block(file: &File, number: u64, stamp: u64) -> std::io::Result<()> {
    let no_memory = |_| std::io::Error::from(std::io::ErrorKind::OutOfMemory);
    let buf = IoBuf::copy_of(&pattern::block(stamp, number)).map_err(no_memory)?;
    file.write_all_at(buf.as_slice(), number * BLOCK as u64)
}

/// A volatile cache has lost something, or a cut would prove nothing; without one nothing may be lost.
pub fn a_drive_loses_only_what_was_not_flushed(context: &Context) -> Result<(), GuestError> {
    let path = Drive::with_serial("lossy")?.partition(1)?;
    let what = || format!("read {}", path.display());
    let file = OpenOptions::new().read(true).open(&path).map_err(GuestError::io(what()))?;
    let mut lost = 0;
    for number in 0..2 * LOSSY_BLOCKS {
        let mut bytes = vec![0; BLOCK];
        file.read_exact_at(&mut bytes, number * BLOCK as u64).map_err(GuestError::io(what()))?;
        let found = pattern::recognise(&bytes, number);
        let stamp = if number < LOSSY_BLOCKS { FLUSHED } else { UNFLUSHED } + number;
        let may_be_lost = number >= LOSSY_BLOCKS;
        lost += u32::from(found == Found::Blank);
        let fine = found == Found::Write(stamp) || (may_be_lost && found == Found::Blank);
        demand(fine, || format!("block {number} holds {found:?} instead of write {stamp}"))?;
    }
    let volatile = context.manifest.volatile;
    demand(volatile == (lost > 0), || format!("{lost} writes were lost; a volatile cache: {volatile}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_or_torn_write_is_seen_and_an_unanswered_one_is_fine() {
        assert!(may_hold(Found::Write(5), Some(5)));
        assert!(may_hold(Found::Write(6), Some(5)));
        assert!(may_hold(Found::Write(6), None) && may_hold(Found::Blank, None));
        assert!(!may_hold(Found::Write(4), Some(5)));
        assert!(!may_hold(Found::Blank, Some(5)));
        assert!(!may_hold(Found::Garbage, None));
    }
}
