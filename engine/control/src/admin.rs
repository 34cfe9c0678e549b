//! Transactions of administrators: pools and images here, `nodes`, and what exists already in `change`. Pure functions from what was read to what is to be
//! written. Every write compares what it was computed from, so two administrators at once do no harm: one
//! of them gets `CompareFailed`, reads again and tries again.
//!
//! Use: submit a `MetaRequest::Range` for every prefix that `reads_*` names, collect the answers in
//! `Keys`, call the function, submit its transaction.

pub mod change;
pub mod nodes;

use crate::director::rule_of;
use placement::{
    FailureDomain, Image, NextId, PG_COUNT_MAX, PlacementError, Pool, ScrubDepth, ScrubPlan, ScrubRecord,
    assign, key,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use thiserror::Error;
use wire::control::{Compare, KeyValue, MetaReply, MetaRequest, Write};
use wire::{BLOCK_BYTES, ImageId, NodeId, PgId, PoolId, Revision, Status};

/// Longest name of a pool or image, in bytes: with its prefix it is a key of the metadata store.
pub const NAME_BYTES_MAX: usize = 480;
/// Largest image: 2^52 blocks are beyond any cluster and leave room for arithmetic.
pub const IMAGE_BYTES_MAX: u64 = 1 << 62;
/// PGs per slice and copy that a new pool gets when nothing is said: enough for an even spread.
pub const PGS_PER_SLICE: u64 = 16;
/// PGs of a new pool when nothing is said, at least and at most.
pub const DEFAULT_PGS: std::ops::RangeInclusive<u64> = 16..=1024;

/// Why an administrator's wish cannot be fulfilled.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum AdminError {
    /// Not a name.
    #[error(
        "{0:?} is no valid name: 1 to {NAME_BYTES_MAX} bytes, no '/', '@' or control characters, no spaces at its ends"
    )]
    Name(String),
    /// The name is taken.
    #[error("{kind} {name:?} exists already")]
    Exists {
        /// `pool` or `image`.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// No such thing.
    #[error("there is no {kind} {name:?}{}", hint(.known))]
    NotFound {
        /// `pool` or `image`.
        kind: &'static str,
        /// The name.
        name: String,
        /// Some that exist.
        known: Vec<String>,
    },
    /// It is being removed.
    #[error("{kind} {name:?} is being removed")]
    Removing {
        /// `pool` or `image`.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// The pool cannot be placed on the nodes that are registered.
    #[error("{0}")]
    Placement(#[from] PlacementError),
    /// Minimum beyond the number of copies.
    #[error("min copies must be from 1 to the number of copies ({copies}), not {min_copies}")]
    MinCopies {
        /// Copies.
        copies: u8,
        /// Minimum asked for.
        min_copies: u8,
    },
    /// The pool still holds images.
    #[error("pool {name:?} still holds {count} image(s), {first:?} for one: remove them first")]
    NotEmpty {
        /// The pool.
        name: String,
        /// How many.
        count: usize,
        /// One of them.
        first: String,
    },
    /// It may be forgotten only when it is gone.
    #[error("node {0} is up: stop it first (`drystone node drain` moves its copies while it works)")]
    StillUp(NodeId),
    /// Thresholds that are in no order.
    #[error(
        "the thresholds must be 0 % < nearfull <= backfillfull <= full <= 100 %, not {nearfull_percent} %, \
         {backfillfull_percent} %, {full_percent} %"
    )]
    Thresholds {
        /// Warned of.
        nearfull_percent: u8,
        /// No more recovery.
        backfillfull_percent: u8,
        /// No more new data.
        full_percent: u8,
    },
    /// Not a size.
    #[error("an image's size must be a multiple of {BLOCK_BYTES} from {BLOCK_BYTES} to 2^62 bytes, not {0}")]
    Size(u64),
    /// Data would be cut off.
    #[error("image {name:?} has {now} bytes; making it {wanted} bytes long cuts data off: say so explicitly")]
    Shrinks {
        /// The image.
        name: String,
        /// Present size.
        now: u64,
        /// Wanted size.
        wanted: u64,
    },
    /// A value in the store is not what it should be.
    #[error("the metadata under {0} cannot be read; see `drystone meta get`")]
    Damaged(String),
    /// The store did not answer.
    #[error("metadata store: {0}")]
    Store(Status),
}

fn hint(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!("; there is {}", known.join(", ")) }
}

/// What was read, by key.
#[derive(Clone, Debug, Default)]
pub struct Keys(BTreeMap<String, KeyValue>);

impl Keys {
    /// Adds the answer to a `Range`.
    pub fn add(&mut self, reply: MetaReply) -> Result<(), AdminError> {
        match reply {
            MetaReply::Range { items, .. } => {
                self.0.extend(items.into_iter().map(|item| (item.key.clone(), item)));
                Ok(())
            }
            MetaReply::Failed { status } => Err(AdminError::Store(Status::from_u8(status))),
            _ => Err(AdminError::Store(Status::Unknown)),
        }
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, AdminError> {
        let parse = |item: &KeyValue| {
            serde_json::from_str(&item.value).map_err(|_| AdminError::Damaged(item.key.clone()))
        };
        self.0.get(key).map(parse).transpose()
    }

    fn all<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<T>, AdminError> {
        let keys = self.0.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        keys.filter_map(|(key, _)| self.get(key).transpose()).collect()
    }

    /// The comparison that holds while nobody else writes the key.
    fn unchanged(&self, key: String) -> Compare {
        let revision = self.0.get(&key).map_or(Revision(0), |item| item.mod_revision);
        Compare::ModRevision { key, revision }
    }
}

fn put<T: Serialize>(key: String, value: &T) -> Result<Write, AdminError> {
    let value = serde_json::to_string(value).map_err(|_| AdminError::Damaged(key.clone()))?;
    Ok(Write::Put { key, value, lease: None })
}

fn check_name(name: &str) -> Result<(), AdminError> {
    let fine = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.trim() == name
        && !name.chars().any(|c| c.is_control() || c == '/' || c == '@');
    if fine { Ok(()) } else { Err(AdminError::Name(name.to_owned())) }
}

/// The ranges to read for a list of prefixes.
pub fn ranges(prefixes: &[String]) -> Vec<MetaRequest> {
    prefixes.iter().map(|prefix| MetaRequest::Range { prefix: prefix.clone(), limit: u32::MAX }).collect()
}

/// A pool to be created.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PoolSpec {
    /// Its name.
    pub name: String,
    /// Copies of each object.
    pub copies: u8,
    /// Below so many live copies nothing is served; by default a majority.
    pub min_copies: Option<u8>,
    /// Placement groups; by default by the number of slices.
    pub pg_count: Option<u32>,
    /// What copies may not share.
    pub failure_domain: FailureDomain,
    /// How often its PGs are scrubbed.
    pub scrub: ScrubPlan,
}

/// What `create_pool` needs to know.
pub fn reads_create_pool() -> Vec<String> {
    [key::NEXT_ID, key::POOLS, key::NODES, key::DRAINS].map(str::to_owned).to_vec()
}

/// Creates a pool. Refused when it could not be placed on the registered nodes.
pub fn create_pool(keys: &Keys, spec: &PoolSpec) -> Result<(Pool, MetaRequest), AdminError> {
    check_name(&spec.name)?;
    let pools: Vec<Pool> = keys.all(key::POOLS)?;
    if pools.iter().any(|pool| pool.name == spec.name) {
        return Err(AdminError::Exists { kind: "pool", name: spec.name.clone() });
    }
    let topology = keys.topology()?;
    let min_copies = spec.min_copies.unwrap_or(spec.copies / 2 + 1);
    if min_copies == 0 || min_copies > spec.copies {
        return Err(AdminError::MinCopies { copies: spec.copies, min_copies });
    }
    let by_slices = topology.spots().len() as u64 * PGS_PER_SLICE / u64::from(spec.copies.max(1));
    let usual = by_slices.next_power_of_two().clamp(*DEFAULT_PGS.start(), *DEFAULT_PGS.end());
    let next: NextId = keys.get(key::NEXT_ID)?.unwrap_or_default();
    let pool = Pool {
        id: next.pool,
        name: spec.name.clone(),
        copies: spec.copies,
        min_copies,
        pg_count: spec.pg_count.unwrap_or_else(|| u32::try_from(usual).unwrap_or(PG_COUNT_MAX)),
        failure_domain: spec.failure_domain,
        removing: false,
        scrub: spec.scrub,
    };
    assign(&topology, &rule_of(&pool), &[])?;
    let name_key = key::pool_name(&pool.name);
    let compares = vec![
        keys.unchanged(key::NEXT_ID.to_owned()),
        Compare::ModRevision { key: name_key.clone(), revision: Revision(0) },
    ];
    let next = NextId { pool: PoolId(next.pool.0.saturating_add(1)), ..next };
    let writes =
        vec![put(key::NEXT_ID.to_owned(), &next)?, put(key::pool(pool.id), &pool)?, put(name_key, &pool.id)?];
    Ok((pool, MetaRequest::Txn { compares, writes }))
}

/// What `remove_pool` needs to know.
pub fn reads_remove_pool() -> Vec<String> {
    vec![key::POOLS.to_owned(), key::IMAGES.to_owned()]
}

fn find_pool(keys: &Keys, name: &str) -> Result<Pool, AdminError> {
    let pools: Vec<Pool> = keys.all(key::POOLS)?;
    let known = pools.iter().map(|pool| format!("{:?}", pool.name)).take(10).collect();
    let found = pools.into_iter().find(|pool| pool.name == name);
    found.ok_or_else(|| AdminError::NotFound { kind: "pool", name: name.to_owned(), known })
}

/// Begins to remove an empty pool; the director does the rest.
pub fn remove_pool(keys: &Keys, name: &str) -> Result<MetaRequest, AdminError> {
    let pool = find_pool(keys, name)?;
    let images: Vec<Image> = keys.all(key::IMAGES)?;
    let mut inside = images.iter().filter(|image| image.pool == pool.id);
    if let Some(first) = inside.next() {
        let (name, first, count) = (name.to_owned(), first.name.clone(), 1 + inside.count());
        return Err(AdminError::NotEmpty { name, count, first });
    }
    // Creating an image compares the pool's revision, so none can slip in.
    let compares = vec![keys.unchanged(key::pool(pool.id))];
    let writes = vec![put(key::pool(pool.id), &Pool { removing: true, ..pool })?];
    Ok(MetaRequest::Txn { compares, writes })
}

fn check_size(size_bytes: u64) -> Result<(), AdminError> {
    let fine =
        size_bytes > 0 && size_bytes <= IMAGE_BYTES_MAX && size_bytes.is_multiple_of(BLOCK_BYTES as u64);
    if fine { Ok(()) } else { Err(AdminError::Size(size_bytes)) }
}

/// What `create_image` needs to know.
pub fn reads_create_image(name: &str) -> Vec<String> {
    vec![key::NEXT_ID.to_owned(), key::POOLS.to_owned(), key::image_name(name)]
}

/// Creates an image. `now_ms` is the wall clock, for people.
pub fn create_image(
    keys: &Keys,
    pool: &str,
    name: &str,
    size_bytes: u64,
    now_ms: u64,
) -> Result<(Image, MetaRequest), AdminError> {
    check_name(name)?;
    check_size(size_bytes)?;
    let pool = find_pool(keys, pool)?;
    if pool.removing {
        return Err(AdminError::Removing { kind: "pool", name: pool.name });
    }
    let name_key = key::image_name(name);
    if keys.0.contains_key(&name_key) {
        return Err(AdminError::Exists { kind: "image", name: name.to_owned() });
    }
    let next: NextId = keys.get(key::NEXT_ID)?.unwrap_or_default();
    let image = Image {
        id: next.image,
        name: name.to_owned(),
        pool: pool.id,
        size_bytes,
        removing: false,
        created_ms: now_ms,
    };
    let compares = vec![
        keys.unchanged(key::NEXT_ID.to_owned()),
        Compare::ModRevision { key: name_key.clone(), revision: Revision(0) },
        keys.unchanged(key::pool(pool.id)),
    ];
    let next = NextId { image: ImageId(next.image.0.saturating_add(1)), ..next };
    let writes = vec![
        put(key::NEXT_ID.to_owned(), &next)?,
        put(key::image(image.id), &image)?,
        put(name_key, &image.id)?,
    ];
    Ok((image, MetaRequest::Txn { compares, writes }))
}

/// What is needed to find an image by name; then its record (`key::image`) is to be read.
pub fn reads_image_id(name: &str) -> Vec<String> {
    vec![key::image_name(name)]
}

/// The number of an image.
pub fn image_id(keys: &Keys, name: &str) -> Result<ImageId, AdminError> {
    let missing = || AdminError::NotFound { kind: "image", name: name.to_owned(), known: Vec::new() };
    keys.get(&key::image_name(name))?.ok_or_else(missing)
}

fn find_image(keys: &Keys, name: &str) -> Result<Image, AdminError> {
    let id = image_id(keys, name)?;
    let missing = || AdminError::NotFound { kind: "image", name: name.to_owned(), known: Vec::new() };
    keys.get(&key::image(id))?.ok_or_else(missing)
}

/// Changes an image's size. Making it smaller must be asked for.
pub fn resize_image(
    keys: &Keys,
    name: &str,
    size_bytes: u64,
    may_shrink: bool,
) -> Result<(Image, MetaRequest), AdminError> {
    check_size(size_bytes)?;
    let image = find_image(keys, name)?;
    if image.removing {
        return Err(AdminError::Removing { kind: "image", name: name.to_owned() });
    }
    if size_bytes < image.size_bytes && !may_shrink {
        let (name, now) = (name.to_owned(), image.size_bytes);
        return Err(AdminError::Shrinks { name, now, wanted: size_bytes });
    }
    let compares = vec![keys.unchanged(key::image(image.id))];
    let image = Image { size_bytes, ..image };
    let writes = vec![put(key::image(image.id), &image)?];
    Ok((image, MetaRequest::Txn { compares, writes }))
}

/// First half of a removal: from now on the image cannot be opened. Its objects are to be deleted next.
/// Fine to repeat.
pub fn begin_remove_image(keys: &Keys, name: &str) -> Result<(Image, MetaRequest), AdminError> {
    let image = find_image(keys, name)?;
    let compares = vec![keys.unchanged(key::image(image.id))];
    let image = Image { removing: true, ..image };
    let writes = vec![put(key::image(image.id), &image)?];
    Ok((image, MetaRequest::Txn { compares, writes }))
}

/// Second half, after the objects are gone.
pub fn finish_remove_image(image: &Image) -> MetaRequest {
    let compares = vec![Compare::Exists { key: key::image(image.id) }];
    let writes = vec![
        Write::Delete { key: key::image(image.id) },
        Write::Delete { key: key::image_name(&image.name) },
    ];
    MetaRequest::Txn { compares, writes }
}

/// What `want_scrub` needs to know.
pub fn reads_want_scrub(pg: PgId) -> Vec<String> {
    vec![key::pg(pg), key::scrub(pg)]
}

/// Asks the PG's primary to scrub it now. A deep one that is wanted already stays wanted.
pub fn want_scrub(keys: &Keys, pg: PgId, depth: ScrubDepth) -> Result<MetaRequest, AdminError> {
    let missing = AdminError::NotFound { kind: "placement group", name: pg.to_string(), known: Vec::new() };
    keys.get::<placement::PgRecord>(&key::pg(pg))?.ok_or(missing)?;
    let record: ScrubRecord = keys.get(&key::scrub(pg))?.unwrap_or_default();
    let wanted = Some(record.wanted.map_or(depth, |before| before.max(depth)));
    let compares = vec![keys.unchanged(key::scrub(pg)), Compare::Exists { key: key::pg(pg) }];
    Ok(MetaRequest::Txn { compares, writes: vec![put(key::scrub(pg), &ScrubRecord { wanted, ..record })?] })
}
