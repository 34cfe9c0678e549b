//! Payloads of control frames: checked rkyv, so damage must end in an error.
#![no_main]
use libfuzzer_sys::fuzz_target;
use wire::control::{ControlMsg, Hello};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(msg) = ControlMsg::decode(bytes) {
        assert_eq!(ControlMsg::decode(&msg.encode()), Ok(msg));
    }
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }
});
