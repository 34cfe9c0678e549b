//! Transactions that change what exists: pools, and the settings of the whole cluster.

use super::{AdminError, Keys, check_name, find_pool, put};
use crate::director::rule_of;
use placement::{FailureDomain, Pool, Settings, assign, key};
use wire::Revision;
use wire::control::{Compare, MetaRequest, Write};

/// What is to be different about a pool; `None` leaves a thing as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PoolChange {
    /// Another name.
    pub name: Option<String>,
    /// Copies of each object. The director adds or removes them PG by PG; no acknowledged write is ever on fewer
    /// copies than before until all of the new ones hold it.
    pub copies: Option<u8>,
    /// Below so many live copies nothing is served.
    pub min_copies: Option<u8>,
    /// What copies may not share.
    pub failure_domain: Option<FailureDomain>,
    /// Seconds between light scrubs; 0: none.
    pub light_scrub_secs: Option<u64>,
    /// Seconds between deep scrubs; 0: none.
    pub deep_scrub_secs: Option<u64>,
}

/// What `change_pool` needs to know.
pub fn reads_change_pool() -> Vec<String> {
    [key::POOLS, key::NODES, key::DRAINS].map(str::to_owned).to_vec()
}

/// Changes a pool. Refused when it could not be placed afterwards.
pub fn change_pool(keys: &Keys, name: &str, change: &PoolChange) -> Result<(Pool, MetaRequest), AdminError> {
    let before = find_pool(keys, name)?;
    if before.removing {
        return Err(AdminError::Removing { kind: "pool", name: before.name });
    }
    let mut pool = before.clone();
    pool.copies = change.copies.unwrap_or(pool.copies);
    // A minimum that was not asked for follows the number of copies where it has to.
    pool.min_copies = change.min_copies.unwrap_or(pool.min_copies.min(pool.copies));
    pool.failure_domain = change.failure_domain.unwrap_or(pool.failure_domain);
    pool.scrub.light_secs = change.light_scrub_secs.unwrap_or(pool.scrub.light_secs);
    pool.scrub.deep_secs = change.deep_scrub_secs.unwrap_or(pool.scrub.deep_secs);
    if pool.min_copies == 0 || pool.min_copies > pool.copies {
        return Err(AdminError::MinCopies { copies: pool.copies, min_copies: pool.min_copies });
    }
    if (pool.copies, pool.failure_domain) != (before.copies, before.failure_domain) {
        assign(&keys.topology()?, &rule_of(&pool), &[])?;
    }
    let mut compares = vec![keys.unchanged(key::pool(pool.id))];
    let mut writes = Vec::new();
    if let Some(name) = change.name.as_ref().filter(|name| **name != before.name) {
        check_name(name)?;
        let taken: Vec<Pool> = keys.all(key::POOLS)?;
        if taken.iter().any(|other| other.name == *name) {
            return Err(AdminError::Exists { kind: "pool", name: name.clone() });
        }
        pool.name.clone_from(name);
        compares.push(Compare::ModRevision { key: key::pool_name(name), revision: Revision(0) });
        writes.push(Write::Delete { key: key::pool_name(&before.name) });
        writes.push(put(key::pool_name(name), &pool.id)?);
    }
    writes.push(put(key::pool(pool.id), &pool)?);
    Ok((pool, MetaRequest::Txn { compares, writes }))
}

/// What `change_settings` needs to know.
pub fn reads_settings() -> Vec<String> {
    vec![key::SETTINGS.to_owned()]
}

/// Changes the settings.
pub fn change_settings(
    keys: &Keys,
    change: impl Fn(&mut Settings),
) -> Result<(Settings, MetaRequest), AdminError> {
    let mut settings: Settings = keys.get(key::SETTINGS)?.unwrap_or_default();
    change(&mut settings);
    let Settings { nearfull_percent, backfillfull_percent, full_percent, .. } = settings;
    let in_order = nearfull_percent <= backfillfull_percent && backfillfull_percent <= full_percent;
    if !in_order || nearfull_percent == 0 || full_percent > 100 {
        return Err(AdminError::Thresholds { nearfull_percent, backfillfull_percent, full_percent });
    }
    let compares = vec![keys.unchanged(key::SETTINGS.to_owned())];
    Ok((settings, MetaRequest::Txn { compares, writes: vec![put(key::SETTINGS.to_owned(), &settings)?] }))
}
