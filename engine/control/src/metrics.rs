//! Metrics of the control core, in the node's registry.

use placement::Settings;
use prometheus::{Gauge, GaugeVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// The gauges. They are set from the core's state when `/metrics` is asked for.
pub struct ControlMetrics {
    pub(crate) term: IntGauge,
    pub(crate) leader: IntGauge,
    pub(crate) commit_index: IntGauge,
    pub(crate) applied_index: IntGauge,
    pub(crate) log_blocks_used: IntGauge,
    pub(crate) revision: IntGauge,
    pub(crate) meta_requests: IntGauge,
    pub(crate) lease: Gauge,
    pub(crate) registered: IntGauge,
    pub(crate) connections: IntGauge,
    pub(crate) subscribers: IntGauge,
    pub(crate) closed: IntGaugeVec,
    pub(crate) loop_lag: Gauge,
    pub(crate) nodes: IntGaugeVec,
    pub(crate) director_records: IntGauge,
    pub(crate) director_conflicts: IntGauge,
    pub(crate) unplaced_pools: IntGauge,
    pub(crate) drained: IntGauge,
    pub(crate) full_slices: IntGauge,
    pub(crate) flags: IntGaugeVec,
    pub(crate) thresholds: GaugeVec,
    pub(crate) failed_slices: IntGaugeVec,
    registry: Registry,
}

impl ControlMetrics {
    /// Creates and registers them.
    pub fn new(registry: &Registry, version: &str) -> Result<Self, prometheus::Error> {
        let int = |name: &str, help: &str| {
            let gauge = IntGauge::with_opts(Opts::new(name, help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let float = |name: &str, help: &str| {
            let gauge = Gauge::with_opts(Opts::new(name, help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let labelled = |name: &str, help: &str, label: &str| {
            let gauge = IntGaugeVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let this = Self {
            term: int("drystone_raft_term", "Raft term of this node's metadata voter, 0 when it is none.")?,
            leader: int("drystone_raft_leader", "Whether this node leads the metadata group.")?,
            commit_index: int("drystone_raft_commit_index", "Last committed entry of the metadata log.")?,
            applied_index: int("drystone_raft_applied_index", "Last applied entry of the metadata log.")?,
            log_blocks_used: int("drystone_raft_log_blocks", "Blocks of the metadata log in use.")?,
            revision: int("drystone_meta_revision", "Metadata revision that this node has seen.")?,
            meta_requests: int("drystone_meta_requests", "Metadata requests of this node under way.")?,
            lease: float(
                "drystone_lease_remaining_seconds",
                "How long this node's primaries may still serve without another renewal.",
            )?,
            registered: int("drystone_registered", "Whether this node takes part in the cluster.")?,
            connections: int("drystone_control_connections", "Accepted control connections.")?,
            subscribers: int("drystone_control_subscribers", "Connections that watch the metadata.")?,
            closed: labelled(
                "drystone_control_closed_connections",
                "Control connections closed by this node since start, by reason.",
                "reason",
            )?,
            loop_lag: float(
                "drystone_control_loop_lag_seconds",
                "Greatest lateness of the control core's tick since the last scrape.",
            )?,
            nodes: labelled("drystone_nodes", "Nodes known to this node, by state.", "state")?,
            director_records: int(
                "drystone_director_records",
                "Placement group records written by this node's director since start.",
            )?,
            director_conflicts: int(
                "drystone_director_conflicts",
                "Transactions of this node's director refused because of a concurrent change.",
            )?,
            unplaced_pools: int(
                "drystone_director_unplaced_pools",
                "Pools that cannot be placed on the present nodes; known on the leader only.",
            )?,
            drained: int("drystone_drained_nodes", "Nodes that are drained, of primaries or of everything.")?,
            full_slices: int(
                "drystone_full_slices",
                "Slices of the cluster that are so full that writes which need more space fail.",
            )?,
            flags: labelled("drystone_flag", "Whether this flag is set for the cluster.", "flag")?,
            thresholds: {
                let help = "How full a slice may be until this threshold is reached, from 0 to 1.";
                let gauge = GaugeVec::new(Opts::new("drystone_threshold_ratio", help), &["threshold"])?;
                registry.register(Box::new(gauge.clone()))?;
                gauge
            },
            failed_slices: {
                let opts =
                    Opts::new("drystone_slice_failed", "Slices of this node that do not serve; always 1.");
                let gauge = IntGaugeVec::new(opts, &["slice", "disk", "path", "reason"])?;
                registry.register(Box::new(gauge.clone()))?;
                gauge
            },
            registry: registry.clone(),
        };
        labelled("drystone_build_info", "Software version; always 1.", "version")?
            .with_label_values(&[version])
            .set(1);
        Ok(this)
    }

    /// What is set for the cluster.
    pub(crate) fn settings(&self, settings: &Settings) {
        for (flag, on) in [
            ("norecover", settings.norecover),
            ("norebalance", settings.norebalance),
            ("noscrub", settings.noscrub),
        ] {
            self.flags.with_label_values(&[flag]).set(i64::from(on));
        }
        for (threshold, percent) in [
            ("nearfull", settings.nearfull_percent),
            ("backfillfull", settings.backfillfull_percent),
            ("full", settings.full_percent),
        ] {
            self.thresholds.with_label_values(&[threshold]).set(f64::from(percent) / 100.0);
        }
    }

    /// Everything in the registry as Prometheus text. Fails when a collector's families cannot be written.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::core::{Collector, Desc};
    use prometheus::proto::MetricFamily;

    struct Nameless(Gauge);

    impl Collector for Nameless {
        fn desc(&self) -> Vec<&Desc> {
            self.0.desc()
        }
        fn collect(&self) -> Vec<MetricFamily> {
            let mut families = self.0.collect();
            families.iter_mut().for_each(|family| family.set_name(String::new()));
            families
        }
    }

    #[test]
    fn a_family_that_cannot_be_written_is_an_error_and_not_an_empty_page() {
        let registry = Registry::new();
        let metrics = ControlMetrics::new(&registry, "test").unwrap();
        assert!(metrics.text().unwrap().contains("drystone_raft_term 0"));
        registry.register(Box::new(Nameless(Gauge::new("x", "y").unwrap()))).unwrap();
        assert!(metrics.text().is_err());
    }
}
