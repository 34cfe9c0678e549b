//! (consensus)
