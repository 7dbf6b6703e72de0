//! The one-byte registers for power, panic and the boot timer.

use crate::platform::ports;
use crate::vm::ExitReason;

/// `SLP_EN` and the place of `SLP_TYP` in the sleep control register (ACPI 6.5, table 4.21).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// The byte that Firecracker's convention has for "init has started".
pub(crate) const BOOT_TIMER_INIT: u8 = 123;

/// What a write to an I/O port ends the machine with, if anything.
pub(crate) fn write_port(port: u16, value: u8) -> Option<ExitReason> {
    match port {
        ports::SLEEP_CONTROL if is_power_off(value) => Some(ExitReason::PowerOff),
        ports::RESET if value == ports::RESET_VALUE => Some(ExitReason::Reset),
        ports::PANIC if value & ports::PANIC_PANICKED != 0 => Some(ExitReason::Panic),
        _ => None,
    }
}

/// What a port reads as; all ones where nothing is.
pub(crate) fn read_port(port: u16) -> u8 {
    match port {
        ports::PANIC => ports::PANIC_PANICKED,
        ports::SLEEP_CONTROL | ports::SLEEP_STATUS | ports::RESET => 0,
        _ => 0xff,
    }
}

fn is_power_off(value: u8) -> bool {
    value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == ports::SLEEP_TYPE_OFF
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_end_the_machine_only_by_their_own_values() {
        let off = SLEEP_ENABLE | ports::SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;
        for (port, value, expected) in [
            (ports::SLEEP_CONTROL, off, Some(ExitReason::PowerOff)),
            (ports::SLEEP_CONTROL, off & !SLEEP_ENABLE, None),
            (ports::SLEEP_CONTROL, SLEEP_ENABLE, None),
            (ports::RESET, 1, Some(ExitReason::Reset)),
            (ports::RESET, 0, None),
            (ports::PANIC, 1, Some(ExitReason::Panic)),
            (ports::PANIC, 2, None),
            (0x80, 0xff, None),
        ] {
            assert_eq!(write_port(port, value), expected, "{port:#x} {value:#x}");
        }
    }

    #[test]
    fn an_absent_port_reads_as_all_ones() {
        assert_eq!([read_port(0xcf8), read_port(0x64), read_port(ports::PANIC)], [0xff, 0xff, 1]);
    }
}
