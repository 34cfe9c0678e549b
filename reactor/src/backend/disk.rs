//! Disk operations of one core in flight: from `Disk::submit` to exactly one `DiskDone`.

use super::core::CoreError;
use super::disk_file::DiskFile;
use super::late_disks::LateDisks;
use super::namespace::Namespace;
use super::nvme::{self, Command, Outcome};
use super::polled::PollRing;
use super::ring::{Class, Completion, Ring};
use super::stats::CoreStats;
use crate::buf::IoBuf;
use crate::env::{DiskError, DiskIndex, DiskInfo, DiskOp, Event, Full, IOV_MAX, Mono, Token};
use io_uring::{opcode, squeue, types};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Disk operations of one core in flight, over all its disks: eight drives at depth 128, beyond which a
/// drive only queues.
pub const DISK_OPS_MAX: usize = 1024;
/// Operations that each disk of a core may have in flight, however many disks there are. A core with more
/// than eight has room for more in all.
///
/// Each disk has an equal share of the room that is its own: a drive that ends nothing any more must not
/// take the room of the others.
const OPS_PER_DISK_MIN: usize = 128;
/// Times an operation is submitted again after EINTR or EAGAIN before that counts as an error: a device
/// that never gets beyond it would keep the loop busy for ever.
const RETRIES_MAX: u8 = 100;

/// How long a command waits that the drive takes a little later: `RETRIES_MAX` of these are as long as a disk may end
/// nothing (`node.disk_timeout` by default).
static LATER: types::Timespec = types::Timespec::new().nsec(100_000_000);
/// In the user data: it is not the command that has ended, but its wait.
const WAITED: u64 = 1 << 32;

struct InFlight {
    disk: DiskIndex,
    token: Token,
    op: DiskOp,
    /// Bytes done by earlier submissions of the same operation.
    done: usize,
    /// Bytes that the command under way is for, when it succeeds.
    asked: usize,
    retries: u8,
    /// Submitted to the ring that is polled.
    polled: bool,
}

#[derive(Default)]
struct Slot {
    op: Option<InFlight>,
    /// What the kernel reads while the operation is in flight. Kept for reuse.
    iovecs: Vec<libc::iovec>,
    /// The same for a discard by command.
    range: [u8; nvme::RANGE_BYTES],
}

/// The disks of one core.
pub(crate) struct Disks {
    /// Before what the kernel reads and writes through it.
    polled: PollRing,
    files: Vec<Arc<DiskFile>>,
    /// Those that came while the core runs are behind these.
    registered: usize,
    late: LateDisks,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Operations in flight, by disk.
    in_flight_of: Vec<usize>,
    /// The most that one disk may have.
    share: usize,
    stats: Arc<CoreStats>,
}

/// What to do with an operation after a completion.
enum Next {
    Done(Result<(), DiskError>),
    Again,
    /// After a while.
    Later,
}

impl Disks {
    pub(crate) fn new(
        files: Vec<Arc<DiskFile>>,
        late: LateDisks,
        polled: PollRing,
        ring: &mut Ring,
        stats: Arc<CoreStats>,
    ) -> Self {
        ring.register_files(&files.iter().map(|file| file.fd()).collect::<Vec<_>>());
        let (slots, share) = room(files.len());
        Self {
            polled,
            in_flight_of: vec![0; files.len()],
            share,
            registered: files.len(),
            late,
            files,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            free: (0..slots as u32).rev().collect(),
            stats,
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn info(&self, disk: DiskIndex) -> Option<DiskInfo> {
        match self.files.get(usize::from(disk.0)) {
            Some(file) => Some(file.info()),
            None => self.late.get(disk).map(|file| file.info()),
        }
    }

    /// Takes the disks up to this one over that have come since; each brings room of its own. They are used by their
    /// descriptors: the kernel's table of registered files has no place for more.
    fn adopt(&mut self, disk: DiskIndex) {
        while self.files.len() <= usize::from(disk.0)
            && let Some(file) =
                u16::try_from(self.files.len()).ok().and_then(|at| self.late.get(DiskIndex(at)))
        {
            self.files.push(file);
            self.in_flight_of.push(0);
            let from = self.slots.len();
            self.slots.resize_with(from + OPS_PER_DISK_MIN, Slot::default);
            self.free.extend((from..self.slots.len()).rev().map(|index| index as u32));
        }
    }

    /// The most operations that a disk may have.
    fn share_of(&self, disk: usize) -> usize {
        if disk < self.registered { self.share } else { OPS_PER_DISK_MIN }
    }

    /// Starts an operation. One that cannot even start completes with an error through `events`.
    pub(crate) fn submit(
        &mut self,
        ring: &mut Ring,
        events: &mut VecDeque<Event>,
        disk: DiskIndex,
        op: DiskOp,
        token: Token,
    ) -> Result<(), (Full, DiskOp)> {
        let Some(info) = self.info(disk) else {
            events.push_back(Event::DiskDone { disk, token, result: Err(DiskError::Gone), op });
            return Ok(());
        };
        if let Err(error) = check(&info, &op) {
            events.push_back(Event::DiskDone { disk, token, result: Err(error), op });
            return Ok(());
        }
        let namespace = self.files.get(usize::from(disk.0)).and_then(|file| file.namespace());
        if let Some(error) = namespace.and_then(|namespace| check_sectors(namespace, &op)) {
            events.push_back(Event::DiskDone { disk, token, result: Err(error), op });
            return Ok(());
        }
        let forgets = namespace.is_none_or(|namespace| namespace.discard_max() > 0);
        if total_bytes(&op) == Some(0) || matches!(op, DiskOp::Discard { len, .. } if len == 0 || !forgets) {
            events.push_back(Event::DiskDone { disk, token, result: Ok(()), op });
            return Ok(());
        }
        let at = usize::from(disk.0);
        if at >= self.files.len() {
            self.adopt(disk);
        }
        let share = self.share_of(at);
        let Some(count) = self.in_flight_of.get_mut(at).filter(|count| **count < share) else {
            return Err((Full, op));
        };
        let Some(index) = self.free.pop() else { return Err((Full, op)) };
        *count += 1;
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.op = Some(InFlight { disk, token, op, done: 0, asked: 0, retries: 0, polled: false });
        }
        self.push(ring, index);
        self.stats.disk_in_flight.set(self.in_flight() as u64);
        Ok(())
    }

    fn push(&mut self, ring: &mut Ring, index: u32) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        let Slot { op: Some(op), iovecs, range } = slot else { return };
        let Some(file) = self.files.get(usize::from(op.disk.0)) else { return };
        let polled = self.polled.takes(usize::from(op.disk.0), &op.op);
        op.polled = polled.is_some();
        let ring = polled.unwrap_or(ring);
        if let Some(namespace) = file.namespace() {
            let entry = build_command(op, iovecs, range, ring, namespace, file.info());
            // SAFETY: as below; a discard's range lies in the slot.
            let taken =
                entry.is_some_and(|entry| unsafe { ring.push_command(entry, Class::Disk, u64::from(index)) });
            debug_assert!(taken, "the core's rings take commands, and operations are of whole blocks");
            return;
        }
        let entry = if ring.knows_files() && usize::from(op.disk.0) < self.registered {
            let index = types::Fd(i32::from(op.disk.0));
            build(op, iovecs, ring, index, file.info()).flags(squeue::Flags::FIXED_FILE)
        } else {
            build(op, iovecs, ring, types::Fd(file.fd()), file.info())
        };
        // SAFETY: the buffers live in the slot's operation and the vector in the slot until the
        // completion has been taken; reads have the only handle to their memory.
        unsafe { ring.push(entry, Class::Disk, u64::from(index)) }
    }

    /// Takes a completion: continues a partial operation or ends it.
    pub(crate) fn completed(
        &mut self,
        ring: &mut Ring,
        events: &mut VecDeque<Event>,
        completion: &Completion,
    ) {
        let index = completion.data as u32;
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        let Some(op) = &mut slot.op else { return };
        if completion.data & WAITED != 0 {
            return self.push(ring, index);
        }
        if op.polled && completion.result == -libc::EOPNOTSUPP {
            tracing::warn!(disk = op.disk.0, "the drive cannot be polled after all; it interrupts instead");
            self.polled.give_up(usize::from(op.disk.0));
            return self.push(ring, index);
        }
        let is_command =
            self.files.get(usize::from(op.disk.0)).is_some_and(|file| file.namespace().is_some());
        let next = match is_command {
            true => judge_command(op, completion.result),
            false => judge(op, completion.result),
        };
        match next {
            Next::Again => self.push(ring, index),
            Next::Later => {
                let entry = opcode::Timeout::new(&raw const LATER).build();
                // SAFETY: the time is static.
                unsafe { ring.push(entry, Class::Disk, u64::from(index) | WAITED) }
            }
            Next::Done(result) => {
                if let Some(InFlight { disk, token, op, polled, .. }) = slot.op.take() {
                    self.free.push(index);
                    self.stats.polled_ops.add(u64::from(polled));
                    if let Some(count) = self.in_flight_of.get_mut(usize::from(disk.0)) {
                        *count -= 1;
                    }
                    self.stats.disk_ops.add(1);
                    events.push_back(Event::DiskDone { disk, token, result, op });
                    self.stats.disk_in_flight.set(self.in_flight() as u64);
                }
            }
        }
    }
}

impl Disks {
    /// Whether operations are under way that nobody hears of without looking.
    pub(crate) fn is_polling(&self) -> bool {
        self.polled.is_busy()
    }

    /// Looks once for such completions. Returns how long the loop may sleep afterwards.
    pub(crate) fn look(&mut self, now: Mono) -> Result<Duration, CoreError> {
        self.polled.look(now)
    }

    /// Moves up to `max` of them into `out`.
    pub(crate) fn reap_polled(&mut self, out: &mut Vec<Completion>, max: usize, now: Mono) {
        self.polled.reap(out, max, now);
    }

    /// Waits until the polled ring has let go of all memory; false when it has not in time.
    pub(crate) fn drain_polled(&mut self) -> bool {
        self.polled.drain()
    }

    /// Gives up the memory of operations in flight for ever.
    pub(crate) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.slots));
    }
}

/// Slots for so many disks, and how many of them one disk may have.
fn room(disks: usize) -> (usize, usize) {
    if disks == 0 {
        return (0, 0);
    }
    let slots = DISK_OPS_MAX.max(disks * OPS_PER_DISK_MIN);
    (slots, slots / disks)
}

/// Bytes that an operation moves; `None` when it moves none by nature.
fn total_bytes(op: &DiskOp) -> Option<usize> {
    match op {
        DiskOp::Read { buf, .. } => Some(buf.len()),
        DiskOp::Write { bufs, .. } => Some(bufs.iter().map(IoBuf::len).sum()),
        DiskOp::Flush | DiskOp::Discard { .. } => None,
    }
}

fn check(info: &DiskInfo, op: &DiskOp) -> Result<(), DiskError> {
    let (offset, len) = match op {
        DiskOp::Read { offset, buf } => (*offset, buf.len() as u64),
        DiskOp::Write { bufs, .. } if bufs.len() > IOV_MAX => return Err(DiskError::Io(libc::EINVAL)),
        DiskOp::Write { offset, .. } => (*offset, total_bytes(op).unwrap_or(0) as u64),
        DiskOp::Discard { offset, len } => (*offset, *len),
        DiskOp::Flush => return Ok(()),
    };
    match offset.checked_add(len) {
        Some(end) if end <= info.size_bytes => Ok(()),
        _ => Err(DiskError::OutOfRange),
    }
}

/// What is wrong with an operation for a drive that takes whole sectors only.
fn check_sectors(namespace: &Namespace, op: &DiskOp) -> Option<DiskError> {
    let (offset, len) = match op {
        DiskOp::Read { offset, buf } => (*offset, buf.len() as u64),
        DiskOp::Write { offset, .. } => (*offset, total_bytes(op).unwrap_or(0) as u64),
        DiskOp::Discard { offset, len } => (*offset, *len),
        DiskOp::Flush => return None,
    };
    let fits = len == 0 || namespace.sectors(offset, len).is_some();
    (!fits).then_some(DiskError::Io(libc::EINVAL))
}

/// Appends what is left of `bufs` after `skip` bytes, joining neighbours in memory.
fn gather(bufs: &[IoBuf], mut skip: usize, out: &mut Vec<libc::iovec>) {
    out.clear();
    for buf in bufs {
        let part = skip.min(buf.len());
        skip -= part;
        if part == buf.len() {
            continue;
        }
        let base = buf.as_ptr().wrapping_add(part);
        let len = buf.len() - part;
        match out.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => {
                last.iov_len += len;
            }
            _ => out.push(libc::iovec { iov_base: base.cast(), iov_len: len }),
        }
    }
}

fn build(
    op: &InFlight,
    iovecs: &mut Vec<libc::iovec>,
    ring: &Ring,
    fd: types::Fd,
    info: DiskInfo,
) -> squeue::Entry {
    match &op.op {
        DiskOp::Read { offset, buf } => {
            let at = offset + op.done as u64;
            let base = buf.as_ptr().wrapping_add(op.done);
            let len = buf.len() - op.done;
            if ring.is_registered(base, len) {
                opcode::ReadFixed::new(fd, base, len as u32, 0).offset(at).build()
            } else {
                opcode::Read::new(fd, base, len as u32).offset(at).build()
            }
        }
        DiskOp::Write { offset, bufs, durable } => {
            let at = offset + op.done as u64;
            let flags = if *durable && !info.write_through { libc::RWF_DSYNC } else { 0 };
            gather(bufs, op.done, iovecs);
            match iovecs.as_slice() {
                [one] if ring.is_registered(one.iov_base.cast(), one.iov_len) => {
                    opcode::WriteFixed::new(fd, one.iov_base.cast(), one.iov_len as u32, 0)
                        .offset(at)
                        .rw_flags(flags)
                        .build()
                }
                [one] => opcode::Write::new(fd, one.iov_base.cast(), one.iov_len as u32)
                    .offset(at)
                    .rw_flags(flags)
                    .build(),
                many => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                    .offset(at)
                    .rw_flags(flags)
                    .build(),
            }
        }
        DiskOp::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        DiskOp::Discard { offset, len } => opcode::Fallocate::new(fd, *len)
            .offset(*offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
    }
}

fn judge(op: &mut InFlight, result: i32) -> Next {
    if result < 0 {
        let again = matches!(-result, libc::EINTR | libc::EAGAIN) && op.retries < RETRIES_MAX;
        if again {
            op.retries += 1;
            return Next::Again;
        }
        // Nothing has to happen on a discard, so a device that cannot is no error.
        if matches!(op.op, DiskOp::Discard { .. }) && matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS) {
            return Next::Done(Ok(()));
        }
        return Next::Done(Err(match -result {
            libc::ENOSPC | libc::EDQUOT => DiskError::NoSpace,
            libc::ENODEV | libc::ENXIO | libc::ENOMEDIUM => DiskError::Gone,
            errno => DiskError::Io(errno),
        }));
    }
    let Some(total) = total_bytes(&op.op) else { return Next::Done(Ok(())) };
    op.done += result as usize;
    if op.done >= total {
        Next::Done(Ok(()))
    } else if result == 0 {
        // The range was checked against the size at opening.
        Next::Done(Err(DiskError::Truncated))
    } else {
        Next::Again
    }
}

/// Cuts a vector off behind so many bytes. Returns how many are left.
fn cut(iovecs: &mut Vec<libc::iovec>, max: usize) -> usize {
    let mut bytes = 0;
    let mut kept = 0;
    for iovec in iovecs.iter_mut() {
        if bytes == max {
            break;
        }
        iovec.iov_len = iovec.iov_len.min(max - bytes);
        bytes += iovec.iov_len;
        kept += 1;
    }
    iovecs.truncate(kept);
    bytes
}

/// The next command of an operation: what is left of it, as far as one command goes. `None` for what is no sectors of
/// the drive.
fn build_command(
    op: &mut InFlight,
    iovecs: &mut Vec<libc::iovec>,
    range: &mut [u8; nvme::RANGE_BYTES],
    ring: &Ring,
    namespace: &Namespace,
    info: DiskInfo,
) -> Option<squeue::Entry128> {
    let (id, done, max) = (namespace.id(), op.done, namespace.transfer_max());
    let (mut kind, mut buffer) = (nvme::ONE, None);
    let command = match &op.op {
        DiskOp::Read { offset, buf } => {
            let (base, len) = (buf.as_ptr().wrapping_add(done), (buf.len() - done).min(max));
            let (sector, sectors) = namespace.sectors(offset + done as u64, len as u64)?;
            op.asked = len;
            buffer = ring.is_registered(base, len).then_some(0);
            Command::read(id, sector, sectors).data(base, len)
        }
        DiskOp::Write { offset, bufs, durable } => {
            gather(bufs, done, iovecs);
            let len = cut(iovecs, max);
            let (sector, sectors) = namespace.sectors(offset + done as u64, len as u64)?;
            op.asked = len;
            let command = Command::write(id, sector, sectors, *durable && !info.write_through);
            match iovecs.as_slice() {
                [one] => {
                    let base = one.iov_base.cast::<u8>();
                    buffer = ring.is_registered(base, len).then_some(0);
                    command.data(base, len)
                }
                many => {
                    kind = nvme::MANY;
                    command.data(many.as_ptr().cast(), many.len())
                }
            }
        }
        DiskOp::Flush => {
            op.asked = 0;
            Command::flush(id)
        }
        DiskOp::Discard { offset, len } => {
            let part = (len - done as u64).min(namespace.discard_max());
            let (sector, sectors) = namespace.sectors(offset + done as u64, part)?;
            let now = nvme::range_sectors(sectors);
            op.asked = (part / sectors * now) as usize;
            *range = nvme::range(sector, now);
            Command::discard(id).data(range.as_ptr(), range.len())
        }
    };
    let (index, fd) = (types::Fixed(u32::from(op.disk.0)), types::Fd(namespace.fd()));
    let entry = match ring.knows_files() {
        true => opcode::UringCmd80::new(index, kind),
        false => opcode::UringCmd80::new(fd, kind),
    };
    Some(entry.buf_index(buffer).cmd(command.encode()).build())
}

/// As `judge`, for a command.
fn judge_command(op: &mut InFlight, result: i32) -> Next {
    match nvme::outcome(result) {
        Outcome::Done => {
            op.done += op.asked;
            let total = match &op.op {
                DiskOp::Discard { len, .. } => *len as usize,
                other => total_bytes(other).unwrap_or(0),
            };
            if op.done >= total { Next::Done(Ok(())) } else { Next::Again }
        }
        Outcome::Later if op.retries < RETRIES_MAX => {
            op.retries += 1;
            Next::Later
        }
        // Nothing has to happen on a discard.
        Outcome::Unsupported if matches!(op.op, DiskOp::Discard { .. }) => Next::Done(Ok(())),
        Outcome::Unsupported => Next::Done(Err(DiskError::Io(libc::EOPNOTSUPP))),
        Outcome::Later => Next::Done(Err(DiskError::Io(libc::EIO))),
        Outcome::Failed(error) => Next::Done(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::Arena;

    #[test]
    fn gathering_joins_neighbours_and_skips_what_is_done() {
        let arena = Arena::new(1 << 20).unwrap();
        let whole = arena.alloc(16384).unwrap();
        let other = arena.alloc(4096).unwrap();
        let bufs = [whole.slice(0, 4096), whole.slice(4096, 4096), whole.slice(12288, 4096), other];
        let mut out = Vec::new();
        gather(&bufs, 0, &mut out);
        let lens = |out: &[libc::iovec]| out.iter().map(|v| v.iov_len).collect::<Vec<_>>();
        assert!(matches!(lens(&out).as_slice(), [8192, 4096, 4096] | [8192, 8192]));
        gather(&bufs, 6144, &mut out);
        assert_eq!(lens(&out)[0], 2048);
        assert_eq!(out[0].iov_base as usize, whole.as_ptr() as usize + 6144);
        gather(&bufs, 16384, &mut out);
        assert!(out.is_empty());
    }

    #[test]
    fn a_disk_that_ends_nothing_leaves_the_others_their_room() {
        assert_eq!(room(0), (0, 0));
        assert_eq!(room(1), (DISK_OPS_MAX, DISK_OPS_MAX));
        for disks in 1..64 {
            let (slots, share) = room(disks);
            assert!(share >= OPS_PER_DISK_MIN && share * disks <= slots, "{disks} disks: {slots}, {share}");
        }
    }

    fn read_of(arena: &Arena, bytes: usize) -> InFlight {
        let op = DiskOp::Read { offset: 0, buf: arena.alloc(bytes).unwrap() };
        InFlight { disk: DiskIndex(0), token: Token(0), op, done: 0, asked: 0, retries: 0, polled: false }
    }

    #[test]
    fn commands_that_are_cancelled_go_again_a_little_later_and_not_for_ever() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut one = read_of(&arena, 8192);
        one.asked = 4096;
        assert!(matches!(judge_command(&mut one, -libc::EINTR), Next::Later));
        assert!(matches!(judge_command(&mut one, 0x008), Next::Later));
        assert_eq!(one.done, 0);
        assert!(matches!(judge_command(&mut one, 0), Next::Again));
        assert!(matches!(judge_command(&mut one, 0), Next::Done(Ok(()))));
        let bad = DiskError::Io(libc::ENODATA);
        assert!(matches!(judge_command(&mut read_of(&arena, 4096), 0x281), Next::Done(Err(e)) if e == bad));
        let mut stuck = read_of(&arena, 4096);
        let turns =
            (0..).take_while(|_| matches!(judge_command(&mut stuck, -libc::EINTR), Next::Later)).count();
        assert_eq!(turns, usize::from(RETRIES_MAX));
        let mut discard = InFlight { op: DiskOp::Discard { offset: 0, len: 4096 }, ..read_of(&arena, 4096) };
        assert!(matches!(judge_command(&mut discard, 0x4002), Next::Done(Ok(()))));
    }

    #[test]
    fn a_vector_is_cut_off_where_a_command_ends() {
        let base = std::ptr::null_mut::<libc::c_void>();
        let of = |lens: &[usize]| -> Vec<libc::iovec> {
            lens.iter().map(|len| libc::iovec { iov_base: base, iov_len: *len }).collect()
        };
        for (lens, max, left) in [
            (&[4096, 8192][..], 16384, &[4096, 8192][..]),
            (&[4096, 8192, 4096], 8192, &[4096, 4096]),
            (&[4096, 8192, 4096], 12288, &[4096, 8192]),
        ] {
            let mut iovecs = of(lens);
            assert_eq!(cut(&mut iovecs, max), left.iter().sum::<usize>());
            assert_eq!(iovecs.iter().map(|iovec| iovec.iov_len).collect::<Vec<_>>(), left);
        }
    }

    #[test]
    fn short_transfers_go_on_and_errors_are_told_apart() {
        let arena = Arena::new(1 << 20).unwrap();
        let op = || InFlight {
            disk: DiskIndex(0),
            token: Token(0),
            op: DiskOp::Read { offset: 0, buf: arena.alloc(8192).unwrap() },
            done: 0,
            retries: 0,
            asked: 0,
            polled: false,
        };
        let mut one = op();
        assert!(matches!(judge(&mut one, 4096), Next::Again));
        assert!(matches!(judge(&mut one, -libc::EINTR), Next::Again));
        assert!(matches!(judge(&mut one, 4096), Next::Done(Ok(()))));
        assert!(matches!(judge(&mut op(), 0), Next::Done(Err(DiskError::Truncated))));
        assert!(matches!(judge(&mut op(), -libc::ENOSPC), Next::Done(Err(DiskError::NoSpace))));
        assert!(matches!(judge(&mut op(), -libc::ENODEV), Next::Done(Err(DiskError::Gone))));
        assert!(matches!(judge(&mut op(), -libc::EIO), Next::Done(Err(DiskError::Io(libc::EIO)))));
        let mut stuck = op();
        let ends =
            (0..=RETRIES_MAX as usize + 1).any(|_| matches!(judge(&mut stuck, -libc::EAGAIN), Next::Done(_)));
        assert!(ends, "an operation that is always told to retry must end");
    }
}
