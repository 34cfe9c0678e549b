//! One core's io_uring.
//!
//! Set up with SINGLE_ISSUER and DEFER_TASKRUN where the kernel has them: completions are then made when
//! this thread enters the kernel and asks for them, in one batch, instead of interrupting it one by one.
//! TASKRUN_FLAG tells without a system call whether entering would bring any.

#![allow(clippy::disallowed_types, reason = "the production backend owns the ring")]

use super::core::CoreError;
use super::stats::CoreStats;
use crate::buf::Arena;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, squeue};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// The completion queue is this many times the submission queue: bounds of disk operations and
/// connections together stay below it in ordinary use (and the kernel keeps what does not fit).
const CQ_FACTOR: u32 = 8;
/// How long a sleep for several completions lasts before one is enough, in microseconds: small against
/// the latency that a queue of that depth has anyway.
const BATCH_WAIT_US: u32 = 50;
/// Longest sleep when a completion more is waited for because of a send that should have brought it. Above a
/// timer tick, so that it costs no timer of its own; reached only when a short send met a full socket.
const INLINE_WAIT: Duration = Duration::from_millis(5);
/// How long to wait, in all, for outstanding operations when a ring is closed.
const DRAIN_MS: u64 = 5_000;
/// Smallest arena prefix worth registering.
const REGISTER_BYTES_MIN: usize = 1 << 20;

const CLASS_SHIFT: u32 = 56;
const DATA_MASK: u64 = (1 << CLASS_SHIFT) - 1;

/// Whose submission it is: the top byte of the user data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// Nobody waits for it.
    None = 0,
    /// The disks.
    Disk = 1,
    /// The transport.
    Net = 2,
    /// The mesh's eventfd.
    Wake = 3,
}

/// A completion, copied out of the ring.
#[derive(Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) class: Class,
    pub(crate) data: u64,
    pub(crate) result: i32,
    pub(crate) flags: u32,
}

/// One core's submission and completion queues.
pub struct Ring {
    io: IoUring,
    stats: Arc<CoreStats>,
    /// Submissions that did not fit; they go first next time.
    backlog: VecDeque<squeue::Entry>,
    /// Submissions without their (last) completion.
    outstanding: usize,
    /// Start address and length of the registered part of the arena.
    registered: Option<(usize, usize)>,
    /// Files are named by their index, not by a descriptor.
    knows_files: bool,
    /// The kernel can wait for several completions and settle for one after a while.
    batches: bool,
    /// Queued submissions that complete while they are submitted, as a rule.
    inline: u32,
}

impl Ring {
    pub(crate) fn new(entries: u32, movable: bool, stats: Arc<CoreStats>) -> Result<Self, CoreError> {
        Self::of_kind(entries, movable, false, stats)
    }

    /// A ring whose completions raise no interrupt: each `enter` looks for them. For reads and writes of
    /// descriptors with O_DIRECT, on devices with queues to poll, and for nothing else.
    pub(crate) fn polled(entries: u32, movable: bool, stats: Arc<CoreStats>) -> Result<Self, CoreError> {
        Self::of_kind(entries, movable, true, stats)
    }

    fn of_kind(entries: u32, movable: bool, polled: bool, stats: Arc<CoreStats>) -> Result<Self, CoreError> {
        let common = || {
            let mut builder = IoUring::builder();
            builder.setup_clamp().setup_submit_all().setup_cqsize(entries * CQ_FACTOR);
            if polled {
                builder.setup_iopoll();
            }
            builder
        };
        let deferred =
            || common().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(entries);
        let cooperative = || common().setup_coop_taskrun().setup_taskrun_flag().build(entries);
        let io = if movable {
            cooperative()
        } else {
            deferred().or_else(|error| {
                tracing::warn!(%error, "kernel refuses a deferred ring; using a cooperative one");
                cooperative()
            })
        };
        let io = io.map_err(CoreError::RingSetup)?;
        Ok(Self {
            batches: io.params().is_feature_min_timeout(),
            io,
            stats,
            backlog: VecDeque::new(),
            outstanding: 0,
            registered: None,
            knows_files: false,
            inline: 0,
        })
    }

    /// Registers as much of the arena's start as the limit on locked memory allows, at most `max` bytes.
    /// Buffers are handed out from the start first, so a part serves most operations.
    pub(crate) fn register_arena(&mut self, arena: &Arena, max: usize) {
        let (base, len) = arena.region();
        let mut want = len.min(max);
        let mut refused = None;
        while want >= REGISTER_BYTES_MIN.min(len) && want > 0 {
            let iovec = libc::iovec { iov_base: base.cast(), iov_len: want };
            // SAFETY: the region belongs to the arena, which the core drops after the ring.
            match unsafe { self.io.submitter().register_buffers(&[iovec]) } {
                Ok(()) => {
                    self.registered = Some((base as usize, want));
                    break;
                }
                Err(error) => refused = Some(error),
            }
            want /= 2;
        }
        let registered = self.registered.map_or(0, |(_, len)| len);
        self.stats.arena_registered_bytes.set(registered as u64);
        if let Some(error) = refused {
            tracing::warn!(
                %error,
                asked_bytes = len.min(max),
                registered_bytes = registered,
                "limit on locked memory (ulimit -l) keeps part of the buffers unregistered; they work, \
                 each operation costs a little more"
            );
        }
    }

    /// Lets go of the registered files at once, instead of when the kernel gets to destroying the ring.
    pub(crate) fn unregister_files(&mut self) {
        // Fails when none are registered: nothing to let go of then.
        let _ = self.io.submitter().unregister_files();
    }

    /// Makes the kernel know files by their index; where it refuses, their descriptors have to do.
    pub(crate) fn register_files(&mut self, files: &[RawFd]) {
        if files.is_empty() {
            return;
        }
        match self.io.submitter().register_files(files) {
            Ok(()) => self.knows_files = true,
            Err(error) => {
                tracing::warn!(%error, "kernel refuses registered files; using plain descriptors");
            }
        }
    }

    /// Whether files are named by their index in what was registered.
    pub(crate) fn knows_files(&self) -> bool {
        self.knows_files
    }

    /// Submissions without their (last) completion.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Has the kernel signal `fd`, an eventfd, whenever there is something to reap.
    pub(crate) fn register_eventfd(&mut self, fd: RawFd) -> io::Result<()> {
        self.io.submitter().register_eventfd(fd)
    }

    /// Whether `len` bytes at `ptr` lie in the registered part of the arena.
    pub(crate) fn is_registered(&self, ptr: *const u8, len: usize) -> bool {
        self.registered.is_some_and(|(base, size)| {
            (ptr as usize).checked_sub(base).is_some_and(|at| at <= size && len <= size - at)
        })
    }

    /// Queues a submission of the transport; `data` (56 bits) comes back with its completion.
    ///
    /// # Safety
    /// Everything the entry points to must stay valid, and untouched where the kernel writes, until the
    /// completion has come back.
    pub unsafe fn push_net(&mut self, entry: squeue::Entry, data: u64) {
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry, Class::Net, data) }
    }

    /// As `push_net`, for a short send, which completes while it is submitted unless the socket is full. The
    /// next sleep therefore waits for one completion more, or it would end at once and bring no news; and
    /// because the socket may be full, it is short.
    ///
    /// # Safety
    /// As `push_net`.
    pub unsafe fn push_net_inline(&mut self, entry: squeue::Entry, data: u64) {
        self.inline += 1;
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry, Class::Net, data) }
    }

    /// Queues the cancellation of a submission pushed with `push_net` under `data`.
    pub fn cancel_net(&mut self, data: u64) {
        let target = (Class::Net as u64) << CLASS_SHIFT | data & DATA_MASK;
        let entry = io_uring::opcode::AsyncCancel::new(target).build();
        // SAFETY: a cancellation points to no memory.
        unsafe { self.push(entry, Class::None, 0) }
    }

    /// Queues a submission.
    ///
    /// # Safety
    /// As `push_net`.
    pub(crate) unsafe fn push(&mut self, entry: squeue::Entry, class: Class, data: u64) {
        let entry = entry.user_data((class as u64) << CLASS_SHIFT | data & DATA_MASK);
        self.outstanding += 1;
        if self.backlog.is_empty() {
            // SAFETY: validity is the caller's promise.
            if unsafe { self.io.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: make room. An error shows again at the next `enter`, which reports it.
            let _ = self.enter(0, None);
            // SAFETY: as above.
            if unsafe { self.io.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    fn take_backlog(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: validity was promised when the entry was queued and lasts until its completion.
            if unsafe { self.io.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Submissions waiting for `enter`.
    pub(crate) fn queued(&mut self) -> usize {
        self.io.submission().len() + self.backlog.len()
    }

    /// Whether completions can be reaped now.
    pub(crate) fn has_completions(&mut self) -> bool {
        !self.io.completion().is_empty()
    }

    /// Whether entering the kernel would make completions that are only waiting for that.
    pub(crate) fn has_deferred(&mut self) -> bool {
        let queue = self.io.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Submits what is queued, makes deferred completions, and waits for `want` completions, at most for
    /// `timeout`; after `BATCH_WAIT_US` one is enough. One system call.
    pub(crate) fn enter(&mut self, want: u32, timeout: Option<Duration>) -> Result<(), CoreError> {
        if !self.backlog.is_empty() {
            self.take_backlog();
        }
        self.stats.enters.add(1);
        let inline = std::mem::take(&mut self.inline);
        let queued = self.io.submission().len() as u32;
        let submitter = self.io.submitter();
        let entered = match timeout {
            // SAFETY: no argument is passed; the flags ask for nothing but completions.
            None => unsafe {
                submitter.enter::<libc::sigset_t>(queued, want, EnterFlags::GETEVENTS.bits(), None)
            },
            Some(timeout) => {
                let timeout = if inline > 0 { timeout.min(INLINE_WAIT) } else { timeout };
                let ts = Timespec::from(timeout);
                let mut args = SubmitArgs::new().timespec(&ts);
                let want = if self.batches { want } else { want.min(1) };
                if want > 1 {
                    args = args.min_wait_usec(BATCH_WAIT_US);
                }
                let want = want + inline;
                let flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
                // SAFETY: `args` and the timespec it points to outlive the call; EXT_ARG says what it is.
                unsafe { submitter.enter(queued, want, flags.bits(), Some(&args)) }
            }
        };
        match entered {
            Ok(_) => Ok(()),
            // Time is up, a signal came, or the kernel wants completions reaped first.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(CoreError::RingEnter(error)),
        }
    }

    /// Moves up to `max` completions into `out`.
    pub(crate) fn reap(&mut self, out: &mut Vec<Completion>, max: usize) {
        for entry in self.io.completion().take(max) {
            if !cqueue::more(entry.flags()) {
                self.outstanding = self.outstanding.saturating_sub(1);
            }
            let class = match entry.user_data() >> CLASS_SHIFT {
                1 => Class::Disk,
                2 => Class::Net,
                3 => Class::Wake,
                _ => Class::None,
            };
            out.push(Completion {
                class,
                data: entry.user_data() & DATA_MASK,
                result: entry.result(),
                flags: entry.flags(),
            });
        }
    }

    /// Cancels everything and waits until the kernel has let go of all memory. False when it has not
    /// after `DRAIN_MS`: the memory must then never be freed.
    pub(crate) fn drain(&mut self) -> bool {
        let cancel = io_uring::opcode::AsyncCancel2::new(io_uring::types::CancelBuilder::any()).build();
        // SAFETY: a cancellation points to no memory.
        unsafe { self.push(cancel, Class::None, 0) };
        let until = super::clock::mono().plus_ms(DRAIN_MS);
        let mut reaped = Vec::new();
        while self.outstanding > 0 {
            if self.enter(1, Some(Duration::from_millis(10))).is_err() {
                return false;
            }
            self.reap(&mut reaped, usize::MAX);
            reaped.clear();
            if super::clock::mono() > until {
                return false;
            }
        }
        self.unregister_files();
        true
    }
}
