//! Bytes from a disk: superblocks, commit blocks, log records, and the offline check over a whole small disk.
//! Checksums are made right before decoding, so that the fuzzer gets behind them.
#![no_main]
use libfuzzer_sys::fuzz_target;
use store::commit::{self, Record};
use store::{CheckOptions, DiskSuper, ReadAt, SliceSuper};
use wire::{BLOCK_BYTES, block_crc};

struct Image(Vec<u8>);

impl ReadAt for Image {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        let len = buf.len().min(self.0.len() - from);
        buf[..len].copy_from_slice(&self.0[from..from + len]);
        Ok(())
    }
}

/// Whole blocks whose checksums are right: superblocks keep theirs at byte 8, everything else at byte 4.
fn sealed(bytes: &[u8], superblock: bool) -> Vec<u8> {
    let mut blocks = bytes.to_vec();
    blocks.resize(blocks.len().max(1).next_multiple_of(BLOCK_BYTES), 0);
    let at = if superblock { 8 } else { 4 };
    for block in blocks.chunks_mut(BLOCK_BYTES) {
        let crc = block_crc(&block[at + 4..]);
        block[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
    blocks
}

fuzz_target!(|bytes: &[u8]| {
    let Some((selector, bytes)) = bytes.split_first() else { return };
    let disk = sealed(bytes, selector % 2 == 0);
    let block = &disk[..BLOCK_BYTES];
    let _ = DiskSuper::decode(block, 1 << 40, None);
    let _ = SliceSuper::decode(block);
    if let Some(header) = commit::decode(block) {
        assert!(header.durable < header.number);
    }
    if let Some((_, used)) = Record::decode(bytes, 1 << 20) {
        assert!(used <= bytes.len());
    }
    let bytes = disk.len() as u64;
    let _ = store::check::check(&Image(disk), bytes, CheckOptions::default());
});
