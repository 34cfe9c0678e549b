//! The cluster map: the JSON values that the metadata store keeps, and their keys.
//!
//! | key | value | written by |
//! |---|---|---|
//! | `/cluster` | [`Cluster`] | the first node, once |
//! | `/next-id` | [`NextId`] | pool and image creation |
//! | `/pools/ID` | [`Pool`] | `pool create` / `rm` |
//! | `/pool-names/NAME` | `ID` | with `/pools/ID`, in one transaction |
//! | `/images/ID` | [`Image`] | `image create` / `resize` / `rm` |
//! | `/image-names/NAME` | `ID` | with `/images/ID`, in one transaction |
//! | `/nodes/ID` | [`Node`] | that node, at start |
//! | `/disks/UUID` | [`DiskRecord`] | the disk's node, at start and about once a minute; `disk retire` |
//! | `/new-disks/ID/UUID` | [`NewDisk`] | `disk add` / `replace`; gone when the running node has taken the disk |
//! | `/live/ID` | [`Live`], bound to the node's lease, in memory | that node, at start |
//! | `/stats/ID` | [`NodeStats`], bound to the node's lease, in memory | that node, when it changes |
//! | `/pg/POOL/INDEX` | [`PgRecord`] | the director; the primary for `in_sync` |
//! | `/scrub/POOL/INDEX` | [`ScrubRecord`] | the primary's node after a scrub; whoever wants one |
//! | `/drain/ID` | [`Drain`] | `node drain`; gone with `node undrain` |
//! | `/settings` | [`Settings`] | `set` / `unset` |
//!
//! Numbers in keys are written with fixed width (`key::*`), so that key order is number order.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use wire::{ClusterId, DiskUuid, Epoch, ImageId, NodeId, ObjectId, PgId, PoolId, SessionId, SliceId};

/// Keys of the metadata store.
pub mod key {
    use super::*;
    /// [`Cluster`].
    pub const CLUSTER: &str = "/cluster";
    /// [`NextId`].
    pub const NEXT_ID: &str = "/next-id";
    /// Prefix of [`Pool`] keys.
    pub const POOLS: &str = "/pools/";
    /// Prefix of pool name keys.
    pub const POOL_NAMES: &str = "/pool-names/";
    /// Prefix of [`Image`] keys.
    pub const IMAGES: &str = "/images/";
    /// Prefix of image name keys.
    pub const IMAGE_NAMES: &str = "/image-names/";
    /// Prefix of [`Node`] keys.
    pub const NODES: &str = "/nodes/";
    /// Prefix of [`DiskRecord`] keys.
    pub const DISKS: &str = "/disks/";
    /// Prefix of [`NewDisk`] keys.
    pub const NEW_DISKS: &str = "/new-disks/";
    /// Prefix of [`Live`] keys.
    pub const LIVE: &str = "/live/";
    /// Prefix of [`NodeStats`] keys.
    pub const STATS: &str = "/stats/";
    /// Prefix of [`PgRecord`] keys.
    pub const PGS: &str = "/pg/";
    /// Prefix of [`ScrubRecord`] keys.
    pub const SCRUBS: &str = "/scrub/";
    /// Prefix of [`Drain`] keys.
    pub const DRAINS: &str = "/drain/";
    /// [`Settings`].
    pub const SETTINGS: &str = "/settings";

    /// Key of a pool.
    pub fn pool(id: PoolId) -> String {
        format!("{POOLS}{:010}", id.0)
    }
    /// Key of a pool's name.
    pub fn pool_name(name: &str) -> String {
        format!("{POOL_NAMES}{name}")
    }
    /// Key of an image.
    pub fn image(id: ImageId) -> String {
        format!("{IMAGES}{:020}", id.0)
    }
    /// Key of an image's name.
    pub fn image_name(name: &str) -> String {
        format!("{IMAGE_NAMES}{name}")
    }
    /// Key of a node.
    pub fn node(id: NodeId) -> String {
        format!("{NODES}{:010}", id.0)
    }
    /// Key of what the cluster knows of a disk.
    pub fn disk(id: DiskUuid) -> String {
        format!("{DISKS}{id}")
    }
    /// The disk that such a key names.
    pub fn parse_disk(key: &str) -> Option<DiskUuid> {
        key.strip_prefix(DISKS)?.parse().ok()
    }
    /// Prefix of the disks that a running node is to take.
    pub fn new_disks_of(node: NodeId) -> String {
        format!("{NEW_DISKS}{:010}/", node.0)
    }
    /// Key of one of them.
    pub fn new_disk(node: NodeId, disk: DiskUuid) -> String {
        format!("{}{disk}", new_disks_of(node))
    }
    /// Key of a node's liveness.
    pub fn live(id: NodeId) -> String {
        format!("{LIVE}{:010}", id.0)
    }
    /// Key of a node's statistics.
    pub fn stats(id: NodeId) -> String {
        format!("{STATS}{:010}", id.0)
    }
    /// Key of a node's drain.
    pub fn drain(id: NodeId) -> String {
        format!("{DRAINS}{:010}", id.0)
    }
    /// Prefix of a pool's PG keys.
    pub fn pgs_of(pool: PoolId) -> String {
        format!("{PGS}{:010}/", pool.0)
    }
    /// Key of a further piece of a node's statistics, for a node that is primary of very many PGs: also
    /// a [`NodeStats`], to be merged with the others. `parse_node` does not take it.
    pub fn stats_part(id: NodeId, part: u32) -> String {
        format!("{}+{part:03}", stats(id))
    }
    /// Key of a PG.
    pub fn pg(id: PgId) -> String {
        format!("{PGS}{:010}/{:08}", id.pool.0, id.index)
    }
    /// Key of a PG's scrubs.
    pub fn scrub(id: PgId) -> String {
        format!("{SCRUBS}{:010}/{:08}", id.pool.0, id.index)
    }
    /// The PG that a PG's key names.
    pub fn parse_pg(key: &str) -> Option<PgId> {
        parse_pg_below(PGS, key)
    }
    /// The PG that a key of its scrubs names.
    pub fn parse_scrub(key: &str) -> Option<PgId> {
        parse_pg_below(SCRUBS, key)
    }
    fn parse_pg_below(prefix: &str, key: &str) -> Option<PgId> {
        let (pool, index) = key.strip_prefix(prefix)?.split_once('/')?;
        Some(PgId { pool: pool.parse().ok()?, index: index.parse().ok()? })
    }
    /// The number at the end of a node, live, stats or drain key.
    pub fn parse_node(key: &str) -> Option<NodeId> {
        key.rsplit_once('/')?.1.parse().ok()
    }
}

/// The cluster as a whole.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cluster {
    /// Drawn when the cluster was created.
    pub id: ClusterId,
    /// Creation time, milliseconds since 1970.
    pub created_ms: u64,
}

/// The next free identifiers; never reused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NextId {
    /// Next pool.
    pub pool: PoolId,
    /// Next image.
    pub image: ImageId,
}

impl Default for NextId {
    fn default() -> Self {
        Self { pool: PoolId(1), image: ImageId(1) }
    }
}

/// What two copies of an object may not share.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureDomain {
    /// A host (a node).
    #[default]
    Host,
    /// A disk: for tests and single-host installations.
    Disk,
}

/// A pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pool {
    /// Its number.
    pub id: PoolId,
    /// Its name.
    pub name: String,
    /// Copies of each object.
    pub copies: u8,
    /// A PG with fewer live copies serves nothing.
    pub min_copies: u8,
    /// Placement groups.
    pub pg_count: u32,
    /// What copies may not share.
    #[serde(default)]
    pub failure_domain: FailureDomain,
    /// The pool is being removed; its PGs go when no image is left.
    #[serde(default)]
    pub removing: bool,
    /// How often its PGs are scrubbed.
    #[serde(default)]
    pub scrub: ScrubPlan,
}

/// How often each PG of a pool is scrubbed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScrubPlan {
    /// Seconds between two light scrubs (versions and presence); 0: none.
    pub light_secs: u64,
    /// Seconds between two deep scrubs (every block of every copy); 0: none.
    pub deep_secs: u64,
}

impl Default for ScrubPlan {
    /// Light every day, deep every week.
    fn default() -> Self {
        Self { light_secs: 24 * 3600, deep_secs: 7 * 24 * 3600 }
    }
}

/// When a PG was scrubbed and what that showed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// End of the last scrub of any depth, milliseconds since 1970; 0: never.
    #[serde(default)]
    pub light_ms: u64,
    /// End of the last deep scrub.
    #[serde(default)]
    pub deep_ms: u64,
    /// Objects that the last scrub looked at.
    #[serde(default)]
    pub objects: u64,
    /// Of these, the ones with a bad or different copy. They were given to recovery.
    #[serde(default)]
    pub errors: u64,
    /// Somebody wants one now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<ScrubDepth>,
}

/// How thoroughly a scrub looks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScrubDepth {
    /// Versions and presence.
    Light,
    /// Every copy is read and compared with its checksums, and these with each other.
    Deep,
}

/// An image (virtual disk).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Image {
    /// Its number.
    pub id: ImageId,
    /// Its name.
    pub name: String,
    /// Where its objects live.
    pub pool: PoolId,
    /// Size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Removal has begun: it can no longer be opened.
    #[serde(default)]
    pub removing: bool,
    /// Creation time, milliseconds since 1970.
    #[serde(default)]
    pub created_ms: u64,
}

/// A slice of a disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Slice {
    /// Its number.
    pub id: SliceId,
    /// Index into the node's `cores`: the core that owns it.
    pub core: u16,
    /// Usable bytes: its placement weight.
    pub size_bytes: u64,
}

/// A disk of a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// Its identity.
    pub uuid: DiskUuid,
    /// Where its node finds it: a device or a file.
    #[serde(default)]
    pub path: String,
    /// Its slices.
    pub slices: Vec<Slice>,
}

/// A disk that a running node is to take.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewDisk {
    /// Where it is on the node.
    pub path: String,
    /// The node does not take it, and why: for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// What the cluster remembers of a disk, for as long as there is a cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The node that it belongs to.
    pub node: NodeId,
    /// The process that used it last.
    pub process: SessionId,
    /// How far each of its slices is known to have come.
    pub slices: Vec<SliceMark>,
    /// It has been replaced, and must not serve again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired: Option<Retired>,
}

/// A slice's highest known generation. One that comes with no higher one is an older copy of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SliceMark {
    /// Its number.
    pub slice: SliceId,
    /// Number of its superblock: rises with every open and every checkpoint.
    pub generation: u64,
}

/// A disk's end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Retired {
    /// When, milliseconds since 1970: for people.
    pub at_ms: u64,
    /// The disk that took its place, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_by: Option<DiskUuid>,
}

/// A node as it registered at its last start.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Host name: the failure domain.
    pub host: String,
    /// Where its control core listens.
    pub control: SocketAddr,
    /// Where each data core listens.
    pub cores: Vec<SocketAddr>,
    /// Where it answers people and Prometheus (`/metrics`, `/links`), if anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<SocketAddr>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Software version.
    #[serde(default)]
    pub version: String,
    /// Disks of its configuration that it had to start without, and why: for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// A node is up: the key exists while its lease does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Live {
    /// The running process. A new session means that everything in memory was lost.
    pub session: SessionId,
    /// Slices of the node that cannot serve: not opened, or failed since. Their core has given them up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<SliceId>,
    /// Slices of the node that have reached the threshold `full`: clients are to put nothing more on them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub full: Vec<SliceId>,
    /// The process is about to stop cleanly: it still answers for its PGs, and others take them over now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// What a drained node gives away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DrainScope {
    /// Its primaries; it keeps its copies (maintenance).
    Primaries,
    /// Its copies too, as far as the failure domains of the other nodes allow.
    Everything,
}

/// A node that is to give away what it has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Drain {
    /// What.
    pub scope: DrainScope,
    /// Since when, milliseconds since 1970; for people.
    #[serde(default)]
    pub since_ms: u64,
}

/// What an administrator has decided for the whole cluster. A missing key means the defaults.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// No recovery in the background where copies are lacking. A write still recovers its object first.
    pub norecover: bool,
    /// No copying in the background where all copies are there and only in the wrong place.
    pub norebalance: bool,
    /// No scrubs by schedule; those asked for are made.
    pub noscrub: bool,
    /// A slice that is so full is warned of.
    pub nearfull_percent: u8,
    /// A slice that is so full takes no objects from recovery in the background.
    pub backfillfull_percent: u8,
    /// Clients' writes that need more space are refused where a copy lies on a slice that is so full.
    pub full_percent: u8,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            norecover: false,
            norebalance: false,
            noscrub: false,
            nearfull_percent: 85,
            backfillfull_percent: 90,
            full_percent: 95,
        }
    }
}

impl Settings {
    /// Whether so many used bytes of so many are at least `percent`. A slice of no size is not full.
    pub fn reaches(used_bytes: u64, size_bytes: u64, percent: u8) -> bool {
        size_bytes > 0 && u128::from(used_bytes) * 100 >= u128::from(size_bytes) * u128::from(percent)
    }
}

/// A PG's place in the cluster. The record is the configuration: whoever acts, acts under its epoch.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PgRecord {
    /// Rises with every change of `acting` or `primary`.
    pub epoch: Epoch,
    /// Where placement wants the copies, in order of preference for the primary.
    pub target: Vec<SliceId>,
    /// The members of this epoch: a write is acknowledged when all of them have it durably.
    pub acting: Vec<SliceId>,
    /// The member that serves; `None` when no in-sync member is live or too few members are.
    pub primary: Option<SliceId>,
    /// The process that may act as primary under this epoch: a restarted one has lost what was in
    /// flight and needs a new epoch.
    pub primary_session: Option<SessionId>,
    /// Members (live or not) that hold every acknowledged write. Never empty once written to. A new
    /// primary comes from here.
    pub in_sync: Vec<SliceId>,
}

impl PgRecord {
    fn all_named(&self) -> impl Iterator<Item = SliceId> {
        self.target.iter().chain(&self.acting).chain(&self.in_sync).chain(&self.primary).copied()
    }

    /// Every slice that is, is to be or may still be a member, once.
    pub fn slices(&self) -> BTreeSet<SliceId> {
        self.all_named().collect()
    }

    /// Whether the slice is one of them.
    pub fn names(&self, slice: SliceId) -> bool {
        self.all_named().any(|named| named == slice)
    }

    /// Whether as many members as the pool wants copies act, just where placement wants them, and all are in sync.
    pub fn is_whole(&self, copies: u8) -> bool {
        self.acting.len() == usize::from(copies)
            && self.acting.len() == self.target.len()
            && self.target.iter().all(|slice| self.acting.contains(slice) && self.in_sync.contains(slice))
    }
}

/// What a node says about itself, for `status`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct NodeStats {
    /// PGs this node is primary of, by `POOL.INDEX`.
    pub pgs: BTreeMap<String, PgStat>,
    /// Its slices, by number.
    pub slices: BTreeMap<String, SliceStat>,
}

/// A PG as its primary sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PgStat {
    /// `active`, `peering`, `incomplete`…, with flags after `+`: `active+clean`, `active+degraded`.
    pub state: String,
    /// Epoch it is in that state.
    pub epoch: Epoch,
    /// Objects.
    pub objects: u64,
    /// Object copies still to be recovered.
    pub missing: u64,
}

/// A slice as its owner sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SliceStat {
    /// Bytes it can hold.
    pub size_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Objects.
    pub objects: u64,
    /// Time its device needs for one operation while it is busy, in microseconds, rounded up to a power of
    /// two; 0 before there was any.
    #[serde(default)]
    pub service_us: u64,
    /// Reads that failed lately, as far as not forgotten.
    #[serde(default)]
    pub read_errors: u64,
    /// `open`, `failed: …`.
    pub state: String,
}

/// Objects that follow each other in a PG before the next PG is chosen: 4 MiB, so that sequential I/O
/// keeps few connections busy at a time and still spreads over all PGs.
pub const PG_STRIPE_OBJECTS: u64 = 32;

/// The PG of an object.
pub fn pg_of(object: ObjectId, pg_count: u32) -> PgId {
    let mut hash = object.image.0 ^ 0x9e37_79b9_7f4a_7c15;
    for word in [object.index / PG_STRIPE_OBJECTS, u64::from(object.pool.0)] {
        // splitmix64's finalizer: published by Vigna as a good 64-bit mixer.
        hash = hash.wrapping_add(word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^= hash >> 31;
    }
    PgId { pool: object.pool, index: (hash % u64::from(pg_count.max(1))) as u32 }
}
