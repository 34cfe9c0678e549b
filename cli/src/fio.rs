//! Runs of fio, and what they measured.

use crate::children::{last_lines, wait_for_end};
use crate::deadline::Deadline;
use crate::error::CliError;
use crate::procfs;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The only fio that the engine fits.
pub const FIO_VERSION: &str = "fio-3.33";

/// What fio works on.
#[derive(Clone, Debug)]
pub enum Target {
    /// An image, through Drystone's engine.
    Image {
        /// libdrystone_fio.so.
        engine: PathBuf,
        /// Control addresses.
        cluster: String,
        /// The image.
        image: String,
    },
    /// A file, through fio's own io_uring engine and without the page cache.
    File(PathBuf),
}

/// A run.
#[derive(Clone, Debug)]
pub struct FioJob {
    /// Its name.
    pub name: String,
    /// fio's `--rw`.
    pub rw: &'static str,
    /// Bytes of one operation, as fio writes it.
    pub bs: &'static str,
    /// Operations under way.
    pub depth: u32,
    /// Further flags.
    pub extra: Vec<String>,
}

/// What a run measured.
#[derive(Clone, Debug, Default)]
pub struct FioResult {
    /// Operations, reads and writes together.
    pub ios: u64,
    /// Bytes they moved.
    pub bytes: u64,
    /// Operations per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
    /// The longest operation.
    pub longest: Duration,
    /// CPU time of fio itself.
    pub cpu: Duration,
}

/// A run under way.
pub struct FioRun {
    child: Child,
    name: String,
    output: PathBuf,
    errors: PathBuf,
}

fn failed(why: impl Into<String>) -> CliError {
    CliError::Program { program: "fio".into(), why: why.into() }
}

/// Checks that fio is there and is the version that the engine fits.
pub fn check() -> Result<(), CliError> {
    let output = Command::new("fio").arg("--version").output();
    let output = output.map_err(|error| failed(format!("cannot be started: {error}")))?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_string();
    if version.starts_with(FIO_VERSION) {
        return Ok(());
    }
    Err(failed(format!("is version {version}; the engine is built for {FIO_VERSION}")))
}

impl FioJob {
    /// Starts it; its files go to `dir`.
    pub fn spawn(&self, target: &Target, dir: &Path) -> Result<FioRun, CliError> {
        let output = dir.join(format!("fio-{}.json", self.name));
        let errors = dir.join(format!("fio-{}.log", self.name));
        let log = std::fs::OpenOptions::new().create(true).truncate(true).write(true).open(&errors);
        let log =
            log.map_err(|source| CliError::Io { what: format!("open {}", errors.display()), source })?;
        let out =
            log.try_clone().map_err(|source| CliError::Io { what: "duplicate a file".into(), source })?;
        // setpriv (util-linux) makes the kernel end fio with this process, whatever happens to it.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", "fio"])
            .arg(format!("--name={}", self.name))
            .args([format!("--rw={}", self.rw), format!("--bs={}", self.bs)])
            .args([format!("--iodepth={}", self.depth), "--direct=1".into(), "--thread".into()])
            .args(["--output-format=json", "--percentile_list=50:99", "--randrepeat=0"])
            .arg(format!("--output={}", output.display()));
        match target {
            Target::Image { engine, cluster, image } => command
                .arg(format!("--ioengine=external:{}", engine.display()))
                .args([format!("--cluster={cluster}"), format!("--image={image}")]),
            Target::File(path) => {
                command.arg("--ioengine=io_uring").arg(format!("--filename={}", path.display()))
            }
        };
        // fio leaves a file with verification state where it was started.
        command.args(&self.extra).current_dir(dir).process_group(0);
        let child = command.stdin(Stdio::null()).stdout(out).stderr(log).spawn();
        let child = child.map_err(|error| failed(format!("cannot be started: {error}")))?;
        Ok(FioRun { child, name: self.name.clone(), output, errors })
    }
}

impl FioRun {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end, at most until the deadline; `None` when it still runs then.
    pub fn wait_until(&mut self, deadline: Deadline) -> Result<Option<FioResult>, CliError> {
        let waiting = |source| CliError::Io { what: "wait for fio".into(), source };
        let Some(cpu) = self.ended(deadline).map_err(waiting)? else { return Ok(None) };
        let status = self.child.wait().map_err(waiting)?;
        let said = last_lines(&self.errors);
        if !status.success() {
            return Err(failed(format!("run {} ended with {status}:\n{said}", self.name)));
        }
        let text = std::fs::read_to_string(&self.output);
        let text = text.map_err(|error| failed(format!("left no result of {}: {error}", self.name)))?;
        let mut result = parse(&text).ok_or_else(|| failed(format!("result not understood:\n{said}")))?;
        result.cpu = cpu;
        Ok(Some(result))
    }

    /// Waits for the process's end without collecting it, so that its CPU time can still be read.
    fn ended(&mut self, deadline: Deadline) -> std::io::Result<Option<Duration>> {
        let pid = Pid::from_raw(self.child.id() as i32).ok_or(std::io::ErrorKind::NotFound)?;
        let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        loop {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
            if waitid(WaitId::Pid(pid), options)?.is_some() {
                return procfs::cpu_time(self.child.id()).map(|time| Some(time.total()));
            }
            if deadline.passed() {
                return Ok(None);
            }
            crate::children::wait_readable(&fd, deadline.left())?;
        }
    }
}

impl Drop for FioRun {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // fio ends its jobs on SIGTERM; only one that does not is killed.
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
        if !matches!(wait_for_end(&mut self.child, Deadline::after(Duration::from_secs(2))), Ok(Some(_))) {
            let _ = self.child.kill().and_then(|()| self.child.wait());
        }
    }
}

/// Sums up fio's JSON: counts over all jobs, latencies of the direction with more operations.
fn parse(text: &str) -> Option<FioResult> {
    // Lines of warnings may stand in front.
    let json = text.get(text.find('{')?..)?;
    let root: Value = serde_json::from_str(json).ok()?;
    let mut result = FioResult::default();
    let mut most = 0;
    for job in root.get("jobs")?.as_array()? {
        for direction in ["read", "write"] {
            let part = job.get(direction)?;
            let number = |name: &str| part.get(name).and_then(Value::as_f64).unwrap_or(0.0);
            let ios = number("total_ios") as u64;
            result.ios += ios;
            result.bytes += number("io_bytes") as u64;
            result.iops += number("iops");
            result.bytes_per_second += number("bw_bytes");
            let latency = part.get("clat_ns")?;
            let longest = latency.get("max").and_then(Value::as_f64).unwrap_or(0.0);
            result.longest = result.longest.max(Duration::from_nanos(longest as u64));
            if ios > most {
                most = ios;
                let at = |name: &str| latency.pointer(&format!("/percentile/{name}")).and_then(Value::as_f64);
                result.p50_us = at("50.000000").unwrap_or(0.0) / 1000.0;
                result.p99_us = at("99.000000").unwrap_or(0.0) / 1000.0;
            }
        }
    }
    Some(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed_up() {
        let part = |ios: u32, max: u32, p50: u32| {
            format!(
                r#"{{"io_bytes": {}, "bw_bytes": 4096, "iops": {ios}.5, "total_ios": {ios},
                    "clat_ns": {{"max": {max}, "percentile": {{"50.000000": {p50}, "99.000000": 9000}}}}}}"#,
                ios * 4096
            )
        };
        let text = format!(
            "fio: a warning\n{{\"jobs\": [{{\"read\": {}, \"write\": {}}}]}}",
            part(10, 500, 1000),
            part(30, 7000, 2000)
        );
        let result = parse(&text).unwrap();
        assert_eq!((result.ios, result.bytes, result.iops), (40, 40 * 4096, 41.0));
        assert_eq!((result.p50_us, result.p99_us), (2.0, 9.0));
        assert_eq!(result.longest, Duration::from_micros(7));
        assert!(parse("fio: bad").is_none());
    }
}
