//! The seam: what a state machine may ask of the world, and what the world tells it.
//!
//! The contract, the same in production and in simulation:
//!
//! - A core is one thread of control. It owns one `Service`. The loop reaps a batch of events, gives
//!   each to `Service::event`, then calls `Service::flush` once: the place to close a group commit.
//!   Then everything submitted meanwhile goes out.
//! - No call of the environment blocks, and none re-enters the service: results come as later events.
//! - Submission may be refused when a bound is reached; nothing has happened then.
//! - Every accepted disk operation brings exactly one `DiskDone`, in any order. Operations in flight
//!   together may be performed in any order.
//! - Frames of one connection arrive in order, once, or the connection ends with `Closed`. After that
//!   it is unknown which of the frames last sent have arrived.
//! - `now` never goes backwards within a core and differs between nodes in origin and (slightly) in rate.

use crate::buf::{Arena, IoBuf, NoBuffers};
use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use thiserror::Error;
use wire::{BlockCrcs, CoreId, Header};

/// Monotonic time in nanoseconds since an arbitrary origin of this node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Mono(pub u64);

impl Mono {
    /// This time plus nanoseconds, saturating.
    pub fn plus_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
    /// This time plus milliseconds, saturating.
    pub fn plus_ms(self, ms: u64) -> Self {
        self.plus_ns(ms.saturating_mul(1_000_000))
    }
    /// Nanoseconds from `earlier` to this, zero when it is not earlier.
    pub fn since(self, earlier: Mono) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Wall clock, milliseconds since 1970: for people and logs, never for ordering.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct WallMs(pub u64);

/// What a submitter attaches to an operation to recognise its completion. By convention the top byte
/// says which part of the service it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Default)]
pub struct Token(pub u64);

/// A disk of this core's environment, an index given by whoever assembled it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Default)]
pub struct DiskIndex(pub u16);

/// A connection. Never reused within a core's life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Default)]
pub struct ConnId(pub u64);

/// Time.
pub trait Clock {
    /// Monotonic time. Cheap: the loop reads the clock once per batch.
    fn now(&self) -> Mono;
    /// Wall clock, for people.
    fn wall(&self) -> WallMs;
}

/// Randomness: one seeded stream per core.
pub trait Rng {
    /// 64 uniformly distributed bits.
    fn random(&mut self) -> u64;
}

/// Timers without cancellation: owners ignore a token that no longer means anything.
pub trait Timers {
    /// Delivers `Event::Timer { token }` once, at or soon after `at`.
    fn set_timer(&mut self, at: Mono, token: Token);
}

/// What a device promises.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskInfo {
    /// Usable bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Writes of up to this many bytes, aligned to it, are never torn: 512 or 4096.
    pub atomic_bytes: u32,
    /// Completed writes survive a power cut without a flush (power-loss protection, or written
    /// through). When false, a write is durable only after a later `Flush`, or when `durable` was set.
    pub write_through: bool,
}

/// A disk operation. Offsets and lengths are multiples of 4096, buffers are block-aligned in memory.
pub enum DiskOp {
    /// Fills `buf` from `offset`.
    Read {
        /// Bytes from the start of the disk.
        offset: u64,
        /// Destination; its length is the length to read. Must be the only handle to its memory.
        buf: IoBuf,
    },
    /// Writes `bufs`, one behind the other, to `offset`.
    Write {
        /// Bytes from the start of the disk.
        offset: u64,
        /// Sources, at most `IOV_MAX` of them. The vector comes back with the completion for reuse.
        bufs: Vec<IoBuf>,
        /// The completion means durable (FUA, or O_DSYNC), whatever `DiskInfo::write_through` says.
        durable: bool,
    },
    /// Makes every write completed before its submission durable.
    Flush,
    /// Says that a range's contents are no longer needed; reads of it return anything.
    Discard {
        /// Bytes from the start of the disk.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl fmt::Debug for DiskOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { offset, buf } => write!(f, "Read({offset}, {})", buf.len()),
            Self::Write { offset, bufs, durable } => {
                write!(
                    f,
                    "Write({offset}, {}, durable={durable})",
                    bufs.iter().map(IoBuf::len).sum::<usize>()
                )
            }
            Self::Flush => write!(f, "Flush"),
            Self::Discard { offset, len } => write!(f, "Discard({offset}, {len})"),
        }
    }
}

/// Most buffers in one `DiskOp::Write`: the kernel's UIO_MAXIOV is 1024; 256 MiB-free small vectors
/// keep one submission's kernel work bounded.
pub const IOV_MAX: usize = 256;

/// Why a disk operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum DiskError {
    /// The device reported an error; the errno, 0 when there is none.
    #[error("device error (errno {0})")]
    Io(i32),
    /// The backing file system is full (thin file).
    #[error("no space left on the device")]
    NoSpace,
    /// The range lies outside the disk.
    #[error("range outside the disk")]
    OutOfRange,
    /// The device is gone.
    #[error("device is gone")]
    Gone,
    /// The disk has become smaller since it was opened: what lay behind its end is lost.
    #[error("disk has been cut short")]
    Truncated,
}

/// A bound was reached and nothing was submitted; try after the next completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("queue is full")]
pub struct Full;

/// Disks of this core.
pub trait Disk {
    /// What the device promises; `None` for an index that does not exist.
    fn disk_info(&self, disk: DiskIndex) -> Option<DiskInfo>;
    /// Starts an operation. On refusal the operation comes back untouched.
    fn submit(&mut self, disk: DiskIndex, op: DiskOp, token: Token) -> Result<(), (Full, DiskOp)>;
}

/// A frame to send or as received.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The header; `payload_len` must equal the payload's length.
    pub header: Header,
    /// Checksums of the payload (see `wire::frame`).
    pub crcs: BlockCrcs,
    /// The payload; `None` when empty. Received data payloads lie block-aligned in the arena.
    /// Receivers verify payload checksums themselves: the transport verifies the header only.
    pub payload: Option<IoBuf>,
}

/// How the bytes of a connection are cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Framing {
    /// `wire::frame` frames.
    Frames,
    /// Plain bytes (HTTP).
    Raw,
}

/// Why a connection ended or never came to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum CloseReason {
    /// We called `close`.
    #[error("closed by this side")]
    Local,
    /// The peer closed in an orderly way.
    #[error("closed by the peer")]
    Peer,
    /// Reset or any other transport error (errno).
    #[error("connection broke (errno {0})")]
    Broken(i32),
    /// The host is there and nothing listens.
    #[error("connection refused")]
    Refused,
    /// No answer in time.
    #[error("connection timed out")]
    TimedOut,
    /// The peer sent something that is not a frame.
    #[error("protocol violation: {0}")]
    Protocol(wire::HeaderError),
}

/// Connections.
pub trait Net {
    /// Starts listening. Port 0 lets the kernel choose; the bound address is returned.
    fn listen(&mut self, at: SocketAddr, framing: Framing, token: Token) -> Result<SocketAddr, NetError>;
    /// Starts connecting: `Connected` or `Closed` follows. Times out after `CONNECT_TIMEOUT_MS`.
    fn connect(&mut self, to: SocketAddr, framing: Framing) -> ConnId;
    /// Queues a frame. `Err(Full)` means that the connection's bounded queue has no room: back-pressure.
    /// Frames sent to a connection that is closed or unknown vanish: `Closed` was or will be delivered.
    fn send(&mut self, conn: ConnId, frame: Frame) -> Result<(), Full>;
    /// Queues raw bytes on a `Framing::Raw` connection.
    fn send_bytes(&mut self, conn: ConnId, bytes: IoBuf) -> Result<(), Full>;
    /// Closes at once, dropping what is queued, or after what is queued has been sent. `Closed(Local)`
    /// follows.
    fn close(&mut self, conn: ConnId, after_flush: bool);
    /// The data payload of the reply frame with this `request` on this connection may be received
    /// straight into `into`. Optional: a transport may ignore it and deliver an arena buffer.
    fn expect(&mut self, _conn: ConnId, _request: u64, _into: IoBuf) {}
}

/// How long a transport waits for a connection to be established.
pub const CONNECT_TIMEOUT_MS: u64 = 1000;
/// How long the next byte of a frame that has begun to arrive may take, in milliseconds: as long as a
/// sender's kernel waits for acknowledgements. Then the connection ends with `CloseReason::TimedOut`; until
/// then the sender holds memory of ours. Time in which we do not read, for want of buffers, does not count.
pub const FRAME_STALL_MS: u64 = 5000;
/// Frames that may wait in one connection's send queue: a client's full depth plus recovery.
pub const SEND_QUEUE_FRAMES: usize = 4096;

/// Why listening failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum NetError {
    /// The address is taken.
    #[error("address in use")]
    InUse,
    /// Any other failure (errno).
    #[error("socket error (errno {0})")]
    Os(i32),
}

/// A message between cores of one node: control only. The receiver downcasts.
pub type MeshMsg = Box<dyn Any + Send>;

/// Rings between the cores of this node.
pub trait Mesh {
    /// Which core this is.
    fn core(&self) -> CoreId;
    /// Queues a message for another core. On refusal the message comes back.
    fn post(&mut self, to: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)>;
}

/// Messages in one mesh ring.
pub const MESH_RING_MESSAGES: usize = 1024;

/// Buffers.
pub trait Buffers {
    /// The core's arena.
    fn arena(&self) -> &Arena;
    /// A buffer of `len` bytes with unspecified contents.
    fn alloc(&self, len: usize) -> Result<IoBuf, NoBuffers> {
        self.arena().alloc(len)
    }
}

/// Everything a service may ask for.
pub trait Env: Clock + Rng + Timers + Disk + Net + Mesh + Buffers {}
impl<T: Clock + Rng + Timers + Disk + Net + Mesh + Buffers> Env for T {}

/// What the world tells a service.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "frames are the common case, and a box would be an allocation each"
)]
pub enum Event {
    /// A timer's time has come.
    Timer {
        /// As given.
        token: Token,
    },
    /// A disk operation ended. The operation comes back with its buffers.
    DiskDone {
        /// The disk.
        disk: DiskIndex,
        /// As given.
        token: Token,
        /// What became of it.
        result: Result<(), DiskError>,
        /// The operation; a successful read's buffer is filled.
        op: DiskOp,
    },
    /// A listener has a new connection.
    Accepted {
        /// The new connection.
        conn: ConnId,
        /// The listener's token.
        token: Token,
        /// Where it comes from.
        from: SocketAddr,
    },
    /// Our connection is established.
    Connected {
        /// The connection.
        conn: ConnId,
    },
    /// A frame arrived.
    Frame {
        /// The connection.
        conn: ConnId,
        /// The frame.
        frame: Frame,
    },
    /// Bytes arrived on a raw connection.
    Bytes {
        /// The connection.
        conn: ConnId,
        /// The bytes.
        bytes: IoBuf,
    },
    /// The connection is no more. The last event of a connection.
    Closed {
        /// The connection.
        conn: ConnId,
        /// Why.
        reason: CloseReason,
    },
    /// A message from another core.
    Mesh {
        /// The sender.
        from: CoreId,
        /// The message.
        msg: MeshMsg,
    },
}

/// The state machine a core runs.
pub trait Service {
    /// Called once, before any event.
    fn start(&mut self, env: &mut dyn Env);
    /// Called before a batch of several events, which come one by one right after: a service may ask memory for what
    /// they will need. It must not matter whether this is called.
    fn coming(&self, _events: &VecDeque<Event>) {}
    /// Called for every event. Bounded work.
    fn event(&mut self, env: &mut dyn Env, event: Event);
    /// Called once after every batch of events, and never without one.
    fn flush(&mut self, env: &mut dyn Env);
    /// Whether the core may end (after a stop was asked for through the mesh).
    fn finished(&self) -> bool {
        false
    }
}
