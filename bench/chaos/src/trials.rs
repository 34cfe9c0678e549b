//! What failover trials measured: percentiles, what was demanded, and the file for programs.

use crate::error::ChaosError;
use clap::ValueEnum;
use cli::error::CliError;
use cli::output::Table;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// A kind of harm.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, later SIGCONT.
    Hang,
    /// The node's link goes down, later up.
    Cut,
    /// SIGTERM.
    Stop,
    /// `drystone node drain --primaries-only`, later `undrain`.
    Drain,
    /// SIGKILL of all nodes at once; they are started again at once.
    Power,
}

/// Those that are measured when nothing is said.
pub const ALL: [Kind; 6] = [Kind::Kill, Kind::Hang, Kind::Cut, Kind::Stop, Kind::Drain, Kind::Power];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Hang => "hang",
            Self::Cut => "cut",
            Self::Stop => "stop",
            Self::Drain => "drain",
            Self::Power => "power",
        })
    }
}

impl Kind {
    /// The longest gap that a client may see.
    pub fn limit(self) -> Option<Duration> {
        match self {
            Self::Kill => Some(Duration::from_secs(1)),
            Self::Hang | Self::Cut => Some(Duration::from_secs(2)),
            Self::Stop | Self::Drain => Some(Duration::from_millis(100)),
            // Contains the start of all processes.
            Self::Power => None,
        }
    }
}

/// One trial.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trial {
    /// The longest time between two completed writes around the harm.
    pub gap: Duration,
    /// The same while the node came back, up to a clean cluster.
    pub back: Duration,
    /// Writes that failed.
    pub errors: u64,
}

/// All of them.
pub struct Trials {
    seed: u64,
    wanted: usize,
    by_kind: BTreeMap<Kind, Vec<Trial>>,
    skipped: BTreeMap<Kind, String>,
}

/// The smallest value that a share of the values does not exceed. The values are sorted.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

fn sorted(trials: &[Trial], of: impl Fn(&Trial) -> Duration) -> Vec<Duration> {
    let mut values: Vec<Duration> = trials.iter().map(of).collect();
    values.sort();
    values
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 1e2
}

fn judge(kind: Kind, trials: &[Trial]) -> bool {
    let quick = |trial: &Trial| kind.limit().is_none_or(|limit| trial.gap <= limit);
    trials.iter().all(|trial| quick(trial) && trial.errors == 0)
}

impl Trials {
    /// None yet.
    pub fn new(seed: u64, wanted: usize) -> Self {
        Self { seed, wanted, by_kind: BTreeMap::new(), skipped: BTreeMap::new() }
    }

    /// One more.
    pub fn add(&mut self, kind: Kind, trial: Trial) {
        self.by_kind.entry(kind).or_default().push(trial);
    }

    /// A kind that cannot be measured here.
    pub fn skip(&mut self, kind: Kind, why: String) {
        self.skipped.insert(kind, why);
    }

    /// Whether every demand was met. Skipped kinds have no say.
    pub fn reached(&self) -> bool {
        self.by_kind.iter().all(|(kind, trials)| judge(*kind, trials))
    }

    /// Prints a table.
    pub fn print(&self) -> Result<(), CliError> {
        let headings =
            ["KIND", ">TRIALS", ">p50 ms", ">p99 ms", ">max ms", ">limit ms", ">errors", ">back max ms", ""];
        let mut table = Table::new(&headings);
        for (kind, trials) in &self.by_kind {
            let gaps = sorted(trials, |trial| trial.gap);
            let back = sorted(trials, |trial| trial.back);
            table.row([
                kind.to_string(),
                trials.len().to_string(),
                format!("{:.1}", ms(percentile(&gaps, 50))),
                format!("{:.1}", ms(percentile(&gaps, 99))),
                format!("{:.1}", ms(percentile(&gaps, 100))),
                kind.limit().map_or("-".into(), |limit| limit.as_millis().to_string()),
                trials.iter().map(|trial| trial.errors).sum::<u64>().to_string(),
                format!("{:.1}", ms(percentile(&back, 100))),
                if judge(*kind, trials) { "reached" } else { "MISSED" }.to_string(),
            ]);
        }
        for (kind, why) in &self.skipped {
            let mut cells = vec![kind.to_string(), "0".into()];
            cells.resize(headings.len() - 1, "-".into());
            cells.push(format!("skipped: {why}"));
            table.row(cells);
        }
        table.print()
    }

    /// Writes everything to a file.
    pub fn write(&self, path: &Path) -> Result<(), ChaosError> {
        let kinds: BTreeMap<String, serde_json::Value> = self
            .by_kind
            .iter()
            .map(|(kind, trials)| {
                let gaps = sorted(trials, |trial| trial.gap);
                let all = |of: fn(&Trial) -> Duration| trials.iter().map(|t| ms(of(t))).collect::<Vec<_>>();
                let value = json!({
                    "p50_ms": ms(percentile(&gaps, 50)),
                    "p99_ms": ms(percentile(&gaps, 99)),
                    "max_ms": ms(percentile(&gaps, 100)),
                    "limit_ms": kind.limit().map(ms),
                    "errors": trials.iter().map(|trial| trial.errors).sum::<u64>(),
                    "reached": judge(*kind, trials),
                    "gaps_ms": all(|trial| trial.gap),
                    "back_ms": all(|trial| trial.back),
                });
                (kind.to_string(), value)
            })
            .collect();
        let skipped: BTreeMap<String, &String> =
            self.skipped.iter().map(|(kind, why)| (kind.to_string(), why)).collect();
        let root = json!({ "seed": self.seed, "trials": self.wanted, "kinds": kinds, "skipped": skipped });
        let text = serde_json::to_string_pretty(&root).map_err(|error| CliError::Json(error.to_string()))?;
        std::fs::write(path, text).map_err(ChaosError::io(format!("write {}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(gap_ms: u64, errors: u64) -> Trial {
        Trial { gap: Duration::from_millis(gap_ms), back: Duration::ZERO, errors }
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<Duration> = (1..=50).map(Duration::from_millis).collect();
        let at = |percent| percentile(&values, percent).as_millis();
        assert_eq!((at(50), at(99), at(100)), (25, 50, 50));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }

    #[test]
    fn one_slow_trial_or_one_error_misses() {
        for (trials, reached) in [
            (vec![trial(10, 0), trial(100, 0)], true),
            (vec![trial(10, 0), trial(101, 0)], false),
            (vec![trial(10, 1)], false),
        ] {
            let mut all = Trials::new(1, trials.len());
            trials.iter().for_each(|trial| all.add(Kind::Stop, *trial));
            assert_eq!(all.reached(), reached, "{trials:?}");
        }
    }
}
