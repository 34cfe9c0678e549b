//! The guest's side: the list of tests, and running those that the host asks for.
//!
//! `system` has what every test needs of the machine, `drive` finds drives, `rdma` makes an RDMA device, `cluster`
//! is nodes on drives, `pattern` blocks that say who wrote them. The tests themselves: `environment`, `disk`,
//! `serving`, `commands`, `fabric` (with `offers`, a hostile peer), `power_cut`.

mod cluster;
mod commands;
mod disk;
mod drive;
mod environment;
mod fabric;
mod offers;
mod pattern;
mod power_cut;
pub mod rdma;
mod serving;
mod system;

use crate::error::{GuestError, demand};
use crate::manifest::{EXIT, LOG, Manifest, Phase};
use cli::deadline::Stopwatch;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A test.
pub struct Test {
    /// Its name: a sentence.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// The boots that run it.
    pub phases: &'static [Phase],
    /// Does it.
    pub run: fn(&Context) -> Result<(), GuestError>,
}

/// What a test is given.
pub struct Context {
    /// What the host says.
    pub manifest: Manifest,
    /// The directory shared with the host.
    pub share: PathBuf,
}

/// The test during which the power is cut: it never ends by itself, and the host says how it went.
pub const UNTIL_THE_CUT: &str = "a_cluster_writes_until_the_power_is_cut";

const ORDINARY: &[Phase] = &[Phase::Tests];

/// All tests, in the order in which a boot runs them.
pub const TESTS: [Test; 29] = [
    Test {
        name: "modules_load",
        about: "rdma_rxe, rdma_ucm and nvme load and make their devices",
        phases: ORDINARY,
        run: environment::modules_load,
    },
    Test {
        name: "a_soft_roce_device_has_a_v2_gid",
        about: "rxe0 on a veth interface, with a GID of RoCE v2",
        phases: ORDINARY,
        run: environment::a_soft_roce_device_has_a_v2_gid,
    },
    Test {
        name: "nvme_drives_are_as_ordered",
        about: "sector size, volatile cache, atomic writes and poll queues reach the kernel",
        phases: ORDINARY,
        run: environment::nvme_drives_are_as_ordered,
    },
    Test {
        name: "reactor_tests_pass_on_this_kernel",
        about: "the reactor's own tests, built by the host",
        phases: ORDINARY,
        run: environment::reactor_tests_pass_on_this_kernel,
    },
    Test {
        name: "a_whole_drive_is_prepared_and_checked",
        about: "disk prepare, info, check on a drive without partitions",
        phases: ORDINARY,
        run: disk::a_whole_drive_is_prepared_and_checked,
    },
    Test {
        name: "a_partition_is_prepared_and_checked",
        about: "the same on a partition, with sectors of 512 bytes and of 4 KiB",
        phases: ORDINARY,
        run: disk::a_partition_is_prepared_and_checked,
    },
    Test {
        name: "a_drive_in_use_is_refused",
        about: "a mounted partition is not prepared",
        phases: ORDINARY,
        run: disk::a_drive_in_use_is_refused,
    },
    Test {
        name: "disk_info_says_what_the_kernel_says",
        about: "sector size, cache, atomic writes and poll queues of drives and partitions",
        phases: ORDINARY,
        run: disk::disk_info_says_what_the_kernel_says,
    },
    Test {
        name: "a_zoned_drive_is_refused",
        about: "with a message that says why",
        phases: ORDINARY,
        run: disk::a_zoned_drive_is_refused,
    },
    Test {
        name: "three_nodes_serve_an_image_from_partitions",
        about: "import, export and compare, fio with verification; drives are polled, and in order afterwards",
        phases: ORDINARY,
        run: serving::three_nodes_serve_an_image_from_partitions,
    },
    Test {
        name: "fio_verifies_a_partition",
        about: "fio writes and verifies a partition with io_uring: the rig itself is sound",
        phases: ORDINARY,
        run: disk::fio_verifies_a_partition,
    },
    Test {
        name: "a_drive_is_pulled_and_its_node_lives_on",
        about: "hot removal: the disk goes out, clients go on, copies are made elsewhere",
        phases: ORDINARY,
        run: serving::a_drive_is_pulled_and_its_node_lives_on,
    },
    Test {
        name: "three_nodes_serve_by_nvme_commands",
        about: "the same cluster with NVMe passthrough: fio with verification, disks in order afterwards",
        phases: ORDINARY,
        run: serving::three_nodes_serve_by_nvme_commands,
    },
    Test {
        name: "a_drive_under_commands_is_pulled",
        about: "hot removal under NVMe passthrough",
        phases: ORDINARY,
        run: serving::a_drive_under_commands_is_pulled,
    },
    Test {
        name: "disks_pass_the_conformance_suite",
        about: "NVMe partitions through the block layer and with commands, interrupting and polled",
        phases: ORDINARY,
        run: commands::disks_pass_the_conformance_suite,
    },
    Test {
        name: "commands_are_refused_where_they_cannot_be",
        about: "disks in use, mounted ones and files take no NVMe commands",
        phases: ORDINARY,
        run: commands::commands_are_refused_where_they_cannot_be,
    },
    Test {
        name: "large_operations_are_made_of_several_commands",
        about: "operations larger than a command's limit, written on one way and read on another",
        phases: ORDINARY,
        run: commands::large_operations_are_made_of_several_commands,
    },
    Test {
        name: "ways_to_a_drive_are_compared",
        about: "CPU per read and write of each way, in one boot: figures, no limits",
        phases: ORDINARY,
        run: commands::ways_to_a_drive_are_compared,
    },
    Test {
        name: "net_rdma_passes_the_conformance_suite",
        about: "the environment conformance suite over soft RoCE, in launched cores and foreign hosts",
        phases: ORDINARY,
        run: fabric::net_rdma_passes_the_conformance_suite,
    },
    Test {
        name: "three_nodes_serve_over_rdma_and_one_dies",
        about: "verified I/O over RDMA, small and large; a node is killed and comes back",
        phases: ORDINARY,
        run: fabric::three_nodes_serve_over_rdma_and_one_dies,
    },
    Test {
        name: "a_paused_node_is_replaced_and_wakes_over_rdma",
        about: "a stopped process is replaced; what it finds in its queues when it wakes does no harm",
        phases: ORDINARY,
        run: fabric::a_paused_node_is_replaced_and_wakes_over_rdma,
    },
    Test {
        name: "a_link_goes_down_and_tcp_takes_over_until_it_is_back",
        about: "the interface of RDMA goes down under I/O: TCP, then RDMA again",
        phases: ORDINARY,
        run: fabric::a_link_goes_down_and_tcp_takes_over_until_it_is_back,
    },
    Test {
        name: "a_device_is_removed_and_tcp_takes_over",
        about: "rdma link delete under I/O: everybody lets go of the device and goes on over TCP",
        phases: ORDINARY,
        run: fabric::a_device_is_removed_and_tcp_takes_over,
    },
    Test {
        name: "forged_offers_harm_nobody",
        about: "impossible offers, a peer that is nowhere, steps out of order",
        phases: ORDINARY,
        run: fabric::forged_offers_harm_nobody,
    },
    Test {
        name: "rdma_and_tcp_are_compared",
        about: "IOPS, median latency and CPU per operation of both, in one boot: figures, no limits",
        phases: ORDINARY,
        run: fabric::rdma_and_tcp_are_compared,
    },
    Test {
        name: "a_drive_loses_only_what_was_not_flushed",
        about: "what a cut does to a drive with a volatile cache and to one without; else it proves nothing",
        phases: &[Phase::Cut, Phase::AfterCut],
        run: power_cut::a_drive_loses_only_what_was_not_flushed,
    },
    Test {
        name: "acknowledged_writes_survive_a_power_cut",
        about: "disk check, start, and every acknowledged write of all boots before",
        phases: &[Phase::Cut, Phase::AfterCut],
        run: power_cut::acknowledged_writes_survive_a_power_cut,
    },
    Test {
        name: "disks_are_in_order_after_power_cuts",
        about: "disk check with all data, after an orderly stop",
        phases: &[Phase::AfterCut],
        run: power_cut::disks_are_in_order_after_power_cuts,
    },
    Test {
        name: UNTIL_THE_CUT,
        about: "writes are acknowledged and reported to the host, which kills QEMU",
        phases: &[Phase::FirstCut, Phase::Cut],
        run: power_cut::a_cluster_writes_until_the_power_is_cut,
    },
];

/// Runs what the manifest asks for. True when all have passed.
pub fn run(share: &Path) -> Result<bool, GuestError> {
    let outcome = run_all(share);
    if let Err(error) = &outcome {
        say(share, &format!("FAILED before or between tests: {error}"))?;
    }
    let all_passed = matches!(outcome, Ok(true));
    let path = share.join(EXIT);
    let code = if all_passed { "0\n" } else { "1\n" };
    std::fs::write(&path, code).map_err(GuestError::io(format!("write {}", path.display())))?;
    outcome
}

fn run_all(share: &Path) -> Result<bool, GuestError> {
    let manifest = Manifest::read(share)?;
    say(share, "the guest is up")?;
    for driver in ["nvme", "virtio_scsi", "sd_mod"] {
        system::module(driver, &[])?;
    }
    let context = Context { manifest, share: share.into() };
    let mut all_passed = true;
    for name in &context.manifest.tests {
        let test = TESTS.iter().find(|test| test.name == name);
        let test = test.ok_or_else(|| GuestError::Missing(format!("test {name}")))?;
        let watch = Stopwatch::start();
        let outcome = (test.run)(&context);
        let took = watch.elapsed().as_millis();
        match &outcome {
            Ok(()) => say(share, &format!("ok {name} ({took} ms)"))?,
            Err(error) => say(share, &format!("FAILED {name}: {error}"))?,
        }
        all_passed &= outcome.is_ok();
    }
    demand(!context.manifest.tests.is_empty(), || "the host asked for no test".into())?;
    Ok(all_passed)
}

/// Appends a line for the host.
fn say(share: &Path, line: &str) -> Result<(), GuestError> {
    let path = share.join(LOG);
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
        .map_err(GuestError::io(format!("write {}", path.display())))
}
