//! The client as a whole: one state machine that serves several images of one cluster.

use crate::control::{Control, News};
use crate::error::{AdminError, SubmitError};
use crate::frames::{self, Identity};
use crate::io::{Counters, Io};
use crate::map::ClusterMap;
use crate::op::{AdminDone, AdminTicket, ImageHandle, ImageInfo, IoDone, Op, Ticket};
use crate::open::Opening;
use crate::options::{OpenMode, Options};
use crate::watch::Watch;
use reactor::{CloseReason, ConnId, Env, Event, Frame, Mono, Service, Token};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use wire::control::MetaRequest;
use wire::{ClusterId, FrameKind, SessionId, Status};

/// The only timer: the client shares its core with nobody.
const TICK: Token = Token(0xc1 << 56);
/// Housekeeping with operations under way: half of the shortest patience (`control`).
const TICK_BUSY_MS: u64 = 125;
/// Housekeeping without: an idle client wakes twice a second.
const TICK_IDLE_MS: u64 = 500;
/// A timer so much behind its time means that nobody polled this client meanwhile.
const LATE_MS: u64 = 200;

/// Who asked for a metadata request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Asker {
    /// The caller.
    Caller(AdminTicket),
    /// An image being opened.
    Opening(AdminTicket),
}

/// Images of one cluster, served from within one core.
///
/// Drive it as a `reactor::Service`. Between events call `open`, `submit` and so on with the same
/// environment, and take results with `poll` and `poll_admin`. Nothing blocks. Results come in any order.
pub struct ClientCore {
    pub(crate) options: Options,
    me: Identity,
    pub(crate) control: Control,
    pub(crate) map: ClusterMap,
    pub(crate) io: Io,
    pub(crate) openings: Vec<Opening>,
    /// Subscriptions of open images.
    pub(crate) open_keys: BTreeMap<ImageHandle, Vec<String>>,
    pub(crate) watch: Option<Watch>,
    pub(crate) askers: BTreeMap<u64, Asker>,
    pub(crate) admin_done: VecDeque<AdminDone>,
    pub(crate) next_admin: u64,
    armed: Option<Mono>,
}

impl ClientCore {
    /// A client of the cluster that any of these control addresses belongs to.
    pub fn new(addrs: Vec<SocketAddr>, options: Options) -> Self {
        Self {
            options,
            me: Identity::default(),
            control: Control::new(addrs),
            map: ClusterMap::default(),
            io: Io::new(options),
            openings: Vec::new(),
            open_keys: BTreeMap::new(),
            watch: None,
            askers: BTreeMap::new(),
            admin_done: VecDeque::new(),
            next_admin: 1,
            armed: None,
        }
    }

    /// Starts opening an image by name; `AdminDone::Opened` follows.
    pub fn open(&mut self, env: &mut dyn Env, name: &str, mode: OpenMode) -> AdminTicket {
        let ticket = self.start_opening(env, name, mode);
        self.settle(env);
        ticket
    }

    /// Takes no more operations for an image. Those under way complete and are reported.
    pub fn close(&mut self, env: &mut dyn Env, image: ImageHandle) {
        self.io.close(image);
        self.open_keys.remove(&image);
        self.want_keys(env);
        self.settle(env);
    }

    /// Size and state of an open image, following the cluster's changes.
    pub fn info(&self, image: ImageHandle) -> Option<ImageInfo> {
        self.io.info(image)
    }

    /// Accepts an operation and sends what can be sent; an `IoDone` with this ticket follows. `user` comes
    /// back in it. On refusal nothing has happened and the operation comes back.
    pub fn submit(
        &mut self,
        env: &mut dyn Env,
        image: ImageHandle,
        op: Op,
        user: u64,
    ) -> Result<Ticket, (SubmitError, Op)> {
        let ticket = self.io.submit(env.now(), image, op, user)?;
        self.settle(env);
        Ok(ticket)
    }

    /// The next completed operation.
    pub fn poll(&mut self) -> Option<IoDone> {
        self.io.poll()
    }

    /// Whether `poll` has something.
    pub fn has_done(&self) -> bool {
        self.io.has_done()
    }

    /// Starts a metadata request; `AdminDone::Meta` follows. Reads are repeated across failures; a
    /// transaction is sent again only while it is certain that it was not applied.
    pub fn meta(&mut self, env: &mut dyn Env, request: MetaRequest) -> AdminTicket {
        let ticket = self.admin_ticket();
        match self.control.call(env, request, self.options.admin_timeout_ms) {
            Ok(call) => {
                self.askers.insert(call, Asker::Caller(ticket));
            }
            Err(error) => self.admin_done.push_back(AdminDone::Meta { ticket, result: Err(error) }),
        }
        self.settle(env);
        ticket
    }

    /// Watches all keys with these prefixes, in place of those watched before; `AdminDone::Watch` follows
    /// again and again.
    pub fn watch(&mut self, env: &mut dyn Env, prefixes: Vec<String>) -> AdminTicket {
        let ticket = self.admin_ticket();
        self.watch = (!prefixes.is_empty()).then(|| Watch::new(ticket, prefixes));
        self.control.renew(env);
        self.want_keys(env);
        self.settle(env);
        ticket
    }

    /// The next result of `open` or `meta`, or news of the watch.
    pub fn poll_admin(&mut self) -> Option<AdminDone> {
        self.admin_done.pop_front()
    }

    /// Whether any operation is under way.
    pub fn is_busy(&self) -> bool {
        self.io.is_busy()
    }

    /// The cluster, once a node has answered.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.me.cluster
    }

    /// The node that serves the map and metadata requests at present.
    pub fn connected_to(&self) -> Option<SocketAddr> {
        self.control.connected_to()
    }

    /// Numbers since the start.
    pub fn counters(&self) -> Counters {
        self.io.counters
    }

    pub(crate) fn admin_ticket(&mut self) -> AdminTicket {
        let ticket = AdminTicket(self.next_admin);
        self.next_admin += 1;
        ticket
    }

    /// Sends what may be sent, and sees to it that time is looked after.
    fn settle(&mut self, env: &mut dyn Env) {
        self.io.pump(env, &self.map);
        let busy = self.io.is_busy() || !self.openings.is_empty();
        let by = env.now().plus_ms(if busy { TICK_BUSY_MS } else { TICK_IDLE_MS });
        let by = [self.io.wake_at, self.control.wake_at()].into_iter().flatten().fold(by, Mono::min);
        self.arm(env, by);
    }

    fn arm(&mut self, env: &mut dyn Env, at: Mono) {
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            env.set_timer(at, TICK);
        }
    }

    fn timer(&mut self, env: &mut dyn Env) {
        let now = env.now();
        // Timers cannot be cancelled: one that was armed before an earlier one still comes.
        let Some(due) = self.armed.filter(|due| *due <= now) else { return };
        self.armed = None;
        let late = now.since(due) > LATE_MS * 1_000_000;
        self.io.tick(env, late);
        let busy = self.io.is_busy() || !self.openings.is_empty() || !self.askers.is_empty();
        let news = self.control.tick(env, busy, late);
        for item in news {
            self.news(env, item);
        }
        self.expire_openings(now);
    }

    fn news(&mut self, env: &mut dyn Env, news: News) {
        match news {
            News::Snapshot { revision, prefixes, items } => {
                let touched = self.map.replace(&items);
                self.after_map(env, touched);
                let watch = self.watch.as_mut().filter(|watch| watch.is_within(&prefixes));
                let changes = watch.and_then(|watch| watch.snapshot(revision, &items));
                self.report_watch(revision, changes);
                self.finish_openings(env);
            }
            News::Changes { revision, changes } => {
                let touched = self.map.apply(&changes);
                self.after_map(env, touched);
                let changes = self.watch.as_mut().and_then(|watch| watch.changes(revision, &changes));
                self.report_watch(revision, changes);
            }
            News::Meta { ticket, result } => match self.askers.remove(&ticket) {
                Some(Asker::Caller(ticket)) => self.admin_done.push_back(AdminDone::Meta { ticket, result }),
                Some(Asker::Opening(opening)) => self.opening_answered(env, opening, result),
                None => {}
            },
        }
    }

    fn report_watch(&mut self, revision: wire::Revision, changes: Option<Vec<wire::control::Change>>) {
        if let (Some(changes), Some(watch)) = (changes, &self.watch) {
            self.admin_done.push_back(AdminDone::Watch { ticket: watch.ticket, revision, changes });
        }
    }

    fn after_map(&mut self, env: &mut dyn Env, touched: crate::map::Touched) {
        self.map.resolve(touched, &mut self.io.peers);
        if touched.nodes {
            self.control.learn(self.map.control_addrs());
        }
        if touched.images {
            self.io.images_changed(env, &self.map);
        }
        self.io.map_changed(env, &self.map, touched.nodes);
    }

    fn frame(&mut self, env: &mut dyn Env, conn: ConnId, frame: &Frame) {
        match frame.header.kind {
            FrameKind::ReadReply | FrameKind::WriteReply | FrameKind::ZeroReply | FrameKind::DeleteReply => {
                self.io.reply(env, &self.map, conn, frame);
            }
            FrameKind::Control if self.control.conn() == Some(conn) => {
                if let Some(news) = self.control.message(env, frame) {
                    self.news(env, news);
                }
            }
            FrameKind::Hello if self.control.conn() == Some(conn) => {
                self.control.hello(env, frame, &mut self.me);
            }
            FrameKind::Hello => {
                let welcome = frames::decode_hello(frame).is_some_and(|hello| {
                    Status::from_u8(hello.refused) == Status::Ok
                        && (hello.cluster.is_none() || hello.cluster == self.me.cluster)
                });
                self.io.peer_up(env, conn, welcome);
            }
            FrameKind::Ping => {
                // Refused when the queue is full: then the frames in it are sign of life enough.
                let _ = env.send(conn, frames::bare(FrameKind::Pong, frame.header.request));
            }
            FrameKind::Pong if self.control.conn() == Some(conn) => self.control.pong(env.now()),
            FrameKind::Pong => {
                if let Some((_, peer)) = self.io.peers.by_conn(conn) {
                    peer.heard(env.now());
                }
            }
            _ => {}
        }
    }

    fn closed(&mut self, env: &mut dyn Env, conn: ConnId, reason: CloseReason) {
        if self.control.conn() == Some(conn) {
            for news in self.control.closed(env, reason) {
                self.news(env, news);
            }
        } else {
            self.io.peer_closed(env, conn, reason);
        }
    }

    /// Why the cluster cannot be reached, for the caller of `open` and the like.
    pub(crate) fn no_answer(&self) -> AdminError {
        if self.control.is_up() {
            AdminError::NoAnswer { last: Status::Unknown }
        } else {
            self.control.unreachable()
        }
    }
}

impl Service for ClientCore {
    fn start(&mut self, env: &mut dyn Env) {
        self.me.session = SessionId(env.random());
        self.io.last_origin = self.me.session.0;
        self.control.start(env);
        self.settle(env);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::Frame { conn, frame } => self.frame(env, conn, &frame),
            Event::Timer { token: TICK } => self.timer(env),
            Event::Connected { conn } if self.control.conn() == Some(conn) => {
                self.control.connected(env, &mut self.me);
            }
            Event::Connected { conn } => {
                self.io.peer_connected(env, conn, &mut self.me);
            }
            Event::Closed { conn, reason } => self.closed(env, conn, reason),
            Event::Timer { .. }
            | Event::DiskDone { .. }
            | Event::Accepted { .. }
            | Event::Bytes { .. }
            | Event::Mesh { .. } => {}
        }
    }

    fn flush(&mut self, env: &mut dyn Env) {
        self.settle(env);
    }
}
