//! Superblocks: of a disk (what slices it has) and of a slice (where its checkpoint and log are).
//!
//! Both exist twice, and are the only blocks ever overwritten in place: one copy at a time, the second only
//! when the first is durable, so that a torn write leaves the other. Checksums cover the whole block behind
//! the checksum field, magic and version come first so that "not ours" and "too new" are told apart from
//! "damaged". All fields little-endian.
//!
//! Disk superblock, 4096 bytes, at byte 0 and at byte `DISK_SUPER_B_BYTES`:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `DRYSDISK` |
//! | 8 | 4 | CRC-32 of bytes 12..4096 |
//! | 12 | 4 | format version |
//! | 16 | 8 | feature bits a reader may ignore |
//! | 24 | 8 | feature bits a reader must know |
//! | 32 | 16 | cluster |
//! | 48 | 16 | disk |
//! | 64 | 8 | node, 0 = none yet |
//! | 72 | 8 | bytes of the disk when it was prepared |
//! | 80 | 4 | slices, a power of two |
//! | 84 | 12 | zero |
//! | 96 | 24 each | per slice: id, first byte, bytes |
//!
//! Slice superblock, 4096 bytes, blocks 0 and 1 of the slice:
//!
//! | at | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `DRYSLICE` |
//! | 8 | 4 | CRC-32 of bytes 12..4096 |
//! | 12 | 4 | format version |
//! | 16 | 16 | feature bits, as above |
//! | 32 | 16 | cluster |
//! | 48 | 16 | disk |
//! | 64 | 8 | slice |
//! | 72 | 8 | blocks in the slice |
//! | 80 | 8 | number of this superblock, +1 with every update; the highest valid one counts |
//! | 88 | 8 | incarnation: +1 with every open |
//! | 96 | 8 | cut: the last commit that was valid at that open |
//! | 104 | 8 | checkpoint: the last commit contained in the pages |
//! | 112 | 8 | block of the first commit behind the checkpoint |
//! | 120 | 8 | block of the page map's root, 0 = no pages |
//! | 128 | 4 | its checksum |
//! | 132 | 4 | object pages |
//! | 136 | | zero |

use crate::bytes::*;
use crate::types::{SLICE_BYTES_MIN, SliceGeometry};
use thiserror::Error;
use wire::{BLOCK_BYTES, ClusterId, DiskUuid, NodeId, SliceId, block_crc};

/// First bytes of a disk.
pub const DISK_MAGIC: u64 = u64::from_le_bytes(*b"DRYSDISK");
/// First bytes of a slice.
pub const SLICE_MAGIC: u64 = u64::from_le_bytes(*b"DRYSLICE");
/// The format this code writes.
pub const FORMAT_VERSION: u32 = 1;
/// Feature bits this code knows and that a reader must know. None yet.
pub const FEATURES_REQUIRED: u64 = 0;
/// Where the second copy of the disk superblock lies: past what a stray partition table overwrites.
pub const DISK_SUPER_B_BYTES: u64 = 512 << 10;
/// Where the first slice begins: 1 MiB, a multiple of every erase block and stripe in use.
pub const FIRST_SLICE_BYTES: u64 = 1 << 20;
/// Most slices of a disk: their table fits in the superblock, and no host has more cores for one disk.
pub const SLICES_MAX: usize = 128;
/// Largest slice: 2^40 blocks, what an address can say.
pub const SLICE_BLOCKS_MAX: u64 = 1 << 40;
/// Slices begin and end at multiples of this.
pub const SLICE_ALIGN_BYTES: u64 = 1 << 20;

const TABLE: usize = 96;
const ENTRY: usize = 24;

/// Why a superblock is not usable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum SuperError {
    /// Nothing but zeroes: never prepared.
    #[error("blank: not prepared")]
    Blank,
    /// The magic is not ours: something else lives here.
    #[error("not a Drystone disk")]
    NotOurs,
    /// Written by another format version.
    #[error("format version {0} is not supported")]
    BadVersion(u32),
    /// Uses features this version does not know.
    #[error("unknown required features {0:#x}")]
    BadFeatures(u64),
    /// Damaged.
    #[error("checksum mismatch")]
    BadCrc,
    /// Of another cluster.
    #[error("belongs to cluster {0}")]
    WrongCluster(ClusterId),
    /// Shorter than a superblock, or the disk is smaller than the superblock says.
    #[error("truncated")]
    Truncated,
    /// The checksum is right and the contents are impossible.
    #[error("impossible contents")]
    Invalid,
}

/// One slice in the disk's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SliceEntry {
    /// Its identity.
    pub slice: SliceId,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl SliceEntry {
    /// What `SliceStore::open` wants.
    pub fn geometry(&self) -> SliceGeometry {
        SliceGeometry { slice: self.slice, offset: self.offset, len: self.len }
    }
}

/// A disk's superblock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskSuper {
    /// The cluster.
    pub cluster: ClusterId,
    /// The disk.
    pub disk: DiskUuid,
    /// The node it was first used by; `None` right after prepare.
    pub node: Option<NodeId>,
    /// Bytes of the disk when prepared.
    pub disk_bytes: u64,
    /// Its slices.
    pub slices: Vec<SliceEntry>,
}

fn check_common(bytes: &[u8], magic: u64) -> Result<(), SuperError> {
    if bytes.len() < BLOCK_BYTES {
        return Err(SuperError::Truncated);
    }
    let block = part(bytes, 0, BLOCK_BYTES);
    if get_u64(block, 0) != magic {
        return Err(if block.iter().all(|b| *b == 0) { SuperError::Blank } else { SuperError::NotOurs });
    }
    if block_crc(part(block, 12, BLOCK_BYTES - 12)) != get_u32(block, 8) {
        return Err(SuperError::BadCrc);
    }
    let version = get_u32(block, 12);
    if version != FORMAT_VERSION {
        return Err(SuperError::BadVersion(version));
    }
    let unknown = get_u64(block, 24) & !FEATURES_REQUIRED;
    if unknown != 0 {
        return Err(SuperError::BadFeatures(unknown));
    }
    Ok(())
}

fn seal_common(block: &mut [u8], magic: u64) {
    put_u64(block, 0, magic);
    put_u32(block, 12, FORMAT_VERSION);
    put_u64(block, 24, FEATURES_REQUIRED);
    let crc = block_crc(part(block, 12, BLOCK_BYTES - 12));
    put_u32(block, 8, crc);
}

impl DiskSuper {
    /// The 4096 bytes of either copy.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        put_u128(&mut block, 32, self.cluster.0);
        put_u128(&mut block, 48, self.disk.0);
        put_u64(&mut block, 64, self.node.map_or(0, |n| n.0));
        put_u64(&mut block, 72, self.disk_bytes);
        put_u32(&mut block, 80, self.slices.len().min(SLICES_MAX) as u32);
        for (i, entry) in self.slices.iter().take(SLICES_MAX).enumerate() {
            let at = TABLE + i * ENTRY;
            put_u64(&mut block, at, entry.slice.0);
            put_u64(&mut block, at + 8, entry.offset);
            put_u64(&mut block, at + 16, entry.len);
        }
        seal_common(&mut block, DISK_MAGIC);
        block
    }

    /// Reads one copy. `disk_bytes` is the disk's size now; `cluster`, when given, must match.
    pub fn decode(bytes: &[u8], disk_bytes: u64, cluster: Option<ClusterId>) -> Result<Self, SuperError> {
        check_common(bytes, DISK_MAGIC)?;
        let count = get_u32(bytes, 80) as usize;
        let node = get_u64(bytes, 64);
        let found = Self {
            cluster: ClusterId(get_u128(bytes, 32)),
            disk: DiskUuid(get_u128(bytes, 48)),
            node: (node != 0).then_some(NodeId(node)),
            disk_bytes: get_u64(bytes, 72),
            slices: (0..count.min(SLICES_MAX))
                .map(|i| {
                    let at = TABLE + i * ENTRY;
                    SliceEntry {
                        slice: SliceId(get_u64(bytes, at)),
                        offset: get_u64(bytes, at + 8),
                        len: get_u64(bytes, at + 16),
                    }
                })
                .collect(),
        };
        if count > SLICES_MAX || !count.is_power_of_two() {
            return Err(SuperError::Invalid);
        }
        let mut end = FIRST_SLICE_BYTES;
        for entry in &found.slices {
            let last = entry.offset.checked_add(entry.len).ok_or(SuperError::Invalid)?;
            if entry.offset < end || !usable(entry.offset, entry.len) {
                return Err(SuperError::Invalid);
            }
            end = last;
        }
        if let Some(cluster) = cluster
            && cluster != found.cluster
        {
            return Err(SuperError::WrongCluster(found.cluster));
        }
        if end > disk_bytes {
            return Err(SuperError::Truncated);
        }
        Ok(found)
    }

    /// Chooses between the two copies: the first usable one, else the more telling error.
    pub fn choose(
        a: &[u8],
        b: &[u8],
        disk_bytes: u64,
        cluster: Option<ClusterId>,
    ) -> Result<Self, SuperError> {
        match Self::decode(a, disk_bytes, cluster) {
            Ok(found) => Ok(found),
            Err(
                first @ (SuperError::WrongCluster(_) | SuperError::BadVersion(_) | SuperError::Truncated),
            ) => Err(first),
            Err(first) => Self::decode(b, disk_bytes, cluster).map_err(|second| match (first, second) {
                (SuperError::Blank | SuperError::NotOurs, SuperError::Blank | SuperError::NotOurs) => first,
                (SuperError::Blank | SuperError::NotOurs, _) => second,
                _ => first,
            }),
        }
    }

    /// Where the copies lie.
    pub fn offsets() -> [u64; 2] {
        [0, DISK_SUPER_B_BYTES]
    }
}

/// Whether a slice can lie there.
pub(crate) fn usable(offset: u64, len: u64) -> bool {
    let block = BLOCK_BYTES as u64;
    offset.is_multiple_of(block)
        && len.is_multiple_of(block)
        && len >= SLICE_BYTES_MIN
        && len / block <= SLICE_BLOCKS_MAX
        && offset.checked_add(len).is_some()
}

/// A slice's superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SliceSuper {
    /// The cluster.
    pub cluster: ClusterId,
    /// The disk.
    pub disk: DiskUuid,
    /// The slice.
    pub slice: SliceId,
    /// Blocks in the slice.
    pub blocks: u64,
    /// Number of this superblock.
    pub number: u64,
    /// Opens so far.
    pub incarnation: u64,
    /// Last valid commit when this incarnation began. Commits up to it belong to earlier incarnations,
    /// commits behind it must belong to this one: a leftover of a cut log can never be taken again.
    pub cut: u64,
    /// Last commit contained in the pages.
    pub checkpoint: u64,
    /// Block of the next commit.
    pub log: u64,
    /// Block of the root, 0 for none.
    pub root: u64,
    /// Checksum of the root.
    pub root_crc: u32,
    /// Object pages.
    pub pages: u32,
}

impl SliceSuper {
    /// Writes the block.
    pub fn encode_into(&self, block: &mut [u8]) {
        block.fill(0);
        put_u128(block, 32, self.cluster.0);
        put_u128(block, 48, self.disk.0);
        put_u64(block, 64, self.slice.0);
        put_u64(block, 72, self.blocks);
        put_u64(block, 80, self.number);
        put_u64(block, 88, self.incarnation);
        put_u64(block, 96, self.cut);
        put_u64(block, 104, self.checkpoint);
        put_u64(block, 112, self.log);
        put_u64(block, 120, self.root);
        put_u32(block, 128, self.root_crc);
        put_u32(block, 132, self.pages);
        seal_common(block, SLICE_MAGIC);
    }

    /// Reads one copy.
    pub fn decode(block: &[u8]) -> Result<Self, SuperError> {
        check_common(block, SLICE_MAGIC)?;
        let found = Self {
            cluster: ClusterId(get_u128(block, 32)),
            disk: DiskUuid(get_u128(block, 48)),
            slice: SliceId(get_u64(block, 64)),
            blocks: get_u64(block, 72),
            number: get_u64(block, 80),
            incarnation: get_u64(block, 88),
            cut: get_u64(block, 96),
            checkpoint: get_u64(block, 104),
            log: get_u64(block, 112),
            root: get_u64(block, 120),
            root_crc: get_u32(block, 128),
            pages: get_u32(block, 132),
        };
        let inside = |at: u64| at >= 2 && at < found.blocks;
        if found.blocks > SLICE_BLOCKS_MAX
            || !inside(found.log)
            || (found.root != 0 && !inside(found.root))
            || (found.root == 0) != (found.pages == 0)
            || u64::from(found.pages) > crate::page::PAGES_MAX
            || found.checkpoint == u64::MAX
        {
            return Err(SuperError::Invalid);
        }
        Ok(found)
    }

    /// The newer valid copy, or why there is none.
    pub fn choose(a: &[u8], b: &[u8]) -> Result<Self, SuperError> {
        match (Self::decode(a), Self::decode(b)) {
            (Ok(a), Ok(b)) => Ok(if b.number > a.number { b } else { a }),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(SuperError::Blank | SuperError::NotOurs), Err(second)) => Err(second),
            (Err(first), Err(_)) => Err(first),
        }
    }
}

/// What `disk prepare` is asked for.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// The cluster.
    pub cluster: ClusterId,
    /// The disk's new identity.
    pub disk: DiskUuid,
    /// The node, when known already.
    pub node: Option<NodeId>,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// The slices' new identities; a power of two of them.
    pub slices: Vec<SliceId>,
}

/// Why a disk cannot be prepared as asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PrepareError {
    /// The number of slices is no power of two, or too large.
    #[error("{0} slices: must be a power of two up to {SLICES_MAX}")]
    SliceCount(usize),
    /// Two slices have the same identity, or one is zero.
    #[error("slice identities must differ and not be zero")]
    SliceIds,
    /// Too small for that many slices.
    #[error("disk of {have} bytes is too small: {need} bytes needed for that many slices")]
    TooSmall {
        /// Bytes there are.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
}

impl DiskPlan {
    /// Lays the disk out: slices of equal size from `FIRST_SLICE_BYTES` on.
    pub fn layout(&self) -> Result<DiskSuper, PrepareError> {
        let count = self.slices.len();
        if count > SLICES_MAX || !count.is_power_of_two() {
            return Err(PrepareError::SliceCount(count));
        }
        let mut ids = self.slices.clone();
        ids.sort_unstable();
        if ids.first() == Some(&SliceId(0)) || ids.windows(2).any(|w| w.first() == w.last()) {
            return Err(PrepareError::SliceIds);
        }
        let need = FIRST_SLICE_BYTES + SLICE_BYTES_MIN * count as u64;
        if self.disk_bytes < need {
            return Err(PrepareError::TooSmall { have: self.disk_bytes, need });
        }
        let each =
            (self.disk_bytes - FIRST_SLICE_BYTES) / count as u64 / SLICE_ALIGN_BYTES * SLICE_ALIGN_BYTES;
        let each = each.min(SLICE_BLOCKS_MAX * BLOCK_BYTES as u64);
        let slices = self
            .slices
            .iter()
            .enumerate()
            .map(|(i, slice)| SliceEntry {
                slice: *slice,
                offset: FIRST_SLICE_BYTES + each * i as u64,
                len: each,
            })
            .collect();
        Ok(DiskSuper {
            cluster: self.cluster,
            disk: self.disk,
            node: self.node,
            disk_bytes: self.disk_bytes,
            slices,
        })
    }

    /// The writes that prepare the disk, to be made in this order: the disk's own superblock comes last, so
    /// that a disk prepared by half reads as blank. Flush before the last two and at the end.
    pub fn writes(&self) -> Result<Vec<(u64, Vec<u8>)>, PrepareError> {
        let disk = self.layout()?;
        let mut writes = Vec::new();
        for entry in &disk.slices {
            let mut block = vec![0; BLOCK_BYTES];
            let fresh = SliceSuper {
                cluster: self.cluster,
                disk: self.disk,
                slice: entry.slice,
                blocks: entry.len / BLOCK_BYTES as u64,
                number: 1,
                incarnation: 0,
                cut: 0,
                checkpoint: 0,
                log: 2,
                root: 0,
                root_crc: 0,
                pages: 0,
            };
            fresh.encode_into(&mut block);
            // Both copies, and zeroes where the first commit will be.
            let mut bytes = block.clone();
            bytes.extend_from_slice(&block);
            bytes.resize(3 * BLOCK_BYTES, 0);
            writes.push((entry.offset, bytes));
        }
        let block = disk.encode();
        writes.push((DISK_SUPER_B_BYTES, block.clone()));
        writes.push((0, block));
        Ok(writes)
    }
}
