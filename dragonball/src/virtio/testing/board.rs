//! The machine's own registers in the hands of a hostile guest: hot-plug, interrupt controller, UART, ports, and what is
//! around them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::script::Script;
use crate::bus::Bus;
use crate::control;
use crate::irq::Message;
use crate::irq::ioapic::{IoApic, MessageSink, PINS};
use crate::memory::layout::{BOOT_TIMER, ECAM, HOT_PLUG, IOAPIC, PCI_32};
use crate::pci::bus::PciBus;
use crate::platform::hotplug::{HotPlugRegisters, Told};
use crate::platform::ports;
use crate::platform::uart::Uart;
use crate::virtio::console::ConsoleTail;
use crate::vm::Shared;

/// vCPUs that the machine starts with.
const VCPUS: u8 = 2;

/// Counts the interrupts.
#[derive(Default)]
struct Interrupts(AtomicUsize);

impl MessageSink for Interrupts {
    fn send(&self, _message: Message) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn watch_end(&self, pin: u8, _message: Option<Message>) {
        assert!(pin < PINS, "there is no pin {pin}");
    }
}

/// The machine without vCPUs, memory and devices.
struct Board {
    bus: Bus,
    registers: Arc<HotPlugRegisters>,
    uart: Arc<Uart>,
    interrupts: Arc<Interrupts>,
    /// vCPUs that are there.
    present: BTreeSet<u8>,
}

/// Does the accesses of a guest, and what the host does meanwhile.
///
/// # Panics
/// When the machine does; when the guest could tell of a vCPU that is not there; or when one access causes more interrupts
/// than there are pins.
pub(super) fn board(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let mut board = Board::new();
    while !script.is_over() {
        let before = board.interrupts.0.load(Ordering::Relaxed);
        match script.byte() % 8 {
            0 | 1 => board.hot_plug(&mut script),
            2 => board.host(&mut script),
            3 => board.port(&mut script),
            4 => board.bus.end_of_interrupt(script.byte()),
            5 => board.save_and_restore(),
            _ => board.memory(&mut script),
        }
        let raised = board.interrupts.0.load(Ordering::Relaxed) - before;
        assert!(raised <= usize::from(PINS), "{raised} interrupts at once");
    }
}

impl Board {
    fn new() -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let ioapic = Arc::new(IoApic::new(Arc::clone(&interrupts) as _));
        let registers = Arc::new(HotPlugRegisters::new(Arc::clone(&ioapic), VCPUS));
        let uart = Arc::new(Uart::new(Arc::clone(&ioapic), Box::new(std::io::sink()), ConsoleTail::default()));
        let (control, mailbox) = control::channel().expect("a mailbox");
        // Who tells something is answered at once, as by a machine that is ending.
        drop(mailbox);
        let bus = Bus {
            ioapic,
            pci: Arc::new(PciBus::default()),
            uart: Some(Arc::clone(&uart)),
            hot_plug: Some(Arc::clone(&registers)),
            control,
            boot_timer: Some(Arc::new(Shared::new().expect("an event"))),
        };
        Self { bus, registers, uart, interrupts, present: (0..VCPUS).collect() }
    }

    /// Memory accesses of all sizes, near the registers that there are.
    fn memory(&self, script: &mut Script<'_>) {
        let (kind, place, data) = (script.byte(), u64::from(script.word()), script.array::<8>());
        let size = 1 << (kind & 3);
        let address = match kind >> 3 & 7 {
            0 => ECAM.start + place % (2 * ECAM.length),
            1 | 2 => IOAPIC.start + place % 0x50,
            3 => HOT_PLUG.start + place % 0x40,
            4 => BOOT_TIMER + place % 8,
            5 => PCI_32.start + place % PCI_32.length,
            6 => place,
            _ => u64::MAX - place % 16,
        };
        if kind & 4 == 0 {
            self.bus.write_memory(address, &data[..size]);
        } else {
            let mut seen = [0; 8];
            self.bus.read_memory(address, &mut seen[..size]);
        }
    }

    fn port(&self, script: &mut Script<'_>) {
        let (kind, place, data) = (script.byte(), script.half(), script.array::<4>());
        let port = if kind & 4 == 0 { ports::UART + place % 8 } else { place };
        let size = usize::from(kind & 3) + 1;
        if kind & 8 == 0 {
            // Some writes end the machine; here that is all that they do.
            let _reason = self.bus.write_port(port, &data[..size]);
        } else {
            self.bus.read_port(port, &mut [0; 4][..size]);
        }
    }

    /// Reads and writes of the hot-plug registers, with what a machine does with what it is told.
    fn hot_plug(&mut self, script: &mut Script<'_>) {
        let offset = u64::from(script.byte() % 20) * 4;
        if script.byte() & 1 == 0 {
            self.registers.read(offset);
            return;
        }
        let value = if script.byte() & 1 == 0 { u32::from(script.byte()) } else { script.word() };
        match self.registers.write(offset, value) {
            Some(Told::CpuEjected(id)) => {
                assert!(self.present.contains(&id), "vCPU {id} is not there and was ejected");
                self.registers.remove_cpu(id);
                self.present.remove(&id);
            }
            Some(Told::CpuReport { id, .. }) => assert!(self.present.contains(&id), "vCPU {id} is not there"),
            Some(Told::PciEjected(slots) | Told::PciSettled(slots)) => assert!(slots != 0, "it was told of no slot"),
            None => {}
        }
    }

    /// The host changes the machine.
    fn host(&mut self, script: &mut Script<'_>) {
        let (kind, id) = (script.byte(), script.byte());
        let slot = id % 32;
        match kind % 10 {
            0 => self.registers.announce(slot),
            1 => drop(self.registers.withdraw(slot)),
            2 => self.registers.ask_back(slot),
            3 => drop(self.registers.keep(slot)),
            4 => {
                self.registers.add_cpu(id);
                self.present.insert(id);
            }
            5 => self.registers.ask_back_cpu(id),
            6 => drop(self.registers.withdraw_cpu(id)),
            7 => self.registers.press_power_button(),
            8 => drop(self.uart.input(script.bytes(usize::from(id)))),
            _ => {
                self.registers.remove_cpu(id);
                self.present.remove(&id);
            }
        }
    }

    fn save_and_restore(&self) {
        let saved = self.registers.save();
        self.registers.restore(&saved);
        assert_eq!(self.registers.save(), saved);
        let saved = self.bus.ioapic.save();
        self.bus.ioapic.restore(&saved);
        assert_eq!(self.bus.ioapic.save(), saved);
    }
}
