//! Who belongs to the group, as replicated state. It is part of every snapshot and changes by log entries that
//! name the whole new membership: whoever applies one knows all members, whatever it knew before. A node
//! that joins knows nobody.
//!
//! A change takes three entries. The first names the new voters as learners and says what is to become of
//! the group (`target`); the second, when they have caught up, makes the group joint: from then on a majority of the
//! old voters and one of the new ones must agree; the third drops the old voters. Every leader goes on where the
//! one before stopped, because the whole plan is in here. `changing` decides when.

// The derives of rkyv make public types of their own, without docs.
#![allow(missing_docs)]

use crate::bounds::{ADDRESS_BYTES_MAX, VOTERS_MAX};
use crate::image::Reader;
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState};
use rkyv::{Archive, Deserialize, Serialize};
use wire::control::VoterAddress;
use wire::{NodeId, Status};

/// The key under which people, nodes and clients find the voters. Written with every change.
pub const VOTERS_KEY: &str = "/meta/voters";

/// The members of a group.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct Members {
    /// They vote. All lists are sorted.
    pub voters: Vec<NodeId>,
    /// Old voters: while there are any, a majority of them is needed, too.
    pub outgoing: Vec<NodeId>,
    /// They get the log and do not vote yet.
    pub learners: Vec<NodeId>,
    /// Who will vote when the change under way is complete; empty without one.
    pub target: Vec<NodeId>,
    /// Where members are reached, as far as anybody has said.
    pub addresses: Vec<VoterAddress>,
}

fn rises<T: Ord>(list: impl Iterator<Item = T>) -> bool {
    let list: Vec<T> = list.collect();
    list.windows(2).all(|pair| matches!(pair, [a, b] if a < b))
}

fn without(list: &[NodeId], others: &[NodeId]) -> Vec<NodeId> {
    list.iter().copied().filter(|node| !others.contains(node)).collect()
}

impl Members {
    /// A group as it is created. Without voters: the node waits to be told.
    pub fn founded(voters: &[NodeId]) -> Self {
        let mut voters = voters.to_vec();
        voters.sort_unstable();
        Self { voters, ..Self::default() }
    }

    /// Whether the node votes, now or until the change is complete.
    pub fn is_voter(&self, node: NodeId) -> bool {
        self.voters.contains(&node) || self.outgoing.contains(&node)
    }

    /// Whether the node has any part in the group.
    pub fn contains(&self, node: NodeId) -> bool {
        self.is_voter(node) || self.learners.contains(&node)
    }

    /// Everybody who votes.
    pub fn all_voters(&self) -> Vec<NodeId> {
        let mut all = self.voters.clone();
        all.extend(without(&self.outgoing, &self.voters));
        all.sort_unstable();
        all
    }

    /// Everybody.
    pub fn all(&self) -> Vec<NodeId> {
        let mut all = self.all_voters();
        all.extend(&self.learners);
        all.sort_unstable();
        all
    }

    /// Whether two majorities are needed.
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether a change is under way.
    pub fn is_changing(&self) -> bool {
        !self.target.is_empty()
    }

    /// Whether these are not, or may not be, the founders any more.
    pub fn was_changed(&self) -> bool {
        self.is_changing() || !self.addresses.is_empty()
    }

    /// Where a member is reached.
    pub fn address(&self, node: NodeId) -> Option<&str> {
        self.addresses.iter().find(|known| known.node == node).map(|known| known.address.as_str())
    }

    /// Whether it can be what the entries above lead to. Checked wherever members come from disk or network: the crate
    /// `raft` answers others with a panic.
    pub fn is_sound(&self) -> bool {
        let lists = [&self.voters, &self.outgoing, &self.learners, &self.target];
        let well_formed = lists.into_iter().all(|list| {
            list.len() <= VOTERS_MAX && !list.contains(&NodeId(0)) && rises(list.iter().copied())
        });
        let addresses = rises(self.addresses.iter().map(|known| known.node))
            && self.addresses.iter().all(|known| {
                let len = known.address.len();
                self.contains(known.node) && len > 0 && len <= ADDRESS_BYTES_MAX
            });
        let fits = match (self.is_changing(), self.is_joint()) {
            (false, joint) => !joint && self.learners.is_empty(),
            (true, false) => {
                self.target != self.voters && self.learners == without(&self.target, &self.voters)
            }
            (true, true) => {
                self.target == self.voters && self.outgoing != self.voters && self.learners.is_empty()
            }
        };
        let odd = |list: &[NodeId]| list.len() % 2 == 1;
        let counts = odd(&self.voters)
            && (self.outgoing.is_empty() || odd(&self.outgoing))
            && (self.target.is_empty() || odd(&self.target));
        well_formed && addresses && fits && counts
    }

    /// The first step of a change, or why it cannot be. `known` are addresses of the present voters.
    pub fn begun(
        &self,
        add: &[VoterAddress],
        remove: &[NodeId],
        known: &[VoterAddress],
    ) -> Result<Self, Status> {
        if self.is_changing() {
            return Err(Status::ChangeUnderWay);
        }
        if add.is_empty() && remove.is_empty() {
            return Err(Status::Invalid);
        }
        if add.iter().any(|new| self.voters.contains(&new.node)) {
            return Err(Status::Exists);
        }
        if remove.iter().any(|old| !self.voters.contains(old)) {
            return Err(Status::NotFound);
        }
        let mut target = without(&self.voters, remove);
        target.extend(add.iter().map(|new| new.node));
        target.sort_unstable();
        if target.len().is_multiple_of(2) || target.len() > VOTERS_MAX {
            return Err(Status::VoterCount);
        }
        let learners = without(&target, &self.voters);
        let mut next = Self { learners, target, ..self.clone() };
        for known in add.iter().chain(known) {
            if next.contains(known.node) && next.address(known.node).is_none() {
                next.addresses.push(known.clone());
            }
        }
        next.addresses.sort_unstable_by_key(|known| known.node);
        // What is left over is twice the same node, and the like.
        if next.is_sound() { Ok(next) } else { Err(Status::Invalid) }
    }

    /// The second step.
    pub fn entered(&self) -> Self {
        let (voters, outgoing) = (self.target.clone(), self.voters.clone());
        Self { voters, outgoing, learners: Vec::new(), ..self.clone() }
    }

    /// The third step.
    pub fn left(&self) -> Self {
        let mut next =
            Self { outgoing: Vec::new(), learners: Vec::new(), target: Vec::new(), ..self.clone() };
        next.addresses.retain(|known| next.voters.contains(&known.node));
        next
    }

    /// Instead of the second step: everything stays as it was.
    pub fn cancelled(&self) -> Result<Self, Status> {
        match (self.is_changing(), self.is_joint()) {
            (false, _) => Err(Status::NotFound),
            (true, true) => Err(Status::ChangeUnderWay), // its new voters vote: it can only be completed
            (true, false) => Ok(self.left()),
        }
    }

    /// The value of `VOTERS_KEY`.
    pub fn json(&self) -> String {
        let list = |nodes: &[NodeId]| -> Vec<serde_json::Value> {
            let one = |node: &NodeId| serde_json::json!({ "node": node.0, "address": self.address(*node) });
            nodes.iter().map(one).collect()
        };
        let parts = [
            ("voters", self.voters.clone()),
            ("leaving", without(&self.outgoing, &self.voters)),
            ("joining", self.learners.clone()),
        ];
        let parts = parts.iter().filter(|(_, nodes)| !nodes.is_empty());
        let value: serde_json::Map<String, serde_json::Value> =
            parts.map(|(name, nodes)| ((*name).to_owned(), list(nodes).into())).collect();
        serde_json::Value::Object(value).to_string()
    }

    /// As the crate `raft` wants it.
    pub fn conf_state(&self) -> ConfState {
        let ids = |list: &[NodeId]| list.iter().map(|node| node.0).collect();
        let mut state = ConfState::default();
        state.set_voters(ids(&self.voters));
        state.set_voters_outgoing(ids(&self.outgoing));
        state.set_learners(ids(&self.learners));
        state
    }

    /// Appends the bytes that an image has: four lists, then the addresses.
    pub fn encode(&self, out: &mut Vec<u8>) {
        for list in [&self.voters, &self.outgoing, &self.learners, &self.target] {
            out.push(list.len() as u8);
            list.iter().for_each(|node| out.extend_from_slice(&node.0.to_le_bytes()));
        }
        out.push(self.addresses.len() as u8);
        for known in &self.addresses {
            out.extend_from_slice(&known.node.0.to_le_bytes());
            out.push(known.address.len() as u8);
            out.extend_from_slice(known.address.as_bytes());
        }
    }

    /// Reads them back; only what is sound.
    pub(crate) fn decode(r: &mut Reader<'_>) -> Option<Self> {
        let list = |r: &mut Reader<'_>| -> Option<Vec<NodeId>> {
            (0..r.u8()?).map(|_| r.u64().map(NodeId)).collect()
        };
        let mut members = Self {
            voters: list(r)?,
            outgoing: list(r)?,
            learners: list(r)?,
            target: list(r)?,
            addresses: Vec::new(),
        };
        for _ in 0..r.u8()? {
            let (node, len) = (NodeId(r.u64()?), r.u8()?);
            members.addresses.push(VoterAddress { node, address: r.text(usize::from(len))? });
        }
        members.is_sound().then_some(members)
    }
}

fn single(kind: ConfChangeType, node: u64) -> ConfChangeSingle {
    let mut single = ConfChangeSingle::default();
    single.set_change_type(kind);
    single.node_id = node;
    single
}

fn change(singles: Vec<ConfChangeSingle>, transition: ConfChangeTransition) -> ConfChangeV2 {
    let mut change = ConfChangeV2::default();
    change.set_transition(transition);
    change.set_changes(singles.into());
    change
}

/// The changes that take the crate `raft` from where it is to `members`. In a group that makes one step at a time
/// there is one at most; a node that joins, or that was told other founders, needs more.
pub fn way(from: &ConfState, members: &Members) -> Vec<ConfChangeV2> {
    let to = members.conf_state();
    let same = |a: &[u64], b: &[u64]| a.len() == b.len() && a.iter().all(|id| b.contains(id));
    if same(&from.voters, &to.voters)
        && same(&from.voters_outgoing, &to.voters_outgoing)
        && same(&from.learners, &to.learners)
    {
        return Vec::new();
    }
    let joint = !to.voters_outgoing.is_empty();
    let base = if joint { &to.voters_outgoing } else { &to.voters };
    let mut singles = Vec::new();
    let add = base.iter().filter(|id| !from.voters.contains(id));
    singles.extend(add.map(|id| single(ConfChangeType::AddNode, *id)));
    let gone = from.voters.iter().filter(|id| !base.contains(id) && !to.learners.contains(id));
    singles.extend(gone.map(|id| single(ConfChangeType::RemoveNode, *id)));
    let learners = to.learners.iter().filter(|id| !from.learners.contains(id));
    singles.extend(learners.map(|id| single(ConfChangeType::AddLearnerNode, *id)));
    let kept = |id: &u64| to.learners.contains(id) || base.contains(id) || to.voters.contains(id);
    let gone = from.learners.iter().filter(|id| !kept(id));
    singles.extend(gone.map(|id| single(ConfChangeType::RemoveNode, *id)));

    let mut way = Vec::new();
    if !from.voters_outgoing.is_empty() {
        way.push(change(Vec::new(), ConfChangeTransition::Auto));
    }
    way.extend(singles.into_iter().map(|single| change(vec![single], ConfChangeTransition::Auto)));
    if joint {
        let gone = to.voters_outgoing.iter().filter(|id| !to.voters.contains(id));
        let new = to.voters.iter().filter(|id| !to.voters_outgoing.contains(id));
        let mut singles: Vec<_> = new.map(|id| single(ConfChangeType::AddNode, *id)).collect();
        singles.extend(gone.map(|id| single(ConfChangeType::RemoveNode, *id)));
        way.push(change(singles, ConfChangeTransition::Explicit));
    }
    way
}

/// What the crate `raft` is to be told about a proposal: it refuses a second change before the first is
/// applied, and looks at nothing but whether this one leaves a joint state. The entry's own bytes say the rest.
pub fn shape(leaves: bool) -> ConfChangeV2 {
    // Node 0 stands for no change.
    let singles = if leaves { Vec::new() } else { vec![single(ConfChangeType::AddLearnerNode, 0)] };
    change(singles, ConfChangeTransition::Auto)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(list: &[u64]) -> Vec<NodeId> {
        list.iter().map(|id| NodeId(*id)).collect()
    }

    fn at(node: u64) -> VoterAddress {
        VoterAddress { node: NodeId(node), address: format!("10.0.0.{node}:7700") }
    }

    fn three() -> Members {
        Members::founded(&nodes(&[3, 1, 2]))
    }

    #[test]
    fn a_replacement_takes_three_steps_and_each_is_sound() {
        let known: Vec<VoterAddress> = (1..=3).map(at).collect();
        let begun = three().begun(&[at(4)], &nodes(&[3]), &known).unwrap();
        assert_eq!((&begun.learners, &begun.target), (&nodes(&[4]), &nodes(&[1, 2, 4])));
        let joint = begun.entered();
        assert_eq!((&joint.voters, &joint.outgoing), (&nodes(&[1, 2, 4]), &nodes(&[1, 2, 3])));
        let left = joint.left();
        assert_eq!((&left.voters, left.is_changing()), (&nodes(&[1, 2, 4]), false));
        assert!([&begun, &joint, &left].into_iter().all(Members::is_sound));
        assert_eq!(left.address(NodeId(4)), Some("10.0.0.4:7700"));
        assert!(left.address(NodeId(3)).is_none());
        assert_eq!(
            joint.json(),
            "{\"leaving\":[{\"address\":\"10.0.0.3:7700\",\"node\":3}],\"voters\":[\
             {\"address\":\"10.0.0.1:7700\",\"node\":1},{\"address\":\"10.0.0.2:7700\",\"node\":2},\
             {\"address\":\"10.0.0.4:7700\",\"node\":4}]}"
        );
        assert_eq!(begun.cancelled().unwrap(), Members { addresses: known, ..three() });
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let begun = |add: &[u64], remove: &[u64]| {
            let add: Vec<_> = add.iter().map(|node| at(*node)).collect();
            three().begun(&add, &nodes(remove), &[]).map(|next| next.target)
        };
        assert_eq!(begun(&[4], &[3]), Ok(nodes(&[1, 2, 4])));
        assert_eq!(begun(&[4, 5], &[]), Ok(nodes(&[1, 2, 3, 4, 5])));
        assert_eq!(begun(&[], &[1, 3]), Ok(nodes(&[2])));
        assert_eq!(begun(&[], &[]), Err(Status::Invalid));
        assert_eq!(begun(&[3], &[3]), Err(Status::Exists));
        assert_eq!(begun(&[4], &[5]), Err(Status::NotFound));
        assert_eq!(begun(&[4], &[]), Err(Status::VoterCount));
        assert_eq!(begun(&[], &[1, 2, 3]), Err(Status::VoterCount));
        assert_eq!(begun(&[4, 4, 5], &[3]), Err(Status::Invalid));
        assert_eq!(begun(&[4, 5, 6, 7, 8, 9], &[]), Err(Status::VoterCount));
        let under_way = three().begun(&[at(4)], &nodes(&[3]), &[]).unwrap();
        assert_eq!(under_way.begun(&[at(5)], &nodes(&[2]), &[]), Err(Status::ChangeUnderWay));
        assert_eq!(under_way.entered().cancelled(), Err(Status::ChangeUnderWay));
        assert_eq!(three().cancelled(), Err(Status::NotFound));
    }

    /// The bytes as they are written: they must not change unnoticed.
    #[test]
    fn the_bytes_are_these() {
        let members = Members::founded(&nodes(&[1])).begun(&[at(2)], &nodes(&[1]), &[]).unwrap();
        let mut bytes = Vec::new();
        members.encode(&mut bytes);
        let mut expected = vec![1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 13]);
        expected.extend(b"10.0.0.2:7700");
        assert_eq!(bytes, expected);
        let mut r = Reader(&bytes);
        assert_eq!(Members::decode(&mut r), Some(members));
        for len in 0..bytes.len() {
            assert!(Members::decode(&mut Reader(&bytes[..len])).is_none(), "cut at {len}");
        }
    }

    /// Any of a few nodes, at any step of any change.
    fn any_members() -> impl Strategy<Value = Members> {
        let list = || {
            proptest::collection::btree_set(1u64..9, 1..8).prop_map(|set| {
                let odd = set.len() - (set.len() + 1) % 2;
                set.into_iter().take(odd).map(NodeId).collect::<Vec<_>>()
            })
        };
        (list(), list(), 0..3).prop_map(|(voters, target, step)| {
            let founded = Members::founded(&voters);
            let learners = without(&target, &founded.voters);
            let begun = Members { learners, target, ..founded.clone() };
            match step {
                _ if begun.target == begun.voters => founded,
                0 => founded,
                1 => begun,
                _ => begun.entered(),
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn every_sound_membership_is_reached_from_every_other(a in any_members(), b in any_members()) {
            prop_assert!(a.is_sound() && b.is_sound());
            let log = crate::memlog::MemLog::new(&Members::default(), (0, 0), Default::default(), Default::default());
            let config = raft::Config { id: 1, ..raft::Config::default() };
            let logger = slog::Logger::root(slog::Discard, slog::o!());
            let mut raw = raft::RawNode::new(&config, log, &logger).unwrap();
            for members in [&a, &b] {
                let from = raw.raft.prs().conf().to_conf_state();
                for change in way(&from, members) {
                    raw.apply_conf_change(&change).unwrap();
                }
                let is = raw.raft.prs().conf().to_conf_state();
                prop_assert!(way(&is, members).is_empty(), "{is:?} is not {members:?}");
            }
        }

        #[test]
        fn random_bytes_are_no_members(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(members) = Members::decode(&mut Reader(&bytes)) {
                prop_assert!(members.is_sound());
            }
        }
    }
}
