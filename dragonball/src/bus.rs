//! Where the guest's accesses go: I/O ports and the memory addresses that no RAM is at.

use std::sync::{Arc, mpsc};

use crate::control::{Control, Request};
use crate::irq::ioapic::IoApic;
use crate::memory::layout::{BOOT_TIMER, ECAM, HOT_PLUG, IOAPIC};
use crate::pci::bus::PciBus;
use crate::platform::hotplug::HotPlugRegisters;
use crate::platform::ports;
use crate::platform::registers::{self, BOOT_TIMER_INIT};
use crate::platform::uart::Uart;
use crate::vm::{ExitReason, Shared};

/// The machine as its vCPUs see it. They call it side by side.
pub(crate) struct Bus {
    /// The interrupt controller.
    pub(crate) ioapic: Arc<IoApic>,
    /// All PCI functions.
    pub(crate) pci: Arc<PciBus>,
    /// The debug UART, if there is one.
    pub(crate) uart: Option<Arc<Uart>>,
    /// The hot-plug registers, if the machine has them.
    pub(crate) hot_plug: Option<Arc<HotPlugRegisters>>,
    /// Who works off what the guest tells by them.
    pub(crate) control: Control,
    /// Who is told of the boot timer's byte, if the machine has one.
    pub(crate) boot_timer: Option<Arc<Shared>>,
}

impl Bus {
    /// Answers a read of `port`. Nothing that exists is wider than a byte.
    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        for byte in data.iter_mut() {
            *byte = match self.uart_register(port) {
                Some((uart, register)) => uart.read(register),
                None => registers::read_port(port),
            };
        }
    }

    /// Takes a write to `port`; gives the reason when it ends the machine. A string instruction's bytes come together.
    pub(crate) fn write_port(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        if let Some((uart, register)) = self.uart_register(port) {
            data.iter().for_each(|byte| uart.write(register, *byte));
            return None;
        }
        data.first().and_then(|value| registers::write_port(port, *value))
    }

    fn uart_register(&self, port: u16) -> Option<(&Uart, u8)> {
        let register = u8::try_from(port.checked_sub(ports::UART)?).ok().filter(|register| *register < 8)?;
        Some((self.uart.as_deref()?, register))
    }

    /// Answers a read of memory that is no RAM; all ones where nothing is.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) {
        if let Some(offset) = ECAM.offset_of(address, data.len()) {
            self.pci.read_config(offset, data);
        } else if let Some(offset) = IOAPIC.offset_of(address, data.len()) {
            copy_register(self.ioapic.read(offset), data);
        } else if let Some((registers, offset)) = self.hot_plug_register(address, data.len()) {
            copy_register(registers.read(offset), data);
        } else if !self.pci.read_memory(address, data) {
            data.fill(0xff);
        }
    }

    /// Takes a write to memory that is no RAM; nothing happens where nothing is.
    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some(offset) = ECAM.offset_of(address, data.len()) {
            self.pci.write_config(offset, data);
        } else if let Some(offset) = IOAPIC.offset_of(address, data.len()) {
            if let Ok(value) = data.try_into() {
                self.ioapic.write(offset, u32::from_le_bytes(value));
            }
        } else if let Some((registers, offset)) = self.hot_plug_register(address, data.len()) {
            if let Ok(value) = data.try_into() {
                self.write_hot_plug(registers, offset, u32::from_le_bytes(value));
            }
        } else if address == BOOT_TIMER {
            self.boot_timer_byte(data);
        } else {
            self.pci.write_memory(address, data);
        }
    }

    /// The hot-plug register that an access of all its four bytes is for.
    fn hot_plug_register(&self, address: u64, size: usize) -> Option<(&HotPlugRegisters, u64)> {
        let offset = HOT_PLUG.offset_of(address, size).filter(|offset| size == 4 && offset.is_multiple_of(4))?;
        Some((self.hot_plug.as_deref()?, offset))
    }

    /// What the guest let go is gone when its write has been carried out.
    fn write_hot_plug(&self, registers: &HotPlugRegisters, offset: u64, value: u32) {
        if let Some(told) = registers.write(offset, value) {
            let (done, wait) = mpsc::channel();
            self.control.send(Request::Told { told, done });
            let _ = wait.recv();
        }
    }

    /// A local APIC has finished `vector`.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }

    fn boot_timer_byte(&self, data: &[u8]) {
        if let (Some(shared), Some(&BOOT_TIMER_INIT)) = (&self.boot_timer, data.first()) {
            shared.guest_init();
        }
    }
}

/// Gives a 32-bit register's bytes; what lies behind them reads as zero.
fn copy_register(value: u32, data: &mut [u8]) {
    data.fill(0);
    for (byte, source) in data.iter_mut().zip(value.to_le_bytes()) {
        *byte = source;
    }
}
