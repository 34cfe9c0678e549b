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
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let wanted = std::env::var("RUST_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    let filter = wanted.unwrap_or_else(|| Targets::new().with_default(level));
    tracing_subscriber::registry().with(lines).with(filter).init();
}
