//! The receiving half: posted receives, payloads to be fetched, and the order of frames.

use super::message::{Descriptor, HEAD_BYTES, Immediate, Kind, PART_BYTES, SMALL_PAYLOAD_BYTES};
use super::outgoing::{Outgoing, span};
use super::{Buffers, LinkError, Memory, RECEIVES, Receive, Signal, Span, Work};
use reactor::{Arena, Frame, IoBuf, NoBuffers};
use std::collections::VecDeque;
use wire::{BLOCK_BYTES, BlockCrcs, HEADER_BYTES, Header};

/// A part that is being fetched.
pub(super) struct Fetch {
    part: Part,
    /// Where it lands, when that is not its place in the payload.
    staging: Option<IoBuf>,
}

/// A part of a payload that lies in the peer's memory.
#[derive(Clone, Copy)]
struct Part {
    /// The frame it belongs to.
    arrival: u64,
    /// Where in the payload it goes.
    offset: usize,
    from: Descriptor,
    /// The receive that announced it, posted again when it is here.
    slot: u16,
}

/// A frame that has arrived, perhaps without (all of) its payload.
struct Arrival {
    header: Header,
    crcs: BlockCrcs,
    payload: Option<IoBuf>,
    /// Bytes announced so far.
    announced: usize,
    /// Bytes still to come.
    missing: usize,
}

pub(super) struct Incoming {
    heads: IoBuf,
    /// Per receive, its block of the arena: taken away with a payload, renewed before it is posted again.
    blocks: Vec<Option<IoBuf>>,
    /// Receives to be posted again.
    unposted: Vec<u16>,
    /// All receives have been posted once: those count as known to the peer.
    opened: bool,
    /// Frames not delivered yet; the first one's number is `first`.
    arrivals: VecDeque<Arrival>,
    first: u64,
    /// Announced and not begun.
    parts: VecDeque<Part>,
}

impl Incoming {
    pub(super) fn new(arena: &Arena) -> Result<Self, NoBuffers> {
        let receives = usize::from(RECEIVES);
        Ok(Self {
            heads: arena.alloc(receives * HEAD_BYTES)?,
            blocks: (0..receives).map(|_| arena.alloc(BLOCK_BYTES).map(Some)).collect::<Result<_, _>>()?,
            unposted: (0..RECEIVES).rev().collect(),
            opened: false,
            arrivals: VecDeque::with_capacity(receives),
            first: 0,
            parts: VecDeque::with_capacity(receives),
        })
    }

    /// Posts what can be posted; each again means a credit for the peer.
    pub(super) fn post_receives(
        &mut self,
        arena: &Arena,
        outgoing: &mut Outgoing,
        receives: &mut Vec<Receive>,
    ) -> Buffers {
        while self.arrivals.len() < usize::from(RECEIVES)
            && let Some(slot) = self.unposted.pop()
        {
            let Some(block) = self.blocks.get_mut(usize::from(slot)) else { continue };
            let block = match block {
                Some(block) => block,
                None => match arena.alloc(BLOCK_BYTES) {
                    Ok(fresh) => block.insert(fresh),
                    Err(NoBuffers) => {
                        self.unposted.push(slot);
                        return Buffers::Short;
                    }
                },
            };
            let at = self.heads.as_ptr() as u64 + u64::from(slot) * HEAD_BYTES as u64;
            let head = Span { addr: at, len: HEAD_BYTES as u32 };
            receives.push(Receive { slot, head, payload: span(block) });
            if self.opened {
                outgoing.owe();
            }
        }
        self.opened = true;
        Buffers::Enough
    }

    pub(super) fn received(
        &mut self,
        outgoing: &mut Outgoing,
        slot: u16,
        bytes: u32,
        imm: u32,
    ) -> Result<Option<Signal>, LinkError> {
        let message = Immediate::decode(imm).ok_or(LinkError::Immediate(imm))?;
        outgoing.receive_used()?;
        outgoing.take_credits(message.credits)?;
        let signal = match message.kind {
            Kind::Frame => {
                self.frame(slot, bytes)?;
                None
            }
            // Their receives are posted again when the part is here.
            Kind::Large => {
                self.large(slot, bytes)?;
                return Ok(None);
            }
            Kind::Part => {
                self.part(slot, bytes)?;
                return Ok(None);
            }
            Kind::Done => {
                outgoing.window_read(message.value)?;
                None
            }
            Kind::Credits => None,
            Kind::Probe => Some(Signal::Probe),
            Kind::ProbeReply => Some(Signal::ProbeReply),
        };
        self.unposted.push(slot);
        Ok(signal)
    }

    /// The head that a message has landed in. No reference to the others is made, into which the device may write.
    fn head(&self, slot: u16) -> IoBuf {
        self.heads.slice(usize::from(slot) * HEAD_BYTES, HEAD_BYTES)
    }

    fn header(&self, slot: u16, bytes: u32) -> Result<(Header, BlockCrcs), LinkError> {
        let head = self.head(slot);
        let len = (bytes as usize).min(HEAD_BYTES);
        let head = head.as_slice().get(..len).ok_or(LinkError::Length(bytes))?;
        if len < HEADER_BYTES {
            return Err(LinkError::Length(bytes));
        }
        Ok(Header::decode(head)?)
    }

    fn frame(&mut self, slot: u16, bytes: u32) -> Result<(), LinkError> {
        let (header, crcs) = self.header(slot, bytes)?;
        let len = header.payload_len as usize;
        let payload = if len == 0 {
            None
        } else {
            if len > SMALL_PAYLOAD_BYTES || bytes as usize != HEAD_BYTES + len {
                return Err(LinkError::Length(bytes));
            }
            let block = self.blocks.get_mut(usize::from(slot)).and_then(Option::take);
            let mut block = block.ok_or(LinkError::Length(bytes))?;
            block.truncate(len);
            Some(block)
        };
        self.arrivals.push_back(Arrival { header, crcs, payload, announced: len, missing: 0 });
        Ok(())
    }

    fn large(&mut self, slot: u16, bytes: u32) -> Result<(), LinkError> {
        let (header, crcs) = self.header(slot, bytes)?;
        let len = header.payload_len as usize;
        if len <= SMALL_PAYLOAD_BYTES {
            return Err(LinkError::Length(bytes));
        }
        self.arrivals.push_back(Arrival { header, crcs, payload: None, announced: 0, missing: len });
        self.part(slot, bytes)
    }

    /// Another part of the frame that arrived last.
    fn part(&mut self, slot: u16, bytes: u32) -> Result<(), LinkError> {
        let from = Descriptor::decode(self.head(slot).as_slice()).ok_or(LinkError::Length(bytes))?;
        if bytes as usize != HEAD_BYTES {
            return Err(LinkError::Length(bytes));
        }
        let arrival = self.first + self.arrivals.len().saturating_sub(1) as u64;
        let frame = self.arrivals.back_mut().ok_or(LinkError::Part(from.len))?;
        let left = frame.header.payload_len as usize - frame.announced;
        if from.len as usize != left.min(PART_BYTES) || left == 0 {
            return Err(LinkError::Part(from.len));
        }
        self.parts.push_back(Part { arrival, offset: frame.announced, from, slot });
        frame.announced += from.len as usize;
        Ok(())
    }

    fn arrival(&mut self, number: u64) -> Option<&mut Arrival> {
        self.arrivals.get_mut(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    /// Begins to fetch what has been announced.
    pub(super) fn fetch(
        &mut self,
        memory: Memory<'_>,
        outgoing: &mut Outgoing,
        work: &mut Vec<Work>,
    ) -> Buffers {
        while outgoing.room() > 0
            && let Some(part) = self.parts.front().copied()
        {
            let Some(frame) = self.arrival(part.arrival) else { break };
            let Ok((into, staging)) = place(frame, &part, memory) else { return Buffers::Short };
            self.parts.pop_front();
            outgoing.post_fetch(work, into, part.from, Fetch { part, staging });
        }
        Buffers::Enough
    }

    /// A part is here.
    pub(super) fn fetched(&mut self, outgoing: &mut Outgoing, fetch: Fetch) {
        let Fetch { part, staging } = fetch;
        let len = part.from.len as usize;
        if let Some(frame) = self.arrival(part.arrival) {
            frame.missing -= len.min(frame.missing);
            if let (Some(staging), Some(payload)) = (staging, frame.payload.as_mut())
                && let Some(bytes) = payload.as_mut_slice()
                && let Some(into) = bytes.get_mut(part.offset..part.offset + len)
            {
                into.copy_from_slice(staging.as_slice());
            }
        }
        outgoing.signal(Kind::Done, part.from.window);
        self.unposted.push(part.slot);
    }

    pub(super) fn deliver(&mut self, mut take: impl FnMut(Frame)) {
        while self.arrivals.front().is_some_and(|frame| frame.missing == 0)
            && let Some(Arrival { header, crcs, payload, .. }) = self.arrivals.pop_front()
        {
            self.first += 1;
            take(Frame { header, crcs, payload });
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.arrivals.is_empty()
    }
}

/// Where a part lands: in the payload's own memory when that is in the arena, else in a buffer of its own.
fn place(frame: &mut Arrival, part: &Part, memory: Memory<'_>) -> Result<(Span, Option<IoBuf>), NoBuffers> {
    let payload = match &mut frame.payload {
        Some(payload) => payload,
        none => none.insert(memory.arena.alloc(frame.header.payload_len as usize)?),
    };
    let len = part.from.len as usize;
    if payload.is_arena() {
        return Ok((span(&payload.slice(part.offset, len)), None));
    }
    let staging = memory.staging.incoming(memory.arena, len)?;
    Ok((span(&staging), Some(staging)))
}
