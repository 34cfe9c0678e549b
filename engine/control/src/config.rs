//! How a control core is set up, its bounds, and what it tells whoever assembled the node.

use crate::planted::Planted;
use placement::Disk;
use prometheus::Registry;
use reactor::DiskIndex;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;
use wire::{ClusterId, NodeId, SessionId, SliceId};

/// Time to live of a node's lease, in milliseconds. A dead node is replaced after at most this, an election where it
/// led the metadata, and one transaction, and clients have to go on within a second. A shorter one would put out nodes
/// that are only late: a virtual machine that is moved stands still for a few hundred milliseconds.
pub const LEASE_TTL_MS: u64 = 800;
/// Time between two renewals, in milliseconds: three may be lost.
pub const LEASE_RENEW_MS: u64 = 200;
/// Part of a lease that authority leaves out, in percent: clocks of two nodes may differ in rate by so
/// much. Real ones differ by 0.01 %, a virtual machine's under load by more.
pub const DRIFT_MARGIN_PERCENT: u64 = 10;
/// Connections of clients and nodes: bounds the memory of strangers.
pub const CONNS_MAX: usize = 4_096;
/// HTTP connections: a few scrapers.
pub const HTTP_CONNS_MAX: usize = 64;
/// Bytes of an HTTP request.
pub const HTTP_REQUEST_BYTES_MAX: usize = 8 * 1024;
/// Header lines of an HTTP request.
pub const HTTP_HEADERS_MAX: usize = 64;
/// How long a connection may take to say hello or to send its HTTP request, in milliseconds.
pub const HELLO_TIMEOUT_MS: u64 = 5_000;
/// Metadata requests of one connection under way.
pub const CONN_REQUESTS_MAX: usize = 64;
/// Metadata requests of all connections under way: the voter takes 256, the node's own need room.
pub const CLIENT_REQUESTS_MAX: usize = 192;
/// Prefixes of one subscription.
pub const PREFIXES_MAX: usize = 64;
/// Bytes of one prefix: the longest key.
pub const PREFIX_BYTES_MAX: usize = 512;
/// Bytes of keys and values in one part of a snapshot: a quarter of what a frame may hold, so that
/// encoding one takes far less than a millisecond.
pub const SNAPSHOT_PART_BYTES: usize = 256 * 1024;
/// Keys in one part of a snapshot: an encoded key costs some 60 bytes besides its text.
pub const SNAPSHOT_PART_ITEMS: usize = 2_000;
/// Snapshot parts sent to one connection in one step.
pub const PARTS_PER_STEP: usize = 2;
/// Messages that may wait for one connection besides what the transport queues; beyond it the peer is
/// too slow and is disconnected. It will subscribe again and get a snapshot.
pub const OUTBOX_FRAMES_MAX: usize = 4_096;
/// Bytes that may wait likewise.
pub const OUTBOX_BYTES_MAX: usize = 8 << 20;
/// Snapshots that one connection may have asked for and not received.
pub const SNAPSHOTS_MAX: usize = 4;
/// First pause before a voter is connected again, in milliseconds.
pub const RECONNECT_MIN_MS: u64 = 20;
/// Longest such pause: well below an election timeout.
pub const RECONNECT_MAX_MS: u64 = 200;
/// Housekeeping and metadata ticks, in milliseconds.
pub const TICK_MS: u64 = consensus::META_TICK_MS;
/// Shortest time between two writes of a statistics key, in milliseconds.
pub const STATS_INTERVAL_MS: u64 = 200;
/// PGs in one statistics key: some 90 bytes each, below a value's bound.
pub const STATS_PGS_PER_KEY: usize = 1_000;
/// PG maps resolved in one step: some microseconds each.
pub const FEEDS_PER_STEP: usize = 128;
/// Messages to one data core that may wait for room in its ring before no more are made.
pub const FEED_BACKLOG: usize = 512;
/// Primaries' wishes that may wait; data cores repeat theirs.
pub const WISHES_MAX: usize = 65_536;
/// Wishes in one transaction.
pub const WISHES_PER_TXN: usize = 64;
/// Transactions of wishes on their way at once.
pub const WISH_TXNS_MAX: usize = 16;
/// How long a clean stop waits for others to take its PGs over, in milliseconds: some metadata transactions. Without a
/// director there is nobody to wait for.
pub const STOP_HAND_OVER_MS: u64 = 1_000;
/// How long a clean stop waits for the data cores, in milliseconds: they need 500 themselves.
pub const STOP_CORES_MS: u64 = 2_000;
/// How long a clean stop waits for the lease to be revoked and the others to take over, in milliseconds.
pub const STOP_LEAVE_MS: u64 = 1_000;

/// Where a voter keeps the metadata store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaRegion {
    /// The disk, an index of this core's environment.
    pub disk: DiskIndex,
    /// Start in bytes, a multiple of 4096.
    pub offset: u64,
    /// Length in bytes, see `consensus::REGION_BYTES_DEFAULT`.
    pub len: u64,
}

/// A voter of the metadata group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Voter {
    /// The node.
    pub node: NodeId,
    /// Its control core's address.
    pub addr: SocketAddr,
}

/// Writes the page `/links`: the connections of all cores of the node, as JSON. What they are only the environment
/// knows.
#[derive(Clone)]
pub struct LinksPage(Arc<dyn Fn() -> String + Send + Sync>);

impl LinksPage {
    /// The page that `write` writes.
    pub fn new(write: impl Fn() -> String + Send + Sync + 'static) -> Self {
        Self(Arc::new(write))
    }

    /// The page as of now.
    pub fn text(&self) -> String {
        (self.0)()
    }
}

/// Everything a control core must know.
#[derive(Clone)]
pub struct ControlConfig {
    /// This node; not 0.
    pub node: NodeId,
    /// Its host: the failure domain.
    pub host: String,
    /// The cluster that the node's disks belong to. The first voters create it in the metadata store; a
    /// store of another cluster is refused.
    pub cluster: ClusterId,
    /// Where to listen for clients and other nodes; port 0 lets the kernel choose.
    pub control_listen: SocketAddr,
    /// The address under which others reach this node; replaces an unspecified one in what is published.
    pub advertise: IpAddr,
    /// Where to serve `/metrics`, if anywhere.
    pub http_listen: Option<SocketAddr>,
    /// What `/links` shows; made by whoever assembles the node.
    pub links: Option<LinksPage>,
    /// The nodes that found the metadata group, 1, 3, 5 or 7 of them; later those to ask first who its voters are.
    pub voters: Vec<Voter>,
    /// Where this node keeps the metadata store; needed when it is a voter or may become one.
    pub meta: Option<MetaRegion>,
    /// Data cores of this node: cores 0 up to this.
    pub data_cores: u16,
    /// The node's disks; the slices' sizes are replaced by what their stores say.
    pub disks: Vec<Disk>,
    /// What the node had to start without, for people; published with its record.
    pub problems: Vec<String>,
    /// The first session; drawn from the environment when absent.
    pub session: Option<SessionId>,
    /// Time to live of the node's lease, usually `LEASE_TTL_MS`.
    pub lease_ttl_ms: u64,
    /// Time between renewals, usually `LEASE_RENEW_MS`.
    pub lease_renew_ms: u64,
    /// What `/metrics` shows; the data cores' metrics are registered here by whoever assembles the node.
    pub registry: Registry,
    /// Told what becomes of the node.
    pub status: Arc<ControlStatus>,
    /// Software version.
    pub version: String,
    /// Deliberate bugs of this package, for the simulator.
    pub planted: Planted,
    /// Deliberate bugs of the metadata store, for the simulator.
    pub meta_planted: consensus::planted::Planted,
}

/// Why a node cannot go on.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ControlError {
    /// An address cannot be listened on.
    #[error("cannot listen on {at}: {why}; is another node running here?")]
    Listen {
        /// The address.
        at: SocketAddr,
        /// Why not.
        why: String,
    },
    /// The metadata store belongs to another cluster.
    #[error(
        "this node's disks belong to cluster {own}, the metadata store to cluster {theirs}: check the \
         addresses of the voters, or prepare the disks for that cluster"
    )]
    OtherCluster {
        /// Of the disks.
        own: ClusterId,
        /// Of the store.
        theirs: ClusterId,
    },
    /// Somebody else runs under this node's number.
    #[error(
        "node {node} is already running on host {host} ({control}), with other disks or with copies of these: \
         give this node a number and disks of its own"
    )]
    NodeInUse {
        /// The number.
        node: NodeId,
        /// The other's host.
        host: String,
        /// The other's address.
        control: SocketAddr,
    },
    /// All of the node's disks belong to others.
    #[error("none of the disks that this node was started with are its own: {0}")]
    Disks(String),
    /// The configuration makes no sense.
    #[error("bad configuration: {0}")]
    Config(&'static str),
    /// The metadata voter has stopped.
    #[error("metadata store: {0}")]
    Meta(#[from] consensus::MetaError),
}

/// How far a control core is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Phase {
    /// Before the registration.
    #[default]
    Starting,
    /// Registered: the node takes part.
    Registered,
    /// A stop was asked for.
    Stopping,
    /// Stopped cleanly.
    Stopped,
    /// Cannot go on.
    Failed(ControlError),
}

/// What others may know of a control core, from any thread.
#[derive(Debug, Default)]
pub struct ControlStatus(Mutex<StatusInner>);

/// The contents of `ControlStatus`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StatusInner {
    /// How far it is.
    pub phase: Phase,
    /// Where clients connect.
    pub control: Option<SocketAddr>,
    /// Where `/metrics` is.
    pub http: Option<SocketAddr>,
    /// This node leads the metadata group and directs the cluster.
    pub leading: bool,
    /// The running session.
    pub session: Option<SessionId>,
    /// Slices that failed, with the reason.
    pub failed_slices: Vec<(SliceId, String)>,
    /// Disks that the node is to take while it runs, by number of the wish: whoever assembled it opens each number once
    /// and answers with `CoreMsg::DiskOpened`.
    pub wanted_disks: Vec<(u64, String)>,
}

impl ControlStatus {
    /// A copy of the present state.
    pub fn get(&self) -> StatusInner {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut StatusInner)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
