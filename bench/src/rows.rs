//! What is measured, and what is to be reached.

/// What a row's value is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value {
    /// CPU microseconds of all processes per operation.
    CpuPerOp,
    /// CPU milliseconds of all processes per MiB.
    CpuPerMib,
    /// Median latency in microseconds.
    P50,
}

/// What is to be reached.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Reach {
    /// At most so many times what plain fio needs.
    TimesPlain(f64),
    /// At most this value.
    AtMost(f64),
}

/// One fio workload.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As in `results.json`.
    pub name: &'static str,
    /// fio's `--rw`.
    pub rw: &'static str,
    /// Bytes of one operation.
    pub bs: &'static str,
    /// Operations under way.
    pub depth: u32,
    /// What is measured.
    pub value: Value,
    /// What is to be reached.
    pub reach: Reach,
}

impl Row {
    /// The value's unit.
    pub fn unit(&self) -> &'static str {
        match self.value {
            Value::CpuPerOp => "us CPU/op",
            Value::CpuPerMib => "ms CPU/MiB",
            Value::P50 => "us p50",
        }
    }
}

/// Time from starting three processes to every PG serving.
pub const START: &str = "start-to-active";
/// Resident memory of an idle node.
pub const RSS: &str = "idle-rss";
/// Seconds.
pub const START_REACH: Reach = Reach::AtMost(1.0);
/// Megabytes.
pub const RSS_REACH: Reach = Reach::AtMost(48.0);

const fn row(
    name: &'static str,
    rw: &'static str,
    bs: &'static str,
    depth: u32,
    value: Value,
    reach: Reach,
) -> Row {
    Row { name, rw, bs, depth, value, reach }
}

/// The workloads.
pub const ROWS: [Row; 6] = [
    row("write-4k-d128", "randwrite", "4k", 128, Value::CpuPerOp, Reach::TimesPlain(7.5)),
    row("read-4k-d128", "randread", "4k", 128, Value::CpuPerOp, Reach::TimesPlain(3.1)),
    row("write-4k-d1", "randwrite", "4k", 1, Value::P50, Reach::AtMost(60.0)),
    row("read-4k-d1", "randread", "4k", 1, Value::P50, Reach::AtMost(15.0)),
    row("write-1m-d16", "write", "1m", 16, Value::CpuPerMib, Reach::AtMost(2.5)),
    row("read-1m-d16", "read", "1m", 16, Value::CpuPerMib, Reach::AtMost(0.85)),
];
