//! Guest memory that a device can access: pages that stay where they are, and their addresses on the bus.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap_anonymous};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Locked pages, there until the guest ends.
pub(crate) struct Pages {
    start: NonNull<u8>,
    count: usize,
}

impl Pages {
    /// Takes `count` zeroed pages.
    pub(crate) fn new(count: usize) -> Result<Self, String> {
        let length = count * PAGE;
        let size = NonZeroUsize::new(length).ok_or("no pages")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap_anonymous(None, size, access, flags) }.map_err(|error| error.to_string())?;
        // SAFETY: the mapping was just made.
        unsafe { mlock(start, length) }.map_err(|error| error.to_string())?;
        Ok(Self { start: start.cast(), count })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The 32-bit word at `index` from the first page on.
    fn word(&self, index: usize) -> *mut u32 {
        assert!(index < self.count * PAGE / 4, "inside of the pages");
        // SAFETY: inside of the mapping, as was just checked.
        unsafe { self.start.as_ptr().cast::<u32>().add(index) }
    }

    /// Reads a word that a device may have written.
    pub(crate) fn read(&self, index: usize) -> u32 {
        // SAFETY: inside of the mapping and aligned.
        unsafe { self.word(index).read_volatile() }
    }

    /// Writes a word.
    pub(crate) fn write(&self, index: usize, value: u32) {
        // SAFETY: inside of the mapping and aligned.
        unsafe { self.word(index).write_volatile(value) };
    }

    /// The address of a page on the bus, which in a guest without an IOMMU is its physical one.
    pub(crate) fn address(&self, page: usize) -> Result<u64, String> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        assert!(page < self.count, "one of the pages");
        let map = File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
        let mut entry = [0; 8];
        let index = self.start.as_ptr() as u64 / PAGE as u64 + page as u64;
        map.read_exact_at(&mut entry, index * 8).map_err(|error| error.to_string())?;
        let entry = u64::from_le_bytes(entry);
        if entry & PRESENT == 0 { Err("a locked page is away".to_owned()) } else { Ok((entry & FRAME) * PAGE as u64) }
    }
}
