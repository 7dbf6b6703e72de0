//! Guest memory: what backs it and how KVM and the devices see it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use self::layout::Range;
use crate::virtio::device::GuestMemory;

mod address_space;
mod blocks;
pub(crate) mod layout;
pub(crate) mod listener;
pub(crate) mod mapping;
pub(crate) mod plug;
mod region;
pub(crate) mod reservation;

pub(crate) use address_space::{AddressSpace, SlotAccess, SlotId};
pub(crate) use plug::PluggableMemory;
pub(crate) use region::range_of;
pub use region::{GuestRegions, Region};

/// Guest RAM before the machine runs.
#[derive(Clone, Debug)]
pub(crate) struct GuestRam {
    memory: GuestMemory,
    huge_pages: bool,
}

impl GuestRam {
    /// Maps `size` bytes of RAM at the addresses that the layout gives them.
    ///
    /// # Errors
    /// When the host has no room for the mapping.
    #[cfg(test)]
    pub(crate) fn new(size: u64) -> io::Result<Self> {
        Self::with_pluggable(size, None, false)
    }

    /// As [`Self::new`]; beside it, memory can be plugged at `pluggable` later (see [`PluggableMemory`]). All of it is in
    /// huge pages, if they are asked for and the host has any.
    ///
    /// # Errors
    /// When the host has no room for the mappings.
    pub(crate) fn with_pluggable(size: u64, pluggable: Option<Range>, huge_pages: bool) -> io::Result<Self> {
        let mut regions = Vec::new();
        for range in layout::ram(size) {
            let region = Region::fixed(mapping::ram(range.length)?, GuestAddress(range.start));
            regions.push(region.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?);
        }
        if let Some(range) = pluggable {
            regions.push(plug::region(range)?);
        }
        if huge_pages {
            for region in &regions {
                if let Err(error) = mapping::advise_huge_pages(region.mapping()) {
                    tracing::warn!(%error, "this host's kernel has no huge pages for guest memory: they are small ones");
                }
            }
        }
        let memory = GuestRegions::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self { memory: Arc::new(memory), huge_pages })
    }

    /// The memory as devices see it.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Copies `bytes` to guest-physical `address`.
    ///
    /// # Errors
    /// When they do not fit there.
    pub(crate) fn write(&self, bytes: &[u8], address: u64) -> io::Result<()> {
        self.memory.write_slice(bytes, GuestAddress(address)).map_err(io::Error::other)
    }

    /// Puts `length` bytes of `file` from `file_offset` on at guest-physical `address`: mapped where both lie on a page,
    /// read otherwise, and into huge pages, which no file's pages become.
    ///
    /// # Errors
    /// When they do not fit there, or the file cannot be mapped or read.
    pub(crate) fn load(&self, file: &File, file_offset: u64, length: u64, address: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let region = self.memory.find_region(GuestAddress(address)).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = address - region.start_addr().0;
        if region.len() - offset < length {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if !self.huge_pages && address.is_multiple_of(mapping::PAGE) && file_offset.is_multiple_of(mapping::PAGE) {
            // The last page is read, not mapped: behind the piece, the file may go on with something else.
            let whole = length - length % mapping::PAGE;
            if whole > 0 {
                mapping::overlay(&region.mapping().get_mmap(), offset, file, file_offset, whole)?;
            }
            return self.read_from(file, file_offset + whole, length - whole, address + whole);
        }
        self.read_from(file, file_offset, length, address)
    }

    fn read_from(&self, file: &File, mut file_offset: u64, length: u64, mut address: u64) -> io::Result<()> {
        let mut buffer = vec![0; usize::try_from(length.min(64 << 10)).map_err(io::Error::other)?];
        let end = address + length;
        while address < end {
            let wanted = usize::try_from(end - address).map_or(buffer.len(), |left| left.min(buffer.len()));
            file.read_exact_at(&mut buffer[..wanted], file_offset)?;
            self.write(&buffer[..wanted], address)?;
            let done = u64::try_from(wanted).map_err(io::Error::other)?;
            file_offset += done;
            address += done;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_loaded_piece_ends_where_it_ends() {
        let ram = GuestRam::new(64 << 20).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 4 * 4096]).unwrap();
        for (address, file_offset) in [(0x10_0000, 0), (0x20_0010, 0), (0x30_0000, 16)] {
            ram.load(&file, file_offset, 4096 + 100, address).unwrap();
            let mut seen = [0; 4096 + 101];
            ram.memory().read_slice(&mut seen, GuestAddress(address)).unwrap();
            assert_eq!((seen[0], seen[4096 + 99], seen[4096 + 100]), (1, 1, 0), "{address:x} {file_offset}");
        }
    }

    #[test]
    fn in_huge_pages_nothing_is_mapped_from_a_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 2 * 4096]).unwrap();
        let name = file.path().to_str().unwrap();
        let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains(name);
        for huge_pages in [true, false] {
            let ram = GuestRam::with_pluggable(64 << 20, None, huge_pages).unwrap();
            ram.load(file.as_file(), 0, 2 * 4096, 0x10_0000).unwrap();
            assert_eq!(mapped(), !huge_pages);
            let mut seen = [0; 2];
            ram.memory().read_slice(&mut seen, GuestAddress(0x10_1fff)).unwrap();
            assert_eq!(seen, [1, 0], "{huge_pages}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ram = GuestRam::new(64 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(ram.load(&file, 0, 1 << 20, (64 << 20) - 4096).is_err());
        assert!(ram.load(&file, 0, 4096, 1 << 40).is_err());
        assert!(ram.load(&file, 1 << 20, 100, 0x10_0000).is_err(), "behind the end of the file");
    }
}
