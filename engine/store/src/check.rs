//! Offline check (see `docs/disk-format.md`).
