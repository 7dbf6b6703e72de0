//! The memory of a device: its base address registers, and which parts of them the guest accesses without an exit.

use std::io;
use std::sync::Arc;

use super::dma::Dma;
use super::host::{BARS, CONFIG_REGION, HostDevice};
use super::mapping::Mapping;
use super::overlay::BAR_REGISTERS;
use crate::memory::layout::Range;
use crate::memory::{AddressSpace, SlotAccess, SlotId};
use crate::pci::windows::BarRequest;

const PAGE: u64 = 4096;

/// Memory slots of KVM.
pub(crate) trait Slots: Send + Sync {
    /// Shows the mapping at `host` to the guest as `range`.
    ///
    /// # Errors
    /// When KVM refuses, for instance because other memory is there.
    ///
    /// # Safety
    /// `host` must be a mapping of the range's length that stays in place until the slot is removed.
    unsafe fn add(&self, range: Range, host: u64) -> io::Result<SlotId>;

    /// Takes it away.
    ///
    /// # Errors
    /// When there is no such slot.
    fn remove(&self, slot: SlotId) -> io::Result<()>;
}

impl Slots for AddressSpace {
    unsafe fn add(&self, range: Range, host: u64) -> io::Result<SlotId> {
        // SAFETY: as the caller promises.
        unsafe { Self::add(self, range, host, SlotAccess::ReadWrite) }
    }

    fn remove(&self, slot: SlotId) -> io::Result<()> {
        Self::remove(self, slot)
    }
}

/// A base address register of memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct BarInfo {
    /// Its register and its region.
    pub(super) index: usize,
    /// What it asks for.
    pub(super) request: BarRequest,
}

/// The BARs of a device but for those of I/O ports.
///
/// # Errors
/// When the device cannot be read or has a BAR that no specification allows.
pub(super) fn discover(host: &dyn HostDevice) -> io::Result<Vec<BarInfo>> {
    let mut found = Vec::new();
    let mut index = 0;
    while index < BARS {
        let mut register = [0; 4];
        host.read(CONFIG_REGION, (BAR_REGISTERS + 4 * index) as u64, &mut register)?;
        let (ports, wide, prefetchable) = (register[0] & 1 != 0, register[0] & 6 == 4, register[0] & 8 != 0);
        let length = host.region(index).size;
        if length > 0 && !ports {
            let request = BarRequest { length, wide, prefetchable };
            let fits = if wide { index + 1 < BARS && length <= 1 << 52 } else { length <= 1 << 31 };
            if !fits || !length.is_power_of_two() || length < 16 {
                return Err(io::Error::other(format!("BAR {index} of {length} bytes is not a valid one")));
            }
            found.push(BarInfo { index, request });
        }
        index += if wide && !ports { 2 } else { 1 };
    }
    Ok(found)
}

/// The parts of a BAR that are mapped: what the host lets us map but for the pages of `trapped`, which are ours.
pub(super) fn mapped_parts(mappable: &[Range], trapped: Option<Range>) -> Vec<Range> {
    let hole = trapped.map(|range| (range.start / PAGE * PAGE, range.end().next_multiple_of(PAGE)));
    let mut parts = Vec::new();
    for area in mappable {
        let (start, end) = (area.start.next_multiple_of(PAGE), area.end() / PAGE * PAGE);
        let pieces = match hole {
            Some((from, to)) => [(start, end.min(from)), (start.max(to), end)],
            None => [(start, end), (end, end)],
        };
        let pieces = pieces.into_iter().filter(|(start, end)| start < end);
        parts.extend(pieces.map(|(start, end)| Range { start, length: end - start }));
    }
    parts
}

/// A BAR with its mappings.
pub(super) struct Bar {
    pub(super) info: BarInfo,
    parts: Vec<Part>,
    /// Where the guest has it while parts of it are shown.
    shown: Option<Range>,
}

struct Part {
    /// Where in the BAR.
    offset: u64,
    mapping: Arc<Mapping>,
    slot: Option<SlotId>,
    /// Where other devices see it.
    peers: Option<Range>,
}

/// Where the parts of BARs are shown.
#[derive(Clone)]
pub(super) struct View {
    /// To the guest.
    pub(super) slots: Arc<dyn Slots>,
    /// To other devices, where they may access this one.
    pub(super) peers: Option<Arc<Dma>>,
}

impl Bar {
    /// Maps all of a BAR that can be mapped.
    pub(super) fn map(host: &dyn HostDevice, info: BarInfo, trapped: Option<Range>) -> io::Result<Self> {
        let parts = mapped_parts(&host.region(info.index).mappable, trapped);
        let part = |part: Range| {
            let mapping = Arc::new(host.map(info.index, part)?);
            Ok(Part { offset: part.start, mapping, slot: None, peers: None })
        };
        let parts = parts.into_iter().map(part).collect::<io::Result<_>>()?;
        Ok(Self { info, parts, shown: None })
    }

    /// Takes it away from where it is, unless that is `wanted`.
    pub(super) fn leave(&mut self, wanted: Option<Range>, view: &View) {
        if self.shown.is_some() && self.shown != wanted {
            self.hide(view);
        }
    }

    /// Shows it at `wanted`. A part that KVM does not take, because the guest has put other memory there, is answered by
    /// exits.
    pub(super) fn appear(&mut self, wanted: Option<Range>, view: &View) {
        let Some(place) = wanted.filter(|_| self.shown.is_none()) else { return };
        self.shown = Some(place);
        for part in &mut self.parts {
            let range = Range { start: place.start + part.offset, length: part.mapping.length() };
            // SAFETY: the mapping lives until `hide` has removed the slot.
            match unsafe { view.slots.add(range, part.mapping.address()) } {
                Ok(slot) => part.slot = Some(slot),
                Err(error) => tracing::debug!(%error, ?range, "a part of a BAR is not mapped"),
            }
            if let Some(dma) = &view.peers {
                // SAFETY: as above; this process never looks at a device's memory.
                match unsafe { dma.map(range, part.mapping.address()) } {
                    Ok(()) => part.peers = Some(range),
                    Err(error) => tracing::warn!(%error, ?range, "other devices cannot access a BAR"),
                }
            }
        }
    }

    fn hide(&mut self, view: &View) {
        self.shown = None;
        for part in &mut self.parts {
            if let (Some(dma), Some(range)) = (&view.peers, part.peers.take())
                && let Err(error) = dma.unmap(range)
            {
                tracing::warn!(%error, ?range, "other devices still see a BAR");
            }
            if let Some(slot) = part.slot.take()
                && let Err(error) = view.slots.remove(slot)
            {
                tracing::error!(%error, "the guest still sees a BAR");
                // Then it must go on seeing this memory, and not what comes to its place in this process.
                std::mem::forget(Arc::clone(&part.mapping));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn range((start, end): (u64, u64)) -> Range {
        Range { start, length: end - start }
    }

    #[rstest]
    #[case(&[(0, 0x10000)], None, &[(0, 0x10000)])]
    #[case(&[(0, 0x10000)], Some((0x2100, 0x2200)), &[(0, 0x2000), (0x3000, 0x10000)])]
    #[case(&[(0, 0x10000)], Some((0, 0x1800)), &[(0x2000, 0x10000)])]
    #[case(&[(0, 0x10000)], Some((0xf000, 0x10000)), &[(0, 0xf000)])]
    #[case(&[(0, 0x1000)], Some((0x800, 0x810)), &[])]
    #[case(&[(0, 0x2000), (0x4000, 0x8000)], Some((0x4000, 0x4010)), &[(0, 0x2000), (0x5000, 0x8000)])]
    #[case(&[(0x100, 0x1100)], None, &[])]
    fn all_but_the_trapped_pages_are_mapped(
        #[case] mappable: &[(u64, u64)],
        #[case] trapped: Option<(u64, u64)>,
        #[case] expected: &[(u64, u64)],
    ) {
        let mappable: Vec<_> = mappable.iter().copied().map(range).collect();
        let expected: Vec<_> = expected.iter().copied().map(range).collect();
        assert_eq!(mapped_parts(&mappable, trapped.map(range)), expected);
    }

    proptest! {
        #[test]
        fn parts_are_whole_pages_inside_and_clear_of_what_is_trapped(
            areas in prop::collection::vec((0_u64..1 << 20, 1_u64..1 << 20), 0..4), at in 0_u64..1 << 20, length in 1_u64..9000
        ) {
            let areas: Vec<_> = areas.into_iter().map(|(start, length)| Range { start, length }).collect();
            let trapped = Range { start: at, length };
            for part in mapped_parts(&areas, Some(trapped)) {
                prop_assert!(part.start.is_multiple_of(PAGE) && part.length.is_multiple_of(PAGE) && part.length > 0);
                prop_assert!(!part.overlaps(trapped));
                prop_assert!(areas.iter().any(|area| area.start <= part.start && part.end() <= area.end()));
            }
        }
    }
}
