//! Tests of the loop's own disks on NVMe: through the block layer and with NVMe commands, interrupting and polled.

use super::Context;
use super::drive::Drive;
use super::system::{LIMIT, Mount};
use crate::error::{GuestError, demand};
use cli::deadline::{Deadline, Stopwatch};
use reactor::backend::{
    Access, CoreOptions, CoreStats, DiskFile, DiskOpenError, ForeignCore, NoTransport, PassthroughError,
    Polling, Transport,
};
use reactor::conformance::{Disks, Host, Kind, run};
use reactor::{DiskError, DiskIndex, DiskOp, Env, Event, IoBuf, Service, Token};
use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The four ways to a drive.
const WAYS: [(Access, Polling); 4] = [
    (Access::Block, Polling::Never),
    (Access::Block, Polling::Auto),
    (Access::Passthrough, Polling::Never),
    (Access::Passthrough, Polling::Auto),
];
const BLOCK: usize = wire::BLOCK_BYTES;
/// How long each figure is measured, and at which depths.
const MEASURED: Duration = Duration::from_secs(2);
const DEPTHS: [u64; 2] = [1, 32];
/// Pieces between one operation and the next. Odd, so that all pieces are used where their number is a power of two.
const STRIDE: u64 = 1021;
/// Bytes of an operation that is larger than any command.
const LARGE: usize = 3 << 20;

fn transport() -> Box<dyn Transport> {
    Box::new(NoTransport::default())
}

pub fn disks_pass_the_conformance_suite(_: &Context) -> Result<(), GuestError> {
    let drive = Drive::with_serial("loop")?;
    let paths: &'static [PathBuf] = Vec::leak(vec![drive.partition(1)?, drive.partition(2)?]);
    for (access, polling) in WAYS {
        for host in [Host::Launched, Host::Foreign] {
            let disks = Disks::Devices { paths, access, polling };
            let kind = Kind { host, disks, transport, address: IpAddr::V4(Ipv4Addr::LOCALHOST) };
            let ran = Cell::new(0);
            let failed = run(kind, |scenario| {
                let wanted = scenario.name.starts_with("disk");
                ran.set(ran.get() + usize::from(wanted));
                wanted
            });
            demand(failed.is_empty() && ran.get() > 0, || {
                format!("{host:?} {access:?} {polling:?}: {failed:#?}")
            })?;
        }
    }
    Ok(())
}

/// What takes no commands, and what is in use, is refused and not taken through the block layer instead.
pub fn commands_are_refused_where_they_cannot_be(_: &Context) -> Result<(), GuestError> {
    let open = |path: &Path| DiskFile::open_for(path, Access::Passthrough);
    let part = Drive::with_serial("loop")?.partition(3)?;
    let held = open(&part).map_err(said)?;
    let again = open(&part);
    demand(matches!(again, Err(DiskOpenError::InUse(_))), || format!("a disk in use: {again:?}"))?;
    drop(held);
    let mounted = {
        let _mount = Mount::fresh(&part, Path::new("/run/commands"))?;
        open(&part)
    };
    demand(matches!(mounted, Err(DiskOpenError::InUse(_))), || format!("a mounted disk: {mounted:?}"))?;
    let file = Path::new("/dev/shm/no-drive");
    std::fs::write(file, vec![0; 1 << 20]).map_err(GuestError::io("write a file"))?;
    let no_drive = open(file);
    let refused =
        matches!(no_drive, Err(DiskOpenError::NoPassthrough { error: PassthroughError::NotNvme, .. }));
    demand(refused, || format!("a file: {no_drive:?}"))
}

/// Keeps so many operations of a disk under way, each in a block of its own.
struct Load {
    write: bool,
    /// Bytes of each, and of the disk's part that is used.
    bytes: usize,
    span: u64,
    next: u64,
    done: u64,
    under_way: u64,
    failed: Option<DiskError>,
    /// Reads must bring what this says.
    expected: Option<fn(u64) -> u8>,
    wrong: Option<u64>,
}

impl Load {
    fn of(write: bool, bytes: usize, span: u64) -> Self {
        let expected = None;
        Self { write, bytes, span, next: 0, done: 0, under_way: 0, failed: None, expected, wrong: None }
    }

    /// Where an operation goes: never beside the one before, or the block layer would make one request of both.
    fn piece(&self, number: u64) -> u64 {
        number * STRIDE % (self.span / self.bytes as u64)
    }

    fn submit(&mut self, env: &mut dyn Env, mut buf: IoBuf) {
        let offset = self.piece(self.next) * self.bytes as u64;
        let number = self.next;
        self.next += 1;
        self.under_way += 1;
        let op = if self.write {
            if let (Some(expected), Some(bytes)) = (self.expected, buf.as_mut_slice()) {
                bytes.fill(expected(offset / self.bytes as u64));
            }
            DiskOp::Write { offset, bufs: vec![buf], durable: true }
        } else {
            DiskOp::Read { offset, buf }
        };
        if env.submit(DiskIndex(0), op, Token(number)).is_err() {
            self.failed = Some(DiskError::NoSpace);
        }
    }
}

impl Service for Load {
    fn start(&mut self, _: &mut dyn Env) {}

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        let Event::DiskDone { result, op, token, .. } = event else { return };
        self.done += 1;
        self.under_way -= 1;
        if let Err(error) = result {
            self.failed = Some(error);
            return;
        }
        let number = self.piece(token.0);
        let buf = match op {
            DiskOp::Read { buf, .. } => {
                let fits =
                    |expected: fn(u64) -> u8| buf.as_slice().iter().all(|byte| *byte == expected(number));
                if !self.expected.is_none_or(fits) {
                    self.wrong = Some(number);
                }
                Some(buf)
            }
            DiskOp::Write { mut bufs, .. } => bufs.pop(),
            _ => None,
        };
        if let Some(buf) = buf.filter(|_| self.limit_allows()) {
            self.submit(env, buf);
        }
    }

    fn flush(&mut self, _: &mut dyn Env) {}
}

impl Load {
    fn limit_allows(&self) -> bool {
        self.failed.is_none() && self.wrong.is_none()
    }
}

/// A core with one disk and a load on it.
struct Bench {
    core: ForeignCore<Load>,
    stats: Arc<CoreStats>,
}

impl Bench {
    fn start(path: &Path, way: (Access, Polling), load: Load, depth: u64) -> Result<Self, GuestError> {
        let stats = Arc::<CoreStats>::default();
        let options = CoreOptions {
            disks: vec![DiskFile::open_for(path, way.0).map_err(said)?],
            polling: way.1,
            registered_bytes_max: 16 << 20,
            stats: stats.clone(),
            ..CoreOptions::default()
        };
        let mut core = ForeignCore::new(options, transport(), load).map_err(said)?;
        core.with(|load, env| {
            for _ in 0..depth {
                let buf = env.alloc(load.bytes).map_err(said)?;
                load.submit(env, buf);
            }
            Ok::<(), GuestError>(())
        })?;
        Ok(Self { core, stats })
    }

    /// Turns until this holds.
    fn turn_until(&mut self, what: &str, mut holds: impl FnMut(&Load) -> bool) -> Result<(), GuestError> {
        let deadline = Deadline::after(LIMIT);
        while !holds(self.core.service()) {
            self.core.poll(Some(Duration::from_millis(20))).map_err(said)?;
            let load = self.core.service();
            demand(load.failed.is_none(), || format!("{what}: operation {}: {:?}", load.done, load.failed))?;
            demand(load.wrong.is_none(), || format!("{what}: block {:?} holds something else", load.wrong))?;
            if deadline.passed() {
                return Err(GuestError::TimedOut { what: what.into(), seconds: LIMIT.as_secs() });
            }
        }
        Ok(())
    }
}

fn said(error: impl std::fmt::Display) -> GuestError {
    GuestError::Demand(error.to_string())
}

/// Operations that no single command can do come back whole.
pub fn large_operations_are_made_of_several_commands(_: &Context) -> Result<(), GuestError> {
    fn pattern(piece: u64) -> u8 {
        piece as u8 + 1
    }
    let part = Drive::with_serial("loop")?.partition(3)?;
    for (writer, reader) in [(WAYS[2], WAYS[0]), (WAYS[0], WAYS[2]), (WAYS[3], WAYS[3])] {
        for (way, write) in [(writer, true), (reader, false)] {
            let load = Load { expected: Some(pattern), ..Load::of(write, LARGE, 4 * LARGE as u64) };
            let mut bench = Bench::start(&part, way, load, 2)?;
            bench.turn_until("large operations", |load| load.done >= 8)?;
        }
    }
    Ok(())
}

/// Not a test of speed: says what each way costs, in one boot, one after the other.
pub fn ways_to_a_drive_are_compared(context: &Context) -> Result<(), GuestError> {
    let part = Drive::with_serial("loop")?.partition(3)?;
    for write in [false, true] {
        for depth in DEPTHS {
            for way in WAYS {
                let mut bench = Bench::start(&part, way, Load::of(write, BLOCK, 32 << 20), depth)?;
                bench.turn_until("operations before measuring", |load| load.done >= 4 * depth)?;
                let watch = Stopwatch::start();
                let own =
                    || cli::procfs::cpu_time(std::process::id()).map_err(GuestError::io("read CPU time"));
                let (before, cpu) = (bench.core.service().done, own()?.total());
                let enters = bench.stats.enters.get();
                let deadline = Deadline::after(MEASURED);
                bench.turn_until("measured operations", |_| deadline.passed())?;
                let ops = (bench.core.service().done - before) as f64;
                let cpu = own()?.total().saturating_sub(cpu);
                let polled = bench.stats.polled_ops.get() > 0;
                demand(polled == (way.1 == Polling::Auto), || format!("{way:?} polled: {polled}"))?;
                let line = format!(
                    "figure {} depth {depth} {:?} {}: {:.0} IOPS, CPU {:.1} us and {:.2} system calls per operation",
                    if write { "write" } else { "read" },
                    way.0,
                    if polled { "polled" } else { "interrupting" },
                    ops / watch.elapsed().as_secs_f64(),
                    cpu.as_secs_f64() * 1e6 / ops,
                    (bench.stats.enters.get() - enters) as f64 / ops,
                );
                super::say(&context.share, &line)?;
            }
        }
    }
    Ok(())
}
