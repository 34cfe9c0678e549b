//! The checkers that look at a whole cluster at the end of a run.

use crate::check::history::show;
use crate::check::linear::{Verdict, judge};
use crate::check::replicas;
use crate::cluster::Cluster;
use crate::world::{ENOUGH, META_LIMIT_NS, Over, RANGE_LIMIT, World};
use placement::PgRecord;
use std::collections::{BTreeMap, BTreeSet};
use wire::control::{MetaReply, MetaRequest};
use wire::{PgId, Revision, SliceId};

impl World {
    /// The watch's view and a linearizable read of everything must agree.
    pub(crate) fn judge_metadata(&mut self) -> Result<(), Over> {
        let mut why = String::new();
        for _ in 0..20 {
            let answer = self.ask(MetaRequest::Range { prefix: "/".to_owned(), limit: RANGE_LIMIT })?;
            let (revision, items) = match answer {
                Ok(MetaReply::Range { revision, items, more: false }) => (revision, items),
                other => {
                    why = format!("{other:?}").chars().take(200).collect();
                    continue;
                }
            };
            self.until(META_LIMIT_NS, "the watch's arrival at the read's revision", |cluster| {
                let seen = cluster.board.borrow().revision;
                // Ephemeral keys move on all the time; the persistent ones have come to rest.
                (seen < revision && !agrees(cluster, &items, Revision(u64::MAX)))
                    .then(|| format!("at {seen} of {revision}"))
            })?;
            if agrees(&self.cluster, &items, revision) {
                return Ok(());
            }
            why = "keys differ".to_owned();
        }
        self.violations.push(format!("metadata: the watch and a read of all keys never agreed: {why}"));
        Err(Over)
    }

    /// What no disk has damaged, no scrub may call bad.
    pub(crate) fn judge_scrubs(&mut self) {
        let (_, bad) = self.cluster.scrubbed();
        let faults = self.cluster.options.faults;
        if bad > 0 && faults.damage == 0 && faults.write_fault == 0 {
            self.violations.push(format!("scrub: {bad} copies were called bad and no disk is"));
        }
    }

    /// The members of each of these PGs must be equal, and nothing of them may lie anywhere else once what was left
    /// behind has been erased.
    pub(crate) fn judge_replicas(&mut self, of: impl Fn(PgId) -> bool) {
        let pgs: Vec<(PgId, PgRecord)> =
            self.cluster.board.borrow().pgs().into_iter().filter(|(pg, _)| of(*pg)).collect();
        let swept = self.cluster.options.move_every_ns > 0;
        let members: BTreeSet<SliceId> =
            pgs.iter().flat_map(|(_, record)| record.acting.iter().copied()).collect();
        let slices: BTreeMap<_, _> = self
            .cluster
            .slices()
            .into_iter()
            .filter(|(_, entry)| swept || members.contains(&entry.slice))
            .filter_map(|(disk, entry)| {
                let disk = self.cluster.universe.disks.get(disk)?;
                Some((entry.slice, replicas::contents_of(disk, entry.geometry(), self.scrubbed)))
            })
            .collect();
        simenv::trace::set_log_time(self.cluster.universe.now);
        let pools = self.cluster.board.borrow().pools();
        let pg_count = |id| pools.iter().find(|pool| pool.id == id).map_or(1, |pool| pool.pg_count);
        let mut wrong = replicas::compare(&slices, &pgs, |pg| pg_count(pg.pool));
        if swept {
            wrong.extend(replicas::strays(&slices, &pgs, pg_count));
        }
        self.violations.extend(wrong.into_iter().map(|text| format!("replicas: {text}")).take(ENOUGH));
    }

    /// Every block must have had a history that one register could have had.
    pub(crate) fn judge_history(&mut self) {
        let history = self.cluster.desk.history.borrow();
        let mut undecided = 0;
        for (place, ops) in history.blocks() {
            match judge(place, &ops, &history.memory) {
                Verdict::Legal => {}
                Verdict::Illegal(why) => {
                    self.violations.push(format!("linearizability: {why}"));
                    if self.violations.len() >= ENOUGH {
                        return;
                    }
                }
                Verdict::Undecided => {
                    undecided += 1;
                    if undecided == 1 && self.nemesis.is_verbose() {
                        eprintln!("undecided: {place}\n{}", show(&ops));
                    }
                }
            }
        }
        self.undecided = undecided;
    }
}

/// Whether the watch has the same persistent keys as a read gave, none of them newer than `revision`.
fn agrees(cluster: &Cluster, items: &[wire::control::KeyValue], revision: Revision) -> bool {
    let board = cluster.board.borrow();
    let read = items.iter().filter(|item| item.lease.is_none());
    let seen = board.keys.values().filter(|item| item.lease.is_none());
    board.keys.values().filter(|item| item.lease.is_none()).all(|item| item.mod_revision <= revision)
        && read.eq(seen)
}
