//! Aligned addresses of this process that are kept for the mapping of a file, and given back as a whole.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};

/// A range of addresses. This process accesses nothing through it: what is placed there is for KVM and the IOMMU.
#[derive(Debug)]
pub(crate) struct Reservation {
    reserved: NonNull<libc::c_void>,
    reserved_length: usize,
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the range belongs to the process and not to a thread.
unsafe impl Send for Reservation {}
// SAFETY: nothing is accessed through it.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `length` bytes that begin at a multiple of `alignment`, a power of two, and that can be accessed as
    /// `protection` says: where nothing is placed, they read as zero.
    ///
    /// # Errors
    /// When the range is longer than there are addresses, or the host refuses.
    pub(crate) fn new(length: usize, alignment: usize, protection: libc::c_int) -> io::Result<Self> {
        let reserved_length = length.checked_add(alignment).ok_or(io::ErrorKind::InvalidInput)?;
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let reserved = unsafe { libc::mmap(null_mut(), reserved_length, protection, anonymous, -1, 0) };
        let reserved = mapped(reserved)?;
        let skip = reserved.cast::<u8>().as_ptr().align_offset(alignment);
        // SAFETY: `skip` is less than the alignment, by which the reservation is longer than `length`.
        let start = unsafe { reserved.cast::<u8>().add(skip) };
        Ok(Self { reserved, reserved_length, start, length })
    }

    /// Maps the first `length` bytes of the range to `file` from `offset` on; `sharing` is `MAP_SHARED`, or `MAP_PRIVATE`
    /// and what goes with it.
    ///
    /// # Errors
    /// When the range is shorter, or the host refuses.
    pub(crate) fn place(
        &self,
        (file, offset): (BorrowedFd<'_>, libc::off_t),
        length: usize,
        protection: libc::c_int,
        sharing: libc::c_int,
    ) -> io::Result<()> {
        if length > self.length {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = sharing | libc::MAP_FIXED;
        // SAFETY: the range lies in the reservation, which nothing else uses, and replaces a part of it.
        mapped(unsafe { libc::mmap(self.start.as_ptr().cast(), length, protection, flags, file.as_raw_fd(), offset) })?;
        Ok(())
    }

    /// Where the range begins in this process.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length as u64
    }
}

impl Drop for Reservation {
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
