//! The mapping of a file for a persistent memory device.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};

use super::{ALIGNMENT, PmemMode};

/// A file in the address space of this process, aligned for guest memory. Behind the file's end come zeroes.
#[derive(Debug)]
pub struct PmemMapping {
    /// The address space that was reserved, which is what is given back.
    reserved: NonNull<libc::c_void>,
    reserved_length: usize,
    start: NonNull<u8>,
    length: usize,
    mode: PmemMode,
}

// SAFETY: the mapping is plain memory that belongs to the process and not to a thread.
unsafe impl Send for PmemMapping {}

impl PmemMapping {
    /// Maps `length` bytes of `file`, rounded up to [`ALIGNMENT`].
    pub(super) fn new(file: &File, length: u64, mode: PmemMode) -> io::Result<Self> {
        let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
        let alignment = usize::try_from(ALIGNMENT).map_err(|_| too_long())?;
        let file_length = usize::try_from(length).map_err(|_| too_long())?;
        let length = file_length.checked_next_multiple_of(alignment).ok_or_else(too_long)?;
        let reserved_length = length.checked_add(alignment).ok_or_else(too_long)?;

        let (protection, sharing) = match mode {
            PmemMode::ReadOnly => (libc::PROT_READ, libc::MAP_SHARED),
            PmemMode::CopyOnWrite => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE),
        };
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let reserved = unsafe { libc::mmap(null_mut(), reserved_length, protection, anonymous, -1, 0) };
        let reserved = mapped(reserved)?;
        let skip = reserved.cast::<u8>().as_ptr().align_offset(alignment);
        // SAFETY: `skip` is less than the alignment, by which the reservation is longer than `length`.
        let start = unsafe { reserved.cast::<u8>().add(skip) };
        let mapping = Self { reserved, reserved_length, start, length, mode };

        let flags = sharing | libc::MAP_FIXED;
        // SAFETY: the range lies in the reservation, which nothing else uses, and replaces a part of it.
        let placed = unsafe { libc::mmap(start.as_ptr().cast(), file_length, protection, flags, file.as_raw_fd(), 0) };
        mapped(placed)?;
        Ok(mapping)
    }

    /// Where it begins in this process, a multiple of [`ALIGNMENT`].
    #[must_use]
    pub fn host_address(&self) -> NonNull<u8> {
        self.start
    }

    /// Its length in bytes, a multiple of [`ALIGNMENT`].
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an empty file is refused")]
    pub fn len(&self) -> u64 {
        self.length as u64
    }

    /// Whether the guest must not write to it: the memory slot is then read-only too.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.mode == PmemMode::ReadOnly
    }
}

impl Drop for PmemMapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that was reserved, and whoever put it into guest memory owns this value.
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
