//! A drive as the process holds it: opened once, locked against other processes, shared by the cores
//! that own its slices.

use super::device::{Device, DeviceError, SYSFS};
use super::namespace::{Access, Namespace, PassthroughError};
use super::polled::Polling;
use crate::env::DiskInfo;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use wire::BLOCK_BYTES;

/// `statfs` type of tmpfs: memory, so written is as durable as it gets.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// The ioctl that tells a block device's size in bytes: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// Attempts to lock a disk, and the time between two: two seconds in all. On a busy machine the kernel takes
/// that long to take apart the ring of a process that has ended in disorder.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum DiskOpenError {
    /// Another process has it: a running node, or a mounted file system.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// It is not there.
    #[error("{0} does not exist")]
    Missing(PathBuf),
    /// Neither a regular file nor a block device.
    #[error("{0} is neither a regular file nor a block device")]
    WrongKind(PathBuf),
    /// Smaller than a block.
    #[error("{path} is too small ({bytes} bytes)")]
    TooSmall {
        /// Which.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A block device of a kind that cannot serve.
    #[error("{path} cannot be used: {error}")]
    Unsuitable {
        /// Which.
        path: PathBuf,
        /// Why.
        error: DeviceError,
    },
    /// It takes no NVMe commands, which were asked for.
    #[error("{path} cannot be used with NVMe commands: {error}")]
    NoPassthrough {
        /// Which.
        path: PathBuf,
        /// Why.
        error: PassthroughError,
    },
    /// Anything else the system said.
    #[error("cannot open {path}: {error}")]
    Os {
        /// Which.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
}

/// An open, exclusively locked disk. The lock lasts as long as this lives.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    file: File,
    info: DiskInfo,
    /// What the kernel says of it, if it is a block device.
    device: Option<Device>,
    direct: bool,
    /// Takes commands, in place of `file`, which only keeps others away then.
    namespace: Option<Namespace>,
}

impl DiskFile {
    /// Opens a regular file, loop device or block device for reading and writing, with O_DIRECT where
    /// the file system has it, and locks it.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>, DiskOpenError> {
        Self::open_for(path, Access::Block)
    }

    /// The same, to be read and written in this way or not at all.
    pub fn open_for(path: impl AsRef<Path>, access: Access) -> Result<Arc<Self>, DiskOpenError> {
        let path = path.as_ref().to_path_buf();
        let os = |error: io::Error| match error.raw_os_error() {
            Some(libc::ENOENT) => DiskOpenError::Missing(path.clone()),
            Some(libc::EBUSY) => DiskOpenError::InUse(path.clone()),
            _ => DiskOpenError::Os { path: path.clone(), error },
        };
        let kind = std::fs::metadata(&path).map_err(os)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskOpenError::WrongKind(path));
        }
        // On a block device O_EXCL without O_CREAT refuses one that is mounted or otherwise claimed.
        let exclusive = if kind.is_block_device() { libc::O_EXCL } else { 0 };
        let open = |flags: i32| {
            OpenOptions::new().read(true).write(true).custom_flags(flags | libc::O_CLOEXEC).open(&path)
        };
        let (file, direct) = match open(libc::O_DIRECT | exclusive) {
            Ok(file) => (file, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(path = %path.display(), "file system refuses O_DIRECT; using the page cache");
                (open(exclusive).map_err(os)?, false)
            }
            Err(error) => return Err(os(error)),
        };
        lock(&file).map_err(|error| {
            if error.kind() == io::ErrorKind::WouldBlock {
                DiskOpenError::InUse(path.clone())
            } else {
                os(error)
            }
        })?;
        let device = device(&file, &path)?;
        let info = match &device {
            Some(device) => block_device(&file, device),
            None => regular_file(&file),
        };
        let info = info.map_err(os)?;
        if info.size_bytes < BLOCK_BYTES as u64 {
            return Err(DiskOpenError::TooSmall { path, bytes: info.size_bytes });
        }
        let namespace = match access {
            Access::Block => None,
            Access::Passthrough => Some(namespace(&file, device.as_ref(), &path)?),
        };
        tracing::debug!(path = %path.display(), ?info, ?device, direct, ?namespace, "disk opened");
        Ok(Arc::new(Self { path, file, info, device, direct, namespace }))
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it promises.
    pub fn info(&self) -> DiskInfo {
        self.info
    }

    /// What the kernel says of a block device; `None` for a file.
    pub fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    /// The same of a disk that a node may be using: it is neither locked nor opened for writing.
    #[allow(clippy::disallowed_methods, reason = "looking at a disk is for tools, outside any loop")]
    pub fn device_at(path: &Path) -> Result<Option<Device>, DiskOpenError> {
        let file = File::open(path).map_err(|error| DiskOpenError::Os { path: path.into(), error })?;
        device(&file, path)
    }

    /// Whether a core with this choice polls it.
    pub fn is_polled(&self, polling: Polling) -> bool {
        polling == Polling::Auto && self.direct && self.device().is_some_and(|device| device.polls)
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// How it is read and written.
    pub fn access(&self) -> Access {
        if self.namespace.is_some() { Access::Passthrough } else { Access::Block }
    }

    /// What takes its commands, if anything does.
    pub(crate) fn namespace(&self) -> Option<&Namespace> {
        self.namespace.as_ref()
    }

    /// Whether the device makes one write durable by itself. Where it cannot, the kernel sends a flush after it.
    pub(crate) fn writes_durably(&self) -> bool {
        // Every NVMe drive knows FUA.
        self.namespace.is_some() || self.device().is_some_and(|device| device.fua || !device.volatile_cache)
    }

    /// What operations are submitted for.
    pub(crate) fn fd(&self) -> RawFd {
        self.namespace.as_ref().map_or(self.file.as_raw_fd(), Namespace::fd)
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // Explicitly, as a ring that still holds the file would otherwise keep the lock a little longer.
        // SAFETY: plain system call on a descriptor that `file` owns.
        unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_UN) };
    }
}

/// Locks against other processes. A process that was just killed holds its lock until the kernel has taken
/// its ring apart, so this tries for a moment.
#[allow(clippy::disallowed_methods, reason = "opening a disk happens before any loop runs")]
fn lock(file: &File) -> io::Result<()> {
    for _ in 0..LOCK_TRIES {
        // SAFETY: plain system call on a descriptor that `file` owns.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(error);
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Err(io::Error::from(io::ErrorKind::WouldBlock))
}

/// Opens what takes the commands of a block device that is open exclusively.
fn namespace(file: &File, device: Option<&Device>, path: &Path) -> Result<Namespace, DiskOpenError> {
    let refused = |error| DiskOpenError::NoPassthrough { path: path.into(), error };
    let os = |error| DiskOpenError::Os { path: path.into(), error };
    let device = device.ok_or_else(|| refused(PassthroughError::NotNvme))?;
    let number = file.metadata().map_err(os)?.rdev();
    let number = (libc::major(number), libc::minor(number));
    let (sector_bytes, discard_max) = (device.logical_block_bytes, device.discard_max_bytes);
    let namespace = Namespace::open(Path::new(SYSFS), number, sector_bytes, discard_max).map_err(refused)?;
    // Commands know nothing of the page cache: what somebody has left there must neither be written later nor be read.
    file.sync_all().map_err(os)?;
    // SAFETY: plain system call on a descriptor that `file` owns.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(namespace)
}

fn whole_blocks(bytes: u64) -> u64 {
    bytes - bytes % BLOCK_BYTES as u64
}

fn regular_file(file: &File) -> io::Result<DiskInfo> {
    // SAFETY: statfs is plain data, for which zero bytes are a valid value.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `fs` is valid to write to and the descriptor is open.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut fs) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(DiskInfo {
        size_bytes: whole_blocks(file.metadata()?.len()),
        // File systems write whole pages; a file stands in for a drive with 4 KiB sectors.
        atomic_bytes: BLOCK_BYTES as u32,
        write_through: fs.f_type == TMPFS_MAGIC,
    })
}

/// What the kernel says of an open file's block device; `None` when it is no block device.
fn device(file: &File, path: &Path) -> Result<Option<Device>, DiskOpenError> {
    let os = |error| DiskOpenError::Os { path: path.into(), error };
    let meta = file.metadata().map_err(os)?;
    if !meta.file_type().is_block_device() {
        return Ok(None);
    }
    let number = meta.rdev();
    Device::read(Path::new(SYSFS), libc::major(number), libc::minor(number))
        .map(Some)
        .map_err(|error| DiskOpenError::Unsuitable { path: path.into(), error })
}

fn block_device(file: &File, device: &Device) -> io::Result<DiskInfo> {
    let mut bytes = 0u64;
    // SAFETY: the ioctl writes one u64 to the pointer given.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(DiskInfo {
        size_bytes: whole_blocks(bytes),
        atomic_bytes: device.atomic_bytes(),
        write_through: !device.volatile_cache,
    })
}
