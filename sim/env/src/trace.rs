//! What was delivered: a running hash that proves two runs equal, and lines for a person.

use crate::clock::Nanos;
use crate::universe::HostId;
use reactor::{DiskOp, Event, MeshMsg};
use std::cell::Cell;
use wire::{CONTROL_CORE, CoreId, Header};

/// Hash and, when asked for, print of every delivered event.
pub struct Trace {
    hash: u64,
    /// Print a line per event to standard error, between these virtual times.
    pub verbose: Option<(Nanos, Nanos)>,
    /// Says what a mesh message is: its type is the services' own.
    pub describe_mesh: fn(&MeshMsg) -> String,
}

impl Default for Trace {
    fn default() -> Self {
        Self { hash: 0x5151_7c4e_d51e_2c5b, verbose: None, describe_mesh: |_| String::new() }
    }
}

thread_local! {
    /// Virtual time for log lines of the services: the simulator is one thread per universe.
    static LOG_TIME: Cell<Nanos> = const { Cell::new(0) };
}

/// Notes the virtual time of what happens in this thread from now on.
pub fn set_log_time(now: Nanos) {
    LOG_TIME.with(|time| time.set(now));
}

/// Virtual time of the universe that runs in this thread.
pub fn log_time() -> Nanos {
    LOG_TIME.with(Cell::get)
}

/// Virtual time as seconds with microseconds.
pub fn stamp(now: Nanos) -> String {
    format!("{:>4}.{:06}", now / 1_000_000_000, now / 1_000 % 1_000_000)
}

impl Trace {
    /// The hash of everything so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    fn mix(&mut self, word: u64) {
        self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// Notes the delivery of an event.
    pub fn event(&mut self, now: Nanos, host: HostId, core: CoreId, event: &Event) {
        self.mix(now);
        self.mix((host as u64) << 16 | u64::from(core.0));
        match event {
            Event::Timer { token } => {
                self.mix(1);
                self.mix(token.0);
            }
            Event::DiskDone { token, result, op, .. } => {
                self.mix(2 + (u64::from(result.is_ok()) << 8));
                self.mix(token.0);
                if let DiskOp::Read { buf, .. } = op {
                    let first = buf.as_slice().get(..8).and_then(|b| b.try_into().ok());
                    self.mix(first.map_or(0, u64::from_le_bytes));
                }
            }
            Event::Accepted { conn, .. } => self.mix(conn.0 << 8 | 3),
            Event::Connected { conn } => self.mix(conn.0 << 8 | 4),
            Event::Frame { conn, frame } => {
                self.mix(conn.0 << 8 | 5);
                self.header(&frame.header);
                for crc in frame.crcs.as_slice() {
                    self.mix(u64::from(*crc));
                }
            }
            Event::Bytes { conn, bytes } => {
                self.mix(conn.0 << 8 | 6);
                self.mix(bytes.len() as u64);
            }
            Event::Closed { conn, .. } => self.mix(conn.0 << 8 | 7),
            Event::Mesh { from, .. } => self.mix(u64::from(from.0) << 8 | 8),
        }
        if let Some((from, to)) = self.verbose
            && (from..=to).contains(&now)
        {
            eprintln!("{} {} {}", stamp(now), place(host, core), describe(event, self.describe_mesh));
        }
    }

    fn header(&mut self, header: &Header) {
        self.mix(header.kind as u64 | (header.status as u64) << 8 | u64::from(header.payload_len) << 16);
        self.mix(header.request);
        self.mix(u64::from(header.pg.pool.0) << 32 | u64::from(header.pg.index));
        self.mix(header.epoch.0);
        self.mix(header.object.image.0 ^ header.object.index.rotate_left(32));
        self.mix(header.version.epoch.0.rotate_left(32) ^ header.version.counter);
    }
}

/// `n1.0` for a data core, `n1.c` for the control core.
pub fn place(host: HostId, core: CoreId) -> String {
    if core == CONTROL_CORE { format!("h{host}.c") } else { format!("h{host}.{core}") }
}

/// A frame's header in one line, without the fields that are zero.
pub fn describe_header(header: &Header) -> String {
    let mut out = format!("{:?} req={}", header.kind, header.request);
    let mut add = |name: &str, value: String, shown: bool| {
        if shown {
            out.push_str(&format!(" {name}={value}"));
        }
    };
    add("status", format!("{:?}", header.status), header.status != wire::Status::Ok);
    add("pg", header.pg.to_string(), header.pg.pool.0 != 0);
    add("epoch", header.epoch.to_string(), header.epoch.0 != 0);
    add("obj", header.object.to_string(), header.object.pool.0 != 0);
    add("ver", header.version.to_string(), header.version != wire::Version::default());
    add("blk", format!("{}+{}", header.block, header.blocks), header.blocks != 0);
    add("len", header.payload_len.to_string(), header.payload_len != 0);
    add("slice", header.slice.to_string(), header.slice.0 != 0);
    add("prim", header.primary.to_string(), header.primary.0 != 0);
    out
}

fn describe(event: &Event, describe_mesh: fn(&MeshMsg) -> String) -> String {
    match event {
        Event::Timer { token } => format!("timer {:#x}", token.0),
        Event::DiskDone { disk, token, result, op } => {
            format!("disk{} {op:?} token={:#x} {result:?}", disk.0, token.0)
        }
        Event::Accepted { conn, from, .. } => format!("accepted conn={} from {from}", conn.0),
        Event::Connected { conn } => format!("connected conn={}", conn.0),
        Event::Frame { conn, frame } => {
            let mut line = format!("frame conn={} {}", conn.0, describe_header(&frame.header));
            if frame.header.kind == wire::FrameKind::Control
                && let Some(payload) = &frame.payload
                && let Ok(msg) = wire::control::ControlMsg::decode(payload.as_slice())
            {
                let text = format!("{msg:?}");
                line.push(' ');
                line.push_str(text.get(..400).unwrap_or(&text));
            }
            line
        }
        Event::Bytes { conn, bytes } => format!("bytes conn={} {}", conn.0, bytes.len()),
        Event::Closed { conn, reason } => format!("closed conn={} {reason}", conn.0),
        Event::Mesh { from, msg } => format!("mesh from {}: {}", from.0, describe_mesh(msg)),
    }
}
