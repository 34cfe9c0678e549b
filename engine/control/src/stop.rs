//! A clean stop: the data cores finish, the lease is revoked, the others take over, leadership is handed
//! on; then the core ends.

use crate::config::{Phase, STOP_CORES_MS, STOP_LEAVE_MS};
use crate::core::ControlCore;
use crate::drive::{Asker, Meta};
use reactor::{Env, Mono};
use std::collections::BTreeSet;
use wire::CoreId;

/// How far a stop is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Not asked for.
    No,
    /// Data cores are finishing.
    Cores {
        /// Who has not answered.
        left: BTreeSet<CoreId>,
        /// They are waited for no longer than this.
        until: Mono,
    },
    /// The lease is being revoked.
    Revoking {
        /// As above.
        until: Mono,
    },
    /// A leader sees to it that the others take over, and passes leadership on.
    Leaving {
        /// As above.
        until: Mono,
        /// Leadership was offered to another voter.
        resigned: bool,
    },
    /// The core may end.
    Done,
}

impl ControlCore {
    pub(crate) fn begin_stop(&mut self, env: &mut dyn Env) {
        if self.stop != Stop::No {
            return;
        }
        tracing::info!(node = %self.config.node, "stopping");
        self.config.status.set(|status| status.phase = Phase::Stopping);
        self.feed.stop();
        let left = (0..self.config.data_cores).map(CoreId).collect();
        self.stop = Stop::Cores { left, until: env.now().plus_ms(STOP_CORES_MS) };
    }

    pub(crate) fn core_stopped(&mut self, env: &mut dyn Env, core: CoreId) {
        if let Stop::Cores { left, .. } = &mut self.stop {
            left.remove(&core);
        }
        self.drive_stop(env);
    }

    /// The slices are closed: nothing that comes later may be older. On its way before the lease ends, which
    /// it depends on.
    fn mark_for_good(&mut self, env: &mut dyn Env) {
        let (session, process) = (self.registrar.session(), self.registrar.process());
        if self.registrar.is_registered()
            && let Some(request) = self.marks.write(&self.config, &self.view, session, process)
        {
            self.ask(env, Asker::Marks, request);
        }
    }

    pub(crate) fn revoked(&mut self, env: &mut dyn Env) {
        if matches!(self.stop, Stop::Revoking { .. }) {
            self.stop = Stop::Leaving { until: env.now().plus_ms(STOP_LEAVE_MS), resigned: false };
        }
    }

    /// Does the next step of a stop when it is due.
    pub(crate) fn drive_stop(&mut self, env: &mut dyn Env) {
        let now = env.now();
        match &mut self.stop {
            Stop::Cores { left, until } if left.is_empty() || now >= *until => {
                self.stop = Stop::Revoking { until: now.plus_ms(STOP_LEAVE_MS) };
                self.mark_for_good(env);
                let todo = self.registrar.leave();
                self.registrar_does(env, vec![todo]);
            }
            Stop::Revoking { until } if now >= *until => self.revoked(env),
            Stop::Leaving { until, resigned } => {
                let alone = self.links.is_empty();
                let late = now >= *until;
                let idle = self.incoming.is_empty() && self.director.is_idle();
                match &mut self.meta {
                    Meta::Voter(node) if node.is_serving() && !alone && !late => {
                        if idle && !*resigned {
                            node.resign(env);
                            *resigned = true;
                        }
                    }
                    Meta::Voter(node) if node.is_serving() && alone && !idle && !late => {}
                    _ => {
                        self.config.status.set(|status| status.phase = Phase::Stopped);
                        self.stop = Stop::Done;
                    }
                }
            }
            _ => {}
        }
    }
}
