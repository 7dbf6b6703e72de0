//! PCI configuration space: identity, BARs, and the PM, PCI Express and MSI-X capabilities.
//!
//! Sources: PCI Local Bus Specification 3.0 §6 (header, MSI-X), PCI Express Base Specification 5.0 §7.5 (PM, PCI
//! Express). BARs keep what is written to them: the client, which knows their sizes from the regions, does the sizing.

/// Bytes of configuration space.
pub(crate) const SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const MEMORY: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
const STATUS: usize = 0x06;
const INTERRUPT_PENDING: u8 = 1 << 3;
const CAPABILITY_LIST: u8 = 1 << 4;
const BARS: usize = 0x10;
/// 64 bits, prefetchable.
const MEMORY_64_PREFETCHABLE: u32 = 0xc;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

const PM: usize = 0x60;
const PM_CONTROL: usize = PM + 4;
const EXPRESS: usize = 0x78;
const DEVICE_CONTROL: usize = EXPRESS + 8;
/// In the upper byte of the device control register: start a function-level reset; reads zero.
const START_FLR: u8 = 1 << 7;
const LINK_CONTROL: usize = EXPRESS + 16;
const DEVICE_CONTROL_2: usize = EXPRESS + 40;
const MSIX: usize = 0xc8;
const MSIX_CONTROL: usize = MSIX + 2;

/// Where the MSI-X table and the pending bits lie in BAR0.
const MSIX_TABLE: u32 = 0xb9_0000;
const MSIX_PENDING: u32 = 0xba_0000;

/// What the device says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// PCI vendor.
    pub vendor: u16,
    /// PCI device.
    pub device: u16,
    /// PCI class, subclass and programming interface, 24 bits.
    pub class: u32,
}

impl Default for Identity {
    /// A datacenter GPU that stock drivers' tables and `lspci` know; class 0302, a 3D controller without a display.
    fn default() -> Self {
        Self { vendor: 0x10de, device: 0x20b0, class: 0x03_0200 }
    }
}

/// The bytes, and which of their bits the client may change.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    initial: [u8; SIZE],
}

impl ConfigSpace {
    pub(crate) fn new(identity: Identity, vectors: u16) -> Self {
        let mut space = Self { bytes: [0; SIZE], writable: [0; SIZE], initial: [0; SIZE] };
        space.add_header(identity);
        space.add_power_management();
        space.add_express();
        space.add_msix(vectors);
        space.initial = space.bytes;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    fn add_header(&mut self, identity: Identity) {
        self.put(0, &identity.vendor.to_le_bytes());
        self.put(2, &identity.device.to_le_bytes());
        self.put(STATUS, &[CAPABILITY_LIST]);
        // Revision in the lowest byte.
        self.put(8, &(identity.class << 8 | 0xa1).to_le_bytes());
        for (bar, kind) in [(0, 0), (1, MEMORY_64_PREFETCHABLE), (3, MEMORY_64_PREFETCHABLE)] {
            self.put(BARS + 4 * bar, &u32::to_le_bytes(kind));
        }
        self.put(SUBSYSTEM, &identity.vendor.to_le_bytes());
        self.put(SUBSYSTEM + 2, &0x1463_u16.to_le_bytes());
        self.put(CAPABILITIES, &[0x60]);
        self.put(INTERRUPT_PIN, &[1]);
        self.allow(COMMAND, &(MEMORY | BUS_MASTER | INTX_DISABLE | 1 << 6 | 1 << 8).to_le_bytes());
        self.allow(BARS, &[0xff; 20]);
        for bar in [0, 1, 3] {
            self.allow(BARS + 4 * bar, &[0xf0]);
        }
        self.allow(INTERRUPT_LINE, &[0xff]);
    }

    fn add_power_management(&mut self) {
        // Version 3, no soft reset on leaving D3.
        self.put(PM, &[0x01, 0x78, 0x03, 0x00, 0x08]);
        self.allow(PM_CONTROL, &[0x03]);
    }

    fn add_express(&mut self) {
        self.put(EXPRESS, &[0x10, 0xc8]);
        // Version 2, endpoint.
        self.put(EXPRESS + 2, &0x0002_u16.to_le_bytes());
        // Function-level reset, role-based errors, extended tags, latencies without limit, 256-byte payload.
        self.put(EXPRESS + 4, &0x1000_8fe1_u32.to_le_bytes());
        self.put(DEVICE_CONTROL, &0x2810_u16.to_le_bytes());
        // 16 GT/s, 16 lanes, in capability and status.
        self.put(EXPRESS + 12, &0x0000_0104_u32.to_le_bytes());
        self.put(EXPRESS + 18, &0x1104_u16.to_le_bytes());
        self.allow(DEVICE_CONTROL, &[0xff, 0x7f]);
        self.allow(LINK_CONTROL, &[0xc3]);
        self.allow(DEVICE_CONTROL_2, &[0x1f]);
    }

    fn add_msix(&mut self, vectors: u16) {
        self.put(MSIX, &[0x11, 0]);
        self.put(MSIX_CONTROL, &vectors.saturating_sub(1).to_le_bytes());
        self.put(MSIX + 4, &MSIX_TABLE.to_le_bytes());
        self.put(MSIX + 8, &MSIX_PENDING.to_le_bytes());
        self.allow(MSIX_CONTROL, &[0, 0xc0]);
    }

    /// Reads bytes that all lie in the space.
    pub(crate) fn read(&self, at: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.bytes[at..at + data.len()]);
    }

    /// Writes bytes that all lie in the space, as far as they may be changed; answers whether they ask for a reset.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) -> bool {
        for (index, byte) in (at..).zip(data) {
            self.bytes[index] = self.bytes[index] & !self.writable[index] | byte & self.writable[index];
        }
        let flr = DEVICE_CONTROL + 1;
        flr.checked_sub(at).and_then(|index| data.get(index)).is_some_and(|byte| byte & START_FLR != 0)
    }

    /// As after a reset.
    pub(crate) fn reset(&mut self) {
        self.bytes = self.initial;
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// Whether the BARs answer.
    pub(crate) fn memory(&self) -> bool {
        self.command() & MEMORY != 0
    }

    /// Whether the device may reach guest memory.
    pub(crate) fn bus_master(&self) -> bool {
        self.command() & BUS_MASTER != 0
    }

    /// Whether the line may be raised.
    pub(crate) fn intx(&self) -> bool {
        self.command() & INTX_DISABLE == 0
    }

    /// Says in the status register whether an interrupt is pending, even if the line may not be raised.
    pub(crate) fn set_interrupt_pending(&mut self, pending: bool) {
        let rest = self.bytes[STATUS] & !INTERRUPT_PENDING;
        self.bytes[STATUS] = if pending { rest | INTERRUPT_PENDING } else { rest };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities(space: &ConfigSpace) -> Vec<u8> {
        let mut at = space.bytes[CAPABILITIES];
        let mut found = Vec::new();
        while at != 0 && found.len() < 48 {
            found.push(space.bytes[usize::from(at)]);
            at = space.bytes[usize::from(at) + 1];
        }
        found
    }

    #[test]
    fn the_capability_list_is_pm_express_and_msix() {
        assert_eq!(capabilities(&ConfigSpace::new(Identity::default(), 8)), [0x01, 0x10, 0x11]);
    }

    #[test]
    fn what_identifies_the_device_cannot_be_changed() {
        let mut space = ConfigSpace::new(Identity::default(), 8);
        space.write(0, &[0xff; SIZE]);
        assert_eq!(space.bytes[..4], [0xde, 0x10, 0xb0, 0x20]);
        assert_eq!(space.bytes[8..12], [0xa1, 0x00, 0x02, 0x03]);
        assert_eq!(space.bytes[BARS + 4] & 0xf, 0xc);
        assert_eq!(capabilities(&space), [0x01, 0x10, 0x11]);
        assert_eq!(space.bytes[MSIX_CONTROL], 7);
    }

    #[test]
    fn only_the_flr_bit_asks_for_a_reset_and_it_reads_zero() {
        let mut space = ConfigSpace::new(Identity::default(), 8);
        assert!(!space.write(DEVICE_CONTROL, &[0xff, 0x7f]));
        assert!(space.write(DEVICE_CONTROL, &[0x10, 0xa8]));
        assert!(space.write(DEVICE_CONTROL + 1, &[0x80]));
        assert!(!space.write(DEVICE_CONTROL + 2, &[0xff]));
        assert_eq!(space.bytes[DEVICE_CONTROL + 1] & START_FLR, 0);
    }

    #[test]
    fn a_reset_turns_memory_and_bus_mastering_off() {
        let mut space = ConfigSpace::new(Identity::default(), 8);
        space.write(COMMAND, &6_u16.to_le_bytes());
        assert!(space.memory() && space.bus_master() && space.intx());
        space.reset();
        assert!(!space.memory() && !space.bus_master());
    }
}
