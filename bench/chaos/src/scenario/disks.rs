//! Disks that answer with errors, late, or never. Every node has two; the second one can be made to fail. Of what
//! lies on it copies are made on its host's other disk, while the node goes on.

use super::Scenario;
use crate::error::ChaosError;
use crate::faulty::{Fault, FaultyDisk};
use crate::load::MAGIC;
use crate::rig::{POOL, Rig};
use crate::stage::{Form, Setting, Stage};
use placement::{Live, key};
use std::collections::BTreeSet;
use std::time::Duration;
use wire::{NodeId, SliceId};

/// Time of one operation on a disk that is slow: more than thirty times what its peers need here, which keep their
/// bytes in memory.
const SLOW: Duration = Duration::from_millis(60);
/// Sectors that become unreadable: some of them hold what was overwritten since, and the others are fewer than the
/// read errors that take a slice out.
const BAD_SECTORS: usize = 40;

fn two_disks(_: &Form) -> Setting {
    let mut setting = Setting::default();
    setting.rig.faulty_disks = true;
    setting
}

/// Every operation fails.
pub const EIO_ALL: Scenario = Scenario {
    name: "disk-eio-all",
    about: "every operation of a disk fails: its slices go out, its node and the other disk go on",
    needs_links: true,
    setting: two_disks,
    run: |stage| rounds(stage, Fault::All),
};

/// Writes fail, reads do not.
pub const EIO_WRITES: Scenario = Scenario {
    name: "disk-eio-writes",
    about: "every write of a disk fails, reads go on: its slices go out, its node and the other disk go on",
    needs_links: true,
    setting: two_disks,
    run: |stage| rounds(stage, Fault::Writes),
};

fn impatient(form: &Form) -> Setting {
    let mut setting = two_disks(form);
    setting.rig.flags = &["--disk-timeout", "2"];
    setting
}

/// Operations do not end.
pub const HANG: Scenario = Scenario {
    name: "disk-hang",
    about: "no operation of a disk ends: its slices go out, its node goes on and stops cleanly meanwhile",
    needs_links: true,
    setting: impatient,
    run: |stage| rounds(stage, Fault::Hang),
};

fn rounds(stage: &mut Stage, fault: Fault) -> Result<(), ChaosError> {
    for round in 0..stage.form.rounds() {
        let victim = some_victim(stage)?;
        stage.say(&format!("node {}'s second disk: {fault:?}", victim + 1));
        disk(stage, victim)?.set(fault);
        goes_out(stage, victim)?;
        comes_back(stage, victim, round > 0)?;
    }
    Ok(())
}

fn disk(stage: &Stage, index: usize) -> Result<&FaultyDisk, ChaosError> {
    let lacks = || ChaosError::Demand(format!("node {} has no second disk", index + 1));
    stage.rig.faulty.get(index).ok_or_else(lacks)
}

/// A node whose second disk serves clients.
fn some_victim(stage: &mut Stage) -> Result<usize, ChaosError> {
    let mut order: Vec<usize> = (0..stage.rig.nodes()).collect();
    stage.rng.shuffle(&mut order);
    let records = stage.rig.records()?;
    for index in order {
        let slices = stage.rig.faulty_slices(index)?;
        if records.values().any(|record| record.primary.is_some_and(|slice| slices.contains(&slice))) {
            return Ok(index);
        }
    }
    Err(ChaosError::Demand("no second disk is primary of anything".into()))
}

fn failed(rig: &mut Rig, index: usize) -> Result<BTreeSet<SliceId>, ChaosError> {
    let live = rig.admin.get::<Live>(&key::live(NodeId(index as u64 + 1)))?;
    Ok(live.map(|(live, _)| live.failed.into_iter().collect()).unwrap_or_default())
}

/// The second disk's slices, and no others, go out; it is named; copies are made elsewhere; its node lives.
fn goes_out(stage: &mut Stage, victim: usize) -> Result<(), ChaosError> {
    let bad = stage.rig.faulty_slices(victim)?;
    stage.rig.wait_until("the disk's slices to be given up", |rig| Ok(failed(rig, victim)? == bad))?;
    stage.say("its slices are out");
    stage.operations(400)?;
    stage.rig.wait_clean()?;
    let elsewhere = |rig: &mut Rig| {
        Ok(rig.records()?.values().all(|record| !record.acting.iter().any(|slice| bad.contains(slice))))
    };
    stage.rig.wait_until("all copies to be elsewhere", elsewhere)?;
    stage.say("every placement group is clean without it");
    if failed(&mut stage.rig, victim)? != bad {
        return Err(ChaosError::Demand("slices of the node's other disk have failed".into()));
    }
    let own = stage.rig.slices(victim)?;
    let mut records = stage.rig.records()?.into_values();
    if !records.any(|record| record.acting.iter().any(|slice| own.contains(slice))) {
        return Err(ChaosError::Demand("the node's other disk serves nothing".into()));
    }
    let path = disk(stage, victim)?.path.display().to_string();
    let status = stage.rig.command(&["disk", "ls"])?;
    match status.lines().find(|line| line.contains(&path) && line.contains("FAILED")) {
        Some(line) => {
            stage.say(line.split_once("FAILED").map_or(line, |(_, why)| why).trim_start_matches(": "))
        }
        None => return Err(ChaosError::Demand(format!("`disk ls` does not name the disk:\n{status}"))),
    }
    Ok(())
}

/// The node stops cleanly while its disk is as it is, and starts with one that works. In between the disk may come to
/// life again, with all that it was given.
fn comes_back(stage: &mut Stage, victim: usize, may_be_late: bool) -> Result<(), ChaosError> {
    if may_be_late && stage.rng.percent(50) {
        stage.say("the disk works again, which comes too late");
        disk(stage, victim)?.set(Fault::None);
        stage.operations(200)?;
        let bad = stage.rig.faulty_slices(victim)?;
        if failed(&mut stage.rig, victim)? != bad {
            return Err(ChaosError::Demand("a slice that was given up is back in the same process".into()));
        }
    }
    stage.rig.stop_node(victim)?;
    let disk = disk(stage, victim)?;
    let (refused, held) = (disk.failed(), disk.held());
    disk.set(Fault::None);
    stage.say(&format!("its node has stopped cleanly ({refused} operations failed, {held} never ended)"));
    stage.operations(100)?;
    stage.rig.start_nodes(&[victim])?;
    stage.operations(100)?;
    stage.rig.wait_clean()?;
    stage.say("the disk is back and every placement group is clean");
    Ok(())
}

/// Some sectors cannot be read.
pub const EIO_READS: Scenario = Scenario {
    name: "disk-eio-reads",
    about: "sectors of a disk cannot be read: they are read from other copies, and mended",
    needs_links: true,
    setting: two_disks,
    run: eio_reads,
};

fn eio_reads(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        stage.operations(600)?;
        let victim = some_victim(stage)?;
        let from = stage.rng.below(1000);
        let disk = disk(stage, victim)?;
        let before = disk.failed();
        // Clients' data and not the store's own blocks, which it keeps in memory.
        let spoilt = disk.spoil(BAD_SECTORS, from, |block| block.starts_with(&MAGIC.to_le_bytes()));
        stage.say(&format!("{spoilt} sectors of node {}'s second disk cannot be read", victim + 1));
        stage.operations(400)?;
        stage.rig.command(&["--json", "pg", "scrub", "--deep", "--pool", POOL])?;
        let met = self::disk(stage, victim)?.failed() - before;
        if met == 0 {
            return Err(ChaosError::Demand("nobody has read a bad sector".into()));
        }
        stage.say(&format!("{met} reads have failed"));
        stage.operations(100)?;
        stage.rig.wait_clean()?;
        stage.rig.scrub()?;
        if !failed(&mut stage.rig, victim)?.is_empty() {
            return Err(ChaosError::Demand("a slice went out for a few bad sectors".into()));
        }
        stage.say("a scrub finds nothing any more");
    }
    Ok(())
}

/// A disk that is much slower than the others.
pub const SLOW_DISK: Scenario = Scenario {
    name: "disk-slow",
    about: "a disk is more than thirty times slower than its peers: it is named, and goes out",
    needs_links: true,
    setting: two_disks,
    run: slow,
};

fn slow(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let before = stage.mean_latency(600)?;
        let victim = some_victim(stage)?;
        stage.say(&format!("node {}'s second disk takes {SLOW:?} per operation", victim + 1));
        disk(stage, victim)?.set(Fault::Slow(SLOW));
        let path = disk(stage, victim)?.path.display().to_string();
        stage.rig.wait_until("the disk to be named as slow", |rig| {
            let status = rig.command(&["disk", "ls"])?;
            Ok(status.lines().any(|line| line.contains(&path) && line.contains("slow")))
        })?;
        let during = stage.mean_latency(100)?;
        stage.say(&format!("it is named; an operation takes clients {during:?}, {before:?} before"));
        goes_out(stage, victim)?;
        let after = stage.mean_latency(600)?;
        stage.say(&format!("without it an operation takes {after:?}"));
        if after > before * 4 + Duration::from_millis(5) {
            return Err(ChaosError::Demand(format!("clients wait {after:?}, {before:?} before")));
        }
        comes_back(stage, victim, false)?;
    }
    Ok(())
}
