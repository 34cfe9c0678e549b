//! What a block device promises, as the kernel tells it in sysfs. Nothing is probed, nothing is written.
//!
//! A partition has no queue of its own: its disk's, one directory above, is meant. A file that is not there (an
//! older kernel, a container without sysfs) counts as the answer that promises least.

use std::path::{Path, PathBuf};
use thiserror::Error;
use wire::BLOCK_BYTES;

/// The kernel's file system of devices.
pub(crate) const SYSFS: &str = "/sys";
/// What a drive writes whole when it promises no more.
const SECTOR_BYTES: u32 = 512;

/// Why a block device cannot serve as a disk.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum DeviceError {
    /// It must be written in order within its zones.
    #[error(
        "it is a zoned device ({0}), which takes writes only in order; Drystone writes anywhere. Use a \
         conventional drive or namespace"
    )]
    Zoned(String),
    /// It cannot write one of our blocks alone.
    #[error(
        "its sectors have {0} bytes, and Drystone writes blocks of {BLOCK_BYTES}: format it with smaller ones"
    )]
    LargeSectors(u32),
}

/// What a block device promises.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// The smallest write.
    pub logical_block_bytes: u32,
    /// The smallest write that needs no reading.
    pub physical_block_bytes: u32,
    /// Largest write that is never torn, where the kernel (6.11 and later) knows; 0: it does not say.
    pub atomic_write_bytes: u32,
    /// Completed writes may be lost in a power cut until they are flushed.
    pub volatile_cache: bool,
    /// One write can be made durable without a flush of all others. Without it the kernel flushes.
    pub fua: bool,
    /// Largest range given back at once; 0: the device forgets nothing.
    pub discard_max_bytes: u64,
    /// The driver has queues whose completions are polled for.
    pub polls: bool,
}

impl Device {
    /// Reads what is known of the device with this number, below `root`, which is `SYSFS` but in tests.
    pub(crate) fn read(root: &Path, major: u32, minor: u32) -> Result<Self, DeviceError> {
        let queue = Queue::of(root, major, minor);
        let zoned = queue.text("zoned").unwrap_or_default();
        if !matches!(zoned.as_str(), "" | "none") {
            return Err(DeviceError::Zoned(zoned));
        }
        let logical = queue.number("logical_block_size").unwrap_or(SECTOR_BYTES);
        if logical as usize > BLOCK_BYTES {
            return Err(DeviceError::LargeSectors(logical));
        }
        Ok(Self {
            logical_block_bytes: logical,
            physical_block_bytes: queue.number("physical_block_size").unwrap_or(logical),
            atomic_write_bytes: queue.number("atomic_write_unit_max_bytes").unwrap_or(0),
            volatile_cache: queue.text("write_cache").as_deref() != Some("write through"),
            fua: queue.number("fua") == Some(1),
            discard_max_bytes: queue.number("discard_max_bytes").unwrap_or(0),
            polls: queue.number("io_poll") == Some(1),
        })
    }

    /// Bytes of a write that is never torn, as `DiskInfo::atomic_bytes`: a block, or a sector. A drive writes a
    /// physical block whole: it would have to read it otherwise, or, an NVMe drive, has promised it (the kernel
    /// takes that drive's physical block from what it says of atomic writes in a power failure).
    pub(crate) fn atomic_bytes(&self) -> u32 {
        let whole = self.physical_block_bytes.max(self.atomic_write_bytes).max(self.logical_block_bytes);
        if whole as usize >= BLOCK_BYTES { BLOCK_BYTES as u32 } else { SECTOR_BYTES }
    }
}

/// The directory of a device's queue, if it is there.
struct Queue(Option<PathBuf>);

impl Queue {
    fn of(root: &Path, major: u32, minor: u32) -> Self {
        // A link, which has to be followed before "the directory above" means anything.
        let device = root.join(format!("dev/block/{major}:{minor}")).canonicalize().ok();
        let own = device.as_deref().map(|device| device.join("queue")).filter(|queue| queue.is_dir());
        let of_disk = || Some(device.as_deref()?.parent()?.join("queue")).filter(|queue| queue.is_dir());
        Self(own.or_else(of_disk))
    }

    fn text(&self, attribute: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.0.as_deref()?.join(attribute)).ok()?;
        Some(text.trim().to_owned())
    }

    fn number<T: std::str::FromStr>(&self, attribute: &str) -> Option<T> {
        self.text(attribute)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A made-up sysfs with one drive, 259:0, and its partition, 259:1.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn with(attributes: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let drive = dir.path().join("devices/pci/nvme/nvme0/nvme0n1");
            std::fs::create_dir_all(drive.join("queue")).unwrap();
            std::fs::create_dir_all(drive.join("nvme0n1p1")).unwrap();
            let numbers = dir.path().join("dev/block");
            std::fs::create_dir_all(&numbers).unwrap();
            symlink("../../devices/pci/nvme/nvme0/nvme0n1", numbers.join("259:0")).unwrap();
            symlink("../../devices/pci/nvme/nvme0/nvme0n1/nvme0n1p1", numbers.join("259:1")).unwrap();
            for (name, value) in attributes {
                std::fs::write(drive.join("queue").join(name), format!("{value}\n")).unwrap();
            }
            Self(dir)
        }

        fn read(&self, minor: u32) -> Result<Device, DeviceError> {
            Device::read(self.0.path(), 259, minor)
        }
    }

    const MODERN: [(&str, &str); 8] = [
        ("logical_block_size", "512"),
        ("physical_block_size", "512"),
        ("atomic_write_unit_max_bytes", "131072"),
        ("write_cache", "write through"),
        ("fua", "0"),
        ("discard_max_bytes", "2199023255040"),
        ("io_poll", "1"),
        ("zoned", "none"),
    ];

    #[test]
    fn a_drive_and_its_partition_promise_the_same() {
        let sysfs = Sysfs::with(&MODERN);
        let device = sysfs.read(0).unwrap();
        assert_eq!(
            device,
            Device {
                logical_block_bytes: 512,
                physical_block_bytes: 512,
                atomic_write_bytes: 131_072,
                volatile_cache: false,
                fua: false,
                discard_max_bytes: 2_199_023_255_040,
                polls: true,
            }
        );
        assert_eq!(device.atomic_bytes(), 4096);
        assert_eq!(sysfs.read(1).unwrap(), device);
    }

    #[test]
    fn what_is_not_said_is_not_promised() {
        let garbage =
            [("write_cache", ""), ("fua", "yes"), ("io_poll", "-1"), ("logical_block_size", "many")];
        for device in [
            Sysfs::with(&[]).read(0),
            Sysfs::with(&garbage).read(1),
            Sysfs::with(&MODERN).read(7),
            Device::read(Path::new("/nowhere"), 259, 0),
        ] {
            let device = device.unwrap();
            assert!(device.volatile_cache && !device.fua && !device.polls, "{device:?}");
            assert_eq!((device.atomic_bytes(), device.logical_block_bytes), (512, 512));
            assert_eq!((device.discard_max_bytes, device.atomic_write_bytes), (0, 0));
        }
    }

    #[test]
    fn sectors_of_a_block_are_whole_and_larger_ones_are_refused() {
        let large =
            Sysfs::with(&[("logical_block_size", "4096"), ("write_cache", "write back"), ("fua", "1")]);
        let device = large.read(1).unwrap();
        assert_eq!((device.atomic_bytes(), device.volatile_cache, device.fua), (4096, true, true));
        let emulated = Sysfs::with(&[("logical_block_size", "512"), ("physical_block_size", "4096")]);
        assert_eq!(emulated.read(0).unwrap().atomic_bytes(), 4096);
        let larger = Sysfs::with(&[("logical_block_size", "16384")]);
        assert_eq!(larger.read(0), Err(DeviceError::LargeSectors(16384)));
    }

    #[test]
    fn zoned_drives_are_refused() {
        for model in ["host-managed", "host-aware"] {
            let zoned = Sysfs::with(&[("zoned", model)]);
            for minor in [0, 1] {
                let error = zoned.read(minor).unwrap_err();
                assert_eq!(error, DeviceError::Zoned(model.to_owned()));
                assert!(error.to_string().contains(model), "{error}");
            }
        }
    }
}
