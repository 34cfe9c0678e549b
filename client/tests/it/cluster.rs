//! A cluster as its clients see it: what it answers to which frame. No time, no network.

use placement::{Image, Live, Node, PgRecord, Pool, Slice, key, pg_of};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use wire::control::{Change, ControlMsg, Hello, KeyValue, MetaReply, MetaRequest, Role, Write};
use wire::*;

/// A frame with its payload, free of any buffer.
#[derive(Clone, Debug)]
pub struct Packet {
    pub header: Header,
    pub crcs: BlockCrcs,
    pub payload: Vec<u8>,
}

impl Packet {
    /// As bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut header = self.header;
        header.payload_len = self.payload.len() as u32;
        header.encode_into(&self.crcs, &mut bytes);
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// From bytes on the wire.
    pub fn decode(bytes: &[u8]) -> Self {
        let lengths = Header::peek(bytes).expect("peer sent a frame");
        assert_eq!(lengths.total(), bytes.len(), "one whole frame");
        let (header, crcs) = Header::decode(bytes).expect("peer sent a sound frame");
        Self { header, crcs, payload: bytes[HEADER_BYTES + lengths.meta..].to_vec() }
    }

    fn message(kind: FrameKind, payload: Vec<u8>) -> Self {
        Self { header: Header::new(kind, 0), crcs: BlockCrcs::one(block_crc(&payload)), payload }
    }

    fn control(msg: &ControlMsg) -> Self {
        Self::message(FrameKind::Control, msg.encode())
    }
}

pub struct FakeNode {
    pub id: NodeId,
    pub session: SessionId,
    pub control: SocketAddr,
    pub core: SocketAddr,
    pub slice: SliceId,
    pub up: bool,
}

/// How the next data frames are answered instead of as they should be.
#[derive(Clone, Copy, Debug)]
pub enum Misdeed {
    /// With this status, undone.
    Refuse(Status),
    /// Reads: one bit of the payload is wrong. Others: done as they should be.
    FlipBit,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Greeted {
    session: SessionId,
    incarnation: u64,
}

pub struct FakeCluster {
    pub id: ClusterId,
    pub nodes: Vec<FakeNode>,
    pub image: Image,
    keys: BTreeMap<String, (String, Revision)>,
    revision: Revision,
    /// Frames pushed to subscribers by changes.
    pub pushed: Vec<(u64, Packet)>,
    subscriptions: BTreeMap<u64, Vec<String>>,
    greeted: BTreeMap<u64, Greeted>,
    newest: BTreeMap<(SocketAddr, SessionId), u64>,
    pub blocks: BTreeMap<(ImageId, u64), Vec<u8>>,
    /// Data requests that were performed, in order.
    pub performed: Vec<Header>,
    pub misdeeds: Vec<Misdeed>,
    /// Control requests the metadata store answers with this instead.
    pub meta_misdeeds: Vec<Status>,
    pub refuse_hello: Option<Status>,
}

pub const POOL: PoolId = PoolId(1);
pub const IMAGE: ImageId = ImageId(7);
pub const PGS: u32 = 4;

impl FakeCluster {
    /// Nodes at these (control, core) addresses with one slice each, and one image `disk`.
    pub fn new(addrs: &[(SocketAddr, SocketAddr)], size_bytes: u64) -> Self {
        let node = |(i, (control, core)): (usize, &(SocketAddr, SocketAddr))| FakeNode {
            id: NodeId(i as u64 + 1),
            session: SessionId(1000 + i as u64),
            control: *control,
            core: *core,
            slice: SliceId(100 + i as u64),
            up: true,
        };
        let image =
            Image { id: IMAGE, name: "disk".into(), pool: POOL, size_bytes, removing: false, created_ms: 0 };
        let pool = Pool {
            id: POOL,
            name: "pool".into(),
            copies: 3,
            min_copies: 2,
            pg_count: PGS,
            failure_domain: placement::FailureDomain::Host,
            removing: false,
            scrub: Default::default(),
        };
        let mut cluster = Self {
            id: ClusterId(0xc1),
            nodes: addrs.iter().enumerate().map(node).collect(),
            image: image.clone(),
            keys: BTreeMap::new(),
            revision: Revision(10),
            pushed: Vec::new(),
            subscriptions: BTreeMap::new(),
            greeted: BTreeMap::new(),
            newest: BTreeMap::new(),
            blocks: BTreeMap::new(),
            performed: Vec::new(),
            misdeeds: Vec::new(),
            meta_misdeeds: Vec::new(),
            refuse_hello: None,
        };
        cluster.put(&key::pool(POOL), &pool);
        cluster.put(&key::image(IMAGE), &image);
        cluster.put(&key::image_name("disk"), &IMAGE);
        cluster.put(&key::image_name("disk-too"), &ImageId(8));
        for i in 0..cluster.nodes.len() {
            cluster.register(i);
        }
        for index in 0..PGS {
            let primary = cluster.nodes[index as usize % cluster.nodes.len()].slice;
            cluster.set_primary(index, Some(primary));
        }
        cluster.pushed.clear();
        cluster
    }

    /// Sets a key and tells subscribers.
    pub fn put<T: serde::Serialize>(&mut self, key: &str, value: &T) {
        let value = serde_json::to_string(value).unwrap();
        self.write(vec![(key.to_owned(), Some(value))]);
    }

    /// Removes a key and tells subscribers.
    pub fn remove(&mut self, key: &str) {
        self.write(vec![(key.to_owned(), None)]);
    }

    /// One transaction.
    fn write(&mut self, writes: Vec<(String, Option<String>)>) {
        self.revision.0 += 1;
        let revision = self.revision;
        let mut changes = Vec::new();
        for (key, value) in writes {
            match value {
                Some(value) => {
                    self.keys.insert(key.clone(), (value.clone(), revision));
                    changes.push(Change::Put(KeyValue { key, value, mod_revision: revision, lease: None }));
                }
                None => {
                    self.keys.remove(&key);
                    changes.push(Change::Delete { key });
                }
            }
        }
        for (conn, prefixes) in &self.subscriptions {
            let seen: Vec<Change> = changes
                .iter()
                .filter(|change| {
                    let (Change::Put(KeyValue { key, .. }) | Change::Delete { key }) = change;
                    prefixes.iter().any(|p| key.starts_with(p.as_str()))
                })
                .cloned()
                .collect();
            if !seen.is_empty() {
                let msg = ControlMsg::Changes { revision, changes: seen };
                self.pushed.push((*conn, Packet::control(&msg)));
            }
        }
    }

    fn register(&mut self, i: usize) {
        let node = &self.nodes[i];
        let record = Node {
            id: node.id,
            host: format!("host{i}"),
            control: node.control,
            cores: vec![node.core],
            http: None,
            disks: vec![placement::Disk {
                uuid: DiskUuid(i as u128),
                path: String::new(),
                slices: vec![Slice { id: node.slice, core: 0, size_bytes: 1 << 40 }],
            }],
            version: String::new(),
            problems: Vec::new(),
        };
        let live = Live { session: node.session, failed: Vec::new(), full: Vec::new(), leaving: false };
        let id = node.id;
        self.put(&key::node(id), &record);
        self.put(&key::live(id), &live);
    }

    pub fn record(&self, index: u32) -> PgRecord {
        self.keys
            .get(&key::pg(PgId { pool: POOL, index }))
            .map(|(value, _)| serde_json::from_str(value).unwrap())
            .unwrap_or_default()
    }

    /// A new epoch of a PG with this primary.
    pub fn set_primary(&mut self, index: u32, primary: Option<SliceId>) {
        let mut record = self.record(index);
        record.epoch.0 += 1;
        record.primary = primary;
        self.put(&key::pg(PgId { pool: POOL, index }), &record);
    }

    /// A node's process dies: it is no longer live and its PGs go to the next live node.
    pub fn kill(&mut self, i: usize) {
        self.nodes[i].up = false;
        let (id, slice) = (self.nodes[i].id, self.nodes[i].slice);
        self.remove(&key::live(id));
        let heir = self.nodes.iter().find(|node| node.up).map(|node| node.slice);
        for index in 0..PGS {
            if self.record(index).primary == Some(slice) {
                self.set_primary(index, heir);
            }
        }
    }

    /// A killed node comes back as a new process.
    pub fn revive(&mut self, i: usize) {
        self.nodes[i].up = true;
        self.nodes[i].session.0 += 100;
        self.register(i);
    }

    pub fn resize(&mut self, size_bytes: u64) {
        self.image.size_bytes = size_bytes;
        let image = self.image.clone();
        self.put(&key::image(IMAGE), &image);
    }

    /// Whether anybody listens there.
    pub fn listens(&self, addr: SocketAddr) -> bool {
        self.nodes.iter().any(|node| node.up && (node.control == addr || node.core == addr))
    }

    /// The connection is gone on the cluster's side.
    pub fn forget(&mut self, conn: u64) {
        self.subscriptions.remove(&conn);
    }

    /// Whether a data frame on this connection would still be looked at: not if its client has greeted
    /// again since.
    pub fn is_current(&self, at: SocketAddr, conn: u64) -> bool {
        self.greeted.get(&conn).is_some_and(|g| self.newest.get(&(at, g.session)) == Some(&g.incarnation))
    }

    /// Answers a frame that arrived at an address.
    pub fn answer(&mut self, at: SocketAddr, conn: u64, packet: &Packet) -> Vec<Packet> {
        match packet.header.kind {
            FrameKind::Hello => self.greet(at, conn, packet),
            FrameKind::Ping => {
                let header = Header::new(FrameKind::Pong, packet.header.request);
                vec![Packet { header, crcs: BlockCrcs::default(), payload: Vec::new() }]
            }
            FrameKind::Control => {
                let msg = ControlMsg::decode(&packet.payload).expect("a control message");
                self.control(conn, msg)
            }
            _ if self.is_current(at, conn) => vec![self.data(at, packet)],
            _ => Vec::new(),
        }
    }

    fn greet(&mut self, at: SocketAddr, conn: u64, packet: &Packet) -> Vec<Packet> {
        let hello = Hello::decode(&packet.payload).expect("a greeting");
        assert_eq!(hello.role, Role::Client);
        assert!(hello.cluster.is_none_or(|c| c == self.id) || self.refuse_hello.is_some());
        let newest = self.newest.entry((at, hello.session)).or_insert(0);
        if hello.incarnation <= *newest {
            // A greeting that was overtaken by a later connection's.
            return Vec::new();
        }
        *newest = hello.incarnation;
        self.greeted.insert(conn, Greeted { session: hello.session, incarnation: hello.incarnation });
        let answer = Hello {
            cluster: Some(self.id),
            role: Role::Node(NodeId(1)),
            session: SessionId(1),
            incarnation: 1,
            refused: self.refuse_hello.map_or(0, |status| status as u8),
        };
        vec![Packet::message(FrameKind::Hello, answer.encode())]
    }

    fn items(&self, prefix: &str) -> Vec<KeyValue> {
        self.keys
            .iter()
            .filter(|(key, _)| key.starts_with(prefix))
            .map(|(key, (value, revision))| KeyValue {
                key: key.clone(),
                value: value.clone(),
                mod_revision: *revision,
                lease: None,
            })
            .collect()
    }

    fn control(&mut self, conn: u64, msg: ControlMsg) -> Vec<Packet> {
        match msg {
            ControlMsg::Meta { ticket, request } => {
                let reply = match self.meta_misdeeds.pop() {
                    Some(status) => MetaReply::failed(status),
                    None => self.meta(request),
                };
                vec![Packet::control(&ControlMsg::MetaReply { ticket, reply })]
            }
            ControlMsg::Subscribe { prefixes } => {
                let mut items: Vec<KeyValue> = prefixes.iter().flat_map(|p| self.items(p)).collect();
                items.sort_by(|a, b| a.key.cmp(&b.key));
                self.subscriptions.insert(conn, prefixes);
                let half = items.split_off(items.len() / 2);
                let part = |items, more| {
                    Packet::control(&ControlMsg::Snapshot { revision: self.revision, items, more })
                };
                vec![part(items, true), part(half, false)]
            }
            other => panic!("a client does not send {other:?}"),
        }
    }

    fn meta(&mut self, request: MetaRequest) -> MetaReply {
        match request {
            MetaRequest::Range { prefix, limit } => {
                let mut items = self.items(&prefix);
                let more = items.len() > limit as usize;
                items.truncate(limit as usize);
                MetaReply::Range { revision: self.revision, items, more }
            }
            MetaRequest::Txn { writes, .. } => {
                let writes = writes
                    .into_iter()
                    .map(|write| match write {
                        Write::Put { key, value, .. } => (key, Some(value)),
                        Write::Delete { key } => (key, None),
                        Write::DeletePrefix { .. } => panic!("not used here"),
                    })
                    .collect();
                self.write(writes);
                MetaReply::Applied { revision: self.revision }
            }
            MetaRequest::LeaseKeep { ttl_ms, .. } => MetaReply::Lease { ttl_ms },
            MetaRequest::LeaseRevoke { .. } => MetaReply::Lease { ttl_ms: 0 },
            MetaRequest::ChangeVoters { .. } | MetaRequest::CancelVoters | MetaRequest::Voters => {
                MetaReply::failed(Status::Invalid) // nobody votes here
            }
        }
    }

    fn data(&mut self, at: SocketAddr, packet: &Packet) -> Packet {
        let header = &packet.header;
        let kind = FrameKind::from_u8(header.kind as u8 + 1).expect("requests have replies");
        let refuse = |status| Packet {
            header: header.reply(kind, status),
            crcs: BlockCrcs::default(),
            payload: Vec::new(),
        };
        assert_eq!(header.pg, pg_of(header.object, PGS), "client and cluster agree on the PG");
        let record = self.record(header.pg.index);
        let node = self.nodes.iter().find(|node| node.core == at).expect("a core's address");
        if record.primary != Some(node.slice) {
            return refuse(Status::NotPrimary);
        }
        if record.epoch != header.epoch {
            return refuse(if header.epoch < record.epoch { Status::StaleEpoch } else { Status::NotPrimary });
        }
        let misdeed = self.misdeeds.pop();
        if let Some(Misdeed::Refuse(status)) = misdeed {
            return refuse(status);
        }
        let mut reply = refuse(Status::Ok);
        let first = header.object.index * OBJECT_BLOCKS as u64 + u64::from(header.block);
        let all = (first..first + u64::from(header.blocks)).map(|b| (header.object.image, b));
        match header.kind {
            FrameKind::Read => {
                for block in all {
                    match self.blocks.get(&block) {
                        Some(bytes) => reply.payload.extend_from_slice(bytes),
                        None => reply.payload.extend_from_slice(&[0; BLOCK_BYTES]),
                    }
                }
                reply.crcs = BlockCrcs::of(&reply.payload);
                if let Some(Misdeed::FlipBit) = misdeed {
                    reply.payload[100] ^= 4;
                }
            }
            FrameKind::Write => {
                assert!(packet.crcs.matches(&packet.payload), "a write carries its checksums");
                assert_eq!(packet.payload.len(), usize::from(header.blocks) * BLOCK_BYTES);
                for (block, bytes) in all.zip(packet.payload.chunks(BLOCK_BYTES)) {
                    self.blocks.insert(block, bytes.to_vec());
                }
            }
            FrameKind::Zero | FrameKind::Delete => all.for_each(|block| drop(self.blocks.remove(&block))),
            kind => panic!("a client does not send {kind:?}"),
        }
        self.performed.push(*header);
        reply
    }
}
