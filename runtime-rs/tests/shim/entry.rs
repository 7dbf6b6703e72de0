//! Where a program begins that is the shim and its tests at once.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

use crate::{guest, node};

/// Is the shim, if a test of this program has started it as that, or else runs the tests.
pub(crate) fn enter(trials: impl IntoIterator<Item = Vec<Trial>>) -> ExitCode {
    if let Some(root) = std::env::var_os(node::ROOT_VARIABLE) {
        return runtime_rs::run(std::env::args_os().skip(1), Path::new(&root), Arc::new(guest::FakeLauncher));
    }
    let mut arguments = Arguments::from_args();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: the shim mounts file systems; run its tests as root");
        return ExitCode::SUCCESS;
    }
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        eprintln!("The tests cannot wait for what they orphan: {error}");
        return ExitCode::FAILURE;
    }
    // Each test waits for all the processes that it orphaned.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials.into_iter().flatten().collect()).exit_code()
}

/// One test with an event loop of its own.
pub(crate) fn trial<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(test())));
        // A test that failed may have left pod processes, which the next one would wait for, and threads that wait for them.
        if outcome.is_err() {
            node::end_orphans();
        }
        runtime.shutdown_background();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(())
    })
}
