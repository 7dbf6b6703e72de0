//! The socket device, with programs of the host on the other side.
#![no_main]

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drive("vsock", bytes));
