//! What the kernel counts about a process: CPU time and memory.

use std::io;
use std::time::Duration;

/// Ticks per second of the times in `/proc/PID/stat`: a fixed part of the kernel's user interface on
/// every architecture that this runs on.
const TICKS_PER_SECOND: u64 = 100;

/// CPU time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuTime {
    /// In user mode and in the kernel, all threads (io_uring's workers too), ended ones included.
    pub own: Duration,
    /// The same of children that were waited for.
    pub children: Duration,
}

impl CpuTime {
    /// Both.
    pub fn total(&self) -> Duration {
        self.own + self.children
    }
}

fn bad(pid: u32) -> io::Error {
    io::Error::other(format!("/proc/{pid}/stat has an unknown form"))
}

/// CPU time of a process so far. Also answers for one that has ended and not been waited for.
pub fn cpu_time(pid: u32) -> io::Result<CpuTime> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat"))?).ok_or_else(|| bad(pid))
}

fn parse_stat(text: &str) -> Option<CpuTime> {
    // The name, in parentheses, may contain anything: fields are counted behind the last one.
    let fields: Vec<u64> =
        text.rsplit_once(')')?.1.split_whitespace().skip(1).map(|f| f.parse().unwrap_or(0)).collect();
    // Behind the state (field 3): utime, stime, cutime, cstime are fields 14 to 17.
    let ticks = |field: usize| fields.get(field - 4).copied();
    let time = |ticks: u64| Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND);
    Some(CpuTime { own: time(ticks(14)? + ticks(15)?), children: time(ticks(16)? + ticks(17)?) })
}

/// Resident memory in bytes.
pub fn resident_bytes(pid: u32) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| bad(pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_the_name() {
        let text = "77 (a ) b) S 1 77 77 0 -1 4194304 1 0 0 0 150 50 30 20 20 0 9 0 1 2 3";
        let time = parse_stat(text).unwrap();
        assert_eq!((time.own, time.children), (Duration::from_secs(2), Duration::from_millis(500)));
        assert_eq!(time.total(), Duration::from_millis(2500));
    }

    #[test]
    fn this_process_has_memory_and_time() {
        assert!(resident_bytes(std::process::id()).unwrap() > 100_000);
        cpu_time(std::process::id()).unwrap();
    }
}
