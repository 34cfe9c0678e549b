//! `drystone doctor`, on whatever host the tests run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use serde_json::Value;
use std::process::{Command, Output};

fn doctor(args: &[&str]) -> Output {
    Command::new(common::binary()).arg("doctor").args(args).output().unwrap()
}

#[test]
fn the_exit_code_says_whether_there_is_a_problem() {
    let output = doctor(&["--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let problems: Vec<_> = findings.iter().filter(|finding| finding["verdict"] == "problem").collect();
    assert_eq!(report["problems"], problems.len());
    assert_eq!(output.status.code(), Some(i32::from(!problems.is_empty())), "{report:#}");
    for finding in findings.iter().filter(|finding| finding["verdict"] != "ok") {
        assert!(finding["why"].is_string() && finding["fix"].is_string(), "{finding}");
    }
    // The tests run on this kernel.
    assert!(findings.iter().any(|f| f["check"] == "kernel version" && f["verdict"] == "ok"), "{report:#}");
}

#[test]
fn each_finding_has_a_line_for_people() {
    let text = String::from_utf8(doctor(&["--cores", "2"]).stdout).unwrap();
    assert!(text.lines().any(|line| line.starts_with("ok ") && line.contains("kernel version")), "{text}");
    assert!(text.contains("2 core(s) want"), "{text}");
    assert_eq!(doctor(&["--cores", "0"]).status.code(), Some(2));
}
