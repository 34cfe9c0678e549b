//! Faults: what happens to a running cluster, and when it ends.

use crate::check::history::DATA_MARKER;
use crate::cluster::{Cluster, NodeState};
use simenv::clock::{MS, SEC};
use simenv::disk::{Damage, WriteFault};
use simenv::rng::Stream;
use simenv::trace::stamp;
use simenv::universe::HostId;

/// Something that was broken and will be mended.
#[derive(Clone, Debug)]
enum Wound {
    Node(usize),
    /// Links, from and to.
    Links(Vec<(HostId, HostId)>),
    Client(usize),
}

/// The source of faults.
pub struct Nemesis {
    rng: Stream,
    wounds: Vec<(u64, Wound)>,
    /// Data at rest is damaged on this node only: one copy of an object at most.
    victim: usize,
    /// Some of it cannot be read at all.
    made_unreadable: bool,
    verbose: bool,
    /// Faults so far, by name.
    pub counts: std::collections::BTreeMap<&'static str, u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(clippy::enum_variant_names, reason = "a write fault is what the disk calls it")]
enum Fault {
    Kill,
    Power,
    Blackout,
    Pause,
    Stop,
    Partition,
    OneWay,
    Link,
    Clog,
    Reset,
    SlowDisk,
    ClientKill,
    Damage,
    WriteFault,
}

/// Writes of blocks that data must have outlived before it rots: a log's tail that rots looks like a log
/// that ended earlier, and no store can tell.
const REST_BLOCKS: u64 = 2_000;

impl Nemesis {
    /// The faults of a seed.
    pub fn new(seed: u64, nodes: usize, verbose: bool) -> Self {
        let mut rng = Stream::new(seed, "nemesis");
        let victim = rng.below(nodes as u64) as usize;
        Self { rng, wounds: Vec::new(), victim, made_unreadable: false, verbose, counts: Default::default() }
    }

    fn say(&self, cluster: &Cluster, text: &str) {
        if self.verbose {
            eprintln!("{} nemesis: {text}", stamp(cluster.universe.now));
        }
    }

    /// Whether it says what it does.
    pub fn is_verbose(&self) -> bool {
        self.verbose
    }

    /// When the next fault is due.
    pub fn next_at(&mut self, cluster: &Cluster) -> u64 {
        cluster.universe.now + self.rng.latency(cluster.options.fault_every_ns)
    }

    /// Mends what is due.
    pub fn mend_due(&mut self, cluster: &mut Cluster) {
        let now = cluster.universe.now;
        let (due, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.wounds).into_iter().partition(|w| w.0 <= now);
        self.wounds = left;
        for (_, wound) in due {
            self.mend(cluster, wound);
        }
    }

    fn mend(&mut self, cluster: &mut Cluster, wound: Wound) {
        self.say(cluster, &format!("mends {wound:?}"));
        match wound {
            Wound::Node(index) => cluster.revive(index),
            Wound::Links(links) => {
                for (from, to) in links {
                    cluster.universe.set_blocked(from, to, false);
                }
            }
            Wound::Client(index) => cluster.start_client(index),
        }
    }

    /// Somebody else has taken a node away: it comes back then.
    pub fn will_revive(&mut self, at: u64, node: usize) {
        self.wounds.retain(|(_, wound)| !matches!(wound, Wound::Node(other) if *other == node));
        self.wounds.push((at, Wound::Node(node)));
    }

    /// Mends everything.
    pub fn heal(&mut self, cluster: &mut Cluster) {
        self.heal_all_but_disks(cluster);
        self.exchange_bad_disks(cluster);
    }

    /// Mends everything but what is wrong on the disks.
    pub fn heal_all_but_disks(&mut self, cluster: &mut Cluster) {
        for (_, wound) in std::mem::take(&mut self.wounds) {
            self.mend(cluster, wound);
        }
        cluster.universe.heal_network();
        cluster.universe.net.options.reset_ppm = 0;
        cluster.universe.net.options.loss_ppm = 0;
        cluster.universe.net.options.corrupt_ppm = 0;
        cluster.universe.net.options.credits_kept_ppm = 0;
        for disk in &mut cluster.universe.disks {
            disk.slow = (0, 1);
            disk.transient_error_ppm = 0;
        }
        self.say(cluster, "heals everything");
    }

    /// A slice rightly refuses to open when it cannot read the block where its log may go on: nobody can
    /// tell a block never written there from an acknowledged commit. An operator would exchange the drive
    /// and start the node again.
    fn exchange_bad_disks(&mut self, cluster: &mut Cluster) {
        if !self.made_unreadable {
            return;
        }
        for disk in cluster.nodes[self.victim].disks.clone() {
            cluster.universe.disks[disk].lift_unreadable();
        }
        if cluster.nodes[self.victim].state == NodeState::Running {
            cluster.kill_node(self.victim);
            cluster.revive(self.victim);
        }
    }

    /// Lets something happen.
    pub fn strike(&mut self, cluster: &mut Cluster) {
        let weights = cluster.options.faults;
        let first = (weights.kill, Fault::Kill);
        let rest = [
            (weights.power, Fault::Power),
            (weights.blackout, Fault::Blackout),
            (weights.pause, Fault::Pause),
            (weights.stop, Fault::Stop),
            (weights.partition, Fault::Partition),
            (weights.one_way, Fault::OneWay),
            (weights.link, Fault::Link),
            (weights.clog, Fault::Clog),
            (weights.reset, Fault::Reset),
            (weights.slow_disk, Fault::SlowDisk),
            (weights.client_kill, Fault::ClientKill),
            (weights.damage, Fault::Damage),
            (weights.write_fault, Fault::WriteFault),
        ];
        if first.0 + rest.iter().map(|(weight, _)| weight).sum::<u32>() == 0 {
            return;
        }
        let fault = self.rng.weighted(first, &rest);
        if cluster.options.gentle && !self.may_strike_gently(cluster, fault) {
            return;
        }
        let until = cluster.universe.now + self.rng.latency(cluster.options.fault_for_ns);
        let away = cluster.options.down_for_ns;
        let until = match fault {
            Fault::Kill if away > 0 => cluster.universe.now + self.rng.latency(away),
            _ => until,
        };
        let happened = match fault {
            Fault::Kill | Fault::Power | Fault::Pause | Fault::Stop => {
                self.strike_node(cluster, fault, until)
            }
            Fault::Blackout => self.blackout(cluster, until),
            Fault::Partition | Fault::OneWay => self.partition(cluster, fault == Fault::OneWay, until),
            Fault::Link => self.cut_link(cluster, until),
            Fault::Clog => self.clog(cluster, until),
            Fault::Reset => cluster.universe.reset_random_connection().then_some("reset"),
            Fault::SlowDisk => self.slow_disk(cluster, until),
            Fault::ClientKill => self.kill_client(cluster, until),
            Fault::Damage => self.damage(cluster),
            Fault::WriteFault => self.write_fault(cluster),
        };
        if let Some(name) = happened {
            *self.counts.entry(name).or_default() += 1;
        }
    }

    /// In gentle seeds, whatever takes a node away waits until nothing else is broken.
    fn may_strike_gently(&self, cluster: &Cluster, fault: Fault) -> bool {
        let light = matches!(fault, Fault::Reset | Fault::ClientKill | Fault::SlowDisk | Fault::Damage);
        light
            || (!self.wounds.iter().any(|(_, wound)| !matches!(wound, Wound::Client(_)))
                && cluster.board.borrow().unclean(cluster.options.pg_count as usize).is_none())
    }

    fn strike_node(&mut self, cluster: &mut Cluster, fault: Fault, until: u64) -> Option<&'static str> {
        let mut up: Vec<usize> =
            (0..cluster.nodes.len()).filter(|&at| cluster.nodes[at].state == NodeState::Running).collect();
        if cluster.options.faults.write_fault > 0 {
            // A lost write at the end of a log looks like a log that ended earlier.
            up.retain(|&at| at != self.victim);
        }
        let index = *self.rng.pick(&up)?;
        self.say(
            cluster,
            &format!("{fault:?} node {} (host {})", cluster.nodes[index].id, cluster.nodes[index].host),
        );
        self.wounds.push((until, Wound::Node(index)));
        match fault {
            Fault::Kill => cluster.kill_node(index),
            Fault::Power => cluster.power_off(index),
            Fault::Stop => cluster.stop_node(index),
            _ => cluster.pause_node(index),
        }
        Some(match fault {
            Fault::Kill => "kill",
            Fault::Power => "power cut",
            Fault::Stop => "stop",
            _ => "pause",
        })
    }

    fn blackout(&mut self, cluster: &mut Cluster, until: u64) -> Option<&'static str> {
        self.say(cluster, "blackout");
        self.wounds.retain(|(_, wound)| !matches!(wound, Wound::Node(_)));
        for index in 0..cluster.nodes.len() {
            cluster.power_off(index);
            let late = self.rng.below(SEC);
            self.wounds.push((until + late, Wound::Node(index)));
        }
        Some("blackout")
    }

    fn partition(&mut self, cluster: &mut Cluster, one_way: bool, until: u64) -> Option<&'static str> {
        let hosts: Vec<HostId> =
            cluster.nodes.iter().map(|node| node.host).chain(cluster.clients.iter().copied()).collect();
        // Either one host apart, or a random half; of the links between, both directions or one.
        let apart: Vec<HostId> = if self.rng.coin() {
            self.rng.pick(&hosts).copied().into_iter().collect()
        } else {
            hosts.iter().copied().filter(|_| self.rng.coin()).collect()
        };
        let mut links = Vec::new();
        for &a in &apart {
            for &b in hosts.iter().filter(|host| !apart.contains(host)) {
                links.push((a, b));
                if !one_way {
                    links.push((b, a));
                }
            }
        }
        if one_way && self.rng.coin() {
            links = links.into_iter().map(|(a, b)| (b, a)).collect();
        }
        self.say(cluster, &format!("blocks {links:?}"));
        for &(from, to) in &links {
            cluster.universe.set_blocked(from, to, true);
        }
        self.wounds.push((until, Wound::Links(links)));
        Some(if one_way { "one-way partition" } else { "partition" })
    }

    /// Two nodes no longer reach each other; whoever reaches both is the bridge between them.
    fn cut_link(&mut self, cluster: &mut Cluster, until: u64) -> Option<&'static str> {
        let mut hosts: Vec<HostId> = cluster.nodes.iter().map(|node| node.host).collect();
        self.rng.shuffle(&mut hosts);
        let [a, b, ..] = hosts.as_slice() else { return None };
        let links = vec![(*a, *b), (*b, *a)];
        self.say(cluster, &format!("cuts {links:?}"));
        for &(from, to) in &links {
            cluster.universe.set_blocked(from, to, true);
        }
        self.wounds.push((until, Wound::Links(links)));
        Some("cut link")
    }

    fn clog(&mut self, cluster: &mut Cluster, until: u64) -> Option<&'static str> {
        let hosts: Vec<HostId> =
            cluster.nodes.iter().map(|node| node.host).chain(cluster.clients.iter().copied()).collect();
        let (from, to) = (*self.rng.pick(&hosts)?, *self.rng.pick(&hosts)?);
        self.say(cluster, &format!("clogs {from} to {to}"));
        cluster.universe.clog(from, to, until);
        Some("clog")
    }

    fn slow_disk(&mut self, cluster: &mut Cluster, until: u64) -> Option<&'static str> {
        let disk = self.rng.below(cluster.universe.disks.len() as u64) as usize;
        let factor = self.rng.weighted((2, 20), &[(1, 500)]);
        self.say(cluster, &format!("disk {disk} is {factor} times slower"));
        cluster.universe.disks[disk].slow = (until, factor);
        Some("slow disk")
    }

    fn kill_client(&mut self, cluster: &mut Cluster, until: u64) -> Option<&'static str> {
        let index = self.rng.below(cluster.clients.len() as u64) as usize;
        if self.wounds.iter().any(|(_, wound)| matches!(wound, Wound::Client(at) if *at == index)) {
            return None;
        }
        self.say(cluster, &format!("kills client {index}"));
        cluster.kill_client(index);
        let soon = until.min(cluster.universe.now + 200 * MS);
        self.wounds.push((soon, Wound::Client(index)));
        Some("client kill")
    }

    fn damage(&mut self, cluster: &mut Cluster) -> Option<&'static str> {
        let disks = cluster.nodes[self.victim].disks.clone();
        let disk = *self.rng.pick(&disks)?;
        let blocks = cluster.universe.disks[disk].resting_blocks(DATA_MARKER, REST_BLOCKS);
        let block = *self.rng.pick(&blocks)?;
        let damage =
            self.rng.weighted((1, Damage::BitRot), &[(1, Damage::Unreadable), (1, Damage::ZeroedSector)]);
        self.say(cluster, &format!("{damage:?} at disk {disk} block {block}"));
        self.made_unreadable |= damage == Damage::Unreadable;
        cluster.universe.disks[disk].damage(block, damage).then_some("damage")
    }

    fn write_fault(&mut self, cluster: &mut Cluster) -> Option<&'static str> {
        let disks = cluster.nodes[self.victim].disks.clone();
        let disk = *self.rng.pick(&disks)?;
        let blocks = cluster.universe.disks[disk].resting_blocks(DATA_MARKER, REST_BLOCKS);
        let fault = match self.rng.pick(&blocks) {
            Some(&to) if self.rng.coin() => WriteFault::Misdirected { to },
            _ => WriteFault::Lost,
        };
        self.say(cluster, &format!("{fault:?} on disk {disk}"));
        cluster.universe.disks[disk].arm(fault, DATA_MARKER);
        Some("write fault")
    }
}
