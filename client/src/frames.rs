//! Building and checking the frames that are not data: greetings and control messages.

use reactor::{Frame, IoBuf};
use wire::control::{ControlMsg, Hello, Role};
use wire::frame::CONTROL_PAYLOAD_BYTES_MAX;
use wire::{BlockCrcs, ClusterId, FrameKind, Header, SessionId, block_crc};

/// Who this client is, on every connection it makes.
#[derive(Default)]
pub(crate) struct Identity {
    pub session: SessionId,
    /// Learned from the first node that answers.
    pub cluster: Option<ClusterId>,
    /// Connections made so far. One count for all peers, so that it rises for each of them.
    incarnation: u64,
}

impl Identity {
    /// The greeting of a new connection. A receiver refuses what still arrives on older ones.
    pub(crate) fn hello(&mut self) -> Option<Frame> {
        self.incarnation += 1;
        let hello = Hello {
            cluster: self.cluster,
            role: Role::Client,
            session: self.session,
            incarnation: self.incarnation,
            refused: 0,
        };
        message(FrameKind::Hello, &hello.encode())
    }
}

fn message(kind: FrameKind, bytes: &[u8]) -> Option<Frame> {
    if bytes.len() > CONTROL_PAYLOAD_BYTES_MAX {
        return None;
    }
    let mut header = Header::new(kind, 0);
    header.payload_len = bytes.len() as u32;
    let payload = IoBuf::copy_of(bytes).ok()?;
    Some(Frame { header, crcs: BlockCrcs::one(block_crc(bytes)), payload: Some(payload) })
}

/// A control message as a frame; `None` when it is larger than a control frame may be.
pub(crate) fn control(msg: &ControlMsg) -> Option<Frame> {
    message(FrameKind::Control, &msg.encode())
}

/// A frame without payload.
pub(crate) fn bare(kind: FrameKind, request: u64) -> Frame {
    Frame { header: Header::new(kind, request), crcs: BlockCrcs::default(), payload: None }
}

/// The payload of a greeting or control message, when it is what its checksum says.
pub(crate) fn checked(frame: &Frame) -> Option<&[u8]> {
    let bytes = frame.payload.as_ref()?.as_slice();
    (frame.crcs.as_slice() == [block_crc(bytes)]).then_some(bytes)
}

/// The checked and decoded greeting.
pub(crate) fn decode_hello(frame: &Frame) -> Option<Hello> {
    Hello::decode(checked(frame)?).ok()
}
