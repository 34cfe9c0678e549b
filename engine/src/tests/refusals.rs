//! Requests and connections that must be refused, and stopping.

use super::cluster::*;
use crate::CoreMsg;
use reactor::{Frame, IoBuf, Net};
use wire::{BLOCK_BYTES, BlockCrcs, ClusterId, Epoch, FrameKind, Header, NodeId, SessionId, Status};

fn ready(seed: u64) -> (Cluster, reactor::ConnId) {
    let mut c = Cluster::new(seed);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(0, 1);
    c.put(conn, 1, 0, 1);
    (c, conn)
}

#[test]
fn an_older_connection_of_a_session_is_fenced_before_the_newer_is_welcomed() {
    let (mut c, old) = ready(1);
    c.world.borrow_mut().hold(CLIENT, 0);
    let late = c.write(old, 1, 0, 9);
    // The newer connection overtakes what the older one still carries.
    let held = c.dial_as(0, None, 2);
    c.world.borrow_mut().lose(CLIENT, 0);
    assert!(!c.welcomed.contains_key(&held));
    let new = c.dial(0, 3);
    c.put(new, 1, 0, 2);
    assert!(!c.replies.contains_key(&late));
    let older = c.dial_as(0, None, 2);
    c.wait("an answer", |c| c.welcomed.contains_key(&older));
    assert_eq!(c.welcomed[&older].refused, Status::StaleEpoch as u8);
    assert_eq!(c.get(new, 1, 0), 2);
}

#[test]
fn a_waiting_write_of_a_fenced_connection_is_never_applied() {
    let (mut c, old) = ready(2);
    c.world.borrow_mut().hold(0, 2);
    let first = c.write(old, 1, 0, 5);
    let read = c.read(old, 1, 0);
    let behind = c.write(old, 1, 0, 6);
    c.pass(10);
    let new = c.dial(0, 2);
    c.wait("fenced", |c| c.closed.contains(&old));
    c.world.borrow_mut().release(0, 2);
    assert_eq!(c.get(new, 1, 0), 5, "started before, so it is done; what waited behind it is not");
    c.pass(50);
    assert!([first, read, behind].iter().all(|request| !c.replies.contains_key(request)));
    assert_eq!(c.get(new, 1, 0), 5);
    c.assert_idle(0);
}

#[test]
fn strangers_are_told_why() {
    let mut c = Cluster::new(3);
    let foreign = c.dial_as(0, Some(ClusterId(1)), 1);
    c.wait("an answer and the end", |c| c.closed.contains(&foreign));
    assert_eq!(c.welcomed[&foreign].refused, Status::WrongCluster as u8);
    let newcomer = c.dial_as(0, None, 1);
    c.wait("an answer", |c| c.welcomed.contains_key(&newcomer));
    assert_eq!(c.welcomed[&newcomer].cluster, Some(CLUSTER));
    assert_eq!(c.welcomed[&newcomer].refused, 0);
}

#[test]
fn anything_but_a_hello_first_ends_the_connection() {
    let mut c = Cluster::new(4);
    let conn = c.client_env.connect(addr(0), reactor::Framing::Frames);
    let mut header = Header::new(FrameKind::Hello, 0);
    header.payload_len = 5;
    let garbage = Frame { header, crcs: BlockCrcs::one(1), payload: Some(IoBuf::copy_of(b"hello").unwrap()) };
    c.client_env.send(conn, garbage).unwrap();
    c.wait("the end", |c| c.closed.contains(&conn));
    let silent = c.client_env.connect(addr(0), reactor::Framing::Frames);
    c.wait("the end of the silent one", |c| c.closed.contains(&silent));
}

#[test]
fn wrong_requests_are_answered_and_change_nothing() {
    let (mut c, conn) = ready(5);
    let mut cases = Vec::new();
    for (block, blocks, bytes) in [(0, 0, 0), (31, 2, 8192), (u32::MAX, 1, 4096), (0, 2, 4096), (0, 33, 4096)]
    {
        let mut header = Header::new(FrameKind::Write, 0);
        header.object = object(1);
        (header.block, header.blocks) = (block, blocks);
        cases.push((header, Some(vec![9u8; bytes]), Status::Invalid));
    }
    let mut member = Header::new(FrameKind::SubWrite, 0);
    member.object = object(1);
    member.blocks = 1;
    cases.push((member, Some(vec![9; 4096]), Status::Invalid));
    let mut stale = Header::new(FrameKind::Read, 0);
    stale.object = object(1);
    stale.blocks = 1;
    stale.epoch = Epoch(1);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    cases.push((stale, None, Status::StaleEpoch));
    for (header, data, expected) in cases {
        let request = c.request(conn, header, data);
        assert_eq!(c.status(request), expected, "{header:?}");
    }
    let mut header = Header::new(FrameKind::Write, 9999);
    header.object = object(1);
    header.pg = PG;
    header.epoch = c.record.epoch;
    header.blocks = 1;
    header.payload_len = 4096;
    let damaged =
        Frame { header, crcs: BlockCrcs::one(1), payload: Some(IoBuf::copy_of(&[9; 4096]).unwrap()) };
    c.client_env.send(conn, damaged).unwrap();
    assert_eq!(c.status(9999), Status::Corrupt);
    assert_eq!(c.get(conn, 1, 0), 1);
    c.assert_idle(0);
}

#[test]
fn operations_of_an_epoch_yet_unknown_wait_for_it() {
    let (mut c, conn) = ready(6);
    let mut header = Header::new(FrameKind::Read, 0);
    header.object = object(1);
    header.blocks = 1;
    header.epoch = Epoch(c.record.epoch.0 + 1);
    let early = c.request(conn, header, None);
    c.pass(20);
    assert!(!c.replies.contains_key(&early));
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    assert_eq!(c.status(early), Status::Ok);
    assert_eq!(c.byte_of(early), 1);
}

#[test]
fn nothing_is_served_without_a_lease_or_with_too_few_copies() {
    let (mut c, conn) = ready(7);
    c.tell(0, CoreMsg::Lease { until: reactor::Mono(1) });
    c.pass(1);
    let request = c.read(conn, 1, 0);
    assert_eq!(c.status(request), Status::NotActive);
    c.decide(0, &[0], &[0]);
    let mut update = c.update();
    update.pool.min_copies = 2;
    update.revision.0 += 1;
    c.tell(0, CoreMsg::Pg(update));
    c.pass(1);
    let request = c.read(conn, 1, 0);
    assert_eq!(c.status(request), Status::NotActive);
    c.wait_state(0, crate::PgState::Incomplete);
}

#[test]
fn a_stop_finishes_what_is_in_flight_and_closes_the_slices() {
    let (mut c, conn) = ready(8);
    let writes: Vec<u64> = (0..20u32).map(|n| c.write(conn, u64::from(n), 0, 3)).collect();
    c.wait("some are under way", |c| c.nodes[&0].core.ops.len() > 5);
    c.tell(0, CoreMsg::Stop);
    c.wait("stopped", |c| c.told().iter().any(|(node, msg)| *node == 0 && matches!(msg, CoreMsg::Stopped)));
    let statuses: Vec<Status> = writes.into_iter().map(|request| c.status(request)).collect();
    assert!(statuses.contains(&Status::Ok));
    assert!(
        statuses.iter().all(|status| matches!(status, Status::Ok | Status::ShuttingDown)),
        "{statuses:?}"
    );
    use reactor::Service;
    assert!(c.nodes[&0].core.finished());
}

/// A connection to a node as some other node's core.
fn dial_as_node(c: &mut Cluster, to: usize) -> reactor::ConnId {
    use reactor::Net;
    let conn = c.client_env.connect(addr(to), reactor::Framing::Frames);
    let hello = wire::control::Hello {
        cluster: Some(CLUSTER),
        role: wire::control::Role::Node(NodeId(9)),
        session: SessionId(9),
        incarnation: 1,
        refused: 0,
    };
    c.client_env.send(conn, crate::session::hello_frame(&hello, 0).unwrap()).unwrap();
    c.wait("welcome", |c| c.welcomed.contains_key(&conn));
    conn
}

#[test]
fn a_question_about_an_unknown_pg_is_answered_and_leaves_no_trace() {
    let mut c = Cluster::new(31);
    c.decide(0, &[0, 1, 2], &[0, 1, 2]);
    c.wait_state(0, crate::PgState::Clean);
    let stranger = dial_as_node(&mut c, 1);
    let asked: Vec<u64> = (1..20)
        .map(|index| {
            let mut header = Header::new(FrameKind::Activate, 0);
            header.pg = wire::PgId { index, ..PG };
            (header.slice, header.primary, header.epoch) = (slice(1), slice(2), Epoch(5));
            c.request(stranger, header, None)
        })
        .collect();
    for request in asked {
        assert_eq!(c.status(request), Status::NotActive);
    }
    c.wait("forgotten", |c| c.nodes[&1].core.pgs.len() == 1);
}

#[test]
fn frames_of_an_epoch_that_no_record_knows_do_not_lock_a_pg() {
    let (mut c, conn) = ready(9);
    let forged = dial_as_node(&mut c, 1);
    for epoch in [c.record.epoch.0 + 1, 1 << 60, u64::MAX] {
        for kind in [FrameKind::Activate, FrameKind::SubWrite, FrameKind::SubDelete] {
            let mut header = Header::new(kind, 0);
            header.object = object(1);
            header.slice = slice(1);
            header.primary = slice(2);
            header.epoch = Epoch(epoch);
            header.blocks = 1;
            let data = (kind == FrameKind::SubWrite).then(|| vec![7; BLOCK_BYTES]);
            c.request(forged, header, data);
        }
    }
    c.pass(100);
    // The present epoch goes on, and so does the next one, whichever has what primary.
    c.put(conn, 1, 0, 2);
    assert_eq!(c.get(conn, 1, 0), 2);
    for primary in [0, 1, 2] {
        c.decide(primary, &[0, 1, 2], &[0, 1, 2]);
        let conn = c.dial(primary, 10 + primary as u64);
        c.put(conn, 1, 0, 3 + primary as u8);
        c.wait_state(primary, crate::PgState::Clean);
    }
    assert!(c.equal(&[0, 1, 2]));
}

#[test]
fn a_member_that_shows_an_epoch_that_no_record_knows_stops_its_primary_for_a_moment_only() {
    let (mut c, conn) = ready(10);
    let node = c.nodes.get_mut(&0).unwrap();
    let key = node.core.pg_key(PG).unwrap();
    node.core.supersede(key, Epoch(1 << 60));
    let begin = c.world.borrow().now;
    c.put(conn, 1, 0, 2);
    let waited_ms = (c.world.borrow().now - begin) / 1_000_000;
    assert!((1_000..=5_000).contains(&waited_ms), "{waited_ms} ms");
    c.decide(1, &[0, 1, 2], &[0, 1, 2]);
    let conn = c.dial(1, 11);
    assert_eq!(c.get(conn, 1, 0), 2);
}

/// Stands at node 2's address: welcomes whoever connects, then answers every frame with garbage.
fn answer_garbage(
    c: &mut Cluster,
    welcomed: &mut std::collections::BTreeSet<reactor::ConnId>,
    seed: &mut u64,
) {
    for event in std::mem::take(&mut c.client_events) {
        if let reactor::Event::Accepted { conn, .. } = event {
            let hello = wire::control::Hello {
                cluster: Some(CLUSTER),
                role: wire::control::Role::Node(NodeId(3)),
                session: SessionId(3000),
                incarnation: 1,
                refused: 0,
            };
            c.client_env.send(conn, crate::session::hello_frame(&hello, 0).unwrap()).unwrap();
            welcomed.insert(conn);
        }
    }
    const KINDS: [FrameKind; 8] = [
        FrameKind::ActivateReply,
        FrameKind::SubWriteReply,
        FrameKind::ListReply,
        FrameKind::SubReadReply,
        FrameKind::SubVerifyReply,
        FrameKind::SubOriginsReply,
        FrameKind::Write,
        FrameKind::Control,
    ];
    for conn in welcomed.iter().copied().filter(|conn| !c.closed.contains(conn)).collect::<Vec<_>>() {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = *seed >> 16;
        let kind = KINDS[random as usize % KINDS.len()];
        let mut header = Header::new(kind, (random << 7) | (random % 16));
        header.pg = PG;
        header.slice = slice((random % 3) as usize);
        header.epoch = Epoch(random % 9);
        header.status = if random.is_multiple_of(5) { Status::Ok } else { Status::Invalid };
        header.block = random as u32;
        header.blocks = (random % 70_000) as u16;
        let data: Vec<u8> = (0..random % 5000).map(|n| (n ^ random) as u8).collect();
        header.payload_len = data.len() as u32;
        let payload = IoBuf::copy_of(&data).ok().filter(|_| !data.is_empty());
        // A connection that has been closed takes nothing; that is all the same here.
        let _ = c.client_env.send(conn, Frame { header, crcs: BlockCrcs::of(&data), payload });
    }
}

#[test]
fn a_peer_that_answers_garbage_is_cut_off_and_the_others_go_on() {
    let (mut c, _) = ready(11);
    c.crash(2);
    c.decide(0, &[0, 1], &[0, 1]);
    c.client_env.listen(addr(2), reactor::Framing::Frames, reactor::Token(0)).unwrap();
    c.decide(0, &[0, 1, 2], &[0, 1]);
    let (mut welcomed, mut seed) = (std::collections::BTreeSet::new(), 1);
    for _ in 0..2000 {
        c.pass(1);
        answer_garbage(&mut c, &mut welcomed, &mut seed);
    }
    let cut = welcomed.iter().filter(|conn| c.closed.contains(conn)).count();
    assert!(cut > 10, "cut off {cut} times");
    // The director leaves it out, and everything is as it was.
    c.decide(0, &[0, 1], &[0, 1]);
    let conn = c.dial(0, 20);
    assert_eq!(c.get(conn, 1, 0), 1);
    c.put(conn, 1, 0, 2);
    c.wait("equal copies", |c| c.equal(&[0, 1]));
    assert_eq!(c.get(conn, 1, 0), 2);
    c.assert_idle(0);
}
