//! The demonstration, interrupted: it must leave no process and no file. (That it succeeds is what
//! `make demo` shows in every CI run.)

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use cli::children::wait_for_end;
use cli::deadline::Deadline;
use common::{LIMIT, binary, temp_dir, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// Command lines of running processes that mention a path.
fn processes_about(path: &Path) -> Vec<String> {
    let path = path.to_str().unwrap();
    let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    lines.filter(|line| line.contains(path)).collect()
}

/// Starts the demonstration, interrupts it when it prints `at`, and returns its last line.
fn interrupted_at(at: &str, signal: Signal) -> String {
    let dir = temp_dir();
    let mut demo = Command::new(binary())
        .args(["demo", "--seconds", "1", "--dir"])
        .arg(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains(at)), "the demonstration never printed '{at}'");
    kill_process(Pid::from_raw(demo.id() as i32).unwrap(), signal).unwrap();
    let last = lines.last().unwrap_or_default();
    assert!(wait_for_end(&mut demo, Deadline::after(LIMIT)).unwrap().is_some(), "it does not end");
    wait_until("all its processes to be gone", || processes_about(dir.path()).is_empty());
    if signal != Signal::KILL {
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "files are left");
    }
    last
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    assert_eq!(interrupted_at("fio: random writes", Signal::INT), "demo: FAILED: interrupted");
}

#[test]
fn its_sudden_death_leaves_no_process_behind() {
    interrupted_at("fio: random writes", Signal::KILL);
}
