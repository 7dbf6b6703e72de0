//! Configuration space, BARs and MSI-X table of a device of the host, by a synthetic one.
#![no_main]

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drive("vfio", bytes));
