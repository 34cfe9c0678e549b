//! The program `drystone`. Everything it does is in the library beside it; start reading at `lib.rs`.

use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;

/// Counts heap allocations per core for `/metrics`: on the data path there must be none.
#[global_allocator]
static HEAP: reactor::backend::CountingHeap = reactor::backend::CountingHeap;

fn main() -> ExitCode {
    let cli = cli::cmd::Cli::parse();
    start_logging(cli.global.verbose);
    match cli::cmd::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::output::report(&error);
            ExitCode::FAILURE
        }
    }
}

/// Log lines go to standard error; `RUST_LOG` overrides what `-v` chooses.
fn start_logging(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
