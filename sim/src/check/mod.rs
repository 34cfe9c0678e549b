//! Checkers: what must hold whatever happened.

pub mod history;
pub mod linear;
pub mod primaries;
pub mod replicas;
