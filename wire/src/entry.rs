//! Lists in payloads: entries of a fixed size, little-endian, one behind the other.

use crate::{Epoch, ImageId, ObjectId, PoolId, Version};

/// One object in a `ListReply`'s payload: 40 bytes each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListEntry {
    /// The object.
    pub object: ObjectId,
    /// What the listing slice holds.
    pub version: Version,
    /// The object was deleted at `version`.
    pub tombstone: bool,
}

impl ListEntry {
    /// Encoded size.
    pub const BYTES: usize = 40;

    /// Appends the encoded entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.object.pool.0.to_le_bytes());
        out.extend_from_slice(&u32::from(self.tombstone).to_le_bytes());
        out.extend_from_slice(&self.object.image.0.to_le_bytes());
        out.extend_from_slice(&self.object.index.to_le_bytes());
        put_version(self.version, out);
    }

    /// Decodes all entries of a payload; `None` when its length is not a whole number of them.
    pub fn decode_all(bytes: &[u8]) -> Option<impl Iterator<Item = Self> + '_> {
        entries(bytes, |entry: &[u8; Self::BYTES]| Self {
            object: ObjectId {
                pool: PoolId(u32_at(entry, 0)),
                image: ImageId(u64_at(entry, 8)),
                index: u64_at(entry, 16),
            },
            version: version_at(entry, 24),
            tombstone: u32_at(entry, 4) & 1 == 1,
        })
    }
}

/// One object that is asked for, in the payload of `SubLookup`: 16 bytes each. The pool is the PG's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LookupEntry {
    /// Image of the object.
    pub image: ImageId,
    /// The object within the image.
    pub index: u64,
}

impl LookupEntry {
    /// Encoded size.
    pub const BYTES: usize = 16;

    /// Appends the encoded entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.image.0.to_le_bytes());
        out.extend_from_slice(&self.index.to_le_bytes());
    }

    /// Decodes all entries of a payload; `None` when its length is not a whole number of them.
    pub fn decode_all(bytes: &[u8]) -> Option<impl Iterator<Item = Self> + '_> {
        entries(bytes, |entry: &[u8; Self::BYTES]| Self {
            image: ImageId(u64_at(entry, 0)),
            index: u64_at(entry, 8),
        })
    }
}

/// A change that was made, in the payload of `SubOrigins` and `ActivateReply`: 40 bytes each. The pool is the
/// PG's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OriginEntry {
    /// Image of the object.
    pub image: ImageId,
    /// The object within the image.
    pub index: u64,
    /// See `Header::origin`.
    pub origin: u64,
    /// What the change made of the object.
    pub version: Version,
}

impl OriginEntry {
    /// Encoded size.
    pub const BYTES: usize = 40;

    /// Appends the encoded entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.image.0.to_le_bytes());
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&self.origin.to_le_bytes());
        put_version(self.version, out);
    }

    /// Decodes all entries of a payload; `None` when its length is not a whole number of them.
    pub fn decode_all(bytes: &[u8]) -> Option<impl Iterator<Item = Self> + '_> {
        entries(bytes, |entry: &[u8; Self::BYTES]| Self {
            image: ImageId(u64_at(entry, 0)),
            index: u64_at(entry, 8),
            origin: u64_at(entry, 16),
            version: version_at(entry, 24),
        })
    }
}

/// What a slice holds of one object, in the payload of `SubVerifyReply`: 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VerifyEntry {
    /// What there is.
    pub holds: Holds,
    /// Its version; zero when nothing is held.
    pub version: Version,
    /// Bit i: block i is written.
    pub mask: u32,
    /// CRC-32 of the checksums of the blocks that were read, in order. Zero when none were.
    pub digest: u32,
}

/// Whether a slice holds an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Holds {
    /// It knows nothing of it.
    #[default]
    Nothing,
    /// It has it.
    Object,
    /// It knows that the object was deleted.
    Tombstone,
}

impl VerifyEntry {
    /// Encoded size.
    pub const BYTES: usize = 32;

    /// Appends the encoded entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let holds: u32 = match self.holds {
            Holds::Nothing => 0,
            Holds::Object => 1,
            Holds::Tombstone => 2,
        };
        for word in [holds, self.mask, self.digest, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        put_version(self.version, out);
    }

    /// Decodes a payload; `None` when it is not exactly one entry.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let entry: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let holds = match u32_at(entry, 0) {
            0 => Holds::Nothing,
            1 => Holds::Object,
            2 => Holds::Tombstone,
            _ => return None,
        };
        Some(Self { holds, version: version_at(entry, 16), mask: u32_at(entry, 4), digest: u32_at(entry, 8) })
    }
}

fn entries<'a, const BYTES: usize, T: 'a>(
    bytes: &'a [u8],
    decode: fn(&[u8; BYTES]) -> T,
) -> Option<impl Iterator<Item = T> + 'a> {
    let (whole, rest) = bytes.as_chunks::<BYTES>();
    rest.is_empty().then(|| whole.iter().map(decode))
}

fn array_at<const N: usize>(entry: &[u8], at: usize) -> [u8; N] {
    // Every caller's offset lies within its entry: the arrays are never missing.
    entry.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u32_at(entry: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(entry, at))
}

fn u64_at(entry: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(entry, at))
}

fn version_at(entry: &[u8], at: usize) -> Version {
    Version { epoch: Epoch(u64_at(entry, at)), counter: u64_at(entry, at + 8) }
}

fn put_version(version: Version, out: &mut Vec<u8>) {
    out.extend_from_slice(&version.epoch.0.to_le_bytes());
    out.extend_from_slice(&version.counter.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_entries_survive_the_wire() {
        let entry = ListEntry {
            object: ObjectId { pool: PoolId(1), image: ImageId(2), index: 3 },
            version: Version { epoch: Epoch(4), counter: 5 },
            tombstone: true,
        };
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        assert_eq!(bytes.len(), ListEntry::BYTES);
        assert_eq!(ListEntry::decode_all(&bytes).unwrap().collect::<Vec<_>>(), vec![entry]);
        assert!(ListEntry::decode_all(&bytes[1..]).is_none());
    }

    #[test]
    fn lookup_entries_survive_the_wire() {
        let entry = LookupEntry { image: ImageId(2), index: u64::MAX - 3 };
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        assert_eq!(bytes.len(), LookupEntry::BYTES);
        assert_eq!(LookupEntry::decode_all(&bytes).unwrap().collect::<Vec<_>>(), vec![entry]);
        assert!(LookupEntry::decode_all(&bytes[1..]).is_none());
    }

    #[test]
    fn origin_entries_survive_the_wire() {
        let entry = OriginEntry {
            image: ImageId(2),
            index: 3,
            origin: u64::MAX - 1,
            version: Version { epoch: Epoch(4), counter: 5 },
        };
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        assert_eq!(bytes.len(), OriginEntry::BYTES);
        assert_eq!(OriginEntry::decode_all(&bytes).unwrap().collect::<Vec<_>>(), vec![entry]);
        assert!(OriginEntry::decode_all(&bytes[1..]).is_none());
    }

    #[test]
    fn verify_entries_survive_the_wire_and_nothing_else_is_one() {
        for holds in [Holds::Nothing, Holds::Object, Holds::Tombstone] {
            let version = Version { epoch: Epoch(4), counter: 5 };
            let entry = VerifyEntry { holds, version, mask: 0x8000_0001, digest: 77 };
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            assert_eq!(bytes.len(), VerifyEntry::BYTES);
            assert_eq!(VerifyEntry::decode(&bytes), Some(entry));
            assert_eq!(VerifyEntry::decode(&bytes[1..]), None);
            bytes[0] = 3;
            assert_eq!(VerifyEntry::decode(&bytes), None);
        }
    }
}
