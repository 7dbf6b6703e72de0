//! Which blocks of pluggable memory the guest has: one bitmap that everybody who looks at guest memory shares.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a block (2 MiB): the unit in which memory is plugged, and a huge page.
pub(crate) const BLOCK: u64 = 2 << 20;
const WORD: u64 = 64;

/// The blocks of one memory region; all are unplugged at first.
///
/// Bits are set and cleared by the `vmm` thread, which is also the one that touches guest memory for devices; vCPU
/// threads only look whether a ring lies in memory.
#[derive(Debug)]
pub(crate) struct PluggedBlocks {
    words: Box<[AtomicU64]>,
    count: u64,
}

/// A run of blocks: the first one's number, and how many.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Run {
    /// The first block.
    pub(crate) first: u64,
    /// How many blocks.
    pub(crate) count: u64,
}

impl Run {
    /// The numbers of the blocks.
    pub(crate) fn numbers(self) -> std::ops::Range<u64> {
        self.first..self.first.saturating_add(self.count)
    }
}

impl PluggedBlocks {
    /// The blocks of a region of `length` bytes, a multiple of [`BLOCK`].
    pub(crate) fn new(length: u64) -> Self {
        let count = length / BLOCK;
        Self { words: (0..count.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect(), count }
    }

    /// The blocks of a region of `length` bytes from [`Self::to_words`]; `None` when the words are not those of such a region.
    pub(crate) fn from_words(length: u64, words: &[u64]) -> Option<Self> {
        let blocks = Self::new(length);
        let behind_the_end =
            (!blocks.count.is_multiple_of(WORD)).then(|| words.last().copied().unwrap_or(0) >> (blocks.count % WORD));
        if words.len() != blocks.words.len() || behind_the_end.is_some_and(|bits| bits != 0) {
            return None;
        }
        blocks.words.iter().zip(words).for_each(|(word, bits)| word.store(*bits, Ordering::Relaxed));
        Some(blocks)
    }

    /// A bit for each block, the first one's lowest.
    pub(crate) fn to_words(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Whether all blocks of `run` exist and are plugged. An empty run is.
    pub(crate) fn all(&self, run: Run) -> bool {
        self.exist(run) && self.masks(run).all(|(word, mask)| word.load(Ordering::Acquire) & mask == mask)
    }

    /// Whether any block of `run` is plugged.
    pub(crate) fn any(&self, run: Run) -> bool {
        self.masks(run).any(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    /// Whether `run` lies in the region.
    pub(crate) fn exist(&self, run: Run) -> bool {
        run.first.checked_add(run.count).is_some_and(|end| end <= self.count)
    }

    /// Whether each of the `length` bytes from `offset` on lies in a plugged block.
    pub(crate) fn hold(&self, offset: u64, length: u64) -> bool {
        let Some(end) = offset.checked_add(length) else { return false };
        let first = offset / BLOCK;
        self.all(Run { first, count: end.div_ceil(BLOCK) - first })
    }

    /// Notes that the blocks of `run`, which must exist, are plugged or not.
    pub(super) fn set(&self, run: Run, plugged: bool) {
        for (word, mask) in self.masks(run) {
            if plugged {
                word.fetch_or(mask, Ordering::Release);
            } else {
                word.fetch_and(!mask, Ordering::Release);
            }
        }
    }

    /// How many blocks are plugged.
    pub(crate) fn plugged(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// The plugged blocks as runs, in order, as long as they can be.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for number in (0..self.count).filter(|&number| self.all(Run { first: number, count: 1 })) {
            match runs.last_mut() {
                Some(last) if last.first + last.count == number => last.count += 1,
                _ => runs.push(Run { first: number, count: 1 }),
            }
        }
        runs
    }

    /// The words that hold the bits of `run`, as far as they exist, each with the bits of it that are meant.
    fn masks(&self, run: Run) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (start, end) = (run.first, run.first.saturating_add(run.count).min(self.count));
        let words = start / WORD..if start < end { end.div_ceil(WORD) } else { start / WORD };
        words.filter_map(move |index| {
            let low = start.max(index * WORD) - index * WORD;
            let high = end.min((index + 1) * WORD) - index * WORD;
            let mask = (u64::MAX >> (WORD - (high - low))) << low;
            Some((self.words.get(usize::try_from(index).ok()?)?, mask))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_are_what_a_set_of_numbers_would_be(
            changes in prop::collection::vec((0_u64..200, 0_u64..200, any::<bool>()), 0..20), asked in (0_u64..210, 0_u64..210)
        ) {
            let blocks = PluggedBlocks::new(200 * BLOCK);
            let mut model = BTreeSet::new();
            for (first, count, plugged) in changes {
                let run = Run { first, count: count.min(200 - first) };
                blocks.set(run, plugged);
                for number in run.numbers() {
                    if plugged { model.insert(number); } else { model.remove(&number); }
                }
            }
            let run = Run { first: asked.0, count: asked.1 };
            prop_assert_eq!(blocks.all(run), run.numbers().all(|number| model.contains(&number)) && run.numbers().end <= 200);
            prop_assert_eq!(blocks.any(run), run.numbers().any(|number| model.contains(&number)));
            prop_assert_eq!(blocks.plugged(), model.len() as u64);
            let listed: Vec<u64> = blocks.runs().into_iter().flat_map(Run::numbers).collect();
            prop_assert_eq!(listed, model.into_iter().collect::<Vec<_>>());
            let words = blocks.to_words();
            prop_assert_eq!(PluggedBlocks::from_words(200 * BLOCK, &words).map(|blocks| blocks.to_words()), Some(words));
        }
    }

    #[test]
    fn words_of_another_region_are_refused() {
        for (length, words) in
            [(200, &[0; 3][..]), (200, &[0; 5]), (200, &[0, 0, 0, 1 << 8]), (128, &[0; 3]), (0, &[0])]
        {
            assert!(PluggedBlocks::from_words(length * BLOCK, words).is_none(), "{length} {words:?}");
        }
        for (length, words) in [(200, &[0, 0, 0, 1 << 7][..]), (128, &[u64::MAX; 2]), (0, &[])] {
            assert!(PluggedBlocks::from_words(length * BLOCK, words).is_some(), "{length} {words:?}");
        }
    }

    #[test]
    fn bytes_are_held_only_by_plugged_blocks_up_to_the_last_one() {
        let blocks = PluggedBlocks::new(4 * BLOCK);
        blocks.set(Run { first: 1, count: 2 }, true);
        for (offset, length, held) in [
            (BLOCK, 1, true),
            (BLOCK, 2 * BLOCK, true),
            (3 * BLOCK - 1, 1, true),
            (3 * BLOCK - 1, 2, false),
            (BLOCK - 1, 2, false),
            (3 * BLOCK, 1, false),
            (4 * BLOCK, 1, false),
            (u64::MAX, 2, false),
            (BLOCK, u64::MAX, false),
        ] {
            assert_eq!(blocks.hold(offset, length), held, "{offset:#x} {length:#x}");
        }
    }
}
