//! Scenarios about disks.

use super::probe::{Actor, Log, check, core, has_pattern, pattern, run_for, same};
use super::{Scenario, World};
use crate::buf::IoBuf;
use crate::env::{DiskError, DiskIndex, DiskOp, Env, Event, Token};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "disk: what was written is read back", run: write_read },
        Scenario { name: "disk: a fresh disk reads as zeroes and says its size", run: fresh },
        Scenario { name: "disk: ranges beyond the end are refused", run: out_of_range },
        Scenario { name: "disk: the queue is bounded, and everything accepted completes once", run: bounded },
        Scenario { name: "disk: discard leaves the neighbours alone", run: discard },
        Scenario { name: "disk: two disks are two disks", run: two_disks },
    ]
}

const DISK: DiskIndex = DiskIndex(0);
const SIZE_BYTES: u64 = 4 << 20;

/// A buffer with the pattern numbered `seed`.
fn filled(env: &mut dyn Env, seed: u64, len: usize) -> Option<IoBuf> {
    let mut buf = env.alloc(len).ok()?;
    pattern(seed, buf.as_mut_slice()?);
    Some(buf)
}

fn submit(env: &mut dyn Env, disk: DiskIndex, op: Option<DiskOp>, token: u64) -> bool {
    op.is_some_and(|op| env.submit(disk, op, Token(token)).is_ok())
}

fn write(env: &mut dyn Env, offset: u64, seeds: &[u64], durable: bool, token: u64) -> bool {
    let bufs: Option<Vec<IoBuf>> = seeds.iter().map(|seed| filled(env, *seed, 4096)).collect();
    submit(env, DISK, bufs.map(|bufs| DiskOp::Write { offset, bufs, durable }), token)
}

fn read(env: &mut dyn Env, disk: DiskIndex, offset: u64, len: usize, token: u64) -> bool {
    let buf = env.alloc(len).ok();
    submit(env, disk, buf.map(|buf| DiskOp::Read { offset, buf }), token)
}

fn write_read(world: &mut dyn World) -> Result<(), String> {
    /// Writes: where, which patterns in which order, durable.
    const WRITES: [(u64, &[u64], bool); 4] = [
        (0, &[1], false),
        (8192, &[2, 3, 4], true),
        (SIZE_BYTES - 4096, &[5], true),
        (1 << 20, &[6, 7, 8, 9, 10, 11, 12, 13], false),
    ];
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[SIZE_BYTES], move || {
        Actor::new(
            (seen, 0usize),
            |(seen, _), env| {
                for (token, (offset, seeds, durable)) in WRITES.iter().enumerate() {
                    if !write(env, *offset, seeds, *durable, token as u64) {
                        seen.push(format!("write {token} was refused"));
                    }
                }
            },
            |(seen, done), env, event| {
                let Event::DiskDone { token, result, op, .. } = event else { return };
                *done += 1;
                if let Err(error) = result {
                    seen.push(format!("operation {} failed: {error}", token.0));
                }
                match op {
                    DiskOp::Write { bufs, .. } => {
                        let due = WRITES.get(token.0 as usize).map_or(0, |(_, seeds, _)| seeds.len());
                        if bufs.len() != due {
                            seen.push(format!("write {} came back with {} buffers", token.0, bufs.len()));
                        }
                        if *done == WRITES.len() {
                            submit(env, DISK, Some(DiskOp::Flush), 99);
                        }
                    }
                    DiskOp::Flush => {
                        for (i, (offset, seeds, _)) in WRITES.iter().enumerate() {
                            read(env, DISK, *offset, seeds.len() * 4096, 10 + i as u64);
                        }
                    }
                    DiskOp::Read { buf, .. } => {
                        let seeds = WRITES.get(token.0 as usize - 10).map_or(&[][..], |(_, seeds, _)| *seeds);
                        let whole = buf.as_slice().chunks(4096).zip(seeds).all(|(b, s)| has_pattern(*s, b));
                        if !whole || buf.len() != seeds.len() * 4096 {
                            seen.push(format!("read {} brought something else", token.0));
                        }
                    }
                    DiskOp::Discard { .. } => {}
                }
                if *done == 2 * WRITES.len() + 1 {
                    seen.push("end".to_owned());
                }
            },
        )
    })])?;
    run_for(world, "end of writing and reading", &log, 1)?;
    same("what was seen", log.all(), vec!["end".to_owned()])
}

fn fresh(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[SIZE_BYTES], move || {
        Actor::new(
            seen,
            |seen, env| {
                let size = env.disk_info(DISK).map_or(0, |info| info.size_bytes);
                let none = env.disk_info(DiskIndex(1)).is_none();
                seen.push(size == SIZE_BYTES && none);
                read(env, DISK, 0, 65536, 1);
                read(env, DISK, SIZE_BYTES - 65536, 65536, 2);
            },
            |seen, _, event| {
                if let Event::DiskDone { result, op: DiskOp::Read { buf, .. }, .. } = event {
                    seen.push(result.is_ok() && buf.as_slice().iter().all(|byte| *byte == 0));
                }
            },
        )
    })])?;
    run_for(world, "reads", &log, 3)?;
    same("size as asked, no second disk; zeroes at both ends", log.all(), vec![true; 3])
}

fn out_of_range(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[SIZE_BYTES], move || {
        Actor::new(
            seen,
            |_, env| {
                read(env, DISK, SIZE_BYTES, 4096, 0);
                read(env, DISK, SIZE_BYTES - 4096, 8192, 1);
                read(env, DISK, u64::MAX - 4095, 8192, 2);
                write(env, SIZE_BYTES - 4096, &[1, 2], false, 3);
                submit(env, DISK, Some(DiskOp::Discard { offset: SIZE_BYTES, len: 4096 }), 4);
            },
            |seen, _, event| {
                if let Event::DiskDone { token, result, .. } = event {
                    seen.push((token.0, result));
                }
            },
        )
    })])?;
    run_for(world, "refusals", &log, 5)?;
    let mut all = log.all();
    all.sort_by_key(|(token, _)| *token);
    same("outcomes", all, (0..5).map(|token| (token, Err(DiskError::OutOfRange))).collect())
}

fn bounded(world: &mut dyn World) -> Result<(), String> {
    /// More than any environment may take at once.
    const ATTEMPTS: u64 = 65_536;
    let (log, accepted) = (Log::new(), Log::new());
    let (seen, took) = (log.clone(), accepted.clone());
    world.start(vec![core(0, 0, &[SIZE_BYTES], move || {
        Actor::new(
            (seen, took, false),
            |(_, took, _), env| {
                let mut count = 0;
                while count < ATTEMPTS {
                    match env.submit(DISK, DiskOp::Flush, Token(count)) {
                        Ok(()) => count += 1,
                        Err((_, DiskOp::Flush)) => break,
                        Err(_) => count = ATTEMPTS,
                    }
                }
                took.push(count);
            },
            |(seen, took, again), env, event| {
                let Event::DiskDone { token, .. } = event else { return };
                seen.push(token.0);
                // A completion makes room for another.
                if !*again {
                    *again = true;
                    took.push(u64::from(env.submit(DISK, DiskOp::Flush, Token(ATTEMPTS)).is_ok()));
                }
            },
        )
    })])?;
    run_for(world, "a first completion", &accepted, 2)?;
    let counts = accepted.all();
    let first = counts.first().copied().unwrap_or(0);
    check(first > 0 && first < ATTEMPTS, format!("{first} operations were accepted at once"))?;
    same("room after a completion", counts.get(1).copied(), Some(1))?;
    run_for(world, "completions", &log, first as usize + 1)?;
    let mut tokens = log.all();
    tokens.sort_unstable();
    let due: Vec<u64> = (0..first).chain([ATTEMPTS]).collect();
    check(tokens == due, "some operation completed twice or never")
}

fn discard(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[SIZE_BYTES], move || {
        Actor::new(
            seen,
            |_, env| {
                write(env, 0, &[1, 2, 3], true, 0);
            },
            |seen, env, event| {
                let Event::DiskDone { token, result, op, .. } = event else { return };
                match (token.0, op) {
                    (0, _) => {
                        let op = DiskOp::Discard { offset: 4096, len: 4096 };
                        submit(env, DISK, Some(op), 1);
                    }
                    (1, _) => {
                        seen.push(result.is_ok());
                        read(env, DISK, 0, 12288, 2);
                    }
                    (_, DiskOp::Read { buf, .. }) => {
                        let block = |i: usize| buf.as_slice().chunks(4096).nth(i).unwrap_or(&[]);
                        seen.push(result.is_ok() && has_pattern(1, block(0)) && has_pattern(3, block(2)));
                    }
                    _ => seen.push(false),
                }
            },
        )
    })])?;
    run_for(world, "discard and read", &log, 2)?;
    same("discard succeeds; both neighbours are intact", log.all(), vec![true, true])
}

fn two_disks(world: &mut dyn World) -> Result<(), String> {
    let log = Log::new();
    let seen = log.clone();
    world.start(vec![core(0, 0, &[SIZE_BYTES, 2 * SIZE_BYTES], move || {
        Actor::new(
            seen,
            |_, env| {
                write(env, 0, &[7], true, 0);
            },
            |seen, env, event| {
                let Event::DiskDone { token, disk, op, .. } = event else { return };
                if token.0 == 0 {
                    read(env, DiskIndex(0), 0, 4096, 1);
                    read(env, DiskIndex(1), 0, 4096, 2);
                    read(env, DiskIndex(1), SIZE_BYTES, 4096, 3);
                } else if let DiskOp::Read { buf, .. } = op {
                    let written = has_pattern(7, buf.as_slice());
                    seen.push((token.0, disk.0, written));
                }
            },
        )
    })])?;
    run_for(world, "reads", &log, 3)?;
    let mut all = log.all();
    all.sort_unstable();
    same("reads", all, vec![(1, 0, true), (2, 1, false), (3, 1, false)])
}
