//! `drystone doctor`: is this host set up for Drystone and RDMA?

use super::Global;
use crate::config::{DEFAULT_BUFFER_BYTES, host_allows_locking};
use crate::doctor::{self, Finding, Host, Verdict};
use crate::error::CliError;
use crate::output::{self, Table};
use crate::units::ByteSize;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use reactor::backend::allowed_cpus;
use rustix::fs::{Access, access};
use serde::Serialize;
use std::path::Path;

/// What the node on this host will be like.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  drystone doctor                 as the user that the node runs as
  drystone doctor --cores 8       for a node with `cores = 8`
  drystone doctor --json | jq '.findings[] | select(.verdict == \"problem\")'

It changes nothing. The exit code is 1 when there is a problem; a note is something to know or to do better.")]
pub struct DoctorArgs {
    /// Data cores of the node [default: one for each CPU]
    #[arg(long, value_parser = RangedU64ValueParser::<u16>::new().range(1..=u64::from(crate::config::CORES_MAX)))]
    pub cores: Option<u16>,
    /// Buffers of each core
    #[arg(long, value_name = "SIZE", default_value_t = DEFAULT_BUFFER_BYTES)]
    pub buffer_bytes: ByteSize,
}

/// All findings, for programs.
#[derive(Serialize)]
struct Report<'a> {
    problems: usize,
    findings: &'a [Finding],
}

/// Runs the command.
pub fn run(global: &Global, args: &DoctorArgs) -> Result<(), CliError> {
    let cpus = u16::try_from(allowed_cpus().len().max(1)).unwrap_or(u16::MAX);
    let host = Host {
        root: "/".into(),
        memlock: host_allows_locking(),
        cores: args.cores.unwrap_or(cpus),
        buffer_bytes: args.buffer_bytes.0,
        rdma_built: cfg!(feature = "rdma"),
        may_use,
    };
    let findings = doctor::examine(&host);
    let problems = doctor::problems(&findings);
    match global.json {
        true => output::json(&Report { problems, findings: &findings })?,
        false => print(&findings)?,
    }
    if problems > 0 { Err(CliError::Unfit { problems }) } else { Ok(()) }
}

fn may_use(path: &Path) -> bool {
    access(path, Access::READ_OK | Access::WRITE_OK).is_ok()
}

/// One line for each finding, and below those that are not as they should be why it matters and what to do.
fn print(findings: &[Finding]) -> Result<(), CliError> {
    let mut table = Table::new(&["", "CHECK", "FOUND"]);
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "PROBLEM",
        };
        table.row([verdict.to_owned(), finding.check.to_owned(), finding.found.clone()]);
    }
    let text = table.text();
    // The first line is the headings.
    for (line, finding) in text.lines().skip(1).zip(findings) {
        output::line(line)?;
        for (what, text) in [("why", finding.why), ("fix", finding.fix.as_deref())] {
            if let Some(text) = text {
                output::line(&format!("           {what}: {text}"))?;
            }
        }
    }
    Ok(())
}
