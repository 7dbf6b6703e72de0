//! The shim as containerd uses it, with a guest that is no virtual machine: `start`, the pod process, the Task API, the
//! streams, and `delete` after a death at any instant.
//!
//! This program is the shim and its test at once: `start` executes its own program, whatever that is called.

#![allow(clippy::unwrap_used, clippy::cognitive_complexity, reason = "a test fails by panicking")]

mod entry;
mod guest;
mod network;
mod node;
mod sizes;
mod tests;

use entry::trial;

fn main() -> std::process::ExitCode {
    entry::enter([tests::all(), sizes::all(), network::all()])
}
