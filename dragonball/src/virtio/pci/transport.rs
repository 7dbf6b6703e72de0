//! One virtio function as the vCPUs see it.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::layout::{self, Capabilities};
use super::lines::Lines;
use super::registers::{Effect, Registers, VERSION_1, View};
use crate::control::{Control, DeviceNumber, DeviceRequest, Request};
use crate::irq::router::IrqRouter;
use crate::memory::layout::Range;
use crate::pci::PciFunction;
use crate::pci::config::{ConfigSpace, ConfigState};
use crate::pci::config_page::ConfigPage;
use crate::pci::msix::MsixState;
use crate::virtio::device::{Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice};

/// What of the machine a transport works with.
#[derive(Clone)]
pub(crate) struct Hardware {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) router: Arc<IrqRouter>,
    pub(crate) memory: GuestMemory,
    pub(crate) control: Control,
}

/// The registers of a device and the way to it.
pub(crate) struct Transport {
    hardware: Hardware,
    /// The device's number on the `vmm` thread.
    device: DeviceNumber,
    offered: u64,
    queue_sizes: Vec<u16>,
    pub(super) capabilities: Capabilities,
    lines: Arc<Lines>,
    state: Mutex<State>,
    /// Where the guest reads the registers of configuration space. Never held while the `vmm` thread is waited for, which
    /// takes it when the function goes.
    page: Mutex<Option<Arc<ConfigPage>>>,
}

struct State {
    config: ConfigSpace,
    registers: Registers,
    /// The doorbell of each ring of an active device.
    doorbells: Vec<Doorbell>,
    /// Where KVM watches the doorbells.
    watched: Option<Range>,
}

struct Doorbell {
    queue: u16,
    event: EventFd,
}

/// Saved state of a transport; the device's own is beside it.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct TransportState {
    config: ConfigState,
    registers: Registers,
    msix: MsixState,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

impl Transport {
    /// A transport for `device`, number `number` on the `vmm` thread, with its memory at `address`.
    ///
    /// # Errors
    /// When the device has more queues than there are doorbells and vectors for.
    pub(crate) fn new(
        hardware: Hardware,
        device: &dyn VirtioDevice,
        number: DeviceNumber,
        address: u32,
    ) -> io::Result<Self> {
        const QUEUES_MAX: u16 = 255;
        let too_many = || io::Error::other("a virtio device with more than 255 queues cannot be carried");
        let queue_sizes = device.queue_sizes().to_vec();
        let queues = u16::try_from(queue_sizes.len()).ok().filter(|count| *count <= QUEUES_MAX);
        let queues = queues.ok_or_else(too_many)?;
        let (config, capabilities) = layout::config_space(device.kind(), address, queues + 1).ok_or_else(too_many)?;
        let lines = Lines::new(Arc::clone(&hardware.router), queues, device.config());
        let registers = Registers::new(&queue_sizes);
        Ok(Self {
            hardware,
            device: number,
            offered: device.features() | VERSION_1,
            queue_sizes,
            capabilities,
            lines: Arc::new(lines),
            state: Mutex::new(State { config, registers, doorbells: Vec::new(), watched: None }),
            page: Mutex::new(None),
        })
    }

    /// What the device's side of the transport needs.
    pub(crate) fn lines(&self) -> &Arc<Lines> {
        &self.lines
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, request: DeviceRequest) {
        self.hardware.control.send(Request::Device { number: self.device, request });
    }

    /// Sends a request and waits until it is done. A machine that is ending drops its requests, which ends the wait.
    fn send_and_wait(&self, request: impl FnOnce(mpsc::Sender<()>) -> DeviceRequest) {
        let (done, wait) = mpsc::channel();
        self.send(request(done));
        let _ = wait.recv();
    }

    fn read_common(&self, state: &State, offset: u64, data: &mut [u8]) {
        let selected = self.lines.queue_vectors.get(usize::from(state.registers.queue_select));
        let view = View {
            offered: self.offered,
            generation: self.lines.generation(),
            broken: self.lines.is_broken(),
            config_vector: self.lines.config_vector.load(Ordering::Acquire),
            queue_vector: selected.map_or(0, |vector| vector.load(Ordering::Acquire)),
        };
        state.registers.read(offset, data, &view);
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        match state.registers.write(offset, data, self.offered) {
            Effect::None => {}
            Effect::Reset => self.reset(state),
            Effect::Activate => self.activate(state),
            Effect::ConfigVector(vector) => {
                self.lines.config_vector.store(self.known_vector(vector), Ordering::Release);
            }
            Effect::QueueVector(vector) => {
                self.lines.set_queue_vector(state.registers.queue_select, self.known_vector(vector));
            }
        }
    }

    /// The vector, or none when there is no such vector: the driver reads back that it was refused.
    fn known_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) <= self.queue_sizes.len() { vector } else { super::lines::NO_VECTOR }
    }

    fn reset(&self, state: &mut State) {
        self.unwatch(state);
        state.doorbells.clear();
        if state.registers.active() {
            self.send_and_wait(DeviceRequest::Reset);
        }
        state.registers = Registers::new(&self.queue_sizes);
        self.lines.reset();
    }

    /// Hands the device its rings. A ring that the driver set up wrongly breaks the device.
    fn activate(&self, state: &mut State) {
        let features = state.registers.driver_features;
        let mut queues = Vec::new();
        let rings = state.registers.rings.iter().zip(&self.queue_sizes).zip(0_u16..);
        for ((ring, max_size), index) in rings.filter(|((ring, _), _)| ring.enabled) {
            let queue = ring.queue(*max_size, features, &self.hardware.memory);
            let doorbell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .and_then(|event| Ok((event.try_clone()?, Doorbell { queue: index, event })));
            match (queue, doorbell) {
                (Some(queue), Ok((kick, doorbell))) => {
                    queues.push(ActiveQueue { index, queue, kick });
                    state.doorbells.push(doorbell);
                }
                (queue, doorbell) => {
                    let error = doorbell.err();
                    tracing::warn!(device = self.device, index, valid = queue.is_some(), ?error, "a ring is unusable");
                    state.doorbells.clear();
                    self.lines.set_broken();
                    return;
                }
            }
        }
        let interrupt: Arc<dyn Interrupt> = Arc::clone(&self.lines) as _;
        let activation = Activation { memory: Arc::clone(&self.hardware.memory), queues, features, interrupt };
        self.send(DeviceRequest::Activate(activation));
        self.watch(state);
    }

    /// Lets KVM take the doorbells at the function's present address.
    fn watch(&self, state: &mut State) {
        let Some(range) = state.config.bar(layout::BAR) else { return };
        for (position, doorbell) in state.doorbells.iter().enumerate() {
            let address = IoEventAddress::Mmio(doorbell_address(range, doorbell.queue));
            if let Err(error) = self.hardware.vm.register_ioevent(&doorbell.event, &address, NoDatamatch) {
                // The accesses then come as exits, which works as well.
                tracing::debug!(%error, ?range, "KVM does not watch a doorbell");
                self.unwatch_doorbells(&state.doorbells[..position], range);
                return;
            }
        }
        state.watched = Some(range);
    }

    fn unwatch(&self, state: &mut State) {
        if let Some(range) = state.watched.take() {
            self.unwatch_doorbells(&state.doorbells, range);
        }
    }

    fn unwatch_doorbells(&self, doorbells: &[Doorbell], range: Range) {
        for doorbell in doorbells {
            let address = IoEventAddress::Mmio(doorbell_address(range, doorbell.queue));
            if let Err(error) = self.hardware.vm.unregister_ioevent(&doorbell.event, &address, NoDatamatch) {
                tracing::warn!(%error, ?range, "KVM still watches a doorbell");
            }
        }
    }

    /// A doorbell whose write KVM did not take.
    fn ring(state: &State, offset: u64) {
        let queue = offset / u64::from(layout::DOORBELL_DISTANCE);
        if let Some(doorbell) = state.doorbells.iter().find(|doorbell| u64::from(doorbell.queue) == queue) {
            // Fails only when the counter is at its maximum: the device has been told then.
            let _ = doorbell.event.write(1);
        }
    }

    /// The window in configuration space: which access of the region its registers ask for, if a valid one.
    fn window(&self, state: &State) -> Option<(u64, usize)> {
        let body: [u8; 14] = state.config.bytes_at(self.capabilities.window);
        let [_, _, bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3] = body;
        let offset = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
        let valid = bar == layout::BAR && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length as u64);
        (valid && offset + (length as u64) <= u64::from(layout::LENGTH)).then_some((offset, length))
    }

    fn page(&self) -> MutexGuard<'_, Option<Arc<ConfigPage>>> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registers of configuration space have changed. The window's data are no register: once the guest has opened it,
    /// its reads must come here.
    fn update_page(&self, state: &State) {
        let page = self.page();
        match page.as_ref() {
            Some(page) if self.window(state).is_some() => page.hide(),
            Some(page) => page.update(state.config.registers()),
            None => {}
        }
    }

    /// Whether an access of configuration space is one of the window's data.
    fn is_window_data(&self, register: u16) -> bool {
        register == self.capabilities.window + layout::WINDOW_DATA
    }

    fn read_region(&self, state: &State, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let size = data.len();
        if let Some(offset) = layout::COMMON.offset_of(offset, size) {
            self.read_common(state, offset, data);
        } else if let Some(offset) = layout::DEVICE.offset_of(offset, size) {
            self.lines.read_config(offset, data);
        } else if let Some(offset) = layout::MSIX_TABLE.offset_of(offset, size) {
            self.lines.msix.read_table(offset, data);
        } else if let Some(offset) = layout::MSIX_PENDING.offset_of(offset, size) {
            self.lines.msix.read_pending(offset, data);
        } else if layout::INTERRUPT_STATUS.offset_of(offset, size) == Some(0) {
            data[0] = self.lines.take_status();
        }
    }

    fn write_region(&self, state: &mut State, offset: u64, data: &[u8]) {
        let size = data.len();
        if let Some(offset) = layout::COMMON.offset_of(offset, size) {
            self.write_common(state, offset, data);
        } else if let Some(offset) = layout::DOORBELLS.offset_of(offset, size) {
            Self::ring(state, offset);
        } else if let Some(offset) = layout::MSIX_TABLE.offset_of(offset, size) {
            self.lines.msix.write_table(offset, data);
        } else if let Some(offset) = layout::DEVICE.offset_of(offset, size) {
            let data = data.to_vec();
            self.send_and_wait(|done| DeviceRequest::WriteConfig { offset, data, done });
        }
    }

    /// The state to be saved, taken while the vCPUs stand still.
    #[cfg_attr(not(test), expect(dead_code, reason = "part of saving a whole machine, which comes with templates"))]
    pub(crate) fn save(&self) -> TransportState {
        let state = self.state();
        TransportState {
            config: state.config.save(),
            registers: state.registers.clone(),
            msix: self.lines.msix.save(),
            config_vector: self.lines.config_vector.load(Ordering::Acquire),
            queue_vectors: self.lines.queue_vectors.iter().map(|vector| vector.load(Ordering::Acquire)).collect(),
        }
    }

    /// Takes a saved state, before the vCPUs run and after the device took its own: a device that was active is handed
    /// its rings again.
    ///
    /// # Errors
    /// When the state is not one of such a device; nothing has changed then.
    #[cfg_attr(not(test), expect(dead_code, reason = "part of saving a whole machine, which comes with templates"))]
    pub(crate) fn restore(&self, saved: &TransportState) -> io::Result<()> {
        let misfit = || io::Error::new(io::ErrorKind::InvalidData, "the saved transport is of another device");
        let mut state = self.state();
        let mut config = state.config.clone();
        let fits = saved.registers.fits(&self.queue_sizes, self.offered)
            && saved.queue_vectors.len() == self.queue_sizes.len()
            && config.restore(&saved.config);
        if !fits || !self.lines.msix.restore(&saved.msix) {
            return Err(misfit());
        }
        state.config = config;
        self.update_page(&state);
        state.registers = saved.registers.clone();
        self.lines.config_vector.store(self.known_vector(saved.config_vector), Ordering::Release);
        for (slot, vector) in self.lines.queue_vectors.iter().zip(&saved.queue_vectors) {
            slot.store(self.known_vector(*vector), Ordering::Release);
        }
        if state.registers.active() {
            self.activate(&mut state);
        }
        Ok(())
    }
}

fn doorbell_address(region: Range, queue: u16) -> u64 {
    region.start + layout::DOORBELLS.start + u64::from(queue) * u64::from(layout::DOORBELL_DISTANCE)
}

/// A function that was removed: KVM no longer watches its doorbells.
impl Drop for Transport {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (doorbells, watched) = (std::mem::take(&mut state.doorbells), state.watched.take());
        if let Some(range) = watched {
            self.unwatch_doorbells(&doorbells, range);
        }
    }
}

impl PciFunction for Transport {
    fn read_config(&self, register: u16, data: &mut [u8]) {
        let state = self.state();
        match self.window(&state) {
            Some((offset, length)) if self.is_window_data(register) && data.len() == length => {
                self.read_region(&state, offset, data);
            }
            _ => state.config.read(register, data),
        }
    }

    fn write_config(&self, register: u16, data: &[u8]) -> bool {
        let mut state = self.state();
        if let Some((offset, length)) = self.window(&state)
            && self.is_window_data(register)
            && data.len() == length
        {
            self.write_region(&mut state, offset, data);
            return false;
        }
        let moved = state.config.write(register, data);
        self.update_page(&state);
        let [_, control] = state.config.bytes_at(self.capabilities.msix);
        self.lines.msix.set_control(control);
        if moved && state.watched != state.config.bar(layout::BAR) && !state.doorbells.is_empty() {
            self.unwatch(&mut state);
            self.watch(&mut state);
        }
        moved
    }

    fn show_config(&self, page: &Arc<ConfigPage>) -> bool {
        let state = self.state();
        if self.window(&state).is_none() {
            page.show(state.config.registers());
        }
        *self.page() = Some(Arc::clone(page));
        true
    }

    fn leave_config(&self) {
        *self.page() = None;
    }

    fn ranges(&self) -> Vec<(u8, Range)> {
        self.state().config.bar(layout::BAR).map(|range| (layout::BAR, range)).into_iter().collect()
    }

    fn read_memory(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.read_region(&self.state(), offset, data);
    }

    fn write_memory(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.write_region(&mut self.state(), offset, data);
    }
}
