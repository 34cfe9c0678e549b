//! The data core itself: its tables, and where each event goes.

use crate::config::*;
use crate::hash::Table;
use crate::metrics::CoreMetrics;
use crate::msg::CoreMsg;
use crate::op::{Obj, Op};
use crate::peer::Peer;
use crate::pg::{Pg, Primary};
use crate::planted::Bug;
use crate::priority::{Decreed, Round};
use crate::recovery::Heal;
use crate::scrub::Scrubs;
use crate::session::{Conn, Sessions};
use crate::share::{Share, Turn};
use crate::slab::{Key, Slab};
use crate::slices::SliceState;
use crate::strays::Strays;
use reactor::{Env, Event, Framing, Mono, Service, Token};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use wire::{CONTROL_CORE, ObjectId, PgId, SessionId, SliceId};

/// Top byte of this core's timer tokens.
const TOKEN_TIMER: u8 = 0x01;
/// Top byte of the listener's token.
const TOKEN_LISTEN: u8 = 0x02;
/// Top byte of the first slice's disk tokens; the others follow.
pub(crate) const TOKEN_SLICES: u8 = 0x80;
/// Rounds of store flushes at the end of one batch; what is left then goes on in the next batch.
const FLUSH_ROUNDS: usize = 4;

/// Classes of store tickets (top byte).
pub(crate) mod ticket {
    /// Nobody waits.
    pub(crate) const NONE: u8 = 0;
    /// A client operation or purge (`Op`).
    pub(crate) const OP: u8 = 1;
    /// A sub-operation as a member (`SubOp`).
    pub(crate) const SUB: u8 = 2;
    /// A recovery reads its object.
    pub(crate) const HEAL_READ: u8 = 3;
    /// A recovery repairs the own copy.
    pub(crate) const HEAL_STORE: u8 = 4;
    /// A scrub reads an object.
    pub(crate) const SCRUB: u8 = 5;
    /// Something left behind is being erased.
    pub(crate) const ERASE: u8 = 6;
}

/// Where a stop stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Life {
    Running,
    /// Waiting for operations in flight, until then at the latest.
    Draining(Mono),
    /// Stores are closing, until then at the latest.
    Closing(Mono),
    Stopped,
}

/// One data core: owns slices and the PGs whose members they are.
pub struct DataCore {
    pub(crate) config: DataCoreConfig,
    pub(crate) metrics: Arc<CoreMetrics>,
    /// This core's own session towards peers, drawn at start.
    pub(crate) session: SessionId,
    /// The process, from the control core.
    pub(crate) process: Option<SessionId>,
    pub(crate) lease_until: Mono,
    pub(crate) life: Life,
    pub(crate) slices: Vec<SliceState>,
    pub(crate) conns: Table<reactor::ConnId, Conn>,
    pub(crate) sessions: Sessions,
    pub(crate) peers: Vec<Peer>,
    pub(crate) peer_index: BTreeMap<SocketAddr, usize>,
    pub(crate) pgs: Slab<Pg>,
    pub(crate) pg_index: Table<PgId, Key>,
    pub(crate) ops: Slab<Op>,
    pub(crate) objs: Slab<Obj>,
    pub(crate) obj_index: Table<ObjectId, Key>,
    pub(crate) heals: Slab<Heal>,
    /// Recoveries that a full store made wait.
    pub(crate) heals_parked: Vec<Key>,
    pub(crate) heals_background: usize,
    pub(crate) purges: usize,
    pub(crate) subs: Slab<crate::member::SubOp>,
    pub(crate) scrubs: Scrubs,
    pub(crate) strays: Strays,
    pub(crate) share: Share,
    /// Slices with a pass over what they hold to be made (`track_groups`), in turn.
    pub(crate) tracking: VecDeque<usize>,
    /// PGs whose own list is being read or swept, in turn.
    pub(crate) scans: VecDeque<Key>,
    pub(crate) recovering: Round,
    pub(crate) decreed: Decreed,
    /// PGs with tombstones to purge, in turn.
    pub(crate) purging: VecDeque<Key>,
    pub(crate) seq: u64,
    pub(crate) outbox: VecDeque<CoreMsg>,
    /// When the earliest timer in force fires; `None` when there is none.
    armed: Option<Mono>,
    housekeeping_at: Mono,
    reach_at: Mono,
    /// PGs with a report due.
    pub(crate) reports: Vec<Key>,
    /// Some of them because their state may have changed.
    pub(crate) reports_due: bool,
    pub(crate) list_scratch: Vec<store::ListEntry>,
}

impl DataCore {
    /// A core that starts its work when the environment calls `start`.
    pub fn new(config: DataCoreConfig) -> Self {
        let metrics = config.metrics.clone();
        Self {
            metrics,
            session: SessionId(0),
            process: None,
            lease_until: Mono(0),
            life: Life::Running,
            slices: config
                .slices
                .iter()
                .take(SLICES_MAX)
                .enumerate()
                .map(|(at, s)| SliceState::new(at, s, &config.metrics))
                .collect(),
            conns: Table::default(),
            sessions: Sessions::default(),
            peers: Vec::new(),
            peer_index: BTreeMap::new(),
            pgs: Slab::with_capacity(64),
            pg_index: Table::default(),
            ops: Slab::with_capacity(CLIENT_OPS_MAX + PURGE_PARALLEL),
            objs: Slab::with_capacity(CLIENT_OPS_MAX),
            obj_index: Table::with_capacity_and_hasher(CLIENT_OPS_MAX * 2, Default::default()),
            heals: Slab::with_capacity(RECOVERY_PARALLEL),
            heals_parked: Vec::new(),
            heals_background: 0,
            purges: 0,
            subs: Slab::with_capacity(1024),
            scrubs: Scrubs::new(),
            strays: Strays::new(),
            share: Share::new(),
            tracking: VecDeque::new(),
            scans: VecDeque::new(),
            recovering: Round::default(),
            decreed: Decreed::default(),
            purging: VecDeque::new(),
            seq: 0,
            outbox: VecDeque::new(),
            armed: None,
            housekeeping_at: Mono(0),
            reach_at: Mono(0),
            reports: Vec::new(),
            reports_due: false,
            list_scratch: Vec::new(),
            config,
        }
    }

    pub(crate) fn bug(&self, bug: Bug) -> bool {
        self.config.planted.has(bug)
    }

    /// Whether primaries of this node may serve now.
    pub(crate) fn lease_holds(&self, env: &dyn Env) -> bool {
        env.now() < self.lease_until || self.bug(Bug::ReadFromStalePrimary)
    }

    pub(crate) fn pg_key(&self, id: PgId) -> Option<Key> {
        self.pg_index.get(&id).copied()
    }

    pub(crate) fn primary(&self, pg: Key) -> Option<&Primary> {
        self.pgs.get(pg)?.primary.as_deref()
    }

    pub(crate) fn primary_mut(&mut self, pg: Key) -> Option<&mut Primary> {
        self.pgs.get_mut(pg)?.primary.as_deref_mut()
    }

    pub(crate) fn slice_at(&self, slice: SliceId) -> Option<usize> {
        self.slices.iter().position(|state| state.id == slice)
    }

    /// Whether a piece of background work may begin now; if not, the loop comes back to it.
    pub(crate) fn background_turn(&mut self, env: &mut dyn Env) -> Turn {
        let turn = self.share.turn(env.now());
        if let Turn::Wait(until) = turn {
            self.wake_at(env, until);
        }
        turn
    }

    pub(crate) fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    /// Tells the control core. Order is kept; what does not fit waits for the next batch.
    pub(crate) fn tell(&mut self, msg: CoreMsg) {
        if self.outbox.len() < OUTBOX_MAX {
            self.outbox.push_back(msg);
        } else {
            tracing::warn!("messages for the control core are dropped: it does not take them");
        }
    }

    fn drain_outbox(&mut self, env: &mut dyn Env) {
        while let Some(msg) = self.outbox.pop_front() {
            if let Err((_, msg)) = env.post(CONTROL_CORE, msg.into_mesh()) {
                if let Ok(msg) = CoreMsg::from_mesh(msg) {
                    self.outbox.push_front(msg);
                }
                self.wake_in(env, 1);
                return;
            }
        }
    }

    /// Makes sure that a timer fires at `at` or before.
    pub(crate) fn wake_at(&mut self, env: &mut dyn Env, at: Mono) {
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            env.set_timer(at, Token(Key::NONE.tagged(TOKEN_TIMER)));
        }
    }

    /// Makes sure that a timer fires in `ms` or before.
    pub(crate) fn wake_in(&mut self, env: &mut dyn Env, ms: u64) {
        let at = env.now().plus_ms(ms);
        self.wake_at(env, at);
    }

    fn timer(&mut self, env: &mut dyn Env) {
        let now = env.now();
        // Timers cannot be cancelled: one that was armed before an earlier one still comes. Were each of them to arm
        // the next one, there would be more and more, until the core did nothing else.
        if self.armed.is_none_or(|due| now < due) {
            return;
        }
        self.armed = None;
        let mut next = self.retry_peers(env);
        self.retry_activates(env);
        if now >= self.housekeeping_at {
            self.housekeeping_at = now.plus_ms(TICK_MS);
            self.housekeeping(env);
        }
        next = next.min(self.housekeeping_at);
        if self.watches_peers() {
            if now >= self.reach_at {
                self.reach_at = now.plus_ms(REACH_TICK_MS);
                self.watch_peers(env);
            }
            next = next.min(self.reach_at);
        }
        if let Some(at) = self.send_reports(env) {
            next = next.min(at);
        }
        if let Life::Draining(until) | Life::Closing(until) = self.life {
            next = next.min(until);
        }
        self.wake_at(env, next);
    }

    fn housekeeping(&mut self, env: &mut dyn Env) {
        self.expire_hellos(env);
        self.forget_peers(env);
        self.rest_stores();
        self.watch_disks(env);
        self.slice_stats();
        self.repeat_reports(env);
        self.end_superseded(env);
        self.resume_recovery();
        self.recheck_queues(env);
        self.turn_away_strangers(env);
        self.forget_pgs();
        self.gauge(env);
    }

    fn mesh(&mut self, env: &mut dyn Env, msg: CoreMsg) {
        match msg {
            CoreMsg::Pg(update) => self.pg_update(env, update),
            CoreMsg::PgGone { pg } => self.pg_gone(env, pg),
            CoreMsg::Lease { until } => self.lease_until = until,
            CoreMsg::Identity { session } => {
                self.process = Some(session);
                self.reconsider_all(env);
                self.look_for_strays(env);
            }
            CoreMsg::Settings(settings) => self.decreed.settings = settings,
            CoreMsg::Full { slices } => self.decreed.full = slices,
            CoreMsg::Scrub { pg, depth } => self.scrub(pg, depth),
            CoreMsg::Leavings { slice, pool, leavings } => self.leavings(slice, pool, leavings),
            CoreMsg::OpenSlices { slices } => self.take_slices(env, slices),
            CoreMsg::SlowFrom { slice, us } => self.told_slow_from(slice, us),
            CoreMsg::GiveUp { slice, why, spared } => self.told_to_give_up(env, slice, why, spared),
            CoreMsg::Stop => self.stop(env),
            other => tracing::warn!(?other, "a data core got a message meant for the control core"),
        }
    }

    fn stop(&mut self, env: &mut dyn Env) {
        if self.life == Life::Running {
            let until = env.now().plus_ms(STOP_LIMIT_MS);
            self.life = Life::Draining(until);
            self.refuse_queued(env);
            self.wake_at(env, until);
        }
    }

    /// Moves a stop forward: drained, then stores closed, then told.
    fn step_stop(&mut self, env: &mut dyn Env) {
        if let Life::Draining(until) = self.life
            && (env.now() >= until || (self.ops.len() == 0 && self.subs.len() == 0))
        {
            let until = env.now().plus_ms(CLOSE_LIMIT_MS);
            self.life = Life::Closing(until);
            self.wake_at(env, until);
            for slice in &mut self.slices {
                slice.close(env);
            }
        }
        if let Life::Closing(until) = self.life
            && env.now() >= until
        {
            self.give_up_unclosed(env);
        }
        if matches!(self.life, Life::Closing(_)) && self.slices.iter().all(SliceState::is_closed) {
            self.life = Life::Stopped;
            self.slice_stats();
            self.tell(CoreMsg::Stopped);
            self.drain_outbox(env);
        }
    }
}

impl Service for DataCore {
    fn start(&mut self, env: &mut dyn Env) {
        self.session = SessionId(env.random());
        let token = Token(Key::NONE.tagged(TOKEN_LISTEN));
        match env.listen(self.config.listen, Framing::Frames, token) {
            Ok(addr) => self.tell(CoreMsg::Listening { addr }),
            Err(error) => {
                tracing::error!(listen = %self.config.listen, %error, "data core cannot listen");
                self.tell(CoreMsg::ListenFailed { addr: self.config.listen, error: error.to_string() });
            }
        }
        self.open_slices(env);
        self.housekeeping_at = env.now().plus_ms(TICK_MS);
        self.wake_at(env, self.housekeeping_at);
        self.flush(env);
    }

    fn coming(&self, events: &VecDeque<Event>) {
        self.look_ahead(events);
    }

    fn event(&mut self, env: &mut dyn Env, event: Event) {
        match event {
            Event::DiskDone { disk: _, token, result, op } => self.disk_done(env, token, result, op),
            Event::Frame { conn, frame } => self.frame(env, conn, frame),
            Event::Timer { .. } => self.timer(env),
            Event::Accepted { conn, from, .. } => self.accepted(env, conn, from),
            Event::Connected { conn } => self.connected(env, conn),
            Event::Closed { conn, reason } => self.closed(env, conn, reason),
            Event::Mesh { msg, .. } => match CoreMsg::from_mesh(msg) {
                Ok(msg) => self.mesh(env, msg),
                Err(_) => tracing::warn!("a mesh message is of no known type"),
            },
            Event::Bytes { conn, .. } => env.close(conn, false),
        }
    }

    fn flush(&mut self, env: &mut dyn Env) {
        self.pump_scans(env);
        self.pump_recovery(env);
        self.pump_purges(env);
        self.pump_scrubs(env);
        self.pump_strays(env);
        for _ in 0..FLUSH_ROUNDS {
            self.retry_parked(env);
            if !self.flush_stores(env) {
                break;
            }
        }
        // Whatever the last round left in the stores must not wait for the next packet.
        if self.slices.iter().any(|slice| slice.has_unflushed) {
            self.wake_in(env, 0);
        }
        if self.life != Life::Running {
            self.step_stop(env);
        }
        if self.reports_due {
            self.reports_due = false;
            if let Some(at) = self.send_reports(env) {
                self.wake_at(env, at);
            }
        }
        self.drain_outbox(env);
    }

    fn finished(&self) -> bool {
        self.life == Life::Stopped && self.outbox.is_empty()
    }
}
