//! A hostile driver of a device of the host: accesses of its configuration space and its memory.

use std::sync::Arc;

use super::device::{Candidate, Options, VfioFunction};
use super::testing::{FakeKvm, Synthetic, services};
use crate::memory::layout::{PCI_32, Range};
use crate::pci::bus::PciBus;
use crate::pci::windows::Windows;
use crate::virtio::testing::script::Script;

const HIGH: Range = Range { start: 64 << 30, length: 192 << 30 };
const SLOT: u8 = 1;

/// Does the accesses of `script` to a synthetic device, then removes it.
///
/// # Panics
/// When the function does; when KVM shows memory of the device where its registers do not say so, or outside of the PCI
/// windows; or when anything is left of the device at the end.
pub fn drive_host_device(mut script: Script<'_>) {
    let (kvm, host) = (Arc::new(FakeKvm::default()), Arc::new(Synthetic::new(8 << 30)));
    let bus = PciBus::default();
    let mut windows = Windows::new(PCI_32, Some(HIGH));
    let Ok(candidate) = Candidate::new(Arc::clone(&host) as _, &Options::default()) else {
        panic!("the device answers")
    };
    let Ok(places) = windows.place(&candidate.requests()) else { panic!("the windows have room") };
    let services = services(&kvm, &[PCI_32, HIGH]);
    let Ok(function) = VfioFunction::new(candidate, &places, &services) else { panic!("the device answers") };
    bus.add(SLOT, Arc::new(function));
    while !script.is_over() {
        let kind = script.byte();
        let place = u64::from(script.word());
        let data: [u8; 8] = script.array();
        let size = 1 << (kind >> 6 & 3);
        let mut seen = [0; 8];
        let register = (u64::from(SLOT) << 15) + if kind & 4 == 0 { place % 0x100 } else { place % 0x1000 };
        let address = places.get(usize::from(kind >> 3 & 3)).map_or(place, |range| range.start + place % range.length);
        match kind & 3 {
            0 => bus.read_config(register, &mut seen[..size.min(4)]),
            1 => bus.write_config(register, &data[..size.min(4)]),
            2 => drop(bus.read_memory(address, &mut seen[..size])),
            _ => bus.write_memory(address, &data[..size]),
        }
        let decoded = bus.decoded(SLOT);
        for shown in kvm.shown() {
            let inside = |(_, range): &(u8, Range)| range.start <= shown.start && shown.end() <= range.end();
            assert!(decoded.iter().any(inside) && shown.start >= PCI_32.start, "{shown:x?} of {decoded:x?}");
        }
    }
    bus.remove(SLOT);
    assert!(kvm.is_empty() && Arc::strong_count(&host) == 1, "something of the device is left");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_driver_gets_memory_where_it_should_not_or_leaves_anything(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            drive_host_device(Script::new(&bytes));
        }
    }
}
