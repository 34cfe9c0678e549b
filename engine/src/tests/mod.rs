//! The phases of the protocol, tested with three cores in a small world in memory and a scripted director.

mod cluster;
mod data;
mod disks;
mod failover;
mod origins;
mod peering;
mod priority;
mod random;
mod reach;
mod refusals;
mod returning;
mod scrub;
mod slices;
mod strays;
mod world;
