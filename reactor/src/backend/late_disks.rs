//! Disks that a process takes while its cores run.
//!
//! They are opened by whoever does that outside all loops, since opening may wait for the drive, and given an index
//! behind the disks that the cores began with. A core meets one when its service first uses that index: nothing has to
//! be announced, and what the other disks do does not change.

use super::disk_file::DiskFile;
use crate::env::DiskIndex;
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// Disks that a process may take while it runs, until it is started again. Each costs the cores that use it room for
/// its operations, which is not given back.
pub const LATE_DISKS_MAX: usize = 64;

/// There are too many.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("this process has taken {LATE_DISKS_MAX} disks since it was started; restart it to take more")]
pub struct TooManyDisks;

/// Shared by the cores of a process and by who opens disks.
#[derive(Clone, Debug)]
pub struct LateDisks {
    first: u16,
    files: Arc<Mutex<Vec<Arc<DiskFile>>>>,
}

impl LateDisks {
    /// None yet, behind so many disks that were there at the start.
    pub fn behind(disks: usize) -> Self {
        Self { first: u16::try_from(disks).unwrap_or(u16::MAX), files: Arc::default() }
    }

    /// From now on the cores can use a disk under the index returned.
    pub fn add(&self, file: Arc<DiskFile>) -> Result<DiskIndex, TooManyDisks> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let at = u16::try_from(files.len()).ok().and_then(|at| self.first.checked_add(at));
        let at = at.filter(|_| files.len() < LATE_DISKS_MAX).ok_or(TooManyDisks)?;
        files.push(file);
        Ok(DiskIndex(at))
    }

    /// The disk of an index behind those of the start. Cores ask once, then they have it.
    pub(crate) fn get(&self, disk: DiskIndex) -> Option<Arc<DiskFile>> {
        let at = disk.0.checked_sub(self.first)?;
        self.files.lock().unwrap_or_else(PoisonError::into_inner).get(usize::from(at)).cloned()
    }
}

impl Default for LateDisks {
    fn default() -> Self {
        Self::behind(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::clock::mono;
    use super::super::disk::Disks;
    use super::super::polled::{PollRing, Polling};
    use super::super::ring::{Ring, RingKind};
    use super::*;
    use crate::buf::Arena;
    use crate::env::{DiskOp, Event, Token};
    use std::collections::VecDeque;
    use std::time::Duration;

    /// How long an operation may take when others have the processors.
    const LIMIT_NS: u64 = 20_000_000_000;

    #[test]
    fn a_disk_that_comes_later_serves_beside_the_others_and_has_room_of_its_own() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = |name: &str, byte: u8| {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![byte; 8192]).unwrap();
            DiskFile::open(&path).unwrap()
        };
        let (files, late) = (vec![file("first", 1)], LateDisks::behind(1));
        let mut ring = Ring::new(8, RingKind::default(), Arc::default()).unwrap();
        let polled = PollRing::new(Polling::Never, &files, || unreachable!("nothing is polled"));
        let mut disks = Disks::new(files, late.clone(), polled, &mut ring, Arc::default());
        assert!(disks.info(DiskIndex(1)).is_none());
        assert_eq!(late.add(file("second", 2)), Ok(DiskIndex(1)));
        assert_eq!(late.add(file("third", 3)), Ok(DiskIndex(2)));
        let (arena, mut events) = (Arena::new(8 << 20).unwrap(), VecDeque::new());
        // All room of the first is taken.
        let op = || DiskOp::Read { offset: 4096, buf: arena.alloc(4096).unwrap() };
        let mut given = 0;
        while disks.submit(&mut ring, &mut events, DiskIndex(0), op(), Token(1)).is_ok() {
            given += 1;
        }
        for disk in [2, 1] {
            assert_eq!(disks.info(DiskIndex(disk)).unwrap().size_bytes, 8192);
            let done = disks.submit(&mut ring, &mut events, DiskIndex(disk), op(), Token(disk.into()));
            assert!(done.is_ok(), "disk {disk} has no room");
            given += 1;
        }
        let (begun, mut found) = (mono(), Vec::new());
        for _ in 0..given {
            while events.is_empty() {
                assert!(mono().since(begun) < LIMIT_NS, "nothing ended");
                ring.enter(0, Some(Duration::from_millis(1))).unwrap();
                found.clear();
                ring.reap(&mut found, 8);
                found.iter().for_each(|completion| disks.completed(&mut ring, &mut events, completion));
            }
            let Some(Event::DiskDone { disk, result, op: DiskOp::Read { buf, .. }, .. }) = events.pop_front()
            else {
                panic!("not what was asked for")
            };
            assert!(result.is_ok() && buf.as_slice().iter().all(|byte| u16::from(*byte) == disk.0 + 1));
        }
        assert!(ring.drain());
    }

    #[test]
    fn there_is_a_bound() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 8192]).unwrap();
        let (file, late) = (DiskFile::open(&path).unwrap(), LateDisks::behind(3));
        for at in 0..LATE_DISKS_MAX as u16 {
            assert_eq!(late.add(file.clone()), Ok(DiskIndex(3 + at)));
        }
        assert_eq!(late.add(file), Err(TooManyDisks));
        assert!(late.get(DiskIndex(2)).is_none() && late.get(DiskIndex(3)).is_some());
    }
}
