//! Two links over a model of two connected queue pairs: in order, one-sided reads only through open windows, a
//! break at any moment that leaves unknown what has arrived.

mod hostile;

use super::*;
use proptest::prelude::*;
use reactor::IoBuf;
use reactor::backend::{CountingHeap, allocations_of_this_thread};
use std::collections::{HashMap, VecDeque};
use wire::{BlockCrcs, FrameKind, Header, block_crc};

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

/// What a queue pair has to do, with what it needs to find again.
struct Posted {
    seq: u32,
    work: Work,
}

/// One side: a link and its half of the model.
struct End {
    arena: Arena,
    staging: Staging,
    link: Link,
    batch: Batch,
    sends: VecDeque<Posted>,
    receives: VecDeque<Receive>,
    /// Open windows: key to address and length.
    windows: HashMap<u32, Span>,
    /// The last key of each window.
    keys: [u32; KEYS.len()],
    got: Vec<(u64, Vec<u8>)>,
    held: Vec<Frame>,
    short: bool,
    /// Heap allocations of the link.
    allocations: u64,
}

const KEYS: [u32; 4] = [0x100, 0x2ff, 0x300, 0x400];

impl End {
    fn new(arena_bytes: usize) -> Self {
        let arena = Arena::new(arena_bytes).unwrap();
        let staging = Staging::new(&arena).unwrap();
        let mut link = Link::new(&arena, &KEYS).unwrap();
        link.grant(RECEIVES);
        let batch = Batch::default();
        let (sends, receives, windows) = Default::default();
        let (got, held, keys) = (Vec::new(), Vec::new(), KEYS);
        Self {
            arena,
            staging,
            link,
            batch,
            sends,
            receives,
            windows,
            keys,
            got,
            held,
            short: false,
            allocations: 0,
        }
    }

    fn fill(&mut self) {
        let memory = Memory { arena: &self.arena, staging: &self.staging };
        self.short = self.link.fill(memory, &mut self.batch) == Buffers::Short;
        self.receives.extend(self.batch.receives.drain(..));
        let first = self.batch.first_seq;
        for (at, work) in self.batch.work.drain(..).enumerate() {
            self.sends.push_back(Posted { seq: (first + at as u64) as u32 & outgoing::SEQ_MASK, work });
        }
        assert!(self.sends.len() <= usize::from(SENDS), "the send queue overflows");
    }

    fn deliver(&mut self, hold: bool) {
        let (got, held) = (&mut self.got, &mut self.held);
        self.link.deliver(|frame| {
            let bytes = frame.payload.as_ref().map_or(Vec::new(), |payload| payload.as_slice().to_vec());
            got.push((frame.header.request, bytes));
            if hold {
                held.push(frame);
            }
        });
    }
}

fn bytes_of(span: Span) -> Vec<u8> {
    // SAFETY: the span was made by a link that keeps its memory alive until the work has completed.
    unsafe { std::slice::from_raw_parts(span.addr as *const u8, span.len as usize) }.to_vec()
}

fn write_to(span: Span, bytes: &[u8]) {
    assert!(bytes.len() <= span.len as usize, "a message longer than its receive");
    // SAFETY: as above, and nothing else looks at it until the work has completed.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), span.addr as *mut u8, bytes.len()) }
}

/// Performs the oldest work request of `from`. With an answer lost, the peer has it and `from` learns nothing.
fn perform(from: &mut End, to: &mut End, answered: bool) -> Result<Option<Signal>, LinkError> {
    let Some(Posted { seq, work }) = from.sends.pop_front() else { return Ok(None) };
    let mut signal = None;
    match work {
        Work::Message { imm, head, payload } => {
            let receive = to.receives.pop_front().expect("receiver not ready: credits are wrong");
            let head = head.map_or(Vec::new(), bytes_of);
            let payload = payload.map_or(Vec::new(), bytes_of);
            write_to(receive.head, &head);
            assert!(payload.is_empty() || head.len() == HEAD_BYTES, "the payload would land in the head");
            write_to(receive.payload, &payload);
            let bytes = (head.len() + payload.len()) as u32;
            signal = counted(&mut to.allocations, || to.link.received(receive.slot, bytes, imm))?;
        }
        Work::Bind { window, key, span } => {
            let last = std::mem::replace(&mut from.keys[usize::from(window)], key);
            assert!(key != last && key >> 8 == last >> 8, "a new key differs in its low byte");
            assert!(from.windows.insert(key, span).is_none(), "a window is opened twice");
        }
        Work::Invalidate { key } => {
            from.windows.remove(&key).expect("a closed window is closed");
        }
        Work::Read { into, from: remote } => {
            let window = to.windows.get(&remote.key).expect("read through a closed window");
            assert!(window.addr == remote.addr && window.len == remote.len && into.len == remote.len);
            write_to(into, &bytes_of(*window));
        }
    }
    if answered {
        counted(&mut from.allocations, || from.link.completed(seq));
    }
    Ok(signal)
}

fn contents(request: u64, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u64 * 13 + request * 101 + (at as u64 >> 9)) as u8).collect()
}

/// A data frame whose payload is in this buffer.
fn frame_in(request: u64, mut buf: IoBuf) -> Frame {
    let bytes = contents(request, buf.len());
    buf.as_mut_slice().unwrap().copy_from_slice(&bytes);
    let mut header = Header::new(FrameKind::Write, request);
    header.payload_len = buf.len() as u32;
    Frame { header, crcs: BlockCrcs::of(&bytes), payload: Some(buf) }
}

fn frame(request: u64, len: usize, arena: &Arena) -> Frame {
    // Above what a data frame can have, and for each third, the payload does not lie in the arena.
    let data = len <= wire::frame::DATA_PAYLOAD_BYTES_MAX;
    let bytes = contents(request, len);
    let payload = (len > 0).then(|| {
        // Who fills its arena with what it sends can receive nothing, over any transport: some is left.
        let (used, all) = arena.usage();
        let spare = used + len + 2 * PART_BYTES <= all;
        let mut buf = match arena.alloc(len) {
            Ok(buf) if data && spare && !request.is_multiple_of(3) => buf,
            _ => IoBuf::heap(len).unwrap(),
        };
        buf.as_mut_slice().unwrap().copy_from_slice(&bytes);
        buf
    });
    let mut crcs = BlockCrcs::default();
    let mut header = Header::new(if data { FrameKind::Write } else { FrameKind::Control }, request);
    header.payload_len = len as u32;
    if data {
        bytes.chunks(4096).for_each(|block| crcs.push(block_crc(block)));
    } else {
        crcs.push(block_crc(&bytes));
    }
    Frame { header, crcs, payload }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Push { side: usize, len: usize },
    Fill { side: usize },
    Perform { side: usize, count: usize },
    Deliver { side: usize, hold: bool },
    Release { side: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![
        2 => Just(0usize),
        6 => Just(4096usize),
        1 => 1usize..4096,
        2 => Just(8192usize),
        2 => Just(131_072usize),
        1 => 131_073usize..=1 << 20,
    ];
    prop_oneof![
        4 => (0usize..2, len).prop_map(|(side, len)| Step::Push { side, len }),
        3 => (0usize..2).prop_map(|side| Step::Fill { side }),
        4 => (0usize..2, 1usize..40).prop_map(|(side, count)| Step::Perform { side, count }),
        2 => (0usize..2, any::<bool>()).prop_map(|(side, hold)| Step::Deliver { side, hold }),
        1 => (0usize..2).prop_map(|side| Step::Release { side }),
    ]
}

struct Pair {
    ends: [End; 2],
    sent: [Vec<(u64, usize)>; 2],
}

impl Pair {
    fn new(arena_bytes: usize) -> Self {
        let mut pair =
            Self { ends: [End::new(arena_bytes), End::new(arena_bytes)], sent: Default::default() };
        // Receives are posted before the other side may send.
        pair.ends.iter_mut().for_each(End::fill);
        pair
    }

    fn perform(&mut self, side: usize, answered: bool) -> Option<Signal> {
        let [a, b] = &mut self.ends;
        let (from, to) = if side == 0 { (a, b) } else { (b, a) };
        perform(from, to, answered).expect("an honest peer")
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Push { side, len } => {
                let request = self.sent[side].len() as u64;
                let end = &mut self.ends[side];
                end.link.push(frame(request, len, &end.arena)).unwrap();
                self.sent[side].push((request, len));
            }
            Step::Fill { side } => self.ends[side].fill(),
            Step::Perform { side, count } => (0..count).for_each(|_| {
                self.perform(side, true);
            }),
            Step::Deliver { side, hold } => self.ends[side].deliver(hold),
            Step::Release { side } => self.ends[side].held.clear(),
        }
    }

    /// Goes on until nothing moves any more.
    fn settle(&mut self) {
        self.ends.iter_mut().for_each(|end| end.held.clear());
        let mut quiet = 0;
        while quiet < 3 {
            let before = self.ends.each_ref().map(|end| end.link.progress());
            for side in 0..2 {
                self.ends[side].fill();
                while !self.ends[side].sends.is_empty() {
                    self.perform(side, true);
                }
                self.ends.iter_mut().for_each(|end| end.deliver(false));
            }
            let after = self.ends.each_ref().map(|end| end.link.progress());
            quiet = if before == after { quiet + 1 } else { 0 };
        }
    }

    fn check_all_arrived(&self) {
        for side in 0..2 {
            let due: Vec<_> = self.sent[side].iter().map(|(n, len)| (*n, contents(*n, *len))).collect();
            let got = &self.ends[1 - side].got;
            assert!(got == &due, "{} of {} frames, or others", got.len(), due.len());
            assert!(self.ends[side].link.is_drained(), "something is still held");
            assert!(self.ends[side].windows.is_empty(), "a window is still open");
        }
    }
}

/// What two idle links hold: blocks and heads.
fn idle_bytes(arena_bytes: usize) -> usize {
    Pair::new(arena_bytes).ends[0].arena.usage().0
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn frames_arrive_whole_once_and_in_order(
        steps in prop::collection::vec(step(), 1..120),
        arena_bytes in prop_oneof![Just(5usize << 18), Just(16 << 20)],
    ) {
        let mut pair = Pair::new(arena_bytes);
        steps.into_iter().for_each(|step| pair.take(step));
        pair.settle();
        pair.check_all_arrived();
        for end in &pair.ends {
            prop_assert_eq!(end.arena.usage().0, idle_bytes(arena_bytes), "buffers are lost");
        }
    }

    #[test]
    fn after_a_break_a_prefix_has_arrived_and_nothing_is_held(
        steps in prop::collection::vec(step(), 1..80),
        unanswered in 0usize..20,
    ) {
        let mut pair = Pair::new(4 << 20);
        steps.into_iter().for_each(|step| pair.take(step));
        (0..unanswered).for_each(|_| {
            pair.perform(0, false);
        });
        pair.ends.iter_mut().for_each(|end| end.deliver(false));
        for side in 0..2 {
            let due: Vec<_> = pair.sent[side].iter().map(|(n, len)| (*n, contents(*n, *len))).collect();
            prop_assert!(due.starts_with(&pair.ends[1 - side].got));
        }
        for end in pair.ends {
            let End { arena, staging, link, held, .. } = end;
            drop((link, held, staging));
            prop_assert_eq!(arena.usage().0, 0, "buffers are lost with the link");
        }
    }

    #[test]
    fn what_a_hostile_peer_sends_is_refused_or_harmless(
        messages in prop::collection::vec((0..RECEIVES, 0u32..5000, any::<u32>(), prop::collection::vec(any::<u8>(), 0..64)), 1..60),
    ) {
        let mut pair = Pair::new(4 << 20);
        let end = &mut pair.ends[0];
        end.link.push(frame(0, 131_072, &end.arena)).unwrap();
        end.fill();
        for (slot, bytes, imm, head) in messages {
            let Some(at) = end.receives.iter().position(|receive| receive.slot == slot) else { continue };
            let receive = end.receives.remove(at).unwrap();
            // Half of them with a plausible kind.
            let imm = if imm & 1 == 0 { imm } else { imm & 0x000f_0007 | (imm >> 8 & 7) << 28 };
            write_to(receive.head, &head);
            if end.link.received(receive.slot, bytes, imm).is_err() {
                return Ok(());
            }
            end.fill();
            end.deliver(false);
        }
    }
}

#[test]
fn a_valid_header_with_lying_lengths_is_refused() {
    type Due = fn(&LinkError) -> bool;
    let cases: [(Kind, usize, u32, Due); 5] = [
        // A payload that did not come.
        (Kind::Frame, 4096, HEAD_BYTES as u32, |error| matches!(error, LinkError::Length(_))),
        // More than a block inside a message.
        (Kind::Frame, 8192, HEAD_BYTES as u32 + 8192, |error| matches!(error, LinkError::Length(_))),
        // To be fetched although it is small.
        (Kind::Large, 4096, HEAD_BYTES as u32, |error| matches!(error, LinkError::Length(_))),
        // A descriptor that says other than the header.
        (Kind::Large, 8192, HEAD_BYTES as u32, |error| matches!(error, LinkError::Part(_))),
        (Kind::Part, 8192, HEAD_BYTES as u32, |error| matches!(error, LinkError::Part(_))),
    ];
    for (kind, len, bytes, is_due) in cases {
        let mut end = End::new(4 << 20);
        end.fill();
        let receive = end.receives.pop_front().unwrap();
        let mut head = Vec::new();
        let Frame { header, crcs, .. } = frame(1, len, &end.arena);
        header.encode_into(&crcs, &mut head);
        head.resize(HEAD_BYTES, 0);
        Descriptor { addr: 1 << 20, key: 1, len: 1 << 20, window: 0 }.encode_into(&mut head);
        write_to(receive.head, &head);
        let imm = message::Immediate { kind, credits: 0, value: 0 }.encode();
        let refused = end.link.received(receive.slot, bytes, imm).unwrap_err();
        assert!(is_due(&refused), "{kind:?} of {len} bytes: {refused:?}");
    }
}

#[test]
fn credits_and_windows_that_do_not_exist_are_refused() {
    let mut end = End::new(4 << 20);
    end.fill();
    for (kind, credits, value) in [(Kind::Credits, 1, 0), (Kind::Done, 0, 0), (Kind::Done, 0, 999)] {
        let receive = end.receives.pop_front().unwrap();
        let imm = message::Immediate { kind, credits, value }.encode();
        let refused = end.link.received(receive.slot, 0, imm).unwrap_err();
        assert!(matches!(refused, LinkError::Credits | LinkError::Window(_)), "{refused:?}");
        end = End::new(4 << 20);
        end.fill();
    }
}

#[test]
fn a_small_write_is_one_work_request_without_a_copy_and_a_large_one_two() {
    let mut pair = Pair::new(16 << 20);
    let end = &mut pair.ends[0];
    let small = frame(1, 4096, &end.arena);
    let at = small.payload.as_ref().unwrap().as_ptr() as u64;
    end.link.push(small).unwrap();
    end.fill();
    let works: Vec<Work> = end.sends.iter().map(|posted| posted.work).collect();
    assert!(
        matches!(works.as_slice(), [Work::Message { payload: Some(span), .. }] if span.addr == at),
        "{works:?}"
    );
    let large = frame(2, 131_072, &end.arena);
    let at = large.payload.as_ref().unwrap().as_ptr() as u64;
    end.sends.clear();
    end.link.push(large).unwrap();
    end.fill();
    let works: Vec<Work> = end.sends.iter().map(|posted| posted.work).collect();
    assert!(
        matches!(works.as_slice(), [Work::Bind { span, .. }, Work::Message { payload: None, .. }] if span.addr == at),
        "{works:?}"
    );
}

#[test]
fn nothing_is_sent_before_the_grant_and_probes_come_through() {
    let mut pair = Pair::new(4 << 20);
    let end = &mut pair.ends[0];
    end.link = Link::new(&end.arena, &KEYS).unwrap();
    end.receives.clear();
    end.link.signal(Kind::Probe);
    end.link.push(frame(0, 4096, &end.arena)).unwrap();
    end.fill();
    assert!(end.sends.is_empty() && end.receives.len() == usize::from(RECEIVES));
    end.link.grant(RECEIVES);
    end.fill();
    assert_eq!(pair.perform(0, true), Some(Signal::Probe));
}

#[test]
fn two_sides_that_have_used_up_their_credits_both_go_on() {
    let mut pair = Pair::new(16 << 20);
    for _ in 0..3 * RECEIVES {
        (0..2).for_each(|side| pair.take(Step::Push { side, len: 100 }));
    }
    // Both send all they may before either has received anything.
    pair.ends.iter_mut().for_each(End::fill);
    pair.settle();
    pair.check_all_arrived();
}

#[test]
fn a_payload_that_needs_a_copy_gets_through_although_the_arena_is_full_of_those_behind_it() {
    let mut pair = Pair::new(2 << 20);
    // Beyond what the arena serves, so from the heap.
    pair.take(Step::Push { side: 0, len: 1 << 20 });
    while let Ok(block) = pair.ends[0].arena.alloc(4096) {
        let (end, request) = (&mut pair.ends[0], pair.sent[0].len() as u64);
        end.link.push(frame_in(request, block)).unwrap();
        pair.sent[0].push((request, 4096));
    }
    pair.settle();
    pair.check_all_arrived();
}

/// Heap allocations of this thread during a call.
fn counted<R>(allocations: &mut u64, call: impl FnOnce() -> R) -> R {
    let before = allocations_of_this_thread();
    let result = call();
    *allocations += allocations_of_this_thread() - before;
    result
}

#[test]
fn small_frames_both_ways_allocate_nothing_once_all_has_its_size() {
    const FRAMES: u64 = 2_000;
    const WARM: u64 = 500;
    let mut pair = Pair::new(16 << 20);
    let mut messages = 0;
    for request in 0..FRAMES {
        if request == WARM {
            messages = 0;
            pair.ends.iter_mut().for_each(|end| end.allocations = 0);
        }
        for side in 0..2 {
            let block = pair.ends[side].arena.alloc(4096).unwrap();
            let frame = frame_in(request, block);
            let end = &mut pair.ends[side];
            counted(&mut end.allocations, || end.link.push(frame)).unwrap();
            let memory = Memory { arena: &end.arena, staging: &end.staging };
            counted(&mut end.allocations, || end.link.fill(memory, &mut end.batch));
            let (receives, work) = (end.batch.receives.clone(), end.batch.work.clone());
            end.receives.extend(receives);
            for (at, work) in work.into_iter().enumerate() {
                messages += 1;
                let seq = (end.batch.first_seq + at as u64) as u32 & outgoing::SEQ_MASK;
                end.sends.push_back(Posted { seq, work });
            }
            while !pair.ends[side].sends.is_empty() {
                // The model copies into the heap, which the links do not do.
                pair.perform(side, true);
            }
            let mut got = 0;
            let end = &mut pair.ends[1 - side];
            counted(&mut end.allocations, || end.link.deliver(|frame| got += frame.header.payload_len));
            assert_eq!(got, 4096);
        }
    }
    let allocations: u64 = pair.ends.iter().map(|end| end.allocations).sum();
    assert_eq!(allocations, 0, "in {} frames", 2 * (FRAMES - WARM));
    // One work request for each frame: credits go back with frames of the other direction.
    assert_eq!(messages, 2 * (FRAMES - WARM));
}
