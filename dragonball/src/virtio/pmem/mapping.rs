//! The mapping of a file for a persistent memory device.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use super::{ALIGNMENT, PmemMode};
use crate::memory::reservation::Reservation;

/// A file in the address space of this process, aligned for guest memory. Behind the file's end come zeroes.
#[derive(Debug)]
pub struct PmemMapping {
    reservation: Reservation,
    mode: PmemMode,
}

impl PmemMapping {
    /// Maps `length` bytes of `file`, rounded up to [`ALIGNMENT`].
    pub(super) fn new(file: &File, length: u64, mode: PmemMode) -> io::Result<Self> {
        let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
        let alignment = usize::try_from(ALIGNMENT).map_err(|_| too_long())?;
        let file_length = usize::try_from(length).map_err(|_| too_long())?;
        let length = file_length.checked_next_multiple_of(alignment).ok_or_else(too_long)?;

        let (protection, sharing) = match mode {
            PmemMode::ReadOnly => (libc::PROT_READ, libc::MAP_SHARED),
            PmemMode::CopyOnWrite => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE),
        };
        let reservation = Reservation::new(length, alignment, protection)?;
        reservation.place((file.as_fd(), 0), file_length, protection, sharing)?;
        Ok(Self { reservation, mode })
    }

    /// Where it begins in this process, a multiple of [`ALIGNMENT`].
    #[must_use]
    pub fn host_address(&self) -> NonNull<u8> {
        self.reservation.start()
    }

    /// Its length in bytes, a multiple of [`ALIGNMENT`].
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an empty file is refused")]
    pub fn len(&self) -> u64 {
        self.reservation.length()
    }

    /// Whether the guest must not write to it: the memory slot is then read-only too.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.mode == PmemMode::ReadOnly
    }
}
