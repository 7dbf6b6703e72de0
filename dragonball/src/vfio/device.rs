//! A PCI function of the machine that is a device of the host.

use std::io;
use std::ops::Range as Span;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::VfioError;
use super::bars::{Bar, BarInfo, Slots, View, discover};
use super::capabilities::{CONVENTIONAL, EXTENDED};
use super::dma::Dma;
use super::host::{CONFIG_REGION, HostDevice, IrqKind};
use super::overlay::{Interrupts, Msi, MsixControl, MsixLayout, Overlay};
use super::pin::Pin;
use super::table::Table;
use super::vectors::{Routes, Vectors};
use crate::irq::ioapic::IoApic;
use crate::irq::pin::PinSource;
use crate::memory::layout::Range;
use crate::pci::PciFunction;
use crate::pci::windows::BarRequest;

const COMMAND: u64 = 0x04;

/// What of the machine a function works with.
#[derive(Clone)]
pub(crate) struct Services {
    /// KVM's memory slots.
    pub(crate) slots: Arc<dyn Slots>,
    /// KVM's interrupt routes.
    pub(crate) routes: Arc<dyn Routes>,
    /// What the pins of functions are joined to.
    pub(crate) ioapic: Arc<IoApic>,
    /// The slot that the function goes into.
    pub(crate) slot: u8,
    /// Called at the guest's first write to a function: it has found it.
    pub(crate) found: Arc<dyn Fn() + Send + Sync>,
    /// The addresses that BARs may have: a guest that puts one elsewhere, over its RAM for instance, loses it.
    pub(crate) windows: Vec<Range>,
}

/// A device that was reset, looked at and mapped, before it has a place in the guest.
pub(crate) struct Candidate {
    host: Arc<dyn HostDevice>,
    overlay: Overlay,
    bars: Vec<Bar>,
    options: Options,
}

impl Candidate {
    /// Resets a device, learns what it has, and maps its memory. May take seconds.
    ///
    /// # Errors
    /// When it does not answer, has BARs that no specification allows, or its memory cannot be mapped.
    pub(crate) fn new(host: Arc<dyn HostDevice>, options: &Options) -> Result<Self, VfioError> {
        if let Err(error) = host.reset() {
            tracing::warn!(device = host.name(), %error, "the host cannot reset it: the guest gets it as it is");
        }
        let look = || {
            // Whatever had it before, it answers to no address and writes to no memory now.
            host.write(CONFIG_REGION, COMMAND, &[0; 2])?;
            discover(&*host)
        };
        let bars = look().map_err(refused(&*host, "read its registers"))?;
        let count = |kind| host.irq(kind).count;
        let interrupts =
            Interrupts { intx: count(IrqKind::Intx), msi: count(IrqKind::Msi), msix: count(IrqKind::Msix) };
        let bytes = config_space(&*host).map_err(refused(&*host, "read its configuration space"))?;
        let mut overlay = Overlay::new(bytes, interrupts, options.clique);
        if options.multi_function {
            overlay.set_multi_function();
        }
        let trapped = |bar: &BarInfo| {
            let layout = overlay.msix()?;
            let (index, start) = layout.table;
            (index == bar.index).then(|| Range { start, length: Table::new(layout.vectors).length() })
        };
        let map = |bar: BarInfo| Bar::map(&*host, bar, trapped(&bar));
        let bars = bars.into_iter().map(map).collect::<io::Result<_>>();
        let bars = bars.map_err(refused(&*host, "map its memory"))?;
        Ok(Self { host, overlay, bars, options: options.clone() })
    }

    /// What its BARs ask for.
    pub(crate) fn requests(&self) -> Vec<BarRequest> {
        self.bars.iter().map(|bar| bar.info.request).collect()
    }
}

fn refused(host: &dyn HostDevice, action: &'static str) -> impl FnOnce(io::Error) -> VfioError {
    let device = host.name().to_owned();
    move |source| VfioError::Host { device, action, source }
}

/// What else of a function is up to whoever adds it.
#[derive(Clone, Default)]
pub(crate) struct Options {
    /// NVIDIA's number of devices that may access each other's memory.
    pub(crate) clique: Option<u8>,
    /// Where its memory is made visible to other devices.
    pub(crate) peers: Option<Arc<Dma>>,
    /// Whether its slot has several functions.
    pub(crate) multi_function: bool,
    /// What must outlive the device, if anything.
    pub(crate) keeper: Option<Arc<dyn Send + Sync>>,
}

/// The function.
pub(crate) struct VfioFunction {
    host: Arc<dyn HostDevice>,
    windows: Vec<Range>,
    view: View,
    msix_layout: Option<MsixLayout>,
    /// Called once.
    found: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    state: Mutex<State>,
    /// Dropped last, after the device was closed.
    _keeper: Option<Arc<dyn Send + Sync>>,
}

struct State {
    overlay: Overlay,
    bars: Vec<Bar>,
    table: Table,
    msix: Vectors,
    /// What of MSI-X and MSI the host was last told.
    msix_control: MsixControl,
    msi: Vectors,
    msi_wanted: Msi,
    pin: Option<Pin>,
    /// It has gone: whatever a vCPU still asks of it changes nothing.
    retired: bool,
}

impl VfioFunction {
    /// Makes a function with its BARs at `addresses`, which are in the order of [`Candidate::requests`]. Takes no time.
    ///
    /// # Errors
    /// When there are no file descriptors left for its interrupts.
    pub(crate) fn new(candidate: Candidate, addresses: &[Range], services: &Services) -> Result<Self, VfioError> {
        let Candidate { host, mut overlay, bars, options } = candidate;
        for (bar, address) in bars.iter().zip(addresses) {
            overlay.set_bar(bar.info.index, address.start, bar.info.request);
        }
        let msix_layout = overlay.msix();
        let table = Table::new(msix_layout.map_or(0, |layout| layout.vectors));
        let pin = overlay.pin().map(|pin| Pin::new(&host, &services.ioapic, services.slot, pin)).transpose();
        let pin = pin.map_err(refused(&*host, "make its interrupt"))?;
        let vectors = |kind| Vectors::new(kind, Arc::clone(&host), Arc::clone(&services.routes));
        let state = State {
            overlay,
            bars,
            table,
            pin,
            msix: vectors(IrqKind::Msix),
            msix_control: MsixControl::default(),
            msi: vectors(IrqKind::Msi),
            msi_wanted: Msi::default(),
            retired: false,
        };
        let view = View { slots: Arc::clone(&services.slots), peers: options.peers.clone() };
        let windows = services.windows.clone();
        let found = Mutex::new(Some(Arc::clone(&services.found)));
        Ok(Self { host, windows, view, msix_layout, found, state: Mutex::new(state), _keeper: options.keeper })
    }

    /// Its pin, for the `vmm` thread to watch.
    pub(crate) fn pin(&self) -> Option<Arc<PinSource>> {
        self.state().pin.as_ref().map(|pin| Arc::clone(pin.source()))
    }

    /// The device stops interrupting, vanishes from the guest, and is reset for whoever gets it next. May take seconds.
    pub(crate) fn retire(&self) {
        let mut state = self.state();
        if std::mem::replace(&mut state.retired, true) {
            return;
        }
        state.msix.set(&[]);
        state.msi.set(&[]);
        if let Some(pin) = &mut state.pin {
            pin.set(false);
        }
        for bar in &mut state.bars {
            bar.leave(None, &self.view);
        }
        let stopped = self.host.write(CONFIG_REGION, COMMAND, &[0; 2]).and_then(|()| self.host.reset());
        if let Err(error) = stopped {
            tracing::warn!(device = self.host.name(), %error, "the host cannot reset it");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the guest has a BAR now; nothing while it is not decoded.
    fn place(&self, overlay: &Overlay, bar: &BarInfo) -> Option<Range> {
        let range = Range { start: overlay.bar(bar.index, bar.request), length: bar.request.length };
        let end = range.start.checked_add(range.length)?;
        let inside = |window: &Range| window.start <= range.start && end <= window.end();
        (overlay.decodes_memory() && self.windows.iter().any(inside)).then_some(range)
    }

    /// Gives the device those bits of a write that are its own; the others keep what they have there.
    fn forward(&self, register: usize, data: &[u8], bits: &[u8]) -> io::Result<()> {
        let register = register as u64;
        let mut value = data.to_vec();
        if bits.iter().any(|bits| *bits != 0xff) {
            let mut present = vec![0; data.len()];
            self.host.read(CONFIG_REGION, register, &mut present)?;
            for ((value, present), bits) in value.iter_mut().zip(present).zip(bits) {
                *value = *value & bits | present & !bits;
            }
        }
        self.host.write(CONFIG_REGION, register, &value)
    }

    /// After a write to the power state: the device may have refused it.
    fn refresh_power(&self, overlay: &mut Overlay, written: &Span<usize>) {
        let mut power = [0];
        if let Some(register) = overlay.power_register().filter(|register| written.contains(register))
            && self.host.read(CONFIG_REGION, register as u64, &mut power).is_ok()
        {
            overlay.set_power_state(power[0]);
        }
    }

    /// Tells the host what of its interrupts the guest has changed. The pin comes last when it is switched on and first when
    /// it is switched off: the host lets a device interrupt in one way at a time.
    fn update_interrupts(state: &mut State) {
        let (control, msi) = (state.overlay.msix_control(), state.overlay.msi());
        let by_message = control.enabled || msi.as_ref().is_some_and(|msi| msi.enabled);
        let by_pin = !by_message && state.overlay.decodes_memory();
        let mut set_pin = |on: bool| {
            if let Some(pin) = state.pin.as_mut().filter(|_| on == by_pin) {
                pin.set(on);
            }
        };
        set_pin(false);
        if control != state.msix_control {
            state.msix_control = control;
            state.msix.set(&state.table.wanted(control));
        }
        if let Some(msi) = msi.filter(|msi| *msi != state.msi_wanted) {
            state.msi.set(if msi.enabled { &msi.vectors } else { &[] });
            state.msi_wanted = msi;
        }
        set_pin(true);
    }

    /// The place of an access in the table of MSI-X.
    fn in_table(&self, state: &State, bar: usize, offset: u64) -> Option<usize> {
        let (table_bar, start) = self.msix_layout?.table;
        let offset = offset.checked_sub(start).filter(|offset| bar == table_bar && *offset < state.table.length())?;
        usize::try_from(offset).ok()
    }

    /// The place of an access in the pending bits of MSI-X.
    fn in_pending(&self, state: &State, bar: usize, offset: u64) -> Option<usize> {
        let (pending_bar, start) = self.msix_layout?.pending;
        let length = state.table.vectors().div_ceil(64) as u64 * 8;
        let offset = offset.checked_sub(start).filter(|offset| bar == pending_bar && *offset < length)?;
        usize::try_from(offset).ok()
    }
}

/// Reads the whole configuration space: 4096 bytes of a device of PCI Express, 256 of another.
fn config_space(host: &dyn HostDevice) -> io::Result<Vec<u8>> {
    let size = host.region(CONFIG_REGION).size;
    let mut bytes = vec![0; if size >= EXTENDED as u64 { EXTENDED } else { CONVENTIONAL }];
    for (offset, word) in (0_u64..).step_by(4).zip(bytes.chunks_exact_mut(4)) {
        host.read(CONFIG_REGION, offset, word)?;
    }
    Ok(bytes)
}

impl PciFunction for VfioFunction {
    fn read_config(&self, register: u16, data: &mut [u8]) {
        let state = self.state();
        let register = usize::from(register);
        if state.overlay.needs_device(register, data.len())
            && let Err(error) = self.host.read(CONFIG_REGION, register as u64, data)
        {
            tracing::debug!(device = self.host.name(), %error, register, "a register cannot be read");
            data.fill(0xff);
        }
        state.overlay.cover(register, data);
    }

    fn write_config(&self, register: u16, data: &[u8]) -> bool {
        if let Some(found) = self.found.lock().unwrap_or_else(PoisonError::into_inner).take() {
            found();
        }
        let mut guard = self.state();
        let state = &mut *guard;
        if state.retired {
            return false;
        }
        let register = usize::from(register);
        let places =
            |state: &State| -> Vec<_> { state.bars.iter().map(|bar| self.place(&state.overlay, &bar.info)).collect() };
        let before = places(state);
        let forwarded = state.overlay.write(register, data);
        // What goes is gone before the device stops answering: the host would end the VM at an access.
        let meanwhile = places(state);
        for (bar, place) in state.bars.iter_mut().zip(meanwhile) {
            bar.leave(place, &self.view);
        }
        if let Some(bits) = forwarded {
            if let Err(error) = self.forward(register, data, &bits) {
                tracing::debug!(device = self.host.name(), %error, register, "a register cannot be written");
            }
            self.refresh_power(&mut state.overlay, &(register..register + data.len()));
        }
        let after = places(state);
        for (bar, place) in state.bars.iter_mut().zip(&after) {
            bar.leave(*place, &self.view);
        }
        for (bar, place) in state.bars.iter_mut().zip(&after) {
            bar.appear(*place, &self.view);
        }
        Self::update_interrupts(state);
        before != after
    }

    fn ranges(&self) -> Vec<(u8, Range)> {
        let state = self.state();
        let place = |bar: &Bar| Some((u8::try_from(bar.info.index).ok()?, self.place(&state.overlay, &bar.info)?));
        state.bars.iter().filter_map(place).collect()
    }

    fn read_memory(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let bar = usize::from(bar);
        let state = self.state();
        if let Some(offset) = self.in_table(&state, bar, offset) {
            return state.table.read(offset, data);
        }
        if let Some(first) = self.in_pending(&state, bar, offset) {
            for (at, byte) in (first..).zip(data) {
                *byte = (0..8).fold(0, |bits, bit| bits | u8::from(state.msix.is_pending(at * 8 + bit)) << bit);
            }
            return;
        }
        drop(state);
        if let Err(error) = self.host.read(bar, offset, data) {
            tracing::debug!(device = self.host.name(), %error, bar, offset, "memory cannot be read");
            data.fill(0xff);
        }
    }

    fn write_memory(&self, bar: u8, offset: u64, data: &[u8]) {
        let bar = usize::from(bar);
        let mut state = self.state();
        if state.retired {
            return;
        }
        if let Some(offset) = self.in_table(&state, bar, offset) {
            state.table.write(offset, data);
            let wanted = state.table.wanted(state.msix_control);
            return state.msix.set(&wanted);
        }
        let pending = self.in_pending(&state, bar, offset).is_some();
        drop(state);
        if !pending && let Err(error) = self.host.write(bar, offset, data) {
            tracing::debug!(device = self.host.name(), %error, bar, offset, "memory cannot be written");
        }
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        self.retire();
    }
}

#[cfg(test)]
mod tests;
