//! Bytes from a disk never make a decoder panic, and damage never passes.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use proptest::prelude::*;
use store::commit::{self, CommitHeader, Record, RecordKind, Records, Runs};
use store::*;
use wire::*;

fn disk_super() -> DiskSuper {
    let slices = (0..8).map(|i| SliceId(i + 1)).collect();
    DiskPlan { cluster: CLUSTER, disk: DiskUuid(5), node: Some(NodeId(3)), disk_bytes: 1 << 34, slices }
        .layout()
        .unwrap()
}

fn slice_super() -> Vec<u8> {
    let mut block = vec![0; B];
    SliceSuper {
        cluster: CLUSTER,
        disk: DiskUuid(5),
        slice: SliceId(6),
        blocks: 5000,
        number: 9,
        incarnation: 4,
        cut: 77,
        checkpoint: 60,
        log: 200,
        root: 300,
        root_crc: 5,
        pages: 12,
    }
    .encode_into(&mut block);
    block
}

fn commit_block() -> Vec<u8> {
    let mut block = vec![0; B];
    let mut used = 0;
    for (i, kind) in [RecordKind::Write, RecordKind::Replace, RecordKind::Delete].into_iter().enumerate() {
        let mut runs = Runs::default();
        if kind.has_data() {
            runs.push(100 + i as u64 * 50, 2);
            runs.push(500, 1);
        }
        let mask = 0b1011;
        let record = Record {
            kind,
            slot: i as u32,
            object: object(1, 2),
            version: version(3),
            mask,
            crcs: [9; 32],
            runs,
        };
        used += record.as_ref().encode(&mut block, commit::HEADER + used);
    }
    let header = CommitHeader {
        slice: SliceId(6),
        number: 61,
        incarnation: 4,
        next: 900,
        durable: 60,
        records: 3,
        used: used as u16,
    };
    commit::seal(&mut block, &header);
    block
}

#[test]
fn what_is_encoded_is_decoded() {
    let disk = disk_super();
    assert_eq!(DiskSuper::decode(&disk.encode(), 1 << 34, Some(CLUSTER)), Ok(disk));
    let block = commit_block();
    let header = commit::decode(&block).unwrap();
    let records: Vec<Record> = Records::new(&block, &header, 5000).map(Option::unwrap).collect();
    assert_eq!(records.len(), 3);
    let mut seen = Vec::new();
    records[1].as_ref().each_block(|b, addr, crc| seen.push((b, addr, crc)));
    assert_eq!(seen, vec![(0, 150, 9), (1, 151, 9), (3, 500, 9)]);
}

#[test]
fn superblock_errors_are_told_apart() {
    let size = 1 << 34;
    let good = disk_super().encode();
    let decode = |b: &[u8]| DiskSuper::decode(b, size, Some(CLUSTER)).unwrap_err();
    assert_eq!(decode(&[0; B]), SuperError::Blank);
    assert_eq!(decode(&[7; B]), SuperError::NotOurs);
    assert_eq!(decode(&good[..B - 1]), SuperError::Truncated);
    let mut bad = good.clone();
    bad[100] ^= 1;
    assert_eq!(decode(&bad), SuperError::BadCrc);
    let mut newer = good.clone();
    newer[12] = 2;
    let crc = block_crc(&newer[12..]);
    newer[8..12].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(decode(&newer), SuperError::BadVersion(2));
    let mut feature = good.clone();
    feature[24] = 1;
    let crc = block_crc(&feature[12..]);
    feature[8..12].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(decode(&feature), SuperError::BadFeatures(1));
    assert_eq!(DiskSuper::decode(&good, size, Some(ClusterId(1))), Err(SuperError::WrongCluster(CLUSTER)));
    assert_eq!(DiskSuper::decode(&good, size / 2, None), Err(SuperError::Truncated));
    // A blank copy beside a good one is survived, in either order.
    assert!(DiskSuper::choose(&[0; B], &good, size, None).is_ok());
    assert!(DiskSuper::choose(&good, &[0; B], size, None).is_ok());
    assert_eq!(DiskSuper::choose(&[0; B], &bad, size, None), Err(SuperError::BadCrc));
}

#[test]
fn impossible_plans_are_refused() {
    let plan = |n: u64, bytes| DiskPlan {
        cluster: CLUSTER,
        disk: DiskUuid(1),
        node: None,
        disk_bytes: bytes,
        slices: (1..=n).map(SliceId).collect(),
    };
    assert_eq!(plan(3, 1 << 40).layout(), Err(PrepareError::SliceCount(3)));
    assert_eq!(plan(0, 1 << 40).layout(), Err(PrepareError::SliceCount(0)));
    assert_eq!(plan(256, 1 << 50).layout(), Err(PrepareError::SliceCount(256)));
    assert!(matches!(plan(4, 64 << 20).layout(), Err(PrepareError::TooSmall { .. })));
    let mut twice = plan(2, 1 << 30);
    twice.slices = vec![SliceId(4), SliceId(4)];
    assert_eq!(twice.layout(), Err(PrepareError::SliceIds));
    let disk = plan(128, 128 << 40).layout().unwrap();
    assert!(disk.slices.windows(2).all(|w| w[0].offset + w[0].len == w[1].offset));
    assert_eq!(DiskSuper::decode(&disk.encode(), 128 << 40, None), Ok(disk));
}

fn decode_everything(bytes: &[u8]) {
    let _ = DiskSuper::decode(bytes, u64::MAX, None);
    let _ = SliceSuper::decode(bytes);
    if let Some(header) = commit::decode(bytes) {
        let _ = Records::new(bytes, &header, 5000).count();
    }
    let header = CommitHeader { records: u16::MAX, used: bytes.len() as u16, ..CommitHeader::default() };
    let records = Records::new(bytes, &header, 5000);
    for record in records.flatten() {
        record.as_ref().each_block(|block, addr, _| assert!(block < 32 && (2..5000).contains(&addr)));
    }
    for slot in 0..13 {
        let slot = page::Slot::of(bytes, slot);
        let _ = (slot.object(), slot.version(), slot.state());
        (0..33).for_each(|i| {
            let _ = slot.block(i);
        });
    }
    for i in 0..400 {
        let _ = page::node_entry(bytes, i);
    }
    assert!(page::check_page(bytes, SliceId(1), 0, 0).is_err());
    assert!(page::check_node(bytes, SliceId(1), 0, 0, 0).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2 * B)) {
        decode_everything(&bytes);
    }

    #[test]
    fn records_of_random_bytes(mut bytes in proptest::collection::vec(any::<u8>(), B), kind in 1u8..6, runs in 0u8..40) {
        bytes[0] = kind;
        bytes[1] = runs;
        if let Some((record, len)) = Record::decode(&bytes, 1 << 40) {
            prop_assert!(len <= commit::RECORD_BYTES_MAX);
            record.as_ref().each_block(|block, addr, _| assert!(block < 32 && addr >= 2));
        }
        decode_everything(&bytes);
    }

    #[test]
    fn a_flipped_bit_never_passes(which in 0usize..3, bit in 0usize..B * 8) {
        let good = [disk_super().encode(), slice_super(), commit_block()][which].clone();
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        match which {
            0 => prop_assert!(DiskSuper::decode(&bad, 1 << 34, None).is_err()),
            1 => prop_assert!(SliceSuper::decode(&bad).is_err()),
            _ => prop_assert!(commit::decode(&bad).is_none()),
        }
    }

    #[test]
    fn a_slice_of_damaged_blocks_opens_or_says_why(at in 0u64..700, byte in 0u64..4096, more in 0u64..5) {
        let mut env = TestEnv::new(24 << 20, DiskKind::default(), at);
        let geometry = prepare(&mut env);
        let mut store = open(&mut env, geometry);
        for i in 0..100 {
            write_now(&mut env, &mut store, object(1, i % 40), i + 1, (i % 32) as u32, &[i + 1]).unwrap();
            if i == 60 {
                close(&mut env, &mut store);
                store = open(&mut env, geometry);
            }
        }
        for i in 0..=more {
            env.damage(geometry.offset + (at + i * 31) % 700 * B as u64 + byte);
        }
        if let Ok((mut store, _)) = try_open(&mut env, geometry, StoreOptions::default()) {
            for i in 0..40 {
                let _ = read_now(&mut env, &mut store, object(1, i), 0, 32);
            }
        }
        let _ = check_disk(&env);
    }
}
