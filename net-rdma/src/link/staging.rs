//! Registered memory for payloads that lie elsewhere: copies on their way out, parts on their way in.
//!
//! Copies of large payloads are held until the peer has fetched them, for which the peer may need memory that its own
//! copies hold. So they never take from the arena, in which payloads from the peer land: a few buffers are set aside
//! for them, and one for parts on their way in, each of which needs it for one fetch only.

use super::{PART_BYTES, SMALL_PAYLOAD_BYTES};
use reactor::{Arena, IoBuf, NoBuffers};

/// The part of an arena that is set aside for copies, and at least and at most how many: with one alone a connection
/// would stand still during each fetch, and more than 2 MiB are more than what is on its way at any time.
const SET_ASIDE_FRACTION: usize = 16;
const SET_ASIDE_MIN: usize = 2;
const SET_ASIDE_MAX: usize = 16;

/// What a core has set aside, in buffers of `PART_BYTES`.
pub(crate) struct Staging {
    outgoing: Vec<IoBuf>,
    incoming: IoBuf,
}

fn unused(buf: &IoBuf, len: usize) -> Option<IoBuf> {
    let mut handle = (buf.is_unique() && buf.len() >= len).then(|| buf.clone())?;
    handle.truncate(len);
    Some(handle)
}

impl Staging {
    pub(crate) fn new(arena: &Arena) -> Result<Self, NoBuffers> {
        let count = arena.region().1 / SET_ASIDE_FRACTION / PART_BYTES;
        let count = count.clamp(SET_ASIDE_MIN, SET_ASIDE_MAX);
        let outgoing = (0..count).map(|_| arena.alloc(PART_BYTES)).collect::<Result<_, _>>()?;
        Ok(Self { outgoing, incoming: arena.alloc(PART_BYTES)? })
    }

    /// For a copy of `len` bytes on its way out, at most `PART_BYTES`.
    pub(super) fn outgoing(&self, arena: &Arena, len: usize) -> Result<IoBuf, NoBuffers> {
        // A small one goes as soon as the peer has a receive for it, whatever memory the peer has.
        if len <= SMALL_PAYLOAD_BYTES
            && let Ok(buf) = arena.alloc(len)
        {
            return Ok(buf);
        }
        self.outgoing.iter().find_map(|buf| unused(buf, len)).ok_or(NoBuffers)
    }

    /// For a part of `len` bytes on its way in, at most `PART_BYTES`.
    pub(super) fn incoming(&self, arena: &Arena, len: usize) -> Result<IoBuf, NoBuffers> {
        arena.alloc(len).or_else(|_| unused(&self.incoming, len).ok_or(NoBuffers))
    }
}
