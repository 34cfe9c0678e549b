//! Every bound of the metadata store, each with its reason.

/// Length of a tick. Heartbeats go out every second tick; see `ELECTION_TICKS_MIN`.
pub const META_TICK_MS: u64 = 50;
/// Ticks between a leader's heartbeats: three of them fit into the shortest election timeout.
pub const HEARTBEAT_TICKS: usize = 2;
/// Shortest election timeout in ticks (300 ms): three lost heartbeats, and an election well under 1 s.
pub const ELECTION_TICKS_MIN: usize = 6;
/// One more than the longest election timeout in ticks (600 ms): spread enough that split votes are rare.
pub const ELECTION_TICKS_END: usize = 13;
/// Ticks after its start at which the first voter stands for election, the second after twice as many:
/// enough for connections between voters that start together.
pub const START_TICKS: usize = 2;
/// Most voters: beyond seven a larger majority only costs latency.
pub const VOTERS_MAX: usize = 7;
/// Longest address of a voter in bytes: an IPv6 address with a port has 47.
pub const ADDRESS_BYTES_MAX: usize = 64;
/// Committed entries that a new voter may still lack when it begins to vote: what a busy group commits in a few round
/// trips.
pub const CAUGHT_UP_ENTRIES: u64 = 64;
/// Ticks between two attempts of a leader that is to be removed to hand over: longer than one takes.
pub const TRANSFER_RETRY_TICKS: u64 = 8;

/// Longest key in bytes: paths, not documents.
pub const KEY_BYTES_MAX: usize = 512;
/// Longest value in bytes: no value may grow with the cluster, and a few must fit into one message.
pub const VALUE_BYTES_MAX: usize = 128 * 1024;
/// Most bytes of keys and values in one transaction: one log entry, one network message.
pub const TXN_BYTES_MAX: usize = 256 * 1024;
/// Most compares and most writes in one transaction: bounds one step's work.
pub const TXN_OPS_MAX: usize = 1024;
/// Most keys in one `Range` answer.
pub const RANGE_ITEMS_MAX: usize = 10_000;
/// Most bytes of keys and values in one `Range` answer: it travels in one control frame of 1 MiB.
pub const RANGE_BYTES_MAX: usize = 768 * 1024;

/// Requests of this node in progress: beyond it `submit` answers `Busy`.
pub const REQUESTS_MAX: usize = 256;
/// How long a request is retried inside before it fails: longer than two elections.
pub const REQUEST_DEADLINE_MS: u64 = 5_000;
/// Ticks between two attempts of a request at the same leader.
pub const RETRY_TICKS: u64 = 6;
/// Proposals of a leader that are not applied yet: bounds the scan that evaluates a transaction.
pub const PROPOSALS_MAX: usize = 512;
/// Renewals and reads waiting for one leadership confirmation, over all groups.
pub const CONFIRM_MAX: usize = 8_192;
/// Sessions whose answers are remembered. A session is one run of one voter, so 32 restarts would have
/// to happen within a request's deadline before an answer is forgotten too early.
pub const SESSIONS_MAX: usize = 32;

/// Shortest and longest time to live of a lease: below, renewals would be the main load; above, a
/// vanished owner would be believed for too long.
pub const LEASE_TTL_MIN_MS: u64 = 200;
/// See `LEASE_TTL_MIN_MS`.
pub const LEASE_TTL_MAX_MS: u64 = 600_000;
/// Most leases: nodes, cores and a few tools.
pub const LEASES_MAX: usize = 16_384;
/// Most bytes of ephemeral keys and values: they live in memory only, on every voter.
pub const EPHEMERAL_BYTES_MAX: u64 = 16 << 20;
/// A gap between two ticks longer than this is this process's own pause: it must not expire leases.
pub const STALL_TICKS: u64 = 6;
/// Ticks a new leader without ephemeral state waits for another voter to offer it.
pub const EPHEMERAL_WAIT_TICKS: u64 = 8;

/// Raft: bytes of entries in one append message (one entry may exceed it).
pub const APPEND_BYTES_MAX: u64 = 256 * 1024;
/// Raft: append messages on their way to one follower.
pub const APPENDS_INFLIGHT: usize = 32;
/// Raft: bytes of entries proposed and not committed, at most (and at most a quarter of the ring: no
/// voter may have to hold more of them than its ring has room for). Beyond it proposals wait at their
/// origin.
pub const UNCOMMITTED_BYTES_MAX: u64 = 8 << 20;
/// Raft: bytes of committed entries handled in one step: keeps a step of the loop short.
pub const APPLY_BYTES_MAX: u64 = 1 << 20;
/// Largest message between voters: it is carried in one control frame of 1 MiB together with its frame.
pub const MESSAGE_BYTES_MAX: usize = 1_000_000;
/// Bytes of a snapshot in one message.
pub const CHUNK_BYTES: usize = 256 * 1024;
/// Largest snapshot accepted from another voter.
pub const IMAGE_BYTES_MAX: usize = 128 << 20;
/// Ticks after which an unanswered chunk is sent again.
pub const CHUNK_RETRY_TICKS: u64 = 4;
/// Unanswered repetitions of a chunk after which a transfer is given up.
pub const CHUNK_RETRIES_MAX: u32 = 10;

/// Smallest region: two snapshot areas of 1 MiB and a log of 2 MiB.
pub const REGION_BYTES_MIN: u64 = 4 << 20;
/// Usual region.
pub const REGION_BYTES_DEFAULT: u64 = 64 << 20;
/// Bytes of one device read or write of the region, at most (one log batch, one piece of a snapshot).
pub const IO_BYTES_MAX: usize = 256 * 1024;
/// Entries in the log after which it is compacted.
pub const COMPACT_ENTRIES: u64 = 20_000;
/// The log is compacted when it fills more than one part in this many of its ring.
pub const COMPACT_RING_PARTS: u64 = 4;
/// Blocks of the ring that received entries may not fill: room for elections.
pub const RING_RESERVE_BLOCKS: u64 = 64;
/// Applied entries kept in memory behind a compaction, so that a voter that is a little late needs no
/// snapshot.
pub const KEEP_ENTRIES: u64 = 1_000;
/// Bytes of such entries at most.
pub const KEEP_BYTES: u64 = 4 << 20;
/// Part of a snapshot area that keys may not use: dedup table, header, room for every entry's growth.
pub const IMAGE_RESERVE_BYTES: u64 = 320 * 1024;
