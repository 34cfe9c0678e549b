//! Messages of the control plane: the payload of `Hello` and `Control` frames, encoded with rkyv and
//! decoded only through its checked API.

// rkyv's derive gives its archived twins' fields no docs; every item written here has its own.
#![allow(missing_docs)]

use crate::{ClusterId, NodeId, Revision, SessionId, Status};
use rkyv::{Archive, Deserialize, Serialize, rancor};
use thiserror::Error;

/// Who opens a connection.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A client library instance.
    Client,
    /// A core of a node.
    Node(NodeId),
}

/// First message in both directions of every framed connection.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The sender's cluster; a client that does not know yet sends `None` and takes the answer's.
    pub cluster: Option<ClusterId>,
    /// Who is calling.
    pub role: Role,
    /// The sender's running instance.
    pub session: SessionId,
    /// Counts the sender's connections to this receiver: operations of an older one are refused.
    pub incarnation: u64,
    /// Why the receiver refuses the connection, in its answer; `0` = welcome (`Status` as a byte).
    pub refused: u8,
}

/// A condition on one key, checked before a transaction's writes.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Compare {
    /// The key's last modification is exactly this revision.
    ModRevision {
        /// The key.
        key: String,
        /// Expected; `Revision(0)` means "does not exist".
        revision: Revision,
    },
    /// The key exists.
    Exists {
        /// The key.
        key: String,
    },
    /// The key exists and is bound to this lease.
    Bound {
        /// The key.
        key: String,
        /// The lease.
        lease: u64,
    },
}

/// One write of a transaction.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Write {
    /// Sets a key. `value` is JSON text.
    Put {
        /// The key.
        key: String,
        /// JSON.
        value: String,
        /// Bind the key to this lease: it vanishes with it and is kept in memory only.
        lease: Option<u64>,
    },
    /// Removes a key; removing a missing key is no error.
    Delete {
        /// The key.
        key: String,
    },
    /// Removes every key with this prefix.
    DeletePrefix {
        /// The prefix.
        prefix: String,
    },
}

/// A request to the metadata store.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum MetaRequest {
    /// All keys with a prefix (an exact key is its own prefix), linearizable.
    Range {
        /// The prefix.
        prefix: String,
        /// At most this many.
        limit: u32,
    },
    /// If all compares hold, apply all writes at one new revision.
    Txn {
        /// Conditions.
        compares: Vec<Compare>,
        /// Writes.
        writes: Vec<Write>,
    },
    /// Create or renew a lease. The store answers with the time to live it granted.
    LeaseKeep {
        /// Chosen by the owner: its `SessionId`.
        lease: u64,
        /// Wanted time to live.
        ttl_ms: u64,
    },
    /// End a lease now; its keys vanish.
    LeaseRevoke {
        /// The lease.
        lease: u64,
    },
    /// Change who keeps the metadata. `Applied` says that the change has begun: the new voters are filled
    /// first and vote only then; `Voters` shows how far it is. One change at a time.
    ChangeVoters {
        /// Nodes that become voters.
        add: Vec<VoterAddress>,
        /// Voters that cease to be.
        remove: Vec<NodeId>,
    },
    /// Give up a change whose new voters do not vote yet.
    CancelVoters,
    /// Who keeps the metadata, as the leader sees it.
    Voters,
}

/// A node and where its control core is reached.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct VoterAddress {
    /// The node.
    pub node: NodeId,
    /// `IP:PORT`.
    pub address: String,
}

/// What a member of the metadata group is.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum VoterRole {
    /// Leads.
    Leader,
    /// Votes.
    Voter,
    /// Is being filled, and does not vote yet.
    Learner,
    /// Votes until the change that removes it is complete.
    Leaving,
}

/// A member of the metadata group, as its leader sees it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct VoterInfo {
    /// The node.
    pub node: NodeId,
    /// What it is.
    pub role: VoterRole,
    /// Where it is reached; empty when the leader was never told.
    pub address: String,
    /// Log entries that it does not have yet.
    pub behind: u64,
    /// It has answered the leader lately.
    pub heard: bool,
}

/// A key with its value.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// JSON text.
    pub value: String,
    /// When it was last written.
    pub mod_revision: Revision,
    /// The lease it is bound to.
    pub lease: Option<u64>,
}

/// The store's answer.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum MetaReply {
    /// To `Range`.
    Range {
        /// The store's revision when it was read.
        revision: Revision,
        /// In key order.
        items: Vec<KeyValue>,
        /// There is more behind the last item.
        more: bool,
    },
    /// To `Txn`: it was applied at this revision.
    Applied {
        /// The new revision.
        revision: Revision,
    },
    /// To `Txn`: a compare did not hold, nothing was written.
    CompareFailed {
        /// Index of the first compare that failed.
        index: u32,
    },
    /// To `LeaseKeep` and `LeaseRevoke`.
    Lease {
        /// Granted time to live; 0 = the lease does not exist (any more).
        ttl_ms: u64,
    },
    /// It could not be done; `Status` as a byte. `Unknown` means it may have been done.
    Failed {
        /// Why.
        status: u8,
    },
    /// To `Voters`.
    Voters {
        /// All members, by number.
        members: Vec<VoterInfo>,
        /// Who will vote when the change under way is complete; empty without one.
        target: Vec<NodeId>,
        /// No change is under way, and every voter that can be heard knows so: any majority can go on.
        settled: bool,
    },
}

/// One change of one key.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The key now has this value.
    Put(KeyValue),
    /// The key is gone.
    Delete {
        /// The key.
        key: String,
    },
}

/// Everything that a control connection carries after `Hello`.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum ControlMsg {
    /// Ask the metadata store; any node answers, forwarding when it must.
    Meta {
        /// Chosen by the caller.
        ticket: u64,
        /// The request.
        request: MetaRequest,
    },
    /// The answer.
    MetaReply {
        /// From the request.
        ticket: u64,
        /// The answer.
        reply: MetaReply,
    },
    /// Watch all keys with these prefixes: the answer is one `Snapshot` (possibly in parts) and then
    /// `Changes` without a gap or a repetition. Replaces the connection's earlier subscription.
    Subscribe {
        /// Key prefixes.
        prefixes: Vec<String>,
    },
    /// Current values; the last part has `more == false`.
    Snapshot {
        /// Revision of the snapshot.
        revision: Revision,
        /// In key order.
        items: Vec<KeyValue>,
        /// More parts follow.
        more: bool,
    },
    /// All watched changes of one revision: one multi-key transaction is one message.
    Changes {
        /// The revision.
        revision: Revision,
        /// In write order.
        changes: Vec<Change>,
    },
    /// Consensus traffic between voters, opaque here (`consensus` checks it).
    Raft {
        /// Encoded by `consensus`.
        bytes: Vec<u8>,
    },
    /// "I could not reach this node: its host refused the connection."
    Refused {
        /// The unreachable node.
        node: NodeId,
    },
    /// A slice's counters for `status`: JSON, kept in memory by the metadata leader.
    Stats {
        /// JSON text.
        json: String,
    },
    /// The request could not be understood or served.
    Error {
        /// `Status` as a byte.
        status: u8,
        /// For a person.
        message: String,
    },
}

/// Bytes that are not a control message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("malformed control message")]
pub struct Malformed;

macro_rules! codec {
    ($type:ident) => {
        impl $type {
            /// Encodes; fails only when memory does.
            pub fn encode(&self) -> Vec<u8> {
                rkyv::to_bytes::<rancor::Failure>(self).map(|b| b.into_vec()).unwrap_or_default()
            }

            /// Decodes with full validation.
            pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
                rkyv::from_bytes::<$type, rancor::Failure>(bytes).map_err(|_| Malformed)
            }
        }
    };
}

codec!(Hello);
codec!(ControlMsg);

impl MetaReply {
    /// A failure as a reply.
    pub fn failed(status: Status) -> Self {
        Self::Failed { status: status as u8 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire_and_garbage_does_not() {
        let msg = ControlMsg::Meta {
            ticket: 7,
            request: MetaRequest::Txn {
                compares: vec![Compare::ModRevision { key: "/a".into(), revision: Revision(0) }],
                writes: vec![Write::Put { key: "/a".into(), value: "{}".into(), lease: Some(1) }],
            },
        };
        let bytes = msg.encode();
        assert_eq!(ControlMsg::decode(&bytes), Ok(msg));
        assert!(ControlMsg::decode(&bytes[..bytes.len() - 3]).is_err());
        assert!(ControlMsg::decode(&[0xff; 64]).is_err());
        assert!(Hello::decode(&[]).is_err());
    }
}
