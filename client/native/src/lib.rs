//! (drystone)
