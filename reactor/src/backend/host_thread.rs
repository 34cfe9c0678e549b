//! A thread for a core that nobody else drives, and the rule of which thread may drive one.

use std::io;
use std::thread::{self, JoinHandle, ThreadId};

/// A thread that turns a `ForeignCore` for callers who want to wait. Dropping it waits for its end: tell
/// its work to end before.
pub struct HostThread(Option<JoinHandle<()>>);

impl HostThread {
    /// Starts `work` on a thread of that name (at most 15 bytes of it show in the kernel's lists).
    pub fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        Ok(Self(Some(thread::Builder::new().name(name.to_owned()).spawn(work)?)))
    }
}

impl Drop for HostThread {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            // A panic has been reported on standard error by the thread itself.
            let _ = handle.join();
        }
    }
}

/// Which threads may turn a core.
pub(crate) enum Home {
    /// The one that made it: the kernel checks that of a ring made for a single issuer.
    Maker(ThreadId),
    /// Any, one after the other.
    Movable,
}

impl Home {
    pub(crate) fn here(movable: bool) -> Self {
        if movable { Self::Movable } else { Self::Maker(thread::current().id()) }
    }

    pub(crate) fn admits_caller(&self) -> bool {
        match self {
            Self::Movable => true,
            Self::Maker(thread) => *thread == thread::current().id(),
        }
    }
}
