//! What a slice's device shows, and when that is reason enough to go on without the slice.
//!
//! A write that fails stops the store by itself, because what the device did to it is unknown, and takes the
//! disk's other slices along where other copies are there. Everything else is
//! judged here, once per tick. Ticks are counted, not time: a process that was stopped for a while must not
//! take its own absence for a disk that hangs.
//!
//! | what | then |
//! |---|---|
//! | an operation says that the device is gone or has been cut short | out, at once |
//! | no operation ends for `disk_timeout_s` although some are under way | out |
//! | one operation takes three times as long although others end | out |
//! | reads fail again and again (unreadable or damaged blocks) | out, if other copies are there |
//! | `PROBES_MAX` probes of an idle device fail in a row | out, if other copies are there |
//! | `SLOW_OUT_NS` and more per operation for `SLOW_OUT_TICKS` | out, if other copies are there |
//! | an outlier among the cluster's disks (the control core says from when on) for as long | the same |
//!
//! A device that nobody uses shows nothing. So one that had nothing to do for `disk_probe_s` is made to read one block,
//! and again with every tick until that works.
//!
//! A slice that is given up stays out until its process starts again.

use crate::core::DataCore;
use crate::msg::CoreMsg;
use crate::slices::SliceLife;
use reactor::{Env, Mono};
use wire::SliceId;

/// Reads of a slice that may fail before it goes out. Each is mended from another copy, and a drive with a
/// handful of weak sectors is best read to its end; one with so many at a time is losing more than it shows.
pub(crate) const READ_ERRORS_MAX: u32 = 50;
/// Probes in a row that may fail, of one copy of the superblock and of the other in turn.
pub(crate) const PROBES_MAX: u32 = 5;
/// Ticks after which one read error is forgotten.
const READ_ERROR_TICKS: u32 = 10;
/// One operation may hang so many times longer than all of them: a drive with a deep queue may be unfair.
const HANGING_TIMES: u32 = 3;
/// Time per operation, while there is always one under way, at which a device is as good as broken: a
/// hundred times what a disk with moving parts needs.
pub(crate) const SLOW_OUT_NS: u64 = 1_000_000_000;
/// So many slow ticks take it out; each that is twice as fast as the bound takes two back.
pub(crate) const SLOW_OUT_TICKS: u32 = 30;
/// Weight of one tick in the time per operation that is reported: an eighth.
const SERVICE_WEIGHT: u64 = 8;

/// How much of a disk is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// This slice.
    Slice,
    /// The disk is not to be trusted any more: its other slices go, too, where other copies are there.
    DiskWhereSpared,
    /// The whole disk.
    Disk,
}

/// What a slice's device has done up to now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Use {
    /// Since when the oldest operation is under way.
    pub(crate) oldest: Option<Mono>,
    /// Operations ended.
    pub(crate) ended: u64,
    /// Time in which there was one under way.
    pub(crate) busy_ns: u64,
}

/// What one tick has shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Fine,
    /// It serves nobody any more.
    Stuck(String),
    /// It serves, badly.
    Bad(String),
}

/// See the module.
#[derive(Default)]
pub(crate) struct Watch {
    last: Use,
    /// Ticks in which nothing ended although something was under way.
    stuck: u32,
    /// Ticks in which the oldest operation was the same.
    hanging: u32,
    slow: u32,
    /// From this time per operation on the disk is an outlier among others; 0: never.
    outlier_ns: u64,
    /// Ticks in which it was one, as `slow`.
    outlier: u32,
    service_ns: u64,
    /// Time under way since the last end of an operation.
    unended_ns: u64,
    errors: u32,
    ticks: u32,
    /// Ticks in which there was nothing to do.
    idle: u32,
}

impl Watch {
    pub(crate) fn read_error(&mut self) {
        self.errors = self.errors.saturating_add(1);
    }

    /// Read errors not yet forgotten.
    pub(crate) fn errors(&self) -> u64 {
        u64::from(self.errors)
    }

    /// Time per operation, rounded up to a power of two so that it is seldom news; 0 before there was any.
    pub(crate) fn service_us(&self) -> u64 {
        if self.service_ns == 0 { 0 } else { (self.service_ns / 1000).max(1).next_power_of_two() }
    }

    /// Whether the device is to be asked if it is there: after so many ticks with nothing to do, and on when it has
    /// `failed` to answer the last time.
    fn wants_probe(&self, after_ticks: u32, failed: u32) -> bool {
        after_ticks > 0 && (self.idle >= after_ticks || failed > 0)
    }

    /// From so much time per operation on, in nanoseconds, the disk is an outlier; 0: never.
    pub(crate) fn outlier_from(&mut self, ns: u64) {
        self.outlier_ns = ns;
        if ns == 0 {
            self.outlier = 0;
        }
    }

    /// Looks at what the device has done since the tick before.
    pub(crate) fn tick(&mut self, now: Use, timeout_ticks: u32) -> Verdict {
        let ended = now.ended.saturating_sub(self.last.ended);
        let busy_ns = now.busy_ns.saturating_sub(self.last.busy_ns);
        let same = now.oldest.is_some() && now.oldest == self.last.oldest;
        self.hanging = if same { self.hanging + 1 } else { 0 };
        self.stuck = if same && ended == 0 { self.stuck + 1 } else { 0 };
        self.idle = if now.oldest.is_none() && ended == 0 { self.idle + 1 } else { 0 };
        self.last = now;
        self.measure(ended, busy_ns);
        self.ticks += 1;
        if self.ticks.is_multiple_of(READ_ERROR_TICKS) {
            self.errors = self.errors.saturating_sub(1);
        }
        if self.stuck >= timeout_ticks || self.hanging >= timeout_ticks.saturating_mul(HANGING_TIMES) {
            Verdict::Stuck(format!("disk hangs: an operation did not end within {} s", self.hanging))
        } else if self.errors >= READ_ERRORS_MAX {
            Verdict::Bad(format!("too many read errors: {} within minutes", self.errors))
        } else if self.slow >= SLOW_OUT_TICKS {
            let ms = self.service_ns / 1_000_000;
            Verdict::Bad(format!("disk is too slow: {ms} ms per operation"))
        } else if self.outlier >= SLOW_OUT_TICKS {
            let (ms, from_ms) = (self.service_ns / 1_000_000, self.outlier_ns / 1_000_000);
            Verdict::Bad(format!(
                "disk is slow beside the others: {ms} ms per operation, and {from_ms} ms is a multiple of what they need"
            ))
        } else {
            Verdict::Fine
        }
    }

    fn measure(&mut self, ended: u64, busy_ns: u64) {
        // Of an operation that takes several ticks, the last one would show too little.
        let busy_ns = busy_ns + std::mem::take(&mut self.unended_ns);
        let each = busy_ns / ended.max(1);
        if ended == 0 {
            self.unended_ns = busy_ns;
        }
        let count = |ticks: &mut u32, from_ns: u64| {
            if each >= from_ns / 2 {
                *ticks += u32::from(each >= from_ns);
            } else if ended > 0 {
                *ticks = ticks.saturating_sub(2);
            }
        };
        count(&mut self.slow, SLOW_OUT_NS);
        if self.outlier_ns > 0 {
            count(&mut self.outlier, self.outlier_ns);
        }
        if ended > 0 {
            let before = if self.service_ns == 0 { each } else { self.service_ns };
            self.service_ns = (before * (SERVICE_WEIGHT - 1) + each) / SERVICE_WEIGHT;
        }
    }
}

impl DataCore {
    /// Looks at every slice's device; once per tick.
    pub(crate) fn watch_disks(&mut self, env: &mut dyn Env) {
        for at in 0..self.slices.len() {
            let (timeout, probe) = (self.config.disk_timeout_s, self.config.disk_probe_s);
            let Some(slice) = self.slices.get_mut(at) else { continue };
            let Some(store) = slice.store.as_mut() else { continue };
            if !matches!(slice.life, SliceLife::Open | SliceLife::Opening) {
                continue;
            }
            let (ended, busy_ns) = store.device_use(env);
            let now = Use { oldest: store.oldest_operation(), ended, busy_ns };
            let failed = store.probes_failed();
            let verdict = match slice.watch.tick(now, timeout) {
                Verdict::Fine if failed >= PROBES_MAX => Verdict::Bad(format!(
                    "disk does not answer: the last {failed} reads of its superblock failed"
                )),
                verdict => verdict,
            };
            if slice.watch.wants_probe(probe, failed) {
                store.probe(env);
            }
            match verdict {
                Verdict::Fine => {}
                Verdict::Stuck(why) => self.give_up(env, at, why, Extent::Disk),
                Verdict::Bad(why) if self.can_spare(at) => {
                    self.give_up(env, at, why, Extent::DiskWhereSpared);
                }
                Verdict::Bad(why) => {
                    let slice = self.slices.get(at).map(|slice| slice.id).unwrap_or_default();
                    tracing::warn!(%slice, why, "a bad slice stays: it holds the only copy of something");
                }
            }
        }
    }

    /// Whether every PG has another member that is here and holds everything.
    fn can_spare(&self, at: usize) -> bool {
        let Some(slice) = self.slices.get(at).map(|slice| slice.id) else { return false };
        self.pgs.iter().filter_map(|(_, pg)| pg.update.as_ref()).all(|update| {
            let record = &update.record;
            let other = |s: &SliceId| *s != slice && record.acting.contains(s);
            !record.in_sync.contains(&slice) || record.in_sync.iter().any(other)
        })
    }

    /// The control core knows how fast other disks are.
    pub(crate) fn told_slow_from(&mut self, slice: SliceId, us: u64) {
        if let Some(slice) = self.slice_at(slice).and_then(|at| self.slices.get_mut(at)) {
            slice.watch.outlier_from(us.saturating_mul(1000));
        }
    }

    /// The control core wants a slice out.
    pub(crate) fn told_to_give_up(&mut self, env: &mut dyn Env, slice: SliceId, why: String, spared: bool) {
        if let Some(at) = self.slice_at(slice).filter(|at| !spared || self.can_spare(*at)) {
            self.give_up(env, at, why, Extent::Slice);
        }
    }

    /// A stop does not wait for disks that do not end what they were given.
    pub(crate) fn give_up_unclosed(&mut self, env: &mut dyn Env) {
        for at in 0..self.slices.len() {
            if self.slices.get(at).is_some_and(|slice| !slice.is_closed()) {
                self.give_up(env, at, "disk hangs: the slice could not be closed".to_owned(), Extent::Slice);
            }
        }
    }

    /// Goes on without a slice: whoever waits for its store gets an answer now, its PGs get other members.
    pub(crate) fn give_up(&mut self, env: &mut dyn Env, at: usize, why: String, extent: Extent) {
        let Some(slice) = self.slices.get_mut(at) else { return };
        if !matches!(slice.life, SliceLife::Open | SliceLife::Opening) {
            return;
        }
        let (id, disk) = (slice.id, slice.disk());
        tracing::error!(slice = %id, disk = disk.0, why, "slice has failed");
        slice.life = SliceLife::Failed(why.clone());
        if let Some(store) = slice.store.as_mut() {
            store.abandon();
        }
        slice.has_unflushed = true;
        self.tell(CoreMsg::SliceFailed { slice: id, why: why.clone(), extent });
        self.slice_stats();
        self.slice_failed(env, at);
        if extent != Extent::Slice {
            for other in 0..self.slices.len() {
                let same = self.slices.get(other).is_some_and(|slice| slice.disk() == disk);
                if same && (extent == Extent::Disk || self.can_spare(other)) {
                    self.give_up(env, other, why.clone(), Extent::Slice);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: u32 = 10;

    fn seconds(n: u64) -> u64 {
        n * 1_000_000_000
    }

    #[test]
    fn a_disk_that_ends_nothing_is_stuck_and_one_that_is_only_deep_is_not() {
        let mut watch = Watch::default();
        let hangs = Use { oldest: Some(Mono(5)), ended: 7, busy_ns: 0 };
        let verdicts: Vec<Verdict> = (0..=TIMEOUT).map(|_| watch.tick(hangs, TIMEOUT)).collect();
        assert!(verdicts[..TIMEOUT as usize].iter().all(|v| *v == Verdict::Fine));
        assert!(matches!(verdicts[TIMEOUT as usize], Verdict::Stuck(_)));

        // Others end all the time: this one may take longer, not for ever.
        let mut watch = Watch::default();
        let deep = |n: u64| Use { oldest: Some(Mono(5)), ended: n, busy_ns: seconds(1) };
        let first = (0..200).find(|n| matches!(watch.tick(deep(*n), TIMEOUT), Verdict::Stuck(_)));
        assert_eq!(first, Some(u64::from(TIMEOUT * HANGING_TIMES)));
    }

    #[test]
    fn a_disk_with_nothing_to_do_is_never_stuck() {
        let mut watch = Watch::default();
        for _ in 0..1000 {
            assert_eq!(watch.tick(Use { oldest: None, ended: 3, busy_ns: 9 }, 1), Verdict::Fine);
        }
    }

    #[test]
    fn slowness_counts_only_while_it_lasts() {
        let slow = |n: u64| Use { oldest: None, ended: n, busy_ns: seconds(2) * n };
        let mut watch = Watch::default();
        let out = (1..100).find(|n| watch.tick(slow(*n), TIMEOUT) != Verdict::Fine);
        assert_eq!(out, Some(u64::from(SLOW_OUT_TICKS)));
        assert!(watch.service_us() >= 2_000_000);

        // One slow second in three is never enough.
        let mut watch = Watch::default();
        let mut now = Use::default();
        for n in 0..1000u64 {
            let slow = n.is_multiple_of(3);
            now.ended += if slow { 1 } else { 100 };
            now.busy_ns += seconds(if slow { 2 } else { 1 });
            assert_eq!(watch.tick(now, TIMEOUT), Verdict::Fine);
        }
    }

    #[test]
    fn an_outlier_goes_after_a_while_and_only_while_it_is_one() {
        let at = |n: u64| Use { oldest: None, ended: n * 20, busy_ns: seconds(1) * n };
        let mut watch = Watch::default();
        assert!(
            (1..100).all(|n| watch.tick(at(n), TIMEOUT) == Verdict::Fine),
            "50 ms by itself are no fault"
        );
        watch.outlier_from(32_000_000);
        let out = (100..200).find(|n| watch.tick(at(*n), TIMEOUT) != Verdict::Fine);
        assert_eq!(out, Some(100 + u64::from(SLOW_OUT_TICKS) - 1));
        watch.outlier_from(0);
        assert_eq!(watch.tick(at(200), TIMEOUT), Verdict::Fine, "another disk is the slowest now");
        watch.outlier_from(32_000_000);
        // Nothing to do is not slow.
        assert!((0..100).all(|_| watch.tick(at(200), TIMEOUT) == Verdict::Fine));
    }

    #[test]
    fn read_errors_add_up_and_are_forgotten() {
        let mut watch = Watch::default();
        (0..READ_ERRORS_MAX).for_each(|_| watch.read_error());
        assert!(matches!(watch.tick(Use::default(), TIMEOUT), Verdict::Bad(_)));
        (0..READ_ERROR_TICKS).for_each(|_| {
            watch.tick(Use::default(), TIMEOUT);
        });
        assert_eq!(watch.tick(Use::default(), TIMEOUT), Verdict::Fine);
    }
}
