//! Namespaces of our own, so that whatever happens nothing is left behind: this program starts itself again
//! inside a network and a mount namespace, which end with it. All files are on a tmpfs that only we see.
//!
//! Where that is not allowed, nodes share the machine's loopback, and what needs links of its own is left out
//! and named.

use crate::error::ChaosError;
use cli::children::run_to_end;
use cli::error::CliError;
use rustix::process::geteuid;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Set in the program that runs inside.
const INSIDE: &str = "DRYSTONE_CHAOS_INSIDE";
/// Where our tmpfs is mounted: a directory that every system has, and whose contents nobody needs meanwhile.
const WORK: &str = "/mnt";
/// The bridge that joins the nodes' links.
pub const BRIDGE: &str = "chaos0";

/// What this process may do.
#[derive(Debug)]
pub enum Isolation {
    /// Network and mounts are ours.
    Own,
    /// They are the machine's.
    Shared {
        /// Why.
        why: String,
    },
}

fn flags() -> Vec<&'static str> {
    let mut flags = vec!["--net", "--mount", "--propagation", "private"];
    if !geteuid().is_root() {
        flags.extend(["--user", "--map-root-user"]);
    }
    flags
}

/// Moves this process into namespaces of its own. Call it first: the program starts anew.
pub fn enter(loopback: bool) -> Result<Isolation, ChaosError> {
    if std::env::var_os(INSIDE).is_some() {
        set_up()?;
        return Ok(Isolation::Own);
    }
    if loopback {
        return Ok(Isolation::Shared { why: "it was asked for".into() });
    }
    // All that is needed later, tried where nothing can be spoilt.
    let probe = "ip link set lo up && ip link add chaos1 type veth peer name chaos2 && ip link add chaos3 type bridge \
                 && mount -t tmpfs tmpfs /mnt";
    let tried = run_to_end(Command::new("unshare").args(flags()).args(["--", "sh", "-c", probe]));
    if let Err(error) = tried {
        return Ok(Isolation::Shared { why: error.to_string() });
    }
    let exe = std::env::current_exe().map_err(ChaosError::io("find this program"))?;
    let error = Command::new("unshare")
        .args(flags())
        .arg("--")
        .arg(exe)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    Err(ChaosError::Cli(CliError::Program { program: "unshare".into(), why: error.to_string() }))
}

/// Runs `ip` with these words.
pub fn ip(words: &str) -> Result<(), ChaosError> {
    run_to_end(Command::new("ip").args(words.split_whitespace())).map(|_| ()).map_err(Into::into)
}

fn set_up() -> Result<(), ChaosError> {
    ip("link set lo up")?;
    ip(&format!("link add {BRIDGE} type bridge"))?;
    ip(&format!("addr add {}/24 dev {BRIDGE}", crate::net::HUB))?;
    ip(&format!("link set {BRIDGE} up"))?;
    mount_tmpfs(Path::new(WORK), None)
}

/// Mounts a tmpfs, visible to us and our children only; `bytes` bounds it.
pub fn mount_tmpfs(at: &Path, bytes: Option<u64>) -> Result<(), ChaosError> {
    let options = bytes.map_or("mode=0700".to_string(), |bytes| format!("mode=0700,size={bytes}"));
    run_to_end(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at))?;
    Ok(())
}

/// Changes the bound of a tmpfs that is mounted.
pub fn resize_tmpfs(at: &Path, bytes: u64) -> Result<(), ChaosError> {
    run_to_end(Command::new("mount").args(["-o", &format!("remount,size={bytes}")]).arg(at))?;
    Ok(())
}

/// Lazily: processes that still have files open there are about to end.
pub fn unmount(at: &Path) {
    let _ = Command::new("umount").arg("--lazy").arg(at).stderr(Stdio::null()).status();
}

impl Isolation {
    /// Where a cluster's directory is made.
    pub fn base(&self) -> PathBuf {
        let shm = Path::new("/dev/shm");
        match self {
            Self::Own => PathBuf::from(WORK),
            Self::Shared { .. } if shm.is_dir() => shm.to_path_buf(),
            Self::Shared { .. } => std::env::temp_dir(),
        }
    }
}
