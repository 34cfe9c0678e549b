//! What tests need of the machine: modules, waiting, mounts.

use crate::error::GuestError;
use crate::program;
use cli::deadline::Deadline;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Longest wait for anything in the guest, which is about ten times slower than the machine.
pub const LIMIT: Duration = Duration::from_secs(120);
/// How often a condition that nobody announces is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Loads a module; one that is there already is fine.
pub fn module(name: &str, options: &[&str]) -> Result<(), GuestError> {
    tool("modprobe", &[&[name], options].concat()).map(|_| ())
}

/// Runs a program and returns what it printed.
pub fn tool(name: &str, args: &[&str]) -> Result<String, GuestError> {
    let path = program::find(name).ok_or_else(|| GuestError::Missing(format!("program {name}")))?;
    program::run(Command::new(path).args(args))
}

/// Waits for a condition that has to be looked for.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool, GuestError>) -> Result<(), GuestError> {
    let deadline = Deadline::after(LIMIT);
    while !holds()? {
        if deadline.passed() {
            return Err(GuestError::TimedOut { what: what.into(), seconds: LIMIT.as_secs() });
        }
        std::thread::park_timeout(LOOK);
    }
    Ok(())
}

/// A short file's text without the space around it.
pub fn text(path: impl AsRef<Path>) -> Result<String, GuestError> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(GuestError::io(format!("read {}", path.display())))?;
    Ok(text.trim().to_owned())
}

/// A path as text: the tests' own paths are all plain.
pub fn utf8(path: &Path) -> Result<&str, GuestError> {
    path.to_str().ok_or_else(|| GuestError::Path(path.into()))
}

/// A mounted ext4 file system, unmounted when dropped.
pub struct Mount(PathBuf);

impl Mount {
    /// Mounts what is on the device.
    pub fn of(device: &Path, at: &Path) -> Result<Self, GuestError> {
        module("ext4", &[])?;
        std::fs::create_dir_all(at).map_err(GuestError::io(format!("make {}", at.display())))?;
        tool("mount", &["-t", "ext4", utf8(device)?, utf8(at)?])?;
        Ok(Self(at.into()))
    }

    /// Makes a file system and mounts it.
    pub fn fresh(device: &Path, at: &Path) -> Result<Self, GuestError> {
        tool("mkfs.ext4", &["-q", "-F", utf8(device)?])?;
        Self::of(device, at)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = utf8(&self.0).and_then(|at| tool("umount", &["--lazy", at]));
    }
}
