//! What ends a run: a part that does not work, or a demand that was not met.

use cli::error::CliError;
use std::path::PathBuf;
use std::process::ExitStatus;
use thiserror::Error;

/// Why a run failed.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A node, the cluster or the command.
    #[error(transparent)]
    Cli(#[from] CliError),
    /// A file or stream.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A program that ended badly.
    #[error("{program} ended with {status}: {said}")]
    Program {
        /// Which.
        program: String,
        /// How.
        status: ExitStatus,
        /// Its last words.
        said: String,
    },
    /// Something that must be there is not.
    #[error("{0} is missing")]
    Missing(String),
    /// The machine's package sources name no Debian mirror of its release.
    #[error("no source below {dir} serves the suite '{suite}'")]
    NoMirror {
        /// Where they were looked for.
        dir: PathBuf,
        /// The release.
        suite: String,
    },
    /// A path that QEMU's command line cannot carry.
    #[error("{0} contains a space or comma: choose another place with DRYSTONE_GUEST_CACHE")]
    Path(PathBuf),
    /// Another run is at work.
    #[error("another run uses {0}")]
    InUse(PathBuf),
    /// A file that says something else than was written there.
    #[error("{what} is not valid: {why}")]
    Malformed {
        /// Which file.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// Time is up.
    #[error("gave up after {seconds} s waiting for {what}")]
    TimedOut {
        /// For what.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// What was seen is not what must be.
    #[error("{0}")]
    Demand(String),
}

impl GuestError {
    /// A file or stream that failed.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// An error unless the demand is met.
pub fn demand(met: bool, what: impl FnOnce() -> String) -> Result<(), GuestError> {
    if met { Ok(()) } else { Err(GuestError::Demand(what())) }
}
