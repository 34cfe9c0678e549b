//! The frame: `[header: 104 bytes][checksums: 4 bytes each][payload]`.
//!
//! The header's own checksum covers bytes 8..104 and the checksums behind it. Data frames carry one
//! checksum per 4 KiB block of payload; control frames and lists carry one for the whole payload. Everything is
//! little-endian and unaligned. A receiver refuses a frame before it believes a length in it: first
//! magic and version, then bounds, then the header checksum.

use crate::{BlockCrcs, Epoch, ImageId, ObjectId, PgId, PoolId, SliceId, Status, Version};
use crate::{OBJECT_BLOCKS, OBJECT_BYTES};
use rkyv::rancor;
use thiserror::Error;

/// "DRY1" in little-endian bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"DRY1");
/// Protocol version; both ends must have the same.
pub const PROTOCOL_VERSION: u8 = 1;
/// Size of the header on the wire.
pub const HEADER_BYTES: usize = 104;
/// Largest checksums area: one object's blocks.
pub const META_BYTES_MAX: usize = OBJECT_BLOCKS * 4;
/// Largest payload of a data frame: one object.
pub const DATA_PAYLOAD_BYTES_MAX: usize = OBJECT_BYTES;
/// Largest payload of a control frame: bounds what an unauthenticated peer can make us buffer.
pub const CONTROL_PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// `Link`: may this connection go on over RDMA?
pub const LINK_OFFER: u16 = 0;
/// `Link`: the offer no longer stands.
pub const LINK_ABANDON: u16 = 1;
/// `Link`: the sender's last frame here; what follows comes over RDMA.
pub const LINK_SWITCH: u16 = 2;
/// Largest offer of another transport.
pub const LINK_PAYLOAD_BYTES_MAX: usize = 256;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal),+ $(,)?) => {
        /// What a frame is. Requests are even, their replies are odd.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u8)]
        pub enum FrameKind { $($(#[$doc])* $name = $value),+ }

        impl FrameKind {
            /// Decodes the header's byte.
            pub fn from_u8(byte: u8) -> Option<Self> {
                match byte { $($value => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

kinds! {
    /// Control message (`control::ControlMsg` in the payload, one checksum).
    Control = 0,
    /// First frame in both directions of every connection: `Hello` in the payload.
    Hello = 2,
    /// Client reads `blocks` blocks at `block` of `object`.
    Read = 4,
    /// Its answer: payload and checksums.
    ReadReply = 5,
    /// Client writes the payload at `block` of `object`.
    Write = 6,
    /// Its answer.
    WriteReply = 7,
    /// Client makes blocks read as zeroes and frees them (discard and write-zeroes).
    Zero = 8,
    /// Its answer.
    ZeroReply = 9,
    /// Client removes the object (image removal).
    Delete = 10,
    /// Its answer.
    DeleteReply = 11,
    /// Primary to member: apply this write as `version`.
    SubWrite = 20,
    /// Its answer.
    SubWriteReply = 21,
    /// Primary to member: zero these blocks as `version`.
    SubZero = 22,
    /// Its answer.
    SubZeroReply = 23,
    /// Primary to member: delete the object as `version`, leaving a tombstone.
    SubDelete = 24,
    /// Its answer.
    SubDeleteReply = 25,
    /// Primary to member: make the object exactly this (recovery): blocks of the mask in `block`
    /// (bit i = block i, `blocks` = population) are in the payload, all others read as zeroes.
    SubPush = 26,
    /// Its answer.
    SubPushReply = 27,
    /// Primary to member: from now on this PG is at `epoch`; refuse anything older.
    Activate = 28,
    /// Its answer, sent once earlier sub-operations of the PG have reached the member's store. When the
    /// request's `blocks` is 1, with what the member knows of changes made (`OriginEntry`s in the payload);
    /// `blocks` is then 1 if that is all there is to know.
    ActivateReply = 29,
    /// Primary to member: list a part of the PG's objects from the cursor in `block` on (0: from the start);
    /// only those in the digest buckets whose bits are set in `origin`, if any are.
    List = 30,
    /// Its answer: `ListEntry`s in the payload; `blocks` = 1 when more follow, from the cursor in `block` on;
    /// the version's counter repeats the cursor asked for.
    ListReply = 31,
    /// Primary to member: read a whole object's present blocks (repair from a good copy).
    SubRead = 32,
    /// Its answer, laid out as `SubPush`.
    SubReadReply = 33,
    /// Primary to member: forget the tombstone of `object` at `version`.
    SubPurge = 34,
    /// Its answer.
    SubPurgeReply = 35,
    /// Primary to member: what the primary knows of changes made (`OriginEntry`s in the payload). With
    /// `FLAG_RECOVERY`: of `object` only, to be kept once the push or deletion of the object that follows is
    /// applied. Without: of the whole PG, in place of whatever the member knew.
    SubOrigins = 36,
    /// Its answer.
    SubOriginsReply = 37,
    /// Primary to member (scrub): what do you hold of `object`? With `blocks` = 1 after reading the blocks of the
    /// mask in `block` and comparing each with its checksum.
    SubVerify = 38,
    /// Its answer: one `VerifyEntry` in the payload; the status says `Corrupt` or `Io` when a block is bad.
    SubVerifyReply = 39,
    /// Liveness of a connection.
    Ping = 40,
    /// Its answer.
    Pong = 41,
    /// Primary to member: tell the digests of the PG.
    SubDigests = 42,
    /// Its answer: one 64-bit digest per bucket in the payload.
    SubDigestsReply = 43,
    /// Primary to member: what do you hold of these objects? `LookupEntry`s in the payload; `block` numbers
    /// the question.
    SubLookup = 44,
    /// Its answer: `ListEntry`s of those that the member holds something of; the version's counter repeats the
    /// number.
    SubLookupReply = 45,
    /// Between transports, never seen by what uses them: a step on the way of this connection to RDMA, said by `blocks`:
    /// `LINK_OFFER` (the offer is in the payload), `LINK_ABANDON`, `LINK_SWITCH`.
    Link = 46,
    /// Answer to an offer: `Ok` with the other side's part in the payload, or any other status: no.
    LinkReply = 47,
}

impl FrameKind {
    /// Whether a frame of this kind carries per-block checksums (true) or one for the payload.
    pub fn has_block_crcs(self) -> bool {
        !matches!(
            self,
            Self::Control
                | Self::Hello
                | Self::ListReply
                | Self::ActivateReply
                | Self::SubOrigins
                | Self::SubVerifyReply
                | Self::SubDigestsReply
                | Self::SubLookup
                | Self::SubLookupReply
                | Self::Link
                | Self::LinkReply
        )
    }
}

/// A frame's header, in native form. Fields that a kind does not use are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What this is.
    pub kind: FrameKind,
    /// `FLAG_*` bits.
    pub flags: u8,
    /// Outcome, in replies.
    pub status: Status,
    /// Bytes of payload behind the checksums.
    pub payload_len: u32,
    /// Chosen by the requester, unique per connection, echoed in the reply.
    pub request: u64,
    /// The PG this concerns.
    pub pg: PgId,
    /// The PG's epoch as the sender knows it.
    pub epoch: Epoch,
    /// The object.
    pub object: ObjectId,
    /// The object's version: assigned (sub-operations) or found (replies).
    pub version: Version,
    /// First block of the range, or a mask (`SubPush`).
    pub block: u32,
    /// Blocks in the range.
    pub blocks: u16,
    /// Receiving slice, in sub-operations; sending slice in their replies.
    pub slice: SliceId,
    /// The primary's slice, in sub-operations.
    pub primary: SliceId,
    /// Which change of which client this is, in `Write`, `Zero`, `Delete` and the sub-operations that carry
    /// them on: the same for every try of one change, different for all others. 0: a change of nobody.
    pub origin: u64,
}

/// `Zero`: the blocks must stay allocated (write-zeroes without unmap). Reserved, not used yet.
pub const FLAG_KEEP_ALLOCATED: u8 = 1;
/// Sub-operation that belongs to recovery, not to a client.
pub const FLAG_RECOVERY: u8 = 2;
/// `Write`, `Zero`, `Delete`: an earlier try of this change may have reached a primary.
pub const FLAG_RESENT: u8 = 4;
/// `SubPush` in the background to a member that is not in sync: nobody waits for it, and a nearly full slice refuses
/// it with `NoSpace`.
pub const FLAG_BACKGROUND: u8 = 8;

impl Header {
    /// A header of `kind` with everything else zero.
    pub fn new(kind: FrameKind, request: u64) -> Self {
        Self {
            kind,
            flags: 0,
            status: Status::Ok,
            payload_len: 0,
            request,
            pg: PgId::default(),
            epoch: Epoch(0),
            object: ObjectId::default(),
            version: Version::default(),
            block: 0,
            blocks: 0,
            slice: SliceId(0),
            primary: SliceId(0),
            origin: 0,
        }
    }

    /// The reply to this request: same request, PG, object and range, the given outcome, no payload.
    pub fn reply(&self, kind: FrameKind, status: Status) -> Self {
        Self { kind, status, payload_len: 0, flags: 0, ..*self }
    }

    /// Encodes header and checksums into `out`, replacing its contents. `out` keeps its capacity, so a
    /// recycled one makes this allocation-free.
    pub fn encode_into(&self, crcs: &BlockCrcs, out: &mut Vec<u8>) {
        out.clear();
        let raw = Raw {
            magic: MAGIC,
            crc: 0,
            kind: self.kind as u8,
            flags: self.flags,
            status: self.status as u8,
            protocol: PROTOCOL_VERSION,
            payload_len: self.payload_len,
            request: self.request,
            pool: self.object_or_pg_pool(),
            pg: self.pg.index,
            epoch: self.epoch.0,
            image: self.object.image.0,
            index: self.object.index,
            version_epoch: self.version.epoch.0,
            version_counter: self.version.counter,
            block: self.block,
            blocks: self.blocks,
            crc_count: crcs.len() as u16,
            slice: self.slice.0,
            primary: self.primary.0,
            origin: self.origin,
        };
        out.extend_from_slice(&raw.to_bytes());
        for crc in crcs.as_slice() {
            out.extend_from_slice(&crc.to_le_bytes());
        }
        let crc = crc32fast::hash(out.get(8..).unwrap_or(&[]));
        if let Some(slot) = out.get_mut(4..8) {
            slot.copy_from_slice(&crc.to_le_bytes());
        }
    }

    fn object_or_pg_pool(&self) -> u32 {
        if self.pg.pool.0 != 0 { self.pg.pool.0 } else { self.object.pool.0 }
    }

    /// Looks at the first `HEADER_BYTES` of `bytes` and says how long the whole frame is, before the
    /// checksum can be verified. Bounds are checked here so that a bad length is never believed.
    pub fn peek(bytes: &[u8]) -> Result<FrameLengths, HeaderError> {
        let raw = Raw::access(bytes)?;
        if raw.magic.to_native() != MAGIC {
            return Err(HeaderError::Magic(raw.magic.to_native()));
        }
        if raw.protocol != PROTOCOL_VERSION {
            return Err(HeaderError::Protocol(raw.protocol));
        }
        let kind = FrameKind::from_u8(raw.kind).ok_or(HeaderError::Kind(raw.kind))?;
        let payload = raw.payload_len.to_native() as usize;
        let max = match kind {
            FrameKind::Control | FrameKind::ListReply => CONTROL_PAYLOAD_BYTES_MAX,
            FrameKind::Link | FrameKind::LinkReply => LINK_PAYLOAD_BYTES_MAX,
            _ => DATA_PAYLOAD_BYTES_MAX,
        };
        if payload > max {
            return Err(HeaderError::Oversized { payload, max });
        }
        let crcs = raw.crc_count.to_native() as usize;
        let expected = if kind.has_block_crcs() {
            payload.div_ceil(crate::BLOCK_BYTES)
        } else {
            usize::from(payload > 0)
        };
        if crcs != expected {
            return Err(HeaderError::CrcCount { crcs, expected });
        }
        Ok(FrameLengths { meta: crcs * 4, payload })
    }

    /// Decodes and verifies header and checksums; `bytes` starts at the header and holds at least
    /// `HEADER_BYTES` plus the checksums that `peek` announced.
    pub fn decode(bytes: &[u8]) -> Result<(Self, BlockCrcs), HeaderError> {
        let lengths = Self::peek(bytes)?;
        let covered = bytes.get(8..HEADER_BYTES + lengths.meta).ok_or(HeaderError::Short)?;
        let raw = Raw::access(bytes)?;
        if crc32fast::hash(covered) != raw.crc.to_native() {
            return Err(HeaderError::Checksum);
        }
        let mut crcs = BlockCrcs::default();
        for crc in covered.get(HEADER_BYTES - 8..).unwrap_or(&[]).chunks_exact(4) {
            if let Ok(four) = <[u8; 4]>::try_from(crc) {
                crcs.push(u32::from_le_bytes(four));
            }
        }
        let pool = PoolId(raw.pool.to_native());
        let header = Self {
            kind: FrameKind::from_u8(raw.kind).ok_or(HeaderError::Kind(raw.kind))?,
            flags: raw.flags,
            status: Status::from_u8(raw.status),
            payload_len: raw.payload_len.to_native(),
            request: raw.request.to_native(),
            pg: PgId { pool, index: raw.pg.to_native() },
            epoch: Epoch(raw.epoch.to_native()),
            object: ObjectId { pool, image: ImageId(raw.image.to_native()), index: raw.index.to_native() },
            version: Version {
                epoch: Epoch(raw.version_epoch.to_native()),
                counter: raw.version_counter.to_native(),
            },
            block: raw.block.to_native(),
            blocks: raw.blocks.to_native(),
            slice: SliceId(raw.slice.to_native()),
            primary: SliceId(raw.primary.to_native()),
            origin: raw.origin.to_native(),
        };
        Ok((header, crcs))
    }
}

/// How long the parts behind a header are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameLengths {
    /// Bytes of checksums.
    pub meta: usize,
    /// Bytes of payload.
    pub payload: usize,
}

impl FrameLengths {
    /// Header, checksums and payload.
    pub fn total(&self) -> usize {
        HEADER_BYTES + self.meta + self.payload
    }
}

/// Why bytes are not a frame. The connection that brought them is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum HeaderError {
    /// Fewer bytes than a header.
    #[error("frame is shorter than its header")]
    Short,
    /// Not our protocol at all.
    #[error("bad magic {0:#010x}")]
    Magic(u32),
    /// Another version of our protocol.
    #[error("protocol version {0}, this side speaks {PROTOCOL_VERSION}")]
    Protocol(u8),
    /// Unknown kind.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A length beyond the bound.
    #[error("payload of {payload} bytes, at most {max} allowed")]
    Oversized {
        /// Announced.
        payload: usize,
        /// Allowed for this kind.
        max: usize,
    },
    /// Checksums do not fit the payload.
    #[error("{crcs} checksums where the payload needs {expected}")]
    CrcCount {
        /// Announced.
        crcs: usize,
        /// Needed.
        expected: usize,
    },
    /// Header damaged in transit.
    #[error("header checksum mismatch")]
    Checksum,
}

/// The header as it lies on the wire; rkyv gives the checked, zero-copy view.
#[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: u32,
    crc: u32,
    kind: u8,
    flags: u8,
    status: u8,
    protocol: u8,
    payload_len: u32,
    request: u64,
    pool: u32,
    pg: u32,
    epoch: u64,
    image: u64,
    index: u64,
    version_epoch: u64,
    version_counter: u64,
    block: u32,
    blocks: u16,
    crc_count: u16,
    slice: u64,
    primary: u64,
    origin: u64,
}

const _: () = assert!(size_of::<ArchivedRaw>() == HEADER_BYTES);

impl Raw {
    fn access(bytes: &[u8]) -> Result<&ArchivedRaw, HeaderError> {
        let bytes = bytes.get(..HEADER_BYTES).ok_or(HeaderError::Short)?;
        rkyv::access::<ArchivedRaw, rancor::Failure>(bytes).map_err(|_| HeaderError::Short)
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0u8; HEADER_BYTES];
        let writer = rkyv::ser::writer::Buffer::from(&mut out[..]);
        // A flat struct of integers into a buffer of its exact size cannot fail; a zero header is
        // refused by every receiver's magic check.
        let _ = rkyv::api::serialize_using::<_, rancor::Failure>(
            &self,
            &mut rkyv::ser::Serializer::new(writer, (), ()),
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BLOCK_BYTES;

    fn sample() -> (Header, BlockCrcs) {
        let mut header = Header::new(FrameKind::SubWrite, 77);
        header.pg = PgId { pool: PoolId(3), index: 9 };
        header.epoch = Epoch(5);
        header.object = ObjectId { pool: PoolId(3), image: ImageId(11), index: 1 << 40 };
        header.version = Version { epoch: Epoch(5), counter: 42 };
        header.block = 2;
        header.blocks = 2;
        header.payload_len = 2 * BLOCK_BYTES as u32;
        header.slice = SliceId(8);
        header.primary = SliceId(6);
        header.origin = 0x0123_4567_89ab_cdef;
        (header, BlockCrcs::of(&vec![1u8; 2 * BLOCK_BYTES]))
    }

    #[test]
    fn header_survives_the_wire() {
        let (header, crcs) = sample();
        let mut bytes = Vec::new();
        header.encode_into(&crcs, &mut bytes);
        assert_eq!(bytes.len(), HEADER_BYTES + 8);
        assert_eq!(Header::peek(&bytes).unwrap().total(), HEADER_BYTES + 8 + 2 * BLOCK_BYTES);
        assert_eq!(Header::decode(&bytes).unwrap(), (header, crcs));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let (header, crcs) = sample();
        let mut bytes = Vec::new();
        header.encode_into(&crcs, &mut bytes);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit} flipped unnoticed");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn oversized_and_foreign_frames_are_refused_before_their_length_is_used() {
        let (mut header, crcs) = sample();
        header.payload_len = u32::MAX;
        let mut bytes = Vec::new();
        header.encode_into(&crcs, &mut bytes);
        assert!(matches!(Header::peek(&bytes), Err(HeaderError::Oversized { .. })));
        bytes[11] = 9;
        assert_eq!(Header::peek(&bytes), Err(HeaderError::Protocol(9)));
        bytes[0] = b'X';
        assert!(matches!(Header::peek(&bytes), Err(HeaderError::Magic(_))));
    }
}
