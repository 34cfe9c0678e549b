//! The fake cluster on real sockets: a thread per connection, one lock.

use crate::cluster::{FakeCluster, Packet};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use wire::{HEADER_BYTES, Header};

struct State {
    cluster: FakeCluster,
    streams: BTreeMap<u64, TcpStream>,
    next_conn: u64,
    threads: Vec<JoinHandle<()>>,
}

pub struct Server {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    listeners: Vec<(SocketAddr, JoinHandle<()>)>,
    pub control: Vec<SocketAddr>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Three nodes on free ports, with an image `disk` of this size.
    pub fn start(size_bytes: u64) -> Self {
        let listen = || TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let listeners: Vec<[TcpListener; 2]> = (0..3).map(|_| [listen(), listen()]).collect();
        let addr = |listener: &TcpListener| listener.local_addr().unwrap();
        let addrs: Vec<_> = listeners.iter().map(|[c, d]| (addr(c), addr(d))).collect();
        let state = Arc::new(Mutex::new(State {
            cluster: FakeCluster::new(&addrs, size_bytes),
            streams: BTreeMap::new(),
            next_conn: 0,
            threads: Vec::new(),
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let accept = |listener: TcpListener| {
            let (state, stop) = (state.clone(), stop.clone());
            let at = addr(&listener);
            (at, std::thread::spawn(move || accept_loop(&listener, &state, &stop)))
        };
        let listeners = listeners.into_iter().flatten().map(accept).collect();
        let control = addrs.iter().map(|(control, _)| *control).collect();
        Self { state, stop, listeners, control }
    }

    /// `HOST:PORT,…`.
    pub fn addresses(&self) -> String {
        self.control.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(",")
    }

    /// Changes the cluster; subscribers are told.
    pub fn with<R>(&self, change: impl FnOnce(&mut FakeCluster) -> R) -> R {
        let mut state = lock(&self.state);
        let result = change(&mut state.cluster);
        push(&mut state);
        result
    }

    /// Breaks every connection.
    pub fn cut_all(&self) {
        for stream in lock(&self.state).streams.values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.cut_all();
        for (addr, thread) in self.listeners.drain(..) {
            // Wakes the accept.
            let _ = TcpStream::connect(addr);
            let _ = thread.join();
        }
        self.cut_all();
        let threads = std::mem::take(&mut lock(&self.state).threads);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

fn accept_loop(listener: &TcpListener, state: &Arc<Mutex<State>>, stop: &AtomicBool) {
    let at = listener.local_addr().unwrap();
    while let Ok((stream, _)) = listener.accept() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let _ = stream.set_nodelay(true);
        let mut guard = lock(state);
        guard.next_conn += 1;
        let conn = guard.next_conn;
        guard.streams.insert(conn, stream.try_clone().unwrap());
        let state = state.clone();
        guard.threads.push(std::thread::spawn(move || serve(stream, at, conn, &state)));
    }
}

fn read_packet(stream: &mut TcpStream) -> Option<Packet> {
    let mut bytes = vec![0; HEADER_BYTES];
    stream.read_exact(&mut bytes).ok()?;
    let total = Header::peek(&bytes).expect("a frame").total();
    bytes.resize(total, 0);
    stream.read_exact(&mut bytes[HEADER_BYTES..]).ok()?;
    Some(Packet::decode(&bytes))
}

fn push(state: &mut State) {
    for (conn, packet) in std::mem::take(&mut state.cluster.pushed) {
        if let Some(stream) = state.streams.get_mut(&conn) {
            let _ = stream.write_all(&packet.encode());
        }
    }
}

fn serve(mut stream: TcpStream, at: SocketAddr, conn: u64, state: &Mutex<State>) {
    while let Some(packet) = read_packet(&mut stream) {
        let mut state = lock(state);
        for reply in state.cluster.answer(at, conn, &packet) {
            if let Some(stream) = state.streams.get_mut(&conn) {
                let _ = stream.write_all(&reply.encode());
            }
        }
        push(&mut state);
    }
    let mut state = lock(state);
    state.cluster.forget(conn);
    state.streams.remove(&conn);
}
