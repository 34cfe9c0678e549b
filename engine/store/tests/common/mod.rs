//! A disk in memory whose power can be cut, and an environment around it.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]

pub mod model;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use reactor::*;
use store::*;
use wire::*;

pub const B: usize = BLOCK_BYTES;
type Block = Rc<[u8]>;

/// How the device keeps what it was given.
#[derive(Clone, Copy, Debug)]
pub struct DiskKind {
    /// Unit that is never torn.
    pub atomic: usize,
    /// Completed writes that were not marked durable survive.
    pub write_through: bool,
    /// Completions come in any order, else in order of submission.
    pub reorder: bool,
}

impl Default for DiskKind {
    fn default() -> Self {
        Self { atomic: 4096, write_through: true, reorder: true }
    }
}

struct InFlight {
    op: DiskOp,
    token: Token,
    volatile_at_submit: usize,
}

/// The environment: one sparse disk, seeded randomness.
pub struct TestEnv {
    pub arena: Arena,
    pub kind: DiskKind,
    pub size: u64,
    stable: BTreeMap<u64, Block>,
    /// What reads see beyond `stable`.
    cached: BTreeMap<u64, Block>,
    /// Completed writes that a cut may lose, in order.
    volatile: Vec<(u64, Block)>,
    in_flight: Vec<InFlight>,
    rng: u64,
    pub fail_writes: bool,
    pub fail_reads: bool,
    /// Writes that still succeed, and how all later ones fail.
    pub writes_left: Option<(u64, DiskError)>,
    pub queue_max: usize,
    /// Forget blocks of data, keep those of the format: for sizes that memory does not hold.
    pub drop_data: bool,
    pub writes: u64,
    pub reads: u64,
    pub bytes_written: u64,
}

impl TestEnv {
    pub fn new(size: u64, kind: DiskKind, seed: u64) -> Self {
        Self {
            arena: Arena::new(64 << 20).unwrap(),
            kind,
            size,
            stable: BTreeMap::new(),
            cached: BTreeMap::new(),
            volatile: Vec::new(),
            in_flight: Vec::new(),
            rng: seed,
            fail_writes: false,
            fail_reads: false,
            writes_left: None,
            queue_max: 4096,
            drop_data: false,
            writes: 0,
            reads: 0,
            bytes_written: 0,
        }
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.random() % n.max(1)
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn look(&self, block: u64) -> Option<&Block> {
        self.cached.get(&block).or_else(|| self.stable.get(&block))
    }

    pub fn read_bytes(&self, offset: u64, buf: &mut [u8]) {
        for (i, to) in buf.chunks_mut(B).enumerate() {
            match self.look(offset / B as u64 + i as u64) {
                Some(block) => to.copy_from_slice(&block[..to.len()]),
                None => to.fill(0),
            }
        }
    }

    pub fn write_bytes(&mut self, offset: u64, bytes: &[u8]) {
        for (i, from) in bytes.chunks(B).enumerate() {
            let mut block = vec![0; B];
            block[..from.len()].copy_from_slice(from);
            self.stable.insert(offset / B as u64 + i as u64, block.into());
        }
    }

    /// Flips bits of a byte on the device.
    pub fn damage(&mut self, offset: u64) {
        let block = offset / B as u64;
        let mut bytes = self.look(block).map_or(vec![0; B], |b| b.to_vec());
        bytes[(offset % B as u64) as usize] ^= 0x55;
        self.cached.remove(&block);
        self.stable.insert(block, bytes.into());
    }

    fn blocks_of(offset: u64, bufs: &[IoBuf]) -> Vec<(u64, Block)> {
        let chunks = bufs.iter().flat_map(|b| b.as_slice().chunks(B));
        (offset / B as u64..).zip(chunks).map(|(at, bytes)| (at, Block::from(bytes))).collect()
    }

    /// Completes one operation and returns what the store is to be told.
    pub fn complete(&mut self) -> Option<(Token, Result<(), DiskError>, DiskOp)> {
        if self.in_flight.is_empty() {
            return None;
        }
        let at = if self.kind.reorder { self.below(self.in_flight.len() as u64) as usize } else { 0 };
        let InFlight { mut op, token, volatile_at_submit } = self.in_flight.remove(at);
        let mut result = Ok(());
        if let (DiskOp::Write { .. }, Some((left, error))) = (&op, &mut self.writes_left) {
            if *left == 0 {
                return Some((token, Err(*error), op));
            }
            *left -= 1;
        }
        match &mut op {
            DiskOp::Read { .. } if self.fail_reads => result = Err(DiskError::Io(5)),
            DiskOp::Write { .. } if self.fail_writes => result = Err(DiskError::Io(5)),
            DiskOp::Read { offset, buf } => {
                let offset = *offset;
                let to = buf.as_mut_slice().expect("a read's buffer must be the only handle");
                self.read_bytes(offset, to);
            }
            DiskOp::Write { offset, bufs, durable } => {
                if self.drop_data {
                    let chunks = bufs.iter().flat_map(|b| b.as_slice().chunks(B));
                    for (block, bytes) in (*offset / B as u64..).zip(chunks) {
                        if bytes.starts_with(b"DRY") {
                            self.stable.insert(block, bytes.into());
                        }
                    }
                    return Some((token, result, op));
                }
                for (block, bytes) in Self::blocks_of(*offset, bufs) {
                    if *durable || self.kind.write_through {
                        self.cached.remove(&block);
                        self.stable.insert(block, bytes);
                    } else {
                        self.cached.insert(block, bytes.clone());
                        self.volatile.push((block, bytes));
                    }
                }
            }
            DiskOp::Flush => {
                for (block, bytes) in self.volatile.drain(..volatile_at_submit.min(self.volatile.len())) {
                    self.stable.insert(block, bytes);
                }
                let left: Vec<u64> = self.volatile.iter().map(|v| v.0).collect();
                self.cached.retain(|block, _| left.contains(block));
            }
            DiskOp::Discard { .. } => {}
        }
        Some((token, result, op))
    }

    /// Cuts the power: of everything not yet durable, each atomic unit may have reached the medium or not,
    /// in any order.
    pub fn power_cut(&mut self) {
        let mut maybe: Vec<(u64, Block)> = std::mem::take(&mut self.volatile);
        for InFlight { op, .. } in std::mem::take(&mut self.in_flight) {
            if let DiskOp::Write { offset, bufs, .. } = op {
                maybe.extend(Self::blocks_of(offset, &bufs));
            }
        }
        let bias = self.below(4);
        for i in (1..maybe.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            maybe.swap(i, j);
        }
        for (block, bytes) in maybe {
            let mut now = self.stable.get(&block).map_or(vec![0; B], |b| b.to_vec());
            for (to, from) in now.chunks_mut(self.kind.atomic).zip(bytes.chunks(self.kind.atomic)) {
                let lands = match bias {
                    0 => self.below(2) == 0,
                    1 => self.below(10) == 0,
                    2 => self.below(10) != 0,
                    _ => self.below(3) != 0,
                };
                if lands {
                    to.copy_from_slice(from);
                }
            }
            self.stable.insert(block, now.into());
        }
        self.cached.clear();
    }
}

impl Clock for TestEnv {
    fn now(&self) -> Mono {
        Mono(1)
    }
    fn wall(&self) -> WallMs {
        WallMs(1)
    }
}
impl Rng for TestEnv {
    fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.rng;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}
impl Timers for TestEnv {
    fn set_timer(&mut self, _: Mono, _: Token) {
        panic!("the store needs no timer");
    }
}
impl Disk for TestEnv {
    fn disk_info(&self, _: DiskIndex) -> Option<DiskInfo> {
        Some(DiskInfo {
            size_bytes: self.size,
            atomic_bytes: self.kind.atomic as u32,
            write_through: self.kind.write_through,
        })
    }
    fn submit(&mut self, _: DiskIndex, op: DiskOp, token: Token) -> Result<(), (Full, DiskOp)> {
        if self.in_flight.len() >= self.queue_max {
            return Err((Full, op));
        }
        match &op {
            DiskOp::Read { offset, buf } => {
                assert!(offset.is_multiple_of(B as u64) && buf.len().is_multiple_of(B));
                assert!(offset + buf.len() as u64 <= self.size);
                self.reads += 1;
            }
            DiskOp::Write { offset, bufs, .. } => {
                assert!(bufs.len() <= IOV_MAX && !bufs.is_empty());
                let len: usize = bufs.iter().map(IoBuf::len).sum();
                assert!(offset.is_multiple_of(B as u64) && len.is_multiple_of(B));
                assert!(offset + len as u64 <= self.size);
                self.writes += 1;
                self.bytes_written += len as u64;
            }
            _ => {}
        }
        let volatile_at_submit = self.volatile.len();
        self.in_flight.push(InFlight { op, token, volatile_at_submit });
        Ok(())
    }
}
impl Net for TestEnv {
    fn listen(&mut self, _: SocketAddr, _: Framing, _: Token) -> Result<SocketAddr, NetError> {
        unreachable!()
    }
    fn connect(&mut self, _: SocketAddr, _: Framing) -> ConnId {
        unreachable!()
    }
    fn send(&mut self, _: ConnId, _: Frame) -> Result<(), Full> {
        unreachable!()
    }
    fn send_bytes(&mut self, _: ConnId, _: IoBuf) -> Result<(), Full> {
        unreachable!()
    }
    fn close(&mut self, _: ConnId, _: bool) {
        unreachable!()
    }
}
impl Mesh for TestEnv {
    fn core(&self) -> CoreId {
        CoreId(0)
    }
    fn post(&mut self, _: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        Err((Full, msg))
    }
}
impl Buffers for TestEnv {
    fn arena(&self) -> &Arena {
        &self.arena
    }
}

pub const CLUSTER: ClusterId = ClusterId(7);
pub const TOKENS: TokenRange = TokenRange { first: 1 << 56, count: 4096 };

pub fn object(image: u64, index: u64) -> ObjectId {
    ObjectId { pool: PoolId(1), image: ImageId(image), index }
}

pub fn version(counter: u64) -> Version {
    Version { epoch: Epoch(1), counter }
}

/// A disk prepared with one slice; returns where it lies.
pub fn prepare(env: &mut TestEnv) -> SliceGeometry {
    let plan = DiskPlan {
        cluster: CLUSTER,
        disk: DiskUuid(9),
        node: None,
        disk_bytes: env.size,
        slices: vec![SliceId(4711)],
    };
    for (offset, bytes) in plan.writes().unwrap() {
        env.write_bytes(offset, &bytes);
    }
    plan.layout().unwrap().slices[0].geometry()
}

/// Delivers completions until nothing is in flight.
pub fn settle(env: &mut TestEnv, store: &mut SliceStore) -> Vec<StoreEvent> {
    let mut events = Vec::new();
    loop {
        store.flush(env);
        while let Some(event) = store.poll() {
            events.push(event);
        }
        let Some((token, result, op)) = env.complete() else { break };
        store.on_event(env, token, result, op);
    }
    while let Some(event) = store.poll() {
        events.push(event);
    }
    events
}

pub fn try_open(
    env: &mut TestEnv,
    geometry: SliceGeometry,
    options: StoreOptions,
) -> Result<(SliceStore, OpenReport), OpenError> {
    let mut store = SliceStore::open(env, DiskIndex(0), geometry, options, TOKENS);
    for event in settle(env, &mut store) {
        if let StoreEvent::Opened(result) = event {
            return result.map(|report| (store, report));
        }
    }
    panic!("opening ended without an event");
}

pub fn open(env: &mut TestEnv, geometry: SliceGeometry) -> SliceStore {
    try_open(env, geometry, StoreOptions::default()).expect("slice opens").0
}

pub fn close(env: &mut TestEnv, store: &mut SliceStore) {
    store.close(env);
    let events = settle(env, store);
    assert!(events.iter().any(|e| matches!(e, StoreEvent::Closed(Ok(())))), "{events:?}");
}

/// Blocks filled with a value, and their checksums.
pub fn data(env: &mut TestEnv, values: &[u64]) -> (IoBuf, BlockCrcs) {
    let mut buf = env.alloc(values.len() * B).unwrap();
    for (chunk, value) in buf.as_mut_slice().unwrap().chunks_mut(B).zip(values) {
        fill(chunk, *value);
    }
    let crcs = BlockCrcs::of(buf.as_slice());
    (buf, crcs)
}

pub fn fill(block: &mut [u8], value: u64) {
    for (i, word) in block.chunks_mut(8).enumerate() {
        let x = if value == 0 { 0 } else { value.wrapping_mul(i as u64 * 2 + 1) };
        word.copy_from_slice(&x.to_le_bytes());
    }
}

/// The value a block was filled with.
pub fn value_of(block: &[u8]) -> u64 {
    let value = u64::from_le_bytes(block[..8].try_into().unwrap());
    let mut expected = vec![0; B];
    fill(&mut expected, value);
    assert_eq!(block, &expected[..], "a mix of two contents");
    value
}

pub fn values_of(buf: &IoBuf) -> Vec<u64> {
    buf.as_slice().chunks(B).map(value_of).collect()
}

/// One write, made durable; `Err` as the store says.
pub fn write_now(
    env: &mut TestEnv,
    store: &mut SliceStore,
    object: ObjectId,
    counter: u64,
    first: u32,
    values: &[u64],
) -> Result<(), StoreError> {
    loop {
        let (buf, crcs) = data(env, values);
        match store.write(env, counter, object, version(counter), first, std::slice::from_ref(&buf), &crcs) {
            Err(StoreError::Busy) => {
                settle(env, store);
            }
            Err(error) => return Err(error),
            Ok(()) => break,
        }
    }
    for event in settle(env, store) {
        if let StoreEvent::Done { ticket, result } = event
            && ticket == counter
        {
            return result;
        }
    }
    panic!("no answer");
}

pub fn read_now(
    env: &mut TestEnv,
    store: &mut SliceStore,
    object: ObjectId,
    first: u32,
    blocks: u32,
) -> Result<Vec<u64>, StoreError> {
    store.read(77, object, first, blocks)?;
    for event in settle(env, store) {
        if let StoreEvent::Read { ticket: 77, result } = event {
            let read = result?;
            assert!(read.crcs.matches(read.data.as_slice()));
            return Ok(values_of(&read.data));
        }
    }
    panic!("no answer");
}

impl ReadAt for TestEnv {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.read_bytes(offset, buf);
        Ok(())
    }
}

pub fn check_disk(env: &TestEnv) -> CheckReport {
    let options = CheckOptions { cluster: Some(CLUSTER), verify_data: true };
    store::check::check(env, env.size, options)
}
