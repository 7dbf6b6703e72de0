//! The mapping of a part of a device's memory into this process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};

/// The largest page that a processor maps at once (1 GiB). A mapping that is aligned to its own size, up to this, lets
/// the kernel use pages as large as they get: 256 GiB in pages of 4 KiB would need 512 MiB of tables.
const ALIGNMENT_MAX: usize = 1 << 30;
const PAGE: usize = 4096;

/// Memory of a device in the address space of this process. This process never touches it: it is there for KVM and the
/// IOMMU.
#[derive(Debug)]
pub(crate) struct Mapping {
    reserved: NonNull<libc::c_void>,
    reserved_length: usize,
    start: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: the mapping belongs to the process and not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: nothing is accessed through it.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` on, for reading and writing.
    ///
    /// # Errors
    /// When the range is no multiple of the page size, or the host refuses.
    pub(crate) fn new(file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        if length == 0 || !length.is_multiple_of(PAGE) {
            return Err(invalid());
        }
        let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
        let alignment = length.checked_next_power_of_two().unwrap_or(ALIGNMENT_MAX).min(ALIGNMENT_MAX);
        let reserved_length = length.checked_add(alignment).ok_or_else(invalid)?;
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let reserved = unsafe { libc::mmap(null_mut(), reserved_length, libc::PROT_NONE, anonymous, -1, 0) };
        let reserved = mapped(reserved)?;
        let skip = reserved.cast::<u8>().as_ptr().align_offset(alignment);
        // SAFETY: `skip` is less than the alignment, by which the reservation is longer than `length`.
        let start = unsafe { reserved.cast::<u8>().add(skip) }.cast();
        let mapping = Self { reserved, reserved_length, start, length };

        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: the range lies in the reservation, which nothing else uses, and replaces a part of it.
        mapped(unsafe { libc::mmap(start.as_ptr(), length, access, flags, file.as_raw_fd(), offset) })?;
        Ok(mapping)
    }

    /// Where it begins in this process.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Its length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that was reserved, and whoever showed it to KVM or the IOMMU owns this value.
        unsafe { libc::munmap(self.reserved.as_ptr(), self.reserved_length) };
    }
}

/// What `mmap` returned, or its error.
fn mapped(address: *mut libc::c_void) -> io::Result<NonNull<libc::c_void>> {
    match NonNull::new(address) {
        Some(address) if address.as_ptr() != libc::MAP_FAILED => Ok(address),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    fn file(length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file
    }

    #[test]
    fn a_mapping_is_aligned_to_its_size_up_to_1_gib() {
        for (length, alignment) in [(0x1000, 0x1000), (0x3000, 0x4000), (16 << 20, 16 << 20), (3 << 30, 1 << 30)] {
            let mapping = Mapping::new(file(length).as_fd(), 0, usize::try_from(length).unwrap()).unwrap();
            assert!(mapping.address().is_multiple_of(alignment), "{length:x}: {:x}", mapping.address());
            assert_eq!(mapping.length(), length);
        }
    }

    #[test]
    fn parts_of_pages_are_refused() {
        for (offset, length) in [(0, 0), (0, 100), (1, 4096), (u64::MAX, 4096), (0, usize::MAX - 4095)] {
            assert!(Mapping::new(file(8192).as_fd(), offset, length).is_err(), "{offset} {length}");
        }
    }
}
