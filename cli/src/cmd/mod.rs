//! The command line: global flags, the list of commands, and who runs each.

pub mod demo;
pub mod disk;
mod disk_add;
pub mod disk_retire;
pub mod doctor;
pub mod image;
pub mod meta;
pub mod node;
pub mod nodes;
pub mod pg;
pub mod pool;
pub mod settings;
pub mod status;
pub mod voters;

use crate::error::CliError;
use clap::{Args, Parser, Subcommand};

/// Distributed block storage: nodes, pools, images, and the tools to run them.
#[derive(Parser, Debug)]
#[command(name = "drystone", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Examples:
  drystone demo                                      a cluster on this machine, tested and measured
  drystone node --config /etc/drystone/node.toml     be a node
  drystone --cluster 10.0.0.1:7700 status            look at a cluster
  drystone image create vm1 --pool ssd --size 100G   make a virtual disk")]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Args, Debug, Clone)]
pub struct Global {
    /// Control address of any node, or several separated by commas
    #[arg(long, env = "DRYSTONE_CLUSTER", value_name = "HOST:PORT[,…]", global = true)]
    pub cluster: Option<String>,
    /// How nodes are reached: auto, rdma or tcp. For `drystone node`: how it is reached [node.transport]
    #[arg(long, env = "DRYSTONE_TRANSPORT", value_name = "NAME", global = true)]
    pub transport: Option<net_rdma::Choice>,
    /// Print data as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more: -v what happens, -vv how, -vvv everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a node of the cluster; list nodes, drain them, forget them
    Node(Box<node::NodeArgs>),
    /// Start a cluster on this machine, run fio through the death of a node, print what it measured
    Demo(demo::DemoArgs),
    /// Check this host's settings for Drystone and RDMA; changes nothing
    Doctor(doctor::DoctorArgs),
    /// Show the cluster's health, or its connections
    Status(status::StatusArgs),
    /// Show what is set for the whole cluster, or set it: flags and thresholds
    Set(settings::SetArgs),
    /// Clear a flag, or put a threshold back to its default
    Unset(settings::UnsetArgs),
    /// Create, list, change and remove pools
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// List placement groups, scrub them
    #[command(subcommand)]
    Pg(pg::PgCommand),
    /// Create, list, resize, remove, import and export images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Prepare disks for a cluster, look at them, check them, replace them
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Look at the cluster's metadata, or change it by hand
    #[command(subcommand)]
    Meta(meta::MetaCommand),
}

/// Runs the command.
pub fn run(cli: Cli) -> Result<(), CliError> {
    let Cli { global, command } = cli;
    match command {
        Command::Node(args) => node::run(&global, *args),
        Command::Demo(args) => demo::run(&args),
        Command::Doctor(args) => doctor::run(&global, &args),
        Command::Status(args) => status::run(&global, &args),
        Command::Set(args) => settings::set(&global, &args),
        Command::Unset(args) => settings::unset(&global, &args),
        Command::Pool(command) => pool::run(&global, command),
        Command::Pg(command) => pg::run(&global, command),
        Command::Image(command) => image::run(&global, command),
        Command::Disk(command) => disk::run(&global, command),
        Command::Meta(command) => meta::run(&global, command),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
