//! All MTRRs of a processor: 28 registers, and the type that they give to an address.

use crate::MemoryType;
use crate::variable::{VARIABLE_RANGES, VariableRange};

/// How many registers there are: the default type, 11 of fixed ranges, 8 pairs of variable ones.
pub const MTRR_REGISTERS: usize = 1 + FIXED.len() + 2 * VARIABLE_RANGES;

/// `IA32_MTRR_DEF_TYPE`.
const DEFAULT_TYPE: u32 = 0x2ff;
/// Its bit that lets MTRRs count.
const ENABLE: u64 = 1 << 11;
/// Its bit that lets the fixed ranges count.
const ENABLE_FIXED: u64 = 1 << 10;
/// `IA32_MTRR_PHYSBASE0`; masks and further pairs follow.
const FIRST_VARIABLE: u32 = 0x200;

/// The registers of fixed ranges: index, first address, and the order of each of its eight ranges' length.
const FIXED: [(u32, u64, u32); 11] = [
    (0x250, 0x0_0000, 16),
    (0x258, 0x8_0000, 14),
    (0x259, 0xA_0000, 14),
    (0x268, 0xC_0000, 12),
    (0x269, 0xC_8000, 12),
    (0x26a, 0xD_0000, 12),
    (0x26b, 0xD_8000, 12),
    (0x26c, 0xE_0000, 12),
    (0x26d, 0xE_8000, 12),
    (0x26e, 0xF_0000, 12),
    (0x26f, 0xF_8000, 12),
];
/// Where fixed ranges end.
pub(crate) const FIXED_END: u64 = 1 << 20;

/// The MTRRs of one processor.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct Mtrrs {
    /// `IA32_MTRR_DEF_TYPE`: the type where no range says another, and what counts at all.
    pub default_type: u64,
    /// The fixed ranges below 1 MiB, by ascending addresses: eight types each.
    pub fixed: [u64; 11],
    /// The variable ranges.
    pub variable: [VariableRange; VARIABLE_RANGES],
}

/// A register holds what no processor takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the register {index:#x} cannot be {value:#x}: it has a reserved memory type or reserved bits")]
pub struct InvalidRegister {
    /// Its number.
    pub index: u32,
    /// What it holds.
    pub value: u64,
}

impl Mtrrs {
    /// What a machine of ours starts with: MTRRs count, everything is write-back, no range says otherwise. The fixed
    /// ranges stay off: counting them with their registers at zero would make the first MiB uncached.
    pub const BOOT: Self = Self {
        default_type: ENABLE | MemoryType::WriteBack.encoding() as u64,
        fixed: [0; 11],
        variable: [VariableRange { base: 0, mask: 0 }; VARIABLE_RANGES],
    };

    /// The registers by their numbers. The default type comes last: it may let the others count.
    #[must_use]
    pub fn registers(&self) -> [(u32, u64); MTRR_REGISTERS] {
        let pairs = (FIRST_VARIABLE..).step_by(2).zip(&self.variable);
        let variable = pairs.flat_map(|(index, range)| [(index, range.base), (index + 1, range.mask)]);
        let fixed = FIXED.iter().zip(&self.fixed).map(|((index, ..), value)| (*index, *value));
        let mut all = variable.chain(fixed).chain([(DEFAULT_TYPE, self.default_type)]);
        // Exactly as many as there are places.
        std::array::from_fn(|_| all.next().unwrap_or_default())
    }

    /// The state in which each register has the value that `read` gives for its number.
    #[must_use]
    pub fn read(mut read: impl FnMut(u32) -> u64) -> Self {
        let mut made = Self { default_type: read(DEFAULT_TYPE), ..Self::BOOT };
        for ((index, ..), value) in FIXED.iter().zip(&mut made.fixed) {
            *value = read(*index);
        }
        for (index, range) in (FIRST_VARIABLE..).step_by(2).zip(&mut made.variable) {
            *range = VariableRange { base: read(index), mask: read(index + 1) };
        }
        made
    }

    /// Checks that a processor whose physical addresses have `address_bits` bits takes all values.
    ///
    /// # Errors
    /// The first register that it would refuse.
    pub fn check(&self, address_bits: u8) -> Result<(), InvalidRegister> {
        let beyond = u64::MAX.checked_shl(u32::from(address_bits)).unwrap_or(0);
        let known = |encoding: u8| MemoryType::from_mtrr(encoding).is_some();
        for (index, value) in self.registers() {
            let kind = value.to_le_bytes()[0];
            let good = match index {
                DEFAULT_TYPE => value & !(ENABLE | ENABLE_FIXED | 0xff) == 0 && known(kind),
                0x200..0x210 if index % 2 == 0 => value & (beyond | 0xf00) == 0 && known(kind),
                0x200..0x210 => value & (beyond | 0x7ff) == 0,
                _ => value.to_le_bytes().into_iter().all(known),
            };
            if !good {
                return Err(InvalidRegister { index, value });
            }
        }
        Ok(())
    }

    /// Whether MTRRs count at all; everything is uncached when they do not.
    #[must_use]
    pub const fn are_enabled(&self) -> bool {
        self.default_type & ENABLE != 0
    }

    /// Whether the fixed ranges count.
    #[must_use]
    pub const fn has_fixed(&self) -> bool {
        self.are_enabled() && self.default_type & ENABLE_FIXED != 0
    }

    /// The type where no range says another.
    #[must_use]
    pub fn default_memory_type(&self) -> MemoryType {
        MemoryType::from_mtrr(self.default_type.to_le_bytes()[0]).unwrap_or(MemoryType::Uncached)
    }

    /// The type that the MTRRs give to `address`.
    #[must_use]
    pub fn type_at(&self, address: u64) -> MemoryType {
        if !self.are_enabled() {
            return MemoryType::Uncached;
        }
        if self.has_fixed() && address < FIXED_END {
            return self.fixed_type_at(address);
        }
        let covering = self.variable.iter().filter(|range| range.contains(address));
        overlap(covering.map(|range| range.memory_type())).unwrap_or_else(|| self.default_memory_type())
    }

    /// The type that the variable ranges alone give to `address`; nothing where none says anything.
    #[must_use]
    pub fn variable_type_at(&self, address: u64) -> Option<MemoryType> {
        let covering = self.variable.iter().filter(|range| range.contains(address));
        overlap(covering.map(|range| range.memory_type()))
    }

    fn fixed_type_at(&self, address: u64) -> MemoryType {
        let part = |((_, start, order), value): (&(u32, u64, u32), &u64)| {
            let number = usize::try_from(address.checked_sub(*start)? >> order).ok()?;
            value.to_le_bytes().get(number).copied()
        };
        let kind = FIXED.iter().zip(&self.fixed).find_map(part);
        kind.and_then(MemoryType::from_mtrr).unwrap_or(MemoryType::Uncached)
    }
}

/// What comes of overlapping variable ranges (SDM vol. 3A, §12.11.4.1): uncached wins, write-through wins over
/// write-back, equal ones agree. Other mixtures are undefined, and reserved types too: both count as uncached here, as
/// the one answer that no caller can come to harm by. Nothing when there are no ranges.
#[must_use]
pub fn overlap(types: impl Iterator<Item = Option<MemoryType>>) -> Option<MemoryType> {
    use MemoryType::{Uncached, WriteBack, WriteThrough};
    types.map(|kind| kind.unwrap_or(Uncached)).reduce(|one, other| match (one, other) {
        (one, other) if one == other => one,
        (WriteThrough, WriteBack) | (WriteBack, WriteThrough) => WriteThrough,
        _ => Uncached,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::MemoryType::{Uncached, WriteBack, WriteCombining, WriteProtected, WriteThrough};
    use super::*;

    pub(crate) fn with(ranges: &[(u64, u64, MemoryType)]) -> Mtrrs {
        let mut made = Mtrrs::BOOT;
        for (place, (start, length, kind)) in made.variable.iter_mut().zip(ranges) {
            *place = VariableRange::new(*start, *length, *kind, 46).unwrap();
        }
        made
    }

    #[test]
    fn a_machine_starts_with_everything_write_back() {
        assert_eq!(Mtrrs::BOOT.default_type, 0x806);
        Mtrrs::BOOT.check(36).unwrap();
        for address in [0, 0xA_0000, 0xC000_0000, 1 << 32, (1 << 46) - 1] {
            assert_eq!(Mtrrs::BOOT.type_at(address), WriteBack);
        }
    }

    #[test]
    fn there_are_28_registers_and_each_has_its_own_number() {
        let mut numbers = Mtrrs::BOOT.registers().map(|(index, _)| index).to_vec();
        assert_eq!(numbers.last(), Some(&0x2ff), "what lets the others count comes last");
        numbers.sort_unstable();
        let mut expected: Vec<u32> = (0x200..0x210).chain([0x250, 0x258, 0x259]).chain(0x268..0x270).collect();
        expected.push(0x2ff);
        assert_eq!(numbers, expected);
        assert_eq!(numbers.len(), 28);
    }

    proptest! {
        #[test]
        fn registers_lead_back_to_their_state(default_type in any::<u64>(), fixed in any::<[u64; 11]>(), variable in any::<[(u64, u64); 8]>()) {
            let variable = variable.map(|(base, mask)| VariableRange { base, mask });
            let mtrrs = Mtrrs { default_type, fixed, variable };
            let registers = mtrrs.registers();
            let value = |index| registers.iter().find(|(number, _)| *number == index).unwrap().1;
            prop_assert_eq!(Mtrrs::read(value), mtrrs);
            let json = serde_json::to_string(&mtrrs).unwrap();
            prop_assert_eq!(serde_json::from_str::<Mtrrs>(&json).unwrap(), mtrrs);
            // Whatever is in them, each address has a type.
            let _ = (mtrrs.check(46), mtrrs.type_at(0xB_8000), mtrrs.type_at(1 << 40));
        }

        #[test]
        fn uncached_wins_wherever_it_lies(ranges in proptest::collection::vec((0_u64..64, 0_u32..6, 0_usize..5), 1..8), page in 0_u64..64) {
            let kinds = [Uncached, WriteCombining, WriteThrough, WriteProtected, WriteBack];
            let ranges: Vec<_> = ranges.into_iter().map(|(start, order, kind)| {
                let length = 1_u64 << (order + 21);
                ((start << 21) & !(length - 1), length, kinds[kind])
            }).collect();
            let address = page << 21;
            let covering: Vec<_> = ranges.iter().filter(|(start, length, _)| (*start..start + length).contains(&address)).collect();
            let kind = with(&ranges).type_at(address);
            if covering.is_empty() {
                prop_assert_eq!(kind, WriteBack);
            } else if covering.iter().any(|(.., kind)| *kind == Uncached) {
                prop_assert_eq!(kind, Uncached);
            } else if covering.iter().all(|(.., kind)| [WriteBack, WriteThrough].contains(kind)) {
                let through = covering.iter().any(|(.., kind)| *kind == WriteThrough);
                prop_assert_eq!(kind, if through { WriteThrough } else { WriteBack });
            } else {
                let first = covering[0].2;
                let equal = covering.iter().all(|(.., kind)| *kind == first);
                prop_assert_eq!(kind, if equal { first } else { Uncached });
            }
        }
    }

    #[test]
    fn fixed_ranges_count_below_1_mib_and_only_where_they_are_on() {
        let mut mtrrs = with(&[(0, 1 << 21, WriteCombining)]);
        mtrrs.fixed = [0x0606_0606_0606_0606; 11];
        mtrrs.fixed[2] = 0x0101_0101_0404_0404;
        mtrrs.fixed[10] = 0x0506_0606_0606_0606;
        let types = |mtrrs: &Mtrrs| [0, 0xA_FFFF, 0xB_0000, 0xF_EFFF, 0xF_FFFF, 0x10_0000].map(|at| mtrrs.type_at(at));
        assert_eq!(types(&mtrrs), [WriteCombining; 6]);
        mtrrs.default_type |= ENABLE_FIXED;
        assert_eq!(types(&mtrrs), [WriteBack, WriteThrough, WriteCombining, WriteBack, WriteProtected, WriteCombining]);
        mtrrs.default_type &= !ENABLE;
        assert_eq!(types(&mtrrs), [Uncached; 6]);
    }

    #[test]
    fn what_no_processor_takes_is_found() {
        let good = with(&[(1 << 45, 1 << 45, WriteCombining)]);
        good.check(46).unwrap();
        assert_eq!(good.check(45).map_err(|error| error.index), Err(0x200), "the base is beyond the address space");
        for (index, value) in [(0x2ff, 0x803), (0x2ff, 0x1806), (0x250, 7), (0x202, 2), (0x203, 1)] {
            let registers = good.registers();
            let others = |number| registers.iter().find(|(index, _)| *index == number).unwrap().1;
            let bad = Mtrrs::read(|number| if number == index { value } else { others(number) });
            assert_eq!(bad.check(46), Err(InvalidRegister { index, value }));
        }
    }
}
