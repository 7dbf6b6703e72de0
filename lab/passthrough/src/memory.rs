//! Guest memory that a device can access: pages that stay where they are, and their addresses on the bus.

use std::fs::{self, File};
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

    /// The address of a page on the bus.
    pub(crate) fn address(&self, page: usize) -> Result<u64, String> {
        assert!(page < self.count, "one of the pages");
        bus_address(self.start.as_ptr() as u64 + (page * PAGE) as u64)
    }
}

/// The address on the bus of a page of this process, which in a guest without an IOMMU is its physical one.
fn bus_address(address: u64) -> Result<u64, String> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let map = File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
    let mut entry = [0; 8];
    map.read_exact_at(&mut entry, address / PAGE as u64 * 8).map_err(|error| error.to_string())?;
    let entry = u64::from_le_bytes(entry);
    if entry & PRESENT == 0 { Err("a locked page is away".to_owned()) } else { Ok((entry & FRAME) * PAGE as u64) }
}

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Huge pages: each is one piece for a device. There until the guest ends.
pub(crate) struct HugePages {
    start: NonNull<u32>,
    count: usize,
}

impl HugePages {
    /// Takes `count` zeroed huge pages, which the kernel makes free for it.
    pub(crate) fn new(count: usize) -> Result<Self, String> {
        fs::write("/proc/sys/vm/nr_hugepages", count.to_string()).map_err(|error| error.to_string())?;
        let size = NonZeroUsize::new(count * HUGE_PAGE).ok_or("no pages")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap_anonymous(None, size, access, flags) };
        let start = start.map_err(|error| format!("{count} huge pages: {error}"))?;
        Ok(Self { start: start.cast(), count })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// What is in them, while no device writes there.
    pub(crate) fn words(&mut self) -> &mut [u32] {
        // SAFETY: the mapping is this value's own, aligned and as long as this; whoever lets a device write waits for its
        // end before the next call.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.count * HUGE_PAGE / 4) }
    }

    /// The address of a huge page on the bus.
    pub(crate) fn address(&self, page: usize) -> Result<u64, String> {
        assert!(page < self.count, "one of the pages");
        bus_address(self.start.as_ptr() as u64 + (page * HUGE_PAGE) as u64)
    }
}
