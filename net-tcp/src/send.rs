//! Sending: frames wait in a bounded queue and leave gathered, many per system call.

use io_uring::{opcode, squeue, types};
use reactor::{Frame, Full, IoBuf, SEND_QUEUE_FRAMES};
use std::collections::VecDeque;
use std::os::fd::RawFd;

/// Pieces in one send: two per frame, so up to 64 frames.
const PIECES_MAX: usize = 128;
/// Bytes in one send, roughly: what a socket's buffer takes before it makes us wait anyway.
const SEND_BYTES_MAX: usize = 1 << 20;
/// A send of at most so many bytes practically always fits a socket's buffer.
const SHORT_BYTES: usize = 32 * 1024;
/// Encoded headers kept for reuse by one core: as many as frames are under way at full depth.
const HEADS_KEPT: usize = 4096;

/// Recycled memory for encoded headers, shared by a core's connections.
#[derive(Default)]
pub(crate) struct Heads(Vec<Vec<u8>>);

impl Heads {
    fn take(&mut self) -> Vec<u8> {
        self.0.pop().unwrap_or_default()
    }

    fn give(&mut self, head: Vec<u8>) {
        if head.capacity() > 0 && self.0.len() < HEADS_KEPT {
            self.0.push(head);
        }
    }
}

/// One frame, or one run of raw bytes (then without a head).
struct Item {
    head: Vec<u8>,
    payload: Option<IoBuf>,
}

impl Item {
    fn len(&self) -> usize {
        self.head.len() + self.payload.as_ref().map_or(0, IoBuf::len)
    }
}

/// A connection's outgoing side.
pub(crate) struct Sender {
    queue: VecDeque<Item>,
    /// Bytes of the first item that have left already.
    done: usize,
    pieces: Vec<libc::iovec>,
    message: libc::msghdr,
}

impl Sender {
    pub(crate) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            done: 0,
            pieces: Vec::with_capacity(PIECES_MAX),
            // SAFETY: msghdr is plain data, for which zero bytes are a valid (empty) value.
            message: unsafe { std::mem::zeroed() },
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(crate) fn push_frame(&mut self, heads: &mut Heads, frame: Frame) -> Result<(), Full> {
        if self.queue.len() >= SEND_QUEUE_FRAMES {
            return Err(Full);
        }
        let mut head = heads.take();
        frame.header.encode_into(&frame.crcs, &mut head);
        self.queue.push_back(Item { head, payload: frame.payload });
        Ok(())
    }

    pub(crate) fn push_bytes(&mut self, bytes: IoBuf) -> Result<(), Full> {
        if self.queue.len() >= SEND_QUEUE_FRAMES {
            return Err(Full);
        }
        if !bytes.is_empty() {
            self.queue.push_back(Item { head: Vec::new(), payload: Some(bytes) });
        }
        Ok(())
    }

    /// The next send of what is queued, and whether it is short; it points into this, which must stay where
    /// it is.
    pub(crate) fn next(&mut self, fd: RawFd) -> Option<(squeue::Entry, bool)> {
        self.pieces.clear();
        let mut skip = self.done;
        let mut bytes = 0;
        for item in &self.queue {
            if self.pieces.len() + 2 > PIECES_MAX || bytes >= SEND_BYTES_MAX {
                break;
            }
            let payload = item.payload.as_ref().map_or((std::ptr::null_mut(), 0), |b| (b.as_ptr(), b.len()));
            for (base, len) in [(item.head.as_ptr().cast_mut(), item.head.len()), payload] {
                let part = skip.min(len);
                skip -= part;
                if part < len {
                    let base = base.wrapping_add(part).cast();
                    self.pieces.push(libc::iovec { iov_base: base, iov_len: len - part });
                    bytes += len - part;
                }
            }
        }
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let short = bytes <= SHORT_BYTES;
        let entry = match self.pieces.as_slice() {
            [] => return None,
            [one] => {
                let base = one.iov_base.cast::<u8>().cast_const();
                opcode::Send::new(types::Fd(fd), base, one.iov_len as u32).flags(flags).build()
            }
            many => {
                self.message.msg_iov = many.as_ptr().cast_mut();
                self.message.msg_iovlen = many.len();
                opcode::SendMsg::new(types::Fd(fd), &raw const self.message).flags(flags as u32).build()
            }
        };
        Some((entry, short))
    }

    /// `bytes` have left.
    pub(crate) fn advance(&mut self, heads: &mut Heads, bytes: usize) {
        self.done += bytes;
        while let Some(front) = self.queue.front() {
            let len = front.len();
            if self.done < len {
                return;
            }
            self.done -= len;
            if let Some(item) = self.queue.pop_front() {
                heads.give(item.head);
            }
        }
        // Back to its beginning: what is queued next finds memory that is in the cache.
        self.queue.clear();
        self.done = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::{BlockCrcs, FrameKind, HEADER_BYTES, Header};

    fn frame(payload: usize) -> Frame {
        let payload = (payload > 0).then(|| IoBuf::heap(payload).unwrap());
        Frame { header: Header::new(FrameKind::Ping, 1), crcs: BlockCrcs::default(), payload }
    }

    fn lens(sender: &mut Sender) -> Vec<usize> {
        sender.next(0);
        sender.pieces.iter().map(|piece| piece.iov_len).collect()
    }

    #[test]
    fn partial_sends_go_on_where_they_stopped() {
        let (mut sender, mut heads) = (Sender::new(), Heads::default());
        for payload in [4096, 0, 8192] {
            sender.push_frame(&mut heads, frame(payload)).unwrap();
        }
        assert_eq!(lens(&mut sender), [HEADER_BYTES, 4096, HEADER_BYTES, HEADER_BYTES, 8192]);
        sender.advance(&mut heads, 10);
        assert_eq!(lens(&mut sender), [HEADER_BYTES - 10, 4096, HEADER_BYTES, HEADER_BYTES, 8192]);
        sender.advance(&mut heads, HEADER_BYTES - 10 + 96);
        assert_eq!(lens(&mut sender), [4000, HEADER_BYTES, HEADER_BYTES, 8192]);
        sender.advance(&mut heads, 4000 + 2 * HEADER_BYTES + 8191);
        assert_eq!(lens(&mut sender), [1]);
        sender.advance(&mut heads, 1);
        assert!(sender.is_empty() && sender.next(0).is_none());
        assert_eq!(heads.0.len(), 3, "headers' memory is kept for reuse");
    }

    #[test]
    fn one_send_is_bounded_and_so_is_the_queue() {
        let (mut sender, mut heads) = (Sender::new(), Heads::default());
        for _ in 0..SEND_QUEUE_FRAMES {
            sender.push_frame(&mut heads, frame(100)).unwrap();
        }
        assert_eq!(sender.push_frame(&mut heads, frame(0)), Err(Full));
        assert_eq!(lens(&mut sender).len(), PIECES_MAX);
    }
}
