//! A clean stop: the others take the PGs over while the data cores still work, the data cores finish, the lease is
//! revoked, leadership is handed on; then the core ends.
//!
//! `/live/N` says first that the node leaves. The director then replaces its slices in every record, primaries with
//! their consent, as in a hand-over: a PG pauses for two metadata transactions, not for as long as stores need
//! to close.

use crate::config::{Phase, STOP_CORES_MS, STOP_HAND_OVER_MS, STOP_LEAVE_MS};
use crate::core::ControlCore;
use crate::director::decide::finish_hand_over;
use crate::drive::{Asker, Meta};
use reactor::{Env, Mono};
use std::collections::BTreeSet;
use wire::CoreId;

/// How far a stop is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Not asked for.
    No,
    /// Others are taking over the node's PGs.
    HandingOver {
        /// They get no longer than this.
        until: Mono,
    },
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
        self.registrar.set_leaving();
        self.stop = Stop::HandingOver { until: env.now().plus_ms(STOP_HAND_OVER_MS) };
    }

    fn stop_cores(&mut self, env: &mut dyn Env) {
        self.feed.stop();
        let left = (0..self.config.data_cores).map(CoreId).collect();
        self.stop = Stop::Cores { left, until: env.now().plus_ms(STOP_CORES_MS) };
    }

    /// Whether somebody else is there who could take over, and has not yet taken over everything that can be.
    fn has_to_give(&self) -> bool {
        let (node, view) = (self.config.node, &self.view);
        let others = view.live().iter().any(|(id, live)| *id != node && !live.leaving);
        if !others || !self.registrar.is_registered() {
            return false;
        }
        let own = |slice: &wire::SliceId| view.home(*slice).is_some_and(|home| home.node == node);
        view.pgs_of_node(node).iter().any(|pg| {
            let Some((entry, pool)) = view.pgs().get(pg).zip(view.pools().get(&pg.pool)) else {
                return false;
            };
            let can_be_given = || {
                let session = self.registrar.session();
                entry.record.primary.is_some() || finish_hand_over(view, entry, pool, session).is_some()
            };
            entry.record.acting.iter().any(own) && can_be_given()
        })
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
        if let Stop::HandingOver { until } = self.stop
            && (now >= until || self.incoming.is_empty() && !self.has_to_give())
        {
            self.stop_cores(env);
        }
        match &mut self.stop {
            Stop::Cores { left, until } if left.is_empty() || now >= *until => {
                self.stop = Stop::Revoking { until: now.plus_ms(STOP_LEAVE_MS) };
                self.mark_for_good(env);
                let todo = self.registrar.leave();
                self.registrar_does(env, vec![todo]);
            }
            Stop::Revoking { until } if now >= *until => self.revoked(env),
            Stop::Leaving { until, resigned } => {
                let alone = matches!(&self.meta, Meta::Voter(node) if node.members().len() <= 1);
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
