//! Silent damage on a disk of a running cluster: found, mended, never returned.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::{TestCluster, pattern, said, wait_until};
use drystone::OpenMode;
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;

const IMAGE_BYTES: u64 = 8 << 20;
const BLOCK: usize = 4096;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Flips a bit in the one block of a disk's file that holds exactly this.
fn rot(disk: &Path, contents: &[u8]) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(disk).unwrap();
    let blocks = file.metadata().unwrap().len() / BLOCK as u64;
    let mut block = vec![0; BLOCK];
    let mut hits = Vec::new();
    for at in 0..blocks {
        file.read_exact_at(&mut block, at * BLOCK as u64).unwrap();
        if block == contents {
            hits.push(at * BLOCK as u64);
        }
    }
    assert_eq!(hits.len(), 1, "the block lies on the disk once");
    file.write_all_at(&[contents[99] ^ 0x10], hits[0] + 99).unwrap();
}

#[test]
fn rotten_blocks_on_two_disks_are_found_by_a_deep_scrub_and_mended() {
    let cluster = TestCluster::with_image(3, IMAGE_BYTES);
    // New placement groups are scrubbed at once; what follows is then only what is asked for.
    wait_until("first scrubs", || {
        let listed = json(&cluster.ok(&["pg", "ls", "--json"]));
        listed.as_array().unwrap().iter().all(|pg| pg["scrub"]["deep_ms"].as_u64().unwrap() > 0)
    });
    let image = cluster.client().open("i", OpenMode::ReadWrite).unwrap();
    let data = pattern(7, IMAGE_BYTES as usize);
    image.write_at(0, &data).unwrap();
    image.flush().unwrap();
    let block = |number: usize| &data[number * BLOCK..(number + 1) * BLOCK];
    // Of the first block two copies are bad, of the others one: on whichever disk the primary is.
    rot(&cluster.fleet.nodes[0].disk, block(0));
    rot(&cluster.fleet.nodes[1].disk, block(0));
    rot(&cluster.fleet.nodes[1].disk, block(700));
    rot(&cluster.fleet.nodes[2].disk, block(1500));

    let light = json(&cluster.ok(&["pg", "scrub", "--pool", "p", "--json"]));
    let sum = |found: &Value, what: &str| -> u64 {
        found.as_object().unwrap().values().map(|record| record[what].as_u64().unwrap()).sum()
    };
    assert_eq!((sum(&light, "objects"), sum(&light, "errors")), (64, 0), "versions do not show it");
    let deep = json(&cluster.ok(&["pg", "scrub", "--pool", "p", "--deep", "--json"]));
    assert_eq!((sum(&deep, "objects"), sum(&deep, "errors")), (64, 3));
    cluster.wait_clean();
    wait_until("a deep scrub that finds nothing", || {
        sum(&json(&cluster.ok(&["pg", "scrub", "--pool", "p", "--deep", "--json"])), "errors") == 0
    });
    assert!(cluster.ok(&["pg", "repair", "--pool", "p"]).contains("nothing to repair"));

    let mut read = vec![0; data.len()];
    image.read_at(0, &mut read).unwrap();
    assert!(read == data, "the image reads as it was written");
    let listed = json(&cluster.ok(&["pg", "ls", "--pool", "p", "--json"]));
    assert!(listed.as_array().unwrap().iter().all(|pg| pg["scrub"]["deep_ms"].as_u64().unwrap() > 0));
    assert!(cluster.ok(&["pg", "ls"]).contains("active+clean"));
}

#[test]
fn what_is_no_placement_group_is_said_so() {
    let cluster = TestCluster::start(1);
    assert!(cluster.fails(&["pg", "scrub", "9.9"]).contains("there is no placement group \"9.9\""));
    for (args, says) in
        [(&["pg", "scrub", "nonsense"][..], "write POOL.INDEX"), (&["pg", "repair"], "required")]
    {
        let output = cluster.command(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "a mistake on the command line");
        assert!(said(&output).contains(says), "{}", said(&output));
    }
    assert!(cluster.fails(&["pg", "repair", "--pool", "nowhere"]).contains("no pool named 'nowhere'"));
}

#[test]
fn copies_without_a_primary_are_not_waited_for() {
    let mut cluster = TestCluster::start(3);
    cluster.ok(&["pool", "create", "p", "--copies", "2", "--min-copies", "2", "--pgs", "8"]);
    cluster.wait_clean();
    cluster.fleet.kill(2).unwrap();
    wait_until("placement groups below their minimum", || {
        let listed = json(&cluster.ok(&["pg", "ls", "--json"]));
        listed.as_array().unwrap().iter().any(|pg| pg["primary"].is_null())
    });
    assert!(cluster.fails(&["pg", "scrub", "--pool", "p"]).contains("has no primary now"));
}
