//! What must hold for every assignment, on many topologies.
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

mod common;

use common::{GIB, cluster, node};
use placement::{Assigner, FailureDomain, LOOKS_PER_STEP, Node, PlacementError, Rule, Topology, assign};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use wire::SliceId;

type Lists = Vec<Vec<SliceId>>;

fn rule(copies: u8, pg_count: u32) -> Rule {
    Rule { copies, pg_count, failure_domain: FailureDomain::Host, seed: 1 }
}

fn loads(lists: &Lists) -> BTreeMap<SliceId, u32> {
    let mut out = BTreeMap::new();
    for slice in lists.iter().flatten() {
        *out.entry(*slice).or_default() += 1;
    }
    out
}

/// Fair shares by a second, independent method: raise the level until everything is placed, domains
/// capped at one copy per PG.
fn fair(topology: &Topology, rule: &Rule) -> BTreeMap<SliceId, f64> {
    let mut weights: BTreeMap<u32, f64> = BTreeMap::new();
    for spot in topology.spots() {
        *weights.entry(spot.domain(rule.failure_domain)).or_default() += spot.size_bytes as f64;
    }
    let cap = f64::from(rule.pg_count);
    let total = cap * f64::from(rule.copies);
    let (mut low, mut high) = (0.0, total);
    for _ in 0..200 {
        let level = (low + high) / 2.0;
        let placed: f64 = weights.values().map(|w| (w * level).min(cap)).sum();
        if placed < total { low = level } else { high = level }
    }
    let of = |spot: &placement::Spot| {
        let weight = weights[&spot.domain(rule.failure_domain)];
        (weight * high).min(cap) * spot.size_bytes as f64 / weight
    };
    topology.spots().iter().map(|spot| (spot.slice, of(spot))).collect()
}

fn check_valid(topology: &Topology, rule: &Rule, lists: &Lists) {
    assert_eq!(lists.len(), rule.pg_count as usize);
    for list in lists {
        assert_eq!(list.len(), usize::from(rule.copies));
        let domains: BTreeSet<u32> =
            list.iter().map(|s| topology.spot(*s).unwrap().domain(rule.failure_domain)).collect();
        assert_eq!(domains.len(), list.len(), "two copies share a domain: {list:?}");
    }
}

fn check_balance(topology: &Topology, rule: &Rule, lists: &Lists) {
    let loads = loads(lists);
    for (slice, fair) in fair(topology, rule) {
        let load = f64::from(loads.get(&slice).copied().unwrap_or(0));
        assert!((load - fair).abs() <= fair * 0.05 + 1.0, "slice {slice} has {load}, fair is {fair}");
    }
}

/// Primaries against each slice's and core's members.
fn check_primaries(topology: &Topology, lists: &Lists, tolerance: f64) {
    let mut slices: BTreeMap<SliceId, (f64, f64)> = BTreeMap::new();
    let mut cores: BTreeMap<(wire::NodeId, u16), (f64, f64)> = BTreeMap::new();
    for list in lists {
        for (place, slice) in list.iter().enumerate() {
            let spot = topology.spot(*slice).unwrap();
            for (fair, primaries) in
                [slices.entry(*slice).or_default(), cores.entry((spot.node, spot.core)).or_default()]
            {
                *fair += 1.0 / list.len() as f64;
                *primaries += if place == 0 { 1.0 } else { 0.0 };
            }
        }
    }
    for (slice, (fair, got)) in slices {
        assert!((got - fair).abs() <= fair * tolerance + 1.0, "slice {slice} leads {got}, fair is {fair}");
    }
    for (core, (fair, got)) in cores {
        assert!((got - fair).abs() <= fair * tolerance + 1.0, "core {core:?} leads {got}, fair is {fair}");
    }
}

fn moved(before: &Lists, after: &Lists) -> usize {
    before.iter().zip(after).map(|(b, a)| a.iter().filter(|s| !b.contains(s)).count()).sum()
}

#[derive(Debug, Clone)]
struct Shape {
    nodes: Vec<Node>,
    rule: Rule,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let nodes = prop::collection::vec((1u64..4, 0u32..3, 1u16..5, 5u64..40), 1..9);
    (nodes, 1u8..4, 1u32..300, any::<bool>(), any::<u64>()).prop_map(|(nodes, copies, pgs, disk, seed)| {
        let nodes = (1..)
            .zip(nodes)
            .map(|(id, (disks, slices, cores, gib))| {
                node(id, &format!("h{id}"), disks, 1 << slices, cores, gib * GIB)
            })
            .collect();
        let failure_domain = if disk { FailureDomain::Disk } else { FailureDomain::Host };
        Shape { nodes, rule: Rule { copies, pg_count: pgs, failure_domain, seed } }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_cluster_gets_a_valid_balanced_stable_assignment(shape in shapes()) {
        let topology = Topology::new(&shape.nodes);
        let result = assign(&topology, &shape.rule, &[]);
        let domains = topology.domains(shape.rule.failure_domain);
        if domains < usize::from(shape.rule.copies) {
            let needed = usize::from(shape.rule.copies);
            let refused = matches!(
                result,
                Err(PlacementError::NotEnoughDomains { have, needed: n, .. }) if have == domains && n == needed
            );
            prop_assert!(refused);
            return Ok(());
        }
        let lists = result.unwrap();
        check_valid(&topology, &shape.rule, &lists);
        check_balance(&topology, &shape.rule, &lists);
        check_primaries(&topology, &lists, 0.10);
        // The same input again moves nothing, whatever order the nodes are listed in.
        let mut reversed = shape.nodes.clone();
        reversed.reverse();
        prop_assert_eq!(&assign(&Topology::new(&reversed), &shape.rule, &lists).unwrap(), &lists);
        prop_assert_eq!(&assign(&topology, &shape.rule, &[]).unwrap(), &lists);
    }

    #[test]
    fn a_history_of_joins_and_leaves_stays_valid_and_balanced(
        shape in shapes(),
        steps in prop::collection::vec((any::<bool>(), 0u64..12), 1..8),
    ) {
        let mut nodes = shape.nodes.clone();
        let mut lists = Lists::new();
        for (join, which) in steps {
            if join {
                if !nodes.iter().any(|n| n.id.0 == 20 + which) {
                    nodes.push(node(20 + which, &format!("new{which}"), 2, 2, 2, (5 + which) * GIB));
                }
            } else if !nodes.is_empty() {
                nodes.remove(which as usize % nodes.len());
            }
            let topology = Topology::new(&nodes);
            let Ok(next) = assign(&topology, &shape.rule, &lists) else { continue };
            check_valid(&topology, &shape.rule, &next);
            check_balance(&topology, &shape.rule, &next);
            check_primaries(&topology, &next, 0.10);
            lists = next;
        }
    }

    #[test]
    fn a_leaving_slice_moves_only_its_own_pgs(
        hosts in 4u64..10, slices in 0u32..3, pgs in 8u32..400, copies in 1u8..4, pick in any::<prop::sample::Index>(),
    ) {
        let mut nodes = cluster(hosts, 1, 1 << slices, 2);
        let rule = rule(copies, pgs);
        let before = assign(&Topology::new(&nodes), &rule, &[]).unwrap();
        let at = pick.index(nodes.len());
        let gone = nodes[at].disks[0].slices.remove(0).id;
        let topology = Topology::new(&nodes);
        let after = assign(&topology, &rule, &before).unwrap();
        check_balance(&topology, &rule, &after);
        for (b, a) in before.iter().zip(&after) {
            let mut stay: Vec<_> = b.iter().filter(|s| **s != gone).copied().collect();
            let mut kept: Vec<_> = a.iter().filter(|s| b.contains(s)).copied().collect();
            stay.sort_unstable();
            kept.sort_unstable();
            prop_assert_eq!(stay, kept, "a PG moved although its slices are all there");
        }
        prop_assert_eq!(moved(&before, &after), before.iter().flatten().filter(|s| **s == gone).count());
    }

    #[test]
    fn a_joining_host_takes_its_share_and_nothing_else_moves(
        hosts in 4u64..10, slices in 0u32..3, pgs in 32u32..400, copies in 1u8..4,
    ) {
        let mut nodes = cluster(hosts, 1, 1 << slices, 2);
        let rule = rule(copies, pgs);
        let before = assign(&Topology::new(&nodes), &rule, &[]).unwrap();
        nodes.push(node(hosts + 1, "new", 1, 1 << slices, 2, 10 * GIB));
        let topology = Topology::new(&nodes);
        let after = assign(&topology, &rule, &before).unwrap();
        check_balance(&topology, &rule, &after);
        check_primaries(&topology, &after, 0.10);
        let share = f64::from(pgs) * f64::from(copies) / (hosts + 1) as f64;
        let new: Vec<_> = nodes[hosts as usize].disks[0].slices.iter().map(|s| s.id).collect();
        let came = after.iter().flatten().filter(|s| new.contains(s)).count();
        prop_assert!(came as f64 >= share * 0.95 - new.len() as f64, "the new host got {} of {}", came, share);
        let slack = share * 0.1 + new.len() as f64;
        prop_assert!(moved(&before, &after) as f64 <= share + slack, "{} moved", moved(&before, &after));
    }
}

/// The bound within a host, in PGs: how far two slices may be apart, each measured against its fair share. A new pool
/// has whole PGs next to the share; what has grown may be a tolerance of 4 % further away, and never without any PG
/// where the share is a whole one.
fn check_within_hosts(topology: &Topology, rule: &Rule, lists: &Lists, tolerance: f64) {
    let (loads, fair) = (loads(lists), fair(topology, rule));
    let mut spread: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for spot in topology.spots() {
        let (load, fair) = (f64::from(loads.get(&spot.slice).copied().unwrap_or(0)), fair[&spot.slice]);
        let (low, high) = ((fair * (1.0 - tolerance)).floor(), (fair * (1.0 + tolerance)).ceil());
        let low = if fair >= 1.0 { low.max(1.0) } else { low };
        assert!((low..=high).contains(&load), "slice {} has {load} of {low} to {high}", spot.slice);
        let (least, most) = spread.entry(spot.domain(FailureDomain::Host)).or_insert((f64::MAX, f64::MIN));
        (*least, *most) = (least.min(load - fair), most.max(load - fair));
    }
    let largest = fair.values().copied().fold(0.0, f64::max);
    for (host, (least, most)) in spread {
        let apart = most - least;
        assert!(apart < 2.0 * (1.0 + largest * tolerance), "host {host}: slices are {apart} PGs apart");
    }
}

#[test]
fn both_disks_of_a_host_have_pgs_from_the_start_and_when_one_comes_later() {
    // One host with two disks beside hosts with one, as many copies as hosts: each host has every PG once.
    for (pgs, gib) in [(4, 10), (8, 10), (32, 10), (8, 5), (32, 20), (256, 11)] {
        let rule = rule(3, pgs);
        let mut nodes = cluster(3, 1, 2, 1);
        let late = node(3, "host3", 2, 2, 1, gib * GIB).disks.remove(1);
        let before = assign(&Topology::new(&nodes), &rule, &[]).unwrap();
        nodes[2].disks.push(late);
        let topology = Topology::new(&nodes);
        check_within_hosts(&topology, &rule, &assign(&topology, &rule, &[]).unwrap(), 0.0);
        let after = assign(&topology, &rule, &before).unwrap();
        check_valid(&topology, &rule, &after);
        check_within_hosts(&topology, &rule, &after, 0.04);
    }
}

#[test]
fn a_small_image_lies_in_as_many_pgs_as_it_has_stripes_and_no_more() {
    let objects = 2 * placement::PG_STRIPE_OBJECTS;
    for image in 1..100 {
        let object = |index| wire::ObjectId { pool: wire::PoolId(1), image: wire::ImageId(image), index };
        let pgs: BTreeSet<u32> =
            (0..objects).map(|index| placement::pg_of(object(index), 32).index).collect();
        assert!(pgs.len() <= 2, "8 MiB lie in {} PGs", pgs.len());
    }
}

#[test]
fn odd_host_names_are_only_names() {
    let long = "x".repeat(255);
    let names =
        ["null", "__proto__", "04e278988710", "höst-ß-日本", &long, "", "constructor", "1e5", "../.."];
    let nodes: Vec<Node> = (1..).zip(names).map(|(id, name)| node(id, name, 1, 2, 1, 10 * GIB)).collect();
    let topology = Topology::new(&nodes);
    assert_eq!(topology.domains(FailureDomain::Host), names.len());
    let rule = rule(3, 90);
    let lists = assign(&topology, &rule, &[]).unwrap();
    check_valid(&topology, &rule, &lists);
    check_balance(&topology, &rule, &lists);
    // The names survive the metadata store's JSON.
    for node in &nodes {
        let text = serde_json::to_string(node).unwrap();
        assert_eq!(&serde_json::from_str::<Node>(&text).unwrap(), node);
    }
}

#[test]
fn nodes_with_one_host_name_are_one_failure_domain() {
    let nodes = vec![node(1, "a", 1, 1, 1, GIB), node(2, "a", 1, 1, 1, GIB), node(3, "b", 1, 1, 1, GIB)];
    let topology = Topology::new(&nodes);
    let error = assign(&topology, &rule(3, 8), &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "3 copies need 3 different hosts with usable slices, the cluster has 2: add hosts, or ask for \
         fewer copies, or let copies share a host (failure domain disk)"
    );
    let by_disk = Rule { failure_domain: FailureDomain::Disk, ..rule(3, 8) };
    check_valid(&topology, &by_disk, &assign(&topology, &by_disk, &[]).unwrap());
}

#[test]
fn senseless_rules_are_refused() {
    let topology = Topology::new(&cluster(3, 1, 1, 1));
    assert_eq!(assign(&topology, &rule(0, 8), &[]), Err(PlacementError::Copies(0)));
    assert_eq!(assign(&topology, &rule(200, 8), &[]), Err(PlacementError::Copies(200)));
    assert_eq!(assign(&topology, &rule(1, 0), &[]), Err(PlacementError::PgCount(0)));
    let empty = assign(&Topology::default(), &rule(1, 1), &[]).unwrap_err();
    assert!(matches!(empty, PlacementError::NotEnoughDomains { have: 0, needed: 1, .. }));
}

#[test]
fn a_slice_without_space_takes_nothing_and_a_previous_list_may_be_nonsense() {
    let mut nodes = cluster(4, 1, 2, 2);
    nodes[0].disks[0].slices[0].size_bytes = 0;
    let empty = nodes[0].disks[0].slices[0].id;
    let topology = Topology::new(&nodes);
    let rule = rule(3, 40);
    let twice = nodes[1].disks[0].slices[0].id;
    let junk: Lists = vec![vec![SliceId(77), twice, twice, empty]; 99];
    let lists = assign(&topology, &rule, &junk).unwrap();
    check_valid(&topology, &rule, &lists);
    assert!(!lists.iter().flatten().any(|s| *s == empty || *s == SliceId(77)));
}

#[test]
fn pools_of_one_shape_are_placed_differently() {
    let topology = Topology::new(&cluster(6, 1, 2, 2));
    let one = assign(&topology, &rule(3, 64), &[]).unwrap();
    let two = assign(&topology, &Rule { seed: 2, ..rule(3, 64) }, &[]).unwrap();
    assert_ne!(one, two);
}

#[test]
fn a_lost_slice_is_rebuilt_by_many_and_its_primaries_spread() {
    let nodes = cluster(8, 1, 2, 2);
    let topology = Topology::new(&nodes);
    let lists = assign(&topology, &rule(3, 480), &[]).unwrap();
    let lost = nodes[0].disks[0].slices[0].id;
    let partners: BTreeSet<SliceId> =
        lists.iter().filter(|l| l.contains(&lost)).flatten().copied().filter(|s| *s != lost).collect();
    assert_eq!(partners.len(), 14, "every slice of another host shares a PG with it");
    let mut heirs: BTreeMap<SliceId, u32> = BTreeMap::new();
    for list in lists.iter().filter(|l| l[0] == lost) {
        *heirs.entry(list[1]).or_default() += 1;
    }
    assert!(heirs.len() >= 7, "{} slices inherit its primaries", heirs.len());
}

/// Places a pool in steps; the lists, and the most looks that one step took.
fn in_steps(nodes: &[Node], rule: &Rule, previous: &Lists, looks: u64) -> (Lists, u64) {
    let mut assigner = Assigner::new(Arc::new(Topology::new(nodes)), *rule, previous.clone()).unwrap();
    let mut most = 0;
    loop {
        let before = assigner.looks();
        let done = assigner.step(looks);
        most = most.max(assigner.looks() - before);
        if let Some(lists) = done {
            return (lists, most);
        }
    }
}

#[test]
fn steps_give_the_same_and_none_of_a_large_pool_is_long() {
    let mut nodes = cluster(30, 1, 4, 4);
    let rule = rule(3, 10_000);
    let mut lists = Lists::new();
    // Created; then a host leaves; then two come.
    for change in 0..3 {
        match change {
            1 => drop(nodes.remove(7)),
            2 => nodes.extend([100, 101].map(|id| node(id, &format!("new{id}"), 1, 4, 4, 10 * GIB))),
            _ => {}
        }
        let at_once = assign(&Topology::new(&nodes), &rule, &lists).unwrap();
        let (stepped, most) = in_steps(&nodes, &rule, &lists, LOOKS_PER_STEP);
        assert!(stepped == at_once, "change {change}: steps change nothing");
        assert!(most <= 2 * LOOKS_PER_STEP, "change {change}: a step took {most} looks");
        lists = at_once;
    }
    let (tiny, _) = in_steps(&nodes, &rule, &lists, 1);
    assert!(tiny == lists, "what is in place stays, however small the steps");
}

#[test]
fn a_node_that_leads_nothing_keeps_its_copies_and_the_others_share_its_primaries() {
    let nodes = cluster(4, 1, 2, 2);
    let (rule, topology) = (rule(3, 128), Topology::new(&nodes));
    let before = assign(&topology, &rule, &[]).unwrap();
    let two = [wire::NodeId(2)].into();
    let following = topology.clone().following(&two);
    let after = assign(&following, &rule, &before).unwrap();
    assert_eq!(moved(&before, &after), 0);
    let mut led: BTreeMap<wire::NodeId, u32> = BTreeMap::new();
    for list in &after {
        *led.entry(topology.spot(list[0]).unwrap().node).or_default() += 1;
    }
    assert_eq!(led.keys().map(|node| node.0).collect::<Vec<_>>(), [1, 3, 4]);
    assert!(led.values().all(|led| (38..=48).contains(led)), "{led:?}");
    // Where nobody else has a copy, a follower leads all the same.
    let all = nodes.iter().map(|node| node.id).collect();
    check_primaries(&topology, &assign(&topology.clone().following(&all), &rule, &after).unwrap(), 0.1);

    let emptied = following.without(&two);
    let gone = assign(&emptied, &rule, &after).unwrap();
    check_valid(&emptied, &rule, &gone);
    assert_eq!(
        moved(&after, &gone),
        after.iter().flatten().filter(|s| topology.spot(**s).unwrap().node.0 == 2).count()
    );
}
