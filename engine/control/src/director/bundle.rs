//! PG records on their way into the metadata store.

use placement::{PgRecord, key};
use wire::control::{Compare, Write};
use wire::{PgId, Revision};

/// Records that go into one transaction.
#[derive(Default)]
pub(super) struct Bundle {
    pub(super) pgs: Vec<PgId>,
    pub(super) compares: Vec<Compare>,
    pub(super) writes: Vec<Write>,
}

impl Bundle {
    /// Adds a PG's next record, which replaces the one of this revision (0: there is none yet).
    pub(super) fn add(&mut self, pg: PgId, record: &PgRecord, revision: Revision) {
        let Some(write) = put_record(pg, record) else { return };
        if revision == Revision(0) {
            let exists = Compare::Exists { key: key::pool(pg.pool) };
            if !self.compares.contains(&exists) {
                self.compares.push(exists);
            }
        }
        self.compares.push(Compare::ModRevision { key: key::pg(pg), revision });
        self.writes.push(write);
        self.pgs.push(pg);
    }
}

/// The write of a PG's record. Serialising numbers and lists cannot fail.
pub fn put_record(pg: PgId, record: &PgRecord) -> Option<Write> {
    let value = serde_json::to_string(record).ok()?;
    Some(Write::Put { key: key::pg(pg), value, lease: None })
}
