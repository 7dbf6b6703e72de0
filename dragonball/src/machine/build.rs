//! Puts a machine together.

use std::io;
use std::sync::Arc;

use super::StartError;
use super::devices::{Devices, debug_uart};
use super::event_loop::{self, Machine};
use super::hot_plug::HotPlug;
use super::input::Input;
use super::vcpus::Vcpus;
use crate::boot;
use crate::bus::Bus;
use crate::config::{ConsoleOutput, MachineConfig};
use crate::control;
use crate::irq::ioapic::IoApic;
use crate::irq::router::IrqRouter;
use crate::kvm::refused;
use crate::manage::Manager;
use crate::memory::layout::{self, HighMemory};
use crate::memory::listener::DmaListeners;
use crate::memory::{AddressSpace, GuestRam};
use crate::platform::hotplug::HotPlugRegisters;
use crate::vcpu;
use crate::virtio::pci::Hardware;
use crate::vm::{Shared, Vm};
use crate::{acpi, host, kvm, threads};

fn host_refused(action: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Host { action, source }
}

/// Builds the machine of a valid configuration and lets it run.
pub(super) fn build(config: &MachineConfig, shared: Arc<Shared>) -> Result<Vm, StartError> {
    threads::reserve_descriptors();
    let kvm = kvm::open()?;
    let vm = kvm::create_vm(&kvm)?;
    shared.stamp("vm created");
    shared.set_boot_memory(config.memory);
    let pluggable = layout::pluggable(config.memory, config.memory_max());
    let ram = GuestRam::with_pluggable(config.memory, pluggable, config.has_huge_pages())
        .map_err(host_refused("map guest memory"))?;
    let address_space = AddressSpace::new(Arc::clone(&vm));
    address_space.add_ram(&ram).map_err(refused("add guest memory"))?;
    let entry = boot::load(config, &ram, acpi::RSDP)?;
    shared.stamp("kernel loaded");

    let (control, mailbox) = control::channel().map_err(host_refused("make an event"))?;
    let router = Arc::new(IrqRouter::new(Arc::clone(&vm)));
    let ioapic = Arc::new(IoApic::new(Arc::clone(&router) as _));
    let uart = debug_uart(config, &ioapic, &shared)?;
    let hardware = Hardware { vm: Arc::clone(&vm), router, memory: Arc::clone(ram.memory()), control: control.clone() };
    let high = HighMemory::above(config.memory, pluggable, host::address_bits());
    let listeners = DmaListeners::new(Arc::clone(ram.memory()));
    let mut devices = Devices::new(hardware, Arc::clone(&ioapic), high, address_space, listeners);
    let workers = devices.add_all(config, &shared)?;
    let registers = config.hot_plug.then(|| Arc::new(HotPlugRegisters::new(Arc::clone(&ioapic), config.vcpus)));
    acpi::write(&ram, &tables(config, &devices)).map_err(host_refused("write the ACPI tables"))?;
    shared.stamp("devices made");

    let bus = Bus {
        ioapic,
        pci: Arc::clone(devices.bus()),
        uart: uart.clone(),
        hot_plug: registers.clone(),
        control: control.clone(),
        boot_timer: config.boot_timer.then(|| Arc::clone(&shared)),
    };
    let context = vcpu::Context { bus: Arc::new(bus), control: control.clone() };
    let vcpus = Vcpus::new((config.vcpus, config.vcpus_max()), &kvm, &vm, entry, context)?;
    let input = uart.filter(|_| config.debug_uart == ConsoleOutput::Stdio).map(Input::new);
    let passthrough = Arc::downgrade(devices.passthrough());
    let hot_plug = HotPlug::new(config, devices, vcpus, registers, Arc::clone(&shared));
    let machine = Machine { shared: Arc::clone(&shared), mailbox, workers, hot_plug, input, memory: ram };
    let thread = threads::spawn("vmm", move || event_loop::run(machine)).map_err(host_refused("start a thread"))?;
    let manager = Manager::new(control, Arc::clone(&shared), passthrough);
    Ok(Vm::new(shared, manager, thread))
}

/// What the ACPI tables speak of.
fn tables(config: &MachineConfig, devices: &Devices) -> acpi::Hardware {
    acpi::Hardware {
        vcpus: config.vcpus,
        vcpus_max: config.vcpus_max(),
        hot_plug: config.hot_plug,
        pci: config.has_pci().then(|| acpi::Pci {
            window_64: devices.window_64(),
            pins: config.may_have_host_devices(),
            changing: devices.changing_slots(),
        }),
        uart: config.debug_uart != ConsoleOutput::None,
    }
}
