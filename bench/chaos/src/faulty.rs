//! A disk that does what it is told not to: a file on a FUSE file system that this process serves. The file is as
//! large as a disk and keeps its bytes in another one; a switch decides what becomes of each operation.
//!
//! Nodes see it as any disk file: O_DIRECT and io_uring reach it as asynchronous requests, so that an operation
//! that does not end holds up no thread of the node, as with a device.

use crate::error::ChaosError;
use crate::isolate;
use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

/// The file's name on its file system, and its number there.
const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
/// Nothing but the contents ever changes.
const VALID: Duration = Duration::from_secs(3600);
/// Requests that the kernel hands on before earlier ones have ended: as many as a node's slices may have under way.
const REQUESTS_MAX: u16 = 8192;
/// Bytes that fail to be read together.
const SECTOR: u64 = 4096;

/// What becomes of operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// They are carried out.
    None,
    /// All fail with EIO: the device is gone, and says so in every way that it has.
    All,
    /// Those that change something fail with EIO.
    Writes,
    /// They are carried out one after the other, and each takes so long.
    Slow(Duration),
    /// None ends. They are carried out when the fault ends.
    Hang,
}

/// An operation and who waits for it.
enum Job {
    Read { offset: u64, size: u32, reply: ReplyData },
    Write { offset: u64, data: Vec<u8>, reply: ReplyWrite },
    Sync { reply: ReplyEmpty },
    Punch { offset: u64, len: u64, reply: ReplyEmpty },
}

struct State {
    fault: Fault,
    /// Sectors that cannot be read until they are written again.
    bad: BTreeSet<u64>,
    /// Sectors that have been written.
    written: BTreeSet<u64>,
    held: Vec<Job>,
    /// Operations that failed on purpose.
    failed: u64,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    backing: File,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an operation fails on purpose.
    fn refuses(&self, job: &Job) -> bool {
        let mut state = self.state();
        let fails = match (state.fault, job) {
            (Fault::All, _) => true,
            (Fault::Writes, Job::Write { .. } | Job::Sync { .. } | Job::Punch { .. }) => true,
            (_, Job::Read { offset, size, .. }) => {
                let end = (offset + u64::from(*size)).div_ceil(SECTOR);
                state.bad.range(offset / SECTOR..end).next().is_some()
            }
            _ => false,
        };
        if let (false, Job::Write { offset, data, .. }) = (fails, job) {
            for sector in offset / SECTOR..(offset + data.len() as u64).div_ceil(SECTOR) {
                state.bad.remove(&sector);
                state.written.insert(sector);
            }
        }
        state.failed += u64::from(fails);
        fails
    }

    fn carry_out(&self, job: Job) {
        let fails = self.refuses(&job);
        match job {
            Job::Read { reply, .. } if fails => reply.error(Errno::EIO),
            Job::Write { reply, .. } if fails => reply.error(Errno::EIO),
            Job::Sync { reply } | Job::Punch { reply, .. } if fails => reply.error(Errno::EIO),
            Job::Read { offset, size, reply } => {
                let mut data = vec![0; size as usize];
                match self.backing.read_exact_at(&mut data, offset) {
                    Ok(()) => reply.data(&data),
                    Err(error) => reply.error(error.into()),
                }
            }
            Job::Write { offset, data, reply } => match self.backing.write_all_at(&data, offset) {
                Ok(()) => reply.written(data.len() as u32),
                Err(error) => reply.error(error.into()),
            },
            // What was written is in the backing file already, and the node's death does not take it away.
            Job::Sync { reply } => reply.ok(),
            Job::Punch { offset, len, reply } => {
                use rustix::fs::{FallocateFlags, fallocate};
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match fallocate(&self.backing, flags, offset, len) {
                    Ok(()) => reply.ok(),
                    Err(error) => reply.error(std::io::Error::from(error).into()),
                }
            }
        }
    }

    /// Ends one operation after the other, each after the time that the present fault says.
    fn carry_out_slowly(&self, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            let state = self.state();
            if let Fault::Slow(each) = state.fault {
                let slow = |state: &mut State| matches!(state.fault, Fault::Slow(_));
                drop(self.changed.wait_timeout_while(state, each, slow));
            } else {
                drop(state);
            }
            self.carry_out(job);
        }
    }
}

struct Files {
    shared: Arc<Shared>,
    bytes: u64,
    slowly: Sender<Job>,
}

impl Files {
    fn attributes(&self, number: INodeNo) -> FileAttr {
        let file = number == FILE;
        FileAttr {
            ino: number,
            size: if file { self.bytes } else { 0 },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file { FileType::RegularFile } else { FileType::Directory },
            perm: if file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: SECTOR as u32,
            flags: 0,
        }
    }

    fn take(&self, job: Job) {
        let mut state = self.shared.state();
        match state.fault {
            Fault::Hang => state.held.push(job),
            Fault::Slow(_) => {
                // Its receiver lives as long as the sender.
                let _ = self.slowly.send(job);
            }
            Fault::None | Fault::All | Fault::Writes => {
                drop(state);
                self.shared.carry_out(job);
            }
        }
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let lacks = |_| std::io::Error::from(std::io::ErrorKind::Unsupported);
        config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).map_err(lacks)?;
        // A bound that is too high is brought down.
        let _ = config.set_max_background(REQUESTS_MAX);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&VALID, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&VALID, &self.attributes(number));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = u64::from(size).min(self.bytes.saturating_sub(offset)) as u32;
        self.take(Job::Read { offset, size, reply });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if offset + data.len() as u64 > self.bytes {
            reply.error(Errno::ENOSPC);
            return;
        }
        self.take(Job::Write { offset, data: data.to_vec(), reply });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.take(Job::Sync { reply });
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        self.take(Job::Punch { offset, len, reply });
    }
}

/// See the module. Unmounted when dropped.
pub struct FaultyDisk {
    /// The file.
    pub path: PathBuf,
    at: PathBuf,
    shared: Arc<Shared>,
    _session: BackgroundSession,
}

impl FaultyDisk {
    /// A disk of so many bytes at `at`, a directory that is made; its bytes are kept in `backing`.
    pub fn mount(at: &Path, backing: &Path, bytes: u64) -> Result<Self, ChaosError> {
        std::fs::create_dir_all(at).map_err(ChaosError::io(format!("make {}", at.display())))?;
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(backing);
        let file = made.and_then(|file| file.set_len(bytes).map(|()| file));
        let file = file.map_err(ChaosError::io(format!("make {}", backing.display())))?;
        let (bad, written) = (BTreeSet::new(), BTreeSet::new());
        let state = Mutex::new(State { fault: Fault::None, bad, written, held: Vec::new(), failed: 0 });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), backing: file });
        let (slowly, jobs) = channel();
        let worker = shared.clone();
        std::thread::Builder::new()
            .name("slow disk".into())
            .spawn(move || worker.carry_out_slowly(&jobs))
            .map_err(ChaosError::io("start a disk's thread"))?;
        let files = Files { shared: shared.clone(), bytes, slowly };
        let session = fuser::spawn_mount(files, at, &fuser::Config::default())
            .map_err(|error| ChaosError::Impossible(format!("FUSE does not mount: {error}")))?;
        Ok(Self { path: at.join(NAME), at: at.to_path_buf(), shared, _session: session })
    }

    /// From now on operations end like that. Those that hung are carried out.
    pub fn set(&self, fault: Fault) {
        let held = {
            let mut state = self.shared.state();
            state.fault = fault;
            std::mem::take(&mut state.held)
        };
        self.shared.changed.notify_all();
        held.into_iter().for_each(|job| self.shared.carry_out(job));
    }

    /// Operations that failed on purpose.
    pub fn failed(&self) -> u64 {
        self.shared.state().failed
    }

    /// Operations that do not end.
    pub fn held(&self) -> usize {
        self.shared.state().held.len()
    }

    /// Makes up to `count` sectors unreadable, neighbours among those that `choose` wants by their contents, from
    /// the `from`th thousandth of what was written on. Returns how many.
    pub fn spoil(&self, count: usize, from: u64, choose: impl Fn(&[u8]) -> bool) -> usize {
        let mut state = self.shared.state();
        let skipped = state.written.len() * from.min(1000) as usize / 1000;
        let mut block = [0; SECTOR as usize];
        let mut wanted = |sector: &u64| {
            self.shared.backing.read_exact_at(&mut block, sector * SECTOR).is_ok() && choose(&block)
        };
        let (front, behind): (Vec<_>, Vec<_>) =
            state.written.iter().copied().enumerate().partition(|(at, _)| *at < skipped);
        let in_turn = behind.into_iter().chain(front).map(|(_, sector)| sector);
        state.bad = in_turn.filter(|sector| wanted(sector)).take(count).collect();
        state.bad.len()
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        // What hangs would keep processes from ending, and the file system from being unmounted.
        self.set(Fault::None);
        isolate::unmount(&self.at);
    }
}
