//! Processes that are killed, paused and stopped.

use super::{Scenario, usual};
use crate::error::ChaosError;
use crate::load::Sharing;
use crate::rig::POOL;
use crate::stage::{Form, Setting, Stage};
use cli::deadline::Deadline;
use std::time::Duration;

/// Longest time for the metadata group to take a change while one voter is down.
const META_LIMIT: Duration = Duration::from_secs(20);

/// Every node is killed once per round, in random order.
pub const HEAL: Scenario = Scenario {
    name: "heal",
    about: "every node is killed in turn and comes back",
    needs_links: false,
    setting: usual,
    run: heal,
};

fn heal(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let mut order: Vec<usize> = (0..stage.rig.nodes()).collect();
        stage.rng.shuffle(&mut order);
        for victim in order {
            stage.say(&format!("node {} is killed", victim + 1));
            stage.rig.kill(victim)?;
            stage.operations(200)?;
            stage.hold_between(0, 1000)?;
            stage.rig.start_nodes(&[victim])?;
            stage.rig.wait_clean()?;
        }
    }
    Ok(())
}

/// A primary is paused until others have replaced it and written; then it wakes.
pub const SPLITBRAIN: Scenario = Scenario {
    name: "splitbrain",
    about: "a primary is paused, replaced, and wakes among its successors' writes",
    needs_links: false,
    setting: usual,
    run: splitbrain,
};

fn splitbrain(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let victim = stage.rig.some_primary(&mut stage.rng)?;
        stage.say(&format!("node {} is paused until it is replaced", victim + 1));
        stage.rig.pause(victim)?;
        stage.rig.wait_replaced(victim)?;
        stage.operations(400)?;
        stage.rig.resume(victim)?;
        stage.operations(400)?;
        stage.rig.wait_clean()?;
        // Pauses about as long as a lease: some are noticed, some not, some while they end.
        for _ in 0..2 {
            let victim = stage.rig.some_primary(&mut stage.rng)?;
            let pause = stage.rng.between(400, 1800);
            stage.say(&format!("node {} is paused for {pause} ms", victim + 1));
            stage.rig.pause(victim)?;
            stage.rig.hold(Duration::from_millis(pause))?;
            stage.rig.resume(victim)?;
            stage.operations(200)?;
        }
        stage.rig.wait_clean()?;
    }
    Ok(())
}

fn single_writers(_: &Form) -> Setting {
    let mut setting = Setting::default();
    setting.load.sharing = Sharing::OwnBlocks;
    setting
}

/// All nodes die at the same moment.
pub const POWER: Scenario = Scenario {
    name: "power",
    about: "all nodes are killed at once and started again, together and one after the other",
    needs_links: false,
    setting: single_writers,
    run: power,
};

fn power(stage: &mut Stage) -> Result<(), ChaosError> {
    let mut order: Vec<usize> = (0..stage.rig.nodes()).collect();
    for round in 0..stage.form.rounds().max(2) {
        stage.rng.shuffle(&mut order);
        stage.say("all nodes are killed");
        for &index in &order {
            stage.rig.kill(index)?;
        }
        if round % 2 == 0 {
            stage.rig.start_nodes(&order)?;
        } else {
            for &index in &order {
                stage.rig.spawn(index)?;
                stage.hold_between(0, 1500)?;
            }
        }
        stage.operations(300)?;
        stage.rig.wait_clean()?;
    }
    Ok(())
}

/// Every node is stopped cleanly and started again.
pub const ROLLING_RESTART: Scenario = Scenario {
    name: "rolling_restart",
    about: "every node is stopped cleanly in turn and started again",
    needs_links: false,
    setting: usual,
    run: rolling_restart,
};

fn rolling_restart(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let mut order: Vec<usize> = (0..stage.rig.nodes()).collect();
        stage.rng.shuffle(&mut order);
        for victim in order {
            stage.say(&format!("node {} is restarted", victim + 1));
            stage.rig.stop_node(victim)?;
            stage.operations(100)?;
            stage.rig.start_nodes(&[victim])?;
            stage.rig.wait_clean()?;
        }
    }
    Ok(())
}

fn five_voters(_: &Form) -> Setting {
    let mut setting = Setting::default();
    (setting.rig.nodes, setting.rig.voters) = (5, 5);
    setting
}

/// Metadata voters die one after the other, the leader each time.
pub const CONTROL_PLANE: Scenario = Scenario {
    name: "control_plane",
    about: "the metadata group's leader is killed again and again; changes of metadata go on",
    needs_links: false,
    setting: five_voters,
    run: control_plane,
};

fn control_plane(stage: &mut Stage) -> Result<(), ChaosError> {
    for round in 0..stage.form.rounds() * 3 {
        let victim = stage.rig.meta_leader()?;
        stage.say(&format!("node {}, the leader, is killed", victim + 1));
        stage.rig.kill(victim)?;
        change_metadata(stage, &format!("extra{round}"))?;
        stage.operations(100)?;
        stage.rig.start_nodes(&[victim])?;
        // Two members of one placement group must not be away at once: two of five voters may.
        stage.rig.wait_clean()?;
    }
    Ok(())
}

fn change_metadata(stage: &mut Stage, image: &str) -> Result<(), ChaosError> {
    let deadline = Deadline::after(META_LIMIT);
    // The outcome of a try can be unknown when its node dies: then the image exists already.
    loop {
        match stage.rig.command(&["image", "create", image, "--pool", POOL, "--size", "1MiB"]) {
            Ok(_) => return Ok(()),
            Err(error) if error.to_string().contains("exists already") => return Ok(()),
            Err(error) if deadline.passed() => return Err(error),
            Err(error) => stage.say(&format!("once more: {error}")),
        }
    }
}

/// One host is away for long, and while it recovers another goes.
pub const DEGRADED_HOST: Scenario = Scenario {
    name: "degraded_host",
    about: "a whole host is away for many writes; another is killed while it recovers",
    needs_links: false,
    setting: usual,
    run: degraded_host,
};

fn degraded_host(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let mut order: Vec<usize> = (0..stage.rig.nodes()).collect();
        stage.rng.shuffle(&mut order);
        let &[first, second, ..] = order.as_slice() else { return Ok(()) };
        stage.say(&format!("node {} is killed and stays away", first + 1));
        stage.rig.kill(first)?;
        stage.operations(if stage.form.short { 1500 } else { 6000 })?;
        stage.rig.start_nodes(&[first])?;
        stage.hold_between(0, 300)?;
        stage.say(&format!("node {} is killed while it recovers", second + 1));
        stage.rig.kill(second)?;
        stage.hold_between(500, 2500)?;
        stage.rig.start_nodes(&[second])?;
        stage.operations(200)?;
        stage.rig.wait_clean()?;
    }
    Ok(())
}

fn one_copy_is_enough(_: &Form) -> Setting {
    let mut setting = single_writers(&Form { short: true, oversubscribed: Duration::ZERO });
    setting.rig.min_copies = Some(1);
    // The last copy alone must not be the last voter too: metadata needs its majority elsewhere.
    (setting.rig.nodes, setting.rig.voters) = (5, 3);
    setting
}

/// A pool that serves with one copy.
pub const MINSIZE_1: Scenario = Scenario {
    name: "minsize_1",
    about: "two of three copies are killed and one serves; it dies, and older copies must not serve instead",
    needs_links: false,
    setting: one_copy_is_enough,
    run: minsize_1,
};

fn minsize_1(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        // Of nodes 1 to 5 the first three vote. 4, 5 and one voter are killed: groups on all three lose
        // every copy that had the last writes.
        let voter = stage.rng.below(3) as usize;
        let (mut first, last) = (vec![3, voter], 4);
        stage.rng.shuffle(&mut first);
        for &victim in &first {
            stage.say(&format!("node {} is killed", victim + 1));
            stage.rig.kill(victim)?;
            stage.operations(200)?;
        }
        stage.say(&format!("node {} is killed, the others come back", last + 1));
        stage.rig.kill(last)?;
        stage.rig.start_nodes(&first)?;
        stage.hold_between(500, 2500)?;
        stage.rig.start_nodes(&[last])?;
        stage.operations(300)?;
        stage.rig.wait_clean()?;
    }
    Ok(())
}
