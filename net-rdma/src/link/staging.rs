//! Registered memory for payloads that lie elsewhere: copies on their way out, parts on their way in.
//!
//! A core's arena can be full of payloads that wait behind the very one that needs a copy. So a few buffers are set
//! aside, one after the other of which sees every such payload through.

use super::PART_BYTES;
use reactor::{Arena, IoBuf, NoBuffers};

/// Buffers set aside by a core, of `PART_BYTES` each: one would do, two let one be filled while the other is fetched.
const SET_ASIDE: usize = 2;

/// What a core has set aside, beside what its arena has.
pub(crate) struct Staging(Vec<IoBuf>);

impl Staging {
    pub(crate) fn new(arena: &Arena) -> Result<Self, NoBuffers> {
        Ok(Self((0..SET_ASIDE).map(|_| arena.alloc(PART_BYTES)).collect::<Result<_, _>>()?))
    }

    /// `len` bytes, at most `PART_BYTES`, of the arena or of what was set aside.
    pub(super) fn alloc(&self, arena: &Arena, len: usize) -> Result<IoBuf, NoBuffers> {
        if let Ok(buf) = arena.alloc(len) {
            return Ok(buf);
        }
        let mut buf = self.0.iter().find(|buf| buf.is_unique() && buf.len() >= len).ok_or(NoBuffers)?.clone();
        buf.truncate(len);
        Ok(buf)
    }
}
