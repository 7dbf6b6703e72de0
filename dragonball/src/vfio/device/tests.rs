//! Tests of a function with a synthetic device: what a guest does to it, and what KVM and the host see of that.

use proptest::prelude::*;

use super::super::host::IrqKind;
use super::super::testing::{EXPRESS, FakeKvm, MSI, MSIX, POWER, Synthetic, TABLE, services};
use super::*;
use crate::irq::Message;
use crate::memory::layout::PCI_32;
use crate::pci::windows::Windows;

const GIB: u64 = 1 << 30;
const HIGH: Range = Range { start: 64 * GIB, length: 192 * GIB };
const VIDEO: u64 = 8 * GIB;
/// The parts of the registers around the page of the MSI-X table, video memory, and the memory beside it.
const MAPPED_PARTS: usize = 4;

struct Machine {
    kvm: Arc<FakeKvm>,
    host: Arc<Synthetic>,
    function: Option<VfioFunction>,
    places: Vec<Range>,
    services: Services,
}

impl Machine {
    fn new() -> Self {
        Self::with(Synthetic::new(VIDEO), &Options::default())
    }

    fn with(host: Synthetic, options: &Options) -> Self {
        let (kvm, host) = (Arc::new(FakeKvm::default()), Arc::new(host));
        let candidate = Candidate::new(Arc::clone(&host) as _, options).unwrap();
        let mut windows = Windows::new(PCI_32, Some(HIGH));
        let places = windows.place(&candidate.requests()).unwrap();
        let services = services(&kvm, &[PCI_32, HIGH]);
        let function = VfioFunction::new(candidate, &places, &services).unwrap();
        Self { kvm, host, function: Some(function), places, services }
    }

    fn function(&self) -> &VfioFunction {
        self.function.as_ref().unwrap()
    }

    fn write(&self, register: usize, data: &[u8]) -> bool {
        self.function().write_config(u16::try_from(register).unwrap(), data)
    }

    fn read(&self, register: usize) -> u32 {
        let mut data = [0; 4];
        self.function().read_config(u16::try_from(register).unwrap(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Memory decoding and bus master.
    fn enable(&self) {
        assert!(self.write(4, &[6, 0]));
    }

    /// The same where it has no effect.
    fn enable_in_vain(&self) {
        assert!(!self.write(4, &[6, 0]));
    }

    /// Writes an entry of the MSI-X table as drivers do: the message, then the mask.
    fn set_vector(&self, vector: u64, message: Message, masked: bool) {
        let entry = TABLE.1 + 16 * vector;
        self.function().write_memory(0, entry, &message.address.to_le_bytes());
        self.function().write_memory(0, entry + 8, &message.data.to_le_bytes());
        self.function().write_memory(0, entry + 12, &[u8::from(masked), 0, 0, 0]);
    }
}

fn message(vector: u32) -> Message {
    Message { address: 0xfee0_1000, data: vector }
}

#[test]
fn memory_is_mapped_only_while_the_guest_decodes_it_and_the_device_is_powered() {
    let machine = Machine::new();
    assert_eq!(machine.kvm.shown(), []);
    machine.enable();
    assert_eq!(machine.kvm.shown().len(), MAPPED_PARTS);
    assert_eq!(machine.host.state().config[4], 6);
    machine.write(POWER + 4, &[3, 0]);
    assert_eq!(machine.kvm.shown(), []);
    machine.write(POWER + 4, &[8, 0]);
    assert_eq!(machine.kvm.shown().len(), MAPPED_PARTS);
    machine.write(4, &[0, 0]);
    assert_eq!((machine.kvm.shown(), machine.function().ranges()), (vec![], vec![]));
}

#[test]
fn a_moved_bar_is_unmapped_and_mapped_again_at_its_new_place() {
    let machine = Machine::new();
    machine.enable();
    let video = machine.places[1];
    assert!(machine.kvm.shown().contains(&video));
    let moved = Range { start: video.start + 16 * GIB, ..video };
    // The upper half is written first and last in turn by guests; both must work while decoding is on.
    machine.write(0x14, &(u32::try_from(moved.start & 0xffff_ffff).unwrap()).to_le_bytes());
    machine.write(0x18, &(u32::try_from(moved.start >> 32).unwrap()).to_le_bytes());
    assert!(machine.kvm.shown().contains(&moved) && !machine.kvm.shown().contains(&video));
    assert!(machine.function().ranges().contains(&(1, moved)));
}

#[test]
fn a_bar_that_the_guest_puts_over_its_ram_is_not_decoded() {
    let machine = Machine::new();
    machine.write(0x10, &0x10_0000_u32.to_le_bytes());
    machine.enable();
    let low = |range: &Range| range.start < PCI_32.start;
    assert!(!machine.kvm.shown().iter().any(low) && !machine.function().ranges().iter().any(|(_, range)| low(range)));
}

#[test]
fn two_bars_at_one_place_leave_the_first_one_mapped() {
    let machine = Machine::new();
    let video = machine.places[1];
    machine.write(0x1c, &(u32::try_from(video.start & 0xffff_ffff).unwrap()).to_le_bytes());
    machine.write(0x20, &(u32::try_from(video.start >> 32).unwrap()).to_le_bytes());
    machine.enable();
    assert_eq!(machine.kvm.shown().len(), MAPPED_PARTS - 1);
    machine.write(4, &[0, 0]);
    assert_eq!(machine.kvm.shown(), []);
}

#[test]
fn registers_that_cannot_be_mapped_are_answered_by_the_device() {
    let machine = Machine::new();
    let mut seen = [0; 4];
    machine.function().read_memory(0, 0x9000, &mut seen);
    assert_eq!(seen, [0xff; 4], "not decoded");
    machine.enable();
    machine.function().write_memory(0, 0x8ff0, &[1, 2, 3, 4]);
    machine.function().read_memory(0, 0x8ff0, &mut seen);
    assert_eq!(seen, [1, 2, 3, 4]);
    machine.function().read_memory(0, 1 << 40, &mut seen);
    assert_eq!(seen, [0xff; 4], "behind the end");
}

#[test]
fn an_interrupt_reaches_the_message_that_the_guest_gave_its_vector() {
    let machine = Machine::new();
    machine.enable();
    machine.set_vector(2, message(0x42), false);
    assert!(!machine.host.interrupt(IrqKind::Msix, 2), "MSI-X is off");
    machine.write(MSIX + 2, &[0, 0x80]);
    assert_eq!(machine.host.vectors(IrqKind::Msix), 3, "no more than are in use");
    assert!(machine.host.interrupt(IrqKind::Msix, 2));
    assert_eq!(machine.kvm.delivered(), [message(0x42)]);
    machine.set_vector(5, message(0x45), false);
    assert!(machine.host.interrupt(IrqKind::Msix, 5) && !machine.host.interrupt(IrqKind::Msix, 4));
    assert_eq!(machine.kvm.delivered(), [message(0x45)]);
    machine.write(MSIX + 2, &[0, 0]);
    assert!(!machine.host.interrupt(IrqKind::Msix, 2) && machine.kvm.delivered().is_empty());
}

#[test]
fn a_host_whose_vectors_cannot_be_added_later_gives_all_at_once() {
    let mut host = Synthetic::new(VIDEO);
    host.grows = false;
    let machine = Machine::with(host, &Options::default());
    machine.enable();
    machine.write(MSIX + 2, &[0, 0x80]);
    assert_eq!(machine.host.vectors(IrqKind::Msix), 8);
    for vector in [7, 0] {
        machine.set_vector(u64::from(vector), message(vector), false);
        assert!(machine.host.interrupt(IrqKind::Msix, usize::try_from(vector).unwrap()));
        assert_eq!(machine.kvm.delivered(), [message(vector)]);
    }
}

#[test]
fn many_vectors_change_their_routes_together() {
    let machine = Machine::new();
    machine.enable();
    for vector in 0..8 {
        machine.set_vector(vector, message(0x40), false);
    }
    let before = machine.host.state().settings;
    machine.write(MSIX + 2, &[0, 0x80]);
    assert_eq!((*machine.kvm.changes.lock().unwrap(), machine.host.state().settings), (1, before + 1));
}

#[test]
fn an_interrupt_of_a_masked_vector_is_pending_and_comes_when_it_is_unmasked() {
    let machine = Machine::new();
    machine.enable();
    machine.set_vector(1, message(0x41), false);
    machine.write(MSIX + 2, &[0, 0x80]);
    machine.set_vector(1, message(0x51), true);
    assert!(machine.host.interrupt(IrqKind::Msix, 1));
    assert_eq!(machine.kvm.delivered(), []);
    let mut pending = [0; 8];
    machine.function().read_memory(0, 0x8100, &mut pending);
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    machine.set_vector(1, message(0x51), false);
    assert_eq!(machine.kvm.delivered(), [message(0x51)]);
    machine.write(MSIX + 2, &[0, 0xc0]);
    assert!(machine.host.interrupt(IrqKind::Msix, 1) && machine.kvm.delivered().is_empty(), "all are masked");
    machine.write(MSIX + 2, &[0, 0x80]);
    assert_eq!(machine.kvm.delivered(), [message(0x51)]);
}

#[test]
fn msi_interrupts_by_the_message_in_configuration_space() {
    let machine = Machine::new();
    machine.enable();
    machine.write(MSI + 4, &0xfee0_2000_u32.to_le_bytes());
    machine.write(MSI + 12, &0x4060_u16.to_le_bytes());
    assert!(!machine.host.interrupt(IrqKind::Msi, 0));
    // Four vectors were offered; the guest takes two.
    machine.write(MSI + 2, &[0x11, 0]);
    assert!(machine.host.interrupt(IrqKind::Msi, 1));
    assert_eq!(machine.kvm.delivered(), [Message { address: 0xfee0_2000, data: 0x4061 }]);
    machine.write(MSI + 12, &0x4070_u16.to_le_bytes());
    assert!(machine.host.interrupt(IrqKind::Msi, 0));
    assert_eq!(machine.kvm.delivered(), [Message { address: 0xfee0_2000, data: 0x4070 }]);
    machine.write(MSI + 2, &[0, 0]);
    assert!(!machine.host.interrupt(IrqKind::Msi, 0));
}

#[test]
fn the_guest_sees_sizes_and_capabilities_but_no_port() {
    let machine = Machine::new();
    machine.write(0x14, &[0xff; 8]);
    machine.write(0x24, &[0xff; 4]);
    assert_eq!([machine.read(0x14), machine.read(0x18), machine.read(0x24)], [0xc, 0xffff_fffe, 0]);
    assert_eq!(machine.read(0), 0x20b0_10de);
    assert_eq!([machine.read(0x100), machine.read(0x140)], [0x1400_0000, 0x0001_0001]);
    assert_eq!([machine.read(EXPRESS) & 0xff, machine.read(0xffe) >> 16], [0x10, 0]);
}

#[test]
fn the_device_is_reset_before_the_guest_gets_it_and_after_and_leaves_nothing() {
    let mut machine = Machine::new();
    assert_eq!(machine.host.state().resets, 1);
    machine.enable();
    machine.set_vector(0, message(1), false);
    machine.write(MSIX + 2, &[0, 0x80]);
    assert!(!machine.kvm.is_empty());
    drop(machine.function.take());
    assert!(machine.kvm.is_empty());
    assert_eq!(machine.host.vectors(IrqKind::Msix), 0);
    assert_eq!(machine.host.state().resets, 2);
    assert_eq!(Arc::strong_count(&machine.host), 1);
}

#[test]
fn a_device_interrupts_by_its_pin_while_it_does_not_by_message() {
    let machine = Machine::new();
    assert_eq!(machine.read(0x3c) >> 8 & 0xff, 1, "pin A");
    assert_eq!(machine.host.vectors(IrqKind::Intx), 0, "nobody uses it yet");
    machine.enable();
    assert_eq!(machine.host.vectors(IrqKind::Intx), 1);
    // A guest that listens to what pin A of slot 1 is joined to.
    let (ioapic, pin) = (&machine.services.ioapic, crate::irq::pci_pin(1, 1));
    ioapic.write(0, 0x10 + 2 * u32::from(pin));
    ioapic.write(0x10, 1 << 15 | 0x31);
    assert!(machine.host.interrupt(IrqKind::Intx, 0));
    machine.function().pin().unwrap().take_event();
    assert_eq!(machine.kvm.sent.lock().unwrap().len(), 1);
    assert_eq!(machine.host.state().unmasked, 0);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(machine.host.state().unmasked, 1, "the host lets it interrupt again at the end of the interrupt");

    machine.write(MSIX + 2, &[0, 0x80]);
    assert_eq!((machine.host.vectors(IrqKind::Intx), machine.host.vectors(IrqKind::Msix)), (0, 1));
    machine.write(MSIX + 2, &[0, 0]);
    assert_eq!((machine.host.vectors(IrqKind::Intx), machine.host.vectors(IrqKind::Msix)), (1, 0));
    machine.write(4, &[0, 0]);
    assert_eq!(machine.host.vectors(IrqKind::Intx), 0);
}

#[test]
fn a_device_that_has_left_is_not_changed_by_a_vcpu_that_still_has_it() {
    let machine = Machine::new();
    machine.enable();
    machine.function().retire();
    assert!(machine.kvm.is_empty() && machine.host.state().resets == 2);
    machine.enable_in_vain();
    machine.set_vector(0, message(1), false);
    machine.function().retire();
    assert!(machine.kvm.is_empty());
    let state = machine.host.state();
    assert_eq!((state.config[4], state.resets), (0, 2));
}

#[test]
fn other_devices_see_its_memory_only_where_that_was_asked_for() {
    let iommu = Arc::new(crate::vfio::dma::tests::Noted::default());
    let dma = Arc::new(Dma::new(Arc::clone(&iommu) as _).unwrap());
    let machine = Machine::with(Synthetic::new(VIDEO), &Options { peers: Some(dma), ..Options::default() });
    machine.enable();
    let seen = iommu.maps.lock().unwrap().clone();
    assert_eq!(seen.get(&machine.places[1].start), Some(&VIDEO));
    drop(machine);
    assert!(iommu.maps.lock().unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_the_guest_writes_memory_is_where_its_registers_say_and_nothing_is_left(
        writes in prop::collection::vec((any::<bool>(), 0_u16..0x1000, 0_u64..0x1_0000, any::<u32>(), 0_usize..3), 0..60)
    ) {
        let mut machine = Machine::new();
        for (config, register, offset, value, size) in writes {
            let data = &value.to_le_bytes()[..1 << size];
            if config {
                // Mostly the header, where it matters.
                let register = if register % 4 == 0 { register % 0x100 } else { 0x04 + register % 0x30 };
                machine.function().write_config(register, data);
            } else {
                machine.function().write_memory(0, offset, data);
            }
            let decoded: Vec<_> = machine.function().ranges();
            for shown in machine.kvm.shown() {
                let inside = |(_, range): &(u8, Range)| range.start <= shown.start && shown.end() <= range.end();
                prop_assert!(decoded.iter().any(inside), "{:x?} in {:x?}", shown, decoded);
                prop_assert!(shown.start >= PCI_32.start);
            }
        }
        drop(machine.function.take());
        prop_assert!(machine.kvm.is_empty());
    }
}
