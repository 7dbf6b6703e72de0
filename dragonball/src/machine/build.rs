//! Puts a machine together.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VmFd};

use super::StartError;
use super::devices::{Devices, debug_uart};
use super::event_loop::{self, Machine};
use super::input::Input;
use crate::boot::Entry;
use crate::bus::Bus;
use crate::config::{ConsoleOutput, MachineConfig};
use crate::control;
use crate::irq::ioapic::IoApic;
use crate::irq::router::IrqRouter;
use crate::kvm::refused;
use crate::memory::layout::{HighMemory, PCI_32};
use crate::memory::{AddressSpace, GuestRam};
use crate::pci::bus::PciBus;
use crate::pci::windows::Windows;
use crate::vcpu::{self, cpuid, registers};
use crate::virtio::pci::Hardware;
use crate::vm::{Shared, Vm};
use crate::{acpi, boot, host, kvm, threads};

fn host_refused(action: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Host { action, source }
}

/// Builds the machine of a valid configuration and lets it run.
pub(super) fn build(config: &MachineConfig, shared: Arc<Shared>) -> Result<Vm, StartError> {
    threads::reserve_descriptors();
    let kvm = kvm::open()?;
    let vm = kvm::create_vm(&kvm)?;
    shared.stamp("vm created");
    let ram = GuestRam::new(config.memory).map_err(host_refused("map guest memory"))?;
    let address_space = AddressSpace::new(Arc::clone(&vm));
    address_space.add_ram(&ram).map_err(refused("add guest memory"))?;
    let entry = boot::load(config, &ram, acpi::RSDP)?;
    shared.stamp("kernel loaded");

    let (control, mailbox) = control::channel().map_err(host_refused("make an event"))?;
    let router = Arc::new(IrqRouter::new(Arc::clone(&vm)));
    let ioapic = Arc::new(IoApic::new(Arc::clone(&router) as _));
    let uart = debug_uart(config, &ioapic, &shared)?;
    let mut devices = Devices {
        hardware: Hardware { vm: Arc::clone(&vm), router, memory: Arc::clone(ram.memory()), control: control.clone() },
        bus: PciBus::default(),
        high: HighMemory::above(config.memory, host::address_bits()),
        address_space,
        windows: Windows::new(PCI_32, None),
        workers: Vec::new(),
    };
    devices.add_all(config, &shared)?;
    let pci = (!devices.workers.is_empty()).then(|| acpi::Pci { window_64: devices.high.pci_window() });
    let tables = acpi::Hardware { vcpus: config.vcpus, pci, uart: uart.is_some() };
    acpi::write(&ram, &tables).map_err(host_refused("write the ACPI tables"))?;
    shared.stamp("devices made");

    let bus = Bus {
        ioapic,
        pci: Arc::new(devices.bus),
        uart: uart.clone(),
        boot_timer: config.boot_timer.then(|| Arc::clone(&shared)),
    };
    let ending = Arc::new(AtomicBool::new(false));
    let context = vcpu::Context { bus: Arc::new(bus), control: control.clone(), ending: Arc::clone(&ending) };
    let vcpus = create_vcpus(config.vcpus, &kvm, &vm, entry)?;
    let input = uart.filter(|_| config.debug_uart == ConsoleOutput::Stdio).map(Input::new);
    let machine =
        Machine { shared: Arc::clone(&shared), mailbox, devices: devices.workers, input, ending, memory: ram };
    let thread = threads::spawn("vmm", move || event_loop::run(machine, vcpus, context))
        .map_err(host_refused("start a thread"))?;
    Ok(Vm::new(shared, control, thread))
}

/// Makes the vCPUs: the first one enters the kernel, the others wait for it to start them.
fn create_vcpus(count: u8, kvm: &Kvm, vm: &VmFd, entry: Entry) -> Result<Vec<kvm_ioctls::VcpuFd>, StartError> {
    vcpu::install_handler();
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("say what CPUID it supports"))?;
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for id in 0..count {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(refused("create a vCPU"))?;
        let table = cpuid::for_vcpu(&supported, id, count).map_err(refused("set CPUID"))?;
        vcpu.set_cpuid2(&table).map_err(refused("set CPUID"))?;
        registers::set_msrs(&vcpu).map_err(refused("set model-specific registers"))?;
        vcpus.push(vcpu);
    }
    if let Some(first) = vcpus.first() {
        registers::enter(first, entry).map_err(refused("set the first vCPU's registers"))?;
    }
    Ok(vcpus)
}
