//! Which connections of frames a core has, and over what each goes: for people, who ask seldom.
//!
//! The transports change a row when a connection opens, changes over or ends, never for an operation: so a lock does
//! no harm, and the table is as bounded as the transports' connections are.

use crate::env::ConnId;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a connection goes over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkState {
    /// TCP.
    Tcp,
    /// TCP still; the two sides find out whether RDMA works between them.
    Negotiating,
    /// RDMA.
    Rdma,
}

impl LinkState {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Negotiating => "negotiating",
            Self::Rdma => "rdma",
        }
    }

    /// What carries the frames that we send now.
    pub fn transport(self) -> &'static str {
        if self == Self::Rdma { "rdma" } else { "tcp" }
    }
}

/// A connection that is established.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// The other side: where we connected to, or where it connected from.
    pub peer: SocketAddr,
    /// Made by us, not by the peer.
    pub outgoing: bool,
    /// What it goes over.
    pub state: LinkState,
    /// How long RDMA's probe took, there and back, in microseconds; known to the side that sent it. As the loop's clock
    /// shows it, which is read once for a batch of events: no more than a hint on a busy core.
    pub round_trip_us: Option<u64>,
    /// How often RDMA was tried in vain or broke: on this connection, and where we made it, on those to the same address
    /// before.
    pub failures: u32,
    /// Why it did so last.
    pub last_failure: Option<Arc<str>>,
}

/// Addresses whose failures are remembered: more than a cluster has cores. Beyond, all are forgotten.
const REMEMBERED_MAX: usize = 65_536;

#[derive(Default, Debug)]
struct Rows {
    links: BTreeMap<ConnId, Link>,
    /// Of addresses that we connect to: a connection that breaks is followed by another one, whose row would otherwise
    /// not say why it is on TCP.
    failures: BTreeMap<SocketAddr, (u32, Arc<str>)>,
}

impl Rows {
    fn failed(&mut self, conn: ConnId, why: &str) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        link.state = LinkState::Tcp;
        link.failures = link.failures.saturating_add(1);
        let why = Arc::<str>::from(why);
        link.last_failure = Some(why.clone());
        if link.outgoing {
            if self.failures.len() >= REMEMBERED_MAX {
                self.failures.clear();
            }
            self.failures.insert(link.peer, (link.failures, why));
        }
    }
}

/// A core's connections. Written by the core alone, readable from anywhere.
#[derive(Default, Debug)]
pub struct LinkTable(Mutex<Rows>);

impl LinkTable {
    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, conn: ConnId, change: impl FnOnce(&mut Link)) {
        if let Some(link) = self.rows().links.get_mut(&conn) {
            change(link);
        }
    }

    /// A connection is established, over TCP as every one is at first.
    pub fn opened(&self, conn: ConnId, peer: SocketAddr, outgoing: bool) {
        let mut rows = self.rows();
        let before = rows.failures.get(&peer).filter(|_| outgoing).cloned();
        let (failures, last_failure) = before.map_or((0, None), |(count, why)| (count, Some(why)));
        let state = LinkState::Tcp;
        rows.links.insert(conn, Link { peer, outgoing, state, round_trip_us: None, failures, last_failure });
    }

    /// One side has offered RDMA.
    pub fn negotiating(&self, conn: ConnId) {
        self.change(conn, |link| link.state = LinkState::Negotiating);
    }

    /// From now on we send over RDMA.
    pub fn switched(&self, conn: ConnId, round_trip_us: Option<u64>) {
        self.change(conn, |link| (link.state, link.round_trip_us) = (LinkState::Rdma, round_trip_us));
    }

    /// The peer does not want RDMA: no error.
    pub fn declined(&self, conn: ConnId) {
        self.change(conn, |link| link.state = LinkState::Tcp);
    }

    /// RDMA does not work there: the connection stays on TCP.
    pub fn gave_up(&self, conn: ConnId, why: &str) {
        self.rows().failed(conn, why);
    }

    /// RDMA broke: the connection ends, and the next one to the same address begins on TCP.
    pub fn broke(&self, conn: ConnId, why: &str) {
        self.rows().failed(conn, why);
    }

    /// The connection is no more.
    pub fn closed(&self, conn: ConnId) {
        self.rows().links.remove(&conn);
    }

    /// The connections as they are now, oldest slot first.
    pub fn list(&self) -> Vec<Link> {
        self.rows().links.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], 7700))
    }

    #[test]
    fn a_connection_goes_from_tcp_to_rdma_and_away() {
        let (table, conn) = (LinkTable::default(), ConnId(5));
        let tcp = Link {
            peer: peer(),
            outgoing: true,
            state: LinkState::Tcp,
            round_trip_us: None,
            failures: 0,
            last_failure: None,
        };
        table.opened(conn, peer(), true);
        assert_eq!(table.list().first(), Some(&tcp));
        table.negotiating(conn);
        assert_eq!(table.list(), [Link { state: LinkState::Negotiating, ..tcp.clone() }]);
        table.switched(conn, Some(12));
        let rdma = Link { state: LinkState::Rdma, round_trip_us: Some(12), ..tcp };
        assert_eq!(table.list().first(), Some(&rdma));
        assert_eq!((rdma.state.transport(), LinkState::Negotiating.transport()), ("rdma", "tcp"));
        table.closed(conn);
        assert_eq!(table.list(), []);
    }

    #[test]
    fn failures_are_counted_and_refusals_are_not() {
        let (table, conn) = (LinkTable::default(), ConnId(5));
        table.opened(conn, peer(), false);
        let after = |change: fn(&LinkTable, ConnId)| {
            table.negotiating(conn);
            change(&table, conn);
            table.list().first().map(|link| (link.state, link.failures))
        };
        assert_eq!(after(|table, conn| table.gave_up(conn, "one")), Some((LinkState::Tcp, 1)));
        assert_eq!(after(LinkTable::declined), Some((LinkState::Tcp, 1)));
        assert_eq!(after(|table, conn| table.gave_up(conn, "two")), Some((LinkState::Tcp, 2)));
    }

    #[test]
    fn the_next_connection_to_an_address_says_why_the_last_one_broke() {
        let table = LinkTable::default();
        let other = SocketAddr::from(([10, 0, 0, 2], 7700));
        table.opened(ConnId(1), peer(), true);
        table.switched(ConnId(1), None);
        table.broke(ConnId(1), "the port is down");
        table.closed(ConnId(1));
        for (conn, to, outgoing) in [(2, peer(), true), (3, peer(), false), (4, other, true)] {
            table.opened(ConnId(conn), to, outgoing);
        }
        let shown = table.list().into_iter().map(|link| (link.failures, link.last_failure));
        let shown: Vec<_> = shown.map(|(count, why)| (count, why.as_deref().map(str::to_owned))).collect();
        assert_eq!(shown, [(1, Some("the port is down".to_owned())), (0, None), (0, None)]);
        table.switched(ConnId(2), Some(3));
        assert_eq!(table.list().first().map(|link| (link.state, link.failures)), Some((LinkState::Rdma, 1)));
    }

    #[test]
    fn what_is_said_of_a_connection_that_is_gone_is_ignored() {
        let table = LinkTable::default();
        table.switched(ConnId(1), None);
        table.gave_up(ConnId(1), "no");
        table.closed(ConnId(1));
        assert_eq!(table.list(), []);
    }
}
