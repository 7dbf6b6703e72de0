//! The address space as runs of one type each.

use crate::MemoryType;
use crate::registers::{FIXED_END, Mtrrs};
use crate::variable::Meeting;

/// The most blocks that are looked at before the answer is given up: masks with holes can cut an address space into
/// more runs than anybody can read.
pub const RUN_STEPS_MAX: usize = 1 << 16;

/// Addresses in a row that have one type.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct Run {
    /// First address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// The type that the MTRRs give them.
    pub memory_type: MemoryType,
}

/// The smallest range.
const PAGE_ORDER: u32 = 12;

impl Mtrrs {
    /// The types of all addresses of `address_bits` bits, ascending; neighbours differ. Nothing when the ranges cut the
    /// space into too many pieces ([`RUN_STEPS_MAX`]).
    #[must_use]
    pub fn runs(&self, address_bits: u8) -> Option<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut steps = 0;
        // Blocks still to be looked at, the lowest on top.
        let mut blocks = vec![(0_u64, u32::from(address_bits).clamp(PAGE_ORDER, u64::BITS - 1))];
        while let Some((start, order)) = blocks.pop() {
            steps += 1;
            if steps > RUN_STEPS_MAX {
                return None;
            }
            if order > PAGE_ORDER && self.is_cut(start, order) {
                let half = 1 << (order - 1);
                blocks.extend([(start + half, order - 1), (start, order - 1)]);
                continue;
            }
            let (end, memory_type) = (start + (1 << order), self.type_at(start));
            match runs.last_mut() {
                Some(last) if last.memory_type == memory_type => last.end = end,
                _ => runs.push(Run { start, end, memory_type }),
            }
        }
        Some(runs)
    }

    /// The parts of `length` bytes from `start` that have one type each; nothing when there are too many.
    #[must_use]
    pub fn runs_in(&self, start: u64, length: u64, address_bits: u8) -> Option<Vec<Run>> {
        let end = start.saturating_add(length);
        let cut = |run: Run| Run { start: run.start.max(start), end: run.end.min(end), ..run };
        Some(self.runs(address_bits)?.into_iter().map(cut).filter(|run| run.start < run.end).collect())
    }

    /// Whether a block may have more than one type.
    fn is_cut(&self, start: u64, order: u32) -> bool {
        let fixed = self.has_fixed() && start < FIXED_END;
        let variable = self.variable.iter().any(|range| range.meets(start, order) == Meeting::Part);
        self.are_enabled() && (fixed || variable)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::VariableRange;

    const BITS: u8 = 46;

    fn arbitrary() -> impl Strategy<Value = Mtrrs> {
        let range = (any::<u64>(), 12_u32..46, proptest::option::of(0_u32..46), 0_u8..8);
        (0_u64..8, any::<[u64; 11]>(), proptest::collection::vec(range, 8)).prop_map(|(default, fixed, ranges)| {
            let mut mtrrs = Mtrrs { default_type: 0x800 | default | (default & 1) << 10, fixed, ..Mtrrs::BOOT };
            for (place, (base, order, hole, kind)) in mtrrs.variable.iter_mut().zip(ranges) {
                let mask = ((1 << BITS) - 1) & !((1 << order) - 1);
                let mask = hole.map_or(mask, |hole| mask & !(1 << hole));
                *place = VariableRange { base: base & !0xfff | u64::from(kind), mask: mask & !0xfff | 0x800 };
            }
            mtrrs
        })
    }

    proptest! {
        #[test]
        fn runs_cover_the_address_space_once_and_say_what_each_address_says(mtrrs in arbitrary(), places in proptest::collection::vec(0_u64..1 << BITS, 64)) {
            let Some(runs) = mtrrs.runs(BITS) else { return Ok(()) };
            prop_assert_eq!(runs.first().unwrap().start, 0);
            prop_assert_eq!(runs.last().unwrap().end, 1 << BITS);
            for pair in runs.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
                prop_assert_ne!(pair[0].memory_type, pair[1].memory_type);
            }
            let edges = runs.iter().flat_map(|run| [run.start, run.end - 1]);
            let low = places.iter().map(|place| place % FIXED_END);
            for address in edges.take(4096).chain(low).chain(places.iter().copied()) {
                let run = runs.iter().find(|run| (run.start..run.end).contains(&address)).unwrap();
                prop_assert_eq!(run.memory_type, mtrrs.type_at(address), "{:#x}", address);
            }
        }
    }

    #[test]
    fn a_hole_for_devices_is_three_runs() {
        let mut mtrrs = Mtrrs::BOOT;
        mtrrs.variable[3] = VariableRange::new(3 << 30, 1 << 30, MemoryType::Uncached, BITS).unwrap();
        let run = |start, end, memory_type| Run { start, end, memory_type };
        let expected = vec![
            run(0, 3 << 30, MemoryType::WriteBack),
            run(3 << 30, 4 << 30, MemoryType::Uncached),
            run(4 << 30, 1 << BITS, MemoryType::WriteBack),
        ];
        assert_eq!(mtrrs.runs(BITS), Some(expected));
        let inside = mtrrs.runs_in((4 << 30) - 0x2000, 0x3000, BITS).unwrap();
        assert_eq!(
            inside,
            [
                run((4 << 30) - 0x2000, 4 << 30, MemoryType::Uncached),
                run(4 << 30, (4 << 30) + 0x1000, MemoryType::WriteBack)
            ]
        );
    }

    #[test]
    fn a_mask_that_cuts_everything_to_pieces_gets_no_answer_instead_of_an_endless_one() {
        let mut mtrrs = Mtrrs::BOOT;
        mtrrs.variable[0] = VariableRange { base: 0, mask: 0x1800 };
        assert_eq!(mtrrs.runs(BITS), None);
        assert_eq!(mtrrs.type_at(0x1000), MemoryType::WriteBack);
        assert_eq!(mtrrs.type_at(0x2000), MemoryType::Uncached);
    }
}
