//! Receiving: a stream buffer, cut into frames.
//!
//! Small payloads are copied from the stream buffer into a buffer of the arena. (Having the kernel scatter them
//! over such buffers was tried: the copy is saved, and the kernel pays for the cold memory instead.) When a
//! payload is not all there, the next receive has two targets: the rest of the payload in its own buffer, and
//! behind it the stream buffer for what follows.

use hashbrown::HashMap;
use io_uring::{opcode, squeue, types};
use reactor::{Arena, ConnId, Event, Frame, Framing, IoBuf};
use std::collections::VecDeque;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::RawFd;
use wire::frame::{MAGIC, META_BYTES_MAX};
use wire::{BlockCrcs, FrameKind, HEADER_BYTES, Header, HeaderError};

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
    /// The peer asks for another transport, which we are to decline. More may be here.
    Offered(Header),
}

/// A connection's incoming side.
pub(crate) struct Receiver {
    /// Offers of another transport are for whoever uses us, not for us to decline.
    passes_offers: bool,
    stream: Box<[u8]>,
    start: usize,
    end: usize,
    partial: Option<Partial>,
    large: bool,
    /// The last receive left bytes in the socket.
    more: bool,
    expected: HashMap<u64, IoBuf, BuildHasherDefault<RequestHasher>>,
    /// Where the receive under way puts what comes.
    pieces: Vec<libc::iovec>,
    message: libc::msghdr,
}

impl Receiver {
    pub(crate) fn new(passes_offers: bool) -> Self {
        Self {
            passes_offers,
            stream: Box::default(),
            start: 0,
            end: 0,
            partial: None,
            large: false,
            more: false,
            expected: HashMap::default(),
            pieces: Vec::new(),
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
        self.place();
        let ioprio = if self.more { 0 } else { POLL_FIRST };
        match self.pieces.as_slice() {
            [one] => {
                let into = one.iov_base.cast();
                opcode::Recv::new(types::Fd(fd), into, one.iov_len as u32).ioprio(ioprio).build()
            }
            many => {
                self.message.msg_iov = many.as_ptr().cast_mut();
                self.message.msg_iovlen = many.len();
                opcode::RecvMsg::new(types::Fd(fd), &raw mut self.message).ioprio(ioprio).build()
            }
        }
    }

    /// Decides where the next receive puts what comes.
    fn place(&mut self) {
        if self.stream.is_empty() {
            self.stream = vec![0; STREAM_BYTES].into_boxed_slice();
        }
        // What is left is less than a header with its checksums, so moving it is cheap.
        if self.start > 0 {
            self.stream.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.pieces.clear();
        if let Some(partial) = &self.partial {
            let rest = partial.payload.as_ptr().wrapping_add(partial.filled);
            let len = partial.payload.len() - partial.filled;
            self.pieces.push(libc::iovec { iov_base: rest.cast(), iov_len: len });
        }
        let window = if self.large { LARGE_WINDOW_BYTES } else { STREAM_BYTES };
        let room = window.max(self.end + HEADER_BYTES + META_BYTES_MAX).min(self.stream.len()) - self.end;
        let into = self.stream.as_mut_ptr().wrapping_add(self.end);
        self.pieces.push(libc::iovec { iov_base: into.cast(), iov_len: room });
    }

    /// `bytes` have come with the last receive; `more` lie in the socket.
    pub(crate) fn received(&mut self, bytes: usize, more: bool, conn: ConnId, events: &mut VecDeque<Event>) {
        self.more = more;
        let mut bytes = bytes;
        if let Some(partial) = &mut self.partial {
            let into_payload = bytes.min(partial.payload.len() - partial.filled);
            partial.filled += into_payload;
            bytes -= into_payload;
            if partial.filled == partial.payload.len()
                && let Some(Partial { header, crcs, payload, .. }) = self.partial.take()
            {
                events
                    .push_back(Event::Frame { conn, frame: Frame { header, crcs, payload: Some(payload) } });
            }
        }
        self.end = (self.end + bytes).min(self.stream.len());
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
        if header.kind == FrameKind::Link && !self.passes_offers {
            if bytes.len() < head + lengths.payload {
                return Ok(false);
            }
            self.start += head + lengths.payload;
            return Err(Parsed::Offered(header));
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wire::block_crc;

    const CONN: ConnId = ConnId(7);

    /// A frame as it is sent, and its payload.
    fn frame(kind: FrameKind, request: u64, payload: usize) -> (Vec<u8>, Vec<u8>) {
        let data: Vec<u8> = (0..payload).map(|i| (i as u64 * 31 + request * 7) as u8).collect();
        let mut header = Header::new(kind, request);
        header.payload_len = payload as u32;
        let mut crcs = BlockCrcs::default();
        data.chunks(4096).for_each(|block| crcs.push(block_crc(block)));
        let mut bytes = Vec::new();
        header.encode_into(&crcs, &mut bytes);
        bytes.extend_from_slice(&data);
        (bytes, data)
    }

    /// Does what the kernel does with a receive: fills its pieces in order with at most `most` bytes.
    fn fill(receiver: &Receiver, from: &mut &[u8], most: usize) -> usize {
        let mut done = 0;
        for piece in &receiver.pieces {
            let n = piece.iov_len.min(from.len()).min(most - done);
            // SAFETY: the receiver says that so many bytes may be written there, and holds the memory.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), piece.iov_base.cast(), n) };
            *from = &from[n..];
            done += n;
        }
        done
    }

    /// Sends the frames through a receiver in cuts of the given lengths.
    fn pass(frames: &[(FrameKind, usize)], cuts: &[usize]) {
        let arena = Arena::new(8 << 20).unwrap();
        let mut receiver = Receiver::new(false);
        let (mut stream, mut sent) = (Vec::new(), Vec::new());
        for (at, (kind, payload)) in frames.iter().enumerate() {
            let (bytes, data) = frame(*kind, at as u64, *payload);
            if *kind == FrameKind::ReadReply && at % 3 == 0 {
                receiver.expect(at as u64, IoBuf::heap(*payload).unwrap());
            }
            stream.extend_from_slice(&bytes);
            sent.push((*kind, at as u64, data));
        }
        let (mut rest, mut got) = (stream.as_slice(), Vec::new());
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            receiver.place();
            let bytes = fill(&receiver, &mut rest, *cuts.next().unwrap());
            let mut events = VecDeque::new();
            receiver.received(bytes, !rest.is_empty(), CONN, &mut events);
            assert_eq!(receiver.parse(Framing::Frames, &arena, CONN, &mut events), Parsed::Hungry);
            for event in events {
                let Event::Frame { frame, .. } = event else { panic!("{event:?}") };
                let data = frame.payload.as_ref().map_or(Vec::new(), |buf| buf.as_slice().to_vec());
                got.push((frame.header.kind, frame.header.request, data));
            }
        }
        assert!(!receiver.is_amid_a_frame());
        assert!(got == sent, "{} of {} frames, or others", got.len(), sent.len());
    }

    fn some_frame() -> impl Strategy<Value = (FrameKind, usize)> {
        prop_oneof![
            6 => Just((FrameKind::Write, 4096)),
            1 => Just((FrameKind::SubWrite, 8192)),
            1 => Just((FrameKind::Read, 0)),
            1 => Just((FrameKind::ReadReply, 4096)),
            1 => Just((FrameKind::Write, 65536)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
        #[test]
        fn frames_arrive_whole_and_in_order_however_the_stream_is_cut(
            runs in prop::collection::vec((some_frame(), 1usize..24), 1..12),
            cuts in prop::collection::vec(prop_oneof![1usize..200, 4000usize..200_000], 1..8),
        ) {
            let frames: Vec<_> = runs.into_iter().flat_map(|(frame, n)| std::iter::repeat_n(frame, n)).collect();
            pass(&frames, &cuts);
        }
    }

    #[test]
    fn a_foreign_stream_behind_a_run_of_frames_is_refused() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut receiver = Receiver::new(false);
        let mut stream: Vec<u8> = (0..8).flat_map(|at| frame(FrameKind::Write, at, 4096).0).collect();
        stream.extend_from_slice(&[0xee; 9000]);
        let (mut rest, mut events) = (stream.as_slice(), VecDeque::new());
        let refused = loop {
            receiver.place();
            let bytes = fill(&receiver, &mut rest, 9000);
            receiver.received(bytes, true, CONN, &mut events);
            match receiver.parse(Framing::Frames, &arena, CONN, &mut events) {
                Parsed::Hungry if !rest.is_empty() => {}
                other => break other,
            }
        };
        assert!(matches!(refused, Parsed::Refused(_)), "{refused:?}");
        assert_eq!(events.len(), 8);
    }

    #[test]
    fn an_offer_of_another_transport_is_set_aside_whole_or_passed_on() {
        let arena = Arena::new(1 << 20).unwrap();
        let lens = [(FrameKind::Ping, 0), (FrameKind::Link, 32), (FrameKind::Write, 4096)];
        let stream: Vec<u8> =
            lens.iter().enumerate().flat_map(|(n, (kind, len))| offer_or(*kind, n as u64, *len)).collect();
        for (passes, due) in [(false, vec![0, 2]), (true, vec![0, 1, 2])] {
            let mut receiver = Receiver::new(passes);
            let (mut rest, mut events, mut offers) = (stream.as_slice(), VecDeque::new(), 0);
            while !rest.is_empty() {
                receiver.place();
                let bytes = fill(&receiver, &mut rest, 150);
                receiver.received(bytes, true, CONN, &mut events);
                while let Parsed::Offered(offer) = receiver.parse(Framing::Frames, &arena, CONN, &mut events)
                {
                    assert_eq!(offer.request, 1);
                    offers += 1;
                }
            }
            let got: Vec<u64> = events
                .iter()
                .map(|event| if let Event::Frame { frame, .. } = event { frame.header.request } else { 99 })
                .collect();
            assert_eq!((got, offers), (due, u64::from(!passes)));
        }
    }

    fn offer_or(kind: FrameKind, request: u64, len: usize) -> Vec<u8> {
        if kind != FrameKind::Link {
            return frame(kind, request, len).0;
        }
        let mut header = Header::new(kind, request);
        header.payload_len = len as u32;
        let mut crcs = BlockCrcs::default();
        crcs.push(block_crc(&vec![0; len]));
        let mut bytes = Vec::new();
        header.encode_into(&crcs, &mut bytes);
        bytes.resize(bytes.len() + len, 0);
        bytes
    }
}
