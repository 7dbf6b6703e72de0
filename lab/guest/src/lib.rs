//! What the lab driver and the command server in the lab machine say to each other.

pub mod wire;
