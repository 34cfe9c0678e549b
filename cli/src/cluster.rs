//! A cluster as the tool's commands see it: metadata requests answered before they return, images opened,
//! and the changes of pools and images as transactions on the keys of `placement::map`.
//!
//! The client lives in this thread; waiting means letting it work until the answer is there.

use crate::cmd::Global;
use crate::deadline::Deadline;
use crate::error::CliError;
use client::{AdminDone, AdminError, ImageHandle, IoDone, Op, OpenMode, Options, SubmitError};
use control::admin::change::{self, PoolChange};
use control::admin::{self, Keys, PoolSpec, nodes};
use drystone::{Client, Hosting};
use placement::{DrainScope, Image, Pool, ScrubDepth, Settings, key};
use serde::de::DeserializeOwned;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;
use wire::control::{Change, Compare, KeyValue, MetaReply, MetaRequest, VoterInfo, Write};
use wire::{ImageId, NodeId, PgId, Revision};

/// Keys asked for in one request: an answer of this many small records fits a control frame.
const RANGE_ITEMS: u32 = 1000;
/// How often a compare-and-swap is tried again: only people and the director compete.
const SWAP_TRIES: u32 = 20;
/// One sleep of the client while waiting; it wakes earlier when something comes.
const TURN: Duration = Duration::from_millis(200);
/// Longest wait for a change: also notices what changes without a key being written.
const CHANGE_WAIT: Duration = Duration::from_millis(100);

/// A connection to a cluster.
pub struct Cluster {
    client: Client,
    /// A watch on everything that a status is made of, once somebody waited for a change.
    watching: bool,
}

/// Resolves `HOST:PORT[,HOST:PORT…]`.
pub fn addresses(text: &str) -> Result<Vec<SocketAddr>, CliError> {
    let mut all = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let found = part
            .to_socket_addrs()
            .map_err(|error| CliError::Address { text: part.to_string(), why: error.to_string() })?;
        all.extend(found);
    }
    if all.is_empty() { Err(CliError::NoCluster) } else { Ok(all) }
}

/// Who keeps the metadata, as the leader sees it.
#[derive(Clone, Debug)]
pub struct Members {
    /// All members, by number.
    pub members: Vec<VoterInfo>,
    /// Who is to vote when the change under way is complete; empty without one.
    pub target: Vec<NodeId>,
    /// No change is under way, and every voter that can be heard knows so.
    pub settled: bool,
}

/// An image that is open.
#[derive(Clone, Copy, Debug)]
pub struct OpenImage {
    /// For operations.
    pub handle: ImageHandle,
    /// Its size in bytes when it was opened.
    pub size_bytes: u64,
}

impl Cluster {
    /// A client of the cluster that the global flags name. Connecting happens with the first request.
    pub fn connect(global: &Global) -> Result<Self, CliError> {
        let addresses = addresses(global.cluster.as_deref().ok_or(CliError::NoCluster)?)?;
        let mut hosting = Hosting::default();
        if let Some(transport) = global.transport {
            hosting.transport = transport;
        }
        Self::hosted(&addresses, Options::default(), hosting)
    }

    /// A client of the cluster with these control addresses.
    pub fn at(addresses: &[SocketAddr]) -> Result<Self, CliError> {
        Self::with_options(addresses, Options::default())
    }

    /// As `at`, with other options.
    pub fn with_options(addresses: &[SocketAddr], options: Options) -> Result<Self, CliError> {
        Self::hosted(addresses, options, Hosting::default())
    }

    fn hosted(addresses: &[SocketAddr], options: Options, hosting: Hosting) -> Result<Self, CliError> {
        let client = Client::hosted(addresses, options, hosting)
            .map_err(|error| CliError::Client(error.to_string()))?;
        Ok(Self { client, watching: false })
    }

    fn turn(&mut self, wait: Duration) -> Result<(), CliError> {
        self.client.poll(Some(wait)).map(|_| ()).map_err(|error| CliError::Client(error.to_string()))
    }

    fn admin(&mut self) -> Result<AdminDone, CliError> {
        loop {
            if let Some(done) = self.client.next_admin() {
                return Ok(done);
            }
            self.turn(TURN)?;
        }
    }

    fn meta(&mut self, what: &str, request: MetaRequest) -> Result<MetaReply, CliError> {
        match self.ask(what, request)? {
            MetaReply::Failed { status } => {
                let source = AdminError::NoAnswer { last: wire::Status::from_u8(status) };
                Err(CliError::Admin { what: what.to_string(), source })
            }
            reply => Ok(reply),
        }
    }

    fn ask(&mut self, what: &str, request: MetaRequest) -> Result<MetaReply, CliError> {
        let failed = |source| CliError::Admin { what: what.to_string(), source };
        let ticket = self.client.meta(request);
        loop {
            match self.admin()? {
                AdminDone::Meta { ticket: done, result } if done == ticket => {
                    return result.map_err(failed);
                }
                _ => continue,
            }
        }
    }

    /// All keys with a prefix.
    pub fn range(&mut self, prefix: &str) -> Result<Vec<KeyValue>, CliError> {
        let what = format!("read metadata below {prefix}");
        let request = MetaRequest::Range { prefix: prefix.to_string(), limit: RANGE_ITEMS };
        match self.meta(&what, request)? {
            MetaReply::Range { items, more: false, .. } => Ok(items),
            // More than one answer holds: a subscription's snapshot comes in as many parts as it takes.
            MetaReply::Range { .. } => self.snapshot(prefix),
            _ => Err(malformed(&what, prefix)),
        }
    }

    fn snapshot(&mut self, prefix: &str) -> Result<Vec<KeyValue>, CliError> {
        let mut all = Vec::new();
        self.watch(prefix, |_, changes| {
            all.extend(changes.iter().filter_map(|change| match change {
                Change::Put(item) => Some(item.clone()),
                Change::Delete { .. } => None,
            }));
            Ok(false)
        })?;
        self.watching = false;
        Ok(all)
    }

    /// Who keeps the metadata.
    pub fn voters(&mut self) -> Result<Members, CliError> {
        match self.meta("ask for the metadata voters", MetaRequest::Voters)? {
            MetaReply::Voters { members, target, settled } => Ok(Members { members, target, settled }),
            _ => Err(malformed("ask for the metadata voters", "")),
        }
    }

    /// Asks for a change of them; the inner error is the leader's refusal.
    pub fn change_voters(
        &mut self,
        what: &str,
        request: MetaRequest,
    ) -> Result<Result<(), wire::Status>, CliError> {
        match self.ask(what, request)? {
            MetaReply::Applied { .. } => Ok(Ok(())),
            MetaReply::Failed { status } => Ok(Err(wire::Status::from_u8(status))),
            _ => Err(malformed(what, "")),
        }
    }

    /// A transaction: `Applied` or `CompareFailed`.
    pub fn txn(&mut self, compares: Vec<Compare>, writes: Vec<Write>) -> Result<MetaReply, CliError> {
        match self.meta("change metadata", MetaRequest::Txn { compares, writes })? {
            reply @ (MetaReply::Applied { .. } | MetaReply::CompareFailed { .. }) => Ok(reply),
            _ => Err(malformed("change metadata", "")),
        }
    }

    /// Hands `news` the current values of a prefix and then every change, until it says `false`.
    pub fn watch(
        &mut self,
        prefix: &str,
        mut news: impl FnMut(Revision, &[Change]) -> Result<bool, CliError>,
    ) -> Result<(), CliError> {
        let ticket = self.client.watch(&[prefix]);
        loop {
            if let AdminDone::Watch { ticket: of, revision, changes } = self.admin()?
                && of == ticket
                && !news(revision, &changes)?
            {
                return Ok(());
            }
        }
    }

    /// Sleeps until the state of nodes or placement groups changes, or a moment has passed: the next read
    /// may show something new.
    pub fn wait_for_change(&mut self) -> Result<(), CliError> {
        if !self.watching {
            self.watching = true;
            self.client.watch(&[key::LIVE, key::STATS, key::PGS]);
        }
        while self.client.next_admin().is_some() {}
        self.turn(CHANGE_WAIT)?;
        Ok(())
    }

    /// A key's value, decoded, and its revision; `None` when it does not exist.
    pub fn get<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<(T, Revision)>, CliError> {
        let items = self.range(key)?;
        items
            .iter()
            .find(|item| item.key == key)
            .map(|item| Ok((decode(item)?, item.mod_revision)))
            .transpose()
    }

    /// All values with a prefix, decoded.
    pub fn list<T: DeserializeOwned>(&mut self, prefix: &str) -> Result<Vec<T>, CliError> {
        self.range(prefix)?.iter().map(decode).collect()
    }

    /// All pools.
    pub fn pools(&mut self) -> Result<Vec<Pool>, CliError> {
        self.list(key::POOLS)
    }

    /// Creates a pool, if the registered nodes can hold it.
    pub fn create_pool(&mut self, spec: &PoolSpec) -> Result<Pool, CliError> {
        self.change("the list of pools", &admin::reads_create_pool(), |keys| admin::create_pool(keys, spec))
    }

    /// Begins the removal of a pool without images; the director finishes it.
    pub fn remove_pool(&mut self, name: &str) -> Result<(), CliError> {
        self.change("the pool", &admin::reads_remove_pool(), |keys| {
            admin::remove_pool(keys, name).map(|request| ((), request))
        })
    }

    /// Changes a pool.
    pub fn change_pool(&mut self, name: &str, how: &PoolChange) -> Result<Pool, CliError> {
        self.change("the pool", &change::reads_change_pool(), |keys| change::change_pool(keys, name, how))
    }

    /// What is set for the whole cluster.
    pub fn settings(&mut self) -> Result<Settings, CliError> {
        Ok(self.get(key::SETTINGS)?.map(|(settings, _)| settings).unwrap_or_default())
    }

    /// Changes what is set for the whole cluster.
    pub fn change_settings(&mut self, how: impl Fn(&mut Settings)) -> Result<Settings, CliError> {
        self.change("the settings", &change::reads_settings(), |keys| change::change_settings(keys, &how))
    }

    /// Begins a node's drain.
    pub fn drain_node(&mut self, node: NodeId, scope: DrainScope) -> Result<(), CliError> {
        self.change("the node", &nodes::reads_drain(), |keys| {
            nodes::drain_node(keys, node, scope, wall_ms()).map(|request| ((), request))
        })
    }

    /// Ends a node's drain.
    pub fn undrain_node(&mut self, node: NodeId) -> Result<(), CliError> {
        self.change("the node", &nodes::reads_drain(), |keys| {
            nodes::undrain_node(keys, node).map(|request| ((), request))
        })
    }

    /// Forgets a node that is gone.
    pub fn remove_node(&mut self, node: NodeId) -> Result<(), CliError> {
        self.change("the node", &nodes::reads_remove_node(node), |keys| {
            nodes::remove_node(keys, node).map(|request| ((), request))
        })
    }

    /// Asks the primary of a placement group to compare its copies now.
    pub fn want_scrub(&mut self, pg: PgId, depth: ScrubDepth) -> Result<(), CliError> {
        self.change("the placement group", &admin::reads_want_scrub(pg), |keys| {
            admin::want_scrub(keys, pg, depth).map(|request| ((), request))
        })
    }

    /// All images.
    pub fn images(&mut self) -> Result<Vec<Image>, CliError> {
        self.list(key::IMAGES)
    }

    /// An image by name.
    pub fn image(&mut self, name: &str) -> Result<Image, CliError> {
        let missing = || CliError::NotFound { kind: "image", name: name.to_string() };
        let (id, _) = self.get::<ImageId>(&key::image_name(name))?.ok_or_else(missing)?;
        self.get(&key::image(id))?.map(|(image, _)| image).ok_or_else(missing)
    }

    /// Creates an image of zeroes.
    pub fn create_image(&mut self, name: &str, pool: &str, size_bytes: u64) -> Result<Image, CliError> {
        self.change("the list of images", &admin::reads_create_image(name), |keys| {
            admin::create_image(keys, pool, name, size_bytes, wall_ms())
        })
    }

    /// Sets an image's recorded size.
    pub fn set_image_size(&mut self, name: &str, size_bytes: u64, may_shrink: bool) -> Result<(), CliError> {
        self.change_image(name, |keys| admin::resize_image(keys, name, size_bytes, may_shrink)).map(|_| ())
    }

    /// Marks an image as being removed: nobody can open it any more. Fine to repeat.
    pub fn mark_image_removed(&mut self, name: &str) -> Result<Image, CliError> {
        self.change_image(name, |keys| admin::begin_remove_image(keys, name))
    }

    /// Forgets an image whose objects are gone.
    pub fn forget_image(&mut self, image: &Image) -> Result<(), CliError> {
        match self.meta("change metadata", admin::finish_remove_image(image))? {
            // A failed comparison says that somebody else has finished the same removal.
            MetaReply::Applied { .. } | MetaReply::CompareFailed { .. } => Ok(()),
            _ => Err(malformed("change metadata", &key::image(image.id))),
        }
    }

    /// A change of one image's record.
    fn change_image<T>(
        &mut self,
        name: &str,
        plan: impl Fn(&Keys) -> Result<(T, MetaRequest), admin::AdminError>,
    ) -> Result<T, CliError> {
        let mut reads = admin::reads_image_id(name);
        reads.push(key::image(self.image(name)?.id));
        self.change("the image", &reads, plan)
    }

    /// Reads, plans a transaction from what was read, and commits it; again when somebody else was faster.
    fn change<T>(
        &mut self,
        what: &str,
        reads: &[String],
        plan: impl Fn(&Keys) -> Result<(T, MetaRequest), admin::AdminError>,
    ) -> Result<T, CliError> {
        for _ in 0..SWAP_TRIES {
            let mut keys = Keys::default();
            for prefix in reads {
                let items = self.range(prefix)?;
                keys.add(MetaReply::Range { revision: Revision(0), items, more: false })?;
            }
            let (value, request) = plan(&keys)?;
            match self.meta("change metadata", request)? {
                MetaReply::Applied { .. } => return Ok(value),
                MetaReply::CompareFailed { .. } => continue,
                _ => return Err(malformed("change metadata", what)),
            }
        }
        Err(CliError::Changed { what: what.to_string() })
    }

    /// Opens an image.
    pub fn open(&mut self, name: &str, mode: OpenMode) -> Result<OpenImage, CliError> {
        let ticket = self.client.open(name, mode);
        loop {
            match self.admin()? {
                AdminDone::Opened { ticket: done, result } if done == ticket => {
                    let handle = result.map_err(|source| match source {
                        AdminError::NotFound => CliError::NotFound { kind: "image", name: name.into() },
                        source => CliError::Admin { what: format!("open image {name}"), source },
                    })?;
                    let size_bytes = self.client.info(handle).map_or(0, |info| info.size_bytes);
                    return Ok(OpenImage { handle, size_bytes });
                }
                _ => continue,
            }
        }
    }

    /// Submits an operation.
    pub fn submit(&mut self, image: OpenImage, op: Op, user: u64) -> Result<(), (SubmitError, Op)> {
        self.client.submit(image.handle, op, user).map(|_| ())
    }

    /// The next completed operation, waiting for it at most until the deadline.
    pub fn next_io_until(&mut self, deadline: Deadline) -> Result<Option<IoDone>, CliError> {
        loop {
            match self.client.next_io() {
                Some(done) => return Ok(Some(done)),
                None if deadline.passed() => return Ok(None),
                None => self.turn(TURN.min(deadline.left()))?,
            }
        }
    }

    /// The next completed operation; waits when there is none.
    pub fn next_io(&mut self) -> Result<IoDone, CliError> {
        loop {
            if let Some(done) = self.client.next_io() {
                return Ok(done);
            }
            self.turn(TURN)?;
        }
    }
}

fn malformed(what: &str, key: &str) -> CliError {
    CliError::Admin { what: what.to_string(), source: AdminError::Malformed { key: key.to_string() } }
}

/// Decodes a key's value.
pub fn decode<T: DeserializeOwned>(item: &KeyValue) -> Result<T, CliError> {
    serde_json::from_str(&item.value)
        .map_err(|error| CliError::Schema { key: item.key.clone(), problem: error.to_string() })
}

/// Milliseconds since 1970.
#[allow(clippy::disallowed_methods, reason = "times for people, in a tool")]
pub(crate) fn wall_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_resolved_or_named_in_the_error() {
        let two = addresses("127.0.0.1:7700, localhost:7701").unwrap();
        assert!(two.contains(&"127.0.0.1:7700".parse().unwrap()) && two.len() >= 2);
        assert!(matches!(addresses(""), Err(CliError::NoCluster)));
        let error = addresses("127.0.0.1:7700,nonsense").unwrap_err();
        assert!(error.to_string().contains("nonsense"), "{error}");
    }
}
