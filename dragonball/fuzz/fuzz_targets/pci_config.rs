//! Configuration space and registers of the PCI transport. Needs `/dev/kvm`, of which any kind will do.
#![no_main]

use std::sync::LazyLock;

use dragonball::virtio::testing::pci::PciMachine;
use dragonball::virtio::testing::script::Script;
use libfuzzer_sys::fuzz_target;

static MACHINE: LazyLock<PciMachine> = LazyLock::new(|| PciMachine::new().expect("a VM: is there a /dev/kvm?"));

fuzz_target!(|bytes: &[u8]| MACHINE.run(Script::new(bytes)));
