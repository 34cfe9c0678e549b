//! Tests of the guest itself: what the others rely on is there.

use super::drive::Drive;
use super::system::module;
use super::{Context, rdma};
use crate::error::{GuestError, demand};
use crate::program;
use std::process::Command;

pub fn modules_load(_: &Context) -> Result<(), GuestError> {
    ["rdma_rxe", "rdma_ucm", "nvme"].into_iter().try_for_each(|name| module(name, &[]))
}

pub fn a_soft_roce_device_has_a_v2_gid(_: &Context) -> Result<(), GuestError> {
    rdma::make().map(|_| ())
}

pub fn nvme_drives_are_as_ordered(_: &Context) -> Result<(), GuestError> {
    for (serial, sector, atomic) in
        [("blank", "512", "512"), ("parts", "512", "4096"), ("large", "4096", "4096")]
    {
        let drive = Drive::with_serial(serial)?;
        for (attribute, wanted) in [
            ("logical_block_size", sector),
            ("atomic_write_unit_max_bytes", atomic),
            ("write_cache", "write back"),
            ("fua", "1"),
            ("io_poll", "1"),
            ("zoned", "none"),
        ] {
            let found = drive.queue(attribute)?;
            demand(found == wanted, || format!("{serial}: {attribute} is '{found}', not '{wanted}'"))?;
        }
    }
    Ok(())
}

pub fn reactor_tests_pass_on_this_kernel(context: &Context) -> Result<(), GuestError> {
    let tests = context.manifest.test_program("reactor", "reactor")?;
    let said = program::run(Command::new(&tests.path).arg("--test-threads=2"))?;
    // A program that runs no test ends well, too.
    demand(said.contains("test result: ok.") && !said.contains(" 0 passed"), || said.clone())
}
