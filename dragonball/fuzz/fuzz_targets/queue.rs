//! The ring itself, with the entropy device behind it.
#![no_main]

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drive("queue", bytes));
