//! The client in this thread.

use crate::cluster::Misdeed;
use crate::server::Server;
use drystone::{AdminDone, BLOCK_BYTES, Client, ImageHandle, IoBuf, IoDone, Op, OpenMode, Options};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::time::Duration;
use wire::Status;

const MIB: u64 = 1 << 20;
const TURN: Duration = Duration::from_millis(100);

fn open(client: &mut Client) -> ImageHandle {
    client.open("disk", OpenMode::ReadWrite);
    loop {
        if let Some(AdminDone::Opened { result, .. }) = client.next_admin() {
            return result.expect("opens");
        }
        client.poll(Some(TURN)).unwrap();
    }
}

fn wait(client: &mut Client) -> IoDone {
    loop {
        if let Some(done) = client.next_io() {
            return done;
        }
        client.poll(Some(TURN)).unwrap();
    }
}

fn foreign(memory: &mut [u8]) -> IoBuf {
    // SAFETY: every test keeps the memory until the operation has completed.
    unsafe { IoBuf::foreign(NonNull::from(&mut *memory).cast(), memory.len()) }
}

/// Bytes that differ everywhere.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut word = seed;
    (0..len)
        .map(|_| {
            word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (word >> 56) as u8
        })
        .collect()
}

#[test]
fn operations_of_every_size_go_there_and_back() {
    let server = Server::start(64 * MIB);
    let mut client = Client::new(&server.control, Options::default()).unwrap();
    let image = open(&mut client);
    for (offset, len) in
        [(0, 4096), (124 * 1024, 8192), (MIB, 128 * 1024), (3 * MIB - 4096, 32 * MIB as usize)]
    {
        let mut data = pattern(len, offset);
        client.submit(image, Op::Write { offset, buf: foreign(&mut data) }, 1).unwrap();
        assert_eq!(wait(&mut client).result, Ok(()));
        let mut back = vec![0; len];
        client.submit(image, Op::Read { offset, buf: foreign(&mut back) }, 2).unwrap();
        assert_eq!(wait(&mut client).result, Ok(()));
        assert!(back == data, "{len} bytes at {offset}, caller's memory");
        client.submit(image, Op::Read { offset, buf: IoBuf::heap(len).unwrap() }, 3).unwrap();
        let done = wait(&mut client);
        assert_eq!(done.result, Ok(()));
        assert!(done.buf.unwrap().as_slice() == data, "{len} bytes at {offset}, heap");
    }
}

#[test]
fn a_full_queue_with_refusals_and_broken_connections_completes() {
    let server = Server::start(64 * MIB);
    let mut client = Client::new(&server.control, Options::default()).unwrap();
    let image = open(&mut client);
    let mut memory: Vec<Vec<u8>> = (0..128).map(|i| pattern(BLOCK_BYTES, i)).collect();
    for round in 0..20u64 {
        for (i, block) in memory.iter_mut().enumerate() {
            let offset = (i as u64 * 97 + round) % 16384 * BLOCK_BYTES as u64;
            client.submit(image, Op::Write { offset, buf: foreign(block) }, i as u64).unwrap();
        }
        client.poll(None).unwrap();
        match round % 4 {
            0 => server.cut_all(),
            1 => server.with(|cluster| cluster.misdeeds = vec![Misdeed::Refuse(Status::NotActive); 50]),
            2 => server.with(|cluster| {
                let slice = cluster.nodes[round as usize % 3].slice;
                cluster.set_primary(round as u32 % 4, Some(slice));
            }),
            _ => {}
        }
        for _ in 0..128 {
            assert_eq!(wait(&mut client).result, Ok(()));
        }
    }
    server.with(|cluster| cluster.misdeeds.clear());
    for (i, block) in memory.iter().enumerate() {
        let mut back = vec![0; BLOCK_BYTES];
        let offset = (i as u64 * 97 + 19) % 16384 * BLOCK_BYTES as u64;
        client.submit(image, Op::Read { offset, buf: foreign(&mut back) }, 0).unwrap();
        assert_eq!(wait(&mut client).result, Ok(()));
        assert!(back == *block);
    }
    assert!(client.counters().retried > 0);
}

#[test]
fn the_eventfd_announces_completions() {
    let server = Server::start(MIB);
    let mut client = Client::new(&server.control, Options::default()).unwrap();
    let image = open(&mut client);
    let fd = client.event_fd().unwrap().as_raw_fd();
    for _ in 0..50 {
        let mut back = vec![0; BLOCK_BYTES];
        client.submit(image, Op::Read { offset: 0, buf: foreign(&mut back) }, 0).unwrap();
        loop {
            while client.poll(None).unwrap() > 0 {}
            if client.next_io().is_some() {
                break;
            }
            let due = client.next_due().unwrap_or(TURN);
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            unsafe { libc::poll(&raw mut poll, 1, due.as_millis() as i32 + 1) };
        }
    }
}

#[test]
fn clients_in_several_threads_do_not_disturb_each_other() {
    let server = Server::start(64 * MIB);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let control = &server.control;
            scope.spawn(move || {
                let mut client = Client::new(control, Options::default()).unwrap();
                let image = open(&mut client);
                for i in 0..50 {
                    let offset = thread * 16 * MIB + i * MIB / 4;
                    let mut data = pattern(BLOCK_BYTES, offset);
                    client.submit(image, Op::Write { offset, buf: foreign(&mut data) }, 0).unwrap();
                    let mut back = vec![0; BLOCK_BYTES];
                    client.submit(image, Op::Read { offset, buf: foreign(&mut back) }, 0).unwrap();
                    assert_eq!(wait(&mut client).result, Ok(()));
                    assert_eq!(wait(&mut client).result, Ok(()));
                    assert!(back == data, "a read waits for the write before it");
                }
            });
        }
    });
}

#[test]
fn dropping_a_client_gives_up_what_is_under_way() {
    let server = Server::start(64 * MIB);
    let mut memory = vec![1; 4 * MIB as usize];
    let mut client = Client::new(&server.control, Options::default()).unwrap();
    let image = open(&mut client);
    client.submit(image, Op::Write { offset: 0, buf: foreign(&mut memory) }, 0).unwrap();
    client.submit(image, Op::Read { offset: 8 * MIB, buf: foreign(&mut memory) }, 0).unwrap();
    client.poll(None).unwrap();
    drop(client);
    memory.fill(2);
}
