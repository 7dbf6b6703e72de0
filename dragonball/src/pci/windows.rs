//! The PCI windows of the machine and who has which part of them: the allocator of base address registers.
//!
//! A BAR's memory is as long as a power of two and lies at a multiple of its length. Placing the largest first then
//! wastes nothing between them. Which window takes which BAR follows from what a guest accepts: memory that must not be
//! prefetched, and BARs of 32 bits, go below 4 GiB; prefetchable BARs of 64 bits go above.
//! Source: PCI Local Bus Specification 3.0, §6.2.5.

use std::fmt;

use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use crate::memory::layout::Range;

/// What a BAR asks for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct BarRequest {
    /// Length in bytes: a power of two, at least 16.
    pub(crate) length: u64,
    /// Whether it can lie above 4 GiB.
    pub(crate) wide: bool,
    /// Whether reads have no side effects.
    pub(crate) prefetchable: bool,
}

impl BarRequest {
    /// A BAR of 32 bits whose reads may have side effects.
    #[cfg(test)]
    pub(crate) const fn registers(length: u64) -> Self {
        Self { length, wide: false, prefetchable: false }
    }

    /// The window that it belongs into.
    const fn window(self) -> WindowKind {
        if self.wide && self.prefetchable { WindowKind::High } else { WindowKind::Low }
    }
}

/// One of the two windows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum WindowKind {
    /// Below 4 GiB.
    Low,
    /// Above RAM, prefetchable.
    High,
}

impl fmt::Display for WindowKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Low => "32-bit",
            Self::High => "64-bit prefetchable",
        })
    }
}

/// A window has no room for what was asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "the device memory needs {} of the {window} PCI window in pieces of up to {}, the window has {} free of {}: {}",
    Bytes(*.need), Bytes(*.largest), Bytes(*.free), Bytes(*.size), remedy(*.window)
)]
pub(crate) struct NoRoom {
    /// Which window.
    pub(crate) window: WindowKind,
    /// What all BARs that were asked for together need of it, in bytes.
    pub(crate) need: u64,
    /// The longest of them, which is also its alignment, in bytes.
    pub(crate) largest: u64,
    /// Bytes that nobody has.
    pub(crate) free: u64,
    /// Bytes in all.
    pub(crate) size: u64,
}

const fn remedy(window: WindowKind) -> &'static str {
    match window {
        WindowKind::Low => "remove another device",
        WindowKind::High => {
            "remove another device, give the machine less memory, or use a host whose processors have more physical \
             address bits"
        }
    }
}

/// A number of bytes in the largest unit that divides it.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = UNITS.iter().find(|(shift, _)| self.0 >> shift > 0 && self.0.trailing_zeros() >= *shift);
        match unit {
            Some((shift, name)) => write!(formatter, "{} {name}", self.0 >> shift),
            None => write!(formatter, "{} bytes", self.0),
        }
    }
}

/// Both windows.
#[derive(Debug)]
pub(crate) struct Windows {
    low: Window,
    /// Missing where the guest's addresses leave no room above RAM.
    high: Option<Window>,
}

impl Windows {
    /// Two empty windows; neither has length 0.
    pub(crate) fn new(low: Range, high: Option<Range>) -> Self {
        Self { low: Window::new(low), high: high.map(Window::new) }
    }

    /// Adds the window above RAM, once it is known what lies below it.
    pub(crate) fn set_high(&mut self, range: Option<Range>) {
        self.high = range.map(Window::new);
    }

    /// The addresses that BARs may have.
    #[cfg(test)]
    pub(crate) fn ranges(&self) -> Vec<Range> {
        [Some(&self.low), self.high.as_ref()].into_iter().flatten().map(|window| window.range).collect()
    }

    /// Places all of `requests` and gives their ranges in the same order.
    ///
    /// # Errors
    /// When one does not fit; none is placed then.
    pub(crate) fn place(&mut self, requests: &[BarRequest]) -> Result<Vec<Range>, NoRoom> {
        let mut order: Vec<usize> = (0..requests.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(requests[*index].length));
        let mut placed = vec![None; requests.len()];
        for index in order {
            let request = requests[index];
            let window = self.window(request.window());
            let Some(range) = window.and_then(|window| window.allocate(request.length)) else {
                for range in placed.into_iter().flatten() {
                    self.free(range);
                }
                return Err(self.no_room(requests, request.window()));
            };
            placed[index] = Some(range);
        }
        Ok(placed.into_iter().flatten().collect())
    }

    /// Gives a range back that [`Self::place`] gave.
    pub(crate) fn free(&mut self, range: Range) {
        for window in [Some(&mut self.low), self.high.as_mut()].into_iter().flatten() {
            if window.range.offset_of(range.start, 1).is_some() {
                window.free(range);
            }
        }
    }

    fn window(&mut self, kind: WindowKind) -> Option<&mut Window> {
        match kind {
            WindowKind::Low => Some(&mut self.low),
            WindowKind::High => self.high.as_mut(),
        }
    }

    fn no_room(&mut self, requests: &[BarRequest], window: WindowKind) -> NoRoom {
        let lengths = || requests.iter().filter(|request| request.window() == window).map(|request| request.length);
        let (size, free) = self.window(window).map_or((0, 0), |window| (window.range.length, window.free));
        let need = lengths().fold(0, u64::saturating_add);
        NoRoom { window, need, largest: lengths().max().unwrap_or_default(), free, size }
    }
}

/// A window and what of it is taken.
#[derive(Debug)]
struct Window {
    range: Range,
    /// Nothing for a range that no allocator can hold, which is then full.
    allocator: Option<AddressAllocator>,
    free: u64,
}

impl Window {
    fn new(range: Range) -> Self {
        let allocator = AddressAllocator::new(range.start, range.length).ok();
        Self { range, allocator, free: range.length }
    }

    fn allocate(&mut self, length: u64) -> Option<Range> {
        let taken = self.allocator.as_mut()?.allocate(length, length, AllocPolicy::FirstMatch).ok()?;
        self.free -= length;
        Some(Range { start: taken.start(), length })
    }

    fn free(&mut self, range: Range) {
        let freed = RangeInclusive::new(range.start, range.end() - 1)
            .ok()
            .and_then(|taken| self.allocator.as_mut()?.free(&taken).ok());
        if freed.is_some() {
            self.free += range.length;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::layout::{HighMemory, PCI_32};

    const GIB: u64 = 1 << 30;

    fn windows(memory: u64, address_bits: u8) -> Windows {
        Windows::new(PCI_32, HighMemory::above(memory, None, address_bits).pci_window())
    }

    fn video_memory(length: u64) -> BarRequest {
        BarRequest { length, wide: true, prefetchable: true }
    }

    /// A datacenter GPU: 16 MiB of registers, video memory, 32 MiB beside it.
    fn gpu(video: u64) -> [BarRequest; 3] {
        [BarRequest::registers(16 << 20), video_memory(video), video_memory(32 << 20)]
    }

    #[test]
    fn eight_gpus_of_256_gib_fit_at_46_address_bits() {
        let mut windows = windows(256 * GIB, 46);
        let mut seen: Vec<Range> = Vec::new();
        for _ in 0..8 {
            for range in windows.place(&gpu(256 * GIB)).unwrap() {
                assert!(range.start.is_multiple_of(range.length), "{range:x?}");
                assert!(seen.iter().all(|other| !other.overlaps(range)), "{range:x?}");
                seen.push(range);
            }
        }
    }

    #[test]
    fn too_few_address_bits_are_refused_with_need_and_have() {
        let mut windows = windows(4 * GIB, 39);
        windows.place(&gpu(128 * GIB)).unwrap();
        let error = windows.place(&gpu(256 * GIB)).unwrap_err();
        assert_eq!((error.window, error.need, error.largest), (WindowKind::High, 256 * GIB + (32 << 20), 256 * GIB));
        let text = error.to_string();
        assert!(text.contains("256 GiB") && text.contains("64-bit") && text.contains("address bits"), "{text}");
        let mut none = Windows::new(PCI_32, None);
        assert_eq!(none.place(&gpu(GIB)).unwrap_err().size, 0);
        assert!(none.place(&[BarRequest::registers(16)]).is_ok());
    }

    #[test]
    fn what_does_not_fit_leaves_nothing_taken() {
        let mut windows = windows(GIB, 40);
        let before = (windows.low.free, windows.high.as_ref().unwrap().free);
        assert!(windows.place(&[gpu(GIB)[0], video_memory(GIB), BarRequest::registers(GIB)]).is_err());
        assert_eq!((windows.low.free, windows.high.as_ref().unwrap().free), before);
        assert!(windows.place(&gpu(GIB)).is_ok());
    }

    #[test]
    fn memory_with_side_effects_stays_below_4_gib_however_wide_its_register() {
        let mut windows = windows(GIB, 40);
        let wide = BarRequest { length: 16 << 10, wide: true, prefetchable: false };
        let narrow = BarRequest { length: 16 << 10, wide: false, prefetchable: true };
        assert!(windows.place(&[wide, narrow]).unwrap().iter().all(|range| range.end() <= 1 << 32));
    }

    #[test]
    fn a_returned_range_is_given_again() {
        let mut windows = windows(GIB, 39);
        for _ in 0..100 {
            let ranges = windows.place(&gpu(128 * GIB)).unwrap();
            ranges.into_iter().for_each(|range| windows.free(range));
        }
    }

    proptest! {
        #[test]
        fn ranges_are_aligned_apart_and_inside(
            requests in prop::collection::vec((4_u32..40, any::<bool>(), any::<bool>()), 0..24),
            bits in 36_u8..=52,
        ) {
            let requests: Vec<_> = requests
                .into_iter()
                .map(|(shift, wide, prefetchable)| BarRequest { length: 1 << shift, wide, prefetchable })
                .collect();
            let mut windows = windows(GIB, bits);
            let all = windows.ranges();
            if let Ok(ranges) = windows.place(&requests) {
                for (index, (range, request)) in ranges.iter().zip(&requests).enumerate() {
                    prop_assert_eq!(range.length, request.length);
                    prop_assert!(range.start.is_multiple_of(range.length));
                    prop_assert!(all.iter().any(|window| window.start <= range.start && range.end() <= window.end()));
                    prop_assert!(request.wide || range.end() <= 1 << 32);
                    prop_assert!(ranges[..index].iter().all(|other| !other.overlaps(*range)));
                }
            }
        }
    }
}
