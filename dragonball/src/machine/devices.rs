//! The devices of a configuration, and the debug UART.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::StartError;
use super::event_loop::DeviceWorker;
use crate::config::{ConsoleOutput, MachineConfig, PmemConfig, VfioConfig};
use crate::irq::ioapic::IoApic;
use crate::memory::layout::HighMemory;
use crate::memory::{AddressSpace, SlotAccess};
use crate::pci::bus::PciBus;
use crate::pci::windows::{BarRequest, Windows};
use crate::platform::uart::Uart;
use crate::vfio;
use crate::virtio::blk::Blk;
use crate::virtio::console::{Console, ConsoleTail};
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::Fs;
use crate::virtio::pci::{Hardware, REGION_LENGTH, Transport};
use crate::virtio::pmem::{Pmem, PmemMode};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::vm::Shared;

/// The devices of a machine as they are put together.
pub(super) struct Devices {
    pub(super) hardware: Hardware,
    pub(super) bus: PciBus,
    pub(super) high: HighMemory,
    pub(super) address_space: AddressSpace,
    pub(super) windows: Windows,
    pub(super) workers: Vec<DeviceWorker>,
}

fn refused<E: Into<Box<dyn std::error::Error + Send + Sync>>>(device: &str) -> impl FnOnce(E) -> StartError {
    move |source| StartError::Device { device: device.to_owned(), source: source.into() }
}

impl Devices {
    /// Makes every device of `config`, in the order in which the guest shall find them.
    pub(super) fn add_all(&mut self, config: &MachineConfig, shared: &Shared) -> Result<(), StartError> {
        if config.device_count() == 0 {
            return Ok(());
        }
        self.add("rng", Box::new(Rng::new()))?;
        for pmem in &config.pmem {
            self.add_pmem(pmem)?;
        }
        for disk in &config.disks {
            self.add("blk", Box::new(Blk::open(&disk.path, disk.read_only).map_err(refused("blk"))?))?;
        }
        for fs in &config.fs {
            self.add("fs", Box::new(Fs::new(&fs.tag, &fs.directory).map_err(refused("fs"))?))?;
        }
        if let Some(vsock) = &config.vsock {
            let device = Vsock::new(u64::from(vsock.guest_cid), &vsock.socket).map_err(refused("vsock"))?;
            self.add("vsock", Box::new(device))?;
        }
        if config.console != ConsoleOutput::None {
            let (output, input) = console_ends(&config.console).map_err(refused("console"))?;
            let console = Console::new(output, input);
            shared.add_console(console.tail());
            self.add("console", Box::new(console))?;
        }
        self.add_vfio(&config.vfio)
    }

    /// Gives devices of the host to the guest. They come last, because their memory lies above everything else.
    fn add_vfio(&mut self, configs: &[VfioConfig]) -> Result<(), StartError> {
        if configs.is_empty() {
            return Ok(());
        }
        self.windows.set_high(self.high.pci_window());
        let services = vfio::Services {
            slots: Arc::new(self.address_space.clone()),
            routes: Arc::clone(&self.hardware.router) as _,
            windows: self.windows.ranges(),
        };
        let vm = Arc::clone(&self.hardware.vm);
        let mut passthrough = vfio::Passthrough::new(vm, Arc::clone(&self.hardware.memory), services);
        for config in configs {
            let slots = passthrough.attach(config, &mut self.windows).map_err(refused("vfio"))?;
            for slot in slots {
                let functions = slot.into_iter().map(|(number, function)| (number, function as _)).collect();
                let no_slot = || refused("vfio")("the PCI bus has no slot left");
                self.bus.add_device(functions).ok_or_else(no_slot)?;
            }
        }
        Ok(())
    }

    /// Gives a device its transport and its slot.
    fn add(&mut self, name: &'static str, device: Box<dyn VirtioDevice>) -> Result<(), StartError> {
        let number = self.workers.len();
        let places = self.windows.place(&[BarRequest::registers(u64::from(REGION_LENGTH))]).map_err(refused(name))?;
        let address = places.first().map_or(0, |place| place.start);
        let address = u32::try_from(address).map_err(io::Error::other).map_err(refused(name))?;
        let transport =
            Transport::new(self.hardware.clone(), device.as_ref(), number, address).map_err(refused(name))?;
        let lines = Arc::clone(transport.lines());
        let no_slot = || refused(name)("the PCI bus has no slot left");
        self.bus.add(Arc::new(transport)).ok_or_else(no_slot)?;
        self.workers.push(DeviceWorker::new(name, device, lines));
        Ok(())
    }

    fn add_pmem(&mut self, config: &PmemConfig) -> Result<(), StartError> {
        let mode = if config.read_only { PmemMode::ReadOnly } else { PmemMode::CopyOnWrite };
        let mut pmem = Pmem::open(&config.path, mode).map_err(refused("pmem"))?;
        let mapping = pmem.mapping();
        let no_room = || refused("pmem")("the guest's address space has no room left");
        let range = self.high.place_pmem(mapping.len()).ok_or_else(no_room)?;
        let host = mapping.host_address().as_ptr() as u64;
        let access = if config.read_only { SlotAccess::ReadOnly } else { SlotAccess::ReadWrite };
        // SAFETY: the mapping is as long as the range and lives in the device, which the `vmm` thread drops after it
        // has joined the vCPUs.
        let _for_good = unsafe { self.address_space.add(range, host, access) }.map_err(refused("pmem"))?;
        pmem.set_start(GuestAddress(range.start));
        self.add("pmem", Box::new(pmem))
    }
}

/// Makes the debug UART, if one is asked for.
pub(super) fn debug_uart(
    config: &MachineConfig,
    ioapic: &Arc<IoApic>,
    shared: &Shared,
) -> Result<Option<Arc<Uart>>, StartError> {
    let output: Box<dyn Write + Send> = match &config.debug_uart {
        ConsoleOutput::None => return Ok(None),
        ConsoleOutput::Stdio => Box::new(io::stdout()),
        ConsoleOutput::File(path) => Box::new(append_to(path).map_err(refused("debug UART"))?),
    };
    let tail = ConsoleTail::default();
    shared.add_console(tail.clone());
    Ok(Some(Arc::new(Uart::new(Arc::clone(ioapic), output, tail))))
}

/// Output and input of the console.
fn console_ends(output: &ConsoleOutput) -> io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    match output {
        ConsoleOutput::None => Ok((None, None)),
        ConsoleOutput::Stdio => {
            Ok((Some(io::stdout().as_fd().try_clone_to_owned()?), Some(io::stdin().as_fd().try_clone_to_owned()?)))
        }
        ConsoleOutput::File(path) => Ok((Some(append_to(path)?.into()), None)),
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    let annotate = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    File::options().create(true).append(true).open(path).map_err(annotate)
}
