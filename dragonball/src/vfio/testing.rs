//! A synthetic device of the host and a synthetic KVM, for tests and for the fuzz target: no hardware, no `/dev/kvm`.
//!
//! The device is strict where VFIO is: it answers memory accesses only while its memory is decoded and it is powered, and
//! KVM's slots refuse to overlap.
#![allow(clippy::expect_used, reason = "a test that cannot set its machine up has failed, and says where")]
#![cfg_attr(not(test), allow(dead_code, reason = "the fuzz target needs less than the tests"))]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::bars::Slots;
use super::host::{BARS, CONFIG_REGION, HostDevice, IrqInfo, IrqKind, Region};
use super::mapping::Mapping;
use super::vectors::Routes;
use crate::irq::Message;
use crate::irq::ioapic::{IoApic, MessageSink};
use crate::irq::router::Gsi;
use crate::memory::SlotId;
use crate::memory::layout::Range;

/// Where the regions of the device are apart in its file.
const REGION_DISTANCE: u64 = 1 << 40;
const COMMAND: usize = 4;
const MEMORY: u8 = 1 << 1;
/// Where the synthetic device has its capabilities.
pub(super) const POWER: usize = 0x60;
pub(super) const MSI: usize = 0x68;
pub(super) const MSIX: usize = 0x80;
pub(super) const EXPRESS: usize = 0xa0;
/// BAR, offset and vectors of its MSI-X table.
pub(super) const TABLE: (usize, u64) = (0, 0x8000);
pub(super) const VECTORS: u16 = 8;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The shape of a GPU: registers with an MSI-X table, video memory, and memory beside it.
pub(super) struct Synthetic {
    memory: File,
    sizes: [u64; BARS],
    /// Whether MSI-X vectors can be added while others are in use.
    pub(super) grows: bool,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) config: Vec<u8>,
    /// The events of each kind, by vector.
    events: [Vec<Option<EventFd>>; 3],
    pub(super) resets: usize,
    /// Calls that set events.
    pub(super) settings: usize,
    /// Calls that let the pin interrupt again.
    pub(super) unmasked: usize,
}

impl Synthetic {
    /// A device with `video` bytes of video memory.
    pub(super) fn new(video: u64) -> Self {
        let memory = vmm_sys_util::tempfile::TempFile::new().expect("a file").into_file();
        memory.set_len(BARS as u64 * REGION_DISTANCE).expect("a sparse file");
        let state = Mutex::new(State { config: config(), ..State::default() });
        Self { memory, sizes: [1 << 16, video, 0, 32 << 20, 0, 0x80], grows: true, state }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Whether anybody listens to a vector; an interrupt goes there.
    pub(super) fn interrupt(&self, kind: IrqKind, vector: usize) -> bool {
        let state = self.state();
        match state.events[kind as usize].get(vector) {
            Some(Some(event)) => event.write(1).is_ok(),
            _ => false,
        }
    }

    /// How many vectors of a kind are switched on.
    pub(super) fn vectors(&self, kind: IrqKind) -> usize {
        self.state().events[kind as usize].len()
    }

    fn decodes(&self) -> bool {
        let state = self.state();
        state.config[COMMAND] & MEMORY != 0 && state.config[POWER + 4] & 3 == 0
    }

    fn check(&self, region: usize, offset: u64, size: usize) -> io::Result<()> {
        let length = self.region(region).size;
        let inside = offset.checked_add(size as u64).is_some_and(|end| end <= length);
        if !inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if region != CONFIG_REGION && !self.decodes() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

/// A display of NVIDIA with capabilities, three BARs of memory and one of ports.
fn config() -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    bytes[..4].copy_from_slice(&[0xde, 0x10, 0xb0, 0x20]);
    bytes[6] = 0x10;
    bytes[8..12].copy_from_slice(&[0xa1, 0, 2, 3]);
    for (offset, register) in [(0x10, 0xfb00_0000_u32), (0x14, 0xc), (0x1c, 0xc), (0x24, 0xe001)] {
        bytes[offset..offset + 4].copy_from_slice(&register.to_le_bytes());
    }
    bytes[0x34] = 0x60;
    bytes[0x3d] = 1;
    bytes[POWER..POWER + 8].copy_from_slice(&[1, 0x68, 3, 0, 8, 0, 0, 0]);
    bytes[MSI..MSI + 4].copy_from_slice(&[5, 0x80, 0x84, 0]);
    let table = TABLE.1.to_le_bytes();
    bytes[MSIX..MSIX + 4].copy_from_slice(&[0x11, 0xa0, VECTORS.to_le_bytes()[0] - 1, 0]);
    bytes[MSIX + 4..MSIX + 8].copy_from_slice(&table[..4]);
    bytes[MSIX + 8..MSIX + 12].copy_from_slice(&[0, 0x81, 0, 0]);
    bytes[EXPRESS..EXPRESS + 4].copy_from_slice(&[0x10, 0, 2, 0]);
    // Virtual functions first, then error reporting.
    bytes[0x100..0x104].copy_from_slice(&0x1401_0010_u32.to_le_bytes());
    bytes[0x140..0x144].copy_from_slice(&0x0001_0001_u32.to_le_bytes());
    bytes
}

impl HostDevice for Synthetic {
    fn name(&self) -> &str {
        "synthetic"
    }

    fn region(&self, number: usize) -> Region {
        let size = if number == CONFIG_REGION { 0x1000 } else { self.sizes.get(number).copied().unwrap_or(0) };
        let mappable = number < BARS && size >= 0x1000;
        let mappable = mappable.then_some(Range { start: 0, length: size }).into_iter().collect();
        Region { size, mappable }
    }

    fn irq(&self, kind: IrqKind) -> IrqInfo {
        let count = match kind {
            IrqKind::Intx => 1,
            IrqKind::Msi => 4,
            IrqKind::Msix => u32::from(VECTORS),
        };
        IrqInfo { count, grows: self.grows && kind == IrqKind::Msix }
    }

    fn read(&self, region: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.check(region, offset, data.len())?;
        if region == CONFIG_REGION {
            let start = usize::try_from(offset).expect("checked");
            data.copy_from_slice(&self.state().config[start..start + data.len()]);
            return Ok(());
        }
        self.memory.read_exact_at(data, region as u64 * REGION_DISTANCE + offset)
    }

    fn write(&self, region: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(region, offset, data.len())?;
        if region == CONFIG_REGION {
            let start = usize::try_from(offset).expect("checked");
            self.state().config[start..start + data.len()].copy_from_slice(data);
            return Ok(());
        }
        self.memory.write_all_at(data, region as u64 * REGION_DISTANCE + offset)
    }

    fn map(&self, region: usize, part: Range) -> io::Result<Mapping> {
        let length = usize::try_from(part.length).map_err(io::Error::other)?;
        Mapping::new(self.memory.as_fd(), region as u64 * REGION_DISTANCE + part.start, length)
    }

    fn set_events(&self, kind: IrqKind, first: u32, events: &[Option<&EventFd>]) -> io::Result<()> {
        let mut state = self.state();
        state.settings += 1;
        let first = usize::try_from(first).map_err(io::Error::other)?;
        let end = first + events.len();
        let present = state.events[kind as usize].len();
        let limit = usize::try_from(self.irq(kind).count).map_err(io::Error::other)?;
        if end > limit || end > present && present > 0 && !self.irq(kind).grows {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let others = (0..state.events.len()).filter(|other| *other != kind as usize);
        if others.into_iter().any(|other| !state.events[other].is_empty()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let lines = &mut state.events[kind as usize];
        lines.resize_with(end.max(present), || None);
        for (line, event) in lines[first..end].iter_mut().zip(events) {
            *line = event.map(EventFd::try_clone).transpose()?;
        }
        Ok(())
    }

    fn stop_events(&self, kind: IrqKind) -> io::Result<()> {
        self.state().events[kind as usize].clear();
        Ok(())
    }

    fn unmask_pin(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.events[IrqKind::Intx as usize].is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.unmasked += 1;
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        let mut state = self.state();
        state.resets += 1;
        state.config = config();
        Ok(())
    }
}

/// KVM's slots and routes as maps.
#[derive(Default)]
pub(super) struct FakeKvm {
    pub(super) slots: Mutex<BTreeMap<u32, Range>>,
    /// How often a slot was added.
    pub(super) additions: Mutex<usize>,
    /// Messages by number; nothing for a number without a route.
    pub(super) routes: Mutex<BTreeMap<Gsi, Option<Message>>>,
    /// Calls that changed routes.
    pub(super) changes: Mutex<usize>,
    attached: Mutex<BTreeMap<Gsi, EventFd>>,
    /// What the IOAPIC has sent.
    pub(super) sent: Mutex<Vec<Message>>,
}

impl FakeKvm {
    /// The messages of the interrupts that have come since the last call.
    pub(super) fn delivered(&self) -> Vec<Message> {
        let routes = locked(&self.routes);
        let attached = locked(&self.attached);
        let came = attached.iter().filter(|(_, event)| event.read().is_ok());
        came.filter_map(|(gsi, _)| *routes.get(gsi)?).collect()
    }

    /// Whether nothing of any device is left.
    pub(super) fn is_empty(&self) -> bool {
        locked(&self.slots).is_empty() && locked(&self.routes).is_empty() && locked(&self.attached).is_empty()
    }

    /// The slots' ranges, by address.
    pub(super) fn shown(&self) -> Vec<Range> {
        let mut ranges: Vec<_> = locked(&self.slots).values().copied().collect();
        ranges.sort();
        ranges
    }
}

impl MessageSink for FakeKvm {
    fn send(&self, message: Message) {
        locked(&self.sent).push(message);
    }

    fn watch_end(&self, _pin: u8, _message: Option<Message>) {}
}

impl Slots for FakeKvm {
    unsafe fn add(&self, range: Range, host: u64) -> io::Result<SlotId> {
        assert!(range.start.is_multiple_of(4096) && range.length.is_multiple_of(4096) && range.length > 0 && host > 0);
        let mut slots = locked(&self.slots);
        if slots.values().any(|other| other.start < range.end() && range.start < other.end()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        *locked(&self.additions) += 1;
        let free = (0..).find(|number| !slots.contains_key(number)).ok_or(io::ErrorKind::OutOfMemory)?;
        slots.insert(free, range);
        Ok(SlotId(free))
    }

    fn remove(&self, slot: SlotId) -> io::Result<()> {
        locked(&self.slots).remove(&slot.0).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Routes for FakeKvm {
    fn allocate(&self) -> io::Result<Gsi> {
        let mut routes = locked(&self.routes);
        let free = (24..4096).map(Gsi).find(|gsi| !routes.contains_key(gsi)).ok_or(io::ErrorKind::OutOfMemory)?;
        routes.insert(free, None);
        Ok(free)
    }

    fn release(&self, gsi: Gsi) {
        assert!(!locked(&self.attached).contains_key(&gsi), "released while in use");
        assert!(locked(&self.routes).remove(&gsi).is_some(), "released twice");
    }

    fn route(&self, changes: &[(Gsi, Message)]) -> io::Result<()> {
        *locked(&self.changes) += 1;
        let mut routes = locked(&self.routes);
        routes.extend(changes.iter().map(|(gsi, message)| (*gsi, Some(*message))));
        Ok(())
    }

    fn attach(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        assert!(matches!(locked(&self.routes).get(&gsi), Some(Some(_))), "attached without a route");
        assert!(locked(&self.attached).insert(gsi, event.try_clone()?).is_none(), "attached twice");
        Ok(())
    }

    fn detach(&self, _event: &EventFd, gsi: Gsi) -> io::Result<()> {
        locked(&self.attached).remove(&gsi).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// A machine with nothing but a window for BARs.
pub(super) fn services(kvm: &Arc<FakeKvm>, windows: &[Range]) -> super::device::Services {
    super::device::Services {
        slots: Arc::clone(kvm) as _,
        routes: Arc::clone(kvm) as _,
        ioapic: Arc::new(IoApic::new(Arc::clone(kvm) as _)),
        slot: 1,
        windows: windows.to_vec(),
        found: Arc::new(|| ()),
    }
}
