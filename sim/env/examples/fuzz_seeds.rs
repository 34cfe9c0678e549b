//! `fuzz_seeds DIRECTORY`: writes first inputs for the fuzz targets, a directory for each, made by the encoders
//! that ship. Called by `sim/fuzz/run --corpus`, which then keeps those that reach something of their own.

use consensus::codec::{Body, Chunk, Command, EntryMsg, Op, Packet, RaftMsg, RequestId, Verdict};
use reactor::{DiskIndex, DiskInfo, Env, Event, IoBuf, Service, Token};
use simenv::clock::{NodeClock, SEC, US};
use simenv::disk::DiskProfile;
use simenv::universe::{CoreSpec, DiskId, Step, Universe};
use std::collections::VecDeque;
use std::error::Error;
use std::net::Ipv4Addr;
use std::path::Path;
use store::{
    DiskPlan, SliceGeometry, SliceStore, StoreError, StoreEvent, StoreOptions, TOKENS_MIN, TokenRange,
};
use wire::control::{
    Change, Compare, ControlMsg, Hello, KeyValue, MetaReply, MetaRequest, Role, VoterAddress, VoterInfo,
    VoterRole, Write,
};
use wire::{
    BLOCK_BYTES, BlockCrcs, ClusterId, CoreId, DiskUuid, Epoch, FrameKind, Header, ImageId, NodeId, ObjectId,
    PgId, PoolId, Revision, SessionId, SliceId, Status, Version,
};
use wire::{Holds, ListEntry, OriginEntry, VerifyEntry};

type Seeds = Vec<Vec<u8>>;

const CLUSTER: ClusterId = ClusterId(7);

fn object(index: u64) -> ObjectId {
    ObjectId { pool: PoolId(1), image: ImageId(2), index }
}

/// A frame of every kind, and payloads of lists.
fn frames() -> Seeds {
    let mut all = Seeds::new();
    for kind in (0..=u8::MAX).filter_map(FrameKind::from_u8) {
        let mut header = Header::new(kind, 5);
        header.pg = PgId { pool: PoolId(1), index: 3 };
        header.epoch = Epoch(4);
        header.object = object(9);
        header.version = Version { epoch: Epoch(4), counter: 8 };
        header.slice = SliceId(11);
        header.primary = SliceId(12);
        header.origin = 13;
        let payload = vec![1; if kind.has_block_crcs() { 2 * BLOCK_BYTES } else { 40 }];
        let crcs = if kind.has_block_crcs() {
            header.blocks = 2;
            BlockCrcs::of(&payload)
        } else {
            BlockCrcs::one(wire::block_crc(&payload))
        };
        header.payload_len = payload.len() as u32;
        let mut bytes = Vec::new();
        header.encode_into(&crcs, &mut bytes);
        all.push(bytes.clone());
        header.payload_len = 0;
        header.status = Status::StaleEpoch;
        header.encode_into(&BlockCrcs::default(), &mut bytes);
        all.push(bytes);
    }
    let (mut list, mut origins) = (Vec::new(), Vec::new());
    for index in 0..3 {
        let version = Version { epoch: Epoch(1), counter: index };
        ListEntry { object: object(index), version, tombstone: index == 1 }.encode(&mut list);
        OriginEntry { image: ImageId(2), index, origin: index + 7, version }.encode(&mut origins);
    }
    let mut verify = Vec::new();
    let version = Version { epoch: Epoch(1), counter: 2 };
    VerifyEntry { holds: Holds::Object, version, mask: 5, digest: 6 }.encode(&mut verify);
    all.extend([list, origins, verify]);
    all
}

/// Offers, the frames that carry them, and what a link takes: the formats of `net-rdma`, which `fuzz` there reads.
fn rdma() -> Seeds {
    const HEAD_BYTES: usize = 256;
    const DESCRIPTOR_AT: usize = wire::HEADER_BYTES + wire::frame::META_BYTES_MAX;
    // Version, MTU, reads, zero; receives, zero; queue pair; packet sequence; GID.
    let mut offer = vec![1, 3, 16, 0, 64, 0, 0, 0, 17, 0, 0, 0, 0x56, 0x34, 0x12, 0];
    offer.extend([7; 16]);
    let mut all = vec![[vec![0], offer.clone()].concat()];
    for (kind, step) in [
        (FrameKind::Link, wire::frame::LINK_OFFER),
        (FrameKind::Link, wire::frame::LINK_ABANDON),
        (FrameKind::Link, wire::frame::LINK_SWITCH),
        (FrameKind::LinkReply, wire::frame::LINK_OFFER),
    ] {
        let mut header = Header { blocks: step, ..Header::new(kind, 5) };
        let (mut bytes, mut crcs) = (Vec::new(), BlockCrcs::default());
        if step == wire::frame::LINK_OFFER {
            (header.payload_len, crcs) = (offer.len() as u32, BlockCrcs::one(wire::block_crc(&offer)));
        }
        header.encode_into(&crcs, &mut bytes);
        all.push([vec![1], bytes, offer.clone()].concat());
    }
    // Frames of our own, then a message of a kind, then everything that is due is done.
    for (kind, len) in [(1u8, 0usize), (1, 4096), (2, 8192), (3, 8192), (4, 0), (5, 0), (6, 0), (7, 0)] {
        let mut header = Header::new(FrameKind::Write, 5);
        (header.payload_len, header.blocks) = (len as u32, len.div_ceil(4096) as u16);
        let mut head = Vec::new();
        header.encode_into(&BlockCrcs::of(&vec![0; len]), &mut head);
        if len > 0 {
            head.resize(HEAD_BYTES, 0);
            let descriptor = [&[0; 9][..], &[1, 0, 0], &(len as u32).to_le_bytes(), &[0; 2]].concat();
            head[DESCRIPTOR_AT..DESCRIPTOR_AT + descriptor.len()].copy_from_slice(&descriptor);
        }
        let bytes = if kind == 1 && len > 0 { HEAD_BYTES + len } else { head.len() };
        let mut message = vec![kind << 4, 0, 0, 0, 0];
        message.extend((bytes as u16).to_le_bytes());
        message.extend(if kind < 4 { head } else { Vec::new() });
        let (small, large, fill, complete, deliver) = (5 | 1 << 3, 5 | 4 << 3, 7, 4 | 31 << 3, 6);
        let round = [message.clone(), vec![fill, complete, deliver, fill]].concat();
        all.push([vec![2, small, large, fill], round.clone(), round].concat());
    }
    all
}

fn requests() -> Vec<MetaRequest> {
    let compares = vec![
        Compare::ModRevision { key: "/pool/1".into(), revision: Revision(3) },
        Compare::Exists { key: "/pg/1".into() },
        Compare::Bound { key: "/live/1".into(), lease: 5 },
    ];
    let writes = vec![
        Write::Put { key: "/live/1".into(), value: "{\"session\":5}".into(), lease: Some(5) },
        Write::Delete { key: "/image/2".into() },
        Write::DeletePrefix { prefix: "/pg/0000000001/".into() },
    ];
    vec![
        MetaRequest::Range { prefix: "/pg/".into(), limit: 100 },
        MetaRequest::Txn { compares, writes },
        MetaRequest::LeaseKeep { lease: 5, ttl_ms: 1000 },
        MetaRequest::LeaseRevoke { lease: 5 },
        MetaRequest::ChangeVoters {
            add: vec![VoterAddress { node: NodeId(4), address: "10.0.0.4:7700".into() }],
            remove: vec![NodeId(3)],
        },
        MetaRequest::CancelVoters,
        MetaRequest::Voters,
    ]
}

fn pair() -> KeyValue {
    KeyValue { key: "/node/1".into(), value: "{}".into(), mod_revision: Revision(2), lease: Some(5) }
}

fn member() -> VoterInfo {
    let (node, address) = (NodeId(4), "10.0.0.4:7700".into());
    VoterInfo { node, role: VoterRole::Learner, address, behind: 7, heard: true }
}

fn replies() -> Vec<MetaReply> {
    vec![
        MetaReply::Range { revision: Revision(9), items: vec![pair(), pair()], more: true },
        MetaReply::Applied { revision: Revision(10) },
        MetaReply::CompareFailed { index: 1 },
        MetaReply::Lease { ttl_ms: 1000 },
        MetaReply::Voters { members: vec![member()], target: vec![NodeId(4)], settled: false },
        MetaReply::failed(Status::Unknown),
    ]
}

/// Every control message, and hellos.
fn control() -> Seeds {
    let mut all = vec![
        ControlMsg::Subscribe { prefixes: vec!["/pg/".into(), "/node/".into()] },
        ControlMsg::Snapshot { revision: Revision(3), items: vec![pair()], more: false },
        ControlMsg::Changes {
            revision: Revision(4),
            changes: vec![Change::Put(pair()), Change::Delete { key: "/node/2".into() }],
        },
        ControlMsg::Raft { bytes: vec![1, 2, 3] },
        ControlMsg::Refused { node: NodeId(2) },
        ControlMsg::Stats { json: "{}".into() },
        ControlMsg::Error { status: 3, message: "why".into() },
    ];
    all.extend(requests().into_iter().map(|request| ControlMsg::Meta { ticket: 1, request }));
    all.extend(replies().into_iter().map(|reply| ControlMsg::MetaReply { ticket: 1, reply }));
    let hello =
        |cluster, role| Hello { cluster, role, session: SessionId(5), incarnation: 2, refused: 0 }.encode();
    let mut bytes: Seeds = all.iter().map(ControlMsg::encode).collect();
    bytes.extend([hello(None, Role::Client), hello(Some(CLUSTER), Role::Node(NodeId(1)))]);
    bytes
}

/// Every packet between voters with every kind of Raft message, and every command.
fn raft() -> Seeds {
    let txn = Op::Txn {
        verdict: Verdict::Apply,
        writes: vec![Write::Put { key: "/a".into(), value: "1".into(), lease: None }],
        stripped: false,
    };
    let ops = [
        txn,
        Op::Txn { verdict: Verdict::CompareFailed(1), writes: Vec::new(), stripped: false },
        Op::Txn { verdict: Verdict::Refused(3), writes: Vec::new(), stripped: true },
        Op::LeaseSet { lease: 5, ttl_ms: 1000 },
        Op::LeaseEnd { lease: 5 },
        Op::EphemeralReset,
    ];
    let id = RequestId { session: 1, seq: 2, floor: 1 };
    let commands: Seeds = ops.into_iter().map(|op| Command { id, op }.encode()).collect();
    let mut bodies = vec![
        Body::ChunkAck { transfer: 1, upto: 100 },
        Body::WantEphemeral,
        Body::EphemeralLost,
        Body::Chunk(Chunk {
            transfer: 1,
            whole: true,
            term: 2,
            index: 3,
            total: 4,
            crc: 5,
            offset: 0,
            bytes: vec![1, 2, 3, 4],
        }),
    ];
    bodies.extend(requests().into_iter().map(|request| Body::Forward { id, request }));
    bodies.extend(replies().into_iter().map(|reply| Body::Answer { session: 1, seq: 2, reply }));
    for kind in 0..20 {
        let data = commands.first().cloned().unwrap_or_default();
        bodies.push(Body::Raft(RaftMsg {
            kind,
            term: 2,
            log_term: 1,
            index: 6,
            commit: 5,
            commit_term: 1,
            reject: kind % 2 == 0,
            reject_hint: 4,
            context: vec![1, 2],
            entries: vec![EntryMsg { term: 2, index: 7, data }],
        }));
    }
    let packets = bodies.into_iter().map(|body| Packet { cluster: CLUSTER, from: NodeId(1), body }.encode());
    packets.chain(commands.clone()).collect()
}

/// What is done to a slice, one after the other; after each the disk is a seed.
#[derive(Clone, Copy)]
enum Act {
    Write { object: u64, first: u32, blocks: usize },
    Zero { object: u64 },
    Replace { object: u64 },
    Delete { object: u64 },
    Purge { object: u64 },
    Close,
}

const ACTS: [Act; 14] = [
    Act::Write { object: 0, first: 0, blocks: 1 },
    Act::Write { object: 1, first: 3, blocks: 2 },
    Act::Write { object: 0, first: 0, blocks: 1 },
    Act::Zero { object: 1 },
    Act::Replace { object: 0 },
    Act::Delete { object: 1 },
    Act::Write { object: 2, first: 31, blocks: 1 },
    Act::Write { object: 3, first: 0, blocks: 1 },
    Act::Write { object: 4, first: 0, blocks: 1 },
    Act::Purge { object: 1 },
    Act::Delete { object: 2 },
    Act::Write { object: 2, first: 0, blocks: 1 },
    Act::Write { object: 5, first: 0, blocks: 1 },
    Act::Close,
];

/// One store on one disk that does `ACTS`, each when the one before is durable.
struct Script {
    geometry: SliceGeometry,
    store: Option<SliceStore>,
    left: VecDeque<Act>,
    last: Option<(u64, Version)>,
    counter: u64,
}

const TOKENS: TokenRange = TokenRange { first: 1, count: TOKENS_MIN };

impl Script {
    fn act(&mut self, env: &mut dyn Env) {
        let (Some(store), Some(act)) = (&mut self.store, self.left.pop_front()) else { return };
        self.counter += 1;
        let version = Version { epoch: Epoch(1), counter: self.counter };
        let data = |env: &mut dyn Env, blocks: usize| -> Result<(IoBuf, BlockCrcs), StoreError> {
            let mut buf = env.alloc(blocks * BLOCK_BYTES).map_err(|_| StoreError::Busy)?;
            if let Some(bytes) = buf.as_mut_slice() {
                // One byte per block that is not zero keeps the seeds small.
                bytes.fill(0);
                bytes
                    .chunks_mut(BLOCK_BYTES)
                    .filter_map(|block| block.first_mut())
                    .for_each(|byte| *byte = 1);
            }
            let crcs = BlockCrcs::of(buf.as_slice());
            Ok((buf, crcs))
        };
        let done = match act {
            Act::Write { object: number, first, blocks } => data(env, blocks)
                .and_then(|(buf, crcs)| store.write(env, 1, object(number), version, first, &[buf], &crcs)),
            Act::Replace { object: number } => data(env, 2)
                .and_then(|(buf, crcs)| store.replace(env, 1, object(number), version, 0b101, &[buf], &crcs)),
            Act::Zero { object: number } => store.zero(env, 1, object(number), version, 3, 1),
            Act::Delete { object: number } => {
                self.last = Some((number, version));
                store.delete(env, 1, object(number), version)
            }
            Act::Purge { object: number } => {
                let version = self.last.filter(|last| last.0 == number).map_or(version, |last| last.1);
                store.purge(env, 1, object(number), version)
            }
            Act::Close => {
                store.close(env);
                Ok(())
            }
        };
        if let Err(error) = done {
            eprintln!("a step of the script is refused: {error}");
        }
    }

    fn drain(&mut self, env: &mut dyn Env) {
        while let Some(event) = self.store.as_mut().and_then(SliceStore::poll) {
            if matches!(event, StoreEvent::Opened(Ok(_)) | StoreEvent::Done { .. }) {
                env.set_timer(env.now().plus_ms(PAUSE_MS), Token(0));
            }
        }
    }
}

/// Between two steps, so that a checkpoint has time and the harness can look at the disk in between.
const PAUSE_MS: u64 = 100;

impl Service for Script {
    fn start(&mut self, env: &mut dyn Env) {
        let options = StoreOptions { dirty_objects_max: 3, ..StoreOptions::default() };
        self.store = Some(SliceStore::open(env, DiskIndex(0), self.geometry, options, TOKENS));
    }
    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { .. } => self.act(env),
            Event::DiskDone { token, result, op, .. } => {
                if let Some(store) = &mut self.store {
                    store.on_event(env, token, result, op);
                }
            }
            _ => {}
        }
        self.drain(env);
    }
    fn flush(&mut self, env: &mut dyn Env) {
        if let Some(store) = &mut self.store {
            store.flush(env);
        }
        self.drain(env);
    }
}

/// Blocks of the small disk: as many as the fuzz target's device has.
const DISK_BLOCKS: u64 = 8192;

/// The disk as the target `disk` wants it: for every block that is not empty its number, its length without
/// the zeroes at its end, and its bytes.
fn image(universe: &Universe, disk: DiskId) -> Vec<u8> {
    let mut out = vec![1];
    let mut block = vec![0; BLOCK_BYTES];
    for number in 0..DISK_BLOCKS {
        let Some(disk) = universe.disks.get(disk) else { continue };
        disk.peek(number, &mut block);
        let len = block.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
        if len > 0 {
            out.extend_from_slice(&(number as u16).to_le_bytes());
            out.extend_from_slice(&(len as u16).to_le_bytes());
            out.extend_from_slice(block.get(..len).unwrap_or(&[]));
        }
    }
    out
}

/// A disk after every step of the script, and the records of its log one by one.
fn disks() -> Result<Seeds, Box<dyn Error>> {
    let disk_bytes = DISK_BLOCKS * BLOCK_BYTES as u64;
    let mut universe = Universe::new(1);
    let host = universe.add_host(Ipv4Addr::new(10, 0, 0, 1), NodeClock::default());
    let info = DiskInfo { size_bytes: disk_bytes, atomic_bytes: 4096, write_through: false };
    let profile = DiskProfile {
        read_ns: 20 * US,
        write_ns: 20 * US,
        flush_ns: 50 * US,
        block_ns: 500,
        queue_depth: 64,
    };
    let disk = universe.add_disk(info, profile);
    let plan = DiskPlan {
        cluster: CLUSTER,
        disk: DiskUuid(3),
        node: Some(NodeId(1)),
        disk_bytes,
        slices: vec![SliceId(4)],
    };
    for (offset, mut bytes) in plan.writes()? {
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        if let Some(disk) = universe.disks.get_mut(disk) {
            disk.preload(offset, &bytes);
        }
    }
    let mut seeds = vec![image(&universe, disk)];
    let layout = plan.layout()?;
    let geometry = layout.slices.first().ok_or("a disk without slices")?.geometry();
    let service = Script { geometry, store: None, left: ACTS.into(), last: None, counter: 0 };
    let spec =
        CoreSpec { id: CoreId(0), arena_bytes: 8 << 20, disks: vec![disk], service: Box::new(service) };
    universe.spawn(host, spec)?;
    let end = 3 * SEC;
    universe.call_at(PAUSE_MS * 1_000_000 / 2, 1);
    while universe.now < end {
        if let Step::Harness(_) = universe.step() {
            let now = image(&universe, disk);
            if seeds.last() != Some(&now) {
                seeds.push(now);
            }
            universe.call_at(universe.now + PAUSE_MS * 1_000_000 / 2, 1);
        }
    }
    let mut records = Seeds::new();
    let mut block = vec![0; BLOCK_BYTES];
    for number in 0..DISK_BLOCKS {
        let Some(disk) = universe.disks.get(disk) else { continue };
        disk.peek(number, &mut block);
        if let Some(header) = store::commit::decode(&block)
            && let Some(bytes) =
                block.get(store::commit::HEADER..store::commit::HEADER + usize::from(header.used))
            && !bytes.is_empty()
        {
            records.push([&[0x80], bytes].concat());
        }
    }
    seeds.extend(records);
    Ok(seeds)
}

#[allow(clippy::disallowed_methods, reason = "a tool writes its files")]
fn main() -> Result<(), Box<dyn Error>> {
    let to = std::env::args().nth(1).ok_or("usage: fuzz_seeds DIRECTORY")?;
    for (target, seeds) in
        [("frame", frames()), ("control", control()), ("raft", raft()), ("disk", disks()?), ("rdma", rdma())]
    {
        let dir = Path::new(&to).join(target);
        std::fs::create_dir_all(&dir)?;
        let largest = seeds.iter().map(Vec::len).max().unwrap_or(0);
        println!("{target}: {} seeds, the largest of {largest} bytes", seeds.len());
        for (number, seed) in seeds.iter().enumerate() {
            std::fs::write(dir.join(format!("{number:03}")), seed)?;
        }
    }
    Ok(())
}
