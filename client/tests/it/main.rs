//! The client against a cluster that exists only as wire frames: every frame is encoded and decoded, the
//! order of everything is drawn from a seed, and the cluster can be told to misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on shall panic")]

mod admin;
mod allocations;
mod cluster;
mod failover;
mod property;
mod rules;
mod world;
