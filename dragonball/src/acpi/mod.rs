//! The ACPI tables: a hardware-reduced machine with one PCI host bridge.
//!
//! Source: ACPI specification 6.5, chapter 5.

use std::io;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::memory::GuestRam;
use crate::memory::layout::{ACPI, ACPI_SIZE, ECAM, IOAPIC, LOCAL_APIC, Range};
use crate::platform::ports;

mod dsdt;
mod hotplug;

/// Who made the tables: six and eight characters, and a revision of no meaning to the guest.
const OEM_ID: [u8; 6] = *b"TATAMI";
const OEM_TABLE_ID: [u8; 8] = *b"DRAGONBL";
const OEM_REVISION: u32 = 1;

/// Where the root pointer is.
pub(crate) const RSDP: u64 = ACPI;

/// What the tables speak of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hardware {
    /// How many vCPUs; their APIC ids count from 0.
    pub(crate) vcpus: u8,
    /// How many there may ever be; no less.
    pub(crate) vcpus_max: u8,
    /// Whether devices and vCPUs come and go; needs the PCI bus.
    pub(crate) hot_plug: bool,
    /// The PCI bus, if there is one.
    pub(crate) pci: Option<Pci>,
    /// Whether there is a debug UART.
    pub(crate) uart: bool,
}

/// The PCI bus.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pci {
    /// Its 64-bit window, where the address space has room for one.
    pub(crate) window_64: Option<Range>,
    /// Whether it may have functions that interrupt by their pins: devices of the host.
    pub(crate) pins: bool,
    /// The slots that devices can come to and go from, a bit each: a guest pays for each when it boots.
    pub(crate) changing: u32,
}

/// Writes all tables into guest memory.
///
/// # Errors
/// When they need more room than there is.
pub(crate) fn write(ram: &GuestRam, hardware: &Hardware) -> io::Result<()> {
    let tables = build(hardware);
    if u64::try_from(tables.len()).map_err(io::Error::other)? > ACPI_SIZE {
        return Err(io::Error::other("the ACPI tables do not fit their 128 KiB"));
    }
    ram.write(&tables, ACPI)
}

/// Lays the tables out from [`ACPI`] on: the root pointer first, then each table at a multiple of 16 bytes.
fn build(hardware: &Hardware) -> Vec<u8> {
    let mut image = Image { bytes: vec![0; Rsdp::len()] };
    let dsdt = image.add(&dsdt::build(hardware));
    let fadt = image.add(&bytes_of(&fadt(dsdt)));
    let madt = image.add(&bytes_of(&madt(hardware)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if hardware.pci.is_some() {
        xsdt.add_entry(image.add(&bytes_of(&mcfg())));
    }
    let xsdt = image.add(&bytes_of(&xsdt));
    image.bytes[..Rsdp::len()].copy_from_slice(&bytes_of(&Rsdp::new(OEM_ID, xsdt)));
    image.bytes
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and gives its guest-physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        ACPI + offset as u64
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The fixed description: no legacy hardware; power and reset by one port each (§5.2.9, §4.8.3.6 and 4.8.3.7).
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    /// `IAPC_BOOT_ARCH` (§5.2.9.3): neither VGA nor a CMOS clock may be probed; no bit says 8042 or legacy devices.
    const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;
    let port = |number: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(number));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(ports::RESET);
    fadt.reset_value = ports::RESET_VALUE;
    fadt.sleep_control_reg = port(ports::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(ports::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Tatami\0\0").into();
    fadt.finalize()
}

/// The interrupt controllers (§5.2.12).
fn madt(hardware: &Hardware) -> MADT {
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..hardware.vcpus_max {
        let status = if id < hardware.vcpus { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
        madt.add_structure(ProcessorLocalApic::new(id, id, status));
    }
    // The address of the IOAPIC lies below 4 GiB.
    let address = u32::try_from(IOAPIC.start).unwrap_or_default();
    madt.add_structure(IoApic::new(0, address, 0));
    madt
}

/// The PCI configuration space (PCI firmware specification 3.3, §4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests;
