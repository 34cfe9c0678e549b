//! What the loops count about themselves, as Prometheus families.

use engine::metrics::{CoreMetrics, families};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, Opts};
use reactor::backend::{CoreStats, Counter};
use std::sync::Arc;
use wire::{CONTROL_CORE, CoreId};

/// Nanoseconds in a second, as Prometheus wants its times.
const NANO: f64 = 1e-9;

struct Family {
    name: &'static str,
    help: &'static str,
    value: fn(&CoreStats) -> &Counter,
    scale: f64,
    grows: bool,
}

const fn counter(name: &'static str, help: &'static str, value: fn(&CoreStats) -> &Counter) -> Family {
    Family { name, help, value, scale: 1.0, grows: true }
}

const fn gauge(name: &'static str, help: &'static str, value: fn(&CoreStats) -> &Counter) -> Family {
    Family { name, help, value, scale: 1.0, grows: false }
}

const FAMILIES: &[Family] = &[
    counter("drystone_loop_enters_total", "io_uring_enter system calls.", |s| &s.enters),
    counter("drystone_loop_turns_total", "Turns of the loop.", |s| &s.iterations),
    counter("drystone_loop_events_total", "Events given to the service.", |s| &s.events),
    counter("drystone_loop_completions_total", "Completions reaped from the ring.", |s| &s.completions),
    counter("drystone_loop_spins_total", "Times the loop polled before sleeping.", |s| &s.spins),
    counter("drystone_loop_spin_hits_total", "Such polls that found something.", |s| &s.spin_hits),
    counter("drystone_loop_parks_total", "Times the loop slept in the kernel.", |s| &s.parks),
    counter("drystone_loop_stalls_total", "Batches that took longer than 5 ms.", |s| &s.stalls),
    Family {
        name: "drystone_loop_lag_seconds_total",
        help: "Time spent in batches, from reaping to the end of the flush.",
        value: |s| &s.lag_sum_ns,
        scale: NANO,
        grows: true,
    },
    Family {
        name: "drystone_loop_lag_max_seconds",
        help: "Longest batch since the start.",
        value: |s| &s.lag_max_ns,
        scale: NANO,
        grows: false,
    },
    counter("drystone_loop_disk_operations_total", "Disk operations completed.", |s| &s.disk_ops),
    counter("drystone_loop_disk_operations_polled_total", "Those found by polling the drive.", |s| {
        &s.polled_ops
    }),
    gauge("drystone_loop_disk_in_flight", "Disk operations under way.", |s| &s.disk_in_flight),
    gauge("drystone_loop_buffer_used_bytes", "Buffers in use when the loop last slept.", |s| {
        &s.arena_used_bytes
    }),
    gauge("drystone_loop_buffer_registered_bytes", "Buffers registered with the kernel.", |s| {
        &s.arena_registered_bytes
    }),
    gauge("drystone_rdma_connections", "Connections that use RDMA, or are about to.", |s| {
        &s.rdma_connections
    }),
    counter("drystone_rdma_switches_total", "Connections that have switched to RDMA.", |s| &s.rdma_switches),
    counter("drystone_rdma_doorbells_total", "Times work was handed to the RDMA device.", |s| {
        &s.rdma_doorbells
    }),
    counter("drystone_rdma_work_requests_total", "Work requests handed to the RDMA device.", |s| {
        &s.rdma_work_requests
    }),
    counter("drystone_rdma_refusals_total", "Times RDMA with a peer came to nothing: TCP went on.", |s| {
        &s.rdma_refusals
    }),
    counter("drystone_rdma_breaks_total", "Connections that broke while they used RDMA.", |s| &s.rdma_breaks),
    counter("drystone_heap_allocations_total", "Heap allocations of the core's thread.", |s| {
        &s.heap_allocations
    }),
];

/// The loops' counters, read when they are asked for.
pub struct LoopCollector {
    cores: Vec<(CoreId, Arc<CoreStats>)>,
    // A collector must describe its families once; the values come from these anew at each collection.
    descs: Vec<Desc>,
}

/// How a core is called in labels: its number, or `control`.
pub fn core_label(core: CoreId) -> String {
    if core == CONTROL_CORE { "control".to_string() } else { core.to_string() }
}

impl LoopCollector {
    /// For the cores of one node.
    pub fn new(cores: Vec<(CoreId, Arc<CoreStats>)>) -> prometheus::Result<Self> {
        let labels = || vec!["core".to_string()];
        let descs = FAMILIES
            .iter()
            .map(|f| Desc::new(f.name.into(), f.help.into(), labels(), Default::default()))
            .collect::<Result<_, _>>()?;
        Ok(Self { cores, descs })
    }

    fn family(&self, family: &Family) -> prometheus::Result<Vec<MetricFamily>> {
        let opts = Opts::new(family.name, family.help);
        let values = self
            .cores
            .iter()
            .map(|(core, stats)| (core_label(*core), (family.value)(stats).get() as f64 * family.scale));
        if family.grows {
            let vec = CounterVec::new(opts, &["core"])?;
            values.for_each(|(core, value)| vec.with_label_values(&[&core]).inc_by(value));
            Ok(vec.collect())
        } else {
            let vec = GaugeVec::new(opts, &["core"])?;
            values.for_each(|(core, value)| vec.with_label_values(&[&core]).set(value));
            Ok(vec.collect())
        }
    }
}

impl Collector for LoopCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        FAMILIES.iter().filter_map(|family| self.family(family).ok()).flatten().collect()
    }
}

/// The data cores' counters, read when they are asked for.
pub struct DataCollector {
    cores: Vec<(CoreId, Arc<CoreMetrics>)>,
    descs: Vec<Desc>,
}

impl DataCollector {
    /// For the data cores of one node.
    pub fn new(cores: Vec<(CoreId, Arc<CoreMetrics>)>) -> prometheus::Result<Self> {
        let descs = families(&cores)
            .iter()
            .map(|family| {
                let (name, help) = (family.name().to_string(), family.help().to_string());
                Desc::new(name, help, Vec::new(), Default::default())
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { cores, descs })
    }
}

impl Collector for DataCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        families(&self.cores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::SliceId;

    #[test]
    fn every_room_s_families_fit_one_registry() {
        let registry = prometheus::Registry::new();
        // A name may be registered once only: what the control core counts is not a data core's too.
        control::ControlMetrics::new(&registry, "test").unwrap();
        registry.register(Box::new(LoopCollector::new(vec![(CoreId(0), Arc::default())]).unwrap())).unwrap();
        let data = vec![(CoreId(0), Arc::new(CoreMetrics::new(&[SliceId(7)])))];
        registry.register(Box::new(DataCollector::new(data).unwrap())).unwrap();
        let names: Vec<String> = registry.gather().iter().map(|family| family.name().to_string()).collect();
        assert!(names.iter().any(|name| name == "drystone_loop_enters_total"));
        assert!(names.iter().any(|name| name == "drystone_slice_open"));
        assert!(names.iter().any(|name| name == "drystone_pgs"));
        let mut once = names.clone();
        once.dedup();
        assert_eq!(names, once);
    }

    #[test]
    fn every_family_is_registered_and_has_a_value_per_core() {
        let registry = prometheus::Registry::new();
        let cores = vec![(CoreId(0), Arc::default()), (CONTROL_CORE, Arc::default())];
        registry.register(Box::new(LoopCollector::new(cores).unwrap())).unwrap();
        let families = registry.gather();
        assert_eq!(families.len(), FAMILIES.len());
        assert!(families.iter().all(|family| family.get_metric().len() == 2));
    }
}
