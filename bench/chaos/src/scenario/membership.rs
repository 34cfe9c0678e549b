//! Nodes and disks that come and go for good, and images that are removed meanwhile.

use super::{Scenario, usual};
use crate::error::ChaosError;
use crate::rig::POOL;
use crate::stage::{Form, Setting, Stage};
use placement::{NodeStats, PgRecord, key};
use wire::SliceId;

/// A node comes back with an empty disk.
pub const NEW_DISK: Scenario = Scenario {
    name: "new_disk",
    about: "a node dies and comes back with a new, empty disk",
    needs_links: false,
    setting: usual,
    run: new_disk,
};

fn new_disk(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let victim = stage.rng.below(stage.rig.nodes() as u64) as usize;
        stage.say(&format!("node {} is killed and gets a new disk", victim + 1));
        stage.rig.kill(victim)?;
        stage.operations(200)?;
        stage.rig.replace_disk(victim)?;
        stage.rig.start_nodes(&[victim])?;
        wait_member(stage, victim)?;
        stage.rig.wait_clean()?;
    }
    Ok(())
}

/// Waits until a node is a member of some placement group.
fn wait_member(stage: &mut Stage, index: usize) -> Result<(), ChaosError> {
    let own = stage.rig.slices(index)?;
    let holds = move |record: &PgRecord| record.acting.iter().any(|slice: &SliceId| own.contains(slice));
    stage.rig.wait_until(&format!("data to move to node {}", index + 1), |rig| {
        Ok(rig.records()?.values().any(&holds))
    })
}

fn many_pgs(form: &Form) -> Setting {
    let mut setting = Setting::default();
    setting.rig.pgs = if form.short { 128 } else { 256 };
    setting
}

/// A fourth node takes its share of many placement groups.
pub const ADD_OSD: Scenario = Scenario {
    name: "add_osd",
    about: "a fourth node joins a pool with many placement groups and takes its share",
    needs_links: false,
    setting: many_pgs,
    run: add_osd,
};

fn add_osd(stage: &mut Stage) -> Result<(), ChaosError> {
    let fourth = stage.rig.add()?;
    stage.say("a fourth node joins");
    stage.rig.start_nodes(&[fourth])?;
    wait_member(stage, fourth)?;
    stage.operations(200)?;
    stage.rig.wait_clean()?;
    wait_share(stage, fourth)
}

/// Waits until a node is in sync in at least half of the share that is due to it.
fn wait_share(stage: &mut Stage, index: usize) -> Result<(), ChaosError> {
    let own = stage.rig.slices(index)?;
    let nodes = stage.rig.nodes();
    stage.rig.wait_until(&format!("node {} to have its share", index + 1), |rig| {
        let records = rig.records()?;
        let has = |record: &&PgRecord| record.in_sync.iter().any(|slice| own.contains(slice));
        let share = records.values().map(|record| record.target.len()).sum::<usize>() / nodes;
        Ok(records.values().filter(has).count() * 2 >= share)
    })
}

/// The fourth node dies in the middle of taking its share.
pub const INTERRUPTED_REBALANCE: Scenario = Scenario {
    name: "interrupted_rebalance",
    about: "a fourth node joins and is killed in the middle of it, and so is one that gives data away",
    needs_links: false,
    setting: many_pgs,
    run: interrupted_rebalance,
};

fn interrupted_rebalance(stage: &mut Stage) -> Result<(), ChaosError> {
    let fourth = stage.rig.add()?;
    stage.say("a fourth node joins");
    stage.rig.start_nodes(&[fourth])?;
    wait_member(stage, fourth)?;
    for round in 0..stage.form.rounds() + 1 {
        let giver = stage.rng.below(3) as usize;
        let victim = if round % 2 == 0 { fourth } else { giver };
        stage.hold_between(0, 300)?;
        stage.say(&format!("node {} is killed in the middle of it", victim + 1));
        stage.rig.kill(victim)?;
        stage.operations(100)?;
        stage.rig.start_nodes(&[victim])?;
    }
    stage.rig.wait_clean()?;
    wait_share(stage, fourth)
}

/// An image is removed while a node is away.
pub const RM_DEGRADED: Scenario = Scenario {
    name: "rm_degraded",
    about: "an image is removed while a node is away, and stays removed when the node is back",
    needs_links: false,
    setting: usual,
    run: rm_degraded,
};

const DOOMED: &str = "doomed";
const DOOMED_BYTES: u64 = 32 << 20;

fn rm_degraded(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let size = DOOMED_BYTES.to_string();
        stage.rig.command(&["image", "create", DOOMED, "--pool", POOL, "--size", &size])?;
        write_all(stage)?;
        let victim = stage.rng.below(stage.rig.nodes() as u64) as usize;
        stage.rig.wait_clean()?;
        stage.say(&format!("node {} is killed, image {DOOMED} is removed", victim + 1));
        stage.rig.kill(victim)?;
        stage.rig.command(&["image", "rm", DOOMED])?;
        stage.operations(200)?;
        stage.rig.start_nodes(&[victim])?;
        stage.rig.wait_clean()?;
        // Objects of the living images are the same on every copy; a slice with more has kept dead ones.
        stage.rig.wait_until("every copy to have the same objects", |rig| {
            let alive = cli::health::ClusterStatus::read(&mut rig.admin)?.pgs.objects;
            let held: u64 = rig
                .admin
                .list::<NodeStats>(key::STATS)?
                .iter()
                .flat_map(|stats| stats.slices.values().map(|slice| slice.objects))
                .sum();
            Ok(held == 3 * alive)
        })?;
        read_zeroes(stage)?;
    }
    Ok(())
}

fn write_all(stage: &mut Stage) -> Result<(), ChaosError> {
    let (mut at, image) = (0, stage.rig.admin.open(DOOMED, client::OpenMode::ReadWrite)?);
    while at < DOOMED_BYTES {
        let bytes = vec![0xa5; 1 << 20];
        let buf = reactor::IoBuf::copy_of(&bytes)
            .map_err(|error| ChaosError::Demand(format!("no memory: {error}")))?;
        let op = client::Op::Write { offset: at, buf };
        let refused = |(error, _)| ChaosError::Demand(format!("write image {DOOMED}: {error}"));
        stage.rig.admin.submit(image, op, at).map_err(refused)?;
        let done = stage.rig.admin.next_io()?;
        done.result.map_err(|error| ChaosError::Demand(format!("write image {DOOMED}: {error}")))?;
        at += 1 << 20;
    }
    Ok(())
}

/// A new image of the same name must not show the old one's contents.
fn read_zeroes(stage: &mut Stage) -> Result<(), ChaosError> {
    let size = DOOMED_BYTES.to_string();
    stage.rig.command(&["image", "create", DOOMED, "--pool", POOL, "--size", &size])?;
    let path = stage.rig.dir().join("doomed");
    let file = path.display().to_string();
    stage.rig.command(&["image", "export", DOOMED, &file, "--force"])?;
    let bytes = std::fs::read(&path).map_err(ChaosError::io(format!("read {file}")))?;
    if bytes.len() as u64 != DOOMED_BYTES || bytes.iter().any(|byte| *byte != 0) {
        return Err(ChaosError::Demand("a new image shows a removed one's contents".into()));
    }
    stage.rig.command(&["image", "rm", DOOMED])?;
    Ok(())
}

/// A node gives all its data away and is stopped.
pub const DRAIN: Scenario = Scenario {
    name: "drain",
    about: "a fourth node joins, an older one is drained and stopped",
    needs_links: false,
    setting: usual,
    run: drain,
};

fn drain(stage: &mut Stage) -> Result<(), ChaosError> {
    if !stage.rig.has_command(&["node", "drain"]) {
        return Err(ChaosError::Impossible("this version has no `drystone node drain`".into()));
    }
    let fourth = stage.rig.add()?;
    stage.rig.start_nodes(&[fourth])?;
    stage.rig.wait_clean()?;
    let victim = stage.rng.below(3) as usize;
    stage.say(&format!("node {} is drained", victim + 1));
    stage.rig.command(&["node", "drain", &(victim + 1).to_string()])?;
    let own = stage.rig.slices(victim)?;
    stage.rig.wait_until("it to hold nothing", |rig| {
        let has = |record: &PgRecord| record.acting.iter().any(|slice| own.contains(slice));
        Ok(!rig.records()?.values().any(has))
    })?;
    stage.operations(200)?;
    stage.rig.stop_node(victim)?;
    stage.operations(200)?;
    stage.rig.start_nodes(&[victim])?;
    Ok(())
}
