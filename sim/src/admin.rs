//! The harness's own client: sets the cluster up, follows every key of the metadata store, and checks that
//! the watch tells the truth.

use client::{AdminDone, AdminTicket, ClientCore};
use placement::{NodeStats, PgRecord, Pool, ScrubRecord, key};
use reactor::{Env, Event, Service, Token};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use wire::control::{Change, KeyValue, MetaReply, MetaRequest};
use wire::{NodeId, PgId, Revision};

/// What the harness and its client share.
#[derive(Default)]
pub struct Board {
    /// Every key, as the watch told.
    pub keys: BTreeMap<String, KeyValue>,
    /// Up to which revision.
    pub revision: Revision,
    /// The watch has delivered its first snapshot.
    pub watching: bool,
    /// Requests to make, with the caller's number.
    pub requests: VecDeque<(u64, MetaRequest)>,
    /// Answers, by the caller's number; an error as its text.
    pub answers: BTreeMap<u64, Result<MetaReply, String>>,
    /// What no correct store would have told.
    pub violations: Vec<String>,
}

/// The token of the timer that looks for requests.
const LOOK: Token = Token(0xab << 56);
/// How often it looks, in milliseconds.
const LOOK_MS: u64 = 5;

/// The client.
pub struct Admin {
    core: ClientCore,
    board: Rc<RefCell<Board>>,
    tickets: BTreeMap<AdminTicket, u64>,
}

impl Admin {
    /// A client of these control addresses.
    pub fn new(addrs: Vec<SocketAddr>, board: Rc<RefCell<Board>>) -> Self {
        Self { core: ClientCore::new(addrs, client::Options::default()), board, tickets: BTreeMap::new() }
    }

    fn go(&mut self, env: &mut dyn Env) {
        loop {
            let request = self.board.borrow_mut().requests.pop_front();
            let Some((number, request)) = request else { break };
            let ticket = self.core.meta(env, request);
            self.tickets.insert(ticket, number);
        }
        while let Some(done) = self.core.poll_admin() {
            match done {
                AdminDone::Meta { ticket, result } => {
                    if let Some(number) = self.tickets.remove(&ticket) {
                        let result = result.map_err(|error| error.to_string());
                        self.board.borrow_mut().answers.insert(number, result);
                    }
                }
                AdminDone::Watch { revision, changes, .. } => {
                    self.board.borrow_mut().learn(revision, changes);
                }
                AdminDone::Opened { .. } => {}
            }
        }
    }
}

impl Board {
    fn learn(&mut self, revision: Revision, changes: Vec<Change>) {
        if self.watching && revision <= self.revision && !changes.is_empty() {
            self.violations.push(format!("watch: revision {revision} came after {}", self.revision));
        }
        self.watching = true;
        self.revision = self.revision.max(revision);
        for change in changes {
            match change {
                Change::Put(item) => {
                    if let Some(old) = self.keys.get(&item.key)
                        && old.mod_revision >= item.mod_revision
                    {
                        self.violations.push(format!(
                            "watch: {} came at revision {} after {}",
                            item.key, item.mod_revision, old.mod_revision
                        ));
                    }
                    self.keys.insert(item.key.clone(), item);
                }
                Change::Delete { key } => {
                    if self.keys.remove(&key).is_none() {
                        self.violations.push(format!("watch: {key} was deleted twice"));
                    }
                }
            }
        }
    }

    fn decode<T: serde::de::DeserializeOwned>(&self, prefix: &str) -> Vec<(String, T)> {
        self.keys
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .filter_map(|(key, item)| Some((key.clone(), serde_json::from_str(&item.value).ok()?)))
            .collect()
    }

    /// All PG records.
    pub fn pgs(&self) -> Vec<(PgId, PgRecord)> {
        self.decode(key::PGS)
            .into_iter()
            .filter_map(|(key, record)| Some((key::parse_pg(&key)?, record)))
            .collect()
    }

    /// What is known of all PGs' scrubs.
    pub fn scrubs(&self) -> Vec<(PgId, ScrubRecord)> {
        self.decode(key::SCRUBS)
            .into_iter()
            .filter_map(|(key, record)| Some((key::parse_scrub(&key)?, record)))
            .collect()
    }

    /// A PG for which somebody still waits to have it scrubbed.
    pub fn unscrubbed(&self) -> Option<String> {
        let scrubs = self.scrubs();
        let (pg, record) = scrubs.iter().find(|(_, record)| record.wanted.is_some())?;
        Some(format!("PG {pg}: {record:?}"))
    }

    /// All pools.
    pub fn pools(&self) -> Vec<Pool> {
        self.decode(key::POOLS).into_iter().map(|(_, pool)| pool).collect()
    }

    /// All images' names and sizes.
    pub fn image_sizes(&self) -> Vec<(String, u64)> {
        let images = self.decode::<placement::Image>(key::IMAGES);
        images.into_iter().map(|(_, image)| (image.name, image.size_bytes)).collect()
    }

    /// Nodes that are live.
    pub fn live(&self) -> Vec<NodeId> {
        self.keys
            .keys()
            .filter(|key| key.starts_with(key::LIVE))
            .filter_map(|key| key::parse_node(key))
            .collect()
    }

    /// Why not every PG is active, clean and where placement wants it; `None` when all are.
    pub fn unclean(&self, pgs_wanted: usize) -> Option<String> {
        let pgs = self.pgs();
        if pgs.len() < pgs_wanted {
            return Some(format!("{} of {pgs_wanted} PG records exist", pgs.len()));
        }
        let stats: Vec<(String, NodeStats)> = self.decode(key::STATS);
        pgs.iter().find_map(|(pg, record)| why_unclean(*pg, record, &stats))
    }

    /// All PGs that are not, and why.
    pub fn unclean_pgs(&self) -> BTreeMap<PgId, String> {
        let stats: Vec<(String, NodeStats)> = self.decode(key::STATS);
        let pgs = self.pgs();
        pgs.iter().filter_map(|(pg, record)| Some((*pg, why_unclean(*pg, record, &stats)?))).collect()
    }
}

fn why_unclean(pg: PgId, record: &PgRecord, stats: &[(String, NodeStats)]) -> Option<String> {
    let named = || format!("PG {pg}: {record:?}");
    let mut acting = record.acting.clone();
    let mut target = record.target.clone();
    acting.sort_unstable();
    target.sort_unstable();
    if record.primary.is_none() || acting != target {
        return Some(format!("{} has no primary or acts elsewhere than wanted", named()));
    }
    if !record.acting.iter().all(|slice| record.in_sync.contains(slice)) {
        return Some(format!("{} has members out of sync", named()));
    }
    let name = pg.to_string();
    let state = stats.iter().filter_map(|(_, stats)| stats.pgs.get(&name)).find(|s| s.epoch == record.epoch);
    match state {
        Some(stat) if stat.state == "active+clean" && stat.missing == 0 => None,
        other => Some(format!("{} is reported as {other:?}", named())),
    }
}

impl Service for Admin {
    fn start(&mut self, env: &mut dyn Env) {
        self.core.start(env);
        self.core.watch(env, vec!["/".to_owned()]);
        env.set_timer(env.now(), LOOK);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { token: LOOK } => env.set_timer(env.now().plus_ms(LOOK_MS), LOOK),
            event => self.core.event(env, event),
        }
    }

    fn flush(&mut self, env: &mut dyn Env) {
        self.core.flush(env);
        self.go(env);
    }
}
