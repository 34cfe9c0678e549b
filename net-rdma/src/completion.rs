//! A core's completion queue and the channel that wakes the core.

use crate::{Device, RdmaError};
use rdma_sys as sys;
use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::rc::Rc;

/// Completions taken out of the queue at once.
const TAKEN_AT_ONCE: usize = 64;

/// A completion, in native form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// As given with the work request.
    pub(crate) id: u64,
    /// `Ok` with bytes received and immediate data, or the status of a queue pair that has broken.
    pub(crate) result: Result<(u32, u32), u32>,
}

/// A completion queue for all connections of a core.
pub(crate) struct CompletionQueue {
    queue: NonNull<sys::ibv_cq>,
    channel: NonNull<sys::ibv_comp_channel>,
    /// The channel will tell of the next completion.
    armed: Cell<bool>,
    _device: Rc<Device>,
}

impl CompletionQueue {
    pub(crate) fn new(device: &Rc<Device>, entries: u32) -> Result<Self, RdmaError> {
        let failed = |what| RdmaError::Make { what, error: io::Error::last_os_error() };
        let context = device.context().as_ptr();
        // SAFETY: an open context.
        let channel = NonNull::new(unsafe { sys::ibv_create_comp_channel(context) })
            .ok_or_else(|| failed("completion channel"))?;
        // SAFETY: the channel's descriptor is open; asking it is to be left at once when it has nothing.
        unsafe {
            let fd = channel.as_ref().fd;
            libc::fcntl(fd, libc::F_SETFL, libc::fcntl(fd, libc::F_GETFL) | libc::O_NONBLOCK);
        }
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        // SAFETY: an open context and channel; no context pointer is passed.
        let queue =
            unsafe { sys::ibv_create_cq(context, entries, std::ptr::null_mut(), channel.as_ptr(), 0) };
        let Some(queue) = NonNull::new(queue) else {
            let error = failed("completion queue");
            // SAFETY: ours, and nothing uses it.
            unsafe { sys::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        Ok(Self { queue, channel, armed: Cell::new(false), _device: device.clone() })
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::ibv_cq {
        self.queue.as_ptr()
    }

    /// The channel's descriptor: readable when the queue has something and was armed.
    pub(crate) fn fd(&self) -> RawFd {
        // SAFETY: an open channel.
        unsafe { self.channel.as_ref().fd }
    }

    /// Takes up to `TAKEN_AT_ONCE` completions. False when there were none. No system call.
    pub(crate) fn take(&self, into: &mut Vec<Done>) -> bool {
        let mut taken = [const { MaybeUninit::<sys::ibv_wc>::uninit() }; TAKEN_AT_ONCE];
        // SAFETY: the array has room for so many; the library writes the first `count` of them.
        let count =
            unsafe { sys::ibv_poll_cq(self.queue.as_ptr(), TAKEN_AT_ONCE as i32, taken.as_mut_ptr().cast()) };
        let count = usize::try_from(count).unwrap_or(0);
        into.extend(taken.iter().take(count).map(|wc| {
            // SAFETY: `count` entries were written.
            let wc = unsafe { wc.assume_init_ref() };
            // SAFETY: immediate data and an invalidated key have the same form.
            let imm = u32::from_be(unsafe { wc.imm_data_invalidated_rkey_union.imm_data });
            let good = wc.status == sys::ibv_wc_status::IBV_WC_SUCCESS;
            Done { id: wc.wr_id, result: if good { Ok((wc.byte_len, imm)) } else { Err(wc.status) } }
        }));
        count > 0
    }

    /// Has the channel tell of the next completion, unless it has been told already.
    pub(crate) fn arm(&self) {
        if !self.armed.replace(true) {
            // SAFETY: an open queue. A failure would mean one that does not exist.
            unsafe { sys::ibv_req_notify_cq(self.queue.as_ptr(), 0) };
        }
    }

    /// The channel is readable: takes what it says, so that it can be armed again.
    pub(crate) fn woken(&self) {
        self.armed.set(false);
        let mut queue = std::ptr::null_mut();
        let mut context = std::ptr::null_mut();
        // SAFETY: both pointers are valid to write to. The channel does not block.
        if unsafe { sys::ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context) } == 0 {
            // SAFETY: the event belongs to our only queue.
            unsafe { sys::ibv_ack_cq_events(self.queue.as_ptr(), 1) };
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: ours, and every queue pair that used them holds the queue, so none is left.
        unsafe {
            sys::ibv_destroy_cq(self.queue.as_ptr());
            sys::ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}

/// A status in words.
pub(crate) fn status_text(status: u32) -> String {
    // SAFETY: the library returns a static string for every number.
    let text = unsafe { std::ffi::CStr::from_ptr(sys::ibv_wc_status_str(status)) };
    text.to_string_lossy().into_owned()
}
