//! `drystone pool`: sets of images that share how many copies are kept and what the copies may not share.

use super::Global;
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{self, Table};
use clap::{Args, Subcommand, ValueEnum};
use control::admin::PoolSpec;
use control::admin::change::PoolChange;
use placement::{FailureDomain, ScrubPlan};

/// Most copies of an object: beyond this, more copies add cost and no safety.
const COPIES_MAX: i64 = 7;
/// Longest time between two scrubs: ten years.
const HOURS_MAX: u64 = 10 * 365 * 24;
/// Most placement groups of a pool: their records are read by every node.
const PGS_MAX: i64 = placement::PG_COUNT_MAX as i64;

/// What to do with pools.
#[derive(Subcommand, Debug)]
pub enum PoolCommand {
    /// Create a pool
    #[command(after_help = "Examples:
  drystone pool create ssd --copies 3 --pgs 64
  drystone pool create scratch --copies 2 --failure-domain disk")]
    Create(CreateArgs),
    /// Change a pool in use: copies, minimum, scrubs, name
    #[command(after_help = "Examples:
  drystone pool set ssd --deep-scrub 24
  drystone pool set scratch --copies 3

Copies are added and removed in the background while the pool is in use; `drystone status` shows how far it is.")]
    Set(SetArgs),
    /// List pools
    Ls,
    /// Remove a pool that has no images
    #[command(after_help = "Example:
  drystone pool rm scratch")]
    Rm {
        /// Its name
        name: String,
    },
}

/// A new pool.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Its name
    pub name: String,
    /// Copies of each object
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=COPIES_MAX))]
    pub copies: u8,
    /// Live copies below which a placement group stops serving [default: more than half of the copies]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=COPIES_MAX))]
    pub min_copies: Option<u8>,
    /// Placement groups [default: by the number of slices]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=PGS_MAX))]
    pub pgs: Option<u32>,
    /// What two copies may not share
    #[arg(long, value_enum, default_value_t = Domain::Host)]
    pub failure_domain: Domain,
    /// Hours between two light scrubs of a placement group (versions and presence of all copies); 0: none
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u64).range(0..=HOURS_MAX))]
    pub light_scrub: u64,
    /// Hours between two deep scrubs (every block of every copy is read and compared); 0: none
    #[arg(long, value_name = "HOURS", default_value_t = 168, value_parser = clap::value_parser!(u64).range(0..=HOURS_MAX))]
    pub deep_scrub: u64,
}

/// What is to be different.
#[derive(Args, Debug)]
#[group(required = true, multiple = true)]
pub struct Changes {
    /// Another name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Copies of each object
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=COPIES_MAX))]
    pub copies: Option<u8>,
    /// Live copies below which a placement group stops serving
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=COPIES_MAX))]
    pub min_copies: Option<u8>,
    /// What two copies may not share
    #[arg(long, value_enum)]
    pub failure_domain: Option<Domain>,
    /// Hours between two light scrubs of a placement group; 0: none
    #[arg(long, value_name = "HOURS", value_parser = clap::value_parser!(u64).range(0..=HOURS_MAX))]
    pub light_scrub: Option<u64>,
    /// Hours between two deep scrubs; 0: none
    #[arg(long, value_name = "HOURS", value_parser = clap::value_parser!(u64).range(0..=HOURS_MAX))]
    pub deep_scrub: Option<u64>,
}

/// A pool to be changed.
#[derive(Args, Debug)]
pub struct SetArgs {
    /// The pool
    pub pool: String,
    /// What is to be different
    #[command(flatten)]
    pub changes: Changes,
}

/// `placement::FailureDomain` on the command line.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum Domain {
    /// A host
    Host,
    /// A disk: survives a disk's death, not a host's
    Disk,
}

impl From<Domain> for FailureDomain {
    fn from(domain: Domain) -> Self {
        match domain {
            Domain::Host => Self::Host,
            Domain::Disk => Self::Disk,
        }
    }
}

/// Runs the command.
pub fn run(global: &Global, command: PoolCommand) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    match command {
        PoolCommand::Create(args) => create(global, &mut cluster, &args),
        PoolCommand::Set(args) => set(global, &mut cluster, &args),
        PoolCommand::Ls => list(global, &mut cluster),
        PoolCommand::Rm { name } => {
            cluster.remove_pool(&name)?;
            output::done(global, &format!("pool {name} is being removed"))
        }
    }
}

fn create(global: &Global, cluster: &mut Cluster, args: &CreateArgs) -> Result<(), CliError> {
    let pool = cluster.create_pool(&PoolSpec {
        name: args.name.clone(),
        copies: args.copies,
        min_copies: args.min_copies,
        pg_count: args.pgs,
        failure_domain: args.failure_domain.into(),
        scrub: ScrubPlan { light_secs: args.light_scrub * 3600, deep_secs: args.deep_scrub * 3600 },
    })?;
    if global.json {
        return output::json(&pool);
    }
    output::line(&format!(
        "pool {} created: number {}, {} copies, {} placement groups",
        pool.name, pool.id, pool.copies, pool.pg_count
    ))
}

fn set(global: &Global, cluster: &mut Cluster, args: &SetArgs) -> Result<(), CliError> {
    let changes = &args.changes;
    let secs = |hours: u64| hours * 3600;
    let pool = cluster.change_pool(
        &args.pool,
        &PoolChange {
            name: changes.name.clone(),
            copies: changes.copies,
            min_copies: changes.min_copies,
            failure_domain: changes.failure_domain.map(FailureDomain::from),
            light_scrub_secs: changes.light_scrub.map(secs),
            deep_scrub_secs: changes.deep_scrub.map(secs),
        },
    )?;
    if global.json {
        return output::json(&pool);
    }
    output::line(&format!(
        "pool {}: {} copies, at least {}; scrubs {} light, {} deep",
        pool.name,
        pool.copies,
        pool.min_copies,
        interval(pool.scrub.light_secs),
        interval(pool.scrub.deep_secs)
    ))
}

/// A scrub's interval, for people.
fn interval(secs: u64) -> String {
    match secs {
        0 => "never".to_owned(),
        secs => format!("every {} h", secs.div_ceil(3600)),
    }
}

fn list(global: &Global, cluster: &mut Cluster) -> Result<(), CliError> {
    let pools = cluster.pools()?;
    if global.json {
        return output::json(&pools);
    }
    let mut table = Table::new(&[
        "NAME",
        ">NUMBER",
        ">COPIES",
        ">MIN",
        ">PGS",
        "DOMAIN",
        "LIGHT SCRUB",
        "DEEP SCRUB",
        "STATE",
    ]);
    for pool in &pools {
        table.row([
            pool.name.clone(),
            pool.id.to_string(),
            pool.copies.to_string(),
            pool.min_copies.to_string(),
            pool.pg_count.to_string(),
            format!("{:?}", pool.failure_domain).to_lowercase(),
            interval(pool.scrub.light_secs),
            interval(pool.scrub.deep_secs),
            if pool.removing { "removing" } else { "ready" }.to_string(),
        ]);
    }
    table.print()
}
