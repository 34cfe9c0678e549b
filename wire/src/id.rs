//! Identifiers and units. Each is a newtype, so that a PG number can never pass for a pool number.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a block: the unit of alignment, allocation and checksums everywhere in Drystone.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks in an object.
pub const OBJECT_BLOCKS: usize = 32;
/// Bytes in an object (128 KiB), the unit of placement and of versions.
pub const OBJECT_BYTES: usize = BLOCK_BYTES * OBJECT_BLOCKS;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
        #[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map($name)
            }
        }
    };
}

id!(
    /// A host's `drystone node`; chosen by the operator, unique in the cluster, never reused.
    NodeId(u64)
);
id!(
    /// A core of one node's reactor: `0..data_cores` are data cores, `CONTROL_CORE` is the control core.
    CoreId(u16)
);
id!(
    /// A pool. Never reused after `pool rm`.
    PoolId(u32)
);
id!(
    /// An image, unique in the whole cluster and never reused.
    ImageId(u64)
);
id!(
    /// A slice, unique in the whole cluster: assigned at `disk prepare` as random 63 bits, never reused.
    SliceId(u64)
);
id!(
    /// A PG's configuration number: rises by at least one with every change of members or primary.
    Epoch(u64)
);
id!(
    /// The number of a committed metadata transaction.
    Revision(u64)
);
id!(
    /// One running client instance or node core: random 64 bits drawn at start.
    SessionId(u64)
);

/// The control core's number on every node.
pub const CONTROL_CORE: CoreId = CoreId(u16::MAX);

/// 128 random bits written as 32 hex digits.
macro_rules! uuid {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                u128::from_str_radix(s, 16).map($name)
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

uuid!(
    /// A cluster; drawn once when the cluster is created, written into every superblock.
    ClusterId
);
uuid!(
    /// A disk; drawn by `disk prepare`.
    DiskUuid
);

/// A placement group of a pool.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct PgId {
    /// The pool.
    pub pool: PoolId,
    /// `0..pool.pg_count`.
    pub index: u32,
}

impl fmt::Display for PgId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.pool, self.index)
    }
}

/// An object: `OBJECT_BYTES` of an image at `index * OBJECT_BYTES`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct ObjectId {
    /// The pool the image lives in; part of the key so that a slice can serve many pools.
    pub pool: PoolId,
    /// The image.
    pub image: ImageId,
    /// Position in the image, in objects.
    pub index: u64,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.pool, self.image, self.index)
    }
}

/// What a copy of an object holds. Copies with equal stamps hold equal bytes.
///
/// The counter rises by one with every change of the object; the epoch is the PG's epoch in which the
/// change was made. Two changes made by different primaries can share a counter but never a stamp.
/// The derived order (epoch first) is the order of authority inside one PG.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct Version {
    /// PG epoch of the last change.
    pub epoch: Epoch,
    /// Changes of this object so far.
    pub counter: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch, self.counter)
    }
}
