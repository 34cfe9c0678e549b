//! `drystone demo`: what Drystone does, shown on this machine in two minutes.

use crate::error::CliError;
use crate::units::ByteSize;
use clap::Args;
use std::path::PathBuf;

/// The demonstration.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  drystone demo
  drystone demo --keep          leaves the cluster running and says how to use it; Ctrl-C ends it

Needs fio (Debian 12's, version 3.33) and about 8 GiB in the directory for temporary files.")]
pub struct DemoArgs {
    /// Leave the cluster running afterwards, until Ctrl-C
    #[arg(long)]
    pub keep: bool,
    /// Where the disks' files are made [default: the directory for temporary files]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Size of the image
    #[arg(long, default_value = "2GiB")]
    pub image_size: ByteSize,
    /// Seconds of each fio run
    #[arg(long, default_value_t = 4)]
    pub seconds: u32,
    /// The fio engine [default: libdrystone_fio.so beside this program]
    #[arg(long, value_name = "FILE")]
    pub engine: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &DemoArgs) -> Result<(), CliError> {
    crate::demo::run(args)
}
