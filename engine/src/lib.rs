//! `engine`: the data core of a node: placement groups, replication, peering, recovery, over slice stores.
pub mod msg;
pub use msg::CoreMsg;
