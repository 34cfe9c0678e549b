//! Images on their way from one voter to another, in chunks, one unanswered chunk at a time: a snapshot
//! must not crowd out heartbeats, and the receiver's memory is bounded by what it has asked for.

use crate::bounds::{CHUNK_BYTES, CHUNK_RETRIES_MAX, CHUNK_RETRY_TICKS, IMAGE_BYTES_MAX};
use crate::codec::Chunk;
use std::collections::BTreeMap;
use wire::NodeId;

/// An image being sent.
#[derive(Debug)]
struct Outgoing {
    transfer: u64,
    whole: bool,
    term: u64,
    index: u64,
    bytes: Vec<u8>,
    crc: u32,
    acked: usize,
    sent_at: u64,
    retries: u32,
}

impl Outgoing {
    fn piece(&self) -> &[u8] {
        let rest = self.bytes.get(self.acked..).unwrap_or(&[]);
        rest.get(..rest.len().min(CHUNK_BYTES)).unwrap_or(&[])
    }

    fn chunk(&self) -> Chunk {
        Chunk {
            transfer: self.transfer,
            whole: self.whole,
            term: self.term,
            index: self.index,
            total: self.bytes.len() as u64,
            crc: self.crc,
            offset: self.acked as u64,
            bytes: self.piece().to_vec(),
        }
    }
}

/// An image being received.
#[derive(Debug)]
struct Incoming {
    from: NodeId,
    transfer: u64,
    whole: bool,
    index: u64,
    total: u64,
    crc: u32,
    bytes: Vec<u8>,
    heard_at: u64,
}

/// A received image.
#[derive(Debug)]
pub struct Received {
    /// See `Chunk`.
    pub whole: bool,
    /// See `Chunk`.
    pub term: u64,
    /// The image.
    pub bytes: Vec<u8>,
}

/// What an acknowledgement led to.
#[derive(Debug)]
pub enum Next {
    /// Nothing to do.
    Nothing,
    /// Send this.
    Send(Chunk),
    /// The receiver has everything; `whole` as in `Chunk`.
    Done {
        /// It was a snapshot.
        whole: bool,
    },
}

/// All transfers of a voter.
#[derive(Debug, Default)]
pub struct Transfers {
    next: u64,
    outgoing: BTreeMap<NodeId, Outgoing>,
    incoming: Option<Incoming>,
}

impl Transfers {
    /// Numbers transfers from `start` on: a run's numbers lie above those of earlier runs when `start` is
    /// taken from a clock or drawn at random; equal numbers would only mix two images, which the
    /// checksum then tells.
    pub fn new(start: u64) -> Self {
        Self { next: start, ..Self::default() }
    }

    /// Whether an image is on its way to `to`: a snapshot, when `whole`.
    pub fn is_sending(&self, to: NodeId, whole: bool) -> bool {
        self.outgoing.get(&to).is_some_and(|out| out.whole || !whole)
    }

    /// Starts to send an image; replaces an earlier one to the same voter.
    pub fn start(
        &mut self,
        to: NodeId,
        whole: bool,
        term: u64,
        index: u64,
        bytes: Vec<u8>,
        tick: u64,
    ) -> Chunk {
        self.next = self.next.wrapping_add(1);
        let crc = crc32fast::hash(&bytes);
        let transfer = self.next;
        let out = Outgoing { transfer, whole, term, index, bytes, crc, acked: 0, sent_at: tick, retries: 0 };
        let chunk = out.chunk();
        self.outgoing.insert(to, out);
        chunk
    }

    /// Takes an acknowledgement.
    pub fn acked(&mut self, from: NodeId, transfer: u64, upto: u64, tick: u64) -> Next {
        let Some(out) = self.outgoing.get_mut(&from).filter(|out| out.transfer == transfer) else {
            return Next::Nothing;
        };
        if upto != (out.acked + out.piece().len()) as u64 {
            return Next::Nothing; // of a repeated chunk, answered before
        }
        out.acked += out.piece().len();
        out.sent_at = tick;
        out.retries = 0;
        if out.acked < out.bytes.len() {
            return Next::Send(out.chunk());
        }
        let whole = out.whole;
        self.outgoing.remove(&from);
        Next::Done { whole }
    }

    /// Chunks to be repeated, and voters whose snapshot is given up.
    pub fn tick(&mut self, tick: u64) -> (Vec<(NodeId, Chunk)>, Vec<NodeId>) {
        let mut again = Vec::new();
        let mut failed = Vec::new();
        self.outgoing.retain(|to, out| {
            if tick.saturating_sub(out.sent_at) < CHUNK_RETRY_TICKS {
                return true;
            }
            out.sent_at = tick;
            out.retries += 1;
            if out.retries > CHUNK_RETRIES_MAX {
                if out.whole {
                    failed.push(*to);
                }
                return false;
            }
            again.push((*to, out.chunk()));
            true
        });
        let patience = CHUNK_RETRY_TICKS * u64::from(CHUNK_RETRIES_MAX);
        if self.incoming.as_ref().is_some_and(|inc| tick.saturating_sub(inc.heard_at) > patience) {
            self.incoming = None;
        }
        (again, failed)
    }

    /// Takes a chunk. The first result is what to acknowledge, the second a complete image.
    pub fn take(&mut self, from: NodeId, chunk: Chunk, tick: u64) -> (Option<u64>, Option<Received>) {
        let len = chunk.bytes.len() as u64;
        let fits = chunk.offset.checked_add(len).is_some_and(|end| end <= chunk.total);
        if !fits || len == 0 || len > CHUNK_BYTES as u64 || chunk.total > IMAGE_BYTES_MAX as u64 {
            return (None, None);
        }
        let same = |inc: &Incoming| inc.from == from && inc.transfer == chunk.transfer;
        if chunk.offset == 0 && !self.incoming.as_ref().is_some_and(same) {
            self.incoming = Some(Incoming {
                from,
                transfer: chunk.transfer,
                whole: chunk.whole,
                index: chunk.index,
                total: chunk.total,
                crc: chunk.crc,
                bytes: Vec::new(),
                heard_at: tick,
            });
        }
        let Some(inc) = self.incoming.as_mut().filter(|inc| same(inc)) else { return (None, None) };
        if chunk.offset == inc.bytes.len() as u64 && inc.total == chunk.total {
            inc.bytes.extend_from_slice(&chunk.bytes);
            inc.heard_at = tick;
        } else if chunk.offset + len > inc.bytes.len() as u64 {
            return (None, None); // a piece between is missing
        }
        let upto = chunk.offset + len;
        if (inc.bytes.len() as u64) < inc.total {
            return (Some(upto), None);
        }
        let Some(inc) = self.incoming.take() else { return (None, None) };
        if crc32fast::hash(&inc.bytes) != inc.crc {
            return (None, None);
        }
        let received = Received { whole: inc.whole, term: chunk.term, bytes: inc.bytes };
        (Some(upto), Some(received))
    }

    /// Index of an ephemeral image that is arriving: nothing behind it may be applied before it is there.
    pub fn ephemeral_arriving(&self) -> Option<u64> {
        self.incoming.as_ref().filter(|inc| !inc.whole).map(|inc| inc.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_arrives_through_loss_and_repetition() {
        let image: Vec<u8> = (0..3 * CHUNK_BYTES + 17).map(|i| i as u8).collect();
        let (mut a, mut b) = (Transfers::new(0), Transfers::new(0));
        let mut chunk = a.start(NodeId(2), true, 5, 100, image.clone(), 0);
        let mut received = None;
        for tick in 1..200 {
            if tick % 3 == 0 {
                // Lost: the sender repeats it.
                let again = (tick..tick + CHUNK_RETRY_TICKS + 1).find_map(|t| a.tick(t).0.pop());
                chunk = again.unwrap().1;
            }
            let (upto, done) = b.take(NodeId(1), chunk.clone(), tick);
            let (repeated, _) = b.take(NodeId(1), chunk.clone(), tick);
            assert!(repeated.is_none() || repeated == upto);
            received = done.or(received);
            match a.acked(NodeId(2), chunk.transfer, upto.unwrap(), tick) {
                Next::Send(next) => chunk = next,
                Next::Done { whole } => {
                    assert!(whole);
                    break;
                }
                Next::Nothing => panic!("acknowledged"),
            }
        }
        assert_eq!(received.unwrap().bytes, image);
        assert!(!a.is_sending(NodeId(2), true));
    }

    #[test]
    fn an_unanswered_snapshot_is_given_up() {
        let mut a = Transfers::new(0);
        a.start(NodeId(2), true, 5, 100, vec![1; 10], 0);
        let failed = (1..1000).find_map(|tick| a.tick(tick).1.pop());
        assert_eq!(failed, Some(NodeId(2)));
    }

    #[test]
    fn pieces_out_of_bounds_are_ignored() {
        let mut b = Transfers::new(0);
        let mut chunk = Transfers::new(0).start(NodeId(2), true, 5, 100, vec![1; 10], 0);
        chunk.offset = u64::MAX;
        assert!(b.take(NodeId(1), chunk.clone(), 0).0.is_none());
        chunk.offset = 0;
        chunk.total = u64::MAX;
        assert!(b.take(NodeId(1), chunk, 0).0.is_none());
    }
}
