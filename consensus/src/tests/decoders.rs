//! Bytes from network and disk that nobody should have written: errors, never panics.

use crate::blocks::{Head, Record, Super, decode_log_block, encode_batch};
use crate::codec::{Body, Chunk, Command, EntryMsg, Op, Packet, RaftMsg, RequestId, Verdict};
use crate::image::{self, Parts};
use crate::machine::Machine;
use crate::members::Members;
use crate::planted::Planted;
use crate::testing::{CLUSTER, Options, World, put};
use proptest::prelude::*;
use raft::eraftpb::MessageType;
use wire::NodeId;
use wire::control::{VoterAddress, Write};

fn packets() -> Vec<Packet> {
    let packet = |body| Packet { cluster: CLUSTER, from: NodeId(2), body };
    let raft = RaftMsg {
        kind: 3,
        term: 5,
        log_term: 4,
        index: 7,
        commit: 6,
        commit_term: 4,
        reject: false,
        reject_hint: 3,
        context: vec![1, 2, 3],
        entries: vec![EntryMsg { term: 5, index: 8, data: vec![9; 40] }],
    };
    let chunk = Chunk {
        transfer: 1,
        whole: true,
        term: 5,
        index: 9,
        total: 3,
        crc: 4,
        offset: 0,
        bytes: vec![1, 2, 3],
    };
    vec![
        packet(Body::Raft(raft)),
        packet(Body::Chunk(chunk)),
        packet(Body::Forward { id: RequestId { session: 1, seq: 2, floor: 1 }, request: put("/a", "1") }),
        packet(Body::WantEphemeral),
        packet(Body::NotMember {
            index: 7,
            voters: vec![VoterAddress { node: NodeId(4), address: "10.0.0.4:700".to_owned() }],
        }),
        packet(Body::Forward {
            id: RequestId { session: 1, seq: 2, floor: 1 },
            request: World::change_request(&[3], &[1]),
        }),
        packet(Body::Answer {
            session: 1,
            seq: 2,
            reply: wire::control::MetaReply::Voters {
                members: vec![],
                target: vec![NodeId(1)],
                settled: true,
            },
        }),
    ]
}

fn members() -> Members {
    let founders = Members::founded(&[NodeId(1), NodeId(2), NodeId(3)]);
    founders.begun(&[World::address(3)], &[NodeId(3)], &[World::address(0)]).unwrap().entered()
}

fn image() -> Vec<u8> {
    let mut machine = Machine::new(Planted::none());
    let command = |seq, op| Command { id: RequestId { session: 3, seq, floor: 1 }, op }.encode();
    machine.apply(1, 1, &command(1, Op::EphemeralReset)).unwrap();
    machine.apply(2, 1, &command(2, Op::LeaseSet { lease: 8, ttl_ms: 1000 })).unwrap();
    let put = |key: &str, lease| Write::Put { key: key.into(), value: "[1,2]".into(), lease };
    let writes = vec![put("/a", None), put("/b", None), put("/l", Some(8))];
    machine.members = members();
    machine.apply(3, 1, &command(3, Op::Txn { verdict: Verdict::Apply, writes, stripped: false })).unwrap();
    image::encode(&machine, Parts::Whole)
}

#[test]
fn every_bit_of_a_block_counts() {
    let mut payload = Vec::new();
    Record::Entry { index: 3, term: 2, data: vec![7; 100] }.encode(&mut payload);
    let block = encode_batch(1, 5, 6, &payload);
    assert!(decode_log_block(&block).is_some());
    for bit in 0..block.len() * 8 {
        let mut damaged = block.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(decode_log_block(&damaged).is_none(), "bit {bit}");
    }
}

/// An image as versions wrote it that knew no changes of the members: these are the founders then.
#[test]
fn an_image_without_members_is_read_and_keeps_the_founders() {
    let mut old = Machine::new(Planted::none());
    old.apply(1, 1, &Command { id: RequestId::default(), op: Op::EphemeralReset }.encode()).unwrap();
    let bytes = image::encode(&old, Parts::Durable);
    assert_eq!(bytes.get(6..8), Some([1, 0].as_slice()), "durable part and nothing else");
    let mut machine = Machine::new(Planted::none());
    machine.members = Members::founded(&[NodeId(1)]);
    machine.install(image::decode(&bytes).unwrap());
    assert_eq!(*machine.members(), Members::founded(&[NodeId(1)]));
}

#[test]
fn an_image_survives_its_bytes() {
    let bytes = image();
    let decoded = image::decode(&bytes).unwrap();
    let mut machine = Machine::new(Planted::none());
    machine.install(decoded);
    assert_eq!(*machine.members(), members());
    assert_eq!(image::encode(&machine, Parts::Whole), bytes);
    for len in 0..bytes.len() {
        assert!(image::decode(&bytes[..len]).is_err(), "cut at {len}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn random_bytes_decode_to_errors(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Packet::decode(&bytes);
        let _ = Command::decode(&bytes);
        let _ = image::decode(&bytes);
        let _ = Record::decode_all(&bytes);
        let _ = (Super::decode(&bytes), Head::decode(&bytes), decode_log_block(&bytes));
        let mut versioned = vec![crate::codec::CODEC_VERSION];
        versioned.extend_from_slice(&bytes);
        let _ = Packet::decode(&versioned);
        let _ = Command::decode(&versioned);
    }

    #[test]
    fn flipped_bits_decode_to_errors_or_to_something_harmless(
        which in 0usize..7,
        flips in proptest::collection::vec(any::<u32>(), 1..5),
    ) {
        let mut bytes = packets()[which].encode();
        let mut image = image();
        for flip in flips {
            let bit = flip as usize;
            let (a, b) = (bit / 8 % bytes.len(), bit / 8 % image.len());
            bytes[a] ^= 1 << (bit % 8);
            image[b] ^= 1 << (bit % 8);
        }
        if let Ok(image) = image::decode(&image) {
            prop_assert!(image.members.is_none_or(|members| members.is_sound()));
        }
        if let Ok(Packet { body: Body::Raft(raft), .. }) = Packet::decode(&bytes) {
            let _ = raft.into_message(NodeId(2), NodeId(1));
        }
    }
}

/// Any Raft message whatever, from a voter of the right cluster, at any voter: none may panic. (They may
/// do harm to the group: voters trust each other.)
#[test]
fn what_a_read_is_recognized_by_comes_back_as_it_was() {
    for kind in [MessageType::MsgReadIndex, MessageType::MsgReadIndexResp] {
        for first in 0..=255 {
            let data = vec![first, 7, 7];
            let term = u64::from(kind == MessageType::MsgReadIndexResp);
            let read = RaftMsg {
                kind: kind as u8,
                term,
                log_term: 0,
                index: 0,
                commit: 0,
                commit_term: 0,
                reject: false,
                reject_hint: 0,
                context: Vec::new(),
                entries: vec![EntryMsg { term: 0, index: 0, data: data.clone() }],
            };
            let message = read.into_message(NodeId(2), NodeId(1)).unwrap();
            assert_eq!(
                message.entries[0].data, data,
                "not even where it begins like a command that changes members"
            );
        }
    }
}

#[test]
fn no_raft_message_can_stop_the_process() {
    for seed in 0..300 {
        let mut w = World::new(seed, Options::default());
        let leader = w.elect();
        w.put(leader, "/a", "1");
        w.converge();
        let victim = if seed % 2 == 0 { leader } else { (leader + 1) % 3 };
        let from = World::id((victim + 1) % 3);
        for _ in 0..60 {
            let term = w.node(victim).status().term;
            let last = w.node(victim).status().last_index;
            let mut near = |around: u64| match w.random.below(6) {
                0 => 0,
                1 => u64::MAX,
                2 => w.random.bits(),
                n => around.wrapping_add(n).saturating_sub(4),
            };
            let (index, log_term) = (near(last), near(term));
            let message = RaftMsg {
                kind: near(10) as u8 % 20,
                term: near(term),
                log_term,
                index,
                commit: near(last),
                commit_term: near(term),
                reject: near(1) % 2 == 0,
                reject_hint: near(last),
                context: vec![],
                entries: (0..near(1) % 3)
                    .map(|i| {
                        let op = match near(2) % 3 {
                            0 => Op::Members { members: Box::new(members()), writes: Vec::new() },
                            _ => Op::EphemeralReset,
                        };
                        EntryMsg {
                            term: near(term),
                            index: index.wrapping_add(1 + i),
                            data: Command { id: RequestId::default(), op }.encode(),
                        }
                    })
                    .collect(),
            };
            let packet = Packet { cluster: CLUSTER, from, body: Body::Raft(message) };
            w.with(victim, |meta, env| meta.on_message(env, from, &packet.encode()));
            // No further: what such a message breaks between voters is not the point here.
            if !w.failures().is_empty() {
                break;
            }
        }
    }
}
