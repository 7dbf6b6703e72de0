//! What the machine has beside PCI devices: power, panic and boot timer registers, and a debug UART.

pub(crate) mod hotplug;
pub(crate) mod ports;
pub(crate) mod registers;
pub(crate) mod uart;
