//! The guest's drives: image files, and how QEMU presents them.
//!
//! What a drive loses when QEMU is killed depends on both. What QEMU has handed to the machine's kernel survives, so a
//! raw image loses nothing. A qcow2 overlay maps its clusters in tables that QEMU keeps in memory until the guest
//! flushes: killed before that, the drive reads as it did before the write. That is a volatile write cache, as far as
//! first writes of a cluster go, and every boot of the power-cut tests begins with a fresh overlay, where all writes
//! are such. QEMU's NVMe drive (10.0) takes no notice of FUA, its SCSI disk does: a drive whose cache is volatile is
//! therefore a SCSI disk there, and NVMe is tested with write-through, where every write is flushed by QEMU.

use crate::error::GuestError;
use crate::program;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Alignment of partitions, and the place of the first.
const ALIGN_BYTES: u64 = 1 << 20;
/// Clusters of an overlay: the store's block, so that each write is lost or kept for itself.
const CLUSTER_BYTES: u64 = wire::BLOCK_BYTES as u64;
/// QEMU's cache of an overlay's mapping: all of it, or entries would be written to make room.
const MAP_CACHE_BYTES: u64 = 16 << 20;
/// Zones of a zoned drive.
const ZONE_BYTES: u64 = 16 << 20;
/// Partitions that the simplest partition table holds.
const PARTITIONS_MAX: usize = 4;

/// How the guest reaches a drive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bus {
    /// Its own controller on PCI.
    Nvme,
    /// A disk of the one virtio-scsi controller.
    Scsi,
}

/// What a drive does with a write before it says that it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cache {
    /// Keeps it in memory until it is told to flush.
    Volatile,
    /// Makes it durable.
    WriteThrough,
}

/// How an image is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Raw,
    Qcow2,
}

/// What a drive promises and how it is divided.
#[derive(Clone, Copy, Debug)]
pub struct DrivePlan {
    /// Its serial number: the guest finds it by that.
    pub serial: &'static str,
    /// How it is reached.
    pub bus: Bus,
    /// What it does with writes.
    pub cache: Cache,
    /// Logical block size.
    pub sector_bytes: u64,
    /// It says that writes of 4 KiB are never torn.
    pub atomic_4k: bool,
    /// It must be written in order within zones (NVMe only).
    pub zoned: bool,
    /// Bytes of each partition, at most `PARTITIONS_MAX`; none: a drive of `bytes` without a table.
    pub partitions: &'static [u64],
    /// Bytes of a drive without partitions.
    pub bytes: u64,
}

/// A drive with its image.
pub struct Drive {
    plan: DrivePlan,
    image: PathBuf,
    format: Format,
}

impl Drive {
    /// Makes a raw image with its partition table.
    pub fn raw(plan: DrivePlan, dir: &Path) -> Result<Self, GuestError> {
        let image = dir.join(format!("{}.raw", plan.serial));
        let what = || format!("make {}", image.display());
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&image);
        let file = file.map_err(GuestError::io(what()))?;
        let bytes = if plan.partitions.is_empty() {
            plan.bytes
        } else {
            plan.partitions.iter().sum::<u64>() + 2 * ALIGN_BYTES
        };
        file.set_len(bytes).map_err(GuestError::io(what()))?;
        if !plan.partitions.is_empty() {
            let table = partition_table(plan.partitions, plan.sector_bytes);
            file.write_all_at(&table, 0).map_err(GuestError::io(what()))?;
        }
        Ok(Self { plan, image, format: Format::Raw })
    }

    /// From now on writes go to a fresh overlay, and first writes are volatile until they are flushed.
    pub fn lay_over(&mut self, dir: &Path, number: usize) -> Result<(), GuestError> {
        let overlay = dir.join(format!("{}.{number}.qcow2", self.plan.serial));
        let below = match self.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", below, "-b"]).arg(&self.image);
        create.arg("-o").arg(format!("cluster_size={CLUSTER_BYTES}")).arg(&overlay);
        program::run(&mut create)?;
        (self.image, self.format) = (overlay, Format::Qcow2);
        Ok(())
    }

    /// Whether a power cut takes what was not flushed.
    pub fn is_volatile(&self) -> bool {
        self.plan.cache == Cache::Volatile && self.format == Format::Qcow2
    }

    /// QEMU's options for it. The machine's page cache stays out of it: a write ends when the file has it.
    fn options(&self) -> String {
        let DrivePlan { serial, bus, cache, sector_bytes, atomic_4k, zoned, .. } = self.plan;
        let format = match self.format {
            Format::Raw => "format=raw".to_owned(),
            Format::Qcow2 => format!("format=qcow2,l2-cache-size={MAP_CACHE_BYTES},cache-clean-interval=0"),
        };
        let cache = match cache {
            Cache::Volatile => "none",
            Cache::WriteThrough => "directsync",
        };
        // Counted from zero: a unit of n blocks is given as n - 1.
        let unit = CLUSTER_BYTES / sector_bytes - 1;
        let device = match bus {
            Bus::Nvme if atomic_4k && unit > 0 => {
                format!("nvme,id=c-{serial},atomic.awun={unit},atomic.awupf={unit}")
            }
            Bus::Nvme if zoned => {
                // A controller and its namespace apart: zones belong to the latter.
                return format!(
                    "-drive file={},if=none,id=d-{serial},cache={cache},{format} \
                     -device nvme,id=c-{serial},serial={serial} \
                     -device nvme-ns,bus=c-{serial},drive=d-{serial},zoned=on,zoned.zone_size={ZONE_BYTES}",
                    self.image.display()
                );
            }
            Bus::Nvme => format!("nvme,id=c-{serial}"),
            Bus::Scsi => "scsi-hd,bus=scsi.0,dpofua=on".to_owned(),
        };
        format!(
            "-drive file={},if=none,id=d-{serial},cache={cache},{format} -device {device},serial={serial},\
             drive=d-{serial},logical_block_size={sector_bytes},physical_block_size={sector_bytes}",
            self.image.display()
        )
    }
}

/// QEMU's options for all drives.
pub fn options(drives: &[Drive]) -> String {
    let mut all = String::new();
    if drives.iter().any(|drive| drive.plan.bus == Bus::Scsi) {
        all.push_str("-device virtio-scsi-pci,id=scsi");
    }
    for drive in drives {
        all.push(' ');
        all.push_str(&drive.options());
    }
    all
}

/// A master boot record: the oldest partition table, which needs no program to be made.
fn partition_table(partitions: &[u64], sector_bytes: u64) -> [u8; 512] {
    /// Where the entries are, and how long each is.
    const ENTRIES: usize = 446;
    const ENTRY_BYTES: usize = 16;
    const LINUX: u8 = 0x83;
    let mut table = [0u8; 512];
    let mut start = ALIGN_BYTES;
    for (index, bytes) in partitions.iter().take(PARTITIONS_MAX).enumerate() {
        let at = ENTRIES + index * ENTRY_BYTES;
        let mut entry = [0u8; ENTRY_BYTES];
        let [_, _, _, _, kind, _, _, _, rest @ ..] = &mut entry;
        *kind = LINUX;
        let (first, count) = ((start / sector_bytes) as u32, (bytes / sector_bytes) as u32);
        let numbers = [first.to_le_bytes(), count.to_le_bytes()];
        rest.copy_from_slice(numbers.as_flattened());
        if let Some(place) = table.get_mut(at..at + ENTRY_BYTES) {
            place.copy_from_slice(&entry);
        }
        start += bytes;
    }
    let [.., first, second] = &mut table;
    (*first, *second) = (0x55, 0xaa);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_follow_each_other_in_sectors_of_the_drive() {
        let table = partition_table(&[64 << 20, 32 << 20], 4096);
        assert_eq!(table[510..], [0x55, 0xaa]);
        let word = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().unwrap());
        assert_eq!((table[450], word(454), word(458)), (0x83, 256, 16384));
        assert_eq!((word(470), word(474)), (256 + 16384, 8192));
        assert_eq!(table[482], 0);
    }
}
