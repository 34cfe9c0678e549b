//! A made-up root directory, for tests of the checks.

use super::Host;
use std::path::Path;

/// A directory that stands for `/`.
pub(super) struct Tree(tempfile::TempDir);

impl Tree {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A tree with these files.
    pub(super) fn with(files: &[(&str, &str)]) -> Self {
        let tree = Self::new();
        files.iter().for_each(|(path, text)| tree.put(path, text));
        tree
    }

    pub(super) fn put(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub(super) fn dir(&self, path: &str) {
        std::fs::create_dir_all(self.0.path().join(path)).unwrap();
    }

    /// The host with this tree, on which everything else is well.
    pub(super) fn host(&self) -> Host {
        fn anything(_: &Path) -> bool {
            true
        }
        Host {
            root: self.0.path().into(),
            memlock: None,
            cores: 4,
            buffer_bytes: 64 << 20,
            rdma_built: true,
            may_use: anything,
        }
    }
}
