//! `drystone disk check`: runs the store's offline check on a disk and tells a person what it found.

use crate::cmd::Global;
use crate::error::{CliError, DiskProblem};
use crate::output::{self, Table};
use crate::units::ByteSize;
use reactor::backend::DiskFile;
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use store::check::{CheckOptions, CheckReport, Finding, Severity, check};
use wire::BLOCK_BYTES;

/// A disk as the check reads it.
struct Device(File);

impl store::ReadAt for Device {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

/// Checks a disk; damage that is not repaired is an error.
pub fn run(global: &Global, path: &Path, data: bool, repair: bool) -> Result<(), CliError> {
    let problem = |error| CliError::Disk { path: path.into(), problem: DiskProblem::Io(error) };
    // Held to the end: a node must not start on the disk meanwhile.
    let lock = DiskFile::open(path)?;
    let device = Device(OpenOptions::new().read(true).write(repair).open(path).map_err(problem)?);
    let report = check(&device, lock.info().size_bytes, CheckOptions { cluster: None, verify_data: data });
    let mut repaired = 0;
    if repair {
        for write in &report.repairs {
            device.0.write_all_at(&write.bytes, write.offset).map_err(problem)?;
            repaired += 1;
        }
        device.0.sync_all().map_err(problem)?;
    }
    if global.json {
        print_json(path, &report, repaired)?
    } else {
        print(path, &report, repaired)?
    }
    let bad = |finding: &&Finding| match finding.severity() {
        Severity::Note => false,
        Severity::Repairable => !repair,
        Severity::Damage => true,
    };
    match report.findings.iter().filter(bad).count() {
        0 => Ok(()),
        findings => Err(CliError::Damaged { path: path.into(), findings }),
    }
}

fn severity(finding: &Finding) -> &'static str {
    match finding.severity() {
        Severity::Note => "note",
        Severity::Repairable => "repairable",
        Severity::Damage => "damage",
    }
}

fn print(path: &Path, report: &CheckReport, repaired: usize) -> Result<(), CliError> {
    if let Some(disk) = &report.disk {
        output::line(&format!("{}: disk {} of cluster {}", path.display(), disk.disk, disk.cluster))?;
        let headings =
            ["SLICE", ">OBJECTS", ">TOMBSTONES", ">DATA", ">USED", ">FREE", ">COMMITS", ">VERIFIED"];
        let mut table = Table::new(&headings);
        let size = |blocks: u64| ByteSize(blocks.saturating_mul(BLOCK_BYTES as u64)).to_string();
        for slice in &report.slices {
            table.row([
                slice.slice.to_string(),
                slice.objects.to_string(),
                slice.tombstones.to_string(),
                size(slice.data_blocks),
                size(slice.used_blocks),
                size(slice.free_blocks),
                slice.commits.to_string(),
                size(slice.verified_blocks),
            ]);
        }
        table.print()?;
    }
    for finding in &report.findings {
        output::line(&format!("{}: {finding}", severity(finding)))?;
    }
    for repair in report.repairs.iter().take(repaired) {
        output::line(&format!("repaired: {}", repair.what))?;
    }
    if report.findings.is_empty() {
        output::line("nothing wrong")?;
    }
    Ok(())
}

fn print_json(path: &Path, report: &CheckReport, repaired: usize) -> Result<(), CliError> {
    let slices: Vec<_> = report
        .slices
        .iter()
        .map(|slice| {
            json!({
                "slice": slice.slice,
                "objects": slice.objects,
                "tombstones": slice.tombstones,
                "data_blocks": slice.data_blocks,
                "pages": slice.pages,
                "commits": slice.commits,
                "used_blocks": slice.used_blocks,
                "free_blocks": slice.free_blocks,
                "verified_blocks": slice.verified_blocks,
            })
        })
        .collect();
    let findings: Vec<_> = report
        .findings
        .iter()
        .map(|finding| json!({ "severity": severity(finding), "finding": finding.to_string() }))
        .collect();
    output::json(&json!({
        "path": path,
        "disk": report.disk.as_ref().map(|disk| disk.disk),
        "cluster": report.disk.as_ref().map(|disk| disk.cluster),
        "slices": slices,
        "findings": findings,
        "repaired": repaired,
    }))
}
