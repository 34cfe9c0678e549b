//! A yardstick for latency: a TCP round trip between two processes on the one core, with plain blocking
//! system calls. A read at depth 1 cannot be faster than this plus the drive; a write needs two of them.

#![allow(clippy::disallowed_methods, reason = "the yardstick is plain sockets, without the environment")]

use cli::deadline::Stopwatch;
use cli::error::CliError;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

/// Bytes of a request: about a header.
const REQUEST_BYTES: usize = 128;
/// Bytes of an answer: one block.
const ANSWER_BYTES: usize = 4096;
/// Round trips of one measurement: a quarter of a second.
const ROUNDS: u32 = 20_000;
/// The hidden argument that makes this program the other end.
pub const FLAG: &str = "answer-to";

fn io(what: &str) -> impl FnOnce(std::io::Error) -> CliError {
    let what = what.to_string();
    move |source| CliError::Io { what, source }
}

/// Mean microseconds of a round trip of `REQUEST_BYTES` there and `ANSWER_BYTES` back.
pub fn round_trip_us() -> Result<f64, CliError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(io("listen for the round trips"))?;
    let address = listener.local_addr().map_err(io("learn the listener's address"))?;
    let program = std::env::current_exe().map_err(io("find this program"))?;
    let mut other = Command::new(program)
        .arg(format!("--{FLAG}"))
        .arg(address.to_string())
        .spawn()
        .map_err(io("start the other end of the round trips"))?;
    let measured = ask(&listener);
    // The connection is closed by now, which ends the other process.
    other.wait().map_err(io("wait for the other end of the round trips"))?;
    measured.map_err(io("measure a TCP round trip"))
}

fn ask(listener: &TcpListener) -> std::io::Result<f64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let (request, mut answer) = ([0u8; REQUEST_BYTES], [0u8; ANSWER_BYTES]);
    let watch = Stopwatch::start();
    for _ in 0..ROUNDS {
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
    }
    Ok(watch.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS))
}

/// The other end: answers until the connection is closed.
pub fn answer(to: SocketAddr) -> Result<(), CliError> {
    let serve = || {
        let mut stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        let (mut request, answer) = ([0u8; REQUEST_BYTES], [0u8; ANSWER_BYTES]);
        while stream.read_exact(&mut request).is_ok() {
            stream.write_all(&answer)?;
        }
        Ok(())
    };
    serve().map_err(io("answer round trips"))
}
