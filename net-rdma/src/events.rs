//! What a device says by itself: that its port has gone down or come back, and that it is no more.
//!
//! A driver says so through a descriptor, which the ring watches: nothing is asked on the way of an operation. Some
//! drivers, soft RoCE among them, have no word for their device's removal: the kernel takes its node away and then
//! waits, for ever, until nobody has it open. So the node is looked for now and then.

use crate::entry::Phase;
use crate::transport::{CHANNEL, RdmaTransport};
use crate::{Device, RdmaError};
use io_uring::{opcode, types};
use rdma_sys as sys;
use reactor::backend::TransportIo;
use reactor::{CloseReason, Mono};
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// User data of the submission that watches the descriptor.
pub(crate) const EVENTS: u64 = CHANNEL | 1;
/// How often the device's node is looked for, in milliseconds: nobody waits for its removal but an administrator.
const NODE_CHECK_MS: u64 = 1_000;
/// Where the kernel lists devices that can be opened.
const NODES: &str = "/sys/class/infiniband_verbs";

/// What a device says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DeviceEvent {
    PortDown,
    PortActive,
    /// Nothing works any more.
    Fatal,
    /// Of no consequence here: queue pairs tell their own errors by completions.
    Other,
}

impl DeviceEvent {
    /// By the numbers of verbs. Only of our port, where a port is meant.
    fn of(kind: u32, port: Option<u8>, ours: u8) -> Self {
        let is = |event: sys::ibv_event_type| kind == event as u32;
        if is(sys::ibv_event_type::IBV_EVENT_DEVICE_FATAL) {
            Self::Fatal
        } else if port == Some(ours) && is(sys::ibv_event_type::IBV_EVENT_PORT_ERR) {
            Self::PortDown
        } else if port == Some(ours) && is(sys::ibv_event_type::IBV_EVENT_PORT_ACTIVE) {
            Self::PortActive
        } else {
            Self::Other
        }
    }
}

/// A device's descriptor for events is asked without waiting.
pub(crate) fn unblock(device: &Device) -> Result<(), RdmaError> {
    let fd = fd(device);
    // SAFETY: plain system calls on a descriptor that the open context owns.
    let done = unsafe { libc::fcntl(fd, libc::F_SETFL, libc::fcntl(fd, libc::F_GETFL) | libc::O_NONBLOCK) };
    let made = |error| RdmaError::Make { what: "channel for events", error };
    if done == 0 { Ok(()) } else { Err(made(io::Error::last_os_error())) }
}

fn fd(device: &Device) -> RawFd {
    // SAFETY: an open context.
    unsafe { device.context().as_ref().async_fd }
}

/// The next event, if there is one.
fn next(device: &Device) -> Option<DeviceEvent> {
    let mut event = MaybeUninit::<sys::ibv_async_event>::zeroed();
    // SAFETY: an open context and a structure to write to. The descriptor does not block.
    if unsafe { sys::ibv_get_async_event(device.context().as_ptr(), event.as_mut_ptr()) } != 0 {
        let error = io::Error::last_os_error();
        let none = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
        // The kernel has cut the process off from its device.
        return (!none).then_some(DeviceEvent::Fatal);
    }
    // SAFETY: the library has written it. The number is read as such, as an enum knows only those of its time, and so
    // is the port, which shares its place with pointers and is asked for only where the number says so below.
    let (kind, element) = unsafe {
        let event = event.as_ptr();
        ((&raw const (*event).event_type).cast::<u32>().read(), (&raw const (*event).element.port_num).read())
    };
    // At once: destroying what an event speaks of waits for that.
    // SAFETY: an event that was got and is given back once.
    unsafe { sys::ibv_ack_async_event(event.as_mut_ptr()) };
    Some(DeviceEvent::of(kind, u8::try_from(element).ok(), device.port()))
}

/// The device's node, which goes when the device is being removed.
pub(crate) fn node(device: &Device) -> PathBuf {
    // SAFETY: an open context has a device, whose names are strings that live as long as it.
    let name = unsafe { CStr::from_ptr((*device.context().as_ref().device).dev_name.as_ptr()) };
    PathBuf::from(NODES).join(name.to_string_lossy().as_ref())
}

impl RdmaTransport {
    /// Has the ring tell of events.
    pub(crate) fn watch_events(&mut self, io: &mut TransportIo<'_>) {
        let Some(device) = self.device().filter(|_| !self.watching_events) else { return };
        let entry = opcode::PollAdd::new(types::Fd(fd(&device)), libc::POLLIN as u32).build();
        self.watching_events = true;
        // SAFETY: the entry points to no memory.
        unsafe { io.ring.push_net(entry, EVENTS) }
    }

    /// The descriptor has something, or is watched no more.
    pub(crate) fn events(&mut self, io: &mut TransportIo<'_>) {
        self.watching_events = false;
        while let Some(event) = self.device().and_then(|device| next(&device)) {
            tracing::debug!(?event, "the RDMA device says");
            match event {
                DeviceEvent::PortDown => self.port_down(io),
                DeviceEvent::PortActive => self.port_active(io),
                DeviceEvent::Fatal => self.lose_device(io, "the RDMA device has failed"),
                DeviceEvent::Other => {}
            }
        }
    }

    /// Nothing reaches anybody: whoever sends again does so over TCP, and need not wait for retries to run out.
    fn port_down(&mut self, io: &mut TransportIo<'_>) {
        tracing::warn!("the RDMA device's port is down");
        self.port_up = false;
        self.end_all(io, CloseReason::Broken(libc::ENETDOWN), "the port is down");
    }

    fn port_active(&mut self, io: &mut TransportIo<'_>) {
        if !std::mem::replace(&mut self.port_up, true) {
            tracing::info!("the RDMA device's port is active again");
            // What was learnt of peers was learnt without it.
            self.peers = Default::default();
            self.offer_check = Some(io.now);
        }
    }

    /// Looks whether the device is being removed.
    pub(crate) fn check_node(&mut self, io: &mut TransportIo<'_>) {
        let Some(device) = self.device() else { return self.node_check = None };
        self.node_check = Some(io.now.plus_ms(NODE_CHECK_MS));
        if !node(&device).exists() {
            drop(device);
            self.lose_device(io, "the RDMA device is being removed");
        }
    }

    /// When to look first.
    pub(crate) fn check_node_later(&mut self, now: Mono) {
        if self.node_check.is_none() && self.device().is_some() {
            self.node_check = Some(now.plus_ms(NODE_CHECK_MS));
        }
    }

    /// Without a device everything goes over TCP. Whatever is open of it is closed.
    fn lose_device(&mut self, io: &mut TransportIo<'_>, why: &str) {
        tracing::error!(why, "this core uses TCP from now on");
        self.end_all(io, CloseReason::Broken(libc::ENODEV), why);
        // The ring holds what it watches open.
        for (watched, data) in [(self.watching, CHANNEL), (self.watching_events, EVENTS)] {
            if watched {
                io.ring.cancel_net(data);
            }
        }
        self.switch_off();
    }

    fn end_all(&mut self, io: &mut TransportIo<'_>, reason: CloseReason, why: &str) {
        for slot in 0..self.entries.len() as u16 {
            match self.at(slot).map(|entry| entry.phase) {
                Some(Phase::Switched) => self.fail(io, slot, reason, why),
                Some(_) => self.give_up(io, slot, why),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_port_counts_and_unknown_events_do_nothing() {
        let of = |kind, port| DeviceEvent::of(kind, Some(port), 2);
        assert_eq!((of(10, 2), of(10, 1)), (DeviceEvent::PortDown, DeviceEvent::Other));
        assert_eq!((of(9, 2), of(9, 1)), (DeviceEvent::PortActive, DeviceEvent::Other));
        assert_eq!((of(8, 0), of(3, 2)), (DeviceEvent::Fatal, DeviceEvent::Other));
        assert_eq!(of(77, 2), DeviceEvent::Other);
    }
}
