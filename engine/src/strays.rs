//! Strays: objects of PGs that have left a slice. Nothing writes, reads or compares them any more; they only take
//! space until they are erased here.
//!
//! What may go is the control core's to say, because a data core knows nothing of PGs that are not its own: only
//! objects of a PG whose record names other slices and calls all of them in sync, and only once the map is known to
//! be younger than this process (an older one could be of a time before this slice joined, with the last copy of
//! something on it since). Between that word and the erasing a PG may come back: then this core has its record, and
//! leaves it alone. A pass goes over one slice after the other in bounded steps, beside everything else; it is made at
//! start, after PGs have left, and again as long as something could not be erased yet.

use crate::config::{
    ERASE_BUSY_MS, ERASE_COST_BYTES, ERASE_PARALLEL, SCAN_SLOTS_PER_STEP, STRAYS_FIRST_MS,
    STRAYS_RETRY_MAX_MS, STRAYS_RETRY_MS,
};
use crate::core::{DataCore, Life, ticket};
use crate::msg::CoreMsg;
use crate::planted::Bug;
use crate::share::Turn;
use crate::slab::Key;
use crate::slices::SliceLife;
use placement::pg_of;
use reactor::{Env, Mono};
use std::collections::{BTreeMap, BTreeSet};
use store::{ListCursor, ListEntry, Presence, StoreError};
use wire::{ObjectId, PgId, PoolId, SliceId};

/// What may go of a pool on a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Leavings {
    /// Nothing: it cannot be told yet.
    Unknown,
    /// All of it: there was such a pool, and it has been removed.
    PoolRemoved,
    /// What belongs to these PGs.
    Of {
        /// How many PGs the pool has.
        pg_count: u32,
        /// Those whose copies all lie elsewhere and in sync.
        settled: BTreeSet<u32>,
    },
}

/// Where the passes over the core's slices stand.
pub(crate) struct Strays {
    /// When the next one begins, if one has to be made.
    due: Option<Mono>,
    /// How long after a pass that had to leave something the next one is made.
    retry_ms: u64,
    pass: Option<Pass>,
    /// Objects whose erasing is not durable yet.
    erasing: usize,
}

struct Pass {
    /// The slice it has come to, and where in it.
    at: usize,
    cursor: ListCursor,
    /// What was heard about the pools met on this slice.
    heard: BTreeMap<PoolId, Leavings>,
    /// When the control core was asked, if it has not answered: the pass waits.
    asked: Option<Mono>,
    /// Until when it leaves a store alone that has too much to do.
    paused: Mono,
    erased: u64,
    /// Something was met that may not go yet.
    left: bool,
}

/// What a pass does with an object.
enum Verdict {
    /// It belongs here.
    Keep,
    Erase,
    /// It is a stray that may not go yet.
    Later,
    /// The control core has to be asked about its pool first.
    Ask,
}

impl Strays {
    pub(crate) fn new() -> Self {
        Self { due: None, retry_ms: STRAYS_RETRY_MS, pass: None, erasing: 0 }
    }
}

impl DataCore {
    /// Something may have left: a pass is made soon, or once more after the present one.
    pub(crate) fn look_for_strays(&mut self, env: &mut dyn Env) {
        self.strays.retry_ms = STRAYS_RETRY_MS;
        self.next_pass_in(env, STRAYS_FIRST_MS);
    }

    fn next_pass_in(&mut self, env: &mut dyn Env, ms: u64) {
        let at = env.now().plus_ms(ms);
        if self.strays.due.is_none_or(|due| at < due) {
            self.strays.due = Some(at);
            self.metrics.strays_pending.set(1);
            self.wake_at(env, at);
        }
    }

    /// Goes on with the pass under way, a bounded step at a time.
    pub(crate) fn pump_strays(&mut self, env: &mut dyn Env) {
        if self.life != Life::Running {
            return;
        }
        if self.strays.pass.is_none() {
            let Some(due) = self.strays.due else { return };
            if env.now() < due {
                return self.wake_at(env, due);
            }
            self.strays.due = None;
            self.strays.pass = Some(Pass::over(0));
        }
        if self.strays.erasing >= ERASE_PARALLEL || matches!(self.background_turn(env), Turn::Wait(_)) {
            return;
        }
        let Some(mut pass) = self.strays.pass.take() else { return };
        // A question is lost where a core has more to tell than it may keep; housekeeping comes by here.
        pass.asked = pass.asked.filter(|asked| env.now() < asked.plus_ms(STRAYS_RETRY_MS));
        if pass.asked.is_some() {
            self.strays.pass = Some(pass);
            return;
        }
        if env.now() < pass.paused {
            self.wake_at(env, pass.paused);
            self.strays.pass = Some(pass);
            return;
        }
        if pass.at < self.slices.len() {
            self.pass_step(env, &mut pass);
            let goes_on = pass.asked.is_none() && self.strays.erasing < ERASE_PARALLEL;
            self.strays.pass = Some(pass);
            if goes_on {
                self.wake_in(env, 0);
            }
            return;
        }
        if pass.erased > 0 {
            tracing::info!(objects = pass.erased, "erased what placement groups that have left had here");
        }
        if pass.left {
            let ms = self.strays.retry_ms;
            self.strays.retry_ms = (ms * 2).min(STRAYS_RETRY_MAX_MS);
            self.next_pass_in(env, ms);
        } else if self.strays.due.is_none() {
            self.metrics.strays_pending.set(0);
        }
    }

    /// Looks at some slots of the pass's slice, up to the first object that it cannot deal with now.
    fn pass_step(&mut self, env: &mut dyn Env, pass: &mut Pass) {
        let mut found = std::mem::take(&mut self.list_scratch);
        found.clear();
        let (at, from) = (pass.at, pass.cursor);
        let next = match self.slices.get(at) {
            Some(slice) if slice.life == SliceLife::Open => {
                let store = slice.store.as_ref();
                store.and_then(|store| store.list(from, SCAN_SLOTS_PER_STEP as u32, |_| true, &mut found))
            }
            _ => None,
        };
        let done = self.deal_with(env, pass, &found);
        self.list_scratch = found;
        match (done, next) {
            // The same slots once more, when there is an answer or room: what is erased already is not met again.
            (false, _) => {}
            (true, Some(next)) => pass.cursor = next,
            (true, None) => {
                let (erased, left) = (pass.erased, pass.left);
                *pass = Pass { erased, left, ..Pass::over(at + 1) };
            }
        }
    }

    /// False when one of the objects has to wait.
    fn deal_with(&mut self, env: &mut dyn Env, pass: &mut Pass, found: &[ListEntry]) -> bool {
        let Some(slice) = self.slices.get(pass.at).map(|slice| slice.id) else { return true };
        for entry in found {
            match self.stray(slice, &pass.heard, entry.object) {
                Verdict::Keep => {}
                Verdict::Later => pass.left = true,
                Verdict::Ask => {
                    self.tell(CoreMsg::AskLeavings { slice, pool: entry.object.pool });
                    pass.asked = Some(env.now());
                    return false;
                }
                Verdict::Erase if self.strays.erasing >= ERASE_PARALLEL => return false,
                Verdict::Erase => {
                    match self.erase(env, pass.at, entry) {
                        Ok(()) => pass.erased += 1,
                        // A checkpoint makes room in moments.
                        Err(StoreError::Busy) => {
                            pass.paused = env.now().plus_ms(ERASE_BUSY_MS);
                            return false;
                        }
                        // It is met again by a pass of its own, not by this one in a circle.
                        Err(_) => pass.left = true,
                    }
                    self.share.spend(env.now(), ERASE_COST_BYTES);
                }
            }
        }
        true
    }

    fn stray(&self, slice: SliceId, heard: &BTreeMap<PoolId, Leavings>, object: ObjectId) -> Verdict {
        let Some(leavings) = heard.get(&object.pool) else { return Verdict::Ask };
        let (pg, may_go) = match leavings {
            Leavings::Unknown => return Verdict::Later,
            Leavings::PoolRemoved => return Verdict::Erase,
            Leavings::Of { pg_count, settled } => {
                let pg = pg_of(object, *pg_count);
                (pg, settled.contains(&pg.index))
            }
        };
        match self.takes_part(pg, slice) {
            Part::Member if may_go && self.bug(Bug::EraseReturned) => Verdict::Erase,
            Part::Member => Verdict::Keep,
            Part::Leaving => Verdict::Later,
            Part::None if may_go => Verdict::Erase,
            Part::None => Verdict::Later,
        }
    }

    /// Whether a slice of this core is, may be or has just been a member of a PG.
    fn takes_part(&self, pg: PgId, slice: SliceId) -> Part {
        let Some(pg) = self.pg_key(pg).and_then(|key| self.pgs.get(key)) else { return Part::None };
        let Some(update) = &pg.update else { return Part::Leaving };
        if update.record.names(slice) {
            Part::Member
        } else if pg.local(slice).is_some_and(|local| !local.is_idle()) {
            Part::Leaving
        } else {
            Part::None
        }
    }

    fn erase(&mut self, env: &mut dyn Env, at: usize, entry: &ListEntry) -> Result<(), StoreError> {
        let store = self.store(at)?;
        let (object, version) = (entry.object, entry.version);
        if matches!(store.lookup(object), Presence::Live(_)) {
            store.delete(env, Key::NONE.tagged(ticket::NONE), object, version)?;
        }
        store.purge(env, Key::NONE.tagged(ticket::ERASE), object, version)?;
        self.strays.erasing += 1;
        Ok(())
    }

    /// One more is gone for good, or its store has failed: both make room for the next.
    pub(crate) fn erased(&mut self, result: Result<(), StoreError>) {
        self.strays.erasing = self.strays.erasing.saturating_sub(1);
        if result.is_ok() {
            self.metrics.erased.add(1);
        }
    }

    /// The control core's answer.
    pub(crate) fn leavings(&mut self, slice: SliceId, pool: PoolId, leavings: Leavings) {
        let at = self.slice_at(slice);
        let in_use = || self.pgs.iter().any(|(_, pg)| pg.id.pool == pool);
        // The pool's PGs are still being taken down here.
        let too_early = leavings == Leavings::PoolRemoved && in_use();
        let Some(pass) = self.strays.pass.as_mut().filter(|pass| Some(pass.at) == at) else { return };
        pass.asked = None;
        pass.heard.insert(pool, if too_early { Leavings::Unknown } else { leavings });
    }
}

impl Pass {
    fn over(at: usize) -> Self {
        Self {
            at,
            cursor: ListCursor(0),
            heard: BTreeMap::new(),
            asked: None,
            paused: Mono(0),
            erased: 0,
            left: false,
        }
    }
}

/// What a slice of this core is to a PG.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Member,
    /// It is none any more, or not yet, and something is under way all the same.
    Leaving,
    None,
}
