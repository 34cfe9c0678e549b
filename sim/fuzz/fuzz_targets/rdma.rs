//! What an RDMA connection takes from a peer: offers and the frames that carry them, and messages with any immediate
//! data, length, header and descriptor, between whatever else the connection does.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else { return };
    match first & 3 {
        0 => net_rdma::fuzz::offer_bytes(rest),
        1 => net_rdma::fuzz::negotiation(rest),
        _ => net_rdma::fuzz::link(rest),
    }
});
