//! Bytes of the region on disk: superblock, snapshot headers, log blocks and the records in them.
//! Pure encoding and decoding; `docs/metadata.md` shows the same for people.
//!
//! The region is cut into 4096-byte blocks: two copies of the superblock, snapshot area A, snapshot area
//! B, and the log, a ring. Everything is little-endian and carries a CRC-32 over all of its block behind
//! the CRC field, so that a block is either what was written or recognised as not.

use crate::image::Reader;
use wire::{BLOCK_BYTES, ClusterId, NodeId, block_crc};

/// Payload bytes of a log block.
pub const LOG_PAYLOAD_BYTES: usize = BLOCK_BYTES - LOG_HEADER_BYTES;
/// Header bytes of a log block.
pub const LOG_HEADER_BYTES: usize = 48;

const SUPER_MAGIC: [u8; 4] = *b"DRMS";
const HEAD_MAGIC: [u8; 4] = *b"DRMH";
const LOG_MAGIC: [u8; 4] = *b"DRML";
/// Version of the whole region's format.
pub const VERSION: u32 = 1;

/// A whole block with its checksum set: `magic, crc32 of bytes 8.., body`.
fn seal(magic: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut block = vec![0u8; BLOCK_BYTES];
    for (to, from) in block.iter_mut().skip(8).zip(body) {
        *to = *from;
    }
    let crc = block_crc(block.get(8..).unwrap_or(&[]));
    for (to, from) in block.iter_mut().zip(magic.iter().chain(crc.to_le_bytes().iter())) {
        *to = *from;
    }
    block
}

/// The body of a block with this magic and a right checksum.
fn open(magic: [u8; 4], block: &[u8]) -> Option<Reader<'_>> {
    let block = block.get(..BLOCK_BYTES)?;
    let mut r = Reader(block);
    if r.take(4)? != magic {
        return None;
    }
    let crc = r.u32()?;
    (block_crc(r.0) == crc).then_some(r)
}

/// The superblock: written once, twice side by side, when the region is formatted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Super {
    /// The cluster.
    pub cluster: ClusterId,
    /// The voter whose memory this is: another voter's log would break elections.
    pub node: NodeId,
    /// Random, in every other block: blocks of an earlier life of the region are recognised.
    pub log_id: u64,
    /// Blocks of the region, of one snapshot area, and of the ring.
    pub geometry: Geometry,
    /// The voters the group was created with; none when this node joined later. Snapshots and the log say who
    /// the members are now.
    pub voters: Vec<NodeId>,
}

/// How the region is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Blocks of one snapshot area, its header block included.
    pub area_blocks: u64,
    /// Blocks of the ring.
    pub ring_blocks: u64,
}

/// Blocks before the first snapshot area.
pub const SUPER_BLOCKS: u64 = 2;

impl Geometry {
    /// A quarter of the region for each snapshot area, the rest for the ring.
    pub fn of_region(len_bytes: u64) -> Self {
        let blocks = len_bytes / BLOCK_BYTES as u64;
        let area_blocks = blocks / 4;
        Self { area_blocks, ring_blocks: blocks.saturating_sub(2 * area_blocks + SUPER_BLOCKS) }
    }

    /// Byte offset of an area (0 or 1) in the region.
    pub fn area_offset(&self, area: usize) -> u64 {
        (SUPER_BLOCKS + self.area_blocks * area as u64) * BLOCK_BYTES as u64
    }

    /// Bytes of snapshot data that fit into an area.
    pub fn image_bytes_max(&self) -> u64 {
        self.area_blocks.saturating_sub(1) * BLOCK_BYTES as u64
    }

    /// Byte offset of log block `number`'s place.
    pub fn ring_offset(&self, number: u64) -> u64 {
        let place = number.checked_rem(self.ring_blocks).unwrap_or(0);
        (SUPER_BLOCKS + 2 * self.area_blocks + place) * BLOCK_BYTES as u64
    }
}

impl Super {
    /// The block.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&VERSION.to_le_bytes());
        body.extend_from_slice(&(self.voters.len() as u32).to_le_bytes());
        body.extend_from_slice(&self.cluster.0.to_le_bytes());
        for field in [self.node.0, self.log_id, self.geometry.area_blocks, self.geometry.ring_blocks] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        for voter in &self.voters {
            body.extend_from_slice(&voter.0.to_le_bytes());
        }
        seal(SUPER_MAGIC, &body)
    }

    /// The format version of an undamaged superblock, whatever it is.
    pub fn version(block: &[u8]) -> Option<u32> {
        open(SUPER_MAGIC, block)?.u32()
    }

    /// From a block; `None` when it is none of this version, or damaged.
    pub fn decode(block: &[u8]) -> Option<Self> {
        let mut r = open(SUPER_MAGIC, block)?;
        if r.u32()? != VERSION {
            return None;
        }
        let voters = r.u32()?;
        let cluster = ClusterId(u128::from(r.u64()?) | u128::from(r.u64()?) << 64);
        let node = NodeId(r.u64()?);
        let log_id = r.u64()?;
        let geometry = Geometry { area_blocks: r.u64()?, ring_blocks: r.u64()? };
        if voters as usize > crate::bounds::VOTERS_MAX || geometry.ring_blocks == 0 {
            return None;
        }
        let voters = (0..voters).map(|_| r.u64().map(NodeId)).collect::<Option<_>>()?;
        Some(Self { cluster, node, log_id, geometry, voters })
    }
}

/// What Raft must never forget.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hard {
    /// Current term.
    pub term: u64,
    /// Vote in it, 0 = none.
    pub vote: u64,
    /// A lower bound of the commit index.
    pub commit: u64,
}

impl Hard {
    /// The later of two: terms rise, and within one a vote is cast once.
    pub fn merge(self, other: Self) -> Self {
        let mut newer = if other.term > self.term { other } else { self };
        if other.term == self.term && newer.vote == 0 {
            newer.vote = other.vote;
        }
        newer.commit = self.commit.max(other.commit);
        newer
    }
}

/// A snapshot area's first block, written after its data is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// From the superblock.
    pub log_id: u64,
    /// Index and term of the last entry in the snapshot.
    pub index: u64,
    /// See `index`.
    pub term: u64,
    /// The log block from which the log must be read behind this snapshot.
    pub log_start: u64,
    /// Batch sequence before that block: later batches have higher ones.
    pub batch_before: u64,
    /// Bytes of the image.
    pub len: u64,
    /// Its checksum.
    pub crc: u32,
    /// Hard state when the snapshot was finished.
    pub hard: Hard,
}

impl Head {
    /// The block.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&VERSION.to_le_bytes());
        body.extend_from_slice(&self.crc.to_le_bytes());
        for field in [
            self.log_id,
            self.index,
            self.term,
            self.log_start,
            self.batch_before,
            self.len,
            self.hard.term,
            self.hard.vote,
            self.hard.commit,
        ] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        seal(HEAD_MAGIC, &body)
    }

    /// From a block.
    pub fn decode(block: &[u8]) -> Option<Self> {
        let mut r = open(HEAD_MAGIC, block)?;
        if r.u32()? != VERSION {
            return None;
        }
        Some(Self {
            crc: r.u32()?,
            log_id: r.u64()?,
            index: r.u64()?,
            term: r.u64()?,
            log_start: r.u64()?,
            batch_before: r.u64()?,
            len: r.u64()?,
            hard: Hard { term: r.u64()?, vote: r.u64()?, commit: r.u64()? },
        })
    }
}

/// A log block's header fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogHead {
    /// From the superblock.
    pub log_id: u64,
    /// Counts log blocks from 0; the place in the ring is its remainder.
    pub number: u64,
    /// Counts batches; one batch is one device write.
    pub batch: u64,
    /// Position of this block in its batch.
    pub position: u16,
    /// Blocks of the batch.
    pub count: u16,
    /// Payload bytes used in this block.
    pub used: u16,
}

/// Encodes a log block.
pub fn encode_log_block(head: &LogHead, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(BLOCK_BYTES);
    for field in [head.log_id, head.number, head.batch] {
        body.extend_from_slice(&field.to_le_bytes());
    }
    for field in [head.position, head.count, head.used, 0] {
        body.extend_from_slice(&field.to_le_bytes());
    }
    body.extend_from_slice(&[0; 8]);
    body.extend_from_slice(payload);
    seal(LOG_MAGIC, &body)
}

/// Decodes a log block and its used payload.
pub fn decode_log_block(block: &[u8]) -> Option<(LogHead, &[u8])> {
    let mut r = open(LOG_MAGIC, block)?;
    let log_id = r.u64()?;
    let number = r.u64()?;
    let batch = r.u64()?;
    let (position, count, used, _) = (r.u16()?, r.u16()?, r.u16()?, r.u16()?);
    r.take(8)?;
    let payload = r.take(usize::from(used))?;
    (position < count).then_some((LogHead { log_id, number, batch, position, count, used }, payload))
}

/// A record in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// Hard state.
    Hard(Hard),
    /// An entry; it also says that no entry behind it, written earlier, counts any more.
    Entry {
        /// Index.
        index: u64,
        /// Term.
        term: u64,
        /// The command without its ephemeral values.
        data: Vec<u8>,
    },
    /// The batch before this one was reported durable; says the commit index of that time.
    Seal {
        /// Commit index.
        commit: u64,
    },
}

const RECORD_HARD: u8 = 1;
const RECORD_ENTRY: u8 = 2;
const RECORD_SEAL: u8 = 3;

impl Record {
    /// Appends `u8 kind, u32 length, body`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, fields, data): (u8, &[u64], &[u8]) = match self {
            Self::Hard(hard) => (RECORD_HARD, &[hard.term, hard.vote, hard.commit], &[]),
            Self::Entry { index, term, data } => (RECORD_ENTRY, &[*index, *term], data),
            Self::Seal { commit } => (RECORD_SEAL, &[*commit], &[]),
        };
        out.push(kind);
        out.extend_from_slice(&((fields.len() * 8 + data.len()) as u32).to_le_bytes());
        for field in fields {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(data);
    }

    /// Bytes of `encode`'s result.
    pub fn encoded_len(&self) -> usize {
        5 + match self {
            Self::Hard(_) => 24,
            Self::Entry { data, .. } => 16 + data.len(),
            Self::Seal { .. } => 8,
        }
    }

    /// Decodes all records of a batch's payload.
    pub fn decode_all(payload: &[u8]) -> Option<Vec<Self>> {
        let mut r = Reader(payload);
        let mut records = Vec::new();
        while !r.0.is_empty() {
            let kind = r.u8()?;
            let len = r.u32()?;
            let mut body = Reader(r.take(len as usize)?);
            let record = match kind {
                RECORD_HARD => Self::Hard(Hard { term: body.u64()?, vote: body.u64()?, commit: body.u64()? }),
                RECORD_ENTRY => {
                    let (index, term) = (body.u64()?, body.u64()?);
                    Self::Entry { index, term, data: std::mem::take(&mut body.0).to_vec() }
                }
                RECORD_SEAL => Self::Seal { commit: body.u64()? },
                _ => return None,
            };
            if !body.0.is_empty() {
                return None;
            }
            records.push(record);
        }
        Some(records)
    }
}

/// Cuts a batch's payload into log blocks, one behind the other.
pub fn encode_batch(log_id: u64, first: u64, batch: u64, payload: &[u8]) -> Vec<u8> {
    let count = payload.len().div_ceil(LOG_PAYLOAD_BYTES).max(1) as u16;
    let mut out = Vec::with_capacity(usize::from(count) * BLOCK_BYTES);
    for position in 0..count {
        let piece = payload.chunks(LOG_PAYLOAD_BYTES).nth(usize::from(position)).unwrap_or(&[]);
        let number = first + u64::from(position);
        let head = LogHead { log_id, number, batch, position, count, used: piece.len() as u16 };
        out.extend_from_slice(&encode_log_block(&head, piece));
    }
    out
}
