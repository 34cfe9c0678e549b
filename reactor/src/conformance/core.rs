//! Scenarios about the loop itself: timers, batches, the mesh, buffers, clock and randomness.

use super::probe::{Actor, Log, check, core, run_for, same};
use super::{Scenario, World};
use crate::buf::IoBuf;
use crate::env::{Env, Event, MESH_RING_MESSAGES, Mono, Token};
use wire::CoreId;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "core: timers come in order and never early", run: timers },
        Scenario { name: "core: one flush after every batch, none without", run: flushes },
        Scenario { name: "core: the mesh keeps order and loses nothing", run: mesh },
        Scenario { name: "core: the mesh refuses unknown cores", run: mesh_unknown },
        Scenario { name: "core: buffers run out and come back", run: buffers },
        Scenario { name: "core: randomness varies", run: randomness },
    ]
}

/// Milliseconds from the start at which timers are set, in the order of setting.
const TIMERS_MS: [u64; 8] = [30, 5, 12, 5, 1, 40, 0, 12];

fn timers(world: &mut dyn World) -> Result<(), String> {
    struct State {
        began: Mono,
        last: Mono,
        log: Log<(u64, u64, bool)>,
    }
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[], move || {
        Actor::new(
            State { began: Mono(0), last: Mono(0), log: seen },
            |state, env| {
                state.began = env.now();
                for (i, ms) in TIMERS_MS.iter().enumerate() {
                    env.set_timer(state.began.plus_ms(*ms), Token(i as u64));
                }
            },
            |state, env, event| {
                if let Event::Timer { token } = event {
                    let forward = env.now() >= state.last;
                    state.last = env.now();
                    state.log.push((token.0, env.now().since(state.began), forward));
                }
            },
        )
    })])?;
    run_for(world, "timers", &log, TIMERS_MS.len())?;
    let mut due: Vec<(u64, u64)> = TIMERS_MS.iter().zip(0..).map(|(ms, i)| (*ms, i)).collect();
    due.sort_unstable();
    let order: Vec<u64> = log.all().iter().map(|(token, ..)| *token).collect();
    same("order of timers", order, due.iter().map(|(_, i)| *i).collect())?;
    for ((token, after_ns, forward), (ms, _)) in log.all().into_iter().zip(due) {
        check(forward, "time went backwards")?;
        check(after_ns >= ms * 1_000_000, format!("timer {token} of {ms} ms came after {after_ns} ns"))?;
    }
    Ok(())
}

fn flushes(world: &mut dyn World) -> Result<(), String> {
    struct State {
        since_flush: usize,
        batches: Log<usize>,
    }
    const TIMERS: u64 = 200;
    let batches = Log::new();
    let seen = batches.clone();
    world.start(vec![core(0, 0, &[], move || Actor {
        state: State { since_flush: 0, batches: seen },
        start: |_, env| {
            for i in 0..TIMERS {
                env.set_timer(env.now().plus_ns(i / 10 * 100_000), Token(i));
            }
        },
        event: |state, _, _| state.since_flush += 1,
        flush: |state, _| {
            state.batches.push(state.since_flush);
            state.since_flush = 0;
        },
    })])?;
    let done = world.run_until(&mut || batches.all().iter().sum::<usize>() >= TIMERS as usize);
    check(done, format!("{} of {TIMERS} events were flushed", batches.all().iter().sum::<usize>()))?;
    check(!batches.all().contains(&0), "a flush without an event")
}

fn mesh(world: &mut dyn World) -> Result<(), String> {
    struct Sender {
        next: u64,
        refused: Log<u64>,
    }
    /// Far more than a ring holds, so that a sender that does not wait meets a full one.
    const MESSAGES: u64 = 8 * MESH_RING_MESSAGES as u64;
    fn fill(state: &mut Sender, env: &mut dyn Env) {
        while state.next < MESSAGES {
            match env.post(CoreId(1), Box::new(state.next)) {
                Ok(()) => state.next += 1,
                Err((_, back)) => {
                    // The message must come back as it was.
                    state.refused.push(back.downcast::<u64>().map_or(u64::MAX, |n| *n ^ state.next));
                    env.set_timer(env.now().plus_ns(200_000), Token(0));
                    return;
                }
            }
        }
    }
    let (got, refused) = (Log::<(u16, u64)>::new(), Log::new());
    let (seen, back) = (got.clone(), refused.clone());
    world.start(vec![
        core(0, 0, &[], move || {
            Actor::new(Sender { next: 0, refused: back }, fill, |state, env, _| fill(state, env))
        }),
        core(0, 1, &[], move || {
            Actor::new(
                seen,
                |_, _| {},
                |seen, _, event| {
                    if let Event::Mesh { from, msg } = event
                        && let Ok(n) = msg.downcast::<u64>()
                    {
                        seen.push((from.0, *n));
                    }
                },
            )
        }),
    ])?;
    run_for(world, "mesh messages", &got, MESSAGES as usize)?;
    let due: Vec<(u16, u64)> = (0..MESSAGES).map(|n| (0, n)).collect();
    check(got.all() == due, "messages were lost, repeated or reordered")?;
    check(refused.all().iter().all(|differs| *differs == 0), "a refused message came back changed")
}

fn mesh_unknown(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[], move || {
        Actor::new(seen, |seen, env| seen.push(env.post(CoreId(77), Box::new(1u64)).is_err()), |_, _, _| {})
    })])?;
    run_for(world, "post", &log, 1)?;
    same("posting to a core that is not there is refused", log.all(), vec![true])
}

fn buffers(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let seen = log.clone();
    let mut plan = core(0, 0, &[], move || {
        Actor::new(
            seen,
            |seen: &mut Log<(usize, bool)>, env| {
                for _ in 0..3 {
                    let mut held: Vec<IoBuf> = Vec::new();
                    while let Ok(buf) = env.alloc(4096) {
                        held.push(buf);
                        if held.len() > 10_000 {
                            break;
                        }
                    }
                    let aligned = held.iter().all(|buf| (buf.as_ptr() as usize).is_multiple_of(4096));
                    seen.push((held.len(), aligned));
                }
            },
            |_, _, _| {},
        )
    });
    plan.arena_bytes = 512 * 1024;
    world.start(vec![plan])?;
    run_for(world, "rounds", &log, 3)?;
    same("blocks in an arena of 512 KiB, three times", log.all(), vec![(128, true); 3])
}

fn randomness(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[], move || {
        Actor::new(
            seen,
            |seen: &mut Log<u64>, env| (0..64).for_each(|_| seen.push(env.random())),
            |_, _, _| {},
        )
    })])?;
    run_for(world, "numbers", &log, 64)?;
    let (mut ones, mut zeroes) = (0u64, u64::MAX);
    for n in log.all() {
        ones |= n;
        zeroes &= n;
    }
    check(ones == u64::MAX && zeroes == 0, "some bit never changes in 64 numbers")
}
