//! Stock fio through the engine: all directions, several jobs as threads and as processes, its errors.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::{TestCluster, wait_until};
use std::path::PathBuf;
use std::process::{Command, Output};

/// The engine, which cargo puts beside the program (`cargo build -p drystone_fio`).
fn engine() -> PathBuf {
    let path = common::binary().with_file_name("libdrystone_fio.so");
    assert!(path.exists(), "{} is missing: cargo build -p drystone_fio", path.display());
    path
}

fn fio(cluster: &str, args: &[&str]) -> Output {
    let dir = common::temp_dir();
    let output = Command::new("fio")
        .arg("--name=t")
        .arg(format!("--ioengine=external:{}", engine().display()))
        .arg(format!("--cluster={cluster}"))
        .args(args)
        .current_dir(dir.path())
        .output();
    output.expect("fio must be installed: apt-get install fio")
}

fn fio_ok(cluster: &TestCluster, args: &[&str]) -> String {
    let output = fio(&cluster.fleet.cluster_flag(), args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "fio {args:?}: {text}{}", common::said(&output));
    text
}

#[test]
fn everything_written_is_verified_by_threads_and_processes() {
    let cluster = TestCluster::with_image(3, 64 << 20);
    for how in ["--thread", "--thread=0"] {
        let text = fio_ok(
            &cluster,
            &[
                "--image=i",
                "--rw=randwrite",
                "--bs=4k-128k",
                "--iodepth=16",
                "--numjobs=3",
                "--size=8m",
                "--offset_increment=8m",
                "--verify=crc32c",
                "--verify_fatal=1",
                how,
            ],
        );
        assert!(text.contains("err= 0"), "{text}");
    }
}

#[test]
fn the_size_defaults_to_the_images() {
    let cluster = TestCluster::with_image(1, 8 << 20);
    let text = fio_ok(&cluster, &["--image=i", "--rw=write", "--bs=1m", "--iodepth=4", "--thread"]);
    assert!(text.contains("io=8192KiB") || text.contains("io=8MiB") || text.contains("8192KiB/"), "{text}");
}

#[test]
fn trims_and_flushes_are_performed() {
    let cluster = TestCluster::with_image(1, 8 << 20);
    fio_ok(&cluster, &["--image=i", "--rw=write", "--bs=64k", "--iodepth=4", "--fsync=8", "--end_fsync=1"]);
    fio_ok(&cluster, &["--image=i", "--rw=trim", "--bs=64k", "--iodepth=4"]);
    let image = cluster.client().open("i", drystone::OpenMode::ReadOnly).unwrap();
    let mut read = vec![1; 8 << 20];
    image.read_at(0, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 0), "what was trimmed still reads as data");
    fio_ok(&cluster, &["--image=i", "--rw=randtrimwrite", "--bs=4k", "--iodepth=4", "--io_size=4m"]);
}

#[test]
fn a_full_cluster_is_an_error_or_waited_for_as_the_job_says() {
    let cluster = TestCluster::with_image(1, 256 << 20);
    fio_ok(&cluster, &["--image=i", "--rw=write", "--bs=1m", "--iodepth=2", "--size=64m"]);
    // Only then do the thresholds come: how fast the nodes hear of the space used is not asked here.
    for (name, value) in [("nearfull", "3%"), ("backfillfull", "3%"), ("full", "3%")] {
        cluster.ok(&["set", name, value]);
    }
    wait_until("status to say that it is full", || {
        cluster.ok(&["status", "--json"]).contains("reached 3%, full")
    });
    fio_ok(&cluster, &["--image=i", "--rw=write", "--bs=1m", "--iodepth=2", "--size=64m"]);
    let flag = cluster.fleet.cluster_flag();
    let write = ["--image=i", "--rw=write", "--bs=1m", "--iodepth=2"];
    // Status knows a moment before the slices' primaries do.
    let refused = (64..192).step_by(4).map(|mib| format!("--offset={mib}m")).find_map(|offset| {
        let output = fio(&flag, &[&write[..], &[&offset, "--size=4m"]].concat());
        (!output.status.success())
            .then(|| format!("{}{}", String::from_utf8_lossy(&output.stdout), common::said(&output)))
    });
    assert!(refused.as_ref().is_some_and(|text| text.contains("No space left")), "{refused:?}");
    // One that waits gets through when the threshold is raised.
    let waits = [&write[..], &["--offset=192m", "--size=64m", "--full=wait"]].concat();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| fio(&flag, &waits));
        cluster.ok(&["unset", "full"]);
        let output = waiting.join().unwrap();
        assert!(output.status.success(), "{}", common::said(&output));
    });
}

#[test]
fn mistakes_are_explained() {
    let cluster = TestCluster::with_image(1, 8 << 20);
    let flag = cluster.fleet.cluster_flag();
    for (cluster, args, said) in [
        (flag.as_str(), ["--image=nope", "--rw=read"], "cannot open image nope: no such image"),
        (flag.as_str(), ["--rw=read", "--bs=4k"], "--image is missing"),
        ("nonsense", ["--image=i", "--rw=read"], "--cluster=nonsense"),
        (flag.as_str(), ["--image=i", "--full=never"], "--full must be error or wait, not never"),
        (flag.as_str(), ["--image=i", "--bs=512"], "multiples of 4096"),
    ] {
        let output = fio(cluster, &args);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), common::said(&output));
        assert!(text.contains(said), "{args:?}: {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
}
