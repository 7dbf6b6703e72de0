//! The file system device, on a small directory.
#![no_main]

use std::sync::Once;

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

/// The most bytes of a file: a guest may fill the host's disk, a fuzzer may not.
const FILE_LIMIT: u64 = 4 << 20;
static LIMIT: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    LIMIT.call_once(|| {
        setrlimit(Resource::RLIMIT_FSIZE, FILE_LIMIT, FILE_LIMIT).expect("a limit");
        // SAFETY: ignoring a signal runs no code.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.expect("a signal");
    });
    drive("fs", bytes);
});
