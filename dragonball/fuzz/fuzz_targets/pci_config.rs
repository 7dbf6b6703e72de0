//! Configuration space and registers of the PCI transport. Needs `/dev/kvm`, of which any kind will do.
#![no_main]

use std::path::Path;

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: assert!(Path::new("/dev/kvm").exists(), "this target needs a /dev/kvm"),
    |bytes: &[u8]| drive("pci_config", bytes)
);
