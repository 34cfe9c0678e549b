//! A whole metadata group in one thread: simulated disks, network and time, driven by a seed. Every
//! outcome of a seed repeats exactly.
//!
//! While it runs it checks what must hold at every moment: outputs of a watcher fold to the replica's
//! keys, revisions rise, a
//! term has one leader, and replicas at the same index are equal.

use crate::bounds::{META_TICK_MS, REQUEST_DEADLINE_MS};
use crate::kv::key_value;
use crate::planted::Planted;
use crate::{Item, MetaConfig, MetaError, MetaNode, MetaOutput, Standing};
use reactor::{
    Arena, Buffers, Clock, ConnId, Disk, DiskError, DiskIndex, DiskInfo, DiskOp, Frame, Framing, Full, IoBuf,
    Mesh, MeshMsg, Mono, Net, NetError, Rng, Timers, Token, WallMs,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use wire::control::{Change, KeyValue, MetaReply, MetaRequest, VoterAddress, Write};
use wire::{BLOCK_BYTES, ClusterId, CoreId, NodeId, Revision};

const MS: u64 = 1_000_000;

/// A small generator with a good spread (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits().checked_rem(n).unwrap_or(0)
    }
    /// True with a probability of `per_mille` / 1000.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

type Block = Box<[u8]>;

/// One node's world.
pub struct TestEnv {
    now: Mono,
    random: Random,
    arena: Option<Arena>,
    blocks: BTreeMap<u64, Block>,
    size: u64,
    submitted: Vec<(Token, DiskOp)>,
    in_flight: BTreeMap<u64, DiskOp>,
    /// Largest number of operations taken before the queue is full.
    pub queue: usize,
    /// Device writes so far.
    pub writes: u64,
}

impl TestEnv {
    fn store(&mut self, offset: u64, bytes: &[u8], mut keep: impl FnMut() -> bool) {
        const SECTOR: usize = 512;
        for (i, sector) in bytes.chunks(SECTOR).enumerate() {
            if !keep() {
                continue;
            }
            let at = offset + (i * SECTOR) as u64;
            let block = self
                .blocks
                .entry(at / BLOCK_BYTES as u64)
                .or_insert_with(|| vec![0; BLOCK_BYTES].into_boxed_slice());
            let within = (at % BLOCK_BYTES as u64) as usize;
            for (to, from) in block.iter_mut().skip(within).zip(sector) {
                *to = *from;
            }
        }
    }

    fn bytes_of(op: &DiskOp) -> Option<(u64, Vec<u8>)> {
        let DiskOp::Write { offset, bufs, .. } = op else { return None };
        Some((*offset, bufs.iter().flat_map(|buf| buf.as_slice().iter().copied()).collect()))
    }

    fn perform(&mut self, op: &mut DiskOp) {
        if let Some((offset, bytes)) = Self::bytes_of(op) {
            self.writes += 1;
            self.store(offset, &bytes, || true);
        } else if let DiskOp::Read { offset, buf } = op
            && let Some(into) = buf.as_mut_slice()
        {
            for (i, chunk) in into.chunks_mut(BLOCK_BYTES).enumerate() {
                match self.blocks.get(&(*offset / BLOCK_BYTES as u64 + i as u64)) {
                    Some(block) => chunk.copy_from_slice(block),
                    None => chunk.fill(0),
                }
            }
        }
    }

    /// Power cut: of every write in flight any subset of sectors is there.
    fn cut(&mut self, random: &mut Random) {
        self.submitted.clear();
        for (_, op) in std::mem::take(&mut self.in_flight) {
            if let Some((offset, bytes)) = Self::bytes_of(&op) {
                let share = [0, 500, 1000, 100, 900][random.below(5) as usize];
                self.store(offset, &bytes, || random.chance(share));
            }
        }
    }

    /// Bits of the disk, for tests that damage it.
    pub fn block_mut(&mut self, number: u64) -> Option<&mut [u8]> {
        self.blocks.get_mut(&number).map(|block| &mut **block)
    }

    /// Numbers of blocks that were ever written.
    pub fn written_blocks(&self) -> Vec<u64> {
        self.blocks.keys().copied().collect()
    }

    /// Whether any block on disk contains these bytes.
    pub fn disk_contains(&self, needle: &[u8]) -> bool {
        self.blocks.values().any(|block| block.windows(needle.len()).any(|w| w == needle))
    }
}

impl Clock for TestEnv {
    fn now(&self) -> Mono {
        self.now
    }
    fn wall(&self) -> WallMs {
        WallMs(self.now.0 / MS)
    }
}
impl Rng for TestEnv {
    fn random(&mut self) -> u64 {
        self.random.bits()
    }
}
impl Timers for TestEnv {
    fn set_timer(&mut self, _at: Mono, _token: Token) {}
}
impl Disk for TestEnv {
    fn disk_info(&self, disk: DiskIndex) -> Option<DiskInfo> {
        (disk.0 == 0).then_some(DiskInfo { size_bytes: self.size, atomic_bytes: 512, write_through: false })
    }
    fn submit(&mut self, _disk: DiskIndex, op: DiskOp, token: Token) -> Result<(), (Full, DiskOp)> {
        if self.submitted.len() + self.in_flight.len() >= self.queue {
            return Err((Full, op));
        }
        self.submitted.push((token, op));
        Ok(())
    }
}
impl Net for TestEnv {
    fn listen(&mut self, _at: SocketAddr, _framing: Framing, _token: Token) -> Result<SocketAddr, NetError> {
        Err(NetError::InUse)
    }
    fn connect(&mut self, _to: SocketAddr, _framing: Framing) -> ConnId {
        ConnId(0)
    }
    fn send(&mut self, _conn: ConnId, _frame: Frame) -> Result<(), Full> {
        Err(Full)
    }
    fn send_bytes(&mut self, _conn: ConnId, _bytes: IoBuf) -> Result<(), Full> {
        Err(Full)
    }
    fn close(&mut self, _conn: ConnId, _after_flush: bool) {}
}
impl Mesh for TestEnv {
    fn core(&self) -> CoreId {
        wire::CONTROL_CORE
    }
    fn post(&mut self, _to: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        Err((Full, msg))
    }
}
#[allow(clippy::expect_used)] // A harness: without memory there is no test.
impl Buffers for TestEnv {
    fn arena(&self) -> &Arena {
        self.arena.as_ref().expect("created with the world")
    }
}

/// What a watcher of one node has seen since the node started.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Keys as the changes say.
    pub keys: BTreeMap<String, KeyValue>,
    /// Revision of the last changes.
    pub last: Option<Revision>,
    /// All changes, with the time they came.
    pub log: Vec<(u64, Revision, Vec<Change>)>,
}

/// A node of the group.
pub struct Slot {
    /// Its world.
    pub env: TestEnv,
    /// The voter, while it runs.
    pub node: Option<MetaNode>,
    /// Its watcher.
    pub watch: Watch,
    /// Why it stopped by itself.
    pub failed: Option<MetaError>,
    life: u32,
    origin_ns: u64,
    paused: bool,
    /// Life, index and watcher's revision that were last compared.
    checked: (u32, u64, Option<Revision>),
}

impl Slot {
    /// How often the node has been started.
    pub fn life(&self) -> u32 {
        self.life
    }
}

enum Happening {
    Deliver { from: usize, to: usize, bytes: Vec<u8> },
    DiskDone { node: usize, life: u32, token: u64 },
    Tick { node: usize, life: u32 },
}

/// How a world behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Voters that found the group: the first nodes.
    pub voters: u64,
    /// Nodes that may become voters.
    pub spares: u64,
    /// Bytes of the region.
    pub region: u64,
    /// Messages lost, per mille.
    pub loss: u64,
    /// Messages doubled, per mille.
    pub doubled: u64,
    /// Longest delay of a message.
    pub delay_us: u64,
    /// Longest disk operation.
    pub disk_us: u64,
    /// Bugs.
    pub planted: Planted,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            voters: 3,
            spares: 0,
            region: 8 << 20,
            loss: 0,
            doubled: 0,
            delay_us: 500,
            disk_us: 300,
            planted: Planted::none(),
        }
    }
}

/// The cluster of every world.
pub const CLUSTER: ClusterId = ClusterId(0xD15C);

/// A group and its surroundings.
pub struct World {
    /// Nanoseconds since the start.
    pub now: u64,
    /// Randomness of the surroundings.
    pub random: Random,
    /// The nodes.
    pub slots: Vec<Slot>,
    /// How it behaves.
    pub options: Options,
    /// Replies by ticket: when, and what.
    pub replies: BTreeMap<u64, (u64, MetaReply)>,
    /// Digest of everything that has happened.
    pub trace: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    next: u64,
    cut: BTreeSet<(usize, usize)>,
    /// Digest of the keys at an applied index, of any node.
    states: BTreeMap<u64, (u64, usize)>,
    /// Elected leader of a term.
    leaders: BTreeMap<u64, NodeId>,
    next_ticket: u64,
}

fn mix(digest: u64, value: u64) -> u64 {
    Random(digest ^ value.wrapping_mul(0xff51_afd7_ed55_8ccd)).bits()
}

fn digest_bytes(bytes: &[u8]) -> u64 {
    (bytes.len() as u64) << 32 | u64::from(crc32fast::hash(bytes))
}

#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // A harness: it is to fail loudly.
impl World {
    /// A group of new nodes, all started.
    pub fn new(seed: u64, options: Options) -> Self {
        let mut random = Random(seed);
        let slots = (0..options.voters + options.spares)
            .map(|_| Slot {
                env: TestEnv {
                    now: Mono(0),
                    random: Random(random.bits()),
                    arena: Some(Arena::new(1 << 18).expect("memory")),
                    blocks: BTreeMap::new(),
                    size: options.region + (1 << 20),
                    submitted: Vec::new(),
                    in_flight: BTreeMap::new(),
                    queue: 64,
                    writes: 0,
                },
                node: None,
                watch: Watch::default(),
                failed: None,
                life: 0,
                origin_ns: random.below(1 << 40),
                paused: false,
                checked: (0, 0, None),
            })
            .collect();
        let mut world = Self {
            now: 0,
            random,
            slots,
            options,
            replies: BTreeMap::new(),
            trace: 0,
            queue: BTreeMap::new(),
            next: 0,
            cut: BTreeSet::new(),
            states: BTreeMap::new(),
            leaders: BTreeMap::new(),
            next_ticket: 1,
        };
        for node in 0..world.slots.len() {
            world.start(node);
        }
        world
    }

    /// A node's identifier.
    pub fn id(node: usize) -> NodeId {
        NodeId(node as u64 + 1)
    }

    /// Where it would be reached.
    pub fn address(node: usize) -> VoterAddress {
        VoterAddress { node: Self::id(node), address: format!("10.0.0.{}:7700", node + 1) }
    }

    /// What a node is started with.
    pub fn config(&self, node: usize) -> MetaConfig {
        MetaConfig {
            node: Self::id(node),
            voters: (0..self.options.voters as usize).map(Self::id).collect(),
            addresses: (0..self.options.voters as usize).map(Self::address).collect(),
            cluster: CLUSTER,
            disk: DiskIndex(0),
            region_offset: 1 << 20,
            region_len: self.options.region,
            tokens: 0x0a00_0000_0000_0000,
            planted: self.options.planted,
        }
    }

    fn at(&mut self, delay_ns: u64, happening: Happening) {
        self.next += 1;
        self.queue.insert((self.now + delay_ns, self.next), happening);
    }

    /// Starts a node that does not run.
    pub fn start(&mut self, node: usize) {
        let config = self.config(node);
        self.open_with(node, config);
    }

    /// Starts a node with a configuration of its own.
    pub fn open_with(&mut self, node: usize, config: MetaConfig) {
        let now = self.now;
        let slot = &mut self.slots[node];
        assert!(slot.node.is_none());
        slot.life += 1;
        slot.paused = false;
        slot.watch = Watch::default();
        slot.env.now = Mono(slot.origin_ns + now);
        slot.node = Some(MetaNode::open(&mut slot.env, config));
        let life = slot.life;
        self.settle(node);
        let first = self.random.below(META_TICK_MS * MS);
        self.at(first, Happening::Tick { node, life });
    }

    /// Power cut.
    pub fn crash(&mut self, node: usize) {
        let slot = &mut self.slots[node];
        slot.node = None;
        slot.env.cut(&mut self.random);
        self.trace = mix(self.trace, 77 + node as u64);
    }

    /// Stops a node's clock-driven and message-driven work without losing memory.
    pub fn pause(&mut self, node: usize, paused: bool) {
        self.slots[node].paused = paused;
    }

    /// Cuts or mends the way from `a` to `b`, one direction.
    pub fn link(&mut self, a: usize, b: usize, up: bool) {
        if up {
            self.cut.remove(&(a, b));
        } else {
            self.cut.insert((a, b));
        }
    }

    /// Cuts a node off from all others.
    pub fn isolate(&mut self, node: usize) {
        for other in 0..self.slots.len() {
            self.link(node, other, false);
            self.link(other, node, false);
        }
    }

    /// Mends all ways.
    pub fn heal(&mut self) {
        self.cut.clear();
    }

    /// The voter, which must run.
    pub fn node(&self, node: usize) -> &MetaNode {
        self.slots[node].node.as_ref().expect("runs")
    }

    /// Does something with a voter, then lets out what it has to say.
    pub fn with(&mut self, node: usize, f: impl FnOnce(&mut MetaNode, &mut TestEnv)) {
        let now = self.now;
        let slot = &mut self.slots[node];
        slot.env.now = Mono(slot.origin_ns + now);
        f(slot.node.as_mut().expect("runs"), &mut slot.env);
        self.settle(node);
    }

    /// Submits a request; the result is its ticket.
    pub fn submit(&mut self, node: usize, request: MetaRequest) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.with(node, |meta, env| meta.submit(env, ticket, request));
        ticket
    }

    /// Flushes a node, starts its disk operations, and takes its outputs.
    fn settle(&mut self, node: usize) {
        let life = self.slots[node].life;
        let slot = &mut self.slots[node];
        let Some(meta) = &mut slot.node else { return };
        meta.flush(&mut slot.env);
        let submitted = std::mem::take(&mut slot.env.submitted);
        for (token, op) in submitted {
            self.slots[node].env.in_flight.insert(token.0, op);
            let delay = 1 + self.random.below(self.options.disk_us * 1000);
            self.at(delay, Happening::DiskDone { node, life, token: token.0 });
        }
        while let Some(output) = self.slots[node].node.as_mut().and_then(MetaNode::poll) {
            self.output(node, output);
        }
        self.check(node);
    }

    fn output(&mut self, node: usize, output: MetaOutput) {
        match output {
            MetaOutput::Send { to, bytes } => {
                assert!(bytes.len() <= crate::bounds::MESSAGE_BYTES_MAX);
                let to = to.0 as usize - 1;
                if self.cut.contains(&(node, to)) || self.random.chance(self.options.loss) {
                    return;
                }
                if self.random.chance(self.options.doubled) {
                    let delay = self.random.below(self.options.delay_us * 20_000);
                    self.at(delay, Happening::Deliver { from: node, to, bytes: bytes.clone() });
                }
                let delay = 1 + self.random.below(self.options.delay_us * 1000);
                self.at(delay, Happening::Deliver { from: node, to, bytes });
            }
            MetaOutput::Reply { ticket, reply } => {
                self.trace = mix(self.trace, ticket);
                let before = self.replies.insert(ticket, (self.now, reply));
                assert!(before.is_none(), "ticket {ticket} was answered twice");
            }
            MetaOutput::Changes { revision, changes } => self.changes(node, revision, changes),
            MetaOutput::Leader { leader, term, is_me } => {
                self.trace = mix(self.trace, term);
                if is_me {
                    let known = *self.leaders.entry(term).or_insert(Self::id(node));
                    assert_eq!(Some(known), leader, "two leaders in term {term}");
                }
            }
            MetaOutput::Failed(error) => self.slots[node].failed = Some(error),
        }
    }

    fn changes(&mut self, node: usize, revision: Revision, changes: Vec<Change>) {
        let now = self.now;
        let watch = &mut self.slots[node].watch;
        assert!(watch.last.is_none_or(|last| last < revision), "node {node}: {revision} again");
        watch.last = Some(revision);
        for change in &changes {
            match change {
                Change::Put(item) => {
                    // Baselines and snapshots bring keys of many revisions, others of exactly theirs.
                    assert!(item.mod_revision <= revision);
                    watch.keys.insert(item.key.clone(), item.clone());
                }
                Change::Delete { key } => {
                    assert!(watch.keys.remove(key).is_some(), "{key} deleted but never put");
                }
            }
        }
        watch.log.push((now, revision, changes));
    }

    fn check(&mut self, node: usize) {
        let slot = &mut self.slots[node];
        let Some(meta) = slot.node.as_ref().filter(|meta| meta.is_ready()) else { return };
        let now = (slot.life, meta.status().applied_index, slot.watch.last);
        if slot.checked == now {
            return;
        }
        slot.checked = now;
        let digest =
            meta.kv().range("").fold(meta.kv().revision().0, |digest, (key, item): (&str, &Item)| {
                let digest = mix(digest, digest_bytes(key.as_bytes()));
                mix(mix(digest, item.mod_revision.0), digest_bytes(item.value.as_bytes()))
            });
        let index = meta.status().applied_index;
        let known = *self.states.entry(index).or_insert((digest, node));
        assert_eq!(known.0, digest, "nodes {} and {node} differ at index {index}", known.1);
        let watched = slot.watch.keys.values().map(|item| (item.key.as_str(), item.mod_revision));
        let held = meta.kv().range("").map(|(key, item)| (key, item.mod_revision));
        assert!(watched.eq(held), "the watcher of node {node} does not see what the node holds");
    }

    /// Lets the next thing happen.
    pub fn step(&mut self) {
        let Some(((at, _), happening)) = self.queue.pop_first() else { return };
        self.now = self.now.max(at);
        self.trace = mix(self.trace, at);
        match happening {
            Happening::Deliver { from, to, bytes } => {
                if self.slots[to].paused {
                    return self.at(MS, Happening::Deliver { from, to, bytes });
                }
                self.trace = mix(self.trace, digest_bytes(&bytes));
                if self.slots[to].node.is_some() && !self.cut.contains(&(from, to)) {
                    self.with(to, |meta, env| meta.on_message(env, Self::id(from), &bytes));
                }
            }
            Happening::DiskDone { node, life, token } => {
                if self.slots[node].life != life || self.slots[node].node.is_none() {
                    return;
                }
                if self.slots[node].paused {
                    return self.at(MS, Happening::DiskDone { node, life, token });
                }
                let Some(mut op) = self.slots[node].env.in_flight.remove(&token) else { return };
                self.slots[node].env.perform(&mut op);
                self.with(node, |meta, env| meta.on_disk(env, Token(token), Ok::<(), DiskError>(()), op));
            }
            Happening::Tick { node, life } => {
                if self.slots[node].life != life || self.slots[node].node.is_none() {
                    return;
                }
                self.at(META_TICK_MS * MS, Happening::Tick { node, life });
                if !self.slots[node].paused {
                    self.with(node, |meta, env| meta.on_tick(env));
                }
            }
        }
    }

    /// Runs for this long.
    pub fn run_ms(&mut self, ms: u64) {
        let until = self.now + ms * MS;
        while self.queue.keys().next().is_some_and(|(at, _)| *at <= until) {
            self.step();
        }
        self.now = until;
    }

    /// Runs until `done`, at most this long; whether it came to be.
    pub fn run_until(&mut self, ms: u64, mut done: impl FnMut(&World) -> bool) -> bool {
        let until = self.now + ms * MS;
        while !done(self) {
            if self.queue.keys().next().is_none_or(|(at, _)| *at > until) {
                return false;
            }
            self.step();
        }
        true
    }

    /// The node that leads and serves.
    pub fn leader(&self) -> Option<usize> {
        let serves = |slot: &Slot| slot.node.as_ref().is_some_and(MetaNode::is_serving) && !slot.paused;
        let serving: Vec<usize> = (0..self.slots.len()).filter(|n| serves(&self.slots[*n])).collect();
        serving.into_iter().max_by_key(|node| self.node(*node).status().term)
    }

    /// Waits for a leader.
    pub fn elect(&mut self) -> usize {
        assert!(
            self.run_until(5_000, |w| w.leader().is_some()),
            "no leader after 5 s: {:?}",
            self.failures()
        );
        self.leader().expect("just seen")
    }

    /// Waits until all running members are ready and have applied the same.
    pub fn converge(&mut self) {
        let same = |w: &World| {
            let nodes = w.slots.iter().filter_map(|slot| slot.node.as_ref());
            let members =
                nodes.filter(|node| !matches!(node.standing(), Standing::Blank | Standing::Outside));
            let mut seen = members.map(|node| {
                let status = node.status();
                (status.ready, status.applied_index, status.leader.is_some())
            });
            let first = seen.next();
            first.is_some_and(|first| first.0 && first.2 && seen.all(|other| other == first))
        };
        assert!(self.run_until(30_000, same), "no convergence: {}", self.describe());
    }

    /// Why nodes have stopped by themselves.
    pub fn failures(&self) -> Vec<(usize, MetaError)> {
        let failed = |(n, slot): (usize, &Slot)| slot.failed.clone().map(|error| (n, error));
        self.slots.iter().enumerate().filter_map(failed).collect()
    }

    /// Everything, for a failed assertion.
    pub fn describe(&self) -> String {
        let one = |slot: &Slot| match &slot.node {
            Some(node) => format!("{:?} of {:?} {:?}", node.standing(), node.members(), node.status()),
            None => "down".to_owned(),
        };
        self.slots.iter().map(one).collect::<Vec<_>>().join("\n") + &format!("{:?}", self.failures())
    }

    /// Submits and waits for the answer.
    pub fn call(&mut self, node: usize, request: MetaRequest) -> MetaReply {
        let ticket = self.submit(node, request);
        let limit = REQUEST_DEADLINE_MS + 1_000;
        assert!(self.run_until(limit, |w| w.replies.contains_key(&ticket)), "no answer: {}", self.describe());
        self.replies[&ticket].1.clone()
    }

    /// Puts a key and expects success.
    pub fn put(&mut self, node: usize, key: &str, value: &str) -> Revision {
        match self.call(node, put(key, value)) {
            MetaReply::Applied { revision } => revision,
            other => panic!("put {key}: {other:?}"),
        }
    }

    /// Asks for a change of the voters.
    pub fn change(&mut self, node: usize, add: &[usize], remove: &[usize]) -> MetaReply {
        self.call(node, Self::change_request(add, remove))
    }

    /// A request for a change of the voters.
    pub fn change_request(add: &[usize], remove: &[usize]) -> MetaRequest {
        MetaRequest::ChangeVoters {
            add: add.iter().map(|node| Self::address(*node)).collect(),
            remove: remove.iter().map(|node| Self::id(*node)).collect(),
        }
    }

    /// The voters, when the change is complete; waits for that.
    pub fn settled(&mut self, node: usize) -> Vec<NodeId> {
        for _ in 0..200 {
            if let MetaReply::Voters { members, settled: true, .. } = self.call(node, MetaRequest::Voters) {
                return members.into_iter().map(|member| member.node).collect();
            }
            self.run_ms(50);
        }
        panic!("the voters do not settle: {}", self.describe());
    }

    /// Reads keys, linearizable, and expects success.
    pub fn range(&mut self, node: usize, prefix: &str) -> Vec<KeyValue> {
        match self.call(node, MetaRequest::Range { prefix: prefix.to_owned(), limit: 1000 }) {
            MetaReply::Range { items, .. } => items,
            other => panic!("range {prefix}: {other:?}"),
        }
    }

    /// The keys a node holds.
    pub fn held(&self, node: usize) -> Vec<KeyValue> {
        self.node(node).kv().range("").map(|(key, item)| key_value(key, item)).collect()
    }
}

/// A transaction that puts one key.
pub fn put(key: &str, value: &str) -> MetaRequest {
    let write = Write::Put { key: key.to_owned(), value: value.to_owned(), lease: None };
    MetaRequest::Txn { compares: vec![], writes: vec![write] }
}

/// A transaction that puts one key bound to a lease.
pub fn put_leased(key: &str, value: &str, lease: u64) -> MetaRequest {
    let write = Write::Put { key: key.to_owned(), value: value.to_owned(), lease: Some(lease) };
    MetaRequest::Txn { compares: vec![], writes: vec![write] }
}
