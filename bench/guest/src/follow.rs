//! Reads a growing file line by line.

use crate::error::GuestError;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// A file that somebody else appends to.
pub struct Lines {
    path: PathBuf,
    read_bytes: u64,
    /// The beginning of a line whose end is not there yet.
    begun: Vec<u8>,
}

impl Lines {
    /// From its beginning; it need not exist yet.
    pub fn of(path: &Path) -> Self {
        Self { path: path.into(), read_bytes: 0, begun: Vec::new() }
    }

    /// Whole lines since the last call.
    #[allow(clippy::disallowed_methods, reason = "a tool outside the seam")]
    pub fn new_ones(&mut self) -> Result<Vec<String>, GuestError> {
        let what = || format!("read {}", self.path.display());
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(GuestError::io(what())(error)),
        };
        let mut read = Vec::new();
        file.seek(SeekFrom::Start(self.read_bytes))
            .and_then(|_| file.read_to_end(&mut read))
            .map_err(GuestError::io(what()))?;
        self.read_bytes += read.len() as u64;
        self.begun.extend(read);
        let Some(end) = self.begun.iter().rposition(|byte| *byte == b'\n') else { return Ok(Vec::new()) };
        let rest = self.begun.split_off(end + 1);
        let whole = std::mem::replace(&mut self.begun, rest);
        Ok(String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_whole_lines_and_each_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut lines = Lines::of(&path);
        assert!(lines.new_ones().unwrap().is_empty());
        let mut file = File::options().create(true).append(true).open(&path).unwrap();
        file.write_all(b"one\ntwo\nthr").unwrap();
        assert_eq!(lines.new_ones().unwrap(), ["one", "two"]);
        assert!(lines.new_ones().unwrap().is_empty());
        file.write_all(b"ee\n").unwrap();
        assert_eq!(lines.new_ones().unwrap(), ["three"]);
    }
}
