//! How a data core is set up, and its bounds.

use crate::metrics::CoreMetrics;
use crate::planted::Planted;
use reactor::DiskIndex;
use std::net::SocketAddr;
use std::sync::Arc;
use store::{SliceGeometry, StoreOptions};
use wire::{ClusterId, NodeId};

/// A slice that the core owns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SliceConfig {
    /// The disk it lies on.
    pub disk: DiskIndex,
    /// Where on the disk.
    pub geometry: SliceGeometry,
}

/// Everything a data core needs to know at start.
#[derive(Clone)]
pub struct DataCoreConfig {
    /// The cluster; peers and clients of others are refused.
    pub cluster: ClusterId,
    /// The node this core is part of.
    pub node: NodeId,
    /// Where to listen; port 0 lets the kernel choose.
    pub listen: SocketAddr,
    /// The core's slices, at most `SLICES_MAX`.
    pub slices: Vec<SliceConfig>,
    /// Where to count; made with `CoreMetrics::new` for the same slices.
    pub metrics: Arc<CoreMetrics>,
    /// How the slice stores run.
    pub store: StoreOptions,
    /// Bytes that scrubs on this core may read from its own slices per second; members read as much beside.
    pub scrub_bytes_per_second: u64,
    /// A disk that ends no operation for so long, in seconds, is given up.
    pub disk_timeout_s: u32,
    /// A disk that had nothing to do for so long, in seconds, is asked whether it is there; 0: never.
    pub disk_probe_s: u32,
    /// A deliberate bug, for the simulator's proof that it sees.
    pub planted: Planted,
}

/// Slices one core may own: their store tokens are numbered by a byte.
pub const SLICES_MAX: usize = 128;
/// Client operations of one connection that may be under way: several times any sensible depth, and few
/// enough that all answers fit the connection's send queue (`reactor::SEND_QUEUE_FRAMES`).
pub const CONN_OPS_MAX: u32 = 1024;
/// Client operations of one core under way. Their sub-operations, one per member, must fit one peer
/// connection's send queue beside recovery and peering.
pub const CLIENT_OPS_MAX: usize = 2048;
/// Share of the core's buffer memory up to which client writes are accepted: half. The rest is for what
/// members are sent.
pub const CLIENT_BUFFER_PARTS: (usize, usize) = (1, 2);
/// Sub-operations under way on one core as a member: what several peers with full queues can send. A
/// peer that exceeds it is disconnected and sends again later.
pub const SUB_OPS_MAX: usize = 16_384;
/// Connections a core accepts: bounds the memory of strangers.
pub const CONNS_MAX: usize = 16_384;
/// Sessions whose last incarnation is remembered after their connection is gone: a delayed frame of an
/// older connection must find it.
pub const SESSIONS_MAX: usize = 32_768;
/// PGs one core takes part in: thousands are normal, more is a broken map.
pub const PGS_MAX: usize = 65_536;
/// How long an accepted connection may take to say hello, in milliseconds.
pub const HELLO_TIMEOUT_MS: u64 = 5_000;
/// First pause before a peer is connected again, in milliseconds.
pub const RECONNECT_MIN_MS: u64 = 10;
/// Longest pause before a peer is connected again: a returning node is found within a quarter of the
/// time that failover may take.
pub const RECONNECT_MAX_MS: u64 = 250;
/// How often connections to peers are looked at, in milliseconds: a fifteenth of `UNREACHABLE_TICKS`, which bounds
/// by how much a member is found late.
pub const REACH_TICK_MS: u64 = 100;
/// Looks without a word from a peer after which it is pinged: 500 ms, so that two more fit
/// into the bound below, and idle connections cost two small frames a second.
pub const PING_TICKS: u32 = 5;
/// Looks without a word from a peer after which it is out of reach: its connection is given up, and its PGs go on
/// without it. 1.5 s: three pings unanswered; longer than the lease of a node that is dead, which is not for us to
/// find out, and less than the two seconds within which I/O has to go on.
pub const UNREACHABLE_TICKS: u32 = 15;
/// Looks that a peer gets which was out of reach when it was needed last: 500 ms. Each of them stops I/O.
pub const REJOIN_TICKS: u32 = 5;
/// Looks after which a connection that does not come about is tried anew: 1 s. The kernel's next attempt for one whose
/// first packets were lost would come later and later.
pub const OPENING_TICKS: u32 = 10;
/// Slots of a slice looked at in one step of a listing: some 10 to 20 ns each.
pub const SCAN_SLOTS_PER_STEP: usize = 4096;
/// Objects a member is asked for at once while it is compared by history: 8 KiB of question, 20 KiB of answer, and
/// their look-up stays far below a millisecond.
pub const LOOKUP_OBJECTS: usize = 512;
/// Scanning steps after one event: bounds an event to about a millisecond.
pub const SCAN_STEPS_PER_EVENT: usize = 4;
/// Objects recovered at once in the background on one core while no client is waiting.
pub const RECOVERY_PARALLEL: usize = 16;
/// The same while clients are being served: recovery may cost them a fifth of their latency at most.
pub const RECOVERY_PARALLEL_BUSY: usize = 2;
/// Fewest copies that a change may be made on while others lack its object, whatever the pool's minimum: a block that
/// decays would be the last of its kind, although there are members that could have it.
pub const COPIES_BESIDE_RECOVERY_MIN: u32 = 2;
/// Part of a busy core's work that recovery and scrub may take together, counted as `CLIENT_OP_COST_BYTES` says.
pub const BACKGROUND_SHARE: (u64, u64) = (1, 5);
/// What a client operation costs a core beside its bytes, in bytes: it takes about as long as reading and
/// checking so many.
pub const CLIENT_OP_COST_BYTES: u64 = 32 << 10;
/// Credit that the background may save up, in bytes: one piece of scrub. More would come out in a burst.
pub const BACKGROUND_CREDIT_MAX_BYTES: i64 = 32 << 10;
/// A core that has answered no client for so long is idle, in milliseconds: longer than a slow disk's write.
pub const CLIENT_IDLE_MS: u64 = 20;
/// What recovering an object costs beside its bytes, in bytes.
pub const RECOVERY_COST_BYTES: u64 = 32 << 10;
/// Pause before an object that could not be recovered is tried again, in milliseconds.
pub const RECOVERY_RETRY_MS: u64 = 1_000;
/// What scrubs on a node read per second when nothing is said: a full 4 TB disk in a day, and a small part of what
/// any SSD reads.
pub const SCRUB_BYTES_PER_SECOND: u64 = 48 << 20;
/// How long a disk may end nothing before it is given up when nothing is said, in seconds. Longer than any pause
/// of a healthy drive; shorter than the half minute after which the kernel gives up, because until then the
/// writes of its PGs wait.
pub const DISK_TIMEOUT_S: u32 = 10;
/// How long a disk may have nothing to do before it is asked whether it is there, when nothing is said, in seconds. Short
/// beside the time in which a second disk fails, and beside what somebody who has pulled the wrong drive waits for; one
/// read of 4 KiB in it costs nothing. It keeps drives with moving parts from sleeping, so whoever lets them sleep sets
/// another.
pub const DISK_PROBE_S: u32 = 60;
/// Objects checked by scrubs at once on one core while no client is waiting.
pub const SCRUB_PARALLEL: usize = 4;
/// The same while clients are being served.
pub const SCRUB_PARALLEL_BUSY: usize = 1;
/// Blocks of an object that a deep scrub reads and checks at once: some 20 microseconds of a core. An object whole
/// would hold clients up for four times as long.
pub const SCRUB_PIECE_BLOCKS: u32 = 8;
/// PGs whose scrub may wait on one core: the control core asks for one after the other.
pub const SCRUBS_QUEUED_MAX: usize = 64;
/// Tombstones purged at once.
pub const PURGE_PARALLEL: usize = 8;
/// Objects that have been left behind and are being erased at once: each is two records of the log.
pub const ERASE_PARALLEL: usize = 16;
/// What erasing one costs, in bytes: no data is read or written, only the log grows.
pub const ERASE_COST_BYTES: u64 = 8 << 10;
/// How long erasing leaves a store alone that takes nothing before a checkpoint has ended, in milliseconds: a fraction
/// of what a checkpoint takes.
pub const ERASE_BUSY_MS: u64 = 10;
/// How long after a start, or after PGs have left, what they left behind is looked for, in milliseconds: they leave
/// by the dozen.
pub const STRAYS_FIRST_MS: u64 = 1_000;
/// How long after a pass that had to leave something there the next one is made, in milliseconds; twice as long each
/// time, up to `STRAYS_RETRY_MAX_MS`. A pass takes a core some 15 ns a slot.
pub const STRAYS_RETRY_MS: u64 = 10_000;
/// See `STRAYS_RETRY_MS`: with ten million slots a quarter of a percent of a core.
pub const STRAYS_RETRY_MAX_MS: u64 = 60_000;
/// Shortest time between two reports of a PG whose counts change, in milliseconds.
pub const REPORT_INTERVAL_MS: u64 = 200;
/// Housekeeping: statistics, forgotten peers, repeated reports, in milliseconds.
pub const TICK_MS: u64 = 1_000;
/// Ticks that a primary waits for the record of a newer epoch that a member has shown: records come within
/// milliseconds, after an election of the metadata group within a second.
pub const SUPERSEDED_TICKS_MAX: u32 = 3;
/// How long `Stop` waits for operations in flight, in milliseconds.
pub const STOP_LIMIT_MS: u64 = 500;
/// How long closing a slice may take, in milliseconds, before the stop goes on without it: its disk hangs. The
/// process gives up after eight seconds in all. What is acknowledged is durable anyway.
pub const CLOSE_LIMIT_MS: u64 = 5_000;
/// Messages for the control core that may wait for room in the mesh before reports are dropped (they are
/// repeated): several per PG.
pub const OUTBOX_MAX: usize = 8_192;
