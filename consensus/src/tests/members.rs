//! Changes of the voters.

use crate::Standing;
use crate::codec::{Body, Command, Packet, RequestId};
use crate::members::VOTERS_KEY;
#[cfg(feature = "planted")]
use crate::planted::Bug;
use crate::planted::Planted;
use crate::testing::{CLUSTER, Options, World, put};
use wire::control::{MetaReply, MetaRequest, VoterRole};
use wire::{NodeId, Status};

fn world(seed: u64, voters: u64, spares: u64) -> World {
    World::new(seed, Options { voters, spares, region: 4 << 20, ..Options::default() })
}

fn ids(nodes: &[usize]) -> Vec<NodeId> {
    nodes.iter().map(|node| World::id(*node)).collect()
}

fn begun(reply: &MetaReply) -> bool {
    matches!(reply, MetaReply::Applied { .. })
}

fn replace(w: &mut World, asker: usize, old: usize, new: usize) -> Vec<NodeId> {
    let reply = w.change(asker, &[new], &[old]);
    assert!(begun(&reply), "{reply:?}");
    w.settled(asker)
}

#[test]
fn a_dead_voter_is_replaced_and_another_one_may_die_then() {
    for seed in 0..20 {
        let mut w = world(seed, 3, 1);
        let leader = w.elect();
        for i in 0..30 {
            w.put(leader, &format!("/k/{i}"), &i.to_string());
        }
        assert_eq!(w.node(3).standing(), Standing::Blank);
        assert_eq!(w.slots[3].env.writes, 0, "a node that nobody wants writes nothing");
        let dead = (seed as usize + leader) % 3;
        w.crash(dead);
        let asker = (dead + 1) % 3;
        let left: Vec<usize> = (0..4).filter(|node| *node != dead).collect();
        assert_eq!(replace(&mut w, asker, dead, 3), ids(&left), "seed {seed}");
        assert_eq!(w.node(3).standing(), Standing::Voter);
        w.crash((dead + 2) % 3);
        w.put(asker, "/after", "1");
        w.put(3, "/after", "2");
        assert_eq!(w.range(3, "/k/").len(), 30);
        w.converge();
        assert_eq!(w.held(3), w.held(asker));
    }
}

#[test]
fn the_key_says_who_votes_and_where() {
    let mut w = world(30, 3, 1);
    let leader = w.elect();
    assert!(w.range(leader, VOTERS_KEY).is_empty(), "as configured");
    let dead = (leader + 1) % 3;
    w.crash(dead);
    replace(&mut w, leader, dead, 3);
    let value = w.range(leader, VOTERS_KEY)[0].value.clone();
    assert!(value.contains("{\"address\":\"10.0.0.4:7700\",\"node\":4}"), "{value}");
    assert!(value.contains(&format!("\"node\":{}", leader + 1)), "{value}");
    assert!(!value.contains(&format!("\"node\":{}", dead + 1)), "{value}");
}

#[test]
fn one_voter_becomes_three_and_three_become_one() {
    for seed in 0..10 {
        let mut w = world(100 + seed, 1, 2);
        w.elect();
        w.put(0, "/a", "1");
        assert!(begun(&w.change(0, &[1, 2], &[])));
        assert_eq!(w.settled(0), ids(&[0, 1, 2]));
        w.crash(0);
        w.put(1, "/a", "2");
        w.start(0);
        w.elect();
        w.converge();
        assert!(begun(&w.change(2, &[], &[0, 1])));
        assert_eq!(w.settled(2), ids(&[2]));
        w.crash(0);
        w.crash(1);
        w.put(2, "/a", "3");
        w.crash(2);
        w.start(2);
        w.elect();
        assert_eq!(w.range(2, "/a")[0].value, "3");
    }
}

#[test]
fn a_leader_can_be_replaced_and_so_can_the_only_voter() {
    for seed in 0..10 {
        let mut w = world(200 + seed, 3, 1);
        let leader = w.elect();
        let asker = (leader + 1) % 3;
        let left: Vec<usize> = (0..4).filter(|node| *node != leader).collect();
        assert_eq!(replace(&mut w, asker, leader, 3), ids(&left));
        let outside = |w: &World| w.node(leader).standing() == Standing::Outside;
        assert!(w.run_until(3_000, outside), "{}", w.describe());
        w.put(asker, "/a", "1");
    }
    let mut w = world(220, 1, 1);
    w.elect();
    w.put(0, "/a", "1");
    assert!(begun(&w.change(0, &[1], &[0])));
    assert!(w.run_until(5_000, |w| w.leader() == Some(1)), "{}", w.describe());
    w.crash(0);
    w.put(1, "/a", "2");
}

#[test]
fn refusals_are_told_from_each_other() {
    let mut w = world(300, 3, 3);
    let leader = w.elect();
    w.put(leader, "/a", "1");
    let asker = (leader + 1) % 3;
    let failed = MetaReply::failed;
    assert_eq!(w.change(asker, &[3], &[4]), failed(Status::NotFound));
    assert_eq!(w.change(asker, &[1], &[0]), failed(Status::Exists));
    assert_eq!(w.change(asker, &[3], &[]), failed(Status::VoterCount));
    assert_eq!(w.change(asker, &[], &[]), failed(Status::Invalid));
    assert_eq!(w.call(asker, MetaRequest::CancelVoters), failed(Status::NotFound));
    // The new one does not run: the change begins and goes no further until it is given up.
    w.crash(3);
    assert!(begun(&w.change(asker, &[3], &[asker])));
    w.run_ms(3_000);
    assert_eq!(w.change(asker, &[4], &[asker]), failed(Status::ChangeUnderWay));
    let MetaReply::Voters { members, target, settled } = w.call(asker, MetaRequest::Voters) else {
        panic!("no voters")
    };
    let new = members.iter().find(|member| member.node == World::id(3)).unwrap();
    assert_eq!((new.role, new.heard, settled), (VoterRole::Learner, false, false));
    assert!(new.behind > 0 && new.address == "10.0.0.4:7700");
    assert_eq!(target.len(), 3);
    assert!(begun(&w.call(asker, MetaRequest::CancelVoters)));
    assert_eq!(w.settled(asker), ids(&[0, 1, 2]));
    assert!(begun(&w.change(asker, &[4, 5], &[])));
    assert_eq!(w.settled(asker).len(), 5);
    // Of the three that would be left two are down.
    let (a, b) = ((leader + 1) % 3, (leader + 2) % 3);
    w.crash(a);
    w.crash(b);
    w.elect();
    w.run_ms(2_000);
    assert_eq!(w.change(4, &[], &[4, 5]), failed(Status::QuorumAtRisk));
}

/// Asks until the change has begun and is complete, whoever dies meanwhile.
fn until_complete(w: &mut World, asker: usize, old: usize, new: usize) {
    for _ in 0..20 {
        if let MetaReply::Voters { members, settled: true, .. } = w.call(asker, MetaRequest::Voters) {
            let voters: Vec<NodeId> = members.iter().map(|member| member.node).collect();
            if voters.contains(&World::id(new)) && !voters.contains(&World::id(old)) {
                return;
            }
            w.change(asker, &[new], &[old]);
        }
        w.run_ms(100);
    }
    panic!("the change does not come to its end: {}", w.describe());
}

/// The leader dies, or everybody does, a little later in each seed, and comes back.
#[test]
fn a_change_survives_the_death_of_its_leader_at_every_step() {
    for seed in 0..120 {
        let options = Options {
            spares: 1,
            region: 4 << 20,
            delay_us: 5_000,
            disk_us: 5_000,
            loss: 10,
            doubled: 10,
            ..Options::default()
        };
        let mut w = World::new(1_000 + seed, options);
        let leader = w.elect();
        for i in 0..5 {
            w.put(leader, "/n", &i.to_string());
        }
        let gone = (leader + 1 + seed as usize % 2) % 3;
        let asker = (0..3).find(|node| *node != gone && *node != leader).unwrap();
        w.submit(asker, World::change_request(&[3], &[gone]));
        w.run_ms(seed * 3);
        let dies: Vec<usize> = if seed % 3 == 0 { (0..4).collect() } else { vec![leader] };
        dies.iter().for_each(|node| w.crash(*node));
        w.run_ms(if seed % 2 == 0 { 10 } else { 1_500 });
        dies.iter().for_each(|node| w.start(*node));
        w.elect();
        until_complete(&mut w, asker, gone, 3);
        assert!(w.failures().is_empty(), "seed {seed}: {:?}", w.failures());
        // Two of the three that are left are enough.
        w.crash(gone);
        w.crash(leader);
        w.put(asker, "/n", "6");
        w.put(3, "/n", "7");
    }
}

#[test]
fn who_was_removed_and_comes_back_neither_votes_nor_disturbs() {
    for seed in 0..20 {
        let mut w = world(2_000 + seed, 3, 1);
        let leader = w.elect();
        let gone = (leader + 1) % 3;
        w.crash(gone);
        replace(&mut w, leader, gone, 3);
        let (term, before) = (w.node(leader).status().term, w.leader());
        // It believes what it last knew, and what its command line says.
        w.start(gone);
        let outside = |w: &World| w.node(gone).standing() == Standing::Outside;
        assert!(w.run_until(3_000, outside), "{}", w.describe());
        // It is told where to go on: all whom it knew may have been removed.
        let (_, told) = w.node(gone).latest_voters().unwrap();
        let mut present = vec![leader, (leader + 2) % 3, 3];
        present.sort_unstable();
        assert_eq!(told, present.into_iter().map(World::address).collect::<Vec<_>>());
        w.run_ms(3_000);
        assert_eq!((w.node(leader).status().term, w.leader()), (term, before), "seed {seed}");
        // With its help there would be a majority of the old voters; of the present ones there is none.
        w.crash((leader + 2) % 3);
        w.crash(3);
        w.run_ms(2_000);
        assert_eq!(w.leader(), None);
        assert!(!begun(&w.call(leader, put("/a", "1"))));
    }
}

#[test]
fn a_node_that_was_removed_can_be_taken_back_with_what_it_has() {
    let mut w = world(2_100, 3, 1);
    let leader = w.elect();
    let gone = (leader + 1) % 3;
    w.crash(gone);
    replace(&mut w, leader, gone, 3);
    w.start(gone);
    w.run_ms(1_000);
    assert_eq!(replace(&mut w, leader, 3, gone), ids(&[0, 1, 2]));
    assert_eq!(w.node(gone).standing(), Standing::Voter);
    w.converge();
}

/// How many entries a new voter lacks when it begins to vote.
fn behind_at_promotion(seed: u64, planted: Planted) -> u64 {
    let options = Options { spares: 1, region: 4 << 20, planted, ..Options::default() };
    let mut w = World::new(seed, options);
    let leader = w.elect();
    for i in 0..400 {
        w.submit(leader, put(&format!("/k/{}", i % 200), "1"));
    }
    w.run_ms(100);
    for i in 0..300 {
        w.put(leader, "/n", &i.to_string());
    }
    // It hears everything and is heard by nobody: it cannot say what it has.
    w.link(3, leader, false);
    assert!(begun(&w.change(leader, &[3], &[(leader + 1) % 3])));
    w.run_ms(2_000);
    if w.node(leader).members().len() == 4 && w.range(leader, VOTERS_KEY)[0].value.contains("joining") {
        w.heal();
        assert!(w.run_until(10_000, |w| w.node(3).standing() == Standing::Voter), "{}", w.describe());
    }
    let (committed, has) = (w.node(leader).status().commit_index, w.node(3).status().last_index);
    committed.saturating_sub(has)
}

#[test]
fn a_learner_votes_only_when_it_has_caught_up() {
    for seed in 0..5 {
        let behind = behind_at_promotion(seed, Planted::none());
        assert!(behind <= crate::bounds::CAUGHT_UP_ENTRIES, "seed {seed}: {behind}");
    }
}

#[cfg(feature = "planted")]
#[test]
fn taking_a_learner_for_caught_up_is_noticed() {
    let bug = Planted::with(Bug::LearnerTakenForCaughtUp);
    let early = |seed| {
        let options = Options { spares: 1, planted: bug, ..Options::default() };
        let mut w = World::new(seed, options);
        let leader = w.elect();
        w.crash(3);
        w.change(leader, &[3], &[(leader + 1) % 3]);
        w.run_ms(2_000);
        !w.range(leader, VOTERS_KEY)[0].value.contains("joining")
    };
    assert!(early(1));
}

#[test]
fn members_outlive_restarts_in_the_log_and_in_snapshots() {
    for seed in 0..12u64 {
        let mut w = world(3_000 + seed, 3, 1);
        let leader = w.elect();
        let gone = (leader + 1) % 3;
        let fill = |w: &mut World| {
            let value = format!("\"{}\"", "x".repeat(10_000));
            for i in 0..80 {
                w.put(leader, &format!("/f/{}", i % 5), &value);
            }
        };
        if seed % 2 == 0 {
            fill(&mut w);
        }
        w.crash(gone);
        let restart = |w: &mut World| {
            (0..4).filter(|node| *node != gone).for_each(|node| w.crash(node));
            (0..4).filter(|node| *node != gone).for_each(|node| w.start(node));
            w.elect();
        };
        match seed % 3 {
            // Complete, and written into a snapshot.
            0 => {
                replace(&mut w, leader, gone, 3);
                fill(&mut w);
                let changed = w.range(leader, VOTERS_KEY)[0].mod_revision.0;
                let at = w.node(leader).status().snapshot_index;
                assert!(at > changed, "{at} {changed}");
            }
            // Complete, in the log alone.
            1 => drop(replace(&mut w, leader, gone, 3)),
            // Begun: the new one cannot be reached, and the snapshot says so.
            _ => {
                w.isolate(3);
                assert!(begun(&w.change(leader, &[3], &[gone])));
                fill(&mut w);
            }
        }
        restart(&mut w);
        w.heal();
        let left: Vec<usize> = (0..4).filter(|node| *node != gone).collect();
        assert_eq!(w.settled(leader), ids(&left), "seed {seed}");
        w.crash((leader + 2) % 3);
        w.put(3, "/after", "1");
    }
}

#[test]
fn a_node_started_with_other_founders_follows_the_group() {
    let mut w = world(4_000, 3, 1);
    let leader = w.elect();
    let gone = (leader + 1) % 3;
    w.crash(gone);
    replace(&mut w, leader, gone, 3);
    // The new voter, and one that was there before, with command lines of all kinds.
    for node in [3, (leader + 2) % 3] {
        for founders in [vec![node], vec![0, 1, 2], vec![0, 2, 3]] {
            w.crash(node);
            let mut config = w.config(node);
            config.voters = ids(&founders);
            w.open_with(node, config);
            w.elect();
            assert!(w.run_until(3_000, |w| w.node(node).standing() == Standing::Voter));
            w.put(node, "/a", "1");
        }
    }
    w.converge();
}

#[test]
fn a_node_that_joins_never_leads_a_group_of_its_own() {
    let mut w = world(4_100, 3, 2);
    for node in 0..3 {
        w.crash(node);
    }
    w.run_ms(10_000);
    for node in [3, 4] {
        assert_eq!((w.node(node).standing(), w.node(node).status().term), (Standing::Blank, 0));
        // What is no leader's does not wake it.
        let packet = Packet {
            cluster: CLUSTER,
            from: World::id(0),
            body: Body::NotMember { index: 9, voters: Vec::new() },
        };
        w.with(node, |meta, env| meta.on_message(env, packet.from, &packet.encode()));
        assert_eq!(w.node(node).standing(), Standing::Blank);
    }
}

/// Bytes of a log entry that says who the members are, as they are on disk: they must stay readable.
#[test]
fn an_entry_of_members_survives_its_bytes_and_nothing_else_passes_for_one() {
    let founders = crate::members::Members::founded(&ids(&[0, 1, 2]));
    let members = Box::new(founders.begun(&[World::address(3)], &ids(&[2]), &[]).unwrap());
    let op = crate::codec::Op::Members { members, writes: Vec::new() };
    let command = Command { id: RequestId::default(), op };
    let bytes = command.encode();
    assert_eq!(bytes[0], crate::codec::MEMBERS_VERSION);
    assert_eq!(Command::decode(&bytes), Ok(command.clone()));
    let mut plain = bytes.clone();
    plain[0] = crate::codec::CODEC_VERSION;
    assert!(Command::decode(&plain).is_err());
    let other = Command { id: RequestId::default(), op: crate::codec::Op::EphemeralReset };
    let mut marked = other.encode();
    marked[0] = crate::codec::MEMBERS_VERSION;
    assert!(Command::decode(&marked).is_err());
    let crate::codec::Op::Members { members, .. } = &command.op else { panic!() };
    let mut unsound = (**members).clone();
    unsound.voters = ids(&[1, 0]);
    let op = crate::codec::Op::Members { members: Box::new(unsound), writes: Vec::new() };
    assert!(Command::decode(&Command { id: RequestId::default(), op }.encode()).is_err());
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Ok(Command { op: crate::codec::Op::Members { members, .. }, .. }) = Command::decode(&flipped) {
            assert!(members.is_sound());
        }
    }
}
