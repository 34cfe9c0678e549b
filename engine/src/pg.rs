//! A placement group as one core sees it: what it promised as a member, and what it knows as primary.
//!
//! `Pg` exists for every PG of which the core owns a member. Its `Primary` part exists exactly while the
//! latest record names one of the core's slices as primary in this very process, and nobody has shown a
//! newer epoch. How records move a PG from one state to the next is in `config_change`; how a primary
//! gets from a record to serving in `activate` and `peering`.

use crate::msg::{Member, PgUpdate};
use crate::origins::Origins;
use crate::priority::Urgency;
use crate::report::PgState;
use crate::slab::Key;
use reactor::{ConnId, Mono};
use std::collections::{BTreeSet, VecDeque};
use wire::{Epoch, Header, NodeId, ObjectId, PgId, SliceId};

/// What one of the core's slices does in a PG.
#[derive(Debug)]
pub(crate) struct LocalMember {
    /// Index into the core's slices.
    pub(crate) at: usize,
    pub(crate) slice: SliceId,
    /// The last epoch a primary has activated here.
    pub(crate) activated: Epoch,
    /// Changes of this PG that the slice's store has not finished, whoever asked for them.
    pub(crate) inflight: u32,
    /// An `Activate` that is answered when `inflight` is zero: only then does a list tell what is durable.
    pub(crate) activating: Option<(ConnId, Header)>,
    /// Which clients' changes it has seen.
    pub(crate) origins: Origins,
}

impl LocalMember {
    pub(crate) fn new(at: usize, slice: SliceId) -> Self {
        Self { at, slice, activated: Epoch(0), inflight: 0, activating: None, origins: Origins::default() }
    }

    /// Nothing of the PG is under way on the slice, and nobody waits for its answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.inflight == 0 && self.activating.is_none()
    }
}

/// A PG on this core.
pub(crate) struct Pg {
    pub(crate) id: PgId,
    /// What the control core said last; `None` before it said anything.
    pub(crate) update: Option<PgUpdate>,
    /// The highest epoch seen, from a record or a primary. Nothing older is obeyed.
    pub(crate) promised: Epoch,
    /// That epoch's primary, as far as known.
    pub(crate) promised_primary: Option<SliceId>,
    pub(crate) locals: Vec<LocalMember>,
    pub(crate) primary: Option<Box<Primary>>,
    /// Client operations that wait for the PG to become active or to reach their epoch.
    pub(crate) queue: VecDeque<Key>,
    /// The epoch under which its primary here has given it away: it is not to serve under that one again.
    pub(crate) gave_away: Epoch,
    /// The control core has said that it is gone; the entry goes when nothing is in flight.
    pub(crate) gone: bool,
}

impl Pg {
    pub(crate) fn new(id: PgId) -> Self {
        Self {
            id,
            update: None,
            promised: Epoch(0),
            promised_primary: None,
            locals: Vec::new(),
            primary: None,
            queue: VecDeque::new(),
            gave_away: Epoch(0),
            gone: false,
        }
    }

    pub(crate) fn local(&self, slice: SliceId) -> Option<&LocalMember> {
        self.locals.iter().find(|local| local.slice == slice)
    }

    pub(crate) fn local_mut(&mut self, slice: SliceId) -> Option<&mut LocalMember> {
        self.locals.iter_mut().find(|local| local.slice == slice)
    }
}

/// The way to a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Link {
    /// Not connected, or not asked yet.
    Down,
    /// `Activate` is under way.
    Activating,
    /// The member obeys this epoch; sub-operations go out.
    Up,
}

/// What the primary knows of a member's objects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Listing {
    /// Nothing: it has to be compared.
    Needed,
    /// It is asked for its digests.
    Digests,
    /// It is asked for objects of the primary's history; the hint after the last of them.
    Looking { from: usize },
    /// The buckets of `mask` differ and have to be listed.
    Differs,
    /// Pages are being asked for; the cursor of the next one.
    Running { cursor: u32 },
    /// Everything it has is compared; what it lacks is being collected from the primary's own list.
    Sweeping { at: usize },
    /// `missing` is all that differs.
    Done,
}

/// Whether a member knows which clients' changes have been made (`origins`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Taught {
    /// Its process is younger than some of them.
    No,
    /// It is being told.
    Sent,
    Yes,
}

/// Another member of a PG, as its primary sees it.
#[derive(Debug)]
pub(crate) struct MemberState {
    pub(crate) slice: SliceId,
    pub(crate) node: NodeId,
    /// Index into the core's peers.
    pub(crate) peer: usize,
    pub(crate) in_sync: bool,
    pub(crate) link: Link,
    pub(crate) listing: Listing,
    /// While comparing: its digests XOR the primary's, without what is known to be missing.
    pub(crate) diff: Vec<u64>,
    /// Objects it is being asked for.
    pub(crate) asked: Vec<ObjectId>,
    /// Digest buckets that are being listed.
    pub(crate) mask: u64,
    /// One bit per entry of the primary's own list, while listing: the member has that object.
    pub(crate) seen: Vec<u64>,
    /// Objects in which it differs from the primary.
    pub(crate) missing: BTreeSet<ObjectId>,
    /// Where background recovery goes on.
    pub(crate) next: Option<ObjectId>,
    /// Background recovery pauses until then after a failure.
    pub(crate) retry_at: Mono,
    /// Its slice has no room for what recovery brings in the background.
    pub(crate) too_full: bool,
    /// It refused something it should have been able to do; reported, a new epoch is due. The flag says
    /// whether its store failed altogether.
    pub(crate) desynced: Option<bool>,
    /// The control core has been told that it is out of reach.
    pub(crate) left_out: bool,
    /// The control core has been told that it has caught up.
    pub(crate) announced: bool,
    pub(crate) taught: Taught,
}

impl MemberState {
    pub(crate) fn new(member: &Member, peer: usize, in_sync: bool) -> Self {
        Self {
            slice: member.slice,
            node: member.node,
            peer,
            in_sync,
            link: Link::Down,
            listing: Listing::Needed,
            diff: Vec::new(),
            asked: Vec::new(),
            mask: 0,
            seen: Vec::new(),
            missing: BTreeSet::new(),
            next: None,
            retry_at: Mono(0),
            too_full: false,
            desynced: None,
            left_out: false,
            announced: false,
            taught: Taught::No,
        }
    }

    /// It holds everything the primary holds, as far as recovery goes, and knows what the primary knows.
    pub(crate) fn is_complete(&self) -> bool {
        self.listing == Listing::Done
            && self.missing.is_empty()
            && self.desynced.is_none()
            && self.taught == Taught::Yes
    }
}

/// How far a primary is under its record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Its own earlier changes must be durable before its own list counts.
    Settling,
    /// Members are asked to promise the epoch.
    Activating,
    /// The own objects are listed, in buckets in which a member differs.
    Scanning { cursor: u32 },
    /// Members are compared.
    Comparing,
    /// Serving.
    Active,
}

/// A PG whose primary is on this core.
pub(crate) struct Primary {
    /// Index into the core's slices.
    pub(crate) at: usize,
    pub(crate) slice: SliceId,
    pub(crate) epoch: Epoch,
    pub(crate) phase: Phase,
    /// It has been active under this epoch or one that leads contiguously to it.
    pub(crate) served: bool,
    /// A member has shown a newer epoch: nothing more is started under this one.
    pub(crate) superseded: bool,
    /// Ticks since then.
    pub(crate) superseded_ticks: u32,
    /// The other acting members; their order gives the bits of `Op::pending`.
    pub(crate) members: Vec<MemberState>,
    /// Own objects in order, while listing.
    pub(crate) own: Vec<ObjectId>,
    /// Own objects that changed last, once they are wanted for comparing.
    pub(crate) hints: Option<Vec<ObjectId>>,
    /// What was last told to the control core, and when.
    pub(crate) reported: Option<(PgState, Epoch, u64, u64)>,
    pub(crate) reported_at: Mono,
    /// Whether a report waits for its interval.
    pub(crate) report_due: bool,
    /// In the core's round of PGs with something to recover, and in which queue.
    pub(crate) in_recovery: Option<Urgency>,
    /// In the core's list of PGs with tombstones to purge.
    pub(crate) in_purging: bool,
}

impl Primary {
    pub(crate) fn member_index(&self, slice: SliceId) -> Option<usize> {
        self.members.iter().position(|member| member.slice == slice)
    }

    pub(crate) fn member(&self, slice: SliceId) -> Option<&MemberState> {
        self.members.iter().find(|member| member.slice == slice)
    }

    /// Bits of all other members.
    pub(crate) fn all_members(&self) -> u32 {
        (1u32 << self.members.len().min(crate::op::MEMBERS_MAX)) - 1
    }

    /// Bits of the members that lack `object`.
    pub(crate) fn lacking(&self, object: ObjectId) -> u32 {
        let mut bits = 0;
        for (at, member) in self.members.iter().enumerate() {
            if !member.missing.is_empty() && member.missing.contains(&object) {
                bits |= 1 << at;
            }
        }
        bits
    }

    /// Of these members, the ones that could become primary.
    pub(crate) fn in_sync_of(&self, bits: u32) -> u32 {
        let in_sync = self.members.iter().enumerate().filter(|(_, member)| member.in_sync);
        in_sync.fold(0, |found, (at, _)| found | 1 << at) & bits
    }

    /// Object copies still to be recovered.
    pub(crate) fn missing(&self) -> u64 {
        self.members.iter().map(|member| member.missing.len() as u64).sum()
    }
}
