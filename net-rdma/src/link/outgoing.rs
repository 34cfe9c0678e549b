//! The sending half: queue, credits, windows, and what the send queue holds on to.

use super::incoming::Fetch;
use super::message::{CREDITS_MAX, Descriptor, HEAD_BYTES, Immediate, Kind, PART_BYTES, SMALL_PAYLOAD_BYTES};
use super::{Buffers, LinkError, Memory, RECEIVES, SENDS, Span, Work};
use reactor::{Arena, Frame, Full, IoBuf, NoBuffers, SEND_QUEUE_FRAMES};
use std::collections::VecDeque;

/// The last credit is for messages that free something at the peer.
const RESERVED_CREDITS: u16 = 1;
/// Credits owed are given back alone when this many have gathered.
const OWED_MAX: u16 = RECEIVES / 2;
/// Work requests that one frame takes at most: its window and its message.
const WORK_OF_A_FRAME: usize = 2;

/// What a work request keeps alive until it has completed.
enum Held {
    /// A message without payload, or the opening of a window, whose memory the window holds.
    Nothing,
    Payload {
        _kept: IoBuf,
    },
    /// The closing of this window.
    Window(u16),
    Fetch(Fetch),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WindowState {
    Free,
    /// The peer may read.
    Open,
    /// The peer has read; to be closed.
    Read,
    /// Being closed.
    Closing,
}

struct Window {
    key: u32,
    state: WindowState,
    memory: Option<IoBuf>,
}

pub(super) struct Outgoing {
    queue: VecDeque<Frame>,
    /// Bytes of the first frame's payload that have been announced already.
    announced: usize,
    /// Messages without a frame: at most one `Done` for each receive of ours, and those of the beginning.
    signals: VecDeque<(Kind, u16)>,
    credits: u16,
    /// As many receives as the peer has in all.
    credits_max: u16,
    /// Receives posted again, which the peer does not know yet.
    owed: u16,
    /// Receives that the peer may know of and has not used. One that uses more would have us post receives, owe credits
    /// and queue answers without bound, for it need not return any credits itself.
    granted: u16,
    heads: IoBuf,
    scratch: Vec<u8>,
    /// In the send queue, oldest first; the first one's number is `first_seq`.
    posted: VecDeque<Held>,
    first_seq: u64,
    windows: Vec<Window>,
    free_windows: Vec<u16>,
    /// In the state `Read`.
    to_close: VecDeque<u16>,
}

/// The memory of a payload, or a copy of it in the arena when the device cannot reach it.
fn registered(payload: &IoBuf, memory: Memory<'_>) -> Result<IoBuf, NoBuffers> {
    if payload.is_arena() {
        return Ok(payload.clone());
    }
    let copy = memory.staging.outgoing(memory.arena, payload.len())?;
    // SAFETY: the buffer was nobody's until now, and is as long as the payload.
    unsafe { std::ptr::copy_nonoverlapping(payload.as_slice().as_ptr(), copy.as_ptr(), payload.len()) };
    Ok(copy)
}

pub(super) fn span(buf: &IoBuf) -> Span {
    Span { addr: buf.as_ptr() as u64, len: buf.len() as u32 }
}

/// The next key of a window: each opening must have another (`ibv_inc_rkey`).
fn next_key(key: u32) -> u32 {
    key & !0xff | key.wrapping_add(1) & 0xff
}

impl Outgoing {
    pub(super) fn new(arena: &Arena, window_keys: &[u32]) -> Result<Self, NoBuffers> {
        let window = |key: &u32| Window { key: *key, state: WindowState::Free, memory: None };
        Ok(Self {
            queue: VecDeque::new(),
            announced: 0,
            signals: VecDeque::with_capacity(usize::from(RECEIVES)),
            credits: 0,
            credits_max: 0,
            owed: 0,
            granted: RECEIVES,
            heads: arena.alloc(usize::from(SENDS) * HEAD_BYTES)?,
            scratch: Vec::with_capacity(HEAD_BYTES),
            posted: VecDeque::with_capacity(usize::from(SENDS)),
            first_seq: 0,
            windows: window_keys.iter().map(window).collect(),
            free_windows: (0..window_keys.len() as u16).rev().collect(),
            to_close: VecDeque::with_capacity(window_keys.len()),
        })
    }

    pub(super) fn grant(&mut self, receives: u16) {
        (self.credits, self.credits_max) = (receives, receives);
    }

    pub(super) fn push(&mut self, frame: Frame) -> Result<(), Full> {
        if self.queue.len() >= SEND_QUEUE_FRAMES {
            return Err(Full);
        }
        self.queue.push_back(frame);
        Ok(())
    }

    pub(super) fn signal(&mut self, kind: Kind, value: u16) {
        self.signals.push_back((kind, value));
    }

    pub(super) fn next_seq(&self) -> u64 {
        self.first_seq + self.posted.len() as u64
    }

    pub(super) fn room(&self) -> usize {
        usize::from(SENDS) - self.posted.len()
    }

    /// A receive was posted again.
    pub(super) fn owe(&mut self) {
        self.owed += 1;
    }

    /// The peer has used one of our receives.
    pub(super) fn receive_used(&mut self) -> Result<(), LinkError> {
        self.granted = self.granted.checked_sub(1).ok_or(LinkError::Uncredited)?;
        Ok(())
    }

    pub(super) fn take_credits(&mut self, credits: u16) -> Result<(), LinkError> {
        self.credits = self.credits.saturating_add(credits);
        if self.credits > self.credits_max { Err(LinkError::Credits) } else { Ok(()) }
    }

    /// The peer has read what lies behind a window.
    pub(super) fn window_read(&mut self, number: u16) -> Result<(), LinkError> {
        match self.windows.get_mut(usize::from(number)) {
            Some(window) if window.state == WindowState::Open => window.state = WindowState::Read,
            _ => return Err(LinkError::Window(number)),
        }
        self.to_close.push_back(number);
        Ok(())
    }

    pub(super) fn is_drained(&self) -> bool {
        self.queue.is_empty()
            && self.signals.is_empty()
            && self.posted.is_empty()
            && self.free_windows.len() == self.windows.len()
    }

    pub(super) fn fill(&mut self, memory: Memory<'_>, work: &mut Vec<Work>) -> Buffers {
        self.close_windows(work);
        self.send_signals(work);
        let sent = self.send_frames(memory, work);
        if self.owed >= OWED_MAX && self.credits > 0 && self.room() > 0 {
            self.send_message(work, Kind::Credits, 0, 0, None);
        }
        if sent.is_err() { Buffers::Short } else { Buffers::Enough }
    }

    fn close_windows(&mut self, work: &mut Vec<Work>) {
        while self.room() > 0
            && let Some(number) = self.to_close.pop_front()
        {
            let Some(window) = self.windows.get_mut(usize::from(number)) else { continue };
            window.state = WindowState::Closing;
            work.push(Work::Invalidate { key: window.key });
            self.posted.push_back(Held::Window(number));
        }
    }

    fn send_signals(&mut self, work: &mut Vec<Work>) {
        while self.room() > 0
            && self.credits > 0
            && let Some((kind, value)) = self.signals.pop_front()
        {
            self.send_message(work, kind, value, 0, None);
        }
    }

    /// One message, whose head of `head` bytes lies in its place already. Takes a credit and gives back those owed.
    fn send_message(
        &mut self,
        work: &mut Vec<Work>,
        kind: Kind,
        value: u16,
        head: usize,
        payload: Option<IoBuf>,
    ) {
        let credits = self.owed.min(CREDITS_MAX);
        self.owed -= credits;
        self.granted += credits;
        self.credits -= 1;
        let at = self.heads.as_ptr() as u64 + (self.head_offset() as u64);
        let imm = Immediate { kind, credits, value }.encode();
        let head = (head > 0).then_some(Span { addr: at, len: head as u32 });
        work.push(Work::Message { imm, head, payload: payload.as_ref().map(span) });
        self.posted.push_back(payload.map_or(Held::Nothing, |payload| Held::Payload { _kept: payload }));
    }

    /// Where the next work request's head lies: a place of its own for each that can be outstanding.
    fn head_offset(&self) -> usize {
        (self.next_seq() % u64::from(SENDS)) as usize * HEAD_BYTES
    }

    /// The next message's head, to be written.
    fn head(&mut self) -> Option<&mut [u8]> {
        let at = self.head_offset();
        self.heads.as_mut_slice()?.get_mut(at..at + HEAD_BYTES)
    }

    fn write_header(&mut self, frame: &Frame) -> usize {
        let mut scratch = std::mem::take(&mut self.scratch);
        frame.header.encode_into(&frame.crcs, &mut scratch);
        let len = scratch.len();
        if let Some(into) = self.head().and_then(|head| head.get_mut(..len)) {
            into.copy_from_slice(&scratch);
        }
        self.scratch = scratch;
        len
    }

    fn send_frames(&mut self, memory: Memory<'_>, work: &mut Vec<Work>) -> Result<(), NoBuffers> {
        while self.credits > RESERVED_CREDITS
            && self.room() >= WORK_OF_A_FRAME
            && let Some(frame) = self.queue.pop_front()
        {
            let len = frame.payload.as_ref().map_or(0, IoBuf::len);
            let sent = if len <= SMALL_PAYLOAD_BYTES {
                self.send_small(memory, work, &frame).map(|()| true)
            } else {
                self.send_part(memory, work, &frame, len)
            };
            match sent {
                Ok(true) => self.announced = 0,
                // More parts to come, or no window is free.
                Ok(false) => {
                    self.queue.push_front(frame);
                    if self.free_windows.is_empty() {
                        return Ok(());
                    }
                }
                Err(short) => {
                    self.queue.push_front(frame);
                    return Err(short);
                }
            }
        }
        Ok(())
    }

    fn send_small(
        &mut self,
        memory: Memory<'_>,
        work: &mut Vec<Work>,
        frame: &Frame,
    ) -> Result<(), NoBuffers> {
        let payload = match &frame.payload {
            Some(payload) if !payload.is_empty() => Some(registered(payload, memory)?),
            _ => None,
        };
        let header = self.write_header(frame);
        let head = if payload.is_some() { HEAD_BYTES } else { header };
        self.send_message(work, Kind::Frame, 0, head, payload);
        Ok(())
    }

    /// Announces the next part of a large payload. True when it was the last.
    fn send_part(
        &mut self,
        memory: Memory<'_>,
        work: &mut Vec<Work>,
        frame: &Frame,
        len: usize,
    ) -> Result<bool, NoBuffers> {
        let Some(payload) = &frame.payload else { return Ok(true) };
        let Some(number) = self.free_windows.last().copied() else { return Ok(false) };
        let from = self.announced;
        let part = registered(&payload.slice(from, PART_BYTES), memory)?;
        let Some(window) = self.windows.get_mut(usize::from(number)) else { return Ok(false) };
        self.free_windows.pop();
        let (span, key) = (span(&part), next_key(window.key));
        *window = Window { key, state: WindowState::Open, memory: Some(part) };
        work.push(Work::Bind { window: number, key, span });
        self.posted.push_back(Held::Nothing);
        let kind = if from == 0 { Kind::Large } else { Kind::Part };
        if kind == Kind::Large {
            self.write_header(frame);
        }
        let descriptor = Descriptor { addr: span.addr, key, len: span.len, window: number };
        if let Some(head) = self.head() {
            descriptor.encode_into(head);
        }
        self.send_message(work, kind, 0, HEAD_BYTES, None);
        self.announced = from + span.len as usize;
        Ok(self.announced >= len)
    }

    /// Puts a fetch into the send queue.
    pub(super) fn post_fetch(&mut self, work: &mut Vec<Work>, into: Span, from: Descriptor, fetch: Fetch) {
        work.push(Work::Read { into, from });
        self.posted.push_back(Held::Fetch(fetch));
    }

    /// Lets go of everything up to the work request whose number ends in `seq`.
    pub(super) fn completed(&mut self, seq: u32, mut fetched: impl FnMut(&mut Self, Fetch)) {
        let ahead = seq.wrapping_sub(self.first_seq as u32) & SEQ_MASK;
        if ahead as usize >= self.posted.len() {
            return;
        }
        for _ in 0..=ahead {
            let Some(held) = self.posted.pop_front() else { return };
            self.first_seq += 1;
            match held {
                Held::Nothing | Held::Payload { .. } => {}
                Held::Window(number) => {
                    if let Some(window) = self.windows.get_mut(usize::from(number)) {
                        window.state = WindowState::Free;
                        window.memory = None;
                        self.free_windows.push(number);
                    }
                }
                Held::Fetch(fetch) => fetched(self, fetch),
            }
        }
    }
}

/// The low bits of a work request's number that its completion brings back.
pub(super) const SEQ_MASK: u32 = (1 << 31) - 1;
