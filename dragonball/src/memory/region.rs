//! A region of guest memory as devices see it: a host mapping, of which blocks may be missing for a while.

use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress, MmapRegion, VolatileSlice,
};

use super::blocks::PluggedBlocks;
use super::layout::Range;

/// All regions of a guest's memory. The set never changes while the machine lives; what is plugged in one does.
pub type GuestRegions = GuestRegionCollection<Region>;

/// A region of guest memory.
///
/// Boot memory is there always. In pluggable memory each access is checked against the blocks that the guest has: a
/// driver that points a device anywhere else gets an error for that request, and the host spends no memory on it.
///
/// An access must go through the collection ([`GuestRegions`]) or [`GuestMemoryRegion::get_slice`], as everything in
/// `virtio_queue` does. What takes the region as one piece (`as_volatile_slice`, and `Bytes` on the region itself) fails
/// while a block is missing.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap<()>,
    blocks: Option<Arc<PluggedBlocks>>,
    /// What keeps the pages, of which `mapping` is only a view.
    _owner: MmapRegion,
}

impl Region {
    /// Memory at `start` that is always there; `view` is a part of `owner`'s pages. `None` when it would not fit below the
    /// end of all addresses.
    pub(crate) fn fixed((view, owner): (MmapRegion, MmapRegion), start: GuestAddress) -> Option<Self> {
        Some(Self { mapping: GuestRegionMmap::new(view, start)?, blocks: None, _owner: owner })
    }

    /// Memory at `start` whose `blocks` come and go; `view` is a part of `owner`'s pages.
    pub(crate) fn pluggable(
        (view, owner): (MmapRegion, MmapRegion),
        start: GuestAddress,
        blocks: Arc<PluggedBlocks>,
    ) -> Option<Self> {
        Some(Self { mapping: GuestRegionMmap::new(view, start)?, blocks: Some(blocks), _owner: owner })
    }

    /// The blocks that come and go; nothing for memory that is always there.
    pub(crate) fn blocks(&self) -> Option<&Arc<PluggedBlocks>> {
        self.blocks.as_ref()
    }

    /// The host mapping, missing blocks included.
    pub(crate) fn mapping(&self) -> &GuestRegionMmap<()> {
        &self.mapping
    }

    /// Whether `length` bytes from `offset` on can be accessed now.
    fn is_there(&self, offset: MemoryRegionAddress, length: usize) -> bool {
        match &self.blocks {
            None => true,
            Some(blocks) => u64::try_from(length).is_ok_and(|length| blocks.hold(offset.0, length)),
        }
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, offset: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        if self.is_there(offset, 1) {
            self.mapping.get_host_address(offset)
        } else {
            Err(GuestMemoryError::InvalidBackendAddress)
        }
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        if self.is_there(offset, count) {
            self.mapping.get_slice(offset, count)
        } else {
            Err(GuestMemoryError::InvalidBackendAddress)
        }
    }
}

impl GuestMemoryRegionBytes for Region {}

/// Where `slice`, a piece of `memory` as its devices get it, lies in the guest.
pub(crate) fn range_of(memory: &GuestRegions, slice: &VolatileSlice<'_>) -> Option<Range> {
    let host = slice.ptr_guard().as_ptr() as u64;
    let length = u64::try_from(slice.len()).ok().filter(|&length| length > 0)?;
    memory.iter().find_map(|region| {
        let pages = Range { start: region.mapping.as_ptr() as u64, length: region.len() };
        let offset = pages.offset_of(host, slice.len())?;
        Some(Range { start: region.start_addr().0 + offset, length })
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::blocks::{BLOCK, Run};
    use super::*;
    use crate::memory::mapping;

    #[test]
    fn accesses_reach_plugged_blocks_only_and_follow_them() {
        let blocks = Arc::new(PluggedBlocks::new(4 * BLOCK));
        let region =
            Region::pluggable(mapping::reserve(4 * BLOCK).unwrap(), GuestAddress(4 * BLOCK), Arc::clone(&blocks))
                .unwrap();
        let fixed = Region::fixed(mapping::ram(2 << 20).unwrap(), GuestAddress(0)).unwrap();
        let memory = GuestRegions::from_regions(vec![fixed, region]).unwrap();
        let reachable = |start: u64, length| memory.check_range(GuestAddress(start), length);
        assert!(reachable(0, 2 << 20) && !reachable(4 * BLOCK, 1));

        mapping::open(&memory.find_region(GuestAddress(4 * BLOCK)).unwrap().mapping, BLOCK, 2 * BLOCK).unwrap();
        blocks.set(Run { first: 1, count: 2 }, true);
        memory.write_slice(b"across", GuestAddress(6 * BLOCK - 3)).unwrap();
        let mut seen = [0; 6];
        memory.read_slice(&mut seen, GuestAddress(6 * BLOCK - 3)).unwrap();
        assert_eq!(&seen, b"across");
        assert!(reachable(5 * BLOCK, 2 << 21) && !reachable(5 * BLOCK, (2 << 21) + 1) && !reachable(5 * BLOCK - 1, 1));
        assert!(memory.get_host_address(GuestAddress(7 * BLOCK)).is_err());

        blocks.set(Run { first: 2, count: 1 }, false);
        assert!(memory.write_slice(b"across", GuestAddress(6 * BLOCK - 3)).is_err());
        assert!(memory.load::<u16>(GuestAddress(6 * BLOCK), std::sync::atomic::Ordering::Relaxed).is_err());
    }
}
