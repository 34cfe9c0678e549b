//! What ends a run: a part that does not work, a demand that was not met, or a history that cannot be.

use crate::history::Violation;
use cli::error::CliError;
use thiserror::Error;

/// Why a run failed.
#[derive(Debug, Error)]
pub enum ChaosError {
    /// A node, a program, the cluster or a file.
    #[error(transparent)]
    Cli(#[from] CliError),
    /// A read returned what no order of the operations explains.
    #[error("history: {0}")]
    History(#[from] Violation),
    /// The cluster did what it must not do.
    #[error("{0}")]
    Demand(String),
    /// A disturbance was asked for that this machine cannot make.
    #[error("not possible here: {0}")]
    Impossible(String),
}

impl ChaosError {
    /// A file or stream that failed.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Cli(CliError::Io { what, source })
    }

    /// Whether it was Ctrl-C.
    pub fn interrupted(&self) -> bool {
        matches!(self, Self::Cli(CliError::Interrupted))
    }
}
