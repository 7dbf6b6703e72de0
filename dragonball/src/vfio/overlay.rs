//! What the guest sees of a device's configuration space: the device's own registers, overlaid by ours.
//!
//! The overlay is data. For each bit of the space it holds whether reads give our value or the device's, whether the
//! guest may write our value, and whether writes reach the device. [`HEADER`] says so for the header; [`visible`] and
//! [`visible_extended`] say which capabilities a guest gets; everything else belongs to the device.
//!
//! What is ours and why: base addresses (the guest's addresses are not the host's); interrupts by message (theirs is a
//! vector of the host); the links between capabilities, because some are hidden: those that concern other functions, the
//! IOMMU, or the size of BARs. I/O ports are hidden because the machine has no window for them, and the expansion ROM
//! because no firmware runs here that would start it; a driver that wants it finds it through the device's registers.
//! Source: PCI Local Bus Specification 3.0, chapter 6; PCI Express Base Specification 5.0, chapter 7.

use super::capabilities::{
    CONVENTIONAL, Capability, EXTENDED, POINTER, conventional, extended, extended_id, id, msi_length,
};
use super::host::BARS;
use crate::irq::Message;
use crate::pci::windows::BarRequest;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const COMMAND_MEMORY: u8 = 1 << 1;
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 1 << 7;
pub(super) const BAR_REGISTERS: usize = 0x10;
const INTERRUPT_PIN: usize = 0x3d;
/// Pin D; A is 1, and 0 is none.
const LAST_PIN: u8 = 4;

/// What happens to the bits of a 32-bit register. What is none of the three can be read from the device.
struct Register {
    offset: usize,
    /// Reads give our value.
    ours: u32,
    /// The guest writes our value.
    writable: u32,
    /// Writes reach the device.
    forwarded: u32,
}

const fn register(offset: usize, ours: u32, writable: u32, forwarded: u32) -> Register {
    Register { offset, ours, writable, forwarded }
}

/// The header of type 0.
const HEADER: [Register; 16] = [
    // Vendor and device.
    register(0x00, 0, 0, 0),
    // Command: no I/O ports; memory decoding is ours and the device's; bus master, parity, SERR and INTx disable are the
    // device's. Status: whether there are capabilities is ours, the errors are cleared by writing ones.
    register(0x04, 0x0010_0003, 0x0000_0002, 0xf900_0546),
    // Revision and class.
    register(0x08, 0, 0, 0),
    // Cache line size and latency are the device's; header type and self test are ours.
    register(0x0c, 0xffff_0000, 0, 0x0000_ffff),
    // Base addresses; their writable bits follow from their sizes.
    register(0x10, !0, 0, 0),
    register(0x14, !0, 0, 0),
    register(0x18, !0, 0, 0),
    register(0x1c, !0, 0, 0),
    register(0x20, !0, 0, 0),
    register(0x24, !0, 0, 0),
    // CardBus; subsystem.
    register(0x28, 0, 0, 0),
    register(0x2c, 0, 0, 0),
    // Expansion ROM: hidden.
    register(0x30, !0, 0, 0),
    // First capability.
    register(0x34, 0xff, 0, 0),
    register(0x38, 0, 0, 0),
    // Interrupt line is the guest's note, interrupt pin ours.
    register(0x3c, 0xffff, 0xff, 0),
];

/// Whether the guest gets a capability of the first list. One that lays BARs out differently (Enhanced Allocation) would
/// contradict ours.
fn visible(capability: &Capability, interrupts: Interrupts) -> bool {
    const ENHANCED_ALLOCATION: u8 = 0x14;
    match u8::try_from(capability.id) {
        Ok(id::MSI) => interrupts.msi > 0,
        Ok(id::MSIX) => interrupts.msix > 0,
        Ok(ENHANCED_ALLOCATION) => false,
        _ => true,
    }
}

/// Whether the guest gets a capability of the list of PCI Express.
fn visible_extended(capability: &Capability) -> bool {
    const HIDDEN: [u16; 8] = [
        extended_id::ROUTING,
        extended_id::TRANSLATION,
        extended_id::VIRTUAL_FUNCTIONS,
        extended_id::PAGE_REQUESTS,
        extended_id::RESIZABLE_BAR,
        extended_id::PROCESS_ADDRESS_SPACES,
        extended_id::PRECISION_TIME,
        extended_id::RESIZABLE_BAR_OF_VIRTUAL_FUNCTIONS,
    ];
    !HIDDEN.contains(&capability.id)
}

/// How many interrupts of each kind can be passed on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Interrupts {
    pub(super) intx: u32,
    pub(super) msi: u32,
    pub(super) msix: u32,
}

/// Where an MSI capability has its registers.
#[derive(Clone, Copy, Debug)]
struct MsiLayout {
    offset: usize,
    wide: bool,
    maskable: bool,
}

/// Where MSI-X has its table and its pending bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct MsixLayout {
    offset: usize,
    /// 1 to 2048.
    pub(super) vectors: u16,
    /// BAR and offset of the table.
    pub(super) table: (usize, u64),
    /// BAR and offset of the pending bits.
    pub(super) pending: (usize, u64),
}

/// What the guest programmed for MSI.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Msi {
    pub(super) enabled: bool,
    /// The message of each vector; nothing for a masked one.
    pub(super) vectors: Vec<Option<Message>>,
}

/// What the guest programmed for MSI-X beside its table.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct MsixControl {
    pub(super) enabled: bool,
    pub(super) masked: bool,
}

/// The overlay.
#[derive(Clone, Debug)]
pub(super) struct Overlay {
    /// Our values. Where the device's are shown, what they were at the beginning.
    values: Vec<u8>,
    ours: Vec<u8>,
    writable: Vec<u8>,
    forwarded: Vec<u8>,
    msi: Option<MsiLayout>,
    msix: Option<MsixLayout>,
    /// The power state register.
    power: Option<usize>,
    low_power: bool,
}

impl Overlay {
    /// Lays an overlay over the configuration space that a device had after its reset: 256 or 4096 bytes. `clique` is the
    /// number of the NVIDIA devices that may access each other's memory.
    pub(super) fn new(mut bytes: Vec<u8>, interrupts: Interrupts, clique: Option<u8>) -> Self {
        let size = if bytes.len() < EXTENDED { CONVENTIONAL } else { EXTENDED };
        bytes.resize(size, 0);
        let (first, second) = (conventional(&bytes), extended(&bytes));
        let mut overlay = Self {
            ours: vec![0; size],
            writable: vec![0; size],
            forwarded: vec![0xff; size],
            values: bytes,
            msi: None,
            msix: None,
            power: None,
            low_power: false,
        };
        let pin = overlay.values[INTERRUPT_PIN];
        for register in &HEADER {
            overlay.apply(register);
        }
        overlay.values[HEADER_TYPE] = 0;
        overlay.values[INTERRUPT_PIN] = if interrupts.intx > 0 && pin <= LAST_PIN { pin } else { 0 };
        overlay.link(&first, interrupts, clique);
        overlay.link_extended(&second);
        overlay
    }

    fn apply(&mut self, register: &Register) {
        let span = register.offset..register.offset + 4;
        self.ours[span.clone()].copy_from_slice(&register.ours.to_le_bytes());
        self.writable[span.clone()].copy_from_slice(&register.writable.to_le_bytes());
        self.forwarded[span.clone()].copy_from_slice(&register.forwarded.to_le_bytes());
        for (value, ours) in self.values[span].iter_mut().zip(register.ours.to_le_bytes()) {
            *value &= !ours;
        }
    }

    /// Makes a byte ours: `value`, of which the guest may write the bits of `writable`.
    fn set(&mut self, offset: usize, value: u8, writable: u8) {
        self.values[offset] = value;
        self.ours[offset] = 0xff;
        self.writable[offset] = writable;
        self.forwarded[offset] = 0;
    }

    fn hide(&mut self, capability: &Capability) {
        (capability.offset..capability.end).for_each(|offset| self.set(offset, 0, 0));
    }

    fn half(&self, offset: usize) -> u16 {
        self.values.get(offset..offset + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn word(&self, offset: usize) -> u32 {
        u32::from(self.half(offset)) | u32::from(self.half(offset + 2)) << 16
    }

    /// Links the capabilities that the guest gets, ours among them.
    fn link(&mut self, all: &[Capability], interrupts: Interrupts, clique: Option<u8>) {
        let mut link = POINTER;
        if let Some(offset) = clique.and_then(|clique| self.add_clique(all, clique)) {
            link = self.link_to(link, offset);
        }
        for capability in all {
            if !visible(capability, interrupts) {
                self.hide(capability);
                continue;
            }
            link = self.link_to(link, capability.offset);
            let offset = capability.offset;
            match u8::try_from(capability.id) {
                Ok(id::POWER) => self.power = Some(offset + 4),
                Ok(id::MSI) => self.take_msi(offset, interrupts.msi),
                Ok(id::MSIX) => self.take_msix(offset, interrupts.msix),
                _ => {}
            }
        }
        self.set(link, 0, 0);
        if self.values[POINTER] != 0 {
            self.values[STATUS] |= STATUS_CAPABILITIES;
        }
    }

    /// Writes a link of the first list and gives where the next one goes.
    fn link_to(&mut self, link: usize, offset: usize) -> usize {
        // Capabilities of the first list lie in the first 256 bytes.
        self.set(link, u8::try_from(offset).unwrap_or_default(), 0);
        offset + 1
    }

    /// NVIDIA's capability for devices that may access each other's memory: the guest's driver enables that among those
    /// of one clique only. It goes where QEMU puts it, because that is where the driver has met it.
    fn add_clique(&mut self, all: &[Capability], clique: u8) -> Option<usize> {
        const LENGTH: usize = 8;
        const PLACES: [usize; 2] = [0xc8, 0xd4];
        let is_free = |place: &usize| all.iter().all(|one| one.end <= *place || place + LENGTH <= one.offset);
        let mut places = PLACES.into_iter().chain((0x40..CONVENTIONAL - LENGTH).step_by(4));
        let place = places.find(is_free)?;
        let bytes = [id::VENDOR, 0, 8, b'P', b'2', b'P', (clique & 0xf) << 3, 0];
        bytes.into_iter().zip(place..).for_each(|(value, offset)| self.set(offset, value, 0));
        Some(place)
    }

    fn take_msi(&mut self, offset: usize, count: u32) {
        let control = self.half(offset + 2);
        let length = msi_length(control);
        if offset + length > CONVENTIONAL {
            return;
        }
        let (wide, maskable) = (control & 1 << 7 != 0, control & 1 << 8 != 0);
        // The logarithm of how many vectors it may ask for, 5 at most.
        let wanted = u16::try_from(count.ilog2()).unwrap_or_default().min(control >> 1 & 7).min(5);
        let [low, high] = (control & 0x180 | wanted << 1).to_le_bytes();
        // Enable, and how many vectors the guest uses.
        self.set(offset + 2, low, 0x71);
        self.set(offset + 3, high, 0);
        (offset + 4..offset + length).for_each(|at| self.set(at, 0, 0xff));
        self.writable[offset + 4] = 0xfc;
        if maskable {
            let pending = offset + length - 4;
            (pending..pending + 4).for_each(|at| self.set(at, 0, 0));
        }
        self.msi = Some(MsiLayout { offset, wide, maskable });
    }

    fn take_msix(&mut self, offset: usize, count: u32) {
        if offset + 12 > CONVENTIONAL {
            return;
        }
        let control = self.half(offset + 2) & 0x7ff;
        let vectors = u32::from(control + 1).min(count);
        let place = |word: u32| (usize::try_from(word & 7).unwrap_or(BARS), u64::from(word & !7));
        let (table, pending) = (place(self.word(offset + 4)), place(self.word(offset + 8)));
        let Ok(vectors) = u16::try_from(vectors) else { return };
        let [low, high] = (vectors - 1).to_le_bytes();
        self.set(offset + 2, low, 0);
        // Enable and function mask.
        self.set(offset + 3, high, 0xc0);
        (offset + 4..offset + 12).for_each(|at| self.set(at, self.values[at], 0));
        self.msix = Some(MsixLayout { offset, vectors, table, pending });
    }

    /// Links the capabilities of PCI Express that the guest gets. The first one cannot be unlinked: where it is hidden, a
    /// capability of kind 0, which means none, takes its place.
    fn link_extended(&mut self, all: &[Capability]) {
        let Some(first) = all.first() else { return };
        let mut link = first.offset;
        for capability in all {
            if visible_extended(capability) {
                if capability.offset != first.offset {
                    self.link_extended_to(link, capability.offset);
                }
                link = capability.offset;
            } else {
                self.hide(capability);
            }
        }
        self.link_extended_to(link, 0);
    }

    fn link_extended_to(&mut self, link: usize, offset: usize) {
        let [low, high] = u16::try_from(offset << 4).unwrap_or_default().to_le_bytes();
        let version = self.values[link + 2] & 0x0f;
        self.set(link + 2, version | low, 0);
        self.set(link + 3, high, 0);
    }

    /// Bytes of the space that the device has.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.values.len()
    }

    /// Says that the guest has several functions in this one's slot.
    pub(super) fn set_multi_function(&mut self) {
        self.values[HEADER_TYPE] |= MULTI_FUNCTION;
    }

    /// Gives the guest a base address register: `address` is where it begins.
    pub(super) fn set_bar(&mut self, index: usize, address: u64, request: BarRequest) {
        let kind = u64::from(request.prefetchable) << 3 | u64::from(request.wide) << 2;
        let mask = !(request.length - 1) & !0xf;
        let bytes = if request.wide { 8 } else { 4 };
        let offset = BAR_REGISTERS + 4 * index;
        let values = (address | kind).to_le_bytes();
        for (at, (value, writable)) in (offset..).zip(values.into_iter().zip(mask.to_le_bytes())).take(bytes) {
            self.set(at, value, writable);
        }
    }

    /// Where the guest has put the BAR at this register.
    pub(super) fn bar(&self, index: usize, request: BarRequest) -> u64 {
        let offset = BAR_REGISTERS + 4 * index;
        let low = u64::from(self.word(offset) & !0xf);
        if request.wide { low | u64::from(self.word(offset + 4)) << 32 } else { low }
    }

    /// Whether the device answers to accesses of its memory: decoding is on and the device is fully powered.
    pub(super) fn decodes_memory(&self) -> bool {
        self.values[COMMAND] & COMMAND_MEMORY != 0 && !self.low_power
    }

    /// Where the power state is, if the device has any.
    pub(super) fn power_register(&self) -> Option<usize> {
        self.power
    }

    /// Notes the device's power state: the low byte of that register.
    pub(super) fn set_power_state(&mut self, register: u8) {
        self.low_power = register & 3 != 0;
    }

    /// Whether a read needs the device.
    pub(super) fn needs_device(&self, register: usize, length: usize) -> bool {
        self.ours.get(register..register + length).is_some_and(|bits| bits.iter().any(|bits| *bits != 0xff))
    }

    /// Lays our values over what the device gave.
    pub(super) fn cover(&self, register: usize, data: &mut [u8]) {
        for (offset, byte) in (register..).zip(data) {
            let Some(ours) = self.ours.get(offset) else {
                *byte = 0;
                continue;
            };
            *byte = *byte & !ours | self.values[offset] & ours;
        }
    }

    /// Takes a write of the guest. Gives which of its bits are for the device; none at all where it need not know.
    pub(super) fn write(&mut self, register: usize, data: &[u8]) -> Option<Vec<u8>> {
        let mut forwarded = Vec::with_capacity(data.len());
        for (offset, value) in (register..).zip(data) {
            let Some(writable) = self.writable.get(offset) else { break };
            self.values[offset] = self.values[offset] & !writable | value & writable;
            forwarded.push(self.forwarded[offset]);
            if self.power == Some(offset) {
                self.set_power_state(*value);
            }
        }
        (forwarded.len() == data.len() && forwarded.iter().any(|bits| *bits != 0)).then_some(forwarded)
    }

    /// What the guest programmed for MSI, if the function has it.
    pub(super) fn msi(&self) -> Option<Msi> {
        let MsiLayout { offset, wide, maskable } = self.msi?;
        let control = self.half(offset + 2);
        let high = if wide { u64::from(self.word(offset + 8)) << 32 } else { 0 };
        let data = self.half(offset + if wide { 12 } else { 8 });
        let mask = if maskable { self.word(offset + if wide { 16 } else { 12 }) } else { 0 };
        let address = u64::from(self.word(offset + 4)) | high;
        // As many vectors as the guest says, but no more than it was told that there are.
        let count = 1_u16 << (control >> 4 & 7).min(control >> 1 & 7);
        let message = |vector: u16| Message { address, data: u32::from(data & !(count - 1) | vector) };
        let vectors = (0..count).map(|vector| (mask >> vector & 1 == 0).then(|| message(vector))).collect();
        Some(Msi { enabled: control & 1 != 0, vectors })
    }

    /// The pin that the function interrupts by, 1 to 4, while it does so by no message.
    pub(super) fn pin(&self) -> Option<u8> {
        Some(self.values[INTERRUPT_PIN]).filter(|pin| *pin > 0)
    }

    /// Where MSI-X is, if the function has it.
    pub(super) fn msix(&self) -> Option<MsixLayout> {
        self.msix
    }

    /// What the guest programmed for it.
    pub(super) fn msix_control(&self) -> MsixControl {
        let control = self.msix.map_or(0, |msix| self.values[msix.offset + 3]);
        MsixControl { enabled: control & 1 << 7 != 0, masked: control & 1 << 6 != 0 }
    }
}

#[cfg(test)]
mod tests;
