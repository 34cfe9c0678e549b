//! (net-rdma)
