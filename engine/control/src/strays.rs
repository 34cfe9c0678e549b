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
    let named = record.target.iter().chain(&record.acting).chain(&record.in_sync);
    record.primary.is_some()
        && record.target.len() == usize::from(copies)
        && record.acting.len() == record.target.len()
        && record
            .target
            .iter()
            .all(|wanted| record.acting.contains(wanted) && record.in_sync.contains(wanted))
        && !named.chain(&record.primary).any(|named| *named == slice)
}
