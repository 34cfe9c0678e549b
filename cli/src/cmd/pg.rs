//! `drystone pg`: placement groups, and having their copies compared.

use super::Global;
use crate::cluster::{Cluster, decode};
use crate::error::CliError;
use crate::output::{self, Table};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use placement::{NodeStats, PgRecord, PgStat, ScrubDepth, ScrubRecord, key};
use serde::Serialize;
use std::collections::BTreeMap;
use std::str::FromStr;
use wire::control::Change;
use wire::{PgId, PoolId};

/// Deep scrubs of one repair: the first finds, the second confirms; more only if something decays meanwhile.
const REPAIR_ROUNDS: usize = 3;

/// What to do with placement groups.
#[derive(Subcommand, Debug)]
pub enum PgCommand {
    /// List placement groups: where their copies are, and when these were compared last
    Ls {
        /// Only those of this pool
        #[arg(long)]
        pool: Option<String>,
    },
    /// Compare all copies now, wait, and say what was found; what is bad is mended from a good copy
    #[command(after_help = "Examples:
  drystone pg scrub 1.7 --deep
  drystone pg scrub --pool ssd")]
    Scrub {
        /// Which
        #[command(flatten)]
        which: Which,
        /// Read every block of every copy, instead of comparing versions only
        #[arg(long)]
        deep: bool,
    },
    /// Compare all copies deeply until nothing bad is left; fail when something cannot be mended
    #[command(after_help = "Example:
  drystone pg repair 1.7")]
    Repair {
        /// Which
        #[command(flatten)]
        which: Which,
    },
}

/// Placement groups.
#[derive(Args, Debug)]
pub struct Which {
    /// Placement groups, as POOL.INDEX (`drystone pg ls` shows them)
    #[arg(value_name = "PG", required_unless_present = "pool", conflicts_with = "pool")]
    pub pgs: Vec<PgArg>,
    /// All placement groups of this pool
    #[arg(long)]
    pub pool: Option<String>,
}

/// A placement group on the command line.
#[derive(Clone, Copy, Debug)]
pub struct PgArg(PgId);

impl FromStr for PgArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (pool, index) = text.split_once('.')?;
            Some(PgId { pool: PoolId(pool.parse().ok()?), index: index.parse().ok()? })
        };
        parse().map(Self).ok_or_else(|| format!("'{text}' is no placement group: write POOL.INDEX, like 1.7"))
    }
}

/// A placement group, for people and programs.
#[derive(Serialize)]
struct PgLine {
    pg: PgId,
    #[serde(flatten)]
    record: PgRecord,
    stat: Option<PgStat>,
    scrub: ScrubRecord,
}

/// Runs the command.
pub fn run(global: &Global, command: PgCommand) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    match command {
        PgCommand::Ls { pool } => list(global, &mut cluster, pool.as_deref()),
        PgCommand::Scrub { which, deep } => {
            let pgs = resolve(&mut cluster, &which)?;
            let depth = if deep { ScrubDepth::Deep } else { ScrubDepth::Light };
            report(global, &scrub(global, &mut cluster, &pgs, depth)?)
        }
        PgCommand::Repair { which } => {
            let pgs = resolve(&mut cluster, &which)?;
            repair(global, &mut cluster, &pgs)
        }
    }
}

fn pool_id(cluster: &mut Cluster, name: &str) -> Result<PoolId, CliError> {
    let found = cluster.pools()?.into_iter().find(|pool| pool.name == name).map(|pool| pool.id);
    found.ok_or_else(|| CliError::NotFound { kind: "pool", name: name.into() })
}

fn records(cluster: &mut Cluster) -> Result<BTreeMap<PgId, PgRecord>, CliError> {
    let items = cluster.range(key::PGS)?;
    items
        .iter()
        .filter_map(|item| Some((key::parse_pg(&item.key)?, item)))
        .map(|(pg, item)| Ok((pg, decode(item)?)))
        .collect()
}

fn scrubs(cluster: &mut Cluster) -> Result<BTreeMap<PgId, ScrubRecord>, CliError> {
    let items = cluster.range(key::SCRUBS)?;
    items
        .iter()
        .filter_map(|item| Some((key::parse_scrub(&item.key)?, item)))
        .map(|(pg, item)| Ok((pg, decode(item)?)))
        .collect()
}

fn resolve(cluster: &mut Cluster, which: &Which) -> Result<Vec<PgId>, CliError> {
    match &which.pool {
        Some(name) => {
            let pool = pool_id(cluster, name)?;
            Ok(records(cluster)?.into_keys().filter(|pg| pg.pool == pool).collect())
        }
        None => Ok(which.pgs.iter().map(|arg| arg.0).collect()),
    }
}

fn list(global: &Global, cluster: &mut Cluster, pool: Option<&str>) -> Result<(), CliError> {
    let pool = pool.map(|name| pool_id(cluster, name)).transpose()?;
    let mut stats: BTreeMap<String, PgStat> = BTreeMap::new();
    for node in cluster.list::<NodeStats>(key::STATS)? {
        for (pg, stat) in node.pgs {
            // After a change of primary the older one's word may stand beside the newer's for a moment.
            if stats.get(&pg).is_none_or(|known| known.epoch <= stat.epoch) {
                stats.insert(pg, stat);
            }
        }
    }
    let mut scrubs = scrubs(cluster)?;
    let lines: Vec<PgLine> = records(cluster)?
        .into_iter()
        .filter(|(pg, _)| pool.is_none_or(|pool| pg.pool == pool))
        .map(|(pg, record)| PgLine {
            pg,
            record,
            stat: stats.remove(&pg.to_string()),
            scrub: scrubs.remove(&pg).unwrap_or_default(),
        })
        .collect();
    if global.json {
        return output::json(&lines);
    }
    let headings = ["PG", "STATE", ">EPOCH", "ACTING", ">OBJECTS", ">MISSING", "SCRUBBED", "DEEPLY", ">BAD"];
    let mut table = Table::new(&headings);
    for line in &lines {
        let stat = line.stat.clone().unwrap_or_default();
        let acting: Vec<String> = line.record.acting.iter().map(ToString::to_string).collect();
        table.row([
            line.pg.to_string(),
            if stat.state.is_empty() { "unknown".into() } else { stat.state },
            line.record.epoch.to_string(),
            acting.join(","),
            stat.objects.to_string(),
            stat.missing.to_string(),
            ago(line.scrub.light_ms),
            ago(line.scrub.deep_ms),
            line.scrub.errors.to_string(),
        ]);
    }
    table.print()
}

/// How long ago something was, for people.
fn ago(at_ms: u64) -> String {
    if at_ms == 0 {
        return "never".into();
    }
    match crate::cluster::wall_ms().saturating_sub(at_ms) / 1000 {
        secs @ 0..120 => format!("{secs} s ago"),
        secs @ 120..7200 => format!("{} min ago", secs / 60),
        secs @ 7200..172_800 => format!("{} h ago", secs / 3600),
        secs => format!("{} d ago", secs / 86_400),
    }
}

/// Asks for scrubs and waits until all have been made.
fn scrub(
    global: &Global,
    cluster: &mut Cluster,
    pgs: &[PgId],
    depth: ScrubDepth,
) -> Result<BTreeMap<PgId, ScrubRecord>, CliError> {
    let records = records(cluster)?;
    if let Some(pg) = pgs.iter().find(|pg| records.get(pg).is_some_and(|record| record.primary.is_none())) {
        return Err(CliError::Refused {
            what: format!("compare the copies of placement group {pg}"),
            why: "it has no primary now; see `drystone status`".into(),
        });
    }
    for pg in pgs {
        cluster.want_scrub(*pg, depth)?;
    }
    let bar = progress(global, pgs.len());
    let mut known = BTreeMap::new();
    cluster.watch(key::SCRUBS, |_, changes| {
        for change in changes {
            if let Change::Put(item) = change
                && let Some(pg) = key::parse_scrub(&item.key)
            {
                known.insert(pg, decode::<ScrubRecord>(item)?);
            }
        }
        let waiting = |pg: &&PgId| known.get(pg).is_none_or(|record| record.wanted.is_some());
        let left = pgs.iter().filter(waiting).count();
        bar.set_position((pgs.len() - left) as u64);
        Ok(left > 0)
    })?;
    bar.finish_and_clear();
    known.retain(|pg, _| pgs.contains(pg));
    Ok(known)
}

/// A progress bar on standard error, and none where nobody would see it.
fn progress(global: &Global, pgs: usize) -> ProgressBar {
    let template = "  comparing copies [{wide_bar}] {pos}/{len} placement groups  {elapsed}";
    match ProgressStyle::with_template(template) {
        Ok(style) if !global.json => ProgressBar::new(pgs as u64).with_style(style),
        _ => ProgressBar::hidden(),
    }
}

fn report(global: &Global, found: &BTreeMap<PgId, ScrubRecord>) -> Result<(), CliError> {
    if global.json {
        let by_name: BTreeMap<String, &ScrubRecord> =
            found.iter().map(|(pg, record)| (pg.to_string(), record)).collect();
        return output::json(&by_name);
    }
    let mut table = Table::new(&["PG", ">OBJECTS", ">BAD"]);
    for (pg, record) in found {
        table.row([pg.to_string(), record.objects.to_string(), record.errors.to_string()]);
    }
    table.print()?;
    let (objects, bad) =
        found.values().fold((0, 0), |(objects, bad), record| (objects + record.objects, bad + record.errors));
    output::line(&match bad {
        0 => format!("{objects} objects compared: all copies are there and equal"),
        bad => {
            format!("{objects} objects compared, {bad} with a bad or different copy: they are being mended")
        }
    })
}

fn repair(global: &Global, cluster: &mut Cluster, pgs: &[PgId]) -> Result<(), CliError> {
    let mut bad = 0;
    for round in 0..REPAIR_ROUNDS {
        let found = scrub(global, cluster, pgs, ScrubDepth::Deep)?;
        let now: u64 = found.values().map(|record| record.errors).sum();
        if now == 0 {
            return output::done(
                global,
                &match (round, bad) {
                    (0, _) => "nothing to repair: all copies are there and equal".to_string(),
                    (_, bad) => {
                        format!("{bad} objects had a bad or different copy; all copies are equal now")
                    }
                },
            );
        }
        bad = bad.max(now);
    }
    Err(CliError::Refused {
        what: "repair every object".into(),
        why: format!("{bad} still have a bad copy; the nodes' logs say which, and whether any copy is good"),
    })
}
