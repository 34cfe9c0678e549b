//! An administrator who has copies moved about while clients work: nodes are drained and taken back, the pool gets
//! fewer copies and more. What is left behind on slices has to be erased in the end.

use crate::cluster::Cluster;
use crate::world::{Over, World};
use control::admin::Keys;
use control::admin::change::{PoolChange, change_pool};
use control::admin::nodes::{drain_node, undrain_node};
use placement::DrainScope;
use simenv::clock::{MS, SEC};
use simenv::rng::Stream;
use wire::NodeId;
use wire::control::MetaRequest;

/// From clean PGs to slices with nothing on them but what belongs there: two passes, the second after the first
/// had to wait for something, and the time in which cores hear of the last records.
const ERASE_LIMIT_NS: u64 = 90 * SEC;
/// In which the last records come to every core.
const NEWS_NS: u64 = 2 * SEC;

/// The administrator.
pub struct Moves {
    rng: Stream,
    next_at: u64,
    drained: Option<NodeId>,
    under_way: Option<u64>,
    /// Requests made.
    pub made: u64,
}

impl Moves {
    /// Of a seed.
    pub fn new(seed: u64) -> Self {
        Self { rng: Stream::new(seed, "moves"), next_at: 0, drained: None, under_way: None, made: 0 }
    }

    fn draw(&mut self, cluster: &Cluster, keys: &Keys, pool: &str) -> Option<MetaRequest> {
        let options = &cluster.options;
        // Redundancy has to outlive a copy that is damaged beside a node that is away.
        let may_shrink = options.faults.damage == 0;
        if may_shrink && self.rng.chance(400_000) {
            let copies = 2 + self.rng.below(2) as u8;
            let change = PoolChange { copies: Some(copies), ..PoolChange::default() };
            return change_pool(keys, pool, &change).ok().map(|(_, request)| request);
        }
        if let Some(node) = self.drained.take() {
            return undrain_node(keys, node).ok();
        }
        let node = cluster.nodes[self.rng.below(cluster.nodes.len() as u64) as usize].id;
        let scope = if self.rng.chance(200_000) { DrainScope::Primaries } else { DrainScope::Everything };
        self.drained = Some(node);
        drain_node(keys, node, scope, 0).ok()
    }
}

impl World {
    /// Asks for the next move when it is due; one request after the other.
    pub(crate) fn move_copies(&mut self, pool: &str) {
        let every_ns = self.cluster.options.move_every_ns;
        if every_ns == 0 || self.is_healing() {
            return;
        }
        let now = self.cluster.universe.now;
        if self.moves.under_way.is_some_and(|number| !self.answered(number)) {
            return;
        }
        self.moves.under_way = None;
        if self.moves.next_at == 0 {
            self.moves.next_at = now + self.moves.rng.latency(every_ns);
        }
        if now < self.moves.next_at {
            return;
        }
        self.moves.next_at = now + 100 * MS + self.moves.rng.latency(every_ns);
        let keys = self.keys();
        if let Some(request) = self.moves.draw(&self.cluster, &keys, pool) {
            self.moves.under_way = Some(self.post(request));
            self.moves.made += 1;
        }
    }

    /// Waits until no slice looks for anything left behind.
    pub(crate) fn sweep(&mut self) -> Result<(), Over> {
        let heard = self.cluster.universe.now + NEWS_NS;
        self.until(ERASE_LIMIT_NS, "erasing what PGs have left behind", |cluster| {
            if cluster.universe.now < heard {
                return Some("cores have not heard yet".to_owned());
            }
            cluster.strays_pending().map(|node| format!("node {node} has not done with it"))
        })
    }
}
