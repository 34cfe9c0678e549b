//! Raft traffic from other voters and commands from the log: no byte of it may reach the consensus crate
//! unchecked.
#![no_main]
use consensus::codec::{Body, Command, Packet};
use libfuzzer_sys::fuzz_target;
use wire::NodeId;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(packet) = Packet::decode(bytes) {
        assert!(Packet::decode(&packet.encode()).is_ok());
        if let Body::Raft(message) = packet.body {
            let _ = message.into_message(NodeId(1), NodeId(2));
        }
    }
    if let Ok(command) = Command::decode(bytes) {
        assert!(Command::decode(&command.encode()).is_ok());
    }
});
