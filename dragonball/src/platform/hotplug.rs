//! The hot-plug registers: how the guest's ACPI code learns of devices and vCPUs that come and go.
//!
//! One page of 32-bit registers, read and written whole. It belongs to the methods in `acpi::hotplug`; no driver of the
//! guest knows it. "RC" is read and clear.
//!
//! | offset | register | access | use |
//! |---|---|---|---|
//! | 0x00 | EVENTS | RC | what happened: bit 0 PCI, bit 1 vCPUs, bit 2 power button |
//! | 0x10 | PCI_UP | RC | slots that a device was put into, a bit each |
//! | 0x14 | PCI_DOWN | RC | slots whose device shall be let go |
//! | 0x18 | PCI_EJECT | W | slots whose device the guest has let go |
//! | 0x1c | PCI_SETTLED | W | slots whose new device the guest has set up, with a driver if it has one |
//! | 0x20 | CPU_SELECT | RW | the vCPU that the registers below are about |
//! | 0x24 | CPU_STATUS | R | bit 0: it is present |
//! | 0x28 | CPU_EVENT | RC | the next vCPU that something is asked of: number × 256 + 1 (came) or 3 (go); 0: none |
//! | 0x2c | CPU_EJECT | W | 1: the guest has let the selected vCPU go |
//! | 0x30 | CPU_OST_EVENT | RW | what the guest reports on: 1 or 3, as above, in the lowest byte |
//! | 0x34 | CPU_OST_STATUS | W | how it went for the selected vCPU; 0: well |
//!
//! The interrupt line is high while EVENTS is not 0: an event before the guest listens is not lost.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::irq::ioapic::IoApic;
use crate::irq::pins;

pub(crate) mod registers {
    //! Offsets of the registers and bits of EVENTS.
    pub(crate) const EVENTS: u64 = 0x00;
    pub(crate) const PCI_UP: u64 = 0x10;
    pub(crate) const PCI_DOWN: u64 = 0x14;
    pub(crate) const PCI_EJECT: u64 = 0x18;
    pub(crate) const PCI_SETTLED: u64 = 0x1c;
    pub(crate) const CPU_SELECT: u64 = 0x20;
    pub(crate) const CPU_STATUS: u64 = 0x24;
    pub(crate) const CPU_EVENT: u64 = 0x28;
    pub(crate) const CPU_EJECT: u64 = 0x2c;
    pub(crate) const CPU_OST_EVENT: u64 = 0x30;
    pub(crate) const CPU_OST_STATUS: u64 = 0x34;

    pub(crate) const EVENT_PCI: u32 = 1 << 0;
    pub(crate) const EVENT_CPU: u32 = 1 << 1;
    pub(crate) const EVENT_POWER_BUTTON: u32 = 1 << 2;

    /// Notifications (ACPI 6.5, §5.6.6): look at the bus from this slot on; a device came; a device shall go.
    pub(crate) const NOTIFY_BUS_CHECK: u8 = 0;
    pub(crate) const NOTIFY_DEVICE_CHECK: u8 = 1;
    pub(crate) const NOTIFY_EJECT: u8 = 3;
}

use registers::{
    CPU_EJECT, CPU_EVENT, CPU_OST_EVENT, CPU_OST_STATUS, CPU_SELECT, CPU_STATUS, EVENT_CPU, EVENT_PCI,
    EVENT_POWER_BUTTON, EVENTS, NOTIFY_DEVICE_CHECK, NOTIFY_EJECT, PCI_DOWN, PCI_EJECT, PCI_SETTLED, PCI_UP,
};

/// Status codes of `_OST` that come before the one that counts (ACPI 6.5, §6.3.5).
const OST_INSERTION_IN_PROGRESS: u32 = 0x80;
const OST_EJECTION_IN_PROGRESS: u32 = 0x84;

/// What a vCPU is asked, or reported on.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) enum CpuEvent {
    /// It came.
    Came,
    /// It shall go.
    Go,
}

impl CpuEvent {
    const fn notification(self) -> u8 {
        match self {
            Self::Came => NOTIFY_DEVICE_CHECK,
            Self::Go => NOTIFY_EJECT,
        }
    }
}

/// What the guest told by a write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Told {
    /// The devices in these slots were let go, a bit each.
    PciEjected(u32),
    /// The guest is through with the new devices in these slots, a bit each.
    PciSettled(u32),
    /// This vCPU was let go.
    CpuEjected(u8),
    /// How the guest got on with this vCPU.
    CpuReport {
        /// The vCPU.
        id: u8,
        /// What was asked of it.
        event: CpuEvent,
        /// Whether it went well.
        done: bool,
    },
}

/// The registers' content; saved and restored as it is.
#[derive(Clone, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct HotPlugState {
    events: u32,
    pci_up: u32,
    pci_down: u32,
    cpu_select: u32,
    cpu_ost_event: u32,
    /// Present vCPUs, a bit each.
    cpus: [u64; 4],
    /// What is asked of vCPUs and was not read yet.
    cpu_events: BTreeMap<u8, CpuEvent>,
}

/// The register page.
pub(crate) struct HotPlugRegisters {
    ioapic: Arc<IoApic>,
    state: Mutex<HotPlugState>,
}

impl HotPlugRegisters {
    /// Registers of a machine whose first `vcpus` vCPUs are present.
    pub(crate) fn new(ioapic: Arc<IoApic>, vcpus: u8) -> Self {
        let mut state = HotPlugState::default();
        (0..vcpus).for_each(|id| state.set_present(id, true));
        Self { ioapic, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, HotPlugState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self, state: &mut HotPlugState, event: u32) {
        state.events |= event;
        self.ioapic.set_level(pins::HOT_PLUG, true);
    }

    /// Tells the guest that `slot` has a device.
    pub(crate) fn announce(&self, slot: u8) {
        let mut state = self.state();
        state.pci_up |= bit(slot);
        state.pci_down &= !bit(slot);
        self.raise(&mut state, EVENT_PCI);
    }

    /// Takes an announcement back; false when the guest has read it.
    pub(crate) fn withdraw(&self, slot: u8) -> bool {
        let mut state = self.state();
        let unread = state.pci_up & bit(slot) != 0;
        state.pci_up &= !bit(slot);
        unread
    }

    /// Asks the guest to let the device in `slot` go.
    pub(crate) fn ask_back(&self, slot: u8) {
        let mut state = self.state();
        state.pci_down |= bit(slot);
        self.raise(&mut state, EVENT_PCI);
    }

    /// Takes that back; false when the guest has read it.
    pub(crate) fn keep(&self, slot: u8) -> bool {
        let mut state = self.state();
        let unread = state.pci_down & bit(slot) != 0;
        state.pci_down &= !bit(slot);
        unread
    }

    /// Tells the guest that the vCPU is there.
    pub(crate) fn add_cpu(&self, id: u8) {
        let mut state = self.state();
        state.set_present(id, true);
        state.cpu_events.insert(id, CpuEvent::Came);
        self.raise(&mut state, EVENT_CPU);
    }

    /// Asks the guest to let the vCPU go.
    pub(crate) fn ask_back_cpu(&self, id: u8) {
        let mut state = self.state();
        state.cpu_events.insert(id, CpuEvent::Go);
        self.raise(&mut state, EVENT_CPU);
    }

    /// Takes back what was asked of the vCPU; false when the guest has read it.
    pub(crate) fn withdraw_cpu(&self, id: u8) -> bool {
        self.state().cpu_events.remove(&id).is_some()
    }

    /// The vCPU is no longer there.
    pub(crate) fn remove_cpu(&self, id: u8) {
        self.state().set_present(id, false);
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        self.raise(&mut self.state(), EVENT_POWER_BUTTON);
    }

    /// Answers a read; 0 where there is no register to be read.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut state = self.state();
        match offset {
            EVENTS => {
                self.ioapic.set_level(pins::HOT_PLUG, false);
                std::mem::take(&mut state.events)
            }
            PCI_UP => std::mem::take(&mut state.pci_up),
            PCI_DOWN => std::mem::take(&mut state.pci_down),
            CPU_SELECT => state.cpu_select,
            CPU_STATUS => u32::from(state.selected().is_some_and(|id| state.is_present(id))),
            CPU_EVENT => state
                .cpu_events
                .pop_first()
                .map_or(0, |(id, event)| u32::from(id) << 8 | u32::from(event.notification())),
            CPU_OST_EVENT => state.cpu_ost_event,
            _ => 0,
        }
    }

    /// Takes a write, and says what the guest told by it. What it tells of a vCPU that is not there is ignored.
    pub(crate) fn write(&self, offset: u64, value: u32) -> Option<Told> {
        let mut state = self.state();
        let selected = state.selected().filter(|id| state.is_present(*id));
        match offset {
            PCI_EJECT if value != 0 => return Some(Told::PciEjected(value)),
            PCI_SETTLED if value != 0 => return Some(Told::PciSettled(value)),
            CPU_SELECT => state.cpu_select = value,
            CPU_EJECT if value == 1 => return selected.map(Told::CpuEjected),
            CPU_OST_EVENT => state.cpu_ost_event = value,
            CPU_OST_STATUS => {
                let event = match state.cpu_ost_event.to_le_bytes()[0] {
                    NOTIFY_DEVICE_CHECK => CpuEvent::Came,
                    NOTIFY_EJECT => CpuEvent::Go,
                    _ => return None,
                };
                let under_way = match event {
                    CpuEvent::Came => OST_INSERTION_IN_PROGRESS,
                    CpuEvent::Go => OST_EJECTION_IN_PROGRESS,
                };
                let report = |id| Told::CpuReport { id, event, done: value == 0 };
                return selected.filter(|_| value != under_way).map(report);
            }
            _ => {}
        }
        None
    }

    /// The state to be saved.
    #[cfg_attr(
        not(any(test, feature = "testing")),
        expect(dead_code, reason = "saved with the whole machine, which comes with templates")
    )]
    pub(crate) fn save(&self) -> HotPlugState {
        self.state().clone()
    }

    /// Takes a saved state, before the vCPUs run.
    #[cfg_attr(
        not(any(test, feature = "testing")),
        expect(dead_code, reason = "restored with the whole machine, which comes with templates")
    )]
    pub(crate) fn restore(&self, saved: &HotPlugState) {
        let mut state = self.state();
        *state = saved.clone();
        self.ioapic.set_level(pins::HOT_PLUG, state.events != 0);
    }
}

impl HotPlugState {
    fn selected(&self) -> Option<u8> {
        u8::try_from(self.cpu_select).ok()
    }

    fn is_present(&self, id: u8) -> bool {
        self.cpus[usize::from(id / 64)] & 1 << (id % 64) != 0
    }

    fn set_present(&mut self, id: u8, present: bool) {
        let word = &mut self.cpus[usize::from(id / 64)];
        *word = *word & !(1 << (id % 64)) | u64::from(present) << (id % 64);
    }
}

fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(u32::from(slot)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::Message;
    use crate::irq::ioapic::MessageSink;

    #[derive(Default)]
    struct Sent(Mutex<Vec<Message>>);

    impl MessageSink for Sent {
        fn send(&self, message: Message) {
            self.0.lock().unwrap().push(message);
        }
        fn watch_end(&self, _pin: u8, _message: Option<Message>) {}
    }

    /// Registers whose interrupt goes to a guest that listens with vector 0x30.
    fn page() -> (HotPlugRegisters, Arc<Sent>, Arc<IoApic>) {
        let sent = Arc::new(Sent::default());
        let ioapic = Arc::new(IoApic::new(Arc::clone(&sent) as _));
        (HotPlugRegisters::new(Arc::clone(&ioapic), 2), sent, ioapic)
    }

    fn listen(ioapic: &IoApic) {
        const LEVEL: u32 = 1 << 15;
        ioapic.write(0, 0x10 + 2 * u32::from(pins::HOT_PLUG));
        ioapic.write(0x10, LEVEL | 0x30);
    }

    #[test]
    fn an_event_before_the_guest_listens_is_not_lost() {
        let (page, sent, ioapic) = page();
        page.announce(5);
        assert_eq!(sent.0.lock().unwrap().len(), 0);
        listen(&ioapic);
        assert_eq!(sent.0.lock().unwrap().len(), 1);
        assert_eq!([page.read(EVENTS), page.read(EVENTS)], [EVENT_PCI, 0]);
        assert_eq!([page.read(PCI_UP), page.read(PCI_UP)], [1 << 5, 0]);
        ioapic.end_of_interrupt(0x30);
        assert_eq!(sent.0.lock().unwrap().len(), 1, "the line went low when the event was read");
    }

    #[test]
    fn what_the_guest_has_not_read_can_be_taken_back() {
        let (page, ..) = page();
        page.announce(3);
        assert!(page.withdraw(3));
        assert!(!page.withdraw(3));
        assert_eq!(page.read(PCI_UP), 0);
        page.ask_back(31);
        assert_eq!(page.read(PCI_DOWN), 1 << 31);
        assert!(!page.keep(31));
        page.add_cpu(2);
        assert!(page.withdraw_cpu(2));
        assert_eq!(page.read(CPU_EVENT), 0);
    }

    #[test]
    fn the_guest_tells_of_slots_that_it_has_set_up_or_let_go() {
        let (page, ..) = page();
        assert_eq!(page.write(PCI_SETTLED, 1 << 4), Some(Told::PciSettled(1 << 4)));
        assert_eq!(page.write(PCI_EJECT, 1 << 5), Some(Told::PciEjected(1 << 5)));
        assert_eq!([page.write(PCI_SETTLED, 0), page.write(PCI_EJECT, 0)], [None, None]);
    }

    #[test]
    fn vcpus_come_one_after_the_other_and_are_told_apart() {
        let (page, ..) = page();
        page.add_cpu(200);
        page.ask_back_cpu(1);
        assert_eq!(page.read(EVENTS), EVENT_CPU);
        assert_eq!([page.read(CPU_EVENT), page.read(CPU_EVENT), page.read(CPU_EVENT)], [0x103, 0xc801, 0]);
        for (id, present) in [(0, 1), (1, 1), (2, 0), (200, 1), (300, 0)] {
            page.write(CPU_SELECT, id);
            assert_eq!(page.read(CPU_STATUS), present, "{id}");
        }
        page.write(CPU_SELECT, 200);
        page.write(CPU_OST_EVENT, 0x101);
        assert_eq!(page.write(CPU_OST_STATUS, OST_INSERTION_IN_PROGRESS), None);
        let report = |done| Some(Told::CpuReport { id: 200, event: CpuEvent::Came, done });
        assert_eq!([page.write(CPU_OST_STATUS, 0), page.write(CPU_OST_STATUS, 0x81)], [report(true), report(false)]);
        assert_eq!(page.write(CPU_EJECT, 1), Some(Told::CpuEjected(200)));
        page.remove_cpu(200);
        assert_eq!([page.write(CPU_EJECT, 1), page.write(CPU_OST_STATUS, 0)], [None, None], "it is gone");
    }

    #[test]
    fn whatever_a_guest_writes_tells_only_what_the_table_says() {
        let (page, ..) = page();
        for offset in (0..0x1000).step_by(4) {
            for value in [0, 1, 3, 0xffff_ffff] {
                let told = page.write(offset, value);
                assert!(
                    told.is_none() || matches!(offset, PCI_EJECT | PCI_SETTLED | CPU_EJECT | CPU_OST_STATUS),
                    "{offset:#x}"
                );
                page.read(offset);
            }
        }
    }

    #[test]
    fn a_saved_page_is_the_same_when_it_comes_back() {
        let (page, ..) = page();
        page.announce(4);
        page.add_cpu(3);
        page.press_power_button();
        let (other, sent, ioapic) = self::page();
        listen(&ioapic);
        other.restore(&page.save());
        assert_eq!(other.save(), page.save());
        assert_eq!(sent.0.lock().unwrap().len(), 1, "the events are still to be told");
    }
}
