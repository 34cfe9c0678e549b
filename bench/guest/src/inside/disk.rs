//! Tests of `drystone disk` on NVMe drives.

use super::Context;
use super::cluster::{check, prepare};
use super::drive::Drive;
use super::system::{Mount, tool, utf8};
use crate::error::{GuestError, demand};
use crate::program;
use std::path::Path;
use std::process::Command;

/// What fio writes and verifies: enough to reuse its queue many times.
const FIO_BYTES: &str = "16M";

pub fn a_whole_drive_is_prepared_and_checked(context: &Context) -> Result<(), GuestError> {
    prepared_and_checked(context, &Drive::with_serial("blank")?.path())
}

pub fn a_partition_is_prepared_and_checked(context: &Context) -> Result<(), GuestError> {
    for serial in ["parts", "large"] {
        prepared_and_checked(context, &Drive::with_serial(serial)?.partition(1)?)?;
    }
    Ok(())
}

/// Preparing works once and changes nothing the second time; the check finds nothing.
fn prepared_and_checked(context: &Context, disk: &Path) -> Result<(), GuestError> {
    let drystone = &context.manifest.drystone;
    let first = prepare(drystone, disk)?;
    demand(first.contains(": prepared"), || first.clone())?;
    let again = prepare(drystone, disk)?;
    demand(again.contains("nothing changed"), || again.clone())?;
    let info = program::run(Command::new(drystone).args(["disk", "info", utf8(disk)?]))?;
    demand(info.contains("node     none yet"), || info.clone())?;
    check(drystone, disk, true).map(|_| ())
}

pub fn a_drive_in_use_is_refused(context: &Context) -> Result<(), GuestError> {
    let partition = Drive::with_serial("parts")?.partition(4)?;
    let _mount = Mount::fresh(&partition, Path::new("/run/in-use"))?;
    match prepare(&context.manifest.drystone, &partition) {
        Err(GuestError::Program { said, .. }) if said.contains("is in use by another process") => Ok(()),
        Err(error) => Err(error),
        Ok(said) => Err(GuestError::Demand(format!("a mounted partition was prepared: {said}"))),
    }
}

/// What the host ordered, as `disk info` tells it.
pub fn disk_info_says_what_the_kernel_says(context: &Context) -> Result<(), GuestError> {
    let (blank, parts, large) =
        (Drive::with_serial("blank")?, Drive::with_serial("parts")?, Drive::with_serial("large")?);
    for (disk, sector, atomic) in
        [(blank.path(), 512, 512), (parts.partition(1)?, 512, 4096), (large.partition(1)?, 4096, 4096)]
    {
        prepare(&context.manifest.drystone, &disk)?;
        let mut command = Command::new(&context.manifest.drystone);
        let text = program::run(command.args(["disk", "info", "--json", utf8(&disk)?]))?;
        let malformed = |error: serde_json::Error| GuestError::Malformed {
            what: "the answer of disk info".into(),
            why: error.to_string(),
        };
        let info: serde_json::Value = serde_json::from_str(&text).map_err(malformed)?;
        let device = info.get(0).and_then(|disk| disk.get("device")).cloned().unwrap_or_default();
        for (key, wanted) in [
            ("logical_block_bytes", sector.into()),
            ("atomic_write_bytes", atomic.into()),
            ("volatile_cache", true.into()),
            ("fua", true.into()),
            ("polls", true.into()),
        ] {
            let wanted: serde_json::Value = wanted;
            let found = device.get(key);
            demand(found == Some(&wanted), || {
                format!("{}: {key} is not {wanted}: {device}", disk.display())
            })?;
        }
    }
    Ok(())
}

pub fn a_zoned_drive_is_refused(context: &Context) -> Result<(), GuestError> {
    let drive = Drive::with_serial("zoned")?;
    match prepare(&context.manifest.drystone, &drive.path()) {
        Err(GuestError::Program { said, .. }) if said.contains("zoned device (host-managed)") => Ok(()),
        Err(error) => Err(error),
        Ok(said) => Err(GuestError::Demand(format!("a zoned drive was prepared: {said}"))),
    }
}

pub fn fio_verifies_a_partition(_: &Context) -> Result<(), GuestError> {
    let partition = Drive::with_serial("parts")?.partition(4)?;
    tool(
        "fio",
        &[
            "--name=verify",
            "--ioengine=io_uring",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=16",
            &format!("--size={FIO_BYTES}"),
            "--verify=crc32c",
            "--verify_fatal=1",
            &format!("--filename={}", utf8(&partition)?),
        ],
    )
    .map(|_| ())
}
