//! Variable ranges: pairs of a base and a mask register.

use crate::MemoryType;

/// How many variable ranges there are: what KVM gives, and what `IA32_MTRRCAP` tells the guest.
pub const VARIABLE_RANGES: usize = 8;

/// The bit of the mask register that lets the range count.
const VALID: u64 = 1 << 11;
/// Ranges consist of pages of 4 KiB.
const PAGE: u64 = 1 << 12;
const ADDRESS: u64 = !(PAGE - 1);

/// A pair of registers, `IA32_MTRR_PHYSBASEn` and `IA32_MTRR_PHYSMASKn`, as the guest wrote them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct VariableRange {
    /// Start of the range, and its type in the lowest byte.
    pub base: u64,
    /// The address bits that are compared with the base, and in bit 11 whether the range counts.
    pub mask: u64,
}

impl VariableRange {
    /// The registers for `length` bytes from `start` where a physical address has `address_bits` bits. Nothing when one
    /// pair cannot say it: the length must be a power of two of at least 4 KiB, the start a multiple of the length, and
    /// the range within the address space.
    #[must_use]
    pub fn new(start: u64, length: u64, kind: MemoryType, address_bits: u8) -> Option<Self> {
        let space = 1_u64.checked_shl(u32::from(address_bits))?;
        let fits = start.checked_add(length)? <= space;
        let one_pair = length.is_power_of_two() && length >= PAGE && start.is_multiple_of(length);
        (fits && one_pair && MemoryType::from_mtrr(kind.encoding()).is_some())
            .then(|| Self { base: start | u64::from(kind.encoding()), mask: (space - 1) & !(length - 1) | VALID })
    }

    /// Whether it counts.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.mask & VALID != 0
    }

    /// Its type; nothing when that is a reserved encoding.
    #[must_use]
    pub const fn memory_type(self) -> Option<MemoryType> {
        MemoryType::from_mtrr(self.base.to_le_bytes()[0])
    }

    /// Whether it says something of `address`.
    #[must_use]
    pub const fn contains(self, address: u64) -> bool {
        let compared = self.mask & ADDRESS;
        self.is_valid() && address & compared == self.base & compared
    }

    /// Its start and length where a physical address has `address_bits` bits. Nothing when it does not count, or when
    /// its mask has holes: the processor takes such masks too, and the range then has several parts.
    #[must_use]
    pub fn span(self, address_bits: u8) -> Option<(u64, u64)> {
        let space = 1_u64.checked_shl(u32::from(address_bits))?;
        let free = (space - 1) & !(self.mask & ADDRESS);
        let length = free + 1;
        (self.is_valid() && length.is_power_of_two()).then_some((self.base & ADDRESS & !free & (space - 1), length))
    }

    /// How a block of `2^order` bytes from `start`, a multiple of that, lies to the range.
    pub(crate) const fn meets(self, start: u64, order: u32) -> Meeting {
        let inside = if order >= u64::BITS { u64::MAX } else { (1 << order) - 1 };
        let compared = self.mask & ADDRESS;
        let above = compared & !inside;
        if !self.is_valid() || start & above != self.base & above {
            Meeting::Apart
        } else if compared & inside == 0 {
            Meeting::Whole
        } else {
            Meeting::Part
        }
    }
}

/// How a block lies to a range.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Meeting {
    /// No address of the block is in the range.
    Apart,
    /// Some are and some are not.
    Part,
    /// All are.
    Whole,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_range_that_one_pair_can_say_comes_back_from_its_registers(
            bits in 36_u8..=52, order in 12_u32..36, place in any::<u64>(), kind in 0_usize..5,
        ) {
            let kind = [0, 1, 4, 5, 6].map(MemoryType::from_mtrr)[kind].unwrap();
            let length = 1_u64 << order;
            let start = (place % (1 << bits)) & !(length - 1);
            let range = VariableRange::new(start, length, kind, bits).unwrap();
            prop_assert_eq!(range.span(bits), Some((start, length)));
            prop_assert_eq!(range.memory_type(), Some(kind));
            for (address, inside) in [(start, true), (start + length - 1, true), (start + length, false)] {
                prop_assert_eq!(range.contains(address), inside);
            }
            prop_assert!(start == 0 || !range.contains(start - 1));
        }

        #[test]
        fn a_block_lies_to_a_range_as_its_addresses_do(base in any::<u64>(), mask in any::<u64>(), page in any::<u64>(), order in 12_u32..16) {
            let range = VariableRange { base, mask };
            let start = page & !((1 << order) - 1);
            let inside = (0..1_u64 << (order - 12)).filter(|page| range.contains(start + page * PAGE)).count();
            let expected = match inside {
                0 => Meeting::Apart,
                all if all == 1 << (order - 12) => Meeting::Whole,
                _ => Meeting::Part,
            };
            prop_assert_eq!(range.meets(start, order), expected);
        }
    }

    #[test]
    fn what_one_pair_cannot_say_is_refused() {
        let uncached = MemoryType::Uncached;
        for (start, length) in [(0, 0), (0, 2048), (0, 3 << 20), (1 << 20, 2 << 20), (1 << 36, 4096), (u64::MAX, 4096)]
        {
            assert_eq!(VariableRange::new(start, length, uncached, 36), None, "{start:#x} {length:#x}");
        }
        assert_eq!(VariableRange::new(0, 4096, MemoryType::UncachedMinus, 36), None, "only page tables can say it");
    }

    #[test]
    fn a_mask_with_holes_has_no_single_span() {
        let every_other_page = VariableRange { base: 6, mask: 0x1000 | VALID };
        assert_eq!(every_other_page.span(36), None);
        assert!(every_other_page.contains(0x2000) && !every_other_page.contains(0x1000));
        assert_eq!(VariableRange::default().span(36), None, "it does not count");
    }
}
