//! Messages between the two ends of a link: what the immediate data and a message's head say.
//!
//! A message is one SEND with immediate data. It lands in one posted receive, which has two pieces: a head of
//! `HEAD_BYTES` and one block for a payload.
//!
//! | kind | head | behind it |
//! |---|---|---|
//! | `Frame` without payload | the frame's header | |
//! | `Frame` | header and checksums, padded to `HEAD_BYTES` | payload, at most `SMALL_PAYLOAD_BYTES` |
//! | `Large` | header and checksums, then the first part's `Descriptor`, `HEAD_BYTES` in all | |
//! | `Part` | the next part's `Descriptor` at the same place, `HEAD_BYTES` in all | |
//! | all others | | |
//!
//! Immediate data, from the highest bit on: kind 4 bits, credits 12, value 16. Every message gives credits back;
//! the value is the window's number in `Done` and zero otherwise. Integers in a descriptor are little-endian.

use wire::frame::META_BYTES_MAX;
use wire::{BLOCK_BYTES, HEADER_BYTES};

/// What a message's head takes: header, all checksums that a frame can have, and a descriptor.
pub const HEAD_BYTES: usize = 256;
/// Payloads of up to so many bytes travel inside the message: the block that most writes and reads are.
pub const SMALL_PAYLOAD_BYTES: usize = BLOCK_BYTES;
/// Larger payloads are fetched by the receiver, so many bytes with each RDMA READ: one object's data.
pub const PART_BYTES: usize = 128 * 1024;

const DESCRIPTOR_BYTES: usize = 18;
const DESCRIPTOR_AT: usize = HEADER_BYTES + META_BYTES_MAX;
const _: () = assert!(DESCRIPTOR_AT + DESCRIPTOR_BYTES <= HEAD_BYTES);

/// What a message is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A frame, all of it.
    Frame = 1,
    /// A frame whose payload is to be fetched.
    Large = 2,
    /// Another part of the last large frame's payload.
    Part = 3,
    /// A part has been fetched: its window may be closed.
    Done = 4,
    /// Nothing but credits.
    Credits = 5,
    /// From the side that connected: does this path carry messages?
    Probe = 6,
    /// It does.
    ProbeReply = 7,
}

impl Kind {
    fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits {
            1 => Self::Frame,
            2 => Self::Large,
            3 => Self::Part,
            4 => Self::Done,
            5 => Self::Credits,
            6 => Self::Probe,
            7 => Self::ProbeReply,
            _ => return None,
        })
    }
}

/// Most credits that one message can give back.
pub(crate) const CREDITS_MAX: u16 = (1 << 12) - 1;

/// A message's immediate data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Immediate {
    pub(crate) kind: Kind,
    /// Receives that the sender has posted again since it last said so.
    pub(crate) credits: u16,
    /// `Done`: the window.
    pub(crate) value: u16,
}

impl Immediate {
    pub(crate) fn encode(self) -> u32 {
        (self.kind as u32) << 28 | u32::from(self.credits.min(CREDITS_MAX)) << 16 | u32::from(self.value)
    }

    pub(crate) fn decode(bits: u32) -> Option<Self> {
        let kind = Kind::from_bits(bits >> 28)?;
        Some(Self { kind, credits: (bits >> 16) as u16 & CREDITS_MAX, value: bits as u16 })
    }
}

/// Memory of the sender that the receiver may read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Descriptor {
    /// Address in the sender's address space.
    pub(crate) addr: u64,
    /// The window's remote key.
    pub(crate) key: u32,
    /// Bytes.
    pub(crate) len: u32,
    /// The window's number, for `Done`.
    pub(crate) window: u16,
}

impl Descriptor {
    /// Writes it to its place in a head.
    pub(crate) fn encode_into(self, head: &mut [u8]) {
        let Some(at) = head.get_mut(DESCRIPTOR_AT..DESCRIPTOR_AT + DESCRIPTOR_BYTES) else { return };
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.key.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..].copy_from_slice(&self.window.to_le_bytes());
        at.copy_from_slice(&bytes);
    }

    /// Reads it from a head; `None` when the head is too short.
    pub(crate) fn decode(head: &[u8]) -> Option<Self> {
        let bytes = head.get(DESCRIPTOR_AT..)?;
        let (addr, bytes) = bytes.split_first_chunk()?;
        let (key, bytes) = bytes.split_first_chunk()?;
        let (len, bytes) = bytes.split_first_chunk()?;
        let (window, _) = bytes.split_first_chunk()?;
        Some(Self {
            addr: u64::from_le_bytes(*addr),
            key: u32::from_le_bytes(*key),
            len: u32::from_le_bytes(*len),
            window: u16::from_le_bytes(*window),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn immediate_data_means_the_same_at_both_ends(kind in 1u32..8, credits in 0..=CREDITS_MAX, value: u16) {
            let sent = Immediate { kind: Kind::from_bits(kind).unwrap(), credits, value };
            prop_assert_eq!(Immediate::decode(sent.encode()), Some(sent));
        }

        #[test]
        fn descriptors_come_back(addr: u64, key: u32, len: u32, window: u16) {
            let mut head = [0xee; HEAD_BYTES];
            let sent = Descriptor { addr, key, len, window };
            sent.encode_into(&mut head);
            prop_assert!(head[..DESCRIPTOR_AT].iter().all(|byte| *byte == 0xee));
            prop_assert_eq!(Descriptor::decode(&head), Some(sent));
        }
    }

    #[test]
    fn unknown_kinds_and_short_heads_are_refused() {
        assert_eq!(Immediate::decode(0), None);
        assert_eq!(Immediate::decode(8 << 28), None);
        assert_eq!(Descriptor::decode(&[0; DESCRIPTOR_AT + DESCRIPTOR_BYTES - 1]), None);
    }
}
