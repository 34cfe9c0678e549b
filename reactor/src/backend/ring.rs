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
use io_uring::{EnterFlags, IoUring, Submitter, cqueue, squeue};
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

fn user_data(class: Class, data: u64) -> u64 {
    (class as u64) << CLASS_SHIFT | data & DATA_MASK
}

/// A completion, copied out of the ring.
#[derive(Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) class: Class,
    pub(crate) data: u64,
    pub(crate) result: i32,
    pub(crate) flags: u32,
}

/// What a ring is for.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct RingKind {
    /// The core may be polled from different threads (one after the other).
    pub(crate) movable: bool,
    /// Its completions raise no interrupt: each `enter` looks for them. For reads and writes of descriptors with
    /// O_DIRECT, on devices with queues to poll, and for nothing else.
    pub(crate) polled: bool,
    /// Its entries have room for commands of a device (`push_command`), which makes them twice as large.
    pub(crate) commands: bool,
}

/// Queues with entries of one size.
struct Queues<S: squeue::EntryMarker, C: cqueue::EntryMarker> {
    io: IoUring<S, C>,
    /// Submissions that did not fit; they go first next time.
    backlog: VecDeque<S>,
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Queues<S, C> {
    fn new(entries: u32, kind: RingKind) -> io::Result<Self> {
        let common = || {
            let mut builder = IoUring::<S, C>::builder();
            builder.setup_clamp().setup_submit_all().setup_cqsize(entries * CQ_FACTOR);
            if kind.polled {
                builder.setup_iopoll();
            }
            builder
        };
        let deferred =
            || common().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(entries);
        let cooperative = || common().setup_coop_taskrun().setup_taskrun_flag().build(entries);
        let io = if kind.movable {
            cooperative()
        } else {
            deferred().or_else(|error| {
                tracing::warn!(%error, "kernel refuses a deferred ring; using a cooperative one");
                cooperative()
            })
        };
        Ok(Self { io: io?, backlog: VecDeque::new() })
    }

    /// Queues an entry, behind those that wait already. False when there is no room.
    ///
    /// # Safety
    /// As `Ring::push_net`.
    unsafe fn push(&mut self, entry: &S) -> bool {
        // SAFETY: validity is the caller's promise.
        self.backlog.is_empty() && unsafe { self.io.submission().push(entry) }.is_ok()
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

    fn reap(&mut self, max: usize, mut each: impl FnMut(cqueue::Entry)) {
        self.io.completion().take(max).for_each(|entry| each(entry.into()));
    }
}

/// Queues of either size.
enum Pair {
    Plain(Queues<squeue::Entry, cqueue::Entry>),
    Large(Queues<squeue::Entry128, cqueue::Entry32>),
}

/// Does the same with queues of either size.
macro_rules! either {
    ($sized:expr, $queues:ident => $does:expr) => {
        match $sized {
            Pair::Plain($queues) => $does,
            Pair::Large($queues) => $does,
        }
    };
}

/// One core's submission and completion queues.
pub struct Ring {
    queues: Pair,
    stats: Arc<CoreStats>,
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
    pub(crate) fn new(entries: u32, kind: RingKind, stats: Arc<CoreStats>) -> Result<Self, CoreError> {
        let queues = match kind.commands {
            false => Queues::new(entries, kind).map(Pair::Plain),
            true => Queues::new(entries, kind).map(Pair::Large),
        };
        let queues = queues.map_err(CoreError::RingSetup)?;
        Ok(Self {
            batches: either!(&queues, q => q.io.params().is_feature_min_timeout()),
            queues,
            stats,
            outstanding: 0,
            registered: None,
            knows_files: false,
            inline: 0,
        })
    }

    fn submitter(&self) -> Submitter<'_> {
        either!(&self.queues, q => q.io.submitter())
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
            match unsafe { self.submitter().register_buffers(&[iovec]) } {
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
        let _ = self.submitter().unregister_files();
    }

    /// Makes the kernel know files by their index; where it refuses, their descriptors have to do.
    pub(crate) fn register_files(&mut self, files: &[RawFd]) {
        if files.is_empty() {
            return;
        }
        match self.submitter().register_files(files) {
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
        self.submitter().register_eventfd(fd)
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
        let entry = io_uring::opcode::AsyncCancel::new(user_data(Class::Net, data)).build();
        // SAFETY: a cancellation points to no memory.
        unsafe { self.push(entry, Class::None, 0) }
    }

    /// Queues a submission.
    ///
    /// # Safety
    /// As `push_net`.
    pub(crate) unsafe fn push(&mut self, entry: squeue::Entry, class: Class, data: u64) {
        let entry = entry.user_data(user_data(class, data));
        self.outstanding += 1;
        let large = || squeue::Entry128::from(entry.clone());
        for _ in 0..2 {
            // SAFETY: validity is the caller's promise.
            let pushed = unsafe {
                match &mut self.queues {
                    Pair::Plain(queues) => queues.push(&entry),
                    Pair::Large(queues) => queues.push(&large()),
                }
            };
            if pushed {
                return;
            }
            self.make_room();
        }
        match &mut self.queues {
            Pair::Plain(queues) => queues.backlog.push_back(entry),
            Pair::Large(queues) => queues.backlog.push_back(large()),
        }
    }

    /// Queues a command of a device. False when this ring has no room for such: it was made for other things.
    ///
    /// # Safety
    /// As `push_net`.
    pub(crate) unsafe fn push_command(&mut self, entry: squeue::Entry128, class: Class, data: u64) -> bool {
        let entry = entry.user_data(user_data(class, data));
        for _ in 0..2 {
            let Pair::Large(queues) = &mut self.queues else { return false };
            // SAFETY: validity is the caller's promise.
            if unsafe { queues.push(&entry) } {
                self.outstanding += 1;
                return true;
            }
            self.make_room();
        }
        let Pair::Large(queues) = &mut self.queues else { return false };
        queues.backlog.push_back(entry);
        self.outstanding += 1;
        true
    }

    /// The queue is full: submits it. With a backlog there is nothing to gain, as that goes first.
    fn make_room(&mut self) {
        if either!(&self.queues, q => q.backlog.is_empty()) {
            // An error shows again at the next `enter`, which reports it.
            let _ = self.enter(0, None);
        }
    }

    /// Submissions waiting for `enter`.
    pub(crate) fn queued(&mut self) -> usize {
        either!(&mut self.queues, q => q.io.submission().len() + q.backlog.len())
    }

    /// Whether completions can be reaped now.
    pub(crate) fn has_completions(&mut self) -> bool {
        either!(&mut self.queues, q => !q.io.completion().is_empty())
    }

    /// Whether entering the kernel would make completions that are only waiting for that.
    pub(crate) fn has_deferred(&mut self) -> bool {
        either!(&mut self.queues, q => {
            let queue = q.io.submission();
            queue.taskrun() || queue.cq_overflow()
        })
    }

    /// Submits what is queued, makes deferred completions, and waits for `want` completions, at most for
    /// `timeout`; after `BATCH_WAIT_US` one is enough. One system call.
    pub(crate) fn enter(&mut self, want: u32, timeout: Option<Duration>) -> Result<(), CoreError> {
        let queued = either!(&mut self.queues, q => {
            if !q.backlog.is_empty() {
                q.take_backlog();
            }
            q.io.submission().len() as u32
        });
        self.stats.enters.add(1);
        let inline = std::mem::take(&mut self.inline);
        let submitter = self.submitter();
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
        let Self { queues, outstanding, .. } = self;
        let each = |entry: cqueue::Entry| {
            if !cqueue::more(entry.flags()) {
                *outstanding = outstanding.saturating_sub(1);
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
        };
        either!(queues, q => q.reap(max, each));
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
