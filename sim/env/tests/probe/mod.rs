//! A server and clients that note what they see, for tests of the simulated network.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "helpers of tests: a failure is the test's; not each uses all"
)]

use reactor::{CloseReason, ConnId, Env, Event, Frame, Framing, IoBuf, Service, Token};
use simenv::clock::{MS, NodeClock, US};
use simenv::universe::{CoreSpec, HostId, Step, Universe};
use std::cell::RefCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use wire::{BlockCrcs, CoreId, FrameKind, Header};

/// What a probe saw.
#[derive(Clone, PartialEq, Debug)]
pub enum Seen {
    Accepted(ConnId),
    Connected(ConnId),
    /// Connection and request number.
    Frame(ConnId, u64),
    Closed(ConnId, CloseReason),
    Refused,
}

#[derive(Default)]
pub struct Log {
    pub seen: Vec<Seen>,
    pub at: Vec<u64>,
    bound: Option<SocketAddr>,
}

pub type Shared = Rc<RefCell<Log>>;

/// Listens, or connects to `to` and sends a numbered frame every `period_us`, reconnecting when it must.
struct Probe {
    log: Shared,
    to: Option<SocketAddr>,
    period_us: u64,
    conn: Option<ConnId>,
    up: bool,
    next: u64,
    /// Bytes of the payload of one in so many frames; the others have none.
    payload: usize,
    every: u64,
}

const PORT: u16 = 700;

impl Probe {
    fn note(&self, env: &dyn Env, seen: Seen) {
        let mut log = self.log.borrow_mut();
        log.seen.push(seen);
        log.at.push(env.now().0);
    }
}

impl Service for Probe {
    fn start(&mut self, env: &mut dyn Env) {
        match self.to {
            None => {
                let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
                self.log.borrow_mut().bound = env.listen(at, Framing::Frames, Token(1)).ok();
            }
            Some(to) => {
                self.conn = Some(env.connect(to, Framing::Frames));
                env.set_timer(env.now().plus_ns(self.period_us * US), Token(0));
            }
        }
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { .. } => {
                env.set_timer(env.now().plus_ns(self.period_us * US), Token(0));
                let Some(to) = self.to else { return };
                let Some(conn) = self.conn else {
                    self.conn = Some(env.connect(to, Framing::Frames));
                    return;
                };
                if self.up {
                    let has_payload = self.payload > 0 && self.next.is_multiple_of(self.every);
                    let payload = env.alloc(self.payload).ok().filter(|_| has_payload);
                    let mut header = Header::new(FrameKind::Write, self.next);
                    header.payload_len = payload.as_ref().map_or(0, IoBuf::len) as u32;
                    let crcs = payload.as_ref().map_or(BlockCrcs::default(), |p| BlockCrcs::of(p.as_slice()));
                    if env.send(conn, Frame { header, crcs, payload }).is_ok() {
                        self.next += 1;
                    } else {
                        self.note(env, Seen::Refused);
                    }
                }
            }
            Event::Accepted { conn, .. } => self.note(env, Seen::Accepted(conn)),
            Event::Connected { conn } => {
                self.up = true;
                self.note(env, Seen::Connected(conn));
            }
            Event::Frame { conn, frame } => {
                self.note(env, Seen::Frame(conn, frame.header.request));
                if self.to.is_none() {
                    let header = frame.header.reply(FrameKind::WriteReply, wire::Status::Ok);
                    if env.send(conn, Frame { header, crcs: BlockCrcs::default(), payload: None }).is_err() {
                        self.note(env, Seen::Refused);
                    }
                }
            }
            Event::Closed { conn, reason } => {
                if self.conn == Some(conn) {
                    self.conn = None;
                    self.up = false;
                }
                self.note(env, Seen::Closed(conn, reason));
            }
            _ => {}
        }
    }

    fn flush(&mut self, _env: &mut dyn Env) {}
}

pub fn probe(
    u: &mut Universe,
    host: HostId,
    to: Option<SocketAddr>,
    period_us: u64,
    payload: usize,
) -> Shared {
    mixed(u, host, to, period_us, payload, 1)
}

/// The same with a payload in one of so many frames only.
pub fn mixed(
    u: &mut Universe,
    host: HostId,
    to: Option<SocketAddr>,
    period_us: u64,
    payload: usize,
    every: u64,
) -> Shared {
    let log = Shared::default();
    let probe = Probe { log: log.clone(), to, period_us, conn: None, up: false, next: 1, payload, every };
    let service = Box::new(probe);
    let spec = CoreSpec { id: CoreId(0), arena_bytes: 1 << 20, disks: Vec::new(), service };
    u.spawn(host, spec).unwrap();
    log
}

pub fn address(host: HostId) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1 + host as u8), PORT))
}

pub fn world(seed: u64, hosts: usize) -> Universe {
    let mut u = Universe::new(seed);
    for host in 0..hosts {
        let clock = NodeClock { origin: 1000 * host as u64, drift_ppm: 0, wall_skew_ms: 0 };
        u.add_host(Ipv4Addr::new(10, 0, 0, 1 + host as u8), clock);
    }
    u
}

pub fn run(u: &mut Universe, ns: u64) {
    let end = u.now + ns;
    u.call_at(end, 9);
    while u.step() != Step::Harness(9) {}
}

/// A server on host 0, a client on host 1.
pub fn pair(seed: u64, period_us: u64) -> (Universe, Shared, Shared) {
    let mut u = world(seed, 2);
    let server = probe(&mut u, 0, None, 0, 0);
    run(&mut u, 2 * MS);
    let client = probe(&mut u, 1, Some(address(0)), period_us, 0);
    (u, server, client)
}

pub fn frames(log: &Shared) -> Vec<(ConnId, u64)> {
    let pick = |seen: &Seen| match seen {
        Seen::Frame(conn, request) => Some((*conn, *request)),
        _ => None,
    };
    log.borrow().seen.iter().filter_map(pick).collect()
}

pub fn closings(log: &Shared) -> Vec<CloseReason> {
    let pick = |seen: &Seen| match seen {
        Seen::Closed(_, reason) => Some(*reason),
        _ => None,
    };
    log.borrow().seen.iter().filter_map(pick).collect()
}
