//! Configuration space, BARs and MSI-X table of a device of the host, by a synthetic one.
#![no_main]

use dragonball::host_device_scene::drive_host_device;
use dragonball::virtio::testing::script::Script;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drive_host_device(Script::new(bytes)));
