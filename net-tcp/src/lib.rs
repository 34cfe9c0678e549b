//! (net-tcp)
