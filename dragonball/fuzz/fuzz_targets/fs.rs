//! The file system device, on a small directory.
#![no_main]

use std::sync::Once;

use dragonball::virtio::fs::Fs;
use dragonball::virtio::testing::Harness;
use dragonball::virtio::testing::script::{Script, run};
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
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::fs::create_dir(directory.path().join("d")).expect("a directory");
    std::fs::write(directory.path().join("f"), "contents").expect("a file");
    std::os::unix::fs::symlink("f", directory.path().join("l")).expect("a link");
    let fs = Fs::new("fuzz", directory.path()).expect("a device");
    run(&mut Harness::new(fs), Script::new(bytes), |_, script| {
        // The host changes the directory under the guest's feet.
        let (from, to) = if script.byte() & 1 == 0 { ("d", "f") } else { ("f", "l") };
        drop(std::fs::rename(directory.path().join(from), directory.path().join(to)));
    });
});
