//! What the data cores of this node are told: the PGs they take part in, the session, the lease.

use crate::config::{FEED_BACKLOG, FEEDS_PER_STEP};
use crate::view::{PgEntry, View};
use engine::CoreMsg;
use engine::msg::PgUpdate;
use placement::Settings;
use reactor::{Env, Mono};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use wire::{CoreId, NodeId, PgId, SessionId, SliceId};

/// One data core.
#[derive(Default)]
struct Core {
    backlog: VecDeque<CoreMsg>,
    /// What it was told last, by PG.
    told: BTreeMap<PgId, PgUpdate>,
    /// PGs it was told under an earlier session.
    stale: BTreeSet<PgId>,
}

/// See the module.
pub struct Feed {
    node: NodeId,
    cores: Vec<Core>,
    dirty: BTreeSet<PgId>,
    /// Nothing is told about PGs before the node is registered.
    open: bool,
    /// What the cores were told last.
    full: BTreeSet<SliceId>,
}

impl Feed {
    /// For this many cores.
    pub fn new(node: NodeId, cores: u16) -> Self {
        let cores = (0..cores).map(|_| Core::default()).collect();
        Self { node, cores, dirty: BTreeSet::new(), open: false, full: BTreeSet::new() }
    }

    /// The node is registered: cores learn their session and then everything.
    pub fn open(&mut self, view: &View, session: SessionId) {
        self.open = true;
        self.broadcast(|| CoreMsg::Identity { session });
        self.dirty.append(&mut view.pgs().keys().copied().collect());
        self.dirty.extend(self.cores.iter().flat_map(|core| &core.stale));
    }

    /// The session is over: cores learn the next one, and no PG until it is registered.
    pub fn shut(&mut self, session: SessionId) {
        self.open = false;
        self.dirty.clear();
        for core in &mut self.cores {
            core.stale.extend(std::mem::take(&mut core.told).into_keys());
        }
        self.broadcast(|| CoreMsg::Identity { session });
    }

    /// Authority until then. Replaces an earlier one that still waits.
    pub fn lease(&mut self, until: Mono) {
        for core in &mut self.cores {
            core.backlog.retain(|msg| !matches!(msg, CoreMsg::Lease { .. }));
            core.backlog.push_back(CoreMsg::Lease { until });
        }
    }

    /// What holds for the whole cluster. Replaces an earlier one that still waits.
    pub fn settings(&mut self, settings: Settings) {
        for core in &mut self.cores {
            core.backlog.retain(|msg| !matches!(msg, CoreMsg::Settings(_)));
            core.backlog.push_back(CoreMsg::Settings(settings));
        }
    }

    /// The slices on which clients are to put nothing more.
    pub fn full(&mut self, slices: BTreeSet<SliceId>) {
        if slices == self.full {
            return;
        }
        self.full = slices;
        for core in &mut self.cores {
            core.backlog.retain(|msg| !matches!(msg, CoreMsg::Full { .. }));
            core.backlog.push_back(CoreMsg::Full { slices: self.full.clone() });
        }
    }

    /// A message to one core, behind what waits for it.
    pub fn send(&mut self, core: CoreId, msg: CoreMsg) {
        if let Some(core) = self.cores.get_mut(usize::from(core.0))
            && core.backlog.len() < FEED_BACKLOG
        {
            core.backlog.push_back(msg);
        }
    }

    /// The same for what must not be left out: at most one message per slice.
    pub fn order(&mut self, core: CoreId, msg: CoreMsg) {
        if let Some(core) = self.cores.get_mut(usize::from(core.0)) {
            core.backlog.push_back(msg);
        }
    }

    /// All cores are to end.
    pub fn stop(&mut self) {
        self.open = false;
        self.dirty.clear();
        self.broadcast(|| CoreMsg::Stop);
    }

    fn broadcast(&mut self, msg: impl Fn() -> CoreMsg) {
        for core in &mut self.cores {
            core.backlog.push_back(msg());
        }
    }

    /// These PGs, or something they are resolved with, have changed.
    pub fn touch(&mut self, pgs: impl IntoIterator<Item = PgId>) {
        if self.open {
            // Merging sorted sets is far cheaper than inserting one by one when there are thousands.
            self.dirty.append(&mut pgs.into_iter().collect());
        }
    }

    /// This PG's record has changed.
    pub fn touch_one(&mut self, pg: PgId) {
        if self.open {
            self.dirty.insert(pg);
        }
    }

    /// Whether something waits for a later step.
    pub fn has_work(&self) -> bool {
        !self.dirty.is_empty() || self.cores.iter().any(|core| !core.backlog.is_empty())
    }

    /// Resolves and sends what is due. Bounded work.
    pub fn pump(&mut self, env: &mut dyn Env, view: &View) {
        let mut resolved = 0;
        while resolved < FEEDS_PER_STEP && self.cores.iter().all(|core| core.backlog.len() < FEED_BACKLOG) {
            let Some(pg) = self.dirty.pop_first() else { break };
            resolved += 1;
            self.resolve(view, pg);
        }
        for (index, core) in (0..).zip(&mut self.cores) {
            while let Some(msg) = core.backlog.pop_front() {
                if let Err((_, msg)) = env.post(CoreId(index), msg.into_mesh()) {
                    if let Ok(msg) = CoreMsg::from_mesh(msg) {
                        core.backlog.push_front(msg);
                    }
                    break;
                }
            }
        }
    }

    fn resolve(&mut self, view: &View, pg: PgId) {
        let entry = view.pgs().get(&pg);
        let wanted = entry.map_or_else(BTreeSet::new, |entry| self.cores_of(view, entry));
        let update = entry.and_then(|entry| self.update(view, pg, entry));
        for (index, core) in (0..).zip(&mut self.cores) {
            match &update {
                Some(update) if wanted.contains(&index) => {
                    core.stale.remove(&pg);
                    if core.told.get(&pg) != Some(update) {
                        core.told.insert(pg, update.clone());
                        core.backlog.push_back(CoreMsg::Pg(update.clone()));
                    }
                }
                _ => {
                    let stale = core.stale.remove(&pg);
                    if core.told.remove(&pg).is_some() || stale {
                        core.backlog.push_back(CoreMsg::PgGone { pg });
                    }
                }
            }
        }
    }

    fn cores_of(&self, view: &View, entry: &PgEntry) -> BTreeSet<u16> {
        let own = |slice: SliceId| view.home(slice).filter(|home| home.node == self.node);
        entry.record.slices().into_iter().filter_map(own).map(|home| home.core).collect()
    }

    fn update(&self, view: &View, pg: PgId, entry: &PgEntry) -> Option<PgUpdate> {
        Some(PgUpdate {
            pg,
            pool: view.pools().get(&pg.pool)?.clone(),
            record: entry.record.clone(),
            revision: entry.revision,
            members: entry.record.slices().into_iter().filter_map(|slice| view.member(slice)).collect(),
        })
    }
}
