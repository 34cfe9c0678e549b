//! Instructions per 4 KiB write and read must not grow unnoticed.
//!
//! To measure anew (after an improvement the limit should come down, too):
//! `cargo test -p instructions -- --nocapture`, and with `--release` for the optimised build. It prints what
//! was counted; `MEASURED` below is the only place to change.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};

/// What was counted per operation, all three nodes together: write, read. Tests are built with other people's
/// crates unoptimised, which takes most of the difference.
const MEASURED: (u64, u64) = if cfg!(debug_assertions) { (140_982, 42_778) } else { (52_241, 14_749) };
/// More than this above `MEASURED` fails, in percent.
const MARGIN_PERCENT: u64 = 10;

const FEW: u64 = 1000;
const MANY: u64 = 3000;

/// Instructions of a whole run.
fn count(dir: &Path, work: &str, operations: u64) -> u64 {
    let out = dir.join(format!("{work}.{operations}"));
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--error-exitcode=99"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(env!("CARGO_BIN_EXE_instructions"))
        .args([work, &operations.to_string()])
        .stdin(Stdio::null())
        .output();
    let run = match run {
        Ok(run) => run,
        Err(error) => panic!("valgrind does not start ({error}): deploy/install-tools installs it"),
    };
    assert!(run.status.success(), "{work}: {}", String::from_utf8_lossy(&run.stderr));
    let profile = std::fs::read_to_string(&out).unwrap();
    let total =
        profile.lines().find_map(|line| line.strip_prefix("summary: ").or(line.strip_prefix("totals: ")));
    total.and_then(|total| total.trim().parse().ok()).unwrap()
}

fn check(work: &str, measured: u64) {
    let dir = tempfile::tempdir().unwrap();
    let per_op = (count(dir.path(), work, MANY) - count(dir.path(), work, FEW)) / (MANY - FEW);
    println!("{work}: {per_op} instructions per operation of 4 KiB, {measured} when the limit was set");
    let most = measured * (100 + MARGIN_PERCENT) / 100;
    assert!(per_op <= most, "{work}: {per_op} instructions per operation, at most {most} allowed");
}

#[test]
fn a_write_of_4_kib_takes_no_more_instructions_than_it_did() {
    check("write", MEASURED.0);
}

#[test]
fn a_read_of_4_kib_takes_no_more_instructions_than_it_did() {
    check("read", MEASURED.1);
}
