//! `store`: one slice of a disk as a whole little store of objects: superblock, log, index, data.
//!
//! A slice belongs to one core; this code is that core's state machine for it: synchronous calls, results
//! as events taken with `SliceStore::poll`, no clock, no thread, no file of its own (design rule: the seam).
//! Everything but the two superblock copies is copy-on-write. A mutation is durable when the *commit* that
//! holds its record and its data is; a *checkpoint* moves what the log says into object pages.
//!
//! It may know `wire` and `reactor`'s traits. Start reading at `types` (what callers see), then `write`
//! (commits), `overlay` (what the log says that pages do not yet say), `checkpoint`, `open`; `groups` is what copies
//! are compared by. The bytes on disk are owned by `superblock`, `page` and `commit`; `docs/disk-format.md`
//! tells the same to people.

mod alloc;
mod bytes;
mod cache;
pub mod check;
mod checkpoint;
pub mod commit;
mod device;
mod groups;
mod index;
mod lists;
mod open;
mod overlay;
pub mod page;
pub mod planted;
mod read;
mod replay;
mod seg;
mod store;
pub mod superblock;
mod types;
mod write;

pub use check::{CheckOptions, CheckReport, Finding, ReadAt, Repair, Severity, SliceReport};
pub use groups::{DIGEST_BUCKETS, Digests, Group, GroupOf, HINTS_MAX, HISTORY_CHANGES, bucket_of, digest_of};
pub use planted::Bug;
pub use store::SliceStore;
pub use superblock::{DiskPlan, DiskSuper, PrepareError, SliceEntry, SliceSuper, SuperError};
pub use types::*;
