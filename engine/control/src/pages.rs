//! What the node's pages say.

use crate::config::LinksPage;
use crate::core::ControlCore;
use crate::drive::Meta;
use crate::http::Wanted;
use reactor::{ConnId, Env, Mono};

const TEXT: &str = "text/plain; charset=utf-8";

impl ControlCore {
    pub(crate) fn on_bytes(&mut self, env: &mut dyn Env, conn: ConnId, bytes: &[u8]) {
        match self.http.bytes(env, conn, bytes) {
            Some(Wanted::Metrics) => {
                let (code, text) = match self.metrics_text(env.now()) {
                    Ok(text) => (200, text),
                    Err(error) => {
                        tracing::error!(%error, "metrics cannot be written as text");
                        (500, format!("metrics cannot be written: {error}\n"))
                    }
                };
                self.http.answer(env, conn, code, "text/plain; version=0.0.4; charset=utf-8", &text);
            }
            Some(Wanted::Links) => match self.config.links.as_ref().map(LinksPage::text) {
                Some(page) => self.http.answer(env, conn, 200, "application/json", &page),
                None => self.http.answer(env, conn, 404, TEXT, "nobody counts the connections here\n"),
            },
            Some(Wanted::Health) => {
                let registered = self.registrar.is_registered();
                let (code, text) = if registered { (200, "ok\n") } else { (503, "not registered\n") };
                self.http.answer(env, conn, code, TEXT, text);
            }
            None => {}
        }
    }

    fn metrics_text(&mut self, now: Mono) -> Result<String, prometheus::Error> {
        let Some(metrics) = &self.metrics else {
            return Err(prometheus::Error::Msg("the control core's metrics were not registered".into()));
        };
        let int = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        if let Meta::Voter(node) = &self.meta {
            let status = node.status();
            metrics.term.set(int(status.term));
            metrics.leader.set(i64::from(node.is_serving()));
            metrics.commit_index.set(int(status.commit_index));
            metrics.applied_index.set(int(status.applied_index));
            metrics.log_blocks_used.set(int(status.log_blocks.0));
        }
        metrics.revision.set(int(self.mirror.revision().0));
        metrics.meta_requests.set(int(self.tickets.len() as u64));
        metrics.lease.set(self.authority.since(now) as f64 / 1e9);
        metrics.registered.set(i64::from(self.registrar.is_registered()));
        let (connections, subscribers) = self.server.sizes();
        metrics.connections.set(int(connections as u64));
        metrics.subscribers.set(int(subscribers as u64));
        let counters = self.server.counters();
        for (reason, count) in
            [("garbage", counters.garbage), ("slow", counters.slow), ("refused", counters.refused)]
        {
            metrics.closed.with_label_values(&[reason]).set(int(count));
        }
        metrics.loop_lag.set(self.lag_ns as f64 / 1e9);
        self.lag_ns = 0;
        let live = self.view.live().len() as u64;
        metrics.nodes.with_label_values(&["up"]).set(int(live));
        let down = (self.view.nodes().len() as u64).saturating_sub(live);
        metrics.nodes.with_label_values(&["down"]).set(int(down));
        metrics.director_records.set(int(self.director.counters().records));
        metrics.director_conflicts.set(int(self.director.counters().conflicts));
        metrics.drained.set(int(self.view.drains().len() as u64));
        metrics.full_slices.set(int(self.view.full().len() as u64));
        metrics.settings(self.view.settings());
        metrics.failed_slices.reset();
        for labels in self.failed_slices() {
            metrics.failed_slices.with_label_values(&labels).set(1);
        }
        metrics.unplaced_pools.set(int(self.director.problems().count() as u64));
        metrics.text()
    }
}
