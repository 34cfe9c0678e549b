//! Measures the loop on this machine: TCP ping-pong between two cores, and 4 KiB disk operations.
//!
//! `cargo run --release -p net-tcp --example loopback -- [idle] [pp1] [pingpong] [cross] [disk] [/dev/…]`;
//! without a word all run but the device (which is overwritten). Pin it with `taskset -c 1` for the one-core setting. CPU is user + system of this process, which
//! holds both ends.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use reactor::backend::{CoreOptions, CorePlan, CoreStats, Cpu, DiskFile, NoTransport, allowed_cpus, launch};
use reactor::*;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use wire::{BlockCrcs, CoreId, FrameKind, Header};

#[derive(Default)]
struct Shared {
    at: Mutex<Option<SocketAddr>>,
    stop: AtomicBool,
    p50_ns: AtomicU64,
    p99_ns: AtomicU64,
}

struct Server {
    shared: Arc<Shared>,
    payload: usize,
}

impl Service for Server {
    fn start(&mut self, env: &mut dyn Env) {
        let at = env.listen("127.0.0.1:0".parse().unwrap(), Framing::Frames, Token(0)).unwrap();
        *self.shared.at.lock().unwrap() = Some(at);
        env.set_timer(env.now().plus_ms(10), Token(1));
    }
    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Frame { conn, frame } => {
                let mut header = frame.header.reply(FrameKind::ReadReply, wire::Status::Ok);
                header.payload_len = self.payload as u32;
                let payload = (self.payload > 0).then(|| env.alloc(self.payload).unwrap());
                let mut crcs = BlockCrcs::default();
                for _ in 0..self.payload.div_ceil(4096) {
                    crcs.push(0);
                }
                env.send(conn, Frame { header, crcs, payload }).unwrap();
            }
            Event::Timer { token } => env.set_timer(env.now().plus_ms(10), token),
            _ => {}
        }
    }
    fn flush(&mut self, _: &mut dyn Env) {}
    fn finished(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }
}

struct Client {
    shared: Arc<Shared>,
    depth: usize,
    left: u64,
    sent: Vec<Mono>,
    lat: Vec<u32>,
    conn: ConnId,
}

impl Client {
    fn ask(&mut self, env: &mut dyn Env, slot: u64) {
        self.sent[slot as usize] = env.now();
        let frame =
            Frame { header: Header::new(FrameKind::Read, slot), crcs: BlockCrcs::default(), payload: None };
        env.send(self.conn, frame).unwrap();
    }
}

impl Service for Client {
    fn start(&mut self, env: &mut dyn Env) {
        env.set_timer(env.now().plus_ms(20), Token(0));
    }
    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { .. } => {
                let at = self.shared.at.lock().unwrap().unwrap();
                self.conn = env.connect(at, Framing::Frames);
            }
            Event::Connected { .. } => (0..self.depth as u64).for_each(|slot| self.ask(env, slot)),
            Event::Frame { frame, .. } => {
                let slot = frame.header.request;
                self.lat.push(env.now().since(self.sent[slot as usize]) as u32);
                self.left = self.left.saturating_sub(1);
                if self.left == 0 {
                    if !self.shared.stop.swap(true, Ordering::Relaxed) {
                        self.lat.sort_unstable();
                        let at = |p: usize| u64::from(self.lat[self.lat.len() * p / 100]);
                        self.shared.p50_ns.store(at(50), Ordering::Relaxed);
                        self.shared.p99_ns.store(at(99), Ordering::Relaxed);
                    }
                } else {
                    self.ask(env, slot);
                }
            }
            Event::Closed { reason, .. } => panic!("connection ended: {reason}"),
            _ => {}
        }
    }
    fn flush(&mut self, _: &mut dyn Env) {}
    fn finished(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }
}

/// The same round trip with two threads and blocking sockets: the yardstick of this very moment.
#[allow(clippy::disallowed_methods, reason = "the plain way, to compare with")]
fn plain(cpu: usize, bytes: usize, ops: u64) {
    use std::io::{Read, Write};
    let pin = move || {
        // SAFETY: cpu_set_t is plain data; the call reads it.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
        }
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let (cpu_before, wall) = (cpu_us(), std::time::Instant::now());
    let server = std::thread::spawn(move || {
        pin();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut buf = vec![0; bytes];
        while stream.read_exact(&mut buf).is_ok() {
            stream.write_all(&buf).unwrap();
        }
    });
    let client = std::thread::spawn(move || {
        pin();
        let mut stream = std::net::TcpStream::connect(at).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut buf = vec![0; bytes];
        for _ in 0..ops {
            stream.write_all(&buf).unwrap();
            stream.read_exact(&mut buf).unwrap();
        }
    });
    client.join().unwrap();
    server.join().unwrap();
    let us = wall.elapsed().as_secs_f64() * 1e6 / ops as f64;
    println!(
        "plain ping-pong of {bytes} bytes: {us:.1} us, {:.2} us CPU",
        (cpu_us() - cpu_before) / ops as f64
    );
}

/// An idle node of one data core and a control core: its memory.
#[allow(clippy::disallowed_methods, reason = "a benchmark of the real loop")]
fn idle(cpu: usize) {
    let shared = Arc::new(Shared::default());
    let plans = [CoreId(0), wire::CONTROL_CORE].map(|core| {
        let shared = shared.clone();
        CorePlan {
            core,
            cpu: Cpu::Pinned(cpu),
            options: CoreOptions::default(),
            transport: Box::new(net_tcp::TcpTransport::boxed),
            service: Box::new(move || Box::new(Server { shared, payload: 0 })),
        }
    });
    let before = cpu_us();
    let running = launch(plans.into()).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let rss = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or("");
    println!("idle node of two cores: {rss}, {:.2} % CPU", (cpu_us() - before) / 2e6 * 100.0);
    shared.stop.store(true, Ordering::Relaxed);
    running.join().unwrap();
}

/// Random 4 KiB operations on one disk at a fixed depth.
struct Grind {
    shared: Arc<Shared>,
    depth: u64,
    left: u64,
    write: bool,
    blocks: u64,
    spare: Vec<Vec<IoBuf>>,
}

impl Grind {
    fn go(&mut self, env: &mut dyn Env, op: Option<DiskOp>) {
        let offset = env.random() % self.blocks * 4096;
        let op = match op {
            Some(DiskOp::Write { bufs, .. }) => DiskOp::Write { offset, bufs, durable: false },
            Some(DiskOp::Read { buf, .. }) => DiskOp::Read { offset, buf },
            _ if self.write => DiskOp::Write {
                offset,
                bufs: self.spare.pop().unwrap_or_else(|| vec![env.alloc(4096).unwrap()]),
                durable: false,
            },
            _ => DiskOp::Read { offset, buf: env.alloc(4096).unwrap() },
        };
        env.submit(DiskIndex(0), op, Token(0)).map_err(|(e, _)| e).unwrap();
    }
}

impl Service for Grind {
    fn start(&mut self, env: &mut dyn Env) {
        self.blocks = env.disk_info(DiskIndex(0)).unwrap().size_bytes / 4096;
        for _ in 0..self.depth {
            self.go(env, None);
        }
    }
    fn event(&mut self, env: &mut dyn Env, event: Event) {
        if let Event::DiskDone { result, op, .. } = event {
            result.unwrap();
            self.left = self.left.saturating_sub(1);
            if self.left == 0 {
                self.shared.stop.store(true, Ordering::Relaxed);
            } else {
                self.go(env, Some(op));
            }
        }
    }
    fn flush(&mut self, _: &mut dyn Env) {}
    fn finished(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }
}

fn cpu_us() -> f64 {
    // SAFETY: rusage is plain data and valid to write to.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let us = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
    us(usage.ru_utime) + us(usage.ru_stime)
}

#[allow(clippy::disallowed_methods, reason = "a benchmark of the real loop")]
fn run(name: &str, ops: u64, shared: &Arc<Shared>, plans: Vec<CorePlan>) {
    let stats: Vec<(CoreId, Arc<CoreStats>)> =
        plans.iter().map(|plan| (plan.core, plan.options.stats.clone())).collect();
    let (cpu, wall) = (cpu_us(), std::time::Instant::now());
    launch(plans).unwrap().join().unwrap();
    let (cpu, wall) = (cpu_us() - cpu, wall.elapsed());
    println!(
        "{name}: {:.0} op/s, p50 {:.1} us, p99 {:.1} us, {:.2} us CPU per op",
        ops as f64 / wall.as_secs_f64(),
        shared.p50_ns.load(Ordering::Relaxed) as f64 / 1e3,
        shared.p99_ns.load(Ordering::Relaxed) as f64 / 1e3,
        cpu / ops as f64
    );
    for (core, stats) in stats {
        let per = |counter: &reactor::backend::Counter| counter.get() as f64 / ops as f64;
        println!(
            "  core {core}: enters/op {:.3}, turns/op {:.3}, parks/op {:.3}, spins {} ({} hits), lag max {} us",
            per(&stats.enters),
            per(&stats.iterations),
            per(&stats.parks),
            stats.spins.get(),
            stats.spin_hits.get(),
            stats.lag_max_ns.get() / 1000
        );
    }
}

fn pingpong(depth: usize, payload: usize, ops: u64, cpus: [usize; 2]) {
    let shared = Arc::new(Shared::default());
    let (one, two) = (shared.clone(), shared.clone());
    let plan = |core, service: Box<dyn FnOnce() -> Box<dyn Service> + Send>| CorePlan {
        core: CoreId(core),
        cpu: Cpu::Pinned(cpus[core as usize]),
        options: CoreOptions::default(),
        transport: Box::new(net_tcp::TcpTransport::boxed),
        service,
    };
    let plans = vec![
        plan(0, Box::new(move || Box::new(Server { shared: one, payload }))),
        plan(
            1,
            Box::new(move || {
                Box::new(Client {
                    shared: two,
                    depth,
                    left: ops,
                    sent: vec![Mono(0); depth],
                    lat: Vec::with_capacity(ops as usize + depth),
                    conn: ConnId(0),
                })
            }),
        ),
    ];
    run(&format!("ping-pong depth {depth}, payload {payload}, cpus {cpus:?}"), ops, &shared, plans);
}

fn disk(path: &str, depth: u64, write: bool, ops: u64, cpu: usize) {
    let options = CoreOptions { disks: vec![DiskFile::open(path).unwrap()], ..Default::default() };
    let shared = Arc::new(Shared::default());
    let one = shared.clone();
    let plan = CorePlan {
        core: CoreId(0),
        cpu: Cpu::Pinned(cpu),
        options,
        transport: Box::new(|| Box::<NoTransport>::default()),
        service: Box::new(move || {
            Box::new(Grind { shared: one, depth, left: ops, write, blocks: 0, spare: Vec::new() })
        }),
    };
    let what = if write { "write" } else { "read" };
    run(&format!("disk 4 KiB {what} depth {depth} on {path}"), ops, &shared, vec![plan]);
}

fn main() {
    let cpus = allowed_cpus();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    let args: Vec<String> = std::env::args().skip(1).collect();
    let wants = |what: &str| args.is_empty() || args.iter().any(|arg| arg == what);
    if wants("idle") {
        idle(first);
    }
    if wants("pp1") {
        plain(first, 4096, 200_000);
        pingpong(1, 4096, 300_000, [first, first]);
    }
    if wants("pingpong") {
        plain(first, 128, 200_000);
        plain(first, 4096, 200_000);
        for (depth, payload, ops) in
            [(1, 0, 200_000), (1, 4096, 200_000), (128, 4096, 500_000), (16, 128 << 10, 50_000)]
        {
            pingpong(depth, payload, ops, [first, first]);
        }
    }
    if wants("cross") {
        pingpong(1, 4096, 50_000, [first, last]);
        pingpong(128, 4096, 500_000, [first, last]);
    }
    if wants("disk") {
        let path = "/dev/shm/drystone-loopback.img";
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
        file.set_len(1 << 30).unwrap();
        for (depth, write) in [(128, true), (128, true), (128, false), (1, true), (1, false)] {
            let ops = if depth == 1 { 100_000 } else { 600_000 };
            disk(path, depth, write, ops, first);
        }
        std::fs::remove_file(path).unwrap();
    }
    if let Some(path) = args.iter().find(|arg| arg.starts_with("/dev/")) {
        disk(path, 128, true, 300_000, first);
        disk(path, 128, false, 300_000, first);
    }
}
