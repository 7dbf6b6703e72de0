//! The Container Runtime Interface, as a kubelet speaks it to containerd.

mod client;
mod forward;
mod log;
mod pod;
mod stream;

pub use client::Cri;
pub use forward::Forwarded;
pub use log::{Line, lines};
pub use pod::{Container, ContainerSpec, Pod, PodSpec};
pub use stream::{Seen, Session};

/// The protocol's messages.
pub use k8s_cri::v1 as api;
