//! The devices of a machine: made from their configuration, put into slots, taken out again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::StartError;
use super::worker::DeviceWorker;
use crate::config::{ConsoleOutput, DeviceConfig, MachineConfig};
use crate::control::{Control, DeviceNumber, Request};
use crate::irq::ioapic::IoApic;
use crate::irq::pin::PinSource;
use crate::manage::{AttachTimes, ChangeError, DeviceInfo, Presence, RangeInfo};
use crate::memory::layout::{HighMemory, PCI_32, Range};
use crate::memory::listener::DmaListeners;
use crate::memory::{AddressSpace, PluggableMemory, SlotAccess, SlotId};
use crate::pci::PciFunction;
use crate::pci::bus::{PciBus, SLOTS};
use crate::pci::windows::Windows;
use crate::platform::uart::Uart;
use crate::threads;
use crate::vfio::{Passthrough, PrepareTimes, PreparedGroup, Services, VfioFunction};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::{Console, ConsoleTail};
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::Fs;
use crate::virtio::mem::Mem;
use crate::virtio::net::Net;
use crate::virtio::pci::{Hardware, Lines, REGION_LENGTH, Transport};
use crate::virtio::pmem::{Pmem, PmemMode};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::vm::Shared;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A device that could not be made, and why.
#[derive(Debug)]
pub(crate) struct Unmade {
    device: &'static str,
    source: Cause,
}

impl From<Unmade> for StartError {
    fn from(Unmade { device, source }: Unmade) -> Self {
        Self::Device { device: device.to_owned(), source }
    }
}

impl From<Unmade> for ChangeError {
    fn from(Unmade { device, source }: Unmade) -> Self {
        Self::Device { device, source }
    }
}

fn unmade<E: Into<Cause>>(device: &'static str) -> impl FnOnce(E) -> Unmade {
    move |source| Unmade { device, source: source.into() }
}

/// A device that has what it needs of the host, and no place in a machine yet.
pub(crate) struct PreparedDevice {
    kind: &'static str,
    part: Part,
}

enum Part {
    /// Persistent memory is shown to the guest beside its registers.
    Pmem {
        device: Pmem,
        read_only: bool,
    },
    /// A device of the host, which needs no worker.
    Vfio(PreparedGroup),
    Other(Box<dyn VirtioDevice>),
}

impl PreparedDevice {
    /// Opens what the device works on. May take long: not to be called on the `vmm` thread while the machine runs.
    pub(crate) fn open(config: &DeviceConfig, passthrough: &Passthrough) -> Result<Self, Unmade> {
        let kind = config.kind();
        let part = match config {
            DeviceConfig::Pmem(pmem) => {
                let mode = if pmem.read_only { PmemMode::ReadOnly } else { PmemMode::CopyOnWrite };
                let device = Pmem::open(&pmem.path, mode).map_err(unmade(kind))?;
                Part::Pmem { device, read_only: pmem.read_only }
            }
            DeviceConfig::Blk(disk) => {
                Part::Other(Box::new(Blk::open(&disk.path, disk.read_only).map_err(unmade(kind))?))
            }
            DeviceConfig::Vfio(vfio) => Part::Vfio(passthrough.prepare(vfio).map_err(unmade(kind))?),
            DeviceConfig::Net(net) => Part::Other(Box::new(Net::open(net).map_err(unmade(kind))?)),
            DeviceConfig::Fs(fs) => Part::Other(Box::new(Fs::new(fs).map_err(unmade(kind))?)),
        };
        Ok(Self { kind, part })
    }

    fn other(kind: &'static str, device: impl VirtioDevice + 'static) -> Self {
        Self { kind, part: Part::Other(Box::new(device)) }
    }
}

/// The devices of a machine.
pub(super) struct Devices {
    hardware: Hardware,
    bus: Arc<PciBus>,
    ioapic: Arc<IoApic>,
    high: HighMemory,
    address_space: AddressSpace,
    listeners: DmaListeners,
    passthrough: Arc<Passthrough>,
    /// What of the PCI windows the devices of the host have.
    windows: Windows,
    /// By slot.
    attached: BTreeMap<u8, Attached>,
    next_number: DeviceNumber,
    window_64: Option<Range>,
}

/// A device in its slot.
pub(super) struct Attached {
    pub(super) name: String,
    pub(super) number: DeviceNumber,
    pub(super) presence: Presence,
    /// It came with the machine and goes with it.
    pub(super) fixed: bool,
    kind: &'static str,
    /// How long a device of the host took to come.
    pub(super) times: Option<AttachTimes>,
    /// A device of the host has none.
    lines: Option<Arc<Lines>>,
    /// Guest-physical memory beside its registers.
    memory: Option<PmemPlace>,
    /// The functions of devices of the host, what of the PCI windows they have, and how long they took to be prepared.
    host: Option<HostGroup>,
}

/// Devices of the host in their slot.
struct HostGroup {
    functions: Vec<Arc<VfioFunction>>,
    bars: Vec<Range>,
    prepared: PrepareTimes,
}

/// Devices of the host that have left their slot and still work for nobody: to be retired where that may take long.
pub(super) struct Leaving {
    functions: Vec<Arc<VfioFunction>>,
    bars: Vec<Range>,
}

impl Leaving {
    /// Stops and resets the devices, and gives the part of the PCI windows that is free now. May take seconds.
    pub(super) fn retire(self) -> Vec<Range> {
        self.functions.iter().for_each(|function| function.retire());
        self.bars
    }
}

/// What of a device that was taken out is left to do.
#[derive(Default)]
pub(super) struct Detached {
    /// The worker that the loop may drop now: none when the guest could still reach its memory.
    pub(super) worker: Option<DeviceNumber>,
    /// To be retired.
    pub(super) leaving: Option<Leaving>,
}

/// What works for a device on the `vmm` thread.
pub(super) enum Worker {
    /// A virtio device.
    Device(DeviceWorker),
    /// The pins of devices of the host.
    Pins(Vec<Arc<PinSource>>),
}

/// Where persistent memory is shown to the guest.
struct PmemPlace {
    range: Range,
    slot: SlotId,
}

impl Devices {
    pub(super) fn new(
        hardware: Hardware,
        ioapic: Arc<IoApic>,
        high: HighMemory,
        address_space: AddressSpace,
        listeners: DmaListeners,
    ) -> Self {
        let passthrough = Arc::new(Passthrough::new(Arc::clone(&hardware.vm), listeners.clone()));
        Self {
            hardware,
            passthrough,
            windows: Windows::new(host_devices_window(), None),
            bus: Arc::new(PciBus::new(address_space.clone())),
            ioapic,
            high,
            address_space,
            listeners,
            attached: BTreeMap::new(),
            next_number: 0,
            window_64: None,
        }
    }

    /// What opens devices of the host.
    pub(super) fn passthrough(&self) -> &Arc<Passthrough> {
        &self.passthrough
    }

    /// What requests to the `vmm` thread are sent by.
    pub(super) fn control(&self) -> &Control {
        &self.hardware.control
    }

    /// The bus that the devices are on.
    pub(super) fn bus(&self) -> &Arc<PciBus> {
        &self.bus
    }

    /// The 64-bit PCI window: there once [`Self::add_all`] has placed what the machine starts with.
    pub(super) fn window_64(&self) -> Option<Range> {
        self.window_64
    }

    /// Makes every device of `config`, in the order in which the guest shall find them.
    pub(super) fn add_all(
        &mut self,
        config: &MachineConfig,
        shared: &Shared,
    ) -> Result<Vec<(DeviceNumber, Worker)>, StartError> {
        let passthrough = Arc::clone(&self.passthrough);
        let mut workers = Vec::new();
        if !config.has_pci() {
            return Ok(workers);
        }
        let memory_devices = self.memory_devices(config, shared)?;
        let mut add = |device: PreparedDevice, fixed: bool| -> Result<(), StartError> {
            let kind = device.kind;
            let slot = self.bus.free_slot().ok_or_else(|| unmade(kind)("the PCI bus has no slot left"))?;
            let name = self.free_name(kind);
            workers.push(self.attach(slot, name, device, fixed)?);
            Ok(())
        };
        add(PreparedDevice::other("rng", Rng::new()), true)?;
        for device in memory_devices {
            add(device, true)?;
        }
        for device in config.devices() {
            add(PreparedDevice::open(&device, &passthrough)?, false)?;
        }
        if let Some(vsock) = &config.vsock {
            let device = Vsock::new(u64::from(vsock.guest_cid), &vsock.socket).map_err(unmade("vsock"))?;
            add(PreparedDevice::other("vsock", device), true)?;
        }
        if config.console != ConsoleOutput::None {
            let (output, input) = console_ends(&config.console).map_err(unmade("console"))?;
            let console = Console::new(output, input);
            shared.add_console(console.tail());
            add(PreparedDevice::other("console", console), true)?;
        }
        self.window_64 = self.high.pci_window();
        self.windows.set_high(self.window_64);
        for device in config.host_devices() {
            let device = PreparedDevice::open(&device, &passthrough)?;
            let slot = self.bus.free_slot().ok_or_else(|| unmade("vfio")("the PCI bus has no slot left"))?;
            let name = self.free_name("vfio");
            workers.push(self.attach(slot, name, device, false)?);
        }
        Ok(workers)
    }

    /// Adds a device to the running machine; its slot says so to nobody yet.
    pub(super) fn add(
        &mut self,
        name: Option<String>,
        device: PreparedDevice,
    ) -> Result<(u8, DeviceNumber, Worker), ChangeError> {
        const NAME_MAX: usize = 64;
        let name = match name {
            Some(name) if name.is_empty() || name.len() > NAME_MAX || self.find(&name).is_some() => {
                return Err(ChangeError::Name(name));
            }
            Some(name) => name,
            None => self.free_name(device.kind),
        };
        let slot = self.bus.free_slot().ok_or(ChangeError::NoSlot)?;
        let (number, worker) = self.attach(slot, name, device, false)?;
        Ok((slot, number, worker))
    }

    /// Gives a device its transport and its slot. Nothing of it is left when that fails.
    fn attach(
        &mut self,
        slot: u8,
        name: String,
        device: PreparedDevice,
        fixed: bool,
    ) -> Result<(DeviceNumber, Worker), Unmade> {
        let kind = device.kind;
        let (device, memory) = match device.part {
            Part::Vfio(group) => return self.attach_group(slot, name, group),
            Part::Other(device) => (device, None),
            Part::Pmem { device, read_only } => {
                let (device, place) = self.place_pmem(device, read_only)?;
                (device, Some(place))
            }
        };
        // There are 31 regions of 16 KiB in a window of more than 600 MiB.
        let address = PCI_32.start + u64::from(REGION_LENGTH) * u64::from(slot - SLOTS.start);
        let address = u32::try_from(address).map_err(io::Error::other).map_err(unmade(kind))?;
        let number = self.next_number;
        let transport =
            Transport::new(self.hardware.clone(), device.as_ref(), number, address).map_err(unmade(kind))?;
        let lines = Arc::clone(transport.lines());
        if !self.bus.add(slot, Arc::new(transport)) {
            return Err(unmade(kind)("its slot is taken"));
        }
        self.next_number += 1;
        let presence = Presence::Present;
        let own_lines = Some(Arc::clone(&lines));
        let attached =
            Attached { name, number, presence, fixed, kind, times: None, lines: own_lines, memory, host: None };
        self.attached.insert(slot, attached);
        Ok((number, Worker::Device(DeviceWorker::new(kind, device, lines))))
    }

    /// Gives devices of the host their memory and their slot.
    fn attach_group(
        &mut self,
        slot: u8,
        name: String,
        mut group: PreparedGroup,
    ) -> Result<(DeviceNumber, Worker), Unmade> {
        let kind = "vfio";
        let number = self.next_number;
        let services = self.services(slot, number);
        let (functions, bars) = match group.place(&mut self.windows, &services) {
            Ok(placed) => placed,
            Err(error) => {
                // Closing devices may take long.
                threads::aside("vfio-close", move || drop(group));
                return Err(unmade(kind)(error));
            }
        };
        let on_bus = functions.iter().map(|(number, function)| (*number, Arc::clone(function) as Arc<dyn PciFunction>));
        let added = self.bus.add_device(slot, on_bus.collect());
        let functions: Vec<_> = functions.into_iter().map(|(_, function)| function).collect();
        if !added {
            bars.into_iter().for_each(|range| self.windows.free(range));
            threads::aside("vfio-close", move || drop(functions));
            return Err(unmade(kind)("its slot is taken"));
        }
        self.next_number += 1;
        let pins = functions.iter().filter_map(|function| function.pin()).collect();
        let host = Some(HostGroup { functions, bars, prepared: group.times() });
        let presence = Presence::Present;
        let attached =
            Attached { name, number, presence, fixed: false, kind, times: None, lines: None, memory: None, host };
        self.attached.insert(slot, attached);
        Ok((number, Worker::Pins(pins)))
    }

    /// What a device of the host in `slot` works with.
    fn services(&self, slot: u8, number: DeviceNumber) -> Services {
        let control = self.hardware.control.clone();
        Services {
            slots: Arc::new(self.address_space.clone()),
            routes: Arc::clone(&self.hardware.router) as _,
            ioapic: Arc::clone(&self.ioapic),
            slot,
            // All that the guest was told of: it places what comes later where it likes.
            windows: [Some(PCI_32), self.window_64].into_iter().flatten().collect(),
            found: Arc::new(move || control.send(Request::Found(number))),
        }
    }

    /// Makes the devices by which the guest gets memory beside its boot memory and gives memory back.
    fn memory_devices(&self, config: &MachineConfig, shared: &Shared) -> Result<Vec<PreparedDevice>, StartError> {
        let mut devices = Vec::new();
        let space = Some(self.address_space.clone());
        if let Some(memory) = PluggableMemory::new(&self.hardware.memory, space, self.listeners.clone()) {
            let mem = Mem::new(memory, config.memory_max() - config.memory).map_err(unmade("mem"))?;
            shared.set_memory(mem.control());
            devices.push(PreparedDevice::other("mem", mem));
        }
        if config.balloon {
            let balloon = Balloon::new(self.listeners.clone(), config.memory_max()).map_err(unmade("balloon"))?;
            shared.set_balloon(balloon.control());
            devices.push(PreparedDevice::other("balloon", balloon));
        }
        Ok(devices)
    }

    fn place_pmem(&mut self, mut pmem: Pmem, read_only: bool) -> Result<(Box<dyn VirtioDevice>, PmemPlace), Unmade> {
        let mapping = pmem.mapping();
        let no_room = || unmade("pmem")("the guest's address space has no room left");
        let range = self.high.place_pmem(mapping.len()).ok_or_else(no_room)?;
        let host = mapping.host_address().as_ptr() as u64;
        let access = if read_only { SlotAccess::ReadOnly } else { SlotAccess::ReadWrite };
        // SAFETY: the mapping is as long as the range and lives in the device, which the `vmm`
        // thread drops after it has removed the slot or joined the vCPUs.
        let slot = unsafe { self.address_space.add(range, host, access) }.map_err(unmade("pmem"))?;
        pmem.set_start(GuestAddress(range.start));
        Ok((Box::new(pmem), PmemPlace { range, slot }))
    }

    /// Takes the device out of its slot, and gives what is left to do.
    pub(super) fn detach(&mut self, slot: u8) -> Detached {
        let Some(attached) = self.attached.remove(&slot) else { return Detached::default() };
        self.bus.remove(slot);
        let may_drop = attached.memory.is_none_or(|place| self.hide(place));
        let leaving = attached.host.map(|HostGroup { functions, bars, .. }| Leaving { functions, bars });
        Detached { worker: may_drop.then_some(attached.number), leaving }
    }

    /// Takes back what of the PCI windows devices had that are gone.
    pub(super) fn free(&mut self, ranges: Vec<Range>) {
        ranges.into_iter().for_each(|range| self.windows.free(range));
    }

    /// Whether the device in `slot` is one of the host, and how long it took to prepare it.
    pub(super) fn prepared(&self, slot: u8) -> Option<PrepareTimes> {
        Some(self.attached.get(&slot)?.host.as_ref()?.prepared)
    }

    /// Takes memory from the guest; false when KVM does not.
    fn hide(&mut self, PmemPlace { range, slot }: PmemPlace) -> bool {
        match self.address_space.remove(slot) {
            Ok(()) => {
                self.high.free_pmem(range);
            }
            Err(error) => {
                tracing::error!(%error, ?range, "KVM does not take persistent memory from the guest; it stays mapped");
                return false;
            }
        }
        true
    }

    /// The slots that devices can come to and go from, a bit each: all but those of devices that came to stay.
    pub(super) fn changing_slots(&self) -> u32 {
        let stays = |slot: &u8| self.attached.get(slot).is_some_and(|attached| attached.fixed);
        SLOTS.filter(|slot| !stays(slot)).fold(0, |bits, slot| bits | 1 << slot)
    }

    /// The slot of the device of this name.
    pub(super) fn find(&self, name: &str) -> Option<u8> {
        self.attached.iter().find(|(_, attached)| attached.name == name).map(|(slot, _)| *slot)
    }

    /// The slot of the device of this number.
    pub(super) fn find_number(&self, number: DeviceNumber) -> Option<u8> {
        self.attached.iter().find(|(_, attached)| attached.number == number).map(|(slot, _)| *slot)
    }

    /// The device in `slot`.
    pub(super) fn at(&mut self, slot: u8) -> Option<&mut Attached> {
        self.attached.get_mut(&slot)
    }

    /// The first name of this kind that no device has: `blk0`, `blk1` …
    fn free_name(&self, kind: &str) -> String {
        // There are fewer devices than numbers to try.
        (0..=self.attached.len())
            .map(|number| format!("{kind}{number}"))
            .find(|name| self.find(name).is_none())
            .unwrap_or_else(|| kind.to_owned())
    }

    /// All devices by their slots.
    pub(super) fn info(&self) -> Vec<DeviceInfo> {
        self.attached.keys().filter_map(|slot| self.info_of(*slot)).collect()
    }

    /// The device in `slot`.
    pub(super) fn info_of(&self, slot: u8) -> Option<DeviceInfo> {
        let attached = self.attached.get(&slot)?;
        let bars = self.bus.decoded(slot).into_iter();
        let mut ranges: Vec<_> = bars.map(|(bar, range)| range_info(range, &format!("BAR{bar}"))).collect();
        ranges.extend(attached.memory.as_ref().map(|place| range_info(place.range, "memory")));
        Some(DeviceInfo {
            name: attached.name.clone(),
            kind: attached.kind.to_owned(),
            address: format!("0000:00:{slot:02x}.0"),
            slot,
            presence: attached.presence,
            ranges,
            interrupts: attached.lines.as_ref().map(|lines| lines.routes()).unwrap_or_default(),
            times: attached.times,
        })
    }
}

/// The part of the 32-bit window that devices of the host get: behind the registers of virtio devices.
fn host_devices_window() -> Range {
    let virtio = (u64::from(REGION_LENGTH) * u64::from(SLOTS.end)).next_power_of_two();
    Range { start: PCI_32.start + virtio, length: PCI_32.length - virtio }
}

/// A range for people and machines to read.
pub(super) fn range_info(range: Range, what: &str) -> RangeInfo {
    RangeInfo { start: range.start, length: range.length, what: what.to_owned() }
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
        ConsoleOutput::File(path) => Box::new(append_to(path).map_err(unmade("debug UART"))?),
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
