//! The machine's I/O ports.

/// The panic device, one byte: bit 0 written = the guest kernel panicked (QEMU's `docs/specs/pvpanic.rst`).
pub(crate) const PANIC: u16 = 0x505;
/// Events that the panic device knows, as a read tells.
pub(crate) const PANIC_PANICKED: u8 = 1;
/// ACPI sleep control register (ACPI 6.5, §4.8.3.7).
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub(crate) const SLEEP_STATUS: u16 = 0x601;
/// The value of `SLP_TYP` that powers off.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
/// ACPI reset register.
pub(crate) const RESET: u16 = 0x602;
/// What resets when written to [`RESET`].
pub(crate) const RESET_VALUE: u8 = 1;
/// The first of the debug UART's eight ports.
pub(crate) const UART: u16 = 0x3f8;
