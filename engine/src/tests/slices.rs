//! Several slices of one core share its disk queue.

use super::cluster::*;
use super::world::{CoreEnv, DiskMem, Due, World};
use crate::config::{DataCoreConfig, SliceConfig};
use crate::metrics::CoreMetrics;
use crate::planted::Planted;
use crate::slices::SliceLife;
use crate::{CoreMsg, DataCore};
use reactor::*;
use std::sync::Arc;
use store::{DiskPlan, StoreOptions};
use wire::*;

/// Events until everything must have come to an end.
const STEPS_MAX: usize = 100_000;

/// A store whose operation was refused while it had none under way hears of no completion of its own: the
/// other stores' completions have to do.
#[test]
fn a_store_refused_by_the_shared_disk_queue_is_flushed_again() {
    all_open_and_close(0);
}

/// Slices that come while the core runs open beside those that it has; one that it has is refused.
#[test]
fn slices_that_come_later_open_beside_the_others_and_none_comes_twice() {
    all_open_and_close(2);
}

/// A core of four slices, so many of which come when the others are open.
fn all_open_and_close(later: usize) {
    const SLICES: u64 = 4;
    let plan = DiskPlan {
        cluster: CLUSTER,
        disk: DiskUuid(9),
        node: Some(NodeId(1)),
        disk_bytes: 128 << 20,
        slices: (0..SLICES).map(|nth| SliceId(nth + 1)).collect(),
    };
    let layout = plan.layout().unwrap();
    let world = World::new(1);
    let mut disk = DiskMem { bytes: plan.disk_bytes, ..Default::default() };
    for (offset, bytes) in plan.writes().unwrap() {
        for (at, chunk) in bytes.chunks(4096).enumerate() {
            let mut block = vec![0; 4096];
            block[..chunk.len()].copy_from_slice(chunk);
            disk.blocks.insert(offset / 4096 + at as u64, block.into());
        }
    }
    world.borrow_mut().disks.insert(0, disk);
    world.borrow_mut().disk_room = 1;
    let slices = layout.slices.iter().map(|s| SliceConfig { disk: DiskIndex(0), geometry: s.geometry() });
    let mut slices: Vec<SliceConfig> = slices.collect();
    let mut late = slices.split_off(SLICES as usize - later);
    let config = DataCoreConfig {
        cluster: CLUSTER,
        node: NodeId(1),
        listen: addr(0),
        slices: slices.clone(),
        metrics: Arc::new(CoreMetrics::new(&[])),
        store: StoreOptions::default(),
        scrub_bytes_per_second: crate::config::SCRUB_BYTES_PER_SECOND,
        disk_timeout_s: crate::config::DISK_TIMEOUT_S,
        disk_probe_s: crate::config::DISK_PROBE_S,
        planted: Planted::none(),
    };
    let mut env = CoreEnv { world: world.clone(), node: 0, arena: Arena::new(16 << 20).unwrap() };
    let mut core = DataCore::new(config);
    core.start(&mut env);
    let run = |core: &mut DataCore, env: &mut CoreEnv, until: &dyn Fn(&DataCore) -> bool| {
        for _ in 0..STEPS_MAX {
            if until(core) {
                return true;
            }
            let next = world.borrow_mut().queue.pop_first();
            let Some(((at, _), (_, _, due))) = next else { return false };
            world.borrow_mut().now = at;
            let event = match due {
                Due::Event(event) => event,
                Due::Disk(token, mut op) => {
                    let result = world.borrow_mut().perform(0, &mut op);
                    Event::DiskDone { disk: DiskIndex(0), token, result, op }
                }
            };
            core.event(env, event);
            core.flush(env);
        }
        false
    };
    let all = |life: SliceLife| move |core: &DataCore| core.slices.iter().all(|slice| slice.life == life);
    assert!(run(&mut core, &mut env, &all(SliceLife::Open)), "a slice never opens");
    if later > 0 {
        late.push(slices[0]);
        core.event(
            &mut env,
            Event::Mesh { from: CONTROL_CORE, msg: CoreMsg::OpenSlices { slices: late }.into_mesh() },
        );
        core.flush(&mut env);
        assert!(run(&mut core, &mut env, &all(SliceLife::Open)), "a late slice never opens");
        let heard = |world: &World| {
            let opened = world.told.iter().filter_map(|(_, msg)| match msg {
                CoreMsg::SliceOpened { slice, result } => Some((*slice, result.is_ok())),
                _ => None,
            });
            opened.collect::<Vec<_>>()
        };
        let heard = heard(&world.borrow());
        assert_eq!(heard.iter().filter(|(_, fine)| *fine).count() as u64, SLICES, "{heard:?}");
        assert!(heard.contains(&(slices[0].geometry.slice, false)), "the same slice twice: {heard:?}");
        assert_eq!(core.metrics.slices().len() as u64, SLICES);
    }
    core.event(&mut env, Event::Mesh { from: CONTROL_CORE, msg: CoreMsg::Stop.into_mesh() });
    core.flush(&mut env);
    assert!(run(&mut core, &mut env, &all(SliceLife::Closed)), "a slice never closes");
}
