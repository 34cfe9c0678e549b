//! What voters say to each other, and what a log entry holds. Both are decoded only through rkyv's
//! checked API; protobuf's decoder never sees a byte from the network or from disk.

// The derives of rkyv make public types of their own, without docs.
#![allow(missing_docs)]

use crate::bounds::MESSAGE_BYTES_MAX;
use crate::members::Members;
use protobuf::RepeatedField;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use rkyv::{Archive, Deserialize, Serialize, rancor};
use thiserror::Error;
use wire::control::{MetaReply, MetaRequest, VoterAddress, Write};
use wire::{ClusterId, NodeId};

/// Version of everything in this file; the first byte of a packet and of a command.
pub const CODEC_VERSION: u8 = 1;
/// First byte of a command that changes the members, instead: the crate `raft` must know such entries from others
/// without decoding each.
pub const MEMBERS_VERSION: u8 = 2;

/// Bytes that are no packet or no command.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum CodecError {
    /// Another version of the codec.
    #[error("unsupported version {0}")]
    Version(u8),
    /// Longer than any valid message.
    #[error("message too long")]
    TooLong,
    /// Malformed.
    #[error("malformed bytes")]
    Malformed,
    /// A Raft message of a kind or shape that no voter sends.
    #[error("Raft message that no voter sends")]
    Unexpected,
}

/// Identifies a request through every retry.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RequestId {
    /// Random number of the origin's run; 0 = the leader itself (lease expiry).
    pub session: u64,
    /// Counts the requests of the session from 1.
    pub seq: u64,
    /// No request of this session below this number will ever be sent again.
    pub floor: u64,
}

/// A packet between voters.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The sender's cluster.
    pub cluster: ClusterId,
    /// The sender.
    pub from: NodeId,
    /// What it says.
    pub body: Body,
}

/// What a packet says.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// A Raft message.
    Raft(RaftMsg),
    /// A request on its way to the leader.
    Forward {
        /// Its identity.
        id: RequestId,
        /// The request.
        request: MetaRequest,
    },
    /// The leader's answer to a request that needs no log entry.
    Answer {
        /// The origin's session.
        session: u64,
        /// The request.
        seq: u64,
        /// The answer.
        reply: MetaReply,
    },
    /// A piece of an image of the state.
    Chunk(Chunk),
    /// Everything up to here has arrived.
    ChunkAck {
        /// The transfer.
        transfer: u64,
        /// Bytes from the start.
        upto: u64,
    },
    /// "My ephemeral state is lost, send me yours."
    WantEphemeral,
    /// "Mine is lost, too."
    EphemeralLost,
    /// "You asked for a vote and are no member."
    NotMember {
        /// At this index of the log, at the latest, that was so.
        index: u64,
        /// Who voted then, and where they are reached; an address is empty when the sender was never told. Who was
        /// away while all voters it knew were replaced has no other way to the store.
        voters: Vec<VoterAddress>,
    },
}

impl Body {
    /// Whether it is heard from nodes that are no members. A voter that lags does not know everybody who votes;
    /// requests and what leaves this node are for members only.
    pub fn is_for_strangers(&self) -> bool {
        match self {
            Self::Raft(message) => kind_of(message.kind).is_some_and(|kind| {
                !matches!(kind, MessageType::MsgReadIndex | MessageType::MsgAppendResponse)
            }),
            Self::Chunk(_) | Self::ChunkAck { .. } | Self::Answer { .. } | Self::NotMember { .. } => true,
            Self::Forward { .. } | Self::WantEphemeral | Self::EphemeralLost => false,
        }
    }

    /// Whether only a leader says it, to those it wants to have.
    pub fn is_leaders(&self) -> bool {
        match self {
            Self::Raft(message) => {
                matches!(kind_of(message.kind), Some(MessageType::MsgAppend | MessageType::MsgHeartbeat))
            }
            Self::Chunk(chunk) => chunk.whole,
            _ => false,
        }
    }
}

/// A piece of an image.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Chosen by the sender, rises.
    pub transfer: u64,
    /// `true`: the whole state, to be installed as a Raft snapshot. `false`: the ephemeral part only.
    pub whole: bool,
    /// The sender's Raft term.
    pub term: u64,
    /// Index of the image.
    pub index: u64,
    /// Length of the whole image.
    pub total: u64,
    /// Checksum of the whole image.
    pub crc: u32,
    /// Where this piece belongs.
    pub offset: u64,
    /// The piece.
    pub bytes: Vec<u8>,
}

/// A Raft message, field by field.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RaftMsg {
    /// `MessageType` as a number.
    pub kind: u8,
    /// Term of the sender.
    pub term: u64,
    /// See the crate `raft`.
    pub log_term: u64,
    /// See the crate `raft`.
    pub index: u64,
    /// Commit index.
    pub commit: u64,
    /// Its term.
    pub commit_term: u64,
    /// The request was refused.
    pub reject: bool,
    /// Where to try next.
    pub reject_hint: u64,
    /// Read contexts.
    pub context: Vec<u8>,
    /// Entries.
    pub entries: Vec<EntryMsg>,
}

/// A log entry.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct EntryMsg {
    /// Term.
    pub term: u64,
    /// Index.
    pub index: u64,
    /// An encoded `Command`, or nothing (a new leader's first entry).
    pub data: Vec<u8>,
}

/// What the leader decided about a request before it entered the log.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All compares held; the writes take effect.
    Apply,
    /// This compare failed.
    CompareFailed(u32),
    /// Refused with this `wire::Status`.
    Refused(u8),
}

/// What a log entry does.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// A transaction.
    Txn {
        /// Decided by the leader.
        verdict: Verdict,
        /// Empty unless the verdict is `Apply`.
        writes: Vec<Write>,
        /// Writes bound to a lease were left out (read back from disk).
        stripped: bool,
    },
    /// Create a lease or change its time to live.
    LeaseSet {
        /// The lease.
        lease: u64,
        /// Granted.
        ttl_ms: u64,
    },
    /// The lease and its keys vanish.
    LeaseEnd {
        /// The lease.
        lease: u64,
    },
    /// All leases and ephemeral keys vanish: no voter that could know them is left.
    EphemeralReset,
    /// The members are these from now on.
    Members {
        /// All of them.
        members: Box<Members>,
        /// The key that shows them.
        writes: Vec<Write>,
    },
}

/// A log entry's data.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Command {
    /// Who asked.
    pub id: RequestId,
    /// What to do.
    pub op: Op,
}

fn decode_with<T>(
    bytes: &[u8],
    version: u8,
    f: impl FnOnce(&[u8]) -> Result<T, rancor::Failure>,
) -> Result<T, CodecError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(CodecError::TooLong);
    }
    match bytes.split_first() {
        Some((first, rest)) if *first == version => f(rest).map_err(|_| CodecError::Malformed),
        Some((other, _)) => Err(CodecError::Version(*other)),
        None => Err(CodecError::Malformed),
    }
}

macro_rules! codec {
    ($type:ident) => {
        impl $type {
            fn encode_as(&self, version: u8) -> Vec<u8> {
                let mut all = vec![version];
                // Encoding into a growing vector fails only when memory does.
                let mut bytes =
                    rkyv::to_bytes::<rancor::Failure>(self).map(|b| b.into_vec()).unwrap_or_default();
                all.append(&mut bytes);
                all
            }

            fn decode_as(bytes: &[u8], version: u8) -> Result<Self, CodecError> {
                decode_with(bytes, version, rkyv::from_bytes::<$type, rancor::Failure>)
            }
        }
    };
}

codec!(Packet);
codec!(Command);

impl Packet {
    /// Encodes.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_as(CODEC_VERSION)
    }

    /// Decodes with full validation.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        Self::decode_as(bytes, CODEC_VERSION)
    }
}

impl Command {
    fn version(&self) -> u8 {
        if matches!(self.op, Op::Members { .. }) { MEMBERS_VERSION } else { CODEC_VERSION }
    }

    /// Encodes.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_as(self.version())
    }

    /// Decodes with full validation.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let version = if is_members(bytes) { MEMBERS_VERSION } else { CODEC_VERSION };
        let command = Self::decode_as(bytes, version)?;
        if command.version() != version {
            return Err(CodecError::Malformed);
        }
        if let Op::Members { members, .. } = &command.op
            && !members.is_sound()
        {
            return Err(CodecError::Malformed);
        }
        Ok(command)
    }
}

fn is_members(data: &[u8]) -> bool {
    data.first() == Some(&MEMBERS_VERSION)
}

impl Command {
    /// What of it may be written to disk: everything but values bound to a lease.
    pub fn without_ephemeral(&self) -> Option<Self> {
        let Op::Txn { verdict, writes, .. } = &self.op else { return None };
        let bound = |write: &Write| matches!(write, Write::Put { lease: Some(_), .. });
        if !writes.iter().any(bound) {
            return None;
        }
        let kept = writes.iter().filter(|write| !bound(write)).cloned().collect();
        Some(Self { id: self.id, op: Op::Txn { verdict: *verdict, writes: kept, stripped: true } })
    }
}

/// Largest term or index that a voter may name: Raft adds to them without a check, and no group gets there.
const NUMBER_MAX: u64 = 1 << 62;

/// Kinds that may come from the network, by their number in the crate `raft`. Proposals are forwarded as
/// `Body::Forward`, snapshots travel as `Body::Chunk`, and the rest is local.
fn kind_of(number: u8) -> Option<MessageType> {
    Some(match number {
        3 => MessageType::MsgAppend,
        4 => MessageType::MsgAppendResponse,
        5 => MessageType::MsgRequestVote,
        6 => MessageType::MsgRequestVoteResponse,
        8 => MessageType::MsgHeartbeat,
        9 => MessageType::MsgHeartbeatResponse,
        14 => MessageType::MsgTimeoutNow,
        15 => MessageType::MsgReadIndex,
        16 => MessageType::MsgReadIndexResp,
        17 => MessageType::MsgRequestPreVote,
        18 => MessageType::MsgRequestPreVoteResponse,
        _ => return None,
    })
}

impl RaftMsg {
    /// Takes the crate's message apart.
    pub fn of(message: Message) -> Self {
        Self {
            kind: message.msg_type as u8,
            term: message.term,
            log_term: message.log_term,
            index: message.index,
            commit: message.commit,
            commit_term: message.commit_term,
            reject: message.reject,
            reject_hint: message.reject_hint,
            context: message.context.to_vec(),
            entries: message
                .entries
                .iter()
                .map(|e| EntryMsg { term: e.term, index: e.index, data: data_of(e).to_vec() })
                .collect(),
        }
    }

    /// The crate's message, when a voter could have sent it: whatever the crate answers with a panic is
    /// refused here or in `guard`.
    pub fn into_message(self, from: NodeId, to: NodeId) -> Result<Message, CodecError> {
        let kind = kind_of(self.kind).ok_or(CodecError::Unexpected)?;
        let read = matches!(kind, MessageType::MsgReadIndex | MessageType::MsgReadIndexResp);
        let numbers = [self.term, self.log_term, self.index, self.commit, self.commit_term, self.reject_hint];
        if numbers.iter().any(|number| *number > NUMBER_MAX) {
            return Err(CodecError::Unexpected);
        }
        // Term 0 marks local messages, which skip every check of terms; only a forwarded read has it.
        if (self.term == 0) != (kind == MessageType::MsgReadIndex) {
            return Err(CodecError::Unexpected);
        }
        if read && self.entries.len() != 1
            || !read && kind != MessageType::MsgAppend && !self.entries.is_empty()
        {
            return Err(CodecError::Unexpected);
        }
        if kind == MessageType::MsgAppend {
            let mut previous = (self.index, self.log_term);
            for entry in &self.entries {
                if Some(entry.index) != previous.0.checked_add(1)
                    || entry.term < previous.1
                    || entry.term > self.term
                {
                    return Err(CodecError::Unexpected);
                }
                previous = (entry.index, entry.term);
            }
        }
        let mut message = Message::default();
        message.set_msg_type(kind);
        message.from = from.0;
        message.to = to.0;
        message.term = self.term;
        message.log_term = self.log_term;
        message.index = self.index;
        message.commit = self.commit;
        message.commit_term = self.commit_term;
        message.reject = self.reject;
        message.reject_hint = self.reject_hint;
        message.context = self.context.into();
        // What a read is recognized by is no command, even where its bytes look like one.
        let entry = if read { plain_entry } else { entry };
        let entries: Vec<Entry> = self.entries.into_iter().map(|e| entry(e.term, e.index, e.data)).collect();
        message.set_entries(RepeatedField::from_vec(entries));
        Ok(message)
    }
}

/// An entry of the crate's type. Its `data` is protobuf where the members change, which nobody here reads or keeps:
/// the command is beside it.
pub fn entry(term: u64, index: u64, data: Vec<u8>) -> Entry {
    if !is_members(&data) {
        return plain_entry(term, index, data);
    }
    let mut entry = Entry { term, index, ..Entry::default() };
    entry.set_entry_type(EntryType::EntryConfChangeV2);
    entry.context = data.into();
    entry
}

fn plain_entry(term: u64, index: u64, data: Vec<u8>) -> Entry {
    let mut entry = Entry { term, index, ..Entry::default() };
    entry.set_entry_type(EntryType::EntryNormal);
    entry.data = data.into();
    entry
}

/// The command of an entry.
pub fn data_of(entry: &Entry) -> &[u8] {
    match entry.get_entry_type() {
        EntryType::EntryNormal => &entry.data,
        _ => &entry.context,
    }
}
