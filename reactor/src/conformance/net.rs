//! Scenarios about connections.

use super::probe::{Actor, Address, Log, check, core, has_pattern, pattern, run_for, same};
use super::{Scenario, World};
use crate::buf::IoBuf;
use crate::env::{CloseReason, ConnId, Env, Event, FRAME_STALL_MS, Frame, Framing, Mono, NetError, Token};
use std::net::SocketAddr;
use wire::{BlockCrcs, FrameKind, Header, Status};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "net: frames arrive in order and intact", run: order },
        Scenario { name: "net: a connection to nobody is refused", run: refused },
        Scenario { name: "net: closing is told once on both sides", run: close_once },
        Scenario { name: "net: raw bytes arrive whole before the orderly end", run: raw },
        Scenario { name: "net: what is no frame closes the connection, and only that", run: garbage },
        Scenario { name: "net: a frame that stops half-way ends its connection", run: stalled },
        Scenario { name: "net: a receiver without buffers slows the sender and loses nothing", run: starved },
        Scenario { name: "net: a taken address is refused", run: taken },
        Scenario { name: "net: an expected reply brings its payload", run: expected },
    ]
}

/// Payload lengths that frames take in turn: none, parts of blocks, blocks, whole objects, and control
/// payloads beyond what the arena serves.
const LENGTHS: [usize; 8] = [0, 4096, 131_072, 12_288, 4096, 0, 300_000, 65_536];

/// Frame number `n`; `None` while there is no buffer for it.
fn frame(env: &mut dyn Env, n: u64, len: usize) -> Option<Frame> {
    let kind = if len > wire::frame::DATA_PAYLOAD_BYTES_MAX { FrameKind::Control } else { FrameKind::Write };
    let mut header = Header::new(kind, n);
    header.payload_len = len as u32;
    if len == 0 {
        return Some(Frame { header, crcs: BlockCrcs::default(), payload: None });
    }
    let mut payload = env.alloc(len).ok()?;
    pattern(n, payload.as_mut_slice()?);
    let crcs = if kind.has_block_crcs() {
        BlockCrcs::of(payload.as_slice())
    } else {
        BlockCrcs::one(wire::block_crc(payload.as_slice()))
    };
    Some(Frame { header, crcs, payload: Some(payload) })
}

/// Whether the frame is as `frame` made it.
fn intact(frame: &Frame, n: u64, len: usize) -> bool {
    let bytes = frame.payload.as_ref().map_or(&[][..], IoBuf::as_slice);
    let crcs = if frame.header.kind.has_block_crcs() || len == 0 {
        frame.crcs.matches(bytes)
    } else {
        frame.crcs.as_slice() == [wire::block_crc(bytes)]
    };
    let aligned = (bytes.as_ptr() as usize).is_multiple_of(4096) || bytes.is_empty();
    frame.header.request == n && bytes.len() == len && crcs && aligned && has_pattern(n, bytes)
}

fn length(n: u64) -> usize {
    LENGTHS.get(n as usize % LENGTHS.len()).copied().unwrap_or(0)
}

/// A client's first step: connects as soon as the server has said where it listens. Tries again by timer.
fn connect_when_known(env: &mut dyn Env, at: &Address, framing: Framing) -> Option<ConnId> {
    match at.last() {
        Some(at) => Some(env.connect(at, framing)),
        None => {
            env.set_timer(env.now().plus_ms(1), Token(u64::MAX));
            None
        }
    }
}

fn listen(env: &mut dyn Env, at: SocketAddr, framing: Framing, out: &Address) {
    if let Ok(bound) = env.listen(at, framing, Token(5)) {
        out.push(bound);
    }
}

/// Sends frames one after the other, as the queue and the buffers allow.
struct Stream {
    at: Address,
    conn: Option<ConnId>,
    next: u64,
    count: u64,
    length: fn(u64) -> usize,
}

impl Stream {
    fn pump(&mut self, env: &mut dyn Env) {
        let Some(conn) = self.conn else { return };
        while self.next < self.count {
            let sent = frame(env, self.next, (self.length)(self.next))
                .is_some_and(|frame| env.send(conn, frame).is_ok());
            if !sent {
                env.set_timer(env.now().plus_ms(1), Token(0));
                return;
            }
            self.next += 1;
        }
    }

    fn actor(at: Address, count: u64, length: fn(u64) -> usize) -> Actor<Self> {
        Actor::new(
            Self { at, conn: None, next: 0, count, length },
            |state, env| state.conn = connect_when_known(env, &state.at, Framing::Frames),
            |state, env, event| match event {
                Event::Timer { token: Token(u64::MAX) } => {
                    state.conn = connect_when_known(env, &state.at, Framing::Frames);
                }
                Event::Timer { .. } | Event::Connected { .. } => state.pump(env),
                _ => {}
            },
        )
    }
}

fn order(world: &mut dyn World) -> Result<(), String> {
    const FRAMES: u64 = 1500;
    let (log, at) = (Log::new(), Address::new());
    let (seen, out, into, here) = (log.clone(), at.clone(), at, world.listen_address(0));
    world.start(vec![
        core(0, 0, &[], move || {
            Actor::new(
                (seen, out, here, 0u64),
                |(_, out, here, _), env| listen(env, *here, Framing::Frames, out),
                |(seen, _, _, next), _, event| {
                    if let Event::Frame { frame, .. } = event {
                        seen.push(intact(&frame, *next, length(*next)));
                        *next += 1;
                    }
                },
            )
        }),
        core(1, 0, &[], move || Stream::actor(into, FRAMES, length)),
    ])?;
    run_for(world, "frames", &log, FRAMES as usize)?;
    match log.all().iter().position(|whole| !whole) {
        None => Ok(()),
        Some(at) => Err(format!("frame {at} is not what was sent as number {at}")),
    }
}

fn refused(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let (seen, to) = (log.clone(), world.refusing_address(1));
    world.start(vec![core(0, 0, &[], move || {
        Actor::new(
            (seen, to, ConnId(0)),
            |(_, to, conn), env| *conn = env.connect(*to, Framing::Frames),
            |(seen, _, own), env, event| match event {
                Event::Closed { conn, reason } => {
                    seen.push((conn == *own, Some(reason)));
                    // Long enough for a second word to come, if one does.
                    env.set_timer(env.now().plus_ms(50), Token(0));
                }
                Event::Timer { .. } => seen.push((true, None)),
                _ => seen.push((false, None)),
            },
        )
    })])?;
    run_for(world, "refusal", &log, 2)?;
    same("events", log.all(), vec![(true, Some(CloseReason::Refused)), (true, None)])
}

fn close_once(world: &mut dyn World) -> Result<(), String> {
    type Words = Log<(&'static str, Option<CloseReason>)>;
    let (server, client, at) = (Words::new(), Words::new(), Address::new());
    let (log, words, out, into) = (server.clone(), client.clone(), at.clone(), at);
    let here = world.listen_address(0);
    world.start(vec![
        core(0, 0, &[], move || {
            Actor::new(
                (log, out, here),
                |(_, out, here), env| listen(env, *here, Framing::Frames, out),
                |(log, ..), env, event| match event {
                    Event::Accepted { token: Token(5), .. } => log.push(("accepted", None)),
                    Event::Frame { .. } => log.push(("frame", None)),
                    Event::Closed { conn, reason } => {
                        log.push(("closed", Some(reason)));
                        // Vanishes: the connection is no more.
                        if let Some(late) = frame(env, 9, 0) {
                            log.push((if env.send(conn, late).is_ok() { "vanished" } else { "full" }, None));
                        }
                        env.close(conn, false);
                        env.set_timer(env.now().plus_ms(50), Token(0));
                    }
                    Event::Timer { .. } => log.push(("end", None)),
                    _ => log.push(("surprise", None)),
                },
            )
        }),
        core(1, 0, &[], move || {
            Actor::new(
                (words, into),
                |(_, into), env| {
                    connect_when_known(env, into, Framing::Frames);
                },
                |(words, into), env, event| match event {
                    Event::Timer { token: Token(u64::MAX) } => {
                        connect_when_known(env, into, Framing::Frames);
                    }
                    Event::Connected { conn } => {
                        words.push(("connected", None));
                        for n in 0..3 {
                            if let Some(frame) = frame(env, n, 4096) {
                                let _ = env.send(conn, frame);
                            }
                        }
                        env.close(conn, true);
                    }
                    Event::Closed { reason, .. } => {
                        words.push(("closed", Some(reason)));
                        env.set_timer(env.now().plus_ms(50), Token(0));
                    }
                    Event::Timer { .. } => words.push(("end", None)),
                    _ => words.push(("surprise", None)),
                },
            )
        }),
    ])?;
    run_for(world, "server's events", &server, 7)?;
    run_for(world, "client's events", &client, 3)?;
    let due = vec![
        ("accepted", None),
        ("frame", None),
        ("frame", None),
        ("frame", None),
        ("closed", Some(CloseReason::Peer)),
        ("vanished", None),
        ("end", None),
    ];
    same("server's events", server.all(), due)?;
    let due = vec![("connected", None), ("closed", Some(CloseReason::Local)), ("end", None)];
    same("client's events", client.all(), due)
}

fn raw(world: &mut dyn World) -> Result<(), String> {
    const BYTES: usize = 200_000;
    let (log, at) = (Log::<(Vec<u8>, Option<CloseReason>)>::new(), Address::new());
    let (seen, out, into, here) = (log.clone(), at.clone(), at, world.listen_address(0));
    world.start(vec![
        core(0, 0, &[], move || {
            Actor::new(
                (out, here, Vec::new()),
                |(out, here, _), env| listen(env, *here, Framing::Raw, out),
                |(_, _, asked), env, event| {
                    let Event::Bytes { conn, bytes } = event else { return };
                    // Even two bytes may come in two pieces.
                    asked.extend_from_slice(bytes.as_slice());
                    // The answer to "go": everything at once, then the end.
                    if asked == b"go" {
                        let mut all = vec![0; BYTES];
                        pattern(3, &mut all);
                        for part in all.chunks(70_000) {
                            if let Ok(part) = IoBuf::copy_of(part) {
                                let _ = env.send_bytes(conn, part);
                            }
                        }
                        env.close(conn, true);
                    }
                },
            )
        }),
        core(1, 0, &[], move || {
            Actor::new(
                (seen, into, Vec::new()),
                |(_, into, _), env| {
                    connect_when_known(env, into, Framing::Raw);
                },
                |(seen, into, got), env, event| match event {
                    Event::Timer { .. } => {
                        connect_when_known(env, into, Framing::Raw);
                    }
                    Event::Connected { conn } => {
                        if let Ok(go) = IoBuf::copy_of(b"go") {
                            let _ = env.send_bytes(conn, go);
                        }
                    }
                    Event::Bytes { bytes, .. } => got.extend_from_slice(bytes.as_slice()),
                    Event::Closed { reason, .. } => seen.push((std::mem::take(got), Some(reason))),
                    _ => {}
                },
            )
        }),
    ])?;
    run_for(world, "end of the connection", &log, 1)?;
    let (bytes, reason) = log.last().unwrap_or_default();
    same("bytes", bytes.len(), BYTES)?;
    same("reason", reason, Some(CloseReason::Peer))?;
    check(has_pattern(3, &bytes), "the bytes are not those sent")
}

/// Makes what a connection begins with.
type Opening = fn(&mut dyn Env) -> Vec<u8>;

/// Connects to where frames are expected, and sends bytes of its own making once.
fn raw_sender(at: Address, opening: Opening) -> Actor<(Address, Opening)> {
    Actor::new(
        (at, opening),
        |(at, _), env| {
            connect_when_known(env, at, Framing::Raw);
        },
        |(at, opening), env, event| match event {
            Event::Timer { .. } => {
                connect_when_known(env, at, Framing::Raw);
            }
            Event::Connected { conn } => {
                if let Ok(bytes) = IoBuf::copy_of(&opening(env)) {
                    let _ = env.send_bytes(conn, bytes);
                }
            }
            _ => {}
        },
    )
}

fn garbage(world: &mut dyn World) -> Result<(), String> {
    const FRAMES: u64 = 20;
    let (log, good, at) = (Log::<bool>::new(), Log::<u64>::new(), Address::new());
    let (seen, whole, out, into, too) = (log.clone(), good.clone(), at.clone(), at.clone(), at);
    let here = world.listen_address(0);
    world.start(vec![
        core(0, 0, &[], move || {
            Actor::new(
                (seen, whole, out, here),
                |(_, _, out, here), env| listen(env, *here, Framing::Frames, out),
                |(seen, whole, ..), _, event| match event {
                    Event::Frame { frame, .. } => whole.push(frame.header.request),
                    Event::Closed { reason, .. } => {
                        seen.push(matches!(reason, CloseReason::Protocol(_)));
                    }
                    _ => {}
                },
            )
        }),
        core(1, 0, &[], move || raw_sender(into, |_| vec![0x47; 200])),
        core(2, 0, &[], move || Stream::actor(too, FRAMES, |_| 4096)),
    ])?;
    run_for(world, "closed connections", &log, 1)?;
    run_for(world, "good frames", &good, FRAMES as usize)?;
    same("reasons are violations of the protocol", log.all(), vec![true])?;
    same("frames of the good connection", good.all(), (0..FRAMES).collect())
}

/// A whole frame, then one whose payload is not all there.
fn frame_and_a_piece(env: &mut dyn Env) -> Vec<u8> {
    let (mut bytes, mut head) = (Vec::new(), Vec::new());
    for n in 0..2 {
        if let Some(Frame { header, crcs, payload }) = frame(env, n, 4096) {
            header.encode_into(&crcs, &mut head);
            bytes.extend_from_slice(&head);
            bytes.extend_from_slice(payload.as_ref().map_or(&[], |p| p.as_slice()));
        }
    }
    bytes.truncate(bytes.len().saturating_sub(1000));
    bytes
}

fn stalled(world: &mut dyn World) -> Result<(), String> {
    let (log, at) = (Log::new(), Address::new());
    let (seen, out, into, here) = (log.clone(), at.clone(), at, world.listen_address(0));
    world.start(vec![
        core(0, 0, &[], move || {
            Actor::new(
                (seen, out, here, Mono(0)),
                |(_, out, here, _), env| listen(env, *here, Framing::Frames, out),
                |(seen, _, _, since), env, event| match event {
                    Event::Accepted { .. } => *since = env.now(),
                    Event::Frame { frame, .. } => seen.push((Some(frame.header.request), None, 0)),
                    Event::Closed { reason, .. } => {
                        seen.push((None, Some(reason), env.now().since(*since) / 1_000_000));
                    }
                    _ => {}
                },
            )
        }),
        core(1, 0, &[], move || raw_sender(into, frame_and_a_piece)),
    ])?;
    run_for(world, "the frame and the end", &log, 2)?;
    let all = log.all();
    let words: Vec<_> = all.iter().map(|(frame, end, _)| (*frame, *end)).collect();
    same("events", words, vec![(Some(0), None), (None, Some(CloseReason::TimedOut))])?;
    let after_ms = all.last().map_or(0, |(.., ms)| *ms);
    check(after_ms >= FRAME_STALL_MS, format!("ended after {after_ms} ms, which is too early"))
}

fn starved(world: &mut dyn World) -> Result<(), String> {
    const FRAMES: u64 = 60;
    let (log, at) = (Log::new(), Address::new());
    let (seen, out, into, here) = (log.clone(), at.clone(), at, world.listen_address(0));
    struct State {
        seen: Log<bool>,
        out: Address,
        here: SocketAddr,
        held: Vec<Frame>,
        next: u64,
    }
    let mut receiver = core(0, 0, &[], move || {
        Actor::new(
            State { seen, out, here, held: Vec::new(), next: 0 },
            |state, env| {
                listen(env, state.here, Framing::Frames, &state.out);
                env.set_timer(env.now().plus_ms(20), Token(0));
            },
            |state, env, event| match event {
                Event::Frame { frame, .. } => {
                    state.seen.push(intact(&frame, state.next, 131_072));
                    state.next += 1;
                    state.held.push(frame);
                }
                // Buffers come back slowly, one at a time.
                Event::Timer { .. } => {
                    state.held.pop();
                    env.set_timer(env.now().plus_ms(2), Token(0));
                }
                _ => {}
            },
        )
    });
    receiver.arena_bytes = 1 << 20;
    world.start(vec![receiver, core(1, 0, &[], move || Stream::actor(into, FRAMES, |_| 131_072))])?;
    run_for(world, "frames", &log, FRAMES as usize)?;
    check(log.all().iter().all(|whole| *whole), "a frame was lost or damaged")
}

fn taken(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let (seen, here) = (log.clone(), world.listen_address(0));
    world.start(vec![core(0, 0, &[], move || {
        Actor::new(
            (seen, here),
            |(seen, here), env| {
                let first = env.listen(*here, Framing::Frames, Token(1));
                let second = first.and_then(|at| env.listen(at, Framing::Frames, Token(2)));
                seen.push(second);
            },
            |_, _, _| {},
        )
    })])?;
    run_for(world, "listening", &log, 1)?;
    same("second listener", log.last(), Some(Err(NetError::InUse)))
}

fn expected(world: &mut dyn World) -> Result<(), String> {
    /// Requests, and the payload lengths of their replies.
    const REPLIES: [usize; 4] = [4096, 131_072, 0, 8192];
    let (log, at) = (Log::<(u64, bool)>::new(), Address::new());
    let (seen, out, into, here) = (log.clone(), at.clone(), at, world.listen_address(0));
    world.start(vec![
        core(0, 0, &[], move || {
            Actor::new(
                (out, here),
                |(out, here), env| listen(env, *here, Framing::Frames, out),
                |_, env, event| {
                    let Event::Frame { conn, frame: asked } = event else { return };
                    let request = asked.header.request;
                    let len = REPLIES.get(request as usize).copied().unwrap_or(0);
                    if let Some(mut reply) = frame(env, request, len) {
                        let header = asked.header.reply(FrameKind::ReadReply, Status::Ok);
                        reply.header = Header { payload_len: len as u32, ..header };
                        let _ = env.send(conn, reply);
                    }
                },
            )
        }),
        core(1, 0, &[], move || {
            Actor::new(
                (seen, into),
                |(_, into), env| {
                    connect_when_known(env, into, Framing::Frames);
                },
                |(seen, into), env, event| match event {
                    Event::Timer { .. } => {
                        connect_when_known(env, into, Framing::Frames);
                    }
                    Event::Connected { conn } => {
                        for request in 0..REPLIES.len() as u64 {
                            if let Ok(buf) = IoBuf::heap(131_072) {
                                env.expect(conn, request, buf);
                            }
                            let header = Header::new(FrameKind::Read, request);
                            let ask = Frame { header, crcs: BlockCrcs::default(), payload: None };
                            let _ = env.send(conn, ask);
                        }
                    }
                    Event::Frame { frame, .. } => {
                        let n = frame.header.request;
                        let len = REPLIES.get(n as usize).copied().unwrap_or(0);
                        seen.push((n, intact(&frame, n, len)));
                    }
                    _ => {}
                },
            )
        }),
    ])?;
    run_for(world, "replies", &log, REPLIES.len())?;
    same("replies", log.all(), (0..REPLIES.len() as u64).map(|n| (n, true)).collect())
}
