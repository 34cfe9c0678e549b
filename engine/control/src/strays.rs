//! What slices may erase of PGs that have left them (`engine::strays` does it).

use crate::view::{PgEntry, View};
use engine::msg::Leavings;
use wire::{NodeId, PoolId, SessionId, SliceId};

/// What of a pool may go on a slice of this node.
///
/// Nothing before the map shows this very process as registered: an older one could be of a time before the slice
/// joined PGs, of which it holds the last copy now. From then on the slice joins none without its core being told.
pub fn leavings(view: &View, node: NodeId, process: SessionId, slice: SliceId, pool: PoolId) -> Leavings {
    let registered = view.live().get(&node).is_some_and(|live| live.session == process);
    let own = view.home(slice).is_some_and(|home| home.node == node);
    if !registered || !own {
        return Leavings::Unknown;
    }
    let Some(known) = view.pools().get(&pool) else {
        return if view.was_removed(pool) { Leavings::PoolRemoved } else { Leavings::Unknown };
    };
    let settled = view.pgs_of_pool(pool).filter(|(_, entry)| is_settled(entry, known.copies, slice));
    Leavings::Of { pg_count: known.pg_count, settled: settled.map(|(pg, _)| pg.index).collect() }
}

/// Whether a PG has as many copies as it should, all where placement wants them and in sync, and none on this slice.
fn is_settled(entry: &PgEntry, copies: u8, slice: SliceId) -> bool {
    let record = &entry.record;
    record.primary.is_some() && record.is_whole(copies) && !record.names(slice)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use placement::{Disk, FailureDomain, Live, NextId, Node, PgRecord, Pool, ScrubPlan, Slice, key};
    use serde::Serialize;
    use std::net::SocketAddr;
    use wire::control::{Change, KeyValue};
    use wire::{DiskUuid, Epoch, ImageId, PgId, Revision};

    const NODE: NodeId = NodeId(1);
    const PROCESS: SessionId = SessionId(11);
    const OWN: SliceId = SliceId(100);
    const POOL: PoolId = PoolId(1);

    fn put(view: &mut View, key: &str, value: &impl Serialize) {
        let value = serde_json::to_string(value).unwrap();
        view.apply(&Change::Put(KeyValue {
            key: key.to_owned(),
            value,
            mod_revision: Revision(7),
            lease: None,
        }));
    }

    /// A record with these slices of other nodes, or this one's.
    fn record(target: &[u64], acting: &[u64], in_sync: &[u64]) -> PgRecord {
        let slices = |of: &[u64]| of.iter().copied().map(SliceId).collect::<Vec<_>>();
        PgRecord {
            epoch: Epoch(3),
            target: slices(target),
            acting: slices(acting),
            primary: acting.first().copied().map(SliceId),
            primary_session: Some(SessionId(12)),
            in_sync: slices(in_sync),
        }
    }

    fn view(session: Option<SessionId>) -> View {
        let mut view = View::default();
        put(&mut view, key::NEXT_ID, &NextId { pool: PoolId(3), image: ImageId(9) });
        let pool = Pool {
            id: POOL,
            name: "p".into(),
            copies: 2,
            min_copies: 1,
            pg_count: 8,
            failure_domain: FailureDomain::Host,
            removing: false,
            scrub: ScrubPlan::default(),
        };
        put(&mut view, &key::pool(POOL), &pool);
        let slice = Slice { id: OWN, core: 0, size_bytes: 1 };
        let disk = Disk { uuid: DiskUuid(1), path: "/d".into(), slices: vec![slice] };
        let at: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let node = Node {
            id: NODE,
            host: "h".into(),
            control: at,
            cores: vec![at],
            http: None,
            disks: vec![disk],
            version: String::new(),
            problems: Vec::new(),
        };
        put(&mut view, &key::node(NODE), &node);
        if let Some(session) = session {
            let live = Live { session, failed: Vec::new(), full: Vec::new(), leaving: false };
            put(&mut view, &key::live(NODE), &live);
        }
        let records = [
            record(&[200, 300], &[200, 300], &[200, 300]),
            record(&[200, 300], &[200, 300], &[200]),
            record(&[200, 300], &[200], &[200, 300]),
            record(&[200, 100], &[200, 100], &[200, 100]),
            record(&[200, 300], &[200, 300], &[200, 300, 100]),
            record(&[200], &[200], &[200]),
            record(&[200, 300], &[200, 300, 100], &[200, 300]),
            record(&[200, 300], &[], &[200, 300]),
        ];
        for (index, record) in (0..).zip(&records) {
            put(&mut view, &key::pg(PgId { pool: POOL, index }), record);
        }
        view
    }

    #[test]
    fn only_what_is_whole_elsewhere_may_go() {
        let view = view(Some(PROCESS));
        let expected = Leavings::Of { pg_count: 8, settled: [0].into() };
        assert_eq!(leavings(&view, NODE, PROCESS, OWN, POOL), expected);
    }

    #[test]
    fn a_map_that_may_be_older_than_the_process_says_nothing() {
        for live in [None, Some(SessionId(12))] {
            assert_eq!(leavings(&view(live), NODE, PROCESS, OWN, POOL), Leavings::Unknown);
        }
        assert_eq!(leavings(&view(Some(PROCESS)), NODE, PROCESS, SliceId(5), POOL), Leavings::Unknown);
    }

    #[test]
    fn a_pool_that_was_removed_is_told_from_one_not_heard_of_yet() {
        let view = view(Some(PROCESS));
        assert_eq!(leavings(&view, NODE, PROCESS, OWN, PoolId(2)), Leavings::PoolRemoved);
        assert_eq!(leavings(&view, NODE, PROCESS, OWN, PoolId(3)), Leavings::Unknown);
    }
}
