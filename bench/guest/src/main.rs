//! `guest`: a virtual machine with what this machine's kernel lacks, NVMe drives and RDMA, and tests in it.
//!
//! Two programs in one. On the host, `prepare` fetches kernel and tools (`apt` without touching the machine's
//! sources), `programs` builds what the guest runs, `run` boots (`boot`, `drives`) and follows what the guest writes
//! into the directory that both share (`manifest`, `follow`). In the guest the same program runs as `guest inside`:
//! `inside/` has the tests, by subject. docs/guest.md explains how to add one.
//!
//! This room may know the parts of `cli` that start nodes, and the client. Start reading at `run`.

mod apt;
mod boot;
mod drives;
mod error;
mod follow;
mod inside;
mod manifest;
mod prepare;
mod program;
mod programs;
mod run;

use clap::{Parser, Subcommand};
use cli::output;
use error::GuestError;
use prepare::Tools;
use run::Run;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Boots a guest with NVMe drives and RDMA, and runs tests in it.
#[derive(Parser, Debug)]
#[command(name = "guest")]
struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Fetch what is needed; the second time, nothing is
    Prepare,
    /// Run the tests
    Run {
        /// Only tests with this in their names
        #[arg(long)]
        filter: Option<String>,
    },
    /// A shell in the guest
    Shell,
    /// List the tests
    Ls,
    /// The guest's side: started by `run`
    #[command(hide = true)]
    Inside {
        /// The directory shared with the host
        share: PathBuf,
    },
}

fn main() -> ExitCode {
    match carry_out(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> Result<bool, GuestError> {
    match command {
        Command::Prepare => with_tools(|_, _| Ok(true)),
        Command::Run { filter } => {
            with_tools(|tools, cache| Run::new(tools, cache, filter.as_deref())?.all())
        }
        Command::Shell => with_tools(|tools, cache| run::shell(tools, cache).map(|()| true)),
        Command::Ls => {
            for test in &inside::TESTS {
                output::line(&format!("{:<44} {}", test.name, test.about))?;
            }
            Ok(true)
        }
        Command::Inside { share } => inside::run(&share),
    }
}

/// Fetches what is missing and does something with it, alone in the cache's directory.
fn with_tools(work: impl FnOnce(&Tools, &Path) -> Result<bool, GuestError>) -> Result<bool, GuestError> {
    let cache = prepare::cache()?;
    let _lock = prepare::lock(&cache)?;
    work(&prepare::prepare(&cache)?, &cache)
}
