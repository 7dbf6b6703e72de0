//! Bus 0: which function has which slot, and which answers to which address.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::PciFunction;
use crate::config::DEVICES_MAX;
use crate::memory::layout::Range;

/// How many slots there are: 5 bits of a bus address.
const SLOTS: usize = 32;
/// Configuration space of one function: 4 KiB; of one slot: eight functions.
const FUNCTION_SHIFT: u32 = 12;
const SLOT_SHIFT: u32 = 15;

/// How many functions a slot can have.
const FUNCTIONS: usize = 8;

/// The functions of a slot, by their numbers. A guest looks for the others only where there is function 0.
type Slot = [Option<Arc<dyn PciFunction>>; FUNCTIONS];

/// All PCI functions of the machine. Slot 0 stays empty: a host bridge would be there, but
/// the guest has no use for it and would spend time on it.
#[derive(Default)]
pub(crate) struct PciBus {
    slots: RwLock<[Slot; SLOTS]>,
    /// Who answers to which addresses. Changes while the guest sets its devices up, hardly ever after.
    ranges: RwLock<Vec<Decoded>>,
}

/// A slot, and a function of it.
type Place = (usize, usize);

struct Decoded {
    range: Range,
    /// Slot and number of the function.
    place: Place,
    bar: u8,
    function: Arc<dyn PciFunction>,
}

impl PciBus {
    /// Puts `function` into the first free slot; nothing when all are taken.
    pub(crate) fn add(&self, function: Arc<dyn PciFunction>) -> Option<usize> {
        self.add_device(vec![(0, function)])
    }

    /// Puts the functions of one device, each with its number, into the first free slot; nothing when all are taken or a
    /// number is none.
    pub(crate) fn add_device(&self, functions: Vec<(u8, Arc<dyn PciFunction>)>) -> Option<usize> {
        let mut device = Slot::default();
        let mut places = Vec::new();
        for (number, function) in functions {
            *device.get_mut(usize::from(number))? = Some(function);
            places.push(usize::from(number));
        }
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slot = (SLOTS - DEVICES_MAX..SLOTS).find(|slot| slots[*slot].iter().all(Option::is_none))?;
        slots[slot] = device;
        drop(slots);
        places.into_iter().for_each(|number| self.refresh((slot, number)));
        Some(slot)
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
        let function = self.function(place);
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|decoded| decoded.place != place);
        if let Some(function) = function {
            for (bar, range) in function.ranges() {
                ranges.push(Decoded { range, place, bar, function: Arc::clone(&function) });
            }
        }
    }

    fn decode(&self, address: u64, size: usize) -> Option<(Arc<dyn PciFunction>, u8, u64)> {
        let ranges: RwLockReadGuard<'_, Vec<Decoded>> = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        // A guest that lets two functions answer to one address gets the one that was there first.
        ranges.iter().find_map(|decoded| {
            let offset = decoded.range.offset_of(address, size)?;
            Some((Arc::clone(&decoded.function), decoded.bar, offset))
        })
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
        fn ranges(&self) -> Vec<(u8, Range)> {
            let start = *self.0.lock().unwrap();
            if start == 0 { Vec::new() } else { vec![(0, Range { start, length: 4096 })] }
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
        assert_eq!(bus.add(Arc::new(Movable::default())), Some(1));
        assert_eq!(read_config(&bus, 1 << 15), [0x11; 4]);
        assert_eq!(read_config(&bus, 1 << 15 | 1 << 12), [0xff; 4]);
        assert_eq!(read_config(&bus, 0), [0xff; 4]);
        assert_eq!(read_config(&bus, 0xf_f000), [0xff; 4]);
    }

    #[test]
    fn functions_of_one_device_answer_side_by_side() {
        let bus = PciBus::default();
        assert_eq!(bus.add_device(vec![(0, Arc::new(Movable::default())), (3, Arc::new(Movable::default()))]), Some(1));
        assert_eq!(bus.add_device(vec![(8, Arc::new(Movable::default()))]), None);
        assert_eq!(bus.add(Arc::new(Movable::default())), Some(2));
        for (function, expected) in [(0, 0x11), (1, 0xff), (3, 0x11), (7, 0xff)] {
            assert_eq!(read_config(&bus, 1 << 15 | function << 12), [expected; 4]);
        }
        for (function, address) in [(0, 0xC010_0000_u32), (3, 0xC020_0000)] {
            bus.write_config(1 << 15 | function << 12 | 0x10, &address.to_le_bytes());
        }
        assert!(bus.read_memory(0xC010_0000, &mut [0]) && bus.read_memory(0xC020_0000, &mut [0]));
    }

    #[test]
    fn a_moved_function_answers_at_its_new_address_only() {
        let bus = PciBus::default();
        bus.add(Arc::new(Movable::default()));
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
            assert_eq!(bus.add(Arc::new(Movable::default())), Some(slot));
        }
        assert_eq!(bus.add(Arc::new(Movable::default())), None);
    }
}
