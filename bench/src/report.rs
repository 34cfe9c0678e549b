//! The table for people and the file for programs.

use crate::echo::Yardstick;
use crate::rows::{Reach, Row, Value};
use cli::error::CliError;
use cli::fio::FioResult;
use cli::output::{self, Table};
use cli::scrape::Counters;
use serde_json::{Map, json};
use std::path::PathBuf;
use std::time::Duration;

/// Nodes whose counters are summed up.
const NODES: f64 = 3.0;

/// One run of one row.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    value: f64,
    iops: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_us_per_op: f64,
    enters_per_op: f64,
    allocations_per_op: f64,
}

impl Measured {
    /// From fio's result, the CPU time of everything involved, and the nodes' counters.
    pub fn of(row: &Row, result: &FioResult, cpu: Duration, counted: Option<Counters>) -> Self {
        let ops = result.ios.max(1) as f64;
        let mib = result.bytes.max(1) as f64 / (1 << 20) as f64;
        let counted = counted.unwrap_or_default();
        Self {
            value: match row.value {
                Value::CpuPerOp => cpu.as_secs_f64() * 1e6 / ops,
                Value::CpuPerMib => cpu.as_secs_f64() * 1e3 / mib,
                Value::P50 => result.p50_us,
            },
            iops: result.iops,
            p50_us: result.p50_us,
            p99_us: result.p99_us,
            cpu_us_per_op: cpu.as_secs_f64() * 1e6 / ops,
            enters_per_op: counted.enters / NODES / ops,
            allocations_per_op: counted.allocations / ops,
        }
    }
}

struct Entry {
    name: String,
    unit: &'static str,
    reach: Reach,
    /// The fio workload, if it is one.
    row: Option<Row>,
    runs: Vec<Measured>,
    plain: Vec<Measured>,
    /// For figures that are no fio runs.
    values: Vec<f64>,
}

impl Entry {
    fn value(&self) -> f64 {
        if self.values.is_empty() {
            median(&self.runs, |run| run.value)
        } else {
            median(&self.values, |v| *v)
        }
    }

    fn plain(&self) -> Option<f64> {
        (!self.plain.is_empty()).then(|| median(&self.plain, |run| run.value))
    }

    fn ratio(&self) -> Option<f64> {
        self.plain().filter(|plain| *plain > 0.0).map(|plain| self.value() / plain)
    }

    fn reached(&self) -> bool {
        match self.reach {
            Reach::AtMost(limit) => self.value() <= limit,
            Reach::TimesPlain(limit) => self.ratio().is_some_and(|ratio| ratio <= limit),
        }
    }
}

fn median<T>(runs: &[T], value: impl Fn(&T) -> f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Everything measured.
pub struct Report {
    entries: Vec<Entry>,
    /// Microseconds of the machine's round trips, each round.
    yardsticks: Vec<(Yardstick, Vec<f64>)>,
    cpu: usize,
    runs: usize,
    seconds: u32,
}

impl Report {
    /// Nothing yet.
    pub fn new(cpu: usize, runs: usize, seconds: u32) -> Self {
        Self { entries: Vec::new(), yardsticks: Vec::new(), cpu, runs, seconds }
    }

    /// Adds a figure that is no fio run.
    pub fn add_single(&mut self, name: &str, unit: &'static str, values: Vec<f64>, reach: Reach) {
        let (runs, plain) = (Vec::new(), Vec::new());
        self.entries.push(Entry { name: name.into(), unit, reach, row: None, runs, plain, values });
    }

    /// Adds a measurement of a yardstick.
    pub fn add_yardstick(&mut self, yardstick: &Yardstick, us: f64) {
        match self.yardsticks.iter_mut().find(|(known, _)| known.name == yardstick.name) {
            Some((_, runs)) => runs.push(us),
            None => self.yardsticks.push((*yardstick, vec![us])),
        }
    }

    fn yardstick_us(&self, name: &str) -> Option<f64> {
        let (_, runs) = self.yardsticks.iter().find(|(known, _)| known.name == name)?;
        Some(median(runs, |us| *us))
    }

    /// The sum of what the figure cannot do without here, in its unit.
    fn parts(&self, entry: &Entry) -> Option<f64> {
        let row = entry.row?;
        let parts = row.parts?;
        let us = |(name, count): (&str, u32)| Some(self.yardstick_us(name)? * f64::from(count));
        let here = us(parts.round_trips)? + us(parts.checksums)?;
        Some(here / row.us_per_unit() + entry.plain()? * f64::from(parts.plain))
    }

    /// Adds a run of a row.
    pub fn add(&mut self, row: &Row, plain: Measured, run: Measured) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.name == row.name) {
            entry.runs.push(run);
            entry.plain.push(plain);
            return;
        }
        self.entries.push(Entry {
            name: row.name.into(),
            unit: row.unit(),
            reach: row.reach,
            row: Some(*row),
            runs: vec![run],
            plain: vec![plain],
            values: Vec::new(),
        });
    }

    /// Prints the table.
    pub fn print(&self) -> Result<(), CliError> {
        let headings = [
            "FIGURE",
            ">VALUE",
            "UNIT",
            ">PLAIN (R)",
            ">RATIO",
            "TO REACH",
            "",
            ">PARTS",
            ">IOPS",
            ">p50 us",
            ">p99 us",
            ">CPU us/op",
            ">ENTERS/OP/NODE",
            ">ALLOCS/OP",
        ];
        let mut table = Table::new(&headings);
        let dash = || "-".to_string();
        for entry in &self.entries {
            let of = |value: fn(&Measured) -> f64, digits: usize| match entry.runs.is_empty() {
                true => dash(),
                false => format!("{:.digits$}", median(&entry.runs, value)),
            };
            table.row([
                entry.name.clone(),
                format!("{:.2}", entry.value()),
                entry.unit.to_string(),
                entry.plain().map_or_else(dash, |plain| format!("{plain:.2}")),
                entry.ratio().map_or_else(dash, |ratio| format!("{ratio:.2}")),
                match entry.reach {
                    Reach::AtMost(limit) => format!("<= {limit}"),
                    Reach::TimesPlain(limit) => format!("<= {limit} R"),
                },
                if entry.reached() { "reached" } else { "MISSED" }.to_string(),
                self.parts(entry).map_or_else(dash, |parts| format!("{parts:.2}")),
                of(|run| run.iops, 0),
                of(|run| run.p50_us, 1),
                of(|run| run.p99_us, 1),
                of(|run| run.cpu_us_per_op, 2),
                of(|run| run.enters_per_op, 3),
                of(|run| run.allocations_per_op, 4),
            ]);
        }
        table.print()?;
        for (yardstick, runs) in &self.yardsticks {
            let us = median(runs, |us| *us);
            output::line(&format!("yardstick: {} takes {us:.2} us here", yardstick.what))?;
        }
        output::line("parts: round trips, drive and checksums that the figure cannot do without here")?;
        Ok(())
    }

    /// Writes `target/bench/results.json`.
    pub fn write(&self) -> Result<(), CliError> {
        let mut root = Map::new();
        let mut plain = Map::new();
        for entry in &self.entries {
            let mut object = Map::new();
            object.insert("value".into(), json!(entry.value()));
            object.insert("unit".into(), json!(entry.unit));
            object.insert("ratio_to_plain".into(), json!(entry.ratio()));
            object.insert("reached".into(), json!(entry.reached()));
            object.insert("sum_of_parts".into(), json!(self.parts(entry)));
            if !entry.runs.is_empty() {
                let of = |value: fn(&Measured) -> f64| json!(median(&entry.runs, value));
                object.insert("iops".into(), of(|run| run.iops));
                object.insert("p50_us".into(), of(|run| run.p50_us));
                object.insert("p99_us".into(), of(|run| run.p99_us));
                object.insert("cpu_us_per_op".into(), of(|run| run.cpu_us_per_op));
                object.insert("io_uring_enters_per_op_and_node".into(), of(|run| run.enters_per_op));
                object.insert("heap_allocations_per_op".into(), of(|run| run.allocations_per_op));
            }
            root.insert(entry.name.clone(), object.into());
            if let Some(value) = entry.plain() {
                plain.insert(entry.name.clone(), json!({ "value": value, "unit": entry.unit }));
            }
        }
        for (yardstick, runs) in &self.yardsticks {
            plain.insert(yardstick.name.into(), json!({ "value": median(runs, |us| *us), "unit": "us" }));
        }
        root.insert("plain".into(), plain.into());
        root.insert("machine".into(), self.machine());
        let text = serde_json::to_string_pretty(&root).map_err(|error| CliError::Json(error.to_string()))?;
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
        let path = target.join("bench/results.json");
        let written =
            std::fs::create_dir_all(target.join("bench")).and_then(|()| std::fs::write(&path, text));
        written.map_err(|source| CliError::Io { what: format!("write {}", path.display()), source })?;
        output::line(&format!("written to {}", path.display()))
    }

    fn machine(&self) -> serde_json::Value {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let value =
                text.lines().find(|line| line.starts_with(name)).and_then(|line| line.split_once(':'));
            value.map_or(String::new(), |(_, value)| value.trim().to_string())
        };
        json!({
            "cpu": field(&read("/proc/cpuinfo"), "model name"),
            "cpus": read("/proc/cpuinfo").lines().filter(|line| line.starts_with("processor")).count(),
            "memory": field(&read("/proc/meminfo"), "MemTotal"),
            "kernel": read("/proc/sys/kernel/osrelease").trim(),
            "fio": cli::fio::FIO_VERSION,
            "pinned_to_cpu": self.cpu,
            "runs": self.runs,
            "seconds_per_run": self.seconds,
        })
    }
}
