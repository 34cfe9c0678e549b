//! Beyond what redundancy survives: most or all copies are hurt at the same time.
//!
//! Then a cluster may fail to answer, and has to say so. It may never give wrong data, crash, or keep silent
//! about what it cannot serve. What exactly may be read depends on whether anybody could know better, see
//! `Plan::history_holds`.

use crate::check::history::{DATA_MARKER, Did, Place};
use crate::cluster::Cluster;
use crate::workload::{Mode, image_name};
use crate::world::{Over, World};
use client::IoError;
use control::admin;
use placement::pg_of;
use simenv::clock::{MS, SEC};
use simenv::disk::{Contents, Damage, WriteFault};
use simenv::rng::Stream;
use simenv::universe::DiskId;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use wire::{OBJECT_BLOCKS, ObjectId, PgId, SliceId};

/// How long after healing everybody knows the records as they are: a lease's time and some elections.
const HEARD_NS: u64 = 5 * SEC;

/// A kind of blow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Blow {
    /// Data at rest rots or becomes unreadable.
    Rot,
    /// So does anything else that the stores have on their disks: superblocks, logs, pages.
    Structures,
    /// For two seconds, data writes are lost or land elsewhere. No process dies.
    WriteFaults,
    /// Power is cut, and empty disks have taken the place of the old ones when it comes back.
    Empty,
    /// One node loses its power and comes back, after it has been replaced, with what was on its disks at an
    /// earlier moment. Nothing happens to the others.
    OneBack,
    /// The same on most or all nodes at once, each with a moment of its own.
    AllBack,
}

/// What a seed decides about it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What happens.
    pub blow: Blow,
    /// To how many nodes.
    pub nodes: usize,
    /// Share of the blocks that are hit, parts per million.
    pub share_ppm: u32,
    /// When the disks are copied that come back later, after the start of the work.
    pub copied_ns: u64,
    /// When it happens, after the start of the work.
    pub at_ns: u64,
    /// How long nodes stay away.
    pub away_ns: u64,
}

impl Plan {
    /// What a seed decides, for so many nodes.
    pub fn draw(seed: u64, nodes: usize) -> Self {
        let mut rng = Stream::new(seed, "beyond");
        let blow = rng.weighted(
            (3, Blow::Rot),
            &[
                (3, Blow::Structures),
                (2, Blow::WriteFaults),
                (3, Blow::Empty),
                (3, Blow::OneBack),
                (2, Blow::AllBack),
            ],
        );
        let at_ns = rng.between(3, 6) * SEC + rng.below(SEC);
        Self {
            blow,
            nodes: if blow == Blow::OneBack {
                1
            } else {
                rng.between(nodes as u64 / 2 + 1, nodes as u64) as usize
            },
            share_ppm: rng.weighted((1, 1_000_000), &[(2, 300_000), (2, 30_000)]),
            copied_ns: rng.between(SEC / 2, at_ns - SEC),
            at_ns,
            // Longer than it takes to notice and to replace it: see `history_holds`.
            away_ns: rng.between(4, 6) * SEC,
        }
    }

    /// Whether clients must still find a history that one register could have had.
    ///
    /// Checksums tell rot, lost and misdirected writes from data, an empty disk has no superblock, and a copy
    /// that was replaced while it was away is not trusted when it is back: right data, or an error.
    ///
    /// Two things nobody can know. A disk that is whole and from an earlier moment looks like one on which
    /// nothing was written since; when no copy that went on is left to ask, or it is not asked because the
    /// record still trusts the old one, then old data is what there is. And the last commits of a log that
    /// have rotted look like a log that ended earlier. What is read then is still some client's write to this
    /// very place, or the zeroes before it.
    pub fn history_holds(&self) -> bool {
        !matches!(self.blow, Blow::Structures | Blow::AllBack)
    }

    /// Whether clients may be told of device errors and checksums.
    pub fn hurts_media(&self) -> bool {
        matches!(self.blow, Blow::Rot | Blow::Structures | Blow::WriteFaults)
    }
}

/// What the blow needs to know while the run goes on.
pub struct Beyond {
    plan: Plan,
    rng: Stream,
    /// The nodes that are hit.
    hit: Vec<usize>,
    copies: BTreeMap<DiskId, Contents>,
    until_ns: u64,
    /// Blocks hurt.
    pub hurt: u64,
}

/// Harness tags.
pub const COPY: u64 = 10;
/// See `COPY`.
pub const HIT: u64 = 11;
/// For how long writes go wrong, and how often one does.
const WRITE_FAULTS_NS: u64 = 2 * SEC;
const WRITE_FAULT_EVERY_NS: u64 = 50 * MS;
/// Writes of blocks that a block must have outlived before it rots. What is younger may be the end of a log.
const REST_BLOCKS: u64 = 300;
/// When not all PGs are clean, a blow to one node alone waits this long.
const PATIENCE_NS: u64 = 200 * MS;
/// From the healing of what can be healed to a state that lasts.
const CONVERGE_LIMIT_NS: u64 = 60 * SEC;
/// For reading every image once, with operations that give up.
const READ_BACK_LIMIT_NS: u64 = 400 * SEC;
/// When the operations of that give up.
const GIVE_UP_MS: u64 = 1_500;

impl Beyond {
    /// The blow of a seed.
    pub fn new(seed: u64, plan: Plan, nodes: usize) -> Self {
        let mut rng = Stream::new(seed, "blow");
        let mut hit: Vec<usize> = (0..nodes).collect();
        rng.shuffle(&mut hit);
        hit.truncate(plan.nodes);
        Self { plan, rng, hit, copies: BTreeMap::new(), until_ns: 0, hurt: 0 }
    }

    fn disks(&self, cluster: &Cluster) -> Vec<DiskId> {
        self.hit.iter().filter_map(|at| cluster.nodes.get(*at)).flat_map(|node| node.disks.clone()).collect()
    }

    /// Slices that have lost something for good.
    fn lost(&self, cluster: &Cluster) -> BTreeSet<SliceId> {
        let disks = self.disks(cluster);
        // An old disk is whole, and refused all the same when the cluster remembers a younger generation of it.
        let lost = cluster.slices().into_iter().filter(|(disk, _)| disks.contains(disk));
        lost.map(|(_, entry)| entry.slice).collect()
    }

    fn rot(&mut self, cluster: &mut Cluster, any_kind: bool) {
        for id in self.disks(cluster) {
            let Some(disk) = cluster.universe.disks.get_mut(id) else { continue };
            let blocks = match any_kind {
                true => disk.resting_blocks_of_any_kind(REST_BLOCKS),
                false => disk.resting_blocks(DATA_MARKER, REST_BLOCKS),
            };
            for block in blocks {
                if !self.rng.chance(self.plan.share_ppm) {
                    continue;
                }
                let damage = self
                    .rng
                    .weighted((2, Damage::BitRot), &[(1, Damage::Unreadable), (1, Damage::ZeroedSector)]);
                self.hurt += u64::from(disk.damage(block, damage));
            }
        }
    }

    fn misplace(&mut self, cluster: &mut Cluster) {
        for id in self.disks(cluster) {
            let Some(disk) = cluster.universe.disks.get_mut(id) else { continue };
            let to = self.rng.pick(&disk.resting_blocks(DATA_MARKER, REST_BLOCKS)).copied();
            let fault = match to {
                Some(to) if self.rng.coin() => WriteFault::Misdirected { to },
                _ => WriteFault::Lost,
            };
            disk.arm(fault, DATA_MARKER);
            self.hurt += 1;
        }
    }

    fn copy(&mut self, cluster: &Cluster) {
        for id in self.disks(cluster) {
            // Not all of the same moment: each is written by a process of its own.
            if let Some(disk) = cluster.universe.disks.get(id)
                && (!self.copies.contains_key(&id) || self.rng.coin())
            {
                self.copies.insert(id, disk.contents());
            }
        }
    }

    fn cut_power(&mut self, cluster: &mut Cluster) {
        for at in self.hit.clone() {
            cluster.power_off(at);
        }
        for id in self.disks(cluster) {
            let Some(disk) = cluster.universe.disks.get_mut(id) else { continue };
            match self.copies.get(&id).filter(|_| self.plan.blow != Blow::Empty) {
                Some(copy) => disk.put_back(copy),
                None => disk.exchange_for_empty(),
            }
            self.hurt += 1;
        }
    }
}

impl fmt::Display for Beyond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on {} nodes: {} hurt", self.plan.blow, self.hit.len(), self.hurt)
    }
}

impl World {
    /// Sees to it that the blow comes when it is due.
    pub(crate) fn prepare_blow(&mut self) {
        let now = self.cluster.universe.now;
        let Some(beyond) = &mut self.beyond else { return };
        let plan = &beyond.plan;
        beyond.until_ns = now + plan.at_ns + WRITE_FAULTS_NS;
        self.cluster.universe.call_at(now + plan.copied_ns, COPY);
        // A second time, which some disks take.
        self.cluster.universe.call_at(now + (plan.copied_ns + plan.at_ns) / 2, COPY);
        self.cluster.universe.call_at(now + plan.at_ns, HIT);
    }

    /// One of the times of `prepare_blow` has come.
    pub(crate) fn blow(&mut self, tag: u64) {
        let Some(mut beyond) = self.beyond.take() else { return };
        let now = self.cluster.universe.now;
        match (tag, beyond.plan.blow) {
            (COPY, Blow::OneBack | Blow::AllBack) => beyond.copy(&self.cluster),
            (HIT, _) if self.is_healing() => {}
            (HIT, Blow::Rot) => beyond.rot(&mut self.cluster, false),
            (HIT, Blow::Structures) => beyond.rot(&mut self.cluster, true),
            (HIT, Blow::WriteFaults) => {
                beyond.misplace(&mut self.cluster);
                if now < beyond.until_ns {
                    self.cluster.universe.call_at(now + WRITE_FAULT_EVERY_NS, HIT);
                }
            }
            (HIT, Blow::OneBack) if self.unclean().is_some() => {
                // Another copy that is behind, and the old one would be the best there is.
                self.cluster.universe.call_at(now + PATIENCE_NS, HIT);
            }
            (HIT, Blow::Empty | Blow::OneBack | Blow::AllBack) => {
                beyond.cut_power(&mut self.cluster);
                for &node in &beyond.hit {
                    self.nemesis.will_revive(now + beyond.plan.away_ns, node);
                }
            }
            _ => {}
        }
        if self.nemesis.is_verbose() {
            let stamp = simenv::trace::stamp(now);
            eprintln!(
                "{stamp} blow {tag}: {:?} on nodes {:?}, {} hurt",
                beyond.plan.blow, beyond.hit, beyond.hurt
            );
        }
        self.beyond = Some(beyond);
    }

    /// What comes after the work and its faults: what can be healed is healed, and the cluster must come to
    /// rest, say what it has lost, and answer for the rest.
    pub(crate) fn end_beyond(&mut self) -> Result<(), Over> {
        self.nemesis.heal_all_but_disks(&mut self.cluster);
        self.revive_all();
        self.cluster.desk.mode.set(Mode::Drain);
        // The board hears of things through a node that may only just have woken.
        let heard = self.cluster.universe.now + HEARD_NS;
        self.wait(CONVERGE_LIMIT_NS, |cluster| {
            if cluster.universe.now < heard {
                return Some("news".to_owned());
            }
            let busy: usize = cluster.desk.busy.borrow().iter().sum();
            let unclean = || cluster.board.borrow().unclean(cluster.options.pg_count as usize);
            if busy > 0 { Some(format!("{busy} operations")) } else { unclean() }
        })?;
        self.judge_silence()?;
        for index in 0..self.cluster.clients.len() {
            self.cluster.kill_client(index);
        }
        self.cluster.patience_ms = Some(GIVE_UP_MS);
        let began = self.cluster.desk.history.borrow().now();
        for index in 0..self.cluster.clients.len() {
            self.cluster.start_client(index);
        }
        self.read_back(READ_BACK_LIMIT_NS)?;
        self.judge_unread()?;
        self.judge_clean_replicas()?;
        let Some(plan) = self.beyond.as_ref().map(|beyond| beyond.plan.clone()) else { return Ok(()) };
        if plan.history_holds() {
            self.judge_history();
        } else if plan.blow == Blow::AllBack {
            self.judge_rest(began);
        }
        if self.violations.is_empty() { Ok(()) } else { Err(Over) }
    }

    /// PGs that are not clean, and why.
    pub(crate) fn unclean_pgs(&self) -> BTreeMap<PgId, String> {
        self.cluster.board.borrow().unclean_pgs()
    }

    fn pgs_of(&self, place: Place, blocks: u64) -> Vec<PgId> {
        let Ok(image) = admin::image_id(&self.keys(), &image_name(place.image)) else { return Vec::new() };
        let pools = self.cluster.board.borrow().pools();
        let Some(pool) = pools.first() else { return Vec::new() };
        let per = OBJECT_BLOCKS as u64;
        let objects = place.block / per..=(place.block + blocks.max(1) - 1) / per;
        objects.map(|index| pg_of(ObjectId { pool: pool.id, image, index }, pool.pg_count)).collect()
    }

    /// Whatever is not answered, and every PG that is not clean, must have a reason that can be seen.
    fn judge_silence(&mut self) -> Result<(), Over> {
        let unclean = self.unclean_pgs();
        let records = self.cluster.board.borrow().pgs();
        let lost = self.beyond.as_ref().map(|beyond| beyond.lost(&self.cluster)).unwrap_or_default();
        for (pg, why) in &unclean {
            let record = records.iter().find(|(other, _)| other == pg).map(|(_, record)| record);
            let touched = record.is_none_or(|record| record.slices().iter().any(|s| lost.contains(s)));
            if !touched {
                self.violations.push(format!("beyond: no disk of PG {pg} is lost, and yet: {why}"));
            }
        }
        let stuck: Vec<(Place, u64)> = self.cluster.desk.open_ops.borrow().values().copied().collect();
        for (place, blocks) in stuck {
            if !self.pgs_of(place, blocks).iter().any(|pg| unclean.contains_key(pg)) {
                self.violations.push(format!(
                    "beyond: an operation on {place}+{blocks} has no answer, and its PG is reported as clean"
                ));
            }
        }
        if self.violations.is_empty() { Ok(()) } else { Err(Over) }
    }

    /// Reads that failed at the end.
    fn judge_unread(&mut self) -> Result<(), Over> {
        let unclean = self.unclean_pgs();
        let media = self.beyond.as_ref().is_some_and(|beyond| beyond.plan.hurts_media());
        let unread = std::mem::take(&mut *self.cluster.desk.unread.borrow_mut());
        self.unread = unread.len() as u64;
        for (place, blocks, error) in unread {
            let explained = match error {
                IoError::TimedOut => self.pgs_of(place, blocks).iter().any(|pg| unclean.contains_key(pg)),
                IoError::Device | IoError::Corrupt => media,
                _ => false,
            };
            if !explained {
                self.violations
                    .push(format!("beyond: reading {place}+{blocks}: {error}, for no known reason"));
            }
        }
        if self.violations.is_empty() { Ok(()) } else { Err(Over) }
    }

    /// What is said to be clean must be equal everywhere.
    fn judge_clean_replicas(&mut self) -> Result<(), Over> {
        let unclean = self.unclean_pgs();
        self.judge_replicas(|pg| !unclean.contains_key(&pg));
        if self.violations.is_empty() { Ok(()) } else { Err(Over) }
    }

    /// Old data or not: what nobody changes must not change.
    fn judge_rest(&mut self, since: u64) {
        let history = self.cluster.desk.history.borrow();
        for (place, ops) in history.blocks() {
            let mut seen = BTreeSet::new();
            for op in ops.iter().filter(|op| op.start > since) {
                if let Did::Read(value) = op.did {
                    seen.insert(value);
                }
            }
            if seen.len() > 1 {
                self.violations.push(format!("beyond: {place} reads as {seen:?} and nobody writes it"));
                return;
            }
        }
    }
}
