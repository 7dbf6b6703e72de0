//! What the pod process does to the host. Every effect is journalled before it happens.

pub mod blocking;
pub mod cgroup;
mod detached;
pub mod fifo;
pub mod files;
pub mod log;
pub mod mount;
pub mod notices;
pub mod share;
