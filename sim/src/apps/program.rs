//! Programs: operations of a region that belong together.

use super::{Kind, Mix};
use simenv::rng::Stream;
use std::collections::VecDeque;

/// A step of a program. Positions are blocks in the region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Writes blocks with this note.
    Write {
        /// First block.
        at: u64,
        /// How many.
        blocks: u64,
        /// What the pages say, see `Page::note`; the second word counts up from block to block.
        note: [u64; 2],
    },
    /// Makes blocks read as zeroes.
    Zero {
        /// First block.
        at: u64,
        /// How many.
        blocks: u64,
        /// By a discard.
        discard: bool,
    },
    /// Reads and compares.
    Read {
        /// First block.
        at: u64,
        /// How many.
        blocks: u64,
    },
    /// Reads, and writes back with the note that was found plus one.
    Modify {
        /// First block.
        at: u64,
        /// How many.
        blocks: u64,
    },
    /// A flush.
    Flush,
    /// Everything before must be done first.
    Barrier,
}

/// Where a log stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LogAt {
    /// Counts the times it has begun anew.
    pub round: u64,
    /// The next block of a record; the first is 1, the head is block 0.
    pub next: u64,
}

/// Longest operation of `Kind::Long`, in blocks: four objects are touched.
const LONG_MAX: u64 = 96;
/// Longest record of a log.
const RECORD_MAX: u64 = 8;

fn range(rng: &mut Stream, total: u64, max: u64) -> (u64, u64) {
    let at = rng.below(total);
    (at, rng.between(1, max.min(total - at)))
}

/// Small numbers are much more likely than large ones: about one in `n` is `n`.
fn skewed(rng: &mut Stream, total: u64) -> u64 {
    let bits = u64::from(64 - total.leading_zeros());
    let below = rng.below(bits + 1);
    rng.below(1 << below).min(total - 1)
}

/// The next program of a region.
pub fn draw(kind: Kind, mix: &Mix, log: &mut LogAt, rng: &mut Stream) -> VecDeque<Action> {
    let total = mix.region_blocks;
    let count = rng.between(1, mix.batch);
    let mut program = VecDeque::new();
    match kind {
        Kind::Log => {
            for _ in 0..count {
                let blocks = rng.between(1, RECORD_MAX);
                log.next = log.next.max(1);
                if log.next + blocks > total {
                    *log = LogAt { round: log.round + 1, next: 1 };
                    // The records of two rounds ago are about to go: the head must not need them.
                    program.extend([Action::Barrier, head(*log), Action::Barrier]);
                }
                program.push_back(Action::Write { at: log.next, blocks, note: [log.round, log.next] });
                log.next += blocks;
            }
            program.extend([Action::Barrier, Action::Flush, Action::Barrier, head(*log), Action::Barrier]);
        }
        Kind::Pages => {
            let pages = total / mix.page_blocks;
            let first = rng.below(pages);
            for nth in 0..count.min(pages) {
                let page = if rng.coin() { (first + nth) % pages } else { rng.below(pages) };
                program.push_back(Action::Modify { at: page * mix.page_blocks, blocks: mix.page_blocks });
            }
            program.extend([Action::Barrier, Action::Flush, Action::Barrier]);
            program.push_back(Action::Read { at: first * mix.page_blocks, blocks: mix.page_blocks });
        }
        Kind::Long => {
            for _ in 0..count.div_ceil(4) {
                let (at, blocks) = range(rng, total, LONG_MAX);
                program.push_back(Action::Write { at, blocks, note: [0, 0] });
                let (at, blocks) = range(rng, total, LONG_MAX);
                program.push_back(Action::Read { at, blocks });
            }
        }
        Kind::Holes => {
            let (at, blocks) = range(rng, total, 40);
            for _ in 0..count {
                let from = at + rng.below(blocks);
                let some = rng.between(1, at + blocks - from);
                program.push_back(match rng.below(4) {
                    0 => Action::Write { at: from, blocks: some, note: [0, 0] },
                    1 => Action::Zero { at: from, blocks: some, discard: true },
                    2 => Action::Zero { at: from, blocks: some, discard: false },
                    _ => Action::Read { at, blocks },
                });
                if rng.chance(200_000) {
                    program.push_back(Action::Barrier);
                }
            }
            program.push_back(Action::Read { at, blocks });
        }
        Kind::Hot => {
            for _ in 0..count {
                let at = skewed(rng, total);
                program.push_back(match rng.below(5) {
                    0 | 1 => Action::Write { at, blocks: 1, note: [0, 0] },
                    2 => Action::Modify { at, blocks: 1 },
                    _ => Action::Read { at, blocks: 1 },
                });
            }
        }
    }
    program
}

fn head(log: LogAt) -> Action {
    Action::Write { at: 0, blocks: 1, note: [log.round, log.next] }
}

/// What a program of another day finds of a log, by its notes alone: the head's promise must be kept. Every
/// record that it counts is of its round, or of one that has begun since.
pub fn check_log(notes: &[Option<[u64; 2]>]) -> Result<LogAt, String> {
    let Some([round, next]) = notes.first().copied().flatten() else { return Ok(LogAt::default()) };
    for (at, note) in notes.iter().enumerate().take(next as usize).skip(1) {
        match note {
            Some([r, n]) if *n == at as u64 && *r >= round => {}
            other => {
                return Err(format!(
                    "the head of round {round} counts {next} blocks; block {at} is {other:?}"
                ));
            }
        }
    }
    Ok(LogAt { round, next })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_lacks_a_record_its_head_counts_is_noticed() {
        let whole = [Some([2, 4]), Some([2, 1]), Some([3, 2]), Some([2, 3]), Some([1, 4])];
        assert_eq!(check_log(&whole), Ok(LogAt { round: 2, next: 4 }));
        let mut gap = whole;
        gap[3] = Some([1, 3]);
        assert!(check_log(&gap).is_err());
        gap[3] = None;
        assert!(check_log(&gap).is_err());
        assert_eq!(check_log(&[None, None]), Ok(LogAt::default()));
    }

    #[test]
    fn programs_stay_in_their_region() {
        let mut rng = Stream::new(1, "programs");
        for seed in 0..200 {
            let mix = Mix::draw(seed, 1);
            let mut log = LogAt::default();
            for kind in [Kind::Log, Kind::Pages, Kind::Long, Kind::Holes, Kind::Hot] {
                for action in draw(kind, &mix, &mut log, &mut rng) {
                    let (at, blocks) = match action {
                        Action::Write { at, blocks, .. }
                        | Action::Zero { at, blocks, .. }
                        | Action::Read { at, blocks }
                        | Action::Modify { at, blocks } => (at, blocks),
                        Action::Flush | Action::Barrier => continue,
                    };
                    assert!(blocks > 0 && at + blocks <= mix.region_blocks, "{kind:?} {action:?} {mix:?}");
                }
            }
        }
    }
}
