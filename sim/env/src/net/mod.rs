//! The simulated network: hosts, directed links, listeners; `conn` has the connections.
//!
//! It behaves as TCP does, seen from above. Bytes of a connection arrive in order and once, or the
//! connection ends; loss shows as delay, stall or reset, and duplication never shows (the kernel removes
//! it). Between connections nothing is ordered: what an old connection still had under way may arrive
//! after a new connection's first frames, and before the old one's `Closed`. A link that is blocked holds
//! what is sent; a timeout of unacknowledged bytes ends a connection on the sender's side only, so the
//! other side stays half-open until it sends or its keep-alive asks (`keepalive`); a rebooted host answers old
//! connections with a reset. A part of the connections goes on over RDMA (`rdma`).

mod conn;
mod keepalive;
mod rdma;

use conn::Conn;
pub(crate) use conn::NetAction;

use crate::clock::{MS, Nanos, SEC, US};
use crate::rng::Stream;
use crate::universe::{CoreIdx, HostId, Universe};
use reactor::{CloseReason, ConnId, Framing, NetError, SEND_QUEUE_FRAMES, Token};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// How the network is, and how often it misbehaves by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetOptions {
    /// Mean one-way delay between hosts.
    pub latency_ns: Nanos,
    /// Transmission time per KiB.
    pub kib_ns: Nanos,
    /// Frames in one direction of a connection before `Full`.
    pub send_queue_frames: usize,
    /// Unacknowledged bytes before the sender stalls.
    pub window_bytes: usize,
    /// Unacknowledged bytes end a connection after this long.
    pub user_timeout_ns: Nanos,
    /// Longest wait from a link's healing to the next retransmission.
    pub retransmit_ns: Nanos,
    /// Chance per frame that its connection is reset, parts per million.
    pub reset_ppm: u32,
    /// Chance per frame that it is lost and retransmitted, parts per million.
    pub loss_ppm: u32,
    /// Chance per frame with a payload that a bit of the payload flips unnoticed, parts per million.
    pub corrupt_ppm: u32,
    /// Connections that switch to RDMA, parts per million.
    pub rdma_ppm: u32,
    /// Chance each time that credits come back over RDMA that the receiver keeps them for a while, parts per million.
    pub credits_kept_ppm: u32,
    /// For how long, at most.
    pub credits_kept_ns: Nanos,
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            latency_ns: 30 * US,
            kib_ns: 800,
            send_queue_frames: SEND_QUEUE_FRAMES,
            window_bytes: 256 * 1024,
            user_timeout_ns: 5 * SEC,
            retransmit_ns: 200 * MS,
            reset_ppm: 0,
            loss_ppm: 0,
            corrupt_ppm: 0,
            rdma_ppm: 0,
            credits_kept_ppm: 0,
            credits_kept_ns: 0,
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Link {
    blocked: bool,
    clogged_until: Nanos,
}

#[derive(Clone, Copy)]
struct Listener {
    core: CoreIdx,
    token: Token,
    framing: Framing,
}

/// Counters, for the run's summary.
#[derive(Clone, Copy, Default, Debug)]
pub struct NetCounters {
    /// Frames delivered.
    pub frames: u64,
    /// Connections reset by injection.
    pub resets: u64,
    /// Payloads damaged by injection.
    pub corrupted: u64,
    /// Frames lost by injection, and retransmitted.
    pub lost: u64,
    /// Connections opened.
    pub connections: u64,
    /// Connections that have switched to RDMA.
    pub switches: u64,
    /// Payloads fetched from their senders' memory.
    pub fetches: u64,
    /// Queue pairs that broke, by injection or by themselves.
    pub breaks: u64,
    /// Of these, those whose peer took or gave nothing for too long.
    pub stalls: u64,
    /// Times that a sender stood still because it had no credits.
    pub without_credits: u64,
}

/// The network's state. Its behaviour is in `Universe`, which it shares with the cores.
pub struct SimNet {
    /// Its options.
    pub options: NetOptions,
    links: Vec<Vec<Link>>,
    listeners: BTreeMap<SocketAddr, Listener>,
    conns: BTreeMap<usize, Box<Conn>>,
    next_conn: usize,
    rng: Stream,
    /// What RDMA draws: where there is none, the other stream goes on as if this did not exist.
    rdma_rng: Stream,
    /// What happened so far.
    pub counters: NetCounters,
}

/// Delay within a host.
const LOOPBACK_NS: Nanos = 4 * US;
/// Longest extra wait of a lost segment before its retransmission.
const LOSS_DELAY_NS: Nanos = 250 * MS;
/// The errno of a listen address that is not this host's.
const EADDRNOTAVAIL: i32 = 99;

impl SimNet {
    pub(crate) fn new(rng: Stream, rdma_rng: Stream) -> Self {
        Self {
            options: NetOptions::default(),
            links: Vec::new(),
            listeners: BTreeMap::new(),
            conns: BTreeMap::new(),
            next_conn: 0,
            rng,
            rdma_rng,
            counters: NetCounters::default(),
        }
    }

    pub(crate) fn add_host(&mut self) {
        for row in &mut self.links {
            row.push(Link::default());
        }
        self.links.push(vec![Link::default(); self.links.len() + 1]);
    }

    fn link(&self, from: HostId, to: HostId) -> Link {
        self.links.get(from).and_then(|row| row.get(to)).copied().unwrap_or_default()
    }

    fn blocked(&self, from: HostId, to: HostId) -> bool {
        from != to && self.link(from, to).blocked
    }

    fn delay(&mut self, from: HostId, to: HostId) -> Nanos {
        if from == to {
            return self.rng.latency(LOOPBACK_NS);
        }
        let mut lost = 0;
        if self.rng.chance(self.options.loss_ppm) {
            self.counters.lost += 1;
            lost = self.rng.below(LOSS_DELAY_NS);
        }
        self.rng.latency(self.options.latency_ns) + lost
    }
}

impl Universe {
    /// Blocks or frees the way from one host to another (one direction).
    pub fn set_blocked(&mut self, from: HostId, to: HostId, blocked: bool) {
        if let Some(link) = self.net.links.get_mut(from).and_then(|row| row.get_mut(to)) {
            link.blocked = blocked;
        }
        if !blocked {
            self.net_kick_host(from);
            self.net_kick_host(to);
        }
    }

    /// Holds everything from one host to another until a time.
    pub fn clog(&mut self, from: HostId, to: HostId, until: Nanos) {
        if let Some(link) = self.net.links.get_mut(from).and_then(|row| row.get_mut(to)) {
            link.clogged_until = until;
        }
    }

    /// What waits in the network, for a report: per direction of a connection, frames and bytes of senders'
    /// memory.
    pub fn network_backlog(&self) -> Vec<String> {
        self.net.conns.iter().flat_map(|(index, conn)| conn.backlog(*index)).collect()
    }

    /// Frees every link.
    pub fn heal_network(&mut self) {
        for link in self.net.links.iter_mut().flatten() {
            *link = Link::default();
        }
        for host in 0..self.hosts.len() {
            self.net_kick_host(host);
        }
    }

    /// Resets a random connection. False when there is none.
    pub fn reset_random_connection(&mut self) -> bool {
        let ids: Vec<usize> = self.net.conns.keys().copied().collect();
        let Some(&conn) = self.net.rng.pick(&ids) else { return false };
        self.net_reset(conn);
        true
    }

    pub(crate) fn net_listen(
        &mut self,
        core: CoreIdx,
        at: SocketAddr,
        framing: Framing,
        token: Token,
    ) -> Result<SocketAddr, NetError> {
        let host_id = self.cores.get(core).map_or(usize::MAX, |core| core.host);
        let Some(host) = self.hosts.get_mut(host_id) else { return Err(NetError::Os(EADDRNOTAVAIL)) };
        if !at.ip().is_unspecified() && at.ip() != host.ip {
            return Err(NetError::Os(EADDRNOTAVAIL));
        }
        let mut bound = SocketAddr::from((host.ip, at.port()));
        while bound.port() == 0 || (at.port() == 0 && self.net.listeners.contains_key(&bound)) {
            bound.set_port(host.next_port);
            host.next_port = host.next_port.wrapping_add(1).max(1024);
        }
        if self.net.listeners.contains_key(&bound) {
            return Err(NetError::InUse);
        }
        self.net.listeners.insert(bound, Listener { core, token, framing });
        Ok(bound)
    }

    pub(crate) fn net_connect(&mut self, core: CoreIdx, to: SocketAddr, framing: Framing) -> ConnId {
        let (host, depart) = self.cores.get(core).map_or((0, 0), |core| (core.host, core.depart));
        let target = self.hosts.iter().position(|host| to.ip() == host.ip);
        let index = self.net.next_conn;
        self.net.next_conn += 1;
        self.net.counters.connections += 1;
        self.net.conns.insert(index, Box::new(Conn::new(core, host, framing, to)));
        self.at(
            depart + reactor::CONNECT_TIMEOUT_MS * MS,
            Action::Net(NetAction::SynTimeout { conn: index }),
        );
        if let Some(target) = target
            && !self.net.blocked(host, target)
        {
            let arrives =
                (depart + self.net.delay(host, target)).max(self.net.link(host, target).clogged_until);
            self.at(arrives, Action::Net(NetAction::Syn { conn: index, target }));
        }
        conn::id_of(index, 0)
    }

    /// Retransmits whatever waits on a connection of this host.
    pub(crate) fn net_kick_host(&mut self, host: HostId) {
        let stalled: Vec<(usize, usize)> = self
            .net
            .conns
            .iter()
            .flat_map(|(&index, conn)| (0..2).map(move |dir| (index, dir, conn.is_stalled(dir, host))))
            .filter(|(_, _, stalled)| *stalled)
            .map(|(index, dir, _)| (index, dir))
            .collect();
        for (conn, dir) in stalled {
            let wait = self.net.rng.below(self.net.options.retransmit_ns);
            self.net_schedule(conn, dir, self.now + wait);
        }
    }

    /// The processes of these cores are gone; their kernel closes what they had open.
    pub(crate) fn net_process_died(&mut self, cores: &[CoreIdx]) {
        self.net_forget_listeners(cores);
        for (conn, end) in self.net_ends_of(cores) {
            self.net_abandon(conn, end);
        }
    }

    /// The machine of these cores is gone, and nobody closes anything.
    pub(crate) fn net_power_lost(&mut self, cores: &[CoreIdx]) {
        self.net_forget_listeners(cores);
        for (conn, end) in self.net_ends_of(cores) {
            self.net_vanish(conn, end);
        }
    }

    fn net_forget_listeners(&mut self, cores: &[CoreIdx]) {
        self.net.listeners.retain(|_, listener| !cores.contains(&listener.core));
        // Half of the restarted processes get the ports of the old one again: a peer that still uses an
        // old address may talk to the wrong core, as it may in production.
        let hosts: Vec<HostId> =
            cores.iter().filter_map(|&core| self.cores.get(core).map(|c| c.host)).collect();
        for host in hosts {
            if self.net.rng.coin()
                && let Some(host) = self.hosts.get_mut(host)
            {
                host.next_port = 1024;
            }
        }
    }

    fn net_ends_of(&self, cores: &[CoreIdx]) -> Vec<(usize, usize)> {
        let mut ends = Vec::new();
        for (&index, conn) in &self.net.conns {
            for end in 0..2 {
                if conn.core_of(end).is_some_and(|core| cores.contains(&core)) {
                    ends.push((index, end));
                }
            }
        }
        ends
    }

    pub(crate) fn net_close(&mut self, conn: ConnId, after_flush: bool) {
        let (index, end) = conn::split(conn);
        self.net_close_end(index, end, after_flush);
    }
}

use crate::universe::Action;

/// A connection broke: reset by the peer's kernel.
const BROKEN_RESET: CloseReason = CloseReason::Broken(104);
/// A queue pair broke: a work request completed with an error, and whether it was done is unknown.
const BROKEN_PAIR: CloseReason = CloseReason::Broken(5);
/// A connection broke: bytes stayed unacknowledged for too long.
const BROKEN_TIMEOUT: CloseReason = CloseReason::Broken(110);
