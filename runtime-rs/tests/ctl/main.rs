//! `kata-ctl` as an administrator runs it, beside pod processes of the real shim whose guests are no virtual machines.
//!
//! The node and the guest are those of the shim's own tests; as there, this program is the shim as well.

#![allow(clippy::unwrap_used, clippy::cognitive_complexity, reason = "a test fails by panicking")]

#[path = "../shim/entry.rs"]
mod entry;
#[path = "../shim/guest.rs"]
mod guest;
#[path = "../shim/node.rs"]
#[allow(dead_code, reason = "the shim's tests use the rest of it")]
mod node;

mod cleanup;
mod ctl;
mod exec;
mod install;
mod installed;
mod metrics;
mod sandboxes;

use entry::trial;

fn main() -> std::process::ExitCode {
    entry::enter([sandboxes::all(), exec::all(), metrics::all(), cleanup::all(), installed::all(), install::all()])
}
