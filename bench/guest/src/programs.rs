//! What the guest runs, built here: the `drystone` program, fio's engine, and programs with tests.
//!
//! The guest sees the machine's files, so nothing is copied: paths are enough.

use crate::error::GuestError;
use crate::manifest::TestProgram;
use crate::program;
use serde::Deserialize;
use std::path::PathBuf;
use std::process::Command;

/// Packages whose tests run in the guest, and the features that they are built with. A test of `inside` runs the
/// program (`Manifest::test_program`).
const TEST_PACKAGES: [TestPackage; 2] =
    [TestPackage { package: "reactor", features: "" }, TestPackage { package: "net-rdma", features: "rdma" }];
/// Features that the programs are built with.
const PROGRAM_FEATURES: &str = "cli/rdma,drystone_fio/rdma";

/// A package whose test programs the guest needs.
struct TestPackage {
    package: &'static str,
    /// As `cargo --features` wants them.
    features: &'static str,
}

/// A line of cargo's messages, as far as it matters here.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Where programs come from.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Builds `drystone` and fio's engine, and returns their paths.
pub fn build_drystone() -> Result<(PathBuf, PathBuf), GuestError> {
    let mut command = cargo();
    command.args(["build", "--release", "-p", "cli", "-p", "drystone_fio", "--message-format", "json"]);
    command.args(["--features", PROGRAM_FEATURES]);
    let text = program::run(&mut command)?;
    let found = messages(&text).find_map(|message| {
        let name = message.target?.name;
        message.executable.filter(|_| name == "drystone")
    });
    let drystone = found.ok_or_else(|| GuestError::Missing("the built program drystone".into()))?;
    let engine = drystone.with_file_name("libdrystone_fio.so");
    if engine.is_file() {
        Ok((drystone, engine))
    } else {
        Err(GuestError::Missing(engine.display().to_string()))
    }
}

/// Builds the test programs.
pub fn build_tests() -> Result<Vec<TestProgram>, GuestError> {
    let mut all = Vec::new();
    for TestPackage { package, features } in &TEST_PACKAGES {
        let mut command = cargo();
        command.args(["test", "--release", "--no-run", "-p", package, "--message-format", "json"]);
        if !features.is_empty() {
            command.args(["--features", features]);
        }
        let text = program::run(&mut command)?;
        let before = all.len();
        all.extend(messages(&text).filter_map(|message| {
            let (name, path) = (message.target?.name, message.executable?);
            message.profile?.test.then(|| TestProgram { package: (*package).to_owned(), name, path })
        }));
        if all.len() == before {
            return Err(GuestError::Missing(format!("a test program of package {package}")));
        }
    }
    Ok(all)
}

fn messages(text: &str) -> impl Iterator<Item = Message> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok())
}
