//! Transactions on nodes: drains, and forgetting one that is gone.

use super::{AdminError, Keys, put};
use placement::{Drain, DrainScope, Node, Topology, key};
use std::collections::BTreeSet;
use wire::NodeId;
use wire::Revision;
use wire::control::{Compare, MetaRequest, Write};

impl Keys {
    /// The nodes that are to keep no copies.
    pub(super) fn emptied(&self) -> Result<BTreeSet<NodeId>, AdminError> {
        let mut nodes = BTreeSet::new();
        for name in self.0.keys().filter(|name| name.starts_with(key::DRAINS)) {
            let drain: Option<Drain> = self.get(name)?;
            if drain.is_some_and(|drain| drain.scope == DrainScope::Everything) {
                nodes.extend(key::parse_node(name));
            }
        }
        Ok(nodes)
    }

    /// Where a new copy may go.
    pub(super) fn topology(&self) -> Result<Topology, AdminError> {
        let nodes: Vec<Node> = self.all(key::NODES)?;
        Ok(Topology::new(&nodes).without(&self.emptied()?))
    }

    fn known(&self, node: NodeId) -> Result<Compare, AdminError> {
        let known = || -> Result<Vec<String>, AdminError> {
            Ok(self.all::<Node>(key::NODES)?.iter().map(|node| node.id.to_string()).take(10).collect())
        };
        match self.get::<Node>(&key::node(node))? {
            Some(_) => Ok(Compare::Exists { key: key::node(node) }),
            None => Err(AdminError::NotFound { kind: "node", name: node.to_string(), known: known()? }),
        }
    }
}

/// What `drain_node` and `undrain_node` need to know.
pub fn reads_drain() -> Vec<String> {
    vec![key::NODES.to_owned(), key::DRAINS.to_owned()]
}

/// Has a node give its primaries, or everything, to others. A drain under way gets the new scope and keeps its
/// date. `now_ms` is the wall clock, for people.
pub fn drain_node(
    keys: &Keys,
    node: NodeId,
    scope: DrainScope,
    now_ms: u64,
) -> Result<MetaRequest, AdminError> {
    let name = key::drain(node);
    let before: Option<Drain> = keys.get(&name)?;
    let drain = Drain { scope, since_ms: before.map_or(now_ms, |before| before.since_ms) };
    let compares = vec![keys.known(node)?, keys.unchanged(name.clone())];
    Ok(MetaRequest::Txn { compares, writes: vec![put(name, &drain)?] })
}

/// Ends a drain. Fine when there is none.
pub fn undrain_node(keys: &Keys, node: NodeId) -> Result<MetaRequest, AdminError> {
    let writes = vec![Write::Delete { key: key::drain(node) }];
    Ok(MetaRequest::Txn { compares: vec![keys.known(node)?], writes })
}

/// What `remove_node` needs to know.
pub fn reads_remove_node(node: NodeId) -> Vec<String> {
    vec![key::node(node), key::live(node)]
}

/// Forgets a node that will not come back; its slices' copies move to others. Refused while it is up.
pub fn remove_node(keys: &Keys, node: NodeId) -> Result<MetaRequest, AdminError> {
    keys.known(node)?;
    if keys.0.contains_key(&key::live(node)) {
        return Err(AdminError::StillUp(node));
    }
    let compares = vec![
        keys.unchanged(key::node(node)),
        Compare::ModRevision { key: key::live(node), revision: Revision(0) },
    ];
    let writes = vec![Write::Delete { key: key::node(node) }, Write::Delete { key: key::drain(node) }];
    Ok(MetaRequest::Txn { compares, writes })
}
