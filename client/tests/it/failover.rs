//! What the caller notices when the cluster fails: a pause, and only the errors that are due.

use crate::cluster::{Misdeed, PGS};
use crate::world::{World, empty, filled, tags};
use client::{FAULT_TRIES_MAX, ImageHandle, IoError, OnNoSpace, Op, Options};
use reactor::{Arena, IoBuf};
use std::ptr::NonNull;
use wire::{BLOCK_BYTES, Status};

const MIB: u64 = 1 << 20;

fn write(world: &mut World, image: ImageHandle, tag: u64) -> Result<(), IoError> {
    world.perform(image, Op::Write { offset: 0, buf: filled(1, tag) }).result
}

fn read(world: &mut World, image: ImageHandle) -> Result<u64, IoError> {
    let done = world.perform(image, Op::Read { offset: 0, buf: empty(1) });
    done.result.map(|()| tags(done.buf.unwrap().as_slice())[0])
}

#[test]
fn refusals_that_pass_are_not_noticed() {
    let (mut world, image) = World::opened(1, Options::default(), MIB);
    for (tag, status) in [
        Status::StaleEpoch,
        Status::NotPrimary,
        Status::NotActive,
        Status::Busy,
        Status::Unknown,
        Status::ShuttingDown,
        Status::OutOfSync,
    ]
    .into_iter()
    .enumerate()
    {
        world.cluster.misdeeds = vec![Misdeed::Refuse(status); 5];
        assert_eq!(write(&mut world, image, tag as u64), Ok(()), "{status}");
        assert_eq!(read(&mut world, image), Ok(tag as u64));
    }
    assert_eq!(world.client.counters().retried, 35);
}

#[test]
fn refusals_that_stay_are_reported() {
    let (mut world, image) = World::opened(2, Options::default(), MIB);
    for (status, error) in [
        (Status::NoSpace, IoError::NoSpace),
        (Status::Invalid, IoError::Invalid),
        (Status::NotFound, IoError::NotFound),
        (Status::WrongCluster, IoError::Refused(Status::WrongCluster)),
    ] {
        world.cluster.misdeeds = vec![Misdeed::Refuse(status)];
        assert_eq!(write(&mut world, image, 1), Err(error));
    }
    for (status, error) in [(Status::Io, IoError::Device), (Status::Corrupt, IoError::Corrupt)] {
        let tries = usize::from(FAULT_TRIES_MAX);
        world.cluster.misdeeds = vec![Misdeed::Refuse(status); tries - 1];
        assert_eq!(write(&mut world, image, 1), Ok(()), "the last try counts");
        world.cluster.misdeeds = vec![Misdeed::Refuse(status); tries];
        assert_eq!(write(&mut world, image, 1), Err(error));
        assert!(world.cluster.misdeeds.is_empty());
    }
}

#[test]
fn no_space_can_be_waited_for() {
    let options = Options { on_no_space: OnNoSpace::Wait, ..Options::default() };
    let (mut world, image) = World::opened(3, options, MIB);
    world.cluster.misdeeds = vec![Misdeed::Refuse(Status::NoSpace); 10];
    let before = world.now_ms();
    assert_eq!(write(&mut world, image, 1), Ok(()));
    assert!(world.now_ms() >= before + 1000, "ten pauses");
}

#[test]
fn damaged_bytes_are_read_again_and_never_delivered() {
    let (mut world, image) = World::opened(4, Options::default(), MIB);
    assert_eq!(write(&mut world, image, 5), Ok(()));
    for in_place in [true, false] {
        world.env.deliver_in_place = in_place;
        let tries = usize::from(FAULT_TRIES_MAX);
        world.cluster.misdeeds = vec![Misdeed::FlipBit; tries - 1];
        assert_eq!(read(&mut world, image), Ok(5));
        world.cluster.misdeeds = vec![Misdeed::FlipBit; tries];
        assert_eq!(read(&mut world, image), Err(IoError::Corrupt));
    }
}

#[test]
fn the_death_of_a_primary_costs_a_pause() {
    for seed in 0..20 {
        let (mut world, image) = World::opened(seed, Options::default(), 64 * MIB);
        for i in 0..64 {
            let op = Op::Write { offset: i * MIB, buf: filled(1, i + 1) };
            world.submit(image, op, i).unwrap();
        }
        for _ in 0..seed * 5 {
            world.step();
        }
        let before = world.now_ms();
        world.kill((seed % 3) as usize);
        for _ in 0..64 {
            assert_eq!(world.wait_io().result, Ok(()));
        }
        assert!(world.now_ms() - before < 500, "seed {seed}: {} ms", world.now_ms() - before);
        for i in 0..64 {
            let done = world.perform(image, Op::Read { offset: i * MIB, buf: empty(1) });
            assert_eq!(tags(done.buf.unwrap().as_slice()), [i + 1]);
        }
    }
}

#[test]
fn io_goes_on_without_a_control_connection() {
    let (mut world, image) = World::opened(5, Options::default(), MIB);
    assert_eq!(write(&mut world, image, 1), Ok(()));
    world.control_answering = false;
    let mut first = world.conns_to(|to| to.port() < 200);
    assert_eq!(first.len(), 1, "one control connection");
    world.cut(first.remove(0));
    for tag in 2..50 {
        assert_eq!(write(&mut world, image, tag), Ok(()));
    }
    // A new map is learned from another node once one answers.
    world.control_answering = true;
    let slice = world.cluster.nodes[2].slice;
    for pg in 0..PGS {
        world.cluster.set_primary(pg, Some(slice));
    }
    assert_eq!(write(&mut world, image, 50), Ok(()));
    assert_eq!(read(&mut world, image), Ok(50));
}

#[test]
fn a_hanging_control_node_is_left_for_another() {
    let (mut world, image) = World::opened(6, Options::default(), MIB);
    assert_eq!(write(&mut world, image, 1), Ok(()));
    let hanging = world.client.connected_to().unwrap();
    world.control_answering = false;
    world.answering = false;
    world.submit(image, Op::Write { offset: 0, buf: filled(1, 2) }, 0).unwrap();
    let before = world.now_ms();
    while world.client.connected_to() == Some(hanging) {
        world.step();
    }
    assert!(world.now_ms() - before <= 1700, "{} ms", world.now_ms() - before);
    world.control_answering = true;
    world.answering = true;
    assert_eq!(world.wait_io().result, Ok(()));
    assert_ne!(world.client.connected_to(), Some(hanging));
}

#[test]
fn a_time_limit_ends_operations_wherever_they_are() {
    let options = Options { io_timeout_ms: Some(700), ..Options::default() };
    let (mut world, image) = World::opened(7, options, MIB);
    assert_eq!(write(&mut world, image, 1), Ok(()));
    world.answering = false;
    let before = world.now_ms();
    world.submit(image, Op::Write { offset: 0, buf: filled(1, 2) }, 0).unwrap(); // sent
    world.submit(image, Op::Read { offset: 0, buf: empty(1) }, 0).unwrap(); // waits for it
    world.submit(image, Op::Flush, 0).unwrap();
    for _ in 0..3 {
        assert_eq!(world.wait_io().result, Err(IoError::TimedOut));
    }
    let took = world.now_ms() - before;
    assert!((700..900).contains(&took), "{took} ms");
    assert!(!world.client.is_busy());
    world.answering = true;
    assert_eq!(write(&mut world, image, 3), Ok(()));
    assert_eq!(read(&mut world, image), Ok(3), "the write given up was fenced by the new connection");
}

#[test]
fn a_timed_out_read_no_longer_touches_the_callers_memory() {
    let options = Options { io_timeout_ms: Some(300), ..Options::default() };
    let (mut world, image) = World::opened(8, options, MIB);
    assert_eq!(write(&mut world, image, 1), Ok(()));
    let mut memory = vec![0u8; BLOCK_BYTES];
    let ptr = NonNull::new(memory.as_mut_ptr()).unwrap();
    // SAFETY: `memory` is not touched before the read has completed.
    let buf = unsafe { IoBuf::foreign(ptr, BLOCK_BYTES) };
    let ticket = world.submit(image, Op::Read { offset: 0, buf }, 0).unwrap();
    world.answering = false;
    let done = world.wait_io();
    assert_eq!((done.ticket, done.result), (ticket, Err(IoError::TimedOut)));
    memory.fill(7);
    world.answering = true;
    for _ in 0..500 {
        world.step();
    }
    assert!(memory.iter().all(|byte| *byte == 7));
}

#[test]
fn silence_of_a_live_primary_ends_with_another_connection() {
    let (mut world, image) = World::opened(9, Options::default(), MIB);
    assert_eq!(write(&mut world, image, 1), Ok(()));
    world.answering = false;
    world.submit(image, Op::Write { offset: 0, buf: filled(1, 2) }, 0).unwrap();
    let before = world.client.counters().disconnects;
    while world.client.counters().disconnects == before {
        world.step();
    }
    world.answering = true;
    assert_eq!(world.wait_io().result, Ok(()));
}

#[test]
fn a_client_that_was_not_polled_does_not_blame_the_cluster() {
    let (mut world, image) = World::opened(10, Options::default(), MIB);
    assert_eq!(write(&mut world, image, 1), Ok(()));
    let at = world.client.connected_to();
    let jumps = 20;
    for tag in 0..jumps {
        world.sleep_ms(10_000);
        assert_eq!(write(&mut world, image, tag), Ok(()));
    }
    assert_eq!(world.client.connected_to(), at);
    assert_eq!(world.client.counters().disconnects, 0);
}

#[test]
fn answers_to_nothing_are_ignored() {
    let (mut world, image) = World::opened(11, Options::default(), MIB);
    assert_eq!(write(&mut world, image, 1), Ok(()));
    world.answering = false;
    world.submit(image, Op::Read { offset: 0, buf: empty(1) }, 0).unwrap();
    let conns = world.conns_to(|to| to.port() >= 200);
    let arena = Arena::new(1 << 20).unwrap();
    for request in (0..64).chain([u64::MAX, 1 << 32, 2 << 32 | 5]) {
        for conn in conns.iter().copied().chain([999]) {
            let header = wire::Header::new(wire::FrameKind::ReadReply, request);
            let payload = Some(arena.alloc(BLOCK_BYTES).unwrap());
            let frame = reactor::Frame { header, crcs: wire::BlockCrcs::default(), payload };
            world.hand_over(conn, frame);
        }
    }
    world.answering = true;
    assert_eq!(world.wait_io().result, Ok(()));
}
