//! A reliable connection's queue pair, with its memory windows.
//!
//! One doorbell for each batch: the work requests of a batch are chained and handed over together, and only the
//! last one of them brings a completion. Messages without a payload go inline where they fit.

use crate::completion::CompletionQueue;
use crate::device::Region;
use crate::link::{Batch, HEAD_BYTES, RECEIVES, SENDS, Span, Staging, WINDOWS, Work};
use crate::offer::Offer;
use crate::{Device, RdmaError};
use rdma_sys as sys;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;

/// How long the device waits for an acknowledgement, as verbs count it: 4.096 us times two to this power, 67 ms.
const ACK_TIMEOUT: u8 = 14;
/// How often it tries again: with the time above a dead path breaks the connection after about half a second.
const ACK_RETRIES: u8 = 6;
/// With credits the receiver is never not ready: one retry is for nothing but the peer's own delay.
const NOT_READY_RETRIES: u8 = 1;
/// 0.64 ms, as verbs count it: what a receiver that is not ready asks us to wait.
const NOT_READY_TIMER: u8 = 12;
/// Hops a packet may take, for routed RoCE v2.
const HOP_LIMIT: u8 = 64;
/// Pieces of a message: head and payload.
const PIECES: usize = 2;

/// What all queue pairs of a core share.
pub(crate) struct Shared {
    // Dropped in this order.
    pub(crate) staging: Staging,
    pub(crate) completions: CompletionQueue,
    pub(crate) region: Region,
    pub(crate) device: Rc<Device>,
    /// Connections that the completion queue and the arena have room for.
    pub(crate) connections_max: usize,
}

/// What a work request's number says beside the request: whose it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Owner {
    /// Slot of the connection.
    pub(crate) slot: u16,
    /// Which of the connections that have had this slot.
    pub(crate) generation: u16,
}

/// What has completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Request {
    /// The receive in this slot.
    Receive(u16),
    /// The work request whose number ends in this.
    Work(u32),
}

const RECEIVE_BIT: u64 = 1 << 31;

fn id(owner: Owner, request: Request) -> u64 {
    let low = match request {
        Request::Receive(slot) => RECEIVE_BIT | u64::from(slot),
        Request::Work(seq) => u64::from(seq) & (RECEIVE_BIT - 1),
    };
    u64::from(owner.slot) << 48 | u64::from(owner.generation) << 32 | low
}

/// The inverse of what work requests are numbered by.
pub(crate) fn meaning(id: u64) -> (Owner, Request) {
    let owner = Owner { slot: (id >> 48) as u16, generation: (id >> 32) as u16 };
    let low = id as u32;
    let request = if id & RECEIVE_BIT != 0 { Request::Receive(low as u16) } else { Request::Work(low) };
    (owner, request)
}

/// A reliable connection.
pub(crate) struct QueuePair {
    queue: NonNull<sys::ibv_qp>,
    windows: Vec<NonNull<sys::ibv_mw>>,
    owner: Owner,
    inline_max: u32,
    psn: u32,
    sends: Vec<sys::ibv_send_wr>,
    receives: Vec<sys::ibv_recv_wr>,
    pieces: Vec<[sys::ibv_sge; PIECES]>,
    shared: Rc<Shared>,
}

fn failed(what: &'static str) -> RdmaError {
    RdmaError::Make { what, error: io::Error::last_os_error() }
}

impl QueuePair {
    /// A queue pair that takes receives and sends nothing yet. `psn` numbers its first packet: best one that no
    /// earlier queue pair has used lately.
    pub(crate) fn new(shared: &Rc<Shared>, owner: Owner, psn: u32) -> Result<Self, RdmaError> {
        // SAFETY: the structure is plain data, for which zero bytes are a valid value.
        let mut attr: sys::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attr.send_cq = shared.completions.as_ptr();
        attr.recv_cq = shared.completions.as_ptr();
        attr.qp_type = sys::ibv_qp_type::IBV_QPT_RC;
        attr.cap.max_send_wr = SENDS.into();
        attr.cap.max_recv_wr = RECEIVES.into();
        attr.cap.max_send_sge = PIECES as u32;
        attr.cap.max_recv_sge = PIECES as u32;
        attr.cap.max_inline_data = HEAD_BYTES as u32;
        let domain = shared.device.domain().as_ptr();
        // SAFETY: a live domain, live queues, and attributes to read and write back.
        let made = NonNull::new(unsafe { sys::ibv_create_qp(domain, &raw mut attr) }).or_else(|| {
            // A device that cannot take as much inline takes none.
            attr.cap.max_inline_data = 0;
            // SAFETY: as above.
            NonNull::new(unsafe { sys::ibv_create_qp(domain, &raw mut attr) })
        });
        let queue = made.ok_or_else(|| failed("queue pair"))?;
        let mut pair = Self {
            queue,
            windows: Vec::with_capacity(WINDOWS.into()),
            owner,
            inline_max: attr.cap.max_inline_data,
            psn: psn & 0x00ff_ffff,
            sends: Vec::with_capacity(SENDS.into()),
            receives: Vec::with_capacity(RECEIVES.into()),
            pieces: Vec::with_capacity(SENDS.max(RECEIVES).into()),
            shared: shared.clone(),
        };
        for _ in 0..WINDOWS {
            // SAFETY: a live domain.
            let window = unsafe { sys::ibv_alloc_mw(domain, sys::ibv_mw_type::IBV_MW_TYPE_2) };
            pair.windows.push(window.and_then(NonNull::new).ok_or_else(|| failed("memory window"))?);
        }
        pair.initialize()?;
        Ok(pair)
    }

    /// The first keys of its windows.
    pub(crate) fn window_keys(&self) -> Vec<u32> {
        // SAFETY: live windows.
        self.windows.iter().map(|window| unsafe { window.as_ref().rkey }).collect()
    }

    /// What the peer has to know of it.
    pub(crate) fn offer(&self) -> Offer {
        let limits = self.shared.device.limits();
        // SAFETY: a live queue pair.
        let qpn = unsafe { self.queue.as_ref().qp_num };
        let gid = self.shared.device.gid().1;
        Offer { mtu: limits.mtu, reads: limits.reads, receives: RECEIVES, qpn, psn: self.psn, gid }
    }

    fn modify(&mut self, attr: &mut sys::ibv_qp_attr, mask: &[Mask]) -> Result<(), RdmaError> {
        let mask = mask.iter().fold(0, |all, one| all | one.0 as i32);
        // SAFETY: a live queue pair and attributes to read.
        let done = unsafe { sys::ibv_modify_qp(self.queue.as_ptr(), attr, mask) };
        let error = io::Error::from_raw_os_error(done);
        if done == 0 { Ok(()) } else { Err(RdmaError::Make { what: "queue pair's state", error }) }
    }

    fn initialize(&mut self) -> Result<(), RdmaError> {
        // SAFETY: the structure is plain data, for which zero bytes are a valid value.
        let mut attr: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_INIT;
        attr.port_num = self.shared.device.port();
        // The peer may read, and only through windows; nobody writes here.
        attr.qp_access_flags = sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
        let mask =
            [Mask::IBV_QP_STATE, Mask::IBV_QP_PKEY_INDEX, Mask::IBV_QP_PORT, Mask::IBV_QP_ACCESS_FLAGS];
        self.modify(&mut attr, &mask)
    }

    /// Connects it to the peer's. Receives should have been posted before.
    pub(crate) fn connect(&mut self, peer: &Offer) -> Result<(), RdmaError> {
        let limits = self.shared.device.limits();
        // SAFETY: the structure is plain data, for which zero bytes are a valid value.
        let mut attr: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_RTR;
        attr.path_mtu = peer.mtu.min(limits.mtu).into();
        attr.dest_qp_num = peer.qpn;
        attr.rq_psn = peer.psn;
        attr.max_dest_rd_atomic = limits.reads;
        attr.min_rnr_timer = NOT_READY_TIMER;
        attr.ah_attr.is_global = 1;
        attr.ah_attr.port_num = self.shared.device.port();
        attr.ah_attr.grh.dgid = sys::ibv_gid { raw: peer.gid.0 };
        attr.ah_attr.grh.sgid_index = self.shared.device.gid().0 as u8;
        attr.ah_attr.grh.hop_limit = HOP_LIMIT;
        let mask = [
            Mask::IBV_QP_STATE,
            Mask::IBV_QP_AV,
            Mask::IBV_QP_PATH_MTU,
            Mask::IBV_QP_DEST_QPN,
            Mask::IBV_QP_RQ_PSN,
            Mask::IBV_QP_MAX_DEST_RD_ATOMIC,
            Mask::IBV_QP_MIN_RNR_TIMER,
        ];
        self.modify(&mut attr, &mask)?;
        // SAFETY: as above.
        let mut attr: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_RTS;
        attr.sq_psn = self.psn;
        attr.timeout = ACK_TIMEOUT;
        attr.retry_cnt = ACK_RETRIES;
        attr.rnr_retry = NOT_READY_RETRIES;
        attr.max_rd_atomic = limits.reads.min(peer.reads);
        let mask = [
            Mask::IBV_QP_STATE,
            Mask::IBV_QP_SQ_PSN,
            Mask::IBV_QP_TIMEOUT,
            Mask::IBV_QP_RETRY_CNT,
            Mask::IBV_QP_RNR_RETRY,
            Mask::IBV_QP_MAX_QP_RD_ATOMIC,
        ];
        self.modify(&mut attr, &mask)
    }

    /// Hands a batch to the device: one doorbell for its receives, one for its work. What the spans point to stays
    /// alive and untouched until the completions are back: the link that made the batch sees to it.
    pub(crate) fn post(&mut self, batch: &Batch) -> Result<(), RdmaError> {
        self.post_receives(batch)?;
        self.post_work(batch)
    }

    fn piece(&self, span: Span) -> sys::ibv_sge {
        sys::ibv_sge { addr: span.addr, length: span.len, lkey: self.shared.region.local_key() }
    }

    fn post_receives(&mut self, batch: &Batch) -> Result<(), RdmaError> {
        if batch.receives.is_empty() {
            return Ok(());
        }
        self.pieces.clear();
        self.receives.clear();
        for receive in &batch.receives {
            let pieces = [self.piece(receive.head), self.piece(receive.payload)];
            self.pieces.push(pieces);
            self.receives.push(sys::ibv_recv_wr {
                wr_id: id(self.owner, Request::Receive(receive.slot)),
                next: std::ptr::null_mut(),
                sg_list: std::ptr::null_mut(),
                num_sge: PIECES as i32,
            });
        }
        // Both vectors are complete: what points into them is set only now.
        let mut next = std::ptr::null_mut();
        for (work, pieces) in self.receives.iter_mut().zip(&mut self.pieces).rev() {
            work.sg_list = pieces.as_mut_ptr();
            work.next = next;
            next = work;
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: a live queue pair and a chain that lives until the call returns; the memory that it names lies
        // in the registered region and is kept by the link.
        let done = unsafe { sys::ibv_post_recv(self.queue.as_ptr(), next, &raw mut bad) };
        posted("receive", done)
    }

    fn post_work(&mut self, batch: &Batch) -> Result<(), RdmaError> {
        if batch.work.is_empty() {
            return Ok(());
        }
        self.pieces.clear();
        self.sends.clear();
        for (at, work) in batch.work.iter().enumerate() {
            let seq = (batch.first_seq + at as u64) as u32;
            let (request, pieces) = self.request(*work);
            self.pieces.push(pieces);
            self.sends.push(sys::ibv_send_wr { wr_id: id(self.owner, Request::Work(seq)), ..request });
        }
        if let Some(last) = self.sends.last_mut() {
            last.send_flags |= sys::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        let mut next = std::ptr::null_mut();
        for (work, pieces) in self.sends.iter_mut().zip(&mut self.pieces).rev() {
            work.sg_list = pieces.as_mut_ptr();
            work.next = next;
            next = work;
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: as for receives.
        let done = unsafe { sys::ibv_post_send(self.queue.as_ptr(), next, &raw mut bad) };
        self.note_keys(batch);
        posted("work request", done)
    }

    /// A window's structure holds its present key, by which the next work request names the window to be bound anew.
    fn note_keys(&mut self, batch: &Batch) {
        for work in &batch.work {
            if let Work::Bind { window, key, .. } = work
                && let Some(window) = self.windows.get_mut(usize::from(*window))
            {
                // SAFETY: a live window of ours; no work request binds a window twice in one batch.
                unsafe { window.as_mut().rkey = *key };
            }
        }
    }

    /// A work request without its number, and its pieces.
    fn request(&self, work: Work) -> (sys::ibv_send_wr, [sys::ibv_sge; PIECES]) {
        // SAFETY: both are plain data, for which zero bytes are a valid value.
        let (mut request, mut pieces): (sys::ibv_send_wr, [sys::ibv_sge; PIECES]) =
            unsafe { std::mem::zeroed() };
        match work {
            Work::Message { imm, head, payload } => {
                request.opcode = sys::ibv_wr_opcode::IBV_WR_SEND_WITH_IMM;
                request.imm_data_invalidated_rkey_union.imm_data = imm.to_be();
                let mut bytes = 0;
                for span in [head, payload].into_iter().flatten() {
                    if let Some(piece) = pieces.get_mut(request.num_sge as usize) {
                        *piece = self.piece(span);
                    }
                    request.num_sge += 1;
                    bytes += span.len;
                }
                if bytes <= self.inline_max && payload.is_none() {
                    request.send_flags = sys::ibv_send_flags::IBV_SEND_INLINE.0;
                }
            }
            Work::Bind { window, key, span } => {
                request.opcode = sys::ibv_wr_opcode::IBV_WR_BIND_MW;
                let window = self.windows.get(usize::from(window));
                request.bind_mw_tso_union.bind_mw = sys::bind_mw_t {
                    mw: window.map_or(std::ptr::null_mut(), |window| window.as_ptr()),
                    rkey: key,
                    bind_info: sys::ibv_mw_bind_info {
                        mr: self.shared.region.as_ptr(),
                        addr: span.addr,
                        length: span.len.into(),
                        mw_access_flags: sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0,
                    },
                };
            }
            Work::Invalidate { key } => {
                request.opcode = sys::ibv_wr_opcode::IBV_WR_LOCAL_INV;
                request.imm_data_invalidated_rkey_union.invalidated_rkey = key;
            }
            Work::Read { into, from } => {
                request.opcode = sys::ibv_wr_opcode::IBV_WR_RDMA_READ;
                request.wr.rdma = sys::rdma_t { remote_addr: from.addr, rkey: from.key };
                pieces[0] = self.piece(into);
                request.num_sge = 1;
            }
        }
        (request, pieces)
    }
}

fn posted(what: &'static str, errno: i32) -> Result<(), RdmaError> {
    if errno == 0 {
        Ok(())
    } else {
        Err(RdmaError::Make { what, error: io::Error::from_raw_os_error(errno.abs()) })
    }
}

type Mask = sys::ibv_qp_attr_mask;

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the structure is plain data, for which zero bytes are a valid value.
        let mut attr: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_ERR;
        // Nothing begins any more.
        let _ = self.modify(&mut attr, &[Mask::IBV_QP_STATE]);
        // SAFETY: all ours. Windows go first: an open one holds its queue pair, and soft RoCE waits for it. When the
        // last call returns, the device reads and writes no memory of this connection any more.
        unsafe {
            for window in &self.windows {
                sys::ibv_dealloc_mw(window.as_ptr());
            }
            sys::ibv_destroy_qp(self.queue.as_ptr());
        }
    }
}
