//! The client with a thread of its own.

use crate::MIB;
use crate::common::{TestCluster, pattern};
use drystone::blocking::{Cluster, Error};
use drystone::{AdminError, Change, MetaReply, MetaRequest, OpenMode, Options, SubmitError};

#[test]
fn calls_from_many_threads_are_done_when_they_return() {
    let cluster = TestCluster::with_image(3, 128 * MIB);
    let image = cluster.client().open("i", OpenMode::ReadWrite).unwrap();
    assert_eq!(image.info().unwrap().size_bytes, 128 * MIB);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let image = &image;
            scope.spawn(move || {
                let data = vec![thread as u8 + 1; 300 * 4096];
                let offset = thread * 2 * MIB + 4096;
                image.write_at(offset, &data).unwrap();
                image.flush().unwrap();
                let mut back = vec![0; data.len()];
                image.read_at(offset, &mut back).unwrap();
                assert!(back == data);
                image.write_zeroes(offset, 4096).unwrap();
                image.discard(offset + 4096, 4096).unwrap();
                image.read_at(offset, &mut back).unwrap();
                assert!(back[..8192].iter().all(|b| *b == 0) && back[8192..] == data[8192..]);
            });
        }
    });
    // Longer than one operation may be.
    let data = pattern(7, 70 * MIB as usize);
    image.write_at(20 * MIB, &data).unwrap();
    let mut back = vec![0; data.len()];
    image.read_at(20 * MIB, &mut back).unwrap();
    assert!(back == data);
    let refused = image.read_at(128 * MIB, &mut back[..4096]);
    assert!(matches!(refused, Err(Error::Submit(SubmitError::OutOfRange { .. }))), "{refused:?}");
}

#[test]
fn administration_and_watching() {
    let nodes = TestCluster::start(3);
    let cluster = nodes.client();
    let missing = cluster.open("nothing", OpenMode::ReadWrite).err();
    assert!(matches!(missing, Some(Error::Admin(AdminError::NotFound))), "{missing:?}");
    let reply = cluster.meta(MetaRequest::Range { prefix: "/nodes/".into(), limit: 10 }).unwrap();
    assert!(matches!(&reply, MetaReply::Range { items, .. } if items.len() == 3), "{reply:?}");
    let news = cluster.watch(&["/w/"]).unwrap();
    let (_, first) = news.recv().unwrap();
    assert!(first.is_empty(), "{first:?}");
    nodes.ok(&["meta", "put", "/w/1", "5"]);
    let (_, second) = news.recv().unwrap();
    assert!(
        matches!(&second[..], [Change::Put(item)] if item.key == "/w/1" && item.value == "5"),
        "{second:?}"
    );
    drop(cluster);
    assert!(news.recv().is_err(), "the watch ends with the client");
}

#[test]
fn an_unreachable_cluster_is_an_error() {
    let nodes = TestCluster::start(1);
    let control = nodes.fleet.controls();
    drop(nodes);
    let options = Options { admin_timeout_ms: 300, ..Options::default() };
    let cluster = Cluster::connect(&control, options).unwrap();
    let result = cluster.open("i", OpenMode::ReadWrite).err();
    assert!(matches!(result, Some(Error::Admin(AdminError::Unreachable { .. }))), "{result:?}");
}
