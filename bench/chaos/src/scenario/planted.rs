//! Harm that a cluster cannot survive, to show that the checker sees: `chaos prove`.

use super::Scenario;
use crate::error::ChaosError;
use crate::stage::{Form, Setting, Stage};

fn without_fio(_: &Form) -> Setting {
    Setting { fio: false, ..Setting::default() }
}

/// All disks forget.
pub const ROLLED_BACK: Scenario = Scenario {
    name: "rolled_back",
    about: "all nodes are put back to what they held some writes ago: acknowledged writes are gone",
    needs_links: false,
    setting: without_fio,
    run: rolled_back,
};

fn rolled_back(stage: &mut Stage) -> Result<(), ChaosError> {
    let all: Vec<usize> = (0..stage.rig.nodes()).collect();
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        std::fs::copy(from, to).map_err(ChaosError::io(format!("copy {}", from.display())))
    };
    stage.say("all nodes are killed and their disks copied");
    for &index in &all {
        stage.rig.kill(index)?;
    }
    for &index in &all {
        for file in memory_of(stage, index)? {
            copy(&file, &file.with_extension("old"))?;
        }
    }
    stage.rig.start_nodes(&all)?;
    stage.operations(600)?;
    stage.say("all nodes are killed and the copies put in their disks' places");
    for &index in &all {
        stage.rig.kill(index)?;
    }
    for &index in &all {
        for file in memory_of(stage, index)? {
            copy(&file.with_extension("old"), &file)?;
        }
    }
    stage.rig.start_nodes(&all)?;
    stage.operations(300)
}

/// A node's disk and its metadata: a cluster that remembered more than its disks would refuse them.
fn memory_of(stage: &Stage, index: usize) -> Result<[std::path::PathBuf; 2], ChaosError> {
    Ok([stage.rig.meta(index)?, stage.rig.disk(index)?])
}
