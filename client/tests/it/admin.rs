//! Opening, metadata requests, watching.

use crate::cluster::POOL;
use crate::world::{World, addr, empty};
use client::{AdminDone, AdminError, ClientCore, Op, OpenMode, Options};
use placement::key;
use reactor::Service;
use wire::control::{Change, KeyValue, MetaReply, MetaRequest, Write};
use wire::{PgId, Status};

const MIB: u64 = 1 << 20;

fn meta(world: &mut World, request: MetaRequest) -> Result<MetaReply, AdminError> {
    let ticket = world.client.meta(&mut world.env, request);
    match world.wait_admin() {
        AdminDone::Meta { ticket: of, result } if of == ticket => result,
        other => panic!("{other:?}"),
    }
}

fn range(prefix: &str) -> MetaRequest {
    MetaRequest::Range { prefix: prefix.into(), limit: 100 }
}

fn txn() -> MetaRequest {
    let put = Write::Put { key: "/x".into(), value: "1".into(), lease: None };
    MetaRequest::Txn { compares: vec![], writes: vec![put] }
}

#[test]
fn images_are_found_by_their_exact_name() {
    let mut world = World::new(1, Options::default(), MIB);
    for (name, due) in
        [("disk", None), ("dis", Some(AdminError::NotFound)), ("no", Some(AdminError::NotFound))]
    {
        let ticket = world.client.open(&mut world.env, name, OpenMode::ReadWrite);
        assert_eq!(world.wait_open(ticket).err(), due, "{name}");
    }
    // Its name is there, its record is not.
    let ticket = world.client.open(&mut world.env, "disk-too", OpenMode::ReadWrite);
    assert_eq!(world.wait_open(ticket), Err(AdminError::NotFound));
    world.cluster.put(&key::image_name("odd"), &"seven");
    let ticket = world.client.open(&mut world.env, "odd", OpenMode::ReadWrite);
    assert!(matches!(world.wait_open(ticket), Err(AdminError::Malformed { .. })));
}

#[test]
fn several_images_share_a_client_and_their_order() {
    let (mut world, one) = World::opened(2, Options::default(), MIB);
    let ticket = world.client.open(&mut world.env, "disk", OpenMode::ReadWrite);
    let two = world.wait_open(ticket).unwrap();
    assert_ne!(one, two);
    world.answering = false;
    world.submit(one, Op::Write { offset: 0, buf: crate::world::filled(1, 7) }, 1).unwrap();
    world.submit(two, Op::Read { offset: 0, buf: empty(1) }, 2).unwrap();
    world.answering = true;
    assert_eq!([world.wait_io().user, world.wait_io().user], [1, 2]);
}

#[test]
fn an_unreachable_cluster_is_reported_in_time_with_the_reason() {
    let options = Options { admin_timeout_ms: 2000, ..Options::default() };
    let mut world = World::new(3, options, MIB);
    world.client = ClientCore::new(vec![addr(150), addr(151)], options);
    world.client.start(&mut world.env);
    let before = world.now_ms();
    let ticket = world.client.open(&mut world.env, "disk", OpenMode::ReadWrite);
    let error = world.wait_open(ticket).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no node of the cluster can be reached (127.0.0.1:150,127.0.0.1:151): connection refused"
    );
    assert!((2000..2600).contains(&(world.now_ms() - before)));
    assert!(matches!(meta(&mut world, range("/")), Err(AdminError::Unreachable { .. })));
}

#[test]
fn a_refused_greeting_is_reported_with_its_reason() {
    let options = Options { admin_timeout_ms: 500, ..Options::default() };
    let mut world = World::new(4, options, MIB);
    world.cluster.refuse_hello = Some(Status::WrongVersion);
    let result = meta(&mut world, range("/"));
    assert!(matches!(result, Err(AdminError::Refused { status: Status::WrongVersion, .. })), "{result:?}");
}

#[test]
fn requests_survive_what_can_be_survived() {
    let mut world = World::new(5, Options::default(), MIB);
    world.cluster.meta_misdeeds = vec![Status::NotActive, Status::Busy, Status::Unknown];
    let reply = meta(&mut world, range(key::POOLS)).unwrap();
    assert!(matches!(reply, MetaReply::Range { items, .. } if items.len() == 1));
    // A transaction is repeated while it is certain that it was not applied.
    world.cluster.meta_misdeeds = vec![Status::NotActive];
    assert!(matches!(meta(&mut world, txn()), Ok(MetaReply::Applied { .. })));
    world.cluster.meta_misdeeds = vec![Status::Unknown];
    assert_eq!(meta(&mut world, txn()), Err(AdminError::OutcomeUnknown));
    // The connection ends with one of each under way.
    world.control_answering = false;
    let read = world.client.meta(&mut world.env, range(key::POOLS));
    let write = world.client.meta(&mut world.env, txn());
    let conn = world.conns_to(|to| to.port() < 200)[0];
    world.cut(conn);
    assert!(matches!(
        world.wait_admin(),
        AdminDone::Meta { ticket, result: Err(AdminError::OutcomeUnknown) } if ticket == write
    ));
    world.control_answering = true;
    assert!(matches!(
        world.wait_admin(),
        AdminDone::Meta { ticket, result: Ok(MetaReply::Range { .. }) } if ticket == read
    ));
    let huge = MetaRequest::Range { prefix: "x".repeat(2 << 20), limit: 1 };
    assert_eq!(meta(&mut world, huge), Err(AdminError::TooLarge));
}

#[test]
fn a_watch_neither_skips_nor_repeats_across_connections() {
    let (mut world, image) = World::opened(6, Options::default(), MIB);
    let ticket = world.client.watch(&mut world.env, vec!["/w/".into(), key::POOLS.into()]);
    let mut seen: Vec<(String, u64)> = Vec::new();
    let mut initial = 0;
    let mut take = |world: &mut World, seen: &mut Vec<(String, u64)>| {
        while let Some(done) = world.client.poll_admin() {
            let AdminDone::Watch { ticket: of, changes, .. } = done else { panic!("{done:?}") };
            assert_eq!(of, ticket);
            initial += 1;
            for change in changes {
                match change {
                    Change::Put(KeyValue { key, mod_revision, .. }) => seen.push((key, mod_revision.0)),
                    Change::Delete { key } => seen.push((key, 0)),
                }
            }
        }
    };
    while seen.is_empty() {
        world.step();
        take(&mut world, &mut seen);
    }
    assert_eq!(seen.len(), 1, "the pool: {seen:?}");
    for i in 0..40 {
        world.cluster.put(&format!("/w/{i}"), &i);
        world.cluster.put("/other", &i);
        if i % 7 == 3 {
            let conn = world.conns_to(|to| to.port() < 200);
            conn.into_iter().for_each(|conn| world.cut(conn));
        }
        if i % 5 == 4 {
            world.cluster.remove(&format!("/w/{i}"));
        }
        for _ in 0..i {
            world.step();
            take(&mut world, &mut seen);
        }
    }
    for _ in 0..2000 {
        world.step();
        take(&mut world, &mut seen);
    }
    let mut unique = seen.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), seen.len(), "nothing comes twice");
    assert!(seen.iter().all(|(key, _)| key != "/other"));
    for i in 0..40 {
        let puts = seen.iter().filter(|(key, revision)| *key == format!("/w/{i}") && *revision > 0).count();
        let last = seen.iter().rev().find(|(key, _)| *key == format!("/w/{i}"));
        if i % 5 == 4 {
            assert!(last.is_none_or(|(_, revision)| *revision == 0), "/w/{i} is gone");
        } else {
            assert_eq!(puts, 1, "/w/{i}");
        }
    }
    assert!(initial > 2);
    // The map of the open image is as good as before.
    world.cluster.set_primary(0, Some(world.cluster.nodes[2].slice));
    assert_eq!(world.perform(image, Op::Read { offset: 0, buf: empty(1) }).result, Ok(()));
    world.cluster.put(&key::pg(PgId { pool: POOL, index: 1 << 30 }), &0);
    world.client.watch(&mut world.env, vec![]);
    assert_eq!(world.perform(image, Op::Read { offset: 0, buf: empty(1) }).result, Ok(()));
}
