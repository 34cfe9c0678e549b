//! The loop in somebody else's thread: how a client lives inside fio, QEMU or a tool.

use super::core::{Core, CoreError, CoreOptions};
use super::host_thread::Home;
use super::mesh::{MeshEnd, Poster};
use super::transport::Transport;
use crate::env::{Clock, Env, Mono, Service};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;
use wire::CoreId;

/// A core that turns only when `poll` is called.
///
/// All calls come from the thread that made it, unless `CoreOptions::movable` is set. There is no mesh;
/// messages from other threads come through a `Poster`.
pub struct ForeignCore<S: Service> {
    core: Core<S>,
    home: Home,
    eventfd: Option<OwnedFd>,
}

impl<S: Service> ForeignCore<S> {
    /// Makes the environment in the calling thread and starts `service` in it.
    pub fn new(options: CoreOptions, transport: Box<dyn Transport>, service: S) -> Result<Self, CoreError> {
        let mesh = MeshEnd::alone(CoreId(0)).map_err(CoreError::Waker)?;
        let home = Home::here(options.movable);
        let core = Core::new(options, transport, mesh, || Box::new(service))?;
        Ok(Self { core, home, eventfd: None })
    }

    /// Whether the calling thread may call the rest: it made this core, or the core is movable. For hosts
    /// that cannot rule out the mistake, such as C programs.
    pub fn admits_caller(&self) -> bool {
        self.home.admits_caller()
    }

    /// The time, read now.
    pub fn now(&mut self) -> Mono {
        self.core.env.refresh_now();
        self.core.env.now()
    }

    /// One turn: submits what is queued, handles what has come, and returns how many events that were.
    ///
    /// `None` never sleeps, and makes no system call when nothing is queued and nothing has come.
    /// `Some(wait)` sleeps until something comes or the time is over; submitting and sleeping are one
    /// system call. What the service submits while events are handled goes out with the next turn: poll
    /// until it returns 0 before waiting for anything else.
    pub fn poll(&mut self, wait: Option<Duration>) -> Result<usize, CoreError> {
        if wait.is_none() {
            self.core.env.prepare();
            // Somebody may wait for the eventfd next: the device of a transport must be told.
            if self.core.env.is_quiet()
                && !self.is_due()
                && (self.eventfd.is_none() || self.core.env.arm()?)
            {
                return Ok(0);
            }
        }
        self.clear_eventfd();
        self.core.turn(wait.unwrap_or(Duration::ZERO))
    }

    /// Calls the service between turns. Time is refreshed first; `Service::flush` is not called, as this
    /// is no batch. What is submitted goes out with the next `poll`.
    pub fn with<R>(&mut self, call: impl FnOnce(&mut S, &mut dyn Env) -> R) -> R {
        self.core.env.refresh_now();
        call(&mut self.core.service, &mut self.core.env)
    }

    /// The service, to look at.
    pub fn service(&self) -> &S {
        &self.core.service
    }

    /// An eventfd that becomes readable when `poll` has something to do: wait for it together with other
    /// descriptors, at most `next_due` long, after `poll` has returned 0. `poll` empties it.
    pub fn event_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        let fd = match self.eventfd.take() {
            Some(fd) => fd,
            None => {
                // SAFETY: plain system call; the result is checked before it becomes an owned descriptor.
                let fd = unsafe { libc::eventfd(1, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: `fd` is a fresh descriptor that nobody else owns.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                self.core.env.register_eventfd(fd.as_raw_fd())?;
                fd
            }
        };
        let fd: &OwnedFd = self.eventfd.insert(fd);
        Ok(std::os::fd::AsFd::as_fd(fd))
    }

    /// How long until a timer wants `poll` to be called; `None` when no timer runs.
    pub fn next_due(&mut self) -> Option<Duration> {
        let now = self.now();
        self.core.env.next_due().map(|due| Duration::from_nanos(due.since(now)))
    }

    /// Posts messages to the service from other threads.
    pub fn poster(&self) -> Poster {
        self.core.env.poster()
    }

    /// Whether a timer is due.
    fn is_due(&mut self) -> bool {
        let Some(due) = self.core.env.next_due() else { return false };
        self.core.env.refresh_now();
        due <= self.core.env.now()
    }

    fn clear_eventfd(&self) {
        if let Some(fd) = &self.eventfd {
            let mut count = [0u8; 8];
            // SAFETY: reads eight bytes into a live array; the descriptor does not block.
            unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        }
    }
}
