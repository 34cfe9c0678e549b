//! Everything that a link takes from a peer, for the fuzzer: one end over a device that does what it is asked.
//!
//! The input is a row of steps, one byte each with what it needs behind it: messages with any immediate data, length and
//! head in the next posted receive, completions, frames of our own, and deliveries.

use crate::link::{
    Batch, HEAD_BYTES, Link, Memory, PART_BYTES, RECEIVES, Receive, SENDS, Span, Staging, Work,
};
use reactor::{Arena, Frame, IoBuf};
use std::collections::VecDeque;
use wire::{BlockCrcs, FrameKind, Header};

const ARENA_BYTES: usize = 8 << 20;
const WINDOW_KEYS: [u32; 4] = [0x100, 0x2ff, 0x300, 0x400];

/// A link with the device's two queues.
struct End {
    arena: Arena,
    staging: Staging,
    link: Link,
    batch: Batch,
    receives: VecDeque<Receive>,
    sends: VecDeque<(u32, Work)>,
}

/// Takes bytes off an input; zeroes when it is at its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N.min(self.0.len()));
        self.0 = rest;
        let mut bytes = [0; N];
        bytes[..head.len()].copy_from_slice(head);
        bytes
    }

    fn some(&mut self, len: usize) -> &[u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }
}

impl End {
    fn new() -> Option<Self> {
        let arena = Arena::new(ARENA_BYTES).ok()?;
        let staging = Staging::new(&arena).ok()?;
        let mut link = Link::new(&arena, &WINDOW_KEYS).ok()?;
        link.grant(RECEIVES);
        let (receives, sends) = (VecDeque::new(), VecDeque::new());
        Some(Self { arena, staging, link, batch: Batch::default(), receives, sends })
    }

    fn is_ours(&self, span: Span) -> bool {
        let (base, len) = self.arena.region();
        let base = base as u64;
        span.addr >= base && span.addr + u64::from(span.len) <= base + len as u64
    }

    fn fill(&mut self) {
        let memory = Memory { arena: &self.arena, staging: &self.staging };
        self.link.fill(memory, &mut self.batch);
        self.receives.extend(self.batch.receives.drain(..));
        let first = self.batch.first_seq;
        for (at, work) in self.batch.work.drain(..).enumerate() {
            self.sends.push_back(((first + at as u64) as u32 & (u32::MAX >> 1), work));
        }
        assert!(self.sends.len() <= usize::from(SENDS), "the send queue overflows");
        assert!(self.receives.len() <= usize::from(RECEIVES), "more receives than there are");
        for (_, work) in &self.sends {
            let spans = match *work {
                Work::Message { head, payload, .. } => [head, payload],
                Work::Bind { span, .. } => [Some(span), None],
                Work::Read { into, from } => {
                    assert!(
                        into.len == from.len && into.len as usize <= PART_BYTES,
                        "a fetch of another length"
                    );
                    [Some(into), None]
                }
                Work::Invalidate { .. } => [None, None],
            };
            assert!(spans.into_iter().flatten().all(|span| self.is_ours(span)), "memory of others");
        }
    }

    /// A message lands. False when it was refused, or there is nothing for it to land in.
    fn message(&mut self, imm: u32, bytes: u32, head: &[u8]) -> bool {
        let Some(receive) = self.receives.pop_front() else { return false };
        let head = &head[..head.len().min(HEAD_BYTES)];
        // SAFETY: the receive's head is `HEAD_BYTES` of the link's own memory, at which nobody looks before `received`.
        unsafe { std::ptr::copy_nonoverlapping(head.as_ptr(), receive.head.addr as *mut u8, head.len()) }
        // The device brings no more than there is room for.
        let bytes = bytes.min(receive.head.len + receive.payload.len);
        self.link.received(receive.slot, bytes, imm).is_ok()
    }

    fn push(&mut self, len: usize) {
        let (mut header, payload) = (Header::new(FrameKind::Write, 1), IoBuf::heap(len));
        let Ok(payload) = payload else { return };
        header.payload_len = len as u32;
        let crcs = BlockCrcs::of(payload.as_slice());
        let _ = self.link.push(Frame { header, crcs, payload: Some(payload).filter(|_| len > 0) });
    }
}

/// Runs one input. Panics when an invariant of the link breaks.
pub fn link(input: &[u8]) {
    let Some(mut end) = End::new() else { return };
    let mut input = Input(input);
    end.fill();
    while !input.0.is_empty() {
        let [step] = input.take();
        match step & 7 {
            // A message; mostly one whose immediate data can be meant, with a head as long as it says.
            0..=3 => {
                let imm = u32::from_le_bytes(input.take());
                let len = u16::from_le_bytes(input.take());
                let imm =
                    if step & 0x80 == 0 { imm & 0x0fff_ffff | u32::from(step >> 4 & 7) << 28 } else { imm };
                let head = input.some(usize::from(len).min(HEAD_BYTES)).to_vec();
                if !end.message(imm, u32::from(len), &head) {
                    return;
                }
            }
            4 => {
                for _ in 0..=(step >> 3) {
                    let Some((seq, _)) = end.sends.pop_front() else { break };
                    end.link.completed(seq);
                }
            }
            5 => end.push(usize::from(step >> 3) * 4096),
            6 => end.link.deliver(|frame| {
                let len = frame.payload.as_ref().map_or(0, IoBuf::len);
                assert_eq!(
                    len, frame.header.payload_len as usize,
                    "a frame with another payload than it says"
                );
            }),
            _ => end.fill(),
        }
    }
}

/// A frame of the negotiation as it comes over TCP: header, checksums, and what is behind them.
pub fn negotiation(input: &[u8]) {
    let Ok(lengths) = Header::peek(input) else { return };
    let Ok((header, crcs)) = Header::decode(input) else { return };
    let payload = input.get(wire::HEADER_BYTES + lengths.meta..).unwrap_or(&[]);
    let _ = (header.blocks, header.request);
    offer(payload, &crcs);
}

fn offer(payload: &[u8], crcs: &BlockCrcs) {
    if let Ok(offer) = crate::Offer::decode(payload, crcs) {
        let again = offer.encode();
        let decoded = crate::Offer::decode(&again, &BlockCrcs::one(wire::block_crc(&again)));
        assert_eq!(decoded, Ok(offer), "decoding is not stable");
    }
}

/// The same for an offer alone, with the checksum that belongs to it: a peer can compute one.
pub fn offer_bytes(input: &[u8]) {
    offer(input, &BlockCrcs::one(wire::block_crc(input)));
}
