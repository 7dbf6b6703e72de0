//! A pod's network namespace joined to its virtual machine.
//!
//! Whoever made the pod (a CNI plugin, docker) has put interfaces with addresses and routes into a network namespace. The
//! machine gets a card for each of them, with the same hardware address, and the guest the addresses and routes
//! ([`Scan`]). Between card and interface lies a tap in the namespace: all that the interface receives is redirected to
//! the tap and the other way round, by the traffic control of the kernel (tc-mirred(8)). So the namespace stays as its
//! maker left it, with every packet taken off before its own stack sees it, and no bridge learns addresses.

mod join;
mod loopback;
mod namespace;
mod scan;

pub use join::part;
pub use loopback::Loopback;
pub use namespace::{Namespace, NamespaceId, leave_host};
pub use netlink::News;
pub use scan::{Interface, Neighbour, Route, Scan};

use std::io;
use std::path::PathBuf;

/// Why no pod gets the host's network, and what to do.
pub const HOST_REFUSED: &str =
    "a virtual machine cannot share it; give the pod a network of its own (no hostNetwork, no --net-host)";

/// Why a pod has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The file is gone, or is none of a network namespace.
    #[error("cannot enter the network namespace {path}: check that it was made and is still there")]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pod would take the host's interfaces from the host.
    #[error("{path} is the host's network namespace: {HOST_REFUSED}")]
    OfHost {
        /// Its file.
        path: PathBuf,
    },
    /// Only the first thread of a process decides where others find its network namespace.
    #[error("a thread that is not the process's first cannot move the process to a network namespace of its own")]
    Thread,
    /// The kernel refused a step.
    #[error("cannot {what}")]
    Kernel {
        /// The step.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl NetworkError {
    fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Kernel { what, source }
    }
}
