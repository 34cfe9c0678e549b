//! Bytes from a disk: superblocks, commit blocks, log records, and the offline check over a whole small disk.
//!
//! An input is a selector and then blocks: number (u16), length (u16), so many bytes; the rest of a block and
//! all other blocks are zero. With bit 0 of the selector, checksums are made right before decoding, so that
//! the fuzzer gets behind them. With bit 7 the input is records of the log instead.
#![no_main]
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeMap;
use store::commit::{self, Record};
use store::superblock::{DISK_MAGIC, SLICE_MAGIC};
use store::{CheckOptions, DiskSuper, ReadAt, SliceSuper};
use wire::{BLOCK_BYTES, block_crc};

/// Blocks of the device.
const DISK_BLOCKS: u64 = 8192;
const DISK_BYTES: u64 = DISK_BLOCKS * BLOCK_BYTES as u64;

#[derive(Default)]
struct Image(BTreeMap<u64, Vec<u8>>);

impl ReadAt for Image {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if offset + buf.len() as u64 > DISK_BYTES {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let from = (at % BLOCK_BYTES as u64) as usize;
            let len = (BLOCK_BYTES - from).min(buf.len() - done);
            match self.0.get(&(at / BLOCK_BYTES as u64)) {
                Some(block) => buf[done..done + len].copy_from_slice(&block[from..from + len]),
                None => buf[done..done + len].fill(0),
            }
            done += len;
        }
        Ok(())
    }
}

/// Makes the checksum right: superblocks keep theirs at byte 8, everything else at byte 4.
fn seal(block: &mut [u8]) {
    let magic = u64::from_le_bytes(block[..8].try_into().unwrap());
    let at = if magic == DISK_MAGIC || magic == SLICE_MAGIC { 8 } else { 4 };
    let crc = block_crc(&block[at + 4..]);
    block[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn image(mut bytes: &[u8], sealed: bool) -> Image {
    let mut image = Image::default();
    while let Some((head, rest)) = bytes.split_first_chunk::<4>() {
        let number = u64::from(u16::from_le_bytes([head[0], head[1]])) % DISK_BLOCKS;
        let len = usize::from(u16::from_le_bytes([head[2], head[3]])).min(BLOCK_BYTES).min(rest.len());
        let mut block = rest[..len].to_vec();
        block.resize(BLOCK_BYTES, 0);
        if sealed {
            seal(&mut block);
        }
        image.0.insert(number, block);
        bytes = &rest[len..];
    }
    image
}

fuzz_target!(|bytes: &[u8]| {
    let Some((selector, bytes)) = bytes.split_first() else { return };
    if selector & 0x80 != 0 {
        let mut rest = bytes;
        while let Some((record, used)) = Record::decode(rest, DISK_BLOCKS) {
            assert!(used > 0 && used <= rest.len());
            let mut again = vec![0; used];
            assert_eq!(record.as_ref().encode(&mut again, 0), used);
            rest = &rest[used..];
        }
        return;
    }
    let image = image(bytes, selector & 1 != 0);
    for block in image.0.values() {
        let _ = DiskSuper::decode(block, DISK_BYTES, None);
        let _ = SliceSuper::decode(block);
        if let Some(header) = commit::decode(block) {
            assert!(header.durable < header.number);
        }
    }
    let options = CheckOptions { cluster: None, verify_data: selector & 2 != 0 };
    let _ = store::check::check(&image, DISK_BYTES, options);
});
