//! The block device.
#![no_main]

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drive("blk", bytes));
