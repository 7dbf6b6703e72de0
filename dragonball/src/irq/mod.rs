//! Interrupts: from a source in this process to a local APIC.

pub(crate) mod ioapic;
pub(crate) mod router;

/// The pins of the IOAPIC that have a source.
pub(crate) mod pins {
    /// The debug UART, where every PC has it.
    pub(crate) const UART: u8 = 4;
    /// The hot-plug registers; level-triggered.
    pub(crate) const HOT_PLUG: u8 = 5;
}

/// A message that raises an interrupt (Intel SDM vol. 3, §11.11).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct Message {
    /// Where it is written: which local APICs get it.
    pub(crate) address: u64,
    /// What is written: vector and delivery mode.
    pub(crate) data: u32,
}
