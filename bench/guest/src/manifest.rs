//! What the host tells the guest, and what the guest tells the host: files in a directory that both see.
//!
//! `manifest.json` is the host's. `log` is the guest's: one line for each test, written when it is over. `exit`
//! is written last. `acked` lists writes of the power-cut test that were acknowledged.

use crate::error::GuestError;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The host's file.
const MANIFEST: &str = "manifest.json";
/// The guest's lines.
pub const LOG: &str = "log";
/// Written when the guest is done.
pub const EXIT: &str = "exit";
/// Acknowledged writes, see `Ack`.
pub const ACKED: &str = "acked";

/// What a boot is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// One test after the other, and an orderly end.
    Tests,
    /// A cluster is made, and writes until the power is cut.
    FirstCut,
    /// Looking for what had been acknowledged, and writing until the power is cut again.
    Cut,
    /// The boot after the last cut.
    AfterCut,
}

/// A program with tests that the host has built.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TestProgram {
    /// Its package.
    pub package: String,
    /// The test target's name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// What a boot has to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The `drystone` program.
    pub drystone: PathBuf,
    /// fio's engine.
    pub engine: PathBuf,
    /// Test programs.
    pub test_programs: Vec<TestProgram>,
    /// Whether drives lose on a power cut what was not flushed.
    pub volatile: bool,
    /// Cuts before this boot.
    pub cuts: u32,
    /// Further flags of nodes.
    pub flags: Vec<String>,
    /// The tests to run, in order.
    pub tests: Vec<String>,
}

impl Manifest {
    /// Puts it where the guest finds it.
    pub fn write(&self, share: &Path) -> Result<(), GuestError> {
        let path = share.join(MANIFEST);
        let text = serde_json::to_string_pretty(self).map_err(malformed)?;
        std::fs::write(&path, text).map_err(GuestError::io(format!("write {}", path.display())))
    }

    /// Reads it.
    pub fn read(share: &Path) -> Result<Self, GuestError> {
        let path = share.join(MANIFEST);
        let text = std::fs::read(&path).map_err(GuestError::io(format!("read {}", path.display())))?;
        serde_json::from_slice(&text).map_err(malformed)
    }

    /// The tests of a package's program.
    pub fn test_program(&self, package: &str, name: &str) -> Result<&TestProgram, GuestError> {
        let fits = |program: &&TestProgram| program.package == package && program.name == name;
        let missing = || GuestError::Missing(format!("test program {name} of package {package}"));
        self.test_programs.iter().find(fits).ok_or_else(missing)
    }
}

fn malformed(error: serde_json::Error) -> GuestError {
    GuestError::Malformed { what: MANIFEST.into(), why: error.to_string() }
}

/// An acknowledged write. The record is made after the acknowledgement and goes straight to the host's file: a cut
/// between the two forgets an acknowledgement, never invents one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ack {
    /// Which write: rises with every write, over all boots.
    pub stamp: u64,
    /// Which block it wrote.
    pub block: u64,
}

impl Ack {
    /// Bytes of a record.
    pub const BYTES: usize = 16;

    /// As it is in the file.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes.copy_from_slice([self.stamp.to_le_bytes(), self.block.to_le_bytes()].as_flattened());
        bytes
    }

    /// All records of a file; a torn last one was never acknowledged.
    pub fn decode_all(bytes: &[u8]) -> Vec<Self> {
        let (records, _) = bytes.as_chunks::<{ Self::BYTES }>();
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let parts = records.iter().map(|record| record.split_at(8));
        parts.map(|(stamp, block)| Self { stamp: word(stamp), block: word(block) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_are_read_as_written_and_a_torn_one_is_none() {
        let acks = [Ack { stamp: 1 << 40, block: 7 }, Ack { stamp: (1 << 40) + 1, block: 300 }];
        let mut bytes: Vec<u8> = acks.iter().flat_map(|ack| ack.encode()).collect();
        assert_eq!(Ack::decode_all(&bytes), acks);
        bytes.extend([9; 15]);
        assert_eq!(Ack::decode_all(&bytes), acks);
    }
}
