//! Equal replicas: opens copies of all slices beside the running cluster and compares what they hold.

use placement::{PgRecord, pg_of};
use reactor::{DiskIndex, Env, Event, Service, Token};
use simenv::clock::{NodeClock, SEC};
use simenv::disk::SimDisk;
use simenv::rng::Stream;
use simenv::universe::{CoreSpec, Step, Universe};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::rc::Rc;
use store::{
    ListCursor, ObjectData, Presence, SliceGeometry, SliceStore, StoreEvent, StoreOptions, TOKENS_MIN,
    TokenRange,
};
use wire::{CoreId, OBJECT_BLOCKS, ObjectId, PgId, PoolId, SliceId, Version, crc::ZERO_BLOCK_CRC};

/// What a slice holds of an object.
#[derive(Clone, PartialEq, Debug)]
pub struct Copy {
    /// Its stamp.
    pub version: Version,
    /// Checksums of its 32 blocks; an unwritten block has that of zeroes.
    pub crcs: Vec<u32>,
}

/// What a slice holds.
#[derive(Default, Debug)]
pub struct Contents {
    /// Objects that are not deleted.
    pub objects: BTreeMap<ObjectId, Copy>,
    /// Traces of deleted objects.
    pub tombstones: Vec<ObjectId>,
    /// What should not be.
    pub violations: Vec<String>,
    done: bool,
}

struct Reader {
    geometry: SliceGeometry,
    store: Option<SliceStore>,
    contents: Rc<RefCell<Contents>>,
    queue: Vec<ObjectId>,
    reading: Option<ObjectId>,
}

const TOKENS: TokenRange = TokenRange { first: 1, count: TOKENS_MIN };
/// Opening and reading a copy may take this long.
const PATIENCE_NS: u64 = 600 * SEC;

impl Reader {
    /// True when there was something.
    fn drain(&mut self) -> bool {
        let mut any = false;
        while let Some(event) = self.store.as_mut().and_then(SliceStore::poll) {
            any = true;
            match event {
                StoreEvent::Opened(Ok(_)) => self.list(),
                StoreEvent::Opened(Err(error)) => {
                    let mut contents = self.contents.borrow_mut();
                    contents.violations.push(format!("slice {} does not open: {error}", self.geometry.slice));
                    contents.done = true;
                }
                StoreEvent::Object { result, .. } => {
                    let object = self.reading.take().unwrap_or_default();
                    self.read(object, result.map_err(|error| error.to_string()));
                }
                _ => {}
            }
            self.next();
        }
        any
    }

    fn list(&mut self) {
        let Some(store) = &self.store else { return };
        let mut listed = Vec::new();
        let mut cursor = Some(ListCursor::default());
        while let Some(at) = cursor {
            cursor = store.list(at, 4096, |_| true, &mut listed);
        }
        let tombstones = listed.iter().filter(|entry| entry.tombstone).map(|entry| entry.object);
        self.contents.borrow_mut().tombstones.extend(tombstones);
        self.queue = listed.iter().filter(|entry| !entry.tombstone).map(|entry| entry.object).collect();
    }

    fn next(&mut self) {
        if self.reading.is_some() {
            return;
        }
        let Some(store) = self.store.as_mut().filter(|store| store.state().is_ok()) else { return };
        match self.queue.pop() {
            Some(object) => match store.read_object(1, object) {
                Ok(()) => self.reading = Some(object),
                Err(error) => {
                    let text = format!("slice {}: reading {object}: {error}", self.geometry.slice);
                    self.contents.borrow_mut().violations.push(text);
                }
            },
            None => self.contents.borrow_mut().done = true,
        }
    }

    fn read(&mut self, object: ObjectId, result: Result<ObjectData, String>) {
        let mut contents = self.contents.borrow_mut();
        let slice = self.geometry.slice;
        match result {
            Ok(data) => {
                let bytes = data.data.as_ref().map_or(&[][..], |data| data.as_slice());
                if !data.crcs.matches(bytes) {
                    contents.violations.push(format!("slice {slice}: {object} does not match its checksums"));
                }
                if let Presence::Live(version) = data.presence {
                    let mut given = data.crcs.as_slice().iter();
                    let crc_of = |block| match data.mask >> block & 1 {
                        1 => given.next().copied().unwrap_or(0),
                        _ => ZERO_BLOCK_CRC,
                    };
                    let crcs = (0..OBJECT_BLOCKS).map(crc_of).collect();
                    contents.objects.insert(object, Copy { version, crcs });
                }
            }
            Err(error) => {
                contents.violations.push(format!("slice {slice}: reading {object} failed: {error}"))
            }
        }
    }
}

impl Service for Reader {
    fn start(&mut self, env: &mut dyn Env) {
        self.store =
            Some(SliceStore::open(env, DiskIndex(0), self.geometry, StoreOptions::default(), TOKENS));
        env.set_timer(env.now(), Token(u64::MAX));
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        if let (Event::DiskDone { token, result, op, .. }, Some(store)) = (event, &mut self.store) {
            store.on_event(env, token, result, op);
        }
        self.drain();
    }

    fn flush(&mut self, env: &mut dyn Env) {
        while let Some(store) = &mut self.store {
            store.flush(env);
            if !self.drain() {
                break;
            }
        }
    }
}

/// Opens a copy of a slice and reads everything in it: of the disk as it is, or of what it would be without the
/// damage done to it.
pub fn contents_of(disk: &SimDisk, geometry: SliceGeometry, as_it_is: bool) -> Contents {
    let mut universe = Universe::new(1);
    universe.add_host(Ipv4Addr::LOCALHOST, NodeClock::default());
    let rng = Stream::new(1, "snapshot");
    universe.disks.push(if as_it_is { disk.twin(rng) } else { disk.snapshot(rng) });
    let contents = Rc::new(RefCell::new(Contents::default()));
    let service =
        Reader { geometry, store: None, contents: contents.clone(), queue: Vec::new(), reading: None };
    let spec = CoreSpec { id: CoreId(0), arena_bytes: 16 << 20, disks: vec![0], service: Box::new(service) };
    if universe.spawn(0, spec).is_ok() {
        while !contents.borrow().done && universe.now < PATIENCE_NS && universe.step() != Step::Empty {}
    }
    let mut contents = contents.take();
    if !contents.done {
        contents.violations.push(format!("slice {} was not read to its end", geometry.slice));
    }
    contents
}

/// What lies on slices that its PG does not name.
pub fn strays(
    slices: &BTreeMap<SliceId, Contents>,
    pgs: &[(PgId, PgRecord)],
    pg_count: impl Fn(PoolId) -> u32,
) -> Vec<String> {
    let records: BTreeMap<PgId, &PgRecord> = pgs.iter().map(|(pg, record)| (*pg, record)).collect();
    let is_stray = |slice: &SliceId, object: &ObjectId| {
        let record = records.get(&pg_of(*object, pg_count(object.pool)));
        record.is_some_and(|record| !record.target.contains(slice) && !record.acting.contains(slice))
    };
    slices
        .iter()
        .flat_map(|(slice, contents)| {
            let objects = contents.objects.keys().chain(&contents.tombstones);
            let strays = objects.filter(|object| is_stray(slice, object));
            strays.map(move |object| format!("{object} was left behind on slice {slice}"))
        })
        .collect()
}

/// Compares all members of each PG.
pub fn compare(
    slices: &BTreeMap<SliceId, Contents>,
    pgs: &[(PgId, PgRecord)],
    pg_count: impl Fn(PgId) -> u32,
) -> Vec<String> {
    let mut wrong: Vec<String> = slices.values().flat_map(|contents| contents.violations.clone()).collect();
    for (pg, record) in pgs {
        let count = pg_count(*pg);
        let of = |slice: &SliceId| -> BTreeMap<ObjectId, &Copy> {
            let all = slices.get(slice).into_iter().flat_map(|contents| contents.objects.iter());
            all.filter(|(object, _)| object.pool == pg.pool && pg_of(**object, count) == *pg)
                .map(|(object, copy)| (*object, copy))
                .collect()
        };
        let Some((first, others)) = record.acting.split_first() else { continue };
        let reference = of(first);
        for other in others {
            let held = of(other);
            for (object, copy) in &reference {
                match held.get(object) {
                    None => wrong.push(format!("PG {pg}: {object} is on slice {first} and not on {other}")),
                    Some(theirs) if theirs.version != copy.version => wrong.push(format!(
                        "PG {pg}: {object} is {} on slice {first} and {} on {other}",
                        copy.version, theirs.version
                    )),
                    Some(theirs) if theirs.crcs != copy.crcs => {
                        let differ: Vec<usize> = (0..OBJECT_BLOCKS)
                            .filter(|&block| theirs.crcs.get(block) != copy.crcs.get(block))
                            .collect();
                        wrong.push(format!(
                            "PG {pg}: {object} version {} differs between slices {first} and {other} in blocks {differ:?}",
                            copy.version
                        ));
                    }
                    Some(_) => {}
                }
            }
            for object in held.keys().filter(|object| !reference.contains_key(object)) {
                wrong.push(format!("PG {pg}: {object} is on slice {other} and not on {first}"));
            }
        }
    }
    wrong
}
