//! `drystone pool`: sets of images that share how many copies are kept and what the copies may not share.

use super::Global;
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{self, Table};
use clap::{Args, Subcommand, ValueEnum};
use control::admin::PoolSpec;
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

/// `placement::FailureDomain` on the command line.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum Domain {
    /// A host
    Host,
    /// A disk: survives a disk's death, not a host's
    Disk,
}

/// Runs the command.
pub fn run(global: &Global, command: PoolCommand) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    match command {
        PoolCommand::Create(args) => create(global, &mut cluster, &args),
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
        failure_domain: match args.failure_domain {
            Domain::Host => FailureDomain::Host,
            Domain::Disk => FailureDomain::Disk,
        },
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

fn list(global: &Global, cluster: &mut Cluster) -> Result<(), CliError> {
    let pools = cluster.pools()?;
    if global.json {
        return output::json(&pools);
    }
    let mut table = Table::new(&["NAME", ">NUMBER", ">COPIES", ">MIN", ">PGS", "DOMAIN", "STATE"]);
    for pool in &pools {
        table.row([
            pool.name.clone(),
            pool.id.to_string(),
            pool.copies.to_string(),
            pool.min_copies.to_string(),
            pool.pg_count.to_string(),
            format!("{:?}", pool.failure_domain).to_lowercase(),
            if pool.removing { "removing" } else { "ready" }.to_string(),
        ]);
    }
    table.print()
}
