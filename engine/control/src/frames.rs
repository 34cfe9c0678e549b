//! Control messages as frames, and back.

use reactor::{Frame, IoBuf};
use wire::control::{ControlMsg, Hello, MetaReply};
use wire::frame::CONTROL_PAYLOAD_BYTES_MAX;
use wire::{BlockCrcs, FrameKind, Header, block_crc};

/// Why a frame is not what it should be. The connection that brought it is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadFrame {
    /// The payload does not match its checksum.
    #[error("payload checksum mismatch")]
    Checksum,
    /// The payload is no such message.
    #[error("malformed message")]
    Malformed,
    /// A kind that has no place on a control connection.
    #[error("unexpected frame kind")]
    Kind,
}

/// A frame around encoded bytes; `None` when they are too long or memory is short.
fn frame(kind: FrameKind, bytes: &[u8]) -> Option<Frame> {
    if bytes.is_empty() || bytes.len() > CONTROL_PAYLOAD_BYTES_MAX {
        return None;
    }
    let header = Header { payload_len: bytes.len() as u32, ..Header::new(kind, 0) };
    let payload = IoBuf::copy_of(bytes).ok()?;
    Some(Frame { header, crcs: BlockCrcs::one(block_crc(bytes)), payload: Some(payload) })
}

/// A control message as a frame. A `Range` answer that does not fit is cut, and says that there is more.
pub fn control(msg: &ControlMsg) -> Option<Frame> {
    if let Some(frame) = frame(FrameKind::Control, &msg.encode()) {
        return Some(frame);
    }
    let ControlMsg::MetaReply { ticket, reply: MetaReply::Range { revision, items, .. } } = msg else {
        return None;
    };
    let half = items.get(..items.len() / 2).filter(|half| !half.is_empty())?;
    let reply = MetaReply::Range { revision: *revision, items: half.to_vec(), more: true };
    control(&ControlMsg::MetaReply { ticket: *ticket, reply })
}

/// A hello as a frame.
pub fn hello(msg: &Hello) -> Option<Frame> {
    frame(FrameKind::Hello, &msg.encode())
}

/// A received frame.
#[derive(Debug)]
pub enum Received {
    /// The first one.
    Hello(Hello),
    /// Any later one.
    Control(ControlMsg),
    /// Wants a `Pong`.
    Ping(Header),
    /// Nothing to do.
    Pong,
}

/// Checks and decodes a frame.
pub fn decode(frame: &Frame) -> Result<Received, BadFrame> {
    let bytes = frame.payload.as_ref().map_or(&[][..], IoBuf::as_slice);
    let checked = || match frame.crcs.as_slice() {
        [crc] if *crc == block_crc(bytes) => Ok(bytes),
        _ => Err(BadFrame::Checksum),
    };
    match frame.header.kind {
        FrameKind::Hello => Ok(Received::Hello(Hello::decode(checked()?).map_err(|_| BadFrame::Malformed)?)),
        FrameKind::Control => {
            Ok(Received::Control(ControlMsg::decode(checked()?).map_err(|_| BadFrame::Malformed)?))
        }
        FrameKind::Ping => Ok(Received::Ping(frame.header)),
        FrameKind::Pong => Ok(Received::Pong),
        _ => Err(BadFrame::Kind),
    }
}

/// The answer to a ping.
pub fn pong(ping: &Header) -> Frame {
    let header = ping.reply(FrameKind::Pong, wire::Status::Ok);
    Frame { header, crcs: BlockCrcs::default(), payload: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::Revision;
    use wire::control::KeyValue;

    #[test]
    fn an_oversized_range_is_cut_and_says_so() {
        let item = |n: usize| KeyValue {
            key: format!("/k/{n:04}"),
            value: "1".repeat(1000),
            mod_revision: Revision(1),
            lease: None,
        };
        let reply =
            MetaReply::Range { revision: Revision(9), items: (0..3000).map(item).collect(), more: false };
        let frame = control(&ControlMsg::MetaReply { ticket: 4, reply }).unwrap();
        let Ok(Received::Control(ControlMsg::MetaReply { ticket: 4, reply })) = decode(&frame) else {
            panic!("no reply");
        };
        let MetaReply::Range { items, more, .. } = reply else { panic!("no range") };
        assert!(more && (500..3000).contains(&items.len()), "{}", items.len());
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let mut frame = control(&ControlMsg::Subscribe { prefixes: vec!["/".into()] }).unwrap();
        assert!(decode(&frame).is_ok());
        frame.payload.as_mut().unwrap().as_mut_slice().unwrap()[3] ^= 1;
        assert_eq!(decode(&frame).unwrap_err(), BadFrame::Checksum);
    }
}
