//! A peer of the negotiation for RDMA that does not keep to it, over a plain TCP connection.

use crate::error::GuestError;
use net_rdma::{Gid, Offer};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use wire::frame::{LINK_OFFER, LINK_SWITCH};
use wire::{BlockCrcs, FrameKind, HEADER_BYTES, Header, Status, block_crc};

/// An offer that is well made, from an address that nobody has.
fn offer() -> Offer {
    let nobody =
        "198.18.0.99".parse().map_or(Ipv6Addr::UNSPECIFIED, |v4: std::net::Ipv4Addr| v4.to_ipv6_mapped());
    Offer { mtu: 3, reads: 16, receives: 64, qpn: 4711, psn: 1, gid: Gid(nobody.octets()) }
}

pub fn from_nowhere() -> Vec<u8> {
    offer().encode().to_vec()
}

pub fn with_mtu(mtu: u8) -> Vec<u8> {
    Offer { mtu, ..offer() }.encode().to_vec()
}

#[allow(clippy::disallowed_methods, reason = "a stranger's connection, not one of Net")]
fn connect(to: SocketAddr) -> Result<TcpStream, GuestError> {
    let stream = TcpStream::connect(to).map_err(GuestError::io(format!("connect to {to}")))?;
    stream.set_read_timeout(Some(super::system::LIMIT)).map_err(GuestError::io("set a limit"))?;
    Ok(stream)
}

fn send(stream: &mut TcpStream, step: u16, payload: &[u8]) -> Result<(), GuestError> {
    let mut header = Header { blocks: step, ..Header::new(FrameKind::Link, 1) };
    header.payload_len = payload.len() as u32;
    let mut crcs = BlockCrcs::default();
    if !payload.is_empty() {
        crcs.push(block_crc(payload));
    }
    let mut bytes = Vec::new();
    header.encode_into(&crcs, &mut bytes);
    bytes.extend_from_slice(payload);
    stream.write_all(&bytes).map_err(GuestError::io("send a frame"))
}

/// The next frame's header; `None` at the end of the connection.
fn receive(stream: &mut TcpStream) -> Result<Option<Header>, GuestError> {
    let mut bytes = vec![0; HEADER_BYTES];
    if stream.read_exact(&mut bytes).is_err() {
        return Ok(None);
    }
    let refused =
        |error: wire::HeaderError| GuestError::Malformed { what: "a frame".into(), why: error.to_string() };
    let lengths = Header::peek(&bytes).map_err(refused)?;
    bytes.resize(lengths.total(), 0);
    let rest = bytes.get_mut(HEADER_BYTES..).unwrap_or(&mut []);
    stream.read_exact(rest).map_err(GuestError::io("receive a frame"))?;
    Header::decode(&bytes).map(|(header, _)| Some(header)).map_err(refused)
}

/// Whether an offer with this payload is accepted. The connection is gone afterwards.
pub fn answer_to(core: SocketAddr, payload: &[u8]) -> Result<bool, GuestError> {
    let mut stream = connect(core)?;
    send(&mut stream, LINK_OFFER, payload)?;
    let answer = receive(&mut stream)?;
    Ok(answer.is_some_and(|header| header.kind == FrameKind::LinkReply && header.status == Status::Ok))
}

/// Makes an offer from nowhere and goes on as if all were well.
pub fn switch_without_probe(core: SocketAddr) -> Result<(), GuestError> {
    let mut stream = connect(core)?;
    send(&mut stream, LINK_OFFER, &from_nowhere())?;
    receive(&mut stream)?;
    send(&mut stream, LINK_SWITCH, &[])?;
    // Its own switch, or the end: either is fine.
    receive(&mut stream).map(|_| ())
}

/// Switches without ever having offered. True when the connection was ended.
pub fn switch_without_offer(core: SocketAddr) -> Result<bool, GuestError> {
    let mut stream = connect(core)?;
    send(&mut stream, LINK_SWITCH, &[])?;
    Ok(receive(&mut stream)?.is_none())
}
