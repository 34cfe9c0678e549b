//! Bytes from a socket, as the transport treats them: a header, its checksums, list entries.
#![no_main]
use libfuzzer_sys::fuzz_target;
use wire::{Header, ListEntry, OriginEntry, VerifyEntry};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(lengths) = Header::peek(bytes) {
        assert!(lengths.total() <= wire::HEADER_BYTES + 128 + (1 << 20), "a length beyond every bound was believed");
    }
    if let Ok((header, crcs)) = Header::decode(bytes) {
        let mut again = Vec::new();
        header.encode_into(&crcs, &mut again);
        assert_eq!(Header::decode(&again), Ok((header, crcs)), "decoding is not stable");
    }
    if let Some(entries) = ListEntry::decode_all(bytes) {
        let mut again = Vec::new();
        entries.for_each(|entry| entry.encode(&mut again));
        assert_eq!(again.len(), bytes.len());
    }
    if let Some(entries) = OriginEntry::decode_all(bytes) {
        let mut again = Vec::new();
        entries.for_each(|entry| entry.encode(&mut again));
        assert_eq!(again, bytes);
    }
    if let Some(entry) = VerifyEntry::decode(bytes) {
        let mut again = Vec::new();
        entry.encode(&mut again);
        assert_eq!(VerifyEntry::decode(&again), Some(entry), "decoding is not stable");
    }
});
