//! `drystone`, the command, as a library: its program is `main.rs`, its process tests and the benchmark use
//! the same parts to start nodes and run fio.
//!
//! `cmd/` has a file per command: its flags, and what it does. Commands talk to the cluster through
//! `cluster`, print through `output`, and fail with a `CliError`, which becomes a message on standard
//! error and exit code 1 (wrong usage is 2). `config` is the node's configuration, `node/` puts a node
//! together from reactor, transports, engine and control core, `children` starts nodes as child processes,
//! `fio` runs fio on images, `demo` is the demonstration.
//!
//! This room may know all others but `sim` and `bench`. Start reading at `cmd`.

pub mod checkup;
pub mod children;
pub mod cluster;
pub mod cmd;
pub mod config;
pub mod deadline;
pub mod demo;
pub mod disk_status;
pub mod disks;
pub mod doctor;
pub mod error;
pub mod fio;
pub mod health;
pub mod links;
pub mod node;
pub mod output;
pub mod procfs;
pub mod scrape;
pub mod stop;
pub mod transfer;
pub mod units;
