//! Prometheus families from the counters of all cores of a node.

use super::{CoreMetrics, LATENCY_BOUNDS_US, Latency, OP_CLASSES, OpMetrics, SliceMetrics};
use crate::report::PG_STATES;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use std::sync::Arc;
use wire::CoreId;

/// A node's data cores with their counters.
type Cores = [(CoreId, Arc<CoreMetrics>)];

fn label(name: &str, value: impl ToString) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_string());
    pair
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(format!("drystone_{name}"));
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn counter(labels: Vec<LabelPair>, value: u64) -> Metric {
    float_counter(labels, value as f64)
}

fn float_counter(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<LabelPair>, value: u64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value as f64);
    let mut metric = Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

fn histogram(labels: Vec<LabelPair>, latency: &Latency) -> Metric {
    let mut total = 0;
    let mut buckets = Vec::with_capacity(LATENCY_BOUNDS_US.len());
    let mut counts = latency.buckets.iter().map(super::Cell64::get);
    for (bound, count) in LATENCY_BOUNDS_US.iter().zip(&mut counts) {
        total += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound as f64 / 1e6);
        bucket.set_cumulative_count(total);
        buckets.push(bucket);
    }
    total += counts.sum::<u64>();
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets);
    histogram.set_sample_count(total);
    histogram.set_sample_sum(latency.sum_ns.get() as f64 / 1e9);
    let mut metric = Metric::from_label(labels);
    metric.set_histogram(histogram);
    metric
}

/// One metric per core and class of operations.
fn per_op(cores: &Cores, make: impl Fn(Vec<LabelPair>, &OpMetrics) -> Vec<Metric>) -> Vec<Metric> {
    let mut all = Vec::new();
    for (core, metrics) in cores {
        for ((_, name), op) in OP_CLASSES.iter().zip(&metrics.ops) {
            all.extend(make(vec![label("core", core), label("op", name)], op));
        }
    }
    all
}

fn per_core(cores: &Cores, make: impl Fn(Vec<LabelPair>, &CoreMetrics) -> Metric) -> Vec<Metric> {
    cores.iter().map(|(core, metrics)| make(vec![label("core", core)], metrics)).collect()
}

fn per_slice(cores: &Cores, make: impl Fn(Vec<LabelPair>, &SliceMetrics) -> Metric) -> Vec<Metric> {
    let slices =
        cores.iter().flat_map(|(core, metrics)| metrics.slices().into_iter().map(move |s| (core, s)));
    slices.map(|(core, slice)| make(vec![label("core", core), label("slice", slice.slice)], &slice)).collect()
}

fn results(labels: Vec<LabelPair>, op: &OpMetrics) -> Vec<Metric> {
    [("ok", &op.ok), ("retry", &op.retry), ("error", &op.error)]
        .into_iter()
        .map(|(result, cell)| {
            let mut labels = labels.clone();
            labels.push(label("result", result));
            counter(labels, cell.get())
        })
        .collect()
}

/// Reads one number of a core.
type CoreNumber = fn(&CoreMetrics) -> u64;
/// Reads one number of a slice.
type SliceNumber = fn(&SliceMetrics) -> u64;

const CORE_COUNTERS: &[(&str, &str, CoreNumber)] = &[
    ("fenced_connections_total", "Connections closed because a newer one of their session came.", |m| {
        m.fenced.get()
    }),
    ("stale_epochs_total", "Requests refused because of an older epoch.", |m| m.stale_epochs.get()),
    ("resent_operations_total", "Sub-operations sent again after a reconnection.", |m| m.resent.get()),
    ("recognised_changes_total", "Changes sent again that had been carried out already.", |m| {
        m.recognised.get()
    }),
    ("lost_memories_total", "PGs that began to serve when nobody knew which changes had been made.", |m| {
        m.memory_lost.get()
    }),
    ("compared_by_digest_total", "Members found equal to their primary by their digests.", |m| {
        m.compared_by_digest.get()
    }),
    ("compared_by_history_total", "Members whose differences all stood in the primary's history.", |m| {
        m.compared_by_history.get()
    }),
    ("compared_by_list_total", "Members whose objects had to be listed for comparing.", |m| {
        m.compared_by_list.get()
    }),
    ("digest_mismatches_total", "Members whose digests did not fit their lists: a bug, or damage.", |m| {
        m.digest_mismatches.get()
    }),
    ("recovered_objects_total", "Object copies made equal to their primary.", |m| m.recovered_objects.get()),
    ("recovered_bytes_total", "Bytes sent to make object copies equal.", |m| m.recovered_bytes.get()),
    ("repaired_objects_total", "Bad own copies rewritten from another member.", |m| m.repaired.get()),
    ("scrubs_total", "Scrubs of a placement group that went through.", |m| m.scrubs.get()),
    ("scrubbed_objects_total", "Objects whose copies a scrub compared.", |m| m.scrubbed_objects.get()),
    ("scrub_errors_total", "Copies that a scrub found bad or different.", |m| m.scrub_errors.get()),
    ("out_of_sync_total", "Members reported as out of sync.", |m| m.out_of_sync.get()),
    ("purged_tombstones_total", "Tombstones purged.", |m| m.purged.get()),
    ("erased_strays_total", "Objects erased that placement groups had left behind.", |m| m.erased.get()),
];

const CORE_GAUGES: &[(&str, &str, CoreNumber)] = &[
    ("client_operations", "Client operations under way.", |m| m.client_ops.get()),
    (
        "client_operations_waiting",
        "Client operations waiting for another one, a recovery or an activation.",
        |m| m.client_ops_waiting.get(),
    ),
    ("sub_operations", "Sub-operations under way as a member.", |m| m.sub_ops.get()),
    ("connections", "Connections accepted and open.", |m| m.connections.get()),
    ("peers_up", "Peers connected.", |m| m.peers_up.get()),
    ("pgs_followed", "Placement groups followed as a member.", |m| m.pgs_followed.get()),
    ("strays_pending", "1 while what placement groups have left behind is looked for and erased.", |m| {
        m.strays_pending.get()
    }),
    ("missing_objects", "Object copies still to be recovered.", |m| m.missing.get()),
    ("buffer_used_bytes", "Buffer memory in use.", |m| m.buffer_used_bytes.get()),
    ("buffer_size_bytes", "Buffer memory in all.", |m| m.buffer_bytes.get()),
];

const SLICE_COUNTERS: &[(&str, &str, SliceNumber)] = &[
    ("slice_writes_total", "Changes given to the slice's store.", |m| m.writes.get()),
    ("slice_reads_total", "Reads given to the slice's store.", |m| m.reads.get()),
    ("slice_corrupt_reads_total", "Reads that met a bad checksum.", |m| m.corrupt.get()),
    ("slice_failures_total", "Operations that failed on the device.", |m| m.failures.get()),
    ("slice_device_operations_total", "Operations that the device has ended.", |m| m.device_ops.get()),
];

/// In nanoseconds.
const SLICE_TIMES: &[(&str, &str, SliceNumber)] = &[
    ("slice_device_wait_seconds_total", "Time that device operations took, each from begin to end.", |m| {
        m.device_wait_ns.get()
    }),
    ("slice_device_busy_seconds_total", "Time in which a device operation was under way.", |m| {
        m.device_busy_ns.get()
    }),
];

const SLICE_GAUGES: &[(&str, &str, SliceNumber)] = &[
    ("slice_open", "1 while the slice serves.", |m| m.open.get()),
    ("slice_size_bytes", "Bytes the slice can hold.", |m| m.size_bytes.get()),
    ("slice_used_bytes", "Bytes in use.", |m| m.used_bytes.get()),
    ("slice_objects", "Objects on the slice.", |m| m.objects.get()),
    ("slice_memory_bytes", "Memory of the slice's index and caches.", |m| m.memory_bytes.get()),
];

/// Everything the data cores of a node count, ready for `prometheus::TextEncoder`.
pub fn families(cores: &Cores) -> Vec<MetricFamily> {
    let mut out = vec![
        family(
            "operations_total",
            "Operations answered, by result.",
            MetricType::COUNTER,
            per_op(cores, results),
        ),
        family(
            "operation_bytes_total",
            "Payload of operations that succeeded.",
            MetricType::COUNTER,
            per_op(cores, |labels, op| vec![counter(labels, op.bytes.get())]),
        ),
        family(
            "operation_duration_seconds",
            "Time from arrival to answer of operations that succeeded.",
            MetricType::HISTOGRAM,
            per_op(cores, |labels, op| vec![histogram(labels, &op.latency)]),
        ),
        family(
            "pgs",
            "Placement groups this node is primary of, by state.",
            MetricType::GAUGE,
            pg_states(cores),
        ),
    ];
    for (name, help, number) in CORE_COUNTERS {
        let metrics = per_core(cores, |labels, core| counter(labels, number(core)));
        out.push(family(name, help, MetricType::COUNTER, metrics));
    }
    for (name, help, number) in CORE_GAUGES {
        let metrics = per_core(cores, |labels, core| gauge(labels, number(core)));
        out.push(family(name, help, MetricType::GAUGE, metrics));
    }
    for (name, help, number) in SLICE_COUNTERS {
        let metrics = per_slice(cores, |labels, slice| counter(labels, number(slice)));
        out.push(family(name, help, MetricType::COUNTER, metrics));
    }
    for (name, help, number) in SLICE_TIMES {
        let metrics = per_slice(cores, |labels, slice| float_counter(labels, number(slice) as f64 / 1e9));
        out.push(family(name, help, MetricType::COUNTER, metrics));
    }
    for (name, help, number) in SLICE_GAUGES {
        let metrics = per_slice(cores, |labels, slice| gauge(labels, number(slice)));
        out.push(family(name, help, MetricType::GAUGE, metrics));
    }
    // A family without samples is refused by the encoder.
    out.retain(|family| !family.get_metric().is_empty());
    out
}

fn pg_states(cores: &Cores) -> Vec<Metric> {
    let mut all = Vec::new();
    for (core, metrics) in cores {
        for ((_, name), cell) in PG_STATES.iter().zip(&metrics.pg_states) {
            all.push(gauge(vec![label("core", core), label("state", name)], cell.get()));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{Encoder, TextEncoder};
    use reactor::Mono;
    use wire::{SliceId, Status};

    #[test]
    fn the_text_names_every_family_once_with_help_and_type() {
        let metrics = CoreMetrics::new(&[SliceId(7)]);
        metrics.op(super::super::OpClass::Write).done(Status::Ok, 4096, Mono(0), Mono(15_000));
        metrics.op(super::super::OpClass::Write).done(Status::Ok, 4096, Mono(0), Mono(9_000_000_000));
        let cores = [(CoreId(0), Arc::new(metrics))];
        let mut text = Vec::new();
        TextEncoder::new().encode(&families(&cores), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(
            "drystone_operation_duration_seconds_bucket{core=\"0\",op=\"write\",le=\"0.00002\"} 1"
        ));
        assert!(
            text.contains(
                "drystone_operation_duration_seconds_bucket{core=\"0\",op=\"write\",le=\"+Inf\"} 2"
            )
        );
        assert!(text.contains("drystone_operations_total{core=\"0\",op=\"write\",result=\"ok\"} 2"));
        assert!(text.contains("drystone_slice_open{core=\"0\",slice=\"7\"} 0"));
        for line in text.lines().filter(|line| line.starts_with("# TYPE")) {
            let mut words = line.split_whitespace().skip(2);
            let (name, kind) = (words.next().unwrap(), words.next().unwrap());
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            assert_eq!(text.matches(&format!("# HELP {name} ")).count(), 1, "{line}");
        }
    }
}
