//! Receiving: a stream buffer, cut into frames.
//!
//! Small payloads are copied from the stream buffer into a buffer of the arena. When a payload is not all
//! there, the next receive has two targets: the rest of the payload in its own buffer, and behind it the
//! stream buffer for what follows.

use hashbrown::HashMap;
use io_uring::{opcode, squeue, types};
use reactor::{Arena, ConnId, Event, Frame, Framing, IoBuf};
use std::collections::VecDeque;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::RawFd;
use wire::frame::{MAGIC, META_BYTES_MAX};
use wire::{BlockCrcs, HEADER_BYTES, Header, HeaderError};

/// Size of a connection's stream buffer: some fifteen frames of 4 KiB in one receive.
const STREAM_BYTES: usize = 64 * 1024;
/// Payloads from here on announce more of their kind: then the stream buffer is offered only to
/// `LARGE_WINDOW_BYTES`, so that the next payload goes straight into its buffer instead of being copied.
const LARGE_PAYLOAD_BYTES: usize = 32 * 1024;
const LARGE_WINDOW_BYTES: usize = 2048;
/// Expected replies per connection: beyond, replies simply arrive in the arena.
const EXPECTED_MAX: usize = 4096;
/// `IORING_RECVSEND_POLL_FIRST`: wait for data instead of trying first; set when the last receive
/// emptied the socket.
const POLL_FIRST: u16 = 1;

/// Request numbers are counters or random: one multiplication spreads either.
#[derive(Default)]
pub(crate) struct RequestHasher(u64);

impl Hasher for RequestHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, n: u64) {
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// A frame whose payload is not complete yet.
struct Partial {
    header: Header,
    crcs: BlockCrcs,
    payload: IoBuf,
    filled: usize,
}

/// What cutting the stream came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// Everything complete was delivered; receive more.
    Hungry,
    /// No buffers left: go on when some have come back.
    Starved,
    /// The peer does not speak our protocol.
    Refused(HeaderError),
}

/// A connection's incoming side.
pub(crate) struct Receiver {
    stream: Box<[u8]>,
    start: usize,
    end: usize,
    partial: Option<Partial>,
    large: bool,
    /// The last receive left bytes in the socket.
    more: bool,
    expected: HashMap<u64, IoBuf, BuildHasherDefault<RequestHasher>>,
    targets: [libc::iovec; 2],
    message: libc::msghdr,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self {
            stream: Box::default(),
            start: 0,
            end: 0,
            partial: None,
            large: false,
            more: false,
            expected: HashMap::default(),
            targets: [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 2],
            // SAFETY: msghdr is plain data, for which zero bytes are a valid (empty) value.
            message: unsafe { std::mem::zeroed() },
        }
    }

    pub(crate) fn expect(&mut self, request: u64, into: IoBuf) {
        if self.expected.len() < EXPECTED_MAX {
            self.expected.insert(request, into);
        }
    }

    /// The beginning of a frame is here and its rest is not.
    pub(crate) fn is_amid_a_frame(&self) -> bool {
        self.partial.is_some() || self.start < self.end
    }

    /// Lets go of what was expected. The buffer that is being filled stays until its receive has ended.
    pub(crate) fn forget_expected(&mut self) {
        self.expected.clear();
    }

    /// The next receive; it points into this, which must stay where it is.
    pub(crate) fn next(&mut self, fd: RawFd) -> squeue::Entry {
        if self.stream.is_empty() {
            self.stream = vec![0; STREAM_BYTES].into_boxed_slice();
        }
        // What is left is less than a header with its checksums, so moving it is cheap.
        if self.start > 0 {
            self.stream.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let window = if self.large { LARGE_WINDOW_BYTES } else { STREAM_BYTES };
        let room = window.max(self.end + HEADER_BYTES + META_BYTES_MAX).min(self.stream.len()) - self.end;
        let into = self.stream.as_mut_ptr().wrapping_add(self.end);
        let ioprio = if self.more { 0 } else { POLL_FIRST };
        match &self.partial {
            None => opcode::Recv::new(types::Fd(fd), into, room as u32).ioprio(ioprio).build(),
            Some(partial) => {
                let rest = partial.payload.as_ptr().wrapping_add(partial.filled);
                self.targets = [
                    libc::iovec { iov_base: rest.cast(), iov_len: partial.payload.len() - partial.filled },
                    libc::iovec { iov_base: into.cast(), iov_len: room },
                ];
                self.message.msg_iov = self.targets.as_mut_ptr();
                self.message.msg_iovlen = self.targets.len();
                opcode::RecvMsg::new(types::Fd(fd), &raw mut self.message).ioprio(ioprio).build()
            }
        }
    }

    /// `bytes` have come with the last receive; `more` lie in the socket.
    pub(crate) fn received(&mut self, bytes: usize, more: bool, conn: ConnId, events: &mut VecDeque<Event>) {
        self.more = more;
        let mut into_stream = bytes;
        if let Some(partial) = &mut self.partial {
            let into_payload = bytes.min(partial.payload.len() - partial.filled);
            partial.filled += into_payload;
            into_stream -= into_payload;
            if partial.filled == partial.payload.len()
                && let Some(Partial { header, crcs, payload, .. }) = self.partial.take()
            {
                events
                    .push_back(Event::Frame { conn, frame: Frame { header, crcs, payload: Some(payload) } });
            }
        }
        self.end = (self.end + into_stream).min(self.stream.len());
    }

    /// Delivers what is complete.
    pub(crate) fn parse(
        &mut self,
        framing: Framing,
        arena: &Arena,
        conn: ConnId,
        events: &mut VecDeque<Event>,
    ) -> Parsed {
        match framing {
            Framing::Raw => self.parse_raw(arena, conn, events),
            Framing::Frames => loop {
                match self.parse_frame(arena, conn, events) {
                    Ok(true) => {}
                    Ok(false) => return Parsed::Hungry,
                    Err(parsed) => return parsed,
                }
            },
        }
    }

    fn parse_raw(&mut self, arena: &Arena, conn: ConnId, events: &mut VecDeque<Event>) -> Parsed {
        let bytes = self.stream.get(self.start..self.end).unwrap_or(&[]);
        if !bytes.is_empty() {
            let Ok(mut buf) = arena.alloc(bytes.len()) else { return Parsed::Starved };
            if let Some(into) = buf.as_mut_slice() {
                into.copy_from_slice(bytes);
            }
            events.push_back(Event::Bytes { conn, bytes: buf });
        }
        (self.start, self.end) = (0, 0);
        Parsed::Hungry
    }

    /// One frame: `Ok(true)` when it was delivered and another may follow.
    fn parse_frame(
        &mut self,
        arena: &Arena,
        conn: ConnId,
        events: &mut VecDeque<Event>,
    ) -> Result<bool, Parsed> {
        if self.partial.is_some() {
            return Ok(false);
        }
        let bytes = self.stream.get(self.start..self.end).unwrap_or(&[]);
        if bytes.len() < HEADER_BYTES {
            return early_check(bytes).map(|()| false).map_err(Parsed::Refused);
        }
        let lengths = Header::peek(bytes).map_err(Parsed::Refused)?;
        let head = HEADER_BYTES + lengths.meta;
        if bytes.len() < head {
            return Ok(false);
        }
        let (header, crcs) = Header::decode(bytes).map_err(Parsed::Refused)?;
        // Replies are odd. One that was expected without a payload (an error) lets go of its buffer.
        let expected = if header.kind as u8 & 1 == 1 { self.expected.remove(&header.request) } else { None };
        if lengths.payload == 0 {
            self.start += head;
            events.push_back(Event::Frame { conn, frame: Frame { header, crcs, payload: None } });
            return Ok(true);
        }
        let mut payload = match expected.filter(|buf| buf.len() >= lengths.payload && buf.is_unique()) {
            Some(buf) => buf,
            None => arena.alloc(lengths.payload).map_err(|_| Parsed::Starved)?,
        };
        payload.truncate(lengths.payload);
        self.large = lengths.payload >= LARGE_PAYLOAD_BYTES;
        let here = bytes.get(head..).unwrap_or(&[]);
        let here = here.get(..lengths.payload).unwrap_or(here);
        if let Some(into) = payload.as_mut_slice().and_then(|into| into.get_mut(..here.len())) {
            into.copy_from_slice(here);
        }
        self.start += head + here.len();
        if here.len() < lengths.payload {
            self.partial = Some(Partial { header, crcs, payload, filled: here.len() });
            return Ok(false);
        }
        events.push_back(Event::Frame { conn, frame: Frame { header, crcs, payload: Some(payload) } });
        Ok(true)
    }
}

/// Refuses foreign protocols from the first four bytes on, so that they do not linger half-read.
fn early_check(bytes: &[u8]) -> Result<(), HeaderError> {
    match bytes.first_chunk::<4>() {
        Some(four) if u32::from_le_bytes(*four) != MAGIC => {
            Err(HeaderError::Magic(u32::from_le_bytes(*four)))
        }
        _ => Ok(()),
    }
}
