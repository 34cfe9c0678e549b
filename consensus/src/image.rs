//! An image of the state: what a snapshot on disk holds and what a voter sends to one that lags.
//!
//! Bytes, little-endian, in this order because a reader can then bound every allocation by what is left:
//!
//! | bytes | field |
//! |---|---|
//! | 4 | magic "DRMI" |
//! | 2 | version, 1 |
//! | 2 | flags: 1 = durable part present, 2 = ephemeral part present, 4 = members present |
//! | 8, 8, 8 | index and term of the last applied entry, revision |
//! | durable part | u64 count of keys, each: u16 key length, u32 value length, u64 create revision, u64 mod revision, key, value |
//! | | u32 count of sessions, each: u64 session, u64 floor, u64 last index, u32 count of outcomes, each: u64 sequence, u8 kind, u64 argument |
//! | members | four lists of nodes (voters, outgoing, learners, target), each: u8 count, u64 each; u8 count of addresses, each: u64 node, u8 length, text |
//! | ephemeral part | u32 count of leases, each: u64 lease, u64 time to live in ms |
//! | | u64 count of keys, as above with u64 lease before the key |
//!
//! The ephemeral part is never written to disk. Without members (as written by versions that could not change them)
//! they are those the group was founded with.

use crate::kv::Item;
use crate::machine::{Ephemeral, Machine, Outcome, Session};
use crate::members::Members;
use crate::planted::Bug;
use std::collections::BTreeMap;
use thiserror::Error;
use wire::Revision;

const MAGIC: [u8; 4] = *b"DRMI";
const VERSION: u16 = 1;
const DURABLE: u16 = 1;
const EPHEMERAL: u16 = 2;
const MEMBERS: u16 = 4;

/// The bytes are no image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ImageError {
    /// Another magic or version.
    #[error("not a metadata image of this version")]
    Foreign,
    /// Lengths do not add up, text is not UTF-8, or the like.
    #[error("malformed metadata image")]
    Malformed,
}

/// Which parts an image shall have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parts {
    /// For the disk.
    Durable,
    /// For a voter that needs a snapshot: everything that is known.
    Whole,
    /// For a voter that has lost its ephemeral part.
    Ephemeral,
}

/// The ephemeral part.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EphemeralPart {
    /// Times to live.
    pub leases: BTreeMap<u64, u64>,
    /// Keys bound to leases.
    pub items: Vec<(String, Item)>,
}

/// A decoded image.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Image {
    /// Index of the last applied entry.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// Revision of the last change.
    pub revision: Revision,
    /// Keys without a lease.
    pub items: Vec<(String, Item)>,
    /// Outcomes of requests.
    pub sessions: BTreeMap<u64, Session>,
    /// Whether the durable part was present.
    pub durable: bool,
    /// The members, when present.
    pub members: Option<Members>,
    /// The ephemeral part, when present.
    pub ephemeral: Option<EphemeralPart>,
}

fn put_item(out: &mut Vec<u8>, key: &str, item: &Item) {
    out.extend_from_slice(&(key.len() as u16).to_le_bytes());
    out.extend_from_slice(&(item.value.len() as u32).to_le_bytes());
    out.extend_from_slice(&item.create_revision.0.to_le_bytes());
    out.extend_from_slice(&item.mod_revision.0.to_le_bytes());
    if let Some(lease) = item.lease {
        out.extend_from_slice(&lease.to_le_bytes());
    }
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(item.value.as_bytes());
}

fn put_outcome(out: &mut Vec<u8>, outcome: Outcome) {
    let (kind, argument) = match outcome {
        Outcome::Applied(revision) => (0u8, revision),
        Outcome::CompareFailed(index) => (1, u64::from(index)),
        Outcome::Refused(status) => (2, u64::from(status)),
        Outcome::Lease(ttl_ms) => (3, ttl_ms),
    };
    out.push(kind);
    out.extend_from_slice(&argument.to_le_bytes());
}

/// Encodes the state of `machine`. Asking for an ephemeral part that is lost leaves it out.
pub fn encode(machine: &Machine, parts: Parts) -> Vec<u8> {
    let durable = parts != Parts::Ephemeral;
    let ephemeral = parts != Parts::Durable && machine.ephemeral == Ephemeral::Known;
    let forgets = parts == Parts::Durable && machine.planted.has(Bug::MembersNotInSnapshot);
    let members = durable && !forgets && *machine.members() != Members::default();
    let flags = if durable { DURABLE } else { 0 }
        | if ephemeral { EPHEMERAL } else { 0 }
        | if members { MEMBERS } else { 0 };
    let kv = machine.kv();
    let mut out = Vec::with_capacity(kv.durable_bytes() as usize + 4096);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    for field in [machine.index, machine.term, kv.revision().0] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    if durable {
        let count = kv.range("").filter(|(_, item)| item.lease.is_none()).count() as u64;
        out.extend_from_slice(&count.to_le_bytes());
        for (key, item) in kv.range("").filter(|(_, item)| item.lease.is_none()) {
            put_item(&mut out, key, item);
        }
        out.extend_from_slice(&(machine.sessions.len() as u32).to_le_bytes());
        for (id, session) in &machine.sessions {
            for field in [*id, session.floor, session.last_index] {
                out.extend_from_slice(&field.to_le_bytes());
            }
            out.extend_from_slice(&(session.outcomes.len() as u32).to_le_bytes());
            for (seq, outcome) in &session.outcomes {
                out.extend_from_slice(&seq.to_le_bytes());
                put_outcome(&mut out, *outcome);
            }
        }
    }
    if members {
        machine.members().encode(&mut out);
    }
    if ephemeral {
        out.extend_from_slice(&(machine.leases.len() as u32).to_le_bytes());
        for (lease, ttl_ms) in &machine.leases {
            out.extend_from_slice(&lease.to_le_bytes());
            out.extend_from_slice(&ttl_ms.to_le_bytes());
        }
        let count = kv.range("").filter(|(_, item)| item.lease.is_some()).count() as u64;
        out.extend_from_slice(&count.to_le_bytes());
        for (key, item) in kv.range("").filter(|(_, item)| item.lease.is_some()) {
            put_item(&mut out, key, item);
        }
    }
    out
}

/// Reads little-endian fields and refuses to run past the end.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }
    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }
    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    pub(crate) fn text(&mut self, len: usize) -> Option<String> {
        String::from_utf8(self.take(len)?.to_vec()).ok()
    }
}

fn get_items(r: &mut Reader<'_>, leased: bool) -> Option<Vec<(String, Item)>> {
    let count = r.u64()?;
    let mut items: Vec<(String, Item)> = Vec::new();
    for _ in 0..count {
        let key_len = r.u16()?;
        let value_len = r.u32()?;
        let create_revision = Revision(r.u64()?);
        let mod_revision = Revision(r.u64()?);
        let lease = if leased { Some(r.u64()?) } else { None };
        let key = r.text(usize::from(key_len))?;
        let value = r.text(value_len as usize)?;
        if items.last().is_some_and(|(previous, _)| *previous >= key) {
            return None;
        }
        items.push((key, Item { value, create_revision, mod_revision, lease }));
    }
    Some(items)
}

fn get_session(r: &mut Reader<'_>) -> Option<(u64, Session)> {
    let id = r.u64()?;
    let mut session = Session { floor: r.u64()?, last_index: r.u64()?, outcomes: BTreeMap::new() };
    for _ in 0..r.u32()? {
        let seq = r.u64()?;
        let kind = r.u8()?;
        let argument = r.u64()?;
        let outcome = match kind {
            0 => Outcome::Applied(argument),
            1 => Outcome::CompareFailed(u32::try_from(argument).ok()?),
            2 => Outcome::Refused(u8::try_from(argument).ok()?),
            3 => Outcome::Lease(argument),
            _ => return None,
        };
        session.outcomes.insert(seq, outcome);
    }
    Some((id, session))
}

fn decode_fields(r: &mut Reader<'_>, flags: u16) -> Option<Image> {
    let mut image = Image {
        index: r.u64()?,
        term: r.u64()?,
        revision: Revision(r.u64()?),
        durable: flags & DURABLE != 0,
        ..Image::default()
    };
    if image.durable {
        image.items = get_items(r, false)?;
        for _ in 0..r.u32()? {
            let (id, session) = get_session(r)?;
            image.sessions.insert(id, session);
        }
    }
    if flags & MEMBERS != 0 {
        image.members = Some(Members::decode(r)?);
    }
    if flags & EPHEMERAL != 0 {
        let mut part = EphemeralPart::default();
        for _ in 0..r.u32()? {
            let lease = r.u64()?;
            part.leases.insert(lease, r.u64()?);
        }
        part.items = get_items(r, true)?;
        image.ephemeral = Some(part);
    }
    r.0.is_empty().then_some(image)
}

/// Decodes an image; never panics and never allocates more than a small multiple of `bytes`.
pub fn decode(bytes: &[u8]) -> Result<Image, ImageError> {
    let mut r = Reader(bytes);
    let magic = r.take(4).ok_or(ImageError::Malformed)?;
    let version = r.u16().ok_or(ImageError::Malformed)?;
    let flags = r.u16().ok_or(ImageError::Malformed)?;
    if magic != MAGIC || version != VERSION || flags & !(DURABLE | EPHEMERAL | MEMBERS) != 0 {
        return Err(ImageError::Foreign);
    }
    decode_fields(&mut r, flags).ok_or(ImageError::Malformed)
}
