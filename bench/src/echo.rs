//! Yardsticks of the machine: TCP round trips between two processes on the one core, with plain blocking
//! system calls, and checksums. What an operation cannot do without is made of them and of plain fio's
//! operation (`rows::Parts`): no figure can be lower.

#![allow(clippy::disallowed_methods, reason = "the yardstick is plain sockets, without the environment")]

use cli::deadline::Stopwatch;
use cli::error::CliError;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use wire::{BLOCK_BYTES, block_crc};

/// Bytes of a request: about a header.
const REQUEST_BYTES: usize = 128;
/// Largest answer.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Yardstick {
    /// Its name in the file of results.
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    task: Task,
    /// About a quarter of a second of it.
    rounds: u32,
}

#[derive(Clone, Copy, Debug)]
enum Task {
    /// A round trip with so many bytes in the answer.
    RoundTrip(usize),
    /// Checksums of as many blocks as hold so many bytes, which the cache holds too.
    Checksums(usize),
}

/// Round trip with one block.
pub const ROUND_TRIP_4K: &str = "tcp-round-trip-4k";
/// Round trip with a mebibyte.
pub const ROUND_TRIP_1M: &str = "tcp-round-trip-1m";
/// Checksums of one block.
pub const CHECKSUMS_4K: &str = "checksums-4k";
/// Checksums of a mebibyte.
pub const CHECKSUMS_1M: &str = "checksums-1m";

/// All of them.
pub const YARDSTICKS: [Yardstick; 4] = [
    Yardstick {
        name: ROUND_TRIP_4K,
        what: "a TCP round trip between two processes with a block in the answer",
        task: Task::RoundTrip(BLOCK_BYTES),
        rounds: 20_000,
    },
    Yardstick {
        name: ROUND_TRIP_1M,
        what: "a TCP round trip between two processes with a mebibyte in the answer",
        task: Task::RoundTrip(ANSWER_BYTES_MAX),
        rounds: 500,
    },
    Yardstick {
        name: CHECKSUMS_4K,
        what: "a block's checksum",
        task: Task::Checksums(BLOCK_BYTES),
        rounds: 500_000,
    },
    Yardstick {
        name: CHECKSUMS_1M,
        what: "a mebibyte's checksums",
        task: Task::Checksums(ANSWER_BYTES_MAX),
        rounds: 2_000,
    },
];
/// The hidden argument that makes this program the other end.
pub const FLAG: &str = "answer-to";

fn io(what: &str) -> impl FnOnce(std::io::Error) -> CliError {
    let what = what.to_string();
    move |source| CliError::Io { what, source }
}

/// Mean microseconds.
pub fn measure_us(yardstick: &Yardstick) -> Result<f64, CliError> {
    match yardstick.task {
        Task::RoundTrip(answer_bytes) => round_trip_us(answer_bytes, yardstick.rounds),
        Task::Checksums(bytes) => Ok(checksums_us(bytes, yardstick.rounds)),
    }
}

fn checksums_us(bytes: usize, rounds: u32) -> f64 {
    let data: Vec<u8> = (0..bytes).map(|i| (i / 7) as u8).collect();
    let watch = Stopwatch::start();
    for _ in 0..rounds {
        for block in black_box(&data).chunks(BLOCK_BYTES) {
            black_box(block_crc(block));
        }
    }
    watch.elapsed().as_secs_f64() * 1e6 / f64::from(rounds)
}

fn round_trip_us(answer_bytes: usize, rounds: u32) -> Result<f64, CliError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(io("listen for the round trips"))?;
    let address = listener.local_addr().map_err(io("learn the listener's address"))?;
    let program = std::env::current_exe().map_err(io("find this program"))?;
    let mut other = Command::new(program)
        .arg(format!("--{FLAG}"))
        .arg(address.to_string())
        .spawn()
        .map_err(io("start the other end of the round trips"))?;
    let measured = ask(&listener, answer_bytes, rounds);
    // The connection is closed by now, which ends the other process.
    other.wait().map_err(io("wait for the other end of the round trips"))?;
    measured.map_err(io("measure a TCP round trip"))
}

fn ask(listener: &TcpListener, answer_bytes: usize, rounds: u32) -> std::io::Result<f64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let (mut request, mut answer) = ([0u8; REQUEST_BYTES], vec![0u8; answer_bytes]);
    // A request says how long its answer is to be.
    request[..4].copy_from_slice(&(answer_bytes as u32).to_le_bytes());
    let watch = Stopwatch::start();
    for _ in 0..rounds {
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
    }
    Ok(watch.elapsed().as_secs_f64() * 1e6 / f64::from(rounds))
}

/// The other end: answers until the connection is closed.
pub fn answer(to: SocketAddr) -> Result<(), CliError> {
    let serve = || {
        let mut stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        let (mut request, answer) = ([0u8; REQUEST_BYTES], vec![0u8; ANSWER_BYTES_MAX]);
        while stream.read_exact(&mut request).is_ok() {
            let wanted = request.first_chunk().map_or(0, |len| u32::from_le_bytes(*len) as usize);
            stream.write_all(answer.get(..wanted).unwrap_or(&answer))?;
        }
        Ok(())
    };
    serve().map_err(io("answer round trips"))
}
