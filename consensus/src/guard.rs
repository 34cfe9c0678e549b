//! Raft messages that the crate `raft` would answer with a panic are sorted out here: a voter whose disk
//! was exchanged, a mixed-up peer or hostile bytes must not stop this process.

use crate::error::MetaError;
use crate::memlog::MemLog;
use raft::eraftpb::{Message, MessageType};
use raft::{Raft, StateRole};

/// What to do with a message.
pub enum Verdict {
    /// Give it to Raft.
    Step,
    /// No voter sends this now; ignore and count it.
    Drop,
    /// It proves that something is lost; stop.
    Halt(MetaError),
}

/// Judges a message against the state it would meet.
pub fn judge(raft: &Raft<MemLog>, message: &Message) -> Verdict {
    let last = raft.raft_log.last_index();
    if message.term != 0 && message.term < raft.term {
        return Verdict::Step; // answered or ignored before its contents matter
    }
    match message.get_msg_type() {
        MessageType::MsgHeartbeat if message.commit > last => {
            Verdict::Halt(MetaError::EntriesLost { last, expected: message.commit })
        }
        // Two leaders of one term cannot be.
        MessageType::MsgHeartbeat | MessageType::MsgAppend
            if message.term == raft.term && raft.state == StateRole::Leader =>
        {
            Verdict::Drop
        }
        // A leader's log has everything committed, so its terms cannot lie below; Raft would search for a
        // common entry below what it still has.
        MessageType::MsgAppend
            if message.index >= raft.raft_log.committed
                && message.log_term < raft.raft_log.term(raft.raft_log.committed).unwrap_or(0) =>
        {
            Verdict::Drop
        }
        MessageType::MsgAppendResponse
            if raft.state == StateRole::Leader && !message.reject && message.index > last =>
        {
            Verdict::Drop
        }
        MessageType::MsgAppendResponse | MessageType::MsgHeartbeatResponse if message.commit > last => {
            Verdict::Drop
        }
        _ => Verdict::Step,
    }
}
