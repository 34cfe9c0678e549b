//! An NVMe namespace that takes commands: its character device, found through sysfs beside the block device.
//!
//! Commands go around the block layer: around its scheduler and its splitting, and also around its knowledge of who uses
//! the drive. So the block device stays open exclusively beside it (`DiskFile`), a partition's place is added here, and
//! what the block layer would have made smaller is made smaller by `disk`.

use super::nvme;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;
use wire::BLOCK_BYTES;

/// `NVME_IOCTL_ID`: the number of the namespace that a character device stands for.
const NAMESPACE_ID: libc::c_ulong = 0x4e40;
/// The unit of partitions' places in sysfs, whatever the drive's sectors are.
const UNIT_BYTES: u64 = 512;

/// How a disk is read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Access {
    /// Through the kernel's block layer.
    #[default]
    Block,
    /// With NVMe commands of our own.
    Passthrough,
}

/// Why a disk takes no commands.
#[derive(Debug, Error)]
pub enum PassthroughError {
    /// A file, or a drive of another kind.
    #[error("it is no NVMe namespace or partition of one")]
    NotNvme,
    /// The kernel has made none for it.
    #[error("it has no generic character device ({0}), without which it takes no commands")]
    NoGeneric(String),
    /// What the device's node is, is not what sysfs says.
    #[error("{path} is not the character device {number} of this namespace")]
    NotTheSame {
        /// The node.
        path: PathBuf,
        /// Major and minor number in sysfs.
        number: String,
    },
    /// Its sectors carry more than data, which commands would have to bring along.
    #[error("its sectors have {0} bytes of metadata: use the block layer, or format it without")]
    Metadata(u64),
    /// An attribute that is needed is not there.
    #[error("the kernel does not say its {0} (Linux 6.8 and later do)")]
    Unknown(&'static str),
    /// The system said so.
    #[error("cannot open {path}: {error}")]
    Os {
        /// The node.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
}

/// What sysfs says of a namespace, and of the part of it that is used.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    /// Name of the character device, and its number.
    generic: (String, String),
    id: u32,
    /// Where the part begins.
    first_byte: u64,
    /// The most that a command moves.
    transfer_max: u64,
}

impl Place {
    /// Of the block device with this number, below `root`.
    fn read(root: &Path, major: u32, minor: u32) -> Result<Self, PassthroughError> {
        use PassthroughError::{NoGeneric, NotNvme, Unknown};
        let device = root.join(format!("dev/block/{major}:{minor}")).canonicalize().map_err(|_| NotNvme)?;
        let is_part = device.join("partition").exists();
        let namespace = if is_part { device.parent() } else { Some(device.as_path()) };
        let namespace = namespace.ok_or(NotNvme)?;
        let name = namespace.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let rest = name.strip_prefix("nvme").ok_or(NotNvme)?;
        let first_byte = if is_part {
            number(&device, "start")
                .and_then(|units| units.checked_mul(UNIT_BYTES))
                .ok_or(Unknown("start"))?
        } else {
            0
        };
        let generic = format!("ng{rest}");
        // Beside the block device: below the controller, or the subsystem where a drive may have several paths.
        let dev = namespace.parent().and_then(|parent| text(&parent.join(&generic), "dev"));
        let dev = dev.ok_or_else(|| NoGeneric(generic.clone()))?;
        let id = number(namespace, "nsid").and_then(|id| u32::try_from(id).ok()).ok_or(Unknown("number"))?;
        match number(namespace, "metadata_bytes").ok_or(Unknown("metadata"))? {
            0 => {}
            bytes => return Err(PassthroughError::Metadata(bytes)),
        }
        let queue = namespace.join("queue");
        let hardware = number(&queue, "max_hw_sectors_kb").unwrap_or(0).saturating_mul(1024);
        // In the worst case no two pages of a buffer lie side by side.
        let segments = number(&queue, "max_segments").unwrap_or(0).saturating_mul(BLOCK_BYTES as u64);
        let sector = number(&queue, "logical_block_size").unwrap_or(UNIT_BYTES);
        let most = hardware.min(segments).min(nvme::SECTORS_MAX.saturating_mul(sector));
        let transfer_max = (most - most % BLOCK_BYTES as u64).max(BLOCK_BYTES as u64);
        Ok(Self { generic: (generic, dev), id, first_byte, transfer_max })
    }
}

fn text(dir: &Path, attribute: &str) -> Option<String> {
    Some(std::fs::read_to_string(dir.join(attribute)).ok()?.trim().to_owned())
}

fn number(dir: &Path, attribute: &str) -> Option<u64> {
    text(dir, attribute)?.parse().ok()
}

/// A namespace, or a partition of one, open for commands.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
    id: u32,
    first_byte: u64,
    sector_bytes: u64,
    transfer_max: usize,
    /// The most that one discard takes; 0: none.
    discard_max: u64,
}

impl Namespace {
    /// Of the block device with this number.
    pub(crate) fn open(
        root: &Path,
        (major, minor): (u32, u32),
        sector_bytes: u32,
        discard_max: u64,
    ) -> Result<Self, PassthroughError> {
        let Place { generic: (name, dev), id, first_byte, transfer_max } = Place::read(root, major, minor)?;
        let path = Path::new("/dev").join(name);
        let os = |error| PassthroughError::Os { path: path.clone(), error };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(&path)
            .map_err(os)?;
        let meta = file.metadata().map_err(os)?;
        let found = format!("{}:{}", libc::major(meta.rdev()), libc::minor(meta.rdev()));
        // SAFETY: this ioctl takes no argument and returns a number.
        let found_id = unsafe { libc::ioctl(file.as_raw_fd(), NAMESPACE_ID) };
        if !meta.file_type().is_char_device() || found != dev || u32::try_from(found_id) != Ok(id) {
            return Err(PassthroughError::NotTheSame { path, number: dev });
        }
        let (sector_bytes, transfer_max) = (u64::from(sector_bytes), transfer_max as usize);
        Ok(Self { file, id, first_byte, sector_bytes, transfer_max, discard_max })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The most that a command moves, a multiple of our block.
    pub(crate) fn transfer_max(&self) -> usize {
        self.transfer_max
    }

    /// The most bytes that one discard takes; 0: the drive forgets nothing.
    pub(crate) fn discard_max(&self) -> u64 {
        self.discard_max
    }

    /// Sectors of the drive for bytes of the disk. `None` when they are none: the drive would take others.
    pub(crate) fn sectors(&self, offset: u64, bytes: u64) -> Option<(u64, u64)> {
        let at = self.first_byte.checked_add(offset)?;
        let whole = at.is_multiple_of(self.sector_bytes) && bytes.is_multiple_of(self.sector_bytes);
        (whole && bytes > 0).then(|| (at / self.sector_bytes, bytes / self.sector_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A made-up sysfs with a namespace, 259:0, and its partition, 259:1.
    fn sysfs(name: &str, attributes: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let controller = dir.path().join("devices/pci/nvme/nvme0");
        let namespace = controller.join(name);
        for path in [namespace.join("queue"), namespace.join("p1"), controller.join("ng0n1")] {
            std::fs::create_dir_all(path).unwrap();
        }
        let numbers = dir.path().join("dev/block");
        std::fs::create_dir_all(&numbers).unwrap();
        symlink(format!("../../devices/pci/nvme/nvme0/{name}"), numbers.join("259:0")).unwrap();
        symlink(format!("../../devices/pci/nvme/nvme0/{name}/p1"), numbers.join("259:1")).unwrap();
        for (attribute, value) in GOOD.iter().chain(attributes) {
            let _ = std::fs::remove_file(namespace.join(attribute));
            if !value.is_empty() {
                std::fs::write(namespace.join(attribute), format!("{value}\n")).unwrap();
            }
        }
        dir
    }

    const GOOD: [(&str, &str); 8] = [
        ("nsid", "3"),
        ("metadata_bytes", "0"),
        ("queue/max_hw_sectors_kb", "512"),
        ("queue/max_segments", "127"),
        ("queue/logical_block_size", "512"),
        ("p1/partition", "1"),
        ("p1/start", "2048"),
        ("../ng0n1/dev", "241:5"),
    ];

    #[test]
    fn a_namespace_and_its_partition_are_found() {
        let dir = sysfs("nvme0n1", &[]);
        let whole = Place::read(dir.path(), 259, 0).unwrap();
        let generic = ("ng0n1".to_owned(), "241:5".to_owned());
        assert_eq!(whole, Place { generic, id: 3, first_byte: 0, transfer_max: 127 * 4096 });
        let part = Place::read(dir.path(), 259, 1).unwrap();
        assert_eq!(part, Place { first_byte: 2048 * 512, ..whole });
    }

    #[test]
    fn transfers_are_bounded_by_whatever_is_least() {
        for (kb, segments, wanted) in
            [("64", "127", 65536), ("512", "2", 8192), ("", "127", 4096), ("3", "9", 4096)]
        {
            let dir = sysfs("nvme0n1", &[("queue/max_hw_sectors_kb", kb), ("queue/max_segments", segments)]);
            assert_eq!(Place::read(dir.path(), 259, 0).unwrap().transfer_max, wanted);
        }
    }

    #[test]
    fn what_takes_no_commands_is_refused() {
        let read = |name: &str, attributes: &[(&str, &str)]| {
            let dir = sysfs(name, attributes);
            [0, 1].map(|minor| Place::read(dir.path(), 259, minor).unwrap_err().to_string())
        };
        for (name, attribute, said) in [
            ("sda", ("nsid", "3"), "no NVMe namespace"),
            ("nvme0n2", ("nsid", "3"), "no generic character device (ng0n2)"),
            ("nvme0n1", ("metadata_bytes", "8"), "8 bytes of metadata"),
            ("nvme0n1", ("metadata_bytes", ""), "does not say its metadata"),
            ("nvme0n1", ("nsid", ""), "does not say its number"),
        ] {
            for error in read(name, &[attribute]) {
                assert!(error.contains(said), "{error}");
            }
        }
        let dir = sysfs("nvme0n1", &[("p1/start", "")]);
        assert!(matches!(Place::read(dir.path(), 259, 1), Err(PassthroughError::Unknown("start"))));
        assert!(matches!(Place::read(dir.path(), 7, 0), Err(PassthroughError::NotNvme)));
    }

    #[test]
    fn only_whole_sectors_are_named() {
        let file = tempfile::tempfile().unwrap();
        let part = Namespace {
            file,
            id: 1,
            first_byte: 1 << 20,
            sector_bytes: 4096,
            transfer_max: 0,
            discard_max: 0,
        };
        assert_eq!(part.sectors(8192, 4096), Some((258, 1)));
        assert_eq!(part.sectors(512, 4096), None);
        assert_eq!(part.sectors(0, 512), None);
        assert_eq!(part.sectors(0, 0), None);
        assert_eq!(part.sectors(u64::MAX - 4095, 4096), None);
    }
}
