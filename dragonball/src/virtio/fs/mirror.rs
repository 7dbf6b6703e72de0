//! Guest memory described by the types of vm-memory 0.17, for the library that is written against those.

use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion as _};
use vm_memory_017::bitmap::BS;
use vm_memory_017::mmap::MmapRegionBuilder;
use vm_memory_017::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::virtio::device::GuestMemory;

/// The mirror of all guest memory.
pub(super) type Mirror = GuestRegionCollection<MirrorRegion>;

/// A region of it: the same pages, of which the same blocks are missing.
pub(super) struct MirrorRegion {
    pages: GuestRegionMmap<()>,
    /// The memory that the pages are of, and the number of the region in it.
    original: (GuestMemory, usize),
}

/// The pages of `memory`, described by the other version's types. `None` when a region cannot be described.
pub(super) fn of(memory: &GuestMemory) -> Option<Mirror> {
    let regions = memory
        .iter()
        .enumerate()
        .map(|(number, region)| {
            let length = usize::try_from(region.len()).ok()?;
            // SAFETY: the region is mapped, has this length, and lives as long as the mirror's region, which holds
            // `memory`; a region of a raw pointer does not unmap it when it is dropped.
            let mapping = unsafe { MmapRegionBuilder::new(length).with_raw_mmap_pointer(region.mapping().as_ptr()) };
            let mapping = mapping.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().ok()?;
            let pages = GuestRegionMmap::new(mapping, GuestAddress(region.start_addr().0))?;
            Some(MirrorRegion { pages, original: (Arc::clone(memory), number) })
        })
        .collect::<Option<Vec<_>>>()?;
    Mirror::from_regions(regions).ok()
}

impl MirrorRegion {
    /// Whether the original would let a device have `count` bytes from `offset` on.
    fn is_there(&self, offset: MemoryRegionAddress, count: usize) -> bool {
        let (memory, number) = &self.original;
        let region = memory.iter().nth(*number);
        region.is_some_and(|region| region.get_slice(vm_memory::MemoryRegionAddress(offset.0), count).is_ok())
    }
}

impl GuestMemoryRegion for MirrorRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.pages.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.pages.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        if self.is_there(offset, count) {
            self.pages.get_slice(offset, count)
        } else {
            Err(GuestMemoryError::InvalidBackendAddress)
        }
    }
}

impl GuestMemoryRegionBytes for MirrorRegion {}
