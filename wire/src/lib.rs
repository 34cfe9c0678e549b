//! `wire`: everything that crosses a core, a socket or a disk under a name both ends agree on.
//!
//! Here live identifiers and units (`id`), the fixed frame header of every connection (`frame`),
//! the lists that some carry (`entry`), block checksums (`crc`), the outcomes that cross the wire (`status`) and the messages of the
//! control plane (`control`). This room knows nobody; everybody knows it. It does no I/O.
//!
//! Start reading at `frame`: a connection is a sequence of frames, and a frame is a 104-byte header,
//! its checksums, and a payload. `docs/wire.md` describes the same bytes for people.

pub mod control;
pub mod crc;
pub mod entry;
pub mod frame;
pub mod id;
pub mod status;

pub use crc::{BlockCrcs, block_crc};
pub use entry::{Holds, ListEntry, LookupEntry, OriginEntry, VerifyEntry};
pub use frame::{FrameKind, HEADER_BYTES, Header, HeaderError};
pub use id::*;
pub use status::Status;
