//! Yardsticks of the machine: TCP round trips between two processes on the one core, with plain blocking
//! system calls. A read at depth 1 cannot be faster than one with a block in the answer plus the drive, a
//! write needs two of them; and a mebibyte read costs at least one with a mebibyte in the answer.

#![allow(clippy::disallowed_methods, reason = "the yardstick is plain sockets, without the environment")]

use cli::deadline::Stopwatch;
use cli::error::CliError;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

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
    answer_bytes: usize,
    /// About a quarter of a second of round trips.
    rounds: u32,
}

/// All of them.
pub const YARDSTICKS: [Yardstick; 2] = [
    Yardstick {
        name: "tcp-round-trip-4k",
        what: "a TCP round trip with a block in the answer",
        answer_bytes: 4096,
        rounds: 20_000,
    },
    Yardstick {
        name: "tcp-round-trip-1m",
        what: "a TCP round trip with a mebibyte in the answer",
        answer_bytes: ANSWER_BYTES_MAX,
        rounds: 500,
    },
];
/// The hidden argument that makes this program the other end.
pub const FLAG: &str = "answer-to";

fn io(what: &str) -> impl FnOnce(std::io::Error) -> CliError {
    let what = what.to_string();
    move |source| CliError::Io { what, source }
}

/// Mean microseconds of a round trip.
pub fn round_trip_us(yardstick: &Yardstick) -> Result<f64, CliError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(io("listen for the round trips"))?;
    let address = listener.local_addr().map_err(io("learn the listener's address"))?;
    let program = std::env::current_exe().map_err(io("find this program"))?;
    let mut other = Command::new(program)
        .arg(format!("--{FLAG}"))
        .arg(address.to_string())
        .spawn()
        .map_err(io("start the other end of the round trips"))?;
    let measured = ask(&listener, yardstick);
    // The connection is closed by now, which ends the other process.
    other.wait().map_err(io("wait for the other end of the round trips"))?;
    measured.map_err(io("measure a TCP round trip"))
}

fn ask(listener: &TcpListener, yardstick: &Yardstick) -> std::io::Result<f64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let (mut request, mut answer) = ([0u8; REQUEST_BYTES], vec![0u8; yardstick.answer_bytes]);
    // A request says how long its answer is to be.
    request[..4].copy_from_slice(&(yardstick.answer_bytes as u32).to_le_bytes());
    let watch = Stopwatch::start();
    for _ in 0..yardstick.rounds {
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
    }
    Ok(watch.elapsed().as_secs_f64() * 1e6 / f64::from(yardstick.rounds))
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
