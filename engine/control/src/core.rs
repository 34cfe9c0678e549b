//! The control core: what it is made of, and which event goes where.

use crate::claims::Marks;
use crate::config::*;
use crate::director::Director;
use crate::director::decide::Wish;
use crate::drive::{Asker, Incoming, Meta};
use crate::feed::Feed;
use crate::http::Http;
use crate::lease::Registrar;
use crate::links::{Link, Linked};
use crate::metrics::ControlMetrics;
use crate::mirror::Mirror;
use crate::new_disks::NewDisks;
use crate::scrubs::Scrubs;
use crate::server::{Asked, Me, Server};
use crate::slow_disks::SlowDisks;
use crate::stats::Stats;
use crate::stop::Stop;
use crate::strays;
use crate::view::View;
use crate::wishes::Wishes;
use consensus::MetaNode;
use engine::CoreMsg;
use engine::msg::{Extent, Opened};
use reactor::{CloseReason, ConnId, Env, Event, Frame, Framing, Mono, Service, Token};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use wire::control::ControlMsg;
use wire::{CoreId, NodeId, Revision, SessionId, SliceId};

/// Disk operations of the metadata voter carry this in their upper half.
pub(crate) const META_TOKENS: u64 = 0xc1 << 56;
const TICK: Token = Token(0xc0 << 56 | 1);
const SOON: Token = Token(0xc0 << 56 | 2);
const CONTROL_LISTENER: Token = Token(0xc0 << 56 | 16);
const HTTP_LISTENER: Token = Token(0xc0 << 56 | 17);
/// When work is left over, the next step comes after this: other events get their turn in between.
const SOON_NS: u64 = 300_000;

/// The control core of a node. See the package.
pub struct ControlCore {
    pub(crate) config: ControlConfig,
    pub(crate) meta: Meta,
    /// This node's part in the metadata group, while that is not its way to the store. See `voters`.
    pub(crate) spare: Option<Box<MetaNode>>,
    /// Revision of the voters that the uplink knows.
    pub(crate) voters_seen: Revision,
    /// It is time to look for others.
    pub(crate) voters_due: bool,
    pub(crate) links: Vec<Link>,
    pub(crate) server: Server,
    pub(crate) http: Http,
    pub(crate) mirror: Mirror,
    pub(crate) view: View,
    pub(crate) incoming: VecDeque<Incoming>,
    pub(crate) director: Director,
    pub(crate) feed: Feed,
    pub(crate) wishes: Wishes,
    pub(crate) stats: Stats,
    pub(crate) scrubs: Scrubs,
    pub(crate) slow_disks: SlowDisks,
    pub(crate) registrar: Registrar,
    pub(crate) marks: Marks,
    pub(crate) new_disks: NewDisks,
    pub(crate) authority: Mono,
    /// Drawn in advance, for the day the lease is lost.
    pub(crate) fresh: SessionId,
    pub(crate) tickets: BTreeMap<u64, Asker>,
    pub(crate) next_ticket: u64,
    pub(crate) stop: Stop,
    pub(crate) metrics: Option<ControlMetrics>,
    pub(crate) control_addr: Option<SocketAddr>,
    pub(crate) http_addr: Option<SocketAddr>,
    pub(crate) listening: BTreeMap<CoreId, SocketAddr>,
    pub(crate) opened: BTreeMap<SliceId, Result<Opened, String>>,
    soon: bool,
    last_tick: Mono,
    ticks: u64,
    pub(crate) lag_ns: u64,
}

impl ControlCore {
    /// A control core that starts when its reactor does.
    pub fn new(config: ControlConfig) -> Self {
        let session = config.session.unwrap_or_default();
        Self {
            feed: Feed::new(config.node, config.data_cores),
            director: Director::new(config.planted),
            registrar: Registrar::new(session),
            marks: Marks::default(),
            new_disks: NewDisks::default(),
            meta: Meta::None,
            spare: None,
            voters_seen: Revision(0),
            voters_due: false,
            links: Vec::new(),
            server: Server::default(),
            http: Http::default(),
            mirror: Mirror::default(),
            view: View::default(),
            incoming: VecDeque::new(),
            wishes: Wishes::default(),
            stats: Stats::default(),
            scrubs: Scrubs::default(),
            slow_disks: SlowDisks::default(),
            authority: Mono(0),
            fresh: SessionId(0),
            tickets: BTreeMap::new(),
            next_ticket: 1,
            stop: Stop::No,
            metrics: None,
            control_addr: None,
            http_addr: None,
            listening: BTreeMap::new(),
            opened: BTreeMap::new(),
            soon: false,
            last_tick: Mono(0),
            ticks: 0,
            lag_ns: 0,
            config,
        }
    }

    /// The parsed map as this node sees it.
    pub fn view(&self) -> &View {
        &self.view
    }

    pub(crate) fn me(&self) -> Me {
        Me { cluster: self.config.cluster, node: self.config.node, session: self.registrar.session() }
    }

    pub(crate) fn fail(&mut self, error: ControlError) {
        tracing::error!(node = %self.config.node, %error, "the node cannot go on");
        self.config.status.set(|status| status.phase = Phase::Failed(error));
        self.feed.stop();
        self.stop = Stop::Done;
    }

    fn open(&mut self, env: &mut dyn Env) -> Result<(), ControlError> {
        if self.config.node.0 == 0 || self.config.voters.is_empty() {
            return Err(ControlError::Config("node 0 cannot exist, and there must be a voter"));
        }
        let listen = |env: &mut dyn Env, at, framing, token| {
            env.listen(at, framing, token)
                .map_err(|error| ControlError::Listen { at, why: error.to_string() })
        };
        let bound = listen(env, self.config.control_listen, Framing::Frames, CONTROL_LISTENER)?;
        self.control_addr = Some(self.reachable(bound));
        let http = match self.config.http_listen {
            Some(at) => Some(listen(env, at, Framing::Raw, HTTP_LISTENER)?),
            None => None,
        };
        self.http_addr = http.map(|bound| self.reachable(bound));
        let control = self.control_addr;
        let session = self.registrar.session();
        self.config.status.set(|status| {
            status.control = control;
            status.http = http;
            status.session = Some(session);
        });
        self.open_meta(env)
    }

    /// An address as others reach it.
    fn reachable(&self, bound: SocketAddr) -> SocketAddr {
        if bound.ip().is_unspecified() { SocketAddr::new(self.config.advertise, bound.port()) } else { bound }
    }

    fn on_tick(&mut self, env: &mut dyn Env) {
        let now = env.now();
        let due = self.last_tick.plus_ms(TICK_MS);
        self.lag_ns = self.lag_ns.max(now.since(due));
        self.last_tick = now;
        self.ticks += 1;
        env.set_timer(now.plus_ms(TICK_MS), TICK);
        self.links.iter_mut().for_each(|link| link.on_tick(env));
        if let Meta::Remote(uplink) = &mut self.meta {
            uplink.on_tick(env);
            if self.server.feeds(uplink.peer()) {
                // Two that vote no more would hear of nothing but each other.
                uplink.give_up(env);
            }
        }
        if let Some(node) = self.member() {
            node.on_tick(env);
        }
        self.prune_links(env);
        self.director.on_tick(&self.view, now);
        self.server.on_tick(env);
        self.http.on_tick(env);
        if self.ticks.is_multiple_of(20) {
            self.wishes.retry();
            self.voters_due = true;
        }
    }

    fn on_accepted(&mut self, env: &mut dyn Env, conn: ConnId, token: Token) {
        match token {
            CONTROL_LISTENER => self.server.accept(env, conn),
            HTTP_LISTENER => self.http.accept(env, conn),
            _ => env.close(conn, false),
        }
    }

    fn on_connected(&mut self, env: &mut dyn Env, conn: ConnId) {
        let me = self.me();
        if let Some(link) = self.links.iter_mut().find(|link| link.owns(conn)) {
            link.connected(env, me);
        } else if let Meta::Remote(uplink) = &mut self.meta
            && uplink.owns(conn)
        {
            uplink.connected(env, me);
        }
    }

    fn on_closed(&mut self, env: &mut dyn Env, conn: ConnId, reason: CloseReason) {
        self.server.closed(conn);
        self.http.closed(conn);
        if let Some(link) = self.links.iter_mut().find(|link| link.owns(conn)) {
            let gone = matches!(link.closed(env, reason), Linked::Gone);
            let peer = link.peer();
            if gone && let Some(node) = self.member() {
                node.on_peer_gone(env, peer);
            }
        } else if let Meta::Remote(uplink) = &mut self.meta
            && uplink.owns(conn)
        {
            uplink.closed(env, reason);
        }
    }

    fn on_frame(&mut self, env: &mut dyn Env, conn: ConnId, frame: &Frame) {
        let me = self.me();
        if let Some(link) = self.links.iter_mut().find(|link| link.owns(conn)) {
            match link.frame(env, me, frame) {
                Linked::Refused(status) => {
                    tracing::error!(voter = %link.peer(), %status, "a voter refuses this node");
                }
                Linked::OtherCluster(theirs) => {
                    tracing::error!(voter = %link.peer(), %theirs, "a voter belongs to another cluster");
                }
                Linked::Message(ControlMsg::Raft { bytes }) => {
                    let from = link.peer();
                    if let Some(node) = self.member() {
                        node.on_message(env, from, &bytes);
                    }
                }
                _ => {}
            }
            return;
        }
        if let Meta::Remote(uplink) = &mut self.meta
            && uplink.owns(conn)
        {
            uplink.frame(env, me, frame);
            return;
        }
        match self.server.frame(env, me, &self.mirror, conn, frame) {
            Some(Asked::Meta { conn, ticket, request }) => {
                self.ask(env, Asker::Client { conn, ticket }, request);
            }
            Some(Asked::Raft { from, bytes }) => {
                if let Some(node) = self.member() {
                    node.on_message(env, from, &bytes);
                }
            }
            Some(Asked::Refused(node)) => self.refused(env, node, false),
            None => {}
        }
    }

    /// Somebody could not reach a node. The voter may elect sooner; nothing else follows from it.
    fn refused(&mut self, env: &mut dyn Env, node: NodeId, own: bool) {
        self.director.refused(&self.view, node);
        match &mut self.meta {
            Meta::Voter(voter) => {
                voter.on_peer_gone(env, node);
                let leader = voter.leader();
                if own && let Some(link) = self.links.iter().find(|link| Some(link.peer()) == leader) {
                    link.send(env, &ControlMsg::Refused { node });
                }
            }
            Meta::Remote(uplink) if own => uplink.refused(env, node),
            _ => {}
        }
    }

    fn on_core(&mut self, env: &mut dyn Env, from: CoreId, msg: CoreMsg) {
        match msg {
            CoreMsg::Listening { addr } => {
                let addr = self.reachable(addr);
                self.listening.insert(from, addr);
                self.check_ready();
            }
            CoreMsg::ListenFailed { addr, error } => {
                self.fail(ControlError::Listen { at: addr, why: error });
            }
            CoreMsg::DiskOpened { ticket, result } => self.disk_opened(ticket, result),
            CoreMsg::SliceOpened { slice, result } => {
                if self.new_disks.heard(slice, result.clone()) {
                    return;
                }
                if let Ok(opened) = &result {
                    self.marks.heard(slice, opened.generation);
                }
                self.opened.insert(slice, result);
                self.tell_failed();
                self.check_ready();
            }
            CoreMsg::SliceFailed { slice, why, extent } => {
                if self.new_disks.heard(slice, Err(why.clone())) {
                    return;
                }
                self.slice_failed(slice, &why);
                if extent != Extent::Slice {
                    self.disk_failed(slice, &why, extent == Extent::DiskWhereSpared);
                }
                self.check_ready();
            }
            CoreMsg::PgReport(report) => {
                let session = self.registrar.session();
                self.wishes.reported(&self.view, session, from, &report);
                let entry = self.view.pgs().get(&report.pg);
                let home = entry.and_then(|e| e.record.primary).and_then(|slice| self.view.home(slice));
                if home.is_some_and(|home| home.node == self.config.node) {
                    self.stats.report(report);
                }
            }
            CoreMsg::InSync { pg, epoch, slice } => self.wishes.add(pg, epoch, slice, Wish::InSync),
            CoreMsg::OutOfSync { pg, epoch, slice, failed } => {
                let own = self.view.home(slice).is_some_and(|home| home.node == self.config.node);
                if failed && own {
                    self.slice_failed(slice, "its store failed");
                }
                let wish = if failed { Wish::Failed } else { Wish::OutOfSync };
                self.wishes.add(pg, epoch, slice, wish);
            }
            CoreMsg::Unreachable { pg, epoch, slice } => {
                self.wishes.add(pg, epoch, slice, Wish::Unreachable);
            }
            CoreMsg::GivesAway { pg, epoch, slice } => self.wishes.add(pg, epoch, slice, Wish::GivesAway),
            CoreMsg::PeerRefused { node } => self.refused(env, node, true),
            CoreMsg::SliceStat { slice, .. } if self.new_disks.is_strange(slice) => {}
            CoreMsg::SliceStat { slice, stat, generation } => {
                if let Some(why) = stat.state.strip_prefix("failed") {
                    self.slice_failed(slice, why.trim_start_matches([':', ' ']));
                }
                self.marks.heard(slice, generation);
                self.stats.slice(slice, stat);
                self.look_for_full();
            }
            CoreMsg::Scrubbed(report) => self.scrubs.reported(from, report),
            CoreMsg::AskLeavings { slice, pool } => {
                let (node, session) = (self.config.node, self.registrar.session());
                let leavings = strays::leavings(&self.view, node, session, slice, pool);
                self.feed.order(from, CoreMsg::Leavings { slice, pool, leavings });
            }
            CoreMsg::Stopped => self.core_stopped(env, from),
            CoreMsg::Stop => self.begin_stop(env),
            CoreMsg::Pg(_)
            | CoreMsg::PgGone { .. }
            | CoreMsg::Lease { .. }
            | CoreMsg::Identity { .. }
            | CoreMsg::Settings(_)
            | CoreMsg::Full { .. }
            | CoreMsg::Scrub { .. }
            | CoreMsg::Leavings { .. }
            | CoreMsg::OpenSlices { .. }
            | CoreMsg::SlowFrom { .. }
            | CoreMsg::GiveUp { .. } => {
                tracing::error!(%from, "a data core sent a message of the control core");
            }
        }
    }

    /// Which of this node's slices clients may put nothing more on.
    pub(crate) fn look_for_full(&mut self) {
        let before = self.view.live().get(&self.config.node).map(|live| live.full.as_slice());
        let percent = self.view.settings().full_percent;
        self.registrar.set_full(self.stats.full(percent, before.unwrap_or(&[])));
    }
}

impl Service for ControlCore {
    fn start(&mut self, env: &mut dyn Env) {
        let session = self.config.session.unwrap_or_else(|| SessionId(env.random().max(1)));
        self.registrar = Registrar::new(session);
        self.fresh = SessionId(env.random().max(1));
        self.next_ticket = 1;
        self.last_tick = env.now();
        env.set_timer(env.now().plus_ms(TICK_MS), TICK);
        match ControlMetrics::new(&self.config.registry, &self.config.version) {
            Ok(metrics) => self.metrics = Some(metrics),
            Err(error) => tracing::error!(%error, "no metrics of the control core"),
        }
        if let Err(error) = self.open(env) {
            self.fail(error);
        }
        self.check_ready();
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Timer { token: TICK } => self.on_tick(env),
            Event::Timer { token: SOON } => self.soon = false,
            Event::Timer { .. } => {}
            Event::DiskDone { token, result, op, .. } => {
                if let Some(node) = self.member() {
                    node.on_disk(env, token, result, op);
                }
            }
            Event::Accepted { conn, token, .. } => self.on_accepted(env, conn, token),
            Event::Connected { conn } => self.on_connected(env, conn),
            Event::Frame { conn, frame } => self.on_frame(env, conn, &frame),
            Event::Bytes { conn, bytes } => self.on_bytes(env, conn, bytes.as_slice()),
            Event::Closed { conn, reason } => self.on_closed(env, conn, reason),
            Event::Mesh { from, msg } => match CoreMsg::from_mesh(msg) {
                Ok(msg) => self.on_core(env, from, msg),
                Err(_) => tracing::error!(%from, "unknown mesh message"),
            },
        }
    }

    fn flush(&mut self, env: &mut dyn Env) {
        let more = self.drive(env);
        if more && !self.soon {
            self.soon = true;
            env.set_timer(env.now().plus_ns(SOON_NS), SOON);
        }
    }

    fn finished(&self) -> bool {
        matches!(self.stop, Stop::Done) && !self.feed.has_work()
    }
}
