//! Configuration space and registers of the PCI transport. Needs `/dev/kvm`, of which any kind will do.
#![no_main]

use dragonball::virtio::testing::targets::drive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drive("pci_config", bytes));
