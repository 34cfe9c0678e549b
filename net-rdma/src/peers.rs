//! Addresses to which RDMA was tried in vain: they get TCP for a while.

use reactor::Mono;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// How long after the first failure RDMA is not tried, and at most after repeated ones, in milliseconds. A client that
/// has lost its link must go on within a second or two: it goes on over TCP and tries RDMA with a later connection.
const PAUSE_MIN_MS: u64 = 2_000;
const PAUSE_MAX_MS: u64 = 60_000;
/// How long a peer that declined is not asked again, in milliseconds.
const DECLINED_MS: u64 = 60_000;
/// Addresses remembered: more than a cluster has cores. Beyond, all are forgotten, and tried once more.
const PEERS_MAX: usize = 65_536;

struct Pause {
    until: Mono,
    ms: u64,
}

/// What a core has learnt about its peers.
#[derive(Default)]
pub(crate) struct Peers(BTreeMap<SocketAddr, Pause>);

impl Peers {
    /// Whether to try RDMA with this peer now.
    pub(crate) fn may_try(&self, peer: SocketAddr, now: Mono) -> bool {
        self.0.get(&peer).is_none_or(|pause| pause.until <= now)
    }

    /// It came to nothing or broke. Returns for how many milliseconds it is not tried again.
    pub(crate) fn failed(&mut self, peer: SocketAddr, now: Mono) -> u64 {
        let ms = self.0.get(&peer).map_or(PAUSE_MIN_MS, |pause| (pause.ms * 2).min(PAUSE_MAX_MS));
        self.pause(peer, now, ms);
        ms
    }

    /// The peer does not want it.
    pub(crate) fn declined(&mut self, peer: SocketAddr, now: Mono) {
        self.pause(peer, now, DECLINED_MS);
    }

    /// It works.
    pub(crate) fn works(&mut self, peer: SocketAddr) {
        self.0.remove(&peer);
    }

    fn pause(&mut self, peer: SocketAddr, now: Mono, ms: u64) {
        if self.0.len() >= PEERS_MAX {
            self.0.clear();
        }
        self.0.insert(peer, Pause { until: now.plus_ms(ms), ms });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_fails_is_tried_ever_more_rarely_until_it_works() {
        let (mut peers, peer) = (Peers::default(), "10.0.0.1:7700".parse().unwrap());
        let mut now = Mono(0);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(peers.may_try(peer, now));
            let ms = peers.failed(peer, now);
            assert!(!peers.may_try(peer, now.plus_ms(ms - 1)));
            now = now.plus_ms(ms);
            pauses.push(ms);
        }
        assert_eq!(pauses, [2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000, 60_000]);
        peers.works(peer);
        assert_eq!(peers.failed(peer, now), PAUSE_MIN_MS);
    }
}
