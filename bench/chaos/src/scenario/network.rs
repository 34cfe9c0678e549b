//! Links that are cut, in one direction or both, and links that are slow.

use super::{Scenario, usual};
use crate::error::ChaosError;
use crate::net::SlowBy;
use crate::stage::Stage;

/// Nodes that do not hear each other, or not one of them.
pub const PARTITION: Scenario = Scenario {
    name: "partition",
    about: "a node's cable, one pair of nodes, one direction of a pair, all that a node sends, or hears, is cut",
    needs_links: true,
    setting: usual,
    run: partition,
};

/// What is cut. Clients reach every node but the one without a cable.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Cable(usize),
    Pair(usize, usize),
    Direction(usize, usize),
    Mouth(usize),
    Ears(usize),
}

impl Cut {
    /// The directions that are cut, where it is not the cable.
    fn directions(self, nodes: usize) -> Vec<(usize, usize)> {
        let others = |of: usize| (0..nodes).filter(move |other| *other != of);
        match self {
            Cut::Cable(_) => Vec::new(),
            Cut::Pair(a, b) => vec![(a, b), (b, a)],
            Cut::Direction(from, to) => vec![(from, to)],
            Cut::Mouth(of) => others(of).map(|to| (of, to)).collect(),
            Cut::Ears(of) => others(of).map(|from| (from, of)).collect(),
        }
    }

    /// Whether nodes stay live that cannot reach each other. Then placement groups that both are members of may
    /// wait until they can: nobody but the two notices.
    fn is_between_live_nodes(self) -> bool {
        matches!(self, Cut::Pair(..) | Cut::Direction(..))
    }

    fn make(self, stage: &Stage) -> Result<(), ChaosError> {
        if let Cut::Cable(index) = self {
            stage.rig.net.cut(index)?;
        }
        let directions = self.directions(stage.rig.nodes());
        directions.into_iter().try_for_each(|(from, to)| stage.rig.net.lose(from, to))
    }

    fn mend(self, stage: &Stage) -> Result<(), ChaosError> {
        if let Cut::Cable(index) = self {
            stage.rig.net.join(index)?;
        }
        let directions = self.directions(stage.rig.nodes());
        directions.into_iter().try_for_each(|(from, to)| stage.rig.net.deliver(from, to))
    }
}

fn partition(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        let mut order: Vec<usize> = (0..stage.rig.nodes()).collect();
        stage.rng.shuffle(&mut order);
        let &[a, b, ..] = order.as_slice() else { return Ok(()) };
        let mut cuts = [Cut::Cable(a), Cut::Pair(a, b), Cut::Direction(a, b), Cut::Mouth(a), Cut::Ears(b)];
        stage.rng.shuffle(&mut cuts);
        for cut in cuts {
            stage.say(&format!("{cut:?} is cut"));
            cut.make(stage)?;
            let before = stage.timeline.answered();
            let needed = if cut.is_between_live_nodes() { 0 } else { 100 };
            let went_on = stage.operations(needed).and_then(|()| stage.hold_between(500, 3000));
            let meanwhile = stage.timeline.answered() - before;
            cut.mend(stage)?;
            went_on?;
            stage.say(&format!("mended; {meanwhile} operations were answered meanwhile"));
            stage.operations(100)?;
            stage.rig.wait_clean()?;
        }
    }
    Ok(())
}

/// Latency and loss on all links.
pub const SLOW_NETWORK: Scenario = Scenario {
    name: "slow_network",
    about: "every link gets latency and loss; a node is killed meanwhile",
    needs_links: true,
    setting: usual,
    run: slow_network,
};

fn slow_network(stage: &mut Stage) -> Result<(), ChaosError> {
    for _ in 0..stage.form.rounds() {
        for index in 0..stage.rig.nodes() {
            if stage.rig.net.slow(index)? == SlowBy::Bucket && index == 0 {
                stage.say("this kernel has no netem: links queue and drop in token buckets instead");
            }
        }
        stage.operations(400)?;
        let victim = stage.rng.below(stage.rig.nodes() as u64) as usize;
        stage.say(&format!("node {} is killed", victim + 1));
        stage.rig.kill(victim)?;
        stage.operations(200)?;
        stage.rig.start_nodes(&[victim])?;
        stage.operations(200)?;
        for index in 0..stage.rig.nodes() {
            stage.rig.net.quicken(index)?;
        }
        stage.rig.wait_clean()?;
    }
    Ok(())
}
