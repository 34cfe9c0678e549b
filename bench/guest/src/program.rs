//! Other programs: whether they are there, and running them to their end.

use crate::error::GuestError;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Directories of programs beside those of `PATH`: administration lives there, which users do not search.
const SYSTEM_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];
/// So much of what a program said goes into an error.
const SAID_BYTES_MAX: usize = 4000;

/// Where a program is.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = SYSTEM_DIRS.iter().map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// A command that runs as root: as it is, or through sudo.
pub fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Runs a program to its end and returns what it printed. An error carries what it said.
pub fn run(command: &mut Command) -> Result<String, GuestError> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.stdin(Stdio::null()).output().map_err(GuestError::io(format!("start {program}")))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let said = end_of(&format!("{text}{errors}")).trim().to_owned();
    Err(GuestError::Program { program, status: output.status, said })
}

/// The last of what a program said.
fn end_of(text: &str) -> &str {
    let from = text.len().saturating_sub(SAID_BYTES_MAX);
    (from..text.len()).find_map(|at| text.get(at..)).unwrap_or("")
}
