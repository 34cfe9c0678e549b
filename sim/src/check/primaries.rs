//! One primary per epoch: looks at every sub-operation on the wire.

use reactor::MeshMsg;
use simenv::clock::Nanos;
use simenv::universe::{HostId, Observer};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use wire::{CoreId, Epoch, FrameKind, Header, PgId, SliceId};

/// Who was seen acting as primary.
#[derive(Default)]
pub struct Primaries {
    seen: BTreeMap<(PgId, Epoch), (SliceId, HostId)>,
    /// Sub-operations looked at.
    pub looked_at: u64,
    /// Two primaries of one epoch.
    pub violations: Vec<String>,
}

/// The observer's end of a shared `Primaries`.
pub struct Watcher(pub Rc<RefCell<Primaries>>);

impl Observer for Watcher {
    fn frame_sent(&mut self, at: Nanos, from: HostId, _to: HostId, header: &Header) {
        let is_sub = matches!(
            header.kind,
            FrameKind::SubWrite
                | FrameKind::SubZero
                | FrameKind::SubDelete
                | FrameKind::SubPush
                | FrameKind::SubPurge
                | FrameKind::Activate
        );
        if !is_sub {
            return;
        }
        let mut primaries = self.0.borrow_mut();
        primaries.looked_at += 1;
        let known = *primaries.seen.entry((header.pg, header.epoch)).or_insert((header.primary, from));
        if known != (header.primary, from) {
            let text = format!(
                "{}: PG {} epoch {} has two primaries: slice {} on host {}, and slice {} on host {from}",
                simenv::trace::stamp(at),
                header.pg,
                header.epoch,
                known.0,
                known.1,
                header.primary
            );
            primaries.violations.push(text);
        }
    }

    fn mesh_posted(&mut self, _at: Nanos, _host: HostId, _from: CoreId, _to: CoreId, _msg: &MeshMsg) {}
}
