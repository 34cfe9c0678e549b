//! The client in this thread.

use crate::MIB;
use crate::common::{TestCluster, pattern};
use drystone::{AdminDone, BLOCK_BYTES, Client, ImageHandle, IoBuf, IoDone, Op, OpenMode, Options};
use std::time::Duration;

const TURN: Duration = Duration::from_millis(100);
/// Writes under way at once.
const DEPTH: u64 = 128;

fn connect(cluster: &TestCluster) -> (Client, ImageHandle) {
    let mut client = Client::new(&cluster.fleet.controls(), Options::default()).unwrap();
    client.open("i", OpenMode::ReadWrite);
    loop {
        if let Some(AdminDone::Opened { result, .. }) = client.next_admin() {
            return (client, result.expect("opens"));
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

fn write(client: &mut Client, image: ImageHandle, offset: u64, data: &[u8]) {
    client.submit(image, Op::Write { offset, buf: IoBuf::copy_of(data).unwrap() }, offset).unwrap();
}

fn read(client: &mut Client, image: ImageHandle, offset: u64, len: usize) {
    client.submit(image, Op::Read { offset, buf: IoBuf::heap(len).unwrap() }, offset).unwrap();
}

/// The next completion is of a read of this data.
fn must_read(client: &mut Client, data: &[u8]) {
    let done = wait(client);
    assert_eq!(done.result, Ok(()));
    assert!(done.buf.unwrap().as_slice() == data, "{} bytes at {}", data.len(), done.user);
}

#[test]
fn operations_of_every_size_go_there_and_back() {
    let cluster = TestCluster::with_image(3, 64 * MIB);
    let (mut client, image) = connect(&cluster);
    for (offset, len) in
        [(0, 4096), (124 * 1024, 8192), (MIB, 128 * 1024), (3 * MIB - 4096, 32 * MIB as usize)]
    {
        let data = pattern(offset, len);
        write(&mut client, image, offset, &data);
        assert_eq!(wait(&mut client).result, Ok(()));
        read(&mut client, image, offset, len);
        must_read(&mut client, &data);
    }
}

#[test]
fn a_full_queue_completes_while_nodes_die_and_return() {
    let mut cluster = TestCluster::with_image(3, 64 * MIB);
    let (mut client, image) = connect(&cluster);
    let blocks: Vec<Vec<u8>> = (0..DEPTH).map(|i| pattern(i, BLOCK_BYTES)).collect();
    let rounds = 12u64;
    let offset = |round: u64, i: u64| (i * 97 + round) % 16384 * BLOCK_BYTES as u64;
    for round in 0..rounds {
        for i in 0..DEPTH {
            write(&mut client, image, offset(round, i), &blocks[i as usize]);
        }
        client.poll(None).unwrap();
        // A node dies with the queue under way; it is back before the next one does.
        let victim = (round / 4 % 3) as usize;
        match round % 4 {
            0 => cluster.fleet.kill(victim).unwrap(),
            2 => cluster.fleet.spawn(victim).unwrap(),
            _ => {}
        }
        for _ in 0..DEPTH {
            assert_eq!(wait(&mut client).result, Ok(()));
        }
        if round % 4 == 3 {
            cluster.fleet.wait_ready(victim).unwrap();
            cluster.wait_clean();
        }
    }
    for i in 0..DEPTH {
        read(&mut client, image, offset(rounds - 1, i), BLOCK_BYTES);
        must_read(&mut client, &blocks[i as usize]);
    }
    assert!(client.counters().retried > 0);
}

#[test]
fn clients_in_several_threads_do_not_disturb_each_other() {
    let cluster = TestCluster::with_image(3, 64 * MIB);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let cluster = &cluster;
            scope.spawn(move || {
                let (mut client, image) = connect(cluster);
                for i in 0..50 {
                    let offset = thread * 16 * MIB + i * MIB / 4;
                    let data = pattern(offset, BLOCK_BYTES);
                    write(&mut client, image, offset, &data);
                    read(&mut client, image, offset, BLOCK_BYTES);
                    // A read waits for the write before it.
                    assert_eq!(wait(&mut client).result, Ok(()));
                    must_read(&mut client, &data);
                }
            });
        }
    });
}

#[test]
fn dropping_a_client_gives_up_what_is_under_way() {
    let cluster = TestCluster::with_image(3, 64 * MIB);
    let (mut client, image) = connect(&cluster);
    write(&mut client, image, 0, &pattern(1, 4 * MIB as usize));
    read(&mut client, image, 8 * MIB, 4 * MIB as usize);
    client.poll(None).unwrap();
    drop(client);
    // The cluster has forgotten it too: another one takes its place.
    let (mut client, image) = connect(&cluster);
    let data = pattern(2, BLOCK_BYTES);
    write(&mut client, image, 0, &data);
    assert_eq!(wait(&mut client).result, Ok(()));
    read(&mut client, image, 0, BLOCK_BYTES);
    must_read(&mut client, &data);
}
