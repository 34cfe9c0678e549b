//! Pools and disks that are full.

use super::Scenario;
use crate::error::ChaosError;
use crate::load::Tolerance;
use crate::rig::POOL;
use crate::stage::{Form, Setting, Stage};
use client::{IoError, Op, OpenMode};
use placement::{Live, key};
use reactor::IoBuf;
use wire::NodeId;

/// Bytes of one write that fills the pool.
const FILL_BYTES: u64 = 1 << 20;
/// The image that takes all space.
const FILLER: &str = "filler";
const FILLER_BYTES: u64 = 4 << 30;

fn small_disks(_: &Form) -> Setting {
    let mut setting = Setting::default();
    setting.rig.disk_bytes = 384 << 20;
    setting.load.tolerance = Tolerance::NoSpace;
    setting
}

/// The pool is filled to the brim, and emptied again.
pub const ENOSPC: Scenario = Scenario {
    name: "enospc",
    about: "the pool is full: clients get NoSpace and nothing worse, and go on when there is space again",
    needs_links: false,
    setting: small_disks,
    run: enospc,
};

fn enospc(stage: &mut Stage) -> Result<(), ChaosError> {
    // Overwriting needs no new space: fio, which tolerates nothing, must go on throughout.
    stage.fio_wrote_all()?;
    for round in 0..stage.form.rounds() {
        let name = format!("{FILLER}{round}");
        stage.rig.admin.create_image(&name, POOL, FILLER_BYTES)?;
        let written = fill(stage, &name)?;
        stage.say(&format!("the pool is full after {} MiB more", written >> 20));
        stage.operations(500)?;
        stage.say(&format!("{} writes were refused for want of space", stage.timeline.no_space()));
        // A node that starts with a full disk. It lacks what was written meanwhile, and may have no room for it
        // until others give some up.
        let victim = stage.rng.below(stage.rig.nodes() as u64) as usize;
        stage.rig.kill(victim)?;
        stage.operations(200)?;
        stage.rig.start_nodes(&[victim])?;
        stage.operations(200)?;
        stage.rig.command(&["image", "rm", &name])?;
        stage.rig.wait_until("writes to find space again", |rig| {
            let (answered, refused) = (stage.timeline.answered(), stage.timeline.no_space());
            rig.wait_until("answers", |_| Ok(stage.timeline.answered() > answered + 300))?;
            Ok(stage.timeline.no_space() == refused)
        })?;
        stage.say("there is space again");
    }
    Ok(())
}

/// Writes until the pool is full; returns how many bytes found room.
fn fill(stage: &mut Stage, image: &str) -> Result<u64, ChaosError> {
    let image = stage.rig.admin.open(image, OpenMode::ReadWrite)?;
    let mut buf = IoBuf::heap(FILL_BYTES as usize)
        .map_err(|error| ChaosError::Demand(format!("no memory to fill the pool with: {error}")))?;
    let noise = buf.as_mut_slice().unwrap_or(&mut []);
    noise.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&stage.rng.bits().to_le_bytes()));
    for offset in (0..FILLER_BYTES).step_by(FILL_BYTES as usize) {
        stage.rig.check()?;
        let op = Op::Write { offset, buf: buf.clone() };
        stage
            .rig
            .admin
            .submit(image, op, offset)
            .map_err(|(error, _)| ChaosError::Demand(format!("fill the pool: {error}")))?;
        match stage.rig.admin.next_io()?.result {
            Ok(()) => {}
            Err(IoError::NoSpace) => return Ok(offset),
            Err(error) => return Err(ChaosError::Demand(format!("filling the pool: {error}"))),
        }
    }
    Err(ChaosError::Demand(format!("{FILLER_BYTES} bytes did not fill the pool")))
}

fn usual(_: &Form) -> Setting {
    Setting::default()
}

/// A disk whose writes fail.
pub const FULL_DISK: Scenario = Scenario {
    name: "full_disk",
    about: "a disk's writes fail, because the file system of its sparse file is full; others take over",
    needs_links: true,
    setting: usual,
    run: full_disk,
};

fn full_disk(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let victim = stage.rig.some_primary(&mut stage.rng)?;
        let used = stage.rig.disk_used(victim)?;
        stage.say(&format!("node {}'s disk takes nothing new any more", victim + 1));
        stage.rig.limit_disk(victim, used + (256 << 10))?;
        let live = key::live(NodeId(victim as u64 + 1));
        stage.rig.wait_until("a slice of it to be given up", |rig| {
            let found = rig.admin.get::<Live>(&live)?;
            Ok(found.is_some_and(|(live, _)| !live.failed.is_empty()))
        })?;
        stage.operations(400)?;
        stage.say("it is replaced by a larger one with the same contents");
        stage.rig.stop_node(victim)?;
        stage.rig.limit_disk(victim, 4 << 30)?;
        stage.rig.start_nodes(&[victim])?;
        stage.operations(100)?;
        stage.rig.wait_clean()?;
    }
    Ok(())
}
