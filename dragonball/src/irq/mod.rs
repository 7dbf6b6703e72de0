//! Interrupts: from a source in this process to a local APIC.

pub(crate) mod ioapic;
pub(crate) mod pin;
pub(crate) mod router;

/// The pins of the IOAPIC that have a source.
pub(crate) mod pins {
    /// What the pins of PCI functions are joined to; level-triggered.
    pub(crate) const PCI: [u8; 4] = [0, 1, 2, 3];
    /// The debug UART, where every PC has it.
    pub(crate) const UART: u8 = 4;
    /// The hot-plug registers; level-triggered.
    pub(crate) const HOT_PLUG: u8 = 5;
}

/// The pin of the IOAPIC that pin `pin` of the functions in `slot` is joined to, 1 for A to 4 for D: one after the other in
/// turn, as on every board, because most functions use A alone.
pub(crate) fn pci_pin(slot: u8, pin: u8) -> u8 {
    pins::PCI[(usize::from(slot) + usize::from(pin.saturating_sub(1))) % pins::PCI.len()]
}

/// A message that raises an interrupt (Intel SDM vol. 3, §11.11).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct Message {
    /// Where it is written: which local APICs get it.
    pub(crate) address: u64,
    /// What is written: vector and delivery mode.
    pub(crate) data: u32,
}
