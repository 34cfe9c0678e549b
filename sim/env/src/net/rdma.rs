//! Connections that go on over a queue pair, as `net-rdma` and the verbs specification have it, seen from above.
//!
//! A connection begins on TCP. At some moment its connecting end sends `Switch`, its last frame over TCP, and the other
//! end does so when it sees that. From then on:
//!
//! - **Messages, in order.** One *lands* when it lies in memory of the receiver's core, for which the receiver has
//!   posted a receive; the network card does that, so messages land in a stopped process too, and one that has landed
//!   is there whatever becomes of its sender.
//! - **Credits.** Without one the sender stands still; they come back as late as the protocol allows, and sometimes
//!   later still. The receiver is never not ready.
//! - **Payloads beyond a block** stay in the sender's memory until the receiver has fetched them: with a stopped
//!   sender's help, but not from a dead one or through a broken queue pair. What was not fetched then is lost, with all
//!   behind it. The sender has its memory back when it has heard that it was read.
//! - **A break** takes the queue pair as a whole. What one side has under way may have landed or not, and its sender is
//!   told the same in both cases. A path without answers breaks it after half a second, where TCP waits for long.
//! - **A peer that owes something** and does nothing for five seconds, stopped perhaps, is given up.
//!
//! The TCP connection stays beneath: its end is the connection's end, and comes behind what has landed.

use super::conn::{Conn, Dir, Item, NO_MEMORY_NS, NetAction, Queued};
use super::{BROKEN_PAIR, BROKEN_TIMEOUT};
use crate::clock::{MS, Nanos, SEC, US};
use crate::universe::{Action, Universe};
use reactor::{CloseReason, Framing, IoBuf};
use std::collections::VecDeque;
use wire::{BLOCK_BYTES, CONTROL_CORE};

// What `net-rdma` has.

/// Receives that each side posts: all are its peer's credits in the beginning.
const RECEIVES: u16 = 64;
/// Credits owed are given back when this many have gathered; sooner only with other messages, which is never sure.
const OWED_MAX: u16 = RECEIVES / 2;
/// The last credit is for messages that free something at the peer.
const RESERVED_CREDITS: u16 = 1;
/// Payloads that may wait to be fetched at once.
const WINDOWS: u16 = 32;
/// Payloads up to this travel inside their message.
const SMALL_BYTES: usize = BLOCK_BYTES;
/// A device that gets no acknowledgement gives up after so long.
const UNANSWERED_NS: Nanos = 470 * MS;
/// The peer owes something and does nothing for so long: the connection ends.
const STALL_NS: Nanos = 5 * SEC;
/// How often that is looked at.
const STALL_CHECK_NS: Nanos = 500 * MS;
/// Longest wait until RDMA is offered on a connection on which it could not be before.
const OFFER_LATE_NS: Nanos = 10 * SEC;
/// From one try of something that the path does not let through to the next.
const RETRY_NS: Nanos = 20 * MS;

/// What happens to connections over RDMA.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RdmaAction {
    /// The connecting end may switch.
    Offer { conn: usize },
    /// A payload of this direction has been read.
    Fetched { conn: usize, dir: usize, id: u64 },
    /// The sender of this direction hears that its oldest read payload was read.
    Done { conn: usize, dir: usize },
    /// The sender of this direction gets credits.
    Credits { conn: usize, dir: usize, count: u16 },
    /// This end's device has had no acknowledgement for too long, perhaps.
    Unanswered { conn: usize, end: usize },
    /// This end's peer has done nothing for too long, perhaps.
    Stalled { conn: usize, end: usize },
    /// This end's queue pair breaks.
    Break { conn: usize, end: usize },
}

/// How something in a queue travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Over {
    Tcp,
    /// Over RDMA; its payload, if it is a large one, lies with the sender.
    Rdma,
    /// Landed, and its payload is being read.
    Fetching {
        id: u64,
        since: Nanos,
    },
    /// Landed, and its payload is here.
    Fetched,
}

/// What a direction has once its end has switched.
pub(super) struct Half {
    /// How many at the head of the queue have landed.
    landed: usize,
    /// Of these, large ones whose fetch has not begun.
    unfetched: usize,
    credits: u16,
    /// Receives posted again, which the sender does not know yet.
    owed: u16,
    /// Large payloads that are landed and whose sender has not heard that they were read.
    windows: u16,
    /// The memory of those that were read.
    read: VecDeque<IoBuf>,
    /// Payloads read of which the receiver has not told yet.
    dones: u16,
    next_fetch: u64,
    /// Waits for a link, a peer's power or a stopped process.
    waiting: bool,
    /// The sender's device has been without an acknowledgement since then.
    unanswered: bool,
    /// When the peer or the device last did something for the sender.
    progress: Nanos,
    stall_check: bool,
}

impl Half {
    fn new(now: Nanos) -> Box<Self> {
        Box::new(Self {
            landed: 0,
            unfetched: 0,
            credits: RECEIVES,
            owed: 0,
            windows: 0,
            read: VecDeque::new(),
            dones: 0,
            next_fetch: 0,
            waiting: false,
            unanswered: false,
            progress: now,
            stall_check: false,
        })
    }
}

impl Queued {
    fn is_large(&self) -> bool {
        matches!(&self.item, Item::Frame { payload: Some(payload), .. } if payload.len() > SMALL_BYTES)
    }
}

impl Dir {
    pub(super) fn landed(&self) -> usize {
        self.half.as_ref().map_or(0, |half| half.landed)
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.half.as_ref().is_some_and(|half| half.waiting)
    }

    /// How what is sent now travels.
    pub(super) fn over(&self) -> Over {
        if self.half.is_some() { Over::Rdma } else { Over::Tcp }
    }

    /// Whether the peer owes the sender something.
    fn is_owed(&self) -> bool {
        self.half.as_ref().is_some_and(|half| half.landed < self.queue.len() || half.windows > 0)
    }

    /// Keeps so many, if they can get there without their sender. With `at_most` none there is nobody to get them.
    pub(super) fn cut(&mut self, keep: usize, at_most: usize) {
        let Some(half) = &mut self.half else { return self.queue.truncate(keep) };
        let on_the_wire = half.landed + usize::from(half.credits);
        let keep = if at_most == 0 { 0 } else { keep.max(half.landed).min(on_the_wire) };
        // What was not fetched stays with its sender, and nothing overtakes it.
        let lost = self.queue.iter().position(|queued| {
            matches!(queued.over, Over::Rdma | Over::Fetching { .. }) && queued.is_large()
        });
        self.queue.truncate(lost.map_or(keep, |lost| keep.min(lost)));
        half.landed = half.landed.min(self.queue.len());
        (half.unfetched, half.windows) = (0, 0);
        half.read.clear();
    }
}

impl Conn {
    fn half(&mut self, dir: usize) -> Option<&mut Half> {
        self.dirs.get_mut(dir)?.half.as_deref_mut()
    }
}

impl Universe {
    pub(super) fn rdma_action(&mut self, action: RdmaAction) {
        match action {
            RdmaAction::Offer { conn } => self.rdma_offered(conn),
            RdmaAction::Fetched { conn, dir, id } => self.rdma_fetched(conn, dir, id),
            RdmaAction::Done { conn, dir } => self.rdma_done(conn, dir),
            RdmaAction::Credits { conn, dir, count } => self.rdma_credits(conn, dir, count),
            RdmaAction::Unanswered { conn, end } => self.rdma_check_answers(conn, end),
            RdmaAction::Stalled { conn, end } => self.rdma_check_stall(conn, end),
            RdmaAction::Break { conn, end } => self.rdma_break(conn, end, BROKEN_PAIR),
        }
    }

    fn rdma_at(&mut self, at: Nanos, action: RdmaAction) {
        self.at(at, Action::Net(NetAction::Rdma(action)));
    }

    /// A connection has come to be: it may switch, most often soon. Control cores use TCP.
    pub(super) fn rdma_offer(&mut self, index: usize) {
        if self.net.options.rdma_ppm == 0 {
            return;
        }
        let Some(conn) = self.net.conns.get(&index) else { return };
        let able = conn.ends.iter().flatten().all(|end| {
            let core = self.cores.get(end.core).map(|core| core.id);
            end.framing == Framing::Frames && core.is_some_and(|core| core != CONTROL_CORE)
        });
        if !self.net.rdma_rng.chance(self.net.options.rdma_ppm) || !able {
            return;
        }
        let rng = &mut self.net.rdma_rng;
        let late = if rng.chance(150_000) { rng.below(OFFER_LATE_NS) } else { 0 };
        // Queue pairs are made, and an offer, its answer, a probe and its answer travel.
        let soon = rng.below(MS) + 4 * rng.latency(self.net.options.latency_ns);
        self.rdma_at(self.now + soon + late, RdmaAction::Offer { conn: index });
    }

    fn rdma_offered(&mut self, index: usize) {
        let Some(conn) = self.net.conns.get(&index) else { return };
        let Some((from, to)) = conn.hosts(0) else { return };
        if !conn.ends.iter().flatten().all(|end| end.open && !end.closing) {
            return;
        }
        let stopped = conn.ends.iter().flatten().any(|end| self.is_paused(end.core));
        if stopped || !self.rdma_path(from, to) {
            // Given up, and offered again.
            let pause = 2 * SEC + self.net.rdma_rng.below(2 * SEC);
            return self.rdma_at(self.now + pause, RdmaAction::Offer { conn: index });
        }
        self.rdma_switch(index, 0);
    }

    /// From now on this end sends over RDMA.
    fn rdma_switch(&mut self, index: usize, end: usize) {
        let now = self.now;
        let Some((from, to)) = self.net.conns.get(&index).and_then(|conn| conn.hosts(end)) else { return };
        let delay = self.net.delay(from, to);
        let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(end)) else {
            return;
        };
        line.last_due = line.last_due.max(now + delay);
        let due = line.last_due;
        line.queue.push_back(Queued { item: Item::Switch, bytes: wire::HEADER_BYTES, due, over: Over::Tcp });
        line.half = Some(Half::new(now));
        self.net.counters.switches += u64::from(end == 0);
        self.net_schedule(index, end, due);
    }

    /// The peer of this end sends over RDMA from now on.
    pub(super) fn rdma_peer_switched(&mut self, index: usize, end: usize) {
        let Some(conn) = self.net.conns.get(&index) else { return };
        let first = conn.dirs.get(end).is_some_and(|line| line.half.is_none());
        if first && conn.end(end).is_some_and(|end| end.open && !end.closing) {
            self.rdma_switch(index, end);
        }
    }

    /// Something was put into the queue.
    pub(super) fn rdma_pushed(&mut self, index: usize, end: usize) {
        let now = self.now;
        let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(end)) else {
            return;
        };
        let alone = line.queue.len() == line.landed() + 1;
        let Some(half) = &mut line.half else { return };
        if alone && half.windows == 0 {
            half.progress = now;
        }
        if !std::mem::replace(&mut half.stall_check, true) {
            let at = now + STALL_NS + self.net.rdma_rng.below(STALL_CHECK_NS);
            self.rdma_at(at, RdmaAction::Stalled { conn: index, end });
        }
    }

    /// Whether packets get from one host to another and their answers back.
    fn rdma_path(&self, from: usize, to: usize) -> bool {
        let clear =
            |a, b| !self.net.blocked(a, b) && (a == b || self.net.link(a, b).clogged_until <= self.now);
        let powered = |host: usize| self.hosts.get(host).is_some_and(|host| host.powered);
        clear(from, to) && clear(to, from) && powered(from) && powered(to)
    }

    /// What the queue's turn has come for.
    pub(super) fn rdma_deliver(&mut self, index: usize, dir: usize) {
        if let Some(half) = self.net.conns.get_mut(&index).and_then(|conn| conn.half(dir)) {
            half.waiting = false;
        }
        let again = self.rdma_land(index, dir);
        let retry = self.rdma_take(index, dir);
        let Some(line) = self.net.conns.get(&index).and_then(|conn| conn.dirs.get(dir)) else { return };
        let end = line.queue.front().filter(|head| head.over == Over::Tcp).map(|head| head.due);
        if let Some(at) = [again, retry, end].into_iter().flatten().min() {
            self.net_schedule(index, dir, at.max(self.now));
        }
    }

    /// Brings what is due into the receiver's memory, and says when to look again.
    fn rdma_land(&mut self, index: usize, dir: usize) -> Option<Nanos> {
        let now = self.now;
        loop {
            let conn = self.net.conns.get(&index)?;
            let (from, to) = conn.hosts(dir)?;
            let line = conn.dirs.get(dir)?;
            let head = line.queue.get(line.landed()).filter(|head| head.over == Over::Rdma)?;
            if head.due > now {
                return Some(head.due);
            }
            let (large, there) = (head.is_large(), conn.is_open(1 - dir));
            let receiver = conn.core_of(1 - dir)?;
            let clogged_until = if from == to { 0 } else { self.net.link(from, to).clogged_until };
            if clogged_until > now {
                self.rdma_unanswered(index, dir);
                return Some(clogged_until + self.net.rdma_rng.below(100 * US));
            }
            let answered = self.rdma_path(from, to) && there;
            if !answered {
                self.rdma_unanswered(index, dir);
            }
            let powered = self.hosts.get(to).is_some_and(|host| host.powered);
            let reaches = there && powered && !self.net.blocked(from, to);
            let stopped = self.is_paused(receiver);
            let half = self.net.conns.get_mut(&index)?.half(dir)?;
            if !reaches {
                half.waiting = true;
                return None;
            }
            if half.credits <= RESERVED_CREDITS || (large && half.windows >= WINDOWS) {
                // What comes back sets it going again.
                self.net.counters.without_credits += 1;
                return None;
            }
            half.credits -= 1;
            half.landed += 1;
            if answered {
                half.progress = now;
            }
            if large {
                half.windows += 1;
                half.unfetched += 1;
            } else if stopped {
                // In the receiver's memory, however long it lies there.
                let at = half.landed - 1;
                let line = self.net.conns.get_mut(&index)?.dirs.get_mut(dir)?;
                line.queue.get_mut(at)?.take_from_sender();
            }
        }
    }

    /// The receiver's process looks at what has landed. Says when to try again what there was no memory for.
    fn rdma_take(&mut self, index: usize, dir: usize) -> Option<Nanos> {
        let now = self.now;
        loop {
            let conn = self.net.conns.get_mut(&index)?;
            let receiver = conn.core_of(1 - dir)?;
            let half = conn.half(dir)?;
            let (unfetched, dones) = (half.unfetched, half.dones);
            if half.landed + usize::from(dones) == 0 {
                return None;
            }
            if self.is_alive(receiver) && self.is_paused(receiver) {
                self.net.conns.get_mut(&index)?.half(dir)?.waiting = true;
                return None;
            }
            if dones > 0 {
                self.rdma_tell_done(index, dir, dones);
            }
            if unfetched > 0 {
                self.rdma_fetch(index, dir);
            }
            let conn = self.net.conns.get_mut(&index)?;
            let line = conn.dirs.get_mut(dir)?;
            let half = line.half.as_deref_mut()?;
            let ready = |head: &Queued| match head.over {
                Over::Rdma => !head.is_large(),
                over => over == Over::Fetched,
            };
            if half.landed == 0 || !line.queue.front().is_some_and(ready) {
                return None;
            }
            half.landed -= 1;
            let head = line.queue.pop_front()?;
            if let Some(back) = conn.half(1 - dir) {
                back.progress = now;
            }
            if let Err(item) = self.net_receive(index, 1 - dir, head.item) {
                let line = self.net.conns.get_mut(&index)?.dirs.get_mut(dir)?;
                line.queue.push_front(Queued { item, ..head });
                line.half.as_deref_mut()?.landed += 1;
                return Some(now + NO_MEMORY_NS);
            }
            self.rdma_post_again(index, dir);
        }
    }

    /// The receive of what was taken is posted again, and its credit comes back in time.
    fn rdma_post_again(&mut self, index: usize, dir: usize) {
        let options = self.net.options;
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        let Some((from, to)) = conn.hosts(dir) else { return };
        let Some(half) = conn.half(dir) else { return };
        half.owed += 1;
        if half.owed < OWED_MAX {
            return;
        }
        let count = std::mem::take(&mut half.owed);
        let rng = &mut self.net.rdma_rng;
        let kept = if rng.chance(options.credits_kept_ppm) { rng.below(options.credits_kept_ns) } else { 0 };
        let at = self.now + kept + self.net.delay(to, from);
        self.rdma_at(at, RdmaAction::Credits { conn: index, dir, count });
    }

    fn rdma_credits(&mut self, index: usize, dir: usize, count: u16) {
        let again = RdmaAction::Credits { conn: index, dir, count };
        let Some(half) = self.rdma_heard(index, dir, again) else { return };
        half.credits += count;
        self.rdma_deliver(index, dir);
    }

    fn rdma_done(&mut self, index: usize, dir: usize) {
        let again = RdmaAction::Done { conn: index, dir };
        let Some(half) = self.rdma_heard(index, dir, again) else { return };
        half.read.pop_front();
        half.windows = half.windows.saturating_sub(1);
        self.rdma_deliver(index, dir);
    }

    /// A message for the sender of this direction, if it gets there; otherwise it is tried again.
    fn rdma_heard(&mut self, index: usize, dir: usize, again: RdmaAction) -> Option<&mut Half> {
        let now = self.now;
        let conn = self.net.conns.get(&index)?;
        let (from, to) = conn.hosts(dir)?;
        if !conn.is_open(dir) || !conn.is_open(1 - dir) {
            return None;
        }
        if !self.rdma_path(from, to) {
            self.rdma_unanswered(index, 1 - dir);
            self.rdma_at(now + RETRY_NS, again);
            return None;
        }
        let half = self.net.conns.get_mut(&index)?.half(dir)?;
        half.progress = now;
        Some(half)
    }

    /// Begins to fetch what has landed.
    fn rdma_fetch(&mut self, index: usize, dir: usize) {
        let now = self.now;
        let Some((from, to)) = self.net.conns.get(&index).and_then(|conn| conn.hosts(dir)) else { return };
        let mut begun = Vec::new();
        if let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(dir))
            && let Some(half) = line.half.as_deref_mut()
        {
            for queued in line.queue.iter_mut().take(half.landed) {
                if queued.over == Over::Rdma && queued.is_large() {
                    queued.over = Over::Fetching { id: half.next_fetch, since: now };
                    begun.push(half.next_fetch);
                    half.next_fetch += 1;
                }
            }
            half.unfetched = 0;
        }
        for id in begun {
            let at = now + self.net.delay(to, from) + self.net.delay(from, to);
            self.rdma_at(at, RdmaAction::Fetched { conn: index, dir, id });
        }
    }

    fn rdma_fetched(&mut self, index: usize, dir: usize, id: u64) {
        let now = self.now;
        let Some(conn) = self.net.conns.get(&index) else { return };
        let (Some((from, to)), Some(line)) = (conn.hosts(dir), conn.dirs.get(dir)) else { return };
        let is_it = |queued: &Queued| matches!(queued.over, Over::Fetching { id: this, .. } if this == id);
        let Some(at) = line.queue.iter().take(line.landed()).position(is_it) else { return };
        let Some(Queued { over: Over::Fetching { since, .. }, .. }) = line.queue.get(at) else { return };
        let since = *since;
        if !conn.is_open(1 - dir) {
            return;
        }
        let gone = !conn.is_open(dir);
        if gone || !self.rdma_path(from, to) {
            if gone || now >= since + UNANSWERED_NS {
                self.rdma_break(index, 1 - dir, BROKEN_PAIR);
            } else {
                self.rdma_at(now + RETRY_NS, RdmaAction::Fetched { conn: index, dir, id });
            }
            return;
        }
        self.net.counters.fetches += 1;
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        if let Some(back) = conn.half(1 - dir) {
            back.progress = now;
        }
        if let Some(line) = conn.dirs.get_mut(dir)
            && let Some(queued) = line.queue.get_mut(at)
            && let Some(half) = line.half.as_deref_mut()
        {
            queued.over = Over::Fetched;
            if let Item::Frame { payload: Some(payload), .. } = &queued.item {
                half.read.push_back(payload.clone());
            }
            half.dones += 1;
            if at > 0 {
                // As it is now, however long it waits for those before it.
                queued.take_from_sender();
            }
        }
        self.rdma_deliver(index, dir);
        if let Some(line) = self.net.conns.get_mut(&index).and_then(|conn| conn.dirs.get_mut(dir))
            && let Some(head) = line.queue.front_mut().filter(|head| at == 0 && head.over == Over::Fetched)
        {
            head.take_from_sender();
        }
    }

    fn rdma_tell_done(&mut self, index: usize, dir: usize, count: u16) {
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        let Some((from, to)) = conn.hosts(dir) else { return };
        if let Some(half) = conn.half(dir) {
            half.dones -= count;
        }
        for _ in 0..count {
            let at = self.now + self.net.delay(to, from);
            self.rdma_at(at, RdmaAction::Done { conn: index, dir });
        }
    }

    /// What an end sends is not acknowledged.
    fn rdma_unanswered(&mut self, index: usize, end: usize) {
        let Some(conn) = self.net.conns.get_mut(&index).filter(|conn| conn.is_open(end)) else { return };
        let Some(half) = conn.half(end) else { return };
        if !std::mem::replace(&mut half.unanswered, true) {
            let at = self.now + UNANSWERED_NS + self.net.rdma_rng.below(UNANSWERED_NS / 8);
            self.rdma_at(at, RdmaAction::Unanswered { conn: index, end });
        }
    }

    fn rdma_check_answers(&mut self, index: usize, end: usize) {
        let Some(conn) = self.net.conns.get_mut(&index) else { return };
        let (Some((here, there)), other) = (conn.hosts(end), conn.is_open(1 - end)) else { return };
        let Some(half) = conn.half(end) else { return };
        half.unanswered = false;
        if !other || !self.rdma_path(here, there) {
            self.rdma_break(index, end, BROKEN_PAIR);
        }
    }

    fn rdma_check_stall(&mut self, index: usize, end: usize) {
        let now = self.now;
        let Some(conn) = self.net.conns.get_mut(&index).filter(|conn| conn.is_open(end)) else { return };
        let Some(core) = conn.core_of(end) else { return };
        let Some(line) = conn.dirs.get_mut(end) else { return };
        let owed = line.is_owed();
        let Some(half) = line.half.as_deref_mut() else { return };
        half.stall_check = owed;
        let due = half.progress + STALL_NS;
        if !owed {
            return;
        }
        if due <= now && !self.is_paused(core) {
            self.net.counters.stalls += 1;
            return self.rdma_break(index, end, BROKEN_TIMEOUT);
        }
        let at = due.max(now) + 1 + self.net.rdma_rng.below(STALL_CHECK_NS);
        self.rdma_at(at, RdmaAction::Stalled { conn: index, end });
    }

    /// Something breaks the queue pair of one end; the other's breaks too, or its end of the TCP connection ends.
    pub(super) fn rdma_break_somewhere(&mut self, index: usize) {
        let rng = &mut self.net.rdma_rng;
        let (end, both) = (usize::from(rng.coin()), rng.coin());
        if both {
            let at = self.now + rng.latency(self.net.options.latency_ns);
            self.rdma_at(at, RdmaAction::Break { conn: index, end: 1 - end });
        }
        self.rdma_break(index, end, BROKEN_PAIR);
    }

    /// An end's queue pair is no more, and with it the connection.
    fn rdma_break(&mut self, index: usize, end: usize, reason: CloseReason) {
        let Some(conn) = self.net.conns.get(&index).filter(|conn| conn.is_open(end)) else { return };
        let closing = conn.end(end).is_some_and(|end| end.closing);
        self.net.counters.breaks += 1;
        self.net_cut_queue(index, end, usize::MAX);
        self.net_push_end(index, end, CloseReason::Peer);
        self.net_end(index, end, if closing { CloseReason::Local } else { reason });
    }
}
