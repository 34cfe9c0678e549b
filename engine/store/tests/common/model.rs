//! Random operations against a model, power cuts included.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]

use super::*;

/// One mutation as the model sees it.
#[derive(Clone, Debug)]
enum Op {
    Write { first: u32, values: Vec<u64> },
    Replace { mask: u32, values: Vec<u64> },
    Zero { first: u32, blocks: u32 },
    Delete,
    Purge,
}

#[derive(Clone, PartialEq, Debug)]
struct Object {
    presence: Presence,
    blocks: [u64; 32],
}

const NOTHING: Object = Object { presence: Presence::Absent, blocks: [0; 32] };

impl Object {
    fn mask(&self) -> u32 {
        (0..32).filter(|b| self.blocks[*b as usize] != 0).fold(0, |m, b| m | 1 << b)
    }
}

fn apply(object: &mut Object, op: &Op, version: Version) {
    match op {
        Op::Write { first, values } => {
            for (i, value) in values.iter().enumerate() {
                object.blocks[*first as usize + i] = *value;
            }
            object.presence = Presence::Live(version);
        }
        Op::Replace { mask, values } => {
            object.blocks = [0; 32];
            let bits = (0..32).filter(|b| mask >> b & 1 == 1);
            for (b, value) in bits.zip(values) {
                object.blocks[b] = *value;
            }
            object.presence = Presence::Live(version);
        }
        Op::Zero { first, blocks } => {
            for b in *first..first + blocks {
                object.blocks[b as usize] = 0;
            }
            object.presence = Presence::Live(version);
        }
        Op::Delete => *object = Object { presence: Presence::Tombstone(version), blocks: [0; 32] },
        Op::Purge => *object = NOTHING,
    }
}

/// What a run may look like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub objects: u64,
    pub steps: u64,
    pub kind: DiskKind,
    pub options: StoreOptions,
    pub disk_bytes: u64,
    /// Cuts in the run.
    pub cuts: u64,
    /// Orderly reopenings instead of some cuts.
    pub closes: bool,
    /// One of so many steps flushes; more means larger batches.
    pub flush_one_in: u64,
}

struct Run {
    env: TestEnv,
    geometry: SliceGeometry,
    shape: Shape,
    store: SliceStore,
    /// Durable for certain.
    base: Vec<Object>,
    /// Submitted since, in order.
    ops: Vec<(usize, Op, Version)>,
    /// How many of them were acknowledged.
    acked: usize,
    counter: u64,
    reads: BTreeMap<u64, (usize, u32, u32, usize)>,
    pub nospace: u64,
}

/// Runs and says what went wrong, or how many mutations were acknowledged.
pub fn run(seed: u64, shape: Shape) -> Result<u64, String> {
    let mut env = TestEnv::new(shape.disk_bytes, shape.kind, seed);
    let geometry = prepare(&mut env);
    let store = try_open(&mut env, geometry, shape.options).map_err(|e| format!("first open: {e}"))?.0;
    let mut run = Run {
        env,
        geometry,
        shape,
        store,
        base: vec![NOTHING; shape.objects as usize],
        ops: Vec::new(),
        acked: 0,
        counter: 0,
        reads: BTreeMap::new(),
        nospace: 0,
    };
    let mut total = 0;
    for cut in 0..shape.cuts {
        for step in 0..shape.steps {
            run.step().map_err(|e| format!("seed {seed} cut {cut} step {step}: {e}"))?;
        }
        total += run.acked as u64;
        let orderly = shape.closes && run.env.below(3) == 0;
        let end = if orderly { run.close() } else { run.cut() };
        end.map_err(|e| format!("seed {seed} cut {cut}: {e}"))?;
    }
    Ok(total)
}

impl Run {
    fn step(&mut self) -> Result<(), String> {
        match self.env.below(10) {
            0..=4 => self.mutate()?,
            5 => self.read()?,
            _ => {
                if let Some((token, result, op)) = self.env.complete() {
                    self.store.on_event(&mut self.env, token, result, op);
                }
            }
        }
        if self.env.below(self.shape.flush_one_in) == 0 {
            self.store.flush(&mut self.env);
        }
        self.drain()
    }

    fn drain(&mut self) -> Result<(), String> {
        while let Some(event) = self.store.poll() {
            match event {
                StoreEvent::Done { ticket, result: Ok(()) } => {
                    let expected = self.ops.get(self.acked).map(|o| o.2.counter);
                    if expected != Some(ticket) {
                        return Err(format!("acknowledged {ticket}, expected {expected:?}"));
                    }
                    self.acked += 1;
                }
                StoreEvent::Read { ticket, result } => {
                    let (object, first, blocks, seen) = self.reads.remove(&ticket).ok_or("unknown read")?;
                    let read = result.map_err(|e| format!("read of {object}: {e}"))?;
                    if !read.crcs.matches(read.data.as_slice()) {
                        return Err("a read's checksums do not match".into());
                    }
                    let found: Vec<u64> = read
                        .data
                        .as_slice()
                        .chunks(B)
                        .map(|b| u64::from_le_bytes(b[..8].try_into().unwrap()))
                        .collect();
                    self.check_read(object, first, blocks, seen, &found)?;
                }
                StoreEvent::Closed(Ok(())) => {}
                other => return Err(format!("unexpected {other:?}")),
            }
        }
        Ok(())
    }

    /// Every block must be as it was at some moment between submission and completion of the read.
    fn check_read(
        &self,
        o: usize,
        first: u32,
        blocks: u32,
        seen: usize,
        found: &[u64],
    ) -> Result<(), String> {
        let mut now = self.base[o].clone();
        let mut possible: Vec<Vec<u64>> = Vec::new();
        for (i, (object, op, version)) in self.ops.iter().enumerate() {
            if i == seen {
                possible = (first..first + blocks).map(|b| vec![now.blocks[b as usize]]).collect();
            }
            if *object == o {
                apply(&mut now, op, *version);
                if i >= seen {
                    for (p, b) in possible.iter_mut().zip(first..) {
                        p.push(now.blocks[b as usize]);
                    }
                }
            }
        }
        if possible.is_empty() {
            possible = (first..first + blocks).map(|b| vec![now.blocks[b as usize]]).collect();
        }
        for (i, (value, possible)) in found.iter().zip(&possible).enumerate() {
            if !possible.contains(value) {
                return Err(format!(
                    "block {} of object {o} reads {value}, not one of {possible:?}",
                    first + i as u32
                ));
            }
        }
        Ok(())
    }

    fn mutate(&mut self) -> Result<(), String> {
        let o = self.env.below(self.shape.objects) as usize;
        let id = object(o as u64 % 3, o as u64);
        self.counter += 1;
        let at = version(self.counter);
        let first = self.env.below(32) as u32;
        let len = if self.env.below(4) == 0 { 1 + self.env.below(u64::from(32 - first)) as u32 } else { 1 };
        let (kind, presence) = (self.env.below(20), self.store.lookup(id));
        let values = |n: u32| -> Vec<u64> { (0..n).map(|i| self.counter * 64 + u64::from(i) + 1).collect() };
        let op = match kind {
            0 => Op::Delete,
            1 | 2 if matches!(presence, Presence::Tombstone(_)) => Op::Purge,
            3 => Op::Zero { first, blocks: len },
            4 => {
                let mask = self.env.random() as u32;
                let n = mask.count_ones();
                Op::Replace { mask, values: (0..n).map(|i| self.counter * 64 + u64::from(i) + 1).collect() }
            }
            _ => Op::Write { first, values: values(len) },
        };
        let (env, store, ticket) = (&mut self.env, &mut self.store, self.counter);
        let result = match &op {
            Op::Write { first, values } => {
                let (buf, crcs) = data(env, values);
                store.write(env, ticket, id, at, *first, &[buf], &crcs)
            }
            Op::Replace { mask, values } if values.is_empty() => {
                store.replace(env, ticket, id, at, *mask, &[], &BlockCrcs::default())
            }
            Op::Replace { mask, values } => {
                let (buf, crcs) = data(env, values);
                store.replace(env, ticket, id, at, *mask, &[buf], &crcs)
            }
            Op::Zero { first, blocks } => store.zero(env, ticket, id, at, *first, *blocks),
            Op::Delete => store.delete(env, ticket, id, at),
            Op::Purge => store.purge(env, ticket, id, presence.version().unwrap()),
        };
        match result {
            Ok(()) => self.ops.push((o, op, at)),
            Err(StoreError::Busy) => {}
            Err(StoreError::NoSpace) => self.nospace += 1,
            Err(error) => return Err(format!("{op:?}: {error}")),
        }
        Ok(())
    }

    fn read(&mut self) -> Result<(), String> {
        let o = self.env.below(self.shape.objects) as usize;
        let first = self.env.below(32) as u32;
        let blocks = 1 + self.env.below(u64::from(32 - first)) as u32;
        self.counter += 1;
        let id = object(o as u64 % 3, o as u64);
        match self.store.read(self.counter, id, first, blocks) {
            Ok(()) => {
                self.reads.insert(self.counter, (o, first, blocks, self.ops.len()));
                Ok(())
            }
            Err(StoreError::Busy) => Ok(()),
            Err(error) => Err(format!("read: {error}")),
        }
    }

    fn cut(&mut self) -> Result<(), String> {
        self.env.power_cut();
        // Sometimes the power fails again while the slice opens.
        for _ in 0..self.env.below(3) {
            let n = self.env.below(12);
            let (g, o) = (self.geometry, self.shape.options);
            let mut store = SliceStore::open(&mut self.env, DiskIndex(0), g, o, TOKENS);
            for _ in 0..n {
                store.flush(&mut self.env);
                let Some((token, result, op)) = self.env.complete() else { break };
                store.on_event(&mut self.env, token, result, op);
            }
            self.env.power_cut();
        }
        self.reopen(false)
    }

    fn close(&mut self) -> Result<(), String> {
        self.store.close(&mut self.env);
        for event in settle(&mut self.env, &mut self.store) {
            match event {
                StoreEvent::Done { result: Ok(()), .. } => self.acked += 1,
                StoreEvent::Read { result: Ok(_), .. } | StoreEvent::Closed(Ok(())) => {}
                other => return Err(format!("while closing: {other:?}")),
            }
        }
        if self.acked != self.ops.len() {
            return Err(format!("closed with {} of {} acknowledged", self.acked, self.ops.len()));
        }
        let before = self.store.stats();
        self.reopen(true)?;
        let after = self.store.stats();
        let (a, b) = ((before.used_bytes, before.data_blocks), (after.used_bytes, after.data_blocks));
        if a != b {
            return Err(format!("space before closing {a:?}, after opening {b:?}: leaked"));
        }
        Ok(())
    }

    /// Opens again; the contents must be those after some prefix of what was submitted, with everything
    /// acknowledged in it.
    fn reopen(&mut self, orderly: bool) -> Result<(), String> {
        let (store, report) = try_open(&mut self.env, self.geometry, self.shape.options)
            .map_err(|e| format!("does not open: {e}"))?;
        if orderly && report.commits != 0 {
            return Err("commits to replay after an orderly close".into());
        }
        self.store = store;
        let checked = check_disk(&self.env);
        let stats = self.store.stats();
        let found = checked.slices.first().copied().unwrap_or_default();
        if checked.severity() > Some(Severity::Note) {
            return Err(format!("the check finds {:?}", checked.findings));
        }
        // The store holds one block more: the place of the next commit is free to it, used to the check.
        if (found.objects, found.data_blocks) != (stats.objects, stats.data_blocks)
            || (found.used_blocks - 1) * B as u64 != stats.used_bytes
        {
            return Err(format!("the check counts {found:?}, the store {stats:?}"));
        }
        let mut now = self.base.clone();
        for (o, op, at) in self.ops.iter().take(self.acked) {
            apply(&mut now[*o], op, *at);
        }
        let mut k = self.acked;
        while !self.matches(&now) {
            let Some((o, op, at)) = self.ops.get(k) else {
                return Err(format!(
                    "contents are no prefix of what was submitted ({} acknowledged of {}): {}",
                    self.acked,
                    self.ops.len(),
                    self.difference()
                ));
            };
            apply(&mut now[*o], op, *at);
            k += 1;
        }
        for (o, expected) in now.iter().enumerate() {
            let id = object(o as u64 % 3, o as u64);
            let found = read_now(&mut self.env, &mut self.store, id, 0, 32)
                .map_err(|e| format!("object {o} after opening: {e}"))?;
            if found != expected.blocks {
                return Err(format!("object {o} reads {found:?}, expected {:?}", expected.blocks));
            }
        }
        self.base = now;
        self.ops.clear();
        self.reads.clear();
        self.acked = 0;
        Ok(())
    }

    fn matches(&self, now: &[Object]) -> bool {
        now.iter().enumerate().all(|(o, object_now)| {
            let id = object(o as u64 % 3, o as u64);
            self.store.lookup(id) == object_now.presence && self.store.written_mask(id) == object_now.mask()
        })
    }

    fn difference(&self) -> String {
        let mut now = self.base.clone();
        for (o, op, at) in self.ops.iter().take(self.acked) {
            apply(&mut now[*o], op, *at);
        }
        let mut out = String::new();
        for (o, expected) in now.iter().enumerate() {
            let id = object(o as u64 % 3, o as u64);
            let found = self.store.lookup(id);
            if found != expected.presence || self.store.written_mask(id) != expected.mask() {
                out += &format!("object {o} is {found:?}, acknowledged {:?}; ", expected.presence);
            }
        }
        out
    }
}
