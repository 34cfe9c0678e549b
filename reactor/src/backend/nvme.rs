//! NVMe commands as io_uring takes them for a namespace's character device, and what a drive answers.
//!
//! The kernel's `struct nvme_uring_cmd` and the status codes of the NVMe base specification. Statuses become the errors
//! that the block path has for them, so that nobody above knows which path a disk takes.

use crate::env::DiskError;

/// `NVME_URING_CMD_IO`: one buffer.
pub(crate) const ONE: u32 = 0xc048_4e80;
/// `NVME_URING_CMD_IO_VEC`: `addr` and `data_len` are a vector of buffers and how many.
pub(crate) const MANY: u32 = 0xc048_4e81;
/// Sectors that a read or write moves at most: 16 bits, counted from zero.
pub(crate) const SECTORS_MAX: u64 = 1 << 16;
/// Sectors that one range of a discard has at most.
const RANGE_SECTORS_MAX: u64 = u32::MAX as u64;

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const DATASET_MANAGEMENT: u8 = 0x09;
/// In the twelfth word of a write: durable when it completes.
const FUA: u32 = 1 << 30;
/// In the eleventh word of dataset management: the ranges are not needed any more.
const DEALLOCATE: u32 = 1 << 2;

/// Bytes of a discard's range.
pub(crate) const RANGE_BYTES: usize = 16;

/// One command.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Command {
    opcode: u8,
    namespace: u32,
    addr: u64,
    data_len: u32,
    words: [u32; 3],
}

impl Command {
    pub(crate) fn read(namespace: u32, sector: u64, sectors: u64) -> Self {
        let words = [sector as u32, (sector >> 32) as u32, sectors.wrapping_sub(1) as u16 as u32];
        Self { opcode: READ, namespace, words, ..Self::default() }
    }

    pub(crate) fn write(namespace: u32, sector: u64, sectors: u64, durable: bool) -> Self {
        let mut write = Self { opcode: WRITE, ..Self::read(namespace, sector, sectors) };
        let [.., last] = &mut write.words;
        *last |= if durable { FUA } else { 0 };
        write
    }

    pub(crate) fn flush(namespace: u32) -> Self {
        Self { opcode: FLUSH, namespace, ..Self::default() }
    }

    /// Of one range, which is the data (`range`).
    pub(crate) fn discard(namespace: u32) -> Self {
        Self { opcode: DATASET_MANAGEMENT, namespace, words: [0, DEALLOCATE, 0], ..Self::default() }
    }

    /// With one buffer, or a vector of `data_len` buffers.
    pub(crate) fn data(self, addr: *const u8, data_len: usize) -> Self {
        Self { addr: addr as u64, data_len: data_len as u32, ..self }
    }

    /// `struct nvme_uring_cmd`: opcode, flags 1, reserved 2, namespace, words 2 and 3, metadata 8, address 8, length
    /// of metadata, length of data, words 10 to 15, timeout, reserved. What is zero stays zero: the kernel's own
    /// timeout for one.
    pub(crate) fn encode(self) -> [u8; 80] {
        let mut bytes = [0; 80];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(0, &[self.opcode]);
        put(4, &self.namespace.to_le_bytes());
        put(24, &self.addr.to_le_bytes());
        put(36, &self.data_len.to_le_bytes());
        for (at, word) in (40..).step_by(4).zip(self.words) {
            put(at, &word.to_le_bytes());
        }
        bytes
    }
}

/// How many sectors of these one discard takes.
pub(crate) fn range_sectors(sectors: u64) -> u64 {
    sectors.min(RANGE_SECTORS_MAX)
}

/// The data of a discard: attributes 4, sectors 4, first sector 8.
pub(crate) fn range(sector: u64, sectors: u64) -> [u8; RANGE_BYTES] {
    let mut bytes = [0; RANGE_BYTES];
    let (head, first) = bytes.split_at_mut(8);
    head[4..].copy_from_slice(&(sectors as u32).to_le_bytes());
    first.copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// What became of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Done,
    /// It was not carried out, and may be a little later: the controller is being reset, or is not ready. On the block
    /// path the kernel waits for that; of commands it expects that whoever sends them does.
    Later,
    /// The drive does not know the command or this form of it.
    Unsupported,
    Failed(DiskError),
}

/// Do not retry.
const DNR: u32 = 0x4000;

/// Reads a completion's result: an errno as negative number, or the drive's status, of which 11 bits say what it is.
pub(crate) fn outcome(result: i32) -> Outcome {
    let io = |errno| Outcome::Failed(DiskError::Io(errno));
    let Ok(status) = u32::try_from(result) else {
        return match -result {
            // The kernel says so of a command that a reset has cancelled, too.
            libc::EINTR | libc::EAGAIN => Outcome::Later,
            libc::ENODEV | libc::ENXIO => Outcome::Failed(DiskError::Gone),
            libc::EOPNOTSUPP => Outcome::Unsupported,
            errno => io(errno),
        };
    };
    let may_retry = status & DNR == 0;
    match status & 0x7ff {
        0 => Outcome::Done,
        // Aborted on request, with its queue, or interrupted; not ready; all kinds of trouble on the path, of which a
        // controller under reset is one.
        0x007 | 0x008 | 0x021 | 0x082 | 0x300..=0x3ff if may_retry => Outcome::Later,
        // Invalid opcode, invalid field.
        0x001 | 0x002 => Outcome::Unsupported,
        // No such namespace any more; the path is gone for good.
        0x00b | 0x300..=0x3ff => Outcome::Failed(DiskError::Gone),
        // Beyond its end, although ours was checked at opening.
        0x080 => Outcome::Failed(DiskError::Truncated),
        0x081 => Outcome::Failed(DiskError::NoSpace),
        0x020 | 0x182 => io(libc::EROFS),
        0x083 => io(libc::EBADE),
        // Write fault, unrecovered read error, access denied, unwritten block.
        0x280 | 0x281 | 0x286 | 0x287 => io(libc::ENODATA),
        // Protection information does not fit.
        0x282..=0x284 => io(libc::EILSEQ),
        _ => io(libc::EIO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_lie_where_the_kernel_looks() {
        let bytes = Command::write(7, 0x1_2345_6789, 8, true).data(0x1000 as *const u8, 4096).encode();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((bytes[0], word(4), word(24), word(28), word(36)), (WRITE, 7, 0x1000, 0, 4096));
        assert_eq!((word(40), word(44), word(48)), (0x2345_6789, 1, 7 | FUA));
        let expected = [0, 4, 24, 25, 36, 37, 40, 41, 42, 43, 44, 48, 51];
        let set: Vec<usize> = (0..80).filter(|at| bytes[*at] != 0).collect();
        assert!(set.iter().all(|at| expected.contains(at)), "{set:?}");
        assert_eq!(Command::read(7, 5, SECTORS_MAX).words, [5, 0, 0xffff]);
        assert_eq!(Command::write(7, 5, 1, false).words, [5, 0, 0]);
        assert_eq!((Command::flush(7).encode()[0], Command::discard(7).encode()[0]), (FLUSH, 9));
        assert_eq!(Command::discard(7).words, [0, 4, 0]);
        assert_eq!(range(0x0102, 3), [0, 0, 0, 0, 3, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn statuses_are_the_errors_of_the_block_path() {
        let io = |errno| Outcome::Failed(DiskError::Io(errno));
        for (result, wanted) in [
            (0, Outcome::Done),
            (-libc::EINTR, Outcome::Later),
            (-libc::ENODEV, Outcome::Failed(DiskError::Gone)),
            (-libc::EIO, io(libc::EIO)),
            (0x281, io(libc::ENODATA)),
            (0x4281, io(libc::ENODATA)),
            (0x280, io(libc::ENODATA)),
            (0x282, io(libc::EILSEQ)),
            (0x4080, Outcome::Failed(DiskError::Truncated)),
            (0x081, Outcome::Failed(DiskError::NoSpace)),
            (0x400b, Outcome::Failed(DiskError::Gone)),
            (0x082, Outcome::Later),
            (0x4082, io(libc::EIO)),
            (0x370, Outcome::Later),
            (0x4370, Outcome::Failed(DiskError::Gone)),
            (0x4002, Outcome::Unsupported),
            (0x006, io(libc::EIO)),
        ] {
            assert_eq!(outcome(result), wanted, "{result:#x}");
        }
    }
}
