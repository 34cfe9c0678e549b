//! A core's second ring, for drives whose driver has queues to poll.
//!
//! Completions of such a ring (IORING_SETUP_IOPOLL) raise no interrupt: they are found when somebody looks. The loop
//! therefore looks in every turn while operations are under way here, and cannot sleep meanwhile; with nothing under
//! way it parks in its ordinary ring as ever. A drive that ends nothing for a while is looked at less often: it must
//! not keep the CPU busy for ever.
//!
//! Only reads and writes come here. Flushes and discards are the ordinary ring's, and so is whatever this one refuses.

use super::core::CoreError;
use super::disk_file::DiskFile;
use super::ring::{Completion, Ring};
use crate::buf::Arena;
use crate::env::{DiskOp, Mono};
use std::sync::Arc;
use std::time::Duration;

/// How long operations may be under way without any ending before the loop sleeps between two looks: longer than
/// any drive that is worth polling takes.
const PATIENCE_NS: u64 = 10_000_000;
/// Such a sleep.
const NAP: Duration = Duration::from_millis(1);

/// Whether drives are polled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Polling {
    /// Those whose driver has queues for it.
    Auto,
    /// None.
    #[default]
    Never,
}

/// A disk, as far as polling goes.
#[derive(Clone, Copy)]
struct Polled {
    /// Its driver has queues to poll, and nothing has been refused so far.
    polls: bool,
    /// The device makes a single write durable. Where it cannot, the kernel sends a flush after the write, and only
    /// the ordinary ring takes that for what it is: one operation that takes long.
    durable: bool,
}

/// The ring, and which disks use it.
pub(crate) struct PollRing {
    /// `None` when no disk is polled.
    ring: Option<Ring>,
    disks: Vec<Polled>,
    /// When something last began on an empty ring, or ended.
    last: Mono,
}

impl PollRing {
    /// A ring if any of the disks can be polled and the kernel makes one.
    pub(crate) fn new(
        polling: Polling,
        files: &[Arc<DiskFile>],
        make: impl FnOnce() -> Result<Ring, CoreError>,
    ) -> Self {
        let of =
            |file: &Arc<DiskFile>| Polled { polls: file.is_polled(polling), durable: file.writes_durably() };
        let disks: Vec<Polled> = files.iter().map(of).collect();
        let mut ring = None;
        if disks.iter().any(|disk| disk.polls) {
            ring = make()
                .inspect_err(|error| tracing::warn!(%error, "no ring for polling: drives interrupt instead"))
                .ok();
        }
        if let Some(ring) = &mut ring {
            ring.register_files(&files.iter().map(|file| file.fd()).collect::<Vec<_>>());
        }
        Self { ring, disks, last: Mono::default() }
    }

    /// As for the ordinary ring.
    pub(crate) fn register_arena(&mut self, arena: &Arena, max: usize) {
        if let Some(ring) = &mut self.ring {
            ring.register_arena(arena, max);
        }
    }

    /// The ring for an operation of a disk, if it is one to poll for.
    pub(crate) fn takes(&mut self, disk: usize, op: &DiskOp) -> Option<&mut Ring> {
        let known = self.disks.get(disk).filter(|disk| disk.polls)?;
        let fits = match op {
            DiskOp::Read { .. } => true,
            DiskOp::Write { durable, .. } => !durable || known.durable,
            DiskOp::Flush | DiskOp::Discard { .. } => false,
        };
        self.ring.as_mut().filter(|_| fits)
    }

    /// A disk's driver has refused to be polled, whatever the kernel says of it.
    pub(crate) fn give_up(&mut self, disk: usize) {
        if let Some(disk) = self.disks.get_mut(disk) {
            disk.polls = false;
        }
    }

    /// Whether operations are under way here.
    pub(crate) fn is_busy(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.outstanding() > 0)
    }

    /// Submits what is queued and looks once for completions. Returns how long the loop may sleep afterwards.
    pub(crate) fn look(&mut self, now: Mono) -> Result<Duration, CoreError> {
        let Some(ring) = &mut self.ring else { return Ok(Duration::ZERO) };
        // Nothing under way but what is still queued: patience begins anew.
        if ring.outstanding() <= ring.queued() {
            self.last = now;
        }
        ring.enter(0, None)?;
        let tired = !ring.has_completions() && now.since(self.last) > PATIENCE_NS;
        Ok(if tired { NAP } else { Duration::ZERO })
    }

    /// Moves up to `max` completions into `out`.
    pub(crate) fn reap(&mut self, out: &mut Vec<Completion>, max: usize, now: Mono) {
        let Some(ring) = &mut self.ring else { return };
        let before = out.len();
        ring.reap(out, max);
        if out.len() > before {
            self.last = now;
        }
    }

    /// As for the ordinary ring.
    pub(crate) fn drain(&mut self) -> bool {
        self.ring.as_mut().is_none_or(Ring::drain)
    }
}

#[cfg(test)]
mod tests {
    use super::super::clock::mono;
    use super::super::disk::Disks;
    use super::super::late_disks::LateDisks;
    use super::super::ring::RingKind;
    use super::super::stats::CoreStats;
    use super::*;
    use crate::env::{DiskIndex, Event, Token};
    use std::collections::VecDeque;

    const POLLED: RingKind = RingKind { movable: false, polled: true, commands: false };

    /// A file as a disk that claims to have queues to poll.
    fn liar(dir: &tempfile::TempDir) -> (Disks, Ring, Arc<CoreStats>) {
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7u8; 8192]).unwrap();
        let files = vec![DiskFile::open(&path).unwrap()];
        let stats = Arc::<CoreStats>::default();
        let mut ring = Ring::new(8, RingKind::default(), stats.clone()).unwrap();
        let mut polled = PollRing::new(Polling::Auto, &files, || unreachable!("a file is not polled"));
        assert!(polled.ring.is_none() && polled.takes(0, &DiskOp::Flush).is_none());
        let mut second = Ring::new(8, POLLED, stats.clone()).unwrap();
        second.register_files(&files.iter().map(|file| file.fd()).collect::<Vec<_>>());
        polled.ring = Some(second);
        polled.disks = vec![Polled { polls: true, durable: true }];
        let disks = Disks::new(files, LateDisks::default(), polled, &mut ring, stats.clone());
        (disks, ring, stats)
    }

    /// How long an operation may take when others have the processors.
    const LIMIT_NS: u64 = 20_000_000_000;

    /// Turns as the loop does until an operation has ended.
    fn ended(disks: &mut Disks, ring: &mut Ring, events: &mut VecDeque<Event>) -> Event {
        let begun = mono();
        while mono().since(begun) < LIMIT_NS {
            if let Some(event) = events.pop_front() {
                return event;
            }
            let mut found = Vec::new();
            if disks.is_polling() {
                disks.look(mono()).unwrap();
            }
            ring.enter(0, Some(NAP)).unwrap();
            ring.reap(&mut found, 8);
            disks.reap_polled(&mut found, 8, mono());
            for completion in &found {
                disks.completed(ring, events, completion);
            }
            std::thread::yield_now();
        }
        panic!("nothing ended");
    }

    #[test]
    fn what_cannot_be_polled_goes_on_in_the_ordinary_ring() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (mut disks, mut ring, stats) = liar(&dir);
        let (arena, mut events) = (Arena::new(1 << 20).unwrap(), VecDeque::new());
        for round in 0..2 {
            let op = DiskOp::Read { offset: 4096, buf: arena.alloc(4096).unwrap() };
            disks.submit(&mut ring, &mut events, DiskIndex(0), op, Token(round)).map_err(|_| ()).unwrap();
            assert_eq!(disks.is_polling(), round == 0, "the first finds out, the second knows");
            let Event::DiskDone { result, op: DiskOp::Read { buf, .. }, .. } =
                ended(&mut disks, &mut ring, &mut events)
            else {
                panic!("not what was asked for")
            };
            assert!(result.is_ok() && buf.as_slice().iter().all(|byte| *byte == 7));
        }
        assert_eq!((stats.disk_ops.get(), stats.polled_ops.get()), (2, 0));
        assert!(disks.drain_polled() && ring.drain());
    }

    #[test]
    fn only_reads_and_writes_that_the_device_can_do_alone_are_polled() {
        let arena = Arena::new(1 << 20).unwrap();
        let block = || arena.alloc(4096).unwrap();
        let stats = Arc::<CoreStats>::default();
        let write = |durable| DiskOp::Write { offset: 0, bufs: vec![block()], durable };
        for able in [false, true] {
            let mut polled = PollRing {
                ring: Some(Ring::new(8, POLLED, stats.clone()).unwrap()),
                disks: vec![Polled { polls: true, durable: able }, Polled { polls: false, durable: able }],
                last: Mono::default(),
            };
            assert!(polled.takes(0, &DiskOp::Read { offset: 0, buf: block() }).is_some());
            assert!(polled.takes(0, &write(false)).is_some());
            assert_eq!(polled.takes(0, &write(true)).is_some(), able);
            assert!(polled.takes(0, &DiskOp::Flush).is_none());
            assert!(polled.takes(0, &DiskOp::Discard { offset: 0, len: 4096 }).is_none());
            assert!(polled.takes(1, &write(false)).is_none());
        }
    }
}
