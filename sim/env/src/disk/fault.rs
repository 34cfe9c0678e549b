//! Injected damage of a disk's contents, kept apart from the pristine contents.

use super::{Cell, Data, IntMap, SimDisk};
use std::rc::Rc;
use wire::BLOCK_BYTES;

/// What a read of a damaged block sees, until the block is written again.
#[derive(Clone)]
pub(super) enum Overlay {
    /// An I/O error: a latent sector error.
    Unreadable,
    /// Other bytes than were written.
    Content(Data),
}

/// Damage to data at rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// Reads of the block fail.
    Unreadable,
    /// A few bits have flipped.
    BitRot,
    /// A 512-byte sector of the block reads as zeroes.
    ZeroedSector,
}

/// Damage done by a write. The device reports success.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteFault {
    /// The block never reaches the medium.
    Lost,
    /// The block lands on this one instead.
    Misdirected {
        /// The victim's block number.
        to: u64,
    },
}

/// What a disk held at some moment, as a copy made with `dd` does.
#[derive(Clone)]
pub struct Contents(IntMap<Cell>);

impl SimDisk {
    /// A copy of everything on the disk now.
    pub fn contents(&self) -> Contents {
        Contents(self.visible.clone())
    }

    /// Everything on the disk becomes what it was, durable and undamaged. Nothing may be in flight: the
    /// host is without power.
    pub fn put_back(&mut self, contents: &Contents) {
        self.visible = contents.0.clone();
        self.durable = contents.0.clone();
        self.pending.clear();
        self.overlays.clear();
    }

    /// An empty disk of the same kind takes this one's place. Nothing may be in flight.
    pub fn exchange_for_empty(&mut self) {
        self.put_back(&Contents(IntMap::default()));
    }

    /// Damages a block at rest. False when nothing was ever written there.
    pub fn damage(&mut self, block: u64, damage: Damage) -> bool {
        let Some(data) = self.visible.get(&block).and_then(|cell| cell.data.clone()) else { return false };
        let overlay = match damage {
            Damage::Unreadable => Overlay::Unreadable,
            Damage::BitRot => {
                let mut bytes = data.to_vec();
                for _ in 0..self.rng.between(1, 5) {
                    let bit = self.rng.below(BLOCK_BYTES as u64 * 8) as usize;
                    if let Some(byte) = bytes.get_mut(bit / 8) {
                        *byte ^= 1 << (bit % 8);
                    }
                }
                Overlay::Content(Some(Rc::from(bytes)))
            }
            Damage::ZeroedSector => {
                let mut bytes = data.to_vec();
                let sector = self.rng.below(BLOCK_BYTES as u64 / 512) as usize;
                if let Some(sector) = bytes.chunks_mut(512).nth(sector) {
                    sector.fill(0);
                }
                Overlay::Content(Some(Rc::from(bytes)))
            }
        };
        self.overlays.insert(block, overlay);
        true
    }

    /// The next written block whose second word is `marker` suffers this.
    pub fn arm(&mut self, fault: WriteFault, marker: u64) {
        self.armed = Some((fault, marker));
    }

    /// Whether a write fault waits for its write.
    pub fn is_armed(&self) -> bool {
        self.armed.is_some()
    }

    pub(super) fn misplace(&mut self, fault: WriteFault, block: u64, before: Data, data: Data) {
        self.overlays.insert(block, Overlay::Content(before));
        if let WriteFault::Misdirected { to } = fault
            && to != block
        {
            self.overlays.insert(to, Overlay::Content(data));
        }
    }

    /// Blocks whose second word is `marker` and that have lain still for the last `age` block writes.
    pub fn resting_blocks(&self, marker: u64, age: u64) -> Vec<u64> {
        let young = self.next_seq.saturating_sub(age);
        let mut blocks: Vec<u64> = self
            .visible
            .iter()
            .filter(|(_, cell)| {
                cell.seq < young && cell.data.as_deref().is_some_and(|data| is_marked(data, marker))
            })
            .map(|(block, _)| *block)
            .collect();
        blocks.sort_unstable();
        blocks
    }

    /// All written blocks that have lain still for the last `age` block writes, data or not.
    pub fn resting_blocks_of_any_kind(&self, age: u64) -> Vec<u64> {
        let young = self.next_seq.saturating_sub(age);
        let resting = self.visible.iter().filter(|(_, cell)| cell.seq < young && cell.data.is_some());
        let mut blocks: Vec<u64> = resting.map(|(block, _)| *block).collect();
        blocks.sort_unstable();
        blocks
    }

    /// Damaged blocks that have not been written since.
    pub fn damaged_blocks(&self) -> Vec<u64> {
        self.overlays.keys().copied().collect()
    }

    /// Unreadable blocks read again as what they are: the drive has been exchanged for a copy of itself.
    pub fn lift_unreadable(&mut self) {
        self.overlays.retain(|_, overlay| !matches!(overlay, Overlay::Unreadable));
    }

    /// Lifts every injected fault: damage at rest, armed faults, slowness, one-off errors.
    pub fn heal(&mut self) {
        self.overlays.clear();
        self.armed = None;
        self.slow = (0, 1);
        self.transient_error_ppm = 0;
    }
}

pub(super) fn is_marked(data: &[u8], marker: u64) -> bool {
    data.get(8..16) == Some(&marker.to_le_bytes())
}
