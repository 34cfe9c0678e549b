//! What a power cut, a kill and injected faults do to a disk.

use super::*;
use reactor::IoBuf;

const FROM: Submitter = Submitter { core: 0, index: DiskIndex(0), token: Token(0) };

fn disk(seed: u64, atomic_bytes: u32, write_through: bool) -> SimDisk {
    let info = DiskInfo { size_bytes: 1 << 30, atomic_bytes, write_through };
    let profile = DiskProfile { read_ns: 10, write_ns: 10, flush_ns: 10, block_ns: 1, queue_depth: 64 };
    SimDisk::new(info, profile, Stream::new(seed, "disk"))
}

fn block_of(byte: u8, blocks: usize) -> Vec<IoBuf> {
    vec![IoBuf::copy_of(&vec![byte; blocks * BLOCK_BYTES]).unwrap()]
}

fn start_write(disk: &mut SimDisk, block: u64, byte: u8, blocks: usize, durable: bool) -> u64 {
    let op = DiskOp::Write { offset: block * BLOCK, bufs: block_of(byte, blocks), durable };
    disk.submit(FROM, op, 0).unwrap_or_else(|_| panic!("full")).0
}

fn write(disk: &mut SimDisk, block: u64, byte: u8, blocks: usize, durable: bool) {
    let id = start_write(disk, block, byte, blocks, durable);
    assert_eq!(disk.complete(id).unwrap().2, Ok(()));
}

fn flush(disk: &mut SimDisk) {
    let id = disk.submit(FROM, DiskOp::Flush, 0).unwrap_or_else(|_| panic!("full")).0;
    assert_eq!(disk.complete(id).unwrap().2, Ok(()));
}

fn read(disk: &mut SimDisk, block: u64) -> Result<Vec<u8>, DiskError> {
    let op = DiskOp::Read { offset: block * BLOCK, buf: IoBuf::heap(BLOCK_BYTES).unwrap() };
    let id = disk.submit(FROM, op, 0).unwrap_or_else(|_| panic!("full")).0;
    let (_, op, result) = disk.complete(id).unwrap();
    let DiskOp::Read { buf, .. } = op else { panic!("another operation came back") };
    result.map(|()| buf.as_slice().to_vec())
}

#[test]
fn only_durable_writes_are_sure_to_survive_a_power_cut() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..200 {
        let mut disk = disk(seed, 4096, false);
        write(&mut disk, 0, 1, 1, false);
        flush(&mut disk);
        write(&mut disk, 1, 2, 1, true);
        write(&mut disk, 2, 3, 1, false);
        disk.power_cut();
        assert_eq!(read(&mut disk, 0).unwrap()[0], 1, "a flushed write");
        assert_eq!(read(&mut disk, 1).unwrap()[0], 2, "a durable write");
        match read(&mut disk, 2).unwrap()[0] {
            0 => lost += 1,
            3 => kept += 1,
            other => panic!("a third thing: {other}"),
        }
    }
    assert!(lost > 30 && kept > 30, "lost {lost}, kept {kept}");
}

#[test]
fn a_flush_covers_only_what_had_completed_before_it() {
    let mut lost = 0;
    for seed in 0..100 {
        let mut disk = disk(seed, 4096, false);
        let late = start_write(&mut disk, 0, 1, 1, false);
        let flushing = disk.submit(FROM, DiskOp::Flush, 0).unwrap_or_else(|_| panic!("full")).0;
        let _ = disk.complete(late).unwrap();
        let _ = disk.complete(flushing).unwrap();
        disk.power_cut();
        lost += u32::from(read(&mut disk, 0).unwrap()[0] == 0);
    }
    assert!(lost > 20, "a write in flight with the flush was always made durable");
}

#[test]
fn unflushed_writes_of_one_block_come_back_in_any_version_but_never_older_than_the_flushed_one() {
    let mut seen = [0u32; 4];
    for seed in 0..300 {
        let mut disk = disk(seed, 4096, false);
        write(&mut disk, 7, 1, 1, true);
        write(&mut disk, 7, 2, 1, false);
        write(&mut disk, 7, 3, 1, false);
        disk.power_cut();
        seen[read(&mut disk, 7).unwrap()[0] as usize] += 1;
    }
    assert_eq!(seen[0], 0);
    assert!(seen[1..].iter().all(|&count| count > 10), "{seen:?}");
}

#[test]
fn a_later_durable_write_is_not_undone_by_an_earlier_unflushed_one() {
    for seed in 0..200 {
        let mut disk = disk(seed, 512, false);
        write(&mut disk, 7, 1, 1, false);
        write(&mut disk, 7, 2, 1, true);
        disk.power_cut();
        assert!(read(&mut disk, 7).unwrap().iter().all(|&byte| byte == 2));
    }
}

#[test]
fn writes_in_flight_tear_at_the_atomic_unit_only() {
    for atomic in [512usize, 4096] {
        let mut torn_blocks = 0;
        let mut torn_writes = 0;
        for seed in 0..200 {
            let mut disk = disk(seed, atomic as u32, true);
            write(&mut disk, 0, 1, 4, true);
            start_write(&mut disk, 0, 2, 4, true);
            disk.power_cut();
            let all: Vec<u8> = (0..4).flat_map(|block| read(&mut disk, block).unwrap()).collect();
            for unit in all.chunks(atomic) {
                assert!(unit.iter().all(|byte| *byte == unit[0]), "a torn unit of {atomic}");
            }
            torn_blocks += u32::from(all.chunks(4096).any(|b| b.iter().any(|byte| *byte != b[0])));
            torn_writes += u32::from(all.iter().any(|byte| *byte != all[0]));
        }
        assert!(torn_writes > 10, "writes larger than the unit never tore");
        assert_eq!(torn_blocks > 0, atomic == 512);
    }
}

#[test]
fn a_write_through_disk_loses_nothing_that_completed() {
    for seed in 0..100 {
        let mut disk = disk(seed, 512, true);
        write(&mut disk, 3, 9, 2, false);
        disk.power_cut();
        assert!(read(&mut disk, 4).unwrap().iter().all(|&byte| byte == 9));
    }
}

#[test]
fn a_kill_keeps_what_the_kernel_had_and_cuts_only_what_was_in_flight() {
    let mut done = 0;
    for seed in 0..100 {
        let mut disk = disk(seed, 4096, false);
        write(&mut disk, 0, 1, 1, false);
        start_write(&mut disk, 1, 2, 1, false);
        disk.kill(&[0]);
        assert!(disk.is_idle());
        assert_eq!(read(&mut disk, 0).unwrap()[0], 1);
        done += u32::from(read(&mut disk, 1).unwrap()[0] == 2);
    }
    assert!((10..95).contains(&done), "{done}");
}

#[test]
fn damage_shows_until_the_block_is_written_and_the_truth_is_kept() {
    let mut disk = disk(1, 4096, true);
    for block in 0..4 {
        write(&mut disk, block, 5, 1, true);
    }
    assert!(disk.damage(0, Damage::Unreadable));
    assert!(disk.damage(1, Damage::BitRot));
    assert!(!disk.damage(1000, Damage::BitRot), "there is nothing to rot");
    assert_eq!(read(&mut disk, 0), Err(DiskError::Io(EIO)));
    assert_ne!(read(&mut disk, 1).unwrap(), vec![5; BLOCK_BYTES]);
    assert_eq!(disk.damaged_blocks(), vec![0, 1]);
    write(&mut disk, 0, 6, 1, true);
    assert_eq!(read(&mut disk, 0).unwrap()[0], 6);

    disk.arm(WriteFault::Misdirected { to: 3 }, u64::from_le_bytes([7; 8]));
    write(&mut disk, 2, 7, 1, true);
    assert_eq!(read(&mut disk, 2).unwrap()[0], 5, "the write did not arrive here");
    assert_eq!(read(&mut disk, 3).unwrap()[0], 7, "it arrived there");
    disk.arm(WriteFault::Lost, u64::from_le_bytes([8; 8]));
    write(&mut disk, 0, 8, 1, true);
    assert_eq!(read(&mut disk, 0).unwrap()[0], 6);
    disk.heal();
    assert_eq!(read(&mut disk, 0).unwrap()[0], 8);
    assert_eq!(read(&mut disk, 2).unwrap()[0], 7);
    assert_eq!(read(&mut disk, 3).unwrap()[0], 5);
}

#[test]
fn bounds_are_kept() {
    let mut disk = disk(1, 4096, true);
    let op = DiskOp::Write { offset: 1 << 30, bufs: block_of(1, 1), durable: true };
    let id = disk.submit(FROM, op, 0).unwrap_or_else(|_| panic!("full")).0;
    assert_eq!(disk.complete(id).unwrap().2, Err(DiskError::OutOfRange));
    for _ in 0..64 {
        start_write(&mut disk, 0, 1, 1, true);
    }
    assert!(disk.submit(FROM, DiskOp::Flush, 0).is_err());
}

#[test]
fn a_disk_that_is_put_back_is_what_it_was_and_an_exchanged_one_is_empty() {
    let mut disk = disk(1, 4096, false);
    write(&mut disk, 0, 1, 1, true);
    let then = disk.contents();
    write(&mut disk, 0, 2, 1, true);
    write(&mut disk, 1, 3, 1, false);
    disk.damage(0, Damage::Unreadable);
    disk.put_back(&then);
    disk.power_cut();
    assert_eq!(read(&mut disk, 0).unwrap()[0], 1);
    assert_eq!(read(&mut disk, 1).unwrap()[0], 0);
    disk.exchange_for_empty();
    assert_eq!(read(&mut disk, 0).unwrap()[0], 0);
}
