//! `kata-ctl` as an administrator runs it, beside pod processes of the real shim whose guests are no virtual machines.
//!
//! The node and the guest are those of the shim's own tests; as there, this program is the shim as well.

#![allow(clippy::unwrap_used, clippy::cognitive_complexity, reason = "a test fails by panicking")]

#[path = "../shim/guest.rs"]
mod guest;
#[path = "../shim/node.rs"]
#[allow(dead_code, reason = "the shim's tests use the rest of it")]
mod node;

mod cleanup;
mod ctl;
mod install;
mod installed;
mod metrics;
mod sandboxes;

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if let Some(root) = std::env::var_os(node::ROOT_VARIABLE) {
        return runtime_rs::run(std::env::args_os().skip(1), Path::new(&root), Arc::new(guest::FakeLauncher));
    }
    let mut arguments = Arguments::from_args();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: the shim mounts file systems; run its tests as root");
        return ExitCode::SUCCESS;
    }
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    // Each test waits for all the processes that it orphaned.
    arguments.test_threads = Some(1);
    libtest_mimic::run(
        &arguments,
        [sandboxes::all(), metrics::all(), cleanup::all(), installed::all(), install::all()]
            .into_iter()
            .flatten()
            .collect(),
    )
    .exit_code()
}

/// One test with an event loop of its own.
fn trial<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(test())));
        if outcome.is_err() {
            node::end_orphans();
        }
        runtime.shutdown_background();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(())
    })
}
