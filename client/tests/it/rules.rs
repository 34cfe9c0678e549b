//! The rules of one client on a healthy cluster: what is accepted, how it is split and ordered, what a
//! flush waits for.

use crate::cluster::IMAGE;
use crate::world::{World, empty, filled, tags};
use client::{IN_FLIGHT_MAX, IoError, MAX_IO_BYTES, OPS_MAX, Op, OpenMode, Options, PARTS_MAX, SubmitError};
use reactor::IoBuf;
use wire::{BLOCK_BYTES, FrameKind, OBJECT_BYTES};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = BLOCK_BYTES as u64;

#[test]
fn an_operation_is_split_at_object_borders_and_put_together_again() {
    let (mut world, image) = World::opened(1, Options::default(), 64 * MIB);
    let offset = OBJECT_BYTES as u64 - 2 * BLOCK;
    let mut buf = IoBuf::heap(OBJECT_BYTES + 5 * BLOCK_BYTES).unwrap();
    for (i, block) in buf.as_mut_slice().unwrap().chunks_mut(BLOCK_BYTES).enumerate() {
        block.chunks_mut(8).for_each(|word| word.copy_from_slice(&(i as u64).to_le_bytes()));
    }
    let blocks = buf.len() / BLOCK_BYTES;
    assert_eq!(world.perform(image, Op::Write { offset, buf }).result, Ok(()));
    let mut sent: Vec<_> =
        world.cluster.performed.iter().map(|h| (h.object.index, h.block, h.blocks)).collect();
    sent.sort_unstable();
    assert_eq!(sent, vec![(0, 30, 2), (1, 0, 32), (2, 0, 3)]);
    let done = world.perform(image, Op::Read { offset, buf: empty(blocks) });
    assert_eq!(done.result, Ok(()));
    assert_eq!(tags(done.buf.unwrap().as_slice()), (0..blocks as u64).collect::<Vec<_>>());
}

#[test]
fn what_cannot_be_done_is_refused_with_its_reason() {
    let (mut world, image) = World::opened(2, Options::default(), MIB);
    let mut refuse = |op| world.submit(image, op, 0).unwrap_err();
    assert_eq!(refuse(Op::Read { offset: 512, buf: empty(1) }), SubmitError::Unaligned);
    assert_eq!(refuse(Op::Read { offset: 0, buf: IoBuf::heap(100).unwrap() }), SubmitError::Unaligned);
    assert_eq!(refuse(Op::Discard { offset: 0, len: 0 }), SubmitError::Empty);
    assert_eq!(refuse(Op::Discard { offset: 0, len: MAX_IO_BYTES + BLOCK }), SubmitError::TooLong);
    let out = SubmitError::OutOfRange { size_bytes: MIB };
    assert_eq!(refuse(Op::Write { offset: MIB, buf: empty(1) }), out);
    assert_eq!(refuse(Op::Write { offset: MIB - BLOCK, buf: empty(2) }), out);
    assert_eq!(refuse(Op::Discard { offset: u64::MAX - BLOCK + 1, len: BLOCK }), out);
    let shared = empty(1);
    assert_eq!(refuse(Op::Read { offset: 0, buf: shared.clone() }), SubmitError::BufferShared);
    assert_eq!(refuse(Op::DeleteObjects { first: 0, count: 1 }), SubmitError::NotAllowed);
    world.client.close(&mut world.env, image);
    assert_eq!(world.submit(image, Op::Flush, 0), Err(SubmitError::NotOpen));
    let ticket = world.client.open(&mut world.env, "disk", OpenMode::ReadOnly);
    let image = world.wait_open(ticket).unwrap();
    assert_eq!(world.submit(image, Op::Write { offset: 0, buf: empty(1) }, 0), Err(SubmitError::NotAllowed));
    assert_eq!(world.perform(image, Op::Read { offset: 0, buf: empty(1) }).result, Ok(()));
}

#[test]
fn overlapping_operations_go_one_after_the_other_and_others_at_once() {
    let (mut world, image) = World::opened(3, Options::default(), 64 * MIB);
    assert_eq!(world.perform(image, Op::Read { offset: 0, buf: empty(1) }).result, Ok(()));
    world.answering = false;
    let write = |offset, tag| Op::Write { offset, buf: filled(2, tag) };
    world.submit(image, write(0, 1), 1).unwrap();
    world.submit(image, write(BLOCK, 2), 2).unwrap(); // overlaps 1
    world.submit(image, write(2 * BLOCK, 3), 3).unwrap(); // overlaps 2
    world.submit(image, write(8 * BLOCK, 4), 4).unwrap(); // overlaps nothing
    world.submit(image, Op::Read { offset: 0, buf: empty(8) }, 5).unwrap(); // overlaps 1 to 3
    world.submit(image, Op::Read { offset: 8 * BLOCK, buf: empty(1) }, 6).unwrap(); // overlaps 4
    world.submit(image, Op::Read { offset: 20 * BLOCK, buf: empty(1) }, 7).unwrap();
    world.submit(image, Op::Read { offset: 20 * BLOCK, buf: empty(1) }, 8).unwrap(); // reads never wait
    assert_eq!(world.pending_data(), 4, "1, 4, 7 and 8 are sent");
    world.answering = true;
    let mut order = Vec::new();
    while order.len() < 8 {
        let done = world.wait_io();
        assert_eq!(done.result, Ok(()));
        if done.user == 5 {
            assert_eq!(tags(done.buf.as_ref().unwrap().as_slice()), [1, 2, 3, 3, 0, 0, 0, 0]);
        }
        order.push(done.user);
    }
    let place = |user| order.iter().position(|u| *u == user).unwrap();
    assert!(place(1) < place(2) && place(2) < place(3) && place(3) < place(5) && place(4) < place(6));
}

#[test]
fn a_flush_waits_for_earlier_changes_only() {
    let (mut world, image) = World::opened(4, Options::default(), 64 * MIB);
    assert_eq!(world.perform(image, Op::Flush).result, Ok(()), "nothing to wait for");
    world.answering = false;
    world.submit(image, Op::Write { offset: 0, buf: filled(1, 1) }, 1).unwrap();
    world.submit(image, Op::Flush, 2).unwrap();
    world.submit(image, Op::Write { offset: 4 * MIB, buf: filled(1, 2) }, 3).unwrap();
    world.submit(image, Op::Flush, 4).unwrap();
    for _ in 0..200 {
        world.step();
    }
    assert!(world.client.poll().is_none());
    assert!(world.pending_data() >= 1, "a flush holds no later write back");
    world.answering = true;
    let order: Vec<u64> = (0..4).map(|_| world.wait_io().user).collect();
    let place = |user| order.iter().position(|u| *u == user).unwrap();
    assert!(place(1) < place(2) && place(2) < place(4) && place(3) < place(4), "{order:?}");
}

#[test]
fn zeroes_and_deletes_reach_the_cluster() {
    let (mut world, image) = World::opened(5, Options::default(), MIB);
    world.perform(image, Op::Write { offset: 0, buf: filled(64, 9) });
    assert_eq!(world.perform(image, Op::Discard { offset: 0, len: 40 * BLOCK }).result, Ok(()));
    let zero = Op::WriteZeroes { offset: 40 * BLOCK, len: BLOCK };
    assert_eq!(world.perform(image, zero).result, Ok(()));
    assert_eq!(world.cluster.blocks.len(), 23);
    let ticket = world.client.open(&mut world.env, "disk", OpenMode::Removal);
    let removal = world.wait_open(ticket).unwrap();
    let done = world.perform(removal, Op::DeleteObjects { first: 0, count: 256 });
    assert_eq!(done.result, Ok(()), "also behind the end");
    assert!(world.cluster.blocks.is_empty());
    let deletes = world.cluster.performed.iter().filter(|h| h.kind == FrameKind::Delete);
    assert_eq!(deletes.map(|h| h.object.index).max(), Some(255));
}

#[test]
fn bounds_push_back_and_everything_accepted_completes() {
    let (mut world, image) = World::opened(6, Options::default(), 4096 * MIB);
    world.warm_up(image);
    world.answering = false;
    let mut accepted = 0;
    let refused = loop {
        match world.submit(image, Op::WriteZeroes { offset: accepted * 4 * MIB, len: 4 * MIB }, 0) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, SubmitError::Busy);
    assert_eq!(accepted as usize, PARTS_MAX / 32);
    assert_eq!(world.pending_data(), IN_FLIGHT_MAX);
    world.answering = true;
    for _ in 0..accepted {
        assert_eq!(world.wait_io().result, Ok(()));
    }
    for _ in 0..OPS_MAX {
        world.submit(image, Op::Flush, 0).unwrap();
    }
    assert_eq!(world.submit(image, Op::Flush, 0), Err(SubmitError::Busy), "completions have to be polled");
    assert!(world.client.poll().is_some());
    assert!(world.submit(image, Op::Flush, 0).is_ok());
}

#[test]
fn a_resize_is_seen_and_a_removal_ends_everything() {
    let (mut world, image) = World::opened(7, Options::default(), MIB);
    world.cluster.resize(2 * MIB);
    while world.client.info(image).unwrap().size_bytes != 2 * MIB {
        world.step();
    }
    let far = MIB + BLOCK;
    assert_eq!(world.perform(image, Op::Write { offset: far, buf: filled(1, 1) }).result, Ok(()));
    world.cluster.resize(MIB);
    while world.client.info(image).unwrap().size_bytes != MIB {
        world.step();
    }
    let refused = world.submit(image, Op::Read { offset: far, buf: empty(1) }, 0);
    assert_eq!(refused, Err(SubmitError::OutOfRange { size_bytes: MIB }));
    // One is sent, one waits for it, one waits for both; the flush waits for all.
    world.answering = false;
    for (user, blocks) in [(1, 1), (2, 2), (3, 3)] {
        world.submit(image, Op::Write { offset: 0, buf: filled(blocks, user) }, user).unwrap();
    }
    world.submit(image, Op::Flush, 4).unwrap();
    world.cluster.image.removing = true;
    world.cluster.resize(MIB);
    while !world.client.info(image).unwrap().removed {
        world.step();
    }
    assert_eq!(world.submit(image, Op::Flush, 0), Err(SubmitError::ImageRemoved));
    world.answering = true;
    for _ in 0..4 {
        let done = world.wait_io();
        assert_eq!(done.result, Err(IoError::ImageRemoved), "operation {}", done.user);
    }
    assert!(!world.client.is_busy());
    assert!(world.cluster.performed.iter().filter(|h| h.object.image == IMAGE).count() <= 2);
    let ticket = world.client.open(&mut world.env, "disk", OpenMode::ReadWrite);
    assert_eq!(world.wait_open(ticket), Err(client::AdminError::Removing));
}

#[test]
fn closing_an_image_lets_what_is_under_way_complete() {
    let (mut world, image) = World::opened(8, Options::default(), MIB);
    world.submit(image, Op::Write { offset: 0, buf: filled(1, 1) }, 1).unwrap();
    world.client.close(&mut world.env, image);
    world.client.close(&mut world.env, image);
    assert_eq!(world.client.info(image), None);
    assert_eq!(world.wait_io().result, Ok(()));
    assert_eq!(world.client.info(image), None);
}
