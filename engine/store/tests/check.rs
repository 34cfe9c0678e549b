//! The offline check finds what was damaged, says where, and repairs superblocks.
#![allow(clippy::unwrap_used, clippy::expect_used)]
mod common;
use common::*;
use store::*;

fn filled() -> (TestEnv, SliceGeometry) {
    let mut env = TestEnv::new(64 << 20, DiskKind::default(), 1);
    let geometry = prepare(&mut env);
    let mut store = open(&mut env, geometry);
    for i in 0..500 {
        write_now(&mut env, &mut store, object(1, i), i + 1, 0, &[i + 1, i + 2]).unwrap();
    }
    close(&mut env, &mut store);
    let mut store = open(&mut env, geometry);
    for i in 0..20 {
        write_now(&mut env, &mut store, object(1, i), 1000 + i, 1, &[7000 + i]).unwrap();
    }
    (env, geometry)
}

/// First block whose first bytes are these.
fn find(env: &TestEnv, magic: &[u8]) -> u64 {
    let mut block = vec![0; B];
    (256..env.size / B as u64)
        .find(|at| {
            env.read_bytes(at * B as u64, &mut block);
            block.starts_with(magic)
        })
        .unwrap()
        * B as u64
}

#[test]
fn a_sound_disk_has_no_findings() {
    let (env, _) = filled();
    let report = check_disk(&env);
    assert_eq!(report.findings, vec![]);
    let slice = report.slices[0];
    assert_eq!((slice.objects, slice.data_blocks, slice.verified_blocks), (500, 1000, 1000));
    assert_eq!((slice.pages, slice.commits), (42, 20));
}

#[test]
fn every_superblock_copy_is_repaired_from_its_twin() {
    for offset in [0, superblock::DISK_SUPER_B_BYTES, 1 << 20, (1 << 20) + B as u64] {
        let (mut env, geometry) = filled();
        env.damage(offset + 64);
        let report = check_disk(&env);
        assert_eq!(report.severity(), Some(Severity::Repairable), "{:?}", report.findings);
        assert_eq!(report.repairs.len(), 1);
        for repair in &report.repairs {
            assert_eq!(repair.offset, offset);
            env.write_bytes(repair.offset, &repair.bytes);
        }
        assert_eq!(check_disk(&env).findings, vec![]);
        open(&mut env, geometry);
    }
}

#[test]
fn damage_is_named() {
    type Expect = fn(&Finding) -> bool;
    let cases: [(&[u8], Expect); 2] =
        [(b"DRYO", |f| matches!(f, Finding::Page { .. })), (b"DRYN", |f| matches!(f, Finding::Node { .. }))];
    for (magic, expected) in cases {
        let (mut env, geometry) = filled();
        let at = find(&env, magic);
        env.damage(at + 2000);
        let report = check_disk(&env);
        assert!(report.findings.iter().any(expected), "{:?}", report.findings);
        assert_eq!(report.severity(), Some(Severity::Damage));
        assert!(try_open(&mut env, geometry, StoreOptions::default()).is_err());
    }
    let (mut env, geometry) = filled();
    let mut store = open(&mut env, geometry);
    let mut block = vec![0; B];
    fill(&mut block, 301);
    let at = find(&env, &block[..16]);
    env.damage(at + 4000);
    let report = check_disk(&env);
    assert!(report.findings.iter().all(|f| matches!(f, Finding::Data { .. })), "{:?}", report.findings);
    assert_eq!(report.findings.len(), 1);
    assert!(report.findings[0].to_string().contains("does not match"), "{}", report.findings[0]);
    let Finding::Data { object, index, .. } = report.findings[0] else { unreachable!() };
    assert_eq!(read_now(&mut env, &mut store, object, index as u32, 1), Err(StoreError::Corrupt));
}

#[test]
fn a_torn_last_commit_is_a_note() {
    let (mut env, geometry) = filled();
    let mut block = vec![0; B];
    fill(&mut block, 7019);
    let at = find(&env, &block[..16]);
    env.damage(at + 4000);
    let report = check_disk(&env);
    assert_eq!(report.severity(), Some(Severity::Note), "{:?}", report.findings);
    assert!(matches!(report.findings[..], [Finding::LogEnd { cut: 1, .. }]));
    let (_, opened) = try_open(&mut env, geometry, StoreOptions::default()).unwrap();
    assert_eq!((opened.commits, opened.cut), (19, 1));
    assert_eq!(check_disk(&env).findings, vec![]);
}

#[test]
fn blank_foreign_and_other_disks_are_told_apart() {
    let mut env = TestEnv::new(64 << 20, DiskKind::default(), 1);
    assert_eq!(check_disk(&env).findings, vec![Finding::NoDisk(SuperError::Blank)]);
    env.write_bytes(0, b"\xebX\x90mkfs.fat");
    assert_eq!(check_disk(&env).findings, vec![Finding::NoDisk(SuperError::NotOurs)]);
    let (env, _) = filled();
    let options = CheckOptions { cluster: Some(wire::ClusterId(3)), verify_data: false };
    let report = store::check::check(&env, env.size, options);
    assert_eq!(report.findings, vec![Finding::NoDisk(SuperError::WrongCluster(CLUSTER))]);
    let report = store::check::check(&env, env.size / 2, CheckOptions::default());
    assert_eq!(report.findings, vec![Finding::NoDisk(SuperError::Truncated)]);
}
