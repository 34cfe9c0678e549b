//! Is this host set up for Drystone and for RDMA? Each check reads what the kernel shows in `/proc` and `/sys` and
//! says what it found; nothing is changed, nothing is tried out.
//!
//! A check is a function of a `Host`: a directory that is `/` but in tests, and what cannot be read from files.
//! `kernel` and `drives` are about every node, `rdma` about hosts with a device for it, which it describes.

mod drives;
mod kernel;
mod rdma;
#[cfg(test)]
mod tree;

use serde::Serialize;
use std::path::{Path, PathBuf};

/// Entries of one directory that are looked at: more than any host has devices, fewer than would take a second.
const ENTRIES_MAX: usize = 4096;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and could be better; or a person has to look.
    Note,
    /// It does not work, or not as this host is meant to.
    Problem,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How bad it is.
    pub verdict: Verdict,
    /// What there is.
    pub found: String,
    /// Why that matters; nothing where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'static str>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), why: None, fix: None }
    }

    fn note(
        check: &'static str,
        found: impl Into<String>,
        why: &'static str,
        fix: impl Into<String>,
    ) -> Self {
        Self { check, verdict: Verdict::Note, found: found.into(), why: Some(why), fix: Some(fix.into()) }
    }

    fn problem(
        check: &'static str,
        found: impl Into<String>,
        why: &'static str,
        fix: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Problem, ..Self::note(check, found, why, fix) }
    }
}

/// The host that is looked at.
#[derive(Clone, Debug)]
pub struct Host {
    /// Where `/proc`, `/sys`, `/dev`, `/etc` and `/usr` are.
    pub root: PathBuf,
    /// Memory that a process may lock; `None`: any amount.
    pub memlock: Option<u64>,
    /// Data cores that the node will have.
    pub cores: u16,
    /// Buffers of each.
    pub buffer_bytes: u64,
    /// Whether this program can use RDMA at all.
    pub rdma_built: bool,
    /// Whether this user may read and write a file.
    pub may_use: fn(&Path) -> bool,
}

impl Host {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A file's text, without the newline; nothing where it cannot be read.
    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The names in a directory, in order; none where there is no such directory.
    fn names(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(path)).into_iter().flatten().take(ENTRIES_MAX);
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

/// Everything that is looked at.
pub fn examine(host: &Host) -> Vec<Finding> {
    let devices = rdma::devices(host);
    let mut findings = vec![
        kernel::version(host),
        kernel::io_uring(host),
        kernel::memlock(host, !devices.is_empty(), drives::any_polls(host)),
        kernel::governor(host),
        drives::poll_queues(host),
    ];
    findings.extend(rdma::examine(host, &devices));
    findings
}

/// The findings that are problems.
pub fn problems(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.verdict == Verdict::Problem).count()
}

#[cfg(test)]
mod tests {
    use super::tree::Tree;
    use super::*;

    #[test]
    fn a_host_of_which_nothing_is_known_has_findings_and_no_panic() {
        let tree = Tree::new();
        let findings = examine(&tree.host());
        assert!(findings.len() >= 6, "{findings:?}");
        // Without a kernel version nobody can tell; without RDMA devices that is no problem.
        assert_eq!(problems(&findings), 0, "{findings:?}");
    }

    #[test]
    fn this_very_host_can_be_examined() {
        let host = Host { root: "/".into(), ..Tree::new().host() };
        assert!(!examine(&host).is_empty());
    }
}
