//! `reactor`: the environment every state machine of Drystone runs in, and its production backend.
//!
//! `env` holds the traits (Clock, Rng, Timers, Disk, Net, Mesh, Buffers; bundled as `Env`) and the
//! events that come back; `buf` the reference-counted buffers of the per-core arena. Engine, consensus
//! and client see nothing else of the world. `backend` is the production side: one loop per core on a
//! thread pinned by glommio, with its own io_uring. The simulator implements the same traits in `sim/`.
//! `planted` is the switch for deliberate bugs.
//!
//! This room may know `wire` only. Start reading at `env`.

pub mod backend;
pub mod buf;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod env;
mod planted;
mod prefetch;

pub use buf::{Arena, IoBuf, NoBuffers};
pub use env::*;
pub use planted::Planted;
pub use prefetch::{prefetch, prefetch_all};
