//! Raft traffic from other voters and commands from the log: no byte of it may reach the consensus crate
//! unchecked.
#![no_main]
use consensus::codec::{Command, Packet};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(packet) = Packet::decode(bytes) {
        assert!(Packet::decode(&packet.encode()).is_ok());
    }
    if let Ok(command) = Command::decode(bytes) {
        assert!(Command::decode(&command.encode()).is_ok());
    }
});
