//! The guest-physical map: every fixed address of the machine, and what is placed at run time.
//!
//! | range | use |
//! |---|---|
//! | 0 – 0x9_FC00 | RAM; boot data in it |
//! | 0xE_0000 – 0xF_FFFF | ACPI tables: RAM that the guest's map calls reserved |
//! | 1 MiB – 3 GiB | RAM |
//! | 0xC000_0000, 64 KiB | platform registers: the boot timer; one page further, hot-plug |
//! | 0xC010_0000 – 0xE7FF_FFFF | 32-bit PCI window |
//! | 0xE800_0000, 1 MiB | PCI configuration space of bus 0 (ECAM) |
//! | 0xFEC0_0000 / 0xFEE0_0000 / 0xFFFB_C000 | IOAPIC / local APICs / pages that KVM needs |
//! | 4 GiB and on | RAM, then pluggable memory, then persistent memory, then the 64-bit PCI window |

use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

/// End of conventional memory: where the extended BIOS data area would start.
pub(crate) const LOW_RAM_END: u64 = 0x9_FC00;
/// Where the boot data begins: the PVH start information and its module list (see `boot::pvh`).
pub(crate) const START_INFO: u64 = 0x6000;
/// The memory map that the start information points to.
pub(crate) const MEMORY_MAP: u64 = 0x7000;
/// The kernel command line, at most 64 KiB.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Page tables of the 64-bit boot protocol: three levels of one page each, used by `bzImage` kernels only.
pub(crate) const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The global descriptor table that a `bzImage` kernel starts with.
pub(crate) const BOOT_GDT: u64 = 0x500;
/// The ACPI tables; their root pointer comes first.
pub(crate) const ACPI: u64 = 0xE_0000;
/// Room for the ACPI tables: 128 KiB.
pub(crate) const ACPI_SIZE: u64 = 0x2_0000;
/// Where RAM above the legacy area begins: kernels are loaded from here on.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;
/// End of the RAM below 4 GiB: 3 GiB.
pub(crate) const RAM_32_END: u64 = 0xC000_0000;
/// The boot timer's register, one byte: the address that Firecracker has it at.
pub(crate) const BOOT_TIMER: u64 = 0xC000_0000;
/// The hot-plug registers: see `platform::hotplug`.
pub(crate) const HOT_PLUG: Range = Range { start: 0xC000_1000, length: 0x1000 };
/// The 32-bit PCI window.
pub(crate) const PCI_32: Range = Range { start: 0xC010_0000, length: 0x27F0_0000 };
/// PCI configuration space, 4 KiB per function, 256 functions of bus 0.
pub(crate) const ECAM: Range = Range { start: 0xE800_0000, length: 0x10_0000 };
/// The IOAPIC's registers.
pub(crate) const IOAPIC: Range = Range { start: 0xFEC0_0000, length: 0x1000 };
/// The local APICs' registers, which KVM emulates.
pub(crate) const LOCAL_APIC: u32 = 0xFEE0_0000;
/// One page that KVM needs on Intel processors for its identity map, followed by three for a task state segment.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// See [`KVM_IDENTITY_MAP`].
pub(crate) const KVM_TSS: usize = 0xFFFB_D000;
/// Where RAM continues above the devices: 4 GiB.
pub(crate) const RAM_64: u64 = 1 << 32;
/// Linux adds memory by sections of this size (128 MiB): persistent memory must not share one with RAM.
const SECTION: u64 = 128 << 20;
/// Persistent memory is placed and sized in multiples of this (2 MiB), so that it can be mapped by huge pages.
pub(crate) const PMEM_ALIGNMENT: u64 = 2 << 20;
/// Pluggable memory begins at a multiple of this (1 GiB), so that it can be mapped by the largest pages.
const PLUGGABLE_ALIGNMENT: u64 = 1 << 30;
/// The most by which the 64-bit PCI window's start is aligned (64 GiB).
const PCI_64_ALIGNMENT: u64 = 64 << 30;
/// The most that is kept free for persistent memory that comes while the machine runs (256 GiB).
const PMEM_RESERVE: u64 = 256 << 30;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub(crate) struct Range {
    /// First address.
    pub(crate) start: u64,
    /// Length in bytes; never 0, and `start + length` does not overflow.
    pub(crate) length: u64,
}

impl Range {
    /// The address after the last.
    pub(crate) const fn end(self) -> u64 {
        self.start + self.length
    }

    /// The offset of `address` in the range when all `size` bytes from it lie in the range.
    pub(crate) fn offset_of(self, address: u64, size: usize) -> Option<u64> {
        let offset = address.checked_sub(self.start)?;
        let end = offset.checked_add(u64::try_from(size).ok()?)?;
        (end <= self.length).then_some(offset)
    }

    /// Whether the two have an address in common.
    #[cfg(test)]
    pub(crate) const fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Where `memory` bytes of RAM lie: up to 3 GiB from 0, the rest from 4 GiB.
pub(crate) fn ram(memory: u64) -> Vec<Range> {
    let low = memory.min(RAM_32_END);
    let mut ranges = vec![Range { start: 0, length: low }];
    if memory > low {
        ranges.push(Range { start: RAM_64, length: memory - low });
    }
    ranges
}

/// What the guest is told about a range of its memory: the types of an E820 map.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum MemoryKind {
    /// Free for the guest's use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// The memory map for the guest: sorted, without overlaps.
pub(crate) fn memory_map(memory: u64) -> Vec<(Range, MemoryKind)> {
    let mut map = vec![
        (Range { start: 0, length: LOW_RAM_END }, MemoryKind::Ram),
        (Range { start: ACPI, length: ACPI_SIZE }, MemoryKind::Reserved),
    ];
    for range in ram(memory) {
        let start = range.start.max(HIGH_RAM);
        map.push((Range { start, length: range.end() - start }, MemoryKind::Ram));
    }
    map.push((ECAM, MemoryKind::Reserved));
    map.sort_by_key(|(range, _)| range.start);
    map
}

fn ram_end(memory: u64) -> u64 {
    ram(memory).last().map_or(0, |range| range.end()).max(RAM_64)
}

/// Where memory lies that can be plugged into a machine of `memory` bytes until it has `memory_max`: above its RAM, in
/// whole sections. Nothing when there is nothing to plug.
pub(crate) fn pluggable(memory: u64, memory_max: u64) -> Option<Range> {
    let length = memory_max.checked_sub(memory)?.checked_next_multiple_of(SECTION)?;
    let start = ram_end(memory).checked_next_multiple_of(PLUGGABLE_ALIGNMENT)?;
    (length > 0 && start.checked_add(length).is_some()).then_some(Range { start, length })
}

/// What lies above all that is or can become RAM: persistent memory, which comes and goes, and the 64-bit PCI window.
#[derive(Debug)]
pub(crate) struct HighMemory {
    space: Option<AddressAllocator>,
    end: u64,
    window: Option<Range>,
}

impl HighMemory {
    /// Begins above `memory` bytes of RAM and the `pluggable` memory; guest-physical addresses have `address_bits` bits.
    pub(crate) fn above(memory: u64, pluggable: Option<Range>, address_bits: u8) -> Self {
        let end = 1 << address_bits;
        let start = pluggable.map_or_else(|| ram_end(memory), Range::end).next_multiple_of(SECTION);
        let space = u64::checked_sub(end, start).and_then(|length| AddressAllocator::new(start, length).ok());
        Self { space, end, window: None }
    }

    /// Takes `length` bytes for persistent memory; nothing when the address space is used up.
    pub(crate) fn place_pmem(&mut self, length: u64) -> Option<Range> {
        let sections = length.checked_next_multiple_of(SECTION).filter(|&sections| sections > 0)?;
        let taken = self.space.as_mut()?.allocate(sections, SECTION, AllocPolicy::FirstMatch).ok()?;
        Some(Range { start: taken.start(), length: length.next_multiple_of(PMEM_ALIGNMENT) })
    }

    /// Gives the addresses of a persistent memory device that is gone back; false when no device has them.
    pub(crate) fn free_pmem(&mut self, range: Range) -> bool {
        let sections =
            range.length.checked_next_multiple_of(SECTION).and_then(|length| range.start.checked_add(length));
        let taken = sections.and_then(|end| RangeInclusive::new(range.start, end.checked_sub(1)?).ok());
        taken.zip(self.space.as_mut()).is_some_and(|(taken, space)| space.free(&taken).is_ok())
    }

    /// The 64-bit PCI window: all that is left above the persistent memory placed so far and some room for more, but the
    /// last 64 KiB, which some processors cannot address. Nothing when no room is left. It is settled by the first call.
    pub(crate) fn pci_window(&mut self) -> Option<Range> {
        if self.window.is_none() {
            self.window = self.settle_window();
        }
        self.window
    }

    fn settle_window(&mut self) -> Option<Range> {
        let space = self.space.as_mut()?;
        let reserve = PMEM_RESERVE.min(self.end / 16);
        let room = space.allocate(reserve, SECTION, AllocPolicy::FirstMatch).ok()?;
        space.free(&room).ok()?;
        let start = (room.end() + 1).checked_next_multiple_of(PCI_64_ALIGNMENT.min(self.end / 16))?;
        let length = self.end.checked_sub(start)?.checked_sub(0x1_0000).filter(|&length| length > 0)?;
        space.allocate(self.end - start, SECTION, AllocPolicy::ExactMatch(start)).ok()?;
        Some(Range { start, length })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{MEMORY_GRANULE, MEMORY_MIN};

    const FIXED: [Range; 5] = [HOT_PLUG, PCI_32, ECAM, IOAPIC, Range { start: LOCAL_APIC as u64, length: 0x1000 }];

    #[test]
    fn fixed_ranges_do_not_overlap() {
        for (index, one) in FIXED.iter().enumerate() {
            for other in &FIXED[index + 1..] {
                assert!(!one.overlaps(*other), "{one:x?} and {other:x?}");
            }
        }
    }

    fn memory_sizes() -> impl Strategy<Value = u64> {
        (MEMORY_MIN / MEMORY_GRANULE..(1 << 40) / MEMORY_GRANULE).prop_map(|granules| granules * MEMORY_GRANULE)
    }

    proptest! {
        #[test]
        fn ram_adds_up_and_stays_clear_of_devices(memory in memory_sizes()) {
            let ranges = ram(memory);
            prop_assert_eq!(ranges.iter().map(|range| range.length).sum::<u64>(), memory);
            for range in ranges {
                prop_assert!(FIXED.iter().all(|fixed| !fixed.overlaps(range)));
            }
        }

        #[test]
        fn memory_map_is_sorted_without_overlaps_and_hides_the_tables(memory in memory_sizes()) {
            let map = memory_map(memory);
            for pair in map.windows(2) {
                prop_assert!(pair[0].0.end() <= pair[1].0.start);
            }
            let tables = Range { start: ACPI, length: ACPI_SIZE };
            prop_assert!(map.iter().all(|(range, kind)| *kind == MemoryKind::Reserved || !range.overlaps(tables)));
        }

        #[test]
        fn high_devices_lie_above_ram_and_apart(
            memory in memory_sizes(), more in 0_u64..(1 << 40) / MEMORY_GRANULE, window_after in 0_usize..8,
            steps in prop::collection::vec((1_u64..(64 << 30), any::<bool>()), 0..12)
        ) {
            let memory_max = memory + more * MEMORY_GRANULE;
            let plug = pluggable(memory, memory_max);
            let mut below = ram_end(memory);
            if let Some(plug) = plug {
                prop_assert!(plug.start >= below && plug.start.is_multiple_of(PLUGGABLE_ALIGNMENT));
                prop_assert!(plug.length >= memory_max - memory && plug.length.is_multiple_of(SECTION));
                below = plug.end();
            } else {
                prop_assert_eq!(memory, memory_max);
            }
            let mut high = HighMemory::above(memory, plug, 46);
            let mut placed: Vec<Range> = Vec::new();
            for (step, (length, remove)) in steps.into_iter().enumerate() {
                if step == window_after {
                    high.pci_window().unwrap();
                }
                if remove && let Some(gone) = placed.pop() {
                    prop_assert!(high.free_pmem(gone) && !high.free_pmem(gone));
                }
                let Some(range) = high.place_pmem(length) else {
                    prop_assert!(step >= window_after, "no room in {:?}", high);
                    continue;
                };
                prop_assert!(range.start >= below && range.length >= length);
                prop_assert!(range.start.is_multiple_of(SECTION) && range.length.is_multiple_of(PMEM_ALIGNMENT));
                let sections = |range: Range| Range { length: range.length.next_multiple_of(SECTION), ..range };
                prop_assert!(placed.iter().all(|other| !sections(*other).overlaps(sections(range))));
                placed.push(range);
            }
            let window = high.pci_window().unwrap();
            prop_assert!(placed.iter().all(|range| range.end() <= window.start) && window.start >= below);
            prop_assert_eq!(window.end(), (1 << 46) - 0x1_0000);
        }

        #[test]
        fn offsets_are_inside_or_refused(start in 0..u64::MAX / 2, length in 1..u64::MAX / 2, address: u64, size in 0_usize..4096) {
            let range = Range { start, length };
            if let Some(offset) = range.offset_of(address, size) {
                prop_assert_eq!(start + offset, address);
                prop_assert!(offset + size as u64 <= length);
            }
        }
    }

    #[test]
    fn an_address_space_that_is_used_up_gives_no_more() {
        let mut high = HighMemory::above(1 << 30, None, 36);
        assert!(high.place_pmem(1 << 36).is_none());
        assert!(high.place_pmem(u64::MAX).is_none());
        assert!(high.place_pmem(0).is_none());
        let first = high.place_pmem(1 << 20).unwrap();
        assert!(high.free_pmem(first));
        assert_eq!(high.place_pmem(1 << 20), Some(first), "the addresses are used again");
        assert!(!high.free_pmem(Range { start: u64::MAX - 1, length: u64::MAX }));
    }

    #[test]
    fn the_window_keeps_room_for_persistent_memory_and_for_devices_whatever_the_width() {
        for (bits, memory, room, window) in
            [(36, 32 << 30, 4 << 30, 16 << 30), (39, 64 << 30, 32 << 30, 256 << 30), (46, 1 << 40, 256 << 30, 60 << 40)]
        {
            let mut high = HighMemory::above(memory, None, bits);
            assert!(high.pci_window().unwrap().length >= window, "{bits} bits");
            assert!(high.place_pmem(room).is_some(), "{bits} bits");
        }
    }
}
