//! A hostile driver of the PCI transport: accesses of configuration space and of the registers behind it.

use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::script::Script;
use super::{MEMORY_SIZE, MEMORY_START, memory};
use crate::control;
use crate::irq::router::IrqRouter;
use crate::kvm;
use crate::memory::AddressSpace;
use crate::memory::layout::PCI_32;
use crate::pci::bus::PciBus;
use crate::virtio::device::{GuestMemory, VirtioDevice};
use crate::virtio::pci::{Hardware, REGION_LENGTH, Transport};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// Where the functions are.
const SLOTS: Range<u8> = 1..3;

/// What the guest reads as memory is what an exit would tell it.
fn assert_shown(bus: &PciBus, slot: u8) {
    let Some(shown) = bus.shown_config(slot) else { return };
    let mut registers = [0; 256];
    bus.read_config(u64::from(slot) << 15, &mut registers);
    assert_eq!(shown[..256], registers, "slot {slot}");
}

/// A bus with two functions in a VM without a vCPU. Requests to the devices behind them go nowhere, as in a machine that
/// is ending.
pub struct PciMachine {
    vm: Arc<VmFd>,
    memory: GuestMemory,
}

impl PciMachine {
    /// A VM; `None` where there is no `/dev/kvm`, or one that lacks something.
    #[must_use]
    pub fn new() -> Option<Self> {
        let vm = kvm::create_vm(&kvm::open().ok()?).ok()?;
        let length = usize::try_from(MEMORY_SIZE).expect("a small memory");
        Some(Self { vm, memory: memory(&[(MEMORY_START, length)]) })
    }

    /// Does the accesses of `script`.
    ///
    /// # Panics
    /// When the transport does, or the guest would read other registers as memory than the function has.
    pub fn run(&self, mut script: Script<'_>) {
        let bus = self.bus();
        while !script.is_over() {
            let kind = script.byte();
            let place = script.word();
            let size = 1 << (kind >> 6 & 1 | kind >> 5 & 2).min(3);
            let data: [u8; 8] = script.array();
            let mut seen = [0; 8];
            // A bit of what is around them is part of the test.
            let config = u64::from(place) % (4 << 15);
            let address = PCI_32.start + u64::from(place) % (3 * u64::from(REGION_LENGTH));
            match kind & 3 {
                0 => bus.read_config(config, &mut seen[..size.min(4)]),
                1 => {
                    bus.write_config(config, &data[..size.min(4)]);
                    SLOTS.for_each(|slot| assert_shown(&bus, slot));
                }
                2 => drop(bus.read_memory(address, &mut seen[..size])),
                _ => bus.write_memory(address, &data[..size]),
            }
        }
        // A driver that leaves resets its devices: KVM then watches no doorbell of this run any more.
        for slot in SLOTS {
            bus.write_config(u64::from(slot) << 15 | 4, &[0; 4]);
        }
    }

    fn bus(&self) -> PciBus {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let vsock = Vsock::new(3, &directory.path().join("vsock")).expect("a device");
        let devices: [Box<dyn VirtioDevice>; 2] = [Box::new(Rng::new()), Box::new(vsock)];
        let (control, mailbox) = control::channel().expect("a mailbox");
        drop(mailbox);
        let hardware = Hardware {
            vm: Arc::clone(&self.vm),
            router: Arc::new(IrqRouter::new(Arc::clone(&self.vm))),
            memory: Arc::clone(&self.memory),
            control,
        };
        let bus = PciBus::new(AddressSpace::new(Arc::clone(&self.vm)));
        for (number, device) in (0..).zip(&devices) {
            let address = PCI_32.start + number * u64::from(REGION_LENGTH);
            let address = u32::try_from(address).expect("an address below 4 GiB");
            let transport = Transport::new(hardware.clone(), device.as_ref(), number, address).expect("a transport");
            let slot = bus.free_slot().expect("a slot");
            assert!(bus.add(slot, Arc::new(transport)));
        }
        bus
    }
}
