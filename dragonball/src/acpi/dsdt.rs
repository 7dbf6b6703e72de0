//! The differentiated system description: the devices that the guest cannot find by itself.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package,
    PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Hardware, OEM_ID, OEM_REVISION, OEM_TABLE_ID, hotplug};
use crate::irq::{pci_pin, pins};
use crate::memory::layout::{ECAM, PCI_32, Range};
use crate::pci::bus::SLOTS;
use crate::platform::ports;

/// Revision 2 and later have 64-bit integers.
const REVISION: u8 = 6;
const HEADER_SIZE: u32 = 36;

/// The whole table.
pub(super) fn build(hardware: &Hardware) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_SIZE, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Body(Vec::new());
    power_off(&mut aml);
    if let Some(pci) = hardware.pci {
        host_bridge(&mut aml, pci.window_64);
        motherboard_resources(&mut aml);
        if pci.pins {
            pin_routes(&mut aml);
        }
    }
    if hardware.hot_plug {
        let changing = hardware.pci.map_or(0, |pci| pci.changing);
        let slots: Vec<u8> = SLOTS.filter(|slot| changing & 1 << slot != 0).collect();
        hotplug::build(&mut aml, &slots, hardware.vcpus, hardware.vcpus_max);
    }
    panic_device(&mut aml);
    if hardware.uart {
        uart(&mut aml);
    }
    dsdt.append_slice(&aml.0);
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

struct Body(Vec<u8>);

impl AmlSink for Body {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn path(name: &str) -> Path {
    Path::new(name)
}

/// `Name (_S5, Package {5})`: the value that the sleep control register takes to power off (§7.4.2).
fn power_off(aml: &mut Body) {
    Name::new(path("_S5_"), &Package::new(vec![&ports::SLEEP_TYPE_OFF])).to_aml_bytes(aml);
}

/// The PCI host bridge: bus 0 alone, and its windows.
fn host_bridge(aml: &mut Body, window_64: Option<Range>) {
    let buses = AddressSpace::new_bus_number(0_u16, 0_u16);
    let last = |range: Range| range.end() - 1;
    // Both ends lie below 4 GiB.
    let below_4g = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let memory_32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        below_4g(PCI_32.start),
        below_4g(last(PCI_32)),
        None,
    );
    let memory_64 = window_64.map(|window| {
        AddressSpace::new_memory(AddressSpaceCacheable::PreFetchable, true, window.start, last(window), None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &memory_32];
    if let Some(memory_64) = &memory_64 {
        resources.push(memory_64);
    }
    Device::new(
        path("_SB_.PCI0"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(path("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(path("_SEG"), &ZERO),
            &Name::new(path("_BBN"), &ZERO),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CCA"), &ONE),
            &Name::new(path("_CRS"), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(aml);
}

/// `_PRT`: which pin of the IOAPIC each pin of each slot's functions is joined to (§6.2.13). Without it, functions interrupt
/// by message or not at all.
fn pin_routes(aml: &mut Body) {
    const ALL_FUNCTIONS: u32 = 0xffff;
    let mut routes = PackageBuilder::new();
    for slot in SLOTS {
        for pin in 1..=4 {
            let address = u32::from(slot) << 16 | ALL_FUNCTIONS;
            let number = u32::from(pci_pin(slot, pin));
            routes.add_element(&Package::new(vec![&address, &(pin - 1), &ZERO, &number]));
        }
    }
    Scope::new(path("_SB_.PCI0"), vec![&Name::new(path("_PRT"), &routes)]).to_aml_bytes(aml);
}

/// Reserves the configuration space: Linux uses it only when both the memory map and this device say so.
fn motherboard_resources(aml: &mut Body) {
    let below_4g = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let ecam = Memory32Fixed::new(true, below_4g(ECAM.start), below_4g(ECAM.length));
    Device::new(
        path("_SB_.MBRD"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(aml);
}

/// The panic device, by the name that Linux's pvpanic driver knows.
fn panic_device(aml: &mut Body) {
    let port = IO::new(ports::PANIC, ports::PANIC, 1, 1);
    Device::new(
        path("_SB_.PEVT"),
        vec![
            &Name::new(path("_HID"), &"QEMU0001"),
            &Name::new(path("_STA"), &0x0f_u8),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(aml);
}

/// The debug UART: a 16550 at the usual place.
fn uart(aml: &mut Body) {
    let port = IO::new(ports::UART, ports::UART, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, u32::from(pins::UART));
    Device::new(
        path("_SB_.COM1"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0501")),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&port, &interrupt])),
        ],
    )
    .to_aml_bytes(aml);
}
