//! Ctrl-C and SIGTERM, as a flag and as something to wait for.

use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this process was asked to stop. Clones see the same flag.
#[derive(Clone, Debug)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Catches SIGINT and SIGTERM from now on. A second one ends the process at once, the default way:
    /// a person who insists is not kept waiting.
    pub fn on_signals() -> std::io::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // Order matters: on the first signal the flag is still false when the first handler looks.
            signal_hook::flag::register_conditional_default(signal, flag.clone())?;
            signal_hook::flag::register(signal, flag.clone())?;
        }
        Ok(Self(flag))
    }

    /// Never asked to: for what must be finished.
    pub fn never() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }

    /// Whether it was asked for.
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error once it was asked for.
    pub fn check(&self) -> Result<(), crate::error::CliError> {
        if self.asked() { Err(crate::error::CliError::Interrupted) } else { Ok(()) }
    }
}
