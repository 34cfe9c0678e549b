//! `drystone_fio`: Drystone as an I/O engine of fio, loaded with
//! `--ioengine=external:…/libdrystone_fio.so --cluster=HOST:PORT[,…] --image=NAME`.
//!
//! `layout` holds what is known about fio's memory (facts about its binary interface), `hooks` the C
//! functions that fio calls, `job` what a job does with the client library. Only `layout` and `hooks` know
//! fio; only `job` knows Drystone. A client lives in the job's own thread or process: submission makes no
//! system call, and reaping makes one that submits and waits at once.
//!
//! This room may know `client/native` only. Start reading at `hooks`.

mod hooks;
mod job;
mod layout;

pub use hooks::ioengine;
