//! Frames whose payload is encoded entries: one checksum covers the whole payload, and there is none without one.

use crate::core::DataCore;
use reactor::{ConnId, Env, Frame, IoBuf};
use wire::{BlockCrcs, Header, Status, block_crc};

/// A frame with `bytes` behind its header; `None` when there is no memory for them.
pub(crate) fn attach(mut header: Header, bytes: &[u8]) -> Option<Frame> {
    let (mut crcs, mut payload) = (BlockCrcs::default(), None);
    if !bytes.is_empty() {
        payload = Some(IoBuf::copy_of(bytes).ok()?);
        crcs = BlockCrcs::one(block_crc(bytes));
    }
    header.payload_len = bytes.len() as u32;
    Some(Frame { header, crcs, payload })
}

/// What `attach` put behind the header, empty when that was nothing; `None` when it is damaged.
pub(crate) fn bytes_of(frame: &Frame) -> Option<&[u8]> {
    let bytes = frame.payload.as_ref().map_or(&[][..], |payload| payload.as_slice());
    (bytes.is_empty() || frame.crcs.as_slice() == [block_crc(bytes)]).then_some(bytes)
}

impl DataCore {
    /// Sends a reply with `bytes`, or says `Busy` when there is no memory for them.
    pub(crate) fn answer_entries(&mut self, env: &mut dyn Env, conn: ConnId, reply: Header, bytes: &[u8]) {
        let busy = Header { status: Status::Busy, ..reply };
        let without = Frame { header: busy, crcs: BlockCrcs::default(), payload: None };
        self.send(env, conn, attach(reply, bytes).unwrap_or(without));
    }
}
