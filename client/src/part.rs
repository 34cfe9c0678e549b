//! Operations under way and the parts they are split into: one part per object touched.

use crate::error::IoError;
use crate::slab::NIL;
use reactor::{IoBuf, Mono};
use wire::{BLOCK_BYTES, Epoch, FrameKind, ImageId, OBJECT_BLOCKS, OBJECT_BYTES, ObjectId, PgId};

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum IoKind {
    Read,
    Write,
    Zero,
    Delete,
    Flush,
}

impl IoKind {
    /// Whether it changes data: such operations exclude each other and reads, and flushes wait for them.
    pub(crate) fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Zero | Self::Delete)
    }

    /// The frames that ask for it and answer it; a flush sends nothing.
    pub(crate) fn frames(self) -> Option<(FrameKind, FrameKind)> {
        match self {
            Self::Read => Some((FrameKind::Read, FrameKind::ReadReply)),
            Self::Write => Some((FrameKind::Write, FrameKind::WriteReply)),
            Self::Zero => Some((FrameKind::Zero, FrameKind::ZeroReply)),
            Self::Delete => Some((FrameKind::Delete, FrameKind::DeleteReply)),
            Self::Flush => None,
        }
    }
}

/// An operation under way.
pub(crate) struct OpState {
    pub kind: IoKind,
    pub image: u32,
    /// Bytes from the start of the image: where the buffer's first byte belongs.
    pub offset: u64,
    pub buf: Option<IoBuf>,
    pub user: u64,
    /// Parts not finished.
    pub parts_left: u32,
    pub error: Option<IoError>,
    /// Its time is over or its image is gone: no part is sent again.
    pub doomed: bool,
    pub deadline: Option<Mono>,
    /// Neighbours among the image's changes and flushes, in order of submission.
    pub prev: u32,
    pub next: u32,
}

/// Where a part is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PartState {
    /// Waits for earlier overlapping parts.
    Blocked,
    /// In the ready queue.
    Ready,
    /// In a peer's queue: waits for its connection, or for room in it.
    Waiting,
    /// In the parked list until a time, or until the map changes.
    Parked { until: Mono },
    /// Sent.
    InFlight { request: u64 },
}

/// A piece of an operation within one object.
pub(crate) struct Part {
    pub op: u32,
    pub kind: IoKind,
    pub object: ObjectId,
    pub pg: PgId,
    pub block: u8,
    pub blocks: u8,
    /// Its blocks of the object, one bit each.
    pub mask: u32,
    pub state: PartState,
    /// Earlier parts that overlap it and are not finished.
    pub waits: u32,
    /// Neighbours in the order table's bucket, oldest first.
    pub prev: u32,
    pub next: u32,
    /// The peer it was last meant for, and the neighbours in that peer's list of sent parts.
    pub peer: u32,
    pub sent_prev: u32,
    pub sent_next: u32,
    /// The PG's epoch of the last try.
    pub epoch: Epoch,
    /// Tries that brought nothing, for the backoff.
    pub retries: u32,
    /// Tries that ended in a checksum mismatch or a device error.
    pub faults: u8,
    /// Names the change in every try: the session plus a count of parts, never 0.
    pub origin: u64,
    /// An earlier try may have reached a primary: later ones say so.
    pub maybe_done: bool,
}

impl Part {
    pub(crate) fn new(
        op: u32,
        kind: IoKind,
        object: ObjectId,
        pg: PgId,
        (block, blocks): (u8, u8),
        origin: u64,
    ) -> Self {
        Self {
            op,
            kind,
            object,
            pg,
            block,
            blocks,
            mask: mask(block, blocks),
            state: PartState::Ready,
            waits: 0,
            prev: NIL,
            next: NIL,
            peer: NIL,
            sent_prev: NIL,
            sent_next: NIL,
            epoch: Epoch(0),
            retries: 0,
            faults: 0,
            origin,
            maybe_done: false,
        }
    }

    /// Bytes from the start of the image.
    pub(crate) fn image_offset(&self) -> u64 {
        self.object.index * OBJECT_BYTES as u64 + u64::from(self.block) * BLOCK_BYTES as u64
    }

    pub(crate) fn len_bytes(&self) -> usize {
        usize::from(self.blocks) * BLOCK_BYTES
    }

    /// Whether the later of the two has to wait for the earlier.
    #[inline]
    pub(crate) fn conflicts(&self, other: &Part) -> bool {
        self.mask & other.mask != 0
            && self.object.index == other.object.index
            && self.object.image == other.object.image
            && (self.kind.changes() || other.kind.changes())
    }
}

fn mask(block: u8, blocks: u8) -> u32 {
    let ones = if usize::from(blocks) >= OBJECT_BLOCKS { u32::MAX } else { (1u32 << blocks) - 1 };
    ones.checked_shl(u32::from(block)).unwrap_or(0)
}

/// A range within one object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    pub index: u64,
    pub block: u8,
    pub blocks: u8,
}

/// Cuts a block-aligned range of an image at object borders.
pub(crate) fn split(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let end = offset.saturating_add(len);
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let index = at / OBJECT_BYTES as u64;
        let within = at % OBJECT_BYTES as u64;
        let take = (OBJECT_BYTES as u64 - within).min(end - at);
        at += take;
        Some(Piece {
            index,
            block: (within / BLOCK_BYTES as u64) as u8,
            blocks: (take / BLOCK_BYTES as u64) as u8,
        })
    })
}

/// How many pieces `split` makes.
pub(crate) fn pieces(offset: u64, len: u64) -> usize {
    if len == 0 {
        return 0;
    }
    let last = offset.saturating_add(len - 1) / OBJECT_BYTES as u64;
    (last - offset / OBJECT_BYTES as u64 + 1) as usize
}

/// The object of a piece.
pub(crate) fn object(pool: wire::PoolId, image: ImageId, piece: Piece) -> ObjectId {
    ObjectId { pool, image, index: piece.index }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_the_range_once_and_never_cross_an_object(
            first in 0u64..1 << 40, blocks in 1u64..9000
        ) {
            let (offset, len) = (first * BLOCK_BYTES as u64, blocks * BLOCK_BYTES as u64);
            let mut at = offset;
            let mut count = 0;
            for piece in split(offset, len) {
                let start = piece.index * OBJECT_BYTES as u64 + u64::from(piece.block) * BLOCK_BYTES as u64;
                prop_assert_eq!(start, at);
                prop_assert!(piece.blocks > 0);
                prop_assert!(usize::from(piece.block + piece.blocks) <= OBJECT_BLOCKS);
                at += u64::from(piece.blocks) * BLOCK_BYTES as u64;
                count += 1;
            }
            prop_assert_eq!(at, offset + len);
            prop_assert_eq!(count, pieces(offset, len));
        }

        #[test]
        fn masks_overlap_exactly_when_ranges_do(a in 0u8..32, b in 0u8..32, la in 1u8..=32, lb in 1u8..=32) {
            let (la, lb) = (la.min(32 - a), lb.min(32 - b));
            let overlap = a < b + lb && b < a + la;
            prop_assert_eq!(mask(a, la) & mask(b, lb) != 0, overlap);
            prop_assert_eq!(mask(a, la).count_ones(), u32::from(la));
        }
    }
}
