//! What is measured, and what is to be reached.

use crate::echo::{CHECKSUMS_1M, CHECKSUMS_4K, ROUND_TRIP_1M, ROUND_TRIP_4K};

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

/// What an operation cannot do without in this setting, where one core does everything one after the other:
/// so many round trips, operations of the drive and passes of checksums. Their sum, with what each costs on
/// this machine in this run, is a floor: nothing is counted for what a cluster does beside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts {
    /// Name of the yardstick of the round trips, and how many.
    pub round_trips: (&'static str, u32),
    /// Name of the yardstick of the checksums, and how many passes.
    pub checksums: (&'static str, u32),
    /// How many times plain fio's operation.
    pub plain: u32,
}

impl Parts {
    /// Client and primary; one disk; checked by the node and by the client.
    const fn read(round_trip: &'static str, checksums: &'static str) -> Self {
        Self { round_trips: (round_trip, 1), checksums: (checksums, 2), plain: 1 }
    }
    /// Client and primary, primary and two members; three disks; computed by the client, checked by each.
    const fn write(round_trip: &'static str, checksums: &'static str) -> Self {
        Self { round_trips: (round_trip, 3), checksums: (checksums, 4), plain: 3 }
    }
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
    /// What it is made of at least. None where operations share what they are made of: at depth 128 a
    /// round trip serves many.
    pub parts: Option<Parts>,
}

impl Row {
    /// Microseconds in one of the value's unit.
    pub fn us_per_unit(&self) -> f64 {
        match self.value {
            Value::CpuPerOp | Value::P50 => 1.0,
            Value::CpuPerMib => 1000.0,
        }
    }

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

const fn row(name: &'static str, rw: &'static str, value: Value, reach: Reach) -> Row {
    Row { name, rw, bs: "4k", depth: 128, value, reach, parts: None }
}

const READ_4K: Parts = Parts::read(ROUND_TRIP_4K, CHECKSUMS_4K);
const WRITE_4K: Parts = Parts::write(ROUND_TRIP_4K, CHECKSUMS_4K);
const READ_1M: Parts = Parts::read(ROUND_TRIP_1M, CHECKSUMS_1M);
const WRITE_1M: Parts = Parts::write(ROUND_TRIP_1M, CHECKSUMS_1M);

/// The workloads.
pub const ROWS: [Row; 6] = [
    row("write-4k-d128", "randwrite", Value::CpuPerOp, Reach::TimesPlain(7.5)),
    row("read-4k-d128", "randread", Value::CpuPerOp, Reach::TimesPlain(3.1)),
    Row {
        depth: 1,
        parts: Some(WRITE_4K),
        ..row("write-4k-d1", "randwrite", Value::P50, Reach::AtMost(60.0))
    },
    Row { depth: 1, parts: Some(READ_4K), ..row("read-4k-d1", "randread", Value::P50, Reach::AtMost(15.0)) },
    Row {
        bs: "1m",
        depth: 16,
        parts: Some(WRITE_1M),
        ..row("write-1m-d16", "write", Value::CpuPerMib, Reach::AtMost(2.5))
    },
    Row {
        bs: "1m",
        depth: 16,
        parts: Some(READ_1M),
        ..row("read-1m-d16", "read", Value::CpuPerMib, Reach::AtMost(0.85))
    },
];
