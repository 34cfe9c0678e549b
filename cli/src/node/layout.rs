//! Which core owns which slice, and on which CPU it runs.

use crate::disks::OwnDisk;
use engine::SliceConfig;
use reactor::DiskIndex;
use reactor::backend::Cpu;
use wire::SliceId;

/// How many data cores to run: what was asked for, else one per CPU, but never more than slices, because
/// a core without a slice would have nothing to do.
pub fn core_count(wanted: Option<u16>, cpus: usize, slices: usize) -> u16 {
    let cores = wanted.map_or(cpus.max(1), usize::from).min(slices.max(1));
    u16::try_from(cores).unwrap_or(u16::MAX)
}

/// The slices of each core. Dealt round, disk by disk, so that every core gets its share of every disk.
pub fn deal(disks: &[OwnDisk], cores: u16) -> Vec<Vec<SliceConfig>> {
    let mut hands: Vec<Vec<SliceConfig>> = (0..cores.max(1)).map(|_| Vec::new()).collect();
    let count = hands.len();
    let mut next = 0;
    for (index, disk) in disks.iter().enumerate() {
        for entry in &disk.superblock.slices {
            let slice = SliceConfig { disk: DiskIndex(index as u16), geometry: entry.geometry() };
            if let Some(hand) = hands.get_mut(next % count) {
                hand.push(slice);
            }
            next += 1;
        }
    }
    hands
}

/// The core that owns a slice.
pub fn owner(hands: &[Vec<SliceConfig>], slice: SliceId) -> u16 {
    let at = hands.iter().position(|hand| hand.iter().any(|own| own.geometry.slice == slice));
    at.and_then(|at| u16::try_from(at).ok()).unwrap_or(0)
}

/// Where each data core runs: on the CPUs named, else on the allowed ones in order when there is one for
/// each, else wherever the kernel wants.
pub fn cpus(named: Option<&[u16]>, allowed: &[usize], cores: u16) -> Vec<Cpu> {
    let cores = usize::from(cores);
    let chosen: Vec<usize> = match named {
        Some(named) => named.iter().map(|cpu| usize::from(*cpu)).collect(),
        None if allowed.len() >= cores => allowed.to_vec(),
        None => Vec::new(),
    };
    (0..cores).map(|core| chosen.get(core).map_or(Cpu::Floating, |cpu| Cpu::Pinned(*cpu))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_core_is_idle_and_none_is_missing() {
        assert_eq!(core_count(None, 8, 4), 4);
        assert_eq!(core_count(None, 2, 4), 2);
        assert_eq!(core_count(Some(3), 2, 4), 3);
        assert_eq!(core_count(None, 2, 0), 1);
        assert_eq!(core_count(Some(9), 2, 4), 4);
    }

    #[test]
    fn cores_are_pinned_only_when_there_is_a_cpu_for_each() {
        assert_eq!(cpus(None, &[0, 1], 2), [Cpu::Pinned(0), Cpu::Pinned(1)]);
        assert_eq!(cpus(None, &[0], 2), [Cpu::Floating, Cpu::Floating]);
        assert_eq!(cpus(Some(&[]), &[0, 1], 2), [Cpu::Floating, Cpu::Floating]);
        assert_eq!(cpus(Some(&[3]), &[0], 1), [Cpu::Pinned(3)]);
    }
}
