//! Rings between the cores of a node, and the letter box for threads that are no cores.
//!
//! A sender pushes and then marks the receiver's `Waker`. Only when the receiver is parked does it pay for
//! a write to the receiver's eventfd, which the receiver keeps armed in its io_uring.

use super::spsc::{self, Consumer, Producer};
use crate::env::{Full, MESH_RING_MESSAGES, MeshMsg};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use wire::{CONTROL_CORE, CoreId};

/// The sender of messages that a `Poster` delivers: no core has this number.
pub const OUTSIDE: CoreId = CoreId(u16::MAX - 1);

/// Something lies in one of the rings.
const PENDING: u8 = 1;
/// The receiver sleeps, or is about to.
const PARKED: u8 = 2;

/// How a core is told that something came while it may be asleep.
pub(crate) struct Waker {
    state: AtomicU8,
    eventfd: OwnedFd,
}

impl Waker {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        // SAFETY: plain system call; the result is checked before it becomes an owned descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a fresh descriptor that nobody else owns.
        let eventfd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Arc::new(Self { state: AtomicU8::new(0), eventfd }))
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// After a push: makes sure that the receiver looks.
    fn notify(&self) {
        // The push happened before this read-modify-write; the receiver's own one orders it (see `take`).
        if self.state.fetch_or(PENDING, Ordering::AcqRel) == PARKED {
            let one = 1u64.to_ne_bytes();
            // SAFETY: writes eight bytes from a live array to an eventfd. It cannot block before 2^64
            // unread notes, and a failure could only mean a wrong descriptor.
            unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) };
        }
    }

    /// Whether something came since the last call. The caller then empties all rings.
    pub(crate) fn take(&self) -> bool {
        self.state.load(Ordering::Relaxed) & PENDING != 0
            && self.state.fetch_and(!PENDING, Ordering::AcqRel) & PENDING != 0
    }

    pub(crate) fn pending(&self) -> bool {
        self.state.load(Ordering::Relaxed) & PENDING != 0
    }

    /// Announces sleep; false when something came and sleeping would be wrong.
    pub(crate) fn park(&self) -> bool {
        if self.state.fetch_or(PARKED, Ordering::AcqRel) & PENDING != 0 {
            self.unpark();
            return false;
        }
        true
    }

    pub(crate) fn unpark(&self) {
        self.state.fetch_and(!PARKED, Ordering::AcqRel);
    }
}

/// Posts messages to one core from any thread: signals, hosts of a `ForeignCore`. Control only, it locks.
#[derive(Clone)]
pub struct Poster {
    waker: Arc<Waker>,
    letters: Arc<Mutex<VecDeque<MeshMsg>>>,
}

impl Poster {
    pub(crate) fn new(waker: Arc<Waker>) -> Self {
        Self { waker, letters: Arc::new(Mutex::new(VecDeque::new())) }
    }

    /// Delivers `Event::Mesh { from: OUTSIDE, msg }`. On refusal the message comes back.
    pub fn post(&self, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        {
            let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
            if letters.len() >= MESH_RING_MESSAGES {
                return Err((Full, msg));
            }
            letters.push_back(msg);
        }
        self.waker.notify();
        Ok(())
    }

    fn take(&self) -> Option<MeshMsg> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

struct Peer {
    core: CoreId,
    to: Producer<MeshMsg>,
    from: Consumer<MeshMsg>,
    waker: Arc<Waker>,
}

/// One core's end of the mesh.
pub(crate) struct MeshEnd {
    core: CoreId,
    waker: Arc<Waker>,
    poster: Poster,
    /// Ordered by core.
    peers: Vec<Peer>,
}

impl MeshEnd {
    /// A core without others.
    pub(crate) fn alone(core: CoreId) -> io::Result<Self> {
        let waker = Waker::new()?;
        Ok(Self { core, poster: Poster::new(waker.clone()), waker, peers: Vec::new() })
    }

    /// The ends of a mesh between `cores`, in their order.
    pub(crate) fn build(cores: &[CoreId]) -> io::Result<Vec<Self>> {
        let mut ends = cores.iter().map(|core| Self::alone(*core)).collect::<io::Result<Vec<_>>>()?;
        for a in 0..ends.len() {
            let (left, right) = ends.split_at_mut(a + 1);
            let Some(one) = left.last_mut() else { continue };
            for two in right {
                let (to_two, from_one) = spsc::ring(MESH_RING_MESSAGES);
                let (to_one, from_two) = spsc::ring(MESH_RING_MESSAGES);
                one.peers.push(Peer { core: two.core, to: to_two, from: from_two, waker: two.waker.clone() });
                two.peers.push(Peer { core: one.core, to: to_one, from: from_one, waker: one.waker.clone() });
            }
        }
        for end in &mut ends {
            end.peers.sort_by_key(|peer| peer.core);
        }
        Ok(ends)
    }

    pub(crate) fn core(&self) -> CoreId {
        self.core
    }

    pub(crate) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    pub(crate) fn poster(&self) -> Poster {
        self.poster.clone()
    }

    pub(crate) fn post(&mut self, to: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        // The control core sorts last; the others are found by search.
        let found = if to == CONTROL_CORE {
            self.peers.last_mut().filter(|peer| peer.core == to)
        } else {
            self.peers.binary_search_by_key(&to, |peer| peer.core).ok().and_then(|at| self.peers.get_mut(at))
        };
        let Some(peer) = found else { return Err((Full, msg)) };
        peer.to.push(msg).map_err(|msg| (Full, msg))?;
        peer.waker.notify();
        Ok(())
    }

    /// Gives every message that has come to `each`, when any has.
    pub(crate) fn receive(&mut self, mut each: impl FnMut(CoreId, MeshMsg)) {
        if !self.waker.take() {
            return;
        }
        for peer in &mut self.peers {
            while let Some(msg) = peer.from.pop() {
                each(peer.core, msg);
            }
        }
        while let Some(msg) = self.poster.take() {
            each(OUTSIDE, msg);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(end: &mut MeshEnd) -> Vec<(u16, u32)> {
        let mut out = Vec::new();
        end.receive(|from, msg| out.push((from.0, *msg.downcast::<u32>().unwrap())));
        out
    }

    #[test]
    fn every_pair_has_its_ring_and_full_gives_the_message_back() {
        let mut ends = MeshEnd::build(&[CoreId(0), CoreId(1), CONTROL_CORE]).unwrap();
        ends[0].post(CONTROL_CORE, Box::new(1u32)).unwrap();
        ends[1].post(CONTROL_CORE, Box::new(2u32)).unwrap();
        ends[2].post(CoreId(1), Box::new(3u32)).unwrap();
        assert_eq!(numbers(&mut ends[2]), [(0, 1), (1, 2)]);
        assert_eq!(numbers(&mut ends[1]), [(u16::MAX, 3)]);
        assert!(ends[0].post(CoreId(7), Box::new(0u32)).is_err());
        for i in 0..MESH_RING_MESSAGES {
            ends[0].post(CoreId(1), Box::new(i as u32)).unwrap();
        }
        let (_, back) = ends[0].post(CoreId(1), Box::new(77u32)).unwrap_err();
        assert_eq!(*back.downcast::<u32>().unwrap(), 77);
        assert_eq!(numbers(&mut ends[1]).len(), MESH_RING_MESSAGES);
    }

    #[test]
    fn parking_is_refused_when_something_has_come() {
        let mut end = MeshEnd::alone(CoreId(0)).unwrap();
        assert!(end.waker().park());
        end.waker().unpark();
        end.poster().post(Box::new(5u32)).unwrap();
        assert!(!end.waker().park());
        assert_eq!(numbers(&mut end), [(OUTSIDE.0, 5)]);
        assert!(end.waker().park());
    }
}
