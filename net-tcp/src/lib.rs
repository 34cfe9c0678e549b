//! `net-tcp`: connections over kernel TCP, as a `Transport` of the reactor's production loop.
//!
//! `transport` holds one core's listeners and connections, `conn` one connection's life, `recv` cuts the
//! byte stream into frames, `send` gathers queued frames into few system calls, `socket` makes sockets.
//! Everything runs on the core's own ring: one receive and one send outstanding per connection.
//!
//! Payloads land block-aligned in the core's arena (or where `expect` said): copied once from the stream
//! buffer when they are small, received in place when they are large. Payload checksums are the
//! receiver's business; headers are checked here, and a stream that is not ours is closed.
//!
//! This room may know `wire` and `reactor`. Start reading at `transport`.

mod conn;
mod recv;
mod send;
mod socket;
mod transport;

pub use transport::{MAX_CONNECTIONS, TcpTransport};
