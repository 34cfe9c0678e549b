//! One node, administered and used as a person would.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::{TestCluster, binary, failure, pattern, said, temp_dir, wait_until};
use drystone::OpenMode;
use serde_json::Value;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn pools_and_images_come_and_go() {
    let cluster = TestCluster::with_image(1, 64 << 20);
    let pools = json(&cluster.ok(&["pool", "ls", "--json"]));
    assert_eq!(pools[0]["name"], "p");
    let images = json(&cluster.ok(&["--json", "image", "ls"]));
    assert_eq!((&images[0]["name"], &images[0]["size_bytes"]), (&"i".into(), &(64u64 << 20).into()));

    cluster.ok(&["image", "resize", "i", "--size", "128MiB"]);
    assert!(cluster.fails(&["image", "resize", "i", "--size", "4MiB"]).contains("cuts data off"));
    cluster.ok(&["image", "resize", "i", "--size", "4MiB", "--shrink"]);
    assert_eq!(json(&cluster.ok(&["image", "info", "i", "--json"]))["size_bytes"], 4 << 20);

    assert!(cluster.fails(&["pool", "rm", "p"]).contains("still holds 1 image"));
    cluster.ok(&["image", "rm", "i"]);
    assert!(cluster.fails(&["image", "info", "i"]).contains("no image named 'i'"));
    cluster.ok(&["pool", "rm", "p"]);
    wait_until("the pool to be gone", || {
        json(&cluster.ok(&["pool", "ls", "--json"])) == Value::Array(vec![])
    });
}

#[test]
fn what_shrinking_cut_off_does_not_come_back() {
    let cluster = TestCluster::with_image(1, 8 << 20);
    let client = cluster.client();
    let image = client.open("i", OpenMode::ReadWrite).unwrap();
    let data = pattern(1, 8 << 20);
    image.write_at(0, &data).unwrap();
    drop(image);
    // Not on an object's border: part of an object is zeroed, the rest removed.
    let cut = (3 << 20) + 4096;
    cluster.ok(&["image", "resize", "i", "--size", &cut.to_string(), "--shrink"]);
    cluster.ok(&["image", "resize", "i", "--size", "8MiB"]);
    let image = client.open("i", OpenMode::ReadWrite).unwrap();
    let mut read = vec![1; 8 << 20];
    image.read_at(0, &mut read).unwrap();
    assert!(read[..cut] == data[..cut], "what was kept changed");
    assert!(read[cut..].iter().all(|byte| *byte == 0), "what was cut off came back");
}

#[test]
fn metadata_is_shown_and_changed() {
    let cluster = TestCluster::start(1);
    cluster.ok(&["meta", "put", "/notes/a", "{\"x\": 1}"]);
    let item = json(&cluster.ok(&["meta", "get", "/notes/", "--json"]));
    assert_eq!(item[0]["value"]["x"], 1);
    let revision = item[0]["revision"].as_u64().unwrap().to_string();
    cluster.ok(&["meta", "put", "/notes/a", "2", "--if-revision", &revision]);
    let lost = cluster.fails(&["meta", "put", "/notes/a", "3", "--if-revision", &revision]);
    assert!(lost.contains("changed by somebody else"), "{lost}");
    assert!(cluster.fails(&["meta", "put", "/notes/a", "{half"]).contains("is not JSON"));
    cluster.ok(&["meta", "del", "/notes/", "--prefix"]);
    assert!(cluster.fails(&["meta", "get", "/notes/a", "--exact"]).contains("no key named"));
}

#[test]
fn a_watch_shows_what_is_there_and_every_change_once() {
    let cluster = TestCluster::start(1);
    cluster.ok(&["meta", "put", "/n/1", "1"]);
    let mut watch = cluster
        .command(&["--json", "meta", "watch", "/n/", "--events", "3"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(watch.stdout.take().unwrap());
    let mut line = || {
        let mut text = String::new();
        std::io::BufRead::read_line(&mut out, &mut text).unwrap();
        json(&text)
    };
    assert_eq!(line()["changes"][0]["put"]["key"], "/n/1");
    cluster.ok(&["meta", "put", "/n/2", "2"]);
    cluster.ok(&["meta", "del", "/n/1"]);
    assert_eq!(line()["changes"][0]["put"]["key"], "/n/2");
    assert_eq!(line()["changes"][0]["delete"]["key"], "/n/1");
    assert!(watch.wait().unwrap().success());
}

#[test]
fn a_sparse_file_goes_through_an_image_and_comes_back() {
    let cluster = TestCluster::with_image(1, 4096);
    let dir = temp_dir();
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    let mut file = std::fs::OpenOptions::new().create_new(true).write(true).open(&before).unwrap();
    // Data, a hole of many chunks, data in the middle of a chunk, and an odd end.
    file.write_all(&pattern(1, 300_000)).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(41_234_567)).unwrap();
    file.write_all(&pattern(2, 5000)).unwrap();
    file.set_len(60_000_001).unwrap();
    let moved =
        json(&cluster.ok(&["--json", "image", "import", before.to_str().unwrap(), "f", "--pool", "p"]));
    assert!(moved["data_bytes"].as_u64().unwrap() < 400_000, "{moved}");
    cluster.ok(&["image", "export", "f", after.to_str().unwrap()]);
    let (before, bytes) = (std::fs::read(&before).unwrap(), std::fs::read(&after).unwrap());
    assert_eq!(bytes.len(), before.len().next_multiple_of(4096));
    assert!(bytes[..before.len()] == before[..], "the bytes changed");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&after).unwrap());
    assert!(blocks * 512 < 2_000_000, "the export is not sparse: {blocks} blocks");
    let refused = cluster.fails(&["image", "export", "f", after.to_str().unwrap()]);
    assert!(refused.contains("--force"), "{refused}");
}

#[test]
fn pipes_that_stutter_go_through_an_image_and_come_back() {
    let cluster = TestCluster::with_image(1, 4096);
    let data = pattern(3, 3_000_123);
    let mut import = cluster
        .command(&["image", "import", "-", "f", "--pool", "p", "--size", "4MiB"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = import.stdin.take().unwrap();
    let mut rest = &data[..];
    let mut piece = 1;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(piece.min(rest.len()));
        pipe.write_all(now).unwrap();
        rest = later;
        piece = piece * 7 % 70_001 + 1;
    }
    drop(pipe);
    assert!(import.wait().unwrap().success());

    let mut export = cluster.command(&["image", "export", "f", "-"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut back = Vec::new();
    export.stdout.take().unwrap().read_to_end(&mut back).unwrap();
    assert!(export.wait().unwrap().success());
    assert_eq!(back.len(), 4 << 20);
    assert!(back[..data.len()] == data[..], "the bytes changed");
    assert!(back[data.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_pipe_of_unknown_length_becomes_an_image_of_its_size() {
    let cluster = TestCluster::with_image(1, 4096);
    // Nothing at all, less than a block, and more than the size that the image begins with.
    for (name, bytes) in [("none", 0), ("little", 100), ("much", (65 << 20) + 4097)] {
        let data = pattern(6, bytes);
        let mut import = cluster
            .command(&["image", "import", "-", name, "--pool", "p"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        import.stdin.take().unwrap().write_all(&data).unwrap();
        let output = import.wait_with_output().unwrap();
        assert!(output.status.success(), "{name}: {}", said(&output));
        let info = json(&cluster.ok(&["--json", "image", "info", name]));
        assert_eq!(info["size_bytes"].as_u64().unwrap() as usize, bytes.max(1).next_multiple_of(4096));
        let mut export =
            cluster.command(&["image", "export", name, "-"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut back = Vec::new();
        export.stdout.take().unwrap().read_to_end(&mut back).unwrap();
        assert!(export.wait().unwrap().success());
        assert!(back[..bytes] == data[..] && back[bytes..].iter().all(|byte| *byte == 0), "{name} changed");
    }
}

#[test]
fn a_source_longer_than_the_image_leaves_nothing_behind() {
    let cluster = TestCluster::with_image(1, 4096);
    let mut import = cluster
        .command(&["image", "import", "-", "f", "--pool", "p", "--size", "1MiB"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The program may stop reading before everything is written.
    let _ = import.stdin.take().unwrap().write_all(&pattern(4, 3 << 20));
    let output = import.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("longer than the image"), "{}", said(&output));
    assert!(cluster.fails(&["image", "info", "f"]).contains("no image named"));
}

#[test]
fn a_node_stops_cleanly_and_finds_everything_again() {
    let mut cluster = TestCluster::with_image(1, 16 << 20);
    let data = pattern(5, 1 << 20);
    cluster.client().open("i", OpenMode::ReadWrite).unwrap().write_at(1 << 20, &data).unwrap();
    cluster.fleet.stop(0).unwrap();
    let disk = cluster.fleet.nodes[0].disk.clone();
    let checked = cluster.ok(&["disk", "check", disk.to_str().unwrap(), "--data", "--json"]);
    assert_eq!(json(&checked)["findings"], Value::Array(vec![]), "{checked}");
    cluster.fleet.spawn(0).unwrap();
    cluster.fleet.wait_ready(0).unwrap();
    cluster.wait_clean();
    let mut read = vec![0; 1 << 20];
    cluster.client().open("i", OpenMode::ReadOnly).unwrap().read_at(1 << 20, &mut read).unwrap();
    assert!(read == data, "the bytes changed");
}

#[test]
fn wrong_use_is_explained() {
    let cluster = TestCluster::start(1);
    assert!(cluster.fails(&["image", "create", "i", "--pool", "nope", "--size", "1G"]).contains("\"nope\""));
    assert!(cluster.fails(&["pool", "create", "p", "--copies", "3"]).contains("3 different hosts"));
    assert!(cluster.fails(&["image", "create", "a/b", "--pool", "p", "--size", "1G"]).contains("a/b"));

    let mut none = Command::new(binary());
    none.args(["status"]).env_remove("DRYSTONE_CLUSTER");
    assert!(failure(none).contains("DRYSTONE_CLUSTER"));
    let mut nobody = Command::new(binary());
    nobody.args(["--cluster", "127.0.0.1:1", "status"]);
    let why = failure(nobody);
    assert!(why.contains("127.0.0.1:1") && why.contains("refused"), "{why}");

    let usage = Command::new(binary()).args(["image", "create", "--sizzle"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
    let usage = Command::new(binary())
        .args(["image", "create", "i", "--pool", "p", "--size", "10X"])
        .output()
        .unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(said(&usage).contains("unknown unit 'X'"), "{}", said(&usage));
}
