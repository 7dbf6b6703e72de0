//! Bus 0: which function has which slot, and which answers to which address.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use super::PciFunction;
use super::config_page::ConfigPage;
use crate::memory::{AddressSpace, layout};

/// How many slots a bus has: 5 bits of a bus address.
const SLOT_COUNT: usize = 32;
/// The slots that devices go into. Slot 0 stays empty: a host bridge would be there, but the guest has no use for it and
/// would spend time on it.
pub(crate) const SLOTS: Range<u8> = 1..32;
/// Configuration space of one function: 4 KiB; of one slot: eight functions.
const FUNCTION_SHIFT: u32 = 12;
const SLOT_SHIFT: u32 = 15;

/// How many functions a slot can have.
const FUNCTION_COUNT: usize = 8;

/// The functions of a slot, by their numbers. A guest looks for the others only where there is function 0.
type Slot = [Option<Arc<dyn PciFunction>>; FUNCTION_COUNT];

/// A slot, and a function of it.
type Place = (usize, usize);

/// All PCI functions of the machine.
///
/// Functions are called with no lock of the bus held: one that waits for the `vmm` thread does not keep it from adding
/// and removing others.
#[derive(Default)]
pub(crate) struct PciBus {
    slots: RwLock<[Slot; SLOT_COUNT]>,
    /// Who answers to which addresses. Changes while the guest sets its devices up, hardly ever after.
    ranges: RwLock<Vec<Decoded>>,
    /// Held while the ranges of a function are asked for and entered, by vCPUs alone.
    refreshing: Mutex<()>,
    /// Registers that the guest reads as memory.
    pages: Option<Pages>,
}

/// The pages of functions 0, by their slots.
struct Pages {
    space: AddressSpace,
    of_slots: Mutex<BTreeMap<usize, Arc<ConfigPage>>>,
}

impl Pages {
    /// Shows the registers of function 0 of what is about to come into `slot`, if they are memory.
    fn show(&self, slot: usize, device: &Slot) {
        let [Some(function), ..] = device else { return };
        let mut pages = self.of_slots.lock().unwrap_or_else(PoisonError::into_inner);
        let page = pages.entry(slot).or_insert_with(|| {
            let address = layout::ECAM.start + ((slot as u64) << SLOT_SHIFT);
            Arc::new(ConfigPage::new(self.space.clone(), address))
        });
        if !function.show_config(page) {
            pages.remove(&slot);
        }
    }

    /// Shows that there is nothing in `slot` any more.
    fn vacate(&self, slot: usize, device: &Slot) {
        device.iter().flatten().for_each(|function| function.leave_config());
        if let Some(page) = self.of_slots.lock().unwrap_or_else(PoisonError::into_inner).get(&slot) {
            page.vacate();
        }
    }
}

struct Decoded {
    range: layout::Range,
    place: Place,
    bar: u8,
    function: Arc<dyn PciFunction>,
}

fn is_free(slot: &Slot) -> bool {
    slot.iter().all(Option::is_none)
}

impl PciBus {
    /// An empty bus of the machine with this memory.
    pub(crate) fn new(space: AddressSpace) -> Self {
        Self { pages: Some(Pages { space, of_slots: Mutex::default() }), ..Self::default() }
    }

    /// The first free slot; nothing when all are taken.
    pub(crate) fn free_slot(&self) -> Option<u8> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        SLOTS.into_iter().find(|slot| is_free(&slots[usize::from(*slot)]))
    }

    /// Puts a function that decodes no memory yet into `slot`; false when the slot is taken or does not exist.
    pub(crate) fn add(&self, slot: u8, function: Arc<dyn PciFunction>) -> bool {
        self.add_device(slot, vec![(0, function)])
    }

    /// Puts the functions of one device, each with its number, into `slot`; false when the slot is taken or does not
    /// exist, or a number is none.
    pub(crate) fn add_device(&self, slot: u8, functions: Vec<(u8, Arc<dyn PciFunction>)>) -> bool {
        let mut device = Slot::default();
        for (number, function) in functions {
            let Some(place) = device.get_mut(usize::from(number)) else { return false };
            *place = Some(function);
        }
        let number = usize::from(slot);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = slots.get_mut(number).filter(|place| SLOTS.contains(&slot) && is_free(place)) else {
            return false;
        };
        if let Some(pages) = &self.pages {
            pages.show(number, &device);
        }
        *place = device;
        true
    }

    /// Empties `slot`: from here on nobody finds its functions. A vCPU that is in the middle of an access finishes it.
    pub(crate) fn remove(&self, slot: u8) {
        let slot = usize::from(slot);
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let removed = slots.get_mut(slot).map(std::mem::take);
        let decoded: Vec<_> = ranges.extract_if(.., |decoded| decoded.place.0 == slot).collect();
        // The last owner frees what a function holds: not under the locks.
        drop((slots, ranges));
        if let (Some(pages), Some(device)) = (&self.pages, &removed) {
            pages.vacate(slot, device);
        }
        drop((removed, decoded));
    }

    fn function(&self, (slot, number): Place) -> Option<Arc<dyn PciFunction>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).get(slot)?.get(number)?.clone()
    }

    /// The function and register that `offset` of the configuration window stands for.
    fn target(&self, offset: u64) -> Option<(Place, u16, Arc<dyn PciFunction>)> {
        let slot = usize::try_from(offset >> SLOT_SHIFT).ok()?;
        let number = usize::try_from(offset >> FUNCTION_SHIFT & 7).ok()?;
        let register = u16::try_from(offset & ((1 << FUNCTION_SHIFT) - 1)).ok()?;
        Some(((slot, number), register, self.function((slot, number))?))
    }

    /// Answers a read at `offset` of the configuration window; all ones where no function is.
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((_, register, function)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    /// Takes a write at `offset` of the configuration window.
    pub(crate) fn write_config(&self, offset: u64, data: &[u8]) {
        if let Some((place, register, function)) = self.target(offset)
            && function.write_config(register, data)
        {
            self.refresh(place);
        }
    }

    /// Asks the function at `place` again what it answers to.
    fn refresh(&self, place: Place) {
        let _one_at_a_time = self.refreshing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(function) = self.function(place) else { return };
        let decoded: Vec<_> = function
            .ranges()
            .into_iter()
            .map(|(bar, range)| Decoded { range, place, bar, function: Arc::clone(&function) })
            .collect();
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        // It may have been removed meanwhile.
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        if slots[place.0][place.1].as_ref().is_some_and(|present| Arc::ptr_eq(present, &function)) {
            ranges.retain(|decoded| decoded.place != place);
            ranges.extend(decoded);
        }
    }

    /// What the functions in `slot` answer to now: base address registers and their ranges.
    pub(crate) fn decoded(&self, slot: u8) -> Vec<(u8, layout::Range)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let of_slot = ranges.iter().filter(|decoded| decoded.place.0 == usize::from(slot));
        of_slot.map(|decoded| (decoded.bar, decoded.range)).collect()
    }

    fn decode(&self, address: u64, size: usize) -> Option<(Arc<dyn PciFunction>, u8, u64)> {
        let ranges: RwLockReadGuard<'_, Vec<Decoded>> = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        // A guest that lets two functions answer to one address gets the one that was there first.
        ranges.iter().find_map(|decoded| {
            let offset = decoded.range.offset_of(address, size)?;
            Some((Arc::clone(&decoded.function), decoded.bar, offset))
        })
    }

    /// What the guest reads as memory where the registers of function 0 in `slot` are, if it does.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn shown_config(&self, slot: u8) -> Option<Vec<u8>> {
        let pages = self.pages.as_ref()?.of_slots.lock().unwrap_or_else(PoisonError::into_inner);
        pages.get(&usize::from(slot))?.content()
    }

    /// Answers a read of a function's memory; false when none answers.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        let found = self.decode(address, data.len());
        if let Some((function, bar, offset)) = &found {
            function.read_memory(*bar, *offset, data);
        }
        found.is_some()
    }

    /// Takes a write to a function's memory, if one answers.
    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.decode(address, data.len()) {
            function.write_memory(bar, offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers to 4 KiB at whatever register 0x10 was last written with.
    #[derive(Default)]
    struct Movable(Mutex<u64>);

    impl PciFunction for Movable {
        fn read_config(&self, _register: u16, data: &mut [u8]) {
            data.fill(0x11);
        }
        fn write_config(&self, register: u16, data: &[u8]) -> bool {
            *self.0.lock().unwrap() = u64::from(u32::from_le_bytes(data.try_into().unwrap()));
            register == 0x10
        }
        fn ranges(&self) -> Vec<(u8, layout::Range)> {
            let start = *self.0.lock().unwrap();
            if start == 0 { Vec::new() } else { vec![(0, layout::Range { start, length: 4096 })] }
        }
        fn read_memory(&self, _bar: u8, offset: u64, data: &mut [u8]) {
            data.fill(offset.to_le_bytes()[0]);
        }
        fn write_memory(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
    }

    fn read_config(bus: &PciBus, offset: u64) -> [u8; 4] {
        let mut data = [0; 4];
        bus.read_config(offset, &mut data);
        data
    }

    #[test]
    fn only_function_0_of_a_taken_slot_answers() {
        let bus = PciBus::default();
        assert!(bus.add(1, Arc::new(Movable::default())));
        assert_eq!(read_config(&bus, 1 << 15), [0x11; 4]);
        assert_eq!(read_config(&bus, 1 << 15 | 1 << 12), [0xff; 4]);
        assert_eq!(read_config(&bus, 0), [0xff; 4]);
        assert_eq!(read_config(&bus, 0xf_f000), [0xff; 4]);
    }

    #[test]
    fn functions_of_one_device_answer_side_by_side_and_leave_together() {
        let bus = PciBus::default();
        let function = || -> Arc<dyn PciFunction> { Arc::new(Movable::default()) };
        assert!(bus.add_device(1, vec![(0, function()), (3, function())]));
        assert!(!bus.add_device(1, vec![(1, function())]) && !bus.add_device(2, vec![(8, function())]));
        assert_eq!(bus.free_slot(), Some(2));
        for (number, expected) in [(0, 0x11), (1, 0xff), (3, 0x11), (7, 0xff)] {
            assert_eq!(read_config(&bus, 1 << 15 | number << 12), [expected; 4]);
        }
        for (number, address) in [(0, 0xC010_0000_u32), (3, 0xC020_0000)] {
            bus.write_config(1 << 15 | number << 12 | 0x10, &address.to_le_bytes());
        }
        assert!(bus.read_memory(0xC010_0000, &mut [0]) && bus.read_memory(0xC020_0000, &mut [0]));
        assert_eq!(bus.decoded(1).len(), 2);
        bus.remove(1);
        assert!(!bus.read_memory(0xC020_0000, &mut [0]) && bus.free_slot() == Some(1));
    }

    #[test]
    fn a_moved_function_answers_at_its_new_address_only() {
        let bus = PciBus::default();
        bus.add(1, Arc::new(Movable::default()));
        let mut data = [0; 1];
        assert!(!bus.read_memory(0xC010_0005, &mut data));
        for address in [0xC010_0000_u32, 0xC020_0000] {
            bus.write_config(1 << 15 | 0x10, &address.to_le_bytes());
            assert!(bus.read_memory(u64::from(address) + 5, &mut data));
            assert_eq!(data, [5]);
        }
        assert!(!bus.read_memory(0xC010_0005, &mut data));
        assert!(!bus.read_memory(0xC020_0FFE, &mut [0; 4]), "an access across the end");
    }

    #[test]
    fn a_full_bus_takes_no_more() {
        let bus = PciBus::default();
        for slot in 1..32 {
            assert_eq!(bus.free_slot(), Some(slot));
            assert!(bus.add(slot, Arc::new(Movable::default())));
            assert!(!bus.add(slot, Arc::new(Movable::default())));
        }
        assert_eq!(bus.free_slot(), None);
        assert!(!bus.add(0, Arc::new(Movable::default())) && !bus.add(32, Arc::new(Movable::default())));
    }

    #[test]
    fn a_removed_function_is_found_by_nobody_and_freed() {
        let bus = PciBus::default();
        let function = Arc::new(Movable::default());
        bus.add(7, Arc::clone(&function) as _);
        bus.write_config(7 << 15 | 0x10, &0xC010_0000_u32.to_le_bytes());
        assert!(bus.read_memory(0xC010_0000, &mut [0; 4]));
        bus.remove(7);
        assert!(!bus.read_memory(0xC010_0000, &mut [0; 4]));
        assert_eq!(read_config(&bus, 7 << 15), [0xff; 4]);
        assert_eq!(Arc::strong_count(&function), 1);
        assert_eq!(bus.free_slot(), Some(1));
        bus.remove(7);
    }
}
