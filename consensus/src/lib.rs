//! `consensus`: the metadata store. A Raft group of 1, 3, 5 or 7 voters inside the storage processes
//! holds an ordered map of keys to JSON values with revisions, transactions, leases and watches.
//!
//! `node::MetaNode` is a synchronous state machine over the environment's traits: its owner hands in disk
//! completions, ticks, messages and requests, calls `flush`, and takes outputs with `poll`. Inside,
//! `running` (with `asking` and `images`) drives the crate `raft`, `journal` its durable log and snapshots, `machine` the replicated
//! state, `serving` what only a leader knows, `reads` linearizable reads, `transfer` images between
//! voters, `members` who belongs to the group and `changing` how that changes. `bounds` has every limit; `docs/metadata.md` says what is guaranteed, and shows the bytes.
//!
//! This room knows `wire` and the traits of `reactor`. Start reading at `node`, then `running`.

mod asking;
mod blocks;
pub mod bounds;
mod changing;
mod check;
pub mod codec;
mod error;
mod guard;
mod image;
mod images;
mod journal;
mod journal_open;
mod kv;
mod machine;
mod members;
mod memlog;
mod node;
pub mod planted;
mod reads;
mod recover;
mod requests;
mod running;
mod serving;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod transfer;

pub use bounds::META_TICK_MS;
pub use error::MetaError;
pub use kv::{Item, Kv};
pub use members::VOTERS_KEY;
pub use node::{MetaConfig, MetaCounters, MetaNode, MetaOutput, MetaStatus, Standing};
