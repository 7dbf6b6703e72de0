//! The balloon, in a guest without a VM.
#![no_main]

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drive("balloon", bytes));
