//! The production backend as a world under test: real threads, sockets, files and devices.

#![allow(clippy::expect_used, reason = "a test harness fails by panicking")]

use super::{CorePlan as Wanted, LIMIT_MS, Scenario, World, all};
use crate::backend::{
    Access, CoreOptions, CorePlan, Cpu, DiskFile, ForeignCore, OUTSIDE, Polling, Poster, Running, Transport,
    launch,
};
use crate::env::{Env, Event, Service};
use std::io::{Seek, SeekFrom, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Rings whenever a core has done something, for the test that waits until something holds.
#[derive(Default)]
struct Bell {
    rung: Mutex<u64>,
    ringing: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.ringing.notify_all();
    }

    fn rung(&self) -> u64 {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it rings again after `seen`; no longer than `wait`.
    fn wait_after(&self, seen: u64, wait: Duration) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.ringing.wait_timeout_while(rung, wait, |rung| *rung == seen));
    }
}

/// Ends when told to, and hides the message that wakes it from the service inside.
struct Stoppable {
    inner: Box<dyn Service>,
    stop: Arc<AtomicBool>,
    bell: Arc<Bell>,
}

impl Service for Stoppable {
    fn start(&mut self, env: &mut dyn Env) {
        self.inner.start(env);
        self.bell.ring();
    }
    fn event(&mut self, env: &mut dyn Env, event: Event) {
        if !matches!(event, Event::Mesh { from: OUTSIDE, .. }) {
            self.inner.event(env, event);
            self.bell.ring();
        }
    }
    fn flush(&mut self, env: &mut dyn Env) {
        if !self.finished() {
            self.inner.flush(env);
            self.bell.ring();
        }
    }
    fn finished(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Who turns the loops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    /// Threads made by `launch`.
    Launched,
    /// Threads of our own that poll `ForeignCore`s.
    Foreign,
}

/// What the disks are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disks {
    /// Files in a directory.
    Files(&'static str),
    /// Loop devices over files on tmpfs.
    Loop,
    /// Block devices: a scenario gets those that have the sizes it wants, and all that is on them is lost.
    Devices {
        /// Where they are.
        paths: &'static [PathBuf],
        /// How they are used.
        access: Access,
        /// Whether they are polled.
        polling: Polling,
    },
}

/// A loop device that is detached when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// `None` when this machine cannot make one; the reason goes to standard error.
    pub fn over(file: &Path) -> Option<Self> {
        let out = Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file).output();
        match out {
            Ok(out) if out.status.success() => {
                Some(Self(String::from_utf8_lossy(&out.stdout).trim().to_owned().into()))
            }
            Ok(out) => {
                eprintln!("no loop device: {}", String::from_utf8_lossy(&out.stderr));
                None
            }
            Err(error) => {
                eprintln!("no loop device: losetup: {error}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Which production backend.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Who turns the loops.
    pub host: Host,
    /// What the disks are.
    pub disks: Disks,
    /// Makes each core's transport, on the core's thread.
    pub transport: fn() -> Box<dyn Transport>,
    /// Where cores listen.
    pub address: IpAddr,
}

/// The production backend over one transport.
pub struct Real {
    kind: Kind,
    stop: Arc<AtomicBool>,
    bell: Arc<Bell>,
    nodes: Vec<Running>,
    threads: Vec<std::thread::JoinHandle<()>>,
    posters: Vec<Poster>,
    // Dropped last: cores still use them until joined.
    loops: Vec<LoopDevice>,
    dirs: Vec<tempfile::TempDir>,
    /// Devices that have been given away.
    used: Vec<PathBuf>,
}

impl Real {
    /// A world without cores.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            stop: Arc::default(),
            bell: Arc::default(),
            nodes: Vec::new(),
            threads: Vec::new(),
            posters: Vec::new(),
            loops: Vec::new(),
            dirs: Vec::new(),
            used: Vec::new(),
        }
    }

    /// An unused device of this size, full of zeroes.
    #[allow(clippy::disallowed_methods, reason = "before any loop runs")]
    fn device(&mut self, paths: &[PathBuf], access: Access, bytes: u64) -> Result<Arc<DiskFile>, String> {
        for path in paths.iter().filter(|path| !self.used.contains(path)) {
            let mut file = std::fs::OpenOptions::new().write(true).open(path).map_err(|e| e.to_string())?;
            if file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())? != bytes {
                continue;
            }
            file.rewind()
                .and_then(|()| file.write_all(&vec![0; bytes as usize]))
                .map_err(|e| e.to_string())?;
            file.sync_all().map_err(|e| e.to_string())?;
            drop(file);
            self.used.push(path.clone());
            return DiskFile::open_for(path, access).map_err(|e| e.to_string());
        }
        Err(format!("no device of {bytes} bytes"))
    }

    fn disk(&mut self, bytes: u64) -> Result<Arc<DiskFile>, String> {
        if let Disks::Devices { paths, access, .. } = self.kind.disks {
            return self.device(paths, access, bytes);
        }
        let base = if let Disks::Files(base) = self.kind.disks { base } else { "/dev/shm" };
        let dir = tempfile::tempdir_in(base).map_err(|e| e.to_string())?;
        let path = dir.path().join("disk");
        let file = std::fs::OpenOptions::new().create_new(true).write(true).open(&path);
        file.and_then(|file| file.set_len(bytes)).map_err(|e| e.to_string())?;
        self.dirs.push(dir);
        let path = if self.kind.disks == Disks::Loop {
            let device = LoopDevice::over(&path).ok_or("no loop device")?;
            let path = device.0.clone();
            self.loops.push(device);
            path
        } else {
            path
        };
        DiskFile::open(path).map_err(|e| e.to_string())
    }

    #[allow(clippy::disallowed_methods, reason = "drives the foreign host from threads of its own")]
    fn start_foreign(&mut self, wanted: Wanted) -> Result<(), String> {
        let options = self.options(&wanted)?;
        let (stop, bell, service) = (self.stop.clone(), self.bell.clone(), wanted.service);
        let transport = self.kind.transport;
        self.threads.push(std::thread::spawn(move || {
            let inner = Stoppable { inner: service(), stop: stop.clone(), bell };
            let mut core = ForeignCore::new(options, transport(), inner).expect("a core");
            while !stop.load(Ordering::Relaxed) {
                core.poll(Some(Duration::from_millis(5))).expect("a turn");
            }
        }));
        Ok(())
    }

    fn options(&mut self, wanted: &Wanted) -> Result<CoreOptions, String> {
        let disks = wanted.disks.iter().map(|bytes| self.disk(*bytes)).collect::<Result<_, _>>()?;
        let polling = match self.kind.disks {
            Disks::Devices { polling, .. } => polling,
            _ => Polling::Never,
        };
        Ok(CoreOptions { disks, polling, arena_bytes: wanted.arena_bytes, ..CoreOptions::default() })
    }
}

impl World for Real {
    fn start(&mut self, cores: Vec<Wanted>) -> Result<(), String> {
        let mut nodes: std::collections::BTreeMap<usize, Vec<CorePlan>> = Default::default();
        for wanted in cores {
            if self.kind.host == Host::Foreign {
                self.start_foreign(wanted)?;
                continue;
            }
            let options = self.options(&wanted)?;
            let (stop, bell, service) = (self.stop.clone(), self.bell.clone(), wanted.service);
            nodes.entry(wanted.node).or_default().push(CorePlan {
                core: wanted.core,
                cpu: Cpu::Floating,
                options,
                transport: Box::new(self.kind.transport),
                service: Box::new(move || Box::new(Stoppable { inner: service(), stop, bell })),
            });
        }
        for plans in nodes.into_values() {
            let ids: Vec<_> = plans.iter().map(|plan| plan.core).collect();
            let running = launch(plans).map_err(|e| e.to_string())?;
            self.posters.extend(ids.iter().filter_map(|id| running.poster(*id)));
            self.nodes.push(running);
        }
        Ok(())
    }

    fn listen_address(&self, _: usize) -> SocketAddr {
        SocketAddr::new(self.kind.address, 0)
    }

    #[allow(clippy::disallowed_methods, reason = "finds a port where nobody listens")]
    fn refusing_address(&self, _: usize) -> SocketAddr {
        let taken = std::net::TcpListener::bind(SocketAddr::new(self.kind.address, 0)).expect("a port");
        taken.local_addr().expect("its address")
    }

    #[allow(clippy::disallowed_methods, reason = "waits for a condition in real time")]
    fn run_until(&mut self, done: &mut dyn FnMut() -> bool) -> bool {
        let until = Instant::now() + Duration::from_millis(LIMIT_MS);
        loop {
            // Read before the condition is tested: what happens in between ends the wait at once.
            let seen = self.bell.rung();
            if done() {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.bell.wait_after(seen, left);
        }
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for poster in &self.posters {
            let _ = poster.post(Box::new(()));
        }
        for node in self.nodes.drain(..) {
            if let Err(error) = node.join() {
                eprintln!("a node ended badly: {error}");
            }
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Runs the wanted scenarios, each in a fresh world, and returns those that failed, with what was seen.
#[allow(clippy::disallowed_methods, reason = "tells how long each took")]
pub fn run(kind: Kind, wanted: impl Fn(&Scenario) -> bool) -> Vec<String> {
    let mut failed = Vec::new();
    for scenario in all().into_iter().filter(wanted) {
        let began = Instant::now();
        let mut world = Real::new(kind);
        let result = (scenario.run)(&mut world);
        drop(world);
        println!("{}: {result:?} in {:?}", scenario.name, began.elapsed());
        if let Err(why) = result {
            failed.push(format!("{}: {why}", scenario.name));
        }
    }
    failed
}
